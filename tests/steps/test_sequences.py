"""Windows of sequences, against slicing Python lists."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steps.common.cli import StepError
from steps.data.sequences import Sequences, load_sequences
from tests.conftest import write_processed


def make(lengths: list[int]) -> tuple[Sequences, list[list[int]]]:
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    item = torch.arange(1, sum(lengths) + 1)
    return Sequences(offsets, item, item * 10, sum(lengths)), [part.tolist() for part in item.split(lengths)]


@given(st.lists(st.integers(4, 12), min_size=1, max_size=6), st.integers(0, 2), st.integers(1, 6), st.randoms())
@settings(max_examples=60, deadline=None)
def test_windows_are_slices(lengths: list[int], dropped: int, max_len: int, random) -> None:
    sequences, lists = make(lengths)
    users = random.sample(range(len(lengths)), len(lengths))
    num_dropped = torch.full((len(users),), dropped)
    batch = sequences.batch(torch.tensor(users), num_dropped, max_len)
    windows = [lists[user][: len(lists[user]) - dropped][-max_len - 1 :] for user in users]
    assert batch.item.tolist() == [item for window in windows for item in window[:-1]]
    assert batch.next_item.tolist() == [item for window in windows for item in window[1:]]
    assert batch.timestamp.tolist() == [10 * item for window in windows for item in window[:-1]]
    assert batch.next_timestamp.tolist() == [10 * item for window in windows for item in window[1:]]
    assert batch.offsets.diff().tolist() == [len(window) - 1 for window in windows]
    assert batch.max_len == max(len(window) for window in windows) - 1
    assert batch.next_item[batch.last].tolist() == [window[-1] for window in windows]
    index, item = sequences.histories(torch.tensor(users), num_dropped)
    histories = [(i, one) for i, user in enumerate(users) for one in lists[user][: len(lists[user]) - dropped - 1]]
    assert list(zip(index.tolist(), item.tolist(), strict=True)) == histories


def test_counts_leave_out_the_dropped_interactions() -> None:
    sequences = Sequences(torch.tensor([0, 3, 5]), torch.tensor([1, 2, 3, 2, 1]), torch.arange(5), 4)
    assert sequences.counts(torch.tensor([0, 0])).tolist() == [0, 2, 2, 1, 0]
    assert sequences.counts(torch.tensor([1, 1])).tolist() == [0, 1, 2, 0, 0]
    assert sequences.counts(torch.tensor([3, 0])).tolist() == [0, 1, 1, 0, 0]


def test_users_with_nothing_to_predict_are_not_trained_on() -> None:
    sequences, _ = make([2, 3, 4, 9])
    assert sequences.trainable_users(torch.full((4,), 2)).tolist() == [2, 3]


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    folder = write_processed(tmp_path / "mine", [5, 6], 20)
    sequences, digest = load_sequences(folder, torch.device("cpu"))
    assert (sequences.num_users, sequences.num_items, len(digest)) == (2, 20, 64)
    path = folder / "sequences.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    with pytest.raises(StepError, match="preprocess again"):
        load_sequences(folder, torch.device("cpu"))
    path.unlink()
    with pytest.raises(StepError, match=r"sequences\.safetensors, which .* is missing"):
        load_sequences(folder, torch.device("cpu"))
