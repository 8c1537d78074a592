"""Train runs: the models that their `config.json` describe, on processed sequences.

Writes `history.jsonl` (a line per epoch), `model.safetensors` and `training.json` beside each `config.json`.
A training that is killed goes on at its last saved epoch when the same command runs again, and ends where an
unbroken one would. Several runs are trained at once on a GPU, on a CPU one after the other; each as if alone.

Needs torch, numpy and safetensors alone; tqdm shows progress where it is installed.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch

from steps.common.cli import StepError, run_step
from steps.common.device import compute_type, device_name, pick_device
from steps.common.files import read_json, write_json, write_text
from steps.common.provenance import commit, versions
from steps.data.holdout import hold_out
from steps.data.sequences import Sequences, load_sequences
from steps.models import CountingModel, build, is_counting
from steps.models.checkpoint import save_weights
from steps.training.loop import Training, reported_epoch, train_together
from steps.training.watching import Watch

_RESULTS = ("history.jsonl", "model.safetensors", "training.json", "metrics.json", "ranks.safetensors")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--run", required=True, type=Path, nargs="+", action="extend", help="folders that hold a config.json each"
    )
    parser.add_argument("--data", required=True, type=Path, help="data/processed/<dataset>")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--precision", choices=["bf16", "tf32"], help="of matrix products on cuda (default: bf16)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    parser.add_argument("--deterministic", action="store_true", help="equal bytes from equal runs on one device")


def main(args: argparse.Namespace) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it torch refuses matrix products
    torch.use_deterministic_algorithms(args.deterministic)
    torch.backends.cuda.matmul.allow_tf32 = True  # the parity contract
    device = pick_device(args.device)
    precision, compute = compute_type(args.precision, device)
    sequences, data_sha256 = load_sequences(args.data, device)
    about = {
        "precision": precision,
        "commit": commit(),
        "data_sha256": data_sha256,
        "device": device_name(device),
        "versions": versions(),
    }
    trainings: dict[Path, Training] = {}
    configs = {run: read_json(run / "config.json") for run in args.run}  # of all, before any results go
    for run, config in configs.items():
        for name in _RESULTS:  # of an earlier training, which would look like this one's if this one failed
            (run / name).unlink(missing_ok=True)
        title = f"{config['row']} on {config['dataset']}, protocol {config['protocol']['name']}, seed {config['seed']}"
        print(f"training {title}, {device_name(device)}", flush=True)
        if is_counting(config):
            _fit(config, sequences, run, about)
            continue
        name = f"{config['row']}, seed {config['seed']}: " if len(args.run) > 1 else ""
        trainings[run] = Training(config, sequences, data_sha256, run, compute, title=name)
    together = [list(trainings)] if device.type == "cuda" else [[run] for run in trainings]
    failed: list[str] = []
    written: list[Path] = []
    for runs in together:
        for index, error in train_together([trainings[run] for run in runs]):
            run = runs[index]
            if error:
                failed.append(f"{run}: {error}" if len(args.run) > 1 else str(error))
                continue
            training = trainings[run]
            save_weights(training.model, run / "model.safetensors")
            how = training.record() | {"runs_at_once": len(runs)}
            if training.model.compute is not compute:
                how["precision"] = "tf32"
            _write(run, training.config, training.history, about | how)
            written.append(run)
    for run in written:  # not before, so that no finished run is trained again where another is killed
        _forget(run)
    if failed:
        raise StepError("; ".join(failed))


def _fit(config: dict[str, Any], sequences: Sequences, run: Path, about: dict[str, Any]) -> None:
    """Fit a counting model, which has one epoch and no loss."""
    model = build(config, sequences.num_items).to(sequences.item.device)
    if not isinstance(model, CountingModel):
        raise TypeError(f"{type(model).__name__} is trained, not fitted")
    holdout = hold_out(sequences, config["protocol"])
    start = time.perf_counter()
    model.fit(sequences, holdout.train_drop)
    seconds = round(time.perf_counter() - start, 3)
    line = {"epoch": 1, "train/seconds": seconds, **Watch(model, config, sequences, holdout)()}
    save_weights(model, run / "model.safetensors")
    _write(run, config, [line], about)


def _write(run: Path, config: dict[str, Any], history: list[dict[str, Any]], about: dict[str, Any]) -> None:
    write_text(run / "history.jsonl", "".join(json.dumps(line) + "\n" for line in history))
    record = {
        "epoch": reported_epoch(config, history),
        "train_seconds": round(sum(line["train/seconds"] for line in history), 3),
        "peak_bytes": max(line.get("train/peak_bytes", 0) for line in history) or None,  # none on a CPU
    }
    write_json(run / "training.json", record | about)


def _forget(run: Path) -> None:
    """Remove the state that a training would go on from."""
    state = run / "resume" / "state.safetensors"
    if state.exists():
        state.unlink()
        state.parent.rmdir()


if __name__ == "__main__":
    run_step("train", __doc__, add_arguments, main)
