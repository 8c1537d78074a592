"""Verdicts: each kind of claim against tables whose answer is known."""

import csv
import importlib
import re
from pathlib import Path
from typing import Any

import pytest

from steps.common import params, yaml_files
from steps.common.claims import experiments, studies
from steps.common.cli import StepError
from steps.common.files import read_json, sha256
from steps.common.studies import plan
from steps.reporting.claims import Verdict, decide
from tests.conftest import ROOT, step

TABLE = ["e", "ml-1m", "paper"]


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def figures(project: Path, model: str, mean: float, half: float, gain: float = 0.0) -> None:
    """The interval of a model's HR@10, and of its gain."""
    row = {"dataset": "ml-1m", "protocol": "paper", "model": model, "metric": "hr@10"}
    row |= {"mean": mean, "low": mean - half, "high": mean + half}
    row |= {"gain": gain, "gain_low": gain - 0.01, "gain_high": gain + 0.01}
    write_csv(project / "reports/e/intervals.csv", [row])


def pairs(project: Path, *rows: tuple[str, str, str, float], sd: float | None = None) -> None:
    """Compared pairs (protocol, better, worse, corrected p): differences of 0.02, above 0 for sure where p is low.

    sd: over 5 seeds; else of rows that are counted.
    """
    lines = [
        {"dataset": "ml-1m", "protocol": protocol, "better": better, "worse": worse, "difference": 0.02}
        | {"low": 0.01 if p < 0.05 else -0.01, "high": 0.03, "p": p, "users": 9, "p_holm": p}
        | {"seeds": None if sd is None else 5, "seeds_sd": sd}
        for protocol, better, worse, p in rows
    ]
    write_csv(project / "reports/e/comparisons.csv", lines)


def verdict(project: Path, **claim: Any) -> Verdict:
    """The one verdict on a claim."""
    content = {"band": 0.03, "claims": {"one": {"text": "{model} {metric}", "place": "table 4"} | claim}}
    (project / "params/claims.yaml").write_text(yaml_files.dump(content))
    (found,) = decide(project / "reports")
    return found


