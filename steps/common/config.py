"""A run's config.json, read and checked without jsonschema: every entry that training needs, and its type and range."""

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steps.common.cli import StepError
from steps.common.files import read_json

_REMEDY = "run plan again"
#: Models that count instead of learning: equal whatever the seed.
COUNT_BASED = ("popular", "markov", "item-knn")


@dataclass(frozen=True)
class _Kind:
    """What an entry has to be: in words, and as a test."""

    words: str
    fits: Callable[[Any], bool]


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def _one_of(*values: str) -> _Kind:
    return _Kind(f"one of {', '.join(values)}", lambda value: value in values if isinstance(value, str) else False)


_TEXT = _Kind("a text", lambda value: isinstance(value, str))
_FLAG = _Kind("true or false", lambda value: isinstance(value, bool))
_COUNT = _Kind("a whole number from 1", lambda value: _is_whole(value) and value >= 1)
_WHOLE = _Kind("a whole number from 0", lambda value: _is_whole(value) and value >= 0)
_POSITIVE = _Kind("a number above 0", lambda value: _is_number(value) and value > 0)
_NOT_NEGATIVE = _Kind("a number from 0", lambda value: _is_number(value) and value >= 0)
_SHARE = _Kind("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1)
_BELOW_1 = _Kind("a number from 0 to below 1", lambda value: _is_number(value) and 0 <= value < 1)
_BELOW_HALF = _Kind("a number between 0 and 0.5", lambda value: _is_number(value) and 0 < value < 0.5)
_PAIR = _Kind(
    "two numbers from 0 to below 1",
    lambda value: isinstance(value, list) and len(value) == 2 and all(_BELOW_1.fits(one) for one in value),
)
_HASH = _Kind("a SHA-256", lambda value: isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None)
_ALPHA = _Kind(
    "a number above 0, 1/dqk or 1/sqrt(dqk)", lambda value: value in ("1/dqk", "1/sqrt(dqk)") or _POSITIVE.fits(value)
)

#: Entries by key; a key that ends in a question mark may be absent.
_Entries = dict[str, "_Kind | _Entries"]

_TRAINING: _Entries = {
    "max_len": _COUNT,
    "epochs": _COUNT,
    "batch": _COUNT,
    "negatives": _COUNT,
    "dropout": _BELOW_1,
    "patience?": _COUNT,
    "eval_every?": _COUNT,
}
_LOSS: _Entries = {
    "name": _one_of("sampled-softmax", "in-batch-softmax", "softmax", "bce", "gbce"),
    "similarity": _one_of("cosine", "dot"),
    "temperature": _POSITIVE,
    "negatives?": _COUNT,
    "calibration?": _SHARE,
}
_TRAINED: _Entries = {
    "dim": _COUNT,
    "loss": _LOSS,
    "optimizer": {"lr": _POSITIVE, "betas": _PAIR, "weight_decay": _NOT_NEGATIVE},
    "items?": {"lr": _POSITIVE, "dtype": _one_of("float16", "float32"), "negative_pool": _COUNT},
}
_BLOCKS: _Entries = _TRAINED | {"blocks": _COUNT, "heads": _COUNT}
_MODELS: dict[str, _Entries] = {
    "popular": {},
    "markov": {},
    "item-knn": {"neighbours": _COUNT, "shrink": _NOT_NEGATIVE},
    "gru4rec": _TRAINED | {"samples": _COUNT, "sample_alpha": _SHARE, "logq": _NOT_NEGATIVE},
    "bert4rec": _BLOCKS | {"mask_prob": _BELOW_1},
    "sasrec": _BLOCKS | {"output_slots": _WHOLE},
    "transformer++": _BLOCKS,
    "hstu": _BLOCKS
    | {
        "output_slots": _WHOLE,
        "dqk": _COUNT,
        "dv": _COUNT,
        "attention": _one_of("silu", "softmax"),
        "alpha": _ALPHA,
        "attention_scale": _one_of("max_len", "true_len"),
        "bias": {"position": _FLAG, "time": _one_of("next", "self", "none")},
    },
}


def read_config(run: Path) -> dict[str, Any]:
    """The config.json of a run's folder. Raises StepError that names file and key if an entry is missing or wrong."""
    file = run / "config.json"
    config = read_json(file, remedy=_REMEDY)
    model, protocol = config.get("model"), config.get("protocol")
    kind = model.get("model") if isinstance(model, dict) else None
    settings = _MODELS.get(kind, {}) if isinstance(kind, str) else {}
    shares: _Entries = {"test_share": _BELOW_HALF, "valid_share": _BELOW_HALF}
    temporal = isinstance(protocol, dict) and protocol.get("split") == "temporal"
    validates = isinstance(protocol, dict) and protocol.get("report") == "best"
    hashes: _Entries = {"train": _HASH, "test": _HASH}
    if validates:
        hashes["valid"] = _HASH
    entries: _Entries = {
        "experiment": _TEXT,
        "dataset": _TEXT,
        "row": _TEXT,
        "seed": _WHOLE,
        "repeats": _one_of("none", "recommend", "leave-out"),
        "protocol": {
            "name": _TEXT,
            "split": _one_of("leave-last-out", "temporal"),
            "report": _one_of("last", "best"),
            "candidates": _one_of("catalogue", "rated"),
            "exclude": _one_of("window", "history"),
        }
        | (shares if temporal else {}),
        "split": hashes,
        "training": _TRAINING,
        "model": {"model": _one_of(*_MODELS)} | settings,
    }
    _check(file, "", config, entries)
    if settings and settings.get("loss") and config["model"]["loss"]["name"] == "gbce":
        _check(file, "model.loss.", config["model"]["loss"], _LOSS | {"calibration": _SHARE})
    return config


@contextmanager
def building(run: Path) -> Iterator[None]:
    """Within it a model that cannot be built from a run's config.json becomes a StepError that names the file."""
    try:
        yield
    except KeyError as error:
        raise StepError(f"{run / 'config.json'} lacks the key {error}; {_REMEDY}") from error
    except (TypeError, ValueError, AssertionError, ArithmeticError) as error:
        raise StepError(f"{run / 'config.json'} describes no model that can be built: {error}; {_REMEDY}") from error


def _check(file: Path, path: str, found: Any, entries: _Entries) -> None:
    if not isinstance(found, dict):
        raise StepError(f"{file}, key {path.rstrip('.')}: {found!r} is no object; {_REMEDY}")
    for name, kind in entries.items():
        key = name.rstrip("?")
        if key not in found:
            if name != key:
                continue
            raise StepError(f"{file}, key {path}{key}: is missing; {_REMEDY}")
        if isinstance(kind, dict):
            _check(file, f"{path}{key}.", found[key], kind)
        elif not kind.fits(found[key]):
            raise StepError(f"{file}, key {path}{key}: {found[key]!r} is not {kind.words}; {_REMEDY}")
    known = {name.rstrip("?") for name in entries}
    unknown = [key for key in found if key not in known]
    if unknown and path != "model.":  # as it also has the sizes that other models of the data set need
        raise StepError(f"{file}, key {path}{unknown[0]}: nothing reads it; {_REMEDY}")
