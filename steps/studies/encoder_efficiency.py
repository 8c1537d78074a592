"""Layers of HSTU beside those of a Transformer: time by length, activations kept, and bytes of optimisers.

Figure 5 of arXiv 2402.17152. Time is of the layers alone, without embeddings and loss: of both passes, which make the
gradients of input and weights, or of a forward pass without gradients. HSTU reads jagged rows; the Transformer gets
them padded to the longest, as its attention takes them. Stochastic Length is HSTU's alone, as in the paper. All is in
one type, weights and residual sums too.
"""

import itertools
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from kernels.rowwise_table import RowwiseTable
from kernels.tools.cases import lengths_of
from kernels.tools.timing import timed
from steps.common import gpu_record
from steps.data.sequences import Batch, Sequences, Size
from steps.data.stochastic_length import draw_lengths, expected_lengths, most_kept
from steps.models.base import compile_modules
from steps.models.hstu import BiasConfig, HSTUConfig, HSTULayer
from steps.studies.attempts import did_not_run, own_stream
from steps.studies.rows import Row, row
from steps.studies.transformer import BACKENDS, TransformerLayer

SPEED, MEMORY, OPTIMISER = "speed", "memory", "optimiser"
HSTU, TRANSFORMER = "HSTU", "Transformer"
TRAINING, INFERENCE = "training", "inference"
ADAM, ROWWISE = "AdamW", "rowwise Adagrad"
#: The alpha with which Stochastic Length leaves everything.
WHOLE = 2.0
_OPERATIONS = ("hstu_attention", "norm_gate", "projection", "layer_norm")  # of a layer of HSTU
_ENCODERS = [
    {"encoder": HSTU, "attention": "ours", "bias": "none", "recomputed": False},
    {"encoder": HSTU, "attention": "ours", "bias": "both", "recomputed": False},
    *({"encoder": TRANSFORMER, "attention": name, "bias": "none", "recomputed": False} for name in BACKENDS),
]
_MANY = 1000  # rows, of which the mean length is taken
_NEAR = 0.01  # so near to the expected a load is good