@pytest.fixture(autouse=True)
def in_project(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an experiment `e`, and a page that explains."""
    monkeypatch.chdir(project)
    (project / "params/experiments/e.yaml").write_text((project / "params/experiments/demo.yaml").read_text())
    (project / "docs").mkdir()
    (project / "docs/findings.md").touch()


FIGURES = {"table": TABLE, "models": ["hstu"], "metrics": ["hr@10"]}


@pytest.mark.parametrize(
    ("mean", "half", "expected"),  # published: 0.3097
    [
        (0.3050, 0.010, "reproduced"),  # within 3 %
        (0.3180, 0.002, "reproduced"),  # within 3 %, though the interval leaves it out
        (0.3300, 0.010, "higher"),
        (0.2900, 0.010, "lower"),
        (0.3200, 0.020, "not decided"),  # beyond the band, and the interval holds the published figure
    ],
)
def test_a_figure_is_judged_on_both_sides(project: Path, mean: float, half: float, expected: str) -> None:
    figures(project, "hstu", mean, half)
    found = verdict(project, figures=FIGURES, explained=["why", "docs/findings.md#y"])
    assert (found.verdict, found.published, found.text) == (expected, 0.3097, "HSTU HR@10")
    assert found.why == f"{mean / 0.3097:.3f} of the published figure"
    assert (found.explained is not None) == (expected in ("higher", "lower"))
    assert found.files == {"reports/e/intervals.csv": sha256(project / "reports/e/intervals.csv")}


@pytest.mark.parametrize(("gain", "expected"), [(0.09, "reproduced"), (0.10, "higher"), (0.05, "lower")])
def test_a_gain_is_the_paper_s_own_ratio(project: Path, gain: float, expected: str) -> None:
    figures(project, "hstu", 0.3, 0.01, gain)
    found = verdict(project, gains=FIGURES)
    assert found.published == pytest.approx(0.0855, abs=1e-4)  # printed as +8.6 %
    assert found.verdict == expected


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([("strict", "hstu", "sasrec", 1e-9), ("paper", "hstu", "sasrec", 0.01)], "reproduced"),
        ([("strict", "hstu", "sasrec", 1e-9), ("paper", "hstu", "sasrec", 0.6)], "partly"),
        ([("strict", "hstu", "sasrec", 1e-9), ("paper", "sasrec", "hstu", 1e-9)], "partly"),
        ([("strict", "sasrec", "hstu", 1e-9), ("paper", "hstu", "sasrec", 0.6)], "contradicted"),
        ([("strict", "sasrec", "hstu", 0.9), ("paper", "hstu", "sasrec", 0.6)], "not decided"),
    ],
)
def test_an_order_holds_in_all_tables_in_some_or_in_none(project: Path, rows: list[Any], expected: str) -> None:
    pairs(project, *rows)
    tables = [["e", "ml-1m", "strict"], ["e", "ml-1m", "paper"]]
    found = verdict(project, order={"rows": ["hstu", "sasrec"], "tables": tables})
    assert found.verdict == expected
    assert found.why.count("ml-1m") == 2
    sign = "+" if rows[0][1] == "hstu" else "-"
    assert f"ml-1m strict {sign}0.0200" in found.why


@pytest.mark.parametrize(
    ("better", "worse", "p", "margin", "expected"),  # the interval is 0.01 to 0.03, or -0.01 to 0.03
    [
        ("hstu", "sasrec", 1e-9, 0.001, "reproduced"),  # above, and so no lower
        ("hstu", "sasrec", 0.6, 0.02, "reproduced"),
        ("hstu", "sasrec", 0.6, 0.005, "not decided"),
        ("sasrec", "hstu", 1e-9, 0.04, "reproduced"),  # -0.03 to -0.01
        ("sasrec", "hstu", 1e-9, 0.02, "not decided"),
        ("sasrec", "hstu", 1e-9, 0.005, "contradicted"),
        ("sasrec", "hstu", 0.6, 0.04, "reproduced"),  # -0.03 to 0.01
        ("sasrec", "hstu", 0.6, 0.001, "not decided"),
    ],
)
def test_no_lower_is_judged_by_the_interval(
    project: Path, better: str, worse: str, p: float, margin: float, expected: str
) -> None:
    pairs(project, ("paper", better, worse, p))
    found = verdict(project, order={"rows": ["hstu", "sasrec"], "tables": [TABLE], "no_lower": margin})
    assert found.verdict == expected
    assert f"a loss of {margin} is none" in found.why


@pytest.mark.parametrize(
    ("sd", "order", "verdict_of_order", "no_lower"),  # 0.02 with 1.2415 sd on either side: Student's t of 5 seeds
    [
        (0.016, ["hstu", "sasrec"], "reproduced", "reproduced"),
        (0.017, ["hstu", "sasrec"], "not decided", "reproduced"),  # -0.0011: above a loss of 0.002
        (0.018, ["hstu", "sasrec"], "not decided", "not decided"),  # -0.0023
        (0.014, ["sasrec", "hstu"], "contradicted", "contradicted"),  # -0.0026
        (0.015, ["sasrec", "hstu"], "contradicted", "not decided"),  # -0.0014
        (0.017, ["sasrec", "hstu"], "not decided", "not decided"),
    ],
)
def test_an_order_that_other_seeds_may_turn_round_is_not_decided(
    project: Path, sd: float, order: list[str], verdict_of_order: str, no_lower: str
) -> None:
    pairs(project, ("paper", "hstu", "sasrec", 1e-9), sd=sd)
    claimed = {"rows": order, "tables": [TABLE]}
    found = verdict(project, order=claimed)
    assert found.verdict == verdict_of_order
    assert (f"± {1.2415 * sd:.3f}" in found.why) == (verdict_of_order == "not decided")
    assert verdict(project, order=claimed | {"no_lower": 0.002}).verdict == no_lower


SPEEDS = [
    {"part": "speed", "n": 1024, "captured": True, "over": 4.0, "device": "H200"},
    {"part": "speed", "n": 8192, "captured": True, "over": 6.0, "device": "H200"},
    {"part": "speed", "n": 16384, "captured": False, "over": 9.0, "device": "H200"},
    {"part": "memory", "n": "", "captured": "", "over": "", "device": "H200"},
]
STUDY = {
    "table": "kernels",
    "rows": {"part": "speed", "captured": True},
    "column": "over",
    "published": ["train_speedup_over_flash_attention2_transformer", "at_8192_range", 0],  # 5.3
}

#: What is said where the study has some rows, and not those that a claim needs.
IN_PART = "not fully measured here; snakemake kernels measures all, steps.study --only what is missing"


@pytest.mark.parametrize(
    ("change", "ours", "published", "expected"),
    [
        ({"at_least": True}, 6.0, 5.3, "reproduced"),  # the greatest of two rows
        ({"at_least": True, "rows": {"n": 1024}}, 4.0, 5.3, "lower"),
        ({}, 6.0, 5.3, "higher"),
        ({"rows": {"n": 1024}}, 4.0, 5.3, "lower"),
        ({"published": ["inference_speedup_over_flash_attention2_transformer", "max"]}, 6.0, 5.6, "higher"),
        ({"rows": {"n": 8192}, "published": ["optimizer_bytes_per_embedding_float", "adam"]}, 6.0, 12.0, "lower"),
    ],
)
def test_a_figure_of_a_study_is_judged(
    project: Path, change: dict[str, Any], ours: float, published: float, expected: str
) -> None:
    write_csv(project / "reports/studies/kernels/table.csv", SPEEDS)
    found = verdict(project, study=STUDY | change)
    assert (found.ours, found.published, found.verdict) == (ours, published, expected)
    assert f"{ours / published:.3f} of the published figure, on H200" in found.why
    assert (", n 8192" in found.why) == (change.get("rows") is None)  # which of several it was
    assert list(found.files) == ["reports/studies/kernels/table.csv"]


def test_a_figure_of_a_study_is_reproduced_within_the_band(project: Path) -> None:
    for over, expected in ((5.15, "reproduced"), (5.45, "reproduced"), (5.1, "lower"), (5.5, "higher")):
        write_csv(project / "reports/studies/kernels/table.csv", [SPEEDS[1] | {"over": over}])
        assert verdict(project, study=STUDY).verdict == expected


def test_a_study_that_was_not_measured_says_which_command_measures_it(project: Path) -> None:
    found = verdict(project, study=STUDY, explained=["why", "docs/findings.md#y"])
    assert (found.verdict, found.why) == ("not run", "not measured here; snakemake kernels does")
    assert (found.experiment, found.published, found.files) == ("studies/kernels", 5.3, {})


def test_a_study_that_was_measured_in_part_decides_what_it_can(project: Path) -> None:
    write_csv(project / "reports/studies/kernels/table.csv", SPEEDS)
    assert verdict(project, study=STUDY | {"rows": {"n": 2048}}).why == IN_PART
    assert verdict(project, study=STUDY | {"rows": {"n": 1024}}).verdict == "lower"


def test_every_claim_about_a_study_is_about_some_of_its_cases() -> None:
    claims = params.load("claims", ROOT / "params")["claims"]
    named = {name: claim["study"] for name, claim in claims.items() if "study" in claim}
    assert named
    for name, claim in named.items():
        content = plan(claim["table"], ROOT / "params")
        cases = importlib.import_module(f"steps.studies.{content['module']}").cases(content)
        assert any(claim["rows"].items() <= case.items() for case in cases), name


def test_a_claim_about_a_study_links_to_its_table(project: Path) -> None:
    write_csv(project / "reports/studies/kernels/table.csv", SPEEDS)
    verdict(project, study=STUDY)
    step("claims", cwd=project)
    page = re.sub(" +", " ", (project / "reports/claims.md").read_text())
    assert "| [studies/kernels](studies/kernels/table.md) | 5.30 | 6.00 | higher |" in page


def seeds(device: str = "H200", **by_data: tuple[list[float], list[float]]) -> list[dict[str, Any]]:
    """Runs of two variants from as many seeds; and a line of their times, which has no seed."""
    rows: list[dict[str, Any]] = []
    for data, values in by_data.items():
        for variant, of_seeds in zip(("some", "all"), values, strict=True):
            rows.append({"data": data, "variant": variant, "seed": "", "ndcg@10": "", "epoch": 1, "device": device})
            rows += [rows[-1] | {"seed": n, "ndcg@10": value} for n, value in enumerate(of_seeds)]
    return rows


RUNS = {"table": "kernels", "rows": [{"variant": "some"}, {"variant": "all"}], "column": "ndcg@10"}
PLACES = {"places": [{"data": "a"}, {"data": "b"}]}
ALL = [0.200, 0.210, 0.190]
# Beside ALL, by hand: +0.02 and +0.02 +- 0.0025 (differences 0.019, 0.020, 0.021; t 4.303 x 0.001 / sqrt 3), and so on.
ABOVE, SAME, NEARLY, LOST = (
    [value + shift + other for value, other in zip(ALL, (-0.001, 0.0, 0.001), strict=True)]
    for shift in (0.02, 0.0, -0.005, -0.02)
)


@pytest.mark.parametrize(
    ("a", "b", "above", "no_lower"),
    [
        (ABOVE, ABOVE, "reproduced", "reproduced"),
        (ABOVE, SAME, "partly", "reproduced"),  # no lower: a loss of 0.0025 is within 3 % of 0.2
        (SAME, SAME, "not decided", "reproduced"),
        (NEARLY, SAME, "contradicted", "partly"),  # -0.005 +- 0.0025: below 0, and neither sure of 0.006 nor of less
        (LOST, NEARLY, "contradicted", "contradicted"),
    ],
)
def test_runs_of_a_study_are_compared_by_seed(
    project: Path, a: list[float], b: list[float], above: str, no_lower: str
) -> None:
    write_csv(project / "reports/studies/kernels/table.csv", seeds(a=(a, ALL), b=(b, ALL)))
    found = verdict(project, runs=RUNS | PLACES, explained=["why", "docs/findings.md#y"])
    assert found.verdict == above
    assert (found.explained is None) == (above == "reproduced")
    shift = a[1] - ALL[1]
    assert f"a {shift:+.4f} ± 0.0025 beside 0.2000" in found.why
    assert list(found.files) == ["reports/studies/kernels/table.csv"]
    assert verdict(project, runs=RUNS | PLACES | {"no_lower": True}).verdict == no_lower


def test_runs_of_a_study_that_are_missing_or_single_decide_nothing(project: Path) -> None:
    assert (found := verdict(project, runs=RUNS | PLACES)).verdict == "not run"
    assert found.why == "not measured here; snakemake kernels does"
    write_csv(project / "reports/studies/kernels/table.csv", seeds(a=(ABOVE, ALL)))
    found = verdict(project, runs=RUNS | PLACES)
    assert (found.verdict, found.why.endswith(f"b: {IN_PART}")) == ("partly", True)
    write_csv(project / "reports/studies/kernels/table.csv", seeds(a=(ABOVE[:1], ALL[:1]), b=(ABOVE[:1], ALL)))
    assert verdict(project, runs=RUNS | PLACES).verdict == "not decided"
    # Runs of another device are no pairs.
    rows = seeds(a=(ABOVE, ALL))
    others = [row | {"device": "H100"} for row in rows if row["variant"] == "all"]
    write_csv(project / "reports/studies/kernels/table.csv", [row for row in rows if row["variant"] == "some"] + others)
    assert verdict(project, runs=RUNS | PLACES).verdict == "not run"


@pytest.mark.parametrize(
    ("holds", "expected"),  # by place and device
    [
        ({"a H100": 1, "a H200": 1, "b H200": 1}, "reproduced"),
        ({"a H200": 1, "b H200": -1}, "partly"),
        ({"a H200": 1}, "partly"),  # b was not measured
        ({"a H200": -1, "b H200": 0}, "contradicted"),
        ({"a H100": 1, "a H200": -1, "b H200": 0}, "not decided"),  # the devices do not agree
        ({}, "not run"),
    ],
)
def test_a_study_s_report_decides_a_claim_in_each_place(project: Path, holds: dict[str, int], expected: str) -> None:
    decided = {"table": "kernels", "rows": {"claim": "grows"}, "places": [{"data": "a"}, {"data": "b"}]}
    assert verdict(project, decided=decided).why == "not measured here; snakemake kernels does"
    lines = [{"claim": "other", "data": "a", "holds": -1, "words": "no", "device": "H200"}]
    for place, sign in holds.items():
        data, device = place.split()
        lines.append({"claim": "grows", "data": data, "holds": sign, "words": f"gain {sign}", "device": device})
    for table, expected_here in ((SPEEDS, "not run"), (lines, expected)):  # of the first no line says that it holds
        write_csv(project / "reports/studies/kernels/table.csv", table)
        found = verdict(project, decided=decided, explained=["why", "docs/findings.md#y"])
        assert found.verdict == expected_here
    assert (found.explained is None) == (expected == "reproduced")
    assert ("b: gain 0, not decided" in found.why) == (holds.get("b H200") == 0)
    assert (f"b: {IN_PART}" in found.why) == ("b H200" not in holds)
    with pytest.raises(StepError, match="no study 'kernel'"):
        verdict(project, decided=decided | {"table": "kernel"})


def test_every_claim_about_runs_of_a_study_is_about_some_of_its_variants() -> None:
    claims = params.load("claims", ROOT / "params")["claims"]
    named = {name: claim["runs"] for name, claim in claims.items() if "runs" in claim}
    assert named
    for name, claim in named.items():
        content = plan(claim["table"], ROOT / "params")
        module = importlib.import_module(f"steps.studies.{content['module']}")
        variants, cases = module.variants(content["settings"]), module.cases(content)
        for place in claim["places"]:
            assert any(place.items() <= case.items() for case in cases), name
        for row in claim["rows"]:
            assert any(row.items() <= variant.items() for variant in variants), name


def test_what_was_not_run_says_which_command_runs_it(project: Path) -> None:
    found = verdict(project, figures=FIGURES)
    assert (found.verdict, found.why, found.files) == ("not run", "not run here; snakemake e does", {})
    order = {"rows": ["hstu", "sasrec"], "tables": [TABLE]}
    assert verdict(project, order=order).verdict == "not run"
    assert verdict(project, why="no data", open=True).verdict == "not run"
    assert verdict(project, why="no data").verdict == "not testable"


def test_an_order_of_which_a_table_is_missing_holds_in_part(project: Path) -> None:
    pairs(project, ("paper", "hstu", "sasrec", 1e-9))
    found = verdict(project, order={"rows": ["hstu", "sasrec"], "tables": [TABLE, ["demo", "demo", "strict"]]})
    assert found.verdict == "partly"
    assert "demo strict: not run here" in found.why


def test_an_order_of_rows_that_are_not_run_yet_waits_for_them(project: Path) -> None:
    pairs(project, ("paper", "sasrec", "most-popular", 1e-9))
    found = verdict(project, order={"rows": ["hstu", "sasrec"], "tables": [TABLE]})
    assert (found.verdict, found.files) == ("not run", {})
    with pytest.raises(StepError, match=r"comparisons.csv has 0 rows of .*gru4rec.*; correct the claim"):  # no such row
        verdict(project, order={"rows": ["gru4rec", "sasrec"], "tables": [TABLE]})


@pytest.mark.parametrize(
    ("claim", "said"),
    [
        ({"figures": FIGURES | {"models": ["hstv"]}}, "no entry 'hstv'"),
        ({"figures": FIGURES | {"models": ["markov"]}}, "has no hr@10 of markov on ml-1m"),
        ({"gains": FIGURES | {"metrics": ["mrr"]}}, "has no mrr of hstu on ml-1m"),
        ({"figures": FIGURES | {"table": ["e", "nowhere", "paper"]}}, "has no hr@10 of hstu on nowhere"),
        ({"figures": FIGURES, "text": "{name}"}, "text: {model} and {metric} are all"),
        ({"order": {"rows": ["hstu", "hstv"], "tables": [TABLE]}}, "no entry 'hstv'"),
        ({"study": STUDY | {"table": "kernel"}}, "no study 'kernel'"),
        ({"study": STUDY | {"published": ["speed"]}}, "params/paper.yaml has no figure efficiency speed"),
        ({"study": STUDY | {"published": STUDY["published"][:2]}}, "has no figure efficiency train_speedup"),
        ({"study": STUDY | {"rows": {"length": 1}}}, "table.csv has no column 'length', which"),
        ({"runs": RUNS | PLACES}, "table.csv has no column 'data', which"),
        ({"runs": RUNS | PLACES | {"table": "kernel"}}, "no study 'kernel'"),
    ],
)
def test_what_a_claim_names_has_to_be_there(project: Path, claim: dict[str, Any], said: str) -> None:
    figures(project, "hstu", 0.3, 0.01)
    write_csv(project / "reports/studies/kernels/table.csv", SPEEDS)
    with pytest.raises(StepError, match=re.escape(said)):
        verdict(project, **claim)


def test_a_claim_about_a_row_that_the_table_lacks_is_an_error(project: Path) -> None:
    figures(project, "sasrec", 0.28, 0.01)
    with pytest.raises(StepError, match=r"intervals.csv has 0 rows of .*hstu.*; correct the claim"):
        verdict(project, figures=FIGURES)


def test_pages_name_every_claim_and_the_same_bytes_come_again(project: Path) -> None:
    figures(project, "hstu", 0.33, 0.01)
    verdict(project, figures=FIGURES, explained=["the order", "docs/findings.md#order"])
    step("claims", cwd=project)
    names = ("claims.md", "claims.html", "claims.csv", "claims.json")
    before = [(project / "reports" / name).read_bytes() for name in names]
    page = (project / "reports/claims.md").read_text()
    assert "| HSTU HR@10 | table 4 | [e](e/comparisons.md) | 0.3097" in " ".join(page.split(" ")).replace("  ", " ")
    assert "[the order](../docs/findings.md#order)" in page
    assert "0.3300 [0.3200, 0.3400]" in page
    assert '<a href="../docs/findings.md#order">the order</a>' in (project / "reports/claims.html").read_text()
    (found,) = read_json(project / "reports/claims.json", list)
    assert (found["claim"], found["verdict"]) == ("one/hstu/hr@10", "higher")
    step("claims", cwd=project)
    assert [(project / "reports" / name).read_bytes() for name in names] == before


def test_the_project_s_claims_name_experiments_and_pages_that_are_there() -> None:
    assert experiments() <= set(params.experiments(ROOT / "params"))
    assert studies() <= set(params.studies(ROOT / "params"))
    for claim in params.load("claims", ROOT / "params")["claims"].values():
        page, _, heading = claim.get("explained", ["", "README.md#hstu-reproduced"])[1].partition("#")
        headings = re.findall(r"^#+ (.*)$", (ROOT / page).read_text(), re.M)
        assert heading in {re.sub(r"[^a-z0-9 -]", "", one.lower()).replace(" ", "-") for one in headings}


def test_the_project_s_orders_are_of_rows_that_their_experiments_run_and_none_is_there_twice() -> None:
    claims = params.load("claims", ROOT / "params")["claims"]
    orders = {name: claim["order"] for name, claim in claims.items() if "order" in claim}
    for name, order in orders.items():
        for experiment, dataset, protocol in order["tables"]:
            ran = {(run.dataset, run.model, run.protocol) for run in params.runs(experiment, ROOT / "params")}
            for row in order["rows"]:
                assert (dataset, row, protocol) in ran, name
    asked = [(*order["rows"], "no_lower" in order, *table) for order in orders.values() for table in order["tables"]]
    assert len(set(asked)) == len(asked)


@pytest.mark.parametrize(
    ("rows", "margin"),
    [
        (["hstu-ranking-merged", "hstu-ranking"], 0.001),
        (["hstu-ranking", "hstu-ranking-merged"], None),
        (["hstu-ranking", "hstu-ranking-no-actions"], None),
        (["hstu-ranking", "dlrm"], None),
        (["hstu-ranking-features", "dlrm"], None),
    ],
)
def test_generative_ranking_is_claimed_under_both_protocols(rows: list[str], margin: float | None) -> None:
    claims = params.load("claims", ROOT / "params")["claims"].values()
    (order,) = (
        claim["order"]
        for claim in claims
        if claim.get("order", {}).get("rows") == rows and claim["order"].get("no_lower") == margin
    )
    assert {protocol for _, _, protocol in order["tables"]} == {"temporal-ranking", "upstream-ranking"}
