"""Print where MLflow's UI compares the runs that the store has, and how to bring in those that it lacks."""

import argparse
from pathlib import Path

from steps.common import params
from steps.common.cli import StepError, run_step
from steps.reporting.records import RUNS
from steps.tracking.store import AwayError, is_server, opened, shown_uri, tracking_uri
from steps.tracking.views import addresses

_REPORTS = Path("reports")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--address", required=True, help="where the UI of mlflow.db is, such as http://127.0.0.1:5000")


def main(args: argparse.Namespace) -> None:
    uri = tracking_uri()
    base = uri.rstrip("/") if is_server(uri) else args.address
    try:
        with opened(uri) as client:
            there = {one.name: one for one in client.search_experiments()}
            for name in params.experiments():
                if name in there:
                    print(f"{name}: {params.load(f'experiments/{name}')['title']}")
                    for what, address in addresses(client, base, there[name]).items():
                        print(f"  {what}\n    {address}")
    except AwayError as error:
        raise StepError(
            f"the MLflow server {shown_uri(uri)} does not answer; start it, or correct the address"
        ) from error
    lacking = [name for name in params.experiments() if name not in there and _is_recorded(name)]
    if lacking:
        print("Committed records that the store lacks, and how to bring them in:")
        for name in lacking:
            print(f"  make track EXPERIMENT={name}")


def _is_recorded(experiment: str) -> bool:
    """Whether the experiment has committed records, and the tables that are tracked with them."""
    folder = _REPORTS / experiment
    return (folder / "records" / RUNS).is_file() and (folder / "table.md").is_file()


if __name__ == "__main__":
    run_step("ui", __doc__, add_arguments, main)
