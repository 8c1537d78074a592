"""What models are trained for: a loss over an encoder, scores, and how they are evaluated."""

from dataclasses import fields
from typing import Any

from steps.common.config import COUNT_BASED, TrainingConfig, task_of
from steps.common.typed import EntryError, read
from steps.data.fields import FieldSizes
from steps.models import ENCODERS, CountBasedModel, build_count_based, is_count_based
from steps.models.item_knn import ItemKNNConfig
from steps.models.rankers import RANKERS
from steps.tasks.base import Task
from steps.tasks.feature_ranking import FeatureRanking
from steps.tasks.masked_items import MaskedItems
from steps.tasks.ranking import Ranking
from steps.tasks.retrieval import Retrieval
from steps.tasks.sessions import Sessions

__all__ = ["Task", "build"]

#: A data set's shape has all of these, whichever of them the encoder reads.
_SHAPE = ("dim", "blocks", "heads", "dqk", "dv")
#: Encoders that are not trained to predict the next item at every token.
_OTHER_TASKS: dict[str, type[Task]] = {"bert4rec": MaskedItems, "gru4rec": Sessions}


def build(config: dict[str, Any], num_items: int, sizes: FieldSizes | None = None) -> CountBasedModel | Task:
    """The untrained model that a run's config.json describes, for items 1..num_items.

    sizes: of the data's fields, for models that read features.
    Raises EntryError if an entry of `model` or `training` is missing or wrong.
    """
    settings = config["model"]
    name = settings.get("model")
    names = [*COUNT_BASED, *ENCODERS, *RANKERS]
    if name not in names:
        raise EntryError(f"key model.model: {name!r} is not one of {', '.join(names)}")
    ranks = task_of(config.get("protocol", {})) == "ranking"
    if name in RANKERS and not ranks:
        raise EntryError(f"key model.model: {name!r} ranks, and does nothing else: take a protocol of ranking")
    ranking: type[Ranking | FeatureRanking] = FeatureRanking if name in RANKERS else Ranking
    task = ranking if ranks else _OTHER_TASKS.get(name, Retrieval)
    if ranks and name in (*COUNT_BASED, *_OTHER_TASKS):
        raise EntryError(f"key model.model: {name!r} does not rank: protocol {config['protocol']['name']} wants that")
    readers = () if name in COUNT_BASED else ((ENCODERS | RANKERS)[name][1], *task.configs)
    known = {"model", *_SHAPE, *(field.name for reader in readers for field in fields(reader))}
    known |= {field.name for field in fields(ItemKNNConfig)} if name == "item-knn" else set()
    unread = [key for key in settings if key not in known]
    if unread:
        raise EntryError(f"key model.{unread[0]}: nothing reads it")
    if is_count_based(config):
        return build_count_based(settings, num_items)
    training = read(TrainingConfig, config["training"], "training.")
    if not ranks:
        return task(settings, training, num_items)
    return ranking(settings, training, num_items, config["protocol"], sizes)
