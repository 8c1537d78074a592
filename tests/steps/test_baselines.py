"""The baselines are the models they claim to be."""

import cmath
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from steps.data.sequences import Batch, Sequences, StaticShape
from steps.models.attention import Layout
from steps.models.item_knn import ItemKNN, ItemKNNConfig
from steps.models.markov import Markov
from steps.models.transformer_pp import TransformerPPBlock, cos_and_sin, rotate
from steps.tasks import Task, build
from steps.tasks.masked_items import MaskedItems, Masking, append_next_item, masked_places
from steps.tasks.sessions import Sessions
from steps.training.optimizers import make_optimizer
from tests.steps import twins
from tests.steps.test_models import ITEMS, MAX_LEN, batch, config, make, sequences


def lists_to_sequences(lists: list[list[int]], num_items: int) -> Sequences:
    offsets = torch.tensor([0, *torch.tensor([len(items) for items in lists]).cumsum(0).tolist()])
    item = torch.tensor([item for items in lists for item in items])
    return Sequences(offsets, item, torch.arange(len(item)), num_items)


LISTS = [[1, 2, 3, 2, 3, 5], [2, 3, 1, 4], [4, 1, 2, 5, 5], [3, 2, 1]]


# Count-based models


def test_markov_counts_transitions_and_falls_back_on_popularity() -> None:
    data, model = lists_to_sequences(LISTS, 6), Markov(6)
    model.fit(data, torch.ones(4, dtype=torch.int64))
    trained = [items[:-1] for items in LISTS]
    flat = [item for items in trained for item in items]
    users = torch.arange(4)
    scores = model.score(data.batch(users, torch.zeros(4, dtype=torch.int64), 10))
    for user, items in enumerate(LISTS):
        for item in range(1, 7):
            pairs = sum(pair == (items[-2], item) for one in trained for pair in itertools.pairwise(one))
            assert scores[user, item] == pytest.approx(pairs + flat.count(item) / (len(flat) + 1))
    # An item that nothing followed leaves popularity alone, always below one transition.
    assert float(scores[2, 1:].max()) < 1


@pytest.mark.parametrize("neighbours", [2, 6])
def test_item_knn_equals_a_dense_computation(neighbours: int) -> None:
    data, model = lists_to_sequences(LISTS, 6), ItemKNN(ItemKNNConfig(neighbours, 0.5), 6)
    model.fit(data, torch.ones(4, dtype=torch.int64))
    users = [set(items[:-1]) for items in LISTS]
    have = {item: {user for user, items in enumerate(users) if item in items} for item in range(7)}

    def similarity(one: int, other: int) -> float:
        if one == other or not have[one] or not have[other]:
            return 0.0
        return len(have[one] & have[other]) / (math.sqrt(len(have[one]) * len(have[other])) + 0.5)

    scores = model.score(data.batch(torch.arange(4), torch.zeros(4, dtype=torch.int64), 3))
    for user, items in enumerate(LISTS):
        expected = [0.0] * 7
        for item in items[:-1][-3:]:
            near = sorted(range(7), key=lambda other, item=item: -similarity(item, other))
            for other in near[:neighbours]:
                expected[other] += similarity(item, other)
        if neighbours == 6:
            torch.testing.assert_close(scores[user], torch.tensor(expected), rtol=0, atol=1e-6)
        assert float(scores[user].sum()) == pytest.approx(sum(expected), abs=1e-5)


# Transformer++


def transformer(**changes: object) -> Task:
    return make("transformer++", **{"dim": 8, "heads": 2} | changes)


