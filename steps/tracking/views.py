"""What MLflow's UI shows of an experiment at first sight, and where.

The UI keeps a shared view as a tag of its experiment: the columns of the list, or the charts. An address names the tag.
"""

import json
from typing import Any
from urllib.parse import quote

from steps.common import params
from steps.reporting.records import Record
from steps.tracking.store import NEWEST, logged, search

#: The newest runs alone, without their parent.
_RUNS = f"tags.state = '{NEWEST}' and tags.kind = 'run'"
#: What runs that differ in their seed alone share.
_ROWS = {
    "aggregateFunction": "average",
    "groupByKeys": [{"mode": "tag", "groupByData": "group"}],
}
_SECTIONS = [
    {"uuid": uuid, "name": name, "display": True, "isReordered": False, "deleted": False, "isGenerated": True}
    for uuid, name in (("results", "Results"), ("curves", "Curves"), ("system", "What an epoch takes"))
]
_TABLE, _CHARTS, _PAIR = "table", "charts", "pair"


def set_views(client: Any, experiment_id: str, title: str, records: list[Record]) -> None:
    """Describe the experiment, and set its shared views; the charts show means where rows have several seeds."""
    task = params.load("tasks")[records[0].task]
    headline, compared = [logged(name) for name in task["headline"]], logged(task["compared"])
    charts = _charts(headline, compared)
    means = {"groupBy": _ROWS, "runsHiddenMode": "SHOW_ALL"} if len({one.run.seed for one in records}) > 1 else {}
    tags = {
        "mlflow.note.content": title,
        "mlflow.experimentKind": "custom_model_development",  # not GenAI, whose page has no runs
        f"mlflow.sharedViewState.{_TABLE}": json.dumps(_table(headline)),
        f"mlflow.sharedViewState.{_CHARTS}": json.dumps(charts | means),
    }
    if pair := compared_runs(client, experiment_id):
        chosen = f"attributes.run_id IN ({', '.join(map(repr, pair))})"
        tags[f"mlflow.sharedViewState.{_PAIR}"] = json.dumps(
            charts | {"searchFilter": chosen, "compareRunSections": [_SECTIONS[place] for place in (1, 0, 2)]}
        )
    for name, value in tags.items():
        client.set_experiment_tag(experiment_id, name, value)


def addresses(client: Any, base: str, experiment: Any) -> dict[str, str]:
    """Where the UI at `base` shows the experiment's runs as a list and as charts, by what is shown there."""
    place = f"{base}/#/experiments/{experiment.experiment_id}/runs?workflowType=machine_learning"
    found = {}
    pair = compared_runs(client, experiment.experiment_id)
    if pair:
        runs, ids = (quote(json.dumps(some, separators=(",", ":"))) for some in (pair, [experiment.experiment_id]))
        found["SASRec and HSTU: curves"] = f"{place}&viewStateShareKey={_PAIR}&compareRunsMode=CHART"
        found["SASRec and HSTU: parameters and results"] = f"{base}/#/compare-runs?runs={runs}&experiments={ids}"
    return found | {
        "the newest runs as charts": f"{place}&viewStateShareKey={_CHARTS}&compareRunsMode=CHART",
        "the newest runs as a table": f"{place}&viewStateShareKey={_TABLE}",
        "all runs, below their tables": place,
    }


def compared_runs(client: Any, experiment_id: str) -> list[str]:
    """The ids of the newest SASRec and HSTU of one protocol, data set and seed; none where one of them lacks."""
    newest: dict[tuple[str, ...], dict[str, str]] = {}
    for run in search(client, experiment_id, f"{_RUNS} and attributes.status = 'FINISHED'"):
        what = run.data.params.get("row", "")
        place = tuple(run.data.tags.get(name, "") for name in ("protocol", "dataset", "seed"))
        newest.setdefault(place, {})[what] = run.info.run_id
    for _, rows in sorted(newest.items(), key=lambda one: (one[0][0] != "strict", one[0])):
        if {"sasrec", "hstu"} <= set(rows):
            return [rows["sasrec"], rows["hstu"]]
    return []


def _table(headline: list[str]) -> dict[str, Any]:
    shown = ["tags.`dataset`", "tags.`protocol`", "tags.`model`", "params.`seed`"]
    shown += [f"metrics.`reported/test/{name}`" for name in headline]
    return {
        "searchFilter": _RUNS,
        "orderByKey": f"metrics.`reported/test/{headline[-1]}`",
        "orderByAsc": False,
        "selectedColumns": [*shown, "metrics.`reported/epoch`", "attributes.`Models`"],
    }


def _charts(headline: list[str], compared: str) -> dict[str, Any]:
    """Bars of what is reported, curves of what is compared, and lines from parameters to results."""
    bars = [_card("BAR", "results", f"reported/test/{name}", f"test {name}") for name in headline]
    parallel = _card("PARALLEL", "results", "", "From parameters to results") | {
        "selectedParams": ["row", "protocol.name", "seed"],
        "selectedMetrics": [*(f"reported/test/{name}" for name in headline), "reported/train_seconds"],
    }
    curves = [
        _card("LINE", "curves", name, title)
        for name, title in (
            (f"valid/{compared}", f"validation {compared}"),
            (f"test/{compared}", f"test {compared}"),
            ("train/loss", "training loss"),
        )
    ]
    system = [_card("LINE", "system", f"system/{name}", name) for name in ("seconds", "step_milliseconds")]
    return {
        "searchFilter": _RUNS,
        "orderByKey": f"metrics.`reported/test/{headline[-1]}`",
        "orderByAsc": False,
        "runsHiddenMode": "FIRST_20_RUNS",
        "isAccordionReordered": True,  # otherwise sections are sorted by their names
        "compareRunCharts": [*bars, parallel, *curves, *system],
        "compareRunSections": _SECTIONS,
    }


def _card(kind: str, section: str, metric: str, title: str) -> dict[str, Any]:
    """A chart with the settings that the UI's own have."""
    card = {
        "type": kind,
        "uuid": f"{kind}-{section}-{metric}".lower(),
        "metricSectionId": section,
        "displayName": title,
        "runsCountToCompare": 20,
        "deleted": False,
        "isGenerated": False,
    }
    if kind == "PARALLEL":
        return card | {"showAllRuns": True}
    card |= {"metricKey": metric}
    if kind == "LINE":
        card |= {
            "xAxisKey": "step",
            "selectedXAxisMetricKey": "",
            "xAxisScaleType": "linear",
            "scaleType": "linear",
            "lineSmoothness": 0,
            "range": {},
            "yAxisKey": "metric",
            "yAxisExpressions": [],
            "ignoreOutliers": False,
            "useGlobalXaxisKey": False,
            "useGlobalLineSmoothing": True,
        }
    return card
