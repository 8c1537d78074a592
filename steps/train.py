"""Train one run: the model that its `config.json` describes, on processed sequences.

Writes `history.jsonl` (a line per epoch), `model.safetensors` and `training.json` beside `config.json`.
A training that is killed goes on at its last finished epoch when the same command runs again; every
epoch draws its randomness from the seed and the epoch's number, so it ends where an unbroken one would.

Needs torch, numpy and safetensors alone; tqdm shows progress where it is installed.
"""

import argparse
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import torch

from steps.common.cli import StepError, run_step
from steps.common.device import device_name, pick_device
from steps.common.files import read_json, write_json, write_text
from steps.common.progress import progress
from steps.common.provenance import commit, versions
from steps.data.holdout import Holdout, hold_out
from steps.data.sequences import Sequences, load_sequences
from steps.models import CountingModel, Model, SequenceModel, build
from steps.models.checkpoint import load_progress, load_state, save_state, save_weights
from steps.ranking.metrics import metrics
from steps.ranking.ranks import Rules, rank

_SEEDS_APART = 1_000_003  # so that no (seed, epoch) shares its random numbers with another
_SELECTED_BY = "ndcg@10"


def train(config: dict[str, Any], sequences: Sequences, data_sha256: str, run: Path) -> list[dict[str, Any]]:
    """Train the run's model and write its weights; returns the history, a dict per epoch."""
    torch.manual_seed(config["seed"] * _SEEDS_APART)
    model = build(config, sequences.num_items).to(sequences.item.device)
    holdout = hold_out(sequences, config["protocol"])
    if not isinstance(model, SequenceModel):
        return _fit(model, config, sequences, holdout, run)
    optimizer = model.optimizer()
    resume = run / "resume" / "state.safetensors"
    identity = hashlib.sha256(json.dumps([config, data_sha256], sort_keys=True).encode()).hexdigest()
    history: list[dict[str, Any]] = []
    best: dict[str, torch.Tensor] = {}
    saved = load_progress(resume)
    if saved is not None and saved["identity"] == identity:
        best = load_state(resume, model, optimizer)
        history = saved["history"]
        print(f"resuming after epoch {len(history)} from {resume}", flush=True)

    epochs = config["training"]["epochs"]
    for epoch in range(len(history) + 1, epochs + 1):
        torch.manual_seed(config["seed"] * _SEEDS_APART + epoch)
        start = time.perf_counter()
        loss = _epoch(model, optimizer, config, sequences, holdout, f"epoch {epoch}/{epochs}")
        seconds = time.perf_counter() - start
        line = {"epoch": epoch, "train/loss": round(loss, 6), "train/seconds": round(seconds, 3)}
        line |= _watch(model, config, sequences, holdout)
        history.append(line)
        print(_summary(line, epochs), flush=True)
        if config["protocol"]["report"] == "best" and line == max(history, key=_selection):
            best = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        save_state(resume, model, optimizer, best, {"identity": identity, "history": history})
    if best:
        model.load_state_dict(best)
    save_weights(model, run / "model.safetensors")
    return history


def reported_epoch(config: dict[str, Any], history: list[dict[str, Any]]) -> int:
    """The epoch whose weights the protocol reports: the last, or the first with the best validation NDCG@10."""
    return (history[-1] if config["protocol"]["report"] == "last" else max(history, key=_selection))["epoch"]


def _selection(line: dict[str, Any]) -> float:
    return line[f"valid/{_SELECTED_BY}"]


def _fit(
    model: CountingModel, config: dict[str, Any], sequences: Sequences, holdout: Holdout, run: Path
) -> list[dict[str, Any]]:
    start = time.perf_counter()
    model.fit(sequences, holdout.train_drop)
    seconds = round(time.perf_counter() - start, 3)
    line = {"epoch": 1, "train/seconds": seconds, **_watch(model, config, sequences, holdout)}
    save_weights(model, run / "model.safetensors")
    return [line]


def _epoch(
    model: SequenceModel,
    optimizer: torch.optim.Optimizer,
    config: dict[str, Any],
    sequences: Sequences,
    holdout: Holdout,
    title: str,
) -> float:
    """One pass over the users in random order, one window each; returns the mean loss per step."""
    model.train()
    max_len, batch_size = config["training"]["max_len"], config["training"]["batch"]
    users = sequences.trainable_users(holdout.train_drop)
    if not len(users):
        raise StepError("no user has two interactions besides those held out: nothing to train on")
    order = users[torch.randperm(len(users)).to(users.device)]
    total, steps = torch.zeros((), device=users.device), 0
    losses = model.losses(sequences, order, holdout.train_drop, max_len, batch_size)
    for loss in progress(losses, total=model.steps(len(order), batch_size), desc=title, unit="step"):
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        total += loss.detach()
        steps += 1
    mean = float(total) / steps  # the epoch's one wait for the device
    if mean != mean:
        raise StepError(f"the loss is not a number in {title}: training diverged; lower the learning rate")
    return mean


def _watch(model: Model, config: dict[str, Any], sequences: Sequences, holdout: Holdout) -> dict[str, Any]:
    """The epoch's metrics: on validation where the protocol has one, else on test, which it then may not select by."""
    split, training = holdout.watched, config["training"]
    start = time.perf_counter()
    rules = [Rules.of(config["protocol"])]
    (found,) = rank(model, sequences, holdout.questions[split], rules, training["max_len"], training["batch"])
    line: dict[str, Any] = {f"{split}/{name}": value for name, value in metrics(found.ranks).items()}
    return line | {f"{split}/seconds": round(time.perf_counter() - start, 3)}


def _summary(line: dict[str, Any], epochs: int) -> str:
    split = "valid" if "valid/hr@10" in line else "test"
    return (
        f"epoch {line['epoch']}/{epochs}  loss {line['train/loss']:.4f}  {split} "
        f"hr@10 {line[f'{split}/hr@10']:.4f}  ndcg@10 {line[f'{split}/ndcg@10']:.4f}  "
        f"{line['train/seconds']:.1f} s + {line[f'{split}/seconds']:.1f} s"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", required=True, type=Path, help="the run's folder, which holds config.json")
    parser.add_argument("--data", required=True, type=Path, help="data/processed/<dataset>")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    parser.add_argument("--deterministic", action="store_true", help="equal bytes from equal runs on one device")


def main(args: argparse.Namespace) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(args.deterministic)
    torch.backends.cuda.matmul.allow_tf32 = True  # the parity contract
    device = pick_device(args.device)
    config = read_json(args.run / "config.json")
    sequences, data_sha256 = load_sequences(args.data, device)
    title = f"{config['row']} on {config['dataset']}, protocol {config['protocol']['name']}, seed {config['seed']}"
    print(f"training {title}, {device_name(device)}", flush=True)
    history = train(config, sequences, data_sha256, args.run)
    write_text(args.run / "history.jsonl", "".join(json.dumps(line) + "\n" for line in history))
    record = {
        "epoch": reported_epoch(config, history),
        "train_seconds": round(sum(line["train/seconds"] for line in history), 3),
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        "commit": commit(),
        "data_sha256": data_sha256,
        "device": device_name(device),
        "versions": versions(),
    }
    write_json(args.run / "training.json", record)
    state = args.run / "resume" / "state.safetensors"
    if state.exists():  # kept until every result is written
        state.unlink()
        state.parent.rmdir()


if __name__ == "__main__":
    run_step("train", __doc__, add_arguments, main)
