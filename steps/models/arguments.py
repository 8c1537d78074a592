"""Checks of what callers give: each raises ValueError that names the argument, and says what is expected.

Of tensors none but `offsets` is read, so that no check of the others waits for a GPU.
"""

import operator
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch


def user_names(users: Iterable[int]) -> list[int]:
    """Users as whole numbers that fit 64 bits. True and False, texts and fractions are none."""
    if not isinstance(users, Iterable):
        raise ValueError(f"users must be a sequence of whole numbers, not {users!r}")
    return [_named(user) for user in users]


def _named(user: Any) -> int:
    name = _whole(user)
    if name is None or not -(2**63) <= name < 2**63:
        raise ValueError(f"users must be whole numbers of 64 bits, not {user!r}")
    return name


def count_of(what: str, given: Any, things: str) -> int:
    """A whole number of `things`, at least 1."""
    number = _whole(given)
    if number is None or number < 1:
        raise ValueError(f"{what} must be a whole number of {things}, at least 1, not {given!r}")
    return number


def require_tensor(
    what: str,
    given: Any,
    shape: tuple[int | str, ...],
    dtype: torch.dtype | None,
    why: str,
    device: torch.device | None = None,
) -> None:
    """A tensor of a shape, in which a text stands for any number, of a type and on a device; None: of and on any."""
    sizes = f"({', '.join(map(str, shape))}{',' * (len(shape) == 1)})"
    wanted = f"{what} must be a tensor {sizes}{f' {_short(dtype)}' if dtype else ''}, {why}"
    if not isinstance(given, torch.Tensor):
        raise ValueError(f"{wanted}, not {'None' if given is None else f'a {type(given).__name__}'}")
    fits = len(given.shape) == len(shape) and all(
        isinstance(n, str) or n == own for n, own in zip(shape, given.shape, strict=True)
    )
    if not fits or given.dtype != (dtype or given.dtype):
        raise ValueError(f"{wanted}, not {tuple(given.shape)} {_short(given.dtype)}")
    if given.device != (device or given.device):
        raise ValueError(f"{what} must be on {device}, as the encoder is, not on {given.device}")


def jagged_counts(offsets: Any, users: int, total: int, things: str) -> list[int]:
    """How many of the `total` things each user has, by `offsets`, which are read: those on a GPU are waited for."""
    require_tensor("offsets", offsets, (users + 1,), torch.int64, "one more than the users")
    bounds = offsets.tolist()
    counts = [end - start for start, end in pairwise(bounds)]
    if bounds[0] or bounds[-1] != total or min(counts, default=0) < 0:
        raise ValueError(f"offsets must rise from 0 to the {total} {things}, not be {bounds}")
    return counts


def _whole(given: Any) -> int | None:
    """The whole number that this is, if it is one."""
    if isinstance(given, bool) or getattr(given, "dtype", None) == torch.bool:
        return None
    try:
        return operator.index(given)
    except TypeError:
        return None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
