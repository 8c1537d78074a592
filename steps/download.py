"""Fetch a data set's raw files, check them, unpack them as published, and write their hashes."""

import argparse
import sys
from pathlib import Path

from steps.common.cli import StepError, run_step
from steps.common.files import atomic_path, sha256, write_json
from steps.common.params import entry
from steps.data.sources import fetch, unpack

MANIFEST = "manifest.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset", required=True, help="an entry of params/datasets.yaml")
    parser.add_argument("--output", required=True, type=Path, help="folder to make: data/raw/<dataset>")


def main(args: argparse.Namespace) -> None:
    content = entry("datasets", args.dataset)["source"]
    sources = content if isinstance(content, list) else [content]
    with atomic_path(args.output) as temporary:
        found = []
        for source in sources:
            # It remains after an interrupted download. Each data set has its own, as several may fetch one file.
            partial = args.output.with_name(f".{args.output.name}.{source['file']}")
            path, digest = fetch(source, partial)
            try:
                unpack(path, source["file"], temporary)
            finally:
                path.unlink()
            found.append({"file": source["file"], "sha256": digest})
            if not {"sha256", "md5"} & source.keys():
                print(
                    f"download: {args.dataset}'s entry has no checksum for {source['file']}, and so takes any file of "
                    f"that name; to hold it to this one, add `sha256: {digest}`",
                    file=sys.stderr,
                )
        write_manifest(temporary, found)


def write_manifest(folder: Path, sources: list[dict[str, str]]) -> None:
    """Write `manifest.json` into `folder`: the sources, and the SHA-256 of every file by its path there."""
    if (folder / MANIFEST).exists():
        held = ", ".join(source["file"] for source in sources)
        raise StepError(f"{held} holds a {MANIFEST} of its own, whose name ours has; not unpacked")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    hashes = {path.relative_to(folder).as_posix(): sha256(path) for path in files}
    write_json(folder / MANIFEST, {"sources": sources, "files": hashes})


if __name__ == "__main__":
    run_step("download", __doc__, add_arguments, main)
