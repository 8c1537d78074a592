"""FuXi's maps beside HSTU's bias: every way that is timed against a twin or a loop over pairs; what fits; ratios."""

import copy
import json
import math
from typing import Any

import pytest
import torch

from steps.common import params, studies
from steps.data.sequences import Batch
from steps.models.hstu import HSTULayer
from steps.studies import time_maps, time_maps_report
from steps.studies.dense_lookup import DenseHSTULayer, position_map, time_map
from steps.studies.encoder_efficiency import saved_bytes
from steps.studies.rows import Row, row
from steps.studies.time_maps import ALPHA, ATTENTION, DENSE, ENCODER, FLOOR, FUSED, GAMMA, MAP, MODELS, TRAINING
from tests.conftest import ROOT
from tests.steps.test_models import batch

STUDY = "time-maps"
ENCODERS = {"dim": 6, "heads": 2, "dqk": 3, "dv": 5, "dtype": "float32"}
SETTINGS: dict[str, Any] = {"encoder": ENCODERS, "fuxi": {"ff_multiplier": 2, "decay": 0.8, "power": 0.2}} | {
    "layers": 2,
    "tokens": 30,
}
CASE: dict[str, Any] = {"part": ATTENTION, "model": DENSE, "pass": TRAINING, "lengths": "ragged", "n": 12}
CASE |= {"compiled": False}
LENGTHS = [2, 9, 4]
INTERACTIONS = [3, 10, 5]  # a token less each, as every token predicts the next


def bucket(seconds: int) -> int:
    return min(math.floor(math.log(max(1, abs(seconds))) / 0.301), 128)


def pairs(data: Batch) -> list[tuple[int, int, int, int]]:
    """Each query and key that it sees, as tokens; how many places they are apart, and seconds to the next item."""
    found = []
    for start, end in zip(data.offsets[:-1].tolist(), data.offsets[1:].tolist(), strict=True):
        for i in range(start, end):
            found += [(i, j, i - j, abs(int(data.next_timestamp[i] - data.timestamp[j]))) for j in range(start, i + 1)]
    return found


def encoder(model: str, dtype: torch.dtype = torch.float64) -> Any:
    """An encoder of twelve positions whose weights are large enough that every term matters."""
    torch.manual_seed(3)
    made = time_maps.encoder_of(model, SETTINGS, 12).to(dtype)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(3)
    return made


