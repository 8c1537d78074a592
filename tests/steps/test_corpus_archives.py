"""Hundreds of archives in bad shape, and steps from raw files on: the right files, or one line and nothing left."""

import gzip
import io
import random
import stat
import struct
import subprocess
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from steps.common import yaml_files
from steps.common.cli import StepError
from steps.common.files import sha256, write_json
from steps.data import sources
from tests.conftest import ROOT, step
from tests.steps import corpus
from tests.steps import corpus_reference as reference
from tests.steps.test_corpus import SEED, check_named, check_rows

CASES, STEPS = 650, 50
BOUND = 50_000  # bytes that an archive may grow to here
TEXT = "".join(f"{row}::{row * 7 % 13}::{row % 5}::{1000 + row}\n" for row in range(200)).encode()
Files = dict[str, bytes]


def zipped(files: Files, method: int = zipfile.ZIP_DEFLATED, **changes: Any) -> bytes:
    """An archive of files. changes: of each member, as attributes of zipfile.ZipInfo."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file:
        for name, content in files.items():
            member = zipfile.ZipInfo(name)
            for key, value in changes.items():
                setattr(member, key, value)
            file.writestr(member, content, method)
    return buffer.getvalue()


def with_flag(archive: bytes, flag: int) -> bytes:
    """An archive with a bit set in the flags of its first member, in both places."""
    data = bytearray(archive)
    for signature, at in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        data[data.index(signature) + at] |= flag
    return bytes(data)


def with_size(archive: bytes, size: int) -> bytes:
    """An archive that claims a size of its first member."""
    data = bytearray(archive)
    for signature, at in ((b"PK\3\4", 22), (b"PK\1\2", 24)):
        struct.pack_into("<I", data, data.index(signature) + at, size)
    return bytes(data)


GOOD: dict[str, tuple[str, bytes, Files]] = {
    "stored": ("x.zip", zipped({"a/r.dat": TEXT, "b.dat": b"b"}, zipfile.ZIP_STORED), {"a/r.dat": TEXT, "b.dat": b"b"}),
    "deflated": ("x.zip", zipped({"a/r.dat": TEXT, "é.dat": b"b"}), {"a/r.dat": TEXT, "é.dat": b"b"}),
    "bz2": ("x.zip", zipped({"a/r.dat": TEXT}, zipfile.ZIP_BZIP2), {"a/r.dat": TEXT}),
    "lzma": ("x.zip", zipped({"a/r.dat": TEXT}, zipfile.ZIP_LZMA), {"a/r.dat": TEXT}),
    "gz": ("x.dat.gz", gzip.compress(TEXT, mtime=0), {"x.dat": TEXT}),
    "zst": ("x.dat.zst", pa.compress(TEXT, codec="zstd", asbytes=True), {"x.dat": TEXT}),
}
#: Archives that are to be refused.
BAD: dict[str, Callable[[], bytes]] = {
    "with a password": lambda: with_flag(zipped({"a": TEXT}), 1),
    "with a name twice": lambda: zipped({"name-1": TEXT, "name-2": b"b"}).replace(b"name-2", b"name-1"),
    "with two names of one file": lambda: zipped({"a/b": TEXT, "a//b": b"b"}),
    "with a file and a folder of one name": lambda: zipped({"a": TEXT, "a/b": b"b"}),
    "with an absolute name": lambda: zipped({"/a": TEXT}),
    "with a name above": lambda: zipped({"a/../../b": TEXT}),
    "with a name of Windows above": lambda: zipped({"..\\b": TEXT}),
    "with a link": lambda: zipped({"a": b"/etc/passwd"}, external_attr=(stat.S_IFLNK | 0o777) << 16),
    "with a smaller size": lambda: with_size(zipped({"a": TEXT}), 10),
    "with a smaller size and zeros": lambda: with_size(zipped({"a": b"\0" * BOUND * 2}), 10),
    "that grows": lambda: zipped({"a": b"\0" * (BOUND + 1)}),
    "that grows by several": lambda: zipped(dict.fromkeys("abcd", b"\x00" * (BOUND // 3))),
    "without files": lambda: zipped({}),
    "without a name": lambda: zipped({"a": TEXT}).replace(b"\1\0", b"\0\0"),
}


def mutated(chance: random.Random, data: bytes, kinds: str) -> bytes:
    """The bytes with one change, which is often in the last ones, where a zip file's directory is."""
    at = chance.randrange(len(data)) if chance.random() < 0.5 else chance.randrange(max(len(data) - 160, 0), len(data))
    size = chance.choice((1, 4, 30))
    kind = chance.choice(kinds.split())
    if kind == "flip":
        return data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]
    if kind == "cut":
        return data[:at]
    if kind == "delete":
        return data[:at] + data[at + size :]
    if kind == "insert":
        return data[:at] + chance.randbytes(size) + data[at:]
    if kind == "double":
        return data[:at] + data[at : at + size] * 2 + data[at + size :]
    return data + chance.choice((b"junk", b"\1", data[: len(data) // 2]))


def unpacked(data: bytes, name: str, folder: Path) -> Files | None:
    """The files that a packed one gives; None if it is refused, by its name."""
    folder.mkdir()
    (folder / "packed").write_bytes(data)
    try:
        sources.unpack(folder / "packed", name, folder / "out")
    except StepError as error:
        line = str(error)
    else:
        line = ""
    if line:
        assert line.startswith(name)
        assert len(line.splitlines()) == 1
        return None
    found = {path.relative_to(folder / "out").as_posix(): path for path in (folder / "out").rglob("*")}
    return {name: path.read_bytes() for name, path in found.items() if path.is_file()}


def test_an_archive_gives_what_was_packed_or_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_SMALL", BOUND)
    counts = Counter[tuple[str, str]]()
    for number in range(CASES):
        chance = random.Random(f"{SEED} {number}")
        kind = chance.choice([*GOOD])
        name, data, files = GOOD[kind]
        # A frame of zstd need not have a checksum, and these do not: no reader notices a flipped byte of them.
        kinds = "cut" if kind == "zst" else "flip cut delete insert double add"
        found = unpacked(mutated(chance, data, kinds), name, tmp_path / str(number))
        counts[kind, "refused" if found is None else "accepted"] += 1
        # Choice: a member that the directory has lost is named by validate, if an entry reads it.
        assert found is None or (found and found.items() <= files.items()), f"{number}: {kind}"
    print(f"\nseed {SEED}: {CASES} archives: {dict(sorted(counts.items()))}")


@pytest.mark.parametrize("kind", BAD)
def test_an_archive_of_another_kind_than_data_is_refused(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_SMALL", BOUND)
    monkeypatch.setattr(sources, "_LARGEST_RATIO", 1)
    assert unpacked(BAD[kind](), "x.zip", tmp_path / "x") is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x"]
    sizes = [path.stat().st_size for path in (tmp_path / "x").rglob("*") if path.is_file()]
    assert max(sizes) <= BOUND


@pytest.mark.parametrize("name", ["x.gz", "x.zst"])
def test_a_packed_file_that_grows_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_SMALL", BOUND)
    zeros = b"\0" * (BOUND * 3)
    data = gzip.compress(zeros) if name == "x.gz" else pa.compress(zeros, codec="zstd", asbytes=True)
    assert unpacked(data, name, tmp_path / "x") is None


# From raw files on, as a user does


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the schemas of params/, where steps run."""
    folder = tmp_path_factory.mktemp("house")
    (folder / "params").mkdir()
    (folder / "params" / "schemas").symlink_to(ROOT / "params" / "schemas")
    return folder


def validated(house: Path, number: int, entry: dict[str, Any], files: Files) -> subprocess.CompletedProcess[str]:
    """What validate says of a data set's files. Checks that it left all of its output, or nothing."""
    demo = yaml_files.read(ROOT / "params/datasets.yaml")["demo"]
    rest = {key: demo[key] for key in ("title", "source", "ties", "training")} | {"repeats": "recommend"}
    if entry["checks"].get("unique_user_item"):
        del rest["repeats"]
    (house / "params" / "datasets.yaml").write_text(yaml_files.dump({"mine": rest | entry}))
    raw, valid = house / f"raw-{number}", house / f"valid-{number}"
    raw.mkdir()
    for name, content in files.items():
        (raw / name).write_bytes(content)
    write_json(raw / "manifest.json", {"files": {path.name: sha256(path) for path in raw.iterdir()}})
    before = {path for path in house.rglob("*") if path.suffix != ".lock"}
    result = step("validate", "--dataset", "mine", "--raw", raw, "--output", valid, cwd=house, check=False)
    left = {path for path in house.rglob("*") if path.suffix != ".lock"} - before
    if result.returncode:
        assert result.returncode == 1
        assert not left
        assert len(result.stderr.splitlines()) == 1, result.stderr
        assert "Traceback" not in result.stderr
        assert "--debug" not in result.stderr
    return result


@pytest.mark.parametrize("number", range(STEPS))
def test_a_step_leaves_all_or_nothing(number: int, house: Path) -> None:
    case = corpus.make(SEED + 1, number)
    result = validated(house, number, case.entry, case.files)
    try:
        expected = reference.expect(case.entry, case.files)
    except reference.Refused as refused:
        assert result.returncode == 1
        check_named(result.stderr, refused, house / f"raw-{number}")
        return
    assert result.returncode == 0, result.stderr
    check_rows(house / f"valid-{number}", expected)
