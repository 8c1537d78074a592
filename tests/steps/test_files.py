"""Files: errors name them, two writers of one output do not meet, and a dead one leaves nothing in the way."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from steps.common.cli import StepError
from steps.common.files import atomic_path, read_json, read_jsonl, write_json, write_text
from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"a": [1, 2', "is not JSON"),
        (b"\xff\xfe{}", "is damaged"),
        (b"[1]", "holds a list where a dict belongs"),
        (b"", "is not JSON"),
        (None, "does not exist"),
    ],
)
def test_a_json_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None, said: str) -> None:
    path = tmp_path / "one.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StepError) as failure:
        read_json(path, remedy="make tea")
    assert str(failure.value).startswith(f"{path} {said}")
    assert str(failure.value).endswith("; make tea")


def test_a_folder_where_a_file_belongs_is_named(tmp_path: Path) -> None:
    with pytest.raises(StepError, match=f"{tmp_path} cannot be read .Is a directory"):
        read_json(tmp_path)


@pytest.mark.parametrize(
    ("line", "said"), [('{"epoch": 2, "tra', r"line 2, is not JSON"), ("7", "line 2, is no JSON object")]
)
def test_a_broken_line_is_named_by_its_number(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "history.jsonl"
    path.write_text('{"epoch": 1}\n' + line)
    with pytest.raises(StepError, match=rf"history\.jsonl, {said}"):
        read_jsonl(path)


def full(path: Path, how: str) -> None:
    """Write `path` until the disk is full, as `open` says it, with a name, or as `write` does, without."""
    with atomic_path(path) as temporary:
        temporary.write_text("ha")
        if how == "open":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(temporary))
        with open("/dev/full", "w") as device:
            device.write("all")


@pytest.mark.parametrize("how", ["open", "write"])
def test_a_full_disk_is_said_with_the_file_that_was_being_written(tmp_path: Path, how: str) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    path = tmp_path / "weights"
    path.write_text("old")
    with pytest.raises(StepError, match=f"cannot write {path}: the disk is full"):
        full(path, how)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StepError, match=r"cannot write .*file/one\.json"):
        write_json(tmp_path / "file/one.json", {})


def test_what_else_fails_in_the_block_names_its_own_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "one"):
        (tmp_path / "other").read_text()


WRITER = """
import sys
from pathlib import Path
from steps.common.files import atomic_path
with atomic_path(Path(sys.argv[1])) as folder:
    folder.mkdir()
    (folder / "who").write_text(sys.argv[2])
    print("writing", flush=True)
    sys.stdin.readline()
"""


def writer(path: Path, name: str) -> subprocess.Popen[str]:
    """Writes until it is told to end, by a line or by the end of its input."""
    code, pipe = [sys.executable, "-c", WRITER, str(path), name], subprocess.PIPE
    return subprocess.Popen(code, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def test_the_second_writer_waits_for_the_first_and_says_so(tmp_path: Path) -> None:
    output = tmp_path / "output"
    first = writer(output, "first")
    assert first.stdout is not None
    assert first.stdout.readline() == "writing\n"
    second = writer(output, "second")
    assert second.stderr is not None
    assert f"another process works on {output}; waiting" in second.stderr.readline()
    assert first.communicate("\n")[1] == ""
    assert first.returncode == 0
    assert second.communicate("\n") == ("writing\n", "")
    assert second.returncode == 0
    assert (output / "who").read_text() == "second"
    assert list(tmp_path.iterdir()) == [output]


def test_a_killed_writer_holds_nobody_up_and_what_it_left_goes(tmp_path: Path) -> None:
    output = tmp_path / "output"
    killed = writer(output, "killed")
    assert killed.stdout is not None
    assert killed.stdout.readline() == "writing\n"
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not output.exists()
    assert [path.name for path in tmp_path.glob(".output.*.partial/who")] == ["who"]
    write_text(output, "whole")
    assert list(tmp_path.iterdir()) == [output]
