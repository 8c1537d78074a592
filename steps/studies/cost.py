"""What a training step of the paper's 1.5-trillion-parameter model takes of each GPU: computed, not measured.

Memory, bytes on the wire, FLOPs, and the least time of each, from shapes in params/studies/cost.yaml, which names the
source of every number. docs/cost.md explains the terms; tests/steps/test_cost.py holds each of them to something
measured. GPUs share all alike: each has as many tokens, and as many rows of the table are asked of each.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kernels.hstu_attention import TIME_BUCKETS
from steps.data.stochastic_length import expected_lengths, most_kept
from steps.studies.flops import trained
from steps.studies.rows import Row, row

ID_BYTES = 8  # a row's number on the wire, int64
#: Bytes of a float of the encoder: weight, gradient, and two moments of AdamW, in float32.
DENSE_BYTES = 16
_UPDATE_BYTES = 28  # of a float of the encoder: AdamW reads these four, and writes three
_FLOAT = 4


@dataclass(frozen=True)
class Shape:
    """HSTU with h dqk = h dv = d = `dim`, a bias of position and time a layer, and windows of `tokens` positions."""

    dim: int
    layers: int
    tokens: int

    @property
    def parameters(self) -> int:
        """Floats of the encoder: W_uvqk of d x 4 d, W_o of d x d and its bias, two tables of biases; and positions."""
        layer = 5 * self.dim**2 + self.dim + 2 * self.tokens - 1 + TIME_BUCKETS
        return self.layers * layer + self.tokens * self.dim

    def projections(self, tokens: float) -> float:
        """FLOPs of a step's products with weights."""
        return trained(tokens * self.layers * 5 * self.dim**2)

    def attention(self, pairs: float) -> float:
        """FLOPs of a step's attention over so many pairs of a query and a key that it sees: Q K and A V, and for each
        of them two products of the backward pass. What kernels compute again does not count."""
        return trained(pairs * self.layers * 2 * self.dim)

    def activations(self, tokens: float, kept: float) -> float:
        """Bytes kept for the backward pass, `kept` d of a token and layer."""
        return kept * self.dim * tokens * self.layers


def moments(tokens: int, alpha: float) -> tuple[float, float]:
    """The mean and the mean square of how many tokens Stochastic Length reads of a row of `tokens`, the longest."""
    kept, mean = most_kept(tokens, alpha), float(expected_lengths(torch.tensor([tokens]), tokens, alpha))
    share = (mean - kept) / (tokens - kept) if tokens > kept else 1.0  # of rows read whole
    return mean, share * tokens**2 + (1 - share) * kept**2


def table_bytes(rows: int, dim: int, weight_bytes: float, sum_bytes: float) -> float:
    """Bytes of a table of so many rows of `dim` floats, and of its optimizer's sum a row."""
    return rows * (dim * weight_bytes + sum_bytes)


def sent(values: float, gpus: int) -> float:
    """What a GPU sends to others, of `values` that are spread alike over all of them, itself included."""
    return values * (gpus - 1) / gpus


def ring(values: float, gpus: int) -> float:
    """What a GPU sends to the next to sum `values` over all: their sums once around, but for a part, then the total."""
    return 2 * values * (gpus - 1) / gpus


def seconds_to_all(values: float, gpus: int, machine: int, nvlink: float, network: float) -> float:
    """The least seconds in which a GPU sends `values` bytes, spread alike over all: the two ways work at once."""
    inside = min(gpus, machine)
    return max(values * (inside - 1) / gpus / nvlink, values * (gpus - inside) / gpus / network)


def seconds_around(values: float, gpus: int, machine: int, nvlink: float, network: float) -> float:
    """The least seconds of a sum of `values` bytes by rings, one a GPU of a machine, which leaves it there alone."""
    if gpus <= machine:
        return ring(values, gpus) / nvlink
    around = ring(values, gpus)
    return max(around * (machine - 1) / machine / nvlink, around / machine / network)


