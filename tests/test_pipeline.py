"""The demo end to end, reduced, under each orchestrator: every output, and nothing to do the second time."""

import base64
import hashlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest

from steps.common import yaml_files
from steps.common.files import read_json, read_jsonl
from tests.conftest import ROOT, copy_project, run

OUTPUTS = ["table.md", "table.csv", "table.html", "runs.csv", "curves.svg", "curves.png", "mlflow.json"]
MODELS = ("most-popular", "hstu")
OUTPUTS += ["details.md", "comparisons.md", "comparisons.csv", "claims.md", "intervals.svg"]


def check_outputs(project: Path) -> None:
    """Every promised file is there."""
    assert [name for name in OUTPUTS if not (project / "reports/demo" / name).is_file()] == []
    for model in MODELS:
        for protocol in ("strict", "paper"):
            folder = project / "runs/demo/demo" / model / protocol / "seed-0"
            names = {path.name for path in folder.iterdir()}
            expected = {"config.json", "history.jsonl", "model.safetensors", "training.json"}
            assert names == expected | {"ranks.safetensors", "metrics.json"}
    table = (project / "reports/demo/table.md").read_text()
    assert "HSTU" in table
    assert "protocol strict" in table
    assert (project / "mlflow.db").is_file()


def planned_jobs(project: Path, *targets: str) -> dict[str, int]:
    """How many jobs of every rule Snakemake would run."""
    planned = run("snakemake", "--cores", "2", "--dry-run", "--", *targets, cwd=project).stdout
    counted = re.findall(r"^(\S+) +(\d+)$", planned, re.M)
    return {rule: int(count) for rule, count in counted if rule != "total"}


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def keep(project: Path, models: str, protocols: str = "[strict, paper]") -> None:
    """Reduce the demo to these rows, and the experiments to the demo, so that a graph is made in little time."""
    edit(project / "params/experiments/demo.yaml", "[most-popular, sasrec, hstu]", models)
    edit(project / "params/experiments/demo.yaml", "[strict, paper]", protocols)
    for path in [*(project / "params/experiments").iterdir(), *(project / "params/studies").iterdir()]:
        if path.stem != "demo":  # studies too, as they name experiments
            path.unlink()
    run("python", "-m", "workflow.generate", cwd=project)


def keep_one_run(project: Path) -> None:
    """Reduce the demo to one run, which trains nothing: what a graph does is seen on it as well."""
    keep(project, "[most-popular]", "[strict]")


def new_times(folder: Path) -> None:
    """Give every file below the folder a new time, in an order that has nothing to do with how they were made."""
    files = [path for path in folder.rglob("*") if path.is_file() and ".snakemake" not in path.parts]
    files.sort(key=lambda path: hashlib.sha256(str(path).encode()).digest())
    for place, path in enumerate(files):
        os.utime(path, (time.time() - place, time.time() - place))


SHOWN = {"tabulate", "compare", "track", "demo"}


@pytest.mark.slow
def test_snakemake_runs_again_what_a_change_concerns(project: Path) -> None:
    keep_one_run(project)
    run("snakemake", "--cores", "2", cwd=project)
    assert planned_jobs(project) == {}

    edit(project / "params/models.yaml", "label: Most popular", "label: Popularity")
    assert set(planned_jobs(project)) == SHOWN
    run("snakemake", "--cores", "2", cwd=project)
    assert "Popularity" in (project / "reports/demo/table.md").read_text()
    edit(project / "params/datasets.yaml", "Generated demo in MovieLens", "Demo in MovieLens")
    assert set(planned_jobs(project)) == SHOWN
    edit(project / "params/datasets.yaml", "Demo in MovieLens", "Generated demo in MovieLens")

    (project / "mlflow.db").unlink()
    assert planned_jobs(project) == {"track": 1, "demo": 1}
    run("snakemake", "--cores", "2", cwd=project)
    assert (project / "mlflow.db").is_file()
    assert planned_jobs(project) == {}

    new_times(project)
    assert planned_jobs(project) == {}

    ratings = project / "data/raw/demo/demo/ratings.dat"
    before = ratings.read_bytes()
    ratings.write_bytes(before.replace(b"::5::", b"::4::", 1))
    assert "validate" in planned_jobs(project)
    refused = run("snakemake", "--cores", "2", cwd=project, check=False)
    assert refused.returncode == 1
    assert "ratings.dat" in refused.stdout + refused.stderr
    ratings.write_bytes(before)
    run("snakemake", "--cores", "2", cwd=project)
    assert planned_jobs(project) == {}


