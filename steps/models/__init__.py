"""The models that the tables compare, one file each: encoders with a typed config, and models that count."""

from typing import Any

from steps.common.config import COUNT_BASED, TrainingConfig
from steps.common.typed import read
from steps.models.base import CountBasedModel, Encoder, HeadsConfig, Model, Recommender
from steps.models.bert4rec import BERT4Rec
from steps.models.fuxi import FuXiAlpha, FuXiAlphaConfig, FuXiGamma, FuXiGammaConfig
from steps.models.gru4rec import GRU, GRU4Rec, GRU4RecConfig
from steps.models.hstu import HSTU, HSTUConfig
from steps.models.item_knn import ItemKNN, ItemKNNConfig
from steps.models.ligr import LiGR, LiGRConfig
from steps.models.markov import Markov
from steps.models.mean_rating import MeanRating, MeanRatingConfig
from steps.models.popular import MostPopular
from steps.models.sasrec import SASRec, SASRecConfig
from steps.models.transformer_pp import TransformerPP

__all__ = [
    "ENCODERS",
    "CountBasedModel",
    "Encoder",
    "Model",
    "Recommender",
    "build_count_based",
    "build_encoder",
    "is_count_based",
]

#: By the `model` of a row in params/models.yaml: the encoder, and the entries that it reads.
ENCODERS: dict[str, tuple[type[Any], type[Any]]] = {
    "sasrec": (SASRec, SASRecConfig),
    "hstu": (HSTU, HSTUConfig),
    "transformer++": (TransformerPP, HeadsConfig),
    "ligr": (LiGR, LiGRConfig),
    "fuxi-alpha": (FuXiAlpha, FuXiAlphaConfig),
    "fuxi-gamma": (FuXiGamma, FuXiGammaConfig),
    "bert4rec": (BERT4Rec, HeadsConfig),
    "gru4rec": (GRU4Rec, GRU4RecConfig),
    "gru": (GRU, GRU4RecConfig),
}


def is_count_based(config: dict[str, Any]) -> bool:
    """Whether a run's config.json describes a `CountBasedModel`."""
    return config["model"].get("model") in COUNT_BASED


def build_count_based(settings: dict[str, Any], num_items: int, protocol: dict[str, Any]) -> CountBasedModel:
    """The model that the `model` entry of a run's config.json describes, before it has counted anything."""
    match settings["model"]:
        case "popular":
            return MostPopular(num_items)
        case "markov":
            return Markov(num_items)
        case "item-knn":
            return ItemKNN(read(ItemKNNConfig, settings, "model.", others=True), num_items)
        case "mean-rating":
            config = read(MeanRatingConfig, settings, "model.", others=True)
            return MeanRating(config, num_items, protocol["positive"])
        case name:
            raise ValueError(f"no model {name!r} that counts")


def build_encoder(settings: dict[str, Any], training: TrainingConfig) -> Encoder:
    """The untrained encoder that the `model` entry of a run's config.json describes."""
    kind, config = ENCODERS[settings["model"]]
    encoder: Encoder = kind(read(config, settings, "model.", others=True), training.max_len, training.dropout)
    return encoder
