"""Launches of the kernels: forward, keys' and values' gradients, queries' gradients, gradients of the bias tables."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton

from ..common import tf32_allowed
from ..jagged.naive import sequence_and_position
from .arguments import Strides
from .backward_bias import Sums, bias_gradient_kernel, diagonal_sum_kernel
from .backward_bias_general import general_bias_gradient_kernel
from .backward_kv import bwd_dkdv_kernel
from .backward_q import bwd_dq_kernel
from .forward import forward_kernel
from .inputs import Inputs, describable, describe, launch_grid, small_edges
from .mma_layout import Tile, has_mma_layout
from .prepare import BAND_TILE, BiasTables, band_gradient_kernel

Config = Mapping[str, int]
_TIME_SLOTS = 256  # buckets 0..128, padded to a power of two
_BIAS_PROGRAMS = 4096
_TIME_COPIES = 64  # of the bucket sums, so that few programs add to one place at a time


class Gradient(NamedTuple):
    """What arrives in the backward pass."""

    grad: torch.Tensor  # (T, h, dv), of the output
    lse: torch.Tensor  # (h, T) float32, the logarithm of softmax's denominators; empty for silu
    delta: torch.Tensor | None  # (h, T) float32, grad . output; None for silu


def forward(inputs: Inputs, bias: BiasTables, config: Config) -> tuple[torch.Tensor, torch.Tensor]:
    """The output and, for softmax, lse."""
    tokens, heads, _ = inputs.q.shape
    output = empty_of_queries(inputs.v, inputs)
    lse = inputs.q.new_empty((heads, tokens) if inputs.softmax else (0,), dtype=torch.float32)
    tiles = triton.cdiv(inputs.max_len, config["block_m"])
    if tokens and tiles:
        forward_kernel[launch_grid(tiles * heads, inputs.num_sequences)](
            lse=lse,
            num_tiles=tiles,
            **_arguments(inputs, bias, config, _mma_layout(inputs, config, True), output=output),
            **_options(inputs, config),
        )
    return output, lse


def empty_of_queries(like: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """(T, h, d) of `like`'s d; zeros where queries may see nothing, since no program visits these."""
    shape = *inputs.q.shape[:2], like.shape[2]
    return like.new_empty(shape) if inputs.key_offsets is None else like.new_zeros(shape)


