"""Cross-entropy of all items in Triton: logits are calculated in tiles, twice, and never stored.

With M states, V items and d dimensions:

- Forward: a program has a tile of states and goes through items, with an online softmax. As attention adds up values,
  it adds up item vectors by their weights: that is the gradient of the states, up to the factor that arrives in the
  backward pass. So the backward pass needs no logits for them. Where states make too few programs, several share the
  items of a tile, and a second kernel puts their sums together.
- The target is left out of the softmax until that kernel: its gradient is the share of all others, no 1 - p, which
  would cancel for a state that is predicted well.
- Backward, items and bias: a program has a tile of items and goes through states, whose logits it calculates again.
  Programs that share the states of a tile write sums of their own. No atomics, so gradients repeat bit by bit.

Products: 4 M V d operations forward, as many backward. Saved for the backward pass, in float32: gradients of states
(M d) and three numbers a state. Scratch: for each program a tile of d columns in float32, where programs share.
Powers and logarithms are of base 2, which the hardware has.
"""
# A kernel's arguments have no Python types.
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..common import configuration, first_derivatives_only, reverse_mode_only, tf32_allowed
from ..tensor_cores import operand
from .naive import PADDING

_PADDING = tl.constexpr(PADDING)
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
# Where a maximum starts: below every logit, and finite, as -inf less -inf is no number.
_LOWEST = tl.constexpr(-1e38)
#: Numbers of states and items fill whole tiles, the largest of which has so many.
_PADDED_TO = 128
_BLOCK_MEAN = 1024


@triton.jit
def _vectors(pointer, count, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):
    """The first rows of a matrix (., D), `count` of them, zeros behind; as the tensor cores read them."""
    here, columns = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK_D)[None, :]
    tile = tl.load(pointer + here * D + columns, mask=(here < count) & (columns < D), other=0.0)
    return operand(tile, tile.dtype, PRECISION)


@triton.jit(do_not_specialize=["item_count"])
def cross_entropy_offsets_kernel(bias, offsets, item_count, BLOCK: tl.constexpr):
    """What is added to the logits of items, to the base 2: -inf for padding, and behind the last item."""
    numbers = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = (numbers != _PADDING) & (numbers < item_count)
    found = tl.where(inside, 0.0, float("-inf"))
    if bias is not None:
        found += tl.load(bias + numbers, mask=inside, other=0.0).to(tl.float32) * _LOG2E
    tl.store(offsets + numbers, found)


