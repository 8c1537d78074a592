"""Write the list of data sets, experiments, runs and studies that workflow/dvc.yaml goes through.

`workflow/runs.yaml` has the experiments and studies that are named, with their data sets: DVC shows every stage that
there is, and of all experiments that is too much to read. Those of params/local/ get `workflow/local/runs.yaml`, and
`workflow/local/dvc.yaml` beside it with the same stages. `make dvc EXPERIMENT=ml-1m` runs this; DVC's stage `check`
compares.
"""

import argparse
import json
import re
import shutil
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from steps.common import params, studies, yaml_files
from steps.common.cli import StepError
from steps.common.datasets import TOLD
from steps.common.files import write_text

ROOT = Path(__file__).resolve().parents[1]
LOCAL = ROOT / "workflow/local"
_TABLES = ("datasets", "models", "protocols")
_DATA, _CARDS = 2, 8  # data sets that DVC's stages `study` and `track` have room for
_REPORT = 2  # modules that its stage `report-study` has room for
_HEAD = "# Written by `make dvc` from {folder}.\n"
#: What `dvc repro` makes.
DEFAULT = ("demo",)
#: The `foreach` of each kind of data stages, and the keys of params/datasets.yaml that they depend on.
_KEYS = {
    "synthesized": ("synthesize", "source"),
    "published": ("source",),
    "validated": ("files", "checks"),
    "processed": ("ties",),
}


def lists(local: bool, names: Collection[str] = DEFAULT) -> dict[str, dict[str, Any]]:
    """The entries of each `foreach` of dvc.yaml, by a name that DVC allows in a stage's.

    local: of params/local/, of which all are listed. names: the experiments and studies of params/ that are listed.

    Raises StepError for an experiment whose name or content does not fit, as its values become commands.
    """
    root = ROOT / "params"
    made: dict[str, dict[str, Any]] = {kind: {} for kind in _KEYS}
    datasets = params.load("datasets", root)
    listed = {name for name in params.experiments(root) if name in names or params.is_local(name, root)}
    used = _used(listed, names)
    for name in _entries("params/local/datasets.yaml" if local else "params/datasets.yaml"):
        if name not in used:
            continue
        valid = params.valid_of(name, root)
        kinds = ["processed"]
        if valid == name:  # else the files are fetched and validated for the other
            kinds += ["validated", "synthesized" if "synthesize" in datasets[name] else "published"]
        for kind in kinds:
            item = {"name": name} | ({"valid": valid} if kind == "processed" else {})
            item |= {key: _owner(name, key) for key in _KEYS[kind]}
            if kind == "processed":  # DVC refuses a key that is not there
                item["told"] = [_key(name, key if key in datasets[name] else "title") for key in TOLD]
            if kind == "validated":
                key = "filters" if "filters" in datasets[name] else "checks"
                item["filters"] = _owner(name, key) | {"key": key}
            _add(made[kind], name, item)
    made |= {"experiments": {}, "runs": {}}
    for name in params.experiments(root):
        if name in listed and params.is_local(name, root) == local:
            shown = params.load(f"experiments/{name}", root)["datasets"]
            if len(shown) > _CARDS:
                raise StepError(f"{params.experiment_path(name, root)}, key datasets: DVC has room for {_CARDS}")
            item = {"name": name, "datasets": shown + shown[:1] * (_CARDS - len(shown))}
            _add(made["experiments"], name, item)
            for run in params.check(name, root):
                keys = ("experiment", "dataset", "model", "protocol", "seed")
                item = {key: getattr(run, key) for key in keys}
                _add(made["runs"], "-".join(map(str, item.values())), item)
    if not local:
        made["studies"] = {}
        for name in filter(names.__contains__, params.studies(root)):
            study, found = params.load(f"studies/{name}", root), studies.manifests(name, root)
            if len(found) > _DATA:
                raise StepError(f"params/studies/{name}.yaml, key measure.data: DVC has room for {_DATA} data sets")
            data = [*found, *[f"runs/studies/{name}/settings.json"] * (_DATA - len(found))]
            _add(made["studies"], name, {"name": name, "data": data, "report": _report(study["module"])})
    return made


