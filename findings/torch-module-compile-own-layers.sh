#!/usr/bin/env bash
# torch 2.13.0: compiled in place, by `module.compile()`, a layer of torch.nn itself runs uncompiled, without a word.
#
# torch.compile(module) makes a graph of it. module.compile(), which keeps the module's type and the names of its
# weights, compiles the call, whose code torch never looks into, no more than into the layer's own forward. So a model
# that compiles its blocks one by one and takes nn.TransformerEncoderLayer for a block trains as slowly as before. A
# layer within a module of one's own is compiled. Known upstream: https://github.com/pytorch/pytorch/issues/150915
#
# Seen: TransformerEncoderLayer: graphs by torch.compile 1, in place 0, in place within a module of one's own 1
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment torch==2.13.0 numpy==2.4.6
CUDA_VISIBLE_DEVICES="" python - <<'PYTHON'
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter


class Block(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def graphs(how):
    torch._dynamo.reset()
    counter, layer = CompileCounter(), nn.TransformerEncoderLayer(4, 1, batch_first=True)
    if how == "torch.compile":
        compiled = torch.compile(layer, backend=counter)
    else:
        compiled = layer if how == "in place" else Block(layer)
        compiled.compile(backend=counter)
    compiled(torch.ones(2, 3, 4))
    return counter.frame_count


whole, in_place, within = graphs("torch.compile"), graphs("in place"), graphs("within")
print(
    f"TransformerEncoderLayer: graphs by torch.compile {whole}, in place {in_place}, "
    f"in place within a module of one's own {within}"
)
assert whole >= 1 and within >= 1
assert in_place == 0, "changed: a layer of torch.nn is compiled in place"
PYTHON
