"""Check the evaluation itself: models that know nothing must score as chance does, under every protocol.

There are three: one that scores all items alike, one that scores at random, and the rule "seen in the window", which
scores 1 the items of the user's window and 0 all others. If one of them is above chance, the evaluation tells a target
from the other candidates where the model cannot. Runs on a data set, and on generated sequences under both rules for
repeats: their items are drawn with replacement, so that a tenth of the targets are repeats, which tell a model nothing.

Writes a table as json and md.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate as render

from steps.common import params
from steps.common.cli import run_step
from steps.common.files import write_json, write_text
from steps.common.provenance import commit
from steps.data.sequences import Batch, Sequences, load_sequences
from steps.data.split import split_sequences
from steps.evaluation.metrics import hit_rate, ndcg
from steps.evaluation.ranks import Rules, rank
from steps.models import Model

_USERS, _ITEMS, _SHORTEST, _LONGEST = 5000, 500, 20, 90  # of the generated sequences
_MAX_LEN, _BATCH = 50, 256
_RANDOM_SEEDS = 10
_DEVIATIONS = 3.0  # half the width of an interval
METRICS = {"hr@10": (hit_rate, 10), "hr@200": (hit_rate, 200), "ndcg@10": (ndcg, 10)}


class _Null(Model):
    def __init__(self, num_items: int, seed: int = 0) -> None:
        super().__init__()
        self.num_items = num_items
        self.random = torch.Generator().manual_seed(seed)


class Constant(_Null):
    """Scores all items alike."""

    def score(self, batch: Batch) -> torch.Tensor:
        return torch.zeros(len(batch.user), self.num_items + 1)


class Random(_Null):
    """Scores at random."""

    def score(self, batch: Batch) -> torch.Tensor:
        return torch.rand(len(batch.user), self.num_items + 1, generator=self.random, dtype=torch.float64)


class SeenInTheWindow(_Null):
    """Scores 1 the items of the window, 0 all others."""

    def score(self, batch: Batch) -> torch.Tensor:
        scores = torch.zeros(len(batch.user), self.num_items + 1)
        return scores.index_put_((batch.sequence_id, batch.item), torch.ones(()))


def generated() -> Sequences:
    """Sequences whose items are drawn uniformly with replacement, at random times."""
    random = torch.Generator().manual_seed(0)
    lengths = torch.randint(_SHORTEST, _LONGEST + 1, (_USERS,), generator=random)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    item = torch.randint(1, _ITEMS + 1, (int(offsets[-1]),), generator=random)
    times = torch.randint(0, 10**8, item.shape, generator=random).split(lengths.tolist())
    return Sequences(offsets, item, torch.cat([part.sort().values for part in times]), _ITEMS)


def judge(sequences: Sequences, protocol: dict[str, Any], repeats: str) -> list[dict[str, Any]]:
    """A row per metric under one protocol and rule for repeats: every model's figure, and chance's interval.

    Chance is the random model's mean over seeds and users, its interval `_DEVIATIONS` standard errors to both sides.
    `fits` says whether the constant model is inside the interval, and the rule is not above it by more than
    `_DEVIATIONS` standard errors of its own.
    """
    held_out = split_sequences(sequences, protocol).held_out["test"]
    rules = [Rules.of({"protocol": protocol, "repeats": repeats})]

    def per_user(model: Model) -> dict[str, torch.Tensor]:
        (ranking,) = rank(model, sequences, held_out, rules, _MAX_LEN, _BATCH)
        return {name: values(ranking.ranks, k) for name, (values, k) in METRICS.items()}

    constant, rule = per_user(Constant(sequences.num_items)), per_user(SeenInTheWindow(sequences.num_items))
    seeds = [per_user(Random(sequences.num_items, seed)) for seed in range(_RANDOM_SEEDS)]
    rows = []
    for name in METRICS:
        every = torch.stack([one[name] for one in seeds])
        chance = float(every.mean())
        half = _DEVIATIONS * float(every.std()) / math.sqrt(every.numel())
        above = half + _DEVIATIONS * float(rule[name].std()) / math.sqrt(every.shape[1])
        figures = {"constant": float(constant[name].mean()), "seen in the window": float(rule[name].mean())}
        fits = abs(figures["constant"] - chance) <= half and figures["seen in the window"] <= chance + above
        row = {"metric": name, "users": every.shape[1], "random": chance, "half_interval": half} | figures
        rows.append({key: round(value, 6) if isinstance(value, float) else value for key, value in row.items()})
        rows[-1]["fits"] = fits
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, type=Path, help="data/processed/<dataset>, which has no repeats")
    parser.add_argument("--output", required=True, type=Path, help="folder for null-models.json and null-models.md")


def main(args: argparse.Namespace) -> None:
    real, digest = load_sequences(args.data, torch.device("cpu"))
    cases = [(args.data.name, real, "none"), *(("generated", generated(), rule) for rule in ("recommend", "leave-out"))]
    rows = []
    for name, sequences, repeats in cases:
        for protocol, settings in params.load("protocols").items():
            about = {"data": name, "repeats": repeats, "protocol": protocol}
            rows += [about | row for row in judge(sequences, settings, repeats)]
    write_json(args.output / "null-models.json", {"rows": rows, "data_sha256": digest, "commit": commit()})
    lines = [
        [row["data"], row["repeats"], row["protocol"], row["metric"].upper(), str(row["users"])]
        + [f"{row['random']:.4f} ± {row['half_interval']:.4f}"]
        + [f"{row[model]:.4f}" for model in ("constant", "seen in the window")]
        + ["yes" if row["fits"] else "no"]
        for row in rows
    ]
    headers = [
        "data",
        "repeats",
        "protocol",
        "metric",
        "users",
        "random",
        "constant",
        "seen in the window",
        "as chance",
    ]
    table = render(lines, headers, tablefmt="github", disable_numparse=True)
    note = (
        "Models that know nothing, under every protocol. Random: the mean over "
        f"{_RANDOM_SEEDS} seeds ± {_DEVIATIONS:.0f} standard errors. As chance: the constant model is inside, the rule "
        f"is not above by more than {_DEVIATIONS:.0f} standard errors of its own. Data sha256 {digest}."
    )
    write_text(args.output / "null-models.md", f"# Null models\n\n{note}\n\n{table}\n")
    print(f"{sum(row['fits'] for row in rows)} of {len(rows)} figures are as chance has them")


if __name__ == "__main__":
    run_step("null_models", __doc__, add_arguments, main)
