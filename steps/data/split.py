"""What is trained on, and what is held out for validation and test: the ways to split sequences.

Needs torch and numpy alone.
"""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kernels.jagged.naive import sequence_and_position
from steps.common.cli import StepError
from steps.common.config import task_of
from steps.data.sequences import Sequences

_GOLDEN = 2654435769  # 2**32 over the golden ratio


@dataclass(frozen=True)
class HeldOut:
    """Held-out interactions, the targets: of retrieval one a user, of ranking all of a period, or a user's last ones.

    users (K,) int64, and num_after (K,) int64: how many of the user's interactions follow the target. part: `test` or
    `valid`, what they are held out for.
    """

    users: torch.Tensor
    num_after: torch.Tensor
    part: str = "test"


@dataclass(frozen=True)
class Split:
    """What is trained on, and what is held out.

    num_held_out (U,) int64: how many of each user's last interactions are not trained on. held_out: the targets of
    `test`, and of `valid` where the protocol validates.
    """

    num_held_out: torch.Tensor
    held_out: dict[str, HeldOut]

    @property
    def eval_part(self) -> str:
        """The part that a model is evaluated on during training: `valid` where there is one, else `test`."""
        return "valid" if "valid" in self.held_out else "test"


def split_sequences(sequences: Sequences, protocol: dict[str, Any]) -> Split:
    """The split that a protocol of params/protocols.yaml describes; validation exists where `report` is `best`."""
    validation = protocol["report"] == "best"
    if protocol["split"] == "leave-last-out":
        return _leave_last_out(sequences, validation)
    shares = protocol["test_share"], protocol["valid_share"] if validation else 0.0
    if protocol["split"] == "users":
        return _of_users(sequences, *shares, protocol["targets"])
    return _temporal(sequences, *shares, every=task_of(protocol) == "ranking")


def require_split(sequences: Sequences, split: Split, config: dict[str, Any], run: Path) -> None:
    """Raise StepError unless a run's split is the one that plan wrote into its config.json."""
    found = split_sha256(sequences, split)
    if found != config["split"]:
        part = next(name for name in [*found, *config["split"]] if found.get(name) != config["split"].get(name))
        raise StepError(
            f"{run / 'config.json'}, key split.{part}: --data has other rows to hold out or to train on than plan saw; "
            "run plan again with the same --data, or name the data it was planned for"
        )


def split_sha256(sequences: Sequences, split: Split) -> dict[str, str]:
    """The SHA-256 of the interactions that are trained on (`train`) and held out (`test`, `valid`), in their order.

    Of (user, item, timestamp) as little-endian int64 columns. `steps.data.split_hash.split_sha256`, which plan calls,
    computes the same hashes from the protocol with code of its own, on purpose: a wrong split in one of the two shows
    as hashes that differ. What is changed here has to be changed there.
    """
    user, position = sequence_and_position(sequences.offsets, len(sequences.item))
    parts = {"train": torch.nonzero(position < (sequences.offsets.diff() - split.num_held_out)[user])[:, 0]}
    for name, held_out in split.held_out.items():
        parts[name] = sequences.offsets[held_out.users + 1] - 1 - held_out.num_after
    found = {}
    for name, index in parts.items():
        digest = hashlib.sha256()
        for column in (user, sequences.item, sequences.timestamp):
            digest.update(column[index].cpu().numpy().astype("<i8").data)
        found[name] = digest.hexdigest()
    return found


def _leave_last_out(sequences: Sequences, validation: bool) -> Split:
    """Per user: the last interaction is test, the second last validation, all before training."""
    users = torch.arange(sequences.num_users, device=sequences.item.device)
    held_out = {"test": HeldOut(users, torch.zeros_like(users))}
    if validation:
        held_out["valid"] = HeldOut(users, torch.ones_like(users), "valid")
    return Split(torch.full_like(users, 2 if validation else 1), held_out)