def gradients(output: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    torch.manual_seed(7)
    return list(torch.autograd.grad(output, inputs, torch.randn(output.shape, dtype=output.dtype)))


def learned(made: Any, vqk: torch.Tensor) -> list[torch.Tensor]:
    of_block = made.blocks[0].named_parameters()
    return [vqk, *(parameter for name, parameter in of_block if name in time_maps._OF_ATTENTION)]


@pytest.mark.parametrize("time", ["next", "self"])
def test_a_dense_lookup_gives_the_bias_of_every_pair(time: str) -> None:
    data = batch(INTERACTIONS)
    query_time = data.next_timestamp if time == "next" else data.timestamp
    table, positions = torch.randn(129), torch.randn(23)  # for twelve positions
    weights, of_position = time_map(table, data, time), position_map(positions, data.max_len)
    assert weights.shape == (3, 9, 9)
    for sequence, (start, length) in enumerate(zip(data.offsets.tolist(), LENGTHS, strict=False)):
        for i in range(length):
            for j in range(length):
                assert of_position[i, j] == positions[11 + j - i]
                seconds = int(query_time[start + i] - data.timestamp[start + j])
                assert weights[sequence, i, j] == table[bucket(seconds)]


def test_attention_with_a_dense_lookup_is_attention_with_the_fused_bias() -> None:
    made, data = encoder(DENSE), batch(INTERACTIONS)
    fused = encoder(FUSED)
    fused.load_state_dict(made.state_dict())
    assert isinstance(made.blocks[0], DenseHSTULayer)
    assert type(fused.blocks[0]) is HSTULayer
    vqk = torch.randn(15, 22, dtype=torch.float64, requires_grad=True)
    found, expected = (time_maps.mixed(one, vqk, data) for one in (made, fused))
    torch.testing.assert_close(found, expected)
    inputs = [learned(one, vqk) for one in (made, fused)]
    assert [len(one) for one in inputs] == [3, 3]  # both tables
    for one, other in zip(gradients(found, inputs[0]), gradients(expected, inputs[1]), strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other)


def test_whole_encoders_with_either_bias_are_the_same() -> None:
    made, data = encoder(DENSE), batch(INTERACTIONS)
    fused = encoder(FUSED)
    fused.load_state_dict(made.state_dict())
    x = torch.randn(15, 6, dtype=torch.float64, requires_grad=True)
    found, expected = made(x, data), fused(x, data)
    torch.testing.assert_close(found, expected)
    of_both = (gradients(output, [x, *one.parameters()]) for output, one in ((found, made), (expected, fused)))
    for one, other in zip(*of_both, strict=True):
        torch.testing.assert_close(one, other)


def test_attention_without_bias_is_a_sum_over_pairs() -> None:
    made, data = encoder(FLOOR), batch(INTERACTIONS)
    vqk = torch.randn(15, 22, dtype=torch.float64, requires_grad=True)
    v, q, k = vqk[:, :10].view(15, 2, 5), vqk[:, 10:16].view(15, 2, 3), vqk[:, 16:].view(15, 2, 3)
    rows = [torch.zeros(2, 5, dtype=torch.float64) for _ in range(15)]
    for i, j, _, _ in pairs(data):
        scores = (q[i] * k[j]).sum(-1)
        rows[i] = rows[i] + (scores * torch.sigmoid(scores) / 12)[:, None] * v[j]
    found, expected = time_maps.mixed(made, vqk, data), torch.stack(rows).flatten(1)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, [vqk]), gradients(expected, [vqk]))


@pytest.mark.parametrize("model", [GAMMA, ALPHA])
def test_channels_of_fuxi_are_sums_over_pairs(model: str) -> None:
    made, data = encoder(model), batch(INTERACTIONS)
    block, inner = made.blocks[0], 10
    vqk = torch.randn(15, inner if model == GAMMA else 22, dtype=torch.float64, requires_grad=True)
    if model == GAMMA:
        with torch.no_grad():
            block.amplitude.fill_(0.7)
            block.decay.fill_(-1.0)
            block.power.fill_(-0.9)  # a month's weight is not 0 then
    v, q, k = vqk[:, :inner], vqk[:, 10:16].view(15, -1, 3), vqk[:, 16:].view(15, -1, 3)
    channels = 2 if model == GAMMA else 3
    rows = [[torch.zeros(inner, dtype=torch.float64)] * channels for _ in range(15)]
    for i, j, places, seconds in pairs(data):
        weights = [block.position_bias[places].expand(inner)]
        if model == GAMMA:
            g, b = 1 / (1 + torch.exp(-block.decay) / 4), torch.exp(block.power) / 5  # from 0.8 and 0.2
            weights.append((block.amplitude * g ** (float(seconds) ** b if seconds else 0.0)).expand(inner))
        else:
            scores = (q[i] * k[j]).sum(-1)
            weights.append(block.time_bias[bucket(seconds)].expand(inner))
            weights.append((scores * torch.sigmoid(scores) / 12).repeat_interleave(5))
        rows[i] = [total + weight * v[j] for total, weight in zip(rows[i], weights, strict=True)]
    expected = torch.stack([torch.cat(sums) for sums in rows])
    found = time_maps.mixed(made, vqk, data)
    torch.testing.assert_close(found, expected)
    inputs = learned(made, vqk)
    assert len(inputs) == (5 if model == GAMMA else 3)
    for one, other in zip(gradients(found, inputs), gradients(expected, inputs), strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other)


