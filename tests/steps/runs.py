"""Configs of small runs, as `plan` would write them."""

import json
from pathlib import Path
from typing import Any

import torch

from steps.common.files import read_json, sha256, write_json
from steps.common.provenance import content_sha256
from steps.data.sequences import load_sequences
from steps.data.split import split_sequences, split_sha256

STRICT = {"name": "strict", "split": "leave-last-out", "report": "best", "candidates": "rated", "exclude": "history"}
PAPER = {"name": "paper", "split": "leave-last-out", "report": "last", "candidates": "catalogue", "exclude": "window"}


def reproducible(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A history without what differs from run to run: seconds and memory."""
    return [
        {key: value for key, value in line.items() if not key.endswith(("seconds", "peak_bytes"))} for line in history
    ]


def config(model: str = "hstu", protocol: dict[str, Any] = STRICT, epochs: int = 4, **changes: Any) -> dict[str, Any]:
    if model == "hstu-softmax":
        model, changes = "hstu", {"attention": "softmax", "alpha": "1/sqrt(dqk)"} | changes
    if model == "hstu-rowwise":
        model, changes = "hstu", {"items": {"lr": 0.05, "dtype": "float16", "negative_pool": 50}} | changes
    settings: dict[str, Any] = {"model": model}
    if model not in ("popular", "markov"):
        settings |= {"dim": 16, "blocks": 2, "heads": 2, "dqk": 8, "dv": 8, "output_slots": 11}
        settings |= {
            "attention": "silu",
            "alpha": 1.0,
            "attention_scale": "max_len",
            "bias": {"position": True, "time": "next"},
        }
        settings |= {"loss": {"name": "sampled-softmax", "similarity": "cosine", "temperature": 0.05}}
        settings |= {"mask_prob": 0.2, "samples": 30, "sample_alpha": 0.5, "logq": 1.0, "neighbours": 9, "shrink": 1.0}
        settings |= {"optimizer": {"lr": 1e-3, "betas": [0.9, 0.98], "weight_decay": 0.0}}
    training = {"max_len": 20, "epochs": epochs, "batch": 16, "negatives": 16, "dropout": 0.2}
    return {"experiment": "t", "dataset": "t", "row": model, "protocol": protocol, "seed": 3, "repeats": "none"} | {
        "model": settings | changes,
        "training": training,
    }


def planned(settings: dict[str, Any], data: Path) -> dict[str, Any]:
    """The config with the hashes of its split of the processed sequences in `data`."""
    sequences, _ = load_sequences(data, torch.device("cpu"))
    return settings | {"split": split_sha256(sequences, split_sequences(sequences, settings["protocol"]))}


def seal(run: Path) -> None:
    """Put the hashes of a run's files into its metrics.json, as train and evaluate would."""
    hashes = {"config_sha256": content_sha256(read_json(run / "config.json"))}
    files = {"history": "history.jsonl", "weights": "model.safetensors", "ranks": "ranks.safetensors"}
    for name, file in files.items():
        hashes[f"{name}_sha256"] = sha256(run / file) if (run / file).exists() else "absent"
    write_json(run / "metrics.json", read_json(run / "metrics.json") | hashes)


def add_record(folder: Path, row: str, seed: int, config: dict[str, Any], metrics: dict[str, Any]) -> None:
    """Add a run to the light records in `folder`, without ranks."""
    import polars as pl  # not at the top: there is none on a bare GPU machine

    from steps.reporting.records import RUNS, RUNS_SCHEMA

    texts = {"config.json": json.dumps(config), "history.jsonl": "", "metrics.json": json.dumps(metrics)}
    key = {"dataset": "ml-1m", "model": row, "protocol": "strict", "seed": seed}
    rows = [key | texts | {"ranks_sha256": None}]
    if (folder / RUNS).exists():
        rows = [*pl.read_parquet(folder / RUNS).iter_rows(named=True), *rows]
    folder.mkdir(parents=True, exist_ok=True)
    pl.DataFrame(rows, schema=RUNS_SCHEMA).write_parquet(folder / RUNS)
