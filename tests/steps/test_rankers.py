"""Rankers by features are the published equations, see nothing of what is to come, and learn what they claim to."""

from typing import Any

import pytest
import torch
from torch import nn

from steps.common.typed import EntryError
from steps.data.before import Before
from steps.data.fields import FieldSizes
from steps.data.sequences import Batch, Sequences, StaticShape
from steps.data.split import split_sequences
from steps.evaluation.ranking import RankingEvaluation
from steps.models.rankers import RANKERS
from steps.models.rankers.deepfm import pairwise
from steps.models.rankers.din import ActivationUnit
from steps.models.rankers.dlrm import dots
from steps.serving.ranker import CandidateRanker
from steps.tasks import build
from steps.tasks.ranking import Ranking, RankingTask
from steps.training.loop import Training, train_together
from tests.steps.test_ranking import OF_USERS, PROTOCOL, in_graphs_and_eagerly, served

ITEMS, MAX_LEN = 24, 12
OWN: dict[str, dict[str, Any]] = {
    "logistic-regression": {},
    "deepfm": {"layers": 2, "hidden": 16},
    "dcn-v2": {"layers": 2, "hidden": 16, "crosses": 2},
    "dlrm": {"layers": 2, "hidden": 16},
    "din": {"layers": 2, "hidden": 16, "unit": 6},
    "sasrec-ranker": {"layers": 2, "hidden": 16, "blocks": 1, "heads": 2, "output_slots": 0},
}
EVERY = [*RANKERS, "hstu"]


def config(model: str, **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "model": model, "dim": 8, "levels": [2.0, 4.0], "others_weight": 0.3,
        "optimizer": {"lr": 1e-2, "betas": [0.9, 0.98], "weight_decay": 0.0},
    }  # fmt: skip
    if model == "hstu":
        settings |= {"blocks": 2, "heads": 2, "dqk": 8, "dv": 8, "attention": "silu", "alpha": 1.0, "head": 8}
        settings |= {"attention_scale": "max_len", "bias": {"position": True, "time": "self"}, "output_slots": 0}
        settings |= {"tokens": "interleaved", "features": True}
    training = {"max_len": MAX_LEN, "epochs": 6, "batch": 16, "negatives": 1, "dropout": 0.0}
    return {
        "model": settings | OWN.get(model, {}) | changes, "training": training, "protocol": PROTOCOL, "seed": 0,
        "row": model,
    }  # fmt: skip


