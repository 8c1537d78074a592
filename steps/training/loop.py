"""The epochs of a training: what is drawn, watched, selected, kept, and when it ends.

Every epoch draws its randomness from the seed and the epoch's number, on CUDA every step, so that a training which
goes on from a state, or beside others on one GPU, ends where it would have ended alone: on CUDA to the bit in
deterministic mode, otherwise but for the order of additions.
"""

import statistics
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch

from steps.common.cli import StepError
from steps.common.progress import progress
from steps.common.provenance import commit, content_sha256
from steps.data.sequences import Sequences
from steps.data.split import hold_out
from steps.evaluation.metrics import SELECTED_BY
from steps.models import SequenceModel, build
from steps.models.checkpoint import StateError, load_state, read_state
from steps.training.device import Place
from steps.training.states import StateWriter
from steps.training.steps import StaticSteps, bucket_size
from steps.training.watching import Watch

SEEDS_APART = 1_000_003  # so that no (seed, epoch) shares its random numbers with another
_STEPS_APART = 2**20  # likewise for steps, of which an epoch has fewer
_COMPILED_FROM = 20_000  # steps, as compiling takes half a minute, which shorter trainings do not win back


class Training:
    """One run in training. `history` has a dict per finished epoch.

    static: whether steps have static shapes, padded to `bucket`s of tokens; as on CUDA, where they are captured too.
    compiled: whether torch.compile fuses static steps; on CUDA where a training is long.
    """

    def __init__(
        self,
        config: dict[str, Any],
        sequences: Sequences,
        data_sha256: str,
        run: Path,
        compute: torch.dtype | None = None,
        static: bool | None = None,
        capture: bool = True,
        compiled: bool | None = None,
        title: str = "",
    ) -> None:
        self.config, self.sequences = config, sequences
        self.device = sequences.item.device
        self.title = title
        self.holdout = hold_out(sequences, config["protocol"])
        self.place = Place(self.device)
        with self.place.entered():
            drop = self.holdout.train_drop
            users = sequences.trainable_users(drop)
            if not len(users):
                raise StepError("no user has two interactions besides those held out: nothing to train on")
            self._users = users.cpu()
            every = torch.arange(sequences.num_users, device=self.device)
            self._lengths = sequences.window_lengths(every, drop, config["training"]["max_len"]).cpu()
            self._how = compute, static, capture, compiled
            self._build()
            self._resume(run / "resume" / "state.safetensors", data_sha256)

    def _build(self) -> None:
        """The untrained model, its optimiser, and what trains and watches it."""
        compute, static, capture, compiled = self._how
        torch.manual_seed(self.config["seed"] * SEEDS_APART)
        model = build(self.config, self.sequences.num_items).to(self.device)
        if not isinstance(model, SequenceModel):
            raise TypeError(f"{type(model).__name__} is fitted, not trained")
        self.model = model
        self.model.compute = compute if model.takes_low_precision else None
        self.optimizer = model.optimizer()
        on_cuda = self.device.type == "cuda"
        self.static: StaticSteps | None = None
        if on_cuda if static is None else static:
            capture, compiled = capture and on_cuda, on_cuda and self._gains() if compiled is None else compiled
            drop = self.holdout.train_drop
            self.static = StaticSteps(model, self.optimizer, self.sequences, drop, self.place, capture, compiled)
        self._watch = Watch(model, self.config, self.sequences, self.holdout)
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, torch.Tensor] = {}

    def _gains(self) -> bool:
        """Whether compiling pays; never in deterministic mode, as what it makes follows the sizes it sees first."""
        if torch.are_deterministic_algorithms_enabled():
            return False
        training = self.config["training"]
        by_event = int(self._lengths.sum()) // training["batch"]
        steps = self.model.steps(len(self._users), training["batch"]) or by_event
        return steps * training["epochs"] >= _COMPILED_FROM

    def _resume(self, path: Path, data_sha256: str) -> None:
        compiled = self.static and self.static.compiled
        self._identity = content_sha256([self.config, data_sha256, str(self.model.compute), compiled])
        self._states = StateWriter(path, self.device)
        self.commits, self.threads = [commit()], [torch.get_num_threads()]
        self._begins = ""
        try:
            state = read_state(path, self._identity)
            if state is None:
                return
            self.best = load_state(state, self.model, self.optimizer)
        except StateError as error:
            self._build()  # again, as it may hold a part of the state
            self._begins = f"{path} {' '.join(str(error).split())}; training starts at epoch 1"
            return
        self.history = state.progress["history"]
        self.commits = list(dict.fromkeys([*state.progress["commits"], *self.commits]))
        self.threads = list(dict.fromkeys([*state.progress["threads"], *self.threads]))
        self._begins = f"resuming after epoch {self.done} from {path}"

    @property
    def done(self) -> int:
        """How many epochs are."""
        return self.history[-1]["epoch"] if self.history else 0

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or validation has not improved for `patience` of them."""
        training = self.config["training"]
        patience = training.get("patience")
        if self.history and patience and self.config["protocol"]["report"] == "best":
            return self.done >= training["epochs"] or self.done - reported_epoch(self.config, self.history) >= patience
        return self.done >= training["epochs"]

    def epochs(self) -> Iterator[None]:
        """Train; yields whenever steps are queued, so that other runs can queue theirs.

        The model is watched, and a line of the history written, after every `watch_every` epochs and after the last.
        """
        epochs, every = self.config["training"]["epochs"], self.config["training"].get("watch_every", 1)
        if self._begins:
            print(self.title + self._begins, flush=True)
        while not self.finished:
            start = time.perf_counter()
            taken = 0
            self._total = self.static.total.zero_() if self.static else torch.zeros((), device=self.device)
            for epoch in range(self.done + 1, min(self.done + every, epochs) + 1):
                title = f"{self.title}epoch {epoch}/{epochs}"
                for queued in self._epoch(epoch, title):
                    taken += queued
                    yield
            loss = float(self._total) / taken  # the one wait for the device
            if loss != loss:
                raise StepError(f"the loss is not a number in {title}: training diverged; lower the learning rate")
            seconds = time.perf_counter() - start
            line = {
                "epoch": epoch,
                "train/loss": round(loss, 6),
                "train/steps": taken,
                "train/seconds": round(seconds, 3),
            }
            if self.device.type == "cuda":  # of all runs at once, as memory is one
                line["train/peak_bytes"] = torch.cuda.max_memory_allocated(self.device)
            with self._uncompiled():
                line |= self._watch(self.place if self.static and self.static.capture else None)
            self.history.append(line)
            print(self.title + summary(line, epochs), flush=True)
            if self.config["protocol"]["report"] == "best" and line == max(self.history, key=_selection):
                self.best = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
            state: dict[str, Any] = {"identity": self._identity, "history": self.history}
            state |= {"commits": self.commits, "threads": self.threads}
            self._states.offer(self.model, self.optimizer, self.best, state, self.finished)
        if self.best:
            self.model.load_state_dict(self.best)
        self._states.finish()
        self.place.wait()

    def _uncompiled(self) -> AbstractContextManager[Any]:
        """Evaluation runs the blocks as they are: compiled they are for training."""
        if self.static is None or not self.static.compiled:
            return nullcontext()
        return torch.compiler.set_stance("force_eager")

    def _epoch(self, epoch: int, title: str) -> Iterator[int]:
        """One pass over the users in random order, one window each; yields how many steps were taken, every time some
        are queued. Adds their losses to the total."""
        self.model.train()
        training = self.config["training"]
        max_len, batch_size, drop = training["max_len"], training["batch"], self.holdout.train_drop
        seed = self.config["seed"] * SEEDS_APART + epoch
        torch.manual_seed(seed)
        order = self._users[torch.randperm(len(self._users))]
        if self.static is not None:
            bucket = bucket_size(batch_size, max_len)
            steps = self.model.static_steps(self._lengths, order, max_len, batch_size, bucket)
            for step, (layout, given) in enumerate(progress(steps, desc=title, unit="step")):
                self.static(layout, given, seed * _STEPS_APART + step)
                yield len(self.model.parts(layout, given))
            return
        losses = self.model.losses(self.sequences, order.to(self.device), drop, max_len, batch_size)
        for loss in progress(losses, total=self.model.steps(len(order), batch_size), desc=title, unit="step"):
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            self._total += loss.detach()
            yield 1

    def give_up(self) -> None:
        """Wait for the state that is being written, whatever becomes of it."""
        with suppress(Exception):
            self._states.finish()

    def record(self) -> dict[str, Any]:
        """How the training went: what it took, and how."""
        step = statistics.median(line["train/seconds"] / line["train/steps"] for line in self.history)
        return {
            "step_ms": round(1000 * step, 3),
            "steps_per_second": round(1 / step, 1) if step else None,
            "item_bytes_per_float": round(self.model.item_bytes(self.optimizer), 3),
            "captured": self.static is not None and self.static.capture,
            "compiled": self.static is not None and self.static.compiled,
            "commit": "+".join(self.commits),
            "threads": "+".join(map(str, self.threads)),
            "stopped_early": self.done if self.done < self.config["training"]["epochs"] else None,
        }


def train_together(trainings: list[Training]) -> Iterator[tuple[int, Exception | None]]:
    """Train all, taking turns at every step; yields the place of each that ends, and why it failed, if it did."""
    going = {index: training.epochs() for index, training in enumerate(trainings)}
    while going:
        for index, steps in list(going.items()):
            error: Exception | None = None
            with trainings[index].place.entered():
                try:
                    next(steps)
                    continue
                except StopIteration:
                    pass
                except Exception as failure:  # of one run, which ends no other
                    error = failure
                    trainings[index].give_up()
            del going[index]
            yield index, error


def reported_epoch(config: dict[str, Any], history: list[dict[str, Any]]) -> int:
    """The epoch whose weights the protocol reports: the last, or the first with the best validation NDCG@10."""
    return (history[-1] if config["protocol"]["report"] == "last" else max(history, key=_selection))["epoch"]


def summary(line: dict[str, Any], epochs: int) -> str:
    """An epoch in one line."""
    split = "valid" if "valid/hr@10" in line else "test"
    return (
        f"epoch {line['epoch']}/{epochs}  loss {line['train/loss']:.4f}  {split} "
        f"hr@10 {line[f'{split}/hr@10']:.4f}  ndcg@10 {line[f'{split}/ndcg@10']:.4f}  "
        f"{line['train/seconds']:.1f} s + {line[f'{split}/seconds']:.1f} s"
    )


def _selection(line: dict[str, Any]) -> float:
    return line[f"valid/{SELECTED_BY}"]