def backward_kv(
    inputs: Inputs, bias: BiasTables, config: Config, gradient: Gradient, dq: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """dk, dv; adds to the float32 `dq` if given; and, for a position bias with targets, the targets' sums."""
    heads, tokens = inputs.q.shape[1], len(inputs.k)
    dk, dv = torch.empty_like(inputs.k, memory_format=torch.contiguous_format), inputs.v.new_empty(inputs.v.shape)
    target_sums = None
    if inputs.num_targets is not None and inputs.position_bias is not None:
        target_sums = gradient.lse.new_empty(tokens, 2, heads)
    tiles = triton.cdiv(inputs.max_len, config["block_n"])
    arguments = _arguments(inputs, bias, config, _mma_layout(inputs, config, False), grad=gradient.grad)
    bwd_dkdv_kernel[launch_grid(tiles * heads, inputs.num_sequences)](
        dq=describe(dq, config["block_m"]) if dq is not None and arguments["FLAGS"].DESCRIPTOR else dq,
        dk=dk,
        dv=dv,
        target_sums=target_sums,
        lse=gradient.lse,
        delta=gradient.delta,
        heads=heads,
        num_tiles=tiles,
        ADD_DQ=dq is not None,
        **arguments,
        **_options(inputs, config),
    )
    return dk, dv, target_sums


def backward_q(
    inputs: Inputs, bias: BiasTables, config: Config, gradient: Gradient
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """dq; and, for a position bias where history tokens see targets, their sums (T, h) over these."""
    dq = empty_of_queries(inputs.q, inputs)
    heads, tiles = inputs.q.shape[1], triton.cdiv(inputs.max_len, config["block_m"])
    target_sums = None
    if inputs.history_sees_targets and inputs.position_bias is not None:
        target_sums = gradient.lse.new_zeros(dq.shape[:2])
    arguments = _arguments(inputs, bias, config, _mma_layout(inputs, config, True), grad=gradient.grad)
    bwd_dq_kernel[launch_grid(tiles * heads, inputs.num_sequences)](
        dq=dq,
        target_sums=target_sums,
        lse=gradient.lse,
        delta=gradient.delta,
        heads=heads,
        num_tiles=tiles,
        **arguments,
        **_options(inputs, config),
    )
    return dq, target_sums


def backward_bias(
    inputs: Inputs,
    bias: BiasTables,
    config: Config,
    gradient: Gradient,
    target_sums: tuple[torch.Tensor | None, torch.Tensor | None],
    deterministic: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of the two tables, float32; None for a table that is not there. `target_sums` are those of
    `backward_kv` and of `backward_q`."""
    block_m, block_n = config["block_m"], config["block_n"]
    ratio = block_m // block_n
    lowest, distances = _distances(inputs, block_m, block_n)
    # Programs of the nearest distances have the most tiles and buckets: sequences first, then tiles are dealt out.
    sequence_splits = max(1, min(inputs.num_sequences, _BIAS_PROGRAMS // distances))
    tile_splits = min(max(1, _BIAS_PROGRAMS // (distances * sequence_splits)), distances)
    programs = distances * sequence_splits * tile_splits
    band_tiles = triton.cdiv(inputs.max_len, BAND_TILE)

    new, band = gradient.lse, bias.handed.band
    sums, near_sums, all_time_sums = Sums(None, None, None), None, None
    if inputs.position_bias is not None:
        copies = sequence_splits * tile_splits if deterministic else 1
        sums = sums._replace(position=new.new_zeros(distances, copies, block_m, block_n))
    if inputs.timed:
        copies = programs if deterministic else _TIME_COPIES
        near_copies = 0 if not band.numel() else band_tiles * inputs.num_sequences if deterministic else copies
        all_time_sums = new.new_zeros(copies + near_copies, _TIME_SLOTS)
        time_sums, near_sums = all_time_sums.split([copies, near_copies])
        sums = sums._replace(time=time_sums, band=new.new_empty(band.shape) if band.numel() else None)

    # An entry sums score gradients of a whole batch, among which errors of operands rounded to TF32 do not cancel:
    # float32 is multiplied as it is, not by tensor cores. Softmax's do cancel within a query, but with its delta alone,
    # which comes of products like the forward pass's (six times the error otherwise, in a window of two).
    exact = inputs.q.dtype == torch.float32 and not inputs.softmax
    mma_layout = not exact and _mma_layout(inputs, config, True)
    arguments = _arguments(inputs, bias, config, mma_layout, grad=gradient.grad)
    if exact:
        arguments["FLAGS"] = arguments["FLAGS"]._replace(PRECISION="ieee")
    kernel = general_bias_gradient_kernel if inputs.general else bias_gradient_kernel
    kernel[(programs,)](
        sums=sums,
        lse=gradient.lse,
        delta=gradient.delta,
        small_edges=small_edges(inputs.q.device) if inputs.timed else None,
        heads=inputs.q.shape[1],
        num_sequences=inputs.num_sequences,
        sequence_splits=sequence_splits,
        tile_splits=tile_splits,
        copies=1 if sums.time is None else len(sums.time),
        lowest=lowest,
        DETERMINISTIC=deterministic,
        **arguments,
        **_options(inputs, config) | {"maxnreg": config.get("maxnreg")},
    )
    dp = dw = None
    if inputs.position_bias is not None:
        dp = torch.zeros_like(inputs.position_bias)
        diagonal_sum_kernel[(distances + ratio,)](
            sums.position.sum(1) if deterministic else sums.position, dp, distances, lowest, inputs.position_zero,
            BLOCK_M=block_m, BLOCK_N=block_n,
        )  # fmt: skip
        if inputs.num_targets is not None:
            _add_target_gradient(dp, inputs, inputs.num_targets, *target_sums)
    if inputs.time_bias is not None and all_time_sums is not None and near_sums is not None:
        if sums.band is not None:
            band_gradient_kernel[launch_grid(band_tiles, inputs.num_sequences)](
                sums.band, bias.handed.near_buckets, near_sums, inputs.offsets, len(near_sums),
                BLOCK=BAND_TILE, DETERMINISTIC=deterministic,
            )  # fmt: skip
        dw = all_time_sums.sum(0)[: len(inputs.time_bias)]
    return dp, dw


def _distances(inputs: Inputs, block_m: int, block_n: int) -> tuple[int, int]:
    """How far beyond a tile's first key its first query is, in multiples of block_n: the least that someone sees, and
    how many there are."""
    ratio = block_m // block_n
    lowest, highest = 1 - ratio, (triton.cdiv(inputs.max_len, block_m) - 1) * ratio
    if inputs.contextual_seq_len or not inputs.causal:
        lowest = min(lowest, 1 - triton.cdiv(inputs.max_len, block_n))
    elif inputs.max_attn_len and not inputs.num_sink_tokens and not inputs.min_full_attn_seq_len:
        if inputs.num_targets is None:  # these are further away than the mask counts
            highest = min(highest, triton.cdiv(inputs.max_attn_len, block_n))
    return lowest, max(highest - lowest + 1, 1)


def _add_target_gradient(
    dp: torch.Tensor,
    inputs: Inputs,
    num_targets: torch.Tensor,
    by_key: torch.Tensor | None,
    by_query: torch.Tensor | None,
) -> None:
    """Adds what targets do: as queries, to dp[j - history] for every key j of the history, and to dp[0] for those among
    themselves; as keys, to dp[history - i] for every query i of the history."""
    of_keys = inputs.offsets if inputs.key_offsets is None else inputs.key_offsets
    lengths = of_keys.diff()
    history = (lengths - num_targets).clamp(min=0)
    for sums, offsets, sign in ((by_key, of_keys, 1), (by_query, inputs.offsets, -1)):
        if sums is not None:
            sequence_id, position = sequence_and_position(offsets, len(sums))
            position = position + (lengths - offsets.diff())[sequence_id]
            beyond = torch.minimum(position, history[sequence_id]) - history[sequence_id]
            index = (sign * beyond + inputs.position_zero).clamp(0, len(dp) - 1)
            dp += torch.zeros_like(dp).index_put_((index,), sums.flatten(1).sum(1), accumulate=True)


def _arguments(
    inputs: Inputs,
    bias: BiasTables,
    config: Config,
    mma_layout: bool,
    output: torch.Tensor | None = None,
    grad: torch.Tensor | None = None,
) -> dict[str, Any]:
    """What the kernels share. Tokens are tensors or, where the table says so and all can be, descriptors, but for the
    output, which is written through a pointer."""
    read = {"q": (inputs.q, config["block_m"]), "k": (inputs.k, config["block_n"]), "v": (inputs.v, config["block_n"])}
    if grad is not None:
        read["do"] = (grad, config["block_m"])
    shape = inputs.shape(config)
    described = all(describable(tensor) for tensor, _ in read.values()) and shape.BLOCK_DV == shape.DV
    # A descriptor cannot leave out what is before a sequence's first query.
    descriptor = bool(config["descriptor"]) and described and inputs.key_offsets is None
    arguments: dict[str, Any] = {
        name: describe(tensor, block) if descriptor else tensor for name, (tensor, block) in read.items()
    }
    if output is not None:
        arguments["output"] = output
    rows = (inputs.q, inputs.k, inputs.v, output if grad is None else grad)
    tables, tiles_width = bias.tables(config["block_m"], config["block_n"])
    return arguments | {
        "sequences": inputs.sequences,
        "tables": tables,
        "strides": Strides(*(stride for tensor in rows if tensor is not None for stride in tensor.stride()[:2])),
        "alpha": inputs.alpha,
        "attention_scale": _attention_scale(inputs),
        "tiles_width": tiles_width,
        "total_tokens": len(inputs.q),
        "position_zero": inputs.position_zero,
        "window": inputs.max_attn_len,
        "prefix": inputs.contextual_seq_len,
        "full": inputs.min_full_attn_seq_len,
        "sinks": inputs.num_sink_tokens,
        "group": inputs.target_group_size,
        "SHAPE": shape,
        "FLAGS": inputs.flags(descriptor, mma_layout),
    }


def _attention_scale(inputs: Inputs) -> float | torch.Tensor:
    if inputs.query_scale is not None:
        return inputs.query_scale
    return 1.0 if inputs.attention_scale is None else inputs.attention_scale


def _mma_layout(inputs: Inputs, config: Config, rows_are_queries: bool) -> bool:
    """Whether the score tiles of a kernel come in the layout of Hopper's tensor cores, one warp above the other: not
    from float32 products that are not TF32, and not where a tile has less than 16 rows a warp."""
    q = inputs.q
    if not q.is_cuda:
        return True
    rows, columns = config["block_m"], config["block_n"]
    if not rows_are_queries:
        rows, columns = columns, rows
    tensor_cores = q.dtype != torch.float32 or tf32_allowed()
    hopper = torch.cuda.get_device_capability(q.device)[0] == 9
    if not (hopper and tensor_cores and rows >= 16 * config["num_warps"]):
        return False
    return has_mma_layout(Tile(q.device, q.dtype, rows, columns, config["num_warps"], rows_are_queries))


def _options(inputs: Inputs, config: Config) -> dict[str, int | None]:
    # The limit is chosen for the causal mask; with others, which need more registers, it would spill.
    limit = config.get("maxnreg") if not inputs.general else None
    return {"num_warps": config["num_warps"], "num_stages": config["num_stages"], "maxnreg": limit}