def sequences(users: int = 60, seed: int = 0) -> Sequences:
    """A user likes an item where group and kind differ, half of all each. Times differ within a user, not between."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 24, (users,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    item = torch.randint(1, ITEMS + 1, (int(lengths.sum()),), generator=generator)
    time = torch.cat([torch.randperm(200, generator=generator)[: int(n)].sort().values for n in lengths])
    group = 1 + torch.arange(users) % 2
    kind = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.arange(ITEMS) % 2])
    liked = torch.repeat_interleave(group, lengths) != kind[item]
    rating = torch.where(liked, 4, 1) + torch.randint(0, 2, item.shape, generator=generator)
    genres = torch.cat([torch.zeros(1, 3), torch.randint(0, 2, (ITEMS, 3), generator=generator)])
    return Sequences(
        offsets, item, time, ITEMS, rating=rating.float(), user_features={"group": group.int()},
        item_features={"kind": kind.int(), "genres": genres.to(torch.uint8)},
    )  # fmt: skip


def like(data: Sequences, item: torch.Tensor, rating: torch.Tensor) -> Sequences:
    features = {"user_features": data.user_features, "item_features": data.item_features}
    return Sequences(data.offsets, item, data.timestamp, ITEMS, rating=rating, **features)


def on(device: str, data: Sequences) -> Sequences:
    tensors = (data.offsets, data.item, data.timestamp, data.rating)
    offsets, item, time, rating = (tensor.to(device) for tensor in tensors)
    kinds = [{name: of.to(device) for name, of in kind.items()} for kind in (data.user_features, data.item_features)]
    return Sequences(offsets, item, time, ITEMS, rating=rating, user_features=kinds[0], item_features=kinds[1])


def make(model: str, data: Sequences, protocol: dict[str, Any] = PROTOCOL, **changes: Any) -> RankingTask:
    torch.manual_seed(1)
    made = build(config(model, **changes) | {"protocol": protocol}, ITEMS, FieldSizes.of(data))
    assert isinstance(made, RankingTask)
    made = made.eval().double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(4)
    made.prepare(data, torch.zeros(data.num_users, dtype=torch.int64))
    return made


def windows(data: Sequences, users: list[int] | None = None) -> Batch:
    chosen = torch.arange(data.num_users) if users is None else torch.tensor(users)
    return data.batch(chosen, torch.zeros_like(chosen), MAX_LEN)


# What a prediction may see


@pytest.mark.parametrize("model", [*EVERY, "hstu merged"])
def test_no_prediction_sees_its_own_rating_or_the_future(model: str) -> None:
    data = sequences()
    assert data.rating is not None
    model, *merged = model.split()
    task, batch = make(model, data, **({"tokens": "merged"} if merged else {})), windows(data)
    expected = task.predict(batch)
    for now in (60, 120, 180):
        generator = torch.Generator().manual_seed(now)
        rating, item = data.rating.clone(), data.item.clone()
        present = torch.nonzero(data.timestamp >= now)[:, 0]
        future = torch.nonzero(data.timestamp > now)[:, 0]
        rating[present] = 6 - rating[present]
        item[future] = item[future[torch.randperm(len(future), generator=generator)]]
        found = task.predict(windows(like(data, item, rating)))
        until = batch.next_timestamp <= now
        assert until.any()
        assert torch.equal(found[until], expected[until])
        assert not torch.equal(found[~until], expected[~until])


@pytest.mark.parametrize("model", EVERY)
def test_candidates_of_one_request_do_not_see_each_other(model: str) -> None:
    """Nor what others do from the time of the request on."""
    data = sequences(90)
    assert data.rating is not None
    protocol = {"name": "users", "task": "ranking", "split": "users", "report": "best", "positive": 4.0}
    protocol |= {"test_share": 0.25, "valid_share": 0.1, "targets": 4}
    settings = config(model) | {"protocol": protocol}
    split = split_sequences(data, protocol)
    held_out = split.held_out["test"]
    task = make(model, data, protocol)
    targets = data.offsets[held_out.users + 1] - 1 - held_out.num_after
    place, expected = torch.arange(len(data.item)), RankingEvaluation(settings, data, held_out).predictions(task).logit
    for one in range(0, len(targets), 5):
        # All but the history, and but the item that is asked about, changes from the time of the request on.
        user = held_out.users[one]
        first = targets[held_out.users == user].min()
        history = (place >= data.offsets[user]) & (place < first)
        changed = (data.timestamp >= data.timestamp[first - 1]) & ~history
        rating, item = data.rating.clone(), data.item.clone()
        rating[changed] = 6 - rating[changed]
        changed[targets[one]] = False
        item[changed] = item[changed] % ITEMS + 1
        found = RankingEvaluation(settings, like(data, item, rating), held_out).predictions(task).logit
        assert torch.equal(found[one], expected[one])
        assert not torch.equal(found, expected)


@pytest.mark.parametrize("protocol", [PROTOCOL, OF_USERS])
@pytest.mark.parametrize("model", EVERY)
def test_what_is_held_out_changes_no_training(model: str, protocol: dict[str, Any], tmp_path: Any) -> None:
    data = sequences()
    assert data.rating is not None
    held_out = split_sequences(data, protocol).num_held_out
    user = torch.repeat_interleave(torch.arange(data.num_users), data.offsets.diff())
    rows = torch.nonzero(data.offsets[user + 1] - torch.arange(len(user)) <= held_out[user])[:, 0]
    item, rating = data.item.clone(), data.rating.clone()
    item[rows], rating[rows] = item[rows] % ITEMS + 1, 6 - rating[rows]
    weights = []
    for changed in (data, like(data, item, rating)):
        settings = config(model) | {"protocol": protocol}
        settings["training"] |= {"epochs": 1, "schedule": "one-pass"}
        training = Training(settings, changed, "0" * 64, tmp_path / str(len(weights)))
        for _, failure in train_together([training]):
            assert failure is None
        weights.append(training.model.state_dict())
    for name, values in weights[0].items():
        assert torch.equal(values, weights[1][name]), name


@pytest.mark.parametrize("model", EVERY)
def test_labels_of_held_out_users_change_no_prediction(model: str) -> None:
    data = sequences(90)
    assert data.rating is not None
    split, settings = split_sequences(data, OF_USERS), config(model) | {"protocol": OF_USERS}
    rating = data.rating.clone()
    for held_out in split.held_out.values():
        targets = data.offsets[held_out.users + 1] - 1 - held_out.num_after
        rating[targets] = 6 - rating[targets]
    one, two = data, like(data, data.item, rating)
    task = make(model, data, OF_USERS)
    found = [RankingEvaluation(settings, each, split.held_out["test"]).predictions(task) for each in (one, two)]
    assert torch.equal(found[0].logit, found[1].logit)
    assert not torch.equal(found[0].label, found[1].label)


@pytest.mark.parametrize("model", EVERY)
def test_a_prediction_reads_item_user_features_and_the_past(model: str) -> None:
    data = sequences()
    assert data.rating is not None
    task = make(model, data)
    user = int(torch.nonzero(data.offsets.diff() == MAX_LEN)[0, 0])
    start, last = int(data.offsets[user]), int(data.offsets[user + 1]) - 1
    expected = task.predict(windows(data, [user]))[-1]

    def changes(**tensors: torch.Tensor) -> bool:
        values = {"item": data.item, "rating": data.rating} | tensors
        found = task.predict(windows(like(data, values["item"], values["rating"]), [user]))[-1]
        return not bool(torch.isclose(found, expected, rtol=0, atol=1e-12))

    item, rating = data.item.clone(), data.rating.clone()
    item[last] = item[last] % ITEMS + 1
    assert changes(item=item)
    rating[start + 2] = 6 - rating[start + 2]
    assert changes(rating=rating)  # in the history, or in the user's counts
    item = data.item.clone()
    item[start + 2] = item[start + 2] % ITEMS + 1
    history = model in ("din", "sasrec-ranker", "hstu")
    if history:
        assert changes(item=item)
    # Another user's rating of the same item, earlier.
    other = torch.nonzero((data.item == data.item[last]) & (data.timestamp < data.timestamp[last]))[:, 0]
    other = other[(other < start) | (other > last)]
    rating = data.rating.clone()
    rating[other] = 6 - rating[other]
    assert changes(rating=rating) == (model != "hstu")
    for kind, place in (("user_features", user), ("item_features", int(data.item[last]))):
        for name, values in getattr(data, kind).items():
            changed = values.clone()
            changed[place] = 3 - changed[place] if values.dim() == 1 else 1 - changed[place]
            with_other = like(data, data.item, data.rating)
            getattr(with_other, kind).update({name: changed})
            found = task.predict(windows(with_other, [user]))[-1]
            getattr(with_other, kind).update({name: values})
            assert not torch.isclose(found, expected, rtol=0, atol=1e-12), name


@pytest.mark.parametrize("model", EVERY)
def test_padding_and_other_windows_change_nothing(model: str) -> None:
    data = sequences()
    task = make(model, data)
    users = torch.tensor([3, 5, 8])
    batch = windows(data, users.tolist())
    padded = data.padded_batch(users, torch.zeros_like(users), StaticShape(3, 64, 9, MAX_LEN))
    torch.testing.assert_close(task.loss(padded), task.loss(batch))
    torch.testing.assert_close(task.predict(padded)[: len(batch.item)], task.predict(batch))
    own = windows(data).sequence_id == 5
    torch.testing.assert_close(task.predict(windows(data))[own], task.predict(windows(data, [5])))


def test_data_without_features_lack_them() -> None:
    data = sequences()
    bare = Sequences(data.offsets, data.item, data.timestamp, ITEMS, rating=data.rating)
    for model in EVERY:
        assert make(model, bare).predict(windows(bare)).isfinite().all(), model


def test_counts_are_of_mean_0_and_variance_1_where_it_is_trained() -> None:
    data = sequences()
    task = make("logistic-regression", data)
    num_held_out = data.offsets.diff() // 3
    task.prepare(data, num_held_out)
    assert data.rating is not None
    before, rows = Before(data, 4.0), []
    for user in range(data.num_users):
        for place in range(int(data.offsets[user]), int(data.offsets[user + 1] - num_held_out[user])):
            query = data.item[place : place + 1], data.timestamp[place : place + 1]
            items, users = before.items(*query), before.users(torch.tensor([user]), query[1])
            numbers = [known for one in (items, users) for known in (one[0].log1p(), one[1].log1p(), one[2])]
            rows.append(torch.cat(numbers))
    found = torch.stack(rows).double()
    torch.testing.assert_close(task.dense_mean, found.mean(0))
    torch.testing.assert_close(task.dense_std, found.std(0, correction=0))


# The equations


def inputs_of(task: RankingTask, batch: Batch) -> tuple[Any, list[list[torch.Tensor]], torch.Tensor]:
    """What the ranker was given, and the same looked up one by one: vectors of each token's fields, and its numbers."""
    given: list[Any] = []
    handle = task.encoder.register_forward_pre_hook(lambda _, arguments: given.append(arguments[0]))
    task.logits(batch)
    handle.remove()
    data, fields = batch.sequences, task.fields
    vectors = []
    for token in range(len(batch.item)):
        user, item = int(batch.user[batch.sequence_id[token]]), int(batch.next_item[token])
        genres = data.item_features["genres"][item]
        tables = fields.item_features.tables
        own = [tables[0].weight[1 + k] for k in range(3) if genres[k]]
        mean = sum(own) / len(own) if own else torch.zeros(task.dim, dtype=torch.float64)
        group, kind = data.user_features["group"][user], data.item_features["kind"][item]
        vectors.append([
            fields.users.weight[user], task.items.weight[item], fields.user_features.tables[0].weight[group], mean,
            tables[1].weight[kind],
        ])  # fmt: skip
    before = Before(data, 4.0)
    users = batch.user[batch.sequence_id]
    known = before.items(batch.next_item, batch.next_timestamp), before.users(users, batch.next_timestamp)
    numbers = torch.stack([column for a, b, c in known for column in (a.log1p(), b.log1p(), c)], dim=1)
    return given[0], vectors, (numbers - task.dense_mean) / task.dense_std