def test_transformer_pp_equals_a_reference() -> None:
    model, data = transformer(), batch([5, 20, 2])
    found = model.encode(data)

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt() * weight

    for start, end in zip(data.offsets[:-1].tolist(), data.offsets[1:].tolist(), strict=True):
        n = end - start
        x = model.items.weight[data.item[start:end]] * math.sqrt(8)
        for block in model.encoder.blocks:
            q, k, v = (norm(x, block.attention_norm.weight) @ block.qkv.weight.T).chunk(3, dim=-1)
            heads = []
            for head in range(2):
                cut = slice(4 * head, 4 * head + 4)
                scores = torch.full((n, n), -torch.inf, dtype=x.dtype)
                for i in range(n):
                    for j in range(i + 1):
                        total = 0.0
                        for pair in range(2):  # the pair turns by (i - j) base^(-2a/d): only distance enters
                            turn = (i - j) * 10_000 ** (-pair / 2)
                            a, b = q[i, cut][pair], q[i, cut][pair + 2]
                            c, d = k[j, cut][pair], k[j, cut][pair + 2]
                            total += (a * c + b * d) * math.cos(turn) + (a * d - b * c) * math.sin(turn)
                        scores[i, j] = total / 2
                heads.append(scores.softmax(-1) @ v[:, cut])
            x = x + torch.cat(heads, dim=-1) @ block.output.weight.T
            normed = norm(x, block.feed_forward_norm.weight)
            x = x + (F.silu(normed @ block.gate.weight.T) * (normed @ block.inner.weight.T)) @ block.outer.weight.T
        torch.testing.assert_close(found[start:end], norm(x, model.encoder.norm.weight), rtol=0, atol=1e-9)


