"""What holds the project's files together: pins, generated files, both graphs."""

import json
import re
import shlex
import shutil
import subprocess
import tomllib
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pytest

from steps.common import params, yaml_files
from steps.common.cli import StepError
from steps.common.studies import PLUMBING
from steps.crates.experiment import OF_COMPARE
from steps.docs import PAGES
from steps.reporting.records import read_records, write_records
from tests import import_graph
from tests.conftest import ROOT, copy_project, run, step
from tests.reduced import plannable
from workflow import generate, rebuild

EXPERIMENTS, STUDIES = plannable(ROOT / "params"), params.studies(ROOT / "params")
NOT_CONDA = {
    "aiobotocore",
    "aioitertools",
    "boto3",
    "botocore",
    "durationpy",
    "dvc-s3",
    "fbgemm-gpu",
    "jmespath",
    "kubernetes",
    "lightning-utilities",
    "moto",
    "nvidia-ml-py",
    "oauthlib",
    "pip",
    "py-partiql-parser",
    "pyre-extensions",
    "pyvers",
    "requests-oauthlib",
    "responses",
    "s3fs",
    "s3transfer",
    "snakemake-executor-plugin-kubernetes",
    "snakemake-executor-plugin-slurm",
    "snakemake-executor-plugin-slurm-jobstep",
    "snakemake-storage-plugin-s3",
    "tensordict",
    "torchmetrics",
    "torchrec",
    "websocket-client",
    "xmltodict",
}


def pins(lines: list[str]) -> dict[str, str]:
    return dict(line.strip().split("==") for line in lines if "==" in line and not line.startswith("#"))


def test_conda_has_the_pins_of_pip() -> None:
    environment = yaml_files.read(ROOT / "environment.yml")
    pip = next(part["pip"] for part in environment["dependencies"] if isinstance(part, dict))
    constraints = pins((ROOT / "constraints.txt").read_text().splitlines())
    assert pins(pip) == {name: version for name, version in constraints.items() if name not in NOT_CONDA}


def test_every_dependency_is_pinned_without_a_build_suffix() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [name for extra in project["optional-dependencies"].values() for name in extra]
    wanted = [name for name in wanted if not name.startswith(project["name"])]  # of one extra by another
    constraints = pins((ROOT / "constraints.txt").read_text().splitlines())
    known = {re.sub(r"[-_.]+", "-", name).lower() for name in constraints}
    names = [re.sub(r"[-_.]+", "-", re.split(r"[\[<>=]", name)[0]).lower() for name in wanted]
    assert [name for name in names if name not in known] == []
    assert [version for version in constraints.values() if "+" in version] == []


def test_dvc_goes_through_the_runs_of_params() -> None:
    assert (ROOT / "workflow/runs.yaml").read_text() == generate.text(local=False), "run `make dvc`"


def committed_experiments() -> list[str]:
    return sorted(path.parent.name for path in (ROOT / "reports").glob("*/records"))


def test_dvc_lists_what_is_named_and_no_more() -> None:
    made = generate.lists(local=False, names=["ml-1m", "convergence"])
    assert {name for kind in ("published", "validated", "processed") for name in made[kind]} == {"ml-1m"}
    assert {item["experiment"] for item in made["runs"].values()} == {"ml-1m"} == set(made["experiments"])
    assert len(made["runs"]) == len(list(params.runs("ml-1m", ROOT / "params")))
    assert list(made["studies"]) == ["convergence"]
    with pytest.raises(StepError, match=r"ml-2m is no experiment or study; there are .*ml-1m"):
        generate.main(["ml-2m"])