@pytest.mark.slow
def test_dvc_runs_again_what_a_change_concerns(project: Path) -> None:
    keep_one_run(project)
    subprocess.run(["git", "init", "--quiet"], cwd=project, check=True)
    run("dvc", "repro", cwd=project)

    def ran() -> set[str]:
        printed = run("dvc", "repro", cwd=project).stdout
        return set(re.findall(r"^Running stage '(?:workflow/dvc.yaml:)?(\w+)", printed, re.M))

    assert ran() == {"check", "track"}  # these two always run
    edit(project / "params/models.yaml", "label: Most popular", "label: Popularity")
    assert ran() == {"check", "plan", "tabulate", "compare", "track", "demo"}
    assert "Popularity" in (project / "reports/demo/table.md").read_text()
    (project / "mlflow.db").unlink()
    run("dvc", "commit", "--force", "workflow/dvc.yaml:track@demo", cwd=project)
    assert ran() == {"check", "track", "demo"}
    assert (project / "mlflow.db").is_file()
    edit(project / "params/experiments/demo.yaml", "seeds: [0]", 'seeds: ["0; touch broken"]')
    refused = run("dvc", "repro", cwd=project, check=False)
    assert refused.returncode != 0
    assert "params/experiments/demo.yaml, key seeds.0" in refused.stderr
    assert not (project / "broken").exists()


def test_a_data_set_may_have_a_plus_in_its_name(project: Path) -> None:
    path = project / "params/datasets.yaml"
    content = yaml_files.read(path)
    path.write_text(yaml_files.dump(content | {"clicks+views": content["demo"]}))
    edit(project / "params/experiments/demo.yaml", "[demo]", "[clicks+views]")
    jobs = planned_jobs(project)
    assert (jobs["download"], jobs["validate"], jobs["preprocess"], jobs["train"]) == (1, 1, 1, 6)


@pytest.mark.parametrize("command", ["--unlock", "--dag", "--rulegraph", "--summary", "--lint", "--list"])
def test_what_runs_nothing_needs_no_cores(project: Path, command: str) -> None:
    run("snakemake", command, cwd=project)


def test_a_wrong_name_gets_the_right_ones(project: Path) -> None:
    for target in ("ml-2m", "reports/ml-2m/table.md", "data/processed/ml-2m/manifest.json"):
        refused = run("snakemake", "--cores", "2", "--", target, cwd=project, check=False)
        assert refused.returncode == 1
        assert "demo, ml-1m, ml-1m-ablations" in refused.stderr
        assert target in refused.stderr
        assert "Traceback" not in refused.stderr
    assert planned_jobs(project, "demo") == planned_jobs(project)
    assert planned_jobs(project, "data/processed/demo/manifest.json")["preprocess"] == 1


@pytest.mark.slow
def test_a_killed_snakemake_goes_on_with_the_same_command(project: Path) -> None:
    keep_one_run(project)
    command = ["snakemake", "--cores", "2"]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with subprocess.Popen(
        command, cwd=project, env=environment | {"PYTHONPATH": str(project)}, stderr=subprocess.PIPE, text=True
    ) as killed:
        assert killed.stderr is not None
        for line in killed.stderr:
            if line.startswith(("rule validate", "localrule validate")):
                break
        twice = run(*command, cwd=project, check=False)
        assert (twice.returncode, "another one is making demo" in twice.stderr) == (1, True)
        killed.kill()
    run(*command, cwd=project)
    assert (project / "reports/demo/table.md").is_file()
    assert planned_jobs(project) == {}

    # A training begun anew, and killed before it wrote anything: what was made of the one before is not taken for its.
    training = "runs/demo/demo/most-popular/strict/seed-0/training.json"
    (project / training).unlink()
    marker = base64.urlsafe_b64encode(training.encode()).decode()
    (project / ".snakemake/incomplete" / marker).write_text('{"external_jobid": null}')
    jobs = planned_jobs(project)
    assert (jobs["train"], jobs["evaluate"]) == (1, 1)


@pytest.fixture(scope="module")
def by_snakemake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose reduced demo Snakemake has made."""
    project = copy_project(tmp_path_factory.mktemp("snakemake"))
    keep(project, f"[{', '.join(MODELS)}]")
    run("snakemake", "--cores", "2", cwd=project)
    return project


@pytest.fixture(scope="module")
def by_dvc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, made by DVC."""
    project = copy_project(tmp_path_factory.mktemp("dvc"))
    subprocess.run(["git", "init", "--quiet"], cwd=project, check=True)
    keep(project, f"[{', '.join(MODELS)}]")
    run("dvc", "repro", cwd=project)
    return project


