"""Entries of nested dicts by dotted keys, such as model.optimizer.lr."""

from typing import Any


def set_entry(config: dict[str, Any], key: str, value: Any) -> None:
    """Set the entry `key`; raises KeyError if it does not exist."""
    *path, last = key.split(".")
    entries: Any = config
    for part in path:
        entries = entries.get(part) if isinstance(entries, dict) else None
    if not isinstance(entries, dict) or last not in entries:
        raise KeyError(key)
    entries[last] = value