def text(local: bool, names: Collection[str] = DEFAULT) -> str:
    """The content of runs.yaml: a line an entry."""
    lines = [_HEAD.format(folder="params/local" if local else "params")]
    for name, items in lists(local, names).items():
        lines.append(f"{name}:\n" if items else f"{name}: {{}}\n")
        lines += [f"  {key}: {json.dumps(item)}\n" for key, item in items.items()]
    return "".join(lines)


def local_dvc_yaml() -> str:
    """workflow/dvc.yaml, one folder deeper, for what params/local/ has."""
    stages = (ROOT / "workflow/dvc.yaml").read_text(encoding="utf-8")
    stages = stages[: stages.index("\n  # Studies\n")].replace("wdir: ..", "wdir: ../..")
    stages = stages.replace("params/experiments/", "params/local/experiments/").replace(
        "workflow/runs", "workflow/local/runs"
    )
    for table in _TABLES:
        if (ROOT / f"params/local/{table}.yaml").is_file():
            line = f"        - params/{table}.yaml:\n"
            stages = stages.replace(line, line + f"        - params/local/{table}.yaml:\n")
    return _HEAD.format(folder="params/local") + stages[stages.index("vars:") :]


def _used(experiments: Collection[str], names: Collection[str]) -> set[str]:
    """The data sets of experiments and of the named studies, and those that they are variants of."""
    root = ROOT / "params"
    found = {dataset for name in experiments for dataset in params.load(f"experiments/{name}", root)["datasets"]}
    for name in filter(names.__contains__, params.studies(root)):
        found |= {Path(manifest).parent.name for manifest in studies.manifests(name, root)}
    return found | {params.valid_of(name, root) for name in found}


def _report(module: str) -> list[str]:
    """The files of a study's report, the first again where there is room left."""
    files = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "steps/studies").glob(f"{module}_*.py"))
    if len(files) > _REPORT:
        raise StepError(f"{', '.join(files)}: DVC has room for {_REPORT} modules of a report")
    return files + files[:1] * (_REPORT - len(files))


def _add(items: dict[str, Any], name: str, item: dict[str, Any]) -> None:
    key = re.sub(r"[^a-z0-9-]", "_", name)
    if key in items:
        raise StepError(f"{name} and another would both be called {key} in DVC; rename one")
    items[key] = item


def _owner(name: str, key: str) -> dict[str, str]:
    """The file and the entry in which DVC finds a key of a data set: its own, or the one it is `like`."""
    for file in ("params/local/datasets.yaml", "params/datasets.yaml"):
        entries = _entries(file)
        if name in entries:
            return {"file": file, "entry": name} if key in entries[name] else _owner(entries[name]["like"], key)
    raise StepError(f"no data set {name!r}")


def _key(name: str, key: str) -> dict[str, str]:
    """The file and the place in which DVC finds a key of a data set."""
    owner = _owner(name, key)
    return {"file": owner["file"], "key": f"{owner['entry']}.{key}"}


def _entries(path: str) -> dict[str, Any]:
    """The entries of a file, without what they are `like`; none without the file."""
    return (yaml_files.read(ROOT / path) or {}) if (ROOT / path).is_file() else {}


def main(names: Collection[str]) -> None:
    there = [*params.experiments(ROOT / "params"), *params.studies(ROOT / "params")]
    for name in names:
        if name not in there:
            raise StepError(f"{name} is no experiment or study; there are {', '.join(there)}")
    shutil.rmtree(LOCAL, ignore_errors=True)
    write_text(ROOT / "workflow/runs.yaml", text(local=False, names=names))
    if (ROOT / "params/local").is_dir():
        write_text(LOCAL / "runs.yaml", text(local=True))
        write_text(LOCAL / "dvc.yaml", local_dvc_yaml())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m workflow.generate", description=__doc__)
    parser.add_argument("names", nargs="*", default=DEFAULT, help="experiments and studies to list; the demo if none")
    try:
        main(parser.parse_args().names)
    except StepError as error:
        sys.exit(f"generate: {error}")
