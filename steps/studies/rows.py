"""The rows of a study: one measured number each, all of one schema, and the small file that keeps them.

A row is a flat dict. Its axes, under names of the study's own, say which case was measured; FIELDS are the number, its
unit, which repetition it is, the interval around it, and what was seen in place of a measurement; ORIGIN is where it
comes from. What does not apply is absent. The file has the rows by case, with the origins that they share once, and the
names of kernels, for which rows have their place in `kernels`. Needs nothing beside Python.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from steps.common.cli import StepError
from steps.common.files import read_json, write_text

Row = dict[str, Any]

FIELDS = ("metric", "value", "unit", "repetition", "low", "high", "seen")
#: `card` is the one device of its kind, which only a GPU says.
ORIGIN = ("device", "card", "commit", "data_sha256", "versions")
#: The case that stands for the device's own copy and matrix product, whose metrics are `copy` and `product`.
ROOFS = "roofs"
#: What names of metrics begin with that are milliseconds of a part, and of one kernel, of the case's time.
PART, KERNEL = "part: ", "kernel: "
#: The metric of a case that does not run: 1, with what was `seen`.
FAILED = "failed"
_REMEDY = "take it from git again, or measure again"


def row(case: dict[str, Any], metric: str, value: float, unit: str, **more: Any) -> Row:
    """A row of a case (its axes), without its origin. more: repetition, low, high, seen, data_sha256; None: absent."""
    fields = {"metric": metric, "value": value, "unit": unit, **more}
    return {key: content for key, content in (case | fields).items() if content is not None}


def case_of(row: Row) -> dict[str, Any]:
    """The axes of a row."""
    return {key: value for key, value in row.items() if key not in FIELDS + ORIGIN}


def cases(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """A dict per case, device and repetition, in order of appearance: axes, origin, and a key per metric.

    A metric with an interval has `<metric>/low` and `<metric>/high` beside it; FAILED has `failed/seen`.
    """
    found: dict[str, dict[str, Any]] = {}
    for one in rows:
        shared = case_of(one) | {key: one[key] for key in ("repetition", *ORIGIN) if key in one}
        wide = found.setdefault(json.dumps(shared, sort_keys=True), shared)
        wide[one["metric"]] = one["value"]
        wide |= {f"{one['metric']}/{end}": one[end] for end in ("low", "high", "seen") if end in one}
    return list(found.values())


def merged(old: list[Row], new: list[Row]) -> list[Row]:
    """The old rows, those of cases measured again on the same device replaced by the new, and the other new rows.

    Rows of another device stay beside them: a measurement never replaces another machine's.
    """
    blocks: dict[str, list[Row]] = {}
    for one in old:
        blocks.setdefault(_key(one), []).append(one)
    blocks |= {_key(one): [] for one in new}
    for one in new:
        blocks[_key(one)].append(one)
    return [one for block in blocks.values() for one in block]


def write_rows(path: Path, study: str, rows: list[Row]) -> None:
    """Write the rows as JSON: a line a case, under it a line a number."""
    origins: list[dict[str, Any]] = []
    blocks: dict[str, list[str]] = {}
    kernels = list(dict.fromkeys(one["metric"] for one in rows if one["metric"].startswith(KERNEL)))
    for one in rows:
        origin = {key: one[key] for key in ORIGIN if key in one}
        if origin not in origins:
            origins.append(origin)
        head = f'{{"origin": {origins.index(origin)}, "case": {_json(case_of(one))}, "measured": ['
        values = [one.get(name) for name in FIELDS]
        if one["metric"] in kernels:
            values[0] = kernels.index(one["metric"])
        while values[-1] is None:
            values.pop()
        blocks.setdefault(head, []).append(_json(values))
    text = ",\n".join(f"  {head}\n   {f',{chr(10)}   '.join(lines)}]}}" for head, lines in blocks.items())
    fields = [name for name in FIELDS if name != "seen" or any("seen" in one for one in rows)]
    shared = ",\n".join(f"  {_json(origin)}" for origin in origins)
    named = ",\n".join(f"  {_json(kernel)}" for kernel in kernels)
    of_kernels = f' "kernels": [\n{named}\n ],\n' if kernels else ""
    write_text(
        path,
        f'{{\n "study": {_json(study)},\n "fields": {_json(fields)},\n'
        f' "origins": [\n{shared}\n ],\n{of_kernels} "cases": [\n{text}\n ]\n}}\n',
    )


def read_rows(path: Path, study: str) -> list[Row]:
    """The rows of a file. Raises StepError naming the case that does not fit, or that stands twice."""
    content = read_json(path, remedy=_REMEDY)
    if content.get("study") != study:
        raise StepError(f"{path} holds rows of study {content.get('study')!r}, not of {study!r}")
    rows: list[Row] = []
    seen: dict[str, int] = {}
    for number, case in enumerate(content.get("cases", []), start=1):
        try:
            origin = content["origins"][case["origin"]]
            measured = [[_metric(content, metric), *values] for metric, *values in case["measured"]]
            found = [_row(case["case"], origin, values) for values in measured]
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise StepError(f"{path}, case {number} does not fit ({error!r}); {_REMEDY}") from None
        for one in found:
            key = _json([_key(one), one["metric"], one.get("repetition")])
            if key in seen:
                raise StepError(f"{path}, case {number} measures {one['metric']!r} as case {seen[key]} does")
            seen[key] = number
        rows += found
    if not rows:
        raise StepError(f"{path} holds no rows; {_REMEDY}")
    return rows


def _metric(content: dict[str, Any], metric: str | int) -> str:
    return content["kernels"][metric] if isinstance(metric, int) else metric


def _row(case: dict[str, Any], origin: dict[str, Any], values: list[Any]) -> Row:
    fields = {name: value for name, value in zip(FIELDS, values, strict=False) if value is not None}
    if set(case) & {*FIELDS, *ORIGIN}:
        raise ValueError("an axis is called like a field")
    if not all(isinstance(text, str) and text for text in (fields["metric"], origin["device"], origin["commit"])):
        raise ValueError("metric, device and commit are texts")
    if not isinstance(fields["unit"], str):
        raise ValueError("a unit is a text")
    if isinstance(fields["value"], bool) or not math.isfinite(fields["value"]):
        raise ValueError(f"{fields['metric']}: {fields['value']} is no number")
    return case | fields | origin


def _key(one: Row) -> str:
    return json.dumps([case_of(one), one["device"]], sort_keys=True)


def _json(content: Any) -> str:
    return json.dumps(content, allow_nan=False)
