"""The models that the tables compare: one file a model, with the interface of `base`."""

from typing import Any

from steps.common.config import COUNT_BASED
from steps.models.base import CountBasedModel, Model, SequenceModel
from steps.models.bert4rec import BERT4Rec
from steps.models.gru4rec import GRU4Rec
from steps.models.hstu import HSTU
from steps.models.item_knn import ItemKNN
from steps.models.markov import Markov
from steps.models.popular import MostPopular
from steps.models.sasrec import SASRec
from steps.models.transformer_pp import TransformerPP

__all__ = ["CountBasedModel", "Model", "SequenceModel", "build", "is_count_based"]


def is_count_based(config: dict[str, Any]) -> bool:
    """Whether `build` makes a `CountBasedModel` of a run's config.json."""
    return config["model"]["model"] in COUNT_BASED


def build(config: dict[str, Any], num_items: int) -> CountBasedModel | SequenceModel:
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