def _temporal(sequences: Sequences, test_share: float, valid_share: float, every: bool) -> Split:
    """One clock for all users, so that nothing of the future is trained on.

    The latest `test_share` of all interactions are the test period, the `valid_share` before them the validation
    period; all before both is trained on. A user's target is their last interaction in a period, if they have one
    there; `every`: all of theirs there. Interactions before a target are part of the history, those of the period too,
    as they would be when serving. A user's first interaction, which has no history, is no target.
    """
    times = sequences.timestamp.sort().values
    count = len(times)
    test_start = times[int(count * (1 - test_share))]
    train_end = times[int(count * (1 - test_share - valid_share))]
    after_train = _num_since(sequences, train_end)
    in_test = _num_since(sequences, test_start)
    lengths = sequences.offsets.diff()
    if every:
        held_out = {"test": _every(sequences, in_test, torch.zeros_like(in_test))}
        if valid_share:
            held_out["valid"] = _every(sequences, after_train, in_test)
        return Split(after_train, _none_empty(held_out))
    held_out = {"test": _held_out((in_test > 0) & (lengths > 1), torch.zeros_like(in_test))}
    if valid_share:
        held_out["valid"] = _held_out((after_train > in_test) & (lengths - in_test > 1), in_test)
    return Split(after_train, _none_empty(held_out))


def _of_users(sequences: Sequences, test_share: float, valid_share: float, targets: int) -> Split:
    """Other users than those that are trained on: of each the last `targets` interactions, but never the first.

    A hash of the user's number decides, so the same users are held out wherever the data are the same.
    """
    users = torch.arange(sequences.num_users, device=sequences.item.device)
    place = (users * _GOLDEN % 2**32).double() / 2**32
    tested = place < test_share
    validated = ~tested & (place < test_share + valid_share)
    lengths = sequences.offsets.diff()
    counts = (lengths - 1).clamp(min=0, max=targets)
    none = torch.zeros_like(counts)
    held_out = {"test": _every(sequences, torch.where(tested, counts, none), none)}
    if valid_share:
        held_out["valid"] = _every(sequences, torch.where(validated, counts, none), none)
    why = "no user with two rows is held out for {}, as there are too few users"
    return Split(torch.where(tested | validated, lengths, none), _none_empty(held_out, why))


_NO_PERIOD = "no user has a row in the {} period, as too few timestamps differ"


def _none_empty(held_out: dict[str, HeldOut], why: str = _NO_PERIOD) -> dict[str, HeldOut]:
    """The targets, with the names of their parts. Raises StepError if a part has none."""
    for name, targets in held_out.items():
        if not len(targets.users):
            raise StepError(
                f"{why.format(name)}; change {name}_share in params/protocols.yaml, or take another protocol"
            )
    return {name: replace(targets, part=name) for name, targets in held_out.items()}


def _every(sequences: Sequences, most_after: torch.Tensor, fewest_after: torch.Tensor) -> HeldOut:
    """All interactions, but a user's first, that fewer than `most_after` (U,) of the user's follow, and `fewest_after`
    (U,) or more: by user, then in order."""
    user, position = sequence_and_position(sequences.offsets, len(sequences.item))
    num_after = sequences.offsets.diff()[user] - 1 - position
    index = torch.nonzero((num_after < most_after[user]) & (num_after >= fewest_after[user]) & (position > 0))[:, 0]
    return HeldOut(user[index], num_after[index])


def _num_since(sequences: Sequences, time: torch.Tensor) -> torch.Tensor:
    """How many interactions each user has at `time` or later: (U,)."""
    user, _ = sequence_and_position(sequences.offsets, len(sequences.item))
    return torch.bincount(user[sequences.timestamp >= time], minlength=sequences.num_users)


def _held_out(has_target: torch.Tensor, num_after: torch.Tensor) -> HeldOut:
    """The targets of the users of whom `has_target` (U,) is true; num_after: (U,)."""
    users = torch.nonzero(has_target)[:, 0]
    return HeldOut(users, num_after[users])
