"""Ranking: what a prediction may see, which examples there are, and that training learns."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from steps.common.cli import StepError
from steps.common.typed import EntryError
from steps.data.sequences import Batch, Sequences
from steps.data.split import HeldOut, split_sequences
from steps.evaluation.engagements import auc
from steps.evaluation.ranking import RankingEvaluation
from steps.serving.ranker import CandidateRanker
from steps.tasks import build
from steps.tasks.ranking import Ranking
from steps.training.loop import Training, train_together
from tests.conftest import ROOT

PROTOCOL = {
    "name": "ranking", "task": "ranking", "split": "temporal", "report": "best", "test_share": 0.1, "valid_share": 0.1,
    "positive": 4.0,
}  # fmt: skip
ITEMS = 40


def config(tokens: str = "interleaved", model: str = "hstu", **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "model": model, "dim": 16, "blocks": 2, "heads": 2, "output_slots": 0, "tokens": tokens,
        "levels": [2.0, 3.0, 4.0, 5.0], "others_weight": 0.5, "head": 16,
        "optimizer": {"lr": 1e-2, "betas": [0.9, 0.98], "weight_decay": 0.0},
    }  # fmt: skip
    if model == "hstu":
        settings |= {"dqk": 8, "dv": 8, "attention": "silu", "alpha": 1.0, "attention_scale": "max_len"}
        settings |= {"bias": {"position": True, "time": "self"}}
    training = {"max_len": 12, "epochs": 6, "batch": 16, "negatives": 1, "dropout": 0.0}
    return {"model": settings | changes, "training": training, "protocol": PROTOCOL, "seed": 0, "row": model}


def sequences(users: int = 60, seed: int = 0) -> Sequences:
    """Users like even items if their first item is even, and else odd ones."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 30, (users,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    item = torch.randint(1, ITEMS + 1, (int(lengths.sum()),), generator=generator)
    time = torch.cat([torch.randint(0, 10**6, (int(n),), generator=generator).sort().values for n in lengths])
    taste = torch.repeat_interleave(item[offsets[:-1]] % 2, lengths)
    liked = (item % 2 == taste) ^ (torch.rand(len(item), generator=generator) < 0.1)
    rating = torch.where(liked, 4, 1) + torch.randint(0, 2, item.shape, generator=generator)
    return Sequences(offsets, item, time, ITEMS, rating=rating.float())


def make(tokens: str, model: str = "hstu") -> Ranking:
    torch.manual_seed(1)
    made = build(config(tokens, model), ITEMS)
    assert isinstance(made, Ranking)
    with torch.no_grad():
        for parameter in made.eval().parameters():
            parameter.mul_(2)
    return made.double()


def windows(data: Sequences, users: list[int]) -> Batch:
    chosen = torch.tensor(users)
    return data.batch(chosen, torch.zeros_like(chosen), 12)


@pytest.mark.parametrize("tokens", ["interleaved", "merged"])
@pytest.mark.parametrize("model", ["hstu", "sasrec"])
def test_no_prediction_sees_its_own_action_or_what_comes_later(tokens: str, model: str) -> None:
    data, task = sequences(), make(tokens, model)
    users = torch.nonzero(data.offsets.diff() > 8)[:3, 0].tolist()
    before = windows(data, users)
    expected = task.predict(before)
    for user in users:
        end = int(data.offsets[user + 1])
        cut = end - 4  # the target of which everything else stays
        other = data.item.clone(), data.rating.clone()
        other[1][cut:end] = 6 - other[1][cut:end]
        other[0][cut + 1 : end] = other[0][cut + 1 : end].flip(0) % ITEMS + 1
        changed = Sequences(data.offsets, other[0], data.timestamp, ITEMS, rating=other[1])
        found = task.predict(windows(changed, users))
        own = before.sequence_id == users.index(user)
        until = before.index + 1 <= cut
        torch.testing.assert_close(found[own & until], expected[own & until])
        assert not torch.equal(found[own & ~until], expected[own & ~until])
        torch.testing.assert_close(found[~own], expected[~own])


