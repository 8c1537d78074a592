"""Parity: each figure beside its like, shares and verdicts, and the curve at the rerun's epochs."""

from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl

from steps.common import params
from steps.common.params import Run
from steps.reporting.outcomes import TestRanks
from steps.reporting.parity import compared_protocols, curve_table, independent_table, orderings, parity_table
from steps.reporting.plots import Shown
from steps.reporting.published import published_figures
from steps.reporting.records import Record
from steps.reporting.task import load_task
from steps.tabulate import sections
from tests.conftest import ROOT

PAPER: dict[str, Any] = {
    "public_datasets": {
        "d": {
            "hstu": {"source": "readme", "hr@10": 0.3, "ndcg@10": 0.2},
            "sasrec": {"source": "readme", "hr@10": 0.1, "ndcg@10": 0.1},
        }
    },
    "sources": {"us": "another team", "readme": "the authors"},
    "independent": {
        "d": [
            {"source": "us", "model": "their HSTU", "row": "hstu", "hr@10": 0.31, "ndcg@10": 0.21},
            {"source": "us", "model": "unlike ours", "hr@10": 0.31, "ndcg@10": 0.21},
        ]
    },
    "reruns": {
        "d": {
            "hstu": {
                "best": {"hr@10": 0.28, "ndcg@10": 0.19},
                "epochs": {1: {"hr@10": 0.1, "ndcg@10": 0.05}, 3: {"hr@10": 0.25, "ndcg@10": 0.16}},
            }
        }
    },
}


def record(
    seed: int, last: float, best: float, protocol: str = "paper", model: str = "hstu", epochs: int = 3
) -> Record:
    history = [
        {"epoch": epoch, "test/hr@10": last * epoch / epochs, "test/ndcg@10": 0.5 * last * epoch / epochs}
        for epoch in range(1, epochs + 1)
    ]
    metrics = {
        "test": {"hr@10": last, "ndcg@10": 0.5 * last},
        "test_best": {"hr@10": best, "ndcg@10": 0.5 * best, "epoch": 2},
    }
    return Record(
        Run("e", "d", model, protocol, seed),
        {"protocol": {"name": protocol}},
        history,
        metrics,
        {},
        lambda: TestRanks(*[np.zeros(0, dtype=np.int64)] * 3),
    )


def test_best_stands_beside_published_and_last_beside_the_rerun_s_last() -> None:
    headers, lines = parity_table(
        [record(0, 0.242, 0.290), record(1, 0.25, 0.2996), record(0, 0.9, 0.9, "strict")], PAPER
    )
    first, second = (dict(zip(headers, line, strict=True)) for line in lines)
    assert [first[name] for name in ("published", "rerun best", "rerun last")] == ["0.3000", "0.2800", "0.2500"]
    assert first["ours best"].startswith("0.2948 ± 0.0068")
    assert first["ours last"].startswith("0.2460 ± 0.0057")
    assert first["best / published, ± 3%"] == "within (0.983)"
    assert first["last / rerun, ± 2%"] == "within (0.984)"
    assert second["best / published, ± 3%"] == "lower (0.737)"


def test_last_epochs_of_other_numbers_are_not_compared() -> None:
    headers, lines = parity_table([record(0, 0.24, 0.29, epochs=4)], PAPER)
    found = dict(zip(headers, lines[0], strict=True))
    assert (found["rerun last"], found["last / rerun, ± 2%"]) == ("", "")


def test_the_curve_has_the_epochs_that_both_have() -> None:
    headers, lines = curve_table([record(0, 0.24, 0.29), record(1, 0.26, 0.3)], PAPER)
    assert [line[2] for line in lines] == ["1", "3"]
    assert dict(zip(headers, lines[1], strict=True))["ours HR@10"].startswith("0.2500")
    assert lines[0][5] == "-16.7%"  # 0.25 / 3 beside 0.1
    assert curve_table([record(0, 0.24, 0.29, epochs=2)], PAPER)[1][0][2] == "1"


