"""Look at a file of interactions, and print the entry of params/local/datasets.yaml that describes it.

The entry is inferred from the file's content: how it is written, which column is what, what validate may check.
Comments say what is doubtful; the same stands on stderr, a line each. Comments behind the entry name the next commands.
"""

import argparse
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from steps.common import params, yaml_files
from steps.common.cli import StepError, run_step
from steps.common.files import sha256
from steps.data.description.column_names import listed
from steps.data.description.entry_text import printable, written
from steps.data.description.inference import Doubt
from steps.data.description.opening import opened
from steps.data.description.proposal import Proposal, date_of, propose
from steps.data.description.tables import Log, entity_of, log_of, tables_of
from steps.data.values import TICKS

_ENTRIES = params.ROOT / params.LOCAL / "datasets.yaml"
_ENDINGS = re.compile(r"(\.(csv|tsv|txt|dat|data|json|jsonl|ndjson|parquet|inter|gz|zst|zip))+$", re.IGNORECASE)
_LENGTHS = (10, 20, 50, 100, 200)  # of windows
_SHARE = 0.9  # of users, whose interactions a window should hold
_LONGEST = 60  # characters of a name that a file gives


def describe(file: Path, items: Path | None, users: Path | None, name: str | None) -> tuple[str, list[Doubt]]:
    """The text that the step prints, and its doubts. items, users: files of their own."""
    name = _name(file, name)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sources = [file, *filter(None, (items, users))]
        tables = tables_of(opened(file, folder))
        log = log_of(tables, folder)
        rest = [table for table in tables if table.raw.path != log.table.raw.path]
        shown = str(log.table.raw.shown)
        proposal = propose(log.rows, log.times, log.share == 1, shown)
        files: dict[str, Any] = {"interactions": log.table.settings}
        doubts = [*log.table.doubts, *proposal.doubts]
        for table, own, key in (("items", items, "item"), ("users", users, "user")):
            candidates = tables_of(opened(own, folder)) if own else rest
            found, problems = entity_of(candidates, key, log.rows[key], folder)
            if own and not found and not problems:
                problems = [Doubt("files", f"{own} has no column of {key}s, each once, and is left out")]
            if found:
                files[table] = found.settings
                rest = [one for one in rest if one.raw.path != found.raw.path]
                doubts += found.doubts
            elif own:
                sources.remove(own)
            doubts += problems
        _check_paths(files)
        notes = proposal.notes | _notes(log, proposal)
        training, notes["training"] = _training(proposal, log.share)
        title = _ENDINGS.sub("", file.name) or file.name
        entry = {
            "title": title,
            "source": [_source(one) for one in sources] if len(sources) > 1 else _source(file),
            "files": files,
            "checks": proposal.checks,
            **({"filters": proposal.filters} if proposal.filters else {}),
            "ties": "file-order",
            **({"repeats": proposal.repeats} if proposal.repeats else {}),
            "training": training,
        }
    head = _head(log, proposal, sources)
    return head + written(name, entry, notes, doubts) + _next_steps(name, title), doubts


def _name(file: Path, name: str | None) -> str:
    """The name of the entry: the one that is wanted, else the file's, made to fit; none that another thing has."""
    taken = params.RESERVED | yaml_files.read(params.ROOT / "datasets.yaml").keys() | {*params.studies()}
    taken |= {one for one in params.experiments() if not params.is_local(one)}
    if name is not None:
        if not params.NAME.fullmatch(name):
            raise StepError(f"--name {name}: lower-case letters, digits, '+' and '-' make one, a letter or digit first")
        if name in taken:
            raise StepError(f"--name {name}: a data set, experiment, study or step is called so; choose another")
        return name
    stem = _ENDINGS.sub("", file.name).lower()
    name = re.sub(r"[^a-z0-9+]+", "-", stem).strip("-+")[:_LONGEST] or "data"
    return f"{name}-own" if name in taken else name


def _source(file: Path) -> dict[str, Any]:
    return {"file": file.name, "sha256": sha256(file), "mirrors": [str(Path(os.path.abspath(file)).parent)]}


