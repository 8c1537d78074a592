"""Training compute against quality: FLOPs, budgets, what is tested on the way, laws and bands, and the report."""

import itertools
import math
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from steps.common import params, studies
from steps.common.cli import StepError
from steps.data.generators.stream import Stream
from steps.data.sequences import Sequences, load_sequences
from steps.data.streamed import write_stream
from steps.studies import scaling_law as study
from steps.studies import scaling_law_report as shown
from steps.studies.flops import Work, work_of
from steps.studies.rows import Row, row
from steps.studies.scaling_law_fits import (
    LOGARITHM,
    POWER,
    SATURATING,
    Frontier,
    band,
    fit,
    frontier,
    growth,
    judge,
    widening,
)
from steps.studies.stream_ceiling import KNOWN, ceilings, least_loss
from steps.tasks import build
from steps.training.loop import train_together
from steps.training.stream import RunStream
from tests.conftest import ROOT, step, write_processed
from tests.steps.runs import config
from tests.steps.test_models import make, schedule_of

CONTENT = params.load("studies/scaling-law", ROOT / "params")
PLAN = studies.plan("scaling-law", ROOT / "params")
GRID = np.geomspace(0.02, 3.0, 80)
X = np.log(10) * np.arange(13, 17.5, 0.5)  # nine budgets


def sized(kind: str, negatives: int = 5, **sizes: Any) -> dict[str, Any]:
    """The config of a model of these sizes."""
    found = config(kind)
    return found | {"training": found["training"] | {"negatives": negatives}, "model": found["model"] | sizes}


def test_work_by_hand() -> None:
    # d 8 to h dv = 8 twice and h dqk = 6 twice, and 8 x 8 back: 288 a layer; pairs 6 + 8; the loss 6 vectors of 8.
    hstu = work_of(sized("hstu", dim=8, blocks=2, heads=2, dqk=3, dv=4))
    assert hstu == Work(token=2 * 288 + 48, pair=2 * 14)
    assert hstu.flops(tokens=10, pairs=30) == 6 * (6240 + 840)
    assert work_of(sized("sasrec", dim=8, blocks=3)) == Work(token=3 * 384 + 48, pair=3 * 16)
    assert work_of(sized("transformer++", dim=6, blocks=1)) == Work(token=4 * 36 + 3 * 6 * 16 + 36, pair=12)
    with pytest.raises(StepError, match="model bert4rec: FLOPs are known of hstu, sasrec, transformer"):
        work_of(config("bert4rec"))


@pytest.mark.parametrize("kind", ["hstu", "sasrec", "transformer++"])
def test_work_is_what_torch_counts(kind: str) -> None:
    # Of width 24, whose 8/3 is 64: torch would count the zeros that fill it up.
    settings, users = sized(kind, negatives=30, dim=24), torch.tensor([0, 1])
    data = Sequences(torch.tensor([0, 13, 26]), torch.arange(26) % 7 + 1, torch.arange(26), 30)
    task, batch = build(settings, 30), data.batch(users, torch.zeros_like(users), 12)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        task.train().loss(batch).backward()
    # In torch attention takes all 12 x 12 pairs of a row, and the loss all 31 rows of so small a table.
    assert counter.get_total_flops() == work_of(settings).flops(24, 2 * 12 * 12)


def test_the_plan_covers_four_orders_of_magnitude_from_three_seeds(tmp_path: Path) -> None:
    found: dict[str, set[float]] = {"ml-1m": set(), "stream": set()}
    for runs in PLAN["runs"]:
        found[runs["configs"][0]["dataset"]].update(study.budgets(runs, 2))
        of_rows = [(one["row"], one["seed"]) for one in runs["configs"]]
        seeds = (0,) if study.POWER in runs else (0, 1, 2)  # of the trial of learning rates one
        assert of_rows == [(name, seed) for name in dict(of_rows) for seed in seeds]
    assert sorted(found["ml-1m"]) == [11.5, 12, 12.5, 13, 13.5, 14, 14.5, 15, 15.5]
    assert sorted(found["stream"]) == [12, 12.5, 13, 13.5, 14, 14.5, 15, 15.5, 16, 16.5, 17]
    # 9 runs of each size, and shapes of 10^13.5; 3 runs of the largest.
    expected = 9 * (1e13 + 3.16228e13 + 3.16228e14 + 1e15 + 3.16228e15) + 36 * 3.16228e13
    expected += 9 * (3.16228e12 + 3.16228e13 + 3.16228e14 + 1e15 + 1e16) + 27 * 3.16228e13 + 3e17 + 6e14
    assert studies.planned_flops(PLAN) == pytest.approx(expected, rel=1e-5)
    said = step("plan_study", "--study", "scaling-law", "--output", tmp_path / "settings.json", cwd=ROOT).stdout
    assert "study scaling-law: 162 runs, 4.45e+17 FLOPs in all" in said
    parts = [case["part"] for case in study.cases(PLAN) if case["data"] == "stream"]
    assert parts[:4] == ["small", "shapes", "256x8", "512x8-hstu-position"]
    assert parts[-3:] == ["1024x16-hstu-position-2", "rates", "best predictor"]
    study.require(study.cases(PLAN), PLAN)
    rates = [study.prepared(one, PLAN["settings"]["lr"])["model"] for one in PLAN["runs"][7]["configs"]]
    assert {(one["model"], one["dim"]): one["optimizer"]["lr"] for one in rates} == pytest.approx(
        {("hstu", 256): 5e-4, ("sasrec", 256): 2.5e-4, ("transformer++", 256): 5e-4}
    )


