"""Turn valid interactions into jagged sequences with contiguous ids, and describe their split."""

import argparse
from pathlib import Path

import polars as pl
from safetensors.numpy import save

from steps.common.cli import run_step
from steps.common.files import atomic_path, sha256, write_json
from steps.common.params import entry
from steps.data.splits import build_sequences, describe_split


def write_sequences(interactions: pl.DataFrame, items: pl.DataFrame, output: Path, ties: str = "file-order") -> None:
    """Write `sequences.safetensors`, `users.parquet`, `items.parquet` and `manifest.json` into the folder `output`."""
    tensors, users, catalogue = build_sequences(interactions, items, ties)
    with atomic_path(output) as folder:
        folder.mkdir()
        (folder / "sequences.safetensors").write_bytes(save(tensors))
        users.write_parquet(folder / "users.parquet")
        catalogue.write_parquet(folder / "items.parquet")
        manifest = {
            "catalogue_items": len(catalogue),
            **describe_split(tensors, ties),
            "sequences_sha256": sha256(folder / "sequences.safetensors"),
        }
        write_json(folder / "manifest.json", manifest)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset", required=True, help="an entry of params/datasets.yaml")
    parser.add_argument("--valid", required=True, type=Path, help="folder that validate wrote")
    parser.add_argument("--output", required=True, type=Path, help="folder to make: data/processed/<dataset>")


def main(args: argparse.Namespace) -> None:
    interactions = pl.read_parquet(args.valid / "interactions.parquet")
    ties = entry("datasets", args.dataset)["ties"]
    write_sequences(interactions, pl.read_parquet(args.valid / "items.parquet"), args.output, ties)


if __name__ == "__main__":
    run_step("preprocess", __doc__, add_arguments, main)
