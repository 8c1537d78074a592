"""Both orchestrators on reduced demos of other kinds: names, changes, grids, other parameters, and after a kill."""

import base64
import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from steps.common import yaml_files
from steps.common.files import read_json, write_json
from tests.conftest import run
from tests.reduced import edit, keep, keep_one_run, planned_jobs


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


def test_the_snakefile_for_the_catalogue_makes_the_same(project: Path) -> None:
    dry = run("snakemake", "--cores", "2", "--dry-run", "--snakefile", "workflow/Snakefile", cwd=project)
    jobs = {rule: int(count) for rule, count in re.findall(r"^(\w+) +(\d+)$", dry.stdout, re.M) if rule != "total"}
    assert jobs.pop("all") == 1
    assert jobs | {"demo": 1} == planned_jobs(project)


def test_a_wrong_name_gets_the_right_ones(project: Path) -> None:
    for target in ("ml-2m", "reports/ml-2m/table.md", "data/processed/ml-2m/manifest.json"):
        refused = run("snakemake", "--cores", "2", "--", target, cwd=project, check=False)
        assert refused.returncode == 1
        assert "demo, kuairand-1k-ranking, ml-1m, ml-1m-ablations" in refused.stderr
        assert target in refused.stderr
        assert "Traceback" not in refused.stderr
    assert planned_jobs(project, "demo") == planned_jobs(project)
    assert planned_jobs(project, "data/processed/demo/manifest.json")["preprocess"] == 1


def new_times(folder: Path) -> None:
    """Give every file below the folder a new time, in an order that has nothing to do with how they were made."""
    files = [path for path in folder.rglob("*") if path.is_file() and ".snakemake" not in path.parts]
    files.sort(key=lambda path: hashlib.sha256(str(path).encode()).digest())
    for place, path in enumerate(files):
        os.utime(path, (time.time() - place, time.time() - place))


SHOWN = {"tabulate", "compare", "crate", "track", "demo"}


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
    assert set(planned_jobs(project)) == SHOWN | {"card"}
    edit(project / "params/datasets.yaml", "Demo in MovieLens", "Generated demo in MovieLens")

    (project / "mlflow.db").unlink()
    assert planned_jobs(project) == {"track": 1, "demo": 1}
    run("snakemake", "--cores", "2", cwd=project)
    assert (project / "mlflow.db").is_file()
    assert planned_jobs(project) == {}
    tracked = project / "reports/demo/mlflow.json"
    content = read_json(tracked)
    write_json(tracked, content | {"pending": "the server did not answer"})
    assert planned_jobs(project) == {"track": 1, "demo": 1}
    write_json(tracked, content)

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


@pytest.mark.slow
def test_a_quiet_run_says_a_line_a_step_and_ends_clearly(project: Path) -> None:
    keep_one_run(project)
    command = ["snakemake", "--cores", "1", "--quiet", "rules", "--", "data/valid/demo/validation.json"]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with subprocess.Popen(
        command,
        cwd=project,
        env=environment | {"PYTHONPATH": str(project)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as interrupted:
        assert interrupted.stdout is not None
        printed = [interrupted.stdout.readline(), interrupted.stdout.readline()]
        os.killpg(interrupted.pid, signal.SIGINT)  # as a terminal's Ctrl-C, which reaches the step too
        printed += interrupted.stdout.readlines()
    assert interrupted.returncode != 0
    assert printed[0].startswith("3 steps: synthesize, download, validate.")
    assert printed[1].startswith("1/3  synthesize demo")
    assert "run the same command again" in printed[-1]
    assert len(printed) <= 5  # one more step may have ended

    again = run(*command, cwd=project)
    printed = (again.stdout + again.stderr).splitlines()
    assert printed[-1].split()[1:3] == ["validate", "demo"]
    assert len(printed) <= 3

    (project / "data/raw/demo/demo/ratings.dat").unlink()
    failed = run(*command, cwd=project, check=False)
    assert failed.returncode == 1
    said = (failed.stdout + failed.stderr).splitlines()[1:]
    assert len(said) == 1
    assert said[0].startswith("validate demo failed: validate: data/raw/demo/demo/ratings.dat")
    assert said[0].endswith("(log: logs/validate/demo.log)")
    assert (project / "logs/validate/demo.log").is_file()


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