def test_the_trial_has_every_encoder_at_both_rates() -> None:
    rule, found = PLAN["settings"]["lr"], []
    for runs in (one for one in PLAN["runs"] if study.POWER in one):
        found += [study.prepared(one, rule, runs[study.POWER])["model"] for one in runs["configs"]]
    assert [(one["model"], one["optimizer"]["lr"]) for one in found] == [
        (encoder, rate) for rate in (5e-4, 2.5e-4) for encoder in ("hstu", "sasrec", "transformer++")
    ]


def test_a_tried_rate_is_an_axis_of_its_rows(tmp_path: Path) -> None:
    run = run_of(tmp_path, power=1.0)
    assert run.config["model"]["optimizer"]["lr"] == pytest.approx(1e-3 * 16 / run.config["model"]["dim"])
    rows = study.rows_of({"data": "x", "part": "rates"}, [trained(run)], {})
    assert rows
    assert {one.get("power") for one in rows} == {1.0}


def test_budgets_end_with_the_steps_that_reach_them() -> None:
    # Windows of 3, 2 and 5 tokens, which end at 20, 10 and 30, one a step: 6 x (3 + 6), 6 x (2 + 3), 6 x (5 + 15).
    offsets, time = torch.tensor([0, 4, 7, 13]), torch.tensor([1, 2, 3, 20, 1, 2, 10, 1, 2, 3, 4, 5, 30])
    data, none = Sequences(offsets, torch.arange(1, 14), time, 20), torch.zeros(3, dtype=torch.int64)
    whole = schedule_of(make("hstu"), data, none, batch=1, max_len=10, schedule="one-pass")
    blocks = study.Budgets(whole, Work(token=1, pair=1), [60, 100, 250, 260])
    users = [[int(step.inputs[0]) for step in blocks.epoch()] for _ in range(4)]
    assert users == [[1, 0], [2], [1, 0], [2]]  # the last budget was passed before: one step
    assert blocks.flops == [84, 204, 288, 408]
    assert blocks.samples == [5, 10, 15, 20]


def run_of(tmp_path: Path, kind: str = "hstu", log10_flops: float = 8.0, levels: int = 2, **tried: float) -> study.Run:
    """A small run on 40 users, whose budgets take 6 steps and 18, validated twice a budget."""
    folder = tmp_path / "processed/x"
    if not folder.exists():
        write_processed(folder, [20] * 40, 60)
    settings = {"a_decade": 2, "checks": 2, "lr": {"base": 1e-3, "dim": 16, "power": {kind: 0.5}}}
    runs, loaded = {"log10_flops": log10_flops, "levels": levels} | tried, load_sequences(folder, torch.device("cpu"))
    return study.Run(config(kind), runs, settings, loaded, tmp_path / "run")


def trained(run: study.Run) -> study.Run:
    assert study.train([run]) == {}
    return run


def test_a_run_on_its_way_is_the_run_of_a_smaller_budget(tmp_path: Path) -> None:
    long, short = trained(run_of(tmp_path)), trained(run_of(tmp_path, log10_flops=7.5, levels=1))
    assert [10**7.5 <= one.flops < 1.2 * 10**7.5 for one in short.found] == [True]
    assert long.found[0][:3] == short.found[0][:3]  # but for seconds
    assert (len(long.found), len(long.history)) == (2, 4)
    assert long.found[1].flops >= 1e8


def test_tests_on_the_way_change_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tested = trained(run_of(tmp_path))
    monkeypatch.setattr(study.Run, "_test", lambda self: {})
    untested = trained(run_of(tmp_path))
    for name in ("train/loss", "valid/ndcg@10"):
        assert [line[name] for line in tested.history] == [line[name] for line in untested.history]
    weights = zip(tested.model.parameters(), untested.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in weights)


def test_what_is_tested_is_the_best_on_validation_so_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, values = run_of(tmp_path), iter([0.3, 0.4, 0.1, 0.2])

    def validate(line: dict[str, Any]) -> Iterator[bool]:
        line["valid/ndcg@10"] = next(values)
        yield from ()

    monkeypatch.setattr(run, "_validate", validate)
    first, second = trained(run).found
    assert first.metrics == second.metrics  # of the second validation, the best of four
    assert first.flops < second.flops


