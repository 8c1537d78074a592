"""What is trained on, and what is asked at validation and test: the two ways to split sequences.

Needs torch and numpy alone.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kernels.jagged.naive import sequence_and_position
from steps.common.cli import StepError
from steps.data.sequences import Sequences


@dataclass(frozen=True)
class Questions:
    """Users (K,) int64 whose rows are held out, and drop (K,) int64: how many rows follow the held-out one."""

    users: torch.Tensor
    drop: torch.Tensor


@dataclass(frozen=True)
class Holdout:
    """A split. train_drop (U,) int64: how many of each user's last rows are not trained on."""

    train_drop: torch.Tensor
    questions: dict[str, Questions]

    @property
    def watched(self) -> str:
        """The questions asked after every epoch: validation where there is one, else test."""
        return "valid" if "valid" in self.questions else "test"


def hold_out(sequences: Sequences, protocol: dict[str, Any]) -> Holdout:
    """The split that a protocol of params/protocols.yaml describes; validation exists where `report` is `best`."""
    validation = protocol["report"] == "best"
    if protocol["split"] == "temporal":
        return _temporal(sequences, protocol["test_share"], protocol["valid_share"] if validation else 0.0)
    return _leave_last_out(sequences, validation)


def require_split(sequences: Sequences, holdout: Holdout, config: dict[str, Any], run: Path) -> None:
    """Raise StepError unless a run's holdout is the split that plan wrote into its config.json."""
    found = split_sha256(sequences, holdout)
    if found != config["split"]:
        part = next(name for name in [*found, *config["split"]] if found.get(name) != config["split"].get(name))
        raise StepError(
            f"{run / 'config.json'}, key split.{part}: --data has other rows to hold out or to train on than plan saw; "
            "run plan again with the same --data, or name the data it was planned for"
        )


def split_sha256(sequences: Sequences, holdout: Holdout) -> dict[str, str]:
    """The SHA-256 of the rows that are trained on (`train`) and asked for (`test`, `valid`), in the sequences' order.

    Of (user, item, timestamp) as little-endian int64 columns.
    """
    user, place = sequence_and_position(sequences.offsets, len(sequences.item))
    rows = {"train": torch.nonzero(place < (sequences.offsets.diff() - holdout.train_drop)[user])[:, 0]}
    for split, questions in holdout.questions.items():
        rows[split] = sequences.offsets[questions.users + 1] - 1 - questions.drop
    found = {}
    for name, index in rows.items():
        digest = hashlib.sha256()
        for column in (user, sequences.item, sequences.timestamp):
            digest.update(column[index].cpu().numpy().astype("<i8").data)
        found[name] = digest.hexdigest()
    return found


def _leave_last_out(sequences: Sequences, validation: bool) -> Holdout:
    """Per user: the last row is test, the second last validation, all before training."""
    users = torch.arange(sequences.num_users, device=sequences.item.device)
    questions = {"test": Questions(users, torch.zeros_like(users))}
    if validation:
        questions["valid"] = Questions(users, torch.ones_like(users))
    return Holdout(torch.full_like(users, 2 if validation else 1), questions)


def _temporal(sequences: Sequences, test_share: float, valid_share: float) -> Holdout:
    """One clock for all users, so that nothing of the future is trained on.

    The latest `test_share` of all rows are the test period, the `valid_share` before them the validation
    period, all before both is trained on. A user is asked for the last row of a period in which they have
    one; rows of the period before it are part of the history, as they would be when serving.
    """
    times = sequences.timestamp.sort().values
    count = len(times)
    test_start = times[int(count * (1 - test_share))]
    train_end = times[int(count * (1 - test_share - valid_share))]
    after_train = _rows_from(sequences, train_end)
    in_test = _rows_from(sequences, test_start)
    lengths = sequences.offsets.diff()
    questions = {"test": _asked((in_test > 0) & (lengths > 1), torch.zeros_like(in_test))}
    if valid_share:
        questions["valid"] = _asked((after_train > in_test) & (lengths - in_test > 1), in_test)
    for split, asked in questions.items():
        if not len(asked.users):
            raise StepError(
                f"no user has a row in the {split} period, as too few timestamps differ; change {split}_share in "
                "params/protocols.yaml, or take another protocol"
            )
    return Holdout(after_train, questions)


def _rows_from(sequences: Sequences, time: torch.Tensor) -> torch.Tensor:
    """How many rows of each user are at `time` or later: (U,)."""
    row, _ = sequence_and_position(sequences.offsets, len(sequences.item))
    return torch.bincount(row[sequences.timestamp >= time], minlength=sequences.num_users)


def _asked(mask: torch.Tensor, drop: torch.Tensor) -> Questions:
    users = torch.nonzero(mask)[:, 0]
    return Questions(users, drop[users])
