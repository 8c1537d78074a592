"""What becomes of a score: silu, and an exponential for softmax."""
# A kernel's arguments have no Python types.
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def silu(x, APPROXIMATE_TANH):
    """x sigmoid(x); APPROXIMATE_TANH: as x/2 (1 + tanh(x/2)), one special-function call instead of an exponential and
    a division. Its error, 2^-11 of tanh, is below bfloat16's rounding, not below float16's."""
    if APPROXIMATE_TANH:
        half = 0.5 * x
        value = half + half * _tanh(half)
    else:
        value = x * tl.sigmoid(x)
    return value


@triton.jit
def silu_and_derivative(x, APPROXIMATE_TANH):
    """silu(x) and its derivative: sigma + silu(x) (1 - sigma)."""
    if APPROXIMATE_TANH:
        sigma = 0.5 + 0.5 * _tanh(0.5 * x)
    else:
        sigma = tl.sigmoid(x)
    value = x * sigma
    return value, sigma + value * (1.0 - sigma)


@triton.jit
def _tanh(x):
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def exp_of(x):
    return tl.exp2(x * _LOG2E)


@triton.jit
def weights_and_derivatives(x, seen, lse, MASKED, FLAGS):
    """A tile's weights and dact, their derivatives by the score; softmax's still lacks the factor (dP - delta)."""
    if FLAGS.SOFTMAX:
        weights = exp_of(x - lse)
        dact = weights
    else:
        weights, dact = silu_and_derivative(x, FLAGS.APPROXIMATE_TANH)
    if MASKED:
        weights = tl.where(seen, weights, 0.0)
        dact = tl.where(seen, dact, 0.0)
    return weights, dact