def test_a_run_whose_validation_is_not_done_lets_the_others_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, other, reads = run_of(tmp_path), run_of(tmp_path), []
    validation, pending = slow._validation, [False]
    queue, line = validation.queue, validation.line

    def queued(stream: Any) -> None:
        pending[0] = True
        queue(stream)

    def read() -> dict[str, Any]:
        assert slow.done == len(reads)  # no line is in the history without its metrics
        pending[0] = False
        reads.append(other.done)
        return line()

    looks = itertools.count()

    def idle(stream: RunStream) -> bool:
        assert next(looks) < 1000  # a run that looks again and again lets no other train
        return stream is not slow.stream or not pending[0] or other.done == 4

    monkeypatch.setattr(RunStream, "is_idle", property(idle))
    monkeypatch.setattr(validation, "queue", queued)
    monkeypatch.setattr(validation, "line", read)
    assert list(train_together([slow, other])) == [(1, None), (0, None)]
    assert reads == [4] * 4
    assert [one[:3] for one in slow.found] == [one[:3] for one in other.found]  # but for seconds


def test_coverage_and_popularity_by_hand() -> None:
    candidate = torch.tensor([False, True, True, True, True, False])
    counts, top = torch.tensor([0, 5, 1, 1, 9, 7]), torch.tensor([[4, 1], [4, 0]])
    # Of the counts 1, 1, 5 and 9: three and a half are below 9, two and a half below 5.
    assert study.spread(top, counts, candidate) == pytest.approx((0.5, (0.875 + 0.625 + 0.875) / 3))
    assert study.spread(torch.tensor([[1, 2], [3, 4]]), counts, candidate) == (1.0, 0.5)


@pytest.mark.parametrize(("temperature", "losses"), [(1.0, [4 / 3, 3]), (0.5, [10 / 9, 5])])  # 1 and 3; 1 and 9
def test_the_loss_is_of_the_target_among_all_items(temperature: float, losses: list[float]) -> None:
    scores = torch.tensor([[9.0, 0.0, math.log(3)], [9.0, math.log(2), 0.0]])
    batch: Any = SimpleNamespace(next_item=torch.tensor([5, 2, 2]), last=torch.tensor([1, 2]))
    watched = study.Watched(SimpleNamespace(score=lambda batch: scores, eval=lambda: None), temperature)
    for _ in range(2):
        watched.eval()
        assert watched.score(batch) is scores
        assert torch.cat(watched.losses).exp().tolist() == pytest.approx(losses)


def test_a_run_that_diverges_says_so_and_the_others_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    runs, metrics = [run_of(tmp_path), run_of(tmp_path, "sasrec")], iter([{"hr@10": 0.25}])
    monkeypatch.setattr(runs[1], "_test", lambda: {"hr@10": 0.5})

    def diverges() -> dict[str, float]:
        for found in metrics:
            return found
        raise StepError("not a number")

    monkeypatch.setattr(runs[0], "_test", diverges)
    rows = study.rows_of({"data": "x", "part": "p"}, runs, study.train(runs))
    found = [(one["encoder"], one["log10_flops"], one["metric"], one["value"]) for one in rows if "repetition" in one]
    assert found == [
        ("hstu", 7.5, "hr@10", 0.25),
        ("hstu", 8.0, "failed", 1),
        ("sasrec", 7.5, "hr@10", 0.5),
        ("sasrec", 8.0, "hr@10", 0.5),
    ]
    assert [(one["seen"], one["repetition"]) for one in rows if "seen" in one] == [("not a number", 3)]


def column(values: Any) -> Any:
    return np.asarray(values, dtype=np.float64)[:, None]


def test_laws_are_recovered_from_their_own_points() -> None:
    since = X - X[0]
    found = fit(LOGARITHM, X, column(0.15 + 0.0195 * since), GRID)
    assert found.exponent[0] == pytest.approx(0.0195)
    assert found.predict([X[0] + 20])[0, 0] == pytest.approx(0.15 + 0.39)
    found = fit(POWER, X, column(8 * np.exp(-0.05 * since)), GRID)
    assert found.exponent[0] == pytest.approx(-0.05)
    assert found.predict([X[0] + 20])[0, 0] == pytest.approx(8 * math.exp(-1))
    assert np.isnan(fit(POWER, X, column([0.0, *[0.1] * 8]), GRID).predict(X)).all()
    for b in (0.0, 0.004):  # to an end, and over a highest point
        found = fit(SATURATING, X, column(0.3 - 0.2 * np.exp(-0.4 * since) - b * since), GRID)
        assert found.exponent[0] == pytest.approx(0.4, rel=0.05)
        assert found.numbers[:3, 0] == pytest.approx([0.3, b, 0.2], abs=0.005)
        assert found.predict([X[0] + 12])[0, 0] == pytest.approx(0.3 - 12 * b, abs=0.005)
    loss = fit(SATURATING, X, column(2 + 3 * np.exp(-0.4 * since)), GRID, more_is_better=False)
    assert loss.exponent[0] == pytest.approx(0.4, rel=0.05)
    assert loss.predict([X[0] + 30])[0, 0] == pytest.approx(2, abs=0.1)
    upwards = fit(SATURATING, X, column(0.1 + 0.001 * since**2), GRID)  # which no saturating law follows
    assert (np.diff(upwards.predict(X)[:, 0], 2) <= 1e-12).all()


