"""The files under params/: read, checked against their schemas, and resolved into one run's config.

`params/local/`, which git ignores, may hold more data sets, models, protocols and experiments, in files of the same
names. They are read and checked like the project's own, and may be `like` them.

Needs PyYAML and jsonschema, so steps that must run on a bare GPU machine (train, evaluate) do not
import it: they read the `config.json` that `plan` resolved.
"""

import functools
import hashlib
import math
import re
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import jsonschema

from steps.common import yaml_files
from steps.common.cli import StepError
from steps.common.config import COUNT_BASED, task_of
from steps.common.datasets import STATED, check_dataset
from steps.common.dotted import set_entry

ROOT = Path("params")
LOCAL = "local"
#: Files with an entry for each name, to which those of params/local/ add theirs.
_TABLES = ("datasets", "models", "protocols")
#: What data sets, models, protocols and experiments may be called: names become folders, and parts of rules' names.
NAME = re.compile(r"[a-z0-9][a-z0-9+-]*")
_NAMED = "is no name: lower-case letters, digits, '+' and '-' make one, a letter or digit first"
_STEPS = Path(__file__).parents[1]
#: Names of rules and folders beside those of experiments and studies.
RESERVED = {"all", "datasets", LOCAL, "studies", "tests"} | {path.stem for path in _STEPS.glob("*.py")}
#: What tables show of a protocol, beside its rules.
_SHOWN_OF_PROTOCOLS = ("note", "published")
#: What variants of a data set have in common.
_SHARED = ("source", "synthesize", "files", "checks", "filters")
_POINT = re.compile(r"\+(?=[a-z_.]+=)")  # where a row's name ends and the settings of a grid's point begin
_LONGEST = 255  # bytes of a folder's name
_SPLIT_BY_HEADS = ("sasrec", "ligr", "bert4rec", "transformer++")


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

    Of datasets, models and protocols it has the entries of params/local/ too. `experiments/<name>` is an experiment, of
    either folder, whose data sets, models and protocols are known to exist; `studies/<name>` is a study, likewise.
    Raises StepError naming the file and the key if it does not fit.
    """
    if name in _TABLES:
        return {key: value for key, (_, value) in _table(name, root).items()}
    if name.startswith("studies/"):
        return _study(name.removeprefix("studies/"), root)
    if name.startswith("experiments/"):
        return _experiment(name.removeprefix("experiments/"), root)
    path = root / f"{name}.yaml"
    return _parse(str(path), _text(path), _schema(name, root))


def entry(name: str, key: str, root: Path = ROOT) -> Any:
    """The entry `key` of `params/<name>.yaml`; StepError lists the known keys if it is not there."""
    return _entry(name, key, root)[1]


def experiments(root: Path = ROOT) -> list[str]:
    """The names of all experiments, params/local/'s too, sorted. Raises StepError naming a file with a wrong name."""
    return sorted(_experiment_files(root))


def studies(root: Path = ROOT) -> list[str]:
    """The names of all studies, sorted. Raises StepError naming a file with a wrong name."""
    return sorted(_named_files("study", [root / "studies"]))


def experiment_path(experiment: str, root: Path = ROOT) -> Path:
    """The file of an experiment; StepError lists the known ones if there is none."""
    files = _experiment_files(root)
    if experiment not in files:
        raise StepError(f"no experiment {experiment!r}; there are {', '.join(sorted(files))}")
    return files[experiment]


def is_local(experiment: str, root: Path = ROOT) -> bool:
    """Whether an experiment is in params/local/."""
    return experiment_path(experiment, root).is_relative_to(root / LOCAL)


def valid_of(dataset: str, root: Path = ROOT) -> str:
    """The data set whose validated files a data set is made of: its own, or those of the one that it is a variant of.

    Raises StepError if the two differ in what is fetched, read, checked or left out.
    """
    file, content = _entry("datasets", dataset, root)
    base: str = content.get("variant_of", dataset)
    other = entry("datasets", base, root)
    if "variant_of" in other and base != dataset:
        raise StepError(f"{file}, key {dataset}.variant_of: {base} is a variant itself; name {other['variant_of']}")
    for key in _SHARED:
        if content.get(key) != other.get(key):
            raise StepError(
                f"{file}, key {dataset}.{key}: a variant of {base} shares its files, and so has the same {key}"
            )
    return base


