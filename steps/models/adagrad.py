"""Adagrad (Duchi et al. 2011) whose step a CUDA graph can hold."""

from collections.abc import Iterable
from typing import Any

import torch


class Adagrad(torch.optim.Optimizer):
    """torch.optim.Adagrad without decays, with the same state, all of it on the parameters' device.

    w = w - lr g / (sqrt(sum of squares of g) + eps), where the sum begins at `initial_accumulator_value`.
    """

    def __init__(
        self, parameters: Iterable[torch.Tensor], lr: float, initial_accumulator_value: float, eps: float
    ) -> None:
        super().__init__(parameters, {"lr": lr, "eps": eps})
        self._update = _update
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device),
                    "sum": torch.full_like(parameter, initial_accumulator_value),
                }

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no closure is called
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            states = [self.state[parameter] for parameter in parameters]
            torch._foreach_add_([state["step"] for state in states], 1)
            tensors = [
                [parameter.detach(), parameter.grad, state["sum"]]
                for parameter, state in zip(parameters, states, strict=True)
            ]
            self._update(tensors, group["lr"], group["eps"])

    def uncompile(self) -> None:
        """Undo `compile`."""
        self._update = _update

    @torch.no_grad()
    def compile(self) -> None:
        """Compile an update with torch.compile, at once, as nothing can be compiled while a graph is captured."""
        self._update = torch.compile(_update)
        for group in self.param_groups:
            tensors = [[torch.zeros_like(parameter.detach()) for _ in range(3)] for parameter in group["params"]]
            self._update(tensors, group["lr"], group["eps"])


def _update(tensors: list[list[torch.Tensor]], lr: float, eps: float) -> None:
    parameters, gradients, sums = zip(*tensors, strict=True)
    torch._foreach_addcmul_(sums, gradients, gradients)
    roots = torch._foreach_sqrt(sums)
    torch._foreach_add_(roots, eps)
    torch._foreach_addcdiv_(parameters, gradients, roots, value=-lr)
