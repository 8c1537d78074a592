#!/usr/bin/env bash
# torch-rechub 0.9.0: CrossNetV2 adds the bias of a cross layer outside the product.
#
# DCN-v2 (arXiv 2008.13535, equation 1): x_{l+1} = x_0 * (W_l x_l + b_l) + x_l. torch-rechub's layer calculates
# x_0 * (W_l x_l) + b_l + x_l, as its docstring does not say. The two agree where the bias is 0, as it is at first, so
# that no test of an untrained layer tells them apart.
#
# Seen, x_0 = [2, 3], W = identity, b = [10, 100]: [16.0, 112.0], where the paper's is [26.0, 312.0]
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment torch==2.13.0 torch-rechub==0.9.0
python - <<'PYTHON'
import torch
from torch_rechub.basic.layers import CrossNetV2

layer = CrossNetV2(input_dim=2, num_layers=1)
x, bias = torch.tensor([[2.0, 3.0]]), torch.tensor([10.0, 100.0])
with torch.no_grad():
    layer.w[0].weight.copy_(torch.eye(2))
    layer.b[0].copy_(bias)
    seen = layer(x)
print(f"torch-rechub {seen.flatten().tolist()}, the paper's {(x * (x + bias) + x).flatten().tolist()}")
assert torch.equal(seen, x * x + bias + x), "changed: the bias is no longer outside the product"
PYTHON
