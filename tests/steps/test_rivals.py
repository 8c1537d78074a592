"""FuXi and LiGR against their formulas, token by token and pair by pair, in values and gradients."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from steps.common import params, yaml_files
from steps.common.cli import StepError
from steps.common.files import read_json
from steps.data.sequences import Batch
from steps.models.fuxi import exponential_power, toeplitz
from steps.reporting.records import read_records, write_records
from steps.tasks import Task
from tests.conftest import ROOT, step
from tests.conftest import run as run_command
from tests.steps.runs import processed_by_its_steps
from tests.steps.test_models import batch, make

LENGTHS = [2, 9, 4]
Encode = Callable[[Task, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def silu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x)


def rms(x: torch.Tensor) -> torch.Tensor:
    return x / torch.sqrt((x * x).sum() / len(x) + 1e-6)


def embedded(model: Task, items: torch.Tensor) -> torch.Tensor:
    return model.items.weight[items] * math.sqrt(6) + model.encoder.position.weight[: len(items)]


def fuxi(model: Task, items: torch.Tensor, query_time: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    """The states (n, d) of one user: arXiv 2502.03036, and 2512.12740 where the blocks have a decay."""
    x = embedded(model, items)
    for block in model.encoder.blocks:
        alpha, heads, dqk, dv = not hasattr(block, "decay"), 2, 3, 5
        inner = heads * dv
        sizes = [3 * inner, inner, heads * dqk, heads * dqk] if alpha else [2 * inner, inner]
        parts = [silu(block.uvqk.T @ rms(token)).split(sizes) for token in x]
        rows = []
        for i in range(len(x)):
            by_position, by_time, by_meaning = torch.zeros(inner), torch.zeros(inner), torch.zeros(inner)
            for j in range(i + 1):
                v, seconds = parts[j][1], abs(int(query_time[i] - time[j]))
                by_position = by_position + block.position_bias[i - j] * v
                if alpha:
                    bucket = min(max(math.floor(math.log(max(1, seconds)) / 0.301), 0), 128)
                    by_time = by_time + block.time_bias[bucket] * v
                    scores = [
                        silu(parts[i][2][h * dqk : (h + 1) * dqk] @ parts[j][3][h * dqk : (h + 1) * dqk]) / 211
                        for h in range(heads)
                    ]
                    weighted = [score * v[h * dv : (h + 1) * dv] for h, score in enumerate(scores)]
                    by_meaning = by_meaning + torch.cat(weighted)
                else:
                    # They start at g = 0.8, whose log-odds are log 4, and at b = 0.2.
                    g, b = 1 / (1 + torch.exp(-block.decay) / 4), torch.exp(block.power) / 5
                    by_time = by_time + block.amplitude * g ** (float(seconds) ** b if seconds else 0.0) * v
            c = torch.cat([by_position, by_time, by_meaning] if alpha else [by_position, by_time])
            h = x[i] + block.output.weight @ (parts[i][0] * rms(c)) + block.output.bias
            n = rms(h)
            rows.append(h + block.outer.weight @ (silu(block.gate.weight @ n) * (block.inner.weight @ n)))
        x = torch.stack(rows)
    return x


def ligr(model: Task, items: torch.Tensor, query_time: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    """The states (n, d) of one user: arXiv 2502.03417, as eSASRec has it."""

    def norm(row: torch.Tensor, layer: Any) -> torch.Tensor:
        centred = row - row.mean()
        return centred / torch.sqrt((centred * centred).mean() + 1e-5) * layer.weight + layer.bias

    def gate(row: torch.Tensor, layer: Any) -> torch.Tensor:
        return torch.sigmoid(layer.weight @ row + layer.bias)

    x = embedded(model, items)
    for block in model.encoder.blocks:
        qkv = [block.qkv.weight @ norm(row, block.attention_norm) + block.qkv.bias for row in x]
        rows = []
        for i, row in enumerate(x):
            mixed = []
            for h in range(2):
                cut = [slice(part * 6 + 3 * h, part * 6 + 3 * h + 3) for part in range(3)]
                scores = torch.stack([qkv[i][cut[0]] @ qkv[j][cut[1]] / math.sqrt(3) for j in range(i + 1)])
                weights = torch.exp(scores - scores.detach().max())
                mixed.append(sum(weights[j] * qkv[j][cut[2]] for j in range(i + 1)) / weights.sum())
            attention = block.output.weight @ torch.cat(mixed) + block.output.bias
            row = row + gate(row, block.attention_gate) * attention
            n = norm(row, block.feed_forward_norm)
            fed = block.outer.weight @ (silu(block.gate.weight @ n) * (block.inner.weight @ n))
            rows.append(row + gate(row, block.feed_forward_gate) * fed)
        x = torch.stack(rows)
    return x


CASES: list[tuple[str, dict[str, Any], Encode]] = [
    ("fuxi-alpha", {"time": "next"}, fuxi),
    ("fuxi-alpha", {"time": "self"}, fuxi),
    ("fuxi-gamma", {"time": "next"}, fuxi),
    ("fuxi-gamma", {"time": "self"}, fuxi),
    ("ligr", {}, ligr),
]


def rival(name: str, dtype: torch.dtype, **changes: Any) -> Task:
    """A model in which the times' weights differ from pair to pair."""
    model = make(name, dtype, **changes)
    for place, block in enumerate(model.encoder.blocks if name == "fuxi-gamma" else []):
        with torch.no_grad():
            block.decay.fill_(place - 1.0)
            block.power.fill_(place - 0.9)
            block.amplitude.fill_(0.7 - 1.5 * place)
    return model


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 3e-5)])
@pytest.mark.parametrize(
    ("name", "changes", "by_hand"), CASES, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_states_and_gradients_are_those_of_the_formula(
    name: str, changes: dict[str, Any], by_hand: Encode, dtype: torch.dtype, tolerance: float
) -> None:
    exact, model, data = rival(name, torch.float64, **changes), rival(name, dtype, **changes), batch(LENGTHS)
    torch.manual_seed(7)
    direction = torch.randn(len(data.item), 6, dtype=torch.float64)
    query_time = data.next_timestamp if changes.get("time") == "next" else data.timestamp
    torch.set_default_dtype(torch.float64)
    try:
        expected = torch.cat(
            [
                by_hand(exact, data.item[start:end], query_time[start:end], data.timestamp[start:end])
                for start, end in zip(data.offsets[:-1].tolist(), data.offsets[1:].tolist(), strict=True)
            ]
        )
        (expected * direction).sum().backward()
    finally:
        torch.set_default_dtype(torch.float32)
    found = model.encode(data)
    (found * direction.to(dtype)).sum().backward()
    assert float((found.double() - expected).detach().abs().max()) < tolerance * float(expected.detach().abs().max())
    of_hand = {key: parameter.grad for key, parameter in exact.named_parameters()}
    assert [key for key, gradient in of_hand.items() if gradient is None or not gradient.any()] == []
    # Of a float64 each by its own size, but for those that are rounding errors alone, as of LiGR's biases of keys.
    largest = max(float(gradient.abs().max()) for gradient in of_hand.values())
    for key, parameter in model.named_parameters():
        size = largest if dtype == torch.float32 else max(float(of_hand[key].abs().max()), 1e-3)
        torch.testing.assert_close(parameter.grad.double(), of_hand[key], rtol=0, atol=tolerance * size, msg=key)


def test_a_table_becomes_the_weights_of_all_earlier_tokens() -> None:
    table = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    assert toeplitz(table, 3).tolist() == [[1, 0, 0], [2, 1, 0], [3, 2, 1]]
    assert toeplitz(table, 1).tolist() == [[1]]
    assert toeplitz(table, 5)[4].tolist() == [5, 4, 3, 2, 1]
    spread = toeplitz(table.requires_grad_(), 3)
    spread.backward(torch.tensor([[1.0, 90.0, 90.0], [10.0, 2.0, 90.0], [100.0, 20.0, 4.0]]))
    assert table.grad is not None
    assert table.grad.tolist() == [7, 30, 100, 0, 0]  # of each distance; of no later token


def test_the_weight_of_time_falls_from_its_amplitude_and_has_finite_gradients() -> None:
    parameters = [torch.tensor(value, requires_grad=True) for value in (0.5, math.log(4), math.log(0.5))]
    weights = exponential_power(torch.tensor([0.0, 1.0, 4.0, 3.0e9]), *parameters)
    torch.testing.assert_close(weights, torch.tensor([0.5, 0.4, 0.32, 0.0]))  # 0.5 x 0.8^0, 0.8^1, 0.8^2
    weights.sum().backward()
    assert all(torch.isfinite(parameter.grad) for parameter in parameters)


@pytest.mark.parametrize("power", [3.0, 4.3, 40.0])
def test_no_power_makes_a_century_something_else_than_a_number(power: float) -> None:
    parameters = [torch.tensor(value, requires_grad=True) for value in (0.5, math.log(4), math.log(power))]
    weights = exponential_power(torch.tensor([0.0, 1.0, 6.3e8, 3.2e9]), *parameters)
    torch.testing.assert_close(weights, torch.tensor([0.5, 0.4, 0.0, 0.0]))
    weights.sum().backward()
    assert all(torch.isfinite(parameter.grad) for parameter in parameters)


def test_weight_decay_draws_the_weight_of_time_to_where_it_starts() -> None:
    block = make("fuxi-gamma").encoder.blocks[0]
    seconds, v = torch.full((1, 1, 1), 32.0, dtype=torch.float64), torch.ones(1, 1, 1, dtype=torch.float64)
    with torch.no_grad():
        block.amplitude.fill_(1.0)
        for parameter in (block.decay, block.power):
            parameter.mul_(0.0)  # as much of it as there can be
    (found,) = block.channels(v, v, v, seconds)
    assert found.item() == pytest.approx(0.64)  # 0.8^(32^0.2), and 32^0.2 is 2


@pytest.mark.parametrize("name", ["fuxi-alpha", "fuxi-gamma"])
@pytest.mark.parametrize(("time", "sees_target"), [("next", True), ("self", False)])
def test_only_time_next_uses_the_time_of_the_target(name: str, time: str, sees_target: bool) -> None:
    model, data = rival(name, torch.float64, time=time), batch([12])
    later = Batch(**vars(data) | {"next_timestamp": data.next_timestamp.clone()})
    later.next_timestamp[-1] += 10**9
    assert torch.equal(model.encode(data), model.encode(later)) != sees_target


def test_no_time_enters_ligr() -> None:
    model, data = make("ligr"), batch([12])
    others = Batch(**vars(data) | {"timestamp": data.timestamp + 1, "next_timestamp": data.next_timestamp * 2})
    assert torch.equal(model.encode(data), model.encode(others))


@pytest.mark.parametrize("name", ["fuxi-alpha", "fuxi-gamma", "ligr"])
def test_equal_seeds_drop_alike(name: str) -> None:
    model, data = make(name).train(), batch(LENGTHS)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(model.encode(data))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_weights_start_as_stated() -> None:
    torch.manual_seed(0)
    sizes = {"dim": 64, "heads": 1, "dqk": 64, "dv": 64}
    alpha, gamma, gated = (make(name, torch.float32, **sizes) for name in ("fuxi-alpha", "fuxi-gamma", "ligr"))
    for parameter in [*alpha.parameters(), *gamma.parameters(), *gated.parameters()]:
        parameter.data.div_(3)  # which `make` multiplied by
    block = alpha.encoder.blocks[0]
    assert block.uvqk.std().item() == pytest.approx(0.02, rel=0.03)
    assert block.uvqk.shape == (64, (3 + 1 + 2) * 64)
    assert block.output.weight.abs().max().item() <= math.sqrt(6 / (3 * 64 + 64))
    assert gamma.encoder.blocks[0].uvqk.shape == (64, 3 * 64)
    assert abs(gamma.encoder.blocks[0].amplitude.item()) <= 0.2
    assert (gamma.encoder.blocks[0].decay.item(), gamma.encoder.blocks[0].power.item()) == (0, 0)
    assert gated.encoder.blocks[0].qkv.weight.std().item() == pytest.approx(math.sqrt(2 / (64 + 192)), rel=0.05)
    assert not gated.encoder.blocks[0].qkv.bias.any()


def numbers_by_hand(row: str, items: int, positions: int, sizes: dict[str, int]) -> int:
    """How many numbers a row of params/models.yaml learns, from its formulas."""
    d, h, qk, v = (sizes[key] for key in ("dim", "heads", "dqk", "dv"))
    block = {
        "sasrec-sampled": 4 * (d * d + d) + 2 * (d * d + d),
        "esasrec": 4 * (d * d + d) + 2 * (d * d + d) + 3 * 4 * d * d + 2 * 2 * d,
        "hstu": d * h * (2 * v + 2 * qk) + h * v * d + d + 2 * positions - 1 + 129,
        "fuxi-alpha": d * h * (4 * v + 2 * qk) + 3 * h * v * d + d + 3 * d * d + positions + 129,
        "fuxi-gamma": d * h * 3 * v + 2 * h * v * d + d + 3 * d * d + positions + 3,
    }
    return (items + 1) * d + positions * d + sizes["blocks"] * block[row]


def test_the_search_has_what_the_authors_take() -> None:
    runs = params.check("rivals-search", ROOT / "params")
    points = {str(sorted(params.point_of(run.model)[1].items())) for run in runs}
    assert (len(points), len(runs)) == (20, 20 * 7 * 2)
    for blocks, dropout, negatives in [
        (2, 0.2, 128),  # HSTU and FuXi on MovieLens-1M
        (4, 0.5, 512),  # HSTU on Amazon Books, as on Beauty here
        (2, 0.1, 256),  # eSASRec on MovieLens-1M, and SASRec beside it
        (1, 0.2, 256),  # eSASRec on Beauty
    ]:
        own = {"model.blocks": blocks, "model.optimizer.lr": 0.001}
        own |= {"training.dropout": dropout, "training.negatives": negatives}
        assert str(sorted(own.items())) in points


def test_a_search_of_rivals_runs_on_the_demo_and_tunes_an_experiment(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, rows = project / "params", ["sasrec-sampled", "esasrec", "hstu", "fuxi-alpha", "fuxi-gamma"]
    rates = [1.0e-4, 3.0e-3]
    for name, more in {
        "search": {"training": {"epochs": 1}, "grid": {"model.optimizer.lr": rates}, "points": 2},
        "own": {"tuned": "search"},
    }.items():
        path = root / f"local/experiments/{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {"title": name, "datasets": ["demo"], "models": rows, "protocols": ["strict"], "seeds": [0]}
        path.write_text(yaml_files.dump(about | more))
    with pytest.raises(StepError, match=r"key tuned: .*search\.yaml has nothing for sasrec-sampled on demo; run exp"):
        params.check("own", root)
    data = ("--data", processed_by_its_steps("demo", project / "data"))
    runs = params.check("search", root)
    assert len(runs) == 2 * len(rows)
    values: dict[str, dict[float, float]] = {}
    for run in runs:
        folder = Path("runs/search") / run.path
        named = ("--experiment", "search", "--dataset", "demo", "--model", run.model, "--protocol", "strict")
        step("plan", *named, "--seed", 0, *data, "--output", folder / "config.json", cwd=project)
        step("train", "--run", folder, *data, "--threads", 1, cwd=project)
        step("evaluate", "--run", folder, *data, cwd=project)
        config, row = read_json(project / folder / "config.json"), run.model.split("+")[0]
        found = read_json(project / folder / "metrics.json")
        items = read_json(data[1] / "manifest.json")["catalogue_items"]
        assert found["parameters"] == numbers_by_hand(row, items, 50 + 11, config["model"])
        values.setdefault(row, {})[config["model"]["optimizer"]["lr"]] = found["valid"]["ndcg@10"]
    monkeypatch.chdir(project)
    step("choose", "--experiment", "search", "--runs", "runs/search", cwd=project)
    for run in params.check("own", root):
        best = max(rates, key=lambda rate: values[run.model][rate])
        assert params.resolve(run, root)["model"]["optimizer"]["lr"] == best
    records, _ = read_records("search", Path("runs/search"))
    write_records("search", records, Path("reports/search/records"))
    written = (root / "local/tuned/search.yaml").read_bytes()
    step("choose", "--experiment", "search", cwd=project)  # of records
    assert (root / "local/tuned/search.yaml").read_bytes() == written
    for name in ("tabulate", "compare"):
        step(name, "--experiment", "search", "--runs", "runs/search", "--output", "reports/search", cwd=project)
    assert "Trials of a search" in Path("reports/search/comparisons.md").read_text()
    assert "FuXi-gamma" in Path("reports/search/table.md").read_text()


def test_an_experiment_whose_search_has_not_chosen_is_refused_in_one_line(project: Path) -> None:
    (project / "params/tuned/rivals-search.yaml").unlink(missing_ok=True)
    refused = run_command("snakemake", "--cores", "1", "--dry-run", "rivals", cwd=project, check=False)
    assert refused.returncode != 0
    assert "rivals-search.yaml has nothing for sasrec on ml-1m; run experiment rivals-search" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert run_command("snakemake", "--cores", "1", "--dry-run", "demo", cwd=project).returncode == 0
