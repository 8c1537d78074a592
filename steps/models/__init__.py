"""The rows of the tables: one file a model, under the interface of `base`."""

from typing import Any

from steps.common.config import WITHOUT_RANDOMNESS
from steps.models.base import CountingModel, Model, SequenceModel
from steps.models.bert4rec import BERT4Rec
from steps.models.gru4rec import GRU4Rec
from steps.models.hstu import HSTU
from steps.models.item_knn import ItemKNN
from steps.models.markov import Markov
from steps.models.popular import MostPopular
from steps.models.sasrec import SASRec
from steps.models.transformer_pp import TransformerPP

__all__ = ["CountingModel", "Model", "SequenceModel", "build", "is_counting"]


def is_counting(config: dict[str, Any]) -> bool:
    """Whether `build` makes a `CountingModel` of a run's config.json."""
    return config["model"]["model"] in WITHOUT_RANDOMNESS


def build(config: dict[str, Any], num_items: int) -> CountingModel | SequenceModel:
    """The untrained model that a run's config.json describes, for items 1..num_items."""
    settings = config["model"]
    match settings["model"]:
        case "popular":
            return MostPopular(num_items)
        case "markov":
            return Markov(num_items)
        case "item-knn":
            return ItemKNN(settings, num_items)
        case "sasrec":
            return SASRec(settings, config["training"], num_items)
        case "hstu":
            return HSTU(settings, config["training"], num_items)
        case "transformer++":
            return TransformerPP(settings, config["training"], num_items)
        case "bert4rec":
            return BERT4Rec(settings, config["training"], num_items)
        case "gru4rec":
            return GRU4Rec(settings, config["training"], num_items)
        case name:
            raise ValueError(f"no model {name!r}")
