"""Histories, and what is recommended for them, as JSON has both."""

from collections.abc import Sequence
from typing import Any

from steps.common.cli import StepError
from steps.serving.recommender import History, Scored
from steps.serving.titles import Catalogue

_KEYS = ("history", "timestamps", "at")


def history_of(content: Any, catalogue: Catalogue) -> tuple[History, dict[str, str]]:
    """The history of an object with `history`, and perhaps `timestamps` and `at`; and what titles were taken for.

    Numbers among items are ids. Raises StepError that names the key, if one is missing, unknown or wrong.
    """
    if not isinstance(content, dict) or "history" not in content:
        raise StepError('an object with the key "history" is wanted')
    unknown = next((key for key in content if key not in _KEYS), None)
    if unknown is not None:
        raise StepError(f"key {unknown!r} is none of {', '.join(_KEYS)}")
    typed, timestamps, at = (content.get(key) for key in _KEYS)
    if not isinstance(typed, list) or not all(isinstance(one, str) or _is_whole(one) for one in typed):
        raise StepError("history: a list of titles is wanted, texts, or of ids, whole numbers")
    if timestamps is not None and not (isinstance(timestamps, list) and all(map(_is_whole, timestamps))):
        raise StepError("timestamps: a list of whole seconds since 1970 is wanted")
    if at is not None and not _is_whole(at):
        raise StepError("at: a time in whole seconds since 1970 is wanted")
    items = [catalogue.find(one) if isinstance(one, str) else catalogue.with_id(str(one)) for one in typed]
    return History(items, timestamps, at), catalogue.understood(typed, items)


def answer_of(understood: dict[str, str], scored: Sequence[Scored], catalogue: Catalogue) -> dict[str, Any]:
    """An object with `understood`, what typed titles were taken for, and the `recommendations`, best first."""
    return {
        "understood": understood,
        "recommendations": [
            {"item": catalogue.ids[one.item - 1], "title": catalogue.name(one.item), "score": one.score}
            for one in scored
        ],
    }


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
