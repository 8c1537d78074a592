"""The demo end to end, reduced, under each orchestrator: every output, and no more to do than a change concerns."""

import csv
import json
import re
import shutil
import subprocess
from pathlib import Path

import jsonschema
import pytest

from steps.common import yaml_files
from steps.common.files import read_json, read_jsonl
from tests.browser import Watched
from tests.conftest import ROOT, copy_project, run
from tests.reduced import edit, keep, planned_jobs

OUTPUTS = ["table.md", "table.csv", "table.html", "runs.csv", "curves.svg", "curves.png", "mlflow.json"]
MODELS = ("most-popular", "hstu")
CARD = ["card.html", "card.json", "croissant.json"]
OUTPUTS += ["metrics.json", "details.md", "comparisons.md", "comparisons.csv", "parity.md", "intervals.svg"]
OUTPUTS += ["crate/ro-crate-metadata.json"]


def check_outputs(project: Path) -> None:
    """Every promised file is there."""
    assert [name for name in OUTPUTS if not (project / "reports/demo" / name).is_file()] == []
    assert [name for name in CARD if not (project / "reports/datasets/demo" / name).is_file()] == []
    for model in MODELS:
        for protocol in ("strict", "paper"):
            folder = project / "runs/demo/demo" / model / protocol / "seed-0"
            names = {path.name for path in folder.iterdir()}
            expected = {"config.json", "history.jsonl", "mllog.txt", "model.safetensors", "training.json"}
            assert names == expected | {"outcomes.safetensors", "metrics.json"}
    table = (project / "reports/demo/table.md").read_text()
    assert "HSTU" in table
    assert "protocol strict" in table
    assert (project / "mlflow.db").is_file()


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


def copy(made: Path, folder: Path) -> Path:
    """A copy of a made project, to change; the files keep their times."""
    return shutil.copytree(made, folder / "project", symlinks=True)


@pytest.mark.slow
def test_both_orchestrators_make_the_same_results(by_snakemake: Path, by_dvc: Path) -> None:
    for project in (by_snakemake, by_dvc):
        check_outputs(project)
    for one in sorted((by_snakemake / "runs").rglob("metrics.json")):
        other = by_dvc / one.relative_to(by_snakemake)
        config = one.with_name("config.json")
        assert config.read_bytes() == other.with_name("config.json").read_bytes()
        ours, theirs = read_json(one), read_json(other)
        for key in ("data_sha256", "config_sha256", "weights_sha256", "outcomes_sha256", "test", "beyond", "variants"):
            assert ours[key] == theirs[key], f"{one.parent.relative_to(by_snakemake)}: {key}"
    for name in CARD:
        made = [(project / "reports/datasets/demo" / name).read_bytes() for project in (by_snakemake, by_dvc)]
        assert made[0] == made[1], name


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
def test_snakemake_makes_the_demo_once(by_snakemake: Path, tmp_path: Path) -> None:
    project = copy(by_snakemake, tmp_path)
    again = run("snakemake", "--cores", "2", cwd=project)
    assert "Nothing to be done" in again.stdout + again.stderr
    # A parameter of the training leaves the data alone and trains again; one of another data set does nothing.
    path = project / "params/datasets.yaml"
    edit(path, "max_len: 200", "max_len: 100")
    assert planned_jobs(project) == {}
    edit(path, "epochs: 3", "epochs: 2")
    jobs = planned_jobs(project)
    assert jobs["train"] == 4
    assert not {"download", "validate", "preprocess", "synthesize"} & set(jobs)


@pytest.mark.slow
@pytest.mark.browser
def test_the_report_is_one_page_that_introduces_itself(by_snakemake: Path, browser_page: Watched) -> None:
    run("snakemake", "--cores", "1", "--report", "report.html", cwd=by_snakemake)
    page = browser_page.page
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto((by_snakemake / "report.html").as_uri())
    page.get_by_role("heading", name="Next-item recommendation").wait_for()
    row = page.get_by_role("row", name="HSTU").first
    [summary] = [
        line
        for line in csv.DictReader((by_snakemake / "reports/demo/table.csv").read_text().splitlines())
        if (line["model"], line["protocol"]) == ("hstu", "strict")
    ]
    assert f"{float(summary['test/ndcg@10']):.4f}" in row.inner_text()
    shown = page.inner_text("body")
    order = ["1. Results", "2. Comparisons and claims", "3. Training", "4. Data sets"]
    assert [line.strip() for line in shown.splitlines() if line.strip() in order] == order
    assert page.locator('a[href^="mailto:"]').count() == 0

    page.get_by_role("link", name="3. Training").last.click()
    page.get_by_text("Learning curves").first.wait_for()
    results = page.evaluate("results")
    assert {path.rsplit("/", 1)[1] for path in results} >= {"table.html", "curves.svg", "intervals.svg", "card.html"}
    assert not [path for path, result in results.items() if "mailto:" in result["caption"] or not result["labels"]]
    for path, result in results.items():
        kind = {"text/html": "html", "image/svg+xml": "img"}.get(result["mime_type"])
        if kind:
            page.evaluate(
                "([path, kind]) => app.setView({content: kind, contentPath: results[path].data_uri})", [path, kind]
            )
            page.locator("iframe" if kind == "html" else "#app img").last.wait_for()
    page.evaluate("app.setView({content: 'stats'})")
    page.locator("#runtimes canvas").wait_for()
    assert (browser_page.refused, browser_page.failed, problems) == ([], [], [])  # whole without a network


