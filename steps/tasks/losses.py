"""The losses a next-item model can be trained with, each a mean over all tokens.

States (T, d) predict `targets` (T,) among items 1..V, whose embeddings are `table` (V + 1, d); row 0 is padding.
In a padded batch `token_mask` (T,) is False for padding, whose targets are 0 and whose losses do not count.
`similarity` also says how items are ranked: by cosine or by dot product.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F

from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.sampled_softmax import sampled_softmax
from kernels.sampled_softmax.naive import NORM_EPS
from steps.common.cli import StepError
from steps.common.typed import Count, EntryError, Positive, Share, read
from steps.data.sequences import Part


@dataclass(frozen=True)
class LossConfig:
    """The `loss` entry of a row in params/models.yaml. negatives: per token; calibration: gBCE's t."""

    name: Literal["sampled-softmax", "in-batch-softmax", "softmax", "bce", "gbce"]
    similarity: Literal["cosine", "dot"]
    temperature: Positive
    negatives: Count = 0
    calibration: Share = 0.0


@dataclass(frozen=True)
class WithLoss:
    """The entry of `model` that a task with a loss reads."""

    loss: LossConfig


def read_loss(settings: dict[str, Any], negatives: int) -> LossConfig:
    """The loss that a `model` entry describes. negatives: those of a token, unless the entry says how many.

    Raises EntryError if it is missing or wrong, or if its parts do not fit.
    """
    config, given = read(WithLoss, settings, "model.", others=True).loss, settings["loss"]
    if config.name == "gbce" and "calibration" not in given:
        raise EntryError("key model.loss.calibration: is missing")
    if config.name != "gbce" and "calibration" in given:
        raise EntryError(f"key model.loss.calibration: loss {config.name} does not read it")
    if config.name == "softmax" and "negatives" in given:
        raise EntryError("key model.loss.negatives: loss softmax does not read it: its negatives are all other items")
    if config.name == "in-batch-softmax" and config.similarity != "cosine":
        raise EntryError("key model.loss.similarity: loss in-batch-softmax has cosine alone")
    return config if "negatives" in given else replace(config, negatives=negatives)


def read_cross_entropy(settings: dict[str, Any]) -> None:
    """Raise EntryError unless the loss is the one of tasks that have no other: full softmax, by dot product."""
    config = read_loss(settings, 0)
    if (config.name, config.similarity, config.temperature) != ("softmax", "dot", 1.0):
        raise EntryError(f"key model.loss: {settings['loss']!r} is not softmax by dot product at temperature 1")


def next_item_loss(
    config: LossConfig,
    states: torch.Tensor,
    table: torch.Tensor,
    targets: torch.Tensor,
    token_mask: torch.Tensor | None = None,
    negative_pool: torch.Tensor | None = None,
    part: Part | None = None,
) -> torch.Tensor:
    """The configured loss: `sampled-softmax`, `in-batch-softmax`, `softmax`, `bce` or `gbce`.

    negative_pool: (P,), the rows of the table that sampled softmax draws its negatives from; None: all.
    part: which tokens of a batch that several processes share these are.
    """
    match config.name:
        case "sampled-softmax":
            negatives = _sample_negatives(len(targets), config.negatives, table, negative_pool, part)
            if config.similarity == "dot":
                positive, negative = _logits(config, states, table, targets, negatives)
                logits = torch.cat([positive[:, None], negative], dim=1)
                return masked_mean(-F.log_softmax(logits, dim=1)[:, 0], token_mask)
            return masked_mean(sampled_softmax(states, table, targets, negatives, config.temperature), token_mask)
        case "in-batch-softmax":
            return in_batch_softmax(states, table, targets, config.negatives, config.temperature, token_mask)
        case "softmax":
            if config.similarity == "cosine":
                states, table = (F.normalize(vectors, dim=-1, eps=NORM_EPS) for vectors in (states, table))
            if config.temperature != 1:
                states = states / config.temperature
            return linear_cross_entropy(states, table, targets)
        case "bce":
            negatives = _sample_negatives(len(targets), config.negatives, table, None, part)
            return binary_cross_entropy(*_logits(config, states, table, targets, negatives), token_mask=token_mask)
        case "gbce":
            negatives = _sample_negatives(len(targets), config.negatives, table, None, part)
            power = gbce_power(config.negatives, len(table) - 1, config.calibration)
            return binary_cross_entropy(*_logits(config, states, table, targets, negatives), power, token_mask)
        case name:
            raise ValueError(f"no loss {name!r}")


