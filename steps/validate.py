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
from steps.data.schemas import describe, features_schema, interactions_schema, validate

_ENTITIES = {"users": "user", "items": "item"}  # the tables beside the interactions, and the column of their ids


def read_valid(
    raw: Path, dataset: dict[str, Any]
) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame | None, list[dict[str, Any]]]:
    """The interactions, the catalogue and the users of a data set, and the report of every check they passed.

    Without an items file the catalogue is the items that have interactions, and titles are empty. Without a users file
    there is no table of users. The columns of both are ids, titles and features.
    Raises StepError that lists every failed check with rows.
    """
    files = dataset["files"]
    _require(
        files, "interactions", ["user", "item", "timestamp", *(["rating"] if "rating" in dataset["checks"] else [])]
    )
    interactions, malformed = read_table(raw, files["interactions"])
    problems = [_wrong_fields(files["interactions"], malformed)] if malformed else []
    tables: dict[str, pl.DataFrame] = {}
    reports = {}
    for name, key in _ENTITIES.items():
        if name in files:
            features = files[name].get("features", {})
            _require(files, name, [key, *features])
            table, malformed = read_table(raw, files[name])
            if table[key].dtype != interactions[key].dtype:
                table, interactions = (part.cast({key: pl.String}) for part in (table, interactions))
            if malformed:
                problems.append(_wrong_fields(files[name], malformed))
            if table[key].null_count() or table[key].n_unique() < len(table):
                problems.append(f"{files[name]['path']}: an id of column {key} is missing or occurs twice")
            tables[name], reports[name] = table, validate(table, features_schema(features))
    known = {name: table[_ENTITIES[name]] for name, table in tables.items()}
    reports = {"interactions": validate(interactions, interactions_schema(dataset["checks"], known))} | reports
    for name, report in reports.items():
        if any(check["failures"] for check in report):
            problems.append(f"{files[name]['path']}: {describe(report, read_texts(raw, files[name]))}")
    if problems:
        raise StepError(f"{raw}: {'; '.join(problems)}. Nothing was written; correct the file")
    items = tables["items"] if "items" in tables else interactions.select("item").unique().sort("item")
    if "title" not in items.columns:
        items = items.with_columns(title=pl.lit(""))
    declared = declared_features(files)
    users = tables["users"].select("user", *declared["user"]) if "users" in tables else None
    items = items.select("item", "title", *declared["item"])
    return interactions, items, users, [check for report in reports.values() for check in report]


def declared_features(files: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The features of a `user` and an `item` that `files`, as in params/datasets.yaml, declares: kinds by column."""
    return {key: files.get(name, {}).get("features", {}) for name, key in _ENTITIES.items()}


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
    interactions, items, users, report = read_valid(args.raw, dataset)
    with atomic_path(args.output) as folder:
        folder.mkdir()
        interactions.write_parquet(folder / "interactions.parquet", compression="lz4")
        items.write_parquet(folder / "items.parquet")
        if users is not None:
            users.write_parquet(folder / "users.parquet")
        files = {path.name: sha256(path) for path in sorted(folder.iterdir())}
        repeats = len(interactions) - interactions.select("user", "item").n_unique()
        counts = {"rows": len(interactions), "items": len(items), "repeats": repeats}
        made = {"files": files, "raw_files": raw_files, "checks": report}
        write_json(folder / "validation.json", counts | made | {"features": declared_features(dataset["files"])})


if __name__ == "__main__":
    run_step("validate", __doc__, add_arguments, main)
