"""Write workflow/dvc/<experiment>/dvc.yaml for every experiment but the demo, from the run stages of dvc.yaml, and the
names of the data sets into the file that makes those.

DVC has no way to give one dvc.yaml another experiment's name, and `dvc repro` runs all of a file, so each
experiment has a file of its own with the same stages. `make dvc` runs this; a test compares.
"""

import re
from pathlib import Path

from steps.common import yaml_files

ROOT = Path(__file__).resolve().parents[2]
DATASETS = ROOT / "workflow/dvc/datasets/dvc.yaml"
_HEAD = """\
# Experiment {name}: `dvc repro workflow/dvc/{name}/dvc.yaml`. Written from the top dvc.yaml by `make dvc`.
vars:
  - ../../../params/experiments/{name}.yaml
  - experiment: {name}

stages:
"""


def experiment_file(name: str) -> str:
    """The text of `workflow/dvc/<name>/dvc.yaml`."""
    text = (ROOT / "dvc.yaml").read_text()
    stages = text[text.index("  plan:\n") :]
    return _HEAD.format(name=name) + re.sub(r"^(  [a-z]+:\n)", r"\1    wdir: ../../..\n", stages, flags=re.MULTILINE)


def datasets_file() -> str:
    """The text of `workflow/dvc/datasets/dvc.yaml`, with every data set but those that are generated."""
    entries = yaml_files.read(ROOT / "params/datasets.yaml")
    names = ", ".join(name for name, entry in entries.items() if "synthesize" not in entry)
    return re.sub(r"^( +dataset: )\[.*\]$", rf"\g<1>[{names}]", DATASETS.read_text(), flags=re.MULTILINE)


def experiments() -> list[str]:
    """Every experiment but the demo, which is the top dvc.yaml, and grids, for which DVC has `exp run -S`."""
    paths = (ROOT / "params/experiments").glob("*.yaml")
    return sorted(path.stem for path in paths if path.stem != "demo" and "\ngrid:" not in path.read_text())


if __name__ == "__main__":
    DATASETS.write_text(datasets_file())
    for name in experiments():
        path = ROOT / "workflow/dvc" / name / "dvc.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(experiment_file(name))
