"""Losses against their definitions, and the limits that tie them together."""

import math

import pytest
import torch
import torch.nn.functional as F

from steps.common.cli import StepError
from steps.tasks import losses

V, DIM, TOKENS = 9, 4, 6


@pytest.fixture
def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    states = torch.randn(TOKENS, DIM, dtype=torch.float64)
    table = torch.randn(V + 1, DIM, dtype=torch.float64)
    return states, table, torch.tensor([1, 9, 3, 3, 5, 1])


def config(name: str, **more: object) -> losses.LossConfig:
    return losses.LossConfig(**{"name": name, "similarity": "dot", "temperature": 1.0, "negatives": 5} | more)


def test_full_softmax_is_cross_entropy_over_the_items_without_padding(inputs) -> None:
    states, table, targets = inputs
    for similarity, temperature in [("dot", 1.0), ("cosine", 0.05)]:
        a, b = (states, table) if similarity == "dot" else (F.normalize(states, dim=-1), F.normalize(table, dim=-1))
        expected = F.cross_entropy((a @ b.T)[:, 1:] / temperature, targets - 1)
        settings = config("softmax", similarity=similarity, temperature=temperature)
        torch.testing.assert_close(losses.next_item_loss(settings, states, table, targets), expected)


@pytest.mark.parametrize(("similarity", "temperature"), [("cosine", 0.1), ("dot", 1.0), ("dot", 2.0)])
def test_sampled_softmax_with_every_item_as_a_negative_is_the_full_one(
    similarity: str, temperature: float, inputs, monkeypatch
) -> None:
    states, table, targets = inputs
    everything = torch.arange(1, V + 1).expand(TOKENS, -1)
    monkeypatch.setattr(losses, "_sample_negatives", lambda *_: everything)
    sampled = config("sampled-softmax", similarity=similarity, temperature=temperature)
    full = config("softmax", similarity=similarity, temperature=temperature)
    expected = losses.next_item_loss(full, states, table, targets)
    torch.testing.assert_close(losses.next_item_loss(sampled, states, table, targets), expected)


def test_in_batch_softmax_with_the_correction_tends_to_the_full_one() -> None:
    """With many draws, sum over draws of exp(s - log q) / R tends to the sum over the batch's items of exp(s)."""
    torch.manual_seed(1)
    states, table = torch.randn(400, DIM, dtype=torch.float64), torch.randn(V + 1, DIM, dtype=torch.float64)
    targets = torch.multinomial(torch.arange(1.0, V + 1), 400, replacement=True) + 1  # far from uniform
    temperature, draws = 1.0, 4000
    found = losses.in_batch_softmax(states, table, targets, draws, temperature)
    logits = (F.normalize(states, dim=-1) @ F.normalize(table, dim=-1).T)[:, 1:] / temperature
    rate = torch.bincount(targets, minlength=V + 1)[1:] / 400
    own = logits.gather(1, targets[:, None] - 1)[:, 0]
    others = logits.exp().sum(1) - own.exp()
    expected = ((own - rate[targets - 1].log()).exp() + draws * others).log() - (own - rate[targets - 1].log())
    torch.testing.assert_close(found, expected.mean(), rtol=2e-3, atol=0)


def test_bce_and_gbce_equal_their_definitions(inputs, monkeypatch) -> None:
    states, table, targets = inputs
    negatives = torch.tensor([[2, 4, 1], [1, 2, 3], [3, 3, 3], [4, 5, 6], [9, 8, 7], [2, 2, 2]])
    monkeypatch.setattr(losses, "_sample_negatives", lambda *_: negatives)
    power = 3 / 8 * (0.75 * (1 - 8 / 3) + 8 / 3)
    for name, beta in [("bce", 1.0), ("gbce", power)]:
        total = 0.0
        for token in range(TOKENS):

            def probability(item: int, token: int = token) -> float:
                return 1 / (1 + math.exp(-float(states[token] @ table[item])))

            terms = -beta * math.log(probability(int(targets[token])))
            terms -= sum(math.log(1 - probability(int(n))) for n in negatives[token] if n != targets[token])
            total += terms / 4
        found = losses.next_item_loss(config(name, negatives=3, calibration=0.75), states, table, targets)
        assert float(found) == pytest.approx(total / TOKENS, abs=1e-9)


def test_gbce_without_calibration_is_bce_and_full_calibration_is_the_sampling_rate() -> None:
    assert losses.gbce_power(256, 3884, 0.0) == pytest.approx(1.0)
    assert losses.gbce_power(256, 3884, 1.0) == pytest.approx(256 / 3883)


def test_gbce_of_a_catalogue_without_negatives_says_so() -> None:
    states, table, targets = torch.randn(3, DIM), torch.randn(2, DIM), torch.ones(3, dtype=torch.int64)
    with pytest.raises(StepError, match="gbce needs a catalogue of 2 items or more, and this one has 1; take"):
        losses.next_item_loss(config("gbce", calibration=0.75), states, table, targets)


def test_sampled_softmax_of_dot_products_by_hand(inputs, monkeypatch) -> None:
    """A negative that is the target does not count; padding does not either."""
    states, table, targets = inputs
    negatives = torch.tensor([[2, 4], [1, 9], [3, 3], [4, 5], [9, 8], [2, 2]])
    monkeypatch.setattr(losses, "_sample_negatives", lambda *_: negatives)
    token_mask = torch.tensor([True] * 5 + [False])
    total = 0.0
    for token in range(5):
        scores = [float(states[token] @ table[item]) for item in negatives[token] if item != targets[token]]
        own = math.exp(float(states[token] @ table[targets[token]]))
        total -= math.log(own / (own + sum(map(math.exp, scores))))
    found = losses.next_item_loss(config("sampled-softmax"), states, table, targets, token_mask)
    assert float(found) == pytest.approx(total / 5, abs=1e-9)


@pytest.mark.parametrize("name", ["sampled-softmax", "in-batch-softmax", "softmax", "bce", "gbce"])
def test_every_loss_has_finite_gradients_and_falls_when_followed(name: str) -> None:
    torch.manual_seed(2)
    states, table = torch.randn(50, DIM, requires_grad=True), torch.randn(V + 1, DIM, requires_grad=True)
    targets = torch.randint(1, V + 1, (50,))
    similarity = "cosine" if name in ("sampled-softmax", "in-batch-softmax") else "dot"
    settings = config(name, similarity=similarity, calibration=0.5)
    optimizer = torch.optim.Adam([states, table], lr=0.05)
    values = []
    for _ in range(60):
        loss = losses.next_item_loss(settings, states, table, targets)
        optimizer.zero_grad()
        loss.backward()
        assert torch.isfinite(states.grad).all()
        assert torch.isfinite(table.grad).all()
        optimizer.step()
        values.append(float(loss))
    assert sum(values[-5:]) < 0.8 * sum(values[:5])
    assert not table.grad[0].any()  # padding is no item


def test_an_unknown_loss_is_an_error(inputs) -> None:
    with pytest.raises(ValueError, match="no loss 'hinge'"):
        losses.next_item_loss(config("hinge"), *inputs)