def cases(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """Shape, GPUs, and alpha of Stochastic Length."""
    given = plan["settings"]
    return [
        {"shape": shape, "gpus": gpus, "alpha": alpha}
        for shape in given["shapes"]
        for gpus in given["gpus"]["value"]
        for alpha in given["alphas"]["value"]
    ]


def measure(case: dict[str, Any], plan: dict[str, Any], data: Path) -> list[Row]:
    """Rows of a case: of one GPU and one step, bytes, FLOPs and milliseconds."""
    given = plan["settings"]
    value = {name: entry["value"] for name, entry in given.items() if "value" in entry}
    shape = Shape(given["shapes"][case["shape"]]["dim"], given["shapes"][case["shape"]]["layers"], value["tokens"])
    found = step(shape, case["gpus"], case["alpha"], value)
    for name, card in given["cards"].items():
        held = found["table"] + found["encoder"]
        found |= {
            f"{name}: products": 1e3 * (found["projections"] + found["attention"]) / card["flops"],
            f"{name}: traffic": 1e3 * found["traffic"] / card["bandwidth"],
            f"{name}: rows that fit": max(0.0, card["memory"] - held) / found["activations"] * value["rows"],
        }
    return [row(case, name, _digits(number), _unit(name)) for name, number in found.items()]


def step(shape: Shape, gpus: int, alpha: float, value: dict[str, Any]) -> dict[str, float]:
    """The terms of one GPU's step by their names: bytes, FLOPs, counts, and milliseconds of the wire."""
    mean, square = moments(shape.tokens, alpha)
    tokens = value["rows"] * mean
    pairs = value["rows"] * (square + mean) / 2  # of a causal row n (n + 1) / 2
    rows = round((value["parameters"] - shape.parameters) / shape.dim)
    own = -(-rows // gpus)
    asked = tokens * value["lookups"] * value["distinct"]
    vectors = asked * shape.dim * value["weight_bytes"]
    of_vectors = asked * shape.dim * value["gradient_bytes"]
    gradient = _FLOAT * shape.parameters
    activations = shape.activations(tokens, value["kept"])
    wires = gpus, value["gpus_a_machine"], value["nvlink"], value["network"]
    table = table_bytes(own, shape.dim, value["weight_bytes"], value["sum_bytes"])
    encoder = DENSE_BYTES * shape.parameters
    # A row that is asked for is read; its vector and gradient pass; the update reads and writes it and its sum.
    looked_up = 3 * asked * shape.dim * value["weight_bytes"] + vectors + of_vectors + 2 * asked * value["sum_bytes"]
    return {
        "tokens": tokens,
        "table rows": rows,
        "encoder floats": shape.parameters,
        "table": table,
        "table by Adam": table_bytes(own, shape.dim, value["adam_bytes"], 0),
        "encoder": encoder,
        "activations": activations,
        "activations here": shape.activations(tokens, value["kept_here"]),
        "in all": table + encoder + activations,
        "ids": sent(asked * ID_BYTES, gpus),
        "vectors": sent(vectors, gpus),
        "gradients of vectors": sent(of_vectors, gpus),
        "gradients of the encoder": ring(gradient, gpus),
        "projections": shape.projections(tokens),
        "attention": shape.attention(pairs),
        "traffic": 2 * activations + _UPDATE_BYTES * shape.parameters + looked_up,
        "all-to-all": 1e3 * seconds_to_all(asked * ID_BYTES + vectors + of_vectors, *wires),
        "all-reduce": 1e3 * seconds_around(gradient, *wires),
    }


def _unit(name: str) -> str:
    if name.endswith(("products", ": traffic", "all-to-all", "all-reduce")):
        return "ms"
    if name in ("projections", "attention"):
        return "FLOPs"
    counts = {"tokens": "tokens", "table rows": "rows", "encoder floats": "floats"}
    return "rows" if name.endswith("that fit") else counts.get(name, "B")


def _digits(number: float) -> float:
    """With six digits, which keeps files small."""
    return float(f"{number:.6g}")
