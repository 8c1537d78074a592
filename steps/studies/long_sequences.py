"""What Stochastic Length and semi-local attention cost in quality, and save in time, on long sequences.

HSTU is trained with full attention, with Stochastic Length (arXiv 2402.17152) and with semi-local attention (arXiv
2602.16986), from several seeds; then it ranks the test items, of all users and of those with long histories. The seeds
of a group of variants are trained at once on a GPU. Before, each variant trains a few epochs alone: its times and its
memory are of these. Needs torch, numpy and safetensors alone.
"""

import gc
import statistics
import tempfile
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import torch

from steps.common.device import pick_precision
from steps.data.sequences import Sequences, StaticShape, load_sequences
from steps.data.stochastic_length import expected_lengths, most_kept
from steps.evaluation.exact_ranks import Rules, Scorer, rank
from steps.evaluation.metrics import user_values
from steps.studies.rows import Row, row
from steps.training.loop import Training, reported_epoch, train_together

FULL, STOCHASTIC, SEMI_LOCAL = "full attention", "Stochastic Length", "semi-local attention"
#: What is added to a metric's name where it is of users with long histories alone.
LONG = ", long histories"


def variants(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The axes of every variant: its group (of runs that are trained at once), its kind and name, and its parameters.

    Full attention; every alpha with every rule; every window with every number of first tokens; windows alone.
    """
    found: list[dict[str, Any]] = [{"group": FULL, "kind": FULL, "variant": FULL}]
    for alpha in settings["stochastic_length"]["alphas"]:
        for rule in settings["stochastic_length"]["rules"]:
            axes = {"group": f"alpha {alpha}", "kind": STOCHASTIC, "variant": f"alpha {alpha} {rule}"}
            found.append(axes | {"alpha": alpha, "rule": rule})
    sizes = settings["semi_local"]
    grid = {(window, first): f"window {window}" for window in sizes["windows"] for first in sizes["first"]}
    for (window, first), group in ({(window, 0): "windows alone" for window in sizes["alone"]} | grid).items():
        name = f"window {window}" + (f" + first {first}" if first else "")
        found.append(
            {"group": group, "kind": SEMI_LOCAL, "variant": name, "max_attn_len": window, "num_sink_tokens": first}
        )
    return found


def cases(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """A case for each data set and group of variants."""
    groups = dict.fromkeys(variant["group"] for variant in variants(plan["settings"]))
    names = dict.fromkeys(config["dataset"] for runs in plan["runs"] for config in runs["configs"])
    return [{"data": name, "group": group} for name in names for group in groups]


def measure(case: dict[str, Any], plan: dict[str, Any], data: Path) -> list[Row]:
    """Rows of a case: of each variant what an epoch takes, alone on the device; of each of its runs how good it is."""
    settings, device = plan["settings"], torch.device(plan["device"])
    sequences, digest = load_sequences(data / "processed" / case["data"], device)
    configs = [config for runs in plan["runs"] for config in runs["configs"] if config["dataset"] == case["data"]]
    found, every = [], []
    for variant in variants(settings):
        if variant["group"] == case["group"]:
            axes = {"data": case["data"]} | variant
            seeds = [changed(config, variant) for config in configs]
            found += measure_epochs(axes, seeds[0], sequences, digest, settings)
            every += [(axes | {"seed": config["seed"]}, config) for config in seeds]
    found += measure_runs(every, sequences, digest, settings)
    return [one | {"data_sha256": digest} for one in found]


def changed(config: dict[str, Any], variant: dict[str, Any]) -> dict[str, Any]:
    """The config of a run of the variant, made from one with full attention."""
    config = deepcopy(config)
    if variant["kind"] == STOCHASTIC:
        config["training"]["stochastic_length"] = {name: variant[name] for name in ("alpha", "rule")}
    if variant["kind"] == SEMI_LOCAL:
        config["model"] |= {name: variant[name] for name in ("max_attn_len", "num_sink_tokens")}
    return config


def tokens_and_pairs(lengths: torch.Tensor, config: dict[str, Any]) -> tuple[float, float]:
    """How many tokens of windows of `lengths` (W,) an epoch reads in the mean, and how many pairs of a query and a key
    that it sees a layer has then.

    A query sees itself, so many tokens before it as the window has, and the first ones.
    """
    lengths, model, sampled = lengths.double(), config["model"], config["training"].get("stochastic_length")
    if sampled:
        longest, alpha = config["training"]["max_len"], sampled["alpha"]
        kept = lengths.clamp(max=most_kept(longest, alpha))
        whole = (kept / lengths) ** 2
        pairs = (1 - whole) * triangle(kept) + whole * triangle(lengths)
        return float(expected_lengths(lengths, longest, alpha).sum()), float(pairs.sum())
    seen = (
        lengths.clamp(max=1 + model["max_attn_len"] + model["num_sink_tokens"]) if "max_attn_len" in model else lengths
    )
    return float(lengths.sum()), float((triangle(seen) + (lengths - seen) * seen).sum())


def triangle(lengths: torch.Tensor) -> torch.Tensor:
    """1 + 2 + ... up to each of the lengths."""
    return lengths * (lengths + 1) / 2


def measure_epochs(
    axes: dict[str, Any], config: dict[str, Any], sequences: Sequences, digest: str, settings: dict[str, Any]
) -> list[Row]:
    """Rows of a variant: seconds of an epoch, the median of `timed` after the first, in which graphs are captured;
    tokens, padding, pairs; and on CUDA the most memory of the first epoch, before anything is evaluated."""
    config = deepcopy(config)
    config["training"]["epochs"] = 1 + settings["timed"]
    (training,) = train([config], sequences, digest)
    torch.manual_seed(0)
    shapes = [step.shape for step in training.schedule.epoch()]
    padded = sum(shape.num_tokens for shape in shapes if isinstance(shape, StaticShape))
    tokens, pairs = tokens_and_pairs(training.schedule.lengths, config)
    seconds = statistics.median(line["train/seconds"] for line in training.history[1:])
    found = [
        row(axes, "epoch, alone", seconds, "s"),
        row(axes, "tokens", round(tokens), "tokens"),
        row(axes, "tokens and padding", padded, "tokens"),
        row(axes, "pairs", round(pairs), "pairs"),
    ]
    if "train/peak_bytes" in training.history[0]:
        found.append(row(axes, "peak", training.history[0]["train/peak_bytes"], "B"))
    return found


def measure_runs(
    every: list[tuple[dict[str, Any], dict[str, Any]]], sequences: Sequences, digest: str, settings: dict[str, Any]
) -> list[Row]:
    """Rows of each run, of axes and config: its metrics on test, the epoch that is chosen, and its training's seconds,
    while the others are trained too."""
    found = []
    trainings = train([config for _, config in every], sequences, digest)
    for (axes, config), training in zip(every, trainings, strict=True):
        held_out = training.split.held_out["test"]
        size = config["training"]
        (ranking,) = rank(
            cast(Scorer, training.model), sequences, held_out, [Rules.of(config)], size["max_len"], size["batch"]
        )
        history = sequences.offsets.diff()[held_out.users] - held_out.num_after - 1
        for part, users in (("", history > 0), (LONG, history > settings["longer_than"])):
            ranks, count = ranking.ranks[users], int(users.sum())
            found.append(row(axes, f"users{part}", count, "users"))
            for name in settings["metrics"] if count else []:
                found.append(row(axes, name + part, round(float(user_values(ranks, name).mean()), 6), "fraction"))
        found.append(row(axes, "chosen epoch", reported_epoch(config, training.history), "epochs"))
        seconds = sum(line["train/seconds"] for line in training.history)
        found += [row(axes, "training", round(seconds, 3), "s"), row(axes, "trained at once", len(every), "runs")]
    return found


def train(configs: list[dict[str, Any]], sequences: Sequences, digest: str) -> list[Training]:
    """Trained runs: on a GPU at once, on a CPU one after the other. Raises what a training fails with."""
    device = sequences.item.device
    compute_dtype = pick_precision("bf16", device)[1]
    gc.collect()  # of earlier runs, whose memory would count as these ones'
    if device.type == "cuda":
        torch._C._cuda_clearCublasWorkspaces()  # cuBLAS keeps memory for every stream that it has ever worked on
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        trainings = [
            Training(config, sequences, digest, Path(folder, str(number)), compute_dtype, title=f"run {number}: ")
            for number, config in enumerate(configs)
        ]
        for together in [trainings] if device.type == "cuda" else [[training] for training in trainings]:
            for _, failure in train_together(together):
                if failure is not None:
                    raise failure
    return trainings
