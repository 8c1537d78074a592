"""Records of ranking, from runs whose predictions are made up: one mean for all seeds of a row."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import save_file

from steps.common import params, yaml_files
from steps.common.cli import StepError
from steps.common.files import write_json, write_text
from steps.evaluation import engagements
from steps.reporting.outcomes import TestPredictions
from steps.reporting.records import RUNS, read_records, write_records
from steps.reporting.statistics import values_of_models, values_of_users
from tests.conftest import step
from tests.steps.runs import seal

ROW = ("demo-taste", "temporal-ranking", "hstu-ranking")
USERS = 40


def experiment(project: Path, seeds: list[int], models: list[str]) -> list[params.Run]:
    content = {"title": "Mine", "datasets": ["demo-taste"], "protocols": ["temporal-ranking"]}
    text = yaml_files.dump(content | {"models": models, "seeds": seeds})
    (project / "params/experiments/mine.yaml").write_text(text)
    return list(params.runs("mine", project / "params"))


def fake_run(project: Path, run: params.Run, users: int = USERS) -> None:
    """A run of which targets and labels are those of every other, and the logits its own."""
    folder = project / "runs/mine" / run.path
    random = torch.Generator().manual_seed(0)
    user = torch.repeat_interleave(torch.arange(users), torch.randint(1, 30, (users,), generator=random))
    label = (torch.rand(len(user), generator=random) < 0.4 + 0.3 * (user % 2)).long()
    random.manual_seed(1 + 10 * len(run.model) + run.seed)
    logit = (torch.randn(len(user), generator=random) + label).round(decimals=1)  # with ties
    drawn = engagements.Predictions(user, logit, label)
    metrics: dict[str, Any] = {"test": engagements.named(engagements.engagement_values(drawn, users).tolist())}
    metrics |= {"reliability": engagements.reliability(logit, label, 4), "epoch": 1, "train_seconds": 1.5}
    metrics |= {"peak_bytes": None, "commit": "a" * 40, "data_sha256": "d" * 64, "device": "CPU, 2 threads"}
    metrics |= {"versions": {"torch": "2.13.0"}}
    write_json(folder / "config.json", params.resolve(run, project / "params"))
    write_text(folder / "history.jsonl", '{"epoch": 1, "valid/auc": 0.5}\n')
    write_json(folder / "metrics.json", metrics)
    sums = torch.stack(engagements.user_sums(drawn), dim=1)
    outcomes = {"test_users": user, "test": logit, "test_labels": label, "test_sums": sums}
    save_file(outcomes, folder / "outcomes.safetensors")
    save_file({"w": torch.ones(2)}, folder / "model.safetensors")
    seal(folder)


def tables(source: str) -> dict[str, bytes]:
    for name in ("tabulate", "compare"):
        step(name, "--experiment", "mine", "--runs", source, "--output", "reports/mine", cwd=Path())
    return content(Path("reports/mine"))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def record_all() -> Path:
    """The light records of experiment `mine`."""
    folder = Path("reports/mine/records")
    write_records("mine", read_records("mine", Path("runs/mine"))[0], folder)
    return folder


@pytest.fixture
def runs(project: Path, monkeypatch: pytest.MonkeyPatch) -> list[params.Run]:
    """Three seeds of two rows, and the one seed of a row without randomness."""
    monkeypatch.chdir(project)
    found = experiment(project, [0, 1, 2], ["mean-rating", "hstu-ranking", "hstu-ranking-merged"])
    for run in found:
        fake_run(project, run)
    return found


def test_tables_are_the_same_bytes_from_runs_and_from_the_means_of_their_rows(runs: list[params.Run]) -> None:
    made = tables("runs/mine")
    assert {"comparisons.csv", "intervals.csv", "table.md"} <= set(made)
    folder = record_all()
    kept = pl.read_parquet(folder / TestPredictions.FILE)
    assert kept.columns == ["dataset", "model", "protocol", *TestPredictions.SCHEMA]
    counted = kept.group_by("model").agg(pl.len(), pl.col("seeds").unique()).sort("model")
    expected = [("hstu-ranking", USERS, [3]), ("hstu-ranking-merged", USERS, [3]), ("mean-rating", USERS, [1])]
    assert counted.rows() == expected
    digests = pl.read_parquet(folder / RUNS).group_by("model").agg(pl.col("outcomes_sha256").n_unique())
    assert digests["outcomes_sha256"].to_list() == [1, 1, 1]
    assert tables(f"{folder}") == made


def test_recording_again_writes_the_same_bytes(runs: list[params.Run], tmp_path: Path) -> None:
    folder = record_all()
    before = content(folder)
    assert content(record_all()) == before
    write_records("mine", read_records("mine", folder)[0], tmp_path / "of records")
    assert content(tmp_path / "of records") == before
    for run in runs:
        if run.model != "hstu-ranking":
            shutil.rmtree(Path("runs/mine") / run.path)
    assert content(record_all()) == before  # other rows stay


def test_values_of_a_recorded_row_are_the_mean_of_its_seeds_values(runs: list[params.Run]) -> None:
    """Against the values of every seed's sums, which nothing has rounded."""
    exact = []
    for record in read_records("mine", Path("runs/mine"))[0]:
        if record.row == ROW:
            exact.append(values_of_users(record.outcomes()))
    assert len(exact) == 3
    found = values_of_models(read_records("mine", record_all())[0])[ROW[:2]][ROW[2]]
    np.testing.assert_allclose(found, np.mean(exact, axis=0), atol=2e-5)
    np.testing.assert_allclose(found.mean(axis=0), np.mean(exact, axis=(0, 1)), atol=5e-6)


