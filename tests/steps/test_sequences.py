"""Windows of sequences, against slicing Python lists."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from steps.common.cli import StepError
from steps.common.files import sha256, write_json
from steps.data.sequences import Sequences, StaticShape, load_sequences
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


def rated() -> Sequences:
    """Users of 4 and 3 interactions; items 1 to 5; the first rating is missing."""
    return Sequences(
        torch.tensor([0, 4, 7]),
        torch.tensor([1, 3, 5, 2, 4, 1, 3]),
        torch.arange(7),
        5,
        rating=torch.tensor([float("nan"), 3.0, 5.0, 1.0, 4.0, 2.0, 3.5]),
        user_features={"gender": torch.tensor([2, 1], dtype=torch.int32)},
        item_features={
            "decade": torch.tensor([0, 3, 1, 2, 1, 3], dtype=torch.int32),
            "genres": torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1], [0, 1], [1, 0]], dtype=torch.uint8),
        },
    )


def test_ratings_and_features_of_a_batch_are_its_tokens() -> None:
    batch = rated().batch(torch.tensor([1, 0]), torch.tensor([0, 1]), 5)
    assert batch.item.tolist() == [4, 1, 1, 3]
    torch.testing.assert_close(batch.rating, torch.tensor([4.0, 2.0, float("nan"), 3.0]), equal_nan=True)
    assert batch.next_rating.tolist() == [2.0, 3.5, 3.0, 5.0]
    assert batch.user_features["gender"].tolist() == [1, 2]
    assert batch.item_features["decade"].tolist() == [1, 3, 3, 2]
    assert batch.item_features["genres"].tolist() == [[0, 1], [1, 0], [1, 0], [1, 1]]
    assert (batch.rating.dtype, batch.item_features["genres"].dtype) == (torch.float32, torch.uint8)


def test_padding_has_zeros_for_ratings_and_features() -> None:
    batch = rated().padded_batch(torch.tensor([1, 0]), torch.tensor([0, 1]), StaticShape(2, 7, 4, 2))
    assert batch.item.tolist() == [4, 1, 1, 3, 0, 0, 0]
    torch.testing.assert_close(batch.rating, torch.tensor([4.0, 2.0, float("nan"), 3.0, 0, 0, 0]), equal_nan=True)
    assert batch.next_rating.tolist() == [2.0, 3.5, 3.0, 5.0, 0.0, 0.0, 0.0]
    assert batch.user_features["gender"].tolist() == [1, 2]
    assert batch.item_features["decade"].tolist() == [1, 3, 3, 2, 0, 0, 0]
    assert batch.item_features["genres"].tolist()[4:] == [[0, 0]] * 3


def test_a_batch_looks_up_no_rating_or_feature_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    sequences = rated()
    for name in ("rating", "user_features", "item_features"):
        monkeypatch.delattr(sequences, name)
    sequences.batch(torch.tensor([1, 0]), torch.tensor([0, 1]), 5)
    sequences.padded_batch(torch.tensor([1, 0]), torch.tensor([0, 1]), StaticShape(2, 7, 4, 2))


def test_data_without_ratings_say_so() -> None:
    sequences, _ = make([4, 3])
    batch = sequences.batch(torch.tensor([0]), torch.tensor([0]), 3)
    for name in ("rating", "next_rating"):
        with pytest.raises(ValueError, match="the data set has no ratings"):
            getattr(batch, name)
    assert (batch.user_features, batch.item_features) == ({}, {})


def test_features_are_loaded_with_the_sequences_that_name_them(tmp_path: Path) -> None:
    folder = write_processed(tmp_path / "mine", [5, 6], 6)
    path, manifest = folder / "features.safetensors", folder / "manifest.json"
    genres = torch.tensor([[0, 0]] + [[1, 0]] * 6, dtype=torch.uint8)
    save_file({"user/a/b": torch.tensor([1, 2], dtype=torch.int32), "item/genres": genres}, path)
    before, digest = load_sequences(folder, torch.device("cpu"))  # the manifest does not name the file
    assert (before.rating, before.user_features, before.item_features) == (None, {}, {})
    write_json(manifest, json.loads(manifest.read_text()) | {"features_sha256": sha256(path)})
    found, again = load_sequences(folder, torch.device("cpu"))
    assert again == digest
    assert {name: values.tolist() for name, values in found.user_features.items()} == {"a/b": [1, 2]}
    assert {name: values.tolist() for name, values in found.item_features.items()} == {"genres": genres.tolist()}
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    with pytest.raises(StepError, match=r"features\.safetensors is not the file that .*preprocess again"):
        load_sequences(folder, torch.device("cpu"))
    path.unlink()
    with pytest.raises(StepError, match=r"features\.safetensors, which .* is missing; run preprocess again"):
        load_sequences(folder, torch.device("cpu"))
