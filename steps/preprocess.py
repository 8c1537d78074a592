"""Turn valid interactions into jagged sequences with contiguous ids, and describe them."""

import argparse
from pathlib import Path

import polars as pl
from safetensors.numpy import save

from steps.common.cli import run_step
from steps.common.files import atomic_path, read_json, reading, sha256, write_json
from steps.common.params import entry
from steps.common.provenance import require_files
from steps.data.build import build_sequences, describe

_REMEDY = "run validate again"
_WRITTEN = {"sequences": "safetensors", "users": "parquet", "items": "parquet"}


def read_tables(valid: Path) -> tuple[pl.DataFrame, pl.DataFrame, dict[str, str]]:
    """The interactions and the catalogue that validate wrote, and the SHA-256 of their files.

    Raises StepError if a file is not the one that validation.json describes.
    """
    source = valid / "validation.json"
    with reading(source, _REMEDY):
        hashes: dict[str, str] = read_json(source, remedy=_REMEDY)["files"]
        wanted = {name: hashes[name] for name in ("interactions.parquet", "items.parquet")}
    require_files(valid, wanted, source, _REMEDY)
    tables = []
    for name in wanted:
        with reading(valid / name, _REMEDY):
            tables.append(pl.read_parquet(valid / name))
    return tables[0], tables[1], wanted


def write_sequences(
    interactions: pl.DataFrame,
    items: pl.DataFrame,
    output: Path,
    ties: str = "file-order",
    made_of: dict[str, str] | None = None,
) -> None:
    """Write `sequences.safetensors`, `users.parquet`, `items.parquet` and `manifest.json` into the folder `output`.

    made_of: the SHA-256 of the files that were read, for the manifest.
    """
    tensors, users, catalogue = build_sequences(interactions, items, ties)
    with atomic_path(output) as folder:
        folder.mkdir()
        (folder / "sequences.safetensors").write_bytes(save(tensors))
        users.write_parquet(folder / "users.parquet")
        catalogue.write_parquet(folder / "items.parquet")
        manifest = {
            "catalogue_items": len(catalogue),
            **describe(tensors, ties),
            **{f"{name}_sha256": sha256(folder / f"{name}.{kind}") for name, kind in _WRITTEN.items()},
            "made_of": made_of or {},
        }
        write_json(folder / "manifest.json", manifest)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset", required=True, help="an entry of params/datasets.yaml")
    parser.add_argument("--valid", required=True, type=Path, help="folder that validate wrote")
    parser.add_argument("--output", required=True, type=Path, help="folder to make: data/processed/<dataset>")


def main(args: argparse.Namespace) -> None:
    interactions, items, made_of = read_tables(args.valid)
    write_sequences(interactions, items, args.output, entry("datasets", args.dataset)["ties"], made_of)


if __name__ == "__main__":
    run_step("preprocess", __doc__, add_arguments, main)
