"""Dataclasses read from JSON values, without jsonschema: the types and ranges of all entries are checked.

A field's type says what its entry has to be: one of the types below, a `Literal`, `bool`, `dict`, or another dataclass.
A field with a default may be absent.
"""

import dataclasses
import math
import re
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Rule:
    """What an entry has to be: in words, and as a test."""

    words: str
    fits: Callable[[Any], bool]


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def _is_share_below_1(value: Any) -> bool:
    return _is_number(value) and 0 <= value < 1


_FLAG = Rule("true or false", lambda value: isinstance(value, bool))
_ABOVE_0 = Rule("a number above 0", lambda value: _is_number(value) and value > 0)

Text = Annotated[str, Rule("a text", lambda value: isinstance(value, str))]
Seed = Annotated[int, Rule("a whole number to 10,000,000", lambda value: _is_whole(value) and 0 <= value <= 10_000_000)]
Whole = Annotated[int, Rule("a whole number from 0", lambda value: _is_whole(value) and value >= 0)]
Count = Annotated[int, Rule("a whole number from 1", lambda value: _is_whole(value) and value >= 1)]
Positive = Annotated[float, _ABOVE_0]
NotNegative = Annotated[float, Rule("a number from 0", lambda value: _is_number(value) and value >= 0)]
Share = Annotated[float, Rule("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1)]
Inside01 = Annotated[float, Rule("a number between 0 and 1", lambda value: _is_number(value) and 0 < value < 1)]
Below1 = Annotated[float, Rule("a number from 0 to below 1", _is_share_below_1)]
To2 = Annotated[float, Rule("a number above 0, at most 2", lambda value: _is_number(value) and 0 < value <= 2)]
BelowHalf = Annotated[float, Rule("a number between 0 and 0.5", lambda value: _is_number(value) and 0 < value < 0.5)]
PairBelow1 = Annotated[
    list[float],
    Rule(
        "two numbers from 0 to below 1",
        lambda value: isinstance(value, list) and len(value) == 2 and all(map(_is_share_below_1, value)),
    ),
]
Rising = Annotated[
    list[float],
    Rule(
        "numbers that rise",
        lambda value: isinstance(value, list) and all(map(_is_number, value)) and value == sorted(set(value)) and value,
    ),
]
Sha256 = Annotated[
    str, Rule("a SHA-256", lambda value: isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None)
]


def number_or(*texts: str) -> Rule:
    """The rule for a number above 0, or one of these texts."""
    words = f"{_ABOVE_0.words}, {' or '.join(texts)}"
    return Rule(words, lambda value: _ABOVE_0.fits(value) or (isinstance(value, str) and value in texts))


class EntryError(ValueError):
    """An entry that is missing or wrong. The message begins with its key."""


def read(kind: type[T], entries: Any, path: str = "", others: bool = False) -> T:
    """The dataclass `kind` with these entries.

    path: the key of the entries themselves, with a dot behind it, for messages. others: whether entries are allowed
    that no field reads. Raises EntryError.
    """
    if not isinstance(entries, dict):
        raise EntryError(f"key {path.rstrip('.')}: {entries!r} is no object")
    hints = typing.get_type_hints(kind, include_extras=True)
    values = {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if field.name in entries:
            values[field.name] = _value(hints[field.name], entries[field.name], path + field.name)
        elif field.default is dataclasses.MISSING:
            raise EntryError(f"key {path}{field.name}: is missing")
    unknown = [key for key in entries if key not in hints]
    if unknown and not others:
        raise EntryError(f"key {path}{unknown[0]}: nothing reads it")
    return kind(**values)


def _value(hint: Any, value: Any, key: str) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = typing.get_args(hint)[0]  # the other is None, which stands for an absent entry
    if dataclasses.is_dataclass(hint):
        return read(typing.cast(type[Any], hint), value, f"{key}.")
    rule = _rule(hint)
    if not rule.fits(value):
        raise EntryError(f"key {key}: {value!r} is not {rule.words}")
    return value


def _rule(hint: Any) -> Rule:
    if hint is bool:
        return _FLAG
    if typing.get_origin(hint) is dict:
        return Rule("an object", lambda value: isinstance(value, dict))
    if typing.get_origin(hint) is Literal:
        texts = typing.get_args(hint)
        return Rule(f"one of {', '.join(texts)}", lambda value: isinstance(value, str) and value in texts)
    rule: Rule = hint.__metadata__[0]
    return rule
