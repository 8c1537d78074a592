"""Statistics: intervals that cover, corrections that correct, and what is said of published orderings."""

import csv
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from steps.common.cli import StepError
from steps.common.params import Run
from steps.evaluation import engagements
from steps.reporting.outcomes import TestPredictions, TestRanks
from steps.reporting.parity import decided, orderings
from steps.reporting.records import Record
from steps.reporting.statistics import (
    TESTS,
    compare_pairs,
    holm,
    interval,
    interval_rows,
    metrics_of_intervals,
    over_seeds,
    resample,
    values_of_users,
)
from steps.reporting.task import load_task


def resampled(models: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The resampled means of one metric: values (U,) of each model."""
    means = resample({name: values[:, None] for name, values in models.items()})
    return {name: of_metric[:, 0] for name, of_metric in means.items()}


def test_gains_are_ndcg_at_ten() -> None:
    best, ties = np.array([1, 1, 3, 10, 10, 500, 0]), np.array([0, 1, 0, 0, 1, 0, 0])
    gains = values_of_users(TestRanks(np.arange(len(best)), best, ties))[:, 0]
    last = 1 / np.log2(11)
    np.testing.assert_allclose(gains, [1.0, (1 + 1 / np.log2(3)) / 2, 0.5, last, last / 2, 0.0, 0.0])


def test_a_metric_that_needs_more_ranks_than_records_keep_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = TestRanks(*np.array([[7, 8], [1, 150], [0, 0]]))
    recorded = TestRanks.of_record(ranks.light())
    assert np.array_equal(values_of_users(recorded), values_of_users(ranks))
    monkeypatch.setattr("steps.reporting.statistics.metrics_of_intervals", lambda: ["ndcg@200", "mrr", "hr@201"])
    assert values_of_users(ranks).shape == (2, 3)
    with pytest.raises(StepError, match=r"intervals of mrr, hr@201, and records keep ranks up to 200 alone"):
        values_of_users(recorded)


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
    pairs[0] |= {"seeds": 1, "seeds_sd": None}
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
    pairs = [row | {"seeds": 5, "seeds_sd": 0.0} for row in compare_pairs(models, resampled(models))]
    (of_seeds,) = (row for row in pairs if (row["better"], row["worse"]) == ("best", "middle"))
    of_seeds["seeds_sd"] = 0.1  # t(4) is 2.776 at 97.5 %: 0.124 on either side of a difference of 0.1
    sentences = orderings(published | {"absent": {"ndcg@10": 0.4}}, models, pairs)
    assert len(sentences) == 6
    said = {sentence.split(" (")[0]: sentence.split("): ")[1] for sentence in sentences}
    assert re.fullmatch(r"not decided: \+0\.\d+, p = \S+, ± 0\.1242 over seeds", said["- best > middle"])
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


def predictions(users: int = 150, seed: int = 0) -> engagements.Predictions:
    """Predictions as evaluate writes them; users differ in their number, their share and the model's skill."""
    random = torch.Generator().manual_seed(seed)
    user = torch.repeat_interleave(torch.arange(users), torch.randint(1, 30, (users,), generator=random))
    taste, skill = torch.randn(users, generator=random), torch.rand(users, generator=random) * 2
    known = torch.randn(len(user), generator=random)
    label = torch.rand(len(user), generator=random) < torch.sigmoid(taste[user] + known)
    logit = ((0.5 * taste + 0.3)[user] + skill[user] * known).round(decimals=1)  # with ties
    return engagements.Predictions(user, logit, label.long())


def kept(drawn: engagements.Predictions) -> TestPredictions:
    sums = torch.stack(engagements.user_sums(drawn), dim=1)
    return TestPredictions.of_row(
        [TestPredictions.of_run({"test_users": drawn.user.numpy(), "test_sums": sums.numpy()})]
    )


def metrics_of(drawn: engagements.Predictions) -> dict[str, float]:
    return engagements.named(engagements.engagement_values(drawn, int(drawn.user.max()) + 1).tolist())


def test_ranking_metrics_are_means_of_users_values_with_the_spread_of_the_metric() -> None:
    """Against metrics that are computed anew of resampled users."""
    drawn = predictions()
    names = metrics_of_intervals(load_task("ranking"))
    values = values_of_users(kept(drawn))
    expected = metrics_of(drawn)
    for place, name in enumerate(names):
        assert values[:, place].mean() == pytest.approx(expected[name], abs=1e-4), name
    random, count = np.random.default_rng(5), len(values)
    rows = [torch.nonzero(drawn.user == user)[:, 0] for user in range(count)]
    resampled_anew = []
    for _ in range(300):
        picked = random.integers(0, count, count)
        index = torch.cat([rows[user] for user in picked])
        number = torch.repeat_interleave(torch.arange(count), torch.tensor([len(rows[user]) for user in picked]))
        resampled_anew.append(metrics_of(engagements.Predictions(number, drawn.logit[index], drawn.label[index])))
    for place, name in enumerate(names):
        anew = np.std([one[name] for one in resampled_anew])
        assert values[:, place].std() / count**0.5 == pytest.approx(anew, rel=0.15), name


def test_recorded_predictions_are_those_that_tables_are_made_of() -> None:
    once = kept(predictions())
    again = TestPredictions.of_record(once.light())
    for name, values in vars(once).items():
        np.testing.assert_array_equal(values, getattr(again, name))


def test_a_user_s_own_auc_is_recorded_exactly() -> None:
    """Of the first user's 4 pairs 2 are ordered and 1 is equal; the second has no pair."""
    drawn = engagements.Predictions(
        torch.tensor([0, 0, 0, 0, 1]), torch.tensor([2.0, 1.0, 1.0, 1.5, 0.0]), torch.tensor([1, 1, 0, 0, 1])
    )
    found = kept(drawn)
    assert found.light()["twice_ordered"].to_list() == [5, 0]
    assert found.own_auc[0] == 5 / 8
    assert np.isnan(found.own_auc[1])


@pytest.mark.parametrize("seeds", [1, 3, 5])
@pytest.mark.parametrize("counts", ["skewed", "alike"])
def test_what_recording_rounds_changes_no_comparison_of_similar_models(counts: str, seeds: int) -> None:
    """Users as many as MovieLens-1M tests, by time a few with most of the targets, else ten of each."""
    random = torch.Generator().manual_seed(3)
    number = torch.full((1209,), 10)
    if counts == "skewed":
        number = (40 * (1.4 * torch.randn(1209, generator=random)).exp()).long().clamp(1, 1000)
    user = torch.repeat_interleave(torch.arange(1209), number)
    known = torch.randn(len(user), generator=random) + 0.5 * torch.randn(1209, generator=random)[user]
    label = (torch.rand(len(user), generator=random) < torch.sigmoid(1.5 * known)).long()
    exact, rounded = [], []
    for _ in range(2):
        unrounded = []
        for _ in range(seeds):
            logit = known + 0.03 * torch.randn(len(user), generator=random)
            sums = engagements.user_sums(engagements.Predictions(user, logit, label))
            unrounded.append(TestPredictions(np.arange(1209), *(values.numpy() for values in sums)))
        exact.append(np.mean([values_of_users(one) for one in unrounded], axis=0))
        rounded.append(values_of_users(TestPredictions.of_row(unrounded)))
    for place, name in enumerate(metrics_of_intervals(load_task("ranking"))):
        one, other = (values[1][:, place] - values[0][:, place] for values in (exact, rounded))
        assert 0 < one.std() / 1209**0.5 < 1e-3
        assert other.std() == pytest.approx(one.std(), rel=0.01), name
        assert TESTS["ranking"](other) == pytest.approx(TESTS["ranking"](one), rel=0.01), name


def test_no_user_s_rounding_reaches_another() -> None:
    """The first user's sum is no whole number of steps, and others' are."""
    large = TestPredictions(
        np.arange(3),
        *np.array([[500.0, 1, 1], [250, 1, 1], [303.9, 0.5, 0.5], [0.3, 0, 0], [151.23, 0.5, 0.5], [9, 0, 0]]),
    )
    again = TestPredictions.of_record(large.light())
    for name in ("loss", "above"):
        found, expected = getattr(again, name), getattr(large, name)
        assert found[1:].tolist() == expected[1:].tolist()
        assert found[0] == pytest.approx(expected[0], abs=500 / 2**18)


def test_the_test_of_a_ranking_difference_is_that_of_its_mean() -> None:
    difference = np.random.default_rng(0).exponential(1.0, 400)
    difference += 0.05 - difference.mean()
    expected = stats.ttest_1samp(difference, 0).pvalue
    assert TESTS["ranking"](difference) == pytest.approx(expected, rel=0.05)
    assert TESTS["ranking"](np.array([0.1])) == 1
    assert TESTS["ranking"](np.full(4, 0.25)) == 0


def of_seeds(values: dict[int, float], model: str = "hstu") -> list[Record]:
    return [
        Record(
            Run("e", "d", "m", "p", seed), {"model": {"model": model}}, [], {"test": {"auc": value}}, {}, lambda: None
        )
        for seed, value in values.items()
    ]


def test_seeds_are_paired_and_a_counted_row_stands_beside_all() -> None:
    three = of_seeds({0: 0.7, 1: 0.8, 2: 0.6})
    other = of_seeds({0: 0.5, 1: 0.7, 4: 0.9})
    assert over_seeds(three, other, "auc") == {"seeds": 2, "seeds_sd": pytest.approx(np.std([0.2, 0.1], ddof=1))}
    counted = of_seeds({0: 0.5}, "popular")
    assert over_seeds(three, counted, "auc") == {"seeds": 3, "seeds_sd": pytest.approx(0.1)}
    assert over_seeds(counted, of_seeds({0: 0.6}, "markov"), "auc") == {"seeds": None, "seeds_sd": None}
    assert over_seeds(three, of_seeds({2: 0.5}), "auc") == {"seeds": 1, "seeds_sd": None}
    assert over_seeds(three, of_seeds({7: 0.5, 8: 0.6}), "auc") == {"seeds": 0, "seeds_sd": None}


@pytest.mark.parametrize(
    ("changed", "sure"),
    [
        ({}, True),
        ({"p_holm": 0.06}, False),
        ({"low": -0.001}, False),
        ({"seeds_sd": 0.0085}, False),  # half the interval over 5 seeds is 2.776 / sqrt(5) = 1.2415 times as much
        ({"seeds_sd": 0.0080}, True),
        ({"seeds": 2, "seeds_sd": 0.0011}, True),  # over 2 seeds it is 12.706 / sqrt(2) = 8.98 times as much
        ({"seeds": 2, "seeds_sd": 0.0012}, False),
        ({"seeds": 1, "seeds_sd": None}, False),
        ({"seeds": None, "seeds_sd": None}, True),  # of models that count
    ],
)
def test_an_order_is_decided_where_users_and_seeds_say_so(changed: dict[str, Any], sure: bool) -> None:
    row = {"difference": 0.01, "low": 0.005, "p_holm": 0.01, "seeds": 5, "seeds_sd": 0.001}
    assert decided(row | changed) == sure
