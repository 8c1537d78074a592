"""Training compute against quality: models of several widths, depths and lengths on equal budgets of FLOPs.

A run is trained to its budget; how many steps that takes follows from the FLOPs of each step (`steps.studies.flops`).
The learning rate is constant, so a run of a smaller budget ends as this one is on its way: it is tested there too. Runs
of a case are trained at once on a GPU. Needs torch, numpy and safetensors alone.
"""

import gc
import statistics
import tempfile
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from steps.common.cli import StepError
from steps.common.device import pick_precision
from steps.data.generators.stream import Stream
from steps.data.sequences import Batch, Sequences, load_sequences
from steps.data.split import split_sequences
from steps.evaluation.exact_ranks import Ranker, Rules, candidates, require_finite
from steps.evaluation.metrics import user_values
from steps.studies.convergence import Blocks
from steps.studies.flops import Work, work_of
from steps.studies.long_sequences import triangle
from steps.studies.rows import FAILED, Row, row
from steps.studies.stream_ceiling import CUTS, KNOWN, expected, least_loss
from steps.training.loop import Training, reported_epoch, train_together
from steps.training.schedule import Schedule, Step

#: The axis that has a budget: the logarithm to base 10 of its FLOPs.
BUDGET = "log10_flops"
LOSS, COVERAGE, POPULARITY = "loss", "coverage@10", "popularity@10"
#: The axis of a trial of learning rates alone: the power of the width.
POWER = "power"
#: The part of a generated data set that is no run: what its best predictor expects.
BEST = "best predictor"
_TOP, _DIGITS = 10, 5


class Tested(NamedTuple):
    """A run at a budget: metrics on test, and FLOPs, passes over the training data and seconds until then."""

    metrics: dict[str, float]
    flops: float
    passes: float
    seconds: float


class Budgets(Blocks):
    """Passes cut into blocks that end with the steps in which budgets of FLOPs, `ends`, are reached. flops: at the end
    of each block so far."""

    def __init__(self, whole: Schedule, work: Work, ends: list[float]) -> None:
        super().__init__(whole, 0)
        self.work, self.ends = work, ends
        self.flops: list[float] = []

    def epoch(self) -> list[Step]:
        found: list[Step] = []
        samples, flops = (self.samples[-1], self.flops[-1]) if self.flops else (0, 0.0)
        while flops < self.ends[len(self.flops)] or not found:
            step, lengths = next(self.trained)
            samples += int(lengths.sum())
            flops += self.work.flops(int(lengths.sum()), float(triangle(lengths.double()).sum()))
            found.append(step)
        self.samples.append(samples)
        self.flops.append(flops)
        return found


class Watched:
    """A model that is ranked with, and the loss (K,) of every target since `eval`: the cross-entropy among all items of
    its scores over the temperature that it was trained with."""

    def __init__(self, model: Any, temperature: float) -> None:
        self.model, self.temperature = model, temperature
        self.losses: list[torch.Tensor] = []

    def eval(self) -> None:
        """Leave training mode, and forget the losses."""
        self.model.eval()
        self.losses = []

    def score(self, batch: Batch) -> torch.Tensor:
        """Scores (B, num_items + 1)."""
        scores: torch.Tensor = self.model.score(batch)
        target = batch.next_item[batch.last] - 1
        self.losses.append(F.cross_entropy(scores[:, 1:].float() / self.temperature, target, reduction="none"))
        return scores


