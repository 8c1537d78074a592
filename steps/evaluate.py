"""Evaluate trained models on all that is held out, and write what came of every target, and the metrics.

Writes `outcomes.safetensors` and `metrics.json` beside each model's weights. Of retrieval the outcomes are the exact
ranks of every user's held-out item (for `test`, and `valid` if there is one: `<name>` the best rank, `<name>_ties` the
candidates of equal score, `<name>_users`), and the metrics are those under the protocol's own rules, under every choice
of candidates and excluded items (`variants`), and beyond accuracy (`beyond`). Of ranking the outcomes are the
predictions for every held-out interaction (`<name>` the logit, `<name>_labels`, `<name>_users`), with what each test
user's add up to (`test_sums`), and beside the metrics stands how often what is predicted comes true (`reliability`).
Needs torch, numpy and safetensors alone. Started by torchrun, several processes evaluate one run, with the same ranks
as one process.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from steps.common.cli import StepError, raise_failures, run_step
from steps.common.config import building, read_config, task_of
from steps.common.device import device_name, pick_device, pick_precision, use_threads
from steps.common.files import atomic_path, read_json, read_jsonl, sha256, write_json
from steps.common.locks import locked
from steps.common.processes import (
    ALONE,
    Processes,
    device_of_process,
    joined,
    require_one_run,
    require_one_source,
)
from steps.common.provenance import commit, require_trained
from steps.common.torchrun import first_to_end
from steps.data.fields import FieldSizes
from steps.data.sequences import Sequences, load_sequences
from steps.data.split import Split, require_split, split_sequences
from steps.evaluation.beyond import beyond_accuracy
from steps.evaluation.engagements import engagement_values, named, reliability, user_sums
from steps.evaluation.exact_ranks import Rules, exclusions, rank, require_finite
from steps.evaluation.metrics import metrics
from steps.evaluation.names import SELECTIONS
from steps.evaluation.ranking import RankingEvaluation
from steps.models import Recommender
from steps.models.weights import load_weights
from steps.tasks import Task, build

#: The number of recommendations per user that coverage and popularity are computed on.
TOP = 10
_EXCLUDE, _CANDIDATES = ("window", "history"), ("catalogue", "rated")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--run", required=True, type=Path, nargs="+", action="extend", help="the runs' folders, which train filled"
    )
    parser.add_argument("--data", required=True, type=Path, help="data/processed/<dataset>")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--precision", choices=["bf16", "tf32"], help="on cuda (default: as it was trained)")


def main(args: argparse.Namespace) -> None:
    torch.backends.cuda.matmul.allow_tf32 = True  # as after every epoch of the training
    device = device_of_process(pick_device(args.device))
    with joined(device) as processes:
        _main(args, device, processes)


def _main(args: argparse.Namespace, device: torch.device, processes: Processes) -> None:
    sequences, data_sha256 = load_sequences(args.data, device)
    runs = list({run.resolve(): run for run in args.run}.values())
    require_one_run(processes, len(runs))
    failures: dict[str, Exception] = {}
    for run in runs:
        try:
            if not run.is_dir():
                raise StepError(f"{run} does not exist; run plan and train first")
            with processes.first_alone(locked(run.resolve())):
                use_threads(None, [read_config(run)])
                evaluate(run, sequences, data_sha256, args.precision, processes)
        except Exception as error:  # of one run; the others continue
            failures[str(run)] = error
    raise_failures(failures, len(runs))


def evaluate(
    run: Path,
    sequences: Sequences,
    data_sha256: str,
    precision: str | None = None,
    processes: Processes = ALONE,
) -> None:
    """Evaluate the model of one run's folder on the device of the sequences; precision None: as it was trained.

    Each of `processes` takes a part of the targets, and one writes.
    Raises StepError if the run is not trained, was trained on other data, or holds a file that is not its training's.
    """
    source = run / "training.json"
    if not source.is_file():
        raise StepError(f"{run} is not trained; run train first")
    config, trained = read_config(run), read_json(source, remedy="train again")
    if trained.get("data_sha256") != data_sha256:
        raise StepError(f"{run} was trained on other sequences than --data has; name its own, or train it again")
    require_trained(run, config, trained, source)
    require_one_source(processes, {str(run / "config.json"): config, str(source): trained, "--data": data_sha256})
    protocol, device = config["protocol"], sequences.item.device
    split = split_sequences(sequences, protocol)
    require_split(sequences, split, config, run)
    with building(run):
        model = build(config, sequences.num_items, FieldSizes.of(sequences), sharded=processes.size > 1).to(device)
    computed = "float32"
    load_weights(model, run / "model.safetensors")
    if isinstance(model, Task):
        as_trained = "bf16" if trained.get("precision") == "bf16" else "tf32"
        computed, model.encoder.compute_dtype = pick_precision(precision or as_trained, device)

    if task_of(protocol) == "ranking":
        found, kept = _predict(model, config, sequences, split, processes)
    else:
        found, kept = _rank(model, config, sequences, split, processes)
    if not processes.writes:
        return
    if protocol["report"] == "last":  # optimistic: the epoch is chosen by the test set
        best = SELECTIONS[task_of(protocol)].best(read_jsonl(run / "history.jsonl"), "test")
        found["test_best"] = {name: best[f"test/{name}"] for name in found["test"]} | {"epoch": best["epoch"]}
    with atomic_path(run / "outcomes.safetensors") as temporary:
        temporary.write_bytes(save({name: tensor.cpu() for name, tensor in kept.items()}))
    evaluated = {"commit": commit(), "device": device_name(device), "precision": computed}
    outcomes_sha256 = sha256(run / "outcomes.safetensors")
    write_json(run / "metrics.json", {**found, **trained, "outcomes_sha256": outcomes_sha256, "evaluated": evaluated})


def _rank(
    model: torch.nn.Module, config: dict[str, Any], sequences: Sequences, split: Split, processes: Processes
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What metrics.json says of a retrieval model, and its ranks."""
    if not isinstance(model, Recommender):
        raise TypeError(f"{type(model).__name__} recommends no items")
    training, own = config["training"], Rules.of(config)
    variants = [Rules(candidates, exclude) for exclude in exclusions(config, _EXCLUDE) for candidates in _CANDIDATES]
    found: dict[str, Any] = {}
    kept: dict[str, torch.Tensor] = {}
    for name, held_out in split.held_out.items():
        rules = [own, *(variants if name == "test" else [])]
        sizes = training["max_len"], training["batch"], TOP
        first, *others = rank(model, sequences, held_out, rules, *sizes, processes)
        found[name] = metrics(first.ranks)
        kept |= {name: first.ranks.best.int(), f"{name}_ties": first.ranks.ties.int()}
        kept[f"{name}_users"] = held_out.users.clone()
        if name == "test":
            found["beyond"] = beyond_accuracy(first.top, first.ranks, sequences, held_out, split.num_held_out)
            found["variants"] = {
                f"{rule.exclude}/{rule.candidates}": metrics(other.ranks)
                for rule, other in zip(variants, others, strict=True)
            }
    return found, kept


@torch.inference_mode()
def _predict(
    model: Any, config: dict[str, Any], sequences: Sequences, split: Split, processes: Processes
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What metrics.json says of a ranking model, and its predictions."""
    found: dict[str, Any] = {}
    kept: dict[str, torch.Tensor] = {}
    for name, held_out in split.held_out.items():
        predictions = RankingEvaluation(config, sequences, held_out, processes).predictions(model)
        require_finite(bool(predictions.logit.isfinite().all()))
        found[name] = named(engagement_values(predictions, sequences.num_users).tolist())
        kept |= {name: predictions.logit, f"{name}_labels": predictions.label.to(torch.uint8)}
        kept[f"{name}_users"] = held_out.users.clone()
        if name == "test":
            found["reliability"] = reliability(predictions.logit, predictions.label)
            kept["test_sums"] = torch.stack(user_sums(predictions), dim=1)
    return found, kept


if __name__ == "__main__":
    run_step("evaluate", __doc__, add_arguments, main, says=first_to_end)
