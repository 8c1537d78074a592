"""Rotary position embeddings in torch."""

import torch


def rotary(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    half = qkv.shape[-1] // 2
    cos, sin = cos[:, None, None], sin[:, None, None]
    first, second, rest = qkv[:, :2].tensor_split([half, 2 * half], dim=-1)
    rotated = torch.cat([first * cos - second * sin, first * sin + second * cos, rest], dim=-1).to(qkv.dtype)
    q, k = rotated.unbind(1)
    return q, k, qkv[:, 2]