def cases(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """Memory and optimisers, then speed: encoders by length of the rows, pass, alpha, and whether they are compiled."""
    sizes = plan["settings"]
    found: list[dict[str, Any]] = [{"part": OPTIMISER, "optimiser": name} for name in (ADAM, ROWWISE)]
    for dim in sizes["memory"]["dims"]:
        for encoder in _ENCODERS[:3]:  # the last keeps what the third does
            case = {"part": MEMORY, **encoder, "dim": dim}
            found.append(case | {"compiled": False})
            if encoder["bias"] == "none" and dim in sizes["memory"]["compiled"]:
                found.append(case | {"compiled": True})
        found.append({"part": MEMORY, **_ENCODERS[0], "recomputed": True, "dim": dim, "compiled": False})
    for which, lengths, n in itertools.product((TRAINING, INFERENCE), ("full", "ragged"), sizes["speed"]["lengths"]):
        shape = {"pass": which, "lengths": lengths, "n": n}
        every = [{"part": SPEED, **encoder, **shape, "alpha": WHOLE, "compiled": False} for encoder in _ENCODERS]
        if which == TRAINING:
            alphas = [every[0] | {"alpha": alpha} for alpha in sizes["speed"]["alphas"]]
            compiled = lengths == "full" and n in sizes["speed"]["compiled"]
            every += [every[0] | {"recomputed": True}] * (lengths == "full")
            every += alphas + [one | {"compiled": True} for one in every if compiled and one["bias"] == "none"]
        found += every
    return found


def require(cases: list[dict[str, Any]], plan: dict[str, Any]) -> None:
    """Raise StepError unless the kernels of HSTU have passed their tests on a GPU, as their code is now."""
    if plan["device"] == "cuda":
        gpu_record.require_passed(_OPERATIONS, gpu_record.ROOT / gpu_record.REPORT, gpu_record.ROOT)


def measure(case: dict[str, Any], plan: dict[str, Any], data: Path) -> list[Row]:
    """Rows of a case: milliseconds of a batch and its size; or multiples of d bytes that a layer keeps of a token; or
    an optimiser's bytes a float. Of a Transformer, or of compiled layers, that do not run, what was seen."""
    with own_stream(plan["device"]):
        return _rows(case, plan["settings"], plan["device"])


def _rows(case: dict[str, Any], settings: dict[str, Any], device: str) -> list[Row]:
    if case["part"] == OPTIMISER:
        sizes = settings["optimiser"]
        return [row(case | sizes, "bytes a float", bytes_a_float(case["optimiser"], device, **sizes), "B")]
    function = speed if case["part"] == SPEED else memory
    try:
        return function(case, settings, device)
    except Exception as error:  # of a backend that refuses, or of a compiler
        return [did_not_run(case, error, may_fail=case["encoder"] != HSTU or case["compiled"])]


class Encoder:
    """Layers of a case of so many rows, and their input: a call makes the output from it.

    x: (T, d) jagged for HSTU, (B, N, d) padded for the Transformer. learned: x, and the weights.
    """

    def __init__(
        self, case: dict[str, Any], encoder: dict[str, Any], layers: int, dropout: float, lengths: torch.Tensor, n: int
    ) -> None:
        torch.manual_seed(0)
        device, self.dtype = lengths.device, getattr(torch, encoder["dtype"])
        dim = case.get("dim", encoder["dim"])
        self.batch = batch_of(lengths, n) if case["encoder"] == HSTU else None
        self.layers: list[nn.Module] = []
        for _ in range(layers):
            layer = _hstu_layer if case["encoder"] == HSTU else _transformer_layer
            self.layers.append(layer(case, dim, encoder["dqk"], n, dropout).to(device))
        if self.batch is not None:
            x = torch.randn(len(self.batch.item), dim, device=device)
        else:
            inside = torch.arange(n, device=device) < lengths[:, None]
            x = torch.randn(len(lengths), n, dim, device=device) * inside[..., None]
        for layer in self.layers:
            for name, parameter in layer.named_parameters():
                if name not in ("position_bias", "time_bias"):  # tables that kernels take in float32
                    parameter.data = parameter.data.to(self.dtype)
        if case["compiled"]:
            compile_modules(self.layers)  # as in training
        self.x = x.to(self.dtype).requires_grad_()
        self.learned = [self.x, *(parameter for layer in self.layers for parameter in layer.parameters())]

    def __call__(self) -> torch.Tensor:
        x = self.x
        for layer in self.layers:
            x = layer(x) if self.batch is None else layer(x, self.batch, self.dtype)
        return x


def _hstu_layer(case: dict[str, Any], dim: int, head: int, n: int, dropout: float) -> nn.Module:
    both = case["bias"] == "both"
    config = HSTUConfig(
        dim=dim,
        blocks=1,
        heads=dim // head,
        dqk=head,
        dv=head,
        output_slots=0,
        attention="silu",
        alpha="1/sqrt(dqk)",
        attention_scale="max_len",
        bias=BiasConfig(position=both, time="next" if both else "none"),
        recompute_projection=case["recomputed"],
    )
    return HSTULayer(config, n, dropout)


def _transformer_layer(case: dict[str, Any], dim: int, head: int, n: int, dropout: float) -> nn.Module:
    return TransformerLayer(dim, dim // head, dropout, case["attention"])


def batch_of(lengths: torch.Tensor, longest: int) -> Batch:
    """Windows of `lengths` (B,), at most `longest`; gaps between times are log-normal, a minute at the median."""
    device, offsets = lengths.device, torch.nn.functional.pad((lengths + 1).cumsum(0), (1, 0))
    total = int(offsets[-1])
    time = (60 * torch.exp(2 * torch.randn(total, device=device, dtype=torch.float64))).long().cumsum(0) + 10**9
    sequences = Sequences(offsets, torch.ones(total, dtype=torch.int64, device=device), time, 1)
    users = torch.arange(len(lengths), device=device)
    return sequences.batch(users, torch.zeros_like(users), longest, Size(total - len(lengths), longest))


def rows_of(n: int, ragged: bool, alpha: float, tokens: int, draws: int) -> tuple[torch.Tensor, float]:
    """Lengths (B,) that are read of a batch's rows, about `tokens` in all; and the sum of their squares, by which
    attention's work goes, over what is expected. Rows are of n tokens, or ragged as `lengths_of` has them.

    Of so many `draws` of Stochastic Length the one whose sum of squares is nearest to the expected one: half of the
    work is in the mean that of the few rows which are read whole. As their number is a whole one, up to a quarter more
    or fewer rows are tried, until the load is as expected.
    """
    random = torch.Generator().manual_seed(0)
    mean = float(expected_lengths(lengths_of(_MANY, n, ragged, "cpu"), n, alpha).mean())
    middle = max(1, round(tokens / mean))
    best, load = lengths_of(middle, n, ragged, "cpu"), math.inf
    for count in sorted(range(math.ceil(0.75 * middle), middle * 5 // 4 + 1), key=lambda rows: abs(rows - middle)):
        lengths = lengths_of(count, n, ragged, "cpu")
        wanted = float(expected_squares(lengths, n, alpha).sum())
        for _ in range(draws):
            drawn = draw_lengths(lengths, n, alpha, random)
            found = float(drawn.double().square().sum()) / wanted
            if abs(found - 1) < abs(load - 1):
                best, load = drawn, found
        if abs(load - 1) < _NEAR:
            break
    return best, load


def expected_squares(lengths: torch.Tensor, longest: int, alpha: float) -> torch.Tensor:
    """The mean square of how many tokens are read of windows of `lengths`: float64, of the same shape."""
    kept, lengths = most_kept(longest, alpha), lengths.double()
    whole = (kept / lengths).clamp(max=1) ** 2
    return torch.where(lengths > kept, (1 - whole) * kept**2 + whole * lengths**2, lengths**2)


def speed(case: dict[str, Any], settings: dict[str, Any], device: str) -> list[Row]:
    """Milliseconds of a batch, whether they are of a CUDA graph, its rows, the tokens that HSTU reads of them, and
    their load over what is expected."""
    sizes, n = settings["speed"], case["n"]
    torch.manual_seed(0)
    lengths, load = rows_of(n, case["lengths"] == "ragged", case["alpha"], sizes["tokens"], sizes["draws"])
    encoder = Encoder(case, settings["encoder"], sizes["layers"], sizes["dropout"], lengths.to(device), n)
    grad = torch.randn_like(encoder.x)

    def train() -> Any:
        return torch.autograd.grad(encoder(), encoder.learned, grad)

    def infer() -> Any:
        with torch.no_grad():
            return encoder()

    if case["pass"] == TRAINING:
        timing = timed(train, [*encoder.learned, grad], device)
    else:
        for layer in encoder.layers:
            layer.eval()
        timing = timed(infer, encoder.learned, device)
    axes = case | {"layers": sizes["layers"]}
    found = [row(axes, "ms", timing.ms, "ms"), row(axes, "sequences", len(lengths), "sequences")]
    found += [
        row(axes, "tokens", int(lengths.sum()), "tokens"),
        row(axes, "load", round(load, 4), "of the expected"),
    ]
    return found + ([] if timing.captured is None else [row(axes, "captured", int(timing.captured), "of 1")])


def memory(case: dict[str, Any], settings: dict[str, Any], device: str) -> list[Row]:
    """What a layer keeps of a token for the backward pass, in d bytes: storages that autograd saved, each once; and on
    CUDA what the allocator says. Of a second layer, and of twice the rows, beyond what the first takes: so neither
    weights nor inputs count."""
    sizes = settings["memory"]
    kept: dict[tuple[int, int], int] = {}
    allocated: dict[tuple[int, int], int] = {}
    for layers in (1, 2):
        for times in (1, 2):
            lengths = torch.full((times * sizes["rows"],), sizes["n"], device=device)
            encoder = Encoder(case, settings["encoder"], layers, sizes["dropout"], lengths, sizes["n"])
            encoder()  # compiles
            kept[layers, times] = saved_bytes(encoder, encoder.learned)
            if device == "cuda":
                torch.cuda.synchronize()
                before = torch.cuda.memory_allocated()
                output = encoder()
                torch.cuda.synchronize()
                allocated[layers, times] = torch.cuda.memory_allocated() - before
                del output
            del encoder
    units = sizes["rows"] * sizes["n"] * case["dim"]
    return [
        row(case, name, round(((of[2, 2] - of[1, 2]) - (of[2, 1] - of[1, 1])) / units, 4), "d bytes")
        for name, of in (("kept", kept), ("allocated", allocated))
        if of
    ]


def saved_bytes(call: Callable[[], torch.Tensor], without: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages that a call saves for its backward pass, each once, those of some tensors left out."""
    found: dict[int, int] = {}
    alive = []  # else the address of one could become another's

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor.detach())
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = call()
    del output
    for tensor in without:
        found.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(found.values())


def bytes_a_float(optimiser: str, device: str, rows: int, dim: int) -> float:
    """Bytes of weight and optimiser's state per float of an item table, after a step."""
    index = torch.arange(rows, device=device)
    if optimiser == ROWWISE:
        table = RowwiseTable(rows, dim, 0.1, torch.float16).to(device)
        nn.init.normal_(table.weight)
        table(index).sum().backward()  # updates
        tensors = [table.weight, table.sums]
    else:
        weight = nn.Parameter(torch.randn(rows, dim, device=device))
        adam = torch.optim.AdamW([weight])
        weight[index].sum().backward()
        adam.step()
        tensors = [weight, *adam.state[weight].values()]
    return round(sum(tensor.nbytes for tensor in tensors) / (rows * dim), 4)
