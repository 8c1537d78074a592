"""Predictions for all held-out interactions, and their metrics."""

from collections.abc import Iterator
from typing import Any, Protocol

import torch

from kernels.jagged import offsets_from_lengths
from steps.common.cli import StepError
from steps.common.processes import ALONE, Processes
from steps.data.sequences import Batch, Sequences, Size
from steps.data.split import HeldOut
from steps.evaluation.engagements import Predictions, engagement_values, named
from steps.evaluation.exact_ranks import require_finite

#: The largest batch on a GPU, in windows.
_WINDOWS_AT_ONCE = 512


class Predictor(Protocol):
    """What is evaluated: a module that says how likely each token's next interaction is an engagement."""

    def eval(self) -> Any:
        """Leave training mode."""

    def predict(self, batch: Batch) -> torch.Tensor:
        """Logits (T,)."""
        ...


class RankingEvaluation:
    """Evaluates models on the same held-out interactions, as often as it is called, without waiting for the device.

    Where the protocol splits by time, a target is predicted in a window that holds at least half of `max_len`
    interactions before it, or all there are; actions of the same user before the target are part of it, as they would
    be when serving. Where it splits by users, a user's targets are candidates of one request, at the time of the last
    interaction before them: each is predicted in a window of its own, which has none of the others.
    """

    def __init__(
        self, config: dict[str, Any], sequences: Sequences, held_out: HeldOut, processes: Processes = ALONE
    ) -> None:
        """Raises StepError if the labels leave nothing to rank, or if there are no ratings.

        processes: they take the batches in turn, and each gets all predictions.
        """
        max_len = config["training"]["max_len"]
        self.sequences, self.held_out, self.max_len, self.processes = sequences, held_out, max_len, processes
        targets = sequences.offsets[held_out.users + 1] - 1 - held_out.num_after
        if sequences.rating is None:
            raise StepError("ranking predicts ratings, and the data set has none: take another data set")
        self._label = (sequences.rating[targets] >= config["protocol"]["positive"]).long()
        self._require_both_labels()
        self._asked: tuple[torch.Tensor, ...] | None = None
        if config["protocol"]["split"] == "users":
            users, num_after = held_out.users, _num_after(sequences, held_out, "amax")[held_out.users]
        else:
            users, num_after, of_window, place = _windows(sequences, held_out, max_len)
        lengths = sequences.window_lengths(users, num_after, max_len)
        ends = offsets_from_lengths(lengths)[1:] - 1
        at_once = config["training"]["batch"]
        if sequences.item.device.type == "cuda":
            at_once = max(at_once, _WINDOWS_AT_ONCE)
        self._batches = [
            (one, after, Size(int(sizes.sum()), int(sizes.max())))
            for one, after, sizes in zip(*(part.split(at_once) for part in (users, num_after, lengths)), strict=True)
        ]
        if config["protocol"]["split"] == "users":
            self._index, self._asked = ends, targets.split(at_once)
        else:
            self._index = ends[of_window] - place

    def predictions(self, model: Predictor) -> Predictions:
        """A logit for every target, in the order of `held_out`."""
        model.eval()
        found = torch.cat(list(self._logits(model)))
        self.processes.sum_(found)
        return Predictions(self.held_out.users, found[self._index].float(), self._label)

    @torch.inference_mode()
    def __call__(self, model: Predictor) -> torch.Tensor:
        """Whether every logit was finite, and the metrics: float64 on the device."""
        predictions = self.predictions(model)
        finite = predictions.logit.isfinite().all()
        return torch.cat([finite.double()[None], engagement_values(predictions, self.sequences.num_users)])

    def _logits(self, model: Predictor) -> Iterator[torch.Tensor]:
        """The logits (T,) of every batch; zeros of those that another process takes."""
        for number, (users, num_after, size) in enumerate(self._batches):
            if number % self.processes.size != self.processes.rank:
                yield torch.zeros(size.num_tokens, device=users.device)
                continue
            batch = self.sequences.batch(users, num_after, self.max_len, size)
            yield model.predict(batch if self._asked is None else batch.asked(self._asked[number]))

    def _require_both_labels(self) -> None:
        users, label = self.held_out.users, self._label
        positive = torch.bincount(users[label == 1], minlength=self.sequences.num_users)
        negative = torch.bincount(users[label == 0], minlength=self.sequences.num_users)
        if not bool(((positive > 0) & (negative > 0)).any()):
            raise StepError(
                f"no user has interactions of both labels in the {self.held_out.part} split, so nothing can be ranked: "
                f"take another `positive` in params/protocols.yaml, a larger {self.held_out.part}_share, or another "
                "data set"
            )

    def named(self, result: torch.Tensor) -> dict[str, float]:
        """The metrics by name. Waits for the device. Raises StepError if a logit is not finite."""
        finite, *values = result.tolist()
        require_finite(bool(finite))
        return named(values)


def _windows(
    sequences: Sequences, held_out: HeldOut, max_len: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The windows that the targets are predicted in, from a user's last target backwards, of half `max_len` targets at
    most.

    Returns users (W,) and num_after (W,) of the windows' last targets; of every target its window (K,), and how many
    of the window's tokens follow the one that predicts it (K,).
    """
    stride = max(1, (max_len + 1) // 2)
    last = _num_after(sequences, held_out, "amin")
    back = held_out.num_after - last[held_out.users]
    keys, of_window = torch.unique(
        held_out.users * (int(back.max()) // stride + 1) + back // stride, return_inverse=True
    )
    users = torch.zeros_like(keys).scatter_(0, of_window, held_out.users)
    first = torch.zeros_like(keys).scatter_(0, of_window, back // stride * stride)
    return users, last[users] + first, of_window, back - first[of_window]


def _num_after(sequences: Sequences, held_out: HeldOut, which: str) -> torch.Tensor:
    """How many interactions of each user (U,) follow the last target (`amin`), or the first (`amax`); 0 of others."""
    none = torch.zeros(sequences.num_users, dtype=torch.int64, device=held_out.users.device)
    return none.scatter_reduce(0, held_out.users, held_out.num_after, which, include_self=False)
