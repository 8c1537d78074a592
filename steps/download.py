"""Fetch a data set's raw files, check them, and unpack them as published."""

import argparse
import shutil
from pathlib import Path

from steps.common.cli import run_step
from steps.common.files import atomic_path
from steps.common.params import entry
from steps.data.sources import extract, fetch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset", required=True, help="an entry of params/datasets.yaml")
    parser.add_argument("--output", required=True, type=Path, help="folder to make: data/raw/<dataset>")


def main(args: argparse.Namespace) -> None:
    source = entry("datasets", args.dataset)["source"]
    # Outlives a broken download. Its own, as data sets that share a file are fetched at once.
    partial = args.output.parent / f".{args.output.name}.{source['file']}.download"
    fetch(source, partial)
    try:
        with atomic_path(args.output) as temporary:
            if source["file"].endswith(".zip"):
                extract(partial, temporary)
            else:
                temporary.mkdir(parents=True)
                shutil.copyfile(partial, temporary / source["file"])
    finally:
        partial.unlink()


if __name__ == "__main__":
    run_step("download", __doc__, add_arguments, main)
