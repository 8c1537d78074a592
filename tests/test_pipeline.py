"""The demo end to end, reduced, under each orchestrator: every output, and nothing to do the second time."""

import re
import subprocess
from pathlib import Path

import pytest

from steps.common.files import read_json
from tests.conftest import run

OUTPUTS = ["table.md", "table.csv", "table.html", "runs.csv", "curves.svg", "curves.png", "mlflow.json"]
OUTPUTS += ["details.md", "comparisons.md", "comparisons.csv", "claims.md", "intervals.svg"]


def check_outputs(project: Path) -> dict[str, float]:
    """Every promised file is there; returns HR@10 of every run."""
    assert [name for name in OUTPUTS if not (project / "reports/demo" / name).is_file()] == []
    found = {}
    for model in ("most-popular", "sasrec", "hstu"):
        for protocol in ("strict", "paper"):
            folder = project / "runs/demo/demo" / model / protocol / "seed-0"
            names = {path.name for path in folder.iterdir()}
            expected = {"config.json", "history.jsonl", "model.safetensors", "training.json"}
            assert names == expected | {"ranks.safetensors", "metrics.json"}
            found[f"{model}/{protocol}"] = read_json(folder / "metrics.json")["test"]["hr@10"]
    table = (project / "reports/demo/table.md").read_text()
    assert "HSTU" in table
    assert "protocol strict" in table
    assert (project / "mlflow.db").is_file()
    return found


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, float]]:
    """What each orchestrator's runs scored, to compare them."""
    return {}


@pytest.mark.slow
def test_snakemake_makes_the_demo_once(project: Path, results: dict[str, dict[str, float]]) -> None:
    run("snakemake", "--cores", "2", cwd=project)
    results["snakemake"] = check_outputs(project)
    again = run("snakemake", "--cores", "2", cwd=project)
    assert "Nothing to be done" in again.stdout + again.stderr
    run("snakemake", "--cores", "1", "--report", "report.html", cwd=project)
    loaded = re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=.?https?:", (project / "report.html").read_text())
    assert loaded == []  # whole without a network
    # A parameter of the training leaves the data alone and trains again; one of another data set does nothing.
    path = project / "params/datasets.yaml"
    path.write_text(path.read_text().replace("max_len: 200", "max_len: 100"))
    assert "Nothing to be done" in (lambda done: done.stdout + done.stderr)(
        run("snakemake", "--cores", "2", cwd=project)
    )
    path.write_text(path.read_text().replace("epochs: 3", "epochs: 2"))
    planned = run("snakemake", "--cores", "2", "--dry-run", cwd=project)
    jobs = {
        line.split()[0]: int(line.split()[1])
        for line in planned.stdout.splitlines()
        if len(line.split()) == 2 and line.split()[1].isdigit()
    }
    assert jobs["train"] == 6
    assert not {"download", "validate", "preprocess", "synthesize"} & set(jobs)


@pytest.mark.slow
def test_dvc_makes_the_demo_once(project: Path, results: dict[str, dict[str, float]]) -> None:
    subprocess.run(["git", "init", "--quiet"], cwd=project, check=True)
    run("dvc", "repro", cwd=project)
    results["dvc"] = check_outputs(project)
    again = run("dvc", "repro", cwd=project)
    assert "Data and pipelines are up to date" in again.stdout
    assert "Running stage" not in again.stdout
    path = project / "params/datasets.yaml"
    path.write_text(path.read_text().replace("epochs: 3", "epochs: 2"))
    planned = run("dvc", "repro", "--dry", "plan", cwd=project).stdout
    assert planned.count("Running stage 'plan@") == 6
    assert "preprocess" not in [line for line in planned.splitlines() if line.startswith("Running")]
    if "snakemake" in results:
        assert results["dvc"] == pytest.approx(results["snakemake"], abs=0.05)


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
    path = project / "params/experiments/demo.yaml"
    path.write_text(
        path.read_text().replace("[most-popular, sasrec, hstu]", "[hstu]").replace("[strict, paper]", "[strict]")
    )
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
