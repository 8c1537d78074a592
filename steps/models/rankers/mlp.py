"""Linear maps with a ReLU and dropout behind each, and a last one with neither."""

from dataclasses import dataclass
from itertools import pairwise

from torch import nn

from steps.common.typed import Count


@dataclass(frozen=True)
class MLPConfig:
    """layers: inner ones; hidden: their width."""

    layers: Count
    hidden: Count


def mlp(num_inputs: int, config: MLPConfig, num_outputs: int, dropout: float) -> nn.Sequential:
    """From (T, num_inputs) to (T, num_outputs)."""
    widths = [num_inputs, *[config.hidden] * config.layers]
    inner: list[nn.Module] = []
    for before, behind in pairwise(widths):
        inner += [nn.Linear(before, behind), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*inner, nn.Linear(config.hidden, num_outputs))
