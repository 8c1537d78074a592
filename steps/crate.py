"""Write the RO-Crate of an experiment: its workflow, runs, tables and claims, for archives and machines to read.

With --repository instead, write the repository's own metadata: ro-crate-metadata.json and codemeta.json. Both are made
of committed files alone, and of the same files with the same bytes.
"""

import argparse
from pathlib import Path

from steps.common import params
from steps.common.cli import StepError, run_step
from steps.common.files import atomic_path, read_json, write_text
from steps.crates.claims import add_claims
from steps.crates.entities import read_project, text
from steps.crates.experiment import ExperimentCrate, workflow_files
from steps.crates.repository import codemeta_text, crate_text
from steps.reporting.records import read_records

METADATA = "ro-crate-metadata.json"
#: Of what tabulate and compare write, each table and figure in one form.
REPORTS = (
    *("table.md", "table.csv", "runs.csv", "details.md", "variants.csv", "beyond.csv", "curves.svg"),
    *("paper.md", "paper.csv", "comparisons.md", "comparisons.csv", "intervals.csv", "intervals.svg", "parity.md"),
)


def write_experiment(experiment: str, runs: Path, reports: Path, claims: Path | None, output: Path) -> None:
    """Write the crate of an experiment, a folder. Raises StepError if a table is missing or a claim is out of date."""
    records, _ = read_records(experiment, runs)
    missing = [name for name in REPORTS if not (reports / name).is_file()]
    if missing:
        raise StepError(f"{reports} lacks {', '.join(missing)}; run tabulate and compare first")
    title = params.load(f"experiments/{experiment}")["title"]
    made = ExperimentCrate(read_project(), experiment, title, records, workflow_files(Path()))
    made.add_reports({name: (reports / name).read_bytes() for name in REPORTS})
    crate = made.finish()
    if claims is not None:
        found = [
            claim for claim in read_json(claims, list, "run claims again") if claim.get("experiment") == experiment
        ]
        add_claims(crate, found, reports, claims)
    with atomic_path(output) as temporary:
        crate.write(temporary)
        (temporary / METADATA).write_text(text(crate), encoding="utf-8", newline="\n")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--experiment", help="an experiment of params/experiments/")
    what.add_argument("--repository", action="store_true", help="the repository's own metadata instead")
    parser.add_argument("--runs", type=Path, help="runs/<experiment> or reports/<experiment>/records")
    parser.add_argument("--reports", type=Path, help="what tabulate and compare wrote: reports/<experiment>")
    parser.add_argument("--claims", type=Path, help="verdicts on claims, decided from these reports (default: none)")
    parser.add_argument("--output", required=True, type=Path, help="folder to write; of the repository its top")


def main(args: argparse.Namespace) -> None:
    if args.repository:
        project = read_project()
        write_text(args.output / METADATA, crate_text(project, Path()))
        write_text(args.output / "codemeta.json", codemeta_text(project, Path()))
    elif args.runs is None or args.reports is None:
        raise StepError("--experiment needs --runs and --reports; name both")
    else:
        write_experiment(args.experiment, args.runs, args.reports, args.claims, args.output)


if __name__ == "__main__":
    run_step("crate", __doc__, add_arguments, main)
