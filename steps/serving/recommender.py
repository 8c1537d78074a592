"""A trained model with all that recommending needs, and nothing of the users it was trained on.

Needs torch, numpy, safetensors and rapidfuzz alone, so that it goes where it is served.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from steps.common.cli import StepError
from steps.common.config import building, read_config
from steps.common.device import use_threads
from steps.common.files import read_json, write_json
from steps.data.sequences import Sequences
from steps.evaluation.exact_ranks import Rules, best_items, require_finite
from steps.models import Recommender as RetrievalModel
from steps.models.weights import load_weights, save_weights
from steps.serving.titles import Catalogue
from steps.tasks import Task, build

_CATALOGUE = "catalogue.json"
_REMEDY = "write the model again"


@dataclass(frozen=True)
class History:
    """What a user did: items (from 1) in the order of time, when, and when the recommendation is wanted.

    timestamps: as many, in seconds since 1970, never falling. at: no earlier than the last. Both may be absent:
    `Recommender` says what stands in for them.
    """

    items: Sequence[int]
    timestamps: Sequence[int] | None = None
    at: int | None = None

    def __post_init__(self) -> None:
        """Raise StepError if the parts do not fit."""
        if not self.items:
            raise StepError("the history is empty: name at least one item")
        if self.timestamps is None:
            if self.at is not None:
                raise StepError("at: a time is given for the recommendation, and none for the items")
            return
        if len(self.timestamps) != len(self.items):
            raise StepError(f"timestamps: {len(self.timestamps)} are given for {len(self.items)} items")
        times = [*self.timestamps, *([] if self.at is None else [self.at])]
        if any(not 0 <= time < 2**62 for time in times):
            raise StepError("timestamps: they are whole seconds since 1970")
        if any(later < earlier for earlier, later in pairwise(times)):
            raise StepError("timestamps: they fall; name the items in the order of time")


@dataclass(frozen=True)
class Scored:
    """An item, from 1, and the score that the model gives it."""

    item: int
    score: float


class Recommender:
    """Recommends the items that a trained model scores highest, among the candidates of the run's protocol.

    Models that read times need those of the items, and the time at which the next item comes. A history without times
    is read as though its items came one typical gap after the other; and without `at` the next item comes one gap after
    the last. The typical gap is the median time between successive interactions of the data set, equal times left out:
    where most share their time with the last, as in MovieLens-1M, no time would pass, which a model rarely saw. The
    study `serving` compares what models hit with the users' own times and without any.
    """

    def __init__(
        self, config: dict[str, Any], model: torch.nn.Module, catalogue: Catalogue, candidates: torch.Tensor, gap: int
    ) -> None:
        """config: the run's config.json. candidates: (num_items + 1,) bool. gap: the typical gap, in seconds."""
        self.config, self.model, self.catalogue = config, model.eval(), catalogue
        self.candidates, self.gap = candidates, gap
        self.exclude = Rules.of(config).exclude
        self.max_len, self._batch = config["training"]["max_len"], config["training"]["batch"]

    @property
    def label(self) -> str:
        """The run in words."""
        return f"{self.config['row']} on {self.config['dataset']}, protocol {self.config['protocol']['name']}"

    @torch.inference_mode()
    def recommend(self, histories: Sequence[History], top: int, seen: bool = False) -> list[list[Scored]]:
        """For each history the `top` candidates of the highest scores, best first; fewer where there are fewer.

        Of equal scores the smallest id comes first. Items of the history are left out as the run's protocol does it:
        those of the window, or of the whole history, or none where the data recommends repeats. seen: leave none out.
        The model reads the last `max_len` items. Raises StepError if scores are not finite.
        """
        found: list[list[Scored]] = []
        for first in range(0, len(histories), self._batch):
            found += self._recommend(histories[first : first + self._batch], top, "nothing" if seen else self.exclude)
        return found

    def _recommend(self, histories: Sequence[History], top: int, exclude: str) -> list[list[Scored]]:
        sequences = self._sequences(histories)
        users = torch.arange(len(histories))
        none_after = torch.zeros_like(users)
        batch = sequences.batch(users, none_after, self.max_len)
        scores = self.model.score(batch)  # type: ignore[operator]
        require_finite(bool(torch.isfinite(scores).all()))
        excluded = ~self.candidates.expand_as(scores)
        if exclude != "nothing":
            user, item = (
                sequences.histories(users, none_after) if exclude == "history" else (batch.sequence_id, batch.item)
            )
            excluded.view(-1).index_fill_(0, user * scores.shape[1] + item, True)
        return self._scored(scores.masked_fill(excluded, -torch.inf), top)

    def _sequences(self, histories: Sequence[History]) -> Sequences:
        """The histories, each with one interaction more: padding, at the time for which recommendations are wanted."""
        lengths = torch.tensor([0, *(len(history.items) + 1 for history in histories)])
        item = [one for history in histories for one in (*history.items, 0)]
        times = [time for history in histories for time in self._times(history)]
        return Sequences(lengths.cumsum(0), torch.tensor(item), torch.tensor(times), len(self.catalogue))

    def _times(self, history: History) -> list[int]:
        if history.timestamps is None:
            return [place * self.gap for place in range(len(history.items) + 1)]
        return [*history.timestamps, history.timestamps[-1] + self.gap if history.at is None else history.at]

    @torch.inference_mode()
    def similar(self, item: int, top: int) -> list[Scored]:
        """The `top` candidates whose learnt embeddings are nearest to the item's, by their cosine; without the item.

        Raises StepError if the model has no item embeddings.
        """
        if not isinstance(self.model, Task):
            raise StepError(
                f"model {self.config['row']} counts and has no embeddings of items; take the run of a model that learns"
            )
        embeddings = F.normalize(self.model.items.weight.float(), dim=1)
        cosine = (embeddings @ embeddings[item])[None]
        excluded = ~self.candidates.clone()
        excluded[item] = True
        return self._scored(cosine.masked_fill(excluded, -torch.inf), top)[0]

    def _scored(self, ranked: torch.Tensor, top: int) -> list[list[Scored]]:
        items = best_items(ranked, top)
        scores = ranked.gather(1, items)
        return [
            [Scored(item, score) for item, score in zip(*row, strict=True) if item]
            for row in zip(items.tolist(), scores.tolist(), strict=True)
        ]

    def save(self, folder: Path) -> None:
        """Write into `folder` what `load` reads: config, weights, and the items with their ids and titles."""
        write_json(folder / "config.json", self.config)
        save_weights(self.model, folder / "model.safetensors")
        content = {
            "gap": self.gap,
            "ids": list(self.catalogue.ids),
            "titles": list(self.catalogue.titles) if self.catalogue.has_titles else None,
            "candidate": self.candidates[1:].int().tolist(),
        }
        (folder / _CATALOGUE).write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "Recommender":
        """What `save` wrote, on the CPU."""
        content = read_json(folder / _CATALOGUE, remedy=_REMEDY)
        catalogue = Catalogue(content["ids"], content["titles"] or [""] * len(content["ids"]))
        candidates = F.pad(torch.tensor(content["candidate"], dtype=torch.bool), (1, 0))
        config = read_config(folder)
        return cls(config, trained_model(folder, config, len(catalogue)), catalogue, candidates, content["gap"])


def trained_model(folder: Path, config: dict[str, Any], num_items: int) -> torch.nn.Module:
    """The model that a folder's config.json describes, with the weights beside it, on the CPU."""
    use_threads(None, [config])
    with building(folder):
        model = build(config, num_items)
    if not isinstance(model, RetrievalModel):
        raise StepError(
            f"{folder / 'config.json'}: model {config['row']} says whether a user engages with an item, and recommends "
            "none; take a run of another protocol"
        )
    load_weights(model, folder / "model.safetensors")
    return model