def protocol_rules(protocol: str, root: Path = ROOT) -> dict[str, Any]:
    """The rules of a protocol, without what tables show beside them."""
    return {key: value for key, value in entry("protocols", protocol, root).items() if key not in _SHOWN_OF_PROTOCOLS}


def label(model: str, root: Path = ROOT) -> str:
    """The label that tables give a row, from its name in an experiment's runs; with the settings of a grid's point."""
    row, point = _split(model)
    return ", ".join([_entry("models", row, root)[1]["label"], *(f"{key}={value}" for key, value in point)])


def runs(experiment: str, root: Path = ROOT) -> Iterator[Run]:
    """Every run of an experiment, in table order.

    A model without randomness has the first seed alone. With a `grid`, every model becomes one for each point of the
    grid, named `model+key=value+...`. Characters that a file's name cannot have are quoted as in URLs. With `points`
    these are that many of the grid's, those whose texts have the least SHA-256: the same for every model.
    """
    content = load(f"experiments/{experiment}", root)
    grid = content.get("grid", {})
    points = [
        "".join(f"+{key}={quote(yaml_files.scalar(value), safe='')}" for key, value in zip(grid, point, strict=True))
        for point in product(*grid.values())
    ]
    if "points" in content:
        drawn = set(sorted(points, key=lambda point: hashlib.sha256(point.encode()).digest())[: content["points"]])
        points = [point for point in points if point in drawn]
    for dataset in content["datasets"]:
        for model in [model + point for model in content["models"] for point in points]:
            for protocol in content["protocols"]:
                random = entry("models", _split(model)[0], root)["model"] not in COUNT_BASED
                for seed in content["seeds"] if random else content["seeds"][:1]:
                    yield Run(experiment, dataset, model, protocol, seed)


def check(experiment: str, root: Path = ROOT) -> list[Run]:
    """All runs of an experiment, in table order; StepError names the file and key if one of them cannot run."""
    found = list(runs(experiment, root))
    for run in found:
        if len(run.model.encode()) > _LONGEST:
            raise StepError(
                f"{experiment_path(experiment, root)}, grid: the name {run.model} is longer than {_LONGEST} bytes, and "
                "has to be a folder's; vary fewer parameters at once"
            )
        resolve(run, root)
    return found


def resolve(run: Run, root: Path = ROOT) -> dict[str, Any]:
    """Everything `train` and `evaluate` need to know about one run, as plain JSON values.

    It has no labels, titles and notes: these change tables, not trainings.
    """
    row, point = _split(run.model)
    data_file, data = _entry("datasets", run.dataset, root)
    training = dict(data["training"])
    shapes = {name: training.pop(name) for name in ("base", "large") if name in training}
    model = dict(entry("models", row, root))
    _require_task(run, row, model.pop("task", "retrieval"), root)
    del model["label"]
    training |= model.pop("training", {}) | load(f"experiments/{run.experiment}", root).get("training", {})
    shape = model.pop("shape", None)
    if shape is not None:
        if shape not in shapes:
            raise StepError(f"{data_file}, entry {run.dataset}: no shape {shape!r}, which model {row} needs")
        model |= shapes[shape]
    config: dict[str, Any] = deepcopy(
        {
            "experiment": run.experiment,
            "dataset": run.dataset,
            "row": run.model,
            "protocol": protocol_rules(run.protocol, root),
            "seed": run.seed,
            "repeats": data.get("repeats", "none"),
            "model": model,
            "training": training,
        }
    )
    valid_of(run.dataset, root)
    where = f"{data_file}, entry {run.dataset}"
    tuned_file, tuned = _tuned(run, row, root)
    if tuned:
        _set_entries(config, tuned, tuned_file)
        _check_point(config, row, shape, tuned_file, root)
    if point:
        where = f"{experiment_path(run.experiment, root)}, grid"
        _set_entries(config, point_of(run.model)[1], where)
        _check_point(config, row, shape, where, root)
    model = config["model"]
    if model["model"] in _SPLIT_BY_HEADS and model["dim"] % model["heads"]:
        raise StepError(f"{where}: {model['heads']} heads do not divide dim {model['dim']}, as model {row} needs")
    config["protocol"] = {"name": run.protocol, **config["protocol"]}
    return config


