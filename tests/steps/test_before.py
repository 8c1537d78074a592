"""What is known before a moment, against counting by hand and by loops."""

import pytest
import torch

from steps.data.before import SHRINKAGE, Before, before_of
from steps.data.sequences import Sequences


def by_hand() -> Sequences:
    """Users 0 and 1; at time 20 both rate item 1."""
    nan = float("nan")
    return Sequences(
        torch.tensor([0, 3, 6]),
        torch.tensor([1, 2, 1, 1, 2, 2]),
        torch.tensor([10, 10, 20, 20, 30, 40]),
        3,
        rating=torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0, nan]),
    )


def test_by_hand() -> None:
    before = Before(by_hand(), 4.0)
    item, time = torch.tensor([1, 2, 1, 1, 2, 3, 1]), torch.tensor([10, 11, 20, 21, 35, 99, 5])
    ratings, engagements, deviation = before.items(item, time)
    assert ratings.tolist() == [0, 1, 1, 3, 2, 0, 0]
    assert engagements.tolist() == [0, 0, 1, 2, 0, 0, 0]
    # The mean of all: 3 of two ratings at 11 and 20, 3 of four at 21, 3 of five at 35.
    expected = [0, -2 / 11, 2 / 11, 2 / 13, -2 / 12, 0, 0]
    torch.testing.assert_close(deviation, torch.tensor(expected))
    ratings, engagements, deviation = before.users(torch.tensor([0, 0, 1, 1, 1]), torch.tensor([10, 20, 20, 40, 10**6]))
    assert ratings.tolist() == [0, 2, 0, 2, 2]  # the missing one is not counted
    assert engagements.tolist() == [0, 1, 0, 0, 0]
    torch.testing.assert_close(deviation, torch.tensor([0, 0, 0, -1 / 12, -1 / 12]))


def random_sequences(seed: int = 0) -> Sequences:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (30,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    item = torch.randint(1, 9, (int(lengths.sum()),), generator=generator)
    # Few times, so that many are equal.
    time = torch.cat([torch.randint(0, 25, (int(n),), generator=generator).sort().values for n in lengths])
    rating = torch.randint(1, 6, item.shape, generator=generator).float()
    return Sequences(offsets, item, time, 9, rating=rating)


def test_equals_loops() -> None:
    data = random_sequences()
    user = torch.repeat_interleave(torch.arange(30), data.offsets.diff())
    before = Before(data, 4.0)
    for group, found in (
        (data.item, before.items(data.item, data.timestamp)),
        (user, before.users(user, data.timestamp)),
    ):
        for place in range(len(group)):
            earlier = data.timestamp < data.timestamp[place]
            own = earlier & (group == group[place])
            assert float(found.ratings[place]) == int(own.sum())
            assert float(found.engagements[place]) == int((data.rating[own] >= 4).sum())
            expected = (data.rating[own] - data.rating[earlier].mean()).sum() / (own.sum() + SHRINKAGE)
            torch.testing.assert_close(found.deviation[place], expected, rtol=1e-5, atol=1e-6)


def test_the_present_and_the_future_change_nothing() -> None:
    data = random_sequences()
    assert data.rating is not None
    now = 12
    later = data.timestamp >= now
    generator = torch.Generator().manual_seed(1)
    places = torch.nonzero(later)[:, 0]
    shuffled = places[torch.randperm(len(places), generator=generator)]
    item, rating = data.item.clone(), data.rating.clone()
    item[places], rating[places] = item[shuffled], 6 - rating[shuffled]
    changed = Sequences(data.offsets, item, data.timestamp, 9, rating=rating)
    everything = torch.arange(10), torch.full((10,), now)
    for one, other in ((Before(data, 4.0), Before(changed, 4.0)),):
        for expected, found in zip(one.items(*everything), other.items(*everything), strict=True):
            assert torch.equal(expected, found)
        for expected, found in zip(one.users(*everything), other.users(*everything), strict=True):
            assert torch.equal(expected, found)
    beyond = torch.arange(10), torch.full((10,), now + 1)
    assert not torch.equal(
        Before(data, 4.0).items(*beyond).engagements, Before(changed, 4.0).items(*beyond).engagements
    )


def test_held_out_users_count_for_themselves_alone_and_their_targets_for_nobody() -> None:
    """Of a split by users; user 0's number hashes to 0, so it is the test user, with its last row as target."""
    protocol = {"task": "ranking", "split": "users", "report": "best", "positive": 4.0, "targets": 1}
    protocol |= {"test_share": 0.3, "valid_share": 0.0}
    before = before_of(by_hand(), protocol)
    late = torch.full((2,), 99)
    items, users = before.items(torch.tensor([1, 2]), late), before.users(torch.tensor([0, 1]), late)
    assert items.ratings.tolist() == [1, 1]  # by user 1; the missing one is not counted
    assert items.engagements.tolist() == [0, 0]
    assert users.ratings.tolist() == [2, 2]
    assert users.engagements.tolist() == [1, 0]
    # The mean of all is that of 2 and 3.
    torch.testing.assert_close(items.deviation, torch.tensor([-0.5, 0.5]) / 11)
    torch.testing.assert_close(users.deviation, torch.tensor([1.0, 0.0]) / 12)
    by_time = before_of(by_hand(), protocol | {"split": "temporal"})
    assert by_time.items(torch.tensor([1, 2]), late).ratings.tolist() == [3, 2]


def test_one_is_kept_of_sequences_and_what_is_an_engagement() -> None:
    data, other = by_hand(), by_hand()
    protocol = {"split": "temporal", "positive": 4.0}
    with torch.inference_mode():
        first = before_of(data, protocol)
    assert before_of(data, dict(protocol)) is first
    query = torch.tensor([1]), torch.tensor([21])
    assert before_of(data, protocol | {"positive": 2.0}).items(*query).engagements.tolist() == [3]
    assert before_of(other, protocol) is not first
    assert not first.items(*query).deviation.is_inference()


def test_what_cannot_be_counted_is_refused() -> None:
    data = by_hand()
    with pytest.raises(ValueError, match="no ratings"):
        Before(Sequences(data.offsets, data.item, data.timestamp, 3), 4.0)
    with pytest.raises(ValueError, match="too large"):
        Before(Sequences(data.offsets, data.item, data.timestamp * 10**17, 3, rating=data.rating), 4.0)