@pytest.mark.slow
def test_dvc_makes_the_demo_once(by_dvc: Path, tmp_path: Path) -> None:
    project = copy(by_dvc, tmp_path)
    again = run("dvc", "repro", cwd=project)
    stages = set(re.findall(r"^Running stage 'workflow/dvc.yaml:([^']+)'", again.stdout, re.M))
    assert stages == {"check@demo", "track@demo"}  # which always run
    edit(project / "params/datasets.yaml", "epochs: 3", "epochs: 2")
    planned = run("dvc", "repro", "--dry", cwd=project).stdout
    assert planned.count("Running stage 'workflow/dvc.yaml:plan@") == 4
    assert not [line for line in planned.splitlines() if line.startswith("Running") and "preprocess" in line]


@pytest.mark.slow
@pytest.mark.browser
def test_dvc_shows_what_people_can_read(by_dvc: Path, tmp_path: Path, browser_page: Watched) -> None:
    project = copy(by_dvc, tmp_path)
    stages = [line for line in run("dvc", "status", cwd=project).stdout.splitlines() if not line.startswith("\t")]
    assert stages == ["workflow/dvc.yaml:check@demo:", "workflow/dvc.yaml:track@demo:"]  # which always run

    [shown] = json.loads(run("dvc", "metrics", "show", "--json", cwd=project).stdout)[""]["data"].values()
    with (project / "reports/demo/table.csv").open() as file:
        for row in csv.DictReader(file):
            for name in ("hr@10", "ndcg@10"):
                found = shown["data"][row["dataset"]][row["protocol"]][row["model"]].pop(name)
                assert found == pytest.approx(float(row[f"test/{name}"]), abs=1e-6)
    assert not [left for of in shown["data"]["demo"].values() for left in of.values() if left]

    run("dvc", "plots", "show", cwd=project)
    browser_page.page.goto((project / "dvc_plots/index.html").as_uri())
    pictures = browser_page.page.locator("img")
    assert pictures.count() == 2
    assert all(picture.evaluate("image => image.naturalWidth") > 300 for picture in pictures.all())
    assert (browser_page.refused, browser_page.failed) == ([], [])


@pytest.mark.slow
def test_dvc_takes_over_what_snakemake_made(by_snakemake: Path, tmp_path: Path) -> None:
    project = copy(by_snakemake, tmp_path)
    subprocess.run(["git", "init", "--quiet"], cwd=project, check=True)
    makefile = (ROOT / "Makefile").read_text()
    [recipe] = re.findall(r"^share: .*\n((?:\t.*\n)+)", makefile, re.M)
    for command in recipe.replace("$(EXPERIMENT)", "demo").splitlines():
        run(*command.strip().removeprefix("@").split(), cwd=project)
    planned = run("dvc", "repro", "--dry", cwd=project).stdout
    assert set(re.findall(r"^Running stage 'workflow/dvc.yaml:([^']+)'", planned, re.M)) == {"check@demo", "track@demo"}


@pytest.mark.slow
def test_dvc_runs_again_what_a_change_concerns(by_dvc: Path, tmp_path: Path) -> None:
    project = copy(by_dvc, tmp_path)

    def ran() -> set[str]:
        printed = run("dvc", "repro", cwd=project).stdout
        return set(re.findall(r"^Running stage '(?:workflow/dvc.yaml:)?(\w+)", printed, re.M))

    assert ran() == {"check", "track"}  # these two always run
    edit(project / "params/models.yaml", "label: Most popular", "label: Popularity")
    assert ran() == {"check", "plan", "tabulate", "compare", "crate", "track", "demo"}
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
