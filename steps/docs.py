"""Write the README, and the pages of docs/ that hold figures, from their templates and the tables under reports/.

A template is Markdown with Jinja's `{{ ... }}`; what it can call is listed at `Figures`. A page is written whole:
change the template, not the page. A figure that no table has is an error: no page shows a number without source.
"""

import argparse
import json
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import polars as pl

from steps.common import params
from steps.common.cli import StepError, run_step
from steps.common.files import read_json, write_text
from steps.reporting.parity import half_over_seeds
from steps.reporting.records import cell
from steps.reporting.tables import markdown

#: A page by its template.
PAGES = {"README.md.j2": "README.md"} | {
    f"{name}.md.j2": f"docs/{name}.md" for name in ("results", "findings", "recommend")
}
_CALLED = (
    "recorded",
    "tables",
    "headline",
    "recommended",
    "metric",
    "lead",
    "published",
    "users",
    "longest",
    "verdicts",
    "study",
)  # by templates


class Figures:
    """What templates call. Every figure is read from the csv and md files that tabulate and compare write."""

    def __init__(self, reports: Path) -> None:
        self.reports = reports
        paper = params.load("paper")
        self.paper: dict[str, Any] = paper["public_datasets"]
        self._csv = cache(self._read)

    def recorded(self, experiment: str) -> bool:
        """Whether an experiment has tables: a template leaves out what it would say of one that was not run."""
        return (self.reports / experiment / "table.csv").is_file()

    def tables(self, experiment: str) -> str:
        """The titles and tables of an experiment's report, without its notes."""
        path = self.reports / experiment / "table.md"
        if not path.is_file():
            raise StepError(f"{path} does not exist; run tabulate first")
        lines = []
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("## "):
                lines += ["", f"**{line.removeprefix('## ')}**", ""]
            elif line.startswith("|"):
                lines.append(line)
        return "\n".join(lines).strip()

    def headline(self, experiment: str, dataset: str, protocols: list[str], metrics: list[str]) -> str:
        """A line a model: the metrics under each protocol, mean ± standard deviation over seeds, and as published."""
        of_experiment = self._csv(experiment, "table")
        models = list(dict.fromkeys(of_experiment.filter(pl.col("dataset") == dataset)["model"]))
        lines = []
        for model in models:
            line = [params.label(model)]
            for protocol in protocols:
                row = self._row(experiment, "table", dataset=dataset, protocol=protocol, model=model)
                line += [cell(row[f"test/{metric}"], row[f"test/{metric}/sd"]) for metric in metrics]
            published = self.paper.get(dataset, {}).get(model, {})
            lines.append([*line, *(f"{published[metric]:.4f}" if metric in published else "" for metric in metrics)])
        headers = [f"{name} {metric.upper()}" for name in [*protocols, "published"] for metric in metrics]
        return markdown(["model", *headers], lines)

    def recommended(self, experiment: str) -> dict[str, Any]:
        """An example that steps.recommend wrote: the `typed` titles in quotes, `top`, how many were asked for, the
        answer as a `table`, and as the `json` that a server gives."""
        (answer,) = read_json(self.reports / experiment / "recommendations.json", list)
        del answer["query"]
        found = answer["recommendations"]
        rows = [[rank, one["title"], f"{one['score']:.4f}"] for rank, one in enumerate(found, start=1)]
        return {
            "typed": [f'"{text}"' for text in answer["understood"]],
            "top": len(found),
            "table": markdown(["rank", "title", "score"], rows),
            "json": json.dumps({"predictions": [answer]}, indent=1),
        }

    def metric(self, experiment: str, dataset: str, protocol: str, model: str, name: str, part: str = "test") -> float:
        """A mean over seeds. part: test, valid, or test_best, the epoch that is best on test."""
        row = self._row(experiment, "table", dataset=dataset, protocol=protocol, model=model)
        return float(row[f"{part}/{name}"])

    def lead(self, experiment: str, dataset: str, protocol: str, model: str, other: str) -> dict[str, float]:
        """The model over the other in the compared metric: `difference`, its interval from `low` to `high`, corrected
        `p`, and `over_seeds`: half the difference's interval over seeds, infinite of one seed."""
        rows = self._csv(experiment, "comparisons").filter(dataset=dataset, protocol=protocol)
        for better, worse, sign in ((model, other, 1), (other, model, -1)):
            found = rows.filter(better=better, worse=worse)
            if len(found) == 1:
                low, high = sorted(sign * found[end].item() for end in ("low", "high"))
                half = half_over_seeds(found.row(0, named=True))
                lead = {"difference": sign * found["difference"].item(), "low": low, "high": high}
                return lead | {"p": found["p_holm"].item(), "over_seeds": half}
        raise StepError(f"{self.reports / experiment}/comparisons.csv does not compare {model} with {other}")

    def published(self, dataset: str, model: str, name: str) -> float:
        """The paper's figure."""
        return float(self.paper[dataset][model][name])

    def verdicts(self) -> dict[str, int]:
        """How many claims of the paper have each verdict."""
        path = self.reports / "claims.csv"
        if not path.is_file():
            raise StepError(f"{path} does not exist; run claims first")
        counts = pl.read_csv(path, columns=["verdict"])["verdict"].value_counts()
        return dict(counts.iter_rows())

    def study(self, name: str, **key: str) -> dict[str, Any]:
        """The only line of a study's table that has these values."""
        return self._row(f"studies/{name}", "table", **key)

    def users(self, experiment: str, dataset: str, protocol: str) -> int:
        """How many test users are compared."""
        rows = self._csv(experiment, "comparisons").filter(dataset=dataset, protocol=protocol)
        return int(rows["users"].first())  # type: ignore[arg-type]

    def longest(self, experiment: str, protocol: str) -> float:
        """Seconds of the longest training of a protocol, without its evaluations. Raises StepError if it has no run."""
        seconds = self._csv(experiment, "runs").filter(protocol=protocol)["train_seconds"]
        if seconds.is_empty():
            raise StepError(f"{self.reports / experiment}/runs.csv has no run of protocol {protocol}")
        return float(seconds.max())  # type: ignore[arg-type]

    def _row(self, experiment: str, table: str, **key: str) -> dict[str, Any]:
        rows = self._csv(experiment, table).filter(**key)
        if len(rows) != 1:
            raise StepError(f"{self.reports / experiment}/{table}.csv has {len(rows)} rows of {key}, where one belongs")
        return rows.row(0, named=True)

    def _read(self, experiment: str, table: str) -> pl.DataFrame:
        path = self.reports / experiment / f"{table}.csv"
        if not path.is_file():
            raise StepError(f"{path} does not exist; run tabulate and compare first")
        return pl.read_csv(path, infer_schema_length=None)


