"""Configs of small runs, as `plan` would write them."""

import json
from pathlib import Path
from typing import Any

import torch

from steps.common.config import COUNT_BASED
from steps.common.files import read_json, sha256, write_json
from steps.common.provenance import content_sha256
from steps.data.sequences import load_sequences
from steps.data.split import split_sequences, split_sha256
from steps.training.loop import Training
from tests.conftest import ROOT, step

STRICT = {"name": "strict", "split": "leave-last-out", "report": "best", "candidates": "rated", "exclude": "history"}
PAPER = {"name": "paper", "split": "leave-last-out", "report": "last", "candidates": "catalogue", "exclude": "window"}


def reproducible(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A history without what differs from run to run: seconds and memory."""
    return [
        {key: value for key, value in line.items() if not key.endswith(("seconds", "peak_bytes"))} for line in history
    ]


_NEXT_ITEM = {"name": "sampled-softmax", "similarity": "cosine", "temperature": 0.05}
_CROSS_ENTROPY = {"name": "softmax", "similarity": "dot", "temperature": 1.0}
_OWN: dict[str, dict[str, Any]] = {
    "popular": {},
    "markov": {},
    "item-knn": {"neighbours": 9, "shrink": 1.0},
    "sasrec": {"output_slots": 11},
    "hstu": {
        "output_slots": 11,
        "attention": "silu",
        "alpha": 1.0,
        "attention_scale": "max_len",
        "bias": {"position": True, "time": "next"},
    },
    "transformer++": {},
    "ligr": {"output_slots": 11, "ff_multiplier": 2},
    "fuxi-alpha": {"output_slots": 11, "ff_multiplier": 2, "time": "next"},
    "fuxi-gamma": {"output_slots": 11, "ff_multiplier": 2, "time": "next", "decay": 0.8, "power": 0.2},
    "bert4rec": {"mask_prob": 0.2, "loss": _CROSS_ENTROPY},
    "gru": {"loss": _CROSS_ENTROPY},
    "gru4rec": {"samples": 30, "sample_alpha": 0.5, "logq": 1.0, "loss": _CROSS_ENTROPY},
}
_CHANGED: dict[str, tuple[str, dict[str, Any]]] = {
    "hstu-softmax": ("hstu", {"attention": "softmax", "alpha": "1/sqrt(dqk)"}),
    "hstu-rowwise": ("hstu", {"items": {"lr": 0.05, "dtype": "float16", "negative_pool": 50}}),
}


def model_entry(model: str, sizes: dict[str, int], **changes: Any) -> dict[str, Any]:
    """The `model` entry of a config, with those keys alone that the model reads. sizes: dim, blocks, heads, dqk, dv."""
    name, own = _CHANGED.get(model, (model, {}))
    entry: dict[str, Any] = {"model": name}
    if name not in COUNT_BASED:
        of_all = {"gru": ["dim"], "gru4rec": ["dim"]} | {
            key: list(sizes) for key in ("hstu", "fuxi-alpha", "fuxi-gamma")
        }
        keys = of_all.get(name, ["dim", "blocks", "heads"])
        entry |= {key: sizes[key] for key in keys} | {"loss": _NEXT_ITEM}
        betas = [0.0, 0.0] if name == "gru4rec" else [0.9, 0.98]
        entry |= {"optimizer": {"lr": 1e-3, "betas": betas, "weight_decay": 0.0}}
    return entry | _OWN[name] | own | changes


def config(model: str = "hstu", protocol: dict[str, Any] = STRICT, epochs: int = 4, **changes: Any) -> dict[str, Any]:
    settings = model_entry(model, {"dim": 16, "blocks": 2, "heads": 2, "dqk": 8, "dv": 8}, **changes)
    training = {"max_len": 20, "epochs": epochs, "batch": 16, "negatives": 16, "dropout": 0.2}
    about = {"experiment": "t", "dataset": "t", "row": settings["model"], "seed": 3, "repeats": "none"}
    return about | {"protocol": protocol, "model": settings, "training": training}


def planned(settings: dict[str, Any], data: Path) -> dict[str, Any]:
    """The config with the hashes of its split of the processed sequences in `data`."""
    sequences, _ = load_sequences(data, torch.device("cpu"))
    return settings | {"split": split_sha256(sequences, split_sequences(sequences, settings["protocol"]))}


def add_tables(data: Path, users: list[str], titles: list[str]) -> Path:
    """Put items.parquet, whose ids are 1001 and so on, and users.parquet beside processed sequences."""
    import polars as pl  # not at the top: there is none on a bare GPU machine

    ids = range(1, len(titles) + 1)
    items = pl.DataFrame({"id": ids, "raw_id": [1000 + item for item in ids], "title": titles})
    items.write_parquet(data / "items.parquet")
    pl.DataFrame({"id": range(len(users)), "raw_id": users}).write_parquet(data / "users.parquet")
    hashes = {f"{name}_sha256": sha256(data / f"{name}.parquet") for name in ("items", "users")}
    write_json(data / "manifest.json", read_json(data / "manifest.json") | hashes)
    return data


def processed_by_its_steps(dataset: str, folder: Path) -> Path:
    """The sequences of a generated data set, made by its own steps below `folder`."""
    arguments = {
        "synthesize": ["--dataset", dataset, "--output", folder / f"mirror/{dataset}.zip"],
        "download": ["--dataset", dataset, "--output", folder / "raw"],
        "validate": ["--dataset", dataset, "--raw", folder / "raw", "--output", folder / "valid"],
        "preprocess": ["--dataset", dataset, "--valid", folder / "valid", "--output", folder / "processed"],
    }
    for name, values in arguments.items():
        step(name, *values, cwd=ROOT, HSTU_DATA_MIRROR=str(folder / "mirror"))
    return folder / "processed"


def seal(run: Path) -> None:
    """Put the hashes of a run's files into its metrics.json, as train and evaluate would."""
    hashes = {"config_sha256": content_sha256(read_json(run / "config.json"))}
    files = {"history": "history.jsonl", "weights": "model.safetensors", "outcomes": "outcomes.safetensors"}
    for name, file in files.items():
        hashes[f"{name}_sha256"] = sha256(run / file) if (run / file).exists() else "absent"
    write_json(run / "metrics.json", read_json(run / "metrics.json") | hashes)


def add_record(folder: Path, row: str, seed: int, config: dict[str, Any], metrics: dict[str, Any]) -> None:
    """Add a run to the light records in `folder`, without ranks."""
    import polars as pl  # not at the top: there is none on a bare GPU machine

    from steps.reporting.records import RUNS, RUNS_SCHEMA

    texts = {"config.json": json.dumps(config), "history.jsonl": "", "metrics.json": json.dumps(metrics)}
    key = {"dataset": "ml-1m", "model": row, "protocol": "strict", "seed": seed}
    rows = [key | texts | {"outcomes_sha256": None}]
    if (folder / RUNS).exists():
        rows = [*pl.read_parquet(folder / RUNS).iter_rows(named=True), *rows]
    folder.mkdir(parents=True, exist_ok=True)
    pl.DataFrame(rows, schema=RUNS_SCHEMA).write_parquet(folder / RUNS)


def states(run: Path, settings: dict[str, Any], data: Path) -> tuple[Training, Path]:
    """A training that was interrupted after its second epoch, and the state that it left."""
    found, digest = load_sequences(data, torch.device("cpu"))
    begun = Training(planned(settings, data), found, digest, run)
    steps = begun.epochs()
    while begun.done < 2:
        next(steps)
    steps.close()
    begun._states.finish()
    return begun, run / "resume" / "state.safetensors"