def test_values_are_linear_in_what_is_averaged() -> None:
    """Sums whose mean over three seeds is a whole number of steps: users of 25, 169 and 16 targets, of which 9, 25 and
    0 are engagements, and all roots are whole."""
    examples, positives = np.array([25.0, 169.0, 16.0]), np.array([9.0, 25.0, 0.0])
    negatives = examples - positives
    pairs = positives * negatives
    random = np.random.default_rng(0)
    drawn = random.integers(5_000, 20_000, (3, 3, 3))  # seeds, sums, users
    drawn[2] += -drawn.sum(axis=0) % 3
    ordered = random.integers(0, 2 * pairs + 1, (3, 3))
    seeds = []
    for steps, twice in zip(drawn, ordered, strict=True):
        loss, above, below = (
            one / 2**15 * np.sqrt(count) for one, count in zip(steps, (examples, positives, negatives), strict=True)
        )
        with np.errstate(invalid="ignore"):
            own_auc = twice / (2 * pairs)
        seeds.append(TestPredictions(np.arange(3), examples, positives, loss, own_auc, above, below))
    row = TestPredictions.of_row(seeds)
    assert row.seeds == 3
    assert row.light()["twice_ordered"].to_list() == ordered.sum(axis=0).tolist()
    assert row.light()["loss"].to_list() == (drawn[:, 0].sum(axis=0) // 3).tolist()
    expected = np.mean([values_of_users(one) for one in seeds], axis=0)
    np.testing.assert_allclose(values_of_users(row), expected, rtol=1e-12)


def refused(said: str) -> None:
    """Recording is refused with these words, and writes nothing."""
    folder = Path("reports/mine/records")
    before = content(folder)
    line = step(
        "record", "--experiment", "mine", "--runs", "runs/mine", "--output", folder, cwd=Path(), check=False
    ).stderr.strip()
    assert said in line
    assert "\n" not in line
    assert content(folder) == before


def test_a_row_is_recorded_with_all_its_seeds(runs: list[params.Run]) -> None:
    record_all()
    shutil.rmtree(Path("runs/mine") / runs[-1].path)
    refused(
        "reports/mine/records has demo-taste/hstu-ranking-merged/temporal-ranking as the mean over seed-0, seed-1, "
        "seed-2, of which seed-2 is not among the runs given; give the runs of all its seeds together, or remove "
        "reports/mine/records and record all runs again"
    )
    shutil.rmtree("reports/mine/records")
    assert set(pl.read_parquet(record_all() / TestPredictions.FILE)["seeds"]) == {1, 2, 3}
    fake_run(Path(), runs[-1])
    assert set(pl.read_parquet(record_all() / TestPredictions.FILE)["seeds"]) == {1, 3}


def test_a_mean_over_a_seed_that_is_no_more_is_refused(project: Path, runs: list[params.Run]) -> None:
    folder = record_all()
    experiment(project, [0, 1], ["mean-rating", "hstu-ranking", "hstu-ranking-merged"])
    refused("hstu-ranking/temporal-ranking as the mean over seed-0, seed-1, seed-2, of which seed-2 is not among")
    with pytest.raises(
        StepError, match=r"hstu-ranking/temporal-ranking is recorded as the mean over 3 seeds, of which 2 are"
    ):
        values_of_models(read_records("mine", folder)[0])
    shutil.rmtree("runs/mine/demo-taste/hstu-ranking")
    refused(
        "hstu-ranking/temporal-ranking as the mean over seed-0, seed-1, seed-2, of which seed-0, seed-1, seed-2 are"
    )


def test_records_of_a_row_that_is_no_more_are_left_out(project: Path, runs: list[params.Run]) -> None:
    record_all()
    experiment(project, [0, 1, 2], ["mean-rating", "hstu-ranking"])
    folder = record_all()
    assert set(pl.read_parquet(folder / TestPredictions.FILE)["model"]) == {"mean-rating", "hstu-ranking"}
    assert len(pl.read_parquet(folder / RUNS)) == 4


def test_seeds_of_other_targets_are_refused(project: Path, runs: list[params.Run]) -> None:
    record_all()
    fake_run(project, runs[2], users=USERS - 1)
    said = f"{runs[2].path} predicts other targets than {runs[1].path}; train and evaluate it again"
    refused(said)
    with pytest.raises(StepError, match=said):
        values_of_models(read_records("mine", Path("runs/mine"))[0])


@pytest.mark.parametrize("damage", ["other sums", "a row a seed"])
def test_records_that_do_not_belong_together_are_named(runs: list[params.Run], damage: str) -> None:
    folder = record_all()
    kept = pl.read_parquet(folder / TestPredictions.FILE)
    if damage == "other sums":
        kept, said = kept.with_columns(pl.col("loss") + 1), "has other outcomes of"
    else:
        kept, said = (
            kept.rename({"seeds": "seed"}),
            "has a row a seed, as earlier commits have it; take .* from a later",
        )
    kept.write_parquet(folder / TestPredictions.FILE)
    with pytest.raises(StepError, match=said):
        values_of_models(read_records("mine", folder)[0])
    if damage == "a row a seed":
        refused("or remove it and record all runs again")
