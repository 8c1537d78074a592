"""Processed sequences in memory, and the windows of them that models read.

Needs torch and safetensors alone.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from kernels.jagged import offsets_from_lengths, to_padded
from kernels.jagged.naive import sequence_and_position
from steps.common.files import read_json, reading
from steps.common.provenance import require_files


@dataclass(frozen=True)
class Batch:
    """Windows of several users, jagged. Each token predicts the next one of its user.

    item, timestamp, next_item, next_timestamp: (T,) int64. offsets: (R + 1,) int64. row, place: (T,) int64, each
    token's window and its place there. max_len: at least the longest window. user: (B,) int64, places in `Sequences`.

    Without padding R is B, and `real` None. With it the tokens that `real` (T,) leaves out are padding: item and
    next item 0, times 0, in rows of their own behind the users', of which the last may be empty.
    """

    item: torch.Tensor
    timestamp: torch.Tensor
    next_item: torch.Tensor
    next_timestamp: torch.Tensor
    offsets: torch.Tensor
    row: torch.Tensor
    place: torch.Tensor
    max_len: int
    user: torch.Tensor
    real: torch.Tensor | None = None

    @property
    def last(self) -> torch.Tensor:
        """The places (B,) of each user's last token."""
        return self.offsets[1 : len(self.user) + 1] - 1

    def to_padded(self, jagged: torch.Tensor) -> torch.Tensor:
        """(T, D) to (R, max_len, D), zeros behind each row."""
        return to_padded(jagged, self.offsets, self.max_len, self.row * self.max_len + self.place)

    def to_jagged(self, padded: torch.Tensor) -> torch.Tensor:
        """(R, max_len, D) to (T, D), without waiting for the device."""
        return padded.flatten(0, 1).index_select(0, self.row * self.max_len + self.place)


@dataclass(frozen=True)
class Layout:
    """The shape of a padded batch, known before its users: `users`, and `tokens` with padding, in so many `rows`."""

    users: int
    tokens: int
    rows: int
    max_len: int


@dataclass(frozen=True)
class Size:
    """What the host knows of a batch without asking the device: its tokens, and the longest window's."""

    tokens: int
    longest: int


class Sequences:
    """All users' interactions, jagged and resident on one device."""

    def __init__(self, offsets: torch.Tensor, item: torch.Tensor, timestamp: torch.Tensor, num_items: int) -> None:
        """Takes offsets (U + 1,) int64, item (T,) int64 from 1 to num_items, timestamp (T,) int64 seconds."""
        self.offsets = offsets
        self.item = item
        self.timestamp = timestamp
        self.num_items = num_items

    @property
    def num_users(self) -> int:
        return len(self.offsets) - 1

    def trainable_users(self, drop: torch.Tensor) -> torch.Tensor:
        """Users that keep at least one pair (token, next token) when their last `drop` (U,) rows are left out."""
        lengths = self.offsets.diff()
        return torch.nonzero(lengths - drop >= 2)[:, 0]

    def window_lengths(self, users: torch.Tensor, drop: torch.Tensor, max_len: int) -> torch.Tensor:
        """How many tokens (B,) int64 the window of each of `users` (B,) has without their last `drop` (B,) rows."""
        rows = self.offsets[users + 1] - drop - self.offsets[users]
        return torch.minimum(rows, torch.full_like(rows, max_len + 1)) - 1

    def batch(self, users: torch.Tensor, drop: torch.Tensor, max_len: int, size: Size | None = None) -> Batch:
        """The latest windows of `users` (B,), their last `drop` (B,) interactions left out.

        A window is the last `max_len` + 1 rows: all but the last are tokens, all but the first are what
        they predict. Training drops the held-out rows; to predict one held-out row, drop those after it.
        Without its `size` the host waits for the device to tell it.
        """
        lengths = self.window_lengths(users, drop, max_len)
        offsets = offsets_from_lengths(lengths)
        size = size or Size(int(offsets[-1]), int(lengths.max()))
        row, place = sequence_and_position(offsets, size.tokens)
        index = (self.offsets[users + 1] - drop - lengths - 1)[row] + place
        return Batch(
            item=self.item[index],
            timestamp=self.timestamp[index],
            next_item=self.item[index + 1],
            next_timestamp=self.timestamp[index + 1],
            offsets=offsets,
            row=row,
            place=place,
            max_len=size.longest,
            user=users,
        )

    def padded_batch(self, users: torch.Tensor, drop: torch.Tensor, layout: Layout) -> Batch:
        """The same windows in a shape that is known beforehand, so that the host need not wait for the device."""
        lengths = self.window_lengths(users, drop, layout.max_len)
        offsets = offsets_from_lengths(lengths)
        total = offsets[-1]
        spare = torch.arange(1, layout.rows - layout.users + 1, device=offsets.device)
        offsets = torch.cat([offsets, (total + spare * layout.max_len).clamp(max=layout.tokens)])
        row, place = sequence_and_position(offsets, layout.tokens)
        real = torch.arange(layout.tokens, device=offsets.device) < total
        first = torch.nn.functional.pad(self.offsets[users + 1] - drop - lengths - 1, (0, len(spare)))
        index = torch.where(real, first[row] + place, 0)
        return Batch(
            item=self.item[index] * real,
            timestamp=self.timestamp[index] * real,
            next_item=self.item[index + 1] * real,
            next_timestamp=self.timestamp[index + 1] * real,
            offsets=offsets,
            row=row,
            place=place,
            max_len=layout.max_len,
            user=users,
            real=real,
        )

    def histories(
        self, users: torch.Tensor, drop: torch.Tensor, total: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The whole history before each user's row to predict: (place of the user in `users`, item), both (S,).

        Without `total`, S, the host waits for the device to tell it.
        """
        start = self.offsets[users]
        lengths = self.offsets[users + 1] - drop - 1 - start
        offsets = offsets_from_lengths(lengths)
        row, place = sequence_and_position(offsets, int(offsets[-1]) if total is None else total)
        return row, self.item[start[row] + place]

    def counts(self, drop: torch.Tensor) -> torch.Tensor:
        """How often each item stands in the sequences without their last `drop` (U,) rows: (num_items + 1,) int64."""
        row, place = sequence_and_position(self.offsets, len(self.item))
        kept = place < (self.offsets.diff() - drop)[row]
        return torch.bincount(self.item[kept], minlength=self.num_items + 1)


def load_sequences(folder: Path, device: torch.device) -> tuple[Sequences, str]:
    """The sequences that preprocess wrote into `folder`, on `device`, and the SHA-256 of their file.

    Raises StepError if the file is not the one its manifest describes.
    """
    path, manifest_path, remedy = folder / "sequences.safetensors", folder / "manifest.json", "run preprocess again"
    manifest = read_json(manifest_path, remedy=remedy)
    with reading(manifest_path, remedy):
        digest, items = str(manifest["sequences_sha256"]), int(manifest["catalogue_items"])
    require_files(folder, {path.name: digest}, manifest_path, remedy)
    with reading(path, remedy):
        tensors = load_file(path, device=str(device))
        sequences = Sequences(tensors["offsets"], tensors["item"].long(), tensors["timestamp"], items)
    return sequences, digest
