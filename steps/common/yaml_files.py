"""How this project reads and writes YAML: numbers, words and dates as in YAML 1.2's core schema.

PyYAML follows YAML 1.1, where `3e-05` and `1e-3` are text, `010` is 8, `1:30` is 90 and `yes` is true. Other tools that
write the same files follow YAML 1.2. Here every decimal number is a number,
`true` and `false` alone are booleans, and a date is text.
"""

import math
import re
from pathlib import Path
from typing import Any

import yaml

from steps.common.cli import StepError

_MERGE = "tag:yaml.org,2002:merge"
#: Tag, what is read as it, and its possible first characters, "" for an empty value. `010` and `0x10`, which readers
#: of YAML do not agree on, are text, so that they are refused where a number is wanted.
_WORDS = (
    ("null", r"~|null|Null|NULL|", [*"~nN", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", [*"-+0123456789"]),
    (
        "float",
        r"[-+]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))"
        r"|\.(?:nan|NaN|NAN)",
        [*"-+.0123456789"],
    ),
    ("merge", "<<", ["<"]),
)


_Resolvers = dict[str, list[tuple[str, re.Pattern[str]]]]


def _resolvers(others: _Resolvers | None = None) -> _Resolvers:
    """The words above, and those of `others`, by their first character, as PyYAML wants them."""
    table = {first: list(words) for first, words in (others or {}).items()}
    for tag, pattern, first in _WORDS:
        for character in first:
            table.setdefault(character, []).append((f"tag:yaml.org,2002:{tag}", re.compile(rf"(?:{pattern})\Z")))
    return table


class _TwiceError(yaml.MarkedYAMLError):
    """A key occurs twice in a mapping."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _resolvers()

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Refuse a key that occurs twice, of which PyYAML keeps the last. A key may override one that `<<` merges."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                name = "<<" if key.tag == _MERGE else self.construct_object(key)
                if name in seen:
                    raise _TwiceError(problem=f"key {key.value} occurs twice", problem_mark=key.start_mark)
                seen.add(name)
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Replace `<<` by the keys that it merges. The mapping's own keys override them, as do those of earlier bases.

        PyYAML takes, for some keys, the value of a base's base instead of the base's own.
        """
        merged: dict[Any, Any] = {}
        own: dict[Any, Any] = {}
        for pair in node.value:
            key, value = pair
            if key.tag != _MERGE:
                own[_identity(key)] = pair
                continue
            for base in reversed(value.value if isinstance(value, yaml.SequenceNode) else [value]):
                if not isinstance(base, yaml.MappingNode):
                    raise yaml.MarkedYAMLError(problem="<< takes mappings alone", problem_mark=key.start_mark)
                self.flatten_mapping(base)
                merged |= {_identity(pair[0]): pair for pair in base.value}
        node.value = list((merged | own).values())


def _identity(key: yaml.Node) -> Any:
    return (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = _resolvers(
        yaml.SafeDumper.yaml_implicit_resolvers
    )  # all that a reader may not read as text

    def ignore_aliases(self, data: Any) -> bool:
        return True


class _LineDumper(_Dumper):
    """Writes texts on one line: those with signs that do not print in double quotes, where they have escapes."""


def _one_line(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_LineDumper.add_representer(str, _one_line)


def parse(text: str, name: str) -> Any:
    """The content of the YAML `text`; StepError names the file `name` and the line of an error."""
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        what = "" if isinstance(error, _TwiceError) else "not YAML: "
        raise StepError(f"{name}{line}: {what}{error.problem}") from error
    except yaml.YAMLError as error:
        raise StepError(f"{name}: not YAML: {error}") from error


def text_of(path: Path) -> str:
    """The text of the YAML file `path`, which has to be UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise StepError(f"{path}: not YAML: no UTF-8 text ({error.reason} at byte {error.start})") from error


def read(path: Path) -> Any:
    """The content of the YAML file `path`; StepError says what is wrong with it, and where."""
    return parse(text_of(path), str(path))


def dump(content: Any) -> str:
    """`content` as YAML, its keys in order, that `parse` and every reader of YAML 1.1 or 1.2 reads back as it was."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def flow(content: Any) -> str:
    """`content` as YAML on one line, whatever its texts hold, that `parse` reads back as it was."""
    written: str = yaml.dump(content, Dumper=_LineDumper, sort_keys=False, default_flow_style=True, width=math.inf)
    return written.removesuffix("...\n").rstrip("\n")


def scalar(value: str | int | float | bool) -> str:
    """A value as one word that `parse` reads back as the same value: text that looks like a number is quoted."""
    plain = str(value)
    try:
        read_back = parse(plain, "")
    except StepError:
        read_back = None
    if type(read_back) is type(value) and read_back == value:
        return plain
    return dump([value]).strip().removeprefix("- ")
