"""FuXi's maps of time beside HSTU's bias: a closed form, a lookup for every pair, and the bias inside the attention.

FuXi-gamma's authors (arXiv 2512.12740) say that it trains 4.48 times as fast as HSTU, whose bias is looked up for every
pair in the code that theirs builds on. Timed here: a map of time alone; what mixes the tokens, without projections; and
encoders as they are trained, of the embedding of positions and some layers. All of a case's models read the same tokens
and know the same times, and have the same width, type and number of layers.

A model that holds N x N maps in memory is not run where these would not fit: their size is known from the shapes.
"""

import functools
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from kernels.hstu_attention import TIME_BUCKETS
from kernels.tools.cases import lengths_of
from kernels.tools.timing import peak_of, timed
from steps.common import gpu_record
from steps.data.sequences import Batch
from steps.models.base import PositionalEncoder, compile_modules
from steps.models.fuxi import FuXi, FuXiAlpha, FuXiAlphaConfig, FuXiGamma, FuXiGammaConfig, exponential_power
from steps.models.hstu import HSTU, BiasConfig, HSTUConfig
from steps.studies.attempts import did_not_run, own_stream
from steps.studies.dense_lookup import DenseHSTULayer, time_map
from steps.studies.encoder_efficiency import batch_of
from steps.studies.rows import FAILED, Row, row

#: What is timed.
MAP, ATTENTION, ENCODER = "map", "attention", "encoder"
DENSE, FUSED, FLOOR = "HSTU, dense lookup", "HSTU, fused bias", "HSTU, no bias"
GAMMA, ALPHA = "FuXi-gamma", "FuXi-alpha"
MODELS = (DENSE, FUSED, FLOOR, GAMMA, ALPHA)
TRAINING, INFERENCE = "training", "inference"
FULL, RAGGED = "full", "ragged"
#: The models that torch.compile is tried with: of the attention, and of whole encoders.
_COMPILED = {ATTENTION: (DENSE, GAMMA), ENCODER: (DENSE, FUSED, GAMMA)}
_OPERATIONS = ("hstu_attention", "norm_gate", "projection", "layer_norm")  # of a layer of HSTU
_OF_ATTENTION = ("position_bias", "time_bias", "amplitude", "decay", "power")  # learned, of either kind of block
_TIME: Literal["next"] = "next"  # of queries: the item's that is to be predicted
_AMPLITUDE = 0.1  # of the map alone
_MANY = 1000  # rows, of which the mean length is taken
_ROOM = 0.9  # of the device's memory
Call = Callable[[], torch.Tensor]


