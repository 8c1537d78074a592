"""The epochs of a training: their random numbers, validation, the best epoch, states to resume from, and the end.

The random numbers of an epoch follow from the seed and the epoch's number, those of a static step from its own number
too. A training that is resumed, or shares a GPU with others, therefore ends with the weights of an uninterrupted one
alone: with the same bytes on CUDA in deterministic mode, otherwise up to the order of additions.
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
from steps.data.split import split_sequences
from steps.evaluation.metrics import SELECTION_METRIC
from steps.models import SequenceModel, build
from steps.models.checkpoint import StateError, load_state, read_state
from steps.training.states import StateWriter
from steps.training.steps import StaticSteps, bucket_size
from steps.training.stream import RunStream
from steps.training.validation import Validation

SEED_STRIDE = 1_000_003  # so that no two pairs (seed, epoch) have the same random numbers
_STEP_STRIDE = 2**20  # likewise for steps, of which an epoch has fewer
_COMPILE_FROM_STEPS = 20_000  # compiling takes half a minute, which a shorter training does not win back


class Training:
    """One run in training. `history` has a dict per finished epoch.

    compute_dtype: the type of the matrix products; None: the weights' own. static: whether steps have static shapes,
    padded to `bucket`s of tokens; by default on CUDA, where they are captured as CUDA graphs too unless `capture` is
    false. compiled: whether torch.compile fuses static steps; by default on CUDA in a long training.
    """

    def __init__(
        self,
        config: dict[str, Any],
        sequences: Sequences,
        data_sha256: str,
        run: Path,
        compute_dtype: torch.dtype | None = None,
        static: bool | None = None,
        capture: bool = True,
        compiled: bool | None = None,
        title: str = "",
    ) -> None:
        self.config, self.sequences = config, sequences
        self.device = sequences.item.device
        self.title = title
        self.split = split_sequences(sequences, config["protocol"])
        self.stream = RunStream(self.device)
        with self.stream.active():
            num_held_out = self.split.num_held_out
            users = sequences.trainable_users(num_held_out)
            if not len(users):
                raise StepError("no user has two interactions besides those held out: nothing to train on")
            self._users = users.cpu()
            all_users = torch.arange(sequences.num_users, device=self.device)
            self._lengths = sequences.window_lengths(all_users, num_held_out, config["training"]["max_len"]).cpu()
            self._options = compute_dtype, static, capture, compiled
            self._build()
            self._resume(run / "resume" / "state.safetensors", data_sha256)

    def _build(self) -> None:
        """Make the untrained model, its optimiser, its static steps and its validation."""
        compute_dtype, static, capture, compiled = self._options
        torch.manual_seed(self.config["seed"] * SEED_STRIDE)
        model = build(self.config, self.sequences.num_items).to(self.device)
        if not isinstance(model, SequenceModel):
            raise TypeError(f"{type(model).__name__} is fitted, not trained")
        self.model = model
        self.model.compute_dtype = compute_dtype if model.supports_low_precision else None
        self.optimizer = model.optimizer()
        on_cuda = self.device.type == "cuda"
        self.static: StaticSteps | None = None
        if on_cuda if static is None else static:
            capture = capture and on_cuda
            compiled = on_cuda and self._compiling_pays() if compiled is None else compiled
            num_held_out = self.split.num_held_out
            self.static = StaticSteps(
                model, self.optimizer, self.sequences, num_held_out, self.stream, capture, compiled
            )
        self._validation = Validation(model, self.config, self.sequences, self.split)
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, torch.Tensor] = {}

    def _compiling_pays(self) -> bool:
        """Whether compiling pays. Never in deterministic mode: the compiled code depends on the sizes it sees first."""
        if torch.are_deterministic_algorithms_enabled():
            return False
        training = self.config["training"]
        by_event = int(self._lengths.sum()) // training["batch"]
        steps = self.model.num_steps(len(self._users), training["batch"]) or by_event
        return steps * training["epochs"] >= _COMPILE_FROM_STEPS

    def _resume(self, path: Path, data_sha256: str) -> None:
        compiled = self.static and self.static.compiled
        self._identity = content_sha256([self.config, data_sha256, str(self.model.compute_dtype), compiled])
        self._states = StateWriter(path, self.device)
        self.commits, self.threads = [commit()], [torch.get_num_threads()]
        self._start_message = ""
        try:
            state = read_state(path, self._identity)
            if state is None:
                return
            self.best = load_state(state, self.model, self.optimizer)
        except StateError as error:
            self._build()  # again, as the model may hold a part of the state
            self._start_message = f"{path} {' '.join(str(error).split())}; training starts at epoch 1"
            return
        self.history = state.progress["history"]
        self.commits = list(dict.fromkeys([*state.progress["commits"], *self.commits]))
        self.threads = list(dict.fromkeys([*state.progress["threads"], *self.threads]))
        self._start_message = f"resuming after epoch {self.done} from {path}"

    @property
    def done(self) -> int:
        """How many epochs are done."""
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

        After every `eval_every` epochs, and after the last, the model is evaluated and the history gets a line.
        """
        epochs, every = self.config["training"]["epochs"], self.config["training"].get("eval_every", 1)
        if self._start_message:
            print(self.title + self._start_message, flush=True)
        while not self.finished:
            start = time.perf_counter()
            num_steps = 0
            self._total = self.static.total.zero_() if self.static else torch.zeros((), device=self.device)
            for epoch in range(self.done + 1, min(self.done + every, epochs) + 1):
                title = f"{self.title}epoch {epoch}/{epochs}"
                for queued in self._epoch(epoch, title):
                    num_steps += queued
                    yield
            loss = float(self._total) / num_steps  # the one wait for the device
            if loss != loss:
                raise StepError(f"the loss is not a number in {title}: training diverged; lower the learning rate")
            seconds = time.perf_counter() - start
            line = {
                "epoch": epoch,
                "train/loss": round(loss, 6),
                "train/steps": num_steps,
                "train/seconds": round(seconds, 3),
            }
            if self.device.type == "cuda":  # of all runs that share the device
                line["train/peak_bytes"] = torch.cuda.max_memory_allocated(self.device)
            with self._uncompiled():
                line |= self._validation(self.stream if self.static and self.static.capture else None)
            self.history.append(line)
            print(self.title + summary(line, epochs), flush=True)
            if self.config["protocol"]["report"] == "best" and line == max(self.history, key=_selection):
                self.best = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
            state: dict[str, Any] = {"identity": self._identity, "history": self.history}
            state |= {"commits": self.commits, "threads": self.threads}
            self._states.save(self.model, self.optimizer, self.best, state, self.finished)
        if self.best:
            self.model.load_state_dict(self.best)
        self._states.finish()
        self.stream.wait()

    def _uncompiled(self) -> AbstractContextManager[Any]:
        """Within it blocks run uncompiled, as an evaluation needs: they are compiled for training."""
        if self.static is None or not self.static.compiled:
            return nullcontext()
        return torch.compiler.set_stance("force_eager")

    def _epoch(self, epoch: int, title: str) -> Iterator[int]:
        """One pass over the users in random order, one window each. Adds the losses to the total.

        Yields whenever steps are queued: how many.
        """
        self.model.train()
        training = self.config["training"]
        max_len, batch_size, num_held_out = training["max_len"], training["batch"], self.split.num_held_out
        seed = self.config["seed"] * SEED_STRIDE + epoch
        torch.manual_seed(seed)
        order = self._users[torch.randperm(len(self._users))]
        if self.static is not None:
            bucket = bucket_size(batch_size, max_len)
            steps = self.model.static_steps(self._lengths, order, max_len, batch_size, bucket)
            for step, (shape, inputs) in enumerate(progress(steps, desc=title, unit="step")):
                self.static(shape, inputs, seed * _STEP_STRIDE + step)
                yield len(self.model.micro_steps(shape, inputs))
            return
        losses = self.model.losses(self.sequences, order.to(self.device), num_held_out, max_len, batch_size)
        for loss in progress(losses, total=self.model.num_steps(len(order), batch_size), desc=title, unit="step"):
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            self._total += loss.detach()
            yield 1

    def abandon(self) -> None:
        """Wait for the state that is being written, and ignore an error of its writing."""
        with suppress(Exception):
            self._states.finish()

    def record(self) -> dict[str, Any]:
        """How the training went, for training.json: times, bytes, and how its steps ran."""
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
    """Train all, in turns of a step; yields the index of each training that ends, and its error if it failed."""
    running = {index: training.epochs() for index, training in enumerate(trainings)}
    while running:
        for index, steps in list(running.items()):
            error: Exception | None = None
            with trainings[index].stream.active():
                try:
                    next(steps)
                    continue
                except StopIteration:
                    pass
                except Exception as failure:  # of one run; the others continue
                    error = failure
                    trainings[index].abandon()
            del running[index]
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
    return line[f"valid/{SELECTION_METRIC}"]
