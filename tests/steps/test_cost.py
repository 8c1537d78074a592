"""Every term of the cost on paper, against what is measured of something small."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kernels.hstu_attention.mask import CAUSAL
from kernels.hstu_attention.naive import visible
from steps.common import studies
from steps.common.processes import Processes
from steps.data.sequences import load_sequences
from steps.data.stochastic_length import draw_lengths
from steps.models.hstu import HSTU, BiasConfig, HSTUConfig
from steps.studies import cost
from steps.studies.cost import Shape, moments, ring, seconds_around, seconds_to_all, sent, step, table_bytes
from steps.studies.encoder_efficiency import batch_of
from steps.training.loop import Training
from tests.conftest import ROOT, run, write_processed
from tests.steps.runs import config

SHAPE = Shape(dim=16, layers=2, tokens=12)


def encoder() -> HSTU:
    bias = BiasConfig(position=True, time="next")
    return HSTU(HSTUConfig(16, 2, 2, 8, 8, 0, "silu", 1.0, "max_len", bias), SHAPE.tokens, 0.0)


def test_the_encoder_has_as_many_floats_and_keeps_16_bytes_of_each() -> None:
    model = encoder()
    batch = batch_of(torch.tensor([12, 12]), 12)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(24, 16), batch).sum().backward()
    optimizer.step()
    kept = [tensor for one in model.parameters() for tensor in (one, one.grad)]
    kept += [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert sum(one.numel() for one in model.parameters()) == SHAPE.parameters
    assert sum(tensor.nbytes for tensor in kept if tensor is not None) == cost.DENSE_BYTES * SHAPE.parameters


def test_the_gradients_that_are_summed_are_the_encoder_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Processes, "sum_", lambda self, tensor: None)
    monkeypatch.setattr(Processes, "gathered", lambda self, text: [text] * self.size)
    data, _ = load_sequences(write_processed(tmp_path / "t", [9] * 12, 30), torch.device("cpu"))
    one = Training(config("hstu"), data, "", tmp_path, processes=Processes(0, 2))
    items = 16 * 31  # which this model learns in the same way; and beside the gradients the loss
    assert one.execution._sums.nbytes == 4 * (Shape(16, 2, 20 + 11).parameters + items + 1)


def test_flops_of_a_step_are_those_that_torch_counts() -> None:
    embeddings = torch.randn(24, 16, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        encoder()(embeddings, batch_of(torch.tensor([12, 12]), 12)).sum().backward()
    # Attention in torch takes all 12 x 12 pairs of a row, also those that the mask hides.
    assert counter.get_total_flops() == SHAPE.projections(24) + SHAPE.attention(2 * 12 * 12)
    assert int(visible(torch.tensor([0, 12, 24]), 12, CAUSAL).expand(2, -1, -1).sum()) == 2 * 12 * 13 / 2


def test_activations_are_those_that_kernels_save() -> None:
    """14 d bytes up to 64 channels; above 24 d, and two numbers of a norm; two layers of 16 tokens. Interpreted."""
    code = """
import json
import kernels.hstu_attention, kernels.norm_gate, kernels.projection, torch
for module in (kernels.hstu_attention, kernels.norm_gate, kernels.projection):
    module.fits_triton = lambda *tensors: True
from steps.studies.encoder_efficiency import Encoder, saved_bytes
def kept(dim, layers, rows):
    case = {"encoder": "HSTU", "bias": "none", "recomputed": False, "compiled": False, "dim": dim}
    one = Encoder(case, {"dim": dim, "dqk": 32, "dtype": "float16"}, layers, 0.2, torch.full((rows,), 16), 16)
    return saved_bytes(one, one.learned)
found = [[kept(dim, layers, rows) for layers, rows in ((1, 1), (1, 2), (3, 1), (3, 2))] for dim in (64, 128)]
print(json.dumps([(c2 - c1) - (b2 - b1) for b1, b2, c1, c2 in found]))
"""
    said = run("python", "-c", code, cwd=ROOT, PYTHONPATH=str(ROOT), TRITON_INTERPRET="1", OMP_NUM_THREADS="1").stdout
    fused, apart = json.loads(said.splitlines()[-1])
    assert fused == Shape(64, 2, 16).activations(16, 14)
    assert apart == Shape(128, 2, 16).activations(16, 24) + 2 * 16 * 4


def test_bytes_of_a_table_are_those_of_a_model(tmp_path: Path) -> None:
    data, _ = load_sequences(write_processed(tmp_path / "t", [9] * 12, 30), torch.device("cpu"))
    one = Training(config("hstu-rowwise"), data, "", tmp_path)
    found = one.model.item_bytes(one.optimizer) * one.model.items.weight.numel()
    assert found == table_bytes(31, 16, 2, 4)
    # The paper's own example: 60 TB for 10 billion rows of 512 with Adam.
    assert table_bytes(10**10, 512, 12, 0) == pytest.approx(60e12, rel=0.03)


LOOKS_UP = """
import json, sys
import torch
from torch import distributed as dist
from kernels.rowwise_table import RowwiseTable, sharded
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
sharded.torchrec.fits = lambda *_: False
exchange, found = dist.all_to_all_single, []
def counted(output, values, received=None, sent=None):
    rows = sent or [1] * 2
    found.append(sum(count for owner, count in enumerate(rows) if owner != rank) * values[:1].nbytes)
    exchange(output, values, received, sent)