def test_models_nobody_reported_are_left_out() -> None:
    assert parity_table([record(0, 0.2, 0.2, model="markov")], PAPER)[1] == []
    assert curve_table([record(0, 0.2, 0.2, model="sasrec")], PAPER)[1] == []


def test_the_protocols_of_a_parity_table_are_named_once() -> None:
    runs = [record(0, 0.2, 0.3), record(0, 0.1, 0.1, model="sasrec"), record(0, 0.2, 0.3, "strict")]
    assert compared_protocols(runs, PAPER) == ["paper"]


def test_a_metric_that_the_rerun_alone_has_keeps_its_line() -> None:
    paper = PAPER | {"public_datasets": {"d": {"hstu": {"source": "readme", "hr@10": 0.3}}}}
    _, lines = parity_table([record(0, 0.24, 0.29)], paper)
    assert [line[2] for line in lines] == ["HR@10", "NDCG@10"]


def test_independent_runs_stand_beside_strict() -> None:
    (line,) = independent_table([record(0, 0.24, 0.29), record(0, 0.3, 0.3, "strict")], PAPER)[1]
    assert line == ["d", "their HSTU", "another team", "0.3100", "0.3000", "0.2100", "0.1500"]


def test_a_metric_that_nobody_reported_has_no_line_and_no_order() -> None:
    figures = {model: {"source": "readme", "hr@10": value} for model, value in (("hstu", 0.3), ("sasrec", 0.1))}
    paper = PAPER | {"public_datasets": {"d": figures}, "reruns": {}}
    ours = [record(0, 0.24, 0.29)]
    _, lines = parity_table(ours, paper)
    assert [line[2] for line in lines] == ["HR@10"]
    ranks = {"hstu": np.ones(3), "sasrec": np.ones(3)}
    assert orderings(figures, ranks, []) == []  # of NDCG@10
    for told, seen in ((paper, {}), (PAPER, PAPER["public_datasets"]["d"])):
        assert Shown(ours, {}, {}, told).others("public_datasets", "d", "paper") == seen


def test_a_table_has_a_column_of_each_metric_that_somebody_reported() -> None:
    task = load_task()
    names = [f"{part}/{name}{end}" for part in ("test", "test_best") for name in task.tables for end in ("", "/sd")]
    row = {"dataset": "d", "protocol": "paper", "model": "hstu", "seeds": 2} | dict.fromkeys(names, 0.5)
    texts = [{"d": "D"}, {"hstu": "HSTU"}, {"d": "none"}]
    for figures, seen in (({"hr@10": 0.3}, ["published HR@10"]), ({"hr@50": 0.3}, [])):
        paper = PAPER | {"public_datasets": {"d": {"hstu": figures | {"source": "readme"}}}}
        (section,) = sections(pl.DataFrame([row]), paper, *texts, task)
        assert [name for name in section.headers if name.startswith("published")] == seen
        assert {len(line) for line in section.rows} == {len(section.headers)}


def test_figures_stand_beside_the_protocols_of_their_source_alone() -> None:
    paper = params.load("paper", ROOT / "params")
    protocols = params.load("protocols", ROOT / "params")
    named = {name: set(about["published"]) for name, about in protocols.items() if "published" in about}
    assert set.union(*named.values()) <= set(paper["sources"])
    of_table_2 = published_figures(paper, "stream", "stream")
    assert set(of_table_2) == {"sasrec", "hstu-softmax", "hstu-no-bias"}
    for dataset, protocol in (("stream", "paper"), ("ml-1m", "stream"), ("ml-1m", "strict")):
        assert published_figures(paper, dataset, protocol) == {}
        runs = [replace(record(0, 0.2, 0.3, protocol), run=Run("e", dataset, "sasrec", protocol, 0))]
        assert compared_protocols(runs, paper) == []
        assert Shown(runs, {}, {}, paper).others("reruns", dataset, protocol) == {}