def test_laws_are_recovered_under_noise_in_all_columns() -> None:
    since, noise = X - X[0], np.random.default_rng(5).normal(0, 0.002, (len(X), 400))
    slopes = fit(LOGARITHM, X, column(0.1 + 0.02 * since) + noise, GRID).exponent
    # Least squares: sd / sqrt(sum of squares from the mean), of 9 half decades 60 / 4 x ln(10)^2.
    assert slopes.std() == pytest.approx(0.002 / math.sqrt(15) / math.log(10), rel=0.15)
    powers = fit(POWER, X, column(8 * np.exp(-0.05 * since)) * np.exp(noise), GRID).exponent
    assert (slopes.mean(), powers.mean()) == pytest.approx((0.02, -0.05), abs=1e-4)
    ends = fit(SATURATING, X, column(0.3 - 0.2 * np.exp(-0.4 * since)) + noise, GRID)
    assert np.median(ends.exponent) == pytest.approx(0.4, rel=0.1)


def test_the_held_out_budgets_are_predicted_from_the_others() -> None:
    of = Frontier([13, 14, 15, 16], column([1.0, 2.0, 3.0, 2.0]), ["a"] * 4)
    errors = [judge(LOGARITHM, of, held_out, GRID)[1] for held_out in (1, 2)]
    assert np.ravel(errors) == pytest.approx([1.0, 0.5])  # 4 where it is 2; 3 and 4 where they are 3 and 2
    assert judge(SATURATING, of, 1, GRID)[1] is None  # four numbers, three budgets
    assert growth(of, [13, 14, 15])[0] == pytest.approx(0.5)  # 1 a decade, where the mean is 2


def test_the_frontier_is_the_best_mean_and_seeds_are_drawn_whole() -> None:
    points = {
        "small": {0: {13.0: 0.1, 14.0: 0.2}, 1: {13.0: 0.3, 14.0: 0.4}},
        "large": {0: {14.0: 0.1, 15.0: 0.9}, 1: {14.0: 0.6, 15.0: 0.65}},
    }
    of = frontier(points, 300, np.random.default_rng(0))
    assert (of.budgets, of.best) == ([13, 14, 15], [("small", 13), ("large", 14), ("large", 15)])
    assert of.values[:, 0] == pytest.approx([0.2, 0.35, 0.775])
    # Of two seeds a mean is one of three; large is 0.1 and 0.9, 0.35 and 0.775, or 0.6 and 0.65 at once. Large
    # counts at 14, also in draws where small is better.
    small, large = (0.1, 0.2, 0.3), ((0.1, 0.9), (0.35, 0.775), (0.6, 0.65))
    assert {tuple(draw) for draw in of.values.T.round(6)} == {(one, *two) for one in small for two in large}
    least = frontier(points, 0, np.random.default_rng(0), more_is_better=False)
    # No run of a larger budget is less than the first one, which does not use it up.
    assert (least.values[:, 0].round(6).tolist(), least.best) == ([0.2, 0.2, 0.2], [("small", 13)] * 3)
    of = frontier({"small": {0: {13.0: 0.1, 14.0: 0.4}, 1: {13.0: 0.5}}}, 200, np.random.default_rng(0))
    assert of.values[:, 0] == pytest.approx([0.3, 0.4])  # the second seed failed
    assert {tuple(draw) for draw in of.values.T.round(6)} == {(0.1, 0.4), (0.3, 0.4)}  # none of that seed alone
    same = {"small": {0: {13.0: 0.1, 14.0: 0.25}}, "large": {0: {13.0: 0.25}}}
    assert frontier(same, 0, np.random.default_rng(0)).best == [("large", 13), ("large", 13)]  # the cheaper one


@pytest.mark.parametrize(
    ("seeds", "confidence", "slope", "least", "most"),
    # Student's t with 2 degrees of freedom is in +-1.96 sqrt(2 / 3), as far as a bootstrap goes, with probability 0.75.
    # Where quality has stopped, its best so far rises by chance, a little.
    [
        (3, None, 0.02, 60, 85),
        (3, 95, 0.02, 89, 99),
        (10, None, 0.02, 82, 99),
        (10, 95, 0.02, 89, 99),
        (3, 95, 0, 83, 99),
    ],
)
def test_the_band_of_an_exponent_covers_it(
    seeds: int, confidence: float | None, slope: float, least: int, most: int
) -> None:
    random, inside = np.random.default_rng(1), 0
    for _ in range(100):
        runs = 0.1 + slope * (X - X[0]) + random.normal(0, 0.01, (seeds, len(X)))
        points = {"size": {seed: dict(enumerate(run)) for seed, run in enumerate(runs)}}
        of = frontier(points, 200, random, confidence=confidence)
        _, low, high = band(fit(LOGARITHM, X, of.values, GRID).exponent, 95)
        inside += low <= slope <= high
    assert least <= inside <= most


