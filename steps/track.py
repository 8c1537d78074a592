"""Bring an experiment's finished runs into an MLflow store, to compare them in its UI.

The store is the file mlflow.db of this folder, or what MLFLOW_TRACKING_URI says. An experiment has a parent run, with
its tables and figures, and a run for each data set, row, protocol and seed below it. What is already there with the
same content is left alone; what changed is logged beside the earlier one, and marked as the newest.

If a server does not answer, that is said, and the output says `pending`: the same command brings the runs in later.
Committed records can be brought in too: --runs reports/<experiment>/records.
"""

import argparse
import sys
from pathlib import Path

from steps.common import params
from steps.common.cli import StepError, run_step
from steps.common.files import write_json
from steps.reporting.records import Record, read_records
from steps.tracking.runs import CARD, log_experiment
from steps.tracking.store import AwayError, experiment_of, opened, remove_unfinished, shown_uri, tracking_uri
from steps.tracking.views import set_views

REQUIRED = ("table.md", "table.csv", "runs.csv", "curves.svg", "comparisons.md", "comparisons.csv")
#: Attached where they are there.
OPTIONAL = (
    *("table.html", "details.md", "paper.md", "paper.html", "parity.md", "variants.csv", "beyond.csv"),
    *("intervals.csv", "intervals.svg", "groups.svg", "speed.svg", "curves.png", "intervals.png"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--experiment", required=True)
    parser.add_argument("--runs", required=True, type=Path, help="runs/<experiment> or reports/<experiment>/records")
    parser.add_argument("--reports", required=True, type=Path, help="the tables and figures to attach")
    parser.add_argument("--cards", type=Path, default=Path("reports/datasets"), help="the data sets' cards to attach")
    parser.add_argument("--data", type=Path, help="data/processed: register the models of runs that have weights")
    parser.add_argument("--output", required=True, type=Path, help="json to write: the MLflow id of every run")


def main(args: argparse.Namespace) -> None:
    missing = [name for name in REQUIRED if not (args.reports / name).is_file()]
    if missing:
        raise StepError(f"{args.reports} lacks {', '.join(missing)}; run tabulate and compare first")
    records, _ = read_records(args.experiment, args.runs)
    _point_at_missing_cards(records, args.cards)
    reports = [args.reports / name for name in (*REQUIRED, *OPTIONAL) if (args.reports / name).is_file()]
    uri = tracking_uri()
    made = {"store": shown_uri(uri), "experiment": args.experiment}
    try:
        with opened(uri) as client:
            experiment_id = experiment_of(client, uri, args.experiment)
            remove_unfinished(client, experiment_id, uri)
            parent, runs = log_experiment(client, experiment_id, records, reports, args.cards)
            models = {}
            if args.data:
                from steps.tracking.models import register  # it loads torch

                models = register(client, experiment_id, records, args.runs, args.data, runs)
            set_views(client, experiment_id, params.load(f"experiments/{args.experiment}")["title"], records)
    except AwayError as error:
        print(
            f"track: the MLflow server {shown_uri(uri)} does not answer; the runs of {args.experiment} are brought in "
            "when the same command or the pipeline runs again",
            file=sys.stderr,
        )
        write_json(args.output, made | {"pending": str(error), "runs": {}})
        return
    write_json(args.output, made | {"parent": parent, "runs": runs, "models": models})


def _point_at_missing_cards(records: list[Record], cards: Path) -> None:
    """Records can be tracked where their data are not to be had, and then without a card."""
    for dataset in dict.fromkeys(record.run.dataset for record in records):
        if not all((cards / dataset / name).is_file() for name in CARD):
            print(f"track: {cards / dataset} lacks its data card; to attach it, run card and track", file=sys.stderr)


if __name__ == "__main__":
    run_step("track", __doc__, add_arguments, main)
