"""Make the archive of a generated data set, the same bytes on every machine."""

import argparse
from pathlib import Path
from typing import Any

from steps.common.cli import StepError, run_step
from steps.common.files import atomic_path
from steps.common.params import entry
from steps.data.generators import generator


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset", required=True, help="an entry of params/datasets.yaml with `synthesize`")
    parser.add_argument("--output", required=True, type=Path, help="archive to write")


def main(args: argparse.Namespace) -> None:
    settings: dict[str, Any] | None = entry("datasets", args.dataset).get("synthesize")
    if settings is None:
        raise StepError(f"params/datasets.yaml, entry {args.dataset}: no key synthesize")
    try:
        chosen = generator(**settings)
    except ValueError as error:
        raise StepError(f"params/datasets.yaml, key {args.dataset}.synthesize: {error}") from error
    with atomic_path(args.output) as temporary:
        chosen.write(temporary)


if __name__ == "__main__":
    run_step("synthesize", __doc__, add_arguments, main)
