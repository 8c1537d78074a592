"""The MLflow store: what its runs say, what a change, a kill, a move and a server that is away do to them."""

import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from steps.common import params
from steps.common.files import parse_jsonl, read_json, write_json, write_text
from steps.track import REQUIRED
from steps.tracking.runs import CARD
from tests.browser import Watched
from tests.conftest import copy_project, step, write_processed
from tests.steps.runs import config, planned, seal
from tests.steps.test_recommend import NUM_ITEMS, TITLES, describe
from tests.steps.test_reporting import experiment, fake_run, value

ROWS = {"datasets": ["ml-1m"], "models": ["sasrec", "hstu"], "protocols": ["strict", "paper"], "seeds": [0, 1]}
STARTED, ENDED = "2026-03-01T10:00:00.250+00:00", "2026-03-01T10:02:00.750+00:00"
TABLE = "model,test/ndcg@10,empty\nsasrec,0.25,\nhstu,0.5,\n"
#: The same in milliseconds since 1970, as `date --utc +%s` has them.
START, END = 1772359200250, 1772359320750
COLUMNS = [("interactions/user", "sc:Integer", "long"), ("interactions/rating", "sc:Float", "double")]


def timed_run(project: Path, run: params.Run, **changes: Any) -> None:
    """A made-up run that says when it was trained: 2 epochs of 20 s, each with 10 s of evaluation."""
    fake_run(project, run)
    folder = project / "runs" / run.experiment / run.path
    part = "valid" if run.protocol == "strict" else "test"
    history = parse_jsonl((folder / "history.jsonl").read_text(), "", "")
    took = {"train/seconds": 20.0, "train/steps": 40, "train/cpu_seconds": 30.0, "train/resident_peak_bytes": 2**30}
    lines = [line | {"train/loss": 3.0 / line["epoch"], f"{part}/seconds": 10.0} | took for line in history]
    write_text(folder / "history.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    metrics = read_json(folder / "metrics.json")
    write_json(folder / "metrics.json", metrics | {"started": STARTED, "ended": ENDED} | changes)
    seal(folder)


def make(project: Path, name: str = "mine", **chosen: Any) -> list[params.Run]:
    """The runs of an experiment and the files of its reports, all made up."""
    runs = experiment(project, name, **ROWS | chosen)
    for run in runs:
        timed_run(project, run)
    reports = project / "reports" / name
    for file in (*REQUIRED, "intervals.svg"):
        write_text(reports / file, TABLE if file.endswith(".csv") else f"<p>{file}</p>")
    return runs


def track(project: Path, name: str = "mine", *more: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return step(*command(name), *more, cwd=project, **variables)


def command(name: str = "mine") -> list[str]:
    folders = ["--runs", f"runs/{name}", "--reports", f"reports/{name}", "--output", f"reports/{name}/mlflow.json"]
    return ["track", "--experiment", name, *folders]


def store(project: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{project}/mlflow.db")


def active(client: Any, name: str = "mine") -> dict[str, list[Any]]:
    """The runs of an experiment that are not deleted, by their key, in the order of their making."""
    found: dict[str, list[Any]] = {}
    for run in reversed(client.search_runs([client.get_experiment_by_name(name).experiment_id])):
        found.setdefault(run.data.tags["key"], []).append(run)
    return found


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a tracked experiment, to look at."""
    project = copy_project(tmp_path_factory.mktemp("tracked"))
    make(project)
    card = project / "reports/datasets/ml-1m"
    card.mkdir(parents=True)
    (card / "card.html").write_text("<p>card</p>")
    write_json(card / "card.json", {"counts": {"users": 6, "interactions": 60}})
    fields = [{"@id": name, "dataType": kind} for name, kind, _ in COLUMNS]
    write_json(card / "croissant.json", {"recordSet": [{"name": "interactions", "field": fields}]})
    track(project)
    return project


@pytest.fixture
def tracked(made_once: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, as the current folder, in which artifacts lie."""
    monkeypatch.chdir(made_once)
    return made_once


@pytest.fixture
def changing(made_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, to change."""
    project = shutil.copytree(made_once, tmp_path / "project")
    monkeypatch.chdir(project)
    return project


def test_runs_are_named_grouped_and_tagged_below_the_experiment_s(tracked: Path) -> None:
    client, made = store(tracked), read_json(tracked / "reports/mine/mlflow.json")
    parent = client.get_run(made["parent"])
    assert parent.info.run_name == "mine: all runs"
    runs = {key: one for key, (one,) in active(client).items()}
    assert {key: one.info.run_id for key, one in runs.items()} == {**made["runs"], "all": made["parent"]}
    run = runs["ml-1m/hstu/strict/seed-1"]
    assert run.info.run_name == "HSTU, strict, seed 1"
    tags = run.data.tags
    assert tags["mlflow.parentRunId"] == made["parent"]
    wanted = {"dataset": "ml-1m", "protocol": "strict", "model": "HSTU", "seed": "1", "group": "HSTU, strict"}
    wanted |= {"state": "newest", "kind": "run", "commit": "a" * 40, "data_sha256": "d" * 64}
    wanted |= {"device": "CPU, 2 threads", "version.torch": "2.13.0", "mlflow.source.git.commit": "a" * 40}
    wanted |= {"mlflow.source.name": "steps/train.py"}
    assert {name: tags[name] for name in wanted} == wanted
    assert tags["mlflow.user"]
    assert run.data.params["row"] == "hstu"
    assert run.data.params["model.dim"] == "50"
    assert run.data.params["protocol.name"] == "strict"
    colours = {key: one.data.tags.get("mlflow.runColor") for key, one in runs.items() if key != "all"}
    assert len(set(colours.values())) == 2  # one a row
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {
        *("config.json", "history.jsonl", "metrics.json", "variants.json")
    }
    experiment_tags = client.get_experiment_by_name("mine").tags
    assert experiment_tags["mlflow.experimentKind"] == "custom_model_development"


def test_runs_have_the_times_of_their_training(tracked: Path) -> None:
    client, made = store(tracked), read_json(tracked / "reports/mine/mlflow.json")
    for run_id in [made["parent"], *made["runs"].values()]:
        run = client.get_run(run_id)
        assert (run.info.start_time, run.info.end_time, run.info.status) == (START, END, "FINISHED")
    run_id = made["runs"]["ml-1m/hstu/strict/seed-1"]
    run = params.Run("mine", "ml-1m", "hstu", "strict", 1)

    def points(name: str) -> list[tuple[int, int, float]]:
        return [(one.step, one.timestamp, one.value) for one in client.get_metric_history(run_id, name)]

    ends = {1: START + 30_000, 2: START + 60_000}
    assert points("valid/hr_at_10") == [(epoch, ends[epoch], value(run, "hr@10", epoch)) for epoch in (1, 2)]
    assert points("train/loss") == [(1, ends[1], 3.0), (2, ends[2], 1.5)]
    assert points("reported/test/mrr") == [(0, END, value(run, "mrr", 2))]  # a step of 0 becomes a bar
    system = {"seconds": 20.0, "evaluation_seconds": 10.0, "step_milliseconds": 500.0, "cpu_utilization_percent": 150.0}
    for name, wanted in (system | {"resident_memory_peak_gib": 1.0}).items():
        assert points(f"system/{name}") == [(epoch, ends[epoch], wanted) for epoch in (1, 2)], name


def test_runs_whose_times_are_not_recorded_say_so(project: Path) -> None:
    """As the committed records of earlier code: the commit is known, and nothing was trained before it was made."""
    subprocess.run(["git", "init", "--quiet"], cwd=project, check=True)
    commit = "git -c user.name=t -c user.email=t@t commit --quiet --allow-empty -m t"
    dated = os.environ | {"GIT_COMMITTER_DATE": "2026-02-03T04:05:06+00:00"}
    subprocess.run(commit.split(), cwd=project, check=True, env=dated)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=project, check=True, capture_output=True, text=True)
    known, unknown = make(project, models=["hstu"], protocols=["paper"])
    timed_run(project, known, started=None, commit=f"{head.stdout.strip()}-dirty", ended=None)
    timed_run(project, unknown, started=None, ended=None)
    before = time.time() * 1000
    track(project)
    (one,), (other,) = (active(store(project))[str(run.path)] for run in (known, unknown))
    assert one.info.start_time == 1770091506000
    assert "its commit's time" in one.data.tags["times"]
    assert before - 1 <= other.info.start_time <= time.time() * 1000
    assert "when it was tracked" in other.data.tags["times"]
    for run in (one, other):
        assert run.info.end_time - run.info.start_time == 60_000  # what its epochs took


def test_the_data_set_has_hash_source_columns_and_counts(tracked: Path) -> None:
    client = store(tracked)
    for (run,) in active(client).values():
        (given,) = run.inputs.dataset_inputs
        assert (given.dataset.name, given.dataset.digest) == ("ml-1m", "d" * 36)
        assert "grouplens.org" in json.loads(given.dataset.source)["url"]
        columns = json.loads(given.dataset.schema)["mlflow_colspec"]
        assert [(one["name"], one["type"]) for one in columns] == [(name, kind) for name, _, kind in COLUMNS]
        assert json.loads(given.dataset.profile) == {"users": 6, "interactions": 60}


def test_the_parent_has_tables_figures_and_cards(tracked: Path) -> None:
    client, made = store(tracked), read_json(tracked / "reports/mine/mlflow.json")
    reports = {Path(file.path).name for file in client.list_artifacts(made["parent"], "report")}
    cards = {Path(file.path).name for file in client.list_artifacts(made["parent"], "dataset/ml-1m")}
    assert (reports, cards) == ({*REQUIRED, "intervals.svg"}, set(CARD))
    results = client.load_table(client.get_experiment_by_name("mine").experiment_id, "table.json")
    assert results.to_dict("list") == {"model": ["sasrec", "hstu"], "test/ndcg@10": [0.25, 0.5]}
    shown = json.loads(client.get_run(made["parent"]).data.tags["mlflow.loggedArtifacts"])
    assert {"path": "comparisons.json", "type": "table"} in shown


def test_a_moved_folder_keeps_its_artifacts_and_writes_none_elsewhere(
    tracked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow writes whole paths; a copy would read the first folder, and write into it."""
    moved = shutil.copytree(tracked, tmp_path / "elsewhere")
    monkeypatch.chdir(moved)
    before = sorted((tracked / "mlartifacts").rglob("*"))
    runs = list(params.runs("mine", moved / "params"))
    timed_run(moved, runs[0], commit="b" * 40)
    track(moved)
    made = read_json(moved / "reports/mine/mlflow.json")
    client = store(moved)
    assert not Path(client.get_run(made["parent"]).info.artifact_uri).is_absolute()
    for key, run_id in made["runs"].items():
        there = moved / client.get_run(run_id).info.artifact_uri / "metrics.json"
        assert there.read_bytes() == (moved / "runs/mine" / key / "metrics.json").read_bytes()
    assert sorted((tracked / "mlartifacts").rglob("*")) == before


def test_tracking_again_adds_nothing(changing: Path) -> None:
    before = read_json(changing / "reports/mine/mlflow.json")
    track(changing)
    assert read_json(changing / "reports/mine/mlflow.json") == before
    assert {key: len(found) for key, found in active(store(changing)).items()} == dict.fromkeys(
        [*before["runs"], "all"], 1
    )


def test_a_changed_run_is_kept_beside_the_earlier_one(changing: Path) -> None:
    before = read_json(changing / "reports/mine/mlflow.json")
    runs = list(params.runs("mine", changing / "params"))
    row = [run for run in runs if (run.model, run.protocol) == (runs[0].model, runs[0].protocol)]
    key, other = str(row[0].path), str(next(run for run in runs if run not in row).path)
    configs = [changing / "runs/mine" / run.path / "config.json" for run in row]  # seeds of a row share their settings
    contents = [read_json(config) for config in configs]
    for path, content in zip(configs, contents, strict=True):
        write_json(path, content | {"training": content["training"] | {"dropout": 0.5}})
        seal(path.parent)
    table = changing / "reports/mine/table.md"
    text = table.read_text()
    table.write_text("changed")
    track(changing)
    after, client = read_json(changing / "reports/mine/mlflow.json"), store(changing)
    found = active(client)

    def states(key: str) -> list[tuple[str, str]]:
        return sorted((one.info.run_id, one.data.tags["state"]) for one in found[key])

    for name, ids in ((key, "runs"), ("all", "parent")):
        old, new = ((made["parent"] if ids == "parent" else made["runs"][key]) for made in (before, after))
        assert states(name) == sorted([(old, "earlier"), (new, "newest")])
    by_id = {one.info.run_id: one for one in found[key]}
    dropouts = [by_id[made["runs"][key]].data.params["training.dropout"] for made in (before, after)]
    assert dropouts == [str(contents[0]["training"]["dropout"]), "0.5"]
    assert after["runs"][other] == before["runs"][other]
    assert client.get_run(after["runs"][other]).data.tags["mlflow.parentRunId"] == after["parent"]

    for path, content in zip(configs, contents, strict=True):  # and back: the first is the newest again
        write_json(path, content)
        seal(path.parent)
    table.write_text(text)
    track(changing)
    assert read_json(changing / "reports/mine/mlflow.json") == before
    found = active(client)
    assert states(key) == sorted([(before["runs"][key], "newest"), (after["runs"][key], "earlier")])


def test_a_deleted_experiment_is_restored(changing: Path) -> None:
    client, before = store(changing), read_json(changing / "reports/mine/mlflow.json")
    client.delete_experiment(client.get_experiment_by_name("mine").experiment_id)
    track(changing)
    assert client.get_experiment_by_name("mine").lifecycle_stage == "active"
    assert read_json(changing / "reports/mine/mlflow.json") == before
    client.delete_run(before["runs"]["ml-1m/hstu/strict/seed-1"])
    track(changing)
    after = read_json(changing / "reports/mine/mlflow.json")["runs"]
    assert [name for name in after if after[name] != before["runs"][name]] == ["ml-1m/hstu/strict/seed-1"]


def test_what_a_killed_tracking_began_is_deleted_and_made_anew(changing: Path) -> None:
    (changing / "mlflow.db").unlink()
    process = subprocess.Popen([sys.executable, "-m", "steps.track", *command()[1:]], cwd=changing)
    running = "SELECT run_uuid FROM runs WHERE status = 'RUNNING' AND name != 'mine: all runs'"
    deadline, begun = time.monotonic() + 120, []
    while not begun:
        assert time.monotonic() < deadline
        assert process.poll() is None
        if (changing / "mlflow.db").exists():
            with closing(sqlite3.connect(f"file:{changing}/mlflow.db?mode=ro", uri=True)) as found:
                begun = found.execute(running).fetchall()
        time.sleep(0.01)
    process.kill()
    process.wait()
    track(changing)
    client = store(changing)
    found = active(client)
    assert {run.info.status for runs in found.values() for run in runs} == {"FINISHED"}
    assert {key: len(runs) for key, runs in found.items()} == dict.fromkeys(found, 1)
    assert len(found) == 9
    with closing(sqlite3.connect(changing / "mlflow.db")) as rows:
        assert rows.execute("SELECT count(*) FROM runs WHERE status = 'RUNNING'").fetchone() == (0,)


def test_a_store_whose_making_was_interrupted_stops_no_later_tracking(changing: Path) -> None:
    """MLflow never opens such a store again: it is made beside its place, and renamed."""
    (changing / "mlflow.db").unlink()
    process = subprocess.Popen(
        [sys.executable, "-m", "steps.track", *command()[1:]], cwd=changing, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not list(changing.glob(".mlflow.db*partial")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (changing / "mlflow.db").exists()
    track(changing)
    assert len(read_json(changing / "reports/mine/mlflow.json")["runs"]) == 8
    assert not list(changing.glob(".mlflow.db.*partial*"))


def test_a_store_that_mlflow_cannot_open_is_named(changing: Path) -> None:
    (changing / "mlflow.db").write_bytes(b"no database" * 100)
    result = step(*command(), cwd=changing, check=False)
    assert result.returncode == 1
    assert "cannot open mlflow.db" in result.stderr.splitlines()[-1]
    assert (changing / "mlflow.db").read_bytes() == b"no database" * 100


def test_a_card_that_lacks_is_pointed_at(changing: Path) -> None:
    assert track(changing).stderr == ""
    (changing / "reports/datasets/ml-1m/card.html").unlink()
    assert "reports/datasets/ml-1m lacks its data card" in track(changing).stderr


def test_writers_at_once_lose_no_record(project: Path) -> None:
    names = [f"part-{number}" for number in range(2)]
    for name in names:
        make(project, name, models=["hstu"])
    processes = [
        subprocess.Popen([sys.executable, "-m", "steps.track", *command(name)[1:]], cwd=project) for name in names
    ]
    assert [process.wait() for process in processes] == [0] * 2
    for name in names:
        found = {key: run.info.run_id for key, (run,) in active(store(project), name).items()}
        made = read_json(project / f"reports/{name}/mlflow.json")
        assert found == made["runs"] | {"all": made["parent"]}
        assert len(found) == 5


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port: int = bound.getsockname()[1]
        return port


@contextmanager
def serving(folder: Path, port: int, *options: str) -> Iterator[str]:
    """MLflow's server in a folder, as `make ui` starts it."""
    arguments = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1", *options]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", "sqlite:///mlflow.db", *arguments],
            cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None, (folder / "server.log").read_text()
            assert time.monotonic() < deadline
            try:
                with urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except OSError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_server_that_is_away_stops_nothing_and_gets_the_runs_once_it_is_back(changing: Path, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    port, there = free_port(), tmp_path / "server"
    address = f"http://127.0.0.1:{port}"
    began = time.monotonic()
    result = track(changing, MLFLOW_TRACKING_URI=f"http://user:secret@127.0.0.1:{port}")
    assert time.monotonic() - began < 60  # MLflow's own tries take minutes
    (said,) = result.stderr.splitlines()
    assert f"{address} does not answer" in said
    content = read_json(changing / "reports/mine/mlflow.json")
    assert (content["store"], content["runs"]) == (address, {})
    assert "pending" in content
    assert "secret" not in json.dumps(content) + result.stderr
    there.mkdir()
    with serving(there, port, "--artifacts-destination", "kept"):
        local = sorted((changing / "mlartifacts").rglob("*"))
        made = []
        for _ in range(2):
            track(changing, MLFLOW_TRACKING_URI=address)
            made.append(read_json(changing / "reports/mine/mlflow.json"))
        assert made[0] == made[1]
        assert "pending" not in made[0]
        client = MlflowClient(address)
        found = active(client)
        assert {key: [run.info.run_id for run in runs] for key, runs in found.items()} == {
            "all": [made[0]["parent"]], **{key: [run_id] for key, run_id in made[0]["runs"].items()}
        }  # fmt: skip
        assert found["ml-1m/hstu/strict/seed-1"][0].info.start_time == START
        reports = {Path(file.path).name for file in client.list_artifacts(made[0]["parent"], "report")}
        assert reports >= set(REQUIRED)
    assert list((there / "kept").rglob("table.md"))
    assert sorted((changing / "mlartifacts").rglob("*")) == local
    assert len(active(store(changing))) == 9  # the file of this folder is as it was


@pytest.fixture(scope="module")
def trained(made_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project of `made_once`, copied, with an experiment more whose models are trained and registered."""
    project = shutil.copytree(made_once, tmp_path_factory.mktemp("trained") / "project")
    describe(write_processed(project / "data/processed/ml-1m", [4 + user % 13 for user in range(40)], NUM_ITEMS))
    runs = experiment(project, "small", **ROWS | {"models": ["most-popular", "hstu"], "protocols": ["strict"]})
    train(project, runs)
    for file in REQUIRED:
        write_text(project / "reports/small" / file, TABLE)
    track(project, "small", "--data", "data/processed")
    return project


def train(project: Path, runs: list[params.Run], **changes: Any) -> None:
    """Train and evaluate runs for two epochs."""
    data = project / "data/processed/ml-1m"
    for run in runs:
        settings = config("hstu" if run.model == "hstu" else "popular", epochs=2, **changes)
        about = {"experiment": run.experiment, "dataset": run.dataset, "row": run.model, "seed": run.seed}
        write_json(project / "runs" / run.experiment / run.path / "config.json", planned(settings | about, data))
    folders = [project / "runs" / run.experiment / run.path for run in runs]
    step("train", "--run", *folders, "--data", data, "--device", "cpu", cwd=project)
    step("evaluate", "--run", *folders, "--data", data, "--device", "cpu", cwd=project)


def test_the_best_seed_of_a_row_is_registered_and_recommends(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import pyfunc, set_registry_uri, set_tracking_uri

    monkeypatch.chdir(trained)
    client = store(trained)
    made = read_json(trained / "reports/small/mlflow.json")
    assert made["models"] == {"ml-1m.most-popular": ["1"], "ml-1m.hstu": ["1"]}
    valid = {
        seed: read_json(trained / f"runs/small/ml-1m/hstu/strict/seed-{seed}/metrics.json")["valid"]["ndcg@10"]
        for seed in (0, 1)
    }
    version = client.get_model_version_by_alias("ml-1m.hstu", "best")
    assert valid[int(version.tags["seed"])] == max(valid.values())
    assert version.run_id == made["runs"][f"ml-1m/hstu/strict/seed-{version.tags['seed']}"]
    model = client.get_logged_model(version.source.removeprefix("models:/"))
    shown = {one.key: one.value for one in model.metrics}
    assert shown["reported/valid/ndcg_at_10"] == max(valid.values())
    (output,) = client.get_run(version.run_id).outputs.model_outputs
    assert output.model_id == model.model_id
    set_tracking_uri(f"sqlite:///{trained}/mlflow.db")
    set_registry_uri(f"sqlite:///{trained}/mlflow.db")
    try:
        loaded = pyfunc.load_model("models:/ml-1m.hstu@best")
    finally:
        set_tracking_uri(None)
        set_registry_uri(None)
    assert loaded.metadata.signature is not None
    assert loaded.metadata.saved_input_example_info is not None
    (answer,) = loaded.predict([{"history": ["the matrix", TITLES[4]]}], params={"k": 3})
    assert answer["understood"]["the matrix"] == TITLES[1]
    assert len({one["title"] for one in answer["recommendations"]}) == 3


def test_a_model_is_registered_once_and_the_best_keeps_its_alias(trained: Path, tmp_path: Path) -> None:
    project = shutil.copytree(trained, tmp_path / "project")
    track(project, "small", "--data", "data/processed")
    client = store(project)
    assert len(client.search_model_versions("name = 'ml-1m.hstu'")) == 1
    before = client.get_model_version_by_alias("ml-1m.hstu", "best").tags
    runs = [run for run in params.runs("small", project / "params") if run.model == "hstu"]
    train(project, runs, dim=8, blocks=1, heads=1)
    metrics = [project / "runs/small" / run.path / "metrics.json" for run in runs]
    worse = dict.fromkeys(read_json(metrics[0])["valid"], 0.0)
    for path in metrics:
        write_json(path, read_json(path) | {"valid": worse})
    track(project, "small", "--data", "data/processed")
    assert read_json(project / "reports/small/mlflow.json")["models"]["ml-1m.hstu"] == ["2"]
    assert client.get_model_version_by_alias("ml-1m.hstu", "best").tags == before


@pytest.mark.browser
def test_the_ui_shows_runs_curves_tables_and_models(
    trained: Path, browser_page: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the addresses that `make ui` prints."""
    monkeypatch.chdir(trained)
    made, page = read_json(trained / "reports/mine/mlflow.json"), browser_page.page
    page.set_default_timeout(90_000)

    def see(*texts: str) -> None:
        for text in texts:
            page.get_by_text(text, exact=True).first.wait_for()

    with serving(trained, free_port()) as address:
        printed = step("ui", "--address", address, cwd=trained).stdout.splitlines()
        titles = [line for line in printed if not line.startswith(" ")]
        assert titles[:2] == ["mine: Experiment mine", "small: Experiment small"]
        shown = {line.strip(): printed[place + 1].strip() for place, line in enumerate(printed[:11]) if place % 2}

        page.goto(shown["the newest runs as a table"])
        see(*(f"{row}, {protocol}, seed {seed}" for row in ("HSTU", "SASRec") for protocol in ("strict", "paper")
              for seed in (0, 1)))  # fmt: skip
        page.goto("about:blank")
        page.goto(shown["all runs, below their tables"])
        see("mine: all runs")
        page.goto("about:blank")
        page.goto(shown["SASRec and HSTU: curves"])
        see("Curves", "valid/ndcg_at_10", "HSTU, strict, seed 0", "SASRec, strict, seed 0")
        chart = page.locator("[data-testid='experiment-view-compare-runs-card']", has_text="valid/ndcg_at_10")
        chart.locator("path.js-line").nth(1).wait_for(state="attached")
        drawn = chart.locator("path.js-line").evaluate_all("lines => lines.map(line => getComputedStyle(line).stroke)")
        runs = store(trained).search_runs(["1"], "tags.protocol = 'strict' and tags.seed = '0'")
        colours = [bytes.fromhex(run.data.tags["mlflow.runColor"].removeprefix("#")) for run in runs]
        assert set(drawn) == {f"rgb({red}, {green}, {blue})" for red, green, blue in colours}  # a curve for each
        page.goto("about:blank")
        page.goto(shown["SASRec and HSTU: parameters and results"])
        see("Comparing 2 Runs from 1 Experiment", "model.attention")
        page.goto("about:blank")
        page.goto(f"{address}/#/experiments/1/runs/{made['parent']}/artifacts/table.json")
        see("View as table", "test/ndcg@10", "0.25")
        page.goto("about:blank")
        page.goto(f"{address}/#/models")
        see("ml-1m.hstu", "ml-1m.most-popular")
    assert not [url for url in browser_page.refused if "mlflow.org" not in url]