def test_bands_cover_where_a_seed_failed_before_the_last_budgets() -> None:
    # Of two seeds the band of a mean ends at both: Student's t with 1 degree of freedom is in +-9.17 with probability
    # 0.93. Widened as of three, in +-2.69, it were so with 0.77.
    random, draws, last, slope = np.random.default_rng(1), 300, 0, 0
    for _ in range(draws):
        runs = 0.1 + 0.02 * (X - X[0]) + random.normal(0, 0.01, (3, len(X)))
        points = {seed: dict(list(enumerate(run))[: 6 if seed == 2 else None]) for seed, run in enumerate(runs)}
        of = frontier({"size": points}, 200, random, confidence=95)
        low, high = band(of.values[-1], 95)[1:]
        last += low <= 0.1 + 0.02 * (X[-1] - X[0]) <= high
        low, high = band(fit(LOGARITHM, X, of.values, GRID).exponent, 95)[1:]
        slope += low <= 0.02 <= high
    assert 0.89 * draws <= last <= 0.97 * draws
    assert slope >= 0.93 * draws  # of budgets of two seeds and of three: wider than need be


def test_deviations_are_widened_as_few_seeds_need() -> None:
    # Of tables: Student's 4.3027 and 2.7764 (95 %, two and four degrees of freedom), the normal's 1.95996.
    assert widening(3, 95) == pytest.approx(math.sqrt(3 / 2) * 4.3027 / 1.95996, rel=1e-4)
    assert widening(5, 95) == pytest.approx(math.sqrt(5 / 4) * 2.7764 / 1.95996, rel=1e-4)
    assert widening(1, 95) == 1
    points = {"size": {0: {13.0: 0.1}, 1: {13.0: 0.3}}}
    of = frontier(points, 100, np.random.default_rng(0), confidence=95)  # of two seeds: 12.7062
    reached = 0.1 * math.sqrt(2) * 12.7062 / 1.95996
    assert of.values[0, 0] == pytest.approx(0.2)
    assert sorted(set(of.values[0].round(4))) == pytest.approx([0.2 - reached, 0.2, 0.2 + reached], abs=1e-4)
    # The third seed failed: three at the first budget, two at the second.
    points = {"size": {0: {13.0: 0.1, 14.0: 0.4}, 1: {13.0: 0.3, 14.0: 0.6}, 2: {13.0: 0.2}}}
    of = frontier(points, 200, np.random.default_rng(0), confidence=95)
    of_three = 0.1 * math.sqrt(3 / 2) * 4.3027 / 1.95996
    assert of.values.max(axis=1) == pytest.approx([0.2 + of_three, 0.5 + reached], abs=1e-4)


def made_up(slopes: dict[str, float], ends: int = 6, spread: float = 0.0, **axes: Any) -> list[Row]:
    """Rows of an H200, of so many half decades from 13: HR@10 of 0.1 and each encoder's slope by lg C, in three seeds
    that differ by 0.001, and in their slopes by `spread`."""
    found = []
    for encoder, slope in slopes.items():
        for budget in [13 + n / 2 for n in range(ends)]:
            case = {"data": "ml-1m", "part": "p", "model": encoder, "encoder": encoder, "dim": 64, "blocks": 2} | axes
            case |= {"max_len": 200, "log10_flops": budget}
            for seed in (0, 1, 2):
                quality = 0.1 + (slope + spread * (seed - 1)) * (budget - 13) + 0.001 * seed
                metrics = {"hr@10": quality, "ndcg@10": 0.1, "loss": 7.0, "coverage@10": 0.5, "popularity@10": 0.75}
                found += [row(case, name, value, "fraction", repetition=seed) for name, value in metrics.items()]
            found += [row(case, name, 1.5, "s") for name in ("flops", "passes", "seconds")]
    return [one | {"device": "H200", "commit": "a" * 40, "data_sha256": "b" * 64} for one in found]


