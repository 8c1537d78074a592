"""Check raw interactions against the data set's schema and write them as typed tables.

`validation.json` counts rows, and those whose user had their item before (`repeats`).

All failures are reported at once, with their rows; nothing is written unless every check passes.
"""

import argparse
from pathlib import Path
from typing import Any

import polars as pl

from steps.common.cli import StepError, run_step
from steps.common.files import atomic_path, read_json, reading, sha256, write_json
from steps.common.params import entry
from steps.common.provenance import require_files
from steps.data.readers import read_table, read_texts
from steps.data.schemas import describe, interactions_schema, validate


def read_valid(raw: Path, dataset: dict[str, Any]) -> tuple[pl.DataFrame, pl.DataFrame, list[dict[str, Any]]]:
    """The interactions and the catalogue of a data set, and the report of every check they passed.

    Without an items file the catalogue is the items that have interactions, and titles are empty.
    Raises StepError that lists every failed check with rows.
    """
    files = dataset["files"]
    _require(
        files, "interactions", ["user", "item", "timestamp", *(["rating"] if "rating" in dataset["checks"] else [])]
    )
    interactions, malformed = read_table(raw, files["interactions"])
    problems = [_wrong_fields(files["interactions"], malformed)] if malformed else []
    items = None
    if "items" in files:
        _require(files, "items", ["item"])
        items, malformed = read_table(raw, files["items"])
        if items["item"].dtype != interactions["item"].dtype:
            items, interactions = (table.cast({"item": pl.String}) for table in (items, interactions))
        if malformed:
            problems.append(_wrong_fields(files["items"], malformed))
        if items["item"].null_count() or items["item"].n_unique() < len(items):
            problems.append(f"{files['items']['path']}: an item id is missing or occurs twice")
    report = validate(interactions, interactions_schema(dataset["checks"], None if items is None else items["item"]))
    if any(check["failures"] for check in report):
        problems.append(describe(report, read_texts(raw, files["interactions"])))
    if problems:
        raise StepError(
            f"{raw / files['interactions']['path']}: {'; '.join(problems)}. Nothing was written; correct the file"
        )
    if items is None:
        items = interactions.select("item").unique().sort("item")
    if "title" not in items.columns:
        items = items.with_columns(title=pl.lit(""))
    return interactions, items.select("item", "title"), report


def check_raw(raw: Path, files: dict[str, Any]) -> dict[str, str]:
    """The SHA-256 of the raw files that `files`, as in params/datasets.yaml, reads.

    Raises StepError if a file that download wrote is missing or has changed, or if it wrote no file of that name.
    """
    manifest = raw / "manifest.json"
    with reading(manifest, "delete the folder, and run download"):
        hashes: dict[str, str] = read_json(manifest, remedy="run download")["files"]
    remedy = "delete the folder to fetch it again, or give edited data an entry of its own in params/datasets.yaml"
    require_files(raw, hashes, manifest, remedy)
    paths = [table["path"] for table in files.values()]
    for path in paths:
        if path not in hashes:
            raise StepError(
                f"{raw / path} is no file of the download ({manifest}); params/datasets.yaml names it; correct that"
            )
    return {path: hashes[path] for path in paths}


def _require(files: dict[str, Any], table: str, columns: list[str]) -> None:
    lacking = [name for name in columns if name not in files[table]["columns"]]
    if lacking:
        raise StepError(f"params/datasets.yaml: files.{table}.columns lacks {', '.join(lacking)}")


def _wrong_fields(table: dict[str, Any], lines: list[int]) -> str:
    shown = ", ".join(map(str, lines[:5])) + (", ..." if len(lines) > 5 else "")
    return f"{table['path']}: {len(lines)} lines do not have {len(table['columns'])} fields (line {shown})"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset", required=True, help="an entry of params/datasets.yaml")
    parser.add_argument("--raw", required=True, type=Path, help="folder of raw files")
    parser.add_argument("--output", required=True, type=Path, help="folder to make: data/valid/<dataset>")


def main(args: argparse.Namespace) -> None:
    dataset = entry("datasets", args.dataset)
    raw_files = check_raw(args.raw, dataset["files"])
    interactions, items, report = read_valid(args.raw, dataset)
    with atomic_path(args.output) as folder:
        folder.mkdir()
        interactions.write_parquet(folder / "interactions.parquet", compression="lz4")
        items.write_parquet(folder / "items.parquet")
        files = {path.name: sha256(path) for path in sorted(folder.iterdir())}
        repeats = len(interactions) - interactions.select("user", "item").n_unique()
        counts = {"rows": len(interactions), "items": len(items), "repeats": repeats}
        made = {"files": files, "raw_files": raw_files, "checks": report}
        write_json(folder / "validation.json", counts | made)


if __name__ == "__main__":
    run_step("validate", __doc__, add_arguments, main)
