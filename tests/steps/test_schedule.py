"""Schedules: what an epoch goes over, in which order, and that its padded steps are the readable loop's."""

from collections.abc import Iterator

import pytest
import torch

from steps.common.cli import StepError
from steps.common.params import ROOT
from steps.common.typed import EntryError
from steps.common.yaml_files import read as read_yaml
from steps.data.sequences import Batch, Sequences
from steps.models import ENCODERS
from steps.tasks import losses
from steps.tasks.masked_items import Masking
from steps.tasks.sessions import Sessions
from steps.training.optimizers import make_optimizer
from steps.training.schedule import OnePass, Schedule
from tests.steps import twins
from tests.steps.test_models import make, schedule_of, sequences

LENGTHS = [9, 3, 14, 2, 25, 7, 1]


def batches(schedule: Schedule) -> Iterator[Batch]:
    for shape, inputs in schedule.epoch():
        yield schedule.batch(shape, inputs)


def targets(data: Sequences, one: Batch) -> list[tuple[int, int]]:
    """Of every real token: its user, and the place of its target among the user's interactions."""
    assert one.token_mask is not None
    index = one.index[one.token_mask] + 1
    user = torch.searchsorted(data.offsets, index, right=True) - 1
    return list(zip(user.tolist(), (index - data.offsets[user]).tolist(), strict=True))


def test_windows_are_every_user_s_latest_targets_once() -> None:
    data, num_held_out = sequences(LENGTHS), torch.tensor([1, 0, 2, 0, 1, 6, 0])
    schedule = schedule_of(make("hstu"), data, num_held_out, max_len=6)
    found = [target for one in batches(schedule) for target in targets(data, one)]
    expected = []
    for user, (length, dropped) in enumerate(zip(LENGTHS, num_held_out.tolist(), strict=True)):
        kept = length - dropped
        expected += [(user, place) for place in range(max(1, kept - 6), kept)]
    assert sorted(found) == expected
    torch.manual_seed(0)
    first = [one.user.tolist() for one in batches(schedule)]
    torch.manual_seed(1)
    assert [one.user.tolist() for one in batches(schedule)] != first


def test_one_pass_predicts_every_interaction_once_in_the_order_of_time() -> None:
    data, num_held_out = sequences(LENGTHS), torch.tensor([1, 0, 2, 0, 1, 6, 0])
    data.timestamp = torch.randint(0, 10**6, (len(data.item),))
    for start, end in zip(data.offsets[:-1].tolist(), data.offsets[1:].tolist(), strict=True):
        data.timestamp[start:end] = data.timestamp[start:end].sort().values
    schedule = schedule_of(make("hstu"), data, num_held_out, max_len=6, schedule="one-pass")
    assert isinstance(schedule, OnePass)
    found, ends = [], []
    for one in batches(schedule):
        found += targets(data, one)
        ends += one.next_timestamp[one.last].tolist()
        assert one.offsets.diff()[: len(one.user)].max() <= 6
    expected = []
    for user, (length, dropped) in enumerate(zip(LENGTHS, num_held_out.tolist(), strict=True)):
        expected += [(user, place) for place in range(1, length - dropped)]
    assert sorted(found) == expected
    assert ends == sorted(ends)


@pytest.mark.parametrize(
    ("name", "schedule", "known"),
    [("gru4rec", "windows", "sessions, one-pass"), ("bert4rec", "one-pass", "windows")],
)
def test_a_model_takes_only_schedules_that_train_it(name: str, schedule: str, known: str) -> None:
    data = sequences([4, 5])
    with pytest.raises(EntryError, match=f"key training.schedule: '{schedule}' does not fit: .* trained on {known}$"):
        schedule_of(make(name), data, torch.zeros(2, dtype=torch.int64), schedule=schedule)


def test_one_pass_event_by_event_predicts_every_interaction_once_in_the_order_of_time() -> None:
    """Users 0 to 3 end at times 4, 1, 3, 2; their windows have at most 2 targets; two lanes."""
    data = sequences([3, 4, 2, 3])
    data.item = torch.arange(1, 13)
    data.timestamp = torch.tensor([4, 4, 4, 1, 1, 1, 1, 3, 3, 2, 2, 2])
    none = torch.zeros(4, dtype=torch.int64)
    schedule = schedule_of(make("gru4rec"), data, none, batch=2, max_len=2, schedule="one-pass")
    events = torch.cat([step.inputs for step in schedule.epoch()])
    # User 1 in two windows, of equal times, in two lanes; user 3 goes on in the shorter one, then user 2, then user 0.
    assert events[:, 0].T.tolist() == [[5, 6, 8, 1, 2], [4, 10, 11, 0, 0]]
    assert events[:, 1].T.tolist() == [[6, 7, 9, 2, 3], [5, 11, 12, 0, 0]]


