"""HSTU and softmax attention as torch operations: launches of the Triton kernels, and their registration with torch."""

import functools
from collections.abc import Mapping
from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from ..common import configuration, first_derivatives_only, reverse_mode_only, tf32_allowed
from .backward import (
    bias_gradient_kernel,
    diagonal_sum_kernel,
    key_gradient_kernel,
    query_gradient_kernel,
)
from .bias import (
    band_gradient_kernel,
    band_kernel,
    relative_time_kernel,
    spread_kernel,
    tile_bucket_kernel,
)
from .forward import forward_kernel
from .naive import bucket_starts
from .tiles import BAND_BLOCK, PADDING

#: Rows no longer than this are of the "short" shape class.
SHORT = 256
#: CUDA's limit.
MOST_ROWS = 65535
_TIME_SLOTS = 256  # buckets 0..128, padded to a power of two
_BIAS_PROGRAMS = 4096
_BAND_TILE = 8  # queries, beside 128 or 256 keys: 64-bit times and sums along a row take many registers
_TIME_COPIES = 64  # of the bucket sums, so that few programs add to one place at a time


def shape_class(q: torch.Tensor, v: torch.Tensor, max_len: int, biased: bool) -> str:
    """What the configuration table distinguishes: the padded head dimension, type width, row length, bias."""
    dim = max(_block(q.shape[2]), _block(v.shape[2]))
    words = [f"d{dim}", "short" if max_len <= SHORT else "long", "bias" if biased else "plain"]
    return "-".join([*words, "fp32"] if q.dtype == torch.float32 else words)


