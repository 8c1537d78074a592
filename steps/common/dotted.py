"""Entries of nested dicts by dotted keys, such as model.optimizer.lr."""

from typing import Any


def set_entry(config: dict[str, Any], key: str, value: Any) -> None:
    """Set the entry `key`; raises KeyError if it does not exist."""
    *path, last = key.split(".")
    place: Any = config
    for part in path:
        place = place.get(part) if isinstance(place, dict) else None
    if not isinstance(place, dict) or last not in place:
        raise KeyError(key)
    place[last] = value
