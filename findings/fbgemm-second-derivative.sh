#!/usr/bin/env bash
# fbgemm-gpu-cpu 1.8.0 with torch 2.13.0: the second derivative of jagged_to_padded_dense is exactly 0.
#
# Padding rows of different lengths is linear, so the sum of cubes of the padded values has the second derivatives 6 x.
# The first derivatives are right. The second are zeros where `create_graph=True` should make them right or raise:
# torch warns that jagged_to_padded_dense_backward has no autograd kernel. dense_to_jagged's are right.
#
# Seen: first derivative [3.0, 12.0, 27.0], second derivative [0.0, 0.0, 0.0], should be [6.0, 12.0, 18.0]
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment torch==2.13.0 fbgemm-gpu-cpu==1.8.0 numpy==2.4.6
python - <<'PYTHON'
import torch
import fbgemm_gpu  # registers torch.ops.fbgemm

values = torch.tensor([[1.0], [2.0], [3.0]], requires_grad=True)
offsets = torch.tensor([0, 2, 3])
padded = torch.ops.fbgemm.jagged_to_padded_dense(values, [offsets], [2], 0.0)
(first,) = torch.autograd.grad((padded**3).sum(), values, create_graph=True)
(second,) = torch.autograd.grad(first.sum(), values)
print(f"first derivative {first.flatten().tolist()}, second derivative {second.flatten().tolist()}, "
      f"should be {(6 * values).flatten().tolist()}")
assert torch.equal(first, 3 * values**2)
assert torch.equal(second, torch.zeros(3, 1)), "changed: the second derivative is no longer 0"
PYTHON
