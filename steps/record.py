"""Copy the small files of finished runs to reports/, where they are committed as evidence.

`tabulate --runs reports/<experiment>/records` rebuilds every table and figure from them, anywhere.
A run made from uncommitted code is refused: its numbers could not be traced.
"""

import argparse
import shutil
from pathlib import Path

from steps.common import params
from steps.common.cli import StepError, run_step
from steps.common.files import atomic_path
from steps.common.provenance import check_run

_FILES = ("config.json", "history.jsonl", "metrics.json", "ranks.safetensors")
_LARGEST = 1_000_000  # bytes of one file; larger ranks stay in runs/


def record(experiment: str, runs: Path, records: Path) -> list[Path]:
    """Copy every finished run of the experiment; returns the record folders.

    Raises StepError, before anything is copied, if a run names no clean commit or holds files of two.
    """
    finished = [run for run in params.runs(experiment) if (runs / run.path / "metrics.json").is_file()]
    if not finished:
        raise StepError(f"{runs} holds no finished run of experiment {experiment}")
    for run in finished:
        _, metrics = check_run(runs / run.path)
        commit = str(metrics.get("commit"))
        if len(commit) != 40:
            raise StepError(f"{runs / run.path} was made at commit {commit!r}; commit first, then train again")
    for run in finished:
        with atomic_path(records / run.path) as folder:
            folder.mkdir()
            for name in _FILES:
                source = runs / run.path / name
                if source.stat().st_size <= _LARGEST:
                    shutil.copyfile(source, folder / name)
    return [records / run.path for run in finished]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--experiment", required=True)
    parser.add_argument("--runs", required=True, type=Path, help="runs/<experiment>")
    parser.add_argument("--output", required=True, type=Path, help="reports/<experiment>/records")


def main(args: argparse.Namespace) -> None:
    folders = record(args.experiment, args.runs, args.output)
    print(f"{len(folders)} records in {args.output}")


if __name__ == "__main__":
    run_step("record", __doc__, add_arguments, main)