def test_maps_alone_are_those_of_the_formulas() -> None:
    case = CASE | {"part": MAP, "lengths": "full"}
    data = time_maps.batch_for(case, SETTINGS, "cpu")
    for model in (DENSE, GAMMA):
        call, (numbers,) = time_maps.subject(case | {"model": model}, SETTINGS, data)
        found, values = call().detach(), numbers.detach().double()
        assert found.shape == (len(data.user), 12, 12)
        g, b = 1 / (1 + torch.exp(-values[1])), torch.exp(values[2])
        for i, j, _, seconds in pairs(data):
            expected = values[bucket(seconds)] if model == DENSE else values[0] * g ** (float(seconds) ** b)
            assert float(found[i // 12, i % 12, j % 12]) == pytest.approx(float(expected), rel=1e-4)
    assert (float(values[0]), float(g), float(b)) == pytest.approx((0.1, 0.8, 0.2))


@pytest.mark.parametrize("lengths", ["full", "ragged"])
def test_all_models_of_a_shape_read_the_same_tokens_and_times(lengths: str) -> None:
    found = [time_maps.batch_for(CASE | {"model": model, "lengths": lengths}, SETTINGS, "cpu") for model in MODELS]
    assert all(torch.equal(one.timestamp, found[0].timestamp) for one in found)
    assert all(torch.equal(one.offsets, found[0].offsets) for one in found)
    assert found[0].max_len == 12
    assert 20 <= len(found[0].item) <= 40  # 30 are asked for
    assert (found[0].offsets.diff() == 12).all() == (lengths == "full")


def test_cases_have_every_model_at_every_shape_once() -> None:
    plan = studies.plan(STUDY, ROOT / "params")
    found = time_maps.cases(plan)
    assert len({json.dumps(case, sort_keys=True) for case in found}) == len(found)
    groups: dict[str, set[str]] = {}
    for case in found:
        if not case["compiled"] and case["part"] != MAP:
            groups.setdefault(json.dumps({key: case[key] for key in case if key != "model"}), set()).add(case["model"])
    assert set(map(frozenset, groups.values())) == {frozenset(MODELS)}
    assert {case["lengths"] for case in found if case["part"] == MAP} == {"full"}


@pytest.mark.parametrize(
    ("part", "model"),
    [(MAP, DENSE), (MAP, GAMMA), *((part, model) for part in (ATTENTION, ENCODER) for model in (DENSE, GAMMA, ALPHA))],
)
def test_what_is_kept_for_the_backward_pass_is_within_the_bound(part: str, model: str) -> None:
    case = CASE | {"part": part, "model": model, "n": 64, "lengths": "full"}
    settings = SETTINGS | {"tokens": 64}
    data = time_maps.batch_for(case, settings, "cpu")
    call, inputs = time_maps.subject(case, settings, data)
    assert 0.1 < saved_bytes(call, inputs) / time_maps.most_bytes(case, settings, 1) < 1


def test_maps_that_do_not_fit_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of float32 with two heads: 7 x 8 bytes a pair, and 4 x 2 x 4 of scores; of two layers 10 x 8, and 6 x 2 x 4."""
    plan, full = {"device": "cpu", "settings": SETTINGS | {"tokens": 120}}, CASE | {"lengths": "full"}
    monkeypatch.setattr(time_maps, "room_of", lambda device: 10 * 144 * 100.0)
    monkeypatch.setattr(time_maps, "subject", lambda *_: pytest.fail("was made"))
    (found,) = time_maps.measure(full | {"part": ENCODER}, plan, ROOT)
    assert (found["metric"], found["value"], found["model"]) == ("failed", 1, DENSE)
    assert found["seen"] == "its N x N maps take up to 0 GB, and 0 GB of the device may be taken"
    assert time_maps.most_bytes(full | {"part": ENCODER}, SETTINGS, 10) == 10 * 144 * 128
    assert time_maps.most_bytes(full, SETTINGS, 10) == 10 * 144 * 88
    assert time_maps.most_bytes(full | {"part": ENCODER, "model": FUSED}, SETTINGS, 10) == 0
    assert time_maps.most_bytes(full | {"part": ENCODER, "model": GAMMA}, SETTINGS, 10) == 10 * 144 * 80
    with pytest.raises(pytest.fail.Exception, match="was made"):
        time_maps.measure(full, plan, ROOT)


def test_compiled_code_that_does_not_run_is_said_and_other_errors_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no\ncompiler")

    monkeypatch.setattr(time_maps, "subject", broken)
    plan = {"device": "cpu", "settings": SETTINGS}
    (found,) = time_maps.measure(CASE | {"compiled": True}, plan, ROOT)
    assert found["seen"].endswith("RuntimeError: no compiler")
    with pytest.raises(RuntimeError, match="no"):
        time_maps.measure(CASE, plan, ROOT)


def test_what_torch_compile_takes_is_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASE | {"compiled": True}
    data, compiled = time_maps.batch_for(case, SETTINGS, "cpu"), torch.compile
    for model in (DENSE, GAMMA):
        expected = time_maps.subject(case | {"model": model, "compiled": False}, SETTINGS, data)[0]()
        with monkeypatch.context() as patched:
            patched.setattr(torch, "compile", lambda call, dynamic: compiled(call, backend="eager", fullgraph=True))
            found = time_maps.subject(case | {"model": model}, SETTINGS, data)[0]()
        torch.testing.assert_close(found, expected)


def rows() -> list[Row]:
    """Attention of training at N 8: 12 ms dense, 4 fused, 3 without, 2 and 6 of FuXi; on another card 30 dense."""
    machine = {"device": "H200", "card": "0a1b2c3d", "commit": "a" * 40}
    shape = {"part": ATTENTION, "pass": TRAINING, "lengths": "full", "n": 8, "compiled": False}
    times = {DENSE: 12.0, FUSED: 4.0, FLOOR: 3.0, GAMMA: 2.0, ALPHA: 6.0}
    found = [row(shape | {"model": model}, "ms", ms, "ms") | machine for model, ms in times.items()]
    found.append(row(shape | {"model": GAMMA}, "peak", 3_000_000, "B") | machine)
    found.append(row(shape | {"model": GAMMA, "n": 16}, "ms", 5.0, "ms") | machine)
    found.append(row(shape | {"model": DENSE, "n": 16}, "failed", 1, "of 1", seen="it is too large") | machine)
    found.append(row(shape | {"model": FUSED, "n": 16}, "ms", 10.0, "ms") | machine | {"card": "another"})
    return found


def test_ratios_are_of_one_shape_and_one_run() -> None:
    study = copy.deepcopy(params.load(f"studies/{STUDY}", ROOT / "params"))
    text, _, lines = time_maps_report.report(rows(), study)
    found = {(line["model"], line["n"]): line for line in lines if "ms" in line}
    over = {key: (line.get("over dense lookup"), line.get("over fused bias")) for key, line in found.items()}
    assert over == {
        (DENSE, 8): (None, 0.3333),
        (FUSED, 8): (3.0, None),
        (FLOOR, 8): (4.0, 1.3333),
        (GAMMA, 8): (6.0, 2.0),
        (ALPHA, 8): (2.0, 0.6667),
        (GAMMA, 16): (None, None),  # the dense one did not fit, the fused one is another card's
        (FUSED, 16): (None, None),
    }
    table = {line.split("|")[1].strip(): line for line in text.splitlines() if "| training |" in " ".join(line.split())}
    assert "does not fit" in text
    assert "2.00 (3.00)" in text
    assert "- HSTU, dense lookup, attention, training, full lengths, N 16, H200: it is too large" in text
    assert set(table) == set(MODELS)
