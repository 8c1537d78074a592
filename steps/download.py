"""Fetch a data set's raw files, check them, unpack them as published, and write their hashes."""

import argparse
import shutil
from pathlib import Path

from steps.common.cli import StepError, run_step
from steps.common.files import atomic_path, sha256, write_json
from steps.common.params import entry
from steps.data.sources import extract, fetch

MANIFEST = "manifest.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset", required=True, help="an entry of params/datasets.yaml")
    parser.add_argument("--output", required=True, type=Path, help="folder to make: data/raw/<dataset>")


def main(args: argparse.Namespace) -> None:
    source = entry("datasets", args.dataset)["source"]
    with atomic_path(args.output) as temporary:
        # It remains after an interrupted download. Each data set has its own, as several may fetch one file at once.
        partial = args.output.with_name(f".{args.output.name}.{source['file']}")
        found = fetch(source, partial)
        try:
            if source["file"].endswith(".zip"):
                extract(found, temporary)
            else:
                temporary.mkdir(parents=True)
                shutil.copyfile(found, temporary / source["file"])
        finally:
            found.unlink()
        write_manifest(temporary, {name: source[name] for name in ("file", "sha256")})


def write_manifest(folder: Path, source: dict[str, str]) -> None:
    """Write `manifest.json` into `folder`: the source and the SHA-256 of every file, by its path there."""
    if (folder / MANIFEST).exists():
        raise StepError(f"{source['file']} holds a {MANIFEST} of its own, whose name ours has; not unpacked")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    hashes = {path.relative_to(folder).as_posix(): sha256(path) for path in files}
    write_json(folder / MANIFEST, {"source": source, "files": hashes})


if __name__ == "__main__":
    run_step("download", __doc__, add_arguments, main)
