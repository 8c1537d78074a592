"""The files under params/: read, checked against their schemas, and resolved into one run's config.

Needs PyYAML and jsonschema, so steps that must run on a bare GPU machine (train, evaluate) do not
import it: they read the `config.json` that `plan` resolved.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from steps.common.cli import StepError

ROOT = Path("params")


@dataclass(frozen=True, order=True)
class Run:
    """One training of an experiment; `path` is its folder below `runs/` or a records folder."""

    experiment: str
    dataset: str
    model: str
    protocol: str
    seed: int

    @property
    def path(self) -> Path:
        return Path(self.dataset, self.model, self.protocol, f"seed-{self.seed}")


def load(name: str, root: Path = ROOT) -> Any:
    """`params/<name>.yaml`, checked against its schema (`paper` has none: it is data, not settings).

    Raises StepError naming the file and the key if it does not fit.
    """
    path = root / f"{name}.yaml"
    if not path.is_file():
        raise StepError(f"{path} does not exist")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise StepError(f"{path} is not YAML: {error}") from error
    kind = "experiment" if name.startswith("experiments/") else name
    schema_path = root / "schemas" / f"{kind}.yaml"
    if schema_path.is_file():
        schema = yaml.safe_load(schema_path.read_text(encoding="utf-8"))
        problem = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema).iter_errors(content))
        if problem is not None:
            key = ".".join(str(part) for part in problem.absolute_path) or "(top level)"
            raise StepError(f"{path}, key {key}: {problem.message}")
    return content


def entry(name: str, key: str, root: Path = ROOT) -> Any:
    """The entry `key` of `params/<name>.yaml`; StepError lists the known keys if it is not there."""
    content = load(name, root)
    if key not in content:
        raise StepError(f"{root / name}.yaml has no entry {key!r}; it has {', '.join(content)}")
    return content[key]


def experiments(root: Path = ROOT) -> list[str]:
    """The names of all experiments, sorted."""
    return sorted(path.stem for path in (root / "experiments").glob("*.yaml"))


def runs(experiment: str, root: Path = ROOT) -> Iterator[Run]:
    """Every run of an experiment, in table order."""
    content = load(f"experiments/{experiment}", root)
    for dataset in content["datasets"]:
        for model in content["models"]:
            for protocol in content["protocols"]:
                for seed in content["seeds"]:
                    yield Run(experiment, dataset, model, protocol, seed)


def resolve(run: Run, root: Path = ROOT) -> dict[str, Any]:
    """Everything `train` and `evaluate` need to know about one run, as plain JSON values."""
    training = dict(entry("datasets", run.dataset, root)["training"])
    shapes = {name: training.pop(name) for name in ("base", "large") if name in training}
    model = dict(entry("models", run.model, root))
    training |= model.pop("training", {}) | load(f"experiments/{run.experiment}", root).get("training", {})
    if "shape" in model:
        if model["shape"] not in shapes:
            raise StepError(
                f"{root}/datasets.yaml, entry {run.dataset}: no shape {model['shape']!r}, which model {run.model} needs"
            )
        model |= shapes[model.pop("shape")]
    return {
        "experiment": run.experiment,
        "dataset": run.dataset,
        "row": run.model,
        "protocol": {"name": run.protocol, **entry("protocols", run.protocol, root)},
        "seed": run.seed,
        "model": model,
        "training": training,
    }