@pytest.mark.parametrize("tokens", ["interleaved", "merged"])
def test_a_prediction_depends_on_the_target_and_on_all_before_it(tokens: str) -> None:
    data, task = sequences(), make(tokens)
    user = int(torch.nonzero(data.offsets.diff() == 9)[0, 0])
    start, last = int(data.offsets[user]), int(data.offsets[user + 1]) - 1
    expected = task.predict(windows(data, [user]))[-1]
    for place in range(start, last + 1):
        for what in ("item", "rating"):
            other = {"item": data.item.clone(), "rating": data.rating.clone()}
            other[what][place] = other[what][place] % 5 + 1 if what == "rating" else other[what][place] % ITEMS + 1
            changed = Sequences(data.offsets, other["item"], data.timestamp, ITEMS, rating=other["rating"])
            same = bool(torch.isclose(task.predict(windows(changed, [user]))[-1], expected, rtol=0, atol=1e-12))
            levels = torch.tensor([2.0, 3.0, 4.0, 5.0])
            reached = [torch.bucketize(r[place], levels, right=True) for r in (data.rating, changed.rating)]
            unseen = what == "rating" and (place == last or bool(reached[0] == reached[1]))
            assert same == unseen, (what, place - start)


def test_the_loss_is_cross_entropy_of_the_levels() -> None:
    data, task = sequences(), make("interleaved")
    batch = windows(data, [0, 1, 2])
    logits = task.logits(batch)
    found = []
    for row, rating in zip(logits, batch.next_rating, strict=True):
        signs = torch.tensor([1 if rating >= level else -1 for level in (2, 3, 4, 5)])
        terms = -torch.nn.functional.logsigmoid(signs * row)
        found.append(terms[2] + 0.5 * (terms[0] + terms[1] + terms[3]) / 3)
    torch.testing.assert_close(task.loss(batch), torch.stack(found).mean())


