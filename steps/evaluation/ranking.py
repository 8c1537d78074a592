"""Predictions for all held-out interactions, and their metrics."""

from typing import Any, Protocol

import torch

from kernels.jagged import offsets_from_lengths
from steps.data.sequences import Batch, Sequences, Size
from steps.data.split import HeldOut
from steps.evaluation.clicks import Predictions, click_values, named
from steps.evaluation.ranks import require_finite

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

    A target is predicted in a window that holds at least half of `max_len` interactions before it, or all there are;
    actions of the same user before the target are part of it, as they would be when serving.
    """

    def __init__(self, config: dict[str, Any], sequences: Sequences, held_out: HeldOut) -> None:
        max_len = config["training"]["max_len"]
        self.sequences, self.held_out, self.max_len = sequences, held_out, max_len
        users, num_after, of_window, place = _windows(sequences, held_out, max_len)
        at_once = config["training"]["batch"]
        if sequences.item.device.type == "cuda":
            at_once = max(at_once, _WINDOWS_AT_ONCE)
        lengths = sequences.window_lengths(users, num_after, max_len)
        starts = offsets_from_lengths(lengths)[:-1]
        self._batches = [
            (one, after, Size(int(sizes.sum()), int(sizes.max())))
            for one, after, sizes in zip(*(part.split(at_once) for part in (users, num_after, lengths)), strict=True)
        ]
        self._index = starts[of_window] + lengths[of_window] - 1 - place
        targets = sequences.offsets[held_out.users + 1] - 1 - held_out.num_after
        if sequences.rating is None:
            raise ValueError("ranking needs ratings, and the data set has none")
        self._label = (sequences.rating[targets] >= config["protocol"]["positive"]).long()

    def predictions(self, model: Predictor) -> Predictions:
        """A logit for every target, in the order of `held_out`."""
        model.eval()
        found = [
            model.predict(self.sequences.batch(users, num_after, self.max_len, size))
            for users, num_after, size in self._batches
        ]
        return Predictions(self.held_out.users, torch.cat(found)[self._index].float(), self._label)

    @torch.inference_mode()
    def __call__(self, model: Predictor) -> torch.Tensor:
        """Whether every logit was finite, and the metrics: float64 on the device."""
        predictions = self.predictions(model)
        finite = predictions.logit.isfinite().all()
        return torch.cat([finite.double()[None], click_values(predictions, self.sequences.num_users)])

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
    last = torch.full((sequences.num_users,), torch.iinfo(torch.int64).max, device=held_out.users.device)
    last = last.scatter_reduce(0, held_out.users, held_out.num_after, "amin")
    back = held_out.num_after - last[held_out.users]
    keys, of_window = torch.unique(
        held_out.users * (int(back.max()) // stride + 1) + back // stride, return_inverse=True
    )
    users = torch.zeros_like(keys).scatter_(0, of_window, held_out.users)
    first = torch.zeros_like(keys).scatter_(0, of_window, back // stride * stride)
    return users, last[users] + first, of_window, back - first[of_window]
