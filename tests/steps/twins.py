"""Readable twins of the static steps: batches in the shapes that the data has, which make the host wait."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from steps.data.sequences import Batch, Sequences
from steps.tasks import Task
from steps.tasks.masked_items import MaskedItems, Output, append_next_item
from steps.tasks.sessions import Sessions


def window_losses(
    task: Task, sequences: Sequences, order: torch.Tensor, num_held_out: torch.Tensor, max_len: int, batch_size: int
) -> Iterator[torch.Tensor]:
    """The losses of an epoch over each user's latest window, a batch of users each."""
    for users in order.split(batch_size):
        batch = sequences.batch(users, num_held_out[users], max_len)
        yield masked_loss(task, batch) if isinstance(task, MaskedItems) else task.loss(batch)


def masked_loss(task: MaskedItems, batch: Batch) -> torch.Tensor:
    """Full cross-entropy of the masked items."""
    item, last, layout = append_next_item(batch)
    masked = task.masking.sample(last, layout, torch.rand(len(batch.user)), torch.rand(len(item)))
    states = task._encode(item, masked, layout)[masked]
    if isinstance(task.output, Output):
        hidden = task.output.norm(F.gelu(task.output.transform(states)))
        logits = (hidden @ task.items.weight.T + task.output.bias)[:, 1:]
    else:
        logits = (states @ task.items.weight.T)[:, 1:]
    return F.cross_entropy(logits, item[masked] - 1)


def session_losses(
    task: Sessions, sequences: Sequences, order: torch.Tensor, num_held_out: torch.Tensor, max_len: int, batch_size: int
) -> Iterator[torch.Tensor]:
    """One loss per event of `batch_size` lanes. The hidden state passes from event to event, without gradients."""
    batch = sequences.batch(order, num_held_out[order], max_len)
    for token, state in lanes(task, batch, batch_size):
        logits, new_state = event(task, batch, token, state)
        state.copy_(new_state)
        yield F.cross_entropy(logits, torch.arange(len(token)), reduction="sum") / batch_size


def event(task: Sessions, batch: Batch, token: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (lanes, lanes + samples) of one event, with the targets on the diagonal; and the new states.

    token: (lanes,), indices into the batch. state: (lanes, d).
    """
    _, hidden = task.encoder.gru(task.items(batch.item[token])[:, None], state[None].clone())
    hidden = task.encoder.hidden_dropout(hidden[0])
    sampled = torch.multinomial(task.popularity**task.config.sample_alpha, task.config.samples, replacement=True)
    candidates = torch.cat([batch.next_item[token], sampled])
    return task.logits(hidden, candidates, task.items(candidates)), hidden.detach()


def lanes(task: Sessions, batch: Batch, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields for each event the index (lanes,) of each lane's token, and the lanes' states (lanes, d).

    States are zero where a window begins. The caller writes the new states into the tensor.
    """
    starts, ends = batch.offsets[:-1].tolist(), batch.offsets[1:].tolist()
    num_lanes = min(batch_size, len(starts))
    token, end, next_window = starts[:num_lanes], ends[:num_lanes], num_lanes
    state = task.items.weight.new_zeros(num_lanes, task.dim)
    while token:
        events = min(last - now for now, last in zip(token, end, strict=True))
        first = torch.tensor(token, device=batch.item.device)
        for number in range(events):
            yield first + number, state
        kept = []
        for lane in range(len(token)):
            token[lane] += events
            if token[lane] == end[lane]:
                if next_window == len(starts):
                    continue
                token[lane], end[lane] = starts[next_window], ends[next_window]
                next_window += 1
                state[lane] = 0
            kept.append(lane)
        if len(kept) < len(token):
            token, end = [token[lane] for lane in kept], [end[lane] for lane in kept]
            state = state[kept]
