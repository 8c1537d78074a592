"""Adagrad (Duchi et al. 2011) that a CUDA graph can hold."""

from collections.abc import Iterable
from typing import Any

import torch


class Adagrad(torch.optim.Optimizer):
    """torch.optim.Adagrad without decays, with the same state, all of it on the parameters' device.

    w = w - lr g / (sqrt(sum of squares of g) + eps), the sum beginning at `initial_accumulator_value`.
    """

    def __init__(
        self, parameters: Iterable[torch.Tensor], lr: float, initial_accumulator_value: float, eps: float
    ) -> None:
        super().__init__(parameters, {"lr": lr, "eps": eps})
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
            gradients = [parameter.grad for parameter in parameters]
            sums = [self.state[parameter]["sum"] for parameter in parameters]
            torch._foreach_add_([self.state[parameter]["step"] for parameter in parameters], 1)
            torch._foreach_addcmul_(sums, gradients, gradients)
            roots = torch._foreach_sqrt(sums)
            torch._foreach_add_(roots, group["eps"])
            torch._foreach_addcdiv_(parameters, gradients, roots, value=-group["lr"])