def point_of(model: str) -> tuple[str, dict[str, Any]]:
    """A row of params/models.yaml and the settings of a grid's point by dotted key, from a name of `runs`."""
    row, point = _split(model)
    return row, {key: yaml_files.parse(value, f"{model}, {key}") for key, value in point}


def tuned_path(experiment: str, search: str, root: Path = ROOT) -> Path:
    """The file of what a search chose, for an experiment that is `tuned` by it: beside the experiments' folder."""
    return experiment_path(experiment, root).parent.parent / "tuned" / f"{search}.yaml"


def _tuned(run: Run, row: str, root: Path) -> tuple[str, dict[str, Any]]:
    """The file of what the experiment's search chose, and the settings of a row; none if the search has no such row.

    Raises StepError if the search has the row, and has not chosen.
    """
    search = load(f"experiments/{run.experiment}", root).get("tuned")
    if search is None or row not in load(f"experiments/{search}", root)["models"]:
        return "", {}
    path = tuned_path(run.experiment, search, root)
    found = _parse(str(path), _text(path), _schema("tuned", root)) if path.is_file() else {}
    chosen = found.get(run.dataset, {}).get(row)
    if chosen is None:
        raise StepError(
            f"{experiment_path(run.experiment, root)}, key tuned: {path} has nothing for {row} on {run.dataset}; run "
            f"experiment {search} on it, then `python -m steps.choose --experiment {search}`"
        )
    return str(path), chosen["settings"]


def _set_entries(config: dict[str, Any], settings: dict[str, Any], where: str) -> None:
    """Set entries of a run's config by dotted key. Raises StepError that names a key which it does not have."""
    for key, value in settings.items():
        try:
            set_entry(config, key, value)
        except KeyError:
            raise StepError(f"{where}: no parameter {key!r}; it is the path in a run's config.json") from None


def _require_task(run: Run, row: str, task: str, root: Path) -> None:
    """Raise StepError unless a row's task is that of the protocol."""
    wanted = task_of(entry("protocols", run.protocol, root))
    if task != wanted:
        raise StepError(
            f"{experiment_path(run.experiment, root)}: protocol {run.protocol} is for {wanted}, and model {row} for "
            f"{task}; an experiment has protocols and models of one task"
        )


def _split(model: str) -> tuple[str, list[tuple[str, str]]]:
    """A row of params/models.yaml and the (key, value) settings of a grid's point, from a name of `runs`.

    No row's name holds `=`, and no value `+` or `=` that is not quoted.
    """
    row, *settings = _POINT.split(model)
    pairs = [setting.split("=", 1) for setting in settings]
    return row, [(key, unquote(value)) for key, value in pairs]


def _check_point(config: dict[str, Any], row: str, shape: str | None, where: str, root: Path) -> None:
    """Check the values of a grid's point against the schemas of the files that its keys come from."""
    training, model = dict(config["training"]), dict(config["model"])
    training.pop("stochastic_length", None)  # of the experiment alone, whose schema has checked it
    own = entry("models", row, root)
    of_row = {"schedule": training.pop("schedule")} if "schedule" in own.get("training", {}) else {}
    data = entry("datasets", config["dataset"], root)
    sizes = data["training"]["base"]
    training["base"] = {key: model.pop(key) for key in sizes} if shape else sizes
    named = {key: value for key, value in own.items() if key in ("label", "task", "shape")}
    named |= {"training": of_row} if of_row else {}
    parts = {
        "datasets": {config["dataset"]: data | {"training": training}},
        "models": {row: model | named},
        "protocols": {"own": config["protocol"]},
    }
    for name, content in parts.items():
        problem = _problem(content, _schema(name, root))
        if problem:
            path = [part for part in problem[0][1:] if part not in ("training", "base")]
            of = {"models": "model", "protocols": "protocol"}.get(name, "training")
            key = ".".join(["model" if path and path[0] in sizes else of, *path])
            raise StepError(f"{where}: {key}: {problem[1]}")


