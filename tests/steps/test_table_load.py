"""The load test of a sharded table: what two processes look up and send, counted apart; and how it is refused."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kernels.jagged import fbgemm as fbgemm_gpu
from kernels.rowwise_table import fbgemm, torchrec
from steps.common.cli import StepError
from steps.common.processes import Processes
from steps.data.generators.fractal import Expansion
from steps.data.sequences import load_sequences
from steps.studies import table_load
from steps.studies.table_load import ids_of, measure, require, table_of
from tests.conftest import write_processed

SETTINGS = {"dim": 8, "lr": 0.05, "length": 40, "users": 3, "steps": 2}
CASE = {"data": "t", "rows": 2, "columns": 5, "by": "ours", "processes": 2}
PLAN: dict[str, Any] = {"device": "cpu", "settings": SETTINGS}


def test_what_a_process_says_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(table_load.__file__).parents[2]))
    with pytest.raises(StepError, match=r"it said: .*processed/t/\S+ does not exist; run preprocess"):
        measure(CASE, PLAN, tmp_path)


def test_two_processes_look_up_an_expansion_and_send_what_one_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(table_load.__file__).parents[2]))
    data, digest = load_sequences(write_processed(tmp_path / "processed/t", [9] * 12, 30), torch.device("cpu"))
    rows = measure(CASE, PLAN, tmp_path)
    found = {one["metric"]: one["value"] for one in rows}
    assert {one["data_sha256"] for one in rows} == {digest}
    expansion = Expansion(data.offsets.numpy(), data.item.numpy(), 30, 2, 5, 40)
    assert found["table rows"] == 151  # padding, and 30 x 5 items
    assert found["table"] == 76 * (2 * 8 + 4)  # of the process with one row more
    sent, ids = [0, 0], [0, 0]
    for step in (2, 3):  # the first two warm up
        asked = [ids_of(expansion, 3, step, Processes(rank, 2)) for rank in (0, 1)]
        assert not torch.equal(*(one[:20] for one in asked))
        of_other = [int((asked[0] >= 76).sum()), int((asked[1] < 76).sum())]
        for rank in (0, 1):
            ids[rank] += len(asked[rank])
            sent[rank] += 8 + 8 * of_other[rank]  # how many, and which
            sent[rank] += 8 * (2 * of_other[1 - rank] + 4 * of_other[rank])  # vectors in answer, and gradients
    assert found["ids"] == max(ids) / 2
    assert found["sent"] == max(sent) / 2
    assert all(found[name] > 0 for name in ("step", "part: lookup", "part: all-to-all", "part: update", "making ids"))


def without(name: str, available: bool) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not available, reason=f"{name} is not installed")


@pytest.mark.parametrize(
    "processes",
    [
        pytest.param(1, marks=without("fbgemm_gpu", fbgemm_gpu.available())),
        pytest.param(2, marks=without("TorchRec", fbgemm_gpu.available() and torchrec.available())),
    ],
)
def test_a_table_of_fbgemm_gpu_is_timed_as_a_whole(
    processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(table_load.__file__).parents[2]))
    write_processed(tmp_path / "processed/t", [9] * 12, 30)
    by = {name: measure(CASE | {"by": name, "processes": processes}, PLAN, tmp_path) for name in ("ours", "fbgemm")}
    torchs, fbgemms = ({one["metric"]: one["value"] for one in rows} for rows in by.values())
    assert torchs.keys() - fbgemms.keys() == {"sent", "part: lookup", "part: all-to-all", "part: update"}
    assert all(torchs[name] == fbgemms[name] for name in ("table rows", "table", "ids"))
    assert fbgemms["step"] > 0


def test_a_table_that_fbgemm_gpu_does_not_take_is_not_timed_as_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(table_load.__file__).parents[2]))
    write_processed(tmp_path / "processed/t", [9] * 12, 30)
    plan = PLAN | {"settings": SETTINGS | {"dim": 6}}
    with pytest.raises(StepError, match=r"no float16 table of width 6 on cpu; .* --only by=ours"):
        measure(CASE | {"by": "fbgemm", "processes": 1}, plan, tmp_path)


def test_the_study_alone_has_fbgemm_gpu_hold_a_table_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fbgemm_gpu, "fits", lambda _: True)
    monkeypatch.setattr(fbgemm, "fits", fbgemm.fits)  # which the study sets
    weight = torch.zeros(3, 8, dtype=torch.float16)
    on_cuda: Any = SimpleNamespace(is_cuda=True, shape=weight.shape, dtype=weight.dtype, numel=weight.numel)
    assert fbgemm.fits(weight)
    assert not fbgemm.fits(on_cuda)
    assert table_load._by_fbgemm(SimpleNamespace(weight=on_cuda))
    assert fbgemm.fits(on_cuda)


def test_a_step_updates_the_rows_that_it_looks_up_and_no_others() -> None:
    table = table_of(20, 8, 0.05, torch.device("cpu"), Processes())
    before = table.weight.clone()
    parts = table_load.parts_of_step(table, torch.tensor([3, 7]), 8, table_load.Watch(torch.device("cpu")))
    changed = (table.weight != before).any(1)
    assert changed.nonzero()[:, 0].tolist() == [3, 7]
    assert parts[0] > 0
    assert parts[1] == 0  # one process sends nothing
    assert parts[2] > 0


def test_what_cannot_be_measured_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(
        StepError, match=r"2 processes need a CUDA device each, and this machine shows 1; .* --only processes=1"
    ):
        require([CASE, CASE | {"processes": 1}], PLAN | {"device": "cuda"})
    require([CASE | {"processes": 1}], PLAN | {"device": "cuda"})
    monkeypatch.setattr(fbgemm_gpu, "available", lambda: True)
    monkeypatch.setattr(torchrec, "available", lambda: False)
    with pytest.raises(StepError, match=r"TorchRec is not installed, .*extra `distributed`, .* --only by=ours"):
        require([CASE | {"by": "fbgemm"}], PLAN)
    require([CASE | {"by": "fbgemm", "processes": 1}], PLAN)
    monkeypatch.setenv("PYTHONPATH", str(Path(table_load.__file__).parents[2]))
    with pytest.raises(StepError, match=r"a process ended with an error; it said: .*manifest.json") as refused:
        measure(CASE | {"processes": 1}, PLAN, tmp_path)
    assert "\n" not in str(refused.value)
