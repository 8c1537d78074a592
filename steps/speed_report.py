"""How fast a training step is, where its time goes, and how far it is from the least it could take.

Reads `train.json`, which `profile_training` writes, the roofs measured on the device, and the records of whole
trainings. Writes `train.md`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from tabulate import tabulate as render

from steps.common.cli import StepError, run_step
from steps.common.files import read_json, write_text
from steps.reporting.records import RUNS, recorded_texts

Row = dict[str, Any]

#: How a step is run, by (captured, compiled), in the order of the columns.
_WAYS = {
    (False, False): "launched from Python",
    (True, False): "CUDA graph",
    (True, True): "compiled, CUDA graph",
}
_WAITING = "GPU idle"


def cases(rows: list[Row]) -> list[dict[str, Row]]:
    """The rows of each model, shape and device, by the way its step is run."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        key = repr([row[name] for name in ("device", "model", "shape", "batch")])
        found.setdefault(key, {})[_WAYS[row["captured"], row["compiled"]]] = row
    return list(found.values())


def floor(row: Row, ceilings: dict[str, Any]) -> float | None:
    """Milliseconds that the step's operations or its bytes take at the device's roofs, whichever is more."""
    if row["least"] is None or row["device"] != ceilings["device"]:
        return None
    products = row["least"]["flops"] / ceilings["matmul_flops_per_second"]
    return float(1000 * max(products, row["least"]["bytes"] / ceilings["copy_bytes_per_second"]))


def speed_table(found: list[dict[str, Row]], ceilings: dict[str, Any]) -> str:
    """A line a case: milliseconds of a step each way, memory at the best, and the floor."""
    lines = []
    for case in found:
        best = min(case.values(), key=lambda row: row["step_ms"])
        least = floor(best, ceilings)
        times = [f"{case[way]['step_ms']:.2f}" if way in case else "" for way in _WAYS.values()]
        bound = ["", ""] if least is None else [f"{least:.2f}", f"{best['step_ms'] / least:.1f}"]
        lines.append([_name(best), *times, f"{best['peak_bytes'] / 2**20:,.0f}", *bound, best["device"]])
    headers = ["step", *(f"{way}, ms" for way in _WAYS.values()), "peak MiB", "floor, ms", "best / floor", "device"]
    return render(lines, headers, tablefmt="github", disable_numparse=True)


def parts_table(case: dict[str, Row]) -> str:
    """A line a part of the step: milliseconds each way; and what is left, when the GPU waits."""
    ways = [way for way in _WAYS.values() if way in case]
    parts = {way: dict(case[way]["parts_ms"]) for way in ways}
    for way in ways:
        parts[way][_WAITING] = max(0.0, case[way]["step_ms"] - sum(parts[way].values()))
    names = sorted({name for way in ways for name in parts[way]}, key=lambda name: -parts[ways[-1]].get(name, 0.0))
    lines = [[name, *(f"{parts[way].get(name, 0.0):.3f}" for way in ways)] for name in names]
    lines.append(["whole step", *(f"{case[way]['step_ms']:.3f}" for way in ways)])
    return render(lines, ["part", *(f"{way}, ms" for way in ways)], tablefmt="github", disable_numparse=True)


def trainings_table(records: Path) -> str:
    """A line for the runs that shared a GPU: what they were, and how long the longest trained.

    Where every model's runs are as many as were trained at once, each model had the GPU for itself.
    """
    groups: dict[tuple[Any, ...], dict[str, list[Row]]] = {}
    texts = [row for path in sorted(records.rglob(RUNS)) for row in recorded_texts(path.parent).values()]
    for metrics, config in ((json.loads(row["metrics.json"]), json.loads(row["config.json"])) for row in texts):
        if metrics.get("captured"):
            metrics["epochs"] = metrics["stopped_early"] or config["training"]["epochs"]
            where = config["experiment"], config["dataset"], config["protocol"]["name"]
            key = (*where, metrics["runs_at_once"], metrics["device"], metrics["commit"])
            groups.setdefault(key, {}).setdefault(config["row"], []).append(metrics)
    lines = []
    for (experiment, dataset, protocol, at_once, device, commit), by_row in groups.items():
        alone = all(len(runs) == at_once for runs in by_row.values())
        for part in [{row: runs} for row, runs in by_row.items()] if alone else [by_row]:
            runs = [run for of_row in part.values() for run in of_row]
            done = sorted({run["epochs"] for run in runs})
            epochs = str(done[0]) if len(done) == 1 else f"{done[0]} to {done[-1]}"
            seconds = f"{max(run['train_seconds'] for run in runs):.1f}"
            peak = f"{max(run['peak_bytes'] for run in runs) / 2**20:,.0f}"
            line = [experiment, dataset, protocol, ", ".join(part), epochs, str(at_once), seconds, peak]
            lines.append([*line, device, commit[:9]])
    headers = ["experiment", "data", "protocol", "models", "epochs", "runs at once", "longest, s", "peak MiB, all"]
    return render(lines, [*headers, "device", "commit"], tablefmt="github", disable_numparse=True)


def _name(row: Row) -> str:
    shape = row["shape"]
    return (
        f"{row['model']}, {shape['blocks']} blocks, d {shape['dim']}, {shape['heads']} heads, "
        f"{shape['items']:,} items, {row['batch']} x {shape['max_len']} tokens"
    )


def markdown(rows: list[Row], ceilings: dict[str, Any], records: Path) -> str:
    """The report."""
    found = cases(rows)
    commits = ", ".join(dict.fromkeys(row["commit"][:9] for row in rows))
    parts = [
        "# Training steps",
        "Every window full, which is the longest a step can take; medians. Floor: the least that the matrix products "
        "and attention can take at the measured rate of a large product, or the bytes that must move at the measured "
        f"rate of a copy, whichever is more; counted for HSTU. Commits {commits}.",
        speed_table(found, ceilings),
        "## Whole trainings",
        "All epochs of the recorded runs: seconds of the longest training, its own evaluations apart; with capturing, "
        "compiling, and what other runs that were trained at once evaluated meanwhile.",
        trainings_table(records),
        "## Where the time goes",
        f"Milliseconds of kernels a step, by part; `{_WAITING}`: the rest of the step, when none ran.",
    ]
    for case in found:
        parts += [f"### {_name(next(iter(case.values())))}", parts_table(case)]
    return "\n\n".join(parts) + "\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", required=True, type=Path, help="reports/speed/train.json")
    parser.add_argument("--ceilings", required=True, type=Path, help="reports/kernels/ceilings.json")
    parser.add_argument("--records", required=True, type=Path, help="folder of run records: reports")
    parser.add_argument("--output", required=True, type=Path, help="markdown to write: reports/speed/train.md")


def main(args: argparse.Namespace) -> None:
    for path in (args.rows, args.ceilings):
        if not path.is_file():
            raise StepError(f"{path} does not exist; profile_training and kernels.tools.benchmark write them on a GPU")
    rows = read_json(args.rows, list)
    if not rows:
        raise StepError(f"{args.rows} holds no rows")
    write_text(args.output, markdown(rows, read_json(args.ceilings), args.records))


if __name__ == "__main__":
    run_step("speed_report", __doc__, add_arguments, main)
