"""A search: the same points for every row, chosen among on validation, for an experiment that is tuned by it."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from steps import choose as step_choose
from steps.common import params, yaml_files
from steps.common.cli import StepError
from steps.reporting.records import read_records, write_records
from tests.conftest import step
from tests.steps.runs import processed_by_its_steps

GRID = {"model.optimizer.lr": [1.0e-3, 1.0e-2, 1.0e-1], "training.dropout": [0.0, 0.2]}
SEARCH = {
    "title": "A search", "datasets": ["demo"], "models": ["logistic-regression", "dlrm"],
    "protocols": ["temporal-ranking"], "seeds": [0], "training": {"epochs": 1}, "grid": GRID, "points": 3,
}  # fmt: skip


def write(project: Path, name: str, content: dict[str, Any]) -> None:
    path = project / "params/local/experiments" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml_files.dump(content))


def test_points_are_the_same_for_every_row_and_for_good(project: Path) -> None:
    root = project / "params"
    write(project, "search", SEARCH)
    found: dict[str, list[str]] = {}
    for run in params.check("search", root):
        found.setdefault(run.model.split("+")[0], []).append(run.model.split("+", 1)[1])
    assert found["dlrm"] == [  # of the six the least three by sha256sum, with a plus sign before each
        "model.optimizer.lr=0.001+training.dropout=0.0",
        "model.optimizer.lr=0.01+training.dropout=0.0",
        "model.optimizer.lr=0.1+training.dropout=0.0",
    ]
    assert found["logistic-regression"] == found["dlrm"]
    write(project, "search", SEARCH | {"points": 99})
    assert len(params.check("search", root)) == 12
    write(project, "search", {key: value for key, value in SEARCH.items() if key != "grid"})
    with pytest.raises(StepError, match="'grid' is a dependency of 'points'"):
        params.check("search", root)


def record(model: str, seed: int, protocol: str = "temporal-ranking", **metrics: Any) -> Any:
    run = params.Run("search", "demo", model, protocol, seed)
    return SimpleNamespace(run=run, config={"protocol": {"task": "ranking"}}, metrics=metrics)


def test_the_least_mean_over_seeds_is_chosen() -> None:
    values = {("dlrm+a.b=1", 0): 0.8, ("dlrm+a.b=1", 1): 0.9, ("dlrm+a.b=2", 0): 0.7, ("dlrm+a.b=2", 1): 0.99}
    values |= {("din+a.b=1", 0): 0.9, ("din+a.b=2", 0): 0.9}
    records = [record(*key, valid={"ne": value}) for key, value in values.items()]
    assert step_choose.choose(records) == {
        "demo": {
            "dlrm": {"trials": 2, "metric": "ne", "value": 0.845, "settings": {"a.b": 2}},
            "din": {"trials": 2, "metric": "ne", "value": 0.9, "settings": {"a.b": 1}},
        }
    }
    with pytest.raises(StepError, match="has no validation to choose by"):
        step_choose.choose([record("dlrm+a.b=1", 0, test={"ne": 0.5})])
    with pytest.raises(StepError, match="protocols temporal-ranking, upstream-ranking; settings are chosen under one"):
        step_choose.choose([*records, record("dlrm+a.b=1", 0, "upstream-ranking", valid={"ne": 0.5})])


def test_the_best_at_an_edge_of_the_grid_is_pointed_at() -> None:
    grid = {"lr": [0.01, 0.001, 0.1], "decay": [0.0, 0.1, 0.2], "batch": [16, 64], "kind": ["a", "b", "c"]}
    chosen = {
        "demo": {
            "din": {"settings": {"lr": 0.001, "decay": 0.0, "batch": 16, "kind": "a"}},
            "dlrm": {"settings": {"lr": 0.001, "decay": 0.2, "batch": 64, "kind": "c"}},
            "dcn-v2": {"settings": {"lr": 0.01, "decay": 0.1, "batch": 64, "kind": "b"}},
        }
    }
    edges = step_choose.at_edges(chosen, grid)
    assert edges == [
        "demo: lr 0.001 is the least of the grid, and the best of din, dlrm",
        "demo: decay 0.2 is the greatest of the grid, and the best of dlrm",
    ]
    written = step_choose.content("search", chosen, edges).splitlines()
    assert written[1:4] == [*(f"# {line}" for line in edges), "demo:"]


def test_a_search_tunes_an_experiment(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = project / "params"
    write(project, "search", SEARCH | {"models": ["logistic-regression"], "points": 2})
    tuned = {key: value for key, value in SEARCH.items() if key not in ("grid", "points", "training")}
    tuned["models"] = ["mean-rating", "logistic-regression"]
    write(project, "own", tuned | {"tuned": "search"})
    with pytest.raises(StepError, match=r"tuned/search\.yaml has nothing for logistic-regression on demo; run exp"):
        params.check("own", root)
    data = ("--data", processed_by_its_steps("demo", project / "data"))
    runs = params.check("search", root)
    for run in runs:
        folder = Path("runs/search") / run.path
        named = ("--experiment", "search", "--dataset", "demo", "--model", run.model, "--protocol", run.protocol)
        step("plan", *named, "--seed", 0, *data, "--output", folder / "config.json", cwd=project)
        step("train", "--run", folder, *data, "--threads", 1, cwd=project)
        if run != runs[-1]:
            step("evaluate", "--run", folder, *data, cwd=project)
    choose = ("--experiment", "search", "--runs", "runs/search")
    assert "lacks 1 runs of search" in step("choose", *choose, cwd=project, check=False).stderr
    step("evaluate", "--run", folder, *data, cwd=project)
    step("choose", *choose, cwd=project)
    written = (root / "local/tuned/search.yaml").read_bytes()
    monkeypatch.chdir(project)
    for _ in range(2):  # of runs, and of records
        write_records("search", read_records("search", Path("runs/search"))[0], Path("reports/search/records"))
        step("choose", "--experiment", "search", cwd=project)
        assert (root / "local/tuned/search.yaml").read_bytes() == written
        for source in ("runs/search", "reports/search/records"):  # trials have nothing to be compared by
            step("compare", "--experiment", "search", "--runs", source, "--output", "reports/search", cwd=project)
            assert "Trials of a search" in Path("reports/search/comparisons.md").read_text()
            assert len(Path("reports/search/intervals.csv").read_text().splitlines()) == 1
        shutil.rmtree("runs/search", ignore_errors=True)
        shutil.copytree("reports/search/records", "runs/search")
    records, _ = read_records("search", Path("reports/search/records"))
    assert records[0].history[0].keys() == {"epoch", "valid/ne", "valid/auc"}
    step(
        "tabulate",
        "--experiment",
        "search",
        "--runs",
        "reports/search/records",
        "--output",
        "reports/search",
        cwd=project,
    )
    with pytest.raises(StepError, match="records leave out the outcomes of searches"):
        records[0].outcomes()
    chosen = yaml_files.read(root / "local/tuned/search.yaml")["demo"]["logistic-regression"]
    assert chosen["trials"] == 2
    assert chosen["settings"].keys() == GRID.keys()
    mean, regression = params.check("own", root)
    assert params.resolve(mean, root)["model"].keys() == {"model", "shrink"}
    config = params.resolve(regression, root)
    settings = {
        "model.optimizer.lr": config["model"]["optimizer"]["lr"],
        "training.dropout": config["training"]["dropout"],
    }
    assert settings == chosen["settings"]
    # What does not fit is refused, whoever wrote it.
    path = root / "local/tuned/search.yaml"
    path.write_text(path.read_text().replace("training.dropout", "training.dropouts"))
    with pytest.raises(StepError, match=r"tuned/search\.yaml: no parameter 'training\.dropouts'"):
        params.check("own", root)