def _entry(name: str, key: str, root: Path) -> tuple[str, Any]:
    """The file that holds the entry `key`, and the entry."""
    table = _table(name, root)
    if key not in table:
        raise StepError(f"{root / name}.yaml has no entry {key!r}; it has {', '.join(table)}")
    return table[key]


def _table(name: str, root: Path) -> dict[str, tuple[str, Any]]:
    """Every entry of `params/<name>.yaml` and params/local/'s file of this name, each with its file."""
    paths = [root / f"{name}.yaml", *(path for path in [root / LOCAL / f"{name}.yaml"] if path.is_file())]
    return _parse_table(name, tuple((str(path), _text(path)) for path in paths), _schema(name, root))


@functools.cache  # a graph of hundreds of runs asks for the same few files
def _parse_table(name: str, files: tuple[tuple[str, str], ...], schema: str | None) -> dict[str, tuple[str, Any]]:
    found: dict[str, tuple[str, Any]] = {}
    for path, text in files:
        content = yaml_files.parse(text, path)
        if content is None:  # comments alone
            content = {}
        if isinstance(content, dict):
            for key in content:
                if key in found:
                    raise StepError(f"{path}, key {key}: {found[key][0]} has an entry of this name; choose another")
            content = {key: _inherit(path, content, key, found) for key in content}
        _check(path, content, schema)
        for key, value in content.items() if name == "datasets" else []:
            check_dataset(path, key, value)
        found |= {key: (path, value) for key, value in content.items()}
    return found


def _inherit(path: str, content: dict[str, Any], key: str, others: dict[str, tuple[str, Any]]) -> Any:
    """The entry `key`, completed by the entry it is `like`: of its own file, or of `others`."""
    value = content[key]
    if not isinstance(value, dict) or "like" not in value:
        return value
    name = str(value["like"])
    base = others[name][1] if name in others else content.get(name)
    if not isinstance(base, dict) or "like" in base:
        raise StepError(f"{path}, key {key}: {value['like']!r} is no entry of its own to be like")
    if "source" in value:  # other files, of which licence and citation of the first say nothing
        base = {name: own for name, own in base.items() if name not in STATED}
    return base | {name: own for name, own in value.items() if name != "like"}


def _experiment_files(root: Path) -> dict[str, Path]:
    """The file of every experiment by its name, which is checked."""
    files = _named_files("experiment", [root / "experiments", root / LOCAL / "experiments"])
    both = sorted(files.keys() & _named_files("study", [root / "studies"]).keys())
    if both:
        raise StepError(f"{files[both[0]]}: a study is called {both[0]!r}; rename the file")
    return files


def _named_files(kind: str, folders: list[Path]) -> dict[str, Path]:
    """The YAML files of the folders by name; StepError says which cannot be called so."""
    files: dict[str, Path] = {}
    for folder in folders:
        for path in sorted(folder.glob("*.yaml")):
            if path.name.startswith("."):  # an editor's
                continue
            if not NAME.fullmatch(path.stem):
                raise StepError(f"{path}: {path.stem!r} {_NAMED}; rename the file")
            article = "an" if kind == "experiment" else "a"
            if path.stem in RESERVED:
                raise StepError(f"{path}: {article} {kind} cannot be called {path.stem!r}, as a step or folder is")
            if path.stem in files:
                raise StepError(f"{path}: {files[path.stem]} is {article} {kind} of this name; rename the file")
            files[path.stem] = path
    return files


def _experiment(name: str, root: Path) -> Any:
    path = experiment_path(name, root)
    content = _parse(str(path), _text(path), _schema("experiment", root))
    for table in _TABLES:
        _known(path, table, table, content[table], root)
    if "groups" in content:
        grouped = {model for models in content["groups"].values() for model in models}
        for model in sorted(grouped ^ set(content["models"])):
            what = "the experiment has no" if model in grouped else "no group has"
            raise StepError(f"{path}, key groups: {what} {model!r}; groups have every model, and no other")
    return content


