"""M-FALCON (arXiv 2402.17152): how long a request takes whose candidates are scored against histories.

Cached: the histories' keys and values are kept (`steps.models.history_cache`); a request appends what is new, and
scores its candidates in micro-batches. Recomputed, which is what one does without: one forward pass of the histories
with the candidates behind them, which do not see each other (`num_targets`). On CUDA both are CUDA graphs, as requests
of their shape came before. Encoders and inputs are random. A case's hidden states are compared first; where the two
ways differ, no time is kept.
"""

import itertools
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from kernels.tools.timing import peak_of
from steps.common.cli import StepError
from steps.models.history_cache import HistoryCache
from steps.models.hstu import HSTU, BiasConfig, HSTUConfig, HSTULayer
from steps.models.repeated import Repeated
from steps.studies.rows import Row, row

RECOMPUTED, CACHED = "recomputed", "cached"
#: What names of the kernels begin with that are attention, its preparations included.
ATTENTION = (
    *("key_bias_kernel", "cached_kernel", "pair_bias_kernel", "appended_kernel", "join_kernel"),
    *("forward_kernel", "band_kernel", "relative_time", "tile_bucket", "spread_kernel"),
)
_AXES = ("model", "precision", "users", "history", "new", "candidates", "way", "micro_batch")
_TYPES = {"bf16": torch.bfloat16, "float32": torch.float32}
_FLOAT32_ERROR = 1e-5  # of the largest hidden state, between the two ways


