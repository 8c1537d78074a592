"""The study of convergence: how samples are counted, when a target is reached, and what its report makes of that."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from steps.common import params, studies
from steps.common.cli import StepError
from steps.data.sequences import Sequences, load_sequences
from steps.studies import convergence as study
from steps.studies import convergence_report as shown
from steps.studies.rows import Row
from steps.training.loop import Training, train_together
from tests.conftest import ROOT
from tests.steps.test_models import make, schedule_of
from tests.steps.test_studies import small

CONTENT = params.load("studies/convergence", ROOT / "params")


def test_every_model_is_a_case_with_all_its_seeds() -> None:
    plan = studies.plan("convergence", ROOT / "params")
    found = study.cases(plan)
    assert [case["model"] for case in found] == ["hstu-ranking", "sasrec", "hstu", "hstu-large"]
    assert found[0] == {"data": "ml-1m", "protocol": "temporal-ranking", "model": "hstu-ranking"}
    assert all(len(runs["configs"]) == 20 for runs in plan["runs"])
    study.require(found, plan)


def test_blocks_are_the_passes_cut_where_their_samples_are_reached() -> None:
    # Three users with 3, 2 and 5 targets, whose windows end at 20, 10 and 30: one pass takes 2, 3 and 5 samples.
    offsets, time = torch.tensor([0, 4, 7, 13]), torch.tensor([1, 2, 3, 20, 1, 2, 10, 1, 2, 3, 4, 5, 30])
    data = Sequences(offsets, torch.arange(1, 14), time, 20)
    none = torch.zeros(3, dtype=torch.int64)
    whole = schedule_of(make("hstu"), data, none, batch=1, max_len=10, schedule="one-pass")
    blocks = study.Blocks(whole, 6)
    users = [[int(step.inputs[0]) for step in blocks.epoch()] for _ in range(4)]
    assert users == [[1, 0, 2], [1], [0, 2], [1, 0]]
    assert blocks.samples == [10, 12, 20, 25]


def test_of_windows_that_are_read_in_part_what_is_read_counts() -> None:
    offsets, item = torch.tensor([0, 40, 70]), torch.cat([torch.arange(1, 41), torch.arange(1, 31)])
    data = Sequences(offsets, item, torch.arange(70), 50)
    sampled = {"alpha": 1.0, "rule": "recent"}
    none = torch.zeros(2, dtype=torch.int64)
    whole = schedule_of(make("hstu"), data, none, batch=2, max_len=64, stochastic_length=sampled)
    blocks = study.Blocks(whole, 1)
    torch.manual_seed(0)
    (step,) = blocks.epoch()
    assert blocks.samples == [int(step.inputs[2].sum())]


def test_blocks_of_a_pass_train_as_epochs_do(tmp_path: Path) -> None:
    plan = small("convergence", tmp_path)
    config = plan["runs"][1]["configs"][0]
    data, digest = load_sequences(tmp_path / "processed/ml-1m", torch.device("cpu"))
    # Of 40 users of 30 interactions, two of them held out, windows of 8 targets.
    runs = {"metric": "hr@10", "every": 40 * 8, "evaluations": 3}
    curve, in_a_pass = study.train(config, runs, data, digest)
    config["training"] |= {"epochs": 3}
    plain = Training(config, data, digest, tmp_path)
    assert [failure for _, failure in train_together([plain])] == [None]
    assert in_a_pass == 320
    assert curve.samples == [320, 640, 960]
    assert curve.quality == [line["valid/hr@10"] for line in plain.history]


def test_a_target_is_reached_at_the_first_evaluation_that_is_no_lower() -> None:
    history = [
        {"train/seconds": 1.0, "valid/seconds": 0.25, "valid/auc": value, "valid/ne": 0.9}
        for value in (0.5, 0.71, 0.7, 0.69, 0.8)
    ]
    curve = study.curve_of(history, [100, 205, 301, 400, 503], "auc")
    assert [curve.reached(target) for target in (0.5, 0.7, 0.71, 0.72, 0.81)] == [0, 1, 1, 4, None]
    assert curve.training == [1, 2, 3, 4, 5]
    assert curve.elapsed == [1.25, 2.5, 3.75, 5.0, 6.25]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"every": 63}, "model sasrec: `every` is 63, and a step may have 64 samples: make it no less"),
        ({"metric": "auc"}, "model sasrec: auc is no metric of protocol strict: hr@1, "),
        ({"report": "last"}, "model sasrec: protocol strict has no validation: take one with `report: best`"),
        ({"model": "bert4rec"}, "model sasrec: is not trained on every interaction of windows"),
        ({"model": "popular"}, "model sasrec: is not trained on every interaction of windows"),
    ],
)
def test_what_cannot_be_counted_is_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    plan = small("convergence", tmp_path)
    runs = plan["runs"][1]
    for config in runs["configs"]:
        config["protocol"] |= {key: value for key, value in change.items() if key == "report"}
        config["model"] |= {key: value for key, value in change.items() if key == "model"}
    runs |= {key: value for key, value in change.items() if key in ("every", "metric")}
    with pytest.raises(StepError, match=f"study convergence, {said}"):
        study.require(study.cases(plan), plan)


def measured(model: str, crossings: list[int | None], target: float = 0.3, points: int = 3) -> list[Row]:
    """The rows of a model: by seed, the evaluation at which it comes to the target, of three of 500 samples each."""
    curves = {}
    for seed, crossing in enumerate(crossings):
        reached = [crossing is not None and number >= crossing for number in range(3)]
        samples = [500 * number + seed for number in (1, 2, 3)]
        training = list(itertools.accumulate([2.0, 1.0, 1.0]))
        elapsed = list(itertools.accumulate([2.5, 1.5, 1.5]))
        curves[seed] = study.Curve(samples, [0.4 if one else 0.1 for one in reached], training, elapsed)
    axes = {"data": "ml-1m", "protocol": "strict", "model": model, "quality": "hr@10"}
    runs = {"target": target, "every": 500, "evaluations": 3}
    origin = {"device": "H200", "commit": "0123456789", "data_sha256": "d" * 64}
    return [one | origin for one in study.rows_of(axes, runs, 1000, curves, points)]


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]


def test_the_report_says_what_the_seeds_needed() -> None:
    rows = measured("hstu", [0, 1, 2, None]) + measured("sasrec", [None, None])
    text, figure, lines = shown.report(rows, CONTENT)
    assert "## ml-1m, protocol strict, H200: HR@10 of 0.3000" in text
    # 500, 1001 and 1502 samples: mean 1001, deviation 501. 2, 3 and 4 s; 2.5, 4 and 5.5 s.
    assert ["hstu", "3 of 4 (75.0%)", "500", "1,001", "1,502", "50.0%", "1.00", "500", "1,500"] in cells(text)
    assert ["hstu", "2.00", "3.00", "4.00", "33.3%", "2.50", "4.00", "5.50", "37.5%"] in cells(text)
    assert ["sasrec", "0 of 2 (0.0%)", "", "", "", "", "", "500", "1,500"] in cells(text)
    assert len(figure.axes) == 1
    assert [(line["model"], line["reached"], line.get("samples")) for line in lines] == [
        ("hstu", 3, 1001),
        ("sasrec", 0, None),
    ]
    # After 1000 samples two of four seeds are at 0.4, the others at 0.1.
    hstu = shown.Model(shown.cases(measured("hstu", [0, 1, 2, None])))
    assert hstu.curve() == [(500, 0.175, 0.1, 0.4), (1000, 0.25, 0.1, 0.4), (1500, 0.325, 0.1, 0.4)]


def test_of_a_curve_so_many_points_are_kept_with_the_last() -> None:
    kept = {points: shown.Model(shown.cases(measured("hstu", [1], points=points))).curve() for points in (1, 2, 4)}
    samples = {points: [point[0] for point in curve] for points, curve in kept.items()}
    assert samples == {1: [1500], 2: [500, 1500], 4: [500, 1000, 1500]}


def test_one_seed_has_no_variation() -> None:
    text, _, _ = shown.report(measured("hstu", [1]), CONTENT)
    assert ["hstu", "1 of 1 (100.0%)", "1,000", "1,000", "1,000", "", "1.00", "500", "1,500"] in cells(text)


def test_other_targets_have_tables_of_their_own() -> None:
    text, figure, _ = shown.report(measured("hstu", [1, 1]) + measured("sasrec", [1, 2], target=0.2), CONTENT)
    assert "HR@10 of 0.3000" in text
    assert "HR@10 of 0.2000" in text
    assert len(figure.axes) == 2
