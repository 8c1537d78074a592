"""The files under params/: read, checked against their schemas, and resolved into one run's config.

Needs PyYAML and jsonschema, so steps that must run on a bare GPU machine (train, evaluate) do not
import it: they read the `config.json` that `plan` resolved.
"""

import functools
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import jsonschema
import yaml

from steps.common.cli import StepError
from steps.common.dotted import set_entry

ROOT = Path("params")
_SPLIT_BY_HEADS = ("sasrec", "bert4rec", "transformer++")


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
    """`params/<name>.yaml`, checked against its schema (`paper` has none: it is data, not settings). Not to be changed.

    Raises StepError naming the file and the key if it does not fit.
    """
    path = root / f"{name}.yaml"
    if not path.is_file():
        raise StepError(f"{path} does not exist")
    schema = root / "schemas" / ("experiment.yaml" if name.startswith("experiments/") else f"{name}.yaml")
    rules = schema.read_text(encoding="utf-8") if schema.is_file() else None
    return _parse(str(path), path.read_text(encoding="utf-8"), rules)


@functools.cache  # a graph of hundreds of runs asks for the same few files
def _parse(path: str, text: str, schema: str | None) -> Any:
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise StepError(f"{path} is not YAML: {error}") from error
    if isinstance(content, dict):
        content = {key: _inherit(path, content, key) for key in content}
    if schema is not None:
        validator = jsonschema.Draft202012Validator(yaml.safe_load(schema))
        problem = jsonschema.exceptions.best_match(validator.iter_errors(content))
        if problem is not None:
            key = ".".join(str(part) for part in problem.absolute_path) or "(top level)"
            raise StepError(f"{path}, key {key}: {problem.message}")
    return content


def _inherit(path: str, content: dict[str, Any], key: str) -> Any:
    """The entry `key`, completed by the entry it is `like`."""
    value = content[key]
    if not isinstance(value, dict) or "like" not in value:
        return value
    if value["like"] not in content or "like" in content[value["like"]]:
        raise StepError(f"{path}, key {key}: {value['like']!r} is no entry of its own to be like")
    return content[value["like"]] | {name: own for name, own in value.items() if name != "like"}


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
    """Every run of an experiment, in table order.

    With a `grid`, every model becomes one for each point of the grid, named `model+key=value+...`, with what is no
    part of a file's name quoted as in URLs.
    """
    content = load(f"experiments/{experiment}", root)
    grid = content.get("grid", {})
    points = [
        "".join(f"+{key}={quote(str(value), safe='')}" for key, value in zip(grid, point, strict=True))
        for point in product(*grid.values())
    ]
    for dataset in content["datasets"]:
        for model in [model + point for model in content["models"] for point in points]:
            for protocol in content["protocols"]:
                for seed in content["seeds"]:
                    yield Run(experiment, dataset, model, protocol, seed)


def resolve(run: Run, root: Path = ROOT) -> dict[str, Any]:
    """Everything `train` and `evaluate` need to know about one run, as plain JSON values."""
    training = dict(entry("datasets", run.dataset, root)["training"])
    shapes = {name: training.pop(name) for name in ("base", "large") if name in training}
    row, *point = run.model.split("+")
    row, point = (f"{row}++", point[2:]) if point[:2] == ["", ""] else (row, point)  # transformer++
    model = deepcopy(entry("models", row, root))
    training |= model.pop("training", {}) | load(f"experiments/{run.experiment}", root).get("training", {})
    if "shape" in model:
        if model["shape"] not in shapes:
            raise StepError(
                f"{root}/datasets.yaml, entry {run.dataset}: no shape {model['shape']!r}, which model {row} needs"
            )
        model |= shapes[model.pop("shape")]
    if model["model"] in _SPLIT_BY_HEADS and model["dim"] % model["heads"]:
        raise StepError(
            f"{root}/datasets.yaml, entry {run.dataset}: {model['heads']} heads do not divide dim {model['dim']}, as "
            f"model {row} needs"
        )
    config = {
        "experiment": run.experiment,
        "dataset": run.dataset,
        "row": run.model,
        "protocol": {"name": run.protocol, **entry("protocols", run.protocol, root)},
        "seed": run.seed,
        "repeats": entry("datasets", run.dataset, root).get("repeats", "none"),
        "model": model,
        "training": training,
    }
    for setting in point:
        key, value = unquote(setting).split("=", 1)
        try:
            set_entry(config, key, yaml.safe_load(value))
        except KeyError:
            experiment = f"{root}/experiments/{run.experiment}.yaml"
            raise StepError(
                f"{experiment}, grid: no parameter {key!r}; it is the path in a run's config.json"
            ) from None
        model["label"] += f", {unquote(setting)}"
    return config
