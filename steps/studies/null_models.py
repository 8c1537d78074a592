"""Check the evaluation itself: models that know nothing must score as chance does, under every protocol.

Three of them: one that scores all items alike, one that scores at random, and the rule "seen in the window", which
scores 1 what the user has just had and 0 all else. If one of them is above chance, a target can be told from the other
candidates without knowing anything of it. Runs on a data set, and on generated sequences whose items are drawn with
replacement, so that a tenth of the targets are repeats, which tell nothing either, under both rules for repeats.
"""

import math
from functools import cache
from pathlib import Path
from typing import Any

import torch

from steps.data.sequences import Batch, Sequences, load_sequences
from steps.data.split import split_sequences
from steps.evaluation.exact_ranks import Rules, rank
from steps.evaluation.metrics import user_values
from steps.models import Recommender
from steps.studies.rows import Row, row

GENERATED = "generated"
METRICS = ("hr@10", "hr@200", "ndcg@10")


class _Null(Recommender):
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
    """Scores 1 what stands in the window, 0 all else."""

    def score(self, batch: Batch) -> torch.Tensor:
        scores = torch.zeros(len(batch.user), self.num_items + 1)
        return scores.index_put_((batch.sequence_id, batch.item), torch.ones(()))


def cases(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """Data, rule for repeats, and protocol."""
    data = [(name, entry["repeats"]) for name, entry in plan["data"]["processed"].items()]
    data += [(GENERATED, rule) for rule in plan["settings"]["generated"]["repeats"]]
    return [
        {"data": name, "repeats": repeats, "protocol": protocol}
        for name, repeats in data
        for protocol in plan["protocols"]
    ]


def measure(case: dict[str, Any], plan: dict[str, Any], data: Path) -> list[Row]:
    """Rows of a case: of every ranking metric the three models' figures, and whether they are as chance has them."""
    settings, digest = plan["settings"], None
    if case["data"] == GENERATED:
        sizes = settings["generated"]
        sequences = generated(sizes["users"], sizes["items"], sizes["shortest"], sizes["longest"])
    else:
        sequences, digest = load_sequences(data / "processed" / case["data"], torch.device("cpu"))
    protocol = plan["protocols"][case["protocol"]]
    found = []
    for judged in judge(sequences, protocol, case["repeats"], settings):
        axes = case | {"ranking": judged["ranking"], "users": judged["users"]}
        middle, half = judged["random"], judged["half_interval"]
        interval = {"low": round(middle - half, 6), "high": round(middle + half, 6)}
        found.append(row(axes, "random", middle, "fraction", **interval, data_sha256=digest))
        for name in ("constant", "seen in the window"):
            found.append(row(axes, name, judged[name], "fraction", data_sha256=digest))
        found.append(row(axes, "as chance", int(judged["fits"]), "1 if true", data_sha256=digest))
    return found


@cache
def generated(users: int, items: int, shortest: int, longest: int) -> Sequences:
    """Sequences whose items are drawn uniformly with replacement, at random times; from shortest to longest items."""
    random = torch.Generator().manual_seed(0)
    lengths = torch.randint(shortest, longest + 1, (users,), generator=random)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    item = torch.randint(1, items + 1, (int(offsets[-1]),), generator=random)
    times = torch.randint(0, 10**8, item.shape, generator=random).split(lengths.tolist())
    return Sequences(offsets, item, torch.cat([part.sort().values for part in times]), items)


def judge(
    sequences: Sequences, protocol: dict[str, Any], repeats: str, settings: dict[str, Any]
) -> list[dict[str, Any]]:
    """A dict per metric under one protocol and rule for repeats: every model's figure, and chance's interval.

    Chance is the random model's mean over seeds and users, its interval `deviations` standard errors to both sides.
    `fits` says whether the constant model is inside, and the rule not above by more than `deviations` of its own.
    """
    held_out = split_sequences(sequences, protocol).held_out["test"]
    rules = [Rules.of({"protocol": protocol, "repeats": repeats})]
    deviations = settings["deviations"]

    def per_user(model: Recommender) -> dict[str, torch.Tensor]:
        (ranking,) = rank(model, sequences, held_out, rules, settings["max_len"], settings["batch"])
        return {name: user_values(ranking.ranks, name) for name in METRICS}

    constant, rule = per_user(Constant(sequences.num_items)), per_user(SeenInTheWindow(sequences.num_items))
    seeds = [per_user(Random(sequences.num_items, seed)) for seed in range(settings["seeds"])]
    found = []
    for name in METRICS:
        every = torch.stack([one[name] for one in seeds])
        chance = float(every.mean())
        half = deviations * float(every.std()) / math.sqrt(every.numel())
        above = half + deviations * float(rule[name].std()) / math.sqrt(every.shape[1])
        figures = {"constant": float(constant[name].mean()), "seen in the window": float(rule[name].mean())}
        fits = abs(figures["constant"] - chance) <= half and figures["seen in the window"] <= chance + above
        judged = {"ranking": name, "users": every.shape[1], "random": chance, "half_interval": half} | figures
        found.append({key: round(value, 6) if isinstance(value, float) else value for key, value in judged.items()})
        found[-1]["fits"] = fits
    return found