@triton.jit(do_not_specialize=["rows", "item_count", "share"])
def cross_entropy_forward_kernel(
    states,
    items,
    offsets,
    targets,
    maxima,
    sums,
    pulls,
    rows,
    item_count,
    share,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_ITEMS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Of a tile of states and the program's share of the items but each state's target: the largest logit, the sum of
    2^(logit - largest), and the sum of the item vectors times that. Outputs are (programs of a tile, rows, ...)."""
    first = tl.program_id(0) * BLOCK_ROWS
    left = tl.minimum(rows - first, BLOCK_ROWS)
    here = tl.arange(0, BLOCK_ROWS)
    state = _vectors(states + first.to(tl.int64) * D, left, D, BLOCK_ROWS, BLOCK_D, PRECISION)
    target = tl.load(targets + first + here, mask=here < left, other=_PADDING).to(tl.int32)
    begin = tl.program_id(1) * share * BLOCK_ITEMS  # the compiler sees that loads are aligned
    end = begin + tl.minimum(share * BLOCK_ITEMS, item_count - begin)
    # Nothing to do for states that are all padding, as at the end of a padded batch.
    end = tl.where(tl.max(tl.where(target == _PADDING, 0, 1), 0) > 0, end, begin)
    maximum = tl.full([BLOCK_ROWS], _LOWEST, tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    pull = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    vector = items + begin.to(tl.int64) * D  # what is in memory before a tile may pass 2^31 elements
    for start in range(begin, end, BLOCK_ITEMS):
        numbers = start + tl.arange(0, BLOCK_ITEMS)  # behind the last item nothing is masked: its offset is -inf
        vectors = _vectors(vector, end - start, D, BLOCK_ITEMS, BLOCK_D, PRECISION)
        vector += BLOCK_ITEMS * D
        logit = tl.dot(state, tl.trans(vectors), input_precision=PRECISION)
        logit = logit * _LOG2E + tl.load(offsets + numbers)[None, :]
        logit = tl.where(numbers[None, :] == target[:, None], float("-inf"), logit)
        larger = tl.maximum(maximum, tl.max(logit, 1))
        shrink = tl.exp2(maximum - larger)
        weight = tl.exp2(logit - larger[:, None])
        total = total * shrink + tl.sum(weight, 1)
        weight = operand(weight, vectors.dtype, PRECISION)
        pull = tl.dot(weight, vectors, pull * shrink[:, None], input_precision=PRECISION)
        maximum = larger
    place = tl.program_id(1).to(tl.int64) * rows + first
    columns = tl.arange(0, BLOCK_D)[None, :]
    tl.store(maxima + place + here, maximum, mask=here < left)
    tl.store(sums + place + here, total, mask=here < left)
    inside = (here < left)[:, None] & (columns < D)
    tl.store(pulls + place * D + here[:, None] * D + columns, pull, mask=inside)


@triton.jit(do_not_specialize=["rows", "item_count", "programs"])
def cross_entropy_join_kernel(
    states,
    items,
    bias,  # or None
    targets,
    maxima,
    sums,
    pulls,
    normalisers,
    misses,
    marks,
    gradients,
    partial,
    rows,
    item_count,
    programs,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """From what the programs of a tile found and the target's logit: the logarithm of the sum of all 2^logit, the share
    of all but the target in it, the target in 32 bits, and the gradient of the loss by the state; of the program's
    states together, the sum of the losses, and of how many. The first three are written behind the last state too."""
    first = tl.program_id(0) * BLOCK_ROWS
    here = tl.arange(0, BLOCK_ROWS)
    inside = first + here < rows
    columns = tl.arange(0, BLOCK_D)[None, :]
    within = inside[:, None] & (columns < D)
    at = first.to(tl.int64) * D + here[:, None] * D + columns
    target = tl.load(targets + first + here, mask=inside, other=_PADDING)
    counts = target != _PADDING
    known = counts & (target > 0) & (target < item_count)
    state = tl.load(states + at, mask=within, other=0.0).to(tl.float32)
    vector = tl.load(items + target[:, None] * D + columns, mask=known[:, None] & (columns < D), other=0.0)
    vector = vector.to(tl.float32)
    own = tl.sum(state * vector, 1)
    if bias is not None:
        own += tl.load(bias + target, mask=known, other=0.0).to(tl.float32)
    own = tl.where(known | (target == _PADDING), own * _LOG2E, float("nan"))
    maximum = own
    others = tl.zeros([BLOCK_ROWS], tl.float32)
    pull = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    place = first.to(tl.int64)
    for _ in range(programs):
        found = tl.load(maxima + place + here, mask=inside, other=0.0)
        larger = tl.maximum(maximum, found)
        shrink, weight = tl.exp2(maximum - larger), tl.exp2(found - larger)
        others = others * shrink + tl.load(sums + place + here, mask=inside, other=0.0) * weight
        part = tl.load(pulls + place * D + here[:, None] * D + columns, mask=within, other=0.0)
        pull = pull * shrink[:, None] + part * weight[:, None]
        maximum = larger
        place += rows
    total = tl.exp2(own - maximum) + others
    normaliser = maximum + tl.log2(total)
    loss = (tl.log2(total) + (maximum - own)) * _LN2
    gradient = (pull - others[:, None] * vector) / total[:, None]
    # A state without a target has the weight 2^-inf for every item.
    tl.store(normalisers + first + here, tl.where(counts, normaliser, float("inf")))
    tl.store(misses + first + here, tl.where(counts, others / total, 0.0))
    tl.store(marks + first + here, target.to(tl.int32))
    tl.store(gradients + at, tl.where(counts[:, None], gradient, 0.0), mask=within)
    tl.store(partial + 2 * tl.program_id(0), tl.sum(tl.where(counts, loss, 0.0), 0))
    tl.store(partial + 2 * tl.program_id(0) + 1, tl.sum(tl.where(counts, 1.0, 0.0), 0))


@triton.jit(do_not_specialize=["count"])
def cross_entropy_mean_kernel(partial, loss, inverse, count, BLOCK: tl.constexpr):
    """The mean, NaN over nothing; and by what gradients of the sum are multiplied, 0 over nothing."""
    here = tl.arange(0, BLOCK)
    total, number = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, BLOCK):
        pair = partial + 2 * (start + here)
        total += tl.load(pair, mask=start + here < count, other=0.0)
        number += tl.load(pair + 1, mask=start + here < count, other=0.0)
    all_of_them = tl.sum(number, 0)
    mean = tl.sum(total, 0) / tl.maximum(all_of_them, 1.0)
    tl.store(loss, tl.where(all_of_them > 0, mean, float("nan")))
    tl.store(inverse, tl.where(all_of_them > 0, 1 / tl.maximum(all_of_them, 1.0), 0.0))


@triton.jit(do_not_specialize=["rows", "item_count", "share"])
def cross_entropy_items_kernel(
    states,
    items,
    offsets,
    normalisers,
    misses,
    marks,
    scale,
    item_gradients,
    bias_gradients,  # or None
    rows,
    item_count,
    share,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_ITEMS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of a tile of items and of their bias, from the program's share of the states, each of whose losses has
    the gradient `scale`. Outputs are (programs of a tile, items, ...)."""
    first = tl.program_id(0) * BLOCK_ITEMS
    left = tl.minimum(item_count - first, BLOCK_ITEMS)
    here = tl.arange(0, BLOCK_ITEMS)
    numbers = first + here
    vectors = _vectors(items + first.to(tl.int64) * D, left, D, BLOCK_ITEMS, BLOCK_D, PRECISION)
    offset = tl.load(offsets + numbers)[:, None]
    begin = tl.program_id(1) * share * BLOCK_ROWS
    end = begin + tl.minimum(share * BLOCK_ROWS, rows - begin)
    total = tl.zeros([BLOCK_ITEMS], tl.float32)
    gradient = tl.zeros([BLOCK_ITEMS, BLOCK_D], tl.float32)
    vector = states + begin.to(tl.int64) * D
    for start in range(begin, end, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)  # behind the last state nothing is masked: its weight is 0
        state = _vectors(vector, end - start, D, BLOCK_ROWS, BLOCK_D, PRECISION)
        vector += BLOCK_ROWS * D
        target = tl.load(marks + row)[None, :]
        normaliser = tl.load(normalisers + row)[None, :]
        miss = tl.load(misses + row)[None, :]
        logit = tl.dot(vectors, tl.trans(state), input_precision=PRECISION)
        weight = tl.exp2(logit * _LOG2E + (offset - normaliser))
        weight = tl.where(numbers[:, None] == target, -miss, weight)
        total += tl.sum(weight, 1)
        weight = operand(weight, state.dtype, PRECISION)
        gradient = tl.dot(weight, state, gradient, input_precision=PRECISION)
    factor = tl.load(scale)
    place = tl.program_id(1).to(tl.int64) * item_count + first
    columns = tl.arange(0, BLOCK_D)[None, :]
    inside = (here < left)[:, None] & (columns < D)
    tl.store(item_gradients + place * D + here[:, None] * D + columns, gradient * factor, mask=inside)
    if bias_gradients is not None:
        tl.store(bias_gradients + place + here, total * factor, mask=here < left)


@triton.jit(do_not_specialize=["item_count", "programs"])
def cross_entropy_sum_kernel(
    item_sums,
    bias_sums,  # or None
    item_gradients,
    bias_gradients,  # or None
    item_count,
    programs,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """The sums over the programs of a tile."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    here = tl.arange(0, BLOCK_ROWS)
    inside = first + here < item_count
    columns = tl.arange(0, BLOCK_D)[None, :]
    within = inside[:, None] & (columns < D)
    at = here[:, None] * D + columns
    gradient = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    place = first
    for _ in range(programs):
        gradient += tl.load(item_sums + place * D + at, mask=within, other=0.0)
        if bias_sums is not None:
            total += tl.load(bias_sums + place + here, mask=inside, other=0.0)
        place += item_count
    tl.store(item_gradients + first * D + at, gradient, mask=within)
    if bias_sums is not None:
        tl.store(bias_gradients + first + here, total, mask=inside)


@torch.library.custom_op("hstu::linear_cross_entropy_forward", mutates_args=())
def _forward(
    states: torch.Tensor, items: torch.Tensor, targets: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The mean loss (), and what is saved: what is added to the logits of Q items, V and some, (Q,); of P states, M and
    some, logarithms of the sums of 2^logit (P,), shares of all but the target (P,) and targets in 32 bits (P,); the
    gradients of the sum of losses by the states (M, d), and by what they are those of the mean (). All in float32 but
    for the targets."""
    (rows, dim), item_count = states.shape, len(items)
    _check_counts(rows, item_count)
    outputs = _forward_outputs(states, items, targets, bias)
    loss, offsets, *saved, inverse = outputs
    states, items, targets = states.contiguous(), items.contiguous(), targets.contiguous()
    bias = None if bias is None else bias.contiguous()
    launch = configuration("linear_cross_entropy_forward", _shape_class(dim, states.dtype), states.device)
    split = _split(rows, launch["block_rows"], item_count, launch["block_items"], launch["programs"])
    maxima, sums = (states.new_empty(split.programs, rows, dtype=torch.float32) for _ in range(2))
    parts = (maxima, sums, states.new_empty(split.programs, rows, dim, dtype=torch.float32))
    sizes = _elementwise_sizes(dim, states)
    joins = len(saved[0]) // sizes["BLOCK_ROWS"]
    partial = states.new_empty(joins, 2, dtype=torch.float32)
    with torch.cuda.device_of(states):
        cross_entropy_offsets_kernel[(len(offsets) // _PADDED_TO,)](bias, offsets, item_count, BLOCK=_PADDED_TO)
        cross_entropy_forward_kernel[split.grid](
            states, items, offsets, targets, *parts, rows, item_count, split.share, **_sizes(dim, launch)
        )
        cross_entropy_join_kernel[(joins,)](
            states, items, bias, targets, *parts, *saved, partial, rows, item_count, split.programs, **sizes
        )
        cross_entropy_mean_kernel[(1,)](partial, loss, inverse, joins, BLOCK=_BLOCK_MEAN)
    return outputs


@_forward.register_fake
def _forward_outputs(
    states: torch.Tensor, items: torch.Tensor, targets: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, dim = states.shape
    loss, inverse = (states.new_empty((), dtype=torch.float32) for _ in range(2))
    offsets = states.new_empty(_padded(items.shape[0]), dtype=torch.float32)
    normalisers, misses = (states.new_empty(_padded(rows), dtype=torch.float32) for _ in range(2))
    marks = states.new_empty(_padded(rows), dtype=torch.int32)
    return loss, offsets, normalisers, misses, marks, states.new_empty(rows, dim, dtype=torch.float32), inverse


@torch.library.custom_op("hstu::linear_cross_entropy_item_gradients", mutates_args=())
def _item_gradients(
    states: torch.Tensor,
    items: torch.Tensor,
    offsets: torch.Tensor,
    normalisers: torch.Tensor,
    misses: torch.Tensor,
    marks: torch.Tensor,
    scale: torch.Tensor,
    biased: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the items (V, d) and, where they are `biased`, of the bias (V,), else (0,). `scale` (), float32, is
    that of every state's loss."""
    (rows, dim), item_count = states.shape, len(items)
    _check_counts(rows, item_count)
    gradients = _item_gradient_outputs(states, items, offsets, normalisers, misses, marks, scale, biased)
    launch = configuration("linear_cross_entropy_items", _shape_class(dim, states.dtype), states.device)
    split = _split(item_count, launch["block_items"], rows, launch["block_rows"], launch["programs"])
    written: list[torch.Tensor | None] = [gradients[0], gradients[1] if biased else None]
    parts = written
    if not split.alone:  # even of one program: kernels are compiled for the type that they write
        shape = (split.programs, *items.shape)
        parts = [None if x is None else x.new_empty(shape[: x.ndim + 1], dtype=torch.float32) for x in written]
    saved, counts = (offsets, normalisers, misses, marks), (rows, item_count, split.share)
    with torch.cuda.device_of(states):
        cross_entropy_items_kernel[split.grid](
            states.contiguous(), items.contiguous(), *saved, scale, *parts, *counts, **_sizes(dim, launch)
        )
        if not split.alone:
            sizes = _elementwise_sizes(dim, states)
            grid = (triton.cdiv(item_count, sizes["BLOCK_ROWS"]),)
            cross_entropy_sum_kernel[grid](*parts, *written, item_count, split.programs, **sizes)
    return gradients


@_item_gradients.register_fake
def _item_gradient_outputs(
    states: torch.Tensor,
    items: torch.Tensor,
    offsets: torch.Tensor,
    normalisers: torch.Tensor,
    misses: torch.Tensor,
    marks: torch.Tensor,
    scale: torch.Tensor,
    biased: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return items.new_empty(items.shape), items.new_empty(items.shape[0] if biased else 0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    states, items, _, bias = inputs
    _, *saved = output
    ctx.biased = bias is not None
    ctx.save_for_backward(states, items, *saved)
    ctx.set_materialize_grads(False)  # no zeros for the outputs that only the backward pass uses


def _backward(
    ctx: Any, gradient: torch.Tensor | None, *of_saved: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    # Only a derivative of this function itself sends gradients to what it saved.
    if gradient is None or any(other is not None for other in of_saved):
        raise RuntimeError("linear_cross_entropy in Triton has first derivatives only")
    reverse_mode_only("linear_cross_entropy", gradient)
    states, items, *saved, state_gradients, inverse = ctx.saved_tensors
    scale = gradient * inverse
    of_states = of_items = of_bias = None
    if ctx.needs_input_grad[0]:
        of_states = (scale * state_gradients).to(states.dtype)
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[3]:
        of_items, of_bias = _item_gradients(states, items, *saved, scale, ctx.biased)
    return of_states, of_items, None, of_bias if ctx.biased else None


_forward.register_autograd(_backward, setup_context=_save)
first_derivatives_only("linear_cross_entropy", _item_gradients)


def linear_cross_entropy(
    states: torch.Tensor, items: torch.Tensor, targets: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """As `kernels.linear_cross_entropy.linear_cross_entropy`, in float32.

    Derivatives are first ones only, and a second one raises RuntimeError.
    """
    return _forward(states, items, targets, bias)[0]


class _Split(NamedTuple):
    """A grid of tiles and, for each, `programs`, each of which has `share` steps of what its tile goes through.

    alone: whether there are so many tiles that a tile has one program, however much it goes through.
    """

    grid: tuple[int, int]
    programs: int
    share: int
    alone: bool


def _split(count: int, block: int, through: int, step: int, at_once: int) -> _Split:
    """At most as many programs as run at once, unless there are more tiles; by sizes alone, so that sums repeat."""
    tiles, steps = triton.cdiv(count, block), max(1, triton.cdiv(through, step))
    most = max(1, at_once // max(1, tiles))
    share = triton.cdiv(steps, min(most, steps))
    programs = triton.cdiv(steps, share)
    return _Split((tiles, programs), programs, share, most == 1)


def _check_counts(rows: int, item_count: int) -> None:
    if max(rows, item_count) > 2**31 - 2**12:  # the last tile and the last share may end beyond
        raise ValueError(f"{rows} states and {item_count} items: the kernels count them in 32 bits")


def _shape_class(dim: int, dtype: torch.dtype) -> str:
    """The name of the launch parameters for vectors of this width and type."""
    width = next(limit for limit in (64, 128, 256) if dim <= limit)
    if dtype != torch.float32:
        return f"{width} half"
    return f"{width} {'single' if tf32_allowed() else 'ieee'}"  # IEEE products keep their factors in registers


def _sizes(dim: int, launch: Mapping[str, int]) -> dict[str, Any]:
    """What a kernel with products is compiled for: its constants, in capitals, and the compiler's options."""
    constants = {name.upper(): value for name, value in launch.items() if name.startswith("block_")}
    options = {name: value for name, value in launch.items() if name.startswith("num_") or name == "maxnreg"}
    precision = "tf32" if tf32_allowed() else "ieee"
    return {"D": dim, "BLOCK_D": _block_d(dim), "PRECISION": precision, **constants, **options}


def _elementwise_sizes(dim: int, tensor: torch.Tensor) -> dict[str, int]:
    launch = configuration("linear_cross_entropy_sums", "256", tensor.device)
    block_d = _block_d(dim)
    rows = min(launch["block_elements"] // block_d, _PADDED_TO)
    return {"D": dim, "BLOCK_D": block_d, "BLOCK_ROWS": rows, "num_warps": launch["num_warps"]}


def _padded(count: int) -> int:
    return (count + _PADDED_TO - 1) // _PADDED_TO * _PADDED_TO


def _block_d(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))