def report(rows: list[Row]) -> tuple[str, Any, list[Row]]:
    """The report of the study with the runs and best predictors of made-up rows beside its own."""
    content: dict[str, Any] = deepcopy(CONTENT)
    sizes: dict[tuple[Any, ...], list[Row]] = {}
    content["measure"]["generated"] += [one["data"] for one in rows if one["part"] == study.BEST]
    for one in (one for one in rows if "log10_flops" in one):
        names = ("data", "part", "model", "dim", "blocks", "max_len", "power")
        sizes.setdefault(tuple(one.get(name) for name in names), []).append(one)
    for (data, part, model, dim, blocks, max_len, power), of_size in sizes.items():
        ends = {one["log10_flops"] for one in of_size}
        runs = {"log10_flops": max(ends), "levels": round(2 * (max(ends) - min(ends))) + 1, "together": part}
        size = {"model.dim": dim, "model.blocks": blocks, "training.max_len": max_len}
        seeds = sorted({one["repetition"] for one in of_size if "repetition" in one})
        group = {"dataset": data, "models": [model], "seeds": seeds, "set": size}
        content["measure"]["runs"].append(group | {"with": runs | ({"power": power} if power else {})})
    return shown.report(rows, content)


@pytest.mark.parametrize(
    ("slopes", "spread", "holds"),  # a tenth or so is the mean: 0.02 is a gain of 14 % a decade
    [
        ({"hstu": 0.02, "sasrec": 0.0, "transformer++": -0.001}, 0.0, 1),
        ({"hstu": 0.02, "sasrec": 0.002}, 0.0, 1),  # which is no gain
        ({"hstu": 0.02, "sasrec": 0.0, "transformer++": 0.01}, 0.0, -1),  # which scales too
        ({"hstu": -0.02, "sasrec": -0.01}, 0.0, -1),  # HSTU does not
        ({"hstu": 0.004, "sasrec": 0.0}, 0.01, 0),  # seeds do not agree
        ({"hstu": 0.02, "sasrec": 0.003}, 0.0005, 0),  # nor whether the other one stops, though it gains less
        ({"hstu": 0.02}, 0.0, None),  # beside nothing
        ({"sasrec": 0.02}, 0.0, None),
    ],
)
def test_the_verdict_needs_ours_to_scale_and_others_to_stop(
    slopes: dict[str, float], spread: float, holds: int | None
) -> None:
    text, figure, lines = report(made_up(slopes, spread=spread))
    assert [line["holds"] for line in lines if line.get("claim") == shown.SCALES] == (
        [holds] if holds is not None else []
    )
    words = {1: "holds", -1: "does not hold", 0: "not decided"}
    assert holds is None or f"- {shown.SCALES}: {words[holds]} (lg C 13.5 to 15.5: HSTU" in text
    assert "from lg C 13 to 15.5, coverage@10 0.500 to 0.500, popularity@10 0.750 to 0.750" in text
    assert len(figure.axes) == 3


@pytest.mark.parametrize(("best", "holds"), [(0.1065, 0), (0.1085, -1)])
def test_nothing_is_decided_where_the_best_predictor_leaves_no_room(best: float, holds: int) -> None:
    """A gain of 3 % a decade is asked for: 0.1015 at the first of two decades would end at 0.1077."""
    known = row({"data": "ml-1m", "part": study.BEST, "model": study.KNOWN}, "hr@10", best, "fraction")
    rows = [*made_up({"hstu": 0.001, "sasrec": 0.0}), known | {"device": "H200", "commit": "a" * 40}]
    text, _, lines = report(rows)
    (verdict,) = [line for line in lines if line.get("claim") == shown.SCALES]
    assert verdict["holds"] == holds
    assert verdict["words"].endswith(f", to the best predictor {(best - 0.1015) / 2 / 0.1025:+.2%}")
    assert verdict["words"] in text


def test_a_budget_need_not_be_used_up() -> None:
    small, large = made_up({"hstu": 0.02}, 2), made_up({"hstu": 0.0}, 4, dim=512)[-54:]
    for one in [one for one in small if one["metric"] == "coverage@10"]:
        one["value"] = one["log10_flops"] / 100
    text, figure, lines = report([*small, *large])
    cells = [[part.strip() for part in line.split("|")[1:5]] for line in text.splitlines() if "| HSTU " in line]
    assert ["13.5", "HSTU", "64x2, 200", "**0.1110 ± 0.0010**"] in cells
    assert ["14.5", "HSTU", "512x2, 200", "0.1010 ± 0.0010"] in cells
    # 0.101, and then 0.111 at three budgets: of a line by 0, 1, 2 and 3 half decades 0.003 each.
    assert lines[0]["law"] == LOGARITHM
    assert lines[0]["exponent"] == pytest.approx(0.006 / math.log(10), rel=1e-4)
    assert [*figure.axes[2].lines[1].get_ydata()] == pytest.approx([0.13, 0.135, 0.135, 0.135])  # of coverage
    assert "coverage@10 0.130 to 0.135" in text
    # Where nothing grows, an exponent is 0, without what rounding leaves.
    text, _, lines = report(made_up({"hstu": 0.0}, 4))
    assert [str(lines[0][key]) for key in ("exponent", "exponent/low", "exponent/high")] == ["0.0"] * 3
    assert "0.0000 [0.0000, 0.0000]" in text
    assert "-0.0000" not in text


