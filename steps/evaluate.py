"""Rank every user's held-out item with a trained model, exactly, and keep the ranks.

Writes `ranks.safetensors` and `metrics.json` beside the weights. Needs torch, numpy and safetensors alone.
"""

import argparse
from pathlib import Path

from safetensors.torch import save

from steps.common.cli import run_step
from steps.common.device import pick_device
from steps.common.files import atomic_path, read_json, read_jsonl, write_json
from steps.data.sequences import DROPPED, load_sequences
from steps.models import build
from steps.models.checkpoint import load_weights
from steps.ranking.metrics import metrics
from steps.ranking.ranks import exact_ranks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", required=True, type=Path, help="the run's folder, which train filled")
    parser.add_argument("--data", required=True, type=Path, help="data/processed/<dataset>")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")


def main(args: argparse.Namespace) -> None:
    config = read_json(args.run / "config.json")
    protocol, training = config["protocol"], config["training"]
    device = pick_device(args.device)
    sequences, _ = load_sequences(args.data, device)
    model = build(config, sequences.num_items).to(device)
    load_weights(model, args.run / "model.safetensors")
    splits = [split for split, drop in DROPPED.items() if drop < protocol["held_out"]]
    ranks = {
        split: exact_ranks(model, sequences, split, protocol, training["max_len"], training["batch"]).cpu()
        for split in splits
    }
    found = {split: metrics(ranks[split]) for split in splits}
    if protocol["report"] == "last":  # optimistic: the epoch is chosen by the test set
        best = max(read_jsonl(args.run / "history.jsonl"), key=lambda line: line["test/ndcg@10"])
        found["test_best"] = {name: best[f"test/{name}"] for name in found["test"]} | {"epoch": best["epoch"]}
    with atomic_path(args.run / "ranks.safetensors") as temporary:
        temporary.write_bytes(save(ranks))
    write_json(args.run / "metrics.json", {**found, **read_json(args.run / "training.json")})


if __name__ == "__main__":
    run_step("evaluate", __doc__, add_arguments, main)
