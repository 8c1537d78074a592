"""torch.export: a program of HSTU takes other numbers of tokens and of sequences, and gives what the model gives."""

import io
from typing import Any

import pytest
import torch
from torch import nn

from kernels import hstu_attention as attention
from kernels import norm_gate, projection
from steps.data.sequences import Batch
from steps.models.hstu import HSTU, BiasConfig, HSTUConfig

pytest.importorskip("kernels.hstu_attention.op", exc_type=ImportError)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DIM, MAX_LEN = 16, 40
OPERATIONS = {"hstu.attention.default", "hstu.norm_gate_forward.default", "hstu.projection_forward.default"}


class Served(nn.Module):
    """The encoder as a function of tensors."""

    def __init__(self, encoder: HSTU) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, embeddings, position, timestamp, next_timestamp, offsets) -> torch.Tensor:
        unread: Any = None
        batch = Batch(
            item=unread, timestamp=timestamp, next_item=unread, next_timestamp=next_timestamp, offsets=offsets,
            sequence_id=unread, position=position, max_len=MAX_LEN, user=unread, sequences=unread, index=unread,
        )  # fmt: skip
        return self.encoder(embeddings, batch)


def model(softmax: bool) -> Served:
    torch.manual_seed(0)
    config = HSTUConfig(
        dim=DIM, blocks=2, heads=2, dqk=8, dv=8, output_slots=3, attention="softmax" if softmax else "silu", alpha=0.3,
        attention_scale="max_len", bias=BiasConfig(position=True, time="next"),
    )  # fmt: skip
    encoder = HSTU(config, MAX_LEN, 0.2).to(DEVICE)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.mul_(3)  # so that every term matters
    return Served(encoder).eval()


def inputs(lengths: list[int]) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(sum(lengths))
    tokens = sum(lengths)
    times = torch.randint(0, 10**6, (tokens + 1,)).cumsum(0)
    position = torch.cat([torch.arange(n) for n in lengths])
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0)])
    return tuple(x.to(DEVICE) for x in (torch.randn(tokens, DIM), position, times[:-1], times[1:], offsets))


def export(module: Served, fewest: int, strict: bool) -> torch.export.ExportedProgram:
    """The program that takes any number of tokens, of so many sequences or more."""
    tokens, sequences = torch.export.Dim("tokens", min=1), torch.export.Dim("offsets", min=fewest + 1)
    shapes = tuple({0: size} for size in (tokens, tokens, tokens, tokens, sequences))
    return torch.export.export(module, inputs([9, 17, 4]), dynamic_shapes=shapes, strict=strict)


def assert_same(program: torch.export.ExportedProgram, module: Served, cases: list[list[int]]) -> None:
    for lengths in cases:
        given = inputs(lengths)
        torch.testing.assert_close(program.module()(*given), module(*given), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # 1 / (1 + inf), interpreted
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("softmax", [False, True], ids=["silu", "softmax"])
def test_with_the_operators(softmax: bool, strict: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for operation in (attention, norm_gate, projection):
        monkeypatch.setattr(operation, "fits_triton", lambda *_: True)
    monkeypatch.setattr(projection, "_fused", lambda _: True)
    module = model(softmax)
    program = export(module, 1, strict)
    assert {str(node.target) for node in program.graph.nodes if "hstu" in str(node.target)} == OPERATIONS
    assert_same(program, module, [[5, 30], [1], [7, 0, 40, 3, 1]])


@pytest.mark.filterwarnings("ignore:_check_is_size:FutureWarning")  # fbgemm_gpu's
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("softmax", [False, True], ids=["silu", "softmax"])
def test_in_torch(softmax: bool, strict: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch asks for two sequences or more: an empty one may stand behind a single one."""
    for operation in (attention, norm_gate, projection):
        monkeypatch.setattr(operation, "fits_triton", lambda *_: False)
    module = model(softmax)
    program = export(module, 2, strict)
    assert_same(program, module, [[5, 30], [1, 0], [7, 0, 40, 3, 1]])


@pytest.mark.filterwarnings("ignore:_check_is_size:FutureWarning")
def test_a_program_is_kept_in_a_file() -> None:
    """And takes inputs whose gradients are of no interest, though the model's parameters ask for theirs."""
    module = model(softmax=False)
    file = io.BytesIO()
    torch.export.save(export(module, 2, strict=False), file)
    file.seek(0)
    with torch.no_grad():
        assert_same(torch.export.load(file), module, [[5, 30], [3, 0]])
