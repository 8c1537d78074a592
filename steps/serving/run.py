"""A run's folder and its processed data, as what recommends."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import torch

from kernels.jagged.naive import sequence_and_position
from steps.common.cli import StepError
from steps.common.files import read_json, reading
from steps.common.provenance import require_files
from steps.data.sequences import Sequences
from steps.evaluation.exact_ranks import Rules, candidates
from steps.serving.recommender import History, Recommender, trained_model
from steps.serving.titles import Catalogue
from steps.serving.trained import open_run

_REMEDY = "run preprocess again"


@dataclass(frozen=True)
class Users:
    """The users of a data set, by the ids that the raw data has."""

    number: dict[str, int]
    sequences: Sequences

    def history(self, raw_id: str) -> History:
        """All that a user did. Raises StepError if there is no such user."""
        if raw_id not in self.number:
            raise StepError(f"no user has the id {raw_id!r}; the data has {len(self.number)} users")
        begin, end = self.sequences.offsets[self.number[raw_id] :][:2].tolist()
        return History(self.sequences.item[begin:end].tolist(), self.sequences.timestamp[begin:end].tolist())


def load_run(run: Path, data: Path) -> tuple[Recommender, Users]:
    """What a trained run's folder recommends, on the CPU, and the users of its processed data.

    Raises StepError that names the file if the run is not trained, the data are not those it was trained on, or one of
    their files is not as its manifest says.
    """
    trained = open_run(run, data)
    config, sequences = trained.config, trained.sequences
    model = trained_model(run, config, sequences.num_items)
    users = _read(data, "users")
    number = dict(zip(users["raw_id"].cast(pl.String), users["id"], strict=True))
    return recommender_of(config, model, sequences, data), Users(number, sequences)


def recommender_of(config: dict[str, Any], model: torch.nn.Module, sequences: Sequences, data: Path) -> Recommender:
    """What recommends with a model that was trained on the sequences of the folder `data`."""
    items = _read(data, "items").sort("id")
    catalogue = Catalogue(items["raw_id"].cast(pl.String).to_list(), items["title"].fill_null("").to_list())
    return Recommender(
        config, model, catalogue, candidates(sequences, Rules.of(config).candidates), typical_gap(sequences)
    )


def popular(sequences: Sequences, count: int) -> list[int]:
    """The items, from 1, with the most interactions: a history to show as an example, which is nobody's."""
    counts = sequences.counts(torch.zeros_like(sequences.offsets[1:]))
    return counts.argsort(descending=True, stable=True)[:count].tolist()


def _read(data: Path, name: str) -> pl.DataFrame:
    """A table of the processed data, as its manifest describes it."""
    manifest, path = data / "manifest.json", data / f"{name}.parquet"
    require_files(data, {path.name: str(read_json(manifest).get(f"{name}_sha256"))}, manifest, _REMEDY)
    with reading(path, _REMEDY):
        return pl.read_parquet(path)


def typical_gap(sequences: Sequences) -> int:
    """The median time from an interaction of a user to the next that has another time, in seconds; 0 if none has."""
    user, _ = sequence_and_position(sequences.offsets, len(sequences.item))
    gaps = sequences.timestamp.diff()[user.diff() == 0]
    gaps = gaps[gaps > 0]
    return int(gaps.median()) if len(gaps) else 0