def _study(name: str, root: Path) -> Any:
    known = _named_files("study", [root / "studies"])
    if name not in known:
        raise StepError(f"no study {name!r}; there are {', '.join(sorted(known))}")
    path = known[name]
    content = _parse(str(path), _text(path), _schema("study", root))
    module, measured = content["module"], content["measure"]
    for file in (f"studies/{module}.py", f"studies/{module}_report.py"):
        if not (_STEPS / file).is_file():
            raise StepError(f"{path}, key module: steps/{file} does not exist; it would measure or report the study")
    _check(str(path), measured, _schema(f"studies/{module}", root), "measure")
    for kind, names in measured.get("data", {}).items():
        _known(path, f"measure.data.{kind}", "datasets", names, root)
    _known(path, "measure.generated", "datasets", measured.get("generated", []), root)
    _known(path, "measure.protocols", "protocols", measured.get("protocols", []), root)
    for index, group in enumerate(measured.get("runs", [])):
        key = f"measure.runs.{index}"
        experiment_path(group["experiment"], root)
        _known(path, f"{key}.models", "models", group["models"], root)
        for table in ("dataset", "protocol"):
            _known(path, f"{key}.{table}", f"{table}s", [group[table]], root)
    return content


def _known(path: Path, where: str, table: str, names: list[str], root: Path) -> None:
    """Raise StepError if one of the names, which stand in a file at a key, is no entry of the table."""
    known = _table(table, root)
    for place, name in enumerate(names):
        if name not in known:
            raise StepError(
                f"{path}, key {where}.{place}: {root / table}.yaml has no entry {name!r}; it has {', '.join(known)}"
            )


def _text(path: Path) -> str:
    if not path.is_file():
        raise StepError(f"{path} does not exist")
    return yaml_files.text_of(path)


def _schema(name: str, root: Path) -> str | None:
    """The text of a file's schema, if it has one."""
    path = root / "schemas" / f"{name}.yaml"
    return path.read_text(encoding="utf-8") if path.is_file() else None


@functools.cache
def _parse(path: str, text: str, schema: str | None) -> Any:
    content = yaml_files.parse(text, path)
    _check(path, content, schema)
    return content


def _check(path: str, content: Any, schema: str | None, below: str = "") -> None:
    """Raise StepError, with file and key, if the content of `path`, below a key of it, does not fit its schema."""
    problem = _problem(content, schema)
    if problem:
        key = ".".join([below, *problem[0]] if below else problem[0])
        raise StepError(f"{path}, key {key or '(top level)'}: {problem[1]}")


def _problem(content: Any, schema: str | None) -> tuple[list[str], str] | None:
    """The key, as its parts, and what is wrong with it, of the most relevant error; None if the content fits."""
    if schema is None:
        return None
    problem = jsonschema.exceptions.best_match(_validator(schema).iter_errors(content))
    if problem is None:
        return None
    message = problem.message
    if problem.validator == "format":
        message = f"{problem.instance!r} {_NAMED}"
    elif problem.validator == "not":
        message = f"{problem.validator_value['required'][0]!r} does not belong here"
    elif problem.validator == "contains":
        message = f"lacks {problem.validator_value['const']!r}"
    return [str(part) for part in problem.absolute_path], message


@functools.cache
def _validator(schema: str) -> Any:
    """A validator that knows names, and to which 50.0 is no integer and infinity no number."""
    checker = jsonschema.Draft202012Validator.TYPE_CHECKER.redefine_many(
        {
            "integer": lambda _, value: isinstance(value, int) and not isinstance(value, bool),
            "number": lambda _, value: (
                isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            ),
        }
    )
    names = jsonschema.FormatChecker(())
    names.checks("name")(lambda value: isinstance(value, str) and NAME.fullmatch(value) is not None)
    strict = jsonschema.validators.extend(jsonschema.Draft202012Validator, type_checker=checker)
    return strict(yaml_files.parse(schema, "schema"), format_checker=names)
