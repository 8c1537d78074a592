"""The study of several processes: its generated sequences, shares, and timeline; ratios of its report by hand."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from steps.common.processes import Processes
from steps.studies import distributed
from steps.studies.distributed import (
    AT_RANDOM,
    BY_COST,
    Timeline,
    at_random,
    cases,
    generated,
    parts_of_step,
    step_rows,
)
from steps.studies.distributed_report import report
from steps.studies.rows import Row, row
from steps.training.loop import Training
from tests.steps.runs import config

FORM = {"form": "movielens-csv", "seed": 1, "folder": "x", "rows": 6000, "users": 60, "movies": 3000} | {
    "rated_movies": 1500,
    "largest_id": 9000,
}
ROWWISE = {"items": {"lr": 0.05, "dtype": "float16", "negative_pool": 50}}


def test_sequences_are_those_of_the_form_in_the_order_of_time() -> None:
    found = generated(FORM, 60, torch.device("cpu"))
    assert (found.num_users, found.num_items, len(found.item)) == (60, 3000, 6000)
    assert len(found.item.unique()) == 1500
    for first, end in zip(found.offsets[:-1].tolist(), found.offsets[1:].tolist(), strict=True):
        assert end - first >= 20
        when = list(zip(found.timestamp[first:end].tolist(), found.item[first:end].tolist(), strict=True))
        assert when == sorted(when)
        assert len(set(found.item[first:end].tolist())) == end - first


def test_at_random_each_process_has_as_many_windows() -> None:
    assert at_random([9, 1, 4, 4], 2) == [[0, 1], [2, 3]]
    assert at_random([9, 1, 4, 4, 1], 2) == [[0, 1], [2, 3, 4]]


def test_parts_of_a_timeline_add_up_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 3.0, 7.0, 15.0, 31.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    timeline = Timeline(torch.device("cpu"))  # at 0
    timeline.begin("lookup")  # at 1
    timeline.begin("all-to-all")  # at 3
    timeline.end()  # at 7
    timeline.end()  # at 15
    monkeypatch.setattr(distributed, "_now", lambda device: 0.0)
    found = timeline.milliseconds()  # at 31
    assert {part: ms for part, ms in found.items() if ms} == {"lookup": 10e3, "all-to-all": 4e3, "rest": 17e3}


@pytest.mark.usefixtures("deterministic")  # as weights are compared to the bit
@pytest.mark.parametrize("table", [{}, ROWWISE])
def test_a_watched_step_is_that_of_no_watch(table: dict[str, Any], tmp_path: Path) -> None:
    sequences = generated(FORM, 60, torch.device("cpu"))
    weights = []
    for watched in (False, True):
        training = Training(config("hstu", **table), sequences, "", tmp_path)
        training.model.train()
        torch.manual_seed(0)
        steps = training.schedule.epoch()[:2]
        if watched:
            parts = parts_of_step(training, steps, 1)
            assert all(parts[part] > 0 for part in ("lookup", "attention", "rest"))
            assert parts["waiting"] == parts["all-to-all"] == 0
        else:
            for number, step in enumerate(steps):
                training.execution(step, number)
        weights.append([tensor.clone() for tensor in training.model.state_dict().values()])
    assert all(torch.equal(*pair) for pair in zip(*weights, strict=True))


def test_one_process_has_the_rows_of_a_step() -> None:
    sequences = generated(FORM, 60, torch.device("cpu"))
    settings = config("hstu", **ROWWISE)
    found = step_rows(settings, sequences, {"steps": 2, "profiled": 1}, Processes())
    rows = {name: value for name, value, *_ in found}
    max_len, batch, dim = settings["training"]["max_len"], settings["training"]["batch"], settings["model"]["dim"]
    assert rows["tokens"] <= batch * max_len
    assert rows["load"] == 1
    assert rows["idle"] == 0
    assert rows["item bytes"] == pytest.approx(2 + 4 / dim, abs=1e-4)


PLAN = {
    "runs": [
        {"measured": "steps", "configs": [{"row": "a", "model": {}}]},
        {"measured": "steps", "configs": [{"row": "b", "model": {"items": {}}}]},
        {"measured": "quality", "configs": [{"row": "c", "model": {}}] * 2},
    ],
    "settings": {"processes": [1, 2], "windows_each": 4, "windows": 8, "balance": {"windows_each": 3}},
}


def test_cases_stand_once() -> None:
    found = [tuple(case.values()) for case in cases(PLAN)]
    steps = [("scaling", table, *sizes) for table in ("AdamW", "rowwise Adagrad") for sizes in ((4, 1), (8, 1), (8, 2))]
    shares = [("balance", shared, 6, 2) for shared in (BY_COST, AT_RANDOM)]
    assert found == [*steps, *shares, ("quality", "c", 1), ("quality", "c", 2)]


def test_ratios_of_the_report() -> None:
    def measured(case: dict[str, Any], **values: float) -> list[Row]:
        parts = {f"part: {part}": 1.0 for part in distributed.PARTS}
        origin = {"device": "H200", "commit": "c" * 40}
        return [row(case, name, value, "ms") | origin for name, value in (values | parts).items()]

    rows = []
    for windows, processes, ms in ((4, 1, 10.0), (8, 1, 18.0), (8, 2, 12.5)):
        case = {"kind": "scaling", "table": "rowwise Adagrad", "windows": windows, "processes": processes}
        rows += measured(case, step=ms, idle=0.5, tokens=8, **{"item bytes": 2.0625})
    for shared, ms in (("at random", 30.0), ("by cost", 20.0)):
        case = {"kind": "balance", "shared": shared, "windows": 6, "processes": 2}
        rows += measured(case, step=ms, idle=0.25, load=1.5)
    for seed, more in ((0, {"epochs": 3, "seconds": 7.0}), (1, {})):
        case = {"kind": "quality", "model": "hstu", "processes": 2}
        for name, value in {"best": 0.25 + seed / 10, **more}.items():
            rows.append(
                row(case, name, value, "s", repetition=seed, data_sha256="d") | {"device": "H200", "commit": "c"}
            )
    settings = PLAN["settings"] | {
        "bars": {"weak": 0.85, "sharded": 1.3, "item_bytes": 2.1, "adam_bytes": 12},
        "balance": {"max_len": 32, "windows_each": 3},
        "quality": {"metric": "ndcg@10", "target": 0.2},
    }
    text, _, lines = report(rows, {"title": "t", "measure": {"settings": settings}})
    assert len(lines) == 7
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    of = {line[0]: line[1:] for line in table}
    assert of["weak scaling, rowwise Adagrad, 2 processes, H200"] == ["0.80", ">= 0.85", "no"]  # 10 / 12.5
    assert of["step over one process's, rowwise Adagrad, 2 processes, H200"] == ["1.25", "<= 1.3", "yes"]
    assert of["bytes a float of the item vectors, rowwise Adagrad, H200"] == ["2.062", "<= 2.1", "yes"]
    two = next(line for line in table if line[:4] == ["H200", "rowwise Adagrad", "2", "8"])
    assert two[4:] == ["8", "12.500", "-", "0.80", "1.44", "-"]  # 18 / 12.5
    assert [line[-1] for line in table if line[3:4] in (["by cost"], ["at random"])] == ["1.50", "1.00"]
    (reached,) = [line for line in table if line[:2] == ["H200", "hstu"]]
    assert reached[3:] == ["1 of 2", "3 (3 to 3)", "7.0 (7.0 to 7.0)", "0.3000", "0.1000"]
    # A ratio to a case of another card is marked, and so is what it says of a bar.
    for one in rows:
        one["card"] = "a" if one.get("processes") == 1 else "b"
    text, *_ = report(rows, {"title": "t", "measure": {"settings": settings}})
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    marked = [[cell for cell in line if cell.endswith("*")] for line in cells]
    assert [found for found in marked if found] == [["0.80*", "1.44*"], ["0.80*", "no*"], ["1.25*", "yes*"]]
