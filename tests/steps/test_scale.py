"""Logs larger than memory, and the same bytes whatever is done at once: blocks, parts, threads, order of the input."""

import functools
import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from steps import validate
from steps.common import params
from steps.common.files import sha256
from steps.data import readers
from steps.data.generators import generator
from steps.data.sources import unpack
from steps.preprocess import write_sequences
from steps.studies.data_growth import scaled
from steps.validate import write_valid
from tests.conftest import ROOT

#: SHA-256 of sequences, items and manifest of two generated data sets. Python 3.11 and 3.12 write the same.
PINNED = {
    "ml-20m-form": "440c12c8d64eeb02fb81e818e6b188f31b120612765ad391f01c335411df9994",
    "amzn-books-form": "bc78994c80a01c04d419c8c2c25214465983e64b30046632554e11d4aa45b1d6",
}


def generated(name: str, rows: int, folder: Path, **changes: int) -> dict[str, Any]:
    """A file in the form of a data set, in `folder`/raw, and the entry that reads it."""
    entry = params.entry("datasets", name, ROOT / "params")
    generator(**scaled(entry["synthesize"], rows) | changes).write(folder / "raw.zip")
    unpack(folder / "raw.zip", "raw.zip", folder / "raw")
    checks = {key: value for key, value in entry["checks"].items() if key != "expected"}
    return entry | {"checks": checks}


SMALL = {"movies": 4000, "rated_movies": 3000, "largest_id": 9000}


def made(raw: Path, entry: dict[str, Any], output: Path, ties: str, rows_in_memory: int = 10**9) -> dict[str, bytes]:
    """The bytes of every file that preprocess writes, but the hashes of what it read."""
    valid, processed = output / "valid", output / "processed"
    valid.mkdir(parents=True)
    processed.mkdir()
    told = write_valid(raw, entry, valid)
    files = {path.name: sha256(path) for path in sorted(valid.iterdir())}
    write_sequences(valid, told | {"files": files}, processed, ties, rows_in_memory)
    return {path.name: path.read_bytes() for path in sorted(processed.iterdir()) if path.name != "made_of.json"}


def digest(files: dict[str, bytes]) -> str:
    content = hashlib.sha256()
    for name in ("sequences.safetensors", "items.parquet", "manifest.json"):
        content.update(files[name])
    return content.hexdigest()


@pytest.mark.parametrize("ties", ["file-order", "item-id", "shuffled"])
def test_blocks_and_parts_change_no_byte(ties: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = generated("ml-20m-form", 30_000, tmp_path, **SMALL)
    whole = made(tmp_path / "raw", entry, tmp_path / "whole", ties)
    monkeypatch.setattr(validate, "read_blocks", functools.partial(readers.read_blocks, block_bytes=5_000))
    assert made(tmp_path / "raw", entry, tmp_path / "parts", ties, rows_in_memory=9_000) == whole


@pytest.mark.parametrize("name", ["ml-20m-form", "amzn-books-form"])
def test_a_shuffled_file_gives_the_same_bytes_where_ties_do_not_depend_on_its_order(name: str, tmp_path: Path) -> None:
    entry = generated(name, 30_000, tmp_path, **(SMALL if name == "ml-20m-form" else {}))
    first = made(tmp_path / "raw", entry, tmp_path / "first", "item-id")
    path = tmp_path / "raw" / entry["files"]["interactions"]["path"]
    header = 1 if entry["files"]["interactions"]["header"] else 0
    lines = path.read_text().splitlines(keepends=True)
    rows = lines[header:]
    random.Random(1).shuffle(rows)
    assert rows != lines[header:]
    path.write_text("".join([*lines[:header], *rows]))
    assert made(tmp_path / "raw", entry, tmp_path / "again", "item-id") == first


@pytest.mark.parametrize("threads", ["1", "2"])
@pytest.mark.parametrize("name", PINNED)
def test_bytes_depend_on_no_thread_and_no_version_of_python(name: str, threads: str, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.steps.test_scale import *\n"
        "folder, name = Path(sys.argv[1]), sys.argv[2]\n"
        "entry = generated(name, 30_000, folder, **(SMALL if name == 'ml-20m-form' else {}))\n"
        "print(digest(made(folder / 'raw', entry, folder / 'made', 'file-order')))\n"
    )
    environment = os.environ | {
        "POLARS_MAX_THREADS": threads,
        "OMP_NUM_THREADS": threads,
    }
    command = [sys.executable, "-c", code, str(tmp_path), name]
    found = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout
    assert found.strip() == PINNED[name]


def test_two_million_rows_take_little_memory_beside_the_libraries(tmp_path: Path) -> None:
    """200 MB; that of imports, 150 MB, is counted apart."""
    entry = generated("ml-20m-form", 2_000_000, tmp_path)
    code = """
import functools, json, resource, sys
from pathlib import Path
from steps import validate
from steps.data import log, readers
from steps.preprocess import write_sequences

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

before = peak()
validate.read_blocks = functools.partial(readers.read_blocks, block_bytes=1 << 18)
log.batches.__defaults__ = (50_000,)
raw, valid, processed = (Path(sys.argv[1], name) for name in ("raw", "valid", "processed"))
valid.mkdir()
processed.mkdir()
told = validate.write_valid(raw, json.loads(sys.argv[2]), valid)
files = {path.name: "" for path in sorted(valid.iterdir())}
write_sequences(valid, told | {"files": files}, processed, "file-order", 200_000)
print(peak() - before)
"""
    command = [sys.executable, "-c", code, str(tmp_path), json.dumps(entry)]
    found = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert float(found) < 200
