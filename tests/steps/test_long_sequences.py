"""The study of long sequences: what its variants are, what they read and see, and what its report makes of numbers."""

import itertools
from typing import Any

import pytest
import torch

from steps.common import params, studies
from steps.data.stochastic_length import most_kept
from steps.studies import long_sequences as study
from steps.studies import long_sequences_report as shown
from steps.studies.rows import Row, row
from tests.conftest import ROOT

PLAN = studies.plan("long-sequences", ROOT / "params")
CONTENT = params.load("studies/long-sequences", ROOT / "params")
SETTINGS = PLAN["settings"]
VARIANTS = {variant["variant"]: variant for variant in study.variants(SETTINGS)}
FULL = study.FULL


def test_every_data_set_has_every_variant_once() -> None:
    assert len(VARIANTS) == len(study.variants(SETTINGS)) == 1 + 2 * 3 + 3 * 3 + 2
    cases = study.cases(PLAN)
    for data in ("ml-1m", "demo-long"):
        groups = [case["group"] for case in cases if case["data"] == data]
        assert sorted(groups) == sorted({variant["group"] for variant in VARIANTS.values()})
    (config,) = PLAN["runs"][0]["configs"][:1]
    changed = [study.changed(config, variant) for variant in VARIANTS.values()]
    assert changed[0] == config == PLAN["runs"][0]["configs"][0]
    assert all(one != other for one, other in itertools.combinations(changed, 2))


def test_a_window_that_is_in_the_grid_too_is_measured_once() -> None:
    sizes = {"windows": [8], "first": [0, 4], "alone": [8, 12]}
    found = study.variants(SETTINGS | {"semi_local": sizes})
    names = {one["variant"]: one["group"] for one in found if one["kind"] == study.SEMI_LOCAL}
    assert names == {"window 8": "window 8", "window 8 + first 4": "window 8", "window 12": "windows alone"}


@pytest.mark.parametrize(("window", "first"), [(0, 0), (3, 0), (3, 2), (3, 9), (40, 1)])
def test_pairs_are_those_that_the_mask_shows(window: int, first: int) -> None:
    lengths = [1, 3, 4, 6, 7, 20]
    expected = 0
    for length in lengths:
        for query, key in itertools.product(range(length), repeat=2):
            expected += key <= query and (not window or query - key <= window or key < first)
    semi_local = {"max_attn_len": window, "num_sink_tokens": first} if window else {}
    config: dict[str, Any] = {"model": semi_local, "training": {"max_len": 20}}
    assert study.tokens_and_pairs(torch.tensor(lengths), config) == (sum(lengths), expected)


def test_stochastic_length_reads_tokens_and_pairs_in_the_mean() -> None:
    config = {"model": {}, "training": {"max_len": 16, "stochastic_length": {"alpha": 1.0, "rule": "recent"}}}
    assert most_kept(16, 1.0) == 4
    # Of 10 tokens 4 with probability 1 - 16/100, otherwise all; of 3 and 4 all.
    tokens, pairs = study.tokens_and_pairs(torch.tensor([3, 4, 10]), config)
    assert tokens == pytest.approx(3 + 4 + 0.84 * 4 + 0.16 * 10)
    assert pairs == pytest.approx(6 + 10 + 0.84 * 10 + 0.16 * 55)


def measured(name: str, values: dict[str, list[float]], ms: float = 10.0, data: str = "ml-1m") -> list[Row]:
    """The rows of a variant: metrics by seed."""
    origin = {"device": "H200", "commit": "0123456789", "data_sha256": "d" * 64}
    axes = {"data": data} | VARIANTS[name]
    cost = {"epoch, alone": ms / 1000, "tokens": 1000, "tokens and padding": 1100, "pairs": 5000, "peak": 2**30}
    found = [row(axes, metric, value, "") for metric, value in cost.items()]
    count = len(next(iter(values.values())))
    every = {"users": [600] * count, "users" + study.LONG: [300] * count, **values}
    every |= {"chosen epoch": [7] * count, "training": [30.0] * count, "trained at once": [9] * count}
    for metric, of_seeds in every.items():
        found += [row(axes | {"seed": seed}, metric, value, "") for seed, value in enumerate(of_seeds)]
    return [one | origin for one in found]


