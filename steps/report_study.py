"""Make the table and the figure of a study from its rows.

With --rows, rows measured on some machine are put into `rows.json` of the output first: they replace those of the same
case and device, and stand beside those of other devices. Then writes `table.md`, `table.csv` (a line a case), and
`figure` as svg and png, light and dark, of all rows that are there.
"""

import argparse
import importlib
from pathlib import Path

import polars as pl

from steps.common import params
from steps.common.cli import run_step
from steps.common.files import atomic_path, write_text
from steps.reporting.figures import save_figure
from steps.studies.rows import ORIGIN, merged, read_rows, write_rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--study", required=True, help="a file of params/studies/")
    parser.add_argument(
        "--rows", type=Path, help="rows to put beside those of the output: runs/studies/<study>/rows.json"
    )
    parser.add_argument("--output", required=True, type=Path, help="folder of the report: reports/studies/<study>")


def main(args: argparse.Namespace) -> None:
    study = params.load(f"studies/{args.study}")
    kept = args.output / "rows.json"
    rows = read_rows(kept, args.study) if kept.exists() or args.rows is None else []
    if args.rows is not None:
        new = read_rows(args.rows, args.study)
        rows = merged(rows, new)
        others = ", ".join(sorted({one["device"] for one in rows} - {one["device"] for one in new}))
        print(
            f"study {args.study}: {len(new)} rows of {new[0]['device']}"
            + (f", beside those of {others}" * bool(others))
        )
    module = importlib.import_module(f"steps.studies.{study['module']}_report")
    text, _, lines = module.report(rows, study)
    if args.rows is not None:
        write_rows(kept, args.study, rows)
    save_figure(lambda: module.report(rows, study)[1], args.output / "figure")
    with atomic_path(args.output / "table.csv") as temporary:
        table = pl.DataFrame([dict(line, versions=None) for line in lines], infer_schema_length=None)
        last = [name for name in ORIGIN if name in table.columns and name != "versions"]
        table.select(pl.exclude(ORIGIN), *last).write_csv(temporary)
    write_text(args.output / "table.md", text)


if __name__ == "__main__":
    run_step("report_study", __doc__, add_arguments, main)