def test_dots_are_drawn_in_order() -> None:
    """So that a figure is the same, whatever Python's hashes of texts are."""
    rows = [row for dim in (64, 128, 256, 512) for row in made_up({"hstu": 0.01}, 4, dim=dim)]
    dots = report(rows)[1].axes[0].lines[0]
    assert (np.diff(np.asarray(dots.get_xdata(), dtype=float)) >= 0).all()


def test_what_the_best_predictor_expects_is_in_words_and_drawn(tmp_path: Path) -> None:
    case = {"data": "ml-1m", "part": study.BEST, "model": KNOWN}
    best = [row(case, "hr@10", 0.25, "fraction"), row(case, "loss", 5.5, "nats")]
    rows = [*made_up({"hstu": 0.02}), *(one | {"device": "H200", "commit": "a" * 40} for one in best)]
    text, figure, _ = report(rows)
    assert "- the best predictor, which knows all but the next, expects HR@10 0.2500, loss 5.5000" in text
    drawn = [[line.get_ydata()[0] for line in axis.lines if line.get_linestyle() == ":"] for axis in figure.axes]
    assert drawn == [[0.25], [5.5], []]


def test_the_best_predictor_is_of_the_records_that_runs_are_tested_on(tmp_path: Path) -> None:
    plan, made = deepcopy(PLAN), {"records": 200, "length": 17, "items": 300, "categories": 6}
    plan["generated"]["stream"]["synthesize"] |= made
    stream = Stream(seed=plan["generated"]["stream"]["synthesize"]["seed"], **made)
    write_stream(stream, tmp_path / "processed/stream")
    rows = study.measure({"data": "stream", "part": study.BEST}, plan | {"device": "cpu"}, tmp_path)
    assert [(one["model"], one["metric"], one["unit"]) for one in rows] == [
        (KNOWN, "hr@10", "fraction"),
        (KNOWN, "loss", "nats"),
    ]
    # The last tenth.
    expected = [ceilings(stream, 180, 200)["known"][0], least_loss(stream, 180, 200)]
    assert [one["value"] for one in rows] == pytest.approx(expected, abs=1e-5)
    assert all(one["data_sha256"] for one in rows)
    plan["generated"]["stream"]["synthesize"]["seed"] += 1
    with pytest.raises(StepError, match="stream is not what its settings make: record 180 differs"):
        study.measure({"data": "stream", "part": study.BEST}, plan | {"device": "cpu"}, tmp_path)


def test_laws_are_told_apart_by_what_they_predict() -> None:
    straight = made_up({"hstu": 0.02}, 8)
    bent = deepcopy(straight)
    for one in (one for one in bent if one["metric"] == "hr@10"):
        one["value"] = 0.3 - 0.2 * 10 ** (-0.4 * (one["log10_flops"] - 13)) + 0.0001 * one["repetition"]
    for rows, share in ((straight, "100.0%"), (bent, "0.0%")):
        assert f"better than the saturating law in {share} of draws" in report(rows)[0]
    assert report(straight)[2][0]["exponent"] == pytest.approx(0.02 / math.log(10), rel=1e-4)


def test_a_part_of_the_runs_can_be_reported_and_the_best_size_is_in_bold() -> None:
    small, large = made_up({"hstu": 0.01}, 2), made_up({"hstu": 0.03}, 2, dim=128)[-18:]
    failed = small[-1] | {"metric": "failed", "unit": "of 1", "repetition": 7, "seen": "not a number"}
    text, _, lines = report([*small, *large, failed])
    cells = [[part.strip() for part in line.split("|")[1:5]] for line in text.splitlines() if "| HSTU " in line]
    assert ["13", "HSTU", "64x2, 200", "**0.1010 ± 0.0010**"] in cells
    assert ["13.5", "HSTU", "64x2, 200", "0.1060 ± 0.0010"] in cells
    assert ["13.5", "HSTU", "128x2, 200", "**0.1160 ± 0.0010**"] in cells
    assert "- hstu, 64x2, 200, seed 7: not a number" in text
    assert "Learning rate 0.001 x (64 / d) ^ p, p: HSTU 0.5, SASRec 1, Transformer++ 0.5, the better" in text
    assert not [line for line in lines if line["part"] == "verdict" or "error" in line]
    with pytest.raises(StepError, match="no run of the rows was tested"):
        report([failed])


def test_what_is_not_measured_yet_is_named_as_only_takes_it() -> None:
    found = shown.unmeasured([], CONTENT["measure"])
    assert found == [" ".join(case.values()) for case in study.cases(PLAN)]
    assert found[:2] == ["ml-1m small", "ml-1m shapes"]
    assert found[-3:] == ["stream 1024x16-hstu-position-2", "stream rates", "stream best predictor"]
    lines = [{"data": "ml-1m", "part": "small", "dim": 32}, {"data": "stream", "part": study.BEST}]
    assert shown.unmeasured(lines, CONTENT["measure"]) == found[1:-1]
    text, _, _ = report(made_up({"hstu": 0.01}, 2))
    assert f"Not measured yet: {', '.join(found)}." in text.splitlines()


