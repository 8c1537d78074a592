"""The arguments of one call, as the kernels take them, and what their launches derive from these."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from ..common import configuration, tf32_allowed
from .arguments import Flags, Sequences, Shape
from .mask import CAUSAL, Mask, cut_mask
from .naive import bucket_starts

#: Sequences no longer than this are of the "short" shape class.
SHORT = 256
#: CUDA's limit of a launch's second and third dimension.
MOST_SEQUENCES = 65535


@dataclass
class Inputs:
    """As `kernels.hstu_attention.hstu_attention` takes them; bias tables in float32, contiguous where kernels need it.

    Raises:
        ValueError: more heads or tokens a sequence than the kernels count.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    offsets: torch.Tensor
    max_len: int
    alpha: float
    attention_scale: float | None
    position_bias: torch.Tensor | None
    time_bias: torch.Tensor | None
    query_time: torch.Tensor | None
    key_time: torch.Tensor | None
    max_attn_len: int
    contextual_seq_len: int
    num_targets: torch.Tensor | None
    softmax: bool
    min_full_attn_seq_len: int = 0
    num_sink_tokens: int = 0
    causal: bool = True
    target_group_size: int = 1
    key_offsets: torch.Tensor | None = None
    query_scale: torch.Tensor | None = None  # `attention_scale`, where each query has its own

    def __post_init__(self) -> None:
        check_sizes(self.q, self.v, self.max_len)
        for name, number in cut_mask(self.mask, self.max_len)._asdict().items():
            setattr(self, name, number)
        self.num_sequences = len(self.offsets) - 1
        self.q, self.k, self.v = token_rows(self.q), token_rows(self.k), token_rows(self.v)
        self.offsets = launch_offsets(self.offsets)
        if self.num_targets is not None:
            self.num_targets = _padded(self.num_targets, len(self.offsets) - 1, 0).contiguous()
        if self.key_offsets is not None:
            self.key_offsets = launch_offsets(self.key_offsets)
        self.query_scale = float_table(self.query_scale)
        self.position_bias, self.time_bias = float_table(self.position_bias), float_table(self.time_bias)
        self.query_time = contiguous(self.query_time) if self.timed else None
        self.key_time = contiguous(self.key_time) if self.timed else None

    @property
    def timed(self) -> bool:
        return self.time_bias is not None

    @property
    def biased(self) -> bool:
        return self.position_bias is not None or self.time_bias is not None

    @property
    def mask(self) -> Mask:
        return Mask(
            self.max_attn_len, self.contextual_seq_len, self.min_full_attn_seq_len, self.num_sink_tokens, self.causal,
            self.target_group_size,
        )  # fmt: skip

    @property
    def general(self) -> bool:
        """Whether there is more than the causal mask and one N, which the kernels' other paths do not know."""
        return is_general(self.mask, self.num_targets, self.key_offsets, self.query_scale)

    @property
    def history_sees_targets(self) -> bool:
        return not self.causal and self.num_targets is not None

    @property
    def position_zero(self) -> int:
        """Index of p[0]."""
        return 0 if self.position_bias is None else (len(self.position_bias) - 1) // 2

    @property
    def precision(self) -> str:
        """Of float32 products, as torch's setting says."""
        return "tf32" if self.q.is_cuda and tf32_allowed() else "ieee"

    @property
    def sequences(self) -> Sequences:
        return Sequences(self.offsets, self.num_targets, self.key_offsets)

    def configuration(self, kernel: str) -> dict[str, int]:
        """A kernel's launch parameters."""
        name = shape_class(self.q, self.v, self.max_len, self.biased)
        return dict(configuration(f"hstu_attention.{kernel}", name, self.q.device))

    def multiplied(self, tensor: torch.Tensor) -> torch.Tensor:
        """The float32 values that the kernels multiply in its place: rounded to TF32, where they do that."""
        values = tensor.float()
        if tensor.dtype == torch.float32 and self.precision == "tf32":
            values = ((values.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)
        return values

    def shape(self, config: Mapping[str, int]) -> Shape:
        dqk, dv = self.q.shape[2], self.v.shape[2]
        return Shape(dqk, dv, block_of(dqk), value_block(dqk, dv), config["block_m"], config["block_n"])

    def flags(self, descriptor: bool, mma_layout: bool) -> Flags:
        return Flags(
            POSITION=self.position_bias is not None,
            TIME=self.timed,
            TARGETS=self.num_targets is not None,
            WINDOW=self.max_attn_len > 0,
            PREFIX=self.contextual_seq_len > 0,
            FULL=self.min_full_attn_seq_len > 0,
            SINKS=self.num_sink_tokens > 0,
            BIDIRECTIONAL=not self.causal,
            GROUPS=self.target_group_size > 1,
            KEY_OFFSETS=self.key_offsets is not None,
            QUERY_SCALE=self.query_scale is not None,
            GENERAL=self.general,
            WHOLE=self.general and self.max_len > SHORT,
            BY_LENGTH=self.attention_scale is None and self.query_scale is None and not self.softmax,
            SOFTMAX=self.softmax,
            DESCRIPTOR=descriptor,
            PRECISION=self.precision,
            APPROXIMATE_TANH=self.q.is_cuda and self.q.dtype == torch.bfloat16,
            MMA_LAYOUT=mma_layout,
            INLINE_ASM=self.q.is_cuda,
        )


def is_general(
    mask: Mask, num_targets: torch.Tensor | None, key_offsets: torch.Tensor | None, query_scale: torch.Tensor | None
) -> bool:
    """`Inputs.general`."""
    tensors = (num_targets, key_offsets, query_scale)
    return mask != CAUSAL or any(tensor is not None for tensor in tensors)


def launch_grid(programs: int, sequences: int) -> tuple[int, int, int]:
    """The grid of `programs` for each sequence. Sequences are in two dimensions, which `tiles.sequence_id` joins; the
    last few programs may belong to none."""
    layers = max(1, triton.cdiv(sequences, MOST_SEQUENCES))
    return programs, triton.cdiv(sequences, layers), layers


def launch_offsets(offsets: torch.Tensor) -> torch.Tensor:
    """Offsets (B + 1,), contiguous, and, for the programs of `launch_grid` that belong to no sequence, empty ones
    behind."""
    _, rows, layers = launch_grid(1, len(offsets) - 1)
    return _padded(offsets, rows * layers + 1, None).contiguous()


def _padded(tensor: torch.Tensor, length: int, value: int | None) -> torch.Tensor:
    """(length,): the values, then `value`, or the last one."""
    missing = length - len(tensor)
    if not missing:
        return tensor
    return torch.cat([tensor, tensor[-1:].expand(missing) if value is None else tensor.new_full((missing,), value)])


def check_sizes(q: torch.Tensor, v: torch.Tensor, longest: int) -> None:
    """Raises ValueError where a token's heads, or a sequence's tiles of all heads, or its positions, are more than 32
    bits count."""
    heads, widest = q.shape[1], max(q.shape[2], v.shape[2])
    if heads * widest >= 2**31 or longest >= 2**31 - 256 or heads * triton.cdiv(longest, 16) >= 2**31:
        raise ValueError(
            f"attention in Triton counts in 32 bits: {heads} heads of {widest}, {longest} tokens a sequence"
        )


def shape_class(q: torch.Tensor, v: torch.Tensor, max_len: int, biased: bool) -> str:
    """What the configuration table distinguishes: the padded head dimension, type width, length, bias."""
    dim = max(block_of(q.shape[2]), block_of(v.shape[2]))
    words = [f"d{dim}", "short" if max_len <= SHORT else "long", "bias" if biased else "plain"]
    return "-".join([*words, "fp32"] if q.dtype == torch.float32 else words)


def block_of(dim: int) -> int:
    """The width of a tile for `dim` columns: a power of two, and at least what a matrix product takes."""
    return max(16, triton.next_power_of_2(dim))


def value_block(dqk: int, dv: int) -> int:
    """The width of a tile of V.

    ptxas 12.8 miscompiles products with a tile of V that is 16 or 32 wide and narrower than Q's: one operand is read at
    a wrong address of shared memory, beyond its end even (heads of 64 and 32). Such a tile is made wider.
    """
    return max(block_of(dv), min(64, block_of(dqk)))


def token_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Tokens (T, h, d) whose vectors are contiguous, and whose heads are no further apart than 32 bits hold."""
    near = (tensor.shape[1] - 1) * tensor.stride(1) < 2**31
    return tensor if tensor.stride(2) == 1 and near else tensor.contiguous()


def contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


def float_table(table: torch.Tensor | None) -> torch.Tensor | None:
    return None if table is None else table.float().contiguous()


def describable(tensor: torch.Tensor) -> bool:
    """Whether the tensor copy engine can read a head's tokens: a power of two wide, less than 2^31 rows on 16 bytes."""
    heads, dim = tensor.shape[1:]
    size = tensor.element_size()
    return (
        dim == block_of(dim)
        and len(tensor) < 2**31
        and tensor.stride(2) == 1
        and (tensor.stride(1) == dim or heads == 1)
        and tensor.stride(0) * size % 16 == 0
        and tensor.data_ptr() % 16 == 0
    )


def describe(tensor: torch.Tensor, block: int) -> TensorDescriptor:
    """A descriptor of (T, h, d) that loads `block` tokens of one head."""
    tokens, heads, dim = tensor.shape
    return TensorDescriptor(tensor, [tokens, heads * dim], [tensor.stride(0), 1], [block, dim])


@functools.cache
def bucket_edges(device: torch.device) -> torch.Tensor:
    """The least second of every time bucket, then the largest number: it is compared with, and added to no time."""
    starts = bucket_starts(device)
    return torch.cat([starts.new_zeros(1), starts, starts.new_full((1,), torch.iinfo(torch.int64).max)])


@functools.cache
def small_edges(device: torch.device) -> torch.Tensor:
    """As `bucket_edges`, cut at the largest int32."""
    return bucket_edges(device).clamp(max=torch.iinfo(torch.int32).max).int()
