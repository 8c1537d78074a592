"""Sampled softmax: its definition in loops, its two implementations, its limit."""

import math

import pytest
import torch
import torch.nn.functional as F

from kernels.sampled_softmax import dense, naive, sampled_softmax

TEMPERATURE = 0.05


def inputs(tokens: int = 9, items: int = 12, negatives: int = 5, dim: int = 4):
    torch.manual_seed(tokens)
    states = torch.randn(tokens, dim, dtype=torch.float64)
    table = torch.randn(items, dim, dtype=torch.float64)
    positives = torch.randint(0, items, (tokens,))
    drawn = torch.randint(0, items, (tokens, negatives))
    drawn[0] = positives[0]  # every negative collides
    drawn[1, 0] = drawn[1, 1]  # one drawn twice counts twice
    return states, table, positives, drawn


@pytest.mark.parametrize("implementation", [dense, naive])
def test_values_equal_the_definition(implementation) -> None:
    states, table, positives, negatives = inputs()
    losses = implementation.sampled_softmax(states, table, positives, negatives, TEMPERATURE)
    for token in range(len(states)):

        def score(item: int, token: int = token) -> float:
            a, b = states[token], table[item]
            return float(a @ b) / max(float(a.norm()), 1e-6) / max(float(b.norm()), 1e-6) / TEMPERATURE

        positive = score(int(positives[token]))
        others = [score(int(item)) for item in negatives[token] if item != positives[token]]
        expected = math.log(math.exp(positive) + sum(map(math.exp, others))) - positive
        assert float(losses[token]) == pytest.approx(expected, abs=1e-9)
    assert losses[0] == 0  # nothing but collisions is left out entirely


def test_both_implementations_have_the_same_gradients() -> None:
    states, table, positives, negatives = inputs(tokens=20)
    states.requires_grad_()
    table.requires_grad_()
    weight = torch.randn(20, dtype=torch.float64)
    gradients = []
    for implementation in (dense, naive):
        losses = implementation.sampled_softmax(states, table, positives, negatives, TEMPERATURE)
        gradients.append(torch.autograd.grad((losses * weight).sum(), [states, table]))
    for ours, twin in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, twin, rtol=0, atol=1e-10)


def test_with_every_item_as_a_negative_it_is_the_full_softmax() -> None:
    states, table, positives, _ = inputs()
    everything = torch.arange(len(table)).expand(len(states), -1)
    logits = F.normalize(states, dim=-1) @ F.normalize(table, dim=-1).T / TEMPERATURE
    expected = F.cross_entropy(logits, positives, reduction="none")
    torch.testing.assert_close(sampled_softmax(states, table, positives, everything, TEMPERATURE), expected)


def test_the_dispatch_follows_the_catalogue_size(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    monkeypatch.setattr(dense, "sampled_softmax", lambda *_: used.append("dense"))
    monkeypatch.setattr(naive, "sampled_softmax", lambda *_: used.append("naive"))
    for items in (320, 321):
        sampled_softmax(torch.zeros(1, 2), torch.zeros(items, 2), torch.zeros(1), torch.zeros(1, 5), TEMPERATURE)
    assert used == ["dense", "naive"]