def test_what_one_device_has_and_another_lacks_is_named_of_it() -> None:
    every = [dict(zip(("data", "part"), case.values(), strict=True)) for case in study.cases(PLAN)]
    h200, h100 = ([case | {"device": device} for case in every] for device in ("H200", "H100"))
    plan = CONTENT["measure"]
    assert shown.not_measured([*h200, *h100], plan) == ""
    # H200 lacks the first and second case, H100 the second and the last.
    said = shown.not_measured([*h200[2:], *h100[:1], *h100[2:-1]], plan)
    assert said == "Not measured yet: ml-1m shapes; on H200 ml-1m small; on H100 stream best predictor."
    assert shown.not_measured(h200[1:], plan) == "Not measured yet: ml-1m small."
    assert shown.not_measured([*h200, *h100[1:]], plan) == "Not measured yet: on H100 ml-1m small."
    # In the report; empty parts leave no empty lines.
    rows = [one | {"device": device} for device in ("H200", "H100") for one in made_up({"hstu": 0.01}, 2)]
    small = [row | {"part": "small"} for row in rows if row["device"] == "H100"]
    text, _, _ = report([*rows, *small])
    assert "; on H200 ml-1m small." in text


def planned_rows(**axes: Any) -> list[Row]:
    """Rows of the smallest size of MovieLens-1M, as the study plans them, but for these axes."""
    return [one | {"part": "small", "dim": 32} | axes for one in made_up({"hstu": 0.01}, 1)]


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        ({"part": "p"}, "part p, model hstu, dim 32, blocks 2, max_len 200, log10_flops 13.0, repetition 0: the study"),
        ({"data": "ml-20m"}, "rows of H200, data ml-20m, part small"),
        ({"model": "hstu-position"}, "model hstu-position"),
        ({"dim": 48}, "dim 48, blocks 2"),
        ({"blocks": 3}, "dim 32, blocks 3"),
        ({"log10_flops": 11.0}, "log10_flops 11.0"),  # the study plans 11.5 to 13
        ({"log10_flops": 12.25}, "log10_flops 12.25"),  # as of four budgets a decade
        ({"repetition": 3}, "repetition 3"),
        ({"power": 0.5}, "power 0.5"),
        ({"part": study.BEST}, "part best predictor, model hstu"),
    ],
)
def test_rows_of_other_settings_are_refused(axes: dict[str, Any], said: str) -> None:
    assert "64x2" not in shown.report(planned_rows(), CONTENT)[0]  # they fit
    with pytest.raises(StepError, match="the study plans no such run now") as refused:
        shown.report(planned_rows(**axes), CONTENT)
    assert said in str(refused.value)


def test_rows_that_lack_what_settings_ask_for_are_refused() -> None:
    content = deepcopy(CONTENT)
    content["measure"]["settings"]["metrics"].append("hr@50")
    with pytest.raises(StepError, match="repetition 0: they have no hr@50; measure the case again"):
        shown.report(planned_rows(), content)
    content = deepcopy(CONTENT)
    content["measure"]["settings"]["a_decade"] = 4  # of four levels, 12.25 to 13
    with pytest.raises(StepError, match=r"log10_flops 12\.0, repetition 0: the study plans no such run now"):
        shown.report(planned_rows(log10_flops=12.0), content)
    content = deepcopy(CONTENT)
    content["measure"]["generated"] = []
    best = row({"data": "stream", "part": study.BEST, "model": KNOWN}, "hr@10", 0.25, "fraction")
    with pytest.raises(StepError, match=r"data stream, part best predictor, .*: the study plans no such run now"):
        shown.report([best | {"device": "H200", "commit": "a" * 40}], content)


def test_a_trial_of_learning_rates_is_no_size() -> None:
    rows = made_up({"hstu": 0.01}, 2)
    tried = [made_up({encoder: 0.5}, 1, power=power)[:5] for encoder in ("sasrec", "hstu") for power in (0.5, 1.0)]
    text, _, lines = report([*rows, *itertools.chain.from_iterable(tried)])
    cells = [[part.strip() for part in line.split("|")[1:-1]] for line in text.splitlines() if "| 64x2, 200 |" in line]
    assert cells[-4:] == [
        [encoder, "64x2, 200", "13", power, "7.0000"] for encoder in ("HSTU", "SASRec") for power in ("0.5", "1")
    ]
    assert lines == report(rows)[2]


def test_what_the_claim_asks_for_is_what_the_report_says() -> None:
    asked = params.load("claims", ROOT / "params")["claims"]["scaling-law"]["decided"]
    assert asked["rows"] == {"claim": shown.SCALES}
    assert [place["data"] for place in asked["places"]] == list(PLAN["data"]["processed"])
