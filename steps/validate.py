"""Check raw interactions against the data set's rules and write them as typed tables.

Values are checked row by row. Then `filters` leave rows out, and what remains is counted and checked. All failures are
reported at once, with their rows; nothing is written unless every check passes. `validation.json` has the checks, what
every filter dropped, and `repeats`: the rows whose user had their item before.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

from steps.common.cli import StepError, run_step
from steps.common.files import atomic_path, read_json, reading, sha256, write_json
from steps.common.params import entry
from steps.common.provenance import require_files
from steps.data import filters
from steps.data.blocks import feature_columns, named_columns, paths, wanted_columns
from steps.data.log import Store, repeats
from steps.data.readers import read_blocks, read_table
from steps.data.schemas import EXAMPLES, Report, features_schema, interactions_schema, shown, ticks_of
from steps.data.values import TICKS, rating_of, typed

_ENTITIES = {"users": "user", "items": "item"}  # the tables beside the interactions, and the column of their ids
_LOG = ("row", "user", "item", "rating", "timestamp")
_WHOLE_ROW = "user, item"  # what is reported of whole rows
_YEAR_S = 366 * 86400


def write_valid(raw: Path, dataset: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Write `interactions.parquet`, `items.parquet`, and `users.parquet` if there is a users file, into `folder`.

    Interactions are in the order of the file, or files: row (of a later file counted on from the one before), user,
    item, timestamp (Int64, in ticks; 0 where the file has none), and rating (Float32) if the file has them, or levels.
    Without an items file the catalogue is the items that have interactions, and titles are empty. dataset: an entry of
    params/datasets.yaml.

    Returns what validation.json tells of them. Raises StepError that lists every failed check.
    """
    files, checks = dataset["files"], dataset["checks"]
    table, rules = files["interactions"], dataset.get("filters", [])
    logs = ", ".join(str(raw / path) for path in paths(table))
    report = Report()
    problems: list[str] = []
    tables = {
        name: _entities(raw, files[name], key, report, problems) for name, key in _ENTITIES.items() if name in files
    }
    store = Store(folder)
    log = _log(raw, table, checks, report, problems, store)
    log, tables = _with_same_ids(log, tables, store)
    counts = filters.tally(log)
    for name, known in tables.items():
        _check_known(log, known, name, report)
    counted = {"raw_rows": filters.size(counts)["rows"]}
    # Else what is wrong with counts is reported too.
    if (rules or not counted["raw_rows"]) and (problems or report.problems()):
        raise _refused(problems, report, logs)
    log, counts, items, dropped = filters.apply(log, [_in_ticks(rule, table) for rule in rules], counts, store)
    items = tables.get("items", items)
    counted |= filters.size(counts) | {"catalogue": len(items)}
    if not counted["rows"]:
        raise StepError(f"{logs}: filters leave none of {counted['raw_rows']} rows. Nothing was written")
    counted["repeats"] = _check_counts(log, counts, checks, report)
    problems += _unexpected(checks.get("expected", {}), counted)
    if problems or report.problems():
        raise _refused(problems, report, logs)
    store.path.rename(folder / "interactions.parquet")
    _write_entities(items, tables.get("users"), declared_features(files), folder)
    return {
        "rows": counted["rows"],
        "items": counted["catalogue"],
        **{key: counted[key] for key in ("repeats", "raw_rows")},
        "filters": [{**kept, "rule": rule} for kept, rule in zip(dropped, rules, strict=True)],
        "ticks_per_second": TICKS[table.get("time", "s")],
        "has_times": "timestamp" in named_columns(table),
        "checks": report.as_json,
        "features": declared_features(files),
    }