def test_committed_tables_and_pages_are_those_of_the_committed_records(tmp_path: Path) -> None:
    for experiment in committed_experiments():
        arguments = ("--runs", f"reports/{experiment}/records", "--output", str(tmp_path / experiment))
        of_records = ["tabulate", *(["compare"] if rebuild.is_compared_again(ROOT / "reports" / experiment) else [])]
        for table in of_records:
            step(table, "--experiment", experiment, *arguments, cwd=ROOT)
        if "compare" not in of_records:
            kept = [f"reports/{experiment}/{name}" for name in OF_COMPARE]
            # All, as nothing makes them again; of a search none.
            assert run("git", "ls-files", *kept, cwd=ROOT).stdout.split() in (kept, [])
            for name in OF_COMPARE:
                shutil.copyfile(ROOT / "reports" / experiment / name, tmp_path / experiment / name)
        names = ("table.md", "table.csv", "runs.csv", "details.md", "paper.md", *OF_COMPARE)
        tables = [f"reports/{experiment}/{name}" for name in names]
        # Of a search the records alone are committed, the demo's tables are a user's own, and some say what others say.
        ignored = run("git", "check-ignore", *tables, cwd=ROOT, check=False).stdout.splitlines()
        for table in set(tables) - set(ignored):
            made = tmp_path / Path(table).relative_to("reports")
            assert made.read_text() == (ROOT / table).read_text(), f"run `make tables`: {table}"
    shutil.copyfile(ROOT / "reports/demo/recommendations.json", tmp_path / "demo/recommendations.json")
    shutil.copytree(ROOT / "reports/studies", tmp_path / "studies")
    step("claims", "--reports", tmp_path, "--output", tmp_path, cwd=ROOT)
    assert (tmp_path / "claims.csv").read_text() == (ROOT / "reports/claims.csv").read_text(), "run `make tables`"
    step("docs", "--reports", tmp_path, "--output", tmp_path, cwd=ROOT)
    for page in PAGES.values():
        assert (tmp_path / page).read_text() == (ROOT / page).read_text(), f"run `make tables`: {page}"


def test_what_compare_made_of_runs_stays_where_records_have_no_outcomes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, outcomes in (("kept", ["ab", None]), ("many-users", [None, None]), ("search", [None, None])):
        records = tmp_path / "reports" / name / "records"
        records.mkdir(parents=True)
        runs = pl.DataFrame({"seed": [0, 1], "outcomes_sha256": pl.Series(outcomes, dtype=pl.String)})
        runs.write_parquet(records / "runs.parquet")
        if name != "search":
            (records.parent / "comparisons.csv").touch()
    first = next(rebuild.stages())
    assert [[command[0], command[2]] for command in first] == [
        ["tabulate", "kept"],
        ["compare", "kept"],
        ["tabulate", "many-users"],
        ["tabulate", "search"],
        ["compare", "search"],
    ]


def test_links_of_pages_lead_somewhere() -> None:
    pages = [ROOT / name for name in ("README.md", "ARTIFACT.md", "config/README.md", "findings/README.md")]
    for page in [*pages, *(ROOT / "docs").glob("*.md")]:
        for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", page.read_text()):
            path = (page.parent / target).resolve() if target else page
            made = path.relative_to(ROOT).parts[:2] == ("reports", "demo")
            assert path.exists() or made, f"{page.name} links to {target}"
            assert not anchor or anchor in anchors(path), f"{page.name} links to {target}#{anchor}"


def test_commands_of_pages_go_until_one_rule() -> None:
    """Of two rules, one of which needs the other, Snakemake ends before the later one, and fails."""
    texts = [path.read_text("utf-8") for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))]
    until = [found for text in texts for found in re.findall(r"snakemake [^\n`]*--until ([\w ]+)", text)]
    assert until
    assert all(len(rules.split()) == 1 for rules in until), until


def test_figures_of_pages_are_committed() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    pages = [ROOT / name for name in listed.split("\0") if name.endswith(".md")]
    found = [
        (page, (page.parent / name).resolve().relative_to(ROOT).as_posix())
        for page in pages
        for name in re.findall(r"""(?:\]\(|srcset="|src=")([^")#:]*\.svg)""", page.read_text())
    ]
    assert {figure for _, figure in found} >= {"reports/ml-1m/curves-dark.svg", "reports/studies/kernels/figure.svg"}
    assert [(page.name, figure) for page, figure in found if figure not in listed.split("\0")] == []


def anchors(page: Path) -> set[str]:
    """The names by which GitHub links to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def snakemake_jobs(project: Path, *targets: str) -> dict[str, dict]:
    """Each job of the targets by its first output: rule, inputs, outputs, command line."""
    result = run(
        "snakemake", "--cores", "2", "--dry-run", "--forceall", "--printshellcmds", "--", *targets, cwd=project
    )
    jobs = {}
    for block in re.split(r"\n(?:\[.*\]\n)?(?:local)?rule ", result.stdout + result.stderr)[1:]:
        rule = block.split(":", 1)[0].strip()
        fields = {
            key: [name.strip() for name in value.split(", ")]
            for key, value in re.findall(r"^    (input|output): (.*)$", block, re.M)
        }
        command = re.search(r"^(?:Shell command: |\s*)(python -m steps\..*?)(?: 2>&1 \| tee .*)?$", block, re.M)
        if "output" in fields:
            assert command, block
            outputs = sorted(name.removesuffix(" (update)") for name in fields["output"])
            jobs[outputs[0]] = {"rule": rule, "input": set(fields["input"]), "output": outputs, "command": command[1]}
    return jobs


def dvc_stages(project: Path, files: list[str]) -> list[dict]:
    """Each stage of the DVC files: dependencies, outputs, command line."""
    code = """