dist.all_to_all_single = counted
table = sharded.ShardedRowwiseTable(RowwiseTable(21, 6, 0.1, torch.float16))
table(torch.tensor([1, 2, 3, 4, 11, 12, 13, 14])).sum().backward()
print(json.dumps([*found, table.weight.nbytes + table.sums.nbytes]))
dist.destroy_process_group()
"""


def test_bytes_of_a_sharded_lookup_are_those_that_two_processes_send(tmp_path: Path) -> None:
    """Each asks for four of its own rows and four of the other's."""
    command = [sys.executable, "-c", LOOKS_UP]
    started = [
        subprocess.Popen([*command, str(rank), tmp_path / "store"], cwd=ROOT, stdout=subprocess.PIPE) for rank in (0, 1)
    ]
    first, second = (json.loads(one.communicate(timeout=120)[0].splitlines()[-1]) for one in started)
    counts, ids, vectors, gradients, table = first
    assert counts == 8  # how many rows are asked for: one number for the other, which the study leaves out
    assert first[:4] == second[:4]
    assert ids == sent(8 * cost.ID_BYTES, 2)
    assert vectors == sent(8 * 6 * 2, 2)  # as the table has them
    assert gradients == sent(8 * 6 * 4, 2)
    assert table == table_bytes(11, 6, 2, 4)  # of 21 rows the first process has 11, the other 10
    assert second[4] == table_bytes(10, 6, 2, 4)


def test_stochastic_length_reads_its_mean_and_its_mean_square() -> None:
    drawn = draw_lengths(torch.full((200_000,), 256), 256, 1.7, torch.Generator().manual_seed(0)).double()
    mean, square = moments(256, 1.7)
    assert mean == pytest.approx(float(drawn.mean()), rel=0.01)
    assert square == pytest.approx(float(drawn.square().mean()), rel=0.02)
    assert moments(256, 2.0) == (256, 256**2)


def test_wires_by_hand() -> None:
    # 16 GPUs, 8 a machine; of 160 bytes each gets 10: 70 stay in the machine, 80 leave it.
    assert sent(160, 16) == 150
    assert seconds_to_all(160, 16, 8, nvlink=70, network=1) == 80
    assert seconds_to_all(160, 16, 8, nvlink=0.5, network=80) == 140
    assert seconds_to_all(160, 4, 8, nvlink=120, network=1) == 1  # 40 each, to three others
    # Around a ring of 16: 15 parts of 10, twice. Of eight rings seven go on in the machine.
    assert ring(160, 16) == 300
    assert seconds_around(160, 16, 8, nvlink=1000, network=1) == 300 / 8
    assert seconds_around(160, 16, 8, nvlink=1, network=1000) == 300 * 7 / 8
    assert seconds_around(160, 4, 8, nvlink=1, network=1) == 240


def test_a_step_by_hand() -> None:
    """3 rows of 12 tokens on 2 GPUs of a machine; a table that has the rest of the parameters, 100 rows of 16."""
    value: dict[str, Any] = {"parameters": SHAPE.parameters + 1600, "rows": 3, "kept": 14, "kept_here": 24}
    value |= {"weight_bytes": 2, "sum_bytes": 4, "adam_bytes": 12, "lookups": 2, "distinct": 0.5, "gradient_bytes": 4}
    found = step(SHAPE, 2, 2.0, value | {"gpus_a_machine": 8, "nvlink": 1e3, "network": 1.0})
    assert (found["tokens"], found["table rows"]) == (36, 100)
    assert found["table"] == 50 * (2 * 16 + 4)
    assert found["table by Adam"] == 50 * 12 * 16
    assert found["activations"] == 14 * 16 * 36 * 2
    assert found["in all"] == found["table"] + 16 * SHAPE.parameters + found["activations"]
    assert (found["ids"], found["vectors"], found["gradients of vectors"]) == (36 * 4, 36 * 16, 36 * 32)  # half of all
    assert found["attention"] == 12 * 16 * 2 * 3 * 78  # 78 pairs a row
    assert found["projections"] == 30 * 16 * 16 * 2 * 36
    # Rows: read, and read and written; vector and gradient; a sum, read and written.
    assert found["traffic"] == 2 * found["activations"] + 28 * SHAPE.parameters + 36 * (3 * 32 + 32 + 64 + 2 * 4)
    assert found["all-to-all"] == 36 * (8 + 32 + 64) / 2  # ms at a thousand bytes a second


def test_every_number_has_a_source() -> None:
    given = studies.plan("cost", ROOT / "params")["settings"]
    entries = [one for entry in given.values() for one in ([entry] if "source" in entry else entry.values())]
    assert len(entries) == len(given) - 2 + sum(len(given[name]) for name in ("shapes", "cards"))
    assert all(len(one["source"]) > 10 for one in entries)
