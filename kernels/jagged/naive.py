"""The jagged operations in torch: any type, any device."""

import torch


def offsets_from_lengths(lengths: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(torch.cumsum(lengths, 0), (1, 0))


def row_and_place(offsets: torch.Tensor, total: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For each of the `total` values: the row it belongs to, and its place in that row; both (T,) int64."""
    lengths = offsets[1:] - offsets[:-1]
    row = torch.repeat_interleave(torch.arange(len(lengths), device=offsets.device), lengths, output_size=total)
    return row, torch.arange(total, device=offsets.device) - offsets[row]


def to_padded(
    values: torch.Tensor, offsets: torch.Tensor, max_len: int, index: torch.Tensor | None = None
) -> torch.Tensor:
    padded = values.new_zeros(len(offsets) - 1, max_len, values.shape[1])
    if index is not None:
        return padded.flatten(0, 1).index_copy(0, index, values).view_as(padded)
    row, place = row_and_place(offsets, len(values))
    return padded.index_put((row, place), values)


def to_jagged(padded: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    row, place = row_and_place(offsets, int(offsets[-1]))
    return padded[row, place]


def select_rows(values: torch.Tensor, offsets: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    selected = offsets_from_lengths(offsets.diff()[rows])
    place = places(offsets, rows, selected, int(selected[-1]))
    # values[place] would, in half precision on a CPU, stop adding up the gradients of a row given 256 times.
    return values.index_select(0, place), selected


def places(offsets: torch.Tensor, rows: torch.Tensor, selected: torch.Tensor, total: int) -> torch.Tensor:
    """Where each of the `total` values of the rows selected, whose offsets are `selected`, stands: (total,) int64."""
    row, place = row_and_place(selected, total)
    return offsets[rows[row]] + place