def masked_mean(losses: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
    """The mean of losses (T,) over the tokens that are not padding."""
    if token_mask is None:
        return losses.mean()
    return torch.where(token_mask, losses, 0.0).sum() / token_mask.sum()


def scores(similarity: str, states: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Similarity (T, V + 1) of every state and every item: `cosine` or `dot`."""
    if similarity == "cosine":
        return F.normalize(states, dim=-1, eps=NORM_EPS) @ F.normalize(table, dim=-1, eps=NORM_EPS).T
    return states @ table.T


def in_batch_softmax(
    states: torch.Tensor,
    table: torch.Tensor,
    targets: torch.Tensor,
    negatives: int,
    temperature: float,
    token_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sampled softmax whose negatives are drawn from the batch's targets, so popular items come more often.

    The logarithm of an item's frequency in the batch, its sampling probability, is subtracted from its logit
    (the logQ correction; arXiv 2306.04039).
    """
    sampled = targets[_sample_indices(targets, negatives, token_mask)]
    # torch.bincount would wait for the device.
    counts = torch.zeros(len(table), dtype=torch.int64, device=targets.device)
    num_tokens = len(targets) if token_mask is None else token_mask.sum()
    frequency = counts.index_add_(0, targets, torch.ones_like(targets)) / num_tokens
    log_frequency = frequency.clamp(min=1 / len(targets)).log()  # items outside the batch are never looked up
    return masked_mean(sampled_softmax(states, table, targets, sampled, temperature, log_frequency), token_mask)


def binary_cross_entropy(
    positive: torch.Tensor, negative: torch.Tensor, power: float = 1.0, token_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """-(power log sigmoid(s+) + sum over negatives log(1 - sigmoid(s-))) / (R + 1), from logits (T,) and (T, R).

    With power 1 this is SASRec's loss (arXiv 1808.09781, equation 7), as a mean over its R + 1 terms;
    with power beta gSASRec's gBCE (arXiv 2308.07192, equation 14).
    """
    terms = -power * F.logsigmoid(positive) - F.logsigmoid(-negative).sum(1)
    return masked_mean(terms / (negative.shape[1] + 1), token_mask)


def gbce_power(negatives: int, items: int, calibration: float) -> float:
    """beta = alpha (t (1 - 1/alpha) + 1/alpha), alpha = R / (V - 1) the sampling rate (arXiv 2308.07192, eq. 20).

    t = 0 leaves binary cross-entropy as it is; t = 1 gives calibrated probabilities. Raises StepError for a catalogue
    without negatives.
    """
    if items < 2:
        raise StepError(f"loss gbce needs a catalogue of 2 items or more, and this one has {items}; take another loss")
    alpha = negatives / (items - 1)
    return alpha * (calibration * (1 - 1 / alpha) + 1 / alpha)


def _sample_negatives(
    tokens: int,
    count: int,
    table: torch.Tensor,
    negative_pool: torch.Tensor | None = None,
    part: Part | None = None,
) -> torch.Tensor:
    """Negatives (tokens, count), drawn uniformly with replacement from `negative_pool`, or from all items.

    Of a part of a batch: drawn for the whole batch, so that a token has the negatives that one process gives it.
    """
    low, high = (1, len(table)) if negative_pool is None else (0, len(negative_pool))
    if part is None:
        drawn = torch.randint(low, high, (tokens, count), device=table.device)
    else:
        whole = torch.randint(low, high, (part.num_tokens, count), device=table.device, generator=part.draws)
        drawn = whole[part.place]
    return drawn if negative_pool is None else negative_pool[drawn]


def _sample_indices(targets: torch.Tensor, count: int, token_mask: torch.Tensor | None) -> torch.Tensor:
    """Indices (T, count) of tokens, drawn uniformly with replacement; never of padding, which is at the end."""
    shape = (len(targets), count)
    if token_mask is None:
        return torch.randint(0, len(targets), shape, device=targets.device)
    return torch.randint(0, 2**62, shape, device=targets.device) % token_mask.sum()


def _logits(
    config: LossConfig, states: torch.Tensor, table: torch.Tensor, targets: torch.Tensor, negatives: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of positives (T,) and negatives (T, R); of a negative that equals the positive -inf."""
    logits = scores(config.similarity, states, table) / config.temperature
    positive = logits.gather(1, targets[:, None])[:, 0]
    negative = logits.gather(1, negatives).masked_fill(negatives == targets[:, None], -torch.inf)
    return positive, negative
