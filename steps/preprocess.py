"""Turn valid interactions into jagged sequences with contiguous ids, and describe them."""

import argparse
from pathlib import Path
from typing import Any

import polars as pl
from safetensors.numpy import save

from steps.common.cli import run_step
from steps.common.files import atomic_path, read_json, reading, sha256, write_json
from steps.common.params import entry
from steps.common.provenance import require_files
from steps.data.build import build_sequences, describe
from steps.data.features import build_features

_REMEDY = "run validate again"
_WRITTEN = {"sequences": "safetensors", "users": "parquet", "items": "parquet"}


def read_tables(valid: Path) -> tuple[dict[str, pl.DataFrame], dict[str, dict[str, Any]], dict[str, str]]:
    """The tables that validate wrote, interactions, items and users if there are any, by name; the features that they
    have, of a `user` and an `item`; and the SHA-256 of their files.

    Raises StepError if a file is not the one that validation.json describes.
    """
    source = valid / "validation.json"
    with reading(source, _REMEDY):
        validation = read_json(source, remedy=_REMEDY)
        hashes: dict[str, str] = validation["files"]
        wanted = {name: hashes[name] for name in ("interactions.parquet", "items.parquet")}
        wanted |= {name: hashes[name] for name in ("users.parquet",) if name in hashes}
    require_files(valid, wanted, source, _REMEDY)
    tables = {}
    for name in wanted:
        with reading(valid / name, _REMEDY):
            tables[Path(name).stem] = pl.read_parquet(valid / name)
    return tables, validation.get("features", {}), wanted


def write_sequences(
    interactions: pl.DataFrame,
    items: pl.DataFrame,
    output: Path,
    ties: str = "file-order",
    made_of: dict[str, str] | None = None,
    users: pl.DataFrame | None = None,
    features: dict[str, dict[str, Any]] | None = None,
) -> None:
    """Write `sequences.safetensors`, `users.parquet`, `items.parquet` and `manifest.json` into the folder `output`, and
    `features.safetensors` if there are features.

    made_of: the SHA-256 of the files that were read, for the manifest. features: what the tables `users` and `items`
    have of a `user` and an `item`, as params/datasets.yaml declares it.
    """
    tensors, with_sequences, catalogue = build_sequences(interactions, items, ties)
    ids = {"user": with_sequences["raw_id"], "item": catalogue["raw_id"]}
    tables = {"item": items} if users is None else {"user": users, "item": items}
    codes, vocabularies = build_features(features or {}, ids, tables)
    with atomic_path(output) as folder:
        folder.mkdir()
        (folder / "sequences.safetensors").write_bytes(save(tensors))
        with_sequences.write_parquet(folder / "users.parquet")
        catalogue.write_parquet(folder / "items.parquet")
        manifest = {
            "catalogue_items": len(catalogue),
            **describe(tensors, ties),
            **{f"{name}_sha256": sha256(folder / f"{name}.{kind}") for name, kind in _WRITTEN.items()},
            "made_of": made_of or {},
        }
        if codes:
            (folder / "features.safetensors").write_bytes(save(codes))
            manifest |= {"features": vocabularies, "features_sha256": sha256(folder / "features.safetensors")}
        write_json(folder / "manifest.json", manifest)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset", required=True, help="an entry of params/datasets.yaml")
    parser.add_argument("--valid", required=True, type=Path, help="folder that validate wrote")
    parser.add_argument("--output", required=True, type=Path, help="folder to make: data/processed/<dataset>")


def main(args: argparse.Namespace) -> None:
    tables, features, made_of = read_tables(args.valid)
    ties = entry("datasets", args.dataset)["ties"]
    write_sequences(**tables, output=args.output, ties=ties, made_of=made_of, features=features)


if __name__ == "__main__":
    run_step("preprocess", __doc__, add_arguments, main)
