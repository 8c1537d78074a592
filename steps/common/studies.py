"""A study of params/studies/, resolved into all that measuring it needs; and the code that its figures rest on."""

import ast
import hashlib
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

from steps.common import params
from steps.common.cli import StepError
from steps.common.dotted import set_entry

_PROJECT = Path(__file__).resolve().parents[2]
#: What a measurement reads of an entry of params/datasets.yaml, by the folder below data/ that it reads.
_READ: dict[str, dict[str, Any]] = {
    "raw": {"files": None, "checks": None, "filters": []},
    "processed": {"repeats": "none"},
}
#: Code that changes how a step runs, not what it measures.
PLUMBING = {
    "cli",
    "files",
    "progress",
    "provenance",
    "yaml_files",
    "locks",
    "config",
    "datasets",
    "typed",
    "gpu_record",
    "processes",
    "torchrun",
}


def plan(study: str, root: Path = params.ROOT) -> dict[str, Any]:
    """All that `steps.study` needs to know, as plain JSON values: whatever the cases are and are made of.

    Titles are no part of it, nor published figures: they change reports, not measurements.
    """
    content = params.load(f"studies/{study}", root)
    measured = deepcopy(content["measure"])
    for index, group in enumerate(measured.get("runs", [])):
        where = f"{root}/studies/{study}.yaml, key measure.runs.{index}"
        measured["runs"][index] = group.get("with", {}) | {"configs": _configs(group, where, root)}
    for kind, names in measured.get("data", {}).items():
        # Copies, as here and below: params are read once, and all who read them share an entry.
        entries = {name: deepcopy(params.entry("datasets", name, root)) for name in names}
        measured["data"][kind] = {
            name: {key: entry.get(key, default) for key, default in _READ[kind].items()}
            for name, entry in entries.items()
        }
    if "generated" in measured:
        entries = {name: deepcopy(params.entry("datasets", name, root)) for name in measured["generated"]}
        measured["generated"] = {name: _generated(entry) for name, entry in entries.items()}
    if "protocols" in measured:
        measured["protocols"] = {name: params.protocol_rules(name, root) for name in measured["protocols"]}
    return {"study": study, "module": content["module"], **measured, "code_sha256": _code_sha256(content["module"])}


def planned_flops(plan: dict[str, Any]) -> float:
    """The sum of the budgets of a plan's runs, in FLOPs; 0 where its runs have none."""
    return sum(
        10 ** runs["log10_flops"] * len(runs["configs"]) for runs in plan.get("runs", []) if "log10_flops" in runs
    )


def manifests(study: str, root: Path = params.ROOT) -> list[str]:
    """The files that say which data a study reads: data/<kind>/<dataset>/manifest.json."""
    data = params.load(f"studies/{study}", root)["measure"].get("data", {})
    return [f"data/{kind}/{name}/manifest.json" for kind, names in data.items() for name in names]


def code_of(module: str) -> list[Path]:
    """The project's files that `steps/studies/<module>.py` imports, itself included, plumbing not; sorted."""
    found: set[Path] = set()
    _follow(_PROJECT / f"steps/studies/{module}.py", found)
    if any(path.is_relative_to(_PROJECT / "kernels") for path in found):
        found.add(_PROJECT / "kernels/configurations.json")
    return sorted(found)


def _generated(entry: dict[str, Any]) -> dict[str, Any]:
    """What a file of another size is made and read by: no number that is expected of the entry's own."""
    checks = {key: value for key, value in entry["checks"].items() if key != "expected"}
    return {key: entry[key] for key in ("synthesize", "files")} | {
        "checks": checks,
        "filters": entry.get("filters", []),
    }


def _configs(group: dict[str, Any], where: str, root: Path) -> list[dict[str, Any]]:
    """The config of each run that a group of `runs` names, with its own settings."""
    configs = []
    for model in group["models"]:
        for seed in group.get("seeds", [0]):
            run = params.Run(group["experiment"], group["dataset"], model, group["protocol"], seed)
            config = params.resolve(run, root)
            for key, value in group.get("set", {}).items():
                try:
                    set_entry(config, key, value)
                except KeyError:
                    raise StepError(f"{where}.set: model {model} has no parameter {key!r}") from None
            configs.append(config)
    return configs


@cache  # code does not change while a graph is made
def _code_sha256(module: str) -> str:
    digest = hashlib.sha256()
    for path in code_of(module):
        digest.update(f"{path.relative_to(_PROJECT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def _follow(path: Path, found: set[Path]) -> None:
    """Add the file, and those that it imports."""
    if path in found or not path.is_file() or (path.parent.name == "common" and path.stem in PLUMBING):
        return
    found.add(path)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            above = path.relative_to(_PROJECT).parts[: -node.level] if node.level else ()
            base = [*above, *(node.module or "").split(".")] if node.module else [*above]
            names = [base, *([*base, alias.name] for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        else:
            continue
        for parts in names:
            if parts and parts[0] in ("steps", "kernels"):
                place = _PROJECT.joinpath(*parts)
                for file in (place.with_suffix(".py"), place / "__init__.py"):
                    _follow(file, found)
