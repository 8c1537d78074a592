"""Verdicts on the paper's claims, from the tables under reports/."""

import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import polars as pl

from steps.common import params
from steps.common.cli import StepError
from steps.common.files import sha256
from steps.common.paired import student
from steps.reporting.parity import certainty, decided, half_over_seeds, side
from steps.reporting.task import load_task

#: What a verdict means, in the order of the summary.
VERDICTS = {
    "reproduced": "ours is what is claimed, within the band or the interval",
    "higher": "ours is above what is claimed",
    "lower": "ours is below what is claimed",
    "partly": "it holds in some of the tables",
    "contradicted": "it holds in no table, and its opposite in some",
    "not decided": "our interval allows it and its opposite",
    "not run": "public data can test it, and no run here does yet",
    "not testable": "public data cannot test it",
}

#: The folder of studies below reports/ and params/.
STUDIES = "studies"
#: Columns of studies' tables that say which of several rows one is.
_AXES = ("n", "alpha")
_CONFIDENCE = 95  # percent, of intervals over seeds


@dataclass(frozen=True)
class Verdict:
    """A row of the claims' table.

    claim: its key, with the model and metric where it is one of several. experiment: whose tables decide it, or
    `studies/<name>`; None where none can. ours, low, high: our figure and its interval; published: theirs. files:
    SHA-256 of what decided it.
    """

    claim: str
    text: str
    place: str
    verdict: str
    experiment: str | None = None
    ours: float | None = None
    low: float | None = None
    high: float | None = None
    published: float | None = None
    share: bool = False  # whether the figures are gains, as shares
    why: str = ""
    explained: tuple[str, str] | None = None
    files: dict[str, str] = field(default_factory=dict)

    def content(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


class Tables:
    """The csv files of experiments and studies under `reports`, and the published figures."""

    def __init__(self, reports: Path) -> None:
        self.reports = reports
        paper = params.load("paper")
        self.paper: dict[str, Any] = paper["public_datasets"]
        self.efficiency: dict[str, Any] = paper["efficiency"]
        self.read = cache(self._read)

    def row(self, experiment: str, table: str, **key: str) -> dict[str, Any] | None:
        """The one row of a table with these values, None where the experiment was not run; StepError if it lacks it."""
        rows = self.read(experiment, table)
        if rows is None:
            return None
        found = rows.filter(**key)
        if len(found) != 1:
            raise StepError(
                f"{self.path(experiment, table)} has {len(found)} rows of {key}, where params/claims.yaml wants one; "
                "correct the claim, or run the experiment whole"
            )
        return found.row(0, named=True)

    def path(self, experiment: str, table: str) -> Path:
        """Of a table, which need not be there."""
        return self.reports / experiment / f"{table}.csv"

    def files(self, *tables: tuple[str, str]) -> dict[str, str]:
        """SHA-256 of the files of (experiment, table), by their path below the reports' parent."""
        paths = sorted({self.path(*table) for table in tables})
        return {f"{self.reports.name}/{path.relative_to(self.reports).as_posix()}": sha256(path) for path in paths}

    def _read(self, experiment: str, table: str) -> pl.DataFrame | None:
        path = self.path(experiment, table)
        return pl.read_csv(path, infer_schema_length=None) if path.is_file() else None


def decide(reports: Path) -> list[Verdict]:
    """The verdict on every claim of params/claims.yaml, in its order."""
    settings, tables = params.load("claims"), Tables(reports)
    for name, claim in settings["claims"].items():
        _check(f"params/claims.yaml, key claims.{name}", claim, tables)
    return [
        verdict for name, claim in settings["claims"].items() for verdict in _of(name, claim, settings["band"], tables)
    ]


def _check(where: str, claim: dict[str, Any], tables: Tables) -> None:
    """Raise StepError if a claim names a study, a row or a figure that is not there."""
    if about := claim.get("study") or claim.get("runs") or claim.get("decided"):
        params.load(f"{STUDIES}/{about['table']}")
    if "study" in claim:
        _published(where, claim["study"]["published"], tables)
    asked = claim.get("figures") or claim.get("gains")
    for model in asked["models"] if asked else claim.get("order", {}).get("rows", []):
        params.entry("models", model)
    if asked:
        try:
            claim["text"].format(model="", metric="")
        except (KeyError, IndexError, ValueError) as error:
            raise StepError(f"{where}.text: {{model}} and {{metric}} are all that it can name ({error})") from error
        published = tables.paper.get(asked["table"][1], {})
        for model in asked["models"]:
            for metric in asked["metrics"]:
                if metric not in published.get(model, {}):
                    raise StepError(
                        f"{where}: params/paper.yaml has no {metric} of {model} on {asked['table'][1]}; add the "
                        "published figure, or leave it out of the claim"
                    )


@dataclass(frozen=True)
class _Row:
    """A figure that is claimed: of a table (experiment, data set, protocol). gain: over the baseline."""

    table: tuple[str, str, str]
    model: str
    metric: str
    gain: bool


def _of(name: str, claim: dict[str, Any], band: float, tables: Tables) -> Iterator[Verdict]:
    explained = tuple(claim["explained"]) if "explained" in claim else None
    told: dict[str, Any] = {"text": claim["text"], "place": claim["place"], "explained": explained}
    if "why" in claim:
        yield Verdict(name, verdict="not run" if claim.get("open") else "not testable", why=claim["why"], **told)
    elif "order" in claim:
        yield _order(name, told, claim["order"], tables)
    elif "study" in claim:
        yield _study(name, told, claim["study"], band, tables)
    elif "runs" in claim:
        yield _runs(name, told, claim["runs"], band, tables)
    elif "decided" in claim:
        yield _decided(name, told, claim["decided"], tables)
    else:
        asked = claim.get("figures") or claim["gains"]
        for model in asked["models"]:
            for metric in asked["metrics"]:
                told["text"] = claim["text"].format(model=params.label(model), metric=metric.upper())
                row = _Row(tuple(asked["table"]), model, metric, "gains" in claim)
                yield _figure(f"{name}/{model}/{metric}", told, row, band, tables)


def _figure(name: str, told: dict[str, Any], row: _Row, band: float, tables: Tables) -> Verdict:
    """Ours beside the published figure, or gain, of a model."""
    experiment, dataset, protocol = row.table
    published = tables.paper[dataset][row.model][row.metric]
    if row.gain:
        published = round(published / tables.paper[dataset][load_task().baseline][row.metric] - 1, 6)
    told = told | {"experiment": experiment, "published": published, "share": row.gain}
    key = {"dataset": dataset, "protocol": protocol, "model": row.model, "metric": row.metric}
    found = tables.row(experiment, "intervals", **key)
    if found is None:
        return Verdict(name, verdict="not run", why=_not_run(experiment), **told | {"explained": None})
    ours, low, high = (
        found[part] for part in (("gain", "gain_low", "gain_high") if row.gain else ("mean", "low", "high"))
    )
    inside = low <= published <= high
    where = "higher" if ours > published else "lower"
    if row.gain:
        verdict, why = "reproduced" if inside else where, ""
    else:
        within = side(ours, published, band) == "within"
        verdict = "reproduced" if within else "not decided" if inside else where
        why = f"{ours / published:.3f} of the published figure"
    if verdict != where:  # nothing is to be explained
        told["explained"] = None
    files = tables.files((experiment, "intervals"))
    return Verdict(name, verdict=verdict, ours=ours, low=low, high=high, why=why, files=files, **told)


def _study(name: str, told: dict[str, Any], claimed: dict[str, Any], band: float, tables: Tables) -> Verdict:
    """A figure of a study, the greatest of the rows that are meant, beside the published one."""
    study, column, meant = f"{STUDIES}/{claimed['table']}", claimed["column"], claimed["rows"]
    where, path = f"params/claims.yaml, key claims.{name}", tables.path(study, "table")
    published = _published(where, claimed["published"], tables)
    told = told | {"experiment": study, "published": published}
    rows = tables.read(study, "table")
    why = _not_measured(claimed["table"], rows)
    not_run = Verdict(name, verdict="not run", why=why, **told | {"explained": None})
    if rows is None:
        return not_run
    missing = [key for key in (*meant, column) if key not in rows.columns]
    if missing:
        raise StepError(f"{path} has no column {missing[0]!r}, which {where} names")
    found = rows.filter(**meant).drop_nulls(column)
    if found.is_empty():  # the study was measured in part
        return not_run
    ours = float(found[column].max())
    within = ours >= published if claimed.get("at_least") else side(ours, published, band) == "within"
    verdict = "reproduced" if within else "higher" if ours > published else "lower"
    if within:
        told["explained"] = None
    best = found.filter(pl.col(column) == ours).row(0, named=True)
    several = [key for key in found.columns if key in _AXES and key not in meant and found[key].n_unique() > 1]
    why = f"{ours / published:.3f} of the published figure, on {best['device']}"
    why += "".join(f", {key} {best[key]}" for key in several)
    return Verdict(name, verdict=verdict, ours=ours, why=why, files=tables.files((study, "table")), **told)


def _runs(name: str, told: dict[str, Any], claimed: dict[str, Any], band: float, tables: Tables) -> Verdict:
    """Whether runs of a study are above others, paired by seed, in every place, some or none; or no lower than those by
    more than the band."""
    study, column = f"{STUDIES}/{claimed['table']}", claimed["column"]
    path, where = tables.path(study, "table"), f"params/claims.yaml, key claims.{name}"
    told = told | {"experiment": study}
    rows, found, said = tables.read(study, "table"), [], []
    not_run = _not_measured(claimed["table"], rows)
    if rows is None:
        return Verdict(name, verdict="not run", why=not_run, **told | {"explained": None})
    for place in claimed["places"]:
        named = [*place, *claimed["rows"][0], *claimed["rows"][1], column, "seed", "device"]
        missing = [key for key in named if key not in rows.columns]
        if missing:
            raise StepError(f"{path} has no column {missing[0]!r}, which {where} names")
        first, second = (rows.filter(**place, **meant).drop_nulls([column, "seed"]) for meant in claimed["rows"])
        pairs = first.join(second, on=["seed", "device"], suffix=", other")
        words = ", ".join(map(str, place.values()))
        if pairs.is_empty():
            said.append(f"{words}: {not_run}")
            continue
        other = statistics.fmean(pairs[f"{column}, other"].to_list())
        mean, half = student((pairs[column] - pairs[f"{column}, other"]).to_list(), _CONFIDENCE)
        margin = band * other if claimed.get("no_lower") else 0.0
        sign = 1 if mean - half > -margin else -1 if mean + half < -margin else 0
        found.append(sign)
        doubt = "" if sign else ", not decided"
        said.append(f"{words} {mean:+.4f} ± {half:.4f} beside {other:.4f}{doubt}")
    verdict = _of_signs(found, len(claimed["places"]))
    if verdict == "reproduced":
        told = told | {"explained": None}
    return Verdict(name, verdict=verdict, why="; ".join(said), files=tables.files((study, "table")), **told)


def _decided(name: str, told: dict[str, Any], claimed: dict[str, Any], tables: Tables) -> Verdict:
    """What a study's report says of a claim: whether it `holds` in every place, some or none, and its `words`."""
    study = f"{STUDIES}/{claimed['table']}"
    told = told | {"experiment": study}
    rows, found, said = tables.read(study, "table"), [], []
    not_run = _not_measured(claimed["table"], rows)
    if rows is None:
        return Verdict(name, verdict="not run", why=not_run, **told | {"explained": None})
    for place in claimed["places"]:
        meant = place | claimed["rows"]
        missing = {*meant, "holds", "words"} - set(rows.columns)
        lines = rows.filter(**meant).drop_nulls("holds") if not missing else rows.clear()
        words = ", ".join(map(str, place.values()))
        if lines.is_empty():  # the study was measured in part
            said.append(f"{words}: {not_run}")
            continue
        signs = set(lines["holds"].to_list())  # one for each device
        found.append(signs.pop() if len(signs) == 1 else 0)
        doubt = "" if found[-1] else ", not decided"
        said += [f"{words}: {line}{doubt}" for line in lines["words"].to_list()]
    verdict = _of_signs(found, len(claimed["places"]))
    if verdict == "reproduced":
        told = told | {"explained": None}
    return Verdict(name, verdict=verdict, why="; ".join(said), files=tables.files((study, "table")), **told)


def _published(where: str, keys: list[str | int], tables: Tables) -> float:
    """The figure that keys lead to from `efficiency` of params/paper.yaml."""
    found: Any = tables.efficiency
    for key in keys:
        try:
            found = found[key]
        except (KeyError, IndexError, TypeError):
            found = None
    if isinstance(found, bool) or not isinstance(found, int | float):
        words = " ".join(map(str, keys))
        raise StepError(f"{where}.study.published: params/paper.yaml has no figure efficiency {words}; add it")
    return float(found)


def _order(name: str, told: dict[str, Any], order: dict[str, Any], tables: Tables) -> Verdict:
    """Whether one row is above another, in every table, some or none; or no lower than it by more than is said."""
    found, said, there = [], [], []
    margin = order.get("no_lower")
    for experiment, dataset, protocol in order["tables"]:
        of_table = {"dataset": dataset, "protocol": protocol}
        rows = tables.read(experiment, "comparisons")
        better, worse = order["rows"]
        if rows is None or _without(rows.filter(**of_table), experiment, better, worse):
            said.append(f"{dataset} {protocol}: {_not_run(experiment)}")
            continue
        there.append((experiment, "comparisons"))
        ahead = len(rows.filter(**of_table, better=better, worse=worse)) == 1
        if not ahead:
            better, worse = worse, better
        row = tables.row(experiment, "comparisons", **of_table, better=better, worse=worse) or {}
        sign = 1 if ahead else -1
        if margin is None:
            found.append(sign if decided(row) else 0)
            test = certainty(row)
        else:
            low, high = sorted((sign * row["low"], sign * row["high"]))
            half = half_over_seeds(row)
            low, high = min(low, sign * row["difference"] - half), max(high, sign * row["difference"] + half)
            found.append(1 if low > -margin else -1 if high < -margin else 0)
            test = f"{low:+.4f} to {high:+.4f}, and a loss of {margin} is none"
        doubt = "" if found[-1] else ", not decided"
        said.append(f"{dataset} {protocol} {sign * row['difference']:+.4f} ({test}{doubt})")
    verdict = _of_signs(found, len(order["tables"]))
    if verdict == "reproduced":
        told = told | {"explained": None}
    experiment = order["tables"][0][0]
    return Verdict(
        name, verdict=verdict, experiment=experiment, why="; ".join(said), files=tables.files(*there), **told
    )


def _without(pairs: pl.DataFrame, experiment: str, *rows: str) -> bool:
    """Whether one of the experiment's rows is in no pair of a table, as its runs are not there yet."""
    there = {*pairs["better"], *pairs["worse"]}
    return any(row not in there for row in rows) and {*rows} <= {run.model for run in params.runs(experiment)}


def _of_signs(found: list[int], asked: int) -> str:
    """The verdict on what is claimed of so many places, of which those that were run say yes, no, or neither."""
    if found and min(found) == 1 and len(found) == asked:
        return "reproduced"
    if 1 in found:
        return "partly"
    return "contradicted" if -1 in found else "not decided" if found else "not run"


def _not_measured(study: str, rows: pl.DataFrame | None) -> str:
    """Why a study's table, of which these rows are there, says nothing of what is claimed, and which command helps."""
    if rows is None:
        return f"not measured here; snakemake {study} does"
    return f"not fully measured here; snakemake {study} measures all, steps.study --only what is missing"


def _not_run(experiment: str) -> str:
    return f"not run here; snakemake {experiment} does"
