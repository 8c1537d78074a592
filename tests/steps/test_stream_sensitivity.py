"""The study of other streams: cases, what is measured of one, and a report whose verdicts are worked out by hand."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from steps.common import params, studies
from steps.common.cli import StepError
from steps.studies import stream_sensitivity
from steps.studies.rows import FAILED, Row, row
from steps.studies.stream_ceiling import KNOWN, TOLD, ceilings, expected
from steps.studies.stream_sensitivity import cases, measure, require, stream_of
from steps.studies.stream_sensitivity_report import CLAIMS, HOLDS, REVERSED, UNDECIDED, report
from steps.study import chosen
from tests.conftest import ROOT
from tests.steps.test_studies import require_numbers_of_rows, small

STUDY = "stream-sensitivity"
CONTENT = params.load(f"studies/{STUDY}", ROOT / "params")
MACHINE = {"device": "H200", "commit": "a" * 40, "data_sha256": "b" * 64}


def test_each_case_changes_one_setting_of_the_stream() -> None:
    plan = studies.plan(STUDY, ROOT / "params")
    found = cases(plan)
    assert len(found) == len(CONTENT["measure"]["settings"]["opened"]) + 4 == 8
    usual = {"opened": 60, "least_a": 1, "most_a": 500}
    assert usual in found
    assert all(case.items() & usual.items() for case in found)
    require(found, plan)  # each has an open item in every category at first
    assert stream_of(plan, {}).records == 100_000
    assert chosen(found, ["opened=95", "least_a=1"]) == [usual | {"opened": 95}]
    assert chosen(found, ["most_a=1"]) == [usual | {"most_a": 1}]


def test_a_stream_that_cannot_be_made_is_refused_before_anything_is_measured() -> None:
    plan = studies.plan(STUDY, ROOT / "params")
    case = {"opened": 99, "least_a": 1, "most_a": 500}
    with pytest.raises(StepError, match=r"'opened': 99.*items: 20000 are too few for 100 categories"):
        require([case], plan)


def test_a_plan_that_is_changed_changes_no_other() -> None:
    studies.plan(STUDY, ROOT / "params")["generated"]["stream"]["synthesize"]["items"] = 300
    assert stream_of(studies.plan(STUDY, ROOT / "params"), {}).items == 20_000


def test_the_most_of_many_records_is_the_mean_of_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stream = stream_of(small(STUDY, tmp_path), {})
    whole = ceilings(stream, 10, 75)
    monkeypatch.setattr("steps.studies.stream_ceiling._AT_ONCE", 20)
    parts = expected(stream, 10, 75)
    assert parts.keys() == whole.keys()
    assert all(parts[name] == pytest.approx(whole[name]) for name in whole)


def test_a_case_has_its_models_by_seed_and_the_most_that_any_can_expect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = small(STUDY, tmp_path)
    plan["runs"][0]["configs"] = plan["runs"][0]["configs"][:3]
    case = {"opened": 30, "least_a": 1, "most_a": 500}
    together = stream_sensitivity.train_together

    def one_fails(trainings: list[Any]) -> Iterator[tuple[int, Exception | None]]:
        assert len(trainings) == 3
        assert all(training.split.held_out["test"].users.tolist() == list(range(72, 80)) for training in trainings)
        assert torch.equal(trainings[0].sequences.item, trainings[2].sequences.item)
        yield 1, StepError("it diverged")
        yield from ((index * 2, failure) for index, failure in together([trainings[0], trainings[2]]))

    monkeypatch.setattr(stream_sensitivity, "train_together", one_fails)
    rows = measure(case, plan, tmp_path)
    metrics = ["hr@10", "hr@50", "hr@200"]
    of_models = [one for one in rows if one["model"] not in (KNOWN, TOLD) and one["metric"] != FAILED]
    assert [(one["model"], one["metric"], one["repetition"]) for one in of_models] == [
        (model, metric, seed) for model, seed in (("sasrec", 0), ("hstu-softmax", 0)) for metric in metrics
    ]
    assert all(case.items() <= one.items() for one in rows)
    (failed,) = [one for one in rows if one["metric"] == FAILED]
    assert (failed["model"], failed["repetition"], failed["seen"]) == ("sasrec", 1, "it diverged")
    most = ceilings(stream_of(plan, case), 72, 80)
    for model, name in ((KNOWN, "known"), (TOLD, "told")):
        values = [one["value"] for one in rows if one["model"] == model]
        assert values == pytest.approx(most[name], abs=1e-6)
    assert len({one["data_sha256"] for one in rows}) == 1


def test_an_error_that_is_no_divergence_ends_the_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = small(STUDY, tmp_path)
    plan["runs"][0]["configs"] = plan["runs"][0]["configs"][:1]
    monkeypatch.setattr(stream_sensitivity, "train_together", lambda trainings: iter([(0, RuntimeError("no memory"))]))
    with pytest.raises(RuntimeError, match="no memory"):
        measure({"opened": 30, "least_a": 1, "most_a": 500}, plan, tmp_path)


# The report


def rows_of(case: dict[str, int], values: dict[str, list[float]], most: float) -> list[Row]:
    """Of each model its seeds' values, twice and four times as much by the other metrics, and the two predictors."""
    scales = {"hr@10": 1, "hr@50": 2, "hr@200": 4}
    found = [
        row(case | {"model": model}, metric, round(value * scale, 6), "fraction", repetition=seed)
        for model, seeds in values.items()
        for seed, value in enumerate(seeds)
        for metric, scale in scales.items()
    ]
    found += [
        row(case | {"model": model}, metric, most * scale * more, "fraction")
        for model, more in ((KNOWN, 1), (TOLD, 1.5))
        for metric, scale in scales.items()
    ]
    return [one | MACHINE for one in found]