import json, sys
from dvc.repo import Repo
repo = Repo()
stages = [stage for file in sys.argv[1:] for stage in repo.stage.load_all(file)]
def local(path): return str(__import__("os").path.relpath(path.fs_path))
print(json.dumps([{"rule": stage.name, "command": stage.cmd, "output": sorted(map(local, stage.outs)),
    "input": [local(dep) for dep in stage.deps
              if type(dep).__name__ == "Dependency" or dep.def_path.startswith(("data/", "reports/"))]}
    for stage in stages]))
"""
    return json.loads(run("python", "-c", code, *files, cwd=project).stdout)


def covers(dependency: str, name: str, project: Path) -> bool:
    """Whether a DVC dependency, a file or a folder, stands for the Snakemake input `name`."""
    if name == dependency:
        return True
    return name.startswith(f"{dependency}/") and ((project / dependency).is_dir() or "." not in Path(dependency).name)


def stands_for(name: str, dependency: str, project: Path) -> bool:
    """Whether the Snakemake input `name` is the DVC dependency, lies in it, or has its hash: small files stand for the
    large ones beside them."""
    if Path(name).name in {"manifest.json", "validation.json", "training.json", "metrics.json"}:
        return covers(dependency, name, project) or Path(name).parent == Path(dependency).parent
    return covers(dependency, name, project)


def add_local_experiment(project: Path) -> None:
    """An experiment of a user's own, on a data set of the user's own."""
    folder = project / "params/local/experiments"
    folder.mkdir(parents=True)
    title = {"like": "demo", "title": "My own"}
    (folder.parent / "datasets.yaml").write_text(yaml_files.dump({"my+own": title, "unused": title}))
    (folder.parent / "models.yaml").write_text(yaml_files.dump({"mine": {"like": "hstu", "label": "Mine"}}))
    (folder / "own.yaml").write_text(
        "title: My own\ndatasets: [my+own]\nmodels: [mine, sasrec]\nprotocols: [strict]\nseeds: [0, 1]\n"
    )
    run("python", "-m", "workflow.generate", *EXPERIMENTS, *STUDIES, cwd=project)


def in_experiments(project: Path) -> set[str]:
    """The data sets that experiments have."""
    found = [params.load(f"experiments/{name}", project / "params") for name in params.experiments(project / "params")]
    return {name for content in found for name in content["datasets"]}


@dataclass
class Graphs:
    """What both orchestrators make of a project that has an experiment of a user's own."""

    project: Path
    jobs: dict[str, dict]
    stages: list[dict]


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Graphs:
    project = copy_project(tmp_path_factory.mktemp("graphs"))
    subprocess.run(["git", "init", "--quiet"], cwd=project, check=True)
    add_local_experiment(project)
    targets = [*plannable(project / "params"), *STUDIES]
    stages = dvc_stages(project, ["workflow/dvc.yaml", "workflow/local/dvc.yaml"])
    return Graphs(project, snakemake_jobs(project, *targets), stages)