def layers(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """An MLP, map by map."""
    maps = [module for module in network if isinstance(module, nn.Linear)]
    for one in maps[:-1]:
        x = (one.weight @ x + one.bias).clamp(min=0)
    return maps[-1].weight @ x + maps[-1].bias


@pytest.mark.parametrize("model", list(RANKERS))
def test_rankers_equal_their_equations(model: str) -> None:
    data = sequences(8)
    task = make(model, data)
    batch = windows(data, [1, 4, 6])
    given, vectors, numbers = inputs_of(task, batch)
    torch.testing.assert_close(given.fields, torch.stack([torch.stack(one) for one in vectors]))
    torch.testing.assert_close(given.dense, numbers)
    ranker, found = task.encoder, []
    for token, (fields, dense) in enumerate(zip(vectors, numbers, strict=True)):
        flat, item = torch.cat([*fields, dense]), fields[1] + fields[3] + fields[4]
        match model:
            case "logistic-regression":
                found.append(sum(fields) + ranker.dense.weight @ dense + ranker.dense.bias)
            case "deepfm":
                own = task.weights(batch, task.item_weights).stacked[token].sum(0)
                both = [*fields, *(number * vector for number, vector in zip(dense, ranker.vectors, strict=True))]
                pairs = sum(both[i] @ both[j] for i in range(len(both)) for j in range(i))
                first = own + ranker.dense.weight @ dense + ranker.dense.bias
                found.append(first + pairs + layers(ranker.deep, flat))
            case "dcn-v2":
                x = flat
                for cross in ranker.crosses:
                    x = flat * (cross.weight @ x + cross.bias) + x
                found.append(ranker.output.weight @ x + layers(ranker.deep, flat))
            case "dlrm":
                bottom = layers(ranker.bottom, dense).clamp(min=0)
                both = [bottom, *fields]
                dots = [both[i] @ both[j] for i in range(len(both)) for j in range(i)]
                found.append(layers(ranker.top, torch.cat([bottom, torch.stack(dots)])))
            case "din":
                start = int(batch.offsets[batch.sequence_id[token]])
                interests = torch.zeros(task.dim, dtype=torch.float64)
                for place in range(start, token + 1):
                    e = given.history[place]
                    inner = ranker.unit.inner(torch.cat([item, e, item - e, item * e]))
                    inner = torch.where(inner > 0, inner, ranker.unit.activation.weight * inner)
                    interests = interests + ranker.unit.outer(inner) * e
                found.append(layers(ranker.deep, torch.cat([flat, interests, interests * item])))
            case "sasrec-ranker":
                state = ranker.encoder(given.history, batch)[token]
                found.append(layers(ranker.deep, torch.cat([flat, state, state * item])))
    expected, logits = torch.stack(found), task.logits(batch)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-11)
    direction = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    parameters = [parameter for parameter in task.parameters() if parameter.requires_grad]
    ours = torch.autograd.grad((logits * direction).sum(), parameters, allow_unused=True)
    plain = torch.autograd.grad((expected * direction).sum(), parameters, allow_unused=True)
    for one, other in zip(ours, plain, strict=True):
        assert one is not None
        torch.testing.assert_close(one, torch.zeros_like(one) if other is None else other, rtol=1e-8, atol=1e-10)


