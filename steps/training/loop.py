"""The epochs of a training: their random numbers, validation, the best epoch, states to resume from, and the end.

The random numbers of an epoch follow from the seed and the epoch's number, those of a static step from its own number
too. A training that is resumed, or shares a GPU with others, therefore ends with the weights of an uninterrupted one
alone: with the same bytes in deterministic mode (on a CPU of as many threads), otherwise up to the order of additions.
"""

import statistics
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch

from steps.common.cli import StepError
from steps.common.config import TrainingConfig, task_of
from steps.common.device import resident_peak_bytes
from steps.common.processes import ALONE, Processes
from steps.common.progress import progress
from steps.common.provenance import commit, content_sha256, utc_now
from steps.common.typed import read
from steps.data.fields import FieldSizes
from steps.data.sequences import Sequences
from steps.data.split import split_sequences
from steps.evaluation.names import SELECTIONS, SHOWN
from steps.models.large_table import blocks_of, load_own
from steps.tasks import EVALUATIONS, Task, build
from steps.training.checkpoint import State, StateError, StateWriter, blocks_of_state, load_state, read_state
from steps.training.distributed import PartOfWindows, SharedExecution, require_divisible
from steps.training.execution import Execution, Mode
from steps.training.optimizers import make_optimizer
from steps.training.schedule import make_schedule
from steps.training.stream import RunStream
from steps.training.validation import Validation

SEED_STRIDE = 1_000_003  # so that no two pairs (seed, epoch) have the same random numbers
_STEP_STRIDE = 2**20  # likewise for steps, of which an epoch has fewer
_PAUSE_S = 1e-4  # between looks at the device, where no run has steps to queue
_COMPILE_FROM_STEPS = 20_000  # compiling takes half a minute, which a shorter training does not win back

_EARLY, _LATE = 0.05, 0.95  # shares of the schedule in which a best epoch is suspicious
_SHORTEST_DOUBTED = 20  # epochs