def declared_features(files: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The features of a `user` and an `item` that `files`, as in params/datasets.yaml, declares: kinds by column."""
    return {key: files.get(name, {}).get("features", {}) for name, key in _ENTITIES.items()}


def check_raw(raw: Path, files: Mapping[str, Any]) -> dict[str, str]:
    """The SHA-256 of the raw files that `files`, as in params/datasets.yaml, reads.

    Raises StepError if a file that download wrote is missing or has changed, or if it wrote no file of that name.
    """
    manifest = raw / "manifest.json"
    with reading(manifest, "delete the folder, and run download"):
        hashes: dict[str, str] = {**read_json(manifest, remedy="run download")["files"]}
    remedy = "delete the folder to fetch it again, or give edited data an entry of its own in params/datasets.yaml"
    require_files(raw, hashes, manifest, remedy)
    read = [path for table in files.values() for path in paths(table)]
    for path in read:
        if path not in hashes:
            known = ", ".join(sorted(hashes)[:EXAMPLES])
            raise StepError(
                f"{raw / path} is no file of the download ({manifest} has {known}); params/datasets.yaml names it; "
                "correct that"
            )
    return {path: hashes[path] for path in read}


def _entities(raw: Path, table: Mapping[str, Any], key: str, report: Report, problems: list[str]) -> pl.DataFrame:
    """An items or a users file: ids, titles and features."""
    features = table.get("features", {})
    block = read_table(raw, table)
    _add_malformed(block.malformed, raw, table, problems)
    frame = typed(block.frame, table)
    sources = {name: pl.col(source).alias(name) for name, source in feature_columns(features).items()}
    found = {
        name: source.str.extract(features[name]["pattern"]) if "pattern" in features[name] else source
        for name, source in sources.items()
    }
    texts = block.frame.with_columns(**sources)
    frame = frame.with_columns(**found)
    report.validate(frame.select(*features), features_schema(features), texts, str(raw / table["path"]))
    wrong = frame.select(pl.col(key).is_null() | pl.col(key).is_first_distinct().not_()).to_series()
    check = report.check(key, "there, and once in the file", str(raw / table["path"]))
    check.add(int(wrong.sum()), _examples(block.frame.filter(wrong), [key]))
    return frame


def _log(
    raw: Path, table: Mapping[str, Any], checks: Mapping[str, Any], report: Report, problems: list[str], store: Store
) -> pl.LazyFrame:
    """All interactions of the files, typed and checked row by row, on disk."""
    writer = store.writer()
    columns, levels = wanted_columns(table), table.get("levels", [])
    schema = interactions_schema(checks, table, columns)
    earliest, latest = sys.maxsize, -sys.maxsize
    last_row = 0
    for file in [{**table, "path": path} for path in paths(table)]:
        malformed, rows_before = [], last_row
        where = "" if len(paths(table)) == 1 else str(raw / file["path"])
        for block, frame in read_blocks(raw, file, lambda block: (block, typed(block.frame, table))):
            malformed += block.malformed
            report.validate(frame, schema, block.frame, where)
            if "rating" in columns and checks.get("missing_ratings"):
                _check_missing_are_empty(frame, block.frame, report.check("rating", "a number, or empty", where))
            if "timestamp" in columns:
                earliest = min(earliest, frame["timestamp"].min() or 0)  # type: ignore[assignment]
                latest = max(latest, frame["timestamp"].max() or 0)  # type: ignore[assignment]
            else:
                frame = frame.with_columns(timestamp=pl.lit(0, pl.Int64))
            if levels:
                frame = frame.with_columns(rating_of(levels))
            if "rating" in frame.columns:
                frame = frame.with_columns(pl.col("rating").cast(pl.Float32))
            if rows_before:
                frame = frame.with_columns(pl.col("row") + rows_before)
            last_row = max(last_row, frame["row"].max() or 0)  # type: ignore[assignment]
            writer.write(
                frame.select(name for name in ("row", "user", "item", "rating", "timestamp") if name in frame.columns)
            )
        _add_malformed(malformed, raw, file, problems)
    if "timestamp" in columns and "time" not in checks and not report.problems():
        _doubt_times(earliest, latest, table)
    return store.opened(writer)


def _doubt_times(earliest: int, latest: int, table: Mapping[str, Any]) -> None:
    """Warn where all times are in one year after 1970: seconds that are read as milliseconds are."""
    ticks = TICKS[table.get("time", "s")]
    if 0 <= earliest <= latest < _YEAR_S * ticks and ticks > 1:
        print(
            f"validate: {', '.join(paths(table))}: all times are in 1970, as `time: {table['time']}` reads them; "
            "set `time: s` if they are seconds",
            file=sys.stderr,
        )


def _check_missing_are_empty(frame: pl.DataFrame, texts: pl.DataFrame, check: Any) -> None:
    wrong = frame["rating"].is_null() & texts["rating"].is_not_null()
    check.add(int(wrong.sum()), _examples(texts.filter(wrong), ["rating"]))


def _add_malformed(lines: list[int], raw: Path, table: Mapping[str, Any], problems: list[str]) -> None:
    if lines:
        shown_lines = ", ".join(map(str, lines[:EXAMPLES])) + (", ..." if len(lines) > EXAMPLES else "")
        count = "1 line does" if len(lines) == 1 else f"{len(lines)} lines do"
        fields = f"{len(table['columns'])} fields" if isinstance(table["columns"], list) else "as many fields as line 1"
        problems.append(f"{raw / table['path']}: {count} not have {fields} (line {shown_lines})")


def _with_same_ids(
    log: pl.LazyFrame, tables: dict[str, pl.DataFrame], store: Store
) -> tuple[pl.LazyFrame, dict[str, pl.DataFrame]]:
    """The same with ids that are texts in all of them where they are in one."""
    texts, schema = [], log.collect_schema()
    for name, table in tables.items():
        key = _ENTITIES[name]
        if table[key].dtype != schema[key]:
            tables[name] = table.cast({key: pl.String})
            if schema[key] != pl.String:
                texts.append(key)
    return (store(log.cast(dict.fromkeys(texts, pl.String))) if texts else log), tables


def _check_known(log: pl.LazyFrame, known: pl.DataFrame, name: str, report: Report) -> None:
    """Every user or item of the log is in its file."""
    key = _ENTITIES[name]
    check = report.check(key, f"in the {name} file")
    unknown = log.select("row", key).drop_nulls(key).filter(pl.col(key).is_in(known[key].implode()).not_())
    number = int(unknown.select(pl.len()).collect().item())
    if number:
        check.add(number, _examples(unknown.sort("row").head(EXAMPLES).collect(), [key]))


def _check_counts(log: pl.LazyFrame, counts: filters.Tally, checks: Mapping[str, Any], report: Report) -> int:
    """Every user has enough rows, and no item twice where that is a rule. Returns how many rows repeat one."""
    least = checks["min_user_interactions"]
    check = report.check(_WHOLE_ROW, f"{least} rows or more per user")
    few = counts["user"].filter(pl.col("len") < least)
    if len(few):
        rows = filters.rows_of(log, "user", few).select("row", "user").sort("row").head(EXAMPLES)
        check.add(int(few["len"].sum()), _examples(rows.collect(), ["user"], named=True))
    again = repeats(log, filters.size(counts)["rows"])
    num_again = int(again.select(pl.len()).collect().item())
    if checks.get("unique_user_item"):
        check = report.check(_WHOLE_ROW, "once per user and item")
        check.add(num_again, _examples(again.head(EXAMPLES).collect(), ["user", "item"], named=True))
    return num_again


def _examples(rows: pl.DataFrame, columns: list[str], named: bool = False) -> list[tuple[int, str]]:
    return [
        (row["row"], ", ".join(f"{name} {shown(row[name])}" if named else shown(row[name]) for name in columns))
        for row in rows.head(EXAMPLES).iter_rows(named=True)
    ]


def _unexpected(expected: Mapping[str, int], counted: Mapping[str, int]) -> list[str]:
    """What the publisher says of the file, against what it has."""
    wrong = [f"{key} {counted[key]} (expected {number})" for key, number in expected.items() if counted[key] != number]
    return [f"the data are not the published ones: {', '.join(wrong)}"] if wrong else []


def _refused(problems: list[str], report: Report, log: str) -> StepError:
    """All that is wrong, in one line. log: the file, or files, of what is wrong with no other."""
    groups: dict[str, list[str]] = {}
    for check in report.checks.values():
        if check.failures:
            groups.setdefault(check.path or log, []).append(str(check))
    found = [*problems, *(f"{path}: {'; '.join(sentences)}" for path, sentences in groups.items())]
    return StepError(f"{'; '.join(found)}. Nothing was written; correct the file, or its entry in params/")


def _in_ticks(rule: dict[str, Any], table: Mapping[str, Any]) -> dict[str, Any]:
    if "time" not in rule:
        return rule
    return {"time": [ticks_of(bound, table.get("time", "s")) for bound in rule["time"]]}


def _write_entities(
    items: pl.DataFrame, users: pl.DataFrame | None, features: Mapping[str, Mapping[str, Any]], folder: Path
) -> None:
    if "title" not in items.columns:
        items = items.with_columns(title=pl.lit(""))
    items.select("item", "title", *features["item"]).write_parquet(folder / "items.parquet")
    if users is not None:
        users.select("user", *features["user"]).write_parquet(folder / "users.parquet")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset", required=True, help="an entry of params/datasets.yaml")
    parser.add_argument("--raw", required=True, type=Path, help="folder of raw files")
    parser.add_argument("--output", required=True, type=Path, help="folder to make: data/valid/<dataset>")


def main(args: argparse.Namespace) -> None:
    dataset = entry("datasets", args.dataset)
    raw_files = check_raw(args.raw, dataset["files"])
    with atomic_path(args.output) as folder:
        folder.mkdir()
        told = write_valid(args.raw, dataset, folder)
        files = {path.name: sha256(path) for path in sorted(folder.iterdir())}
        write_json(folder / "validation.json", told | {"files": files, "raw_files": raw_files})


if __name__ == "__main__":
    run_step("validate", __doc__, add_arguments, main)
