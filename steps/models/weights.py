"""The weights of a trained model, as a safetensors file; of several processes each writes and reads its own rows."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from steps.common.cli import StepError, one_line
from steps.common.files import atomic_path, name_written
from steps.common.processes import ALONE, Processes
from steps.models.large_table import Block, blocks_of, load_own

#: Numbers that are copied, written or read at once.
AT_ONCE = 2**24
_ALIGNMENT = 8  # of the header's end
#: In the order in which safetensors has them.
_CODES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def save_weights(model: torch.nn.Module, path: Path, processes: Processes = ALONE) -> None:
    """Write the model's parameters and buffers to `path`, atomically; one process does, and of a table that several
    share each its rows. The bytes are those that one process writes."""
    blocks = blocks_of(model)
    if blocks:
        write_together(path, model.state_dict(), blocks, processes)
    elif processes.writes:
        host = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        with atomic_path(path) as temporary:
            temporary.write_bytes(save(host))


def load_weights(model: torch.nn.Module, path: Path) -> None:
    """Read what `save_weights` wrote, of a table that processes share this one's rows. Raises StepError if the file is
    missing, damaged or of another model."""
    try:
        blocks = blocks_of(model)
        if not blocks:
            model.load_state_dict(load_file(path))
            return
        with safe_open(path, "pt") as file:
            load_own(model, {name: own_rows(file, name, blocks) for name in file.keys()})  # noqa: SIM118
    except (OSError, SafetensorError, RuntimeError, KeyError, ValueError) as error:
        raise StepError(f"{path} does not hold the weights of this model: {error}. Train again") from error


def own_rows(file: Any, name: str, blocks: Mapping[str, Block]) -> torch.Tensor:
    """An entry of an open safetensors file, of a table in `blocks` this process's rows; raises ValueError if the file
    has another number of rows."""
    if name not in blocks:
        whole: torch.Tensor = file.get_tensor(name)
        return whole
    block, rows = blocks[name], file.get_slice(name)
    if rows.get_shape()[0] != block.rows:
        raise ValueError(f"{name} has {rows.get_shape()[0]} rows, not {block.rows}")
    if block.count:
        own: torch.Tensor = rows[block.first : block.first + block.count]
        return own
    return torch.empty(0, *rows.get_shape()[1:], dtype=rows[:1].dtype)


def write_together(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    blocks: Mapping[str, Block],
    processes: Processes,
    metadata: Mapping[str, str] | None = None,
    sealed: Callable[[Path], Mapping[str, str]] | None = None,
) -> None:
    """Write a safetensors file of `tensors`, atomically: the first process what all have, each its rows of `blocks`.

    All need the folder, and nobody holds more than it has. sealed: what says the metadata once the data are there, of
    as many characters as before. When a process returns the file is there. Raises StepError in all processes if one
    cannot write.
    """
    if not processes.writes:
        place = json.loads(processes.told(""))
        _write_rows(path, Path(place["path"]), place["begins"], tensors, blocks, processes)
        processes.wait()
        return
    header, begins, end = _header(tensors, blocks, metadata)
    with atomic_path(path) as temporary:
        with temporary.open("wb") as file:
            file.write(header)
            file.truncate(end)
        processes.told(json.dumps({"path": str(temporary.resolve()), "begins": begins}))
        _write_rows(path, temporary, begins, tensors, blocks, processes)
        if sealed is not None:
            with temporary.open("r+b") as file:
                file.write(_header(tensors, blocks, sealed(temporary))[0])
    processes.wait()


def pieces(tensor: Any) -> Iterator[torch.Tensor]:
    """A tensor, or one of a file that `get_slice` found, in parts of `AT_ONCE` numbers or so, on the CPU."""
    shape = tensor.shape if isinstance(tensor, torch.Tensor) else tensor.get_shape()
    rows = shape[0] if len(shape) else 0
    if not rows:
        if isinstance(tensor, torch.Tensor):
            yield tensor.detach().cpu()
        return
    width = max(1, torch.Size(shape[1:]).numel())
    for start in range(0, rows, max(1, AT_ONCE // width)):
        yield tensor[start : min(rows, start + max(1, AT_ONCE // width))].detach().cpu().contiguous()


def _header(
    tensors: Mapping[str, torch.Tensor], blocks: Mapping[str, Block], metadata: Mapping[str, str] | None
) -> tuple[bytes, dict[str, int], int]:
    """The file's first bytes; where each tensor begins; and where the file ends."""
    order = [*_CODES]
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in sorted(tensors, key=lambda name: (order.index(tensors[name].dtype), name)):
        shape = [*tensors[name].shape]
        if name in blocks:
            shape[0] = blocks[name].rows
        start, end = end, end + torch.Size(shape).numel() * tensors[name].element_size()
        entries[name] = {"dtype": _CODES[tensors[name].dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    begins = {name: 8 + len(text) + entries[name]["data_offsets"][0] for name in tensors}
    return len(text).to_bytes(8, "little") + text, begins, 8 + len(text) + end


def _write_rows(
    path: Path,
    temporary: Path,
    begins: Mapping[str, int],
    tensors: Mapping[str, torch.Tensor],
    blocks: Mapping[str, Block],
    processes: Processes,
) -> None:
    """Write to `temporary` what this process writes of `path`. Raises StepError in all processes if one cannot, so that
    the first removes the file."""
    failure = ""
    try:
        try:
            _write_own(temporary, begins, tensors, blocks, first=processes.writes)
        except OSError as error:
            name_written(path, temporary, error)
            raise
    except (OSError, StepError) as error:
        failure = one_line(error)
    if failures := [text for text in processes.gathered(failure) if text]:
        raise StepError(failures[0])


def _write_own(
    path: Path,
    begins: Mapping[str, int],
    tensors: Mapping[str, torch.Tensor],
    blocks: Mapping[str, Block],
    first: bool,
) -> None:
    with path.open("r+b") as file:
        for name, tensor in tensors.items():
            if name not in blocks and not first:
                continue
            before = blocks[name].first * tensor[:1].nbytes if name in blocks and len(tensor) else 0
            file.seek(begins[name] + before)
            for piece in pieces(tensor):
                file.write(piece.flatten().view(torch.uint8).numpy().data)
