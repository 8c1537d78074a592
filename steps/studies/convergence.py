"""How many samples, and seconds, a training needs until validation reaches a fixed quality; from many seeds.

A sample is an interaction that is trained on as a target, each time it is. Every `every` samples the model is evaluated
on all of validation. The target stops nothing: all seeds are trained to the end of the budget, so that the curves are
of the same runs everywhere. Seeds are trained one after the other, each alone on the device, as their seconds count.
Needs torch, numpy and safetensors alone.
"""

import gc
import itertools
import statistics
import tempfile
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch

from steps.common.cli import StepError
from steps.common.config import task_of
from steps.common.device import pick_precision
from steps.data.sequences import Sequences, load_sequences
from steps.evaluation.names import OF_TASK
from steps.models import is_count_based
from steps.studies.rows import Row, row
from steps.training.execution import Mode
from steps.training.loop import Training, train_together
from steps.training.schedule import Schedule, Step

#: A metric's mean over the seeds after so many samples is called by this and their number.
AFTER = "after "
#: Encoders whose trainings have other targets than every interaction of a window.
_OTHER_TARGETS = ("bert4rec", "gru4rec")


class Curve(NamedTuple):
    """A training at each of its evaluations: the samples trained on so far, the metric, and the seconds so far: of
    training, and of training and evaluation."""

    samples: list[int]
    quality: list[float]
    training: list[float]
    elapsed: list[float]

    def reached(self, target: float) -> int | None:
        """The first evaluation, by index, at which the metric is no less than the target; None: it never is."""
        return next((index for index, value in enumerate(self.quality) if value >= target), None)


class Blocks(Schedule):
    """The passes of `whole`, one after the other, cut into blocks: what is an epoch elsewhere is a block here.

    Block k ends with the step in which k * every samples are reached, wherever in a pass that is. samples: how many
    were trained on at the end of each block so far. trained: the steps to come, each with the tokens of its windows.
    """

    def __init__(self, whole: Schedule, every: int) -> None:
        self.whole, self.every = whole, every
        self.sequences, self.config = whole.sequences, whole.config
        self.windows, self.lengths = whole.windows, whole.lengths
        self.samples: list[int] = []
        self.trained = self._passes()

    @property
    def num_updates(self) -> int:
        return self.whole.num_updates

    def epoch(self) -> list[Step]:
        found = []
        trained, end = self.samples[-1] if self.samples else 0, (len(self.samples) + 1) * self.every
        while trained < end:
            step, lengths = next(self.trained)
            trained += int(lengths.sum())
            found.append(step)
        self.samples.append(trained)
        return found

    def steps(self, order: torch.Tensor) -> list[Step]:
        return self.whole.steps(order)

    def batch(self, shape: Any, inputs: torch.Tensor) -> Any:
        return self.whole.batch(shape, inputs)

    def _passes(self) -> Iterator[tuple[Step, torch.Tensor]]:
        """The steps of pass after pass, each with how many tokens its windows have."""
        while True:
            steps = self.whole.epoch()
            windows = torch.cat([step.inputs for step in steps], dim=1)
            if self.config.stochastic_length:
                lengths = windows[2]
            else:
                lengths = self.sequences.window_lengths(windows[0], windows[1], self.config.max_len)
            yield from zip(steps, lengths.cpu().split([step.inputs.shape[1] for step in steps]), strict=True)