def test_a_protocol_of_another_scale_has_levels_of_its_own() -> None:
    """0 shown, 1 clicked, 2 viewed long: two outputs, and an action for each of the three ratings."""
    settings = config() | {"protocol": PROTOCOL | {"positive": 2.0, "levels": [1.0]}}
    task = build(settings, ITEMS)
    assert isinstance(task, Ranking)
    assert task.levels.tolist() == [1, 2]
    assert task.positive == 1
    assert task.actions is not None
    with torch.no_grad():
        task.actions.weight.copy_(torch.arange(3.0)[:, None].expand(3, task.dim))
    rating = torch.tensor([0.0, 1.0, 2.0])
    before = task.before(torch.tensor([3, 3, 3]), rating, torch.zeros(3, dtype=torch.bool), None, None)
    assert before[:, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("tokens", ["interleaved", "merged", "items"])
def test_a_request_of_no_user_has_no_logits(tokens: str) -> None:
    none = torch.zeros(0, dtype=torch.int64)
    assert CandidateRanker(make(tokens).eval()).score([], none, torch.tensor([0]), none).shape == (0,)


def test_padding_changes_no_loss() -> None:
    data, task = sequences(), make("interleaved")
    users = torch.tensor([3, 5, 8])
    batch = data.batch(users, torch.zeros_like(users), 12)
    from steps.data.sequences import StaticShape

    padded = data.padded_batch(users, torch.zeros_like(users), StaticShape(3, 64, 9, 12))
    torch.testing.assert_close(task.loss(padded), task.loss(batch))


@pytest.mark.parametrize("max_len", [1, 2, 5, 12, 100])
def test_every_held_out_interaction_is_predicted_once_with_half_a_window_before_it(max_len: int) -> None:
    data = sequences()
    settings = config() | {"training": config()["training"] | {"max_len": max_len, "batch": 7}}
    for held_out in split_sequences(data, PROTOCOL).held_out.values():
        targets = data.offsets[held_out.users + 1] - 1 - held_out.num_after

        class Told:
            """Its logit is where the target is; or how many interactions it sees."""

            def __init__(self, what: str) -> None:
                self.what = what

            def eval(self) -> None:
                pass

            def predict(self, batch: Batch) -> torch.Tensor:
                return batch.index + 1 if self.what == "place" else batch.position + 1

        evaluation = RankingEvaluation(settings, data, held_out)
        assert evaluation.predictions(Told("place")).logit.long().tolist() == targets.tolist()
        seen = evaluation.predictions(Told("seen")).logit.long()
        there = targets - data.offsets[held_out.users]
        assert (seen >= torch.minimum(there, torch.tensor(max(1, max_len // 2)))).all()
        assert torch.equal(evaluation.predictions(Told("place")).label, (data.rating[targets] >= 4).long())


def test_the_split_holds_out_all_of_a_period_but_first_interactions() -> None:
    data = sequences()
    found = split_sequences(data, PROTOCOL)
    times = data.timestamp.sort().values
    bounds = [times[int(len(times) * share)] for share in (0.8, 0.9)] + [torch.tensor(10**7)]
    first = set(data.offsets[:-1].tolist())
    for name, low, high in (("valid", *bounds[:2]), ("test", *bounds[1:])):
        expected = [i for i, time in enumerate(data.timestamp) if low <= time < high and i not in first]
        held_out: HeldOut = found.held_out[name]
        assert (data.offsets[held_out.users + 1] - 1 - held_out.num_after).tolist() == expected


@pytest.mark.parametrize("tokens", ["interleaved", "merged"])
def test_training_learns_what_users_like(tokens: str, tmp_path: Any) -> None:
    settings = config(tokens)
    settings["training"] |= {"epochs": 18, "max_len": 30}
    training = Training(settings, sequences(400), "0" * 64, tmp_path)
    for _, failure in train_together([training]):
        assert failure is None
    assert min(line["valid/ne"] for line in training.history) < 0.75
    assert max(line["valid/auc"] for line in training.history) > 0.8


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(EntryError, match=r"model\.levels: .*is not numbers that rise"):
        build(config(levels=[4.0, 2.0]), ITEMS)
    with pytest.raises(EntryError, match=r"'popular' is not one of mean-rating, .*hstu.*, the models of ranking"):
        build(config() | {"model": {"model": "popular"}}, ITEMS)
    data = sequences()
    for rating in (None, torch.full_like(data.rating, torch.nan)):
        bare = Sequences(data.offsets, data.item, data.timestamp, ITEMS, rating=rating)
        with pytest.raises(StepError, match="ranking predicts ratings"):
            make("merged").prepare(bare, torch.zeros(60, dtype=torch.int64))


OF_USERS = {
    "name": "upstream", "task": "ranking", "split": "users", "report": "best", "test_share": 0.25, "valid_share": 0.1,
    "targets": 5, "positive": 4.0,
}  # fmt: skip


def shuffled(data: Sequences, rows: torch.Tensor, seed: int = 1) -> Sequences:
    """The items and ratings of these rows in another order, drawn apart; times are as they were."""
    generator, (item, rating) = torch.Generator().manual_seed(seed), (data.item.clone(), data.rating.clone())
    for values in (item, rating):
        values[rows] = values[rows[torch.randperm(len(rows), generator=generator)]]
    return Sequences(data.offsets, item, data.timestamp, ITEMS, rating=rating)


def evaluation(data: Sequences, protocol: dict[str, Any], max_len: int = 12) -> RankingEvaluation:
    settings = config() | {"protocol": protocol}
    settings["training"] |= {"max_len": max_len}
    return RankingEvaluation(settings, data, split_sequences(data, protocol).held_out["test"])


@pytest.mark.parametrize("tokens", ["interleaved", "merged", "items"])
def test_what_comes_later_changes_no_prediction_by_the_clock(tokens: str) -> None:
    data, task = sequences(200), make(tokens)
    held_out = split_sequences(data, PROTOCOL).held_out["test"]
    times = data.timestamp[data.offsets[held_out.users + 1] - 1 - held_out.num_after]
    cut = times.median()
    other = shuffled(data, torch.nonzero(data.timestamp >= cut)[:, 0])
    one, two = (evaluation(changed, PROTOCOL).predictions(task).logit for changed in (data, other))
    assert int((times < cut).sum()) > 20
    assert torch.equal(one[times < cut], two[times < cut])
    assert not torch.equal(one[times >= cut], two[times >= cut])


@pytest.mark.parametrize("tokens", ["interleaved", "merged", "items"])
def test_candidates_of_one_request_do_not_see_each_other(tokens: str) -> None:
    data, task = sequences(200), make(tokens)
    held_out = split_sequences(data, OF_USERS).held_out["test"]
    index = data.offsets[held_out.users + 1] - 1 - held_out.num_after
    one = evaluation(data, OF_USERS).predictions(task).logit
    for place in range(5):
        kept = held_out.num_after == place
        other = shuffled(data, index[~kept])
        two = evaluation(other, OF_USERS).predictions(task).logit
        torch.testing.assert_close(one[kept], two[kept])
        assert not torch.allclose(one[~kept], two[~kept])
    # Of a candidate it is the item alone that counts, neither its rating nor its time.
    rating = data.rating.clone()
    rating[index] = 6 - rating[index]
    time = data.timestamp.clone()
    time[index] += torch.arange(len(index))
    changed = Sequences(data.offsets, data.item, time, ITEMS, rating=rating)
    assert torch.equal(evaluation(changed, OF_USERS).predictions(task).logit, one)


@pytest.mark.parametrize("max_len", [1, 4, 12, 100])
def test_a_candidate_is_the_next_item_of_its_user_s_history(max_len: int) -> None:
    data, task = sequences(), build(config(output_slots=200), ITEMS).eval().double()
    held_out = split_sequences(data, OF_USERS).held_out["test"]
    with torch.no_grad():
        found = evaluation(data, OF_USERS, max_len).predictions(task)
    for logit, label, user, num_after in zip(found.logit, found.label, held_out.users, held_out.num_after, strict=True):
        start, end = data.offsets[user], data.offsets[user + 1]
        target = end - 1 - num_after
        first = end - min(5, end - start - 1)
        history = torch.arange(int(max(start, first - max_len)), int(first))
        rows = torch.cat([history, target[None]])
        time = torch.cat([data.timestamp[history], data.timestamp[first - 1][None]])
        alone = Sequences(torch.tensor([0, len(rows)]), data.item[rows], time, ITEMS, rating=data.rating[rows])
        expected = task.predict(alone.batch(torch.tensor([0]), torch.tensor([0]), max_len))[-1].detach()
        assert float(logit) == pytest.approx(float(expected), abs=1e-6)
        assert label == (data.rating[target] >= 4)


@pytest.mark.parametrize("protocol", [PROTOCOL, OF_USERS])
@pytest.mark.parametrize("tokens", ["interleaved", "merged"])
def test_what_is_held_out_changes_no_training(protocol: dict[str, Any], tokens: str, tmp_path: Any) -> None:
    data = sequences()
    held_out = split_sequences(data, protocol).num_held_out
    user = torch.repeat_interleave(torch.arange(data.num_users), data.offsets.diff())
    from_end = data.offsets[user + 1] - torch.arange(len(user))
    weights = []
    for changed in (data, shuffled(data, torch.nonzero(from_end <= held_out[user])[:, 0])):
        settings = config(tokens) | {"protocol": protocol}
        settings["training"] |= {"epochs": 1, "schedule": "one-pass"}
        training = Training(settings, changed, "0" * 64, tmp_path / str(len(weights)))
        for _, failure in train_together([training]):
            assert failure is None
        weights.append(training.model.state_dict())
    for name, values in weights[0].items():
        assert torch.equal(values, weights[1][name]), name


@pytest.mark.parametrize("protocol", [PROTOCOL, OF_USERS])
def test_the_means_see_neither_their_label_nor_what_comes_later(protocol: dict[str, Any]) -> None:
    data = sequences(200)
    split = split_sequences(data, protocol)
    held_out = split.held_out["test"]
    index = data.offsets[held_out.users + 1] - 1 - held_out.num_after
    settings = config() | {"model": {"model": "mean-rating", "shrink": 5.0}, "protocol": protocol}
    cut = data.timestamp[index].median() if protocol is PROTOCOL else None
    later = data.timestamp >= cut if cut is not None else torch.zeros(len(data.item)).index_fill(0, index, 1) > 0
    rating = torch.where(later, 6 - data.rating, data.rating)
    logits = []
    for ratings in (data.rating, rating):
        changed = Sequences(data.offsets, data.item, data.timestamp, ITEMS, rating=ratings)
        model = build(settings, ITEMS)
        model.fit(changed, split.num_held_out)
        logits.append(evaluation(changed, protocol).predictions(model).logit)
    before = data.timestamp[index] < cut if cut is not None else torch.ones(len(index)) > 0
    assert torch.equal(logits[0][before], logits[1][before])
    assert cut is None or not torch.equal(logits[0], logits[1])


def test_labels_that_leave_nothing_to_rank_are_refused() -> None:
    data = sequences()
    alike = Sequences(data.offsets, data.item, data.timestamp, ITEMS, rating=torch.full_like(data.rating, 5))
    for protocol in (PROTOCOL, OF_USERS):
        for part, held_out in split_sequences(alike, protocol).held_out.items():
            message = f"no user has interactions of both labels in the {part} split, .* a larger {part}_share"
            with pytest.raises(StepError, match=message):
                RankingEvaluation(config() | {"protocol": protocol}, alike, held_out)
    with pytest.raises(StepError, match=r"all ratings that are trained on are below 4\.0, or none"):
        build(config() | {"model": {"model": "mean-rating", "shrink": 5.0}}, ITEMS).fit(alike, torch.zeros(60).long())


def served(ranker: CandidateRanker, data: Sequences, held_out: HeldOut, pieces: int) -> torch.Tensor:
    """The logits of the targets as a request for each user, after histories that came in so many pieces."""
    users = held_out.users.unique().tolist()
    device, start, end = data.item.device, data.offsets.tolist(), data.offsets.tolist()[1:]
    first = {user: end[user] - 1 - int(held_out.num_after[held_out.users == user].max()) for user in users}
    for piece in range(pieces):
        parts = []
        for user in users:
            length = first[user] - start[user]
            parts.append(range(*(start[user] + length * place // pieces for place in (piece, piece + 1))))
        index = torch.tensor([row for part in parts for row in part], dtype=torch.int64, device=device)
        offsets = torch.tensor([0, *(len(part) for part in parts)]).cumsum(0)
        features = {name: values[users] for name, values in data.user_features.items()}
        ranker.append(users, data.item[index], data.rating[index], data.timestamp[index], offsets, features)
    targets = data.offsets[held_out.users + 1] - 1 - held_out.num_after
    offsets = torch.tensor([0, *(int((held_out.users == user).sum()) for user in users)]).cumsum(0)
    time = torch.stack([data.timestamp[first[user] - 1] for user in users])
    return ranker.score(users, data.item[targets], offsets, time, micro_batch=7)


def on(device: str, data: Sequences) -> Sequences:
    tensors = (data.offsets, data.item, data.timestamp, data.rating)
    offsets, item, time, rating = (tensor.to(device) for tensor in tensors)
    return Sequences(offsets, item, time, ITEMS, rating=rating)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("tokens", ["interleaved", "merged", "items"])
@pytest.mark.parametrize("attention", ["silu", "softmax"])
@pytest.mark.parametrize("pieces", [1, 4])
def test_serving_from_kept_histories_is_the_training_path(
    tokens: str, attention: str, pieces: int, device: str
) -> None:
    """In float32 to 1e-5, and in AUC but for a pair or two of nearly equal scores."""
    assert not torch.backends.cuda.matmul.allow_tf32
    data = on(device, sequences(300))
    torch.manual_seed(1)
    settings = config(tokens, attention=attention)
    settings["training"] |= {"max_len": 32}
    settings["protocol"] = OF_USERS
    task = build(settings, ITEMS).eval().to(device)
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.mul_(2)
    held_out = split_sequences(data, OF_USERS).held_out["test"]
    with torch.no_grad():
        trained = RankingEvaluation(settings, data, held_out).predictions(task)
    found = served(CandidateRanker(task, page=4), data, held_out, pieces)
    torch.testing.assert_close(found, trained.logit, rtol=1e-5, atol=1e-5)
    assert float(trained.logit.std()) > 0.01
    one, two = (float(auc(logit, trained.label)) for logit in (found, trained.logit))
    assert one == pytest.approx(two, abs=1e-4)


def in_graphs_and_eagerly(
    settings: dict[str, Any], data: Sequences, folder: Path, compute_dtype: torch.dtype | None
) -> Training:
    """A run of some epochs that is captured, after one of eager steps has come to the same weights."""
    settings["training"] |= {"epochs": 4, "schedule": "one-pass"}
    torch.use_deterministic_algorithms(True)
    try:
        runs = [Training(settings, data, "0" * 64, folder / mode, compute_dtype, mode) for mode in ("graph", "eager")]
        for run in runs:
            for _, failure in train_together([run]):
                assert failure is None
    finally:
        torch.use_deterministic_algorithms(False)
    assert runs[0].record()["captured"]
    for name, values in runs[0].model.state_dict().items():
        torch.testing.assert_close(values, runs[1].model.state_dict()[name], rtol=1e-4, atol=1e-5)
    return runs[0]


@pytest.mark.gpu
@pytest.mark.parametrize("protocol", [PROTOCOL, OF_USERS])
@pytest.mark.parametrize("tokens", ["interleaved", "merged", "items"])
def test_training_and_evaluation_are_graphs_that_do_what_eager_steps_do(
    tokens: str, protocol: dict[str, Any], tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    data = on("cuda", sequences(300))
    settings = config(tokens) | {"protocol": protocol}
    run = in_graphs_and_eagerly(settings, data, tmp_path, torch.bfloat16)
    assert "without a CUDA graph" not in capsys.readouterr().out
    best = min(run.history, key=lambda line: line["valid/ne"])
    with run.stream.active():
        anew = RankingEvaluation(settings, data, run.split.held_out["valid"])
        found = anew.named(anew(run.model))
    assert found == pytest.approx({name: best[f"valid/{name}"] for name in found}, abs=2e-6)


def test_who_has_no_history_is_not_ranked() -> None:
    ranker = CandidateRanker(make("merged"))
    with pytest.raises(ValueError, match="user 3 has no history: append at least one interaction first"):
        ranker.score([3], torch.tensor([1]), torch.tensor([0, 1]), torch.tensor([0]))
    with pytest.raises(ValueError, match="of HSTU alone, and this is a SASRec"):
        CandidateRanker(make("merged", "sasrec"))


@pytest.mark.parametrize("tokens", ["interleaved", "merged", "items"])
def test_what_cannot_be_ranked_is_refused_and_changes_nothing(tokens: str) -> None:
    ranker = CandidateRanker(make(tokens))
    users, offsets = [7, 8, 9], torch.tensor([0, 2, 2, 4])
    given = {"items": [3, 1, 4, ITEMS], "ratings": [4.0, 2.0, 5.0, 1.0], "timestamps": [10, 10, 30, 40]}

    def append(**changes: list[Any]) -> None:
        ranker.append(users, *(torch.tensor(values) for values in (given | changes).values()), offsets)

    def score(candidates: list[int], time: list[int]) -> torch.Tensor:
        return ranker.score([7, 9], torch.tensor(candidates), torch.tensor([0, 1, 3]), torch.tensor(time))

    faults: list[tuple[dict[str, list[Any]], str]] = [
        (
            {"ratings": [4.0, 2.0, 5.0, float("nan")]},
            "user 9: the rating of item 40 is nan: leave out what is not rated",
        ),
        ({"items": [3, 0, 4, 1]}, "user 7: item 0 is not in the catalogue: give items from 1 to 40"),
        ({"items": [3, 1, ITEMS + 1, 1]}, "user 9: item 41 is not in the catalogue: give items from 1 to 40"),
        ({"timestamps": [10, 10, 30, 29]}, "user 9: an interaction at 29 follows one at 30: append them in the order"),
        ({"ratings": [4.0]}, "4 items, 1 ratings, 4 timestamps, and offsets end at 4"),
    ]
    for changes, message in faults:
        with pytest.raises(ValueError, match=message):
            append(**changes)
    assert not ranker.cache.lengths
    append()
    expected = score([5, 6, 7], [10, 40])
    with pytest.raises(ValueError, match="user 7: an interaction at 9 follows one at 10: append them in the order"):
        append(timestamps=[9, 10, 40, 40])
    with pytest.raises(ValueError, match="user 9: the request's time 39 is before the last interaction's, 40"):
        score([5, 6, 7], [10, 39])
    for item in (0, ITEMS + 1):
        with pytest.raises(ValueError, match=f"user 9: item {item} is not in the catalogue"):
            score([5, 6, item], [10, 40])
    assert torch.equal(score([5, 6, 7], [10, 40]), expected)
    # Who was forgotten begins anew.
    ranker.evict([7, 9])
    with pytest.raises(ValueError, match="user 7 has no history"):
        score([5, 6, 7], [10, 40])
    append()
    torch.testing.assert_close(score([5, 6, 7], [10, 40]), expected)


@pytest.mark.parametrize("tokens", ["interleaved", "merged"])
def test_arguments_of_another_kind_are_named_and_change_nothing(tokens: str) -> None:
    ranker = CandidateRanker(make(tokens))
    one, two = torch.tensor([0, 1]), torch.tensor([0, 2])
    given: dict[str, Any] = {
        "users": [7], "items": torch.tensor([3, 1]), "ratings": torch.tensor([4, 2]),
        "timestamps": torch.tensor([10, 20]), "offsets": two,
    }  # fmt: skip
    ranker.append(**given)
    asked: dict[str, Any] = {
        "users": [7], "candidates": torch.tensor([5]), "offsets": one, "time": torch.tensor([20])
    }  # fmt: skip
    expected = ranker.score(**asked)
    names: list[tuple[Any, str]] = [
        ([7.9], "users must be whole numbers of 64 bits, not 7.9"),
        ("7", "users must be whole numbers of 64 bits, not '7'"),
        ([True], "users must be whole numbers of 64 bits, not True"),
        (7, "users must be a sequence of whole numbers, not 7"),
    ]
    for users, message in names:
        for call in (
            lambda users=users: ranker.append(**given | {"users": users}),
            lambda users=users: ranker.score(**asked | {"users": users}),
            lambda users=users: ranker.evict(users),
        ):
            with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
                call()
    for changes, message in (
        ({"items": [3, 1]}, "items must be a tensor (T,) int64, one for every interaction, not a list"),
        ({"ratings": None}, "ratings must be a tensor (T,), one for every interaction, not None"),
        ({"ratings": torch.ones(2).to("meta")}, "ratings must be on cpu, as the encoder is, not on meta"),
        ({"timestamps": torch.ones(2)}, "timestamps must be a tensor (T,) int64, one for every interaction, not (2,) "
                                        "float32"),
        ({"offsets": [0, 2]}, "offsets must be a tensor (2,) int64, one more than the users, not a list"),
        ({"offsets": torch.tensor([1, 2])}, "offsets must rise from 0 to the 2 interactions, not be [1, 2]"),
        ({"users": [7, 8, 9], "offsets": torch.tensor([0, 2, 1, 2])},
         "offsets must rise from 0 to the 2 interactions, not be [0, 2, 1, 2]"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            ranker.append(**given | changes)
    for changes, message in (
        ({"candidates": [5]}, "candidates must be a tensor (T,) int64, one for every candidate, not a list"),
        ({"time": [20]}, "time must be a tensor (T,) int64, one for every user, not a list"),
        ({"time": torch.tensor([20]).to("meta")}, "time must be on cpu, as the encoder is, not on meta"),
        ({"offsets": None}, "offsets must be a tensor (2,) int64, one more than the users, not None"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            ranker.score(**asked | changes)
    assert list(ranker.cache.lengths) == [7]
    assert torch.equal(ranker.score(**asked), expected)
    ranker.append(**given | {"timestamps": torch.tensor([20, 30])})
    ranker.evict([7])
    ranker.append(**given)  # whose latest time is forgotten too
    torch.testing.assert_close(ranker.score(**asked), expected)


def test_the_page_s_example_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs/ranking.md").read_text("utf-8"), re.M | re.S)
    (block,) = (one for one in blocks if "ranker.append" in one)
    exec(block, {})  # noqa: S102
    promised = re.findall(r"^print\(.*\)  # (.*)$", block, re.MULTILINE)
    assert promised
    assert capsys.readouterr().out.splitlines() == promised
