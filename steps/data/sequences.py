"""Processed sequences in memory, and the windows of them that models read.

Needs torch and safetensors alone.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from kernels.jagged import naive, offsets_from_lengths, to_padded
from kernels.jagged.naive import sequence_and_position
from steps.common.files import read_json, reading
from steps.common.provenance import require_files
from steps.data.stochastic_length import Rule, chosen_positions


@dataclass(frozen=True)
class Part:
    """Which of a batch's tokens these are, where several processes have a part each.

    num_tokens: of the whole batch, with its padding. place: (T,) int64, where each token stands in the whole batch; 0
    for padding. draws: a generator that is in the same state in all processes.
    """

    num_tokens: int
    place: torch.Tensor
    draws: torch.Generator


@dataclass(frozen=True)
class Batch:
    """Windows of several users, jagged: T tokens in S sequences. Each token predicts the next one of its user.

    item, timestamp, next_item, next_timestamp: (T,) int64. offsets: (S + 1,) int64. sequence_id, position: (T,) int64,
    the window that a token belongs to, and its position there. max_len: at least the longest window. user: (B,) int64,
    indices into `Sequences`.

    Without padding S is B, and `token_mask` is None. With padding `token_mask` (T,) is False where a token is padding.
    Padding has item and next item 0 and times 0. It fills sequences of its own behind the users', of which the last may
    be empty.

    sequences, index: (T,) int64, where the tokens' interactions are in `sequences`. Of them ratings and features are
    looked up whenever they are asked for, so that they cost nothing where they are not. next_index: (T,) int64, where
    what they predict is; None: behind each. Whoever predicts may read `sequences` up to a token's `index` alone.

    part: of a batch that several processes share; None: this is the whole.
    """

    item: torch.Tensor
    timestamp: torch.Tensor
    next_item: torch.Tensor
    next_timestamp: torch.Tensor
    offsets: torch.Tensor
    sequence_id: torch.Tensor
    position: torch.Tensor
    max_len: int
    user: torch.Tensor
    sequences: "Sequences"
    index: torch.Tensor
    token_mask: torch.Tensor | None = None
    next_index: torch.Tensor | None = None
    part: Part | None = None

    @property
    def last(self) -> torch.Tensor:
        """The index (B,) of each user's last token."""
        return self.offsets[1 : len(self.user) + 1] - 1

    @property
    def rating(self) -> torch.Tensor:
        """Each token's rating (T,) float32, 0 where it is padding. Raises ValueError if the data has no ratings."""
        return self._rating(self.index)

    @property
    def next_rating(self) -> torch.Tensor:
        """The rating (T,) float32 of what each token predicts, 0 where it is padding. Raises as `rating`."""
        return self._rating(self.index + 1 if self.next_index is None else self.next_index)

    @property
    def user_features(self) -> dict[str, torch.Tensor]:
        """The users' features by name, as in `Sequences`: (B,) int32 or (B, K) uint8."""
        return {name: values[self.user] for name, values in self.sequences.user_features.items()}

    @property
    def item_features(self) -> dict[str, torch.Tensor]:
        """The features of the tokens' items by name, as in `Sequences`: (T,) int32 or (T, K) uint8, 0 for padding."""
        return {name: values[self.item] for name, values in self.sequences.item_features.items()}

    @property
    def next_item_features(self) -> dict[str, torch.Tensor]:
        """The features of what the tokens predict, as `item_features`."""
        return {name: values[self.next_item] for name, values in self.sequences.item_features.items()}

    def _rating(self, index: torch.Tensor) -> torch.Tensor:
        if self.sequences.rating is None:
            raise ValueError("the data set has no ratings: a model that reads them needs one that has")
        rating = self.sequences.rating[index]
        return rating if self.token_mask is None else torch.where(self.token_mask, rating, 0)

    def asked(self, target: torch.Tensor) -> "Batch":
        """The same windows, of which each asks about an interaction `target` (B,), an index into `sequences`, in place
        of the one that follows it, as though that happened at the time of the window's last. Without padding."""
        last, data = self.last, self.sequences
        return replace(
            self,
            next_item=self.next_item.index_copy(0, last, data.item[target]),
            next_timestamp=self.next_timestamp.index_copy(0, last, self.timestamp[last]),
            next_index=(self.index + 1).index_copy(0, last, target),
        )

    def to_padded(self, jagged: torch.Tensor) -> torch.Tensor:
        """(T, D) to (S, max_len, D), zeros behind each sequence."""
        return to_padded(jagged, self.offsets, self.max_len, self.sequence_id * self.max_len + self.position)

    def to_jagged(self, padded: torch.Tensor) -> torch.Tensor:
        """(S, max_len, D) to (T, D), without waiting for the device."""
        return padded.flatten(0, 1).index_select(0, self.sequence_id * self.max_len + self.position)


