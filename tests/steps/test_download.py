"""Downloads: right bytes or one clear line and nothing written; broken ones go on where they stopped."""

import gzip
import hashlib
import http.server
import io
import stat
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from steps.common import yaml_files
from steps.common.cli import StepError
from steps.common.files import read_json
from steps.data import sources
from steps.data.sources import MIRROR_VARIABLE, fetch, unpack
from tests.conftest import step


def archive(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return buffer.getvalue()


def publish(project: Path, content: bytes, checksum: str | None = None) -> Path:
    """Make `content` the data set `mine` of the project, found in the folder it returns."""
    mirror = project / "mirror"
    mirror.mkdir()
    (mirror / "mine.zip").write_bytes(content)
    path = project / "params" / "datasets.yaml"
    datasets = yaml_files.read(path)
    mine = {key: datasets["demo"][key] for key in ("title", "files", "checks", "ties", "training")}
    mine["source"] = {"file": "mine.zip", "sha256": checksum or hashlib.sha256(content).hexdigest()}
    path.write_text(yaml_files.dump(datasets | {"mine": mine}))
    return mirror


def failure(project: Path, mirror: Path) -> str:
    """The one line that a failing download prints; checks that nothing was written and no trace shown."""
    arguments = ("--dataset", "mine", "--output", "data/raw/mine")
    result = step("download", *arguments, cwd=project, check=False, HSTU_DATA_MIRROR=str(mirror))
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert not list((project / "data").rglob("*.dat"))
    assert not (project / "data/raw/mine").exists()
    return result.stderr


def test_a_good_archive_is_unpacked_as_published(project: Path) -> None:
    mirror = publish(project, archive(**{"demo/ratings.dat": b"1::2::3::4\n", "demo/": b""}))
    step("download", "--dataset", "mine", "--output", "data/raw/mine", cwd=project, HSTU_DATA_MIRROR=str(mirror))
    assert (project / "data/raw/mine/demo/ratings.dat").read_bytes() == b"1::2::3::4\n"
    assert [path.name for path in (project / "data/raw").iterdir()] == ["mine"]
    content = (mirror / "mine.zip").read_bytes()
    assert read_json(project / "data/raw/mine/manifest.json") == {
        "sources": [{"file": "mine.zip", "sha256": hashlib.sha256(content).hexdigest()}],
        "files": {"demo/ratings.dat": hashlib.sha256(b"1::2::3::4\n").hexdigest()},
    }


def test_an_archive_with_a_manifest_of_its_own_is_refused(project: Path) -> None:
    assert "manifest.json of its own" in failure(project, publish(project, archive(**{"manifest.json": b"{}"})))


def test_a_wrong_checksum_names_both(project: Path) -> None:
    content = archive(**{"demo/ratings.dat": b"1::2::3::4\n"})
    line = failure(project, publish(project, content, "0" * 64))
    assert "0" * 64 in line
    assert hashlib.sha256(content).hexdigest() in line


def test_a_truncated_archive_is_refused(project: Path) -> None:
    content = archive(**{"demo/ratings.dat": b"1::2::3::4\n" * 100})
    mirror = publish(project, content)
    (mirror / "mine.zip").write_bytes(content[:-50])
    assert "truncated" in failure(project, mirror)


def test_an_archive_published_damaged_is_refused(project: Path) -> None:
    content = archive(**{"demo/ratings.dat": b"1::2::3::4\n" * 100})
    assert "damaged or not a zip archive" in failure(project, publish(project, content[:-50]))


def test_a_flipped_byte_inside_a_member_is_refused(project: Path) -> None:
    content = bytearray(archive(**{"a.dat": b"good", "demo/ratings.dat": b"1::2::3::4\n" * 100}))
    content[content.index(b"1::2") + 5] ^= 1
    assert "damaged" in failure(project, publish(project, bytes(content)))


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_flipped_byte_is_refused_whatever_packed_it(method: int, project: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file:
        file.writestr("demo/ratings.dat", b"1::2::3::4\n" * 100)
    content = bytearray(buffer.getvalue())
    content[80] ^= 1
    assert "mine.zip is damaged" in failure(project, publish(project, bytes(content)))


def test_an_archive_that_lacks_its_begin_is_refused(project: Path) -> None:
    content = archive(**{"demo/ratings.dat": b"1::2::3::4\n" * 100})
    assert "mine.zip is damaged" in failure(project, publish(project, content[:60] + content[64:]))


def test_an_archive_without_a_file_is_refused(project: Path) -> None:
    assert "mine.zip holds no files" in failure(project, publish(project, archive(**{"demo/": b""})))


@pytest.mark.parametrize(
    "name", ["../evil.dat", "/evil.dat", "demo/../../evil.dat", "..\\evil.dat", "C:/evil.dat", "."]
)
def test_a_member_outside_the_folder_is_refused(project: Path, name: str) -> None:
    line = failure(project, publish(project, archive(**{"demo/ratings.dat": b"x", name: b"evil"})))
    assert "outside its folder" in line
    assert not list(project.parent.rglob("evil.dat"))


def test_a_link_is_refused(project: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        member = zipfile.ZipInfo("demo/ratings.dat")
        member.external_attr = (stat.S_IFLNK | 0o777) << 16
        file.writestr(member, "/etc/passwd")
    assert "is a link" in failure(project, publish(project, buffer.getvalue()))


def tarred(*members: tuple[str, bytes, bytes]) -> bytes:
    """A tar of members (name, type, content), in gzip."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as file:
        for name, kind, content in members:
            member = tarfile.TarInfo(name)
            member.type, member.size = kind, len(content)
            member.linkname = "/etc/passwd" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
            file.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def unpacked(content: bytes, folder: Path) -> dict[str, bytes]:
    (folder / "packed").write_bytes(content)
    unpack(folder / "packed", "a.tar.gz", folder / "raw")
    return {
        path.relative_to(folder / "raw").as_posix(): path.read_bytes()
        for path in (folder / "raw").rglob("*")
        if path.is_file()
    }


FOLDER = ("a", tarfile.DIRTYPE, b"")
LOG = ("a/data/log.csv", tarfile.REGTYPE, b"u,i\n1,2\n" * 9000)
README = ("./a/README", tarfile.REGTYPE, b"")


def test_a_tar_is_unpacked_as_published(tmp_path: Path) -> None:
    assert unpacked(tarred(FOLDER, LOG, README), tmp_path) == {"a/data/log.csv": LOG[2], "a/README": b""}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (tarred(FOLDER), "a.tar.gz holds no files"),
        (tarred(LOG, LOG), "log.csv is there twice"),
        (tarred(LOG, ("a/../../evil", tarfile.REGTYPE, b"x")), "'a/../../evil' would be written outside its folder"),
        (tarred(LOG, ("/evil", tarfile.REGTYPE, b"x")), "'/evil' would be written outside its folder"),
        (tarred(LOG, ("a/l", tarfile.SYMTYPE, b"")), "'a/l' is a link or no file"),
        (tarred(LOG, ("a/l", tarfile.LNKTYPE, b"")), "'a/l' is a link or no file"),
        (tarred(LOG, ("a/l", tarfile.FIFOTYPE, b"")), "'a/l' is a link or no file"),
        (tarred(LOG)[:-200], "a.tar.gz is damaged"),
        (tarred(LOG)[:-8] + bytes(8), "a.tar.gz is damaged"),    # the checksum at the end of gzip
        (gzip.compress(b"no tar" * 999), "a.tar.gz is damaged or not a tar archive in gzip"),
        (gzip.compress(gzip.decompress(tarred(LOG))[:5000]), "a.tar.gz is damaged"),    # whole gzip of half a tar
        (b"no gzip", "a.tar.gz is damaged"),
    ],
    ids=lambda value: value if isinstance(value, str) else "tar",    # the bytes of gzip have the time in them
)  # fmt: skip
def test_a_tar_in_bad_shape_is_refused(content: bytes, said: str, tmp_path: Path) -> None:
    with pytest.raises(StepError, match=said):
        unpacked(content, tmp_path)
    assert not list(tmp_path.rglob("evil"))


def test_a_tar_that_grows_beyond_what_data_do_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_SMALL", 1000)
    monkeypatch.setattr(sources, "_LARGEST_RATIO", 2)
    with pytest.raises(StepError, match=r"a\.tar\.gz grows beyond 1000 bytes"):
        unpacked(tarred(LOG), tmp_path)


def test_no_source_says_what_to_set(project: Path) -> None:
    publish(project, b"")
    line = step("download", "--dataset", "mine", "--output", "data/raw/mine", cwd=project, check=False).stderr
    assert MIRROR_VARIABLE in line


def test_an_unknown_data_set_lists_the_known(project: Path) -> None:
    line = step("download", "--dataset", "ml-1b", "--output", "x", cwd=project, check=False).stderr
    assert "ml-1m" in line


class _Server(http.server.BaseHTTPRequestHandler):
    """Serves `content`; breaks off after `breaks_after` bytes while that is set; knows Range."""

    content = bytes(range(256)) * 4096  # what a path with `wrong` has is another, of the same length
    breaks_after: int | None = None
    requests: list[str | None] = []  # noqa: RUF012  (one server a test, which empties it)

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.requests.append(wanted)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(self.content) - start))
        self.end_headers()
        end = len(self.content) if self.breaks_after is None else start + self.breaks_after
        content = self.content[::-1] if "wrong" in self.path else self.content
        self.wfile.write(content[start:end])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    _Server.requests.clear()
    _Server.breaks_after = None
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Server)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_address[1]}/mine.bin"
    running.shutdown()


def source(url: str, **more: object) -> dict[str, object]:
    return {"file": "mine.bin", "sha256": hashlib.sha256(_Server.content).hexdigest(), "publisher": url, **more}


def test_a_broken_download_goes_on_where_it_stopped(server: str, tmp_path: Path) -> None:
    partial = tmp_path / "partial"
    _Server.breaks_after = 300_000
    with pytest.raises(StepError, match=r"mine\.bin"):
        fetch(source(server), partial)
    (begun,) = tmp_path.iterdir()
    have = begun.stat().st_size
    assert have > 0
    _Server.breaks_after = None
    assert fetch(source(server), partial)[0].read_bytes() == _Server.content
    assert _Server.requests == [None, f"bytes={have}-"]


def test_a_mirror_that_breaks_off_wrong_bytes_spoils_no_other(server: str, tmp_path: Path) -> None:
    """Its partial file is its own: the next source begins at the first byte, and so does it once it is corrected."""
    wrong = server.replace("mine.bin", "wrong/mine.bin")
    _Server.breaks_after = 300_000
    with pytest.raises(StepError, match="wrong/mine"):
        fetch(source(wrong), tmp_path / "partial")
    _Server.breaks_after = None
    found, _ = fetch(source(wrong, mirrors=[server]), tmp_path / "partial")
    assert found.read_bytes() == _Server.content
    assert list(tmp_path.iterdir()) == [found]
    assert _Server.requests[0] is None
    assert _Server.requests[-1] is None


def test_a_download_that_goes_on_from_wrong_bytes_begins_again(server: str, tmp_path: Path) -> None:
    _Server.breaks_after = 300_000
    with pytest.raises(StepError):
        fetch(source(server), tmp_path / "partial")
    (begun,) = tmp_path.iterdir()
    begun.write_bytes(b"x" * begun.stat().st_size)
    _Server.breaks_after = None
    assert fetch(source(server), tmp_path / "partial")[0].read_bytes() == _Server.content


def test_mirrors_follow_the_publisher_and_the_environment_comes_last(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong, right = tmp_path / "wrong", tmp_path / "right"
    for folder, content in ((wrong, b"other"), (right, _Server.content)):
        folder.mkdir()
        (folder / "mine.bin").write_bytes(content)
    monkeypatch.setenv(MIRROR_VARIABLE, str(right))
    partial = tmp_path / "partial"
    nobody = "http://127.0.0.1:9/mine.bin"  # the discard port: refused at once
    assert fetch(source(nobody, mirrors=[str(wrong)]), partial)[0].read_bytes() == _Server.content
    monkeypatch.setenv(MIRROR_VARIABLE, str(right / "mine.bin"))  # a file serves as well
    fetch(source(nobody), partial)
    monkeypatch.setenv(MIRROR_VARIABLE, server.removesuffix("/mine.bin"))  # and a URL
    fetch(source(nobody), tmp_path / "new")
    assert len(_Server.requests) == 1


def test_the_rest_of_another_data_set_s_download_is_left_alone(project: Path) -> None:
    """Data sets that share a file are fetched at once."""
    mirror = publish(project, archive(**{"demo/ratings.dat": b"1::2::3::4\n"}))
    other = project / "data/raw/.other.mine.zip.download"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"half")
    step("download", "--dataset", "mine", "--output", "data/raw/mine", cwd=project, HSTU_DATA_MIRROR=str(mirror))
    assert other.read_bytes() == b"half"
    assert (project / "data/raw/mine/demo/ratings.dat").read_bytes() == b"1::2::3::4\n"
