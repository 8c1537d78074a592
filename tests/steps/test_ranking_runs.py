"""Ranking from processed data to tables: three users by hand, and the generated demo whose taste drifts."""

import argparse
import csv
import math
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save

from steps import plan
from steps.common import params, yaml_files
from steps.common.cli import StepError
from steps.common.config import read_config
from steps.common.files import read_json, read_jsonl, sha256, write_json
from steps.common.params import Run, resolve
from steps.evaluation.engagements import auc
from steps.reporting.details import reliability_table
from steps.reporting.records import Record, read_records, write_records
from steps.serving.recommender import trained_model
from tests.conftest import ROOT, step
from tests.reduced import plannable
from tests.steps.runs import planned, processed_by_its_steps

#: User, item, rating, time. The latest four are tested.
ROWS = [
    (0, 1, 5, 1), (0, 2, 2, 2), (0, 1, 4, 7), (0, 2, 1, 8),
    (1, 1, 4, 3), (1, 2, 4, 4), (1, 2, 1, 9),
    (2, 2, 1, 5), (2, 1, 2, 6), (2, 2, 5, 10),
]  # fmt: skip
CLOCK = {"name": "temporal-ranking", "task": "ranking", "split": "temporal", "report": "last"}
CLOCK |= {"test_share": 0.4, "valid_share": 0.1, "positive": 4.0}


def processed(folder: Path) -> Path:
    """The rows as preprocess would write them."""
    _, item, rating, time = (np.array(column) for column in zip(*ROWS, strict=True))
    tensors = {"offsets": np.array([0, 4, 7, 10]), "item": item.astype(np.int32), "timestamp": time}
    tensors |= {"rating": rating.astype(np.float32)}
    folder.mkdir()
    (folder / "sequences.safetensors").write_bytes(save(tensors))
    digest = sha256(folder / "sequences.safetensors")
    write_json(folder / "manifest.json", {"catalogue_items": 2, "sequences_sha256": digest})
    return folder


def make(project: Path, settings: dict[str, Any], data: Path, dataset: str = "demo-taste") -> Path:
    """Train and evaluate a run of experiment `mine`."""
    run = project / "runs/mine" / Run("mine", dataset, settings["row"], settings["protocol"]["name"], 0).path
    write_json(run / "config.json", planned(settings, data))
    for name in ("train", "evaluate"):
        step(name, "--run", run, "--data", data, "--device", "cpu", cwd=project)
    return run


def add_experiment(project: Path, **content: Any) -> None:
    text = yaml_files.dump({"title": "Mine", "datasets": ["demo-taste"], "seeds": [0], **content})
    (project / "params/experiments/mine.yaml").write_text(text)


def tabulate(project: Path, runs: str = "runs/mine") -> dict[str, bytes]:
    """The tables, figures and pages of experiment `mine`."""
    for table in ("tabulate", "compare"):
        step(table, "--experiment", "mine", "--runs", runs, "--output", "reports/mine", cwd=project)
    return {path.name: path.read_bytes() for path in (project / "reports/mine").iterdir() if path.is_file()}


def check_documented(run: Path) -> None:
    """Every key of a run's files is in the schema."""
    schema = yaml_files.read(ROOT / "params/schemas/results.yaml")
    files = [(read_json(run / "training.json"), "training"), (read_json(run / "metrics.json"), "ranking_result")]
    for content, name in [*files, *((line, "history") for line in read_jsonl(run / "history.jsonl"))]:
        jsonschema.validate(content, schema | {"$ref": f"#/$defs/{name}"})