def test_data_without_a_pair_of_interactions_cannot_be_trained_on() -> None:
    data = sequences([2, 3])
    with pytest.raises(StepError, match="nothing to train on"):
        schedule_of(make("hstu"), data, torch.tensor([1, 2]))


@pytest.mark.parametrize(
    "name",
    ["hstu", "hstu-softmax", "sasrec", "ligr", "fuxi-alpha", "fuxi-gamma", "transformer++", "bert4rec", "gru4rec"],
)
def test_an_epoch_ends_with_the_weights_of_the_readable_loop(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, without dropout, and with the same draws in both."""
    data, num_held_out = sequences(LENGTHS), torch.tensor([1, 0, 2, 0, 1, 6, 0])
    torch.manual_seed(2)
    sampled = torch.randint(1, 61, (5000, 7))
    monkeypatch.setattr(losses, "_sample_negatives", lambda tokens, count, *_: sampled[:tokens, :count])
    popular = data.item[data.offsets[4] : data.offsets[4] + 15].repeat(2)  # which are trained on
    monkeypatch.setattr(torch, "multinomial", lambda *_, **__: popular)
    monkeypatch.setattr(torch, "searchsorted", _with_samples(torch.searchsorted, popular))
    monkeypatch.setattr(
        Masking,
        "sample",
        lambda _, last, layout, *__: (
            (torch.arange(len(last)) % 3 == 0) & (torch.arange(len(last)) < int(layout.offsets[-1]))
        ),
    )
    ends = []
    for padded in (True, False):
        task = make(name)  # in evaluation mode
        optimizer = make_optimizer(task)
        schedule = schedule_of(task, data, num_held_out, max_len=6)
        torch.manual_seed(3)
        order = torch.randperm(len(schedule.lengths))
        users = schedule.windows[0, order]
        if padded:
            torch.manual_seed(3)
            found = (
                task.loss(schedule.batch(shape, micro_step))
                for shape, inputs in schedule.epoch()
                for micro_step in schedule.micro_steps(inputs)
            )
        else:
            twin = twins.session_losses if isinstance(task, Sessions) else twins.window_losses
            found = twin(task, data, users, num_held_out, 6, 3)
        for loss in found:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        ends.append({key: parameter.detach() for key, parameter in task.named_parameters()})
    start = dict(make(name).named_parameters())
    for key, parameter in ends[0].items():
        torch.testing.assert_close(parameter, ends[1][key], rtol=0, atol=1e-7, msg=key)
    assert max(float((parameter - start[key].detach()).abs().max()) for key, parameter in ends[0].items()) > 1e-3


def _with_samples(searchsorted, samples: torch.Tensor):
    """torch.searchsorted, but for the draw of negatives from a cumulative distribution."""

    def patched(table: torch.Tensor, values: torch.Tensor, **options: bool) -> torch.Tensor:
        is_draw = len(values) == len(samples) and values.is_floating_point()
        return samples if is_draw else searchsorted(table, values, **options)

    return patched


def test_the_schema_of_models_and_the_typed_configs_have_the_same_keys() -> None:
    schema = read_yaml(ROOT / "schemas/models.yaml")["$defs"]
    shapes = {"dim", "blocks", "heads", "dqk", "dv"}
    tasks = {"bert4rec": {"mask_prob", "last_only", "output_layer"}, "gru4rec": {"samples", "sample_alpha", "logq"}}
    for name, (_, config) in ENCODERS.items():
        of_schema = set(schema[{"transformer++": "transformer"}.get(name, name)]["properties"])
        own = {field for field in config.__dataclass_fields__ if field not in shapes} | tasks.get(name, set())
        others = {"label", "model", "shape", "training", "loss", "optimizer", "items"}
        assert of_schema - others - shapes == own, name  # some rows may say their sizes themselves