def cases(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """A case for each data set, protocol and model, of all its seeds."""
    found = [case_of(config) for runs in plan["runs"] for config in runs["configs"]]
    return [case for index, case in enumerate(found) if case not in found[:index]]


def case_of(config: dict[str, Any]) -> dict[str, Any]:
    """The case that a run belongs to."""
    return {"data": config["dataset"], "protocol": config["protocol"]["name"], "model": config["row"]}


def require(cases: list[dict[str, Any]], plan: dict[str, Any]) -> None:
    """Raise StepError, which names the model, unless each of the cases has samples, a validation and its metric, and no
    step has more samples than lie between two evaluations."""
    for case in cases:
        runs, (config, *_) = _runs_of(case, plan)
        sizes, protocol = config["training"], config["protocol"]
        most, wrong = sizes["batch"] * sizes["max_len"], ""
        if is_count_based(config) or config["model"]["model"] in _OTHER_TARGETS:
            wrong = "is not trained on every interaction of windows, so it has no samples to count: take another model"
        elif protocol["report"] != "best":
            wrong = f"protocol {protocol['name']} has no validation: take one with `report: best`"
        elif runs["metric"] not in OF_TASK[task_of(protocol)]:
            wrong = (
                f"{runs['metric']} is no metric of protocol {protocol['name']}: {', '.join(OF_TASK[task_of(protocol)])}"
            )
        elif runs["every"] < most:
            wrong = f"`every` is {runs['every']}, and a step may have {most} samples: make it no less"
        if wrong:
            raise StepError(f"study {plan['study']}, model {case['model']}: {wrong}")


def measure(case: dict[str, Any], plan: dict[str, Any], data: Path) -> list[Row]:
    """Rows of a case: its target and budget, the curve over the seeds, and when each seed reached the target.

    The first seed is trained once before, which compiles kernels and is not kept.
    """
    device = torch.device(plan["device"])
    sequences, digest = load_sequences(data / "processed" / case["data"], device)
    runs, configs = _runs_of(case, plan)
    curves, in_a_pass = {}, 0
    for config in [configs[0], *configs]:
        curves[config["seed"]], in_a_pass = train(config, runs, sequences, digest)
    found = rows_of(case | {"quality": runs["metric"]}, runs, in_a_pass, curves, plan["settings"]["points"])
    return [one | {"data_sha256": digest} for one in found]


def train(config: dict[str, Any], runs: dict[str, Any], sequences: Sequences, digest: str) -> tuple[Curve, int]:
    """Train a run to its last evaluation, alone; its curve, and the samples of a pass.

    runs: its `metric`, `every` and `evaluations`. Raises StepError if it diverges.
    """
    config = deepcopy(config)
    config["training"] |= {"epochs": runs["evaluations"], "eval_every": 1}
    config["training"].pop("patience", None)  # the target ends no training, nor does anything else
    on_cuda = sequences.item.device.type == "cuda"
    compute_dtype = pick_precision("bf16", sequences.item.device)[1]
    with tempfile.TemporaryDirectory() as folder:
        title = f"{config['row']}, seed {config['seed']}, "
        mode: Mode = "graph" if on_cuda else "eager"
        training = Training(config, sequences, digest, Path(folder), compute_dtype, mode, title)
        training.schedule = blocks = Blocks(training.schedule, runs["every"])
        for _, failure in train_together([training]):
            if failure is not None:
                raise failure
    curve = curve_of(training.history, blocks.samples, runs["metric"])
    in_a_pass = int(blocks.lengths.sum())
    del training, blocks
    gc.collect()  # the memory of graphs, which are cycles, is the next run's
    if on_cuda:
        torch.cuda.empty_cache()
    return curve, in_a_pass


def curve_of(history: list[dict[str, Any]], samples: list[int], metric: str) -> Curve:
    """The curve that a training's history has, of the samples that it was trained on so far after each line."""
    training = list(itertools.accumulate(line["train/seconds"] for line in history))
    evaluation = itertools.accumulate(line["valid/seconds"] for line in history)
    elapsed = [before + after for before, after in zip(training, evaluation, strict=True)]
    return Curve(samples, [line[f"valid/{metric}"] for line in history], training, elapsed)


def rows_of(
    axes: dict[str, Any], runs: dict[str, Any], in_a_pass: int, curves: dict[int, Curve], points: int
) -> list[Row]:
    """Rows of a model: target, cadence, budget, and samples of a pass; the curves' mean, lowest and highest; and by
    seed, as its repetition, the samples and seconds at which the target was first reached, none where it was not.

    runs: its `target`, `every` and `evaluations`. in_a_pass: samples. curves: by seed. points: of the curve's
    evaluations so many are kept at most, evenly, the last among them.
    """
    every, stride = runs["every"], -(-runs["evaluations"] // points)
    found = [
        row(axes, "target", runs["target"], "fraction"),
        row(axes, "every", every, "samples"),
        row(axes, "budget", runs["evaluations"] * every, "samples"),
        row(axes, "pass", in_a_pass, "samples"),
        row(axes, "seeds", len(curves), "runs"),
    ]
    for number, values in enumerate(zip(*(curve.quality for curve in curves.values()), strict=True), start=1):
        if (runs["evaluations"] - number) % stride:
            continue
        mean, low, high = (round(value, 4) for value in (statistics.fmean(values), min(values), max(values)))
        found.append(row(axes, f"{AFTER}{number * every}", mean, "fraction", low=low, high=high))
    for seed, curve in curves.items():
        index = curve.reached(runs["target"])
        if index is not None:
            found += [
                row(axes, "samples", curve.samples[index], "samples", repetition=seed),
                row(axes, "training", round(curve.training[index], 3), "s", repetition=seed),
                row(axes, "elapsed", round(curve.elapsed[index], 3), "s", repetition=seed),
            ]
    return found


def _runs_of(case: dict[str, Any], plan: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The entry of `runs` that a case is of, and its configs, one a seed."""
    for runs in plan["runs"]:
        configs = [config for config in runs["configs"] if case_of(config) == case]
        if configs:
            return runs, configs
    raise ValueError(f"no run is of the case {case}")