class Run(Training):
    """A training of `runs.levels` budgets, the last of 10 ^ `runs.log10_flops` FLOPs, with `checks` validations each.

    found: by budget what it was tested as, with the weights that the protocol reports so far: the last ones, or the
    best on validation.
    """

    def __init__(
        self,
        config: dict[str, Any],
        runs: dict[str, Any],
        settings: dict[str, Any],
        data: tuple[Sequences, str],
        run: Path,
    ) -> None:
        config, sequences = prepared(config, settings["lr"], runs.get(POWER)), data[0]
        self.tried = {POWER: runs[POWER]} if POWER in runs else {}
        self.checks = settings["checks"] if config["protocol"]["report"] == "best" else 1
        self.budgets = budgets(runs, settings["a_decade"])
        shares = [(number + 1 - self.checks) / self.checks / settings["a_decade"] for number in range(self.checks)]
        ends = [10 ** (budget + share) for budget in self.budgets for share in shares]
        config["training"] |= {"epochs": len(ends), "eval_every": 1}
        config["training"].pop("patience", None)
        dtype, on_cuda = pick_precision("bf16", sequences.item.device)[1], sequences.item.device.type == "cuda"
        super().__init__(config, *data, run, dtype, "graph" if on_cuda else "eager", f"{name_of(config)}: ")
        self.found: list[Tested] = []
        with self.stream.active():
            self.schedule = self.blocks = Budgets(self.schedule, work_of(config), ends)
            rules, size = Rules.of(config), config["training"]
            tested = self.split.held_out["test"]
            self._ranker = Ranker(sequences, tested, [rules], size["max_len"], size["batch"], _TOP)
            self._watched = Watched(self.model, config["model"]["loss"]["temperature"])
            self._items = sequences.counts(self.split.num_held_out), candidates(sequences, rules.candidates)

    def _end_epoch(self, line: dict[str, Any]) -> Iterator[bool]:
        """Validate where the protocol does, and test where a budget is reached. No state is saved."""
        validated = self.split.eval_part == "valid"
        if validated:
            yield from self._validate(line)
        self.history.append(line)
        if validated and reported_epoch(self.config, self.history) == line["epoch"]:
            self.best = self._weights()
        if line["epoch"] % self.checks == 0:
            passes = self.blocks.samples[-1] / int(self.blocks.lengths.sum())
            seconds = sum(one["train/seconds"] for one in self.history)
            self.found.append(Tested(self._test(), self.blocks.flops[-1], passes, seconds))
            print(
                f"{self.title}{self.blocks.flops[-1]:.3g} FLOPs, {seconds:.1f} s, {self.found[-1].metrics}", flush=True
            )

    def _weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}

    def _test(self) -> dict[str, float]:
        """The metrics on test of the best weights so far, or of these, which stay as they are."""
        now = self._weights() if self.best else {}
        if self.best:
            self.model.load_state_dict(self.best)
        finite, (ranking,) = self._ranker.rank(self._watched)
        require_finite(bool(finite))
        found = {name: float(user_values(ranking.ranks, name).mean()) for name in ("hr@10", "ndcg@10")}
        found[LOSS] = float(torch.cat(self._watched.losses).mean())
        found[COVERAGE], found[POPULARITY] = spread(ranking.top, *self._items)
        if now:
            self.model.load_state_dict(now)
        return {name: round(value, _DIGITS) for name, value in found.items()}


def spread(top: torch.Tensor, counts: torch.Tensor, candidate: torch.Tensor) -> tuple[float, float]:
    """Coverage and popularity of recommended items top (K, k), 0 where there is none.

    Of candidates (V + 1,) bool, with counts (V + 1,) in the training data. Coverage: the share of them that is
    recommended to anyone. Popularity: the mean percentile of what is recommended, 0 to 1: the share of the candidates
    with a lower count, and half of those with the same one. Random items have 0.5.
    """
    given, of_all = top[top > 0], counts[candidate].sort().values
    ends = [torch.searchsorted(of_all, counts[given], right=right) for right in (False, True)]
    return len(given.unique()) / len(of_all), float((ends[0] + ends[1]).double().mean() / 2 / len(of_all))


def budgets(runs: dict[str, Any], a_decade: int) -> list[float]:
    """The logarithms, to base 10, of the budgets of FLOPs that a run is tested at, in order."""
    return [runs["log10_flops"] - number / a_decade for number in reversed(range(runs["levels"]))]


def prepared(config: dict[str, Any], rule: dict[str, Any], power: float | None = None) -> dict[str, Any]:
    """The config with the learning rate of its width: base x (dim / d) ^ power, by default with its encoder's power."""
    config = deepcopy(config)
    model = config["model"]
    power = rule["power"][model["model"]] if power is None else power
    model["optimizer"]["lr"] = rule["base"] * (rule["dim"] / model["dim"]) ** power
    return config


def name_of(config: dict[str, Any]) -> str:
    """A run's name: width, depth, model and seed."""
    return f"{config['model']['dim']}x{config['model']['blocks']}-{config['row']}-{config['seed']}"