@pytest.mark.slow
def test_both_orchestrators_make_the_same_results(by_snakemake: Path, by_dvc: Path) -> None:
    for project in (by_snakemake, by_dvc):
        check_outputs(project)
    for one in sorted((by_snakemake / "runs").rglob("metrics.json")):
        other = by_dvc / one.relative_to(by_snakemake)
        config = one.with_name("config.json")
        assert config.read_bytes() == other.with_name("config.json").read_bytes()
        ours, theirs = read_json(one), read_json(other)
        for key in ("data_sha256", "config_sha256", "weights_sha256", "ranks_sha256", "test", "beyond", "variants"):
            assert ours[key] == theirs[key], f"{one.parent.relative_to(by_snakemake)}: {key}"


@pytest.mark.slow
def test_every_key_of_a_run_s_files_is_documented(by_snakemake: Path) -> None:
    schema = yaml_files.read(ROOT / "params/schemas/results.yaml")
    runs = [path.parent for path in (by_snakemake / "runs").rglob("metrics.json")]
    files = [(read_json(run / "training.json"), "training") for run in runs]
    files += [(read_json(run / "metrics.json"), "result") for run in runs]
    files += [(line, "history") for run in runs for line in read_jsonl(run / "history.jsonl")]
    for content, name in files:
        jsonschema.validate(content, schema | {"$ref": f"#/$defs/{name}"})


@pytest.mark.slow
def test_snakemake_makes_the_demo_once(by_snakemake: Path) -> None:
    project = by_snakemake
    again = run("snakemake", "--cores", "2", cwd=project)
    assert "Nothing to be done" in again.stdout + again.stderr
    run("snakemake", "--cores", "1", "--report", "report.html", cwd=project)
    loaded = re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=.?https?:", (project / "report.html").read_text())
    assert loaded == []  # whole without a network
    # A parameter of the training leaves the data alone and trains again; one of another data set does nothing.
    path = project / "params/datasets.yaml"
    edit(path, "max_len: 200", "max_len: 100")
    assert planned_jobs(project) == {}
    edit(path, "epochs: 3", "epochs: 2")
    jobs = planned_jobs(project)
    assert jobs["train"] == 4
    assert not {"download", "validate", "preprocess", "synthesize"} & set(jobs)


@pytest.mark.slow
def test_dvc_makes_the_demo_once(by_dvc: Path) -> None:
    project = by_dvc
    again = run("dvc", "repro", cwd=project)
    stages = set(re.findall(r"^Running stage 'workflow/dvc.yaml:([^']+)'", again.stdout, re.M))
    assert stages == {"check@demo", "track@demo"}  # which always run
    edit(project / "params/datasets.yaml", "epochs: 3", "epochs: 2")
    planned = run("dvc", "repro", "--dry", cwd=project).stdout
    assert planned.count("Running stage 'workflow/dvc.yaml:plan@") == 4
    assert not [line for line in planned.splitlines() if line.startswith("Running") and "preprocess" in line]


@pytest.mark.slow
def test_snakemake_runs_a_grid(project: Path) -> None:
    path = project / "params/experiments/sweep-demo.yaml"
    path.write_text(path.read_text().replace("  training.dropout: [0.1, 0.2]\n", ""))
    run("snakemake", "--cores", "2", "--", "sweep-demo", cwd=project)
    table = (project / "reports/sweep-demo/table.md").read_text()
    for rate in ("0.001", "0.003"):
        assert f"HSTU, model.optimizer.lr={rate}" in table
        config = project / f"runs/sweep-demo/demo/hstu+model.optimizer.lr={rate}/strict/seed-0/config.json"
        assert read_json(config)["model"]["optimizer"]["lr"] == float(rate)


@pytest.mark.slow
def test_dvc_runs_an_experiment_with_another_parameter(project: Path) -> None:
    keep(project, "[hstu]", "[strict]")
    for command in (
        ["init", "--quiet"],
        ["add", "--all"],
        ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "t"],
    ):
        subprocess.run(["git", *command], cwd=project, check=True)
    run("dvc", "exp", "run", "-S", "params/models.yaml:hstu.optimizer.lr=0.00003", cwd=project)
    config = read_json(project / "runs/demo/demo/hstu/strict/seed-0/config.json")
    assert config["model"]["optimizer"]["lr"] == 0.00003
    assert (project / "reports/demo/table.md").is_file()