class _Launch:
    """The arguments that all kernels of one call share."""

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        offsets: torch.Tensor,
        max_len: int,
        alpha: float,
        normaliser: float | None,
        position_bias: torch.Tensor | None,
        time_bias: torch.Tensor | None,
        query_time: torch.Tensor | None,
        key_time: torch.Tensor | None,
        max_attn_len: int,
        contextual_seq_len: int,
        num_targets: torch.Tensor | None,
        softmax: bool,
        bands: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        """`bands`: those of the forward pass, where this is the backward pass.

        Raises:
            ValueError: more rows, heads or tokens a row than the kernels count.
        """
        check_sizes(q, v, offsets, max_len)
        offsets, num_targets = offsets.contiguous(), _contiguous(num_targets)
        self.q, self.k, self.v = q, k, v
        self.tokens, self.heads, self.dqk = q.shape
        self.dv = v.shape[2]
        self.offsets, self.rows, self.max_len = offsets, len(offsets) - 1, max_len
        timed = time_bias is not None
        self.times = (_contiguous(query_time), _contiguous(key_time)) if timed else (None, None)
        self.prefix = contextual_seq_len
        self.biased = position_bias is not None or time_bias is not None
        self.plain_masks = not (num_targets is not None or max_attn_len or contextual_seq_len)
        self.tables = {
            "position_bias": None if position_bias is None else position_bias.float().contiguous(),
            "time_bias": None if time_bias is None else time_bias.float().contiguous(),
            "bucket_edges": _bucket_edges(q.device) if time_bias is not None else None,
            "query_time": self.times[0],
            "key_time": self.times[1],
        }
        self.common: dict[str, Any] = {
            "offsets": offsets,
            "num_targets": num_targets,
            **self.tables,
            "alpha": alpha,
            "normaliser": 1.0 if normaliser is None else normaliser,
            "heads": self.heads,
            "total_tokens": self.tokens,
            "position_zero": (len(position_bias) - 1) // 2 if position_bias is not None else 0,
            "window": max_attn_len,
            "prefix": contextual_seq_len,
            "DQK": self.dqk,
            "DV": self.dv,
            "BLOCK_DQK": _block(self.dqk),
            "BLOCK_DV": value_block(self.dqk, self.dv),
            "POSITION": position_bias is not None,
            "TIME": time_bias is not None,
            "TARGETS": num_targets is not None,
            "WINDOW": max_attn_len > 0,
            "PREFIX": contextual_seq_len > 0,
            "BY_LENGTH": normaliser is None and not softmax,
            "SOFTMAX": softmax,
            "PRECISION": "tf32" if q.is_cuda and tf32_allowed() else "ieee",
            "FAST": q.is_cuda and q.dtype == torch.bfloat16,
            "ASSEMBLY": q.is_cuda,
        }
        self.common["spread"] = self._spread_table()
        self.bands = bands or self._bands()
        self.common["band"] = self.bands[0] if self.bands[0].numel() else None
        self._tile_buckets: dict[tuple[int, int], dict[str, Any]] = {}

    def configuration(self, kernel: str) -> dict[str, int]:
        name = shape_class(self.q, self.v, self.max_len, self.biased)
        return dict(configuration(f"hstu_attention.{kernel}", name, self.q.device))

    def rows_of(self, config: Mapping[str, int], **tensors: tuple[torch.Tensor, int]) -> dict[str, Any]:
        """Arguments for token tensors (T, h, d), each with the tile height it is read at: tensors or descriptors."""
        descriptor = bool(config["descriptor"]) and all(_describable(tensor) for tensor, _ in tensors.values())
        arguments: dict[str, Any] = {"DESCRIPTOR": descriptor}
        for name, (tensor, block) in tensors.items():
            arguments[name] = _describe(tensor, block) if descriptor else tensor
            letter = {"q": "q", "k": "k", "v": "v", "grad": "g"}[name]
            arguments |= {f"stride_{letter}t": tensor.stride(0), f"stride_{letter}h": tensor.stride(1)}
        return arguments

    def multiplied(self, tensor: torch.Tensor) -> torch.Tensor:
        """The float32 values that the kernels multiply in its place: rounded to TF32, where they do that."""
        values = tensor.float()
        if tensor.dtype == torch.float32 and self.common["PRECISION"] == "tf32":
            values = ((values.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)
        return values

    def _diagonals(self, rows: int, warps: int) -> bool:
        """Whether score tiles come in the layout of Hopper's tensor cores, one warp above the other: not from float32
        products that are not TF32, and not where a tile has less than 16 rows a warp."""
        if not self.q.is_cuda:
            return True
        tensor_cores = self.q.dtype != torch.float32 or tf32_allowed()
        return tensor_cores and rows >= 16 * warps and torch.cuda.get_device_capability(self.q.device)[0] == 9

    def _blocks(self, config: Mapping[str, int]) -> dict[str, int | None]:
        # The limit is chosen for the causal mask; with others, which need more registers, it would spill.
        limit = config.get("maxnreg") if self.plain_masks else None
        return {
            "BLOCK_M": config["block_m"],
            "BLOCK_N": config["block_n"],
            "num_warps": config["num_warps"],
            "num_stages": config["num_stages"],
            "maxnreg": limit,
        }

    def _spread_table(self) -> torch.Tensor | None:
        table = self.tables["position_bias"]
        if table is None or not self.plain_masks or not self.tokens:
            return None
        zero = self.common["position_zero"]
        width = 2 * (zero + PADDING.value + zero % 2) + 2
        spread = table.new_empty(4, width)
        spread_kernel[(triton.cdiv(width, 256),)](table, spread, zero, BLOCK=256)
        return spread

    def _bands(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Biases and buckets near the diagonal, (T, 2 BAND_BLOCK) each; empty where there are no times."""
        wanted = self.common["TIME"] and self.plain_masks
        band = self.q.new_empty(self.tokens if wanted else 0, 2 * BAND_BLOCK.value)
        near_buckets = torch.empty_like(band, dtype=torch.uint8)
        if band.numel():
            band_kernel[(triton.cdiv(self.max_len, _BAND_TILE), self.rows)](
                band,
                near_buckets,
                self.offsets,
                **self.tables,
                position_zero=self.common["position_zero"],
                POSITION=self.common["POSITION"],
                BLOCK=_BAND_TILE,
                ASSEMBLY=self.common["ASSEMBLY"],
            )
        return band, near_buckets

    def tile_buckets(self, block_m: int, block_n: int) -> dict[str, Any]:
        """Arguments that say how times fall into buckets, for tiles of block_m queries and block_n keys."""
        query_time, key_time = self.times
        if query_time is None:
            return {"since": None, "tiles_buckets": None, "tiles_width": 0}
        if (block_m, block_n) not in self._tile_buckets:
            since = query_time.new_empty(2, self.tokens, dtype=torch.int32)
            slots = self.tokens // block_m + self.rows + 1
            query_ranges = since.new_empty(slots, 2)
            key_ranges = since.new_empty(self.tokens // block_n + self.rows + 1, 2)
            block = max(block_m, block_n)
            relative_time_kernel[(triton.cdiv(self.max_len, block), self.rows)](
                query_time, key_time, self.offsets, since, query_ranges, key_ranges, self.tokens,
                BLOCK_M=block_m, BLOCK_N=block_n, BLOCK=block,
            )  # fmt: skip
            width = triton.cdiv(self.max_len, block_n)
            tiles = since.new_empty(slots, width)
            programs = triton.cdiv(self.max_len, block_m) * triton.cdiv(width, 32)
            tile_bucket_kernel[(programs, self.rows)](
                self.offsets, query_ranges, key_ranges, tiles, width,
                BLOCK_M=block_m, BLOCK_N=block_n, BLOCK=32, ASSEMBLY=self.common["ASSEMBLY"],
            )  # fmt: skip
            self._tile_buckets[block_m, block_n] = {"since": since, "tiles_buckets": tiles, "tiles_width": width}
        return self._tile_buckets[block_m, block_n]

    def forward(self, config: Mapping[str, int]) -> tuple[torch.Tensor, torch.Tensor]:
        output = self.v.new_empty(self.tokens, self.heads, self.dv)
        log_mass = self.q.new_empty((self.heads, self.tokens) if self.common["SOFTMAX"] else (0,), dtype=torch.float32)
        tiles = triton.cdiv(self.max_len, config["block_m"])
        if self.tokens and tiles:
            forward_kernel[(tiles * self.heads, self.rows)](
                output=output,
                log_mass=log_mass,
                **self.tile_buckets(config["block_m"], config["block_n"]),
                stride_ot=output.stride(0),
                stride_oh=output.stride(1),
                num_tiles=tiles,
                **self.rows_of(
                    config,
                    q=(self.q, config["block_m"]),
                    k=(self.k, config["block_n"]),
                    v=(self.v, config["block_n"]),
                ),
                **self.common,
                **self._blocks(config),
                DIAGONALS=self._diagonals(config["block_m"], config["num_warps"]),
            )
        return output, log_mass

    def key_gradient(
        self,
        config: Mapping[str, int],
        grad: torch.Tensor,
        log_mass: torch.Tensor,
        delta: torch.Tensor | None,
        dq: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """dk, dv; adds to the float32 `dq` if given; and, for a position bias with targets, the targets' sums."""
        dk, dv = torch.empty_like(self.k, memory_format=torch.contiguous_format), self.v.new_empty(self.v.shape)
        sums: list[torch.Tensor | None] = [None, None]
        if self.common["TARGETS"] and self.common["POSITION"]:
            sums = [log_mass.new_empty(self.heads, self.tokens) for _ in range(2)]
        tiles = triton.cdiv(self.max_len, config["block_n"])
        arguments = self.rows_of(
            config,
            q=(self.q, config["block_m"]),
            grad=(grad, config["block_m"]),
            k=(self.k, config["block_n"]),
            v=(self.v, config["block_n"]),
        )
        dq_argument = dq if dq is None or not arguments["DESCRIPTOR"] else _describe(dq, config["block_m"])
        key_gradient_kernel[(tiles * self.heads, self.rows)](
            dq=dq_argument,
            dk=dk,
            dv=dv,
            log_mass=log_mass,
            delta=delta,
            target_sums=sums[0],
            self_sums=sums[1],
            **self.tile_buckets(config["block_m"], config["block_n"]),
            num_tiles=tiles,
            ADD_DQ=dq is not None,
            DIAGONALS=self._diagonals(config["block_n"], config["num_warps"]),
            **arguments,
            **self.common,
            **self._blocks(config),
        )
        return dk, dv, sums[0], sums[1]

    def query_gradient(
        self, config: Mapping[str, int], grad: torch.Tensor, log_mass: torch.Tensor, delta: torch.Tensor | None
    ) -> torch.Tensor:
        dq = self.q.new_empty(self.q.shape)
        tiles = triton.cdiv(self.max_len, config["block_m"])
        query_gradient_kernel[(tiles * self.heads, self.rows)](
            dq=dq,
            log_mass=log_mass,
            delta=delta,
            **self.tile_buckets(config["block_m"], config["block_n"]),
            num_tiles=tiles,
            **self.rows_of(
                config,
                q=(self.q, config["block_m"]),
                grad=(grad, config["block_m"]),
                k=(self.k, config["block_n"]),
                v=(self.v, config["block_n"]),
            ),
            **self.common,
            **self._blocks(config),
            DIAGONALS=self._diagonals(config["block_m"], config["num_warps"]),
        )
        return dq

    def bias_gradient(
        self,
        config: Mapping[str, int],
        deterministic: bool,
        grad: torch.Tensor,
        log_mass: torch.Tensor,
        delta: torch.Tensor | None,
        target_sums: torch.Tensor | None,
        self_sums: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Gradients of the two tables, float32; None for a table that is not there."""
        block_m, block_n = config["block_m"], config["block_n"]
        ratio = block_m // block_n
        # In multiples of block_n: a tile's last keys are up to ratio - 1 beyond its first query, prefix keys more.
        lowest = -max(ratio, triton.cdiv(min(self.prefix, self.max_len), block_n)) + 1
        distances = (triton.cdiv(self.max_len, block_m) - 1) * ratio - lowest + 1
        # Programs of the nearest distances have the most tiles and buckets: rows first, then tiles are dealt out.
        row_splits = max(1, min(self.rows, _BIAS_PROGRAMS // distances))
        tile_splits = max(1, _BIAS_PROGRAMS // (distances * row_splits))
        tile_splits = min(tile_splits, distances)
        splits = row_splits * tile_splits
        band_grid = (triton.cdiv(self.max_len, _BAND_TILE), self.rows)
        position_sums = time_sums = near_sums = band_gradient = None
        position_bias, time_bias = self.tables["position_bias"], self.tables["time_bias"]
        if position_bias is not None:
            position_sums = log_mass.new_zeros(distances, splits if deterministic else 1, block_m, block_n)
        if time_bias is not None:
            copies = distances * splits if deterministic else _TIME_COPIES
            near_copies = 0 if not self.plain_masks else band_grid[0] * band_grid[1] if deterministic else copies
            sums = log_mass.new_zeros(copies + near_copies, _TIME_SLOTS)
            time_sums, near_sums = sums.split([copies, near_copies])
            if self.plain_masks:
                band_gradient = log_mass.new_empty(self.bands[1].shape)
        tensors = {"q": (self.q, block_m), "grad": (grad, block_m), "k": (self.k, block_n), "v": (self.v, block_n)}
        # An entry sums score gradients of a whole batch, among which errors of operands rounded to TF32 do not cancel:
        # float32 is multiplied as it is, not by tensor cores. Softmax's do cancel within a query, but with its delta
        # alone, which comes of products like the forward pass's (six times the error otherwise, in a window of two).
        exact = self.q.dtype == torch.float32 and not self.common["SOFTMAX"]
        bias_gradient_kernel[(distances * splits,)](
            position_sums=position_sums,
            time_sums=time_sums,
            band_gradient=band_gradient,
            log_mass=log_mass,
            delta=delta,
            **self.tile_buckets(block_m, block_n),
            rows=self.rows,
            small_edges=_small_edges(self.q.device) if time_sums is not None else None,
            row_splits=row_splits,
            tile_splits=tile_splits,
            copies=len(time_sums) if time_sums is not None else 1,
            lowest=lowest,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            **self.rows_of(config, **tensors),
            **self.common | ({"PRECISION": "ieee"} if exact else {}),
            DIAGONALS=not exact and self._diagonals(block_m, config["num_warps"]),
            DETERMINISTIC=deterministic,
            num_warps=config["num_warps"],
            num_stages=config["num_stages"],
            maxnreg=config.get("maxnreg"),
        )
        dp = dw = None
        if position_sums is not None and position_bias is not None:
            dp = log_mass.new_zeros(len(position_bias))
            diagonal_sum_kernel[(distances + ratio,)](
                position_sums.sum(1) if deterministic else position_sums,
                dp,
                distances,
                lowest,
                self.common["position_zero"],
                BLOCK_M=block_m,
                BLOCK_N=block_n,
            )
            if target_sums is not None and self_sums is not None:
                dp += self._target_position_gradient(dp, target_sums, self_sums)
        if time_bias is not None:
            if band_gradient is not None and near_sums is not None:
                band_gradient_kernel[band_grid](
                    band_gradient, self.bands[1], near_sums, self.offsets, len(near_sums),
                    BLOCK=_BAND_TILE, DETERMINISTIC=deterministic,
                )  # fmt: skip
            dw = sums.sum(0)[: len(time_bias)]
        return dp, dw

    def _target_position_gradient(
        self, like: torch.Tensor, target_sums: torch.Tensor, self_sums: torch.Tensor
    ) -> torch.Tensor:
        """What targets add: p[j - history] for every key j of the history, and p[0] of themselves."""
        lengths = self.offsets.diff()
        row = torch.repeat_interleave(lengths, output_size=self.tokens)
        place = torch.arange(self.tokens, device=row.device) - self.offsets[row]
        history = (lengths - self.common["num_targets"]).clamp(min=0)[row]
        zero = self.common["position_zero"]
        index = (torch.minimum(place, history) - history + zero).clamp(min=0)
        values = target_sums.sum(0) + self_sums.sum(0)
        return torch.zeros_like(like).index_put_((index,), values, accumulate=True)


@torch.library.custom_op("hstu::attention", mutates_args=())
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    offsets: torch.Tensor,
    max_len: int,
    alpha: float,
    normaliser: float | None,
    position_bias: torch.Tensor | None,
    time_bias: torch.Tensor | None,
    query_time: torch.Tensor | None,
    key_time: torch.Tensor | None,
    max_attn_len: int,
    contextual_seq_len: int,
    num_targets: torch.Tensor | None,
    softmax: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(output (T, h, dv), log of softmax's denominators (h, T), biases and time buckets near the diagonal, (T, 256)
    each); the last three for the backward pass, and empty where they do not apply."""
    with torch.cuda.device_of(q):
        launch = _Launch(
            _rows(q), _rows(k), _rows(v), offsets, max_len, alpha, normaliser, position_bias, time_bias, query_time,
            key_time, max_attn_len, contextual_seq_len, num_targets, softmax,
        )  # fmt: skip
        return *launch.forward(launch.configuration("forward")), *launch.bands


@attention.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    offsets: torch.Tensor,
    max_len: int,
    alpha: float,
    normaliser: float | None,
    position_bias: torch.Tensor | None,
    time_bias: torch.Tensor | None,
    query_time: torch.Tensor | None,
    key_time: torch.Tensor | None,
    max_attn_len: int,
    contextual_seq_len: int,
    num_targets: torch.Tensor | None,
    softmax: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    log_mass = q.new_empty((q.shape[1], q.shape[0]) if softmax else (0,), dtype=torch.float32)
    banded = time_bias is not None and not (max_attn_len or contextual_seq_len or num_targets is not None)
    band = q.new_empty(q.shape[0] if banded else 0, 2 * BAND_BLOCK.value)
    return v.new_empty(v.shape), log_mass, band, torch.empty_like(band, dtype=torch.uint8)


@torch.library.custom_op("hstu::attention_backward", mutates_args=())
def attention_backward(
    grad: torch.Tensor,
    output: torch.Tensor,
    log_mass: torch.Tensor,
    band: torch.Tensor,
    near_buckets: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    offsets: torch.Tensor,
    max_len: int,
    alpha: float,
    normaliser: float | None,
    position_bias: torch.Tensor | None,
    time_bias: torch.Tensor | None,
    query_time: torch.Tensor | None,
    key_time: torch.Tensor | None,
    max_attn_len: int,
    contextual_seq_len: int,
    num_targets: torch.Tensor | None,
    softmax: bool,
    deterministic: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv, and the gradients of both tables (empty for a table that is not there)."""
    with torch.cuda.device_of(q):
        launch = _Launch(
            _rows(q), _rows(k), _rows(v), offsets, max_len, alpha, normaliser, position_bias, time_bias, query_time,
            key_time, max_attn_len, contextual_seq_len, num_targets, softmax, (band, near_buckets),
        )  # fmt: skip
        if not q.numel() or not max_len:
            tables = [log_mass.new_empty(0) if t is None else torch.zeros_like(t) for t in (position_bias, time_bias)]
            return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), tables[0], tables[1]
        grad = _rows(grad)
        delta = (launch.multiplied(grad) * output.float()).sum(-1).T.contiguous() if softmax else None
        config = launch.configuration("key_gradient")
        # One pass that adds dq as it goes, in no fixed order; or a second kernel for dq.
        added = not deterministic and bool(config["add_dq"])
        dq = torch.zeros(q.shape, dtype=torch.float32, device=q.device) if added else None
        dk, dv, target_sums, self_sums = launch.key_gradient(config, grad, log_mass, delta, dq)
        if dq is None:
            dq = launch.query_gradient(launch.configuration("query_gradient"), grad, log_mass, delta)
        dp = dw = None
        if launch.biased:
            config = launch.configuration("bias_gradient")
            dp, dw = launch.bias_gradient(config, deterministic, grad, log_mass, delta, target_sums, self_sums)
        return (
            dq.to(q.dtype),
            dk,
            dv,
            log_mass.new_empty(0) if dp is None or position_bias is None else dp.to(position_bias.dtype),
            log_mass.new_empty(0) if dw is None or time_bias is None else dw.to(time_bias.dtype),
        )


@attention_backward.register_fake
def _(
    grad: torch.Tensor,
    output: torch.Tensor,
    log_mass: torch.Tensor,
    band: torch.Tensor,
    near_buckets: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    offsets: torch.Tensor,
    max_len: int,
    alpha: float,
    normaliser: float | None,
    position_bias: torch.Tensor | None,
    time_bias: torch.Tensor | None,
    *_others: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dp, dw = (log_mass.new_empty(0) if t is None else t.new_empty(t.shape) for t in (position_bias, time_bias))
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dp, dw


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    tensors = [value for value in inputs if value is None or isinstance(value, torch.Tensor)]
    ctx.is_tensor = [isinstance(value, torch.Tensor) for value in inputs]
    ctx.others = [None if isinstance(value, torch.Tensor) else value for value in inputs]
    softmax = inputs[-1]
    ctx.save_for_backward(
        *(value for value in tensors if value is not None),
        output[0] if softmax else output[0].new_empty(0),
        *output[1:],
    )


def _backward(ctx: Any, grad: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    reverse_mode_only("attention", grad)
    *saved, output, log_mass, band, near_buckets = ctx.saved_tensors
    tensors = iter(saved)
    inputs = [next(tensors) if flag else other for flag, other in zip(ctx.is_tensor, ctx.others, strict=True)]
    deterministic = torch.are_deterministic_algorithms_enabled()
    dq, dk, dv, dp, dw = attention_backward(grad, output, log_mass, band, near_buckets, *inputs, deterministic)
    gradients: list[torch.Tensor | None] = [None] * len(inputs)
    gradients[:3] = dq, dk, dv
    gradients[7] = dp if inputs[7] is not None else None
    gradients[8] = dw if inputs[8] is not None else None
    return tuple(gradients)


attention.register_autograd(_backward, setup_context=_setup_context)
first_derivatives_only("attention", attention_backward)


@functools.cache
def _bucket_edges(device: torch.device) -> torch.Tensor:
    """The least second of every time bucket, then the largest number: it is compared with, and added to no time."""
    starts = bucket_starts(device)
    return torch.cat([starts.new_zeros(1), starts, starts.new_full((1,), torch.iinfo(torch.int64).max)])


@functools.cache
def _small_edges(device: torch.device) -> torch.Tensor:
    return _bucket_edges(device).clamp(max=torch.iinfo(torch.int32).max).int()


def _block(dim: int) -> int:
    """The width of a tile for `dim` columns: a power of two, and at least what a matrix product takes."""
    return max(16, triton.next_power_of_2(dim))


def value_block(dqk: int, dv: int) -> int:
    """The width of a tile of V.

    ptxas 12.8 miscompiles products with a tile of V that is not full, 16 or 32 wide and narrower than Q's (it reads a
    uniform register that it never set; tests/kernels/ahead_of_time.py looks for that): such a tile is made wider.
    """
    block = _block(dv)
    return block if dv == block else max(block, min(64, _block(dqk)))


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """Tokens (T, h, d) whose vectors are contiguous, and whose heads are no further apart than 32 bits hold."""
    near = (tensor.shape[1] - 1) * tensor.stride(1) < 2**31
    return tensor if tensor.stride(2) == 1 and near else tensor.contiguous()


def _contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


def check_sizes(q: torch.Tensor, v: torch.Tensor, offsets: torch.Tensor, longest: int) -> None:
    """Raises ValueError where there are more rows than a launch's second dimension may have; where a token's heads, or
    a row's tiles of all heads, or its places, are more than 32 bits count."""
    if len(offsets) - 1 > MOST_ROWS:
        raise ValueError(f"attention in Triton takes at most {MOST_ROWS} rows, not {len(offsets) - 1}")
    heads, widest = q.shape[1], max(q.shape[2], v.shape[2])
    if heads * widest >= 2**31 or longest >= 2**31 - 256 or heads * triton.cdiv(longest, 16) >= 2**31:
        raise ValueError(f"attention in Triton counts in 32 bits: {heads} heads of {widest}, {longest} tokens a row")


def _describable(tensor: torch.Tensor) -> bool:
    """Whether the tensor copy engine can read a head's tokens: a power of two wide, less than 2^31 rows on 16 bytes."""
    heads, dim = tensor.shape[1:]
    size = tensor.element_size()
    return (
        dim == _block(dim)
        and len(tensor) < 2**31
        and tensor.stride(2) == 1
        and (tensor.stride(1) == dim or heads == 1)
        and tensor.stride(0) * size % 16 == 0
        and tensor.data_ptr() % 16 == 0
    )


def _describe(tensor: torch.Tensor, block: int) -> TensorDescriptor:
    tokens, heads, dim = tensor.shape
    return TensorDescriptor(tensor, [tokens, heads * dim], [tensor.stride(0), 1], [block, dim])
