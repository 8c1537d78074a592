"""What models are trained for: a loss over an encoder, scores, and how they are evaluated."""

from dataclasses import fields
from typing import Any

from steps.common.config import COUNTING, TrainingConfig, task_of
from steps.common.typed import EntryError, read
from steps.data.fields import FieldSizes
from steps.evaluation.ranking import RankingEvaluation
from steps.evaluation.retrieval import RetrievalEvaluation
from steps.models import ENCODERS, CountBasedModel, build_count_based, is_count_based
from steps.models.item_knn import ItemKNNConfig
from steps.models.mean_rating import MeanRatingConfig
from steps.models.rankers import RANKERS
from steps.tasks.base import Task
from steps.tasks.feature_ranking import FeatureRanking
from steps.tasks.masked_items import MaskedItems
from steps.tasks.ranking import Ranking
from steps.tasks.retrieval import Retrieval
from steps.tasks.sessions import Sessions

__all__ = ["EVALUATIONS", "Task", "build"]

#: How the models of each task are evaluated after an epoch.
EVALUATIONS: dict[str, type[RetrievalEvaluation | RankingEvaluation]] = {
    "retrieval": RetrievalEvaluation,
    "ranking": RankingEvaluation,
}
#: A data set's shape has all of these, whichever of them the encoder reads.
_SHAPE = ("dim", "blocks", "heads", "dqk", "dv")
#: Encoders that are not trained to predict the next item at every token.
_OTHER_TASKS: dict[str, type[Task]] = {"bert4rec": MaskedItems, "gru4rec": Sessions}
#: By task, what is trained for it, by the `model` of a row.
_TRAINED: dict[str, dict[str, type[Task]]] = {
    "retrieval": {name: _OTHER_TASKS.get(name, Retrieval) for name in ENCODERS},
    "ranking": {name: Ranking for name in ENCODERS if name not in _OTHER_TASKS}
    | dict.fromkeys(RANKERS, FeatureRanking),
}
#: The entries that models which count read.
_OF_COUNTING: dict[str, type[Any]] = {"item-knn": ItemKNNConfig, "mean-rating": MeanRatingConfig}


def build(
    config: dict[str, Any], num_items: int, sizes: FieldSizes | None = None, sharded: bool = False
) -> CountBasedModel | Task:
    """The untrained model that a run's config.json describes, for items 1..num_items.

    sizes: of the data's fields, for models that read features. sharded: of a `RowwiseTable` this process, one of
    several, makes its rows alone.
    Raises EntryError if an entry of `model` or `training` is missing or wrong.
    """
    settings, protocol = config["model"], config.get("protocol", {})
    name, task = settings.get("model"), task_of(protocol)
    known = [*COUNTING[task], *_TRAINED[task]]
    if name not in known:
        raise EntryError(f"key model.model: {name!r} is not one of {', '.join(known)}, the models of {task}")
    if is_count_based(config):
        readers = [_OF_COUNTING[name]] if name in _OF_COUNTING else []
        _refuse_others(settings, readers)
        return build_count_based(settings, num_items, protocol)
    kind = _TRAINED[task][name]
    _refuse_others(settings, [(ENCODERS | RANKERS)[name][1], *kind.configs])
    training = read(TrainingConfig, config["training"], "training.")
    if issubclass(kind, (Ranking, FeatureRanking)):
        return kind(settings, training, num_items, protocol, sizes)
    return (
        kind(settings, training, num_items, sharded)
        if issubclass(kind, Retrieval)
        else kind(settings, training, num_items)
    )


def _refuse_others(settings: dict[str, Any], readers: list[type[Any]]) -> None:
    """Raise EntryError at an entry that none of the readers has."""
    known = {"model", *_SHAPE, *(field.name for reader in readers for field in fields(reader))}
    unread = [key for key in settings if key not in known]
    if unread:
        raise EntryError(f"key model.{unread[0]}: nothing reads it")
