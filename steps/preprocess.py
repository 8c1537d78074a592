"""Turn valid interactions into jagged sequences with contiguous ids, and describe them."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl
from safetensors.numpy import save

from steps.common.cli import run_step
from steps.common.files import atomic_path, read_json, reading, sha256, write_json
from steps.common.params import entry
from steps.common.provenance import require_files
from steps.data.build import NO_TIMES, ROWS_IN_MEMORY, TIES, build_sequences
from steps.data.features import build_features

_REMEDY = "run validate again"
_WRITTEN = {"sequences": "safetensors", "users": "parquet", "items": "parquet"}


def read_validation(valid: Path) -> dict[str, Any]:
    """What validate says of the tables that it wrote, with the SHA-256 of each under `files`.

    Raises StepError if a file is not the one that validation.json describes.
    """
    source = valid / "validation.json"
    with reading(source, _REMEDY):
        validation = read_json(source, remedy=_REMEDY)
        names = ("interactions.parquet", "items.parquet", "users.parquet")
        validation["files"] = {name: validation["files"][name] for name in names if name in validation["files"]}
    require_files(valid, validation["files"], source, _REMEDY)
    return validation


def write_sequences(
    valid: Path, validation: Mapping[str, Any], folder: Path, ties: str, rows_in_memory: int = ROWS_IN_MEMORY
) -> None:
    """Write `sequences.safetensors`, `users.parquet`, `items.parquet` and `manifest.json` into `folder`, and
    `features.safetensors` if there are features. `made_of.json` has the SHA-256 of the files that were read.

    ties: a key of `build.TIES`. rows_in_memory: how many interactions are sorted at once.
    """
    tables = {Path(name).stem: pl.scan_parquet(valid / name) for name in validation["files"]}
    log, items = tables["interactions"], tables["items"].collect()
    ticks = validation.get("ticks_per_second", 1)
    with_sequences, catalogue, counted = build_sequences(log, items, folder, ties, ticks, rows_in_memory)
    ids = {"user": with_sequences["raw_id"], "item": catalogue["raw_id"]}
    entities = {"item": items} | ({"user": tables["users"].collect()} if "users" in tables else {})
    codes, vocabularies = build_features(validation.get("features", {}), ids, entities)
    with_sequences.write_parquet(folder / "users.parquet")
    catalogue.write_parquet(folder / "items.parquet")
    rules: dict[str, Any] = {"ties": TIES[ties] if validation.get("has_times", True) else NO_TIMES}
    if validation.get("filters"):
        rules["filters"] = [made["rule"] for made in validation["filters"]]
    manifest = {
        "catalogue_items": len(catalogue),
        **counted,
        "rules": rules,
        **{f"{name}_sha256": sha256(folder / f"{name}.{kind}") for name, kind in _WRITTEN.items()},
    }
    if codes:
        (folder / "features.safetensors").write_bytes(save(codes))
        manifest |= {"features": vocabularies, "features_sha256": sha256(folder / "features.safetensors")}
    write_json(folder / "manifest.json", manifest)
    write_json(folder / "made_of.json", validation["files"])


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset", required=True, help="an entry of params/datasets.yaml")
    parser.add_argument("--valid", required=True, type=Path, help="folder that validate wrote")
    parser.add_argument("--output", required=True, type=Path, help="folder to make: data/processed/<dataset>")
    parser.add_argument(
        "--rows-in-memory",
        type=_count,
        default=ROWS_IN_MEMORY,
        help="interactions that are sorted at once, about 80 bytes each; of more, parts go through the disk",
    )


def main(args: argparse.Namespace) -> None:
    validation = read_validation(args.valid)
    ties = entry("datasets", args.dataset)["ties"]
    with atomic_path(args.output) as folder:
        folder.mkdir()
        write_sequences(args.valid, validation, folder, ties, args.rows_in_memory)


if __name__ == "__main__":
    run_step("preprocess", __doc__, add_arguments, main)
