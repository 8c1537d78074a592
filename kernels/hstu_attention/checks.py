"""What is wrong with a call as far as shapes, types and Python's numbers show it: a look at values would wait for the
device. Each check raises ValueError, in one line that names the argument."""

from collections.abc import Iterable

import torch

from .mask import Mask, check_mask
from .naive import TIME_BUCKETS

_NO_NUMBERS = (float, torch.Tensor)


def check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    offsets: torch.Tensor,
    longest: int,
    position_bias: torch.Tensor | None,
    time_bias: torch.Tensor | None,
    query_time: torch.Tensor | None,
    key_time: torch.Tensor | None,
    mask: Mask,
    num_targets: torch.Tensor | None,
    key_offsets: torch.Tensor | None,
) -> None:
    """Of all four functions. `longest`: positions that a position bias must tell apart."""
    _check_numbers(("max_len",), (longest,))
    if offsets.ndim != 1 or not offsets.shape[0]:
        raise ValueError(f"offsets must be (B + 1,), not {tuple(offsets.shape)}")
    rows = "T" if key_offsets is None else "T'"
    keys = q.shape[:1] if key_offsets is None else k.shape[:1]
    if q.ndim != 3 or k.shape != (*keys, *q.shape[1:]) or v.ndim != 3 or v.shape[:2] != k.shape[:2]:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (q, k, v))
        wanted = f"(T, h, dqk), ({rows}, h, dqk) and ({rows}, h, dv)"
        raise ValueError(f"q, k and v must be {wanted}, not {shapes}")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"q, k and v must be floats of one type, not {q.dtype}, {k.dtype} and {v.dtype}")
    if position_bias is not None:
        if position_bias.ndim != 1 or position_bias.shape[0] < 2 * longest - 1:
            shape = tuple(position_bias.shape)
            raise ValueError(f"position_bias must have at least {2 * longest - 1} entries, not shape {shape}")
        if position_bias.shape[0] % 2 == 0:
            shape = tuple(position_bias.shape)
            raise ValueError(f"position_bias must be (2P - 1,), with p[0] in the middle, not {shape}")
        _check_floats("position_bias", position_bias)
    if time_bias is not None:
        _check_length("time_bias", time_bias, TIME_BUCKETS)
        _check_floats("time_bias", time_bias)
    _check_numbers(mask._fields, mask)
    check_mask(mask, num_targets is not None)
    _check_type("offsets", offsets)
    # Not len(): it would make a number of a size that torch.export leaves open.
    _check_integers(q.shape[0], query_time=query_time)
    _check_integers(k.shape[0], key_time=key_time)
    _check_integers(offsets.shape[0], key_offsets=key_offsets)
    _check_integers(offsets.shape[0] - 1, num_targets=num_targets)


def check_cached(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    offsets: torch.Tensor,
    cached_k: torch.Tensor,
    cached_v: torch.Tensor,
    cached_offsets: torch.Tensor,
    query_time: torch.Tensor | None,
    key_time: torch.Tensor | None,
    cached_time: torch.Tensor | None,
) -> None:
    """Of `cached_attention`, what is stored, and all times."""
    if cached_k.shape[1:] != k.shape[1:] or cached_v.shape[1:] != v.shape[1:] or cached_k.shape[0] != cached_v.shape[0]:
        shapes = f"{tuple(cached_k.shape)} and {tuple(cached_v.shape)}"
        raise ValueError(f"cached_k and cached_v must be (T', h, dqk) and (T', h, dv) as k and v are, not {shapes}")
    if not q.dtype == cached_k.dtype == cached_v.dtype:
        raise ValueError(f"cached_k and cached_v must be {q.dtype} as q, not {cached_k.dtype} and {cached_v.dtype}")
    if cached_offsets.shape != offsets.shape:
        lengths = f"{offsets.shape[0]}, {tuple(cached_offsets.shape)}"
        raise ValueError(f"offsets and cached_offsets must be of one length, not {lengths}")
    _check_type("cached_offsets", cached_offsets)
    _check_integers(offsets.shape[0] - 1, query_time=query_time, key_time=key_time)
    _check_integers(cached_k.shape[0], cached_time=cached_time)


def check_times(time_bias: torch.Tensor | None, *times: torch.Tensor | None) -> None:
    if time_bias is not None and any(time is None for time in times):
        raise ValueError("time_bias needs query_time and key_time (and cached_time, with a cache)")


def check_scale(attention_scale: float | torch.Tensor | None, tokens: int) -> None:
    if isinstance(attention_scale, torch.Tensor):
        _check_length("attention_scale", attention_scale, tokens)
        _check_floats("attention_scale", attention_scale)
        if attention_scale.requires_grad and torch.is_grad_enabled():
            raise ValueError("attention_scale gets no gradient: give attention_scale.detach()")


def check_numbers(**numbers: int) -> None:
    _check_numbers(numbers.keys(), numbers.values())


def _check_numbers(names: Iterable[str], numbers: Iterable[int]) -> None:
    for name, number in zip(names, numbers, strict=True):
        # Others, as torch.SymInt and numpy's, count as well as int.
        if not isinstance(number, int) and isinstance(number, _NO_NUMBERS):
            raise ValueError(f"{name} must be an int, not a {type(number).__name__}")
        if number < 0:
            raise ValueError(f"{name} must not be negative, as {number} is")


def _check_floats(name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must be of floats, not {tensor.dtype}")


def _check_integers(length: int, **tensors: torch.Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None:
            _check_length(name, tensor, length)
            _check_type(name, tensor)


def _check_length(name: str, tensor: torch.Tensor, length: int) -> None:
    if tensor.shape != (length,):
        raise ValueError(f"{name} must be ({length},), not {tuple(tensor.shape)}")


def _check_type(name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype != torch.int64:
        raise ValueError(f"{name} must be int64, not {tensor.dtype}")
