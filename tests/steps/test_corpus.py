"""Thousands of raw files in bad shape: each gives the rows of a plain reference, or one line that names the place.

`CORPUS_SEED` and `CORPUS_CASES` ask for other and more files than the tests try by themselves.
"""

import functools
import os
import re
import signal
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from steps import validate
from steps.common.cli import StepError
from steps.data import readers, records
from steps.preprocess import write_sequences
from tests.steps import corpus
from tests.steps import corpus_reference as reference

SEED = int(os.environ.get("CORPUS_SEED", "20240217"))
CASES = int(os.environ.get("CORPUS_CASES", "1400"))
GROUPS = 7
SECONDS = 30  # that one file may take; most take a twentieth of one
SHOWN = 5  # rows that a message names of those that fail a check


@pytest.mark.parametrize("group", range(GROUPS))
def test_a_file_is_read_right_or_refused_with_its_place(group: int, tmp_path: Path) -> None:
    numbers = range(group, CASES, GROUPS)
    counts, wrong = Counter[tuple[str, str, str]](), []
    for number in numbers:
        case = corpus.make(SEED, number)
        folder = tmp_path / str(number)
        try:
            with at_most(SECONDS):
                outcome = tried(case, folder, sequences=number % 3 == 0)
        except Exception as error:
            wrong.append(f"{number}: {case.form}, {case.mutation}: {type(error).__name__}: {error}")
            outcome = "wrong"
        counts[case.form, case.mutation, outcome] += 1
    print(f"\nseed {SEED}, group {group}: {told(counts)}")
    assert not wrong, f"seed {SEED}, {len(wrong)} of {len(numbers)}:\n" + "\n".join(wrong)


def test_a_quote_that_is_not_closed_takes_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a sixty-fourth of the reader's bounds: at most 12 MB for a file of 8 MB that is one record."""
    monkeypatch.setattr(records, "_LONGEST_RECORD", records._LONGEST_RECORD >> 6)
    (tmp_path / "t.csv").write_text('user,item\r\n1,2\r\n1,"3\r\n' + "1,2\r\n" * 1_600_000)
    table = {"path": "t.csv", "separator": ",", "header": True, "columns": ["user", "item"]}
    tracemalloc.start()
    with pytest.raises(StepError, match=r"t\.csv, line 3: a quote is not closed"):
        list(readers.read_blocks(tmp_path, table, lambda block: block, readers.BLOCK_BYTES >> 6))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12e6, f"{peak / 1e6:.1f} MB"


def told(counts: Counter[tuple[str, str, str]]) -> str:
    """How many files were tried, by outcome, form and mutation."""
    parts = [f"{sum(counts.values())} tried"]
    for at in (2, 0, 1):
        by = Counter[str]()
        for key, number in counts.items():
            by[key[at]] += number
        parts.append(", ".join(f"{name} {number}" for name, number in sorted(by.items())))
    return "; ".join(parts)


def tried(case: corpus.Case, folder: Path, sequences: bool) -> str:
    """Whether a case is accepted or refused. Raises AssertionError if that, or what is read, is wrong."""
    try:
        expected = reference.expect(case.entry, case.files)
    except reference.Refused as refused:
        expected = refused
    folder.mkdir()
    for name, content in case.files.items():
        (folder / name).write_bytes(content)
    valid = folder / "valid"
    valid.mkdir()
    try:
        with blocks_of(case.block_bytes):
            report = validate.write_valid(folder, case.entry, valid)
    except StepError as error:
        line = " ".join(str(error).split())  # as run_step prints it
        assert isinstance(expected, reference.Refused), f"is fine, but: {line}"
        check_named(line, expected, folder)
        return "refused"
    assert not isinstance(expected, reference.Refused), f"is read in spite of {expected.faults[:3]}"
    check_rows(valid, expected)
    if sequences:
        check_sequences(valid, report, folder, expected)
    return "accepted"


@contextmanager
def blocks_of(block_bytes: int) -> Iterator[None]:
    small = functools.partial(readers.read_blocks, block_bytes=block_bytes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "read_blocks", small)
        patch.setattr(validate, "read_blocks", small)
        patch.setattr(readers, "BLOCK_ROWS", max(block_bytes // 20, 1))
        yield


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def late(*_: Any) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def check_named(line: str, refused: reference.Refused, folder: Path) -> None:
    """The line names the file and the place: of one fault that ends the reading, or of the first of every kind."""
    by_kind: dict[tuple[str, str], list[reference.Fault]] = {}
    for fault in refused.faults:
        by_kind.setdefault((fault.path, fault.kind), []).append(fault)
    named = [any(is_named(line, fault, folder) for fault in faults[:SHOWN]) for faults in by_kind.values()]
    assert any(named) if refused.fatal else all(named), f"{line}\n  does not name {refused.faults[:3]}"


def is_named(line: str, fault: reference.Fault, folder: Path) -> bool:
    _, there, said = line.partition(str(folder / fault.path))
    if not there or fault.lines is None:
        return bool(there)
    numbers = re.findall(r"(?:line|row|lines from) ([0-9]+(?:, [0-9]+)*)", said)
    return any(int(number) in fault.lines for several in numbers for number in several.split(", "))


def check_rows(valid: Path, expected: reference.Expected) -> None:
    log = pq.read_table(valid / "interactions.parquet")
    assert ("rating" in log.column_names) == expected.rated
    found = list(
        zip(
            log["row"].to_pylist(),
            log["user"].to_pylist(),
            log["item"].to_pylist(),
            log["rating"].to_pylist() if expected.rated else [None] * len(log),
            log["timestamp"].to_pylist(),
            strict=True,
        )
    )
    assert found == [(*row[:3], None if row[3] is None else float(np.float32(row[3])), row[4]) for row in expected.rows]
    items = pq.read_table(valid / "items.parquet")
    titles = [title or "" for title in items["title"].to_pylist()]
    assert dict(zip(items["item"].to_pylist(), titles, strict=True)) == expected.items
    assert len(items) == len(expected.items)


def check_sequences(valid: Path, report: dict[str, Any], folder: Path, expected: reference.Expected) -> None:
    output = folder / "processed"
    output.mkdir()
    files = {path.name: "" for path in valid.iterdir()}
    write_sequences(valid, report | {"files": files}, output, "file-order", rows_in_memory=len(expected.rows) // 2)
    right = reference.sequences(expected)
    assert pq.read_table(output / "users.parquet")["raw_id"].to_pylist() == right.users
    assert pq.read_table(output / "items.parquet")["raw_id"].to_pylist() == right.items
    tensors = load_file(output / "sequences.safetensors")
    for name in ("offsets", "item", "timestamp"):
        assert tensors[name].tolist() == getattr(right, name), name
    if expected.rated:
        ratings = np.array([np.nan if rating is None else rating for rating in right.rating], dtype=np.float32)
        np.testing.assert_array_equal(tensors["rating"], ratings)
