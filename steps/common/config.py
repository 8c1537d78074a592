"""A run's config.json: which entries it has, and how train and evaluate read it.

The entries of `model` are checked where the model is built: its own file says what they are.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from steps.common.cli import StepError
from steps.common.files import read_json
from steps.common.typed import Below1, BelowHalf, Count, EntryError, Positive, Rising, Seed, Sha256, Text, To2, read

_REMEDY = "run plan again"
#: Models that count instead of learning, by task: equal whatever the seed.
COUNTING = {"retrieval": ("popular", "markov", "item-knn"), "ranking": ("mean-rating",)}
COUNT_BASED = tuple(name for names in COUNTING.values() for name in names)


@dataclass(frozen=True)
class StochasticLength:
    """How much of long windows training reads: `steps.data.stochastic_length`."""

    alpha: To2
    rule: Literal["recent", "random", "weighted"]


@dataclass(frozen=True)
class TrainingConfig:
    """How a run is trained. schedule: see `steps.training.schedule`; None: what the model's task is trained by.
    stochastic_length: None: windows are read whole."""

    max_len: Count
    epochs: Count
    batch: Count
    negatives: Count
    dropout: Below1
    patience: Count | None = None
    eval_every: Count = 1
    schedule: Literal["windows", "one-pass"] | None = None
    stochastic_length: StochasticLength | None = None


@dataclass(frozen=True)
class _Protocol:
    name: Text
    split: Literal["leave-last-out", "temporal"]
    report: Literal["last", "best"]
    candidates: Literal["catalogue", "rated"]
    exclude: Literal["window", "history"]


@dataclass(frozen=True)
class _TemporalProtocol(_Protocol):
    test_share: BelowHalf
    valid_share: BelowHalf


@dataclass(frozen=True)
class _UnvalidatedTemporalProtocol(_Protocol):
    test_share: BelowHalf
    valid_share: BelowHalf | None = None


@dataclass(frozen=True, kw_only=True)
class _RankingProtocol:
    name: Text
    task: Literal["ranking"]
    split: Literal["temporal", "users"]
    report: Literal["last", "best"]
    test_share: BelowHalf  # of all rows, or of the users
    valid_share: BelowHalf
    positive: Positive  # the least rating that counts as engagement
    levels: Rising | None = None  # of ratings, in place of the row's own


@dataclass(frozen=True, kw_only=True)
class _ProtocolOfUsers(_RankingProtocol):
    targets: Count  # of each held-out user the last so many interactions


@dataclass(frozen=True)
class _Hashes:
    train: Sha256
    test: Sha256


@dataclass(frozen=True)
class _HashesWithValid(_Hashes):
    valid: Sha256


@dataclass(frozen=True)
class _Model:
    model: Text


@dataclass(frozen=True)
class _RunConfig:
    experiment: Text
    dataset: Text
    row: Text
    seed: Seed
    repeats: Literal["none", "recommend", "leave-out"]
    protocol: dict[str, Any]
    split: dict[str, Any]
    training: TrainingConfig
    model: dict[str, Any]


def task_of(protocol: dict[str, Any]) -> str:
    """What a protocol of params/protocols.yaml evaluates: retrieval, unless it says otherwise."""
    return str(protocol.get("task", "retrieval"))


def read_config(run: Path) -> dict[str, Any]:
    """The config.json of a run's folder. Raises StepError that names file and key if an entry is missing or wrong."""
    file = run / "config.json"
    config = read_json(file, remedy=_REMEDY)
    try:
        whole = read(_RunConfig, config)
        read(_Model, whole.model, "model.", others=True)
        protocol = read(_kind_of(whole.protocol), whole.protocol, "protocol.")
        read(_HashesWithValid if protocol.report == "best" else _Hashes, whole.split, "split.")
    except EntryError as error:
        raise StepError(f"{file}, {error}; {_REMEDY}") from error
    return config


def _kind_of(protocol: dict[str, Any]) -> type[_Protocol | _RankingProtocol]:
    """Which entries a protocol has to have. Raises EntryError for a task that is none."""
    if task_of(protocol) not in COUNTING:
        raise EntryError(f"key protocol.task: {protocol['task']!r} is not one of {', '.join(COUNTING)}")
    if task_of(protocol) == "ranking":
        return _ProtocolOfUsers if protocol.get("split") == "users" else _RankingProtocol
    if protocol.get("split") != "temporal":
        return _Protocol
    return _UnvalidatedTemporalProtocol if protocol.get("report") == "last" else _TemporalProtocol


@contextmanager
def building(run: Path) -> Iterator[None]:
    """Within it a model that cannot be built from a run's config.json becomes a StepError that names file and key."""
    file = run / "config.json"
    try:
        yield
    except EntryError as error:
        raise StepError(f"{file}, {error}; {_REMEDY}") from error
    except (TypeError, ValueError, RuntimeError, AssertionError, ArithmeticError) as error:
        raise StepError(f"{file} describes no model that can be built: {error}; {_REMEDY}") from error
