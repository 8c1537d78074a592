"""The jagged operations in torch: any type, any device."""

import torch


def offsets_from_lengths(lengths: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(torch.cumsum(lengths, 0), (1, 0))


def sequence_and_position(offsets: torch.Tensor, total: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For each of the `total` values: the sequence it belongs to, and its position there; both (T,) int64."""
    token = torch.arange(total, device=offsets.device)
    sequence_id = torch.bucketize(token, offsets, right=True) - 1  # torch.compile fuses it, whatever the sizes
    return sequence_id, token - offsets[sequence_id]


def to_padded(
    values: torch.Tensor, offsets: torch.Tensor, max_len: int, index: torch.Tensor | None = None
) -> torch.Tensor:
    padded = values.new_zeros(offsets.shape[0] - 1, max_len, values.shape[1])
    if index is not None:
        return padded.flatten(0, 1).index_copy(0, index, values).view_as(padded)
    sequence_id, position = sequence_and_position(offsets, values.shape[0])
    return padded.index_put((sequence_id, position), values)


def to_jagged(padded: torch.Tensor, offsets: torch.Tensor, total: int | None = None) -> torch.Tensor:
    sequence_id, position = sequence_and_position(offsets, int(offsets[-1]) if total is None else total)
    return padded[sequence_id, position]


def select_rows(values: torch.Tensor, offsets: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    selected = offsets_from_lengths(offsets.diff()[rows])
    index = selected_index(offsets, rows, selected, int(selected[-1]))
    # values[index] would, in half precision on a CPU, stop adding up the gradients of a sequence given 256 times.
    return values.index_select(0, index), selected


def selected_index(offsets: torch.Tensor, rows: torch.Tensor, selected: torch.Tensor, total: int) -> torch.Tensor:
    """Where each of the `total` values of the sequences `rows`, whose new offsets are `selected`, stands: (total,)."""
    sequence_id, position = sequence_and_position(selected, total)
    return offsets[rows[sequence_id]] + position
