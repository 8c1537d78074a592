"""Processed sequences in memory, and the windows of them that models read.

Needs torch and safetensors alone.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from kernels.jagged import offsets_from_lengths
from kernels.jagged.naive import row_and_place
from steps.common.cli import StepError
from steps.common.files import read_json, sha256


@dataclass(frozen=True)
class Batch:
    """Windows of several users, jagged. Each token predicts the next one of its user.

    item, timestamp, next_item, next_timestamp: (T,) int64. offsets: (B + 1,) int64. max_len: the longest
    window. user: (B,) int64, places in `Sequences`.
    """

    item: torch.Tensor
    timestamp: torch.Tensor
    next_item: torch.Tensor
    next_timestamp: torch.Tensor
    offsets: torch.Tensor
    max_len: int
    user: torch.Tensor

    @property
    def last(self) -> torch.Tensor:
        """The places (B,) of each window's last token."""
        return self.offsets[1:] - 1


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

    def batch(self, users: torch.Tensor, drop: torch.Tensor, max_len: int) -> Batch:
        """The latest windows of `users` (B,), their last `drop` (B,) interactions left out.

        A window is the last `max_len` + 1 rows: all but the last are tokens, all but the first are what
        they predict. Training drops the held-out rows; to predict one held-out row, drop those after it.
        """
        end = self.offsets[users + 1] - drop
        lengths = torch.minimum(end - self.offsets[users], torch.full_like(end, max_len + 1)) - 1
        offsets = offsets_from_lengths(lengths)
        row, place = row_and_place(offsets, int(offsets[-1]))
        index = (end - lengths - 1)[row] + place
        return Batch(
            item=self.item[index],
            timestamp=self.timestamp[index],
            next_item=self.item[index + 1],
            next_timestamp=self.timestamp[index + 1],
            offsets=offsets,
            max_len=int(lengths.max()),
            user=users,
        )

    def histories(self, users: torch.Tensor, drop: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The whole history before each user's row to predict: (place of the user in `users`, item), both (S,)."""
        start = self.offsets[users]
        lengths = self.offsets[users + 1] - drop - 1 - start
        offsets = offsets_from_lengths(lengths)
        row, place = row_and_place(offsets, int(offsets[-1]))
        return row, self.item[start[row] + place]

    def counts(self, drop: torch.Tensor) -> torch.Tensor:
        """How often each item stands in the sequences without their last `drop` (U,) rows: (num_items + 1,) int64."""
        row, place = row_and_place(self.offsets, len(self.item))
        kept = place < (self.offsets.diff() - drop)[row]
        return torch.bincount(self.item[kept], minlength=self.num_items + 1)


def load_sequences(folder: Path, device: torch.device) -> tuple[Sequences, str]:
    """The sequences that preprocess wrote into `folder`, on `device`, and the SHA-256 of their file.

    Raises StepError if the file is not the one its manifest describes.
    """
    path = folder / "sequences.safetensors"
    if not path.is_file():
        raise StepError(f"{path} does not exist; run preprocess first")
    manifest = read_json(folder / "manifest.json")
    digest = sha256(path)
    if digest != manifest["sequences_sha256"]:
        raise StepError(f"{path} is not the file that {folder / 'manifest.json'} describes; run preprocess again")
    tensors = load_file(path, device=str(device))
    sequences = Sequences(tensors["offsets"], tensors["item"].long(), tensors["timestamp"], manifest["catalogue_items"])
    return sequences, digest
