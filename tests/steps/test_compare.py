"""Statistics: intervals that cover, corrections that correct, and what is said of published orderings."""

import csv
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from steps.reporting.outcomes import TestRanks
from steps.reporting.parity import orderings
from steps.reporting.statistics import (
    compare_pairs,
    holm,
    interval,
    interval_rows,
    metrics_of_intervals,
    resample,
    values_of_users,
)


def resampled(models: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The resampled means of one metric: values (U,) of each model."""
    means = resample({name: values[:, None] for name, values in models.items()})
    return {name: of_metric[:, 0] for name, of_metric in means.items()}


def test_gains_are_ndcg_at_ten() -> None:
    best, ties = np.array([1, 1, 3, 10, 10, 500, 0]), np.array([0, 1, 0, 0, 1, 0, 0])
    gains = values_of_users(TestRanks(np.arange(len(best)), best, ties))[:, 0]
    last = 1 / np.log2(11)
    np.testing.assert_allclose(gains, [1.0, (1 + 1 / np.log2(3)) / 2, 0.5, last, last / 2, 0.0, 0.0])


def test_the_interval_covers_the_true_mean_as_often_as_it_says() -> None:
    random = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        low, high = interval(resample({"a": random.exponential(1.0, (150, 1))}, seed=trial)["a"][:, 0])
        covered += low <= 1.0 <= high
    assert 0.89 <= covered / 200 <= 0.99


def test_the_interval_agrees_with_scipy() -> None:
    values = np.random.default_rng(2).random(500)
    expected = stats.bootstrap([values], np.mean, method="percentile", n_resamples=2000, rng=3).confidence_interval
    # The ends of two such intervals differ by about 0.001 (one deviation) from their resampling alone.
    np.testing.assert_allclose(interval(resample({"a": values[:, None]})["a"][:, 0]), expected, atol=4e-3)


def test_a_difference_is_resampled_as_its_models_are() -> None:
    one, other = np.random.default_rng(7).random((2, 300))
    means = resampled({"one": one, "other": other, "difference": one - other})
    np.testing.assert_allclose(means["one"] - means["other"], means["difference"], atol=1e-12)
    assert means["one"].std() == pytest.approx(one.std() / 300**0.5, rel=0.1)


def test_gains_over_the_baseline_have_the_interval_of_their_ratio() -> None:
    random = np.random.default_rng(3)
    width = len(metrics_of_intervals())
    base = random.exponential(1.0, (4000, width))
    models = {"sasrec": base, "hstu": 1.1 * base + random.normal(0, 0.1, base.shape)}
    rows = {(row["model"], row["metric"]): row for row in interval_rows(models, resample(models))}
    assert len(rows) == 2 * width
    assert "gain" not in rows["sasrec", "hr@10"]
    row = rows["hstu", "hr@10"]
    place = metrics_of_intervals().index("hr@10")
    assert row["mean"] == pytest.approx(models["hstu"][:, place].mean())
    assert row["low"] < row["mean"] < row["high"]
    assert row["gain_low"] < 0.1 < row["gain_high"]  # as it was made
    # The noise of 0.1 over 4,000 users leaves the ratio an error of 0.0016: users' own spread cancels.
    assert 0.004 < row["gain_high"] - row["gain_low"] < 0.009


def test_no_baseline_no_gain() -> None:
    models = {"hstu": np.random.default_rng(4).random((50, len(metrics_of_intervals())))}
    assert all("gain" not in row for row in interval_rows(models, resample(models)))


def test_holm_on_a_worked_example() -> None:
    # 0.01 x 4; then max(0.04, 0.02 x 3); max(0.06, 0.03 x 2); max(0.06, 0.04 x 1): in the order given.
    np.testing.assert_allclose(holm([0.04, 0.01, 0.03, 0.02]), [0.06, 0.04, 0.06, 0.06])
    assert holm([0.7, 0.9]) == [1.0, 1.0]


def test_pairs_find_a_difference_and_none_where_there_is_none() -> None:
    random = np.random.default_rng(8)
    base = random.random(2000)
    models = {"a": base, "b": base + random.normal(0.03, 0.2, 2000), "c": base + random.normal(0, 0.2, 2000)}
    rows = {(row["better"], row["worse"]): row for row in compare_pairs(models, resampled(models))}
    assert len(rows) == 3
    clear = rows["b", "a"]
    assert clear["p_holm"] < 0.001
    assert clear["low"] > 0
    assert clear["difference"] == pytest.approx((models["b"] - models["a"]).mean())
    none = rows.get(("a", "c")) or rows["c", "a"]
    assert none["p_holm"] > 0.05
    assert none["low"] < 0 < none["high"]


def test_the_level_holds_where_most_users_gain_the_same() -> None:
    """Two thirds of zeros, and no difference: about one in twenty is rejected, not one in forty."""
    random = np.random.default_rng(11)
    rejected = 0
    for _ in range(400):
        other = random.normal(0, 1, 500) * (random.random(500) < 0.35)
        models = {"a": np.zeros(500), "b": other}
        (row,) = compare_pairs(models, {"a": np.zeros(1), "b": np.zeros(1)})
        rejected += row["p"] < 0.05
    assert 0.033 <= rejected / 400 <= 0.08  # 0.05 and its error of 0.011; split zeros reject 0.02


def test_ranks_that_speak_against_the_mean_decide_nothing() -> None:
    gains = np.concatenate([np.full(400, 0.01), np.full(60, -1.0), np.zeros(500)])
    models = {"a": gains, "b": np.zeros(len(gains))}
    pairs = compare_pairs(models, resampled(models))
    assert (pairs[0]["better"], pairs[0]["p"]) == ("b", 1.0)
    (sentence,) = orderings({"a": {"ndcg@10": 0.2}, "b": {"ndcg@10": 0.1}}, models, pairs)
    assert sentence.split("): ")[1].startswith("not decided")


def test_equal_models_do_not_differ() -> None:
    values = np.random.default_rng(5).random(50)
    models = {"a": values, "b": values.copy()}
    (row,) = compare_pairs(models, resampled(models))
    assert (row["p"], row["difference"]) == (1.0, 0.0)


def test_equal_gains_averaged_over_other_numbers_of_seeds_do_not_differ() -> None:
    """The mean over six seeds of 1 / log2(rank + 1) is not to the bit the mean over five."""
    gains = 1 / np.log2(np.random.default_rng(9).integers(1, 12, 4000) + 1)
    models = {"six": np.mean([gains] * 6, axis=0), "five": np.mean([gains] * 5, axis=0)}
    assert (models["six"] != models["five"]).any()
    (row,) = compare_pairs(models, resampled(models))
    assert (row["p"], row["difference"]) == (1.0, 0.0)


def test_published_orderings_hold_or_not_or_are_not_decided() -> None:
    random = np.random.default_rng(6)
    base = random.random(2000)
    models = {
        "worst": base + random.normal(-0.1, 0.1, 2000),
        "middle": base,
        "tied": base + random.normal(0, 1e-3, 2000) * (random.random(2000) < 0.01),
        "best": base + random.normal(0.1, 0.1, 2000),
    }
    published = {
        "best": {"ndcg@10": 0.3},
        "worst": {"ndcg@10": 0.2},
        "middle": {"ndcg@10": 0.1},
        "tied": {"ndcg@10": 0.05},
    }
    sentences = orderings(published | {"absent": {"ndcg@10": 0.4}}, models, compare_pairs(models, resampled(models)))
    assert len(sentences) == 6
    said = {sentence.split(" (")[0]: sentence.split("): ")[1] for sentence in sentences}
    assert said["- best > worst"].startswith("holds: +")
    assert said["- worst > middle"].startswith("does not hold: -")
    assert said["- middle > tied"].startswith("not decided")


def test_the_table_is_readable(tmp_path: Path) -> None:
    from tests.conftest import ROOT, step

    arguments = ("--experiment", "ml-1m", "--runs", "reports/ml-1m/records", "--output", tmp_path)
    step("compare", *arguments, cwd=ROOT)
    with (tmp_path / "comparisons.csv").open() as file:
        rows = list(csv.DictReader(file))
    hstu = next(row for row in rows if (row["better"], row["worse"], row["protocol"]) == ("hstu", "sasrec", "paper"))
    assert float(hstu["low"]) < float(hstu["difference"]) < float(hstu["high"])
    assert int(hstu["users"]) == 6040
    assert "hstu > sasrec (published 0.1720 > 0.1603): holds" in (tmp_path / "parity.md").read_text()
