"""The rule every low-precision kernel is held to."""

from collections.abc import Sequence

import torch


def assert_no_worse(
    outputs: Sequence[torch.Tensor],
    naive: Sequence[torch.Tensor],
    exact: Sequence[torch.Tensor],
    names: Sequence[str],
    tables: float = 2.0,
    terms: float = 0.0,
) -> None:
    """Error against float64 at most twice the naive version's in the same low precision, at the worst and on average.

    On top, for cases so small that the naive version comes out exact by luck: one rounding of the output, and
    four of the float32 steps before it; ten times those for a bias table's gradient, whose entries are sums of
    many terms that cancel. `tables` is the factor for these: softmax takes its rows' sums of weight times gradient
    from the rounded output, as FlashAttention does, which moves all of a row's score gradients together. Under softmax
    the terms of dq and dk cancel too, to nothing where a query sees one key: `terms` is how large they are.
    """
    for name, output, low, high in zip(names, outputs, naive, exact, strict=True):
        assert output.shape == high.shape, f"{name}: {output.shape} for {high.shape}"
        assert output.isfinite().all(), f"{name} has values that are not finite"
        if not high.numel():
            continue
        steps = 40 if "bias" in name else 4
        rounding = torch.finfo(output.dtype).eps / 2 + steps * torch.finfo(torch.float32).eps / 2
        for kind, size in (("largest", _largest), ("mean", _mean)):
            error, allowed = (
                size(output.double() - high),
                (tables if "bias" in name else 2) * size(low.double() - high) + rounding * size(high),
            )
            allowed += 4 * torch.finfo(torch.float32).eps / 2 * terms if name in ("dq", "dk") else 0.0
            assert error <= allowed, f"{name}: {kind} error {error:.3g}, allowed {allowed:.3g}"


def _largest(tensor: torch.Tensor) -> float:
    return tensor.abs().max().item()


def _mean(tensor: torch.Tensor) -> float:
    return tensor.square().mean().sqrt().item()