@dataclass(frozen=True)
class Events:
    """One event of each of several windows that are read in parallel lanes.

    item, next_item: (lanes,) int64, 0 where a lane has no window. is_first: (lanes,) int64, 1 where the window begins.
    batch_size: what the sum of losses is divided by.
    """

    item: torch.Tensor
    next_item: torch.Tensor
    is_first: torch.Tensor
    batch_size: int


@dataclass(frozen=True)
class StaticShape:
    """The shape of a padded batch, known before its users. Tokens and sequences are counted with padding."""

    num_users: int
    num_tokens: int
    num_sequences: int
    max_len: int


@dataclass(frozen=True)
class Size:
    """What the host knows of a batch without asking the device: how many tokens it has, and the longest window."""

    num_tokens: int
    max_len: int


class Sequences:
    """All users' interactions, jagged and resident on one device."""

    def __init__(
        self,
        offsets: torch.Tensor,
        item: torch.Tensor,
        timestamp: torch.Tensor,
        num_items: int,
        *,
        rating: torch.Tensor | None = None,
        user_features: dict[str, torch.Tensor] | None = None,
        item_features: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Takes offsets (U + 1,) int64, item (T,) int64 from 1 to num_items, timestamp (T,) int64 seconds.

        Of data sets that have them: rating (T,) float32, NaN where one is missing; features of users, of U rows, and of
        items, of num_items + 1 rows, of which the first, padding, is 0. A category is (rows,) int32 from 1; several are
        (rows, K) uint8, 1 in column k where the row has value k of K.
        """
        self.offsets = offsets
        self.item = item
        self.timestamp = timestamp
        self.num_items = num_items
        self.rating = rating
        self.user_features = user_features or {}
        self.item_features = item_features or {}

    @property
    def num_users(self) -> int:
        return len(self.offsets) - 1

    def trainable_users(self, num_dropped: torch.Tensor) -> torch.Tensor:
        """Users that keep at least one pair (token, next token) without their last `num_dropped` (U,) interactions."""
        lengths = self.offsets.diff()
        return torch.nonzero(lengths - num_dropped >= 2)[:, 0]

    def window_lengths(self, users: torch.Tensor, num_dropped: torch.Tensor, max_len: int) -> torch.Tensor:
        """How many tokens (B,) int64 the windows of `users` (B,) have without their last `num_dropped` (B,)
        interactions."""
        return self._windows(users, num_dropped, max_len)[1]

    def _windows(
        self, users: torch.Tensor, num_dropped: torch.Tensor, max_len: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the windows of `users` (B,) begin, and how many tokens they have: both (B,) int64."""
        end = self.offsets[users + 1] - num_dropped
        kept = (end - self.offsets[users]).clamp(max=max_len + 1)
        return end - kept, kept - 1

    def batch(self, users: torch.Tensor, num_dropped: torch.Tensor, max_len: int, size: Size | None = None) -> Batch:
        """The latest windows of `users` (B,), without their last `num_dropped` (B,) interactions.

        A window is the last `max_len` + 1 interactions: all but the last are tokens, all but the first are what they
        predict. Training drops the held-out interactions. To predict one held-out interaction, drop those after it.
        Without `size` the host has to wait for the device.
        """
        start, lengths = self._windows(users, num_dropped, max_len)
        offsets = offsets_from_lengths(lengths)
        size = size or Size(int(offsets[-1]), int(lengths.max()))
        sequence_id, position = sequence_and_position(offsets, size.num_tokens)
        index = start[sequence_id] + position
        return Batch(
            item=self.item[index],
            timestamp=self.timestamp[index],
            next_item=self.item[index + 1],
            next_timestamp=self.timestamp[index + 1],
            offsets=offsets,
            sequence_id=sequence_id,
            position=position,
            max_len=size.max_len,
            user=users,
            sequences=self,
            index=index,
        )

    def padded_batch(
        self,
        users: torch.Tensor,
        num_dropped: torch.Tensor,
        shape: StaticShape,
        kept: torch.Tensor | None = None,
        rule: Rule = "recent",
    ) -> Batch:
        """The same windows in a shape that is known beforehand, so that the host need not wait for the device.

        kept: of each window so many tokens (B,), which `rule` chooses; each still predicts the user's next item.
        """
        start, lengths = self._windows(users, num_dropped, shape.max_len)
        chosen = None
        if kept is not None:
            times = None
            if rule == "weighted":
                place = start[:, None] + torch.arange(shape.max_len, device=start.device)
                times = self.timestamp[place.clamp(max=len(self.timestamp) - 1)]
            chosen = chosen_positions(rule, lengths, kept, shape.max_len, times)
            lengths = kept
        padding = (0, shape.num_sequences - shape.num_users)
        lengths = torch.nn.functional.pad(lengths, padding, value=shape.max_len)
        offsets = naive.offsets_from_lengths(lengths).clamp(max=shape.num_tokens)  # torch.compile fuses no fbgemm_gpu
        sequence_id, position = sequence_and_position(offsets, shape.num_tokens)
        token_mask = sequence_id < len(users)
        user = sequence_id.clamp(max=len(users) - 1)
        place = position if chosen is None else chosen[user, position.clamp(max=shape.max_len - 1)]
        index = torch.where(token_mask, start[user] + place, 0)
        next_index = index + 1
        return Batch(
            item=self.item[index] * token_mask,
            timestamp=self.timestamp[index] * token_mask,
            next_item=self.item[next_index] * token_mask,
            next_timestamp=self.timestamp[next_index] * token_mask,
            offsets=offsets,
            sequence_id=sequence_id,
            position=position,
            max_len=shape.max_len,
            user=users,
            sequences=self,
            index=index,
            token_mask=token_mask,
        )

    def histories(
        self, users: torch.Tensor, num_after: torch.Tensor, total: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The whole history before each user's held-out interaction, which `num_after` (B,) others follow.

        Returns (index of the user in `users`, item), both (H,). Without `total`, H, the host waits for the device.
        """
        start = self.offsets[users]
        lengths = self.offsets[users + 1] - num_after - 1 - start
        offsets = offsets_from_lengths(lengths)
        index, position = sequence_and_position(offsets, int(offsets[-1]) if total is None else total)
        return index, self.item[start[index] + position]

    def counts(self, num_dropped: torch.Tensor) -> torch.Tensor:
        """How often each item occurs when each user's last `num_dropped` (U,) interactions are left out:
        (num_items + 1,) int64."""
        user, position = sequence_and_position(self.offsets, len(self.item))
        kept = position < (self.offsets.diff() - num_dropped)[user]
        return torch.bincount(self.item[kept], minlength=self.num_items + 1)


def load_sequences(folder: Path, device: torch.device) -> tuple[Sequences, str]:
    """The sequences that preprocess wrote into `folder`, with ratings and features, on `device`, and the SHA-256 of
    their file, which has no features.

    Raises StepError if a file is not the one its manifest describes.
    """
    path, manifest_path, remedy = folder / "sequences.safetensors", folder / "manifest.json", "run preprocess again"
    manifest = read_json(manifest_path, remedy=remedy)
    with reading(manifest_path, remedy):
        digest, items = str(manifest["sequences_sha256"]), int(manifest["catalogue_items"])
    require_files(folder, {path.name: digest}, manifest_path, remedy)
    features: dict[str, dict[str, torch.Tensor]] = {"user": {}, "item": {}}
    if "features_sha256" in manifest:
        features_path = folder / "features.safetensors"
        require_files(folder, {features_path.name: str(manifest["features_sha256"])}, manifest_path, remedy)
        with reading(features_path, remedy):
            for key, values in load_file(features_path, device=str(device)).items():
                kind, name = key.split("/", 1)
                features[kind][name] = values
    with reading(path, remedy):
        tensors = load_file(path, device=str(device))
        sequences = Sequences(
            tensors["offsets"],
            tensors["item"].long(),
            tensors["timestamp"],
            items,
            rating=tensors.get("rating"),
            user_features=features["user"],
            item_features=features["item"],
        )
    return sequences, digest
