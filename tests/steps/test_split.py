"""The splits, against loops over users."""

import pytest
import torch

from steps.common.cli import StepError
from steps.data.sequences import Sequences
from steps.data.split import split_sequences


def sequences(seed: int = 0, users: int = 30) -> tuple[Sequences, list[list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 15, (users,), generator=generator)
    times = [torch.randint(0, 1000, (int(n),), generator=generator).sort().values for n in lengths]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    item = torch.arange(1, int(lengths.sum()) + 1)
    return Sequences(offsets, item, torch.cat(times), len(item)), [part.tolist() for part in times]


@pytest.mark.parametrize(("report", "held"), [("last", 1), ("best", 2)])
def test_leave_last_out_holds_out_the_last_interactions(report: str, held: int) -> None:
    data, lists = sequences()
    found = split_sequences(data, {"split": "leave-last-out", "report": report})
    assert found.num_held_out.tolist() == [held] * 30
    assert [held_out.part for held_out in found.held_out.values()] == list(found.held_out) == ["test", "valid"][:held]
    assert found.eval_part == ("valid" if held == 2 else "test")
    for num_after, held_out in enumerate(found.held_out.values()):
        assert held_out.users.tolist() == list(range(len(lists)))
        assert held_out.num_after.tolist() == [num_after] * 30


@pytest.mark.parametrize("report", ["last", "best"])
def test_the_temporal_split_has_one_clock(report: str) -> None:
    data, lists = sequences()
    protocol = {"split": "temporal", "report": report, "test_share": 0.2, "valid_share": 0.2}
    found = split_sequences(data, protocol)
    all_times = sorted(time for times in lists for time in times)
    test_start = all_times[int(len(all_times) * 0.8)]
    train_end = all_times[int(len(all_times) * 0.6)] if report == "best" else test_start
    expected = {"test": [], "valid": []}
    for user, times in enumerate(lists):
        assert found.num_held_out[user] == sum(time >= train_end for time in times)
        in_test = sum(time >= test_start for time in times)
        in_valid = sum(train_end <= time < test_start for time in times)
        if in_test and len(times) > 1:
            expected["test"].append((user, 0))
        if in_valid and len(times) - in_test > 1:
            expected["valid"].append((user, in_test))
    for name, held_out in found.held_out.items():
        assert list(zip(held_out.users.tolist(), held_out.num_after.tolist(), strict=True)) == expected[name]
        batch = data.batch(held_out.users, held_out.num_after, 5)
        start, end = {"test": (test_start, 10**9), "valid": (train_end, test_start)}[name]
        assert ((batch.next_timestamp[batch.last] >= start) & (batch.next_timestamp[batch.last] < end)).all()
    assert ("valid" in found.held_out) == (report == "best")
    # All that is trained on is earlier than all that is held out.
    users = data.trainable_users(found.num_held_out)
    trained = data.batch(users, found.num_held_out[users], 100)
    assert int(trained.next_timestamp.max()) < train_end


@pytest.mark.parametrize("times", [[5, 5, 5], [1, 9, 9]])
def test_a_period_without_any_row_is_named(times: list[int]) -> None:
    data = Sequences(torch.tensor([0, 3, 6]), torch.arange(1, 7), torch.tensor(times * 2), 6)
    protocol = {"split": "temporal", "report": "best", "test_share": 0.3, "valid_share": 0.3}
    with pytest.raises(StepError, match=r"no user has a row in the valid period.*valid_share"):
        split_sequences(data, protocol)


def test_users_are_held_out_by_their_numbers() -> None:
    """Multiples of 0.618 without their whole part: .00 .62 .24 .85 .47 .09 .71 .33 .94 .56."""
    data, lists = sequences(users=10)
    protocol = {"task": "ranking", "split": "users", "report": "best", "test_share": 0.25, "valid_share": 0.1}
    found = split_sequences(data, protocol | {"targets": 4})
    lengths = [len(times) for times in lists]
    assert found.num_held_out.tolist() == [n if user in (0, 2, 5, 7) else 0 for user, n in enumerate(lengths)]
    for name, users in (("test", (0, 2, 5)), ("valid", (7,))):
        held_out = found.held_out[name]
        expected = [(user, after) for user in users for after in reversed(range(min(4, lengths[user] - 1)))]
        assert list(zip(held_out.users.tolist(), held_out.num_after.tolist(), strict=True)) == expected


def test_a_part_without_any_user_is_named() -> None:
    data = Sequences(torch.tensor([0, 3, 6]), torch.arange(1, 7), torch.arange(6), 6)
    protocol = {"task": "ranking", "split": "users", "report": "best", "test_share": 0.3, "valid_share": 0.1}
    with pytest.raises(StepError, match=r"no user with two rows is held out for valid.*valid_share"):
        split_sequences(data, protocol | {"targets": 4})
