#!/usr/bin/env bash
# torch 2.13.0: forward-mode derivatives of an operator by torch.library.custom_op are 0, without a word.
#
# The operator has a derivative by `register_autograd`, so reverse mode is right. `torch.func.jvp` takes the operator's
# output for a constant: it neither uses the formula nor raises, as torch.autograd.Function without a jvp does.
#
# Seen: torch.autograd.grad 6.0, torch.func.jvp 0.0, should be 6.0, warnings: 0
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment torch==2.13.0 numpy==2.4.6
python - <<'PYTHON'
import warnings

import torch


@torch.library.custom_op("finding::square", mutates_args=())
def square(x: torch.Tensor) -> torch.Tensor:
    return x * x


square.register_fake(torch.empty_like)
square.register_autograd(
    lambda ctx, gradient: 2 * ctx.saved_tensors[0] * gradient,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
x = torch.tensor(3.0)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    _, tangent = torch.func.jvp(square, (x,), (torch.tensor(1.0),))
words = [warning for warning in seen if issubclass(warning.category, UserWarning)]  # others are of torch's own imports
leaf = x.clone().requires_grad_()
(gradient,) = torch.autograd.grad(square(leaf), leaf)
print(f"torch.autograd.grad {gradient}, torch.func.jvp {tangent}, should be 6.0, warnings: {len(words)}")
assert gradient == 6
assert tangent == 0, "changed: the tangent is no longer 0"
assert not words, "changed: there is a warning"
PYTHON