class Training:
    """One run in training. `history` has a dict per finished epoch.

    compute_dtype: the type of the matrix products; None: the weights' own. mode: how steps run; None: eager on a CPU,
    on CUDA as graphs, and compiled too in a long training. processes: those that train it together, never compiled.
    """

    def __init__(
        self,
        config: dict[str, Any],
        sequences: Sequences,
        data_sha256: str,
        run: Path,
        compute_dtype: torch.dtype | None = None,
        mode: Mode | None = None,
        title: str = "",
        processes: Processes = ALONE,
    ) -> None:
        self.config, self.sequences = config, sequences
        self.settings = read(TrainingConfig, config["training"], "training.")
        self.device = sequences.item.device
        self.title, self.processes = title, processes
        self.split = split_sequences(sequences, config["protocol"])
        self.stream = RunStream(self.device)
        with self.stream.active():
            self._options = compute_dtype, mode
            self._build()
            self._resume(run / "resume" / "state.safetensors", data_sha256)

    def _build(self) -> None:
        """Make the untrained model, its optimiser, its schedule and execution, and its validation."""
        compute_dtype, mode = self._options
        torch.manual_seed(self.config["seed"] * SEED_STRIDE)
        sharded = self.processes.size > 1
        model = build(self.config, self.sequences.num_items, FieldSizes.of(self.sequences), sharded)
        if not isinstance(model, Task):
            raise TypeError(f"{type(model).__name__} is fitted, not trained")
        self.model = model.to(self.device)
        model.encoder.compute_dtype = compute_dtype if model.encoder.supports_low_precision else None
        model.prepare(self.sequences, self.split.num_held_out)
        self.optimizer = make_optimizer(model)
        self.schedule = make_schedule(model.schedules, self.settings, self.sequences, self.split.num_held_out)
        self.execution = self._execution(mode)
        part = self.split.eval_part
        evaluate = EVALUATIONS[task_of(self.config["protocol"])]
        evaluation = evaluate(self.config, self.sequences, self.split.held_out[part], self.processes)
        self._validation = Validation(model, evaluation, part)
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, torch.Tensor] = {}

    def _execution(self, mode: Mode | None) -> Execution:
        """How steps run; of several processes each takes its part of the schedule."""
        if self.processes.size == 1:
            return Execution(self.model, self.optimizer, self.schedule, self.stream, mode or self._best_mode())
        whole = require_divisible(self.model, self.schedule)
        self.schedule = part = PartOfWindows(whole, self.processes)
        captured = self.device.type == "cuda" and mode != "eager"
        shared: Mode = "graph" if captured else "eager"
        return SharedExecution(self.model, self.optimizer, part, self.stream, self.processes, shared)

    def _best_mode(self) -> Mode:
        """The fastest mode. Not `compiled` in deterministic mode: such code depends on the sizes it sees first."""
        if self.device.type != "cuda":
            return "eager"
        long = self.schedule.num_updates * self.settings.epochs >= _COMPILE_FROM_STEPS
        return "compiled" if long and not torch.are_deterministic_algorithms_enabled() else "graph"

    def _resume(self, path: Path, data_sha256: str) -> None:
        # Compiled or not as one process would be: several, which are not, go on from its state, and it from theirs.
        how = str(self.model.encoder.compute_dtype), (self._options[1] or self._best_mode()) == "compiled"
        self._identity = content_sha256([self.config, data_sha256, *how])
        self._states = StateWriter(path, self.device)
        self.commits, self.threads = [commit()], [torch.get_num_threads()]
        self.started: str | None = None
        self._start_message = ""
        state, damage = None, ""
        try:
            state = read_state(path, self._identity, blocks_of_state(self.model))
            if state is not None:
                self.best = load_state(state, self.model, self.optimizer)
        except StateError as error:
            damage = " ".join(str(error).split())
        if self.processes.size > 1:
            self._require_one_state(path, state, damage)
        if damage:
            self._build()  # again, as the model may hold a part of the state
            self._start_message = f"{path} {damage}; training starts at epoch 1"
            return
        if state is None:
            return
        self.history = state.progress["history"]
        self.commits = list(dict.fromkeys([*state.progress["commits"], *self.commits]))
        self.threads = list(dict.fromkeys([*state.progress["threads"], *self.threads]))
        self.started = state.progress.get("started")  # states of earlier code have none
        self._start_message = f"resuming after epoch {self.done} from {path}"

    def _require_one_state(self, path: Path, state: State | None, damage: str) -> None:
        """Raise StepError unless all processes go on from the same state: what others wrote is not thrown away where
        one cannot read it."""
        damages = {rank: text for rank, text in enumerate(self.processes.gathered(damage)) if text}
        if damages:
            ranks, text = ", ".join(map(str, damages)), damages[min(damages)]
            raise StepError(
                f"{path} {text} (rank {ranks}); nothing was changed: mend that, or remove {path.parent} to start at "
                "epoch 1"
            )
        progress = state.progress if state else None
        self.processes.require_equal(progress, f"the state {path}")

    @property
    def done(self) -> int:
        """How many epochs are done."""
        return self.history[-1]["epoch"] if self.history else 0

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or validation has not improved for `patience` of them."""
        if self.done >= self.settings.epochs:
            return True
        if not self.history or not self.settings.patience or self.config["protocol"]["report"] != "best":
            return False
        return self.done - reported_epoch(self.config, self.history) >= self.settings.patience

    def epochs(self) -> Iterator[bool]:
        """Train; yields True whenever steps are queued, and False where they are not yet done, so that other runs can
        queue theirs.

        After every `eval_every` epochs, and after the last, the model is evaluated and the history gets a line.
        """
        epochs, every = self.settings.epochs, self.settings.eval_every
        if not self.history:
            self.started = utc_now()
        if self._start_message:
            print(self.title + self._start_message, flush=True)
        while not self.finished:
            start, cpu_start = time.perf_counter(), time.process_time()
            num_steps = 0
            self.execution.total.zero_()
            for epoch in range(self.done + 1, min(self.done + every, epochs) + 1):
                title = f"{self.title}epoch {epoch}/{epochs}"
                for queued in self._epoch(epoch, title):
                    num_steps += queued
                    yield True
            yield from self._turns_until_idle()
            loss = float(self.execution.total) / num_steps
            if loss != loss:
                raise StepError(f"the loss is not a number in {title}: training diverged; lower the learning rate")
            seconds = time.perf_counter() - start
            line = {
                "epoch": epoch,
                "train/loss": round(loss, 6),
                "train/steps": num_steps,
                "train/seconds": round(seconds, 3),
                "train/cpu_seconds": round(time.process_time() - cpu_start, 3),
                "train/resident_peak_bytes": resident_peak_bytes(),
            }
            if self.device.type == "cuda":  # of all runs that share the device
                line["train/peak_bytes"] = torch.cuda.max_memory_allocated(self.device)
            yield from self._end_epoch(line)
        if self.best:
            load_own(self.model, self.best)
        self._states.finish()
        self.stream.wait()

    def _turns_until_idle(self) -> Iterator[bool]:
        """Let other runs queue their work until the device has done this run's: who waits for it stops them all.

        Processes that train several runs together take their turns in one order.
        """
        while self.processes.size == 1 and not self.stream.is_idle:
            yield False

    def _validate(self, line: dict[str, Any]) -> Iterator[bool]:
        """Evaluate the model, and add its metrics to `line`."""
        with self._uncompiled():
            captured = self.execution.capture and self.processes.size == 1  # no graph holds what processes sum up
            self._validation.queue(self.stream if captured else None)
        yield from self._turns_until_idle()
        line |= self._validation.line()

    def _end_epoch(self, line: dict[str, Any]) -> Iterator[bool]:
        """Evaluate the model after the epoch of `line`, and save the state."""
        yield from self._validate(line)
        self.history.append(line)
        print(self.title + summary(line, self.settings.epochs, task_of(self.config["protocol"])), flush=True)
        if self.config["protocol"]["report"] == "best" and line == _best(self.config, self.history):
            blocks = blocks_of(self.model)  # of large tables, for which a GPU may have no room twice
            self.best = {
                name: tensor.detach().to("cpu" if name in blocks else tensor.device, copy=True)
                for name, tensor in self.model.state_dict().items()
            }
        state: dict[str, Any] = {"identity": self._identity, "history": self.history}
        state |= {"commits": self.commits, "threads": self.threads, "started": self.started}
        saved = self.model, self.optimizer, self.best, state, self.finished
        if self.model.is_sharded:
            self._states.save_together(*saved, self.processes)
            return
        if self.processes.writes:
            self._states.save(*saved)
        self.processes.wait()  # where the one that writes waits for the disk

    def _uncompiled(self) -> AbstractContextManager[Any]:
        """Within it blocks run uncompiled, as an evaluation needs: they are compiled for training."""
        if not self.execution.compiled:
            return nullcontext()
        return torch.compiler.set_stance("force_eager")

    def _epoch(self, epoch: int, title: str) -> Iterator[int]:
        """Queue the steps of an epoch; yields after each how many updates of the weights it has."""
        self.model.train()
        seed = self.config["seed"] * SEED_STRIDE + epoch
        self.stream.seed(seed)
        for number, step in enumerate(progress(self.schedule.epoch(), desc=title, unit="step")):
            self.execution(step, seed * _STEP_STRIDE + number)
            yield len(self.schedule.micro_steps(step.inputs))

    def abandon(self) -> None:
        """Wait for the state that is being written, and ignore an error of its writing."""
        with suppress(Exception):
            self._states.finish()

    def record(self) -> dict[str, Any]:
        """How the training went, for training.json: times, sizes, and how its steps ran."""
        step = statistics.median(line["train/seconds"] / line["train/steps"] for line in self.history)
        return {
            "step_ms": round(1000 * step, 3),
            "steps_per_second": round(1 / step, 1) if step else None,
            "parameters": self.model.num_parameters(),
            "item_bytes_per_float": round(self.model.item_bytes(self.optimizer), 3),
            "captured": not self.processes.any(not self.execution.captured),
            "compiled": self.execution.compiled,
            "commit": "+".join(self.commits),
            "threads": "+".join(map(str, self.threads)),
            "stopped_early": self.done if self.done < self.settings.epochs else None,
            "started": self.started,
            **({"processes": self.processes.size} if self.processes.size > 1 else {}),
        }


def train_together(trainings: list[Training]) -> Iterator[tuple[int, Exception | None]]:
    """Train all, in turns of a step; yields the index of each training that ends, and its error if it failed."""
    running = {index: training.epochs() for index, training in enumerate(trainings)}
    while running:
        all_wait = True
        for index, steps in list(running.items()):
            error: Exception | None = None
            with trainings[index].stream.active():
                try:
                    all_wait &= not next(steps)
                    continue
                except StopIteration:
                    pass
                except Exception as failure:  # of one run; the others continue
                    error = failure
                    trainings[index].abandon()
            del running[index]
            all_wait = False
            yield index, error
        if all_wait:
            time.sleep(_PAUSE_S)  # for the threads that write states


def reported_epoch(config: dict[str, Any], history: list[dict[str, Any]]) -> int:
    """The epoch whose weights the protocol reports: the last, or the first that is best on validation."""
    return int((history[-1] if config["protocol"]["report"] == "last" else _best(config, history))["epoch"])


def doubt(config: dict[str, Any], history: list[dict[str, Any]]) -> str | None:
    """What the place of the best epoch in the schedule says against the schedule, if anything.

    Of protocols that report the best epoch, and schedules of enough epochs to have an early and a late part.
    """
    epochs, last = config["training"]["epochs"], history[-1]["epoch"]
    if config["protocol"]["report"] == "last" or epochs < _SHORTEST_DOUBTED:
        return None
    best = reported_epoch(config, history)
    if best > _LATE * epochs:
        return f"was best at epoch {best} of {epochs}, and may still improve: raise training.epochs"
    if best <= _EARLY * epochs and last > best:
        return f"was best at epoch {best} of {epochs}, and overfits since: raise training.dropout, or lower the rate"
    return None


def summary(line: dict[str, Any], epochs: int, task: str) -> str:
    """An epoch in one line."""
    split = "valid" if "valid/seconds" in line else "test"
    shown = "  ".join(f"{name} {line[f'{split}/{name}']:.4f}" for name in SHOWN[task])
    return (
        f"epoch {line['epoch']}/{epochs}  loss {line['train/loss']:.4f}  {split} {shown}  "
        f"{line['train/seconds']:.1f} s + {line[f'{split}/seconds']:.1f} s"
    )


def _best(config: dict[str, Any], history: list[dict[str, Any]]) -> dict[str, Any]:
    """The first line of the history that is best on validation."""
    line: dict[str, Any] = SELECTIONS[task_of(config["protocol"])].best(history, "valid")
    return line