def test_both_orchestrators_have_the_same_graph(graphs: Graphs) -> None:
    project, jobs = graphs.project, graphs.jobs
    gates = {stage["rule"]: stage["output"][0] for stage in graphs.stages if stage["rule"].startswith("check@")}
    # Snakemake checks the parameters that it reads while it makes its graph.
    stages = [stage for stage in graphs.stages if stage["rule"] not in gates]
    # DVC goes through one experiment at a time, and the claims look at all.
    jobs = {name: job for name, job in jobs.items() if job["rule"] != "claims"}
    made = {name: [stage for stage in stages if covers(stage["output"][0], name, project)] for name in jobs}
    used = {stage["rule"] for found in made.values() for stage in found}
    unused = [stage["rule"] for stage in stages if stage["rule"] not in used]
    idle = {name for name in params.load("datasets", project / "params") if name not in in_experiments(project)}
    assert {rule for rule in unused if rule.split("@")[-1] not in idle} == set()
    assert len(used) == len(jobs)
    for name, job in jobs.items():
        (stage,) = made[name]
        for file in job["output"]:
            assert any(covers(output, file, project) for output in stage["output"]), f"DVC's {name} lacks {file}"
        for output in stage["output"]:
            assert any(covers(output, file, project) for file in job["output"]), f"Snakemake's {name} lacks {output}"
        assert shlex.split(job["command"]) == shlex.split(stage["command"])
        checked = {gate for gate in gates.values() if gate in stage["input"]}
        assert job["rule"] != "plan" or len(checked) == 1
        for file in job["input"]:
            assert any(covers(dependency, file, project) for dependency in stage["input"]), f"DVC's {name} lacks {file}"
        for dependency in set(stage["input"]) - checked:
            assert any(stands_for(file, dependency, project) for file in job["input"]), (
                f"Snakemake's {name} lacks {dependency}"
            )


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    return import_graph.graph(ROOT)


@pytest.mark.parametrize(
    "name",
    [
        *("download", "validate", "preprocess", "card", "plan", "train", "evaluate", "tabulate", "compare"),
        *("crate", "track", "plan_study", "study", "report_study"),
    ],
)
def test_what_a_step_imports_is_a_dependency_of_it(graphs: Graphs, imports: dict[str, set[str]], name: str) -> None:
    listed = next(stage for stage in graphs.stages if stage["rule"].split("@")[0].replace("-", "_") == name)["input"]
    plumbing = {f"steps/common/{module}.py" for module in PLUMBING}
    reached = import_graph.reachable(f"steps/{name}.py", imports, without=plumbing)
    wanted = {file for file in reached if not file.endswith("/__init__.py")}
    if name in {"download", "validate", "preprocess", "card"}:
        wanted.discard("steps/common/params.py")  # they depend on the values that they read
        wanted.discard("steps/common/dotted.py")
    lacking = {file for file in wanted if not any(covers(dependency, file, graphs.project) for dependency in listed)}
    assert lacking == set()


def test_an_experiment_with_a_wrong_name_gets_no_stages(project: Path) -> None:
    content = (project / "params/experiments/demo.yaml").read_text()
    (project / "params/experiments/x; touch broken.yaml").write_text(content)
    refused = run("python", "-m", "workflow.generate", "x; touch broken", cwd=project, check=False)
    assert refused.returncode == 1
    assert "x; touch broken" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert "x; touch" not in (project / "workflow/runs.yaml").read_text()


def test_commits_that_reports_name_are_of_this_history() -> None:
    """On a machine without git a variable says the commit, and nothing there can tell whether it exists."""
    if run("git", "rev-parse", "--is-shallow-repository", cwd=ROOT).stdout.strip() == "true":
        pytest.skip("the history is not here")
    texts = []
    for name in run("git", "ls-files", "reports", cwd=ROOT).stdout.splitlines():
        if name.endswith(".json"):
            texts.append((ROOT / name).read_text())
        elif name.endswith("/runs.parquet"):
            texts += pl.read_parquet(ROOT / name, columns=["metrics.json"])["metrics.json"].to_list()
    named = {name for text in texts for name in re.findall(r'"commit": ?"([0-9a-f]{40})', text)}
    assert named
    unknown = {
        name for name in named if run("git", "cat-file", "-e", f"{name}^{{commit}}", cwd=ROOT, check=False).returncode
    }
    assert not unknown


def test_the_tree_stays_small() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    sizes = {name: (ROOT / name).stat().st_size for name in filter(None, listed.split("\0")) if (ROOT / name).is_file()}
    assert sum(sizes.values()) <= 8_000_000, sorted(sizes, key=lambda name: -sizes[name])[:10]


@pytest.mark.parametrize("experiment", ["amzn-beauty", "ml-1m"])
def test_a_further_run_adds_little(experiment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found, _ = read_records(experiment, Path("reports", experiment, "records"))
    for name, kept in (("all", found), ("less", [record for record in found if record.run != found[-1].run])):
        write_records(experiment, kept, tmp_path / name)
    bytes_of = {name: sum(path.stat().st_size for path in (tmp_path / name).iterdir()) for name in ("all", "less")}
    assert bytes_of["all"] - bytes_of["less"] <= 10_000
