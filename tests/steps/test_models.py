"""Each model is the model it claims to be."""

import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from steps.common.config import TrainingConfig
from steps.common.typed import EntryError, read
from steps.data.sequences import Batch, Sequences
from steps.models import CountBasedModel, is_count_based
from steps.tasks import Task, build, losses
from steps.training.schedule import Schedule, Windows, make_schedule
from tests.steps.runs import model_entry

MAX_LEN, ITEMS = 200, 60
CAUSAL = ["hstu", "hstu-softmax", "sasrec", "transformer++", "ligr", "fuxi-alpha", "fuxi-gamma", "gru", "gru4rec"]


def config(model: str, **changes: Any) -> dict[str, Any]:
    settings = model_entry(model, {"dim": 6, "blocks": 2, "heads": 2, "dqk": 3, "dv": 5}, **changes)
    training = {"max_len": MAX_LEN, "epochs": 1, "batch": 3, "negatives": 7, "dropout": 0.2}
    return {"model": settings, "training": training}


def make(model: str, dtype: torch.dtype = torch.float64, **changes: Any) -> Task:
    """A model in evaluation mode whose weights are large enough that every term matters."""
    torch.manual_seed(1)
    made = build(config(model, **changes), ITEMS)
    assert isinstance(made, Task)
    with torch.no_grad():
        for parameter in made.eval().parameters():
            parameter.mul_(3)
    return made.to(dtype)


def schedule_of(task: Task, data: Sequences, num_held_out: torch.Tensor, **settings: Any) -> Schedule:
    """The schedule that trains the task on the data."""
    training = read(TrainingConfig, config("hstu")["training"] | settings)
    task.prepare(data, num_held_out)
    return make_schedule(task.schedules, training, data, num_held_out)


def sequences(lengths: list[int], seed: int = 0) -> Sequences:
    torch.manual_seed(seed)
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    timestamps = [torch.randint(0, 3 * 10**8, (n,)).sort().values for n in lengths]
    for times in timestamps:
        times[1::4] = times[: len(times[1::4])]  # ties, and times that go back
    item = torch.randint(1, ITEMS + 1, (sum(lengths),))
    return Sequences(offsets, item, torch.cat(timestamps), ITEMS)


def batch(lengths: list[int], seed: int = 0) -> Batch:
    data = sequences(lengths, seed)
    users = torch.arange(data.num_users)
    return data.batch(users, torch.zeros_like(users), MAX_LEN)