def cases(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """A case for all runs on a data set that are trained `together`, and for each of the others; and one for the best
    predictor of each generated data set."""
    found = [case_of(config, runs) for runs in plan["runs"] for config in runs["configs"]]
    found += [{"data": name, "part": BEST} for name in plan["generated"]]
    return [case for index, case in enumerate(found) if case not in found[:index]]


def case_of(config: dict[str, Any], runs: dict[str, Any]) -> dict[str, Any]:
    """The case that a run belongs to. `together` may name the `{row}`."""
    return {"data": config["dataset"], "part": runs.get("together", name_of(config)).format(row=config["row"])}


def require(cases: list[dict[str, Any]], plan: dict[str, Any]) -> None:
    """Raise StepError, which names the model, where its FLOPs are not known."""
    for runs in plan["runs"]:
        for config in runs["configs"]:
            if case_of(config, runs) in cases:
                work_of(config)


def measure(case: dict[str, Any], plan: dict[str, Any], data: Path) -> list[Row]:
    """Rows of a case: by model, size and budget, metrics of each seed as its repetition, and means over its seeds of
    FLOPs, passes, and seconds while the case's other runs are trained too. A seed that fails says so. Of the best
    predictor what it expects."""
    device = torch.device(plan["device"])
    loaded = load_sequences(data / "processed" / case["data"], device)
    if case["part"] == BEST:
        return [one | {"data_sha256": loaded[1]} for one in predicted(case, plan, loaded[0])]
    gc.collect()  # the memory of graphs, which are cycles
    if device.type == "cuda":
        torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as folder:
        trained = [
            Run(config, runs, plan["settings"], loaded, Path(folder))
            for runs in plan["runs"]
            for config in runs["configs"]
            if case_of(config, runs) == case
        ]
        failed = train(trained)
    return [one | {"data_sha256": loaded[1]} for one in rows_of(case, trained, failed)]


def predicted(case: dict[str, Any], plan: dict[str, Any], sequences: Sequences) -> list[Row]:
    """Rows of what the best predictor of a generated data set expects of the interactions that runs are tested on.

    Raises StepError where the data are of other settings.
    """
    configs = [config for runs in plan["runs"] for config in runs["configs"] if config["dataset"] == case["data"]]
    users = split_sequences(sequences, configs[0]["protocol"]).held_out["test"].users
    settings = plan["generated"][case["data"]]["synthesize"]
    stream = Stream(**{key: value for key, value in settings.items() if key != "form"})
    first, last = int(users.min()), int(users.max()) + 1
    of_first = sequences.item[sequences.offsets[first] : sequences.offsets[first + 1]].tolist()
    if stream.part(first, first + 1)[0].tolist() != of_first:
        raise StepError(f"data set {case['data']} is not what its settings make: record {first} differs; make it again")
    hits = expected(stream, first, last)["known"][CUTS.index(_TOP)]
    axes = case | {"model": KNOWN}
    return [
        row(axes, f"hr@{_TOP}", round(hits, _DIGITS), "fraction"),
        row(axes, LOSS, round(least_loss(stream, first, last), _DIGITS), "nats"),
    ]


def train(trained: list[Run]) -> dict[int, str]:
    """Train runs to their budgets, on a GPU at once; by index what those said that diverged. Raises other errors."""
    failed = {}
    at_once = trained[0].device.type == "cuda"
    for first, together in [(0, trained)] if at_once else [(index, [run]) for index, run in enumerate(trained)]:
        for index, failure in train_together(list(together)):
            if failure is not None and not isinstance(failure, StepError):
                raise failure
            if failure is not None:
                failed[first + index] = str(failure)
    return failed


def rows_of(case: dict[str, Any], trained: list[Run], failed: dict[int, str]) -> list[Row]:
    """Rows of the runs of a case, as `measure` has them."""
    found: list[Row] = []
    points: dict[tuple[Any, ...], list[Tested]] = {}
    for index, run in enumerate(trained):
        model, seed = run.config["model"], run.config["seed"]
        axes = case | {"model": run.config["row"], "encoder": model["model"], "dim": model["dim"]}
        axes |= {"blocks": model["blocks"], "max_len": run.config["training"]["max_len"]} | run.tried
        for budget, tested in zip(run.budgets, run.found, strict=False):
            at = axes | {BUDGET: budget}
            points.setdefault(tuple(at.items()), []).append(tested)
            units = {LOSS: "nats"}
            found += [row(at, *one, units.get(one[0], "fraction"), repetition=seed) for one in tested.metrics.items()]
        if index in failed:
            at = axes | {BUDGET: run.budgets[len(run.found)]}
            found.append(row(at, FAILED, 1, "of 1", repetition=seed, seen=failed[index]))
    for key, tests in points.items():
        for name, unit in (("flops", "FLOPs"), ("passes", "passes"), ("seconds", "s")):
            mean = statistics.fmean(getattr(tested, name) for tested in tests)
            found.append(row(dict(key), name, float(f"{mean:.5g}"), unit))
    return found