def test_history_is_items_with_their_features_and_ratings() -> None:
    data = sequences(8)
    task = make("din", data)
    batch = windows(data)
    given, _, _ = inputs_of(task, batch)
    for token in range(len(batch.item)):
        level = sum(float(batch.rating[token]) >= bound for bound in (2.0, 4.0))
        item = int(batch.item[token])
        genres, kinds = task.fields.item_features.tables
        own = data.item_features["genres"][item].double()
        expected = task.items.weight[item] + task.actions.weight[level] + kinds.weight[data.item_features["kind"][item]]
        expected = expected + own @ genres.weight[1:] / own.sum().clamp(min=1)
        torch.testing.assert_close(given.history[token], expected)


def test_attention_of_din_sees_its_own_place_and_before() -> None:
    torch.manual_seed(0)
    unit = ActivationUnit(4, 5).double()
    history, item = torch.randn(2, 2, 6, 4, dtype=torch.float64)
    sums = unit(history.requires_grad_(), item)
    for place in range(6):
        (gradient,) = torch.autograd.grad(sums[:, place].sum(), history, retain_graph=True)
        assert (gradient[:, : place + 1] != 0).any(-1).all()
        assert not gradient[:, place + 1 :].any()


@pytest.mark.parametrize("what", ["pairs", "crosses", "dots", "unit"])
def test_parts_equal_those_of_libraries(what: str) -> None:
    """Of TorchRec and FuxiCTR, where they are installed: code of others, with the same weights.

    Not TorchRec's FactorizationMachine (1.9.2), which sums over all pairs of numbers, not of vectors.
    """
    torch.manual_seed(0)
    vectors = torch.randn(7, 5, 4, dtype=torch.float64, requires_grad=True)
    data = sequences(8)
    if what == "pairs":
        library = pytest.importorskip("fuxictr.pytorch.layers")
        ours, theirs = pairwise(vectors), library.InnerProductInteraction(5)(vectors)[:, 0]
    elif what == "crosses":
        library = pytest.importorskip("torchrec.modules.crossnet")
        ranker = make("dcn-v2", data).encoder
        other = library.CrossNet(ranker.output.in_features, 2).double()
        for place, cross in enumerate(ranker.crosses):
            other.kernels[place], other.bias[place] = cross.weight, nn.Parameter(cross.bias[:, None])
        vectors = torch.randn(7, ranker.output.in_features, dtype=torch.float64, requires_grad=True)
        ours, theirs = ranker.crossed(vectors), other(vectors)
    elif what == "dots":
        library = pytest.importorskip("torchrec.models.dlrm")
        other = library.InteractionArch(4)
        ours = torch.cat([vectors[:, 0], dots(vectors).sort(1).values], dim=1)
        theirs = other(vectors[:, 0], vectors[:, 1:])
        theirs = torch.cat([theirs[:, :4], theirs[:, 4:].sort(1).values], dim=1)
    else:
        library = pytest.importorskip("fuxictr.pytorch.layers")
        other = library.DIN_Attention(4, [6], hidden_activations="PReLU").double()
        maps = [module for module in other.modules() if isinstance(module, nn.Linear)]
        unit = ActivationUnit(4, 6).double()
        unit.inner.weight, unit.inner.bias = maps[0].weight, maps[0].bias
        unit.outer.weight, unit.outer.bias = maps[1].weight, maps[1].bias
        slopes = next(module for module in other.modules() if isinstance(module, nn.PReLU)).weight
        unit.activation.weight = nn.Parameter(slopes.detach().expand(6).clone())
        item = torch.randn(7, 4, dtype=torch.float64)
        ours, theirs = unit(vectors, item[:, None].expand(-1, 5, -1))[:, -1], other(item, vectors)
    torch.testing.assert_close(ours, theirs)
    direction = torch.randn_like(ours)
    mine = torch.autograd.grad((ours * direction).sum(), vectors)[0]
    torch.testing.assert_close(mine, torch.autograd.grad((theirs * direction).sum(), vectors)[0])


