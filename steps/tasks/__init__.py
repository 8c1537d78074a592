"""What models are trained for: a loss over an encoder, scores, and how they are evaluated."""

from typing import Any

from steps.common.config import COUNT_BASED, TrainingConfig
from steps.common.typed import EntryError, read
from steps.models import ENCODERS, CountBasedModel, build_count_based, is_count_based
from steps.tasks.base import Task
from steps.tasks.masked_items import MaskedItems
from steps.tasks.retrieval import Retrieval
from steps.tasks.sessions import Sessions

__all__ = ["Task", "build"]

#: Encoders that are not trained to predict the next item at every token.
_OTHER_TASKS: dict[str, type[Task]] = {"bert4rec": MaskedItems, "gru4rec": Sessions}


def build(config: dict[str, Any], num_items: int) -> CountBasedModel | Task:
    """The untrained model that a run's config.json describes, for items 1..num_items.

    Raises EntryError if an entry of `model` or `training` is missing or wrong.
    """
    settings = config["model"]
    name = settings.get("model")
    if name not in (*COUNT_BASED, *ENCODERS):
        raise EntryError(f"key model.model: {name!r} is not one of {', '.join([*COUNT_BASED, *ENCODERS])}")
    if is_count_based(config):
        return build_count_based(settings, num_items)
    training = read(TrainingConfig, config["training"], "training.")
    return _OTHER_TASKS.get(name, Retrieval)(settings, training, num_items)
