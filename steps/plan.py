"""Resolve one run of an experiment into its `config.json`, so that training needs no other parameter file."""

import argparse
from pathlib import Path

from steps.common.cli import run_step
from steps.common.files import write_json
from steps.common.params import Run, resolve


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--experiment", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--protocol", required=True)
    parser.add_argument("--seed", required=True, type=int)
    parser.add_argument("--output", required=True, type=Path, help="config.json to write")


def main(args: argparse.Namespace) -> None:
    run = Run(args.experiment, args.dataset, args.model, args.protocol, args.seed)
    write_json(args.output, resolve(run))


if __name__ == "__main__":
    run_step("plan", __doc__, add_arguments, main)
