"""Resolve one run of an experiment into its `config.json`, so that training needs no other parameter file.

It has the hashes of the rows that the run's protocol trains on and holds out. train and evaluate compare them with
their own split.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from steps.common.cli import StepError, run_step
from steps.common.config import task_of
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


def require_ratings(dataset: str, arrays: dict[str, np.ndarray]) -> None:
    """Raise StepError if an interaction of a data set has no rating: ranking predicts all."""
    number, remedy = len(arrays["item"]), "take another data set, or protocols and models of retrieval"
    if "rating" not in arrays:
        raise StepError(f"ranking predicts ratings, and data set {dataset} has none: {remedy}")
    if missing := int(np.isnan(arrays["rating"]).sum()):
        raise StepError(
            f"ranking predicts ratings, and {missing} of {number} interactions of data set {dataset} have none: leave "
            f"out their rows (filter min_rating), {remedy}"
        )


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
    config, arrays = resolve(run), read_arrays(args.data)
    if task_of(config["protocol"]) == "ranking":
        require_ratings(run.dataset, arrays)
    write_json(args.output, config | {"split": split_sha256(arrays, config["protocol"])})


if __name__ == "__main__":
    run_step("plan", __doc__, add_arguments, main)
