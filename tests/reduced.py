"""The reduced demo of a project copy, reduced further; and what Snakemake would make of it."""

import re
from pathlib import Path

from steps.common import params, yaml_files
from tests.conftest import run


def plannable(root: Path) -> list[str]:
    """The experiments whose runs resolve: all but those that are tuned by a search which has not chosen yet."""

    def is_tuned(name: str) -> bool:
        search = params.load(f"experiments/{name}", root).get("tuned")
        return search is None or params.tuned_path(name, search, root).is_file()

    return [name for name in params.experiments(root) if is_tuned(name)]


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
    claims = project / "params/claims.yaml"
    content = yaml_files.read(claims)
    content["claims"] = {
        name: claim for name, claim in content["claims"].items() if not {"study", "runs", "decided"} & {*claim}
    }
    claims.write_text(yaml_files.dump(content), encoding="utf-8")
    for path in [*(project / "params/experiments").iterdir(), *(project / "params/studies").iterdir()]:
        if path.stem != "demo":  # studies too, as they name experiments
            path.unlink()
    run("python", "-m", "workflow.generate", cwd=project)


def keep_one_run(project: Path) -> None:
    """Reduce the demo to one run, which trains nothing: what a graph does is seen on it as well."""
    keep(project, "[most-popular]", "[strict]")
