"""A run's folder and its processed data, as what recommends."""

from dataclasses import dataclass
from pathlib import Path

import polars as pl
import torch

from kernels.jagged.naive import sequence_and_position
from steps.common.cli import StepError
from steps.common.config import read_config
from steps.common.files import read_json, reading
from steps.common.provenance import require_files, require_trained
from steps.data.sequences import Sequences, load_sequences
from steps.evaluation.ranks import Rules, candidates
from steps.serving.recommender import History, Recommender, trained_model
from steps.serving.titles import Catalogue

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
    source = run / "training.json"
    if not run.is_dir():
        raise StepError(f"{run} does not exist; it is a folder runs/<experiment>/<dataset>/<model>/<protocol>/seed-N")
    if not source.is_file():
        raise StepError(f"{run} is not trained; run train first")
    config, trained = read_config(run), read_json(source, remedy="train again")
    require_trained(run, config, trained, source)
    sequences, digest = load_sequences(data, torch.device("cpu"))
    if trained.get("data_sha256") != digest:
        raise StepError(f"{run} was trained on other sequences than {data} has; name its own with --data")
    manifest = data / "manifest.json"
    hashes = {f"{name}.parquet": str(read_json(manifest).get(f"{name}_sha256")) for name in ("items", "users")}
    require_files(data, hashes, manifest, _REMEDY)
    with reading(data / "items.parquet", _REMEDY):
        items = pl.read_parquet(data / "items.parquet").sort("id")
        catalogue = Catalogue(items["raw_id"].cast(pl.String).to_list(), items["title"].fill_null("").to_list())
    with reading(data / "users.parquet", _REMEDY):
        users = pl.read_parquet(data / "users.parquet")
        number = dict(zip(users["raw_id"].cast(pl.String), users["id"], strict=True))
    model = trained_model(run, config, sequences.num_items)
    candidate = candidates(sequences, Rules.of(config).candidates)
    return Recommender(config, model, catalogue, candidate, typical_gap(sequences)), Users(number, sequences)


def typical_gap(sequences: Sequences) -> int:
    """The median time between successive interactions of a user, in seconds."""
    user, _ = sequence_and_position(sequences.offsets, len(sequences.item))
    gaps = sequences.timestamp.diff()[user.diff() == 0]
    return int(gaps.median()) if len(gaps) else 0
