"""Both splits, against loops over users."""

import pytest
import torch

from steps.common.cli import StepError
from steps.data.sequences import Sequences
from steps.data.split import hold_out


def sequences(seed: int = 0, users: int = 30) -> tuple[Sequences, list[list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 15, (users,), generator=generator)
    times = [torch.randint(0, 1000, (int(n),), generator=generator).sort().values for n in lengths]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    item = torch.arange(1, int(lengths.sum()) + 1)
    return Sequences(offsets, item, torch.cat(times), len(item)), [part.tolist() for part in times]


@pytest.mark.parametrize(("report", "held"), [("last", 1), ("best", 2)])
def test_leave_last_out_holds_out_the_last_rows(report: str, held: int) -> None:
    data, lists = sequences()
    found = hold_out(data, {"split": "leave-last-out", "report": report})
    assert found.train_drop.tolist() == [held] * 30
    assert list(found.questions) == ["test", "valid"][:held]
    assert found.watched == ("valid" if held == 2 else "test")
    for drop, split in enumerate(found.questions):
        assert found.questions[split].users.tolist() == list(range(len(lists)))
        assert found.questions[split].drop.tolist() == [drop] * 30


@pytest.mark.parametrize("report", ["last", "best"])
def test_the_temporal_split_has_one_clock(report: str) -> None:
    data, lists = sequences()
    protocol = {"split": "temporal", "report": report, "test_share": 0.2, "valid_share": 0.2}
    found = hold_out(data, protocol)
    every = sorted(time for times in lists for time in times)
    test_start = every[int(len(every) * 0.8)]
    train_end = every[int(len(every) * 0.6)] if report == "best" else test_start
    expected = {"test": [], "valid": []}
    for user, times in enumerate(lists):
        assert found.train_drop[user] == sum(time >= train_end for time in times)
        in_test = sum(time >= test_start for time in times)
        in_valid = sum(train_end <= time < test_start for time in times)
        if in_test and len(times) > 1:
            expected["test"].append((user, 0))
        if in_valid and len(times) - in_test > 1:
            expected["valid"].append((user, in_test))
    for split, questions in found.questions.items():
        assert list(zip(questions.users.tolist(), questions.drop.tolist(), strict=True)) == expected[split]
        batch = data.batch(questions.users, questions.drop, 5)
        start, end = {"test": (test_start, 10**9), "valid": (train_end, test_start)}[split]
        assert ((batch.next_timestamp[batch.last] >= start) & (batch.next_timestamp[batch.last] < end)).all()
    assert ("valid" in found.questions) == (report == "best")
    # Nothing that is trained on is as late as anything that is asked.
    users = data.trainable_users(found.train_drop)
    trained = data.batch(users, found.train_drop[users], 100)
    assert int(trained.next_timestamp.max()) < train_end


@pytest.mark.parametrize("times", [[5, 5, 5], [1, 9, 9]])
def test_a_period_that_nobody_has_a_row_in_is_named(times: list[int]) -> None:
    data = Sequences(torch.tensor([0, 3, 6]), torch.arange(1, 7), torch.tensor(times * 2), 6)
    protocol = {"split": "temporal", "report": "best", "test_share": 0.3, "valid_share": 0.3}
    with pytest.raises(StepError, match=r"no user has a row in the valid period.*valid_share"):
        hold_out(data, protocol)
