#!/usr/bin/env bash
# torch 2.13.0: a program exported with an input whose `.grad` is set refuses inputs whose `.grad` is not.
#
# `torch.export.export` writes a guard on the attribute `.grad` of the example input into the program, though the module
# never reads it. A leaf that has been through a backward pass is such an input: that is what one has at hand after a
# training step. The program then fails on the inputs that it will meet in use.
#
# Seen: exported before a backward pass: (3, 2); after one: AttributeError 'NoneType' object has no attribute 'size'
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment torch==2.13.0 numpy==2.4.6
python - <<'PYTHON'
import torch


class Double(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def exported_with(x: torch.Tensor) -> str:
    """What the exported program says of another input."""
    program = torch.export.export(Double(), (x,), dynamic_shapes=({0: torch.export.Dim("rows")},))
    try:
        return str(tuple(program.module()(torch.randn(3, 2)).shape))
    except Exception as error:
        return f"{type(error).__name__} {error}"


before = exported_with(torch.randn(4, 2, requires_grad=True))
leaf = torch.randn(4, 2, requires_grad=True)
leaf.sum().backward()
after = exported_with(leaf)
print(f"exported before a backward pass: {before}; after one: {after}")
assert before == "(3, 2)"
assert after.startswith("AttributeError"), "changed: the program takes the input"
PYTHON