# Training


@pytest.mark.parametrize("model", list(RANKERS))
def test_pairs_of_fields_are_learnt_by_all_but_logistic_regression(model: str, tmp_path: Any) -> None:
    settings = config(model)
    settings["training"] |= {"epochs": 12, "max_len": 30}
    training = Training(settings, sequences(300), "0" * 64, tmp_path)
    for _, failure in train_together([training]):
        assert failure is None
    best = max(line["valid/auc"] for line in training.history)
    assert best < 0.6 if model == "logistic-regression" else best > 0.95


@pytest.mark.gpu
@pytest.mark.parametrize("protocol", [PROTOCOL, OF_USERS])
@pytest.mark.parametrize("model", EVERY)
def test_training_and_evaluation_are_graphs_that_do_what_eager_steps_do(
    model: str, protocol: dict[str, Any], tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    data = on("cuda", sequences(300))
    settings = config(model) | {"protocol": protocol}
    in_graphs_and_eagerly(settings, data, tmp_path, None)
    assert "without a CUDA graph" not in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.parametrize("model", EVERY)
def test_a_gpu_predicts_what_a_cpu_does(model: str) -> None:
    assert not torch.backends.cuda.matmul.allow_tf32
    data = sequences()
    task = make(model, data).float()
    expected = task.predict(windows(data))
    users = torch.arange(data.num_users, device="cuda")
    found = task.cuda().predict(on("cuda", data).batch(users, torch.zeros_like(users), MAX_LEN))
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_refused() -> None:
    data = sequences(8)
    with pytest.raises(EntryError, match=r"key model\.unit: nothing reads it"):
        build(config("deepfm", unit=3), ITEMS, FieldSizes.of(data))
    settings = config("din")
    del settings["model"]["hidden"]
    with pytest.raises(EntryError, match=r"key model\.hidden: is missing"):
        build(settings, ITEMS, FieldSizes.of(data))
    with pytest.raises(EntryError, match=r"'dlrm' is not one of .*, the models of retrieval"):
        build(config("dlrm") | {"protocol": {"name": "strict"}}, ITEMS, FieldSizes.of(data))
    with pytest.raises(ValueError, match="how many values they have"):
        build(config("dlrm"), ITEMS)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("tokens", ["interleaved", "merged", "items"])
@pytest.mark.parametrize("pieces", [1, 4])
def test_serving_with_features_is_the_training_path(tokens: str, pieces: int, device: str) -> None:
    """A user's features are of the first interaction, whichever piece it comes in; of later ones they are not read."""
    data = on(device, sequences(300))
    settings = config("hstu", tokens=tokens) | {"protocol": OF_USERS}
    settings["training"] |= {"max_len": 24}
    torch.manual_seed(1)
    task = build(settings, ITEMS, FieldSizes.of(data)).eval().to(device)
    assert isinstance(task, Ranking)
    held_out = split_sequences(data, OF_USERS).held_out["test"]
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.mul_(4)
        windows = RankingEvaluation(settings, data, held_out).predictions(task)
    found = served(CandidateRanker(task, page=4, item_features=data.item_features), data, held_out, pieces)
    torch.testing.assert_close(found, windows.logit, rtol=1e-5, atol=1e-5)
    # And features count.
    other = Sequences(
        data.offsets, data.item, data.timestamp, ITEMS, rating=data.rating,
        user_features={"group": 3 - data.user_features["group"]}, item_features=data.item_features,
    )  # fmt: skip
    assert not torch.allclose(
        served(CandidateRanker(task, page=4, item_features=data.item_features), other, held_out, pieces), found
    )


def test_features_that_do_not_fit_are_refused_and_change_nothing() -> None:
    data = sequences(8)
    task = make("hstu", data).float()
    assert isinstance(task, Ranking)
    items = data.item_features
    for features, said in (
        (None, "item_features: genres is missing; this model reads genres, kind"),
        ({"genres": items["genres"]}, "item_features: kind is missing"),
        (items | {"kind": items["kind"][1:]}, r"kind has the shape \(24,\), which should be \(25,\) or \(25, 2\)"),
        (items | {"genres": items["genres"][:, :2]}, r"genres has the shape \(25, 2\), .* or \(25, 3\)"),
    ):
        with pytest.raises(ValueError, match=said):
            CandidateRanker(task, item_features=features)
    ranker = CandidateRanker(task, item_features=items)

    def append(users: list[int], features: dict[str, torch.Tensor] | None) -> None:
        item, rating, time = torch.tensor([3, 4]), torch.tensor([5.0, 1.0]), torch.tensor([10, 20])
        ranker.append(users, item, rating, time, torch.tensor([0, 1, 2]), features)

    for features, said in (
        (None, "user_features: group is missing; this model reads group"),
        ({"group": torch.tensor([1])}, r"group has the shape \(1,\), which should be \(2,\)"),
        ({"group": torch.tensor([1, 3])}, "user 9: group is 3, of which the model knows 1 to 2 alone"),
        ({"group": torch.tensor([1, 0])}, "user 9: group is 0, of which the model knows 1 to 2 alone"),
    ):
        with pytest.raises(ValueError, match=said):
            append([7, 9], features)
    assert not ranker.cache.lengths

    def score() -> torch.Tensor:
        return ranker.score([7, 9], torch.tensor([5, 6]), torch.tensor([0, 1, 2]), torch.tensor([30, 30]))

    append([7, 9], {"group": torch.tensor([1, 2])})
    expected = score()
    ranker.evict([9])
    append([9, 8], {"group": torch.tensor([2, 1])})  # where 9 had other items and 8 is new
    ranker.evict([7, 9])
    with pytest.raises(ValueError, match="group is missing"):
        append([7, 9], None)
    append([7, 9], {"group": torch.tensor([1, 2])})
    torch.testing.assert_close(score(), expected)
    ranker.append([7], torch.tensor([8]), torch.tensor([3.0]), torch.tensor([21]), torch.tensor([0, 1]))
    given = {"group": torch.tensor([99])}  # which is not read
    ranker.append([9], torch.tensor([8]), torch.tensor([3.0]), torch.tensor([21]), torch.tensor([0, 1]), given)
