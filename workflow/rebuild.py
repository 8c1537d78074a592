"""Rebuild the tables and figures of every committed record, the studies', claims, crates, and the pages that show them.

As steps do on their own, in one process a core: their imports take longer than most of them. `make tables` runs this.
"""

import argparse
import multiprocessing
import os
import runpy
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import polars as pl

REPORTS = Path("reports")


def is_compared_again(report: Path) -> bool:
    """Whether compare can read an experiment's records. Those of more test users than records keep have no outcomes:
    what compare made of the runs stays."""
    outcomes = pl.read_parquet(report / "records/runs.parquet").to_series(-1)
    return outcomes.null_count() < len(outcomes) or not (report / "comparisons.csv").is_file()


def stages() -> Iterator[list[list[str]]]:
    """Command lines of steps; those of a stage need what the stages before it made."""
    experiments = sorted(path.parent for path in REPORTS.glob("*/records"))
    studies = sorted(path.parent for path in REPORTS.glob("studies/*/rows.json"))
    of_experiments = {path: ["--experiment", path.name, "--runs", f"{path}/records"] for path in experiments}
    tables = [
        [step, *of, "--output", f"{path}"]
        for path, of in of_experiments.items()
        for step in ("tabulate", *(["compare"] if is_compared_again(path) else []))
    ]
    yield tables + [["report_study", "--study", path.name, "--output", f"{path}"] for path in studies]
    yield [["claims"]]
    claims = ["--claims", "reports/claims.json"]
    crates = [
        ["crate", *of, "--reports", f"{path}", *claims, "--output", f"{path}/crate"]
        for path, of in of_experiments.items()
    ]
    yield [*crates, ["crate", "--repository", "--output", "."], ["docs"]]


def run_step(command: list[str]) -> int:
    """Run one step in this process; its exit code."""
    sys.argv = command
    try:
        runpy.run_module(f"steps.{command[0]}", run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cores", type=int, default=os.cpu_count())
    cores = parser.parse_args().cores
    with ProcessPoolExecutor(cores, multiprocessing.get_context("spawn")) as workers:
        for commands in stages():
            if any(workers.map(run_step, commands)):  # the step has said what is wrong
                sys.exit(1)


if __name__ == "__main__":
    main()