@pytest.mark.parametrize("dim", [1, 5, 8, 24])  # of widths 3, 13, 21, and 64, which needs no zeros
def test_zeros_change_nothing_in_the_feed_forward_network(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    block, widths = TransformerPPBlock(dim, 1, 0.0).double(), []
    x = torch.randn(7, dim, dtype=torch.float64, requires_grad=True)
    of = (x, block.gate.weight, block.inner.weight, block.outer.weight)
    expected = (F.silu(x @ of[1].T) * (x @ of[2].T)) @ of[3].T
    weight = torch.randn_like(expected)

    def silu(gate: torch.Tensor) -> torch.Tensor:
        widths.append(gate.shape[1])
        return gate * gate.sigmoid()

    monkeypatch.setattr(F, "silu", silu)
    found = block._feed_forward(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    grads = zip(torch.autograd.grad(found, of, weight), torch.autograd.grad(expected, of, weight), strict=True)
    for one, other in grads:
        torch.testing.assert_close(one, other, rtol=0, atol=1e-13)
    assert widths == [-(-block.gate.out_features // 8) * 8]


@pytest.mark.parametrize("width", [1, 2, 5, 8])
def test_rotation_turns_each_pair_by_its_angle(width: int) -> None:
    """As numbers of a real and an imaginary part, by a loop."""
    torch.manual_seed(0)
    x, position = torch.randn(4, 2, 3, width, dtype=torch.float64), torch.tensor([0, 5, 300, 1])
    turned, half = rotate(x, *cos_and_sin(position, width, torch.float64)), width // 2
    expected = x.clone()
    for token, place in enumerate(position.tolist()):
        for pair in range(half):
            turn = cmath.exp(1j * place * 10_000.0 ** (-pair / half))
            for part, head in itertools.product(range(2), range(3)):
                first, second = x[token, part, head, [pair, pair + half]].tolist()
                number = complex(first, second) * turn
                expected[token, part, head, pair] = number.real
                expected[token, part, head, pair + half] = number.imag
    torch.testing.assert_close(turned, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    if width % 2:
        assert torch.equal(turned[..., -1], x[..., -1])


# BERT4Rec


def bert(**changes: object) -> MaskedItems:
    model = make("bert4rec", **changes)
    assert isinstance(model, MaskedItems)
    return model


def test_bert4rec_equals_a_reference_from_torch_modules() -> None:
    model, data = bert(), batch([5, 20, 2])
    found = model.encode(data)
    for start, end in zip(data.offsets[:-1].tolist(), data.offsets[1:].tolist(), strict=True):
        x = model.items.weight[data.item[start:end]] + model.encoder.position.weight[: end - start]
        x = F.layer_norm(x, (6,), model.encoder.input_norm.weight, model.encoder.input_norm.bias)
        for block in model.encoder.blocks:
            layer = torch.nn.TransformerEncoderLayer(6, 2, 24, 0.0, "gelu", batch_first=True, dtype=torch.float64)
            layer.self_attn.in_proj_weight.data, layer.self_attn.in_proj_bias.data = block.qkv.weight, block.qkv.bias
            for ours, theirs in [
                (block.output, layer.self_attn.out_proj),
                (block.attention_norm, layer.norm1),
                (block.inner, layer.linear1),
                (block.outer, layer.linear2),
                (block.feed_forward_norm, layer.norm2),
            ]:
                theirs.weight.data, theirs.bias.data = ours.weight.data, ours.bias.data
            x = layer.train()(x[None])[0]  # in training mode torch takes its plain path; dropout is 0
        torch.testing.assert_close(found[start:end], x, rtol=0, atol=1e-9)


def test_bert4rec_attends_both_ways_but_never_to_the_target() -> None:
    model, data = bert(), batch([12])
    changed = Batch(**vars(data) | {"item": data.item.clone()})
    changed.item[-1] = changed.item[-1] % ITEMS + 1
    assert not torch.isclose(model.encode(data)[0], model.encode(changed)[0]).all()
    other = Batch(**vars(data) | {"next_item": data.next_item.clone()})
    other.next_item[-1] = other.next_item[-1] % ITEMS + 1
    assert torch.equal(model.score(data), model.score(other))
    assert not torch.isclose(model.score(data), model.score(changed)).all()


def sampled(model: MaskedItems, lengths: list[int]) -> torch.Tensor:
    """A mask of sequences of these lengths."""
    ends = torch.tensor(lengths).cumsum(0)
    layout = Layout.of(torch.nn.functional.pad(ends, (1, 0)), sum(lengths), max(lengths))
    last = torch.zeros(sum(lengths), dtype=torch.bool).index_fill(0, ends - 1, True)
    return model.masking.sample(last, layout, torch.rand(len(lengths)), torch.rand(sum(lengths)))


@pytest.mark.parametrize("num_tokens", [21, 24, 28, 30])  # of them 21 are the windows'; no padding is longer than 8
def test_bert4rec_masks_padded_windows_as_a_loop_over_them_does(num_tokens: int) -> None:
    model, data, users = bert(), sequences([9, 3, 40, 2, 4]), torch.tensor([2, 4, 0, 3, 1])
    shape = StaticShape(5, num_tokens, 7, 8)
    batch = data.padded_batch(users, torch.tensor([5, 0, 1, 0, 0]), shape)
    number = model.masking.max_masked(num_tokens + 7, 7)
    for seed in range(30):
        torch.manual_seed(seed)
        of_sequence, of_item = draws = torch.rand(7), torch.rand(num_tokens + 7)
        item, masked, layout, targets = model.masking(batch, draws, number)
        expected, mask = [], []
        for sequence, (start, end) in enumerate(itertools.pairwise(batch.offsets.tolist())):
            window = batch.item[start:end].tolist() + ([int(batch.next_item[end - 1])] if sequence < 5 else [0])
            drawn = (of_item[len(mask) : len(mask) + len(window)] < 0.2).tolist()
            if of_sequence[sequence] < 1 / 11 or not any(drawn):
                drawn = [False] * (len(window) - 1) + [True]
            expected, mask = expected + window, mask + drawn
        assert (item.tolist(), masked.tolist()) == (expected, mask)
        assert (layout.offsets - batch.offsets).tolist() == list(range(8))
        wanted = masked_places(masked, number)
        assert layout.wanted is not None
        assert torch.equal(layout.wanted, wanted)
        assert torch.equal(targets, item[wanted].where(masked[wanted], 0))
        for sequence, (start, end) in enumerate(itertools.pairwise(layout.query_offsets.tolist())):
            assert (layout.sequence_id[wanted[start:end]] == sequence).all()
        assert int(layout.query_offsets[-1]) == number


def test_bert4rec_masks_a_fifth_and_at_least_one_item() -> None:
    model = bert()
    torch.manual_seed(0)
    masked = sampled(model, [40] * 1000).view(1000, 40)
    assert bool(masked.any(1).all())
    last_only = masked[:, -1] & (masked.sum(1) == 1)
    assert 0.06 < float(last_only.double().mean()) < 0.13  # one in eleven, and the rare sequence with no other
    assert float(masked[~last_only].double().mean()) == pytest.approx(0.2, abs=0.01)
    short = sampled(model, [1] * 1000)
    assert bool(short.all())


def test_bert4rec_without_last_only_masks_items_independently() -> None:
    torch.manual_seed(0)
    masked = sampled(bert(last_only=False), [40] * 1000).view(1000, 40)
    assert float(masked.double().mean()) == pytest.approx(0.2, abs=0.01)
    assert float(masked[:, -1].double().mean()) == pytest.approx(0.2, abs=0.04)  # the last one as any other


@pytest.mark.parametrize("mask_prob", [0.01, 0.2, 0.9])
def test_bert4rec_masks_no_more_items_than_it_has_room_for(mask_prob: float) -> None:
    masking, total = Masking(mask_prob, 0.0), 2000
    layout = Layout.of(torch.tensor([0, total]), total, total)
    last = layout.position == total - 1
    torch.manual_seed(0)
    counts = [int(masking.sample(last, layout, torch.rand(1), torch.rand(total)).sum()) for _ in range(200)]
    assert max(counts) <= masking.max_masked(total, 1) <= min(total, max(counts) + 100)
    assert masking.max_masked(3, 3) == 3


def test_bert4rec_fills_the_masked_items_up_to_a_number_known_beforehand() -> None:
    model = bert()
    torch.manual_seed(0)
    for lengths in ([7, 1, 40, 200, 3, 90], [1, 1, 1]):
        total = sum(lengths)
        none, most = torch.zeros(total, dtype=torch.bool), torch.arange(total) < total - 3
        number = model.masking.max_masked(total, len(lengths))
        for masked in (sampled(model, lengths), none, most):
            index = masked_places(masked, number)
            (places,) = masked.nonzero(as_tuple=True)
            assert len(index) == number
            assert (index.diff() > 0).all()
            if len(places) <= number:
                assert torch.equal(index[masked[index]], places)
            else:
                assert torch.equal(index, places[:number])


@pytest.mark.parametrize("output_layer", [True, False])
def test_bert4rec_trains_on_the_window_with_its_next_item(output_layer: bool) -> None:
    data = batch([4, 2])
    item, _, layout = append_next_item(data)
    assert layout.offsets.tolist() == [0, 4, 6]
    expected = sequences([4, 2]).item.tolist()
    assert item.tolist() == expected
    model = bert(output_layer=output_layer)
    torch.manual_seed(3)
    expected_loss = twins.masked_loss(model, data)
    torch.manual_seed(3)
    torch.testing.assert_close(model.loss(data), expected_loss)


def test_bert4rec_without_an_output_layer_scores_by_dot_products_of_the_mask_s_state() -> None:
    model, data = bert(output_layer=False), batch([5, 20])
    item, _, layout = append_next_item(data)
    masked = torch.zeros_like(item, dtype=torch.bool)
    masked[[4, 24]] = True  # in place of each user's last item
    state = model._encode(item, masked, layout)[[4, 24]]
    torch.testing.assert_close(model.score(data)[:, 1:], state @ model.items.weight[1:].T)
    assert not [name for name, _ in model.named_parameters() if name.startswith("output.")]


# GRU4Rec


def test_a_gru_that_predicts_every_next_item_equals_the_equations_by_hand() -> None:
    """arXiv 1406.1078, with torch's two biases: r, z and n are the thirds of each matrix."""
    model, data = make("gru"), batch([5, 20, 2])
    (weight_x, weight_h, bias_x, bias_h), found = model.encoder.gru.all_weights[0], model.encode(data)
    for start, end in zip(data.offsets[:-1].tolist(), data.offsets[1:].tolist(), strict=True):
        h = torch.zeros(6, dtype=torch.float64)
        for token in range(start, end):
            x = weight_x @ model.items.weight[data.item[token]] + bias_x
            before = weight_h @ h + bias_h
            reset, update = (torch.sigmoid(x[part] + before[part]) for part in (slice(0, 6), slice(6, 12)))
            h = (1 - update) * torch.tanh(x[12:] + reset * before[12:]) + update * h
            torch.testing.assert_close(found[token], h, rtol=0, atol=1e-12)
    last = found[data.offsets[1:] - 1]
    torch.testing.assert_close(model.score(data), last @ model.items.weight.T)
    logits = (found @ model.items.weight.T)[:, 1:]
    torch.testing.assert_close(model.loss(data), F.cross_entropy(logits, data.next_item - 1))


def gru() -> Sessions:
    torch.manual_seed(1)
    model = build(config("gru4rec"), ITEMS)
    assert isinstance(model, Sessions)
    return model.double()


def test_gru4rec_visits_every_event_once_in_parallel_lanes() -> None:
    model = gru()
    lengths = [5, 3, 9, 2, 4, 7]
    data = sequences(lengths)
    users = torch.arange(6)
    one = data.batch(users, torch.zeros_like(users), MAX_LEN)
    visited, fresh = [], []
    for token, state in twins.lanes(model, one, 3):
        for lane, index in enumerate(token.tolist()):
            starts_here = index in one.offsets.tolist()
            assert starts_here == (not state[lane].any())
            fresh.append(starts_here)
        visited += token.tolist()
        state += 1.0
    assert sorted(visited) == list(range(sum(lengths) - 6))
    assert sum(fresh) == 6
    first = next(iter(twins.lanes(model, one, 3)))[0]
    assert first.tolist() == one.offsets[:3].tolist()  # three users at a time


def test_gru4rec_loss_is_the_authors() -> None:
    """-log softmax of the lane's own target among all lanes' targets and shared samples, after the logQ correction."""
    model = gru().eval()
    data = sequences([6, 8, 5])
    users = torch.arange(3)
    num_held_out = torch.zeros_like(users)
    torch.manual_seed(5)
    model.prepare(data, num_held_out)
    loss = next(iter(twins.session_losses(model, data, users, num_held_out, MAX_LEN, 3)))
    torch.manual_seed(5)
    one = data.batch(users, num_held_out, MAX_LEN)
    counts = data.counts(num_held_out).double()
    sampled = torch.multinomial(counts**0.5, 30, replacement=True)
    token = one.offsets[:-1]
    gates = model.items.weight[one.item[token]] @ model.encoder.gru.weight_ih_l0.T  # biases are zero, so is the state
    reset, update, new = gates.chunk(3, dim=1)
    del reset
    hidden = (1 - update.sigmoid()) * new.tanh()
    targets = one.next_item[token]
    total = 0.0
    for lane in range(3):
        logits = [float(hidden[lane] @ model.items.weight[item]) - math.log(counts[item]) for item in targets]
        logits += [float(hidden[lane] @ model.items.weight[item]) - 0.5 * math.log(counts[item]) for item in sampled]
        total += math.log(sum(map(math.exp, logits))) - logits[lane]
    assert float(loss) == pytest.approx(total / 3, abs=1e-9)


def test_gru4rec_carries_state_without_gradients_and_scores_like_a_gru() -> None:
    model = gru().eval()
    data = batch([9, 4])
    states = model.encode(data)
    alone, _ = model.encoder.gru(model.items(data.item[:8])[None])
    torch.testing.assert_close(states[:8], alone[0])
    expected = states[data.last] @ model.items.weight.T + model.bias
    torch.testing.assert_close(model.score(data), expected)
    token, state = next(twins.lanes(model, data, 2))
    model.popularity = torch.ones(ITEMS + 1, dtype=torch.float64)
    _, hidden = twins.event(model, data, token, state)
    assert not hidden.requires_grad
    torch.testing.assert_close(hidden, states[data.offsets[:-1]].detach())


def test_gru4rec_divides_by_the_root_of_squares_and_epsilon() -> None:
    model = gru()
    optimizer = make_optimizer(model)
    with torch.no_grad():
        before = model.bias.clone()
    for gradient in (0.5, 1e-4):
        model.bias.grad = torch.full_like(model.bias, gradient)
        optimizer.step()
    moved = 1e-3 * (0.5 / math.sqrt(0.25 + 1e-6) + 1e-4 / math.sqrt(0.25 + 1e-8 + 1e-6))
    torch.testing.assert_close(before - model.bias, torch.full_like(before, moved))
