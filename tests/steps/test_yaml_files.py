"""YAML is read and written in one way, in which numbers mean the same to every tool that touches a file."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from steps.common import yaml_files
from steps.common.cli import StepError
from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-05", 0.00003),
        ("1e-3", 0.001),
        ("1e3", 1000.0),
        ("1.0e-3", 0.001),
        ("-2.5E+2", -250.0),
        (".5", 0.5),
        ("7", 7),
        ("-7", -7),
        ("true", True),
        ("null", None),
        ("", None),
        # What readers of YAML 1.1 and 1.2 do not agree on is text, which a schema refuses where it wants a number.
        ("010", "010"),
        ("0x1F", "0x1F"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("yes", "yes"),
        ("2024-01-01", "2024-01-01"),
        ("=", "="),
    ],
)
def test_a_word_is_what_yaml_1_2_says(text: str, value: Any) -> None:
    found = yaml_files.parse(f"key: {text}", "file")["key"]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [("a: 1\nb: 2\na: 3\n", 3, "a"), ("- {x: 1, x: 1}\n", 1, "x"), ("p: &p {a: 1}\nq:\n  <<: *p\n  <<: *p\n", 4, "<<")],
)
def test_a_key_that_stands_twice_is_an_error(text: str, line: int, key: str) -> None:
    with pytest.raises(StepError, match=f"^params/x.yaml, line {line}: key {key} occurs twice$"):
        yaml_files.parse(text, "params/x.yaml")


def test_merge_keys_give_a_variant_its_base_s_keys() -> None:
    text = "base: &base {a: 1, b: 2}\nown: &own\n  <<: *base\n  b: 3\nlast: {<<: *own, c: 4}\n"
    assert yaml_files.parse(text, "file") == {
        "base": {"a": 1, "b": 2},
        "own": {"a": 1, "b": 3},
        "last": {"a": 1, "b": 3, "c": 4},
    }


@pytest.mark.parametrize("text", ["a: [1", "a: !!python/object/apply:os.getcwd []", "a: \x01", "? [1]\n: 2"])
def test_what_is_no_yaml_names_the_file(text: str) -> None:
    with pytest.raises(StepError, match=r"^params/x\.yaml.*: not YAML: "):
        yaml_files.parse(text, "params/x.yaml")


def test_bytes_that_are_no_text_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"title: Caf\xe9\n")
    with pytest.raises(StepError, match=r"x\.yaml: not YAML: no UTF-8 text"):
        yaml_files.read(tmp_path / "x.yaml")


numbers = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(10**20), 10**20)
texts = st.text(st.characters(codec="utf-8", exclude_categories=["C"])) | st.sampled_from(
    ["1e-3", "3e-05", "010", "yes", "no", "true", "null", "~", "", "2024-01-01", "1:30", "<<", "=", "-", "1/sqrt(dqk)"]
)
values = numbers | st.booleans() | texts


def same(left: Any, right: Any) -> bool:
    return type(left) is type(right) and left == right


@given(values)
def test_a_word_comes_back_as_it_was(value: Any) -> None:
    assert same(yaml_files.parse(yaml_files.scalar(value), "name"), value)


@given(st.dictionaries(texts, values | st.lists(values)))
def test_content_comes_back_as_it_was_and_in_order(content: dict[str, Any]) -> None:
    found = yaml_files.parse(yaml_files.dump(content), "file")
    assert found == content
    assert list(found) == list(content)


@given(
    st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=99) | texts, st.text(st.characters(codec="utf-8")))
)
def test_content_of_any_signs_stands_on_one_line(content: dict[str, str]) -> None:
    written = yaml_files.flow(content)
    assert len(written.splitlines()) == 1
    assert yaml_files.parse(written, "line") == content
    assert yaml_files.parse(yaml_files.flow(list(content)), "line") == list(content)


@given(values)
def test_what_is_written_is_the_same_to_a_reader_of_yaml_1_1(value: Any) -> None:
    """PyYAML's own loader, DVC's, is one."""
    assert same(yaml.safe_load(yaml_files.dump([value]))[0], value)


@given(numbers)
def test_numbers_keep_their_names(value: float) -> None:
    """Folders of committed grid runs are called after Python's own words for numbers."""
    assert yaml_files.scalar(value) == str(value)


def test_infinity_is_read_for_the_schema_to_refuse() -> None:
    assert math.isinf(yaml_files.parse(".inf", "file"))
    assert math.isnan(yaml_files.parse(".nan", "file"))


def test_nothing_else_reads_or_writes_yaml() -> None:
    for path in [*ROOT.glob("steps/**/*.py"), *ROOT.glob("workflow/**/*.py"), *ROOT.glob("tests/**/*.py")]:
        if path.name not in ("yaml_files.py", Path(__file__).name):
            assert not re.search(r"^\s*(import yaml|from yaml)\b", path.read_text(), re.MULTILINE), path
