"""What runs of one table row have to share, besides the row: all but the seed that could change their figures.

As MLPerf has it, runs are counted together whose pinned values are equal: the whole config (data set, split, model,
batch, rate, schedule) but for the seed, the data by their hash, and the precision of matrix products. Commits, devices
and library versions may differ; a table's footer and the crate of its experiment name them.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from steps.common.cli import StepError

_PINNED = ("data_sha256", "precision")


def require_pinned(runs: Iterable[tuple[tuple[str, ...], Path, Mapping[str, Any], Mapping[str, Any]]]) -> None:
    """Raise StepError at the first run whose pinned values are others than those of the first run of its row.

    runs: of each its row, its path, its config and its metrics.
    """
    first: dict[tuple[str, ...], tuple[Path, dict[str, Any]]] = {}
    for row, path, config, metrics in runs:
        values = dict(_flat({"config": {**config, "seed": None}}))
        values |= {name: metrics.get(name) for name in _PINNED}
        other, theirs = first.setdefault(row, (path, values))
        for key in {**theirs, **values}:
            if theirs.get(key) != values.get(key):
                raise StepError(
                    f"{other} and {path} cannot share a table row: {key} is {_said(theirs, key)} in the first and "
                    f"{_said(values, key)} in the second; train and evaluate again the one that is out of date"
                )


def _flat(content: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """The values of nested objects, by their keys joined with dots."""
    if not isinstance(content, dict):
        return [(prefix, content)]
    dot = f"{prefix}." if prefix else ""
    return [pair for key, value in content.items() for pair in _flat(value, f"{dot}{key}")]


def _said(values: Mapping[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else "absent"
