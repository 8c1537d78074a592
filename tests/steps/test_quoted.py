"""The baselines that the paper quotes, where they are quoted from: what the data keep, and that its rows train."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from safetensors.numpy import load_file

from steps.common import params
from steps.data.sequences import load_sequences
from steps.docs import render_page
from steps.preprocess import write_sequences
from steps.tasks import build
from steps.training.loop import Training
from steps.validate import write_valid
from tests.conftest import ROOT
from tests.steps.runs import processed_by_its_steps

RUN = params.Run("quoted-baselines", "demo", "bert4rec-quoted", "strict", 0)
QUOTED = [row for row in params.load("experiments/quoted-baselines", ROOT / "params")["models"] if "quoted" in row]


def test_users_and_items_of_five_ratings_stay_and_ties_keep_the_order_of_the_file(tmp_path: Path) -> None:
    """Users 1 to 5 rated the films 10 to 50. Film 60 has four ratings. So has user 6; one of them is film 70's
    fifth, and counts, as both are counted before any row is left out."""
    log = [(user, film, 100) for user in (1, 2, 3, 4, 5) for film in (50, 40, 30, 20, 10)]
    log += [(user, 60, 300) for user in (1, 2, 3, 4)] + [(user, 70, 200) for user in (1, 2, 3, 4)]
    log += [(6, 10, 1), (6, 20, 2), (6, 30, 3), (6, 70, 4)]
    (tmp_path / "ml-1m").mkdir()
    lines = [f"{user}::{film}::4::{978300000 + time}\n" for user, film, time in log]
    (tmp_path / "ml-1m/ratings.dat").write_text("".join(lines))
    entry = params.entry("datasets", "ml-1m-5-core", ROOT / "params")
    checks = entry["checks"] | {"expected": {"raw_rows": 37, "rows": 29, "users": 5, "items": 6, "catalogue": 6}}
    for folder in ("valid", "made"):
        (tmp_path / folder).mkdir()
    told = write_valid(tmp_path, entry | {"checks": checks}, tmp_path / "valid")
    assert told["filters"][0]["dropped"] == {"rows": 8, "users": 1, "items": 1}
    told |= {"files": {"interactions.parquet": "", "items.parquet": ""}}
    write_sequences(tmp_path / "valid", told, tmp_path / "made", entry["ties"])
    assert pl.read_parquet(tmp_path / "made/items.parquet")["raw_id"].to_list() == [10, 20, 30, 40, 50, 70]
    tensors = load_file(tmp_path / "made/sequences.safetensors")
    assert tensors["offsets"].tolist() == [0, 6, 12, 18, 24, 29]
    assert tensors["item"].tolist() == [5, 4, 3, 2, 1, 6] * 4 + [5, 4, 3, 2, 1]


def test_the_variant_differs_from_ml_1m_in_what_it_keeps_alone() -> None:
    datasets = params.load("datasets", ROOT / "params")
    ours, theirs = datasets["ml-1m"], datasets["ml-1m-5-core"]
    assert {key for key in theirs if theirs[key] != ours.get(key)} == {"title", "files", "checks", "filters"}
    assert theirs["files"] == {"interactions": ours["files"]["interactions"]}


@pytest.mark.parametrize("row", QUOTED)
def test_a_quoted_row_has_its_authors_settings_on_any_data(row: str) -> None:
    config = params.resolve(replace(RUN, dataset="ml-1m-5-core", model=row), ROOT / "params")
    epochs, patience, heads = {"bert4rec-quoted": (200, 20, 2)}.get(row, (100, 10, 1))
    wanted = {"max_len": 200, "batch": 128, "epochs": epochs, "patience": patience}
    assert {key: config["training"][key] for key in wanted} == wanted
    assert config["model"]["dim"] == 64
    assert config["model"]["optimizer"] == {"lr": 1e-3, "betas": [0.9, 0.999], "weight_decay": 0.0}
    if row != "gru4rec-quoted":  # one layer, and no dropout that acts
        assert (config["model"]["blocks"], config["model"]["heads"], config["training"]["dropout"]) == (2, heads, 0.1)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return processed_by_its_steps("demo", tmp_path_factory.mktemp("demo"))


@pytest.mark.parametrize("row", QUOTED)
def test_a_quoted_row_trains_two_steps_on_the_demo(row: str, demo: Path, tmp_path: Path) -> None:
    sequences, digest = load_sequences(demo, torch.device("cpu"))
    config = params.resolve(replace(RUN, model=row), ROOT / "params")
    training = Training(config, sequences, digest, tmp_path)
    before = {name: value.clone() for name, value in training.model.state_dict().items()}
    training.model.train()
    for seed, step in zip((1, 2), training.schedule.epoch(), strict=False):
        training.execution(step, seed)
    start = math.log(2 if row == "sasrec-quoted-bce" else sequences.num_items)  # of small initial weights
    assert float(training.execution.total) / 2 == pytest.approx(start, rel=0.1)
    after = training.model.state_dict()
    assert [name for name in before if torch.equal(before[name], after[name])] == []


def test_sasrec_s_weights_are_as_many_as_theirs_and_start_as_they_do() -> None:
    torch.manual_seed(0)
    config = params.resolve(replace(RUN, dataset="ml-1m-5-core", model="sasrec-quoted"), ROOT / "params")
    model: Any = build(config, 3416)
    block = model.encoder.blocks[0]
    for weight in (block.output.weight, block.inner.weight, block.outer.weight, model.encoder.position.weight):
        assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert float(block.query.weight.detach().std()) == pytest.approx(
        (2 / (64 + 3 * 64)) ** 0.5, rel=0.1
    )  # Xavier of (3 d, d)
    assert not block.inner.bias.any()
    assert model.encoder.position.weight.shape == (200, 64)
    # Their notebook's summary: items, positions, norms, attention, norms, feed-forward, the last norm.
    assert model.num_parameters() == 3417 * 64 + 12_800 + 256 + 33_280 + 256 + 16_640 + 128


def test_the_finding_stands_on_its_page_once_it_is_recorded(tmp_path: Path) -> None:
    for path in (ROOT / "reports").iterdir():
        if path.name != "quoted-baselines":
            (tmp_path / path.name).symlink_to(path)
    template = ROOT / "docs/templates/findings.md.j2"
    words = "Trained as it is there"
    assert words not in render_page(template, tmp_path)
    (tmp_path / "quoted-baselines").mkdir()
    rows = [("bert4rec-quoted", 0.15), ("bert4rec", 0.14), ("gru4rec-quoted", 0.16), ("gru4rec", 0.17)]
    rows += [("sasrec-quoted", 0.18)]
    of_table = {"dataset": "ml-1m-5-core", "protocol": "strict"}
    table = pl.DataFrame([of_table | {"model": model, "test/ndcg@10": value} for model, value in rows])
    table.write_csv(tmp_path / "quoted-baselines/table.csv")
    pair: dict[str, Any] = {"better": "bert4rec-quoted", "worse": "bert4rec", "difference": 0.01, "p_holm": 1e-5}
    pair |= {"low": 0.005, "high": 0.015, "seeds": 5, "seeds_sd": 0.001}
    pl.DataFrame([of_table | pair]).write_csv(tmp_path / "quoted-baselines/comparisons.csv")
    page = render_page(template, tmp_path)
    assert words in page
    assert "| the same, run here | 0.1500 (97.6 %) | 0.1600 (97.1 %) |" in page  # of 0.1537 and 0.1648
    assert "| settings of ours | 0.1400 | 0.1700 |" in page
    assert "theirs are +0.0100 above ours on the same data\n(p 1e-05)" in page
    assert "full softmax has 0.1800" in page
