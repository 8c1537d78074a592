"""What the headline hides: the same models under other rules of ranking, and beyond accuracy."""

from typing import Any

from steps.reporting.records import Record, by_row, cell, labels, mean_and_sd
from steps.reporting.task import load_task


def variants(records: list[Record]) -> list[dict[str, Any]]:
    """A row per model and rule of ranking (excluded items / candidates): HR@10 and NDCG@10 with their deviations."""
    rows = []
    for (dataset, protocol, model), seeds in by_row(records).items():
        if not all("variants" in seed.metrics for seed in seeds):
            continue
        for rule in seeds[0].metrics["variants"]:
            row: dict[str, Any] = {"dataset": dataset, "protocol": protocol, "model": model, "rule": rule}
            for name in load_task().headline:
                mean, deviation = mean_and_sd(seed.metrics["variants"][rule][name] for seed in seeds)
                row |= {name: mean, f"{name}/sd": deviation}
            rows.append(row | {"seeds": len(seeds)})
    return rows


def beyond(records: list[Record]) -> list[dict[str, Any]]:
    """A row per model: coverage, popularity, and NDCG@10 by history length and by popularity of the target."""
    rows, metric = [], load_task().compared
    for (dataset, protocol, model), seeds in by_row(records).items():
        if not all("beyond" in seed.metrics for seed in seeds):
            continue
        row: dict[str, Any] = {"dataset": dataset, "protocol": protocol, "model": model, "seeds": len(seeds)}
        first = seeds[0].metrics["beyond"]
        for name, value in first.items():
            if not isinstance(value, dict):
                row[name] = mean_and_sd(seed.metrics["beyond"][name] for seed in seeds)[0]
                continue
            for group, mean in groups_of(seeds, name, metric).items():
                row[f"{metric}, {_GROUPS[name]} {group}"] = mean
        rows.append(row)
    return rows


def groups_of(seeds: list[Record], key: str, metric: str) -> dict[str, float]:
    """The metric's mean over seeds in every group that has users. key: by_history_length or by_popularity."""
    found = [seed.metrics.get("beyond", {}).get(key, {}) for seed in seeds]
    return {
        group: mean_and_sd(groups[group][metric] for groups in found)[0]
        for group, content in found[0].items()
        if metric in content
    }


def reliability(seeds: list[Record]) -> list[dict[str, Any]]:
    """Of groups of equal size by predicted probability, from low to high: number, examples, what was predicted and what
    share was positive, means over seeds."""
    found = []
    for number, groups in enumerate(zip(*(seed.metrics["reliability"] for seed in seeds), strict=True), start=1):
        means = {name: mean_and_sd(group[name] for group in groups)[0] for name in ("predicted", "positive")}
        found.append({"group": number, "examples": groups[0]["examples"], **means})
    return found


def reliability_rows(records: list[Record]) -> list[dict[str, Any]]:
    """A row per model and group of `reliability`."""
    return [
        dict(zip(_KEYS, (*row, len(seeds)), strict=True)) | group
        for row, seeds in by_row(records).items()
        for group in reliability(seeds)
    ]


_GROUPS = {"by_history_length": "history", "by_popularity": "target"}


def variant_table(rows: list[dict[str, Any]], records: list[Record]) -> tuple[list[str], list[list[str]]]:
    """Headers and lines: a line per model and metric, a column per rule."""
    names = labels(records)
    rules = list(dict.fromkeys(row["rule"] for row in rows))
    lines: dict[tuple[str, str, str, str], list[str]] = {}
    for row in rows:
        for metric in load_task().headline:
            key = (row["dataset"], row["protocol"], names[row["model"]], metric.upper())
            lines.setdefault(key, list(key)).append(cell(row[metric], row[f"{metric}/sd"]))
    return ["data set", "protocol", "model", "metric", *rules], list(lines.values())


def beyond_table(rows: list[dict[str, Any]], records: list[Record]) -> tuple[list[str], list[list[str]]]:
    """Headers and lines: a line per model."""
    names = labels(records)
    columns = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in _KEYS]
    lines = [
        [row["dataset"], row["protocol"], names[row["model"]]]
        + [f"{row[name]:.4f}" if name in row else "" for name in columns]
        for row in rows
    ]
    return ["data set", "protocol", "model", *columns], lines


_KEYS = ("dataset", "protocol", "model", "seeds")


def reliability_table(rows: list[dict[str, Any]], records: list[Record]) -> tuple[list[str], list[list[str]]]:
    """Headers and lines: a line per model, with how far what was predicted is from what came true, in the mean over all
    examples and in the group where it is furthest."""
    names = labels(records)
    models: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        models.setdefault((row["dataset"], row["protocol"], names[row["model"]]), []).append(row)
    lines = []
    for key, groups in models.items():
        gaps = [abs(group["predicted"] - group["positive"]) for group in groups]
        examples = [group["examples"] for group in groups]
        mean = sum(gap * count for gap, count in zip(gaps, examples, strict=True)) / sum(examples)
        worst = groups[gaps.index(max(gaps))]
        numbers = (mean, max(gaps), worst["predicted"], worst["positive"])
        lines.append([*key, *(f"{number:.4f}" for number in numbers)])
    return ["data set", "protocol", "model", "mean gap", "largest gap", "predicted there", "engaged there"], lines