ROWS = [
    *rows_of(
        {"opened": 0, "least_a": 1, "most_a": 500},
        {
            "sasrec": [0.020, 0.021, 0.019],
            "hstu-softmax": [0.022, 0.0205, 0.023],
            "hstu-no-bias": [0.03, 0.031, 0.029],
            "hstu-position": [0.03, 0.03, 0.03],
        },
        0.04,
    ),
    *rows_of(
        {"opened": 60, "least_a": 1, "most_a": 500},
        {"sasrec": [0.010, 0.011], "hstu-softmax": [0.020, 0.021], "hstu-no-bias": [0.018, 0.019]},
        0.036,
    ),
    *rows_of(
        {"opened": 60, "least_a": 10, "most_a": 10},
        {"sasrec": [0.010, 0.011], "hstu-softmax": [0.020], "hstu-no-bias": [0.040, 0.044]},
        0.05,
    ),
]
ROWS.append(
    row({"opened": 60, "least_a": 10, "most_a": 10, "model": "hstu-softmax"}, FAILED, 1, "of 1", repetition=1, seen="x")
    | MACHINE
)


def test_verdicts_are_of_all_seeds_and_ratios_of_means() -> None:
    text, _, table = report(ROWS, CONTENT)
    said = {(line["claim"], line["metric"]): line for line in table if line["part"] == "claim"}
    attention, softmax, whole = (
        [said[claim, "hr@10"][word] for word in (HOLDS, REVERSED, UNDECIDED)] for claim in CLAIMS
    )
    # A failed seed of softmax attention decides nothing; ranges that touch decide nothing.
    assert (attention, softmax, whole) == ([1, 1, 1], [1, 0, 2], [3, 0, 0])
    counts = "of 3 cases it holds in 1, is the other way round in 1, is not decided in 1"
    assert f"HR@10, {next(iter(CLAIMS))}: {counts}" in text
    assert "ratio 0.90 to 2.10, in the paper 1.45" in text
    assert "ratio 1.50 to 4.00, in the paper 2.02" in text
    assert "it holds in 3, is the other way round in 0, is not decided in 0; ratio 1.50 to 4.00\n" in text  # of HR@200
    assert "opened 60 %, a 10, HSTU with softmax, seed 1: x" in text


def test_a_table_has_means_ends_and_the_most() -> None:
    text, _, table = report(ROWS, CONTENT)
    first = next(line for line in text.splitlines() if line.startswith("| opened 0 %, a 1 to 500"))
    cells = [cell.strip() for cell in first.split("|")[2:-1]]
    assert cells[0] == "0.0200 [0.0190, 0.0210]"
    assert cells[2:6] == ["0.0300 [0.0290, 0.0310]", "0.0300 [0.0300, 0.0300]", "0.0400", "0.0600"]
    assert cells[6:] == ["1.37", "1.09", "1.50"]
    (line,) = [one for one in table if (one["part"], one.get("model"), one.get("opened")) == ("model", "sasrec", 0)]
    assert (line["hr@50/low"], line["hr@50"], line["hr@50/high"], line["seeds"]) == (0.038, 0.04, 0.042, 3)
    assert (line["device"], line["data_sha256"]) == ("H200", "b" * 64)


def test_a_sentence_says_what_moves_with_each_setting() -> None:
    text = report(ROWS, CONTENT)[0]
    opened, a = [line for line in text.splitlines() if line.startswith("- HR@10 from")]
    assert opened.startswith(
        "- HR@10 from opened 0 %, a 1 to 500 to opened 60 %, a 1 to 500: "
        "Transformer 0.0200 to 0.0105 (50% to 29% of the most), "
        "HSTU with softmax 0.0218 to 0.0205 (55% to 57% of the most)"
    )
    assert "bias of position" not in opened  # which one end lacks
    assert a.startswith("- HR@10 from opened 60 %, a 10 to opened 60 %, a 1 to 500: Transformer 0.0105 to 0.0105")


def test_every_number_of_the_report_comes_from_its_rows() -> None:
    require_numbers_of_rows(ROWS, CONTENT)


def test_devices_stand_apart_and_one_case_alone_has_a_report() -> None:
    others = [one | {"device": "CPU"} for one in ROWS if one["opened"] == 0]
    text, figure, table = report(others, CONTENT)
    assert "from opened" not in text
    assert len(figure.axes) == len(CONTENT["measure"]["settings"]["metrics"])
    text, _, table = report([*ROWS, *others], CONTENT)
    assert [line for line in text.splitlines() if line.startswith("## ")] == ["## H200", "## CPU"]
    assert {line["device"] for line in table} == {"H200", "CPU"}


def test_the_published_figures_are_those_of_the_paper() -> None:
    paper = params.load("paper", ROOT / "params")["public_datasets"]["stream"]
    rows = CONTENT["published"]["rows"]
    metrics = "hr@10", "hr@50"
    assert {one["model"]: [one[name] for name in metrics] for one in rows} == {
        model: [figures[name] for name in metrics] for model, figures in paper.items()
    }