def cases(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """Every request, each way; lists in an entry are crossed. What is recomputed has no micro-batch."""
    found = {}
    for entry in plan["settings"]["requests"]:
        values = [entry[axis] if isinstance(entry[axis], list) else [entry[axis]] for axis in _AXES]
        for point in itertools.product(*values):
            case = dict(zip(_AXES, point, strict=True))
            if case["way"] == RECOMPUTED:
                del case["micro_batch"]
            found[json.dumps(case)] = case
    return list(found.values())


def measure(case: dict[str, Any], plan: dict[str, Any], data: Path) -> list[Row]:
    """Rows of a case: percentiles of latency, of how many requests, candidates a second, memory beyond what was there
    before, bytes of the cache; and on CUDA how long kernels ran, and attention's among them.

    Raises StepError where cached hidden states are not the recomputed ones.
    """
    settings, device = plan["settings"], torch.device(plan["device"])
    model = settings["models"][case["model"]]
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.empty_cache()
    with _float32_as_it_is(), torch.no_grad():
        torch.manual_seed(0)
        encoder = random_encoder(model, sum(case[name] for name in ("history", "new", "candidates")), device)
        request = Request.random(case, model["dim"], device)
        prepare_type(encoder, _TYPES[case["precision"]])
        check(encoder, request, case, settings["page"])
        cache = None
        if case["way"] == CACHED:
            cache = HistoryCache(encoder, settings["page"])
            prepare, answer = cached(cache, request, case["micro_batch"])
        else:
            prepare, answer = _nothing, recomputed(encoder, request, _TYPES[case["precision"]])
            if on_cuda:  # likewise a graph from the second request on
                answer = partial(Repeated(device).run, case["way"], answer, [])
        peak = peak_of(answer, device.type, prepare)
        seconds = latencies(prepare, answer, settings["warm_up"], settings["timed"], device)
        kernels = _kernels(prepare, answer) if on_cuda else {}
    axes = case | model
    milliseconds = 1000 * torch.tensor(seconds, dtype=torch.float64)
    found = [
        row(axes, f"p{percentile}", round(float(milliseconds.quantile(percentile / 100)), 4), "ms")
        for percentile in settings["percentiles"]
    ]
    rate = case["users"] * case["candidates"] * len(seconds) / sum(seconds)
    found += [row(axes, "requests", len(seconds), "requests"), row(axes, "rate", round(rate, 1), "candidates/s")]
    if cache is not None:
        found.append(row(axes, "kept", cache.bytes, "B"))
    if peak is not None:
        attention = sum(ms for name, ms in kernels.items() if name.startswith(ATTENTION))
        found += [
            row(axes, "peak", peak, "B"),
            row(axes, "busy", round(sum(kernels.values()), 4), "ms"),
            row(axes, "attention", round(attention, 4), "ms"),
        ]
    return found


def random_encoder(model: dict[str, Any], positions: int, device: torch.device) -> HSTU:
    """An encoder in eval mode of a model's sizes and so many positions, whose weights are large enough that every term
    matters."""
    bias = BiasConfig(model["position"], model["time"])
    sizes = {name: model[name] for name in ("dim", "blocks", "heads", "dqk", "dv")}
    config = HSTUConfig(
        **sizes, output_slots=0, attention="silu", alpha="1/sqrt(dqk)", attention_scale="max_len", bias=bias
    )
    with device:
        encoder = HSTU(config, positions, dropout=0.0).eval()
    for layer in cast(list[HSTULayer], list(encoder.blocks)):
        for weights in (layer.uvqk, layer.position_bias, layer.time_bias):
            if weights is not None:
                weights.data.mul_(3)
    return encoder


def prepare_type(encoder: HSTU, dtype: torch.dtype) -> None:
    """Let the encoder compute in a type, its matrices converted beforehand, as a server's are."""
    encoder.compute_dtype = dtype if dtype != torch.float32 else None
    for layer in cast(list[HSTULayer], list(encoder.blocks)):
        for matrix in (layer.uvqk, *layer.output.parameters()):
            matrix.data = matrix.data.to(dtype)


@dataclass(frozen=True)
class Request:
    """The histories of some users, new tokens included, and candidates of each at one time.

    tokens (U, n, d), their times (U, n), candidates (U, m, d), asked (U,); of the n tokens the last `new` are new.
    """

    tokens: torch.Tensor
    times: torch.Tensor
    candidates: torch.Tensor
    asked: torch.Tensor
    new: int

    @classmethod
    def random(cls, case: dict[str, Any], dim: int, device: torch.device) -> "Request":
        """Gaps between times are log-normal: a minute at the median, a standard deviation of 2 in the logarithm."""
        users, n = case["users"], case["history"] + case["new"]
        gaps = 60 * torch.exp(2 * torch.randn(users, n + 1, device=device, dtype=torch.float64))
        times = gaps.long().cumsum(1) + 10**9
        tokens, candidates = (
            torch.randn(users, count, dim, device=device) * dim**-0.5 for count in (n, case["candidates"])
        )
        return cls(tokens, times[:, :-1], candidates, times[:, -1].contiguous(), case["new"])


def recomputed(encoder: HSTU, request: Request, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    """A call that makes the candidates' hidden states (U m, d), one user's behind the other's, in one forward pass.

    What it is given is laid out beforehand.
    """
    (users, n), m, device = request.times.shape, request.candidates.shape[1], request.times.device
    at = request.asked[:, None].expand(users, m)
    embeddings = torch.cat([request.tokens, request.candidates], 1).flatten(0, 1)
    time = torch.cat([request.times, at], 1).flatten()
    query_time = time
    if cast(HSTULayer, encoder.blocks[0]).time == "next":
        query_time = torch.cat([request.times[:, 1:], request.asked[:, None], at], 1).flatten()
    position = torch.arange(n + m, device=device).clamp(max=n).repeat(users)
    offsets = torch.arange(users + 1, device=device) * (n + m)
    num_targets = torch.full((users,), m, device=device)

    def answer() -> torch.Tensor:
        x = encoder.embed(embeddings, position)
        for layer in cast(list[HSTULayer], list(encoder.blocks)):
            u, q, k, v = layer.project(x, dtype)
            attention_output = layer.attend(q, k, v, offsets, n + m, query_time, time, num_targets=num_targets)
            x = layer.finish(x, u, attention_output, dtype)
        return x.unflatten(0, (users, n + m))[:, n:].flatten(0, 1)

    return answer


def cached(
    cache: HistoryCache, request: Request, micro_batch: int
) -> tuple[Callable[[], None], Callable[[], torch.Tensor]]:
    """A call that lets the cache have the histories without what is new; and one that appends this, and makes the
    hidden states that `recomputed` makes. Between two of the second there must be one of the first."""
    (users, n), m = request.times.shape, request.candidates.shape[1]
    names, kept = list(range(users)), n - request.new
    old, new = (part.flatten(0, 1) for part in request.tokens.split([kept, request.new], 1))
    old_times, new_times = (part.flatten() for part in request.times.split([kept, request.new], 1))
    candidates = request.candidates.flatten(0, 1)
    of_old, of_new, of_candidates = (torch.arange(users + 1) * count for count in (kept, request.new, m))

    def prepare() -> None:
        if request.new or not cache.lengths:
            cache.evict(list(cache.lengths))
            cache.append(names, old, old_times, of_old)

    def answer() -> torch.Tensor:
        if request.new:
            cache.append(names, new, new_times, of_new)
        return cache.encode(names, candidates, of_candidates, request.asked, micro_batch)

    return prepare, answer


def check(encoder: HSTU, request: Request, case: dict[str, Any], page: int) -> None:
    """Raise StepError unless the cached hidden states are the recomputed ones.

    In bf16: the error of the cached ones, against a pass in float32 of the same weights, is at most twice the
    recomputed ones', at the worst and on average. In float32: they are equal up to rounding.
    """
    prepare, answer = cached(HistoryCache(encoder, page), request, case.get("micro_batch", 1024))
    for _ in range(3):  # the third replays graphs, where there are any
        prepare()
        found = answer()
    plain = recomputed(encoder, request, _TYPES[case["precision"]])()
    if case["precision"] == "float32":
        wrong = differs(found, plain)
    else:
        wrong = worse(found, plain, recomputed(encoder, request, torch.float32)())
    if wrong:
        shown = ", ".join(f"{key} {value}" for key, value in case.items())
        raise StepError(f"{shown}: cached hidden states are not the recomputed ones ({wrong}); no time is kept")


def worse(found: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> str:
    """How far `found` is off by more than twice the error of `plain`, in words; empty where it is not."""
    if not found.isfinite().all():
        return "some are not finite"
    for kind, size in (("largest", _largest), ("mean", _mean)):
        error, allowed = size(found - exact), 2 * size(plain - exact) + torch.finfo(torch.float32).eps * size(exact)
        if not error <= allowed:
            return f"{kind} error {error:.3g}, allowed {allowed:.3g}"
    return ""


def differs(found: torch.Tensor, plain: torch.Tensor) -> str:
    """How far float32 hidden states are apart beyond rounding, in words; empty where they are not."""
    error, allowed = _largest(found - plain), _FLOAT32_ERROR * _largest(plain)
    return "" if error <= allowed else f"largest difference {error:.3g}, allowed {allowed:.3g}"


def latencies(
    prepare: Callable[[], None],
    answer: Callable[[], torch.Tensor],
    warm_up: int,
    timed: dict[str, Any],
    device: torch.device,
) -> list[float]:
    """Seconds of each request on the host, from the call until the device is done. Preparing is not timed."""
    found: list[float] = []
    for number in itertools.count(-warm_up):
        prepare()
        _wait(device)
        start = time.perf_counter()
        answer()
        _wait(device)
        seconds = time.perf_counter() - start
        if number >= 0:
            found.append(seconds)
        enough = len(found) >= timed["fewest"] and sum(found) >= timed["seconds"]
        if enough or len(found) >= timed["most"]:
            return found
    raise AssertionError  # count() does not end


def _kernels(prepare: Callable[[], None], answer: Callable[[], torch.Tensor]) -> dict[str, float]:
    """Milliseconds of one request by kernel, copies included."""
    prepare()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        answer()
        torch.cuda.synchronize()
    return {event.key: event.self_device_time_total / 1000 for event in profile.key_averages()}


@contextmanager
def _float32_as_it_is() -> Iterator[None]:
    """Within, products of float32 are not rounded to TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _nothing() -> None:
    pass


def _largest(tensor: torch.Tensor) -> float:
    return float(tensor.abs().max())


def _mean(tensor: torch.Tensor) -> float:
    return float(tensor.square().mean().sqrt())
