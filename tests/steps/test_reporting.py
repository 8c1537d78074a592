"""Tables and records, from runs whose numbers are made up."""

import csv
import json
import re
import shutil
import statistics
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from steps.common import params, yaml_files
from steps.common.cli import StepError
from steps.common.files import parse_jsonl, write_json, write_text
from steps.evaluation.names import HR_CUTOFFS, NDCG_CUTOFFS
from steps.reporting.outcomes import LARGEST_RANK, TestRanks
from steps.reporting.records import HISTORY, HISTORY_CRC, RUNS, read_records, recorded_texts, write_records
from tests.conftest import step
from tests.steps.runs import seal

FIGURE = (".svg", ".png", "-dark.svg", "-dark.png")
METRICS = ("hr@1", "hr@10", "hr@50", "hr@100", "hr@200", "ndcg@10", "ndcg@50", "ndcg@200", "mrr")


def value(run: params.Run, name: str, epoch: int) -> float:
    """A made-up metric that differs between runs, metrics and epochs."""
    return round(0.1 + 0.01 * run.seed + 0.001 * METRICS.index(name) + 0.02 * len(run.model) + 0.0001 * epoch, 6)


def fake_run(project: Path, run: params.Run, commit: str = "a" * 40) -> None:
    folder = project / "runs" / run.experiment / run.path
    config = params.resolve(run, project / "params")
    split = "valid" if run.protocol == "strict" else "test"
    lines = [{"epoch": epoch, **{f"{split}/{name}": value(run, name, epoch) for name in METRICS}} for epoch in (1, 2)]
    metrics: dict[str, Any] = {"test": {name: value(run, name, 2) for name in METRICS}}
    if run.protocol == "paper":
        metrics["test_best"] = {name: value(run, name, 2) for name in METRICS} | {"epoch": 2}
    both = {"hr@10": value(run, "hr@10", 2), "ndcg@10": value(run, "ndcg@10", 2)}
    if split == "valid":
        metrics["valid"] = {name: value(run, name, 1) for name in METRICS}
    metrics["variants"] = {"window/rated": both, "history/rated": {name: number + 0.1 for name, number in both.items()}}
    groups = {"head": {"users": 3, **both}, "tail": {"users": 0}}
    metrics["beyond"] = {"coverage@10": 0.5, "popularity@10": 0.1, "by_popularity": groups}
    metrics |= {"epoch": 2, "train_seconds": 1.5, "peak_bytes": None, "commit": commit}
    metrics |= {"data_sha256": "d" * 64, "device": "CPU, 2 threads", "versions": {"torch": "2.13.0"}}
    write_json(folder / "config.json", config)
    write_text(folder / "history.jsonl", "".join(f"{line}\n".replace("'", '"') for line in lines))
    write_json(folder / "metrics.json", metrics)
    random = torch.Generator().manual_seed(10 * len(run.model) + run.seed)
    best, ties = (torch.randint(1, 40 // (1 + len(run.model) % 3), (200,), generator=random).int() for _ in range(2))
    ranks = {"test": best, "test_ties": ties, "test_users": torch.arange(200)}
    save_file(ranks, folder / "outcomes.safetensors")
    save_file({"w": torch.ones(2)}, folder / "model.safetensors")
    seal(folder)


def experiment(project: Path, name: str, **content: Any) -> list[params.Run]:
    text = yaml_files.dump({"title": f"Experiment {name}", **content})
    (project / "params/experiments" / f"{name}.yaml").write_text(text)
    return list(params.runs(name, project / "params"))


def tabulate(project: Path, name: str, runs: str | None = None) -> None:
    for table in ("tabulate", "compare"):
        step(table, "--experiment", name, "--runs", runs or f"runs/{name}", "--output", f"reports/{name}", cwd=project)


@pytest.fixture
def ml_1m(project: Path, monkeypatch: pytest.MonkeyPatch) -> list[params.Run]:
    monkeypatch.chdir(project)  # where parameters are looked for
    chosen = {"datasets": ["ml-1m"], "models": ["sasrec", "hstu"], "protocols": ["strict", "paper"], "seeds": [0, 1, 2]}
    return experiment(project, "mine", **chosen)


def test_the_table_holds_means_deviations_and_published_figures(project: Path, ml_1m: list[params.Run]) -> None:
    for run in ml_1m:
        fake_run(project, run)
    tabulate(project, "mine")
    values = [value(run, "hr@10", 2) for run in ml_1m if (run.model, run.protocol) == ("hstu", "paper")]
    shown = f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"
    markdown = (project / "reports/mine/table.md").read_text()
    strict, paper = markdown.split("## MovieLens-1M, protocol ")[1:]
    hstu = next(line for line in paper.splitlines() if line.startswith("| HSTU"))
    assert [cell.strip() for cell in hstu.split("|")][2:4] == ["3", shown]
    assert [cell.strip() for cell in hstu.split("|")][-3:-1] == ["0.3097", "0.1720"]
    assert "published HR@10" not in strict  # figures of two protocols never share a column
    assert "Dross" not in paper  # sources of rows that are not shown are not named
    for part in ("a" * 40, "d" * 64, "CPU, 2 threads"):
        assert part in markdown
    with (project / "reports/mine/table.csv").open() as file:
        rows = {(row["model"], row["protocol"]): row for row in csv.DictReader(file)}
    assert float(rows["hstu", "paper"]["test/hr@10"]) == pytest.approx(statistics.mean(values), abs=1e-6)
    assert float(rows["hstu", "paper"]["test/hr@10/sd"]) == pytest.approx(statistics.stdev(values), abs=1e-6)
    with (project / "reports/mine/runs.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 12
    html = (project / "reports/mine/table.html").read_text()
    HTMLParser().feed(html)
    assert shown in html
    assert (project / "reports/mine/curves.png").read_bytes().startswith(b"\x89PNG")


def record_all(project: Path) -> Path:
    """The light records of experiment `mine`."""
    folder = project / "reports/mine/records"
    write_records("mine", read_records("mine", project / "runs/mine")[0], folder)
    return folder


def test_tables_are_the_same_bytes_from_runs_and_from_their_records(project: Path, ml_1m: list[params.Run]) -> None:
    for run in ml_1m:
        fake_run(project, run)
    tabulate(project, "mine")
    folder = project / "reports/mine"
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    figures = {f"{name}{end}" for name in ("curves", "groups", "speed", "intervals") for end in FIGURE}
    assert figures | {"table.md", "paper.tex", "paper.html", "intervals.csv", "parity.md"} <= set(before)
    step("record", "--experiment", "mine", "--runs", "runs/mine", "--output", "reports/mine/records", cwd=project)
    assert sorted(path.name for path in (folder / "records").iterdir()) == [TestRanks.FILE, RUNS]
    tabulate(project, "mine", "reports/mine/records")
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_the_paper_s_table_has_both_gains_over_sasrec(project: Path, ml_1m: list[params.Run]) -> None:
    for run in ml_1m:
        fake_run(project, run)
    tabulate(project, "mine")
    ours = {}
    for model in ("sasrec", "hstu"):
        values = [value(run, "hr@10", 2) for run in ml_1m if (run.model, run.protocol) == (model, "paper")]
        ours[model] = statistics.mean(values)
    lines = [line.split("|") for line in (project / "reports/mine/paper.md").read_text().splitlines()]
    rows = {(cells[1].strip(), cells[2].strip()): [cell.strip() for cell in cells] for cells in lines if len(cells) > 5}
    assert rows["HSTU", "ours"][4].endswith(f"({ours['hstu'] / ours['sasrec'] - 1:+.1%})")
    assert rows["HSTU", "theirs"][4] == "0.3097 (+8.6%)"  # as the paper prints it
    assert rows["HSTU-large", "theirs"][4] == "0.3294 (+15.5%)"
    assert ("HSTU-large", "ours") not in rows  # which was not run
    assert rows["SASRec", "theirs"][4] == "0.2853"
    latex = (project / "reports/mine/paper.tex").read_text()
    assert r"0.3097 (+8.6\%)" in latex
    assert latex.count(r"\begin{tabular}") == 1


def test_labels_keep_their_characters(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    label = "A|B <i>*x*</i> $1 & $2 `c` [d](e)"
    (project / "params/local").mkdir()
    (project / "params/local/models.yaml").write_text(yaml_files.dump({"odd": {"like": "hstu", "label": label}}))
    for run in experiment(project, "mine", datasets=["ml-1m"], models=["odd"], protocols=["strict"], seeds=[0]):
        fake_run(project, run)
    tabulate(project, "mine")
    row = next(
        line for line in (project / "reports/mine/table.md").read_text().splitlines() if "B" in line and "|" in line
    )
    cells = re.split(r"(?<!\\)\|", row)  # GitHub ends a column at a bar without backslash
    assert re.sub(r"\\(.)", r"\1", cells[1].strip()) == label
    assert len(cells) == len(re.split(r"(?<!\\)\|", "| model | seeds | a | b | c | d | e | f |"))
    html = (project / "reports/mine/table.html").read_text()
    assert "A|B &lt;i&gt;*x*&lt;/i&gt; $1 &amp; $2 `c` [d](e)" in html
    assert "$1 &amp; $2" in (project / "reports/mine/curves.svg").read_text()


def test_figures_are_the_same_drawing_on_dark_paper(project: Path, ml_1m: list[params.Run]) -> None:
    for run in ml_1m:
        fake_run(project, run)
    tabulate(project, "mine")
    light, dark = ((project / f"reports/mine/curves{end}").read_text() for end in (".svg", "-dark.svg"))
    assert re.sub("#[0-9a-f]{6}", "#", light) == re.sub("#[0-9a-f]{6}", "#", dark)
    assert "#ffffff" not in dark
    assert "HSTU" in light  # text stays text
    with (
        Image.open(project / "reports/mine/curves.png") as one,
        Image.open(project / "reports/mine/curves-dark.png") as other,
    ):
        assert one.size == other.size
        assert one.convert("L").getpixel((0, 0)) == 255
        assert other.convert("L").getpixel((0, 0)) < 40


def test_records_hold_the_ranks_up_to_the_largest_that_counts(project: Path, ml_1m: list[params.Run]) -> None:
    for run in ml_1m:
        fake_run(project, run)
    path = project / "runs/mine" / ml_1m[0].path
    best, ties = torch.arange(1, 1001).int(), (torch.arange(1000) % 3).int()
    save_file({"test": best, "test_ties": ties, "test_users": torch.arange(1000)}, path / "outcomes.safetensors")
    seal(path)
    folder = record_all(project)
    (found, *_), missing = read_records("mine", folder)
    assert missing == []
    kept = found.outcomes()
    assert kept.users.tolist() == list(range(1000))
    assert kept.best.tolist() == [*range(1, LARGEST_RANK + 1), *[LARGEST_RANK + 1] * (1000 - LARGEST_RANK)]
    assert kept.ties.tolist() == [*ties.tolist()[:LARGEST_RANK], *[0] * (1000 - LARGEST_RANK)]
    assert {name: (path / name).read_text() for name in ("config.json", "metrics.json")} == {
        name: text for name, text in found.texts.items() if name != HISTORY
    }
    assert max(*HR_CUTOFFS, *NDCG_CUTOFFS) <= LARGEST_RANK


def test_recording_again_replaces_runs_and_leaves_out_those_that_are_no_more(
    project: Path, ml_1m: list[params.Run]
) -> None:
    for run in ml_1m:
        fake_run(project, run)
    folder = record_all(project)
    before = (folder / TestRanks.FILE).read_bytes()
    assert (record_all(project) / TestRanks.FILE).read_bytes() == before
    fake_run(project, ml_1m[0], commit="b" * 40)
    experiment(project, "mine", datasets=["ml-1m"], models=["sasrec", "hstu"], protocols=["strict"], seeds=[0, 1])
    shutil.rmtree(project / "runs/mine" / ml_1m[-1].path.parts[0] / "hstu")
    record_all(project)
    found, missing = read_records("mine", folder)
    assert [record.run for record in found] == [run for run in ml_1m if run.protocol == "strict" and run.seed < 2]
    assert [record.metrics["commit"] for record in found] == ["b" * 40] + ["a" * 40] * 3
    assert missing == []


@pytest.mark.parametrize("damage", ["half", "other ranks", "other history", "other config"])
def test_records_that_do_not_belong_together_are_named(project: Path, ml_1m: list[params.Run], damage: str) -> None:
    for run in ml_1m:
        fake_run(project, run)
    folder = record_all(project)
    runs, ranks = pl.read_parquet(folder / RUNS), pl.read_parquet(folder / TestRanks.FILE)
    if damage == "half":
        (folder / RUNS).write_bytes((folder / RUNS).read_bytes()[:500])
    elif damage == "other ranks":
        ranks.with_columns(pl.lit(3, pl.UInt16).alias("rank")).write_parquet(folder / TestRanks.FILE)
    else:
        column = "history.jsonl" if damage == "other history" else "config.json"
        old, new = ('"epoch": [1', '"epoch": [3') if damage == "other history" else ('"seed": 0', '"seed": 9')
        runs.with_columns(pl.col(column).str.replace(old, new, literal=True)).write_parquet(folder / RUNS)
    with pytest.raises(
        StepError, match="ranks.parquet has other outcomes" if damage == "other ranks" else "runs.parquet"
    ):
        read_records("mine", folder)[0][0].outcomes()


LOSSES = '{"epoch": 1, "train/loss": 2.5}\n{"epoch": 2, "train/loss": NaN}\n'
NOW_AND_THEN = '{"epoch": 1}\n{"epoch": 2, "valid/hr@10": 0.1}\n'


@pytest.mark.parametrize(
    ("lines", "recorded"),
    [
        (LOSSES, '{"epoch": [1, 2], "train/loss": [2.5, NaN]}'),
        (NOW_AND_THEN, NOW_AND_THEN),
        ("", "{}"),
    ],
)
def test_a_history_is_recorded_by_key_and_comes_back_the_same(
    project: Path, ml_1m: list[params.Run], lines: str, recorded: str
) -> None:
    fake_run(project, ml_1m[0])
    ((record,), _), folder = read_records("mine", project / "runs/mine"), project / "records"
    write_records("mine", [replace(record, history=parse_jsonl(lines, "", ""))], folder)
    assert pl.read_parquet(folder / RUNS)[HISTORY].to_list() == [recorded]
    assert [row[HISTORY] for row in recorded_texts(folder).values()] == [lines]
    pl.read_parquet(folder / RUNS).with_columns(pl.lit(lines).alias(HISTORY)).write_parquet(folder / RUNS)
    assert [row[HISTORY] for row in recorded_texts(folder).values()] == [lines]  # as earlier commits have it


def test_a_recorded_history_has_what_reports_show_of_every_epoch(project: Path, ml_1m: list[params.Run]) -> None:
    fake_run(project, ml_1m[0])
    path = project / "runs/mine" / ml_1m[0].path
    shown = {"train/loss": 2.5, "train/seconds": 1.5, "valid/seconds": 0.5, "valid/hr@10": 0.3, "valid/ndcg@10": 0.2}
    left_out = {f"valid/{name}": 0.1 for name in METRICS if name not in ("hr@10", "ndcg@10")}
    write_text(path / HISTORY, json.dumps({"epoch": 1} | left_out | shown) + "\n")
    seal(path)
    folder = record_all(project)
    ((record,), _) = read_records("mine", folder)
    assert record.history == [{"epoch": 1} | shown]
    assert record.curve("valid/ndcg@10") == {1: 0.2}
    with pytest.raises(StepError, match=rf"the history of {record.run.path} lacks valid/mrr; .* read runs/mine, or"):
        record.curve("valid/mrr")


def test_records_of_earlier_commits_are_read_and_recorded_again(
    project: Path, ml_1m: list[params.Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have whole histories, whose SHA-256 is in metrics.json, and ranks up to 500."""
    for run in ml_1m:
        fake_run(project, run)
    path = project / "runs/mine" / ml_1m[0].path
    ranks = {"test": [200, 201, 500, 501], "test_ties": [7, 7, 7, 7], "test_users": [0, 1, 2, 3]}
    save_file({name: torch.tensor(values) for name, values in ranks.items()}, path / "outcomes.safetensors")
    seal(path)
    folder = record_all(project)
    now = {path.name: path.read_bytes() for path in folder.iterdir()}
    with monkeypatch.context() as earlier:
        earlier.setattr("steps.reporting.outcomes.LARGEST_RANK", 500)
        record_all(project)
    whole = [(project / "runs/mine" / run.path / HISTORY).read_text() for run in ml_1m]
    runs = pl.read_parquet(folder / RUNS).drop(HISTORY_CRC).with_columns(pl.Series(HISTORY, whole))
    runs.write_parquet(folder / RUNS)
    found, _ = read_records("mine", folder)
    assert [record.texts[HISTORY] for record in found] == whole
    kept = found[0].outcomes()
    assert (kept.best.tolist(), kept.ties.tolist()) == ([200, 201, 500, 501], [7, 7, 7, 0])
    record = ("record", "--experiment", "mine", "--runs", "reports/mine/records", "--output", "reports/mine/records")
    step(*record, cwd=project)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == now
    kept = read_records("mine", folder)[0][0].outcomes()
    assert (kept.best.tolist(), kept.ties.tolist()) == ([200, 201, 201, 201], [7, 0, 0, 0])
    runs.with_columns(pl.col(HISTORY).str.replace("1", "3", literal=True)).write_parquet(folder / RUNS)
    with pytest.raises(StepError, match="the history is another than was recorded"):
        read_records("mine", folder)


def test_records_have_the_rows_of_a_user_together(project: Path, ml_1m: list[params.Run]) -> None:
    for run in ml_1m:
        fake_run(project, run)
    ranks = pl.read_parquet(record_all(project) / TestRanks.FILE)
    of_a_table = sum((run.dataset, run.protocol) == (ml_1m[0].dataset, ml_1m[0].protocol) for run in ml_1m)
    assert of_a_table > 1
    for start in range(0, len(ranks), of_a_table):
        assert ranks["user"][start : start + of_a_table].n_unique() == 1


def test_ranks_of_many_users_stay_in_runs(
    project: Path, ml_1m: list[params.Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    for run in ml_1m:
        fake_run(project, run)
    monkeypatch.setattr("steps.reporting.records.MOST_USERS", 199)
    folder = record_all(project)
    with pytest.raises(StepError, match="compare runs/mine"):
        read_records("mine", folder)[0][0].outcomes()


def test_details_show_every_rule_and_group(project: Path, ml_1m: list[params.Run]) -> None:
    for run in ml_1m:
        fake_run(project, run)
    tabulate(project, "mine")
    with (project / "reports/mine/variants.csv").open() as file:
        rows = {(row["model"], row["protocol"], row["rule"]): row for row in csv.DictReader(file)}
    assert len(rows) == 8
    values = [value(run, "hr@10", 2) + 0.1 for run in ml_1m if (run.model, run.protocol) == ("hstu", "paper")]
    assert float(rows["hstu", "paper", "history/rated"]["hr@10"]) == pytest.approx(statistics.mean(values), abs=1e-6)
    details = (project / "reports/mine/details.md").read_text()
    assert f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}" in details
    with (project / "reports/mine/beyond.csv").open() as file:
        beyond = list(csv.DictReader(file))
    assert beyond[0]["coverage@10"] == "0.5"
    assert "ndcg@10, target head" in beyond[0]
    assert "ndcg@10, target tail" not in beyond[0]  # nobody is in it


def test_a_grid_is_chosen_by_validation_which_stands_before_test(project: Path) -> None:
    chosen = {"datasets": ["ml-1m"], "models": ["hstu"], "protocols": ["strict", "paper"], "seeds": [0]}
    for run in experiment(project, "mine", **chosen, grid={"training.dropout": [0.1, 0.3]}):
        fake_run(project, run)
    tabulate(project, "mine")
    strict, paper = (project / "reports/mine/table.md").read_text().split("## MovieLens-1M, protocol ")[1:]
    headers = [cell.strip() for cell in next(line for line in strict.splitlines() if line.startswith("|")).split("|")]
    assert headers[3:7] == ["valid HR@10", "valid NDCG@10", "test HR@10", "test NDCG@10"]
    row = next(line for line in strict.splitlines() if line.startswith("| HSTU, training.dropout=0.3"))
    assert [cell.strip() for cell in row.split("|")][3] == f"{value(run, 'hr@10', 1):.4f}"
    assert "valid" not in paper.split("|")[1:][3]
    assert "nothing chooses" in paper


def test_the_table_says_what_happened_to_repeats(project: Path, ml_1m: list[params.Run]) -> None:
    path = project / "params/datasets.yaml"
    datasets = yaml_files.read(path)
    del datasets["ml-1m"]["checks"]["unique_user_item"]
    path.write_text(yaml_files.dump(datasets | {"ml-1m": datasets["ml-1m"] | {"repeats": "leave-out"}}))
    for run in ml_1m:
        fake_run(project, run)
    tabulate(project, "mine")
    assert "a target that is among the items left out is a miss" in (project / "reports/mine/table.md").read_text()


def test_a_data_set_that_allows_repeats_has_to_say_what_happens_to_them(project: Path) -> None:
    path = project / "params/datasets.yaml"
    datasets = yaml_files.read(path)
    del datasets["ml-1m"]["checks"]["unique_user_item"]
    path.write_text(yaml_files.dump(datasets))
    with pytest.raises(StepError, match=r"datasets.yaml.*ml-1m.*repeats"):
        params.load("datasets", project / "params")


def test_a_record_of_uncommitted_code_is_refused(project: Path, ml_1m: list[params.Run]) -> None:
    for run in ml_1m:
        fake_run(project, run, commit="a" * 40 + ("-dirty" if run == ml_1m[-1] else ""))
    arguments = ("--experiment", "mine", "--runs", "runs/mine", "--output", "reports/mine/records")
    result = step("record", *arguments, cwd=project, check=False)
    assert result.returncode == 1
    assert "commit first" in result.stderr
    assert not (project / "reports/mine/records").exists()


def test_missing_runs_are_named(project: Path, ml_1m: list[params.Run]) -> None:
    for run in ml_1m[:-2]:
        fake_run(project, run)
    tabulate(project, "mine")
    assert "Not run: ml-1m/hstu/paper (seeds 1 2)." in (project / "reports/mine/table.md").read_text()


def test_no_runs_is_an_error(project: Path, ml_1m: list[params.Run]) -> None:
    del ml_1m
    arguments = ("--experiment", "mine", "--runs", "runs/mine", "--output", "reports/mine")
    assert "no finished run" in step("tabulate", *arguments, cwd=project, check=False).stderr
    assert not (project / "reports/mine").exists()


def test_a_protocol_of_one_s_own_has_its_table(project: Path) -> None:
    path = project / "params/protocols.yaml"
    protocols = yaml_files.read(path)
    path.write_text(yaml_files.dump(protocols | {"own": protocols["strict"]}))
    chosen = {"datasets": ["ml-1m"], "models": ["sasrec"], "protocols": ["own"], "seeds": [0]}
    for run in experiment(project, "mine", **chosen):
        fake_run(project, run)
    tabulate(project, "mine")
    assert "## MovieLens-1M, protocol own" in (project / "reports/mine/table.md").read_text()


@pytest.mark.parametrize("users", [None, 100])
def test_ranks_that_cannot_be_compared_are_named(project: Path, ml_1m: list[params.Run], users: int | None) -> None:
    for run in ml_1m:
        fake_run(project, run)
    path = project / "runs/mine" / ml_1m[-1].path / "outcomes.safetensors"
    path.unlink()
    if users:
        ones = torch.ones(users, dtype=torch.int32)
        save_file({"test": ones, "test_ties": ones - 1, "test_users": torch.arange(users)}, path)
        seal(path.parent)
    arguments = ("--experiment", "mine", "--runs", "runs/mine", "--output", "reports/mine")
    result = step("compare", *arguments, cwd=project, check=False)
    assert (result.returncode, len(result.stderr.splitlines())) == (1, 1), result.stderr
    assert ("ranks other users" if users else "does not exist") in result.stderr
