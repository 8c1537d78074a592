"""FLOPs of training steps: of products alone, each of which is a multiplication and an addition.

What kernels compute again does not count, nor do padding, lookups, norms, element-wise functions and optimisers.
"""

from dataclasses import dataclass
from typing import Any

from steps.common.cli import StepError

#: Encoders whose products are known.
ENCODERS = ("hstu", "sasrec", "transformer++")


def trained(products: float) -> float:
    """FLOPs of a step whose forward pass has so many products, and its backward pass two for each of them."""
    return 3 * 2 * products


@dataclass(frozen=True)
class Work:
    """Products of a forward pass: for each token, of all layers and the loss, and for each pair of a query and a key
    that it sees, of all layers."""

    token: float
    pair: float

    def flops(self, tokens: float, pairs: float) -> float:
        """FLOPs of training on so many tokens and pairs."""
        return trained(self.token * tokens + self.pair * pairs)


def work_of(config: dict[str, Any]) -> Work:
    """The work of a run, by its config.

    A token and layer: HSTU d h (2 dv + 2 dqk) + h dv d; SASRec 6 d^2; Transformer++ 4 d^2 + 3 d round(8 d / 3). A pair
    and layer: h (dqk + dv), of the others 2 d. The loss: d for the positive and each negative. Raises StepError for
    other encoders, and for a loss other than sampled softmax.
    """
    model = config["model"]
    kind, dim, blocks = model["model"], model["dim"], model["blocks"]
    if kind not in ENCODERS or model["loss"]["name"] != "sampled-softmax":
        known = f"{', '.join(ENCODERS)} with loss sampled-softmax"
        raise StepError(f"model {config['row']}: FLOPs are known of {known}; take one of these")
    token, pair = 6 * dim**2, 2 * dim
    if kind == "hstu":
        values, keys = model["heads"] * model["dv"], model["heads"] * model["dqk"]
        token, pair = dim * (3 * values + 2 * keys), values + keys
    elif kind == "transformer++":
        token = 4 * dim**2 + 3 * dim * round(8 * dim / 3)
    return Work(blocks * token + (1 + config["training"]["negatives"]) * dim, blocks * pair)
