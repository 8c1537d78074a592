"""Write DVC's stages of every experiment but the demo, from the run stages of the top dvc.yaml.

DVC has no way to give one dvc.yaml another experiment's name, and `dvc repro` runs all of a file, so each
experiment has a file of its own with the same stages: `workflow/dvc/<experiment>/dvc.yaml`, for those of params/local
`workflow/dvc/local/<experiment>/dvc.yaml`. Data sets have `workflow/dvc/datasets/dvc.yaml`, in which the names are
written, and `workflow/dvc/local/datasets/dvc.yaml`. `make dvc` runs this; a test compares.
"""

import re
import shutil
import sys
from pathlib import Path
from typing import Any

from steps.common import params, yaml_files
from steps.common.cli import StepError

ROOT = Path(__file__).resolve().parents[2]
DATASETS = ROOT / "workflow/dvc/datasets/dvc.yaml"
LOCAL = ROOT / "workflow/dvc/local"
_TABLES = ("datasets", "models", "protocols")
_HEAD = """\
# Experiment {name}: `dvc repro {file}`. Written from the top dvc.yaml by `make dvc`.
vars:
  - {up}/{parameters}
  - experiment: {name}

stages:
"""
_LOCAL_HEAD = "# Data sets of params/local, from archive to sequences. Written by `make dvc`.\n"


def experiment_file(name: str) -> str:
    """The text of an experiment's dvc.yaml, whichever folder it stands in."""
    local = is_local(name)
    file = f"workflow/dvc/{'local/' if local else ''}{name}/dvc.yaml"
    parameters = f"params/{'local/' if local else ''}experiments/{name}.yaml"
    up = "/".join([".."] * file.count("/"))
    text = (ROOT / "dvc.yaml").read_text()
    stages = text[text.index("  check:\n") :]
    stages = re.sub(r"^(  [a-z]+:\n)", rf"\1    wdir: {up}\n", stages, flags=re.MULTILINE)
    if local:
        stages = stages.replace("params/experiments/", "params/local/experiments/")
        for table in filter(_has_local, _TABLES):
            line = f"      - params/{table}.yaml:\n"
            stages = stages.replace(line, line + f"      - params/local/{table}.yaml:\n")
    return _HEAD.format(name=name, file=file, up=up, parameters=parameters) + stages


def datasets_file() -> str:
    """The text of `workflow/dvc/datasets/dvc.yaml`, with every data set but those that are generated or local."""
    entries = params.load("datasets", ROOT / "params")
    own = _entries("params/datasets.yaml")
    names = ", ".join(name for name in own if "synthesize" not in entries[name])
    return re.sub(r"^( +dataset: )\[.*\]$", rf"\g<1>[{names}]", DATASETS.read_text(), flags=re.MULTILINE)


def local_datasets_file() -> str:
    """The text of `workflow/dvc/local/datasets/dvc.yaml`: stages of every data set of params/local."""
    entries = params.load("datasets", ROOT / "params")
    stages: dict[str, Any] = {}
    for name in _entries("params/local/datasets.yaml"):
        archive = f"data/synthetic/{name}.zip"
        synthesized = "synthesize" in entries[name]
        if synthesized:
            stages |= _stage("synthesize", name, [], ["steps/synthesize.py"], ["synthesize"], archive)
        code = ["steps/download.py", "steps/data/sources.py", *([archive] if synthesized else [])]
        stages |= _stage("download", name, [], code, ["source"], f"data/raw/{name}")
        code = ["steps/validate.py", "steps/data/readers.py", "steps/data/schemas.py", f"data/raw/{name}"]
        stages |= _stage(
            "validate", name, ["--raw", f"data/raw/{name}"], code, ["files", "checks"], f"data/valid/{name}"
        )
        code = ["steps/preprocess.py", "steps/data/build.py", f"data/valid/{name}"]
        valid = ["--valid", f"data/valid/{name}"]
        stages |= _stage("preprocess", name, valid, code, ["ties"], f"data/processed/{name}")
    return _LOCAL_HEAD + yaml_files.dump({"stages": stages})


def _stage(step: str, name: str, options: list[str], deps: list[str], keys: list[str], out: str) -> dict[str, Any]:
    """One stage of a local data set, under a name that DVC allows."""
    command = ["python", "-m", f"steps.{step}", "--dataset", name, *options, "--output", out]
    files: dict[str, list[str]] = {}
    for key in keys:
        file, owner = _owner(name, key)
        files.setdefault(file, []).append(f"{owner}.{key}")
    stage = {
        "wdir": "../../../..",
        "cmd": " ".join(command),
        "deps": deps,
        "params": [{file: found} for file, found in files.items()],
        "outs": [out],
    }
    return {f"{step}-{name.replace('+', '_')}": stage}


def _owner(name: str, key: str) -> tuple[str, str]:
    """The file and the entry that give a local data set the value of a key: its own, or the one it is `like`."""
    local = _entries("params/local/datasets.yaml")
    if key in local[name]:
        return "params/local/datasets.yaml", name
    other = local[name]["like"]
    return ("params/local/datasets.yaml" if other in local else "params/datasets.yaml"), other


def _has_local(table: str) -> bool:
    return (ROOT / f"params/local/{table}.yaml").is_file()


def _entries(path: str) -> dict[str, Any]:
    """The entries of a file as written; none without the file."""
    return (yaml_files.read(ROOT / path) or {}) if (ROOT / path).is_file() else {}


def is_local(name: str) -> bool:
    """Whether an experiment stands in params/local."""
    return (ROOT / f"params/local/experiments/{name}.yaml").is_file()


def experiments() -> list[str]:
    """Every experiment but the demo, which is the top dvc.yaml, and grids, for which DVC has `exp run -S`.

    Raises StepError for one whose name or content does not fit, as its values become commands.
    """
    root = ROOT / "params"
    names = [name for name in params.experiments(root) if name != "demo"]
    return [name for name in names if "grid" not in params.load(f"experiments/{name}", root)]


def main() -> None:
    files = {DATASETS: datasets_file()}
    for name in experiments():
        folder = LOCAL if is_local(name) else ROOT / "workflow/dvc"
        files[folder / name / "dvc.yaml"] = experiment_file(name)
    if _entries("params/local/datasets.yaml"):
        files[LOCAL / "datasets/dvc.yaml"] = local_datasets_file()
    for path in LOCAL.glob("*/dvc.yaml"):
        if path not in files:  # its parameters are gone, and DVC would stumble over it
            shutil.rmtree(path.parent)
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    try:
        main()
    except StepError as error:
        sys.exit(f"generate: {error}")
