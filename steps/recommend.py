"""Recommend items with a trained run: for a user of its data, for titles that you type, or for a file of either.

Prints a table, or writes csv or json; or writes the run as a model that MLflow serves. A title need not be spelt as the
data has it; what it is taken for is printed. `id:` and an id name an item too. Made to be used by hand: no stage of the
pipeline. docs/recommend.md has the forms of files, and how the same is served over HTTP.
"""

import argparse
import csv
import io
import json
from pathlib import Path
from typing import Any

from tabulate import tabulate as render

from steps.common.cli import StepError, run_step
from steps.common.config import read_config
from steps.common.files import write_text
from steps.serving.forms import answer_of
from steps.serving.mlflow_model import save_model
from steps.serving.queries import Query, read_queries
from steps.serving.recommender import History
from steps.serving.run import Users, load_run
from steps.serving.titles import Catalogue

_LAST = 5  # items of a history that are printed


def queries_of(args: argparse.Namespace, catalogue: Catalogue, users: Users) -> list[Query]:
    """What the arguments ask for."""
    if args.input:
        return read_queries(args.input, catalogue, users)
    if args.user is not None:
        return [Query(args.user, users.history(args.user))]
    texts = args.history or [args.similar]
    items = [catalogue.find(text) for text in texts]
    return [Query("1", History(items), catalogue.understood(texts, items))]


def _table(answer: dict[str, Any]) -> str:
    rows = [[rank, one["title"], one["item"], one["score"]] for rank, one in _ranked(answer)]
    return render(rows, ["rank", "title", "id", "score"], floatfmt=".4f", disable_numparse=[1, 2])


def _ranked(answer: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    return list(enumerate(answer["recommendations"], start=1))


def _about(query: Query, catalogue: Catalogue) -> str:
    titles = [catalogue.name(item) for item in query.history.items]
    return f"{query.name}, {len(titles)} in the history: {'... ' * (len(titles) > _LAST)}{'; '.join(titles[-_LAST:])}"


def _csv(answers: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["query", "rank", "item", "title", "score"])
    for answer in answers:
        for rank, one in _ranked(answer):
            writer.writerow([answer["query"], rank, one["item"], one["title"], one["score"]])
    return text.getvalue()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--run", required=True, type=Path, help="a trained run: runs/<experiment>/<dataset>/<model>/<protocol>/seed-N"
    )
    parser.add_argument("--data", type=Path, help="default: data/processed/<the run's data set>")
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--user", metavar="ID", help="a user of the data, by the id that the raw data has")
    asked.add_argument("--history", nargs="+", metavar="TITLE", help="what somebody has seen, the latest last")
    asked.add_argument("--input", type=Path, metavar="FILE", help="csv, json or jsonl: many users or histories")
    asked.add_argument("--similar", metavar="TITLE", help="the items whose learnt embeddings are nearest to an item's")
    asked.add_argument("--save", type=Path, metavar="FOLDER", help="write the run as an MLflow model, to be served")
    parser.add_argument("--top", type=int, default=10, help="how many recommendations (default: 10)")
    parser.add_argument("--seen", action="store_true", help="items of the history may be recommended")
    parser.add_argument("--output", type=Path, metavar="FILE", help="csv or json to write, by its suffix")


def main(args: argparse.Namespace) -> None:
    if args.output and args.output.suffix not in (".csv", ".json"):
        raise StepError(f"--output {args.output}: .csv or .json, please")
    if args.top < 1:
        raise StepError(f"--top {args.top}: at least 1, please")
    if not args.run.is_dir():
        raise StepError(f"--run {args.run} does not exist; it is runs/<experiment>/<dataset>/<model>/<protocol>/seed-N")
    data = args.data or Path("data/processed", read_config(args.run)["dataset"])
    if not data.is_dir():
        raise StepError(f"{data} does not exist; run preprocess, or name the run's data with --data")
    if args.save:
        save_model(args.run, data, args.save)
        print(f"MLflow model in {args.save}")
        return
    recommender, users = load_run(args.run, data)
    catalogue = recommender.catalogue
    if args.top > len(catalogue):
        raise StepError(f"--top {args.top}: the data set has {len(catalogue)} items; ask for at most as many")
    queries = queries_of(args, catalogue, users)
    if args.similar:
        found = [recommender.similar(queries[0].history.items[0], args.top)]
    else:
        found = recommender.recommend([query.history for query in queries], args.top, args.seen)
    answers = [
        {"query": query.name} | answer_of(query.understood, scored, catalogue)
        for query, scored in zip(queries, found, strict=True)
    ]
    print(recommender.label)
    for query, answer in zip(queries, answers, strict=True):
        for text, title in query.understood.items():
            print(f"{text!r} is {title}")
        if args.output is None:
            about = _about(query, catalogue) if args.user or args.input else ""
            print(f"{about}\n{_table(answer)}")
    if args.output is None:
        return
    text = _csv(answers) if args.output.suffix == ".csv" else json.dumps(answers, indent=2, ensure_ascii=False) + "\n"
    write_text(args.output, text)
    print(f"recommendations for {len(answers)} in {args.output}")


if __name__ == "__main__":
    run_step("recommend", __doc__, add_arguments, main)
