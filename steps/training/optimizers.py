"""The optimisers that a CUDA graph can hold."""

from collections.abc import Iterable
from typing import Any

import torch

from steps.tasks import Task

_ADAGRAD_EPS = 1e-6  # of GRU4Rec's author, within the root


def make_optimizer(task: Task) -> torch.optim.Optimizer:
    """The task's optimiser over all parameters: `adamw`, or `adagrad`, which divides by sqrt(sum of squares + 1e-6)."""
    config, on_cuda = task.optimizer_config, task.items.weight.is_cuda
    if task.optimizer == "adagrad":
        return Adagrad(task.parameters(), lr=config.lr, initial_accumulator_value=_ADAGRAD_EPS, eps=0.0)
    return torch.optim.AdamW(
        task.parameters(),
        lr=config.lr,
        betas=(config.betas[0], config.betas[1]),
        weight_decay=config.weight_decay,
        capturable=on_cuda,
        fused=on_cuda or None,
    )


def init_state(optimizer: torch.optim.Optimizer) -> None:
    """Give AdamW the state that its first step would make: within a graph, every replay would make it again."""
    if not isinstance(optimizer, torch.optim.AdamW):
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


class Adagrad(torch.optim.Optimizer):
    """Adagrad (Duchi et al. 2011), as torch.optim.Adagrad without decays, and without its counts of steps.

    w = w - lr g / (sqrt(sum of squares of g) + eps), where the sum begins at `initial_accumulator_value`.
    """

    def __init__(
        self, parameters: Iterable[torch.Tensor], lr: float, initial_accumulator_value: float, eps: float
    ) -> None:
        super().__init__(parameters, {"lr": lr, "eps": eps})
        self._update = _update
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = {"sum": torch.full_like(parameter, initial_accumulator_value)}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no closure is called
        for group in self.param_groups:
            tensors = [
                [parameter.detach(), parameter.grad, self.state[parameter]["sum"]]
                for parameter in group["params"]
                if parameter.grad is not None
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
