"""Describe a data set: a page, the same numbers as JSON, and Croissant metadata of its validated tables.

`card.json` has the SHA-256 of the two others. What is computed is of the processed sequences, which are read block by
block.
"""

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

from steps.cards.croissant import describe
from steps.cards.figures import draw
from steps.cards.numbers import map_tensors, measure
from steps.cards.page import render
from steps.common.cli import StepError, run_step
from steps.common.datasets import STATED
from steps.common.files import read_json, sha256, write_text
from steps.common.params import entry
from steps.common.provenance import require_files

_OF_MANIFEST = {"sequences": "safetensors", "features": "safetensors", "items": "parquet", "users": "parquet"}
_TABLES = ("interactions", "items", "users")
_TIES = ("share_of_rows_tied_with_the_row_before", "share_of_users_with_tied_target")


def describe_dataset(name: str, raw: Path, valid: Path, processed: Path) -> dict[str, Any]:
    """The content of card.json, but for the files beside it.

    Raises StepError if the folders do not belong to one another, or if a file is not the one that its folder describes.
    """
    dataset = entry("datasets", name)
    validation, fetched = read_json(valid / "validation.json"), read_json(raw / "manifest.json", remedy="run download")
    manifest = read_json(processed / "manifest.json", remedy="run preprocess")
    made = {f"{stem}.{kind}": f"{stem}_sha256" for stem, kind in _OF_MANIFEST.items() if f"{stem}_sha256" in manifest}
    hashes = {
        "raw": validation["raw_files"],
        "valid": validation["files"],
        "processed": {file: manifest[key] for file, key in made.items()},
    }
    if any(fetched["files"].get(file) != digest for file, digest in hashes["raw"].items()):
        raise StepError(f"{valid / 'validation.json'} is not of the files in {raw}; run validate again")
    if read_json(processed / "made_of.json") != hashes["valid"]:
        raise StepError(f"{processed / 'manifest.json'} is not of the tables in {valid}; run preprocess again")
    require_files(valid, hashes["valid"], valid / "validation.json", "run validate again")
    require_files(processed, hashes["processed"], processed / "manifest.json", "run preprocess again")
    tensors = map_tensors(processed / "sequences.safetensors")
    ties = {"rule": manifest["rules"]["ties"]}
    if validation["has_times"]:
        ties |= {key: manifest[key] for key in _TIES}
    folders = {"raw": raw, "valid": valid, "processed": processed}
    return {
        "dataset": name,
        "title": dataset["title"],
        **{key: dataset[key] for key in ("variant_of", *STATED) if key in dataset},
        "generated": "synthesize" in dataset,
        **measure(tensors, manifest["catalogue_items"], validation["has_times"]),
        "features": {
            kind: {feature: len(values) for feature, values in found.items()}
            for kind, found in manifest.get("features", {}).items()
        },
        "rows": {
            "raw": validation["raw_rows"],
            "kept": validation["rows"],
            "repeats": validation["repeats"],
            "filters": validation["filters"],
        },
        "ties": ties,
        "checks": [{key: check[key] for key in ("column", "check")} for check in validation["checks"]],
        "sources": _sources(dataset["source"], fetched["sources"]),
        "files": {
            kind: {
                file: {"bytes": (folders[kind] / file).stat().st_size, "sha256": digest}
                for file, digest in found.items()
            }
            for kind, found in hashes.items()
        },
    }


def _sources(declared: Any, fetched: list[dict[str, str]]) -> list[dict[str, str]]:
    """What was downloaded; and from where, if its publisher has an address on the web."""
    sources = declared if isinstance(declared, list) else [declared]
    publishers = {source["file"]: source.get("publisher", "") for source in sources}
    found = []
    for source in fetched:
        file, publisher = source["file"], publishers.get(source["file"], "")
        about = {"file": file, "sha256": source["sha256"]}
        if publisher.startswith(("http://", "https://")):
            about["url"] = publisher if publisher.endswith(file) else f"{publisher.rstrip('/')}/{file}"
        found.append(about)
    return found


def _columns(path: Path) -> dict[str, str]:
    """The columns of a table: whether they are `integer`, `number` or `text`."""

    def kind(column: Any) -> str:
        return "integer" if column.is_integer() else "number" if column.is_float() else "text"

    return {name: kind(column) for name, column in pl.read_parquet_schema(path).items()}


def _text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset", required=True, help="an entry of params/datasets.yaml")
    parser.add_argument("--raw", required=True, type=Path, help="folder that download wrote")
    parser.add_argument("--valid", required=True, type=Path, help="folder that validate wrote")
    parser.add_argument("--processed", required=True, type=Path, help="folder that preprocess wrote")
    parser.add_argument("--output", required=True, type=Path, help="folder for the card: reports/datasets/<dataset>")


def main(args: argparse.Namespace) -> None:
    card = describe_dataset(args.dataset, args.raw, args.valid, args.processed)
    written = card["files"]["valid"]
    tables = {name: _columns(args.valid / f"{name}.parquet") for name in _TABLES if f"{name}.parquet" in written}
    folder = Path(os.path.relpath(args.valid, args.output)).as_posix()
    ticks = read_json(args.valid / "validation.json")["ticks_per_second"]
    write_text(args.output / "croissant.json", _text(describe(card, tables, folder, ticks)))
    write_text(args.output / "card.html", render(card, draw(card)))
    beside = {name: sha256(args.output / name) for name in ("card.html", "croissant.json")}
    write_text(args.output / "card.json", _text(card | {"beside": beside}))


if __name__ == "__main__":
    run_step("card", __doc__, add_arguments, main)