def layer_by_hand(layer: Any, x: torch.Tensor, times: torch.Tensor, next_times: torch.Tensor) -> torch.Tensor:
    """One HSTU layer on one user's tokens (n, d), from equations 1 to 3, with explicit sums."""

    def norm(row: list[float]) -> list[float]:
        mean = sum(row) / len(row)
        variance = sum((value - mean) ** 2 for value in row) / len(row)
        return [(value - mean) / math.sqrt(variance + 1e-6) for value in row]

    def silu(value: float) -> float:
        return value / (1 + math.exp(-value))

    weight, n = layer.uvqk.tolist(), len(x)
    window, sinks = layer.window["max_attn_len"], layer.window["num_sink_tokens"]
    heads, dqk, dv = layer.heads, layer.dqk, layer.dv
    rows = []
    for row in x.tolist():
        normed = norm(row)
        rows.append([silu(sum(normed[a] * weight[a][b] for a in range(len(row)))) for b in range(len(weight[0]))])
    position, time = layer.position_bias.tolist(), layer.time_bias.tolist()
    output = []
    for i in range(n):
        attention_output = []
        for head in range(heads):
            total = [0.0] * dv
            for j in range(i + 1):
                if window and i - j > window and j >= sinks:
                    continue
                q_at = 2 * heads * dv + head * dqk
                k_at = q_at + heads * dqk
                score = sum(rows[i][q_at + a] * rows[j][k_at + a] for a in range(dqk)) * layer.alpha
                seconds = abs(int(next_times[i] - times[j]))
                bucket = min(max(math.floor(math.log(max(1, seconds)) / 0.301), 0), 128)
                score += position[(len(position) - 1) // 2 + j - i] + time[bucket]
                for a in range(dv):
                    total[a] += silu(score) / 211 * rows[j][heads * dv + head * dv + a]
            attention_output += total
        gated = [rows[i][a] * value for a, value in enumerate(norm(attention_output))]
        out, bias = layer.output.weight.tolist(), layer.output.bias.tolist()
        output.append(
            [x[i][b].item() + bias[b] + sum(gated[a] * out[b][a] for a in range(len(gated))) for b in range(x.shape[1])]
        )
    return torch.tensor(output, dtype=torch.float64)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("lengths", [[2, 14, 3], [202]])  # one token; ragged; a full window of the N = 211 model
@pytest.mark.parametrize("window", [{}, {"max_attn_len": 4, "num_sink_tokens": 3}], ids=["causal", "semi-local"])
def test_hstu_equals_the_equations_by_hand(
    window: dict[str, int], lengths: list[int], dtype: torch.dtype, tolerance: float
) -> None:
    exact, data = make("hstu", **window).requires_grad_(False), batch(lengths)
    model = make("hstu", dtype, **window)
    assert model.encoder.num_positions == 211
    found = model.encode(data)
    for start, end in zip(data.offsets[:-1].tolist(), data.offsets[1:].tolist(), strict=True):
        items, n = data.item[start:end], end - start
        x = exact.items.weight[items] * math.sqrt(6) + exact.encoder.position.weight[:n]
        for layer in exact.encoder.blocks:
            x = layer_by_hand(layer, x, data.timestamp[start:end], data.next_timestamp[start:end])
        scale = float(x.abs().max())
        assert float((found[start:end].double() - x).abs().max()) / scale < tolerance


def test_first_tokens_without_a_window_are_refused() -> None:
    with pytest.raises(EntryError, match=r"key model\.max_attn_len: must be 1 or more, as num_sink_tokens lifts"):
        make("hstu", num_sink_tokens=3)


def test_hstu_weights_start_as_the_authors_do() -> None:
    torch.manual_seed(0)
    model = build(config("hstu", dim=64, heads=1, dqk=64, dv=64), 5000)
    layer = model.encoder.blocks[0]
    assert layer.uvqk.std().item() == pytest.approx(0.02, rel=0.03)
    assert layer.position_bias.std().item() == pytest.approx(0.02, rel=0.15)
    assert layer.output.weight.abs().max().item() <= math.sqrt(6 / 128)
    assert model.items.weight.abs().max().item() <= 0.04
    assert model.items.weight.std().item() == pytest.approx(0.02 * 0.88, rel=0.02)  # truncated at two std
    assert model.encoder.position.weight.std().item() == pytest.approx(math.sqrt(2 / (211 + 64)), rel=0.05)


@pytest.mark.parametrize("learned_norms", [False, True])
def test_sasrec_equals_a_reference_from_torch_modules(learned_norms: bool) -> None:
    model, data = make("sasrec", learned_norms=learned_norms), batch([5, 20, 2])

    def norm(x: torch.Tensor, layer: Any) -> torch.Tensor:
        assert (layer.weight is not None) == learned_norms
        return F.layer_norm(x, (6,), layer.weight, layer.bias, eps=1e-8)

    found = model.encode(data)
    for start, end in zip(data.offsets[:-1].tolist(), data.offsets[1:].tolist(), strict=True):
        n = end - start
        x = model.items.weight[data.item[start:end]] * math.sqrt(6) + model.encoder.position.weight[:n]
        for block in model.encoder.blocks:
            attention = torch.nn.MultiheadAttention(6, 2, batch_first=True, dtype=torch.float64)
            attention.in_proj_weight.data = torch.cat([block.query.weight, block.key.weight, block.value.weight])
            attention.in_proj_bias.data = torch.cat([block.query.bias, block.key.bias, block.value.bias])
            attention.out_proj.weight.data = block.output.weight.data
            attention.out_proj.bias.data = block.output.bias.data
            normed = norm(x, block.attention_norm)
            future = torch.ones(n, n, dtype=torch.bool).triu(1)
            attention_output, _ = attention(normed[None], x[None], x[None], attn_mask=future, need_weights=False)
            x = norm(normed + attention_output[0], block.feed_forward_norm)
            x = x + F.linear(
                F.relu(F.linear(x, block.inner.weight, block.inner.bias)), block.outer.weight, block.outer.bias
            )
        if learned_norms:
            x = norm(x, model.encoder.last_norm)
        torch.testing.assert_close(found[start:end], x, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", CAUSAL)
def test_the_future_changes_no_earlier_state(name: str) -> None:
    model, data = make(name), batch([30])
    changed = Batch(**vars(data) | {"item": data.item.clone(), "timestamp": data.timestamp.clone()})
    changed.item[20:] = changed.item[20:] % ITEMS + 1
    changed.timestamp[20:] += 12345
    before, after = model.encode(data), model.encode(changed)
    assert torch.equal(before[:20], after[:20])
    assert not torch.isclose(before[20:], after[20:]).all(dim=1).any()


@pytest.mark.parametrize("name", [*CAUSAL, "bert4rec"])
def test_a_user_is_encoded_alike_alone_and_in_any_batch(name: str) -> None:
    model, data = make(name), sequences([4, 40, 11, 2])
    none = torch.zeros(4, dtype=torch.int64)
    together = data.batch(torch.tensor([1, 3, 0, 2]), none, MAX_LEN)
    states = model.encode(together)
    for index, user in enumerate([1, 3, 0, 2]):
        alone = model.encode(data.batch(torch.tensor([user]), none[:1], MAX_LEN))
        start, end = together.offsets[index : index + 2].tolist()
        torch.testing.assert_close(states[start:end], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("time", "sees_target"), [("next", True), ("self", False), ("none", False)])
def test_only_time_next_uses_the_time_of_the_target(time: str, sees_target: bool) -> None:
    model = make("hstu", bias={"position": True, "time": time})
    data = batch([12])
    later = Batch(**vars(data) | {"next_timestamp": data.next_timestamp.clone()})
    later.next_timestamp[-1] += 10**9
    assert torch.equal(model.encode(data), model.encode(later)) != sees_target
    earlier = Batch(**vars(data) | {"timestamp": data.timestamp - 10**9, "next_timestamp": data.next_timestamp - 10**9})
    torch.testing.assert_close(model.encode(earlier), model.encode(data))  # only differences of time enter


def test_without_biases_there_are_no_bias_tables() -> None:
    names = [name for name, _ in make("hstu", bias={"position": False, "time": "none"}).named_parameters()]
    assert not [name for name in names if "bias" in name and "output" not in name]


@pytest.mark.parametrize("name", [*CAUSAL, "bert4rec"])
def test_every_parameter_gets_a_gradient(name: str) -> None:
    model, data = make(name).train(), sequences([10, 34])
    schedule = schedule_of(model, data, torch.zeros(2, dtype=torch.int64))
    for shape, inputs in schedule.epoch():
        for micro_step in schedule.micro_steps(inputs):
            model.loss(schedule.batch(shape, micro_step)).backward()
    assert [
        key for key, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ] == []


@pytest.mark.parametrize("bucket", [None, 8])  # padded, as on a GPU, or not
@pytest.mark.parametrize("name", ["hstu", "sasrec", "transformer++"])
def test_a_rowwise_table_has_the_loss_and_the_gradient_of_an_ordinary_one(
    name: str, bucket: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rowwise = make(name, torch.float32, items={"lr": 0.05, "dtype": "float32", "negative_pool": 20})
    ordinary = make(name, torch.float32)
    ordinary.load_state_dict(rowwise.state_dict() | {"items.weight": rowwise.items.weight}, strict=False)
    assert not any("items" in key for key, _ in rowwise.named_parameters())
    data, users, num_held_out = sequences([9, 3, 14]), torch.tensor([2, 0, 1]), torch.zeros(3, dtype=torch.int64)
    if bucket is None:
        windows = data.batch(users, num_held_out, MAX_LEN)
    else:
        schedule = schedule_of(rowwise, data, num_held_out)
        assert isinstance(schedule, Windows)
        schedule.bucket = bucket
        ((shape, inputs),) = schedule.steps(users)
        windows = schedule.batch(shape, inputs)
    torch.manual_seed(5)
    pool = torch.randint(1, ITEMS + 1, (20,))
    negatives = pool[torch.randint(0, 20, (len(windows.item), 7))]
    before = rowwise.items.weight.clone()
    torch.manual_seed(5)
    found = rowwise.loss(windows)
    found.backward()
    monkeypatch.setattr(losses, "_sample_negatives", lambda *_: negatives)
    expected = ordinary.loss(windows)
    expected.backward()
    torch.testing.assert_close(found, expected)
    for key, parameter in rowwise.named_parameters():
        torch.testing.assert_close(parameter.grad, dict(ordinary.named_parameters())[key].grad, rtol=1e-3, atol=1e-4)
    gradient = ordinary.items.weight.grad[1:]
    rate = 0.05 / (gradient.square().mean(1).sqrt() + 1e-8)
    torch.testing.assert_close(rowwise.items.weight[1:], before[1:] - rate[:, None] * gradient, rtol=1e-3, atol=1e-4)
    assert torch.equal(rowwise.items.weight[0], before[0])


def test_scores_are_cosines_of_the_last_state() -> None:
    model, data = make("hstu"), batch([9, 33])
    scores = model.score(data)
    state = model.encode(data)[data.offsets[1:] - 1]
    expected = torch.cosine_similarity(state[:, None], model.items.weight[None], dim=-1)
    torch.testing.assert_close(scores, expected)


@pytest.mark.parametrize("name", [*CAUSAL, "bert4rec", "popular", "markov", "item-knn"])
def test_a_config_tells_whether_its_model_is_count_based(name: str) -> None:
    settings = config(name)
    assert is_count_based(settings) == isinstance(build(settings, ITEMS), CountBasedModel)


def test_most_popular_ranks_by_training_counts() -> None:
    offsets = torch.tensor([0, 4, 7])
    data = Sequences(offsets, torch.tensor([1, 2, 3, 3, 2, 3, 1]), torch.arange(7), 4)
    model = build({"model": {"model": "popular"}}, 4)
    model.fit(data, torch.ones(2, dtype=torch.int64))
    assert (
        model.score(data.batch(torch.tensor([0, 1]), torch.zeros(2, dtype=torch.int64), 5)).tolist()
        == [[0, 1, 2, 2, 0]] * 2
    )


SAMPLED = {"name": "sampled-softmax", "similarity": "cosine", "temperature": 0.05}
IN_BATCH = SAMPLED | {"name": "in-batch-softmax"}
FULL = {"name": "softmax", "similarity": "dot", "temperature": 1.0}
ROWWISE = {"lr": 0.05, "dtype": "float32", "negative_pool": 9}


@pytest.mark.parametrize(
    ("name", "changes", "key"),
    [
        ("hstu", {"foo": 1}, "model.foo: nothing reads it"),
        ("popular", {"neighbours": 9}, "model.neighbours: nothing reads it"),
        ("sasrec", {"heads": 4}, "model.heads: 4 does not divide dim 6"),
        ("bert4rec", {"heads": 4}, "model.heads: 4 does not divide dim 6"),
        ("ligr", {"heads": 4}, "model.heads: 4 does not divide dim 6"),
        ("fuxi-alpha", {"decay": 0.5}, "model.decay: nothing reads it"),
        ("fuxi-gamma", {"decay": 1.0}, "model.decay: 1.0 is not a number between 0 and 1"),
        ("bert4rec", {"mask_prob": 0}, "model.mask_prob: 0 is not a number between 0 and 1"),
        ("bert4rec", {"items": ROWWISE}, "model.items: model bert4rec does not train"),
        ("gru4rec", {"items": ROWWISE}, "model.items: model gru4rec does not train"),
        ("hstu", {"items": ROWWISE, "loss": FULL}, "model.items: loss softmax needs all embeddings"),
        ("hstu", {"loss": IN_BATCH | {"similarity": "dot"}}, "model.loss.similarity: loss in-batch-softmax has cosine"),
        ("hstu", {"loss": SAMPLED | {"calibration": 0.5}}, "model.loss.calibration: loss sampled-softmax does not"),
        ("hstu", {"loss": FULL | {"negatives": 5}}, "model.loss.negatives: loss softmax does not read it"),
        ("gru4rec", {"optimizer": {"lr": 0.1, "betas": [0.9, 0.9], "weight_decay": 0.0}}, "model.optimizer: Adagrad"),
        ("gru4rec", {"loss": SAMPLED}, "model.loss: "),
    ],
)
def test_entries_that_nothing_reads_or_that_do_not_fit_are_refused(
    name: str, changes: dict[str, Any], key: str
) -> None:
    with pytest.raises(EntryError, match=f"^key {re.escape(key)}"):
        build(config(name, **changes), ITEMS)


def test_a_recomputed_projection_changes_neither_values_nor_gradients() -> None:
    data, found = batch([2, 14, 3]), {}
    for again in (False, True):
        model = make("hstu", recompute_projection=again)
        states = model.encode(data)
        states.square().sum().backward()
        found[again] = [states, *(parameter.grad for parameter in model.parameters())]
    assert all(torch.equal(one, other) for one, other in zip(found[False], found[True], strict=True))