def p_value(value: float) -> str:
    """`p 1`, `p .004`, `p 2e-08`: two digits below .001."""
    if value >= 0.001:
        return "p 1" if value > 0.995 else f"p {value:.3f}".replace("0.", ".")
    return f"p {value:.0e}"


def render_page(template: Path, reports: Path) -> str:
    """The page that a template makes. Raises StepError that names the template if it asks for what is not there."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False)  # noqa: S701 - Markdown
    figures = Figures(reports)
    names = {name: getattr(figures, name) for name in _CALLED}
    environment.filters |= {"four": "{:.4f}".format, "signed": "{:+.4f}".format, "p": p_value}
    environment.filters["percent"] = lambda share: f"{share:.1%}".replace("%", " %")
    try:
        return environment.from_string(template.read_text(encoding="utf-8")).render(**names)
    except jinja2.TemplateError as error:
        raise StepError(f"{template}: {error}") from error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--templates", type=Path, default=Path("docs/templates"))
    parser.add_argument("--reports", type=Path, default=Path("reports"))
    parser.add_argument("--output", type=Path, default=Path(), help="the folder that has README.md and docs/")


def main(args: argparse.Namespace) -> None:
    pages = {page: render_page(args.templates / template, args.reports) for template, page in PAGES.items()}
    for page, text in pages.items():
        write_text(args.output / page, text)


if __name__ == "__main__":
    run_step("docs", __doc__, add_arguments, main)