def cases(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """Maps, attention and encoders by lengths, N and pass, the models of one shape behind each other; then compiled."""
    settings = plan["settings"]
    shapes = [(FULL, n) for n in settings["lengths"]] + [(RAGGED, n) for n in settings["ragged"]]
    found: list[dict[str, Any]] = []
    for part, (lengths, n), which in itertools.product((MAP, ATTENTION, ENCODER), shapes, (TRAINING, INFERENCE)):
        models: tuple[str, ...] = MODELS
        if part == MAP:  # which is padded, whatever the lengths
            models = (DENSE, GAMMA) if lengths == FULL else ()
        shape = {"pass": which, "lengths": lengths, "n": n, "compiled": False}
        found += [{"part": part, "model": model, **shape} for model in models]
    for (part, some), n in itertools.product(_COMPILED.items(), settings["compiled"]):
        shape = {"pass": TRAINING, "lengths": FULL, "n": n, "compiled": True}
        found += [{"part": part, "model": model, **shape} for model in some]
    return found


def require(cases: list[dict[str, Any]], plan: dict[str, Any]) -> None:
    """Raise StepError unless the kernels of HSTU have passed their tests on a GPU, as their code is now."""
    if plan["device"] == "cuda":
        gpu_record.require_passed(_OPERATIONS, gpu_record.ROOT / gpu_record.REPORT, gpu_record.ROOT)


def measure(case: dict[str, Any], plan: dict[str, Any], data: Path) -> list[Row]:
    """Rows of a case: milliseconds of a batch, whether they are of a CUDA graph, the peak of memory, and the batch's
    size. Of maps that do not fit into the memory, and of compiled code that does not run, what was seen."""
    with own_stream(plan["device"]):
        return _rows(case, plan["settings"], plan["device"])


def _rows(case: dict[str, Any], settings: dict[str, Any], device: str) -> list[Row]:
    batch = batch_for(case, settings, device)
    case = case | {"rows": len(batch.user), "tokens": len(batch.item)}
    wanted, room = most_bytes(case, settings, len(batch.user)), room_of(device)
    if wanted > room:
        seen = f"its N x N maps take up to {wanted / 1e9:.0f} GB, and {room / 1e9:.0f} GB of the device may be taken"
        return [row(case, FAILED, 1, "of 1", seen=seen)]
    try:
        return _timed(case, settings, batch, device)
    except Exception as error:  # of a compiler
        return [did_not_run(case, error, may_fail=case["compiled"])]


def _timed(case: dict[str, Any], settings: dict[str, Any], batch: Batch, device: str) -> list[Row]:
    call, inputs = subject(case, settings, batch)
    if case["pass"] == TRAINING:
        grad, learned = torch.randn_like(call()), list(inputs)
        inputs.append(grad)

    def run() -> Any:
        if case["pass"] == TRAINING:
            return torch.autograd.grad(call(), learned, grad)
        with torch.no_grad():
            return call()

    peak = peak_of(run, device)
    timing = timed(run, inputs, device)
    found = [row(case, "ms", timing.ms, "ms")]
    found += [] if timing.captured is None else [row(case, "captured", int(timing.captured), "of 1")]
    return found + ([] if peak is None else [row(case, "peak", peak, "B")])


def batch_for(case: dict[str, Any], settings: dict[str, Any], device: str) -> Batch:
    """The batch that all models of the case's shape read: about as many tokens at every N."""
    torch.manual_seed(0)
    n, ragged = case["n"], case["lengths"] == RAGGED
    mean = float(lengths_of(_MANY, n, ragged, "cpu").double().mean())
    lengths = lengths_of(max(1, round(settings["tokens"] / mean)), n, ragged, "cpu")
    return batch_of(lengths.to(device), n)


def subject(case: dict[str, Any], settings: dict[str, Any], batch: Batch) -> tuple[Call, list[torch.Tensor]]:
    """What is timed, as a call; and what is learned of it, its input included."""
    torch.manual_seed(1)
    device = batch.offsets.device
    if case["part"] == MAP:
        return _map(case["model"], settings, batch)
    encoder = encoder_of(case["model"], settings, case["n"]).to(device)
    if case["part"] == ENCODER:
        x = torch.randn(len(batch.item), encoder.dim, device=device, requires_grad=True)
        if case["compiled"]:
            encoder.before_compiling()
            compile_modules(encoder.compiled_modules)  # as in training
        return lambda: encoder(x, batch), [x, *encoder.parameters()]
    vqk = torch.randn(len(batch.item), _width(case["model"], settings), device=device)
    vqk = vqk.to(getattr(torch, settings["encoder"]["dtype"])).requires_grad_()
    function: Callable[..., torch.Tensor] = mixed
    if case["compiled"]:
        function = torch.compile(mixed, dynamic=True)
    of_block = encoder.blocks[0].named_parameters()
    learned = [vqk, *(parameter for name, parameter in of_block if name in _OF_ATTENTION)]
    return functools.partial(function, encoder, vqk, batch), learned


def _map(model: str, settings: dict[str, Any], batch: Batch) -> tuple[Call, list[torch.Tensor]]:
    """The weights of time alone, (S, N, N) float32: of a table, or of three numbers."""
    device = batch.offsets.device
    if model == DENSE:
        table = (0.02 * torch.randn(TIME_BUCKETS, device=device)).requires_grad_()
        return lambda: time_map(table, batch, _TIME), [table]
    encoder: Any = encoder_of(model, settings, batch.max_len)
    # One tensor, whose elements trade places where the timing wants another input.
    numbers = torch.tensor([_AMPLITUDE, *encoder.blocks[0].start], device=device, requires_grad=True)
    return lambda: exponential_power(encoder.time_of_pairs(batch, torch.float32), *numbers.unbind()), [numbers]


def encoder_of(model: str, settings: dict[str, Any], n: int) -> PositionalEncoder:
    """A model's encoder, of n positions, without dropout."""
    sizes, fuxi = settings["encoder"], settings["fuxi"]
    shared: dict[str, Any] = {name: sizes[name] for name in ("dim", "heads", "dv")}
    shared |= {"blocks": settings["layers"], "output_slots": 0}
    encoder: PositionalEncoder
    if model == GAMMA:
        encoder = FuXiGamma(FuXiGammaConfig(**shared, time=_TIME, **fuxi), n, 0.0)
    elif model == ALPHA:
        of_both = {"ff_multiplier": fuxi["ff_multiplier"], "dqk": sizes["dqk"]}
        encoder = FuXiAlpha(FuXiAlphaConfig(**shared, time=_TIME, **of_both), n, 0.0)
    else:
        both = model != FLOOR
        config = HSTUConfig(
            **shared,
            dqk=sizes["dqk"],
            attention="silu",
            alpha=1.0,
            attention_scale="max_len",
            bias=BiasConfig(position=both, time=_TIME if both else "none"),
        )
        encoder = HSTU(config, n, 0.0)
        if model == DENSE:
            encoder.blocks = nn.ModuleList(DenseHSTULayer(config, n, 0.0) for _ in range(settings["layers"]))
    encoder.compute_dtype = None if sizes["dtype"] == "float32" else getattr(torch, sizes["dtype"])
    return encoder


def mixed(encoder: PositionalEncoder, vqk: torch.Tensor, batch: Batch) -> torch.Tensor:
    """What a block's projections lie around: of values, queries and keys side by side (T, .), FuXi's channels
    (T, channels h dv), or HSTU's attention (T, h dv). The times of all pairs, which FuXi's blocks share, included."""
    block: Any = encoder.blocks[0]
    if isinstance(encoder, FuXi):
        time = encoder.time_of_pairs(batch, encoder.position.weight.dtype)
        with encoder.autocast(vqk.device):
            return block.attend(vqk, batch, time)
    of_v, of_qk = block.heads * block.dv, block.heads * block.dqk
    v, q, k = (part.unflatten(-1, (block.heads, -1)) for part in vqk.split([of_v, of_qk, of_qk], dim=-1))
    if isinstance(block, DenseHSTULayer):
        return block.attend_densely(q, k, v, batch).flatten(1)
    return block.attend(q, k, v, batch.offsets, batch.max_len, batch.next_timestamp, batch.timestamp).flatten(1)


def _width(model: str, settings: dict[str, Any]) -> int:
    """Of a token's values, queries and keys."""
    sizes = settings["encoder"]
    return int(sizes["heads"] * (sizes["dv"] + (0 if model == GAMMA else 2 * sizes["dqk"])))


def most_bytes(case: dict[str, Any], settings: dict[str, Any], sequences: int) -> int:
    """At most so many bytes a model's N x N maps take at once, in both passes; 0 where the kernels hold none.

    For each layer the backward pass keeps three values of up to 8 bytes a pair, and two scores a pair and head; what
    else is there at once, of differences of times, their maps and gradients, is four values, and two scores.
    """
    if case["model"] in (FUSED, FLOOR):
        return 0
    layers = settings["layers"] if case["part"] == ENCODER else 1
    a_pair = 8 * (4 + 3 * layers)
    if case["part"] != MAP and case["model"] != GAMMA:
        sizes = settings["encoder"]
        a_pair += sizes["heads"] * getattr(torch, sizes["dtype"]).itemsize * (2 + 2 * layers)
    return int(sequences * case["n"] ** 2 * a_pair)


def room_of(device: str) -> float:
    """Bytes of the device's memory that maps may take; of a CPU no limit is known."""
    if device != "cuda":
        return math.inf
    return _ROOM * float(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