def test_the_means_of_three_users_by_hand(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a shrinkage of 1. Half of what is trained on is an engagement: items 2 of 3 and 1 of 3.

    | target | the user's mean before | the item's      | odds             | probability | engaged |
    | 0: 1   | (1 + .5) / 3 = 1/2     | 2.5 / 4 = 5/8   | 1 x 5/3          | 5/8         | yes     |
    | 0: 2   | (2 + .5) / 4 = 5/8     | 1.5 / 4 = 3/8   | 5/3 x 3/5        | 1/2         | no      |
    | 1: 2   | (2 + .5) / 3 = 5/6     | 3/8             | 5 x 3/5          | 3/4         | no      |
    | 2: 2   | (0 + .5) / 3 = 1/6     | 3/8             | 1/5 x 3/5        | 3/28        | yes     |
    """
    monkeypatch.chdir(project)
    add_experiment(project, models=["mean-rating"], protocols=["temporal-ranking"])
    about = {"experiment": "mine", "dataset": "demo-taste", "row": "mean-rating", "seed": 0, "repeats": "none"}
    training = {"max_len": 2, "epochs": 1, "batch": 2, "negatives": 1, "dropout": 0.0}
    model = {"model": "mean-rating", "shrink": 1.0}
    run = make(project, about | {"protocol": CLOCK, "model": model, "training": training}, processed(project / "data"))
    check_documented(run)
    outcomes = load_file(run / "outcomes.safetensors")
    assert outcomes["test_users"].tolist() == [0, 0, 1, 2]
    assert outcomes["test_labels"].tolist() == [1, 0, 0, 1]
    np.testing.assert_allclose(outcomes["test"], np.log([5 / 3, 1, 3, 3 / 25]), atol=1e-6)
    loss = -(math.log(5 / 8) + math.log(1 / 2) + math.log(1 / 4) + math.log(3 / 28)) / 4
    # Of the pairs of an engaged and another one, 5/8 is above 1/2 alone, and 3/28 above none.
    expected = {"ne": loss / math.log(2), "auc": 1 / 4, "gauc": 1.0, "log_loss": loss}
    expected["calibration"] = (5 / 8 + 1 / 2 + 3 / 4 + 3 / 28) / 2
    assert read_json(run / "metrics.json")["test"] == pytest.approx(expected, abs=1e-6)
    with pytest.raises(StepError, match=r"mean-rating says whether a user engages with an item, and recommends none"):
        trained_model(run, read_config(run), 2)
    made = tabulate(project)
    lines = made["table.md"].decode().splitlines()
    (row,) = (line for line in lines if line.startswith("| Mean of item and user"))
    figures = [f"{expected[name]:.4f}" for name in ("ne", "auc", "gauc", "log_loss", "calibration")]
    assert [cell.strip() for cell in row.split("|")][2:8] == ["1", *figures]
    (header,) = (line for line in lines if line.startswith("| model"))
    assert [cell.strip() for cell in header.split("|")][3:8] == ["NE", "AUC", "GAUC", "LOG LOSS", "CALIBRATION"]
    rows = {line["metric"]: line for line in csv.DictReader(made["intervals.csv"].decode().splitlines())}
    assert list(rows) == ["auc", "ne", "gauc", "log_loss"]
    for name, line in rows.items():
        assert float(line["mean"]) == pytest.approx(expected[name], abs=1e-5)
    # 4 predictions, of which each is a group: from low to high.
    groups = [line.split(",")[-2:] for line in made["beyond.csv"].decode().splitlines()[1:]]
    assert [[float(cell) for cell in group] for group in groups] == [[0.107143, 1], [0.5, 0], [0.625, 1], [0.75, 0]]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sequences of the demo whose taste drifts, made by its own steps."""
    return processed_by_its_steps("demo-taste", tmp_path_factory.mktemp("demo"))


@pytest.mark.slow
def test_hstu_is_above_the_means_where_taste_drifts(demo: Path, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who reads actions and items follows the taste; means, and items without actions, do not. From runs and from
    records."""
    monkeypatch.chdir(project)
    models = ["mean-rating", "hstu-ranking", "hstu-ranking-merged", "hstu-ranking-no-actions"]
    add_experiment(
        project,
        models=models,
        protocols=["temporal-ranking"],
        training=params.load("experiments/ranking-demo")["training"],
    )
    for model in models:
        run = make(project, resolve(Run("mine", "demo-taste", model, "temporal-ranking", 0)), demo)
        check_documented(run)
    made = tabulate(project)
    with (project / "reports/mine/table.csv").open() as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    of_all, own = ({model: float(row[f"test/{name}"]) for model, row in rows.items()} for name in ("auc", "gauc"))
    for found in (of_all, own):
        assert min(found["hstu-ranking"], found["hstu-ranking-merged"]) > 0.65
        assert found["hstu-ranking-no-actions"] == pytest.approx(0.5, abs=0.04)
    assert of_all["mean-rating"] == pytest.approx(0.5, abs=0.04)
    # Of a user's two targets the earlier one's label moves the mean of the later: up after an engagement, else down.
    assert 0.4 < own["mean-rating"] < 0.52
    with (project / "reports/mine/comparisons.csv").open() as file:
        pairs = {(row["better"], row["worse"]): row for row in csv.DictReader(file)}
    for model in ("hstu-ranking", "hstu-ranking-merged"):
        row = pairs[model, "mean-rating"]
        assert float(row["low"]) > 0.05
        assert float(row["p_holm"]) < 1e-6
        assert float(row["difference"]) == pytest.approx(of_all[model] - of_all["mean-rating"], abs=5e-5)
    folder = project / "reports/mine/records"
    write_records("mine", read_records("mine", project / "runs/mine")[0], folder)
    assert sum(path.stat().st_size for path in folder.iterdir()) / len(models) < 8_000
    assert tabulate(project, "reports/mine/records") == made
    reports = ["--experiment", "mine", "--runs", "runs/mine", "--reports", "reports/mine"]
    step("crate", *reports, "--output", "reports/mine/crate", cwd=project)
    (project / "data").mkdir()
    (project / "data/demo-taste").symlink_to(demo)
    step("track", *reports, "--data", "data", "--output", "reports/mine/mlflow.json", cwd=project)
    tracked = read_json(project / "reports/mine/mlflow.json")
    assert tracked["models"] == {}  # what ranks is not served as a recommender
    with closing(sqlite3.connect(project / "mlflow.db")) as store:
        logged = {key for (key,) in store.execute("SELECT DISTINCT key FROM latest_metrics")}
    assert {"reported/test/auc", "reported/test/ne", "valid/auc", "valid/log_loss", "train/loss"} <= logged


@pytest.mark.slow
def test_the_order_of_actions_alone_says_nothing_where_taste_drifts(
    demo: Path, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HSTU to whom all items are one, and the share of engagements among a user's last five ratings."""
    monkeypatch.chdir(project)
    add_experiment(
        project, models=["hstu-ranking"], protocols=["temporal-ranking"],
        training=params.load("experiments/ranking-demo")["training"],
    )  # fmt: skip
    tensors = load_file(demo / "sequences.safetensors")
    data = project / "alike"
    data.mkdir()
    tensors["item"] = np.ones_like(tensors["item"])
    (data / "sequences.safetensors").write_bytes(save(tensors))
    manifest = {"catalogue_items": 1, "sequences_sha256": sha256(data / "sequences.safetensors")}
    write_json(data / "manifest.json", manifest)
    run = make(project, resolve(Run("mine", "demo-taste", "hstu-ranking", "temporal-ranking", 0)), data)
    found = read_json(run / "metrics.json")["test"]
    assert [found["auc"], found["gauc"]] == pytest.approx([0.5, 0.5], abs=0.05)
    engaged = torch.from_numpy(tensors["rating"] >= 4).float()
    user = torch.repeat_interleave(
        torch.arange(len(tensors["offsets"]) - 1), torch.from_numpy(np.diff(tensors["offsets"]))
    )
    recent = torch.stack([engaged.roll(back) for back in range(1, 6)]).sum(0)
    whole = torch.arange(len(user)) - torch.from_numpy(tensors["offsets"])[user] >= 5
    assert float(auc(recent[whole], engaged[whole].long())) == pytest.approx(0.5, abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("row", [name for name, row in params.load("models", ROOT / "params").items() if "task" in row])
def test_every_ranking_row_runs_under_the_protocol_of_users(
    row: str, demo: Path, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    datasets = yaml_files.read(project / "params/datasets.yaml")
    training = datasets["demo-taste"]["training"]
    training["large"] = training["base"] | {"blocks": 3}
    (project / "params/datasets.yaml").write_text(yaml_files.dump(datasets))
    add_experiment(project, models=[row], protocols=["upstream-ranking"], training={"epochs": 1})
    run = make(project, resolve(Run("mine", "demo-taste", row, "upstream-ranking", 0)), demo)
    check_documented(run)
    outcomes = load_file(run / "outcomes.safetensors")
    users, counts = np.unique(outcomes["test_users"], return_counts=True)
    assert set(counts) == {10}
    assert len(users) == pytest.approx(250, abs=2)
    history = read_jsonl(run / "history.jsonl")
    assert history[0]["valid/ne"] == read_json(run / "metrics.json")["valid"]["ne"]


def test_an_experiment_is_of_one_task(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    for models, protocols, said in (
        (["hstu"], ["temporal-ranking"], "protocol temporal-ranking is for ranking, and model hstu for retrieval"),
        (["hstu-ranking"], ["strict"], "protocol strict is for retrieval, and model hstu-ranking for ranking"),
    ):
        add_experiment(project, models=models, protocols=protocols)
        with pytest.raises(StepError, match=rf"mine\.yaml: {said}; an experiment has protocols and models of one task"):
            params.check("mine")


@pytest.mark.parametrize(
    ("rating", "said"),
    [
        (None, "and data set demo-taste has none: take another data set"),
        ([5, np.nan, 4, 1, 4, np.nan, 1, 1, 2, 5], "and 2 of 10 interactions of data set demo-taste have none"),
    ],
)
def test_ranking_without_ratings_is_refused_before_training(
    rating: list[float] | None, said: str, tmp_path: Path, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    add_experiment(project, models=["mean-rating"], protocols=["temporal-ranking"])
    data, run = processed(tmp_path / "data"), Run("mine", "demo-taste", "mean-rating", "temporal-ranking", 0)
    arguments = argparse.Namespace(**vars(run), data=data, output=tmp_path / "config.json")
    plan.main(arguments)
    assert read_json(tmp_path / "config.json")["split"]
    tensors = load_file(data / "sequences.safetensors")
    del tensors["rating"]
    if rating is not None:
        tensors["rating"] = np.array(rating, dtype=np.float32)
    (data / "sequences.safetensors").write_bytes(save(tensors))
    manifest = {"catalogue_items": 2, "sequences_sha256": sha256(data / "sequences.safetensors")}
    write_json(data / "manifest.json", manifest)
    with pytest.raises(StepError, match=said):
        plan.main(arguments)


def test_one_pass_is_one_in_every_experiment() -> None:
    for experiment in plannable(ROOT / "params"):
        for run in params.runs(experiment, ROOT / "params"):
            if run.model.endswith("one-pass"):
                training = resolve(run, ROOT / "params")["training"]
                assert (training["schedule"], training["epochs"]) == ("one-pass", 1), experiment


def test_gaps_are_of_groups_weighed_by_their_examples() -> None:
    run = Run("mine", "demo-taste", "dlrm", "temporal-ranking", 0)
    record = Record(run, {}, [], {}, {}, lambda: pytest.fail("reads no outcomes"))
    groups = ((3, 0.25, 0.5), (1, 0.75, 0.0))  # gaps of 0.25 and 0.75
    rows = [
        {
            "dataset": run.dataset,
            "protocol": run.protocol,
            "model": run.model,
            "examples": n,
            "predicted": p,
            "positive": y,
        }
        for n, p, y in groups
    ]
    _, (line,) = reliability_table(rows, [record])
    assert line == ["demo-taste", "temporal-ranking", "DLRM", "0.3750", "0.7500", "0.7500", "0.0000"]