def quality(*values: float, long: float = 0.0) -> dict[str, list[float]]:
    """NDCG and HR of all users by seed, and of long histories by as much more."""
    return {
        name + part: [value + (long if part else 0.0) for value in values]
        for name in ("ndcg@10", "hr@10")
        for part in ("", study.LONG)
    }


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ((0.219, 0.231, 0.240), "better"),  # 0.02 ± 4.303 x 0.001 / sqrt(3), whatever the seeds' own level
        ((0.210, 0.231, 0.249), "no different"),  # 0.02 ± 4.303 x 0.00954 / sqrt(3) = 0.0237
        ((0.180, 0.191, 0.199), "worse"),
        ((0.200, 0.210, 0.220), "no different"),
    ],
)
def test_verdicts_follow_from_differences_paired_by_seed(values: tuple[float, ...], verdict: str) -> None:
    rows = measured(FULL, quality(0.2, 0.21, 0.22)) + measured("window 32", quality(*values))
    full, other = shown.panels_of(shown.cases(rows))["H200", "ml-1m"]
    found = shown.Comparison(other, full, "ndcg@10", 95)
    assert found.verdict == verdict
    assert found.mean == pytest.approx(sum(values) / 3 - 0.21)
    if verdict == "better":
        assert found.half == pytest.approx(4.3027 * 0.001 / 3**0.5, rel=1e-4)


def test_from_one_seed_nothing_follows() -> None:
    rows = measured(FULL, quality(0.2)) + measured("window 32", quality(0.1))
    full, other = shown.panels_of(shown.cases(rows))["H200", "ml-1m"]
    assert shown.Comparison(other, full, "ndcg@10", 95).verdict == "no different"


def test_first_tokens_are_compared_with_the_window_that_sees_as_many_keys() -> None:
    rows = [one for name in VARIANTS for one in measured(name, quality(0.2, 0.21))]
    (found,) = shown.panels_of(shown.cases(rows)).values()
    assert [(one.name, other.name) for one, other in shown.budgets(found)] == [
        ("window 32 + first 128", "window 160"),
        ("window 128 + first 32", "window 160"),
        ("window 512 + first 128", "window 640"),
    ]
    assert [(one.name, other.name) for one, other in shown.other_rules(found)][:2] == [
        ("alpha 1.6 random", "alpha 1.6 recent"),
        ("alpha 1.6 weighted", "alpha 1.6 recent"),
    ]


def test_the_report_says_what_the_seeds_say() -> None:
    rows = measured(FULL, quality(0.2, 0.21, 0.22, long=0.05), ms=20.0)
    rows += measured("alpha 1.6 recent", quality(0.1, 0.111, 0.119), ms=5.0)
    rows += measured("alpha 1.6 random", quality(0.2, 0.211, 0.219, long=0.05), ms=9.0)
    rows += measured("window 160", quality(0.15, 0.16, 0.171), ms=8.0)
    rows += measured("window 32 + first 128", quality(0.25, 0.26, 0.271, long=0.05), ms=8.4)
    text, figure, lines = shown.report(rows, CONTENT)
    said = text.splitlines()
    assert "600 users are tested, of whom 300 have long histories." in said
    for sentence in (
        "NDCG@10. Stochastic Length, beside full attention, is worse: alpha 1.6 recent; "
        "no different: alpha 1.6 random.",
        "NDCG@10. Semi-local attention, beside full attention, is better: window 32 + first 128; worse: window 160.",
        "NDCG@10. Stochastic Length by one rule, and by another: it is better: alpha 1.6 random than alpha 1.6 recent.",
        "NDCG@10. First tokens beside a window, and a longer window of as many keys: they are better: "
        "window 32 + first 128 than window 160.",
        "Of those that are worse by no metric, window 32 + first 128 has the shortest epoch: 42% of full attention's.",
    ):
        assert f"- {sentence}" in said
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said if line.startswith("|")]
    all_users = ["0.1603 ± 0.0105", "-0.0497 ± 0.0014", "worse"]
    assert ["window 160", *all_users, "0.1603 ± 0.0105", "-0.0997 ± 0.0014", "worse"] in cells
    assert ["32", "", "0.2603 ± 0.0105; 0.3103 ± 0.0105"] in cells
    assert len(figure.axes) == 1
    assert len(lines) == 5 * (1 + 3)


def test_a_part_of_the_study_can_be_reported() -> None:
    rows = measured("window 32", quality(0.2, 0.21)) + measured("window 128", quality(0.2, 0.22), data="demo-long")
    text, figure, _ = shown.report(rows, CONTENT)
    assert "## demo-long, H200" in text
    assert len(figure.axes) == 2