def _check_paths(files: dict[str, Any]) -> None:
    paths = [table["path"] for table in files.values()]
    twice = next((path for path in paths if paths.count(path) > 1), None)
    if twice:
        raise StepError(f"two files are both called {twice} once they are unpacked; rename one")


def _notes(log: Log, proposal: Proposal) -> dict[str, str]:
    notes = {}
    if log.left_out:
        notes["files.interactions.columns"] = f"not read: {listed(log.left_out)}"
    if proposal.repeats is None:
        notes["checks.unique_user_item"] = "no user has an item twice"
    notes["ties"] = "of rows with equal times: file-order, item-id or shuffled"
    return notes


def _training(proposal: Proposal, share: float) -> tuple[dict[str, Any], str]:
    """The settings that params/trainings.yaml has for as many interactions, with a window as the lengths need it.
    share: of the file that was looked at; lengths show in all of it alone."""
    count = round(len(proposal.kept) / share)
    sizes = params.load("trainings")
    chosen = next(size for size in sizes if count < size.get("below", count + 1))
    needed = float(np.quantile(proposal.lengths, _SHARE))
    window = next((length for length in _LENGTHS if length >= needed), _LENGTHS[-1])
    note = f"params/trainings.yaml, for {count:,} interactions; 90 % of users have at most {needed:.0f}"
    if share < 1:
        return chosen["training"], f"params/trainings.yaml, for about {count:,} interactions"
    return chosen["training"] | {"max_len": min(window, chosen["training"]["max_len"])}, note


def _head(log: Log, proposal: Proposal, sources: list[Path]) -> str:
    rows = log.rows
    counted = f"{len(rows):,} rows, {rows['user'].n_unique():,} users, {rows['item'].n_unique():,} items"
    if log.times:
        low, high = (int(bound) / TICKS[log.times.unit] for bound in rows["timestamp"].sort()[[0, -1]])
        counted += f", {date_of(low)} to {date_of(high)}"
    lines = [f"# Made by `python -m steps.describe` from {listed(file.name for file in sources)}: {counted}."]
    kept = proposal.kept
    if len(kept) < len(rows):
        lines.append(
            f"# Behind the filters: {len(kept):,} rows, {len(proposal.lengths):,} users, "
            f"{kept['item'].n_unique():,} items with rows."
        )
    if log.share < 1:
        lines.append(f"# The file is large: counts are of its first {log.share:.0%}, and the rest may differ.")
    return "\n".join(lines) + "\n"


def _next_steps(name: str, title: str) -> str:
    experiment = {
        "title": f"{title}, a first look",
        "datasets": [name],
        "models": ["most-popular", "sasrec", "hstu"],
        "protocols": ["strict"],
        "seeds": [0, 1, 2],
    }
    there = _ENTRIES.is_file() and name in (yaml_files.read(_ENTRIES) or {})
    lines = [
        f"1. Put the entry above into {_ENTRIES}{', in place of that of its name' if there else ''}.",
        f"2. Put these lines, without #, into params/local/experiments/{name}.yaml:",
        *(f"     {key}: {yaml_files.flow(value)}" for key, value in experiment.items()),
        f"3. python -m steps.check --experiment {name}     # does all of it fit?",
        f"4. snakemake --cores 2 {name}                    # makes reports/{name}/",
        f"   or: make dvc, then dvc repro workflow/local/dvc.yaml:track@{name}",
    ]
    return "\n" + "".join(f"# {line}\n" for line in lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", type=Path, help="interactions: CSV and its like, JSON lines, Parquet; also .gz, .zst, .zip"
    )
    parser.add_argument("--items", type=Path, help="a file of items: ids, titles, genres")
    parser.add_argument("--users", type=Path, help="a file of users")
    parser.add_argument("--name", help="of the data set; absent: the file's")


def main(args: argparse.Namespace) -> None:
    text, doubts = describe(args.file, args.items, args.users, args.name)
    sys.stdout.write(text)
    for doubt in doubts:
        print(f"describe: DOUBT: {printable(doubt.text)}", file=sys.stderr)


if __name__ == "__main__":
    run_step("describe", __doc__, add_arguments, main)
