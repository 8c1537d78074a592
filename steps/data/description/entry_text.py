"""An entry of params/datasets.yaml as text, with comments beside its keys."""

from collections.abc import Iterator, Mapping
from typing import Any

from steps.common import yaml_files
from steps.data.description.inference import Doubt

#: Keys whose parts have lines of their own.
_OPENED = ("files", "files.interactions", "files.items", "files.users", "checks", "filters", "training")


def written(name: str, entry: Mapping[str, Any], notes: Mapping[str, str], doubts: list[Doubt]) -> str:
    """The entry `name` as YAML. notes: what stands behind a key, by its path. doubts: what stands above a key; of a key
    that the entry lacks, above the nearest that it has."""
    above: dict[str, list[str]] = {}
    for doubt in doubts:
        key = doubt.key
        while key and not _has(entry, key):
            key = key.rpartition(".")[0]
        above.setdefault(key, []).append(doubt.text)
    lines = [*_doubts(above.get("", []), ""), f"{yaml_files.flow(name)}:", *_mapping(entry, "", "  ", notes, above)]
    return "\n".join(lines) + "\n"


def _mapping(
    content: Mapping[str, Any], path: str, indent: str, notes: Mapping[str, str], above: Mapping[str, list[str]]
) -> Iterator[str]:
    for key, value in content.items():
        where = f"{path}.{key}" if path else key
        note = f"    # {printable(notes[where])}" if where in notes else ""
        yield from _doubts(above.get(where, []), indent)
        if where not in _OPENED and not (where == "source" and isinstance(value, list)):
            yield f"{indent}{key}: {yaml_files.flow(value)}{note}"
        elif isinstance(value, list):
            yield f"{indent}{key}:{note}"
            for place, one in enumerate(value):
                beside = notes.get(f"{where}.{place}")
                yield f"{indent}  - {yaml_files.flow(one)}" + (f"    # {printable(beside)}" if beside else "")
        else:
            yield f"{indent}{key}:{note}"
            yield from _mapping(value, where, indent + "  ", notes, above)


def _doubts(texts: list[str], indent: str) -> Iterator[str]:
    for text in texts:
        yield f"{indent}# DOUBT: {printable(text)}"


def printable(text: str) -> str:
    """A text of a comment, which ends with its line, whatever a file has brought into it."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)


def _has(content: Any, path: str) -> bool:
    for part in path.split("."):
        if not isinstance(content, Mapping) or part not in content:
            return False
        content = content[part]
    return True
