"""Resolve one run of an experiment into its `config.json`, so that training needs no other parameter file.

It has the hashes of the rows that the run's protocol trains on and holds out. train and evaluate compare them with
their own split.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from steps.common.cli import run_step
from steps.common.files import read_json, reading, write_json
from steps.common.params import Run, resolve
from steps.common.provenance import require_files
from steps.data.split_hash import split_sha256


def read_arrays(data: Path) -> dict[str, np.ndarray]:
    """The sequences that preprocess wrote. Raises StepError if they are not those that its manifest describes."""
    manifest, remedy = data / "manifest.json", "run preprocess again"
    found: dict[str, Any] = read_json(manifest, remedy=remedy)
    require_files(data, {"sequences.safetensors": str(found.get("sequences_sha256"))}, manifest, remedy)
    with reading(data / "sequences.safetensors", remedy):
        return load_file(data / "sequences.safetensors")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--experiment", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--protocol", required=True)
    parser.add_argument("--seed", required=True, type=int)
    parser.add_argument("--data", required=True, type=Path, help="data/processed/<dataset>")
    parser.add_argument("--output", required=True, type=Path, help="config.json to write")


def main(args: argparse.Namespace) -> None:
    run = Run(args.experiment, args.dataset, args.model, args.protocol, args.seed)
    config = resolve(run)
    write_json(args.output, config | {"split": split_sha256(read_arrays(args.data), config["protocol"])})


if __name__ == "__main__":
    run_step("plan", __doc__, add_arguments, main)
