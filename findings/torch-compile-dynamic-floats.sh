#!/usr/bin/env bash
# torch 2.13.0: torch.compile(dynamic=True) takes a module's float attributes, as dropout's p, for numbers that may
# change: the graph reads them from the host, and whatever is reckoned with them there becomes a kernel in C++.
#
# dynamic=True is said to be of sizes. A module whose attributes nobody changes has its dropout's p as an input of the
# graph all the same, a float64 tensor of no dimension on the CPU, and `width ** -0.5` of a size that torch takes for
# dynamic is an operation of the graph. On a machine with a GPU the backend then compiles C++ for the host beside the
# Triton kernels, and first finds out what its processor can do. On one with an H200 and torch 2.11.0, a graph with such
# a power took 44 s to compile; all six graphs of that model took 79 s, and 21 s with
# torch._dynamo.config.specialize_float = True, by which floats are constants.
#
# Seen: inputs by default: ['L_x_', 'L_self_modules_dropout_p float64'] with specialize_float: ['L_x_'] scalar made:
# True False (the last where the width is an int attribute)
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment torch==2.13.0 numpy==2.4.6
CUDA_VISIBLE_DEVICES="" python - <<'PYTHON'
import torch
from torch import nn

seen = {}


class Block(nn.Module):
    def __init__(self, name, by_attribute):
        super().__init__()
        self.name, self.by_attribute, self.width = name, by_attribute, 6
        self.linear, self.dropout = nn.Linear(6, 6), nn.Dropout(0.2)

    def forward(self, x):
        width = self.width if self.by_attribute else x.shape[-1]
        x = self.dropout(self.linear(x))
        return attend(x, width**-0.5)


@torch.compiler.disable
def attend(x, scale):
    return x * scale


def compiled(name, by_attribute):
    graphs = []

    def look(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    block = Block(name, by_attribute)
    torch.compile(block, dynamic=True, backend=look)(torch.rand(10, 6))
    nodes = [node for graph in graphs for node in graph.graph.nodes]
    values = {node: node.meta["example_value"] for node in nodes if node.op == "placeholder"}
    inputs = [
        node.target + (" float64" if value.dtype == torch.float64 else "")
        for node, value in values.items()
        if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter)
    ]
    return inputs, any(node.target is torch.scalar_tensor for node in nodes)


floats, scalar = compiled("default", False)
_, none = compiled("attribute", True)
with torch._dynamo.config.patch(specialize_float=True):
    constants, _ = compiled("constant", False)
print("inputs by default:", floats, "with specialize_float:", constants, "scalar made:", scalar, none)
assert any("float64" in one for one in floats), "changed: dropout's p is a constant"
assert not any("float64" in one for one in constants)
assert scalar and not none, "changed: a power of a size"
PYTHON
