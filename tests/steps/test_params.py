"""Parameters: what is written in params/ is checked, and resolves into one run's config."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from steps.common import params, yaml_files
from steps.common.cli import StepError
from steps.common.datasets import STATED
from steps.common.files import read_json
from tests.conftest import ROOT, step, write_processed
from tests.conftest import run as run_command
from tests.reduced import plannable
from tests.steps.runs import planned

SWEEP = "experiments/sweep-demo"


@pytest.mark.parametrize("experiment", plannable(ROOT / "params"))
def test_every_run_of_every_experiment_resolves(experiment: str) -> None:
    for run in params.runs(experiment, ROOT / "params"):
        config = params.resolve(run, ROOT / "params")
        assert config["training"]["epochs"] >= 1
        assert (config["dataset"], config["row"], config["seed"]) == (run.dataset, run.model, run.seed)


def test_ml_1m_has_the_parity_contract() -> None:
    root = ROOT / "params"
    large = params.resolve(params.Run("ml-1m", "ml-1m", "hstu-large", "paper", 0), root)
    assert large["training"] == {"max_len": 200, "epochs": 101, "batch": 128, "negatives": 128, "dropout": 0.2}
    shape = {name: large["model"][name] for name in ("dim", "blocks", "heads", "dqk", "dv")}
    assert shape == {"dim": 50, "blocks": 8, "heads": 2, "dqk": 25, "dv": 25}
    base = params.resolve(params.Run("ml-1m", "ml-1m", "hstu", "paper", 0), root)
    assert [base["model"][name] for name in ("blocks", "heads", "dqk", "dv")] == [2, 1, 50, 50]
    sasrec = params.resolve(params.Run("ml-1m", "ml-1m", "sasrec", "paper", 0), root)
    assert sasrec["model"]["optimizer"] == {"lr": 1e-3, "betas": [0.9, 0.98], "weight_decay": 0.0}


def test_the_study_s_data_sets_differ_in_their_ties_alone() -> None:
    datasets = params.load("datasets", ROOT / "params")
    for name in ("item-id", "shuffled"):
        variant = datasets[f"ml-1m-{name}-ties"]
        assert variant["ties"] == name
        assert {key for key in variant if variant[key] != datasets["ml-1m"].get(key)} == {"title", "variant_of", "ties"}
        assert params.valid_of(f"ml-1m-{name}-ties", ROOT / "params") == "ml-1m"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"checks": {"min_user_interactions": 5, "unique_user_item": True}},
            "key mine.checks: a variant of demo",
        ),
        ({"variant_of": "demos"}, "no entry 'demos'"),
        ({"variant_of": "ml-1m-item-id-ties"}, "is a variant itself; name ml-1m"),
    ],
)
def test_a_variant_shares_what_is_fetched_and_checked(project: Path, changes: dict, said: str) -> None:
    write_local(project, "datasets", {"mine": {"like": "demo", "title": "Mine", "variant_of": "demo"} | changes})
    run = params.Run("demo", "mine", "hstu", "strict", 0)
    with pytest.raises(StepError, match=said):
        params.resolve(run, project / "params")


def test_files_of_one_s_own_do_not_get_the_licence_of_the_entry_they_are_like(project: Path) -> None:
    own = {"like": "demo", "title": "Mine"}
    write_local(project, "datasets", {"same": own, "mine": own | {"source": {"file": "mine.zip"}, "version": "2"}})
    found = params.load("datasets", project / "params")
    assert {key for key in STATED if key in found["same"]} == {"licence", "citation", "version"}
    assert {key: found["mine"][key] for key in STATED if key in found["mine"]} == {"version": "2"}


def test_a_model_without_randomness_has_one_seed() -> None:
    seeds: dict[str, list[int]] = {}
    for run in params.runs("ml-1m", ROOT / "params"):
        if run.protocol == "paper":
            seeds.setdefault(run.model, []).append(run.seed)
    once = {"most-popular", "item-knn", "markov"}
    assert seeds == {model: [0] if model in once else [0, 1, 2, 3, 4] for model in seeds}
    assert once < seeds.keys()


def test_a_row_like_another_has_its_keys_but_for_its_own(project: Path) -> None:
    models = params.load("models", project / "params")
    assert models["hstu-position"] == models["hstu"] | {
        "label": "HSTU, position bias only",
        "bias": {"position": True, "time": "none"},
    }
    path = project / "params/models.yaml"
    path.write_text(path.read_text().replace("like: hstu", "like: hstv"))
    with pytest.raises(StepError, match="key hstu-large: 'hstv' is no entry of its own to be like"):
        params.load("models", project / "params")


def test_an_experiment_overrides_its_training() -> None:
    short = params.resolve(params.Run("ml-1m-short", "ml-1m", "hstu", "paper", 0), ROOT / "params")
    assert short["training"]["epochs"] == 3


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("models", {"hstu": {"label": "HSTU", "model": "hstu"}}, "hstu"),
        (
            "protocols",
            {"odd": {"split": "temporal", "report": "best", "candidates": "rated", "exclude": "window"}},
            "odd",
        ),
        ("experiments/demo", {"seeds": [-1]}, "seeds.0"),
        ("experiments/demo", {"seeds": [20240217]}, "seeds.0"),  # whose steps' seeds are beyond 64 bits
        ("experiments/demo", {"trainings": {}}, "trainings"),
        ("datasets", {"mine": {"title": "x"}}, "mine"),
    ],
)
def test_a_wrong_file_is_named_with_its_key(project: Path, file: str, change: dict, said: str) -> None:
    path = project / "params" / f"{file}.yaml"
    path.write_text(yaml_files.dump(yaml_files.read(path) | change))
    with pytest.raises(StepError, match=rf"{file}.yaml.*{said}"):
        params.load(file, project / "params")


def test_unknown_names_list_the_known() -> None:
    with pytest.raises(StepError, match="no entry 'hstv'; it has most-popular, item-knn"):
        params.entry("models", "hstv", ROOT / "params")
    with pytest.raises(StepError, match="no shape 'large', which model hstu-large needs"):
        params.resolve(params.Run("demo", "demo", "hstu-large", "paper", 0), ROOT / "params")


def test_a_grid_makes_a_row_of_every_point(project: Path) -> None:
    runs = list(params.runs("sweep-demo", project / "params"))
    assert len(runs) == len({run.path for run in runs}) == 4
    config = params.resolve(runs[-1], project / "params")
    assert runs[-1].model == "hstu+model.optimizer.lr=0.003+training.dropout=0.2"
    assert (config["model"]["optimizer"]["lr"], config["training"]["dropout"]) == (0.003, 0.2)
    assert params.label(runs[-1].model, project / "params") == "HSTU, model.optimizer.lr=0.003, training.dropout=0.2"
    # The other points, and the row itself, keep their own values.
    assert params.resolve(runs[0], project / "params")["model"]["optimizer"]["lr"] == 0.001
    path = project / "params/experiments/sweep-demo.yaml"
    path.write_text(path.read_text().replace("model.optimizer.lr", "model.optimizer.rate"))
    with pytest.raises(StepError, match=r"sweep-demo\.yaml, grid: no parameter 'model\.optimizer\.rate'"):
        params.resolve(next(params.runs("sweep-demo", project / "params")), project / "params")


def test_values_of_a_grid_make_names_of_folders(project: Path) -> None:
    path = project / "params/experiments/sweep-demo.yaml"
    path.write_text(yaml_files.dump(yaml_files.read(path) | {"grid": {"model.alpha": [1.0, "1/sqrt(dqk)"]}}))
    run = list(params.runs("sweep-demo", project / "params"))[1]
    assert run.model == "hstu+model.alpha=1%2Fsqrt%28dqk%29"
    config = params.resolve(run, project / "params")
    assert config["model"]["alpha"] == "1/sqrt(dqk)"
    assert params.label(run.model, project / "params") == "HSTU, model.alpha=1/sqrt(dqk)"


def test_heads_that_do_not_divide_the_width_are_named(project: Path) -> None:
    path = project / "params/datasets.yaml"
    datasets = yaml_files.read(path)
    datasets["demo"]["training"]["base"]["heads"] = 5
    path.write_text(yaml_files.dump(datasets))
    with pytest.raises(StepError, match="entry demo: 5 heads do not divide dim 32, as model sasrec needs"):
        params.resolve(params.Run("demo", "demo", "sasrec", "strict", 0), project / "params")


def write_local(project: Path, name: str, content: dict[str, Any]) -> Path:
    path = project / "params/local" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml_files.dump(content))
    return path


def test_a_name_with_plus_signs_is_no_point_of_a_grid(project: Path) -> None:
    assert params.label("transformer++", ROOT / "params") == "Transformer++"
    root = project / "params"
    write_local(project, "models", {"hstu+time": {"like": "hstu-time", "label": "Plus"}})
    write_local(project, "datasets", {"clicks+views": {"like": "demo", "title": "Clicks and views"}})
    chosen = {"datasets": ["clicks+views"], "models": ["hstu+time"], "protocols": ["strict"], "seeds": [0]}
    grid = {"training.dropout": [0.1], "model.alpha": ["1/sqrt(dqk)"]}
    write_local(project, "experiments/own", {"title": "Own", **chosen, "grid": grid})
    (run,) = params.check("own", root)
    assert run.model == "hstu+time+training.dropout=0.1+model.alpha=1%2Fsqrt%28dqk%29"
    config = params.resolve(run, root)
    assert (config["model"]["bias"]["position"], config["model"]["alpha"]) == (False, "1/sqrt(dqk)")
    assert params.label(run.model, root) == "Plus, training.dropout=0.1, model.alpha=1/sqrt(dqk)"
    assert params.label("transformer+++training.dropout=0.1", root) == "Transformer++, training.dropout=0.1"


def test_labels_and_titles_are_no_part_of_a_run(project: Path) -> None:
    root = project / "params"
    before = params.resolve(params.Run("demo", "demo", "hstu", "strict", 0), root)
    assert "label" not in before["model"]
    for name, old, new in (
        ("models", "label: HSTU\n", "label: Ours\n"),
        ("experiments/demo", "title: The", "title: Now the"),
        ("datasets", "title: Generated", "title: Still generated"),
    ):
        path = root / f"{name}.yaml"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))
    assert params.resolve(params.Run("demo", "demo", "hstu", "strict", 0), root) == before
    assert params.label("hstu", root) == "Ours"
    assert params.load("experiments/demo", root)["title"].startswith("Now")


@pytest.mark.parametrize("word", ["3e-05", "0.00003", "3.0e-5", "3E-5"])
def test_a_small_number_is_a_number_however_it_is_written(project: Path, word: str) -> None:
    """`dvc exp run -S params/models.yaml:hstu.optimizer.lr=0.00003` writes 3e-05."""
    root = project / "params"
    path = root / "models.yaml"
    text = path.read_text()
    path.write_text(text.replace("{lr: 1.0e-3", f"{{lr: {word}"))
    assert params.load("models", root)["hstu"]["optimizer"]["lr"] == 0.00003
    path.write_text(text)
    path = root / "experiments/sweep-demo.yaml"
    path.write_text(path.read_text().replace("[1.0e-3, 3.0e-3]", f"[{word}, 1e-3]"))
    runs = params.check("sweep-demo", root)
    rates = [params.resolve(run, root)["model"]["optimizer"]["lr"] for run in runs]
    assert rates == [0.00003, 0.00003, 0.001, 0.001]
    assert runs[0].model == "hstu+model.optimizer.lr=3e-05+training.dropout=0.1"


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        # The error is of the branch that the entry's own model selects.
        ("models", "alpha: 1.0 ", "alpha: 1e-3x ", r"key hstu[a-z-]*\.alpha: '1e-3x' is not"),
        (
            "models",
            "mask_prob: 0.2",
            "mask_prob: '0.2'",
            r"key bert4rec(-quoted)?\.mask_prob: '0\.2' is not of type 'number'",
        ),
        (
            "models",
            "last_only: false",
            "shape: base\n  last_only: false",
            r"key bert4rec-quoted: 'shape' does not belong here",
        ),
        ("models", "heads: 2\n  mask_prob", "mask_prob", r"key bert4rec-quoted: 'heads' is a required property"),
        ("models", "dim: 64\n  training", "training", r"key gru4rec-quoted: 'dim' is a required property"),
        ("models", "samples: 2048", "samples: 2e3", r"key gru4rec\.samples: 2000\.0 is not of type 'integer'"),
        ("models", "shrink: 10.0", "shrink: .inf", r"key item-knn\.shrink: inf is not of type 'number'"),
        ("models", "shrink: 10.0", "shrink: .nan", r"key item-knn\.shrink: nan is not of type 'number'"),
        ("models", "shrink: 10.0", "shrink: 1e999", r"key item-knn\.shrink: inf is not of type 'number'"),
        ("models", "shrink: 10.0", "shrink: true", r"key item-knn\.shrink: True is not of type 'number'"),
        ("models", "shrink: 10.0", "shrink: 1:30", r"key item-knn\.shrink: '1:30' is not of type 'number'"),
        ("models", "negatives: 256, calibration: 0.75", "negatives: 256", r"key sasrec-gbce\.loss: 'calibration'"),
        (
            "models",
            "negatives: 256, calibration",
            "negatives: 0, calibration",
            r"key sasrec-gbce\.loss\.negatives: 0 is less",
        ),
        ("models", "markov\n", "markov\n  lr: 1\n", r"key markov: .*'lr'"),
        (
            "models",
            "dot, temperature: 1.0, negatives: 1}",
            "dot, temperature: 1.0, calibration: 1}",
            r"'calibration' doe",
        ),
        ("models", "betas: [0.0, 0.0]", "betas: [0.9, 0.0]", r"key gru4rec\.optimizer\.betas"),
        ("models", "label: HSTU\n", "label: ''\n", r"key hstu\.label"),
        ("models", "hstu-time:", "hstu time:", r"'hstu time' is no name"),
        ("models", "hstu-time:", "hstu/time:", r"'hstu/time' is no name"),
        ("models", "hstu-time:", '"hstu\\n":', r"'hstu.n' is no name"),
        ("models", "hstu-time:", "7:", r"7 is no name"),
        ("models", "hstu-time:", "hstu-position:", r"line \d+: key hstu-position occurs twice"),
        ("protocols", "temporal: ", "Temporal: ", r"'Temporal' is no name"),
        ("protocols", "test_share: 0.1", "test_share: .nan", r"key temporal(-ranking)?\.test_share: nan"),
        (
            "protocols",
            "  valid_share: 0.1     # of all rows, before those\n",
            "",
            r"key temporal.*: 'valid_share' is a req",
        ),
        (
            "datasets",
            "schedule: one-pass",
            "schedule: windows",
            r"key stream[a-z-]*\.training\.schedule: 'one-pass' was",
        ),
        ("datasets", "ml-1m:", "ml_1m:", r"'ml_1m' is no name"),
        ("datasets", "max_len: 200", "max_len: 200.0", r"key ml-[a-z0-9-]+\.training\.max_len: 200\.0 is not of type"),
        ("datasets", "max_len: 200", "max_len: 0200", r"key ml-[a-z0-9-]+\.training\.max_len: '0200' is not of type"),
        ("datasets", "negatives: 128", "negatives: 0", r"key [a-z0-9-]+\.training\.negatives: 0 is less"),
        (
            "datasets",
            "columns: [user, item, timestamp]",
            "columns: [item, timestamp]",
            r"interactions\.columns: lacks 'user'",
        ),
        ("datasets", "columns: [user, item, timestamp]", "columns: [user, item]", r"columns: lacks 'timestamp'"),
        ("datasets", "checks: {min_user", "checks: {rating: [1, 5], min_user", r"columns: lacks 'rating'"),
        ("datasets", "rating: [1, 5]", "rating: [5, 1]", r"key [a-z0-9-]+\.checks\.rating: 5 is more than 1"),
        (
            "datasets",
            "checks: {min_user",
            "checks: {time: [2021-01-01, 1600000000], min_user",
            r"checks\.time: 2021-01-01 is more than 1600000000",
        ),
        ("datasets", "checks: {min_user", "checks: {time: [2021-02-30, 1], min_user", r"checks\.time: day is out of"),
        (
            "datasets",
            "columns: [user, item, timestamp]",
            "columns: {user: who, item: who, timestamp: when}",
            r"interactions\.columns: two of them are taken from 'who'",
        ),
        ("datasets", "gender: category", "gender: text", r"key [a-z0-9-]+\.files\.users\.features\.gender"),
        ("datasets", 'categories: "|"', 'categories: ""', r"key [a-z0-9-]+\.files\.items\.features\.genres"),
        ("datasets", "gender: category", "user: category", r"key [a-z0-9-]+\.files\.users\.features: 'user'"),
        ("datasets", "item, timestamp]}", "item, timestamp], features: {}}", "interactions: 'features' does not"),
        (
            "datasets",
            "levels: [is_click, ",
            "levels: [clicked, ",
            r"interactions\.levels: 'clicked' is none of `columns`",
        ),
        (
            "datasets",
            "levels: [is_click, ",
            "levels: [item, ",
            r"interactions\.levels: 'item' is none of `columns` that",
        ),
        (
            "datasets",
            "long_view: long_view}",
            "long_view: long_view, rating: is_like}",
            r"levels: .*; take one of both",
        ),
        (
            "datasets",
            "levels: [is_click, long_view]",
            "levels: []",
            r"key kuairand-(1|27)k\.files\.interactions\.levels",
        ),
        (
            "datasets",
            "path: demo/movies.dat",
            "path: [a.dat, b.dat]",
            r"key demo[a-z-]*\.files\.items\.path: \['a\.dat', 'b",
        ),
        ("datasets", "to_5_08_1k.csv", "to_5_08_1k.csv.gz", r"path: download unpacks .*_1k\.csv$"),
        ("protocols", "levels: [1.0]", "levels: [true]", r"key temporal-long-view\.levels\.0: True is not of type"),
        (SWEEP, "seeds: [0]", "seeds: [0.0]", r"key seeds\.0: 0\.0 is not of type 'integer'"),
        (SWEEP, "seeds: [0]", "seeds: []", r"key seeds"),
        (SWEEP, "[demo]", "[Demo]", r"key datasets\.0: 'Demo' is no name"),
        (SWEEP, "[demo]", "[demos]", r"key datasets\.0: .*no entry 'demos'; it has demo, "),
        (SWEEP, "[hstu]", "[hstu, hstv]", r"key models\.1: .*no entry 'hstv'; it has most-popular, "),
        (SWEEP, "[strict]", "[strikt]", r"key protocols\.0: .*no entry 'strikt'; it has strict, "),
        (SWEEP, "[0.1, 0.2]", "[]", r"key grid\.training\.dropout"),
        (SWEEP, "[0.1, 0.2]", "[.nan]", r"key grid\.training\.dropout\.0: nan"),
        (SWEEP, "[0.1, 0.2]", "[1.5]", r"grid: training\.dropout: 1\.5 is greater"),
        (SWEEP, "[0.1, 0.2]", "['0.1']", r"grid: training\.dropout: '0\.1' is not of type 'number'"),
        (SWEEP, "training.dropout: [0.1", "training.negatives: [0", r"grid: training\.negatives: 0 is"),
        (SWEEP, "training.dropout: [0.1", "training.batch: [1e2", r"batch: 100\.0 is not of type 'integer'"),
        (SWEEP, "training.dropout: [0.1", "model.blocks: [0", r"grid: model\.blocks: 0 is less"),
        (SWEEP, "training.dropout: [0.1", "model.bias.time: [0", r"grid: model\.bias\.time: 0 is not one"),
        (SWEEP, "training.dropout: [0.1", "protocol.report: [0", r"grid: protocol\.report: 0 is not one"),
        (SWEEP, "training.dropout: [0.1", "protocol.name: [0", r"grid: no parameter 'protocol\.name'"),
        (SWEEP, "training.dropout: [0.1", f"model.attention: [{'silu' * 60}", "longer than 255 bytes"),
    ],
)
def test_what_does_not_fit_is_found_at_once(project: Path, file: str, old: str, new: str, said: str) -> None:
    path = project / "params" / f"{file}.yaml"
    shutil.copyfile(ROOT / "params" / f"{file}.yaml", path)
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(StepError, match=rf"{file}\.yaml.*{said}"):
        params.check("sweep-demo", project / "params")


def test_heads_of_a_grid_that_do_not_divide_the_width_are_named(project: Path) -> None:
    path = project / "params/experiments/sweep-demo.yaml"
    content = yaml_files.read(path) | {"models": ["sasrec"], "grid": {"model.heads": [1, 5]}}
    path.write_text(yaml_files.dump(content))
    with pytest.raises(StepError, match=r"sweep-demo\.yaml, grid: 5 heads do not divide dim 32"):
        params.check("sweep-demo", project / "params")


def test_the_schedule_of_a_data_set_is_that_of_every_row(project: Path) -> None:
    """Of points of a grid too, whose values are checked as those of the files are that they come from."""
    path = project / "params/experiments/sweep-demo.yaml"
    rows = {"datasets": ["stream-small"], "models": ["gru4rec", "hstu-one-pass", "hstu"], "protocols": ["stream"]}
    path.write_text(yaml_files.dump(yaml_files.read(path) | rows | {"grid": {"training.batch": [4, 8]}}))
    for run in params.check("sweep-demo", project / "params"):
        training = params.resolve(run, project / "params")["training"]
        assert (training["schedule"], training["epochs"]) == ("one-pass", 1)


@pytest.mark.parametrize("name", ["Mine", "my shop", "my_shop", "-mine", "mine.old"])
def test_a_file_whose_name_no_experiment_can_have_is_named(project: Path, name: str) -> None:
    path = write_local(project, f"experiments/{name}", {})
    with pytest.raises(StepError, match=rf"{re.escape(str(path))}: '{re.escape(name)}' is no name.*rename the file"):
        params.experiments(project / "params")


@pytest.mark.parametrize("name", ["train", "datasets", "studies", "tests", "local"])
def test_an_experiment_is_not_called_as_a_step_or_a_folder(project: Path, name: str) -> None:
    path = write_local(project, f"experiments/{name}", {})
    with pytest.raises(StepError, match=rf"{re.escape(str(path))}: an experiment cannot be called '{name}'"):
        params.experiments(project / "params")


def test_an_unknown_experiment_lists_the_known(project: Path) -> None:
    write_local(project, "experiments/mine", {})
    with pytest.raises(
        StepError, match=r"^no experiment 'demos'; there are amzn-beauty, amzn-books, demo, .*mine.*sweep-demo$"
    ):
        params.load("experiments/demos", project / "params")


def test_local_entries_are_read_beside_the_project_s_own(project: Path) -> None:
    root = project / "params"
    write_local(project, "datasets", {"mine": {"like": "demo", "title": "Mine", "ties": "item-id"}})
    write_local(project, "models", {"hstu-wide": {"like": "hstu-large", "label": "Wide", "shape": "base"}})
    write_local(project, "protocols", {"own": {"like": "strict", "exclude": "window"}})
    chosen = {"datasets": ["demo", "mine"], "models": ["hstu", "hstu-wide"], "protocols": ["own"], "seeds": [0]}
    write_local(project, "experiments/mine", {"title": "Mine", **chosen})
    assert "mine" in params.experiments(root)
    assert [run.dataset for run in params.check("mine", root)] == ["demo", "demo", "mine", "mine"]
    assert params.entry("datasets", "mine", root) == params.entry("datasets", "demo", root) | {
        "title": "Mine",
        "ties": "item-id",
    }
    config = params.resolve(params.Run("mine", "mine", "hstu-wide", "own", 0), root)
    assert config["protocol"] == {"name": "own"} | params.protocol_rules("strict", root) | {"exclude": "window"}
    assert params.label("hstu-wide", root) == "Wide"
    write_local(project, "models", {})  # a file whose entries are all gone
    assert "hstu" in params.load("models", root)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "models",
            {"hstu": {"like": "sasrec", "label": "Mine"}},
            "key hstu: .*params/models.yaml has an entry of this",
        ),
        ("models", {"own": {"like": "hstv", "label": "Mine"}}, "key own: 'hstv' is no entry of its own to be like"),
        ("models", {"own": {"like": "hstu", "alpha": "x"}}, r"key own\.alpha: 'x' is not one of"),
        ("models", {"Own": {"like": "hstu"}}, "'Own' is no name"),
        ("experiments/demo", {}, "params/experiments/demo.yaml is an experiment of this name"),
        ("experiments/own", {"title": "Own"}, r"key \(top level\): 'datasets' is a required"),
    ],
)
def test_a_wrong_local_file_is_named(project: Path, name: str, content: dict[str, Any], said: str) -> None:
    path = write_local(project, name, content)
    with pytest.raises(StepError, match=f"^{re.escape(str(path))}.*{said}"):
        params.check("own", project / "params") if "/" in name else params.load(name, project / "params")


def test_entries_and_results_of_one_s_own_leave_the_checkout_clean(project: Path) -> None:
    def git(*arguments: str) -> str:
        return run_command("git", "-c", "user.name=t", "-c", "user.email=t@t", *arguments, cwd=project).stdout

    def commit() -> str:
        code = "from steps.common.provenance import commit; print(commit())"
        return run_command("python", "-c", code, cwd=project).stdout.strip()

    for arguments in (["init", "--quiet"], ["add", "--all"], ["commit", "-qm", "all"]):
        git(*arguments)
    before = commit()
    assert re.fullmatch("[0-9a-f]{40}", before)
    write_local(project, "datasets", {"mine": {"like": "demo", "title": "Mine"}})
    chosen = {"datasets": ["mine"], "models": ["hstu"], "protocols": ["strict"], "seeds": [0]}
    write_local(project, "experiments/mine", {"title": "Mine", **chosen})
    results = "mine/hstu/strict/seed-0"
    names = ["--experiment", "mine", "--dataset", "mine", "--model", "hstu", "--protocol", "strict", "--seed", "0"]
    data = write_processed(project / "data/processed/mine", [5, 6, 9], 20)
    step("plan", *names, "--data", data, "--output", f"runs/mine/{results}/config.json", cwd=project)
    for path in (
        "workflow/local/dvc.yaml",
        "reports/mine/table.md",
        "reports/mine/records/runs.parquet",
    ):
        (project / path).parent.mkdir(parents=True)
        (project / path).touch()
    assert git("status", "--porcelain") == "?? workflow/local/\n"  # untracked: DVC reads no file that git ignores
    assert commit() == before


def test_the_project_s_own_reports_are_not_ignored() -> None:
    tracked = run_command("git", "ls-files", "reports", cwd=ROOT).stdout.split()
    of_cards = {path.rpartition("/")[0] for path in tracked if path.startswith("reports/datasets/")}
    folders = sorted({"/".join(path.split("/")[:2]) for path in tracked if path.count("/") > 1} - {"reports/datasets"})
    assert "reports/ml-1m" in folders
    probes = [f"{folder}/records/new.json" for folder in folders] + [f"{folder}/new.json" for folder in of_cards]
    own = ["reports/mine/table.md", "reports/datasets/mine/card.json"]
    ignored = run_command("git", "check-ignore", "--no-index", *probes, *own, cwd=ROOT).stdout.split()
    assert ignored == own


def test_the_step_of_checking_writes_every_run_s_path(project: Path) -> None:
    done = step("check", "--experiment", "demo", "--output", "runs/demo.json", cwd=project)
    assert "6 runs" in done.stdout
    models = [
        f"demo/{model}/{rule}/seed-0" for model in ("hstu", "most-popular", "sasrec") for rule in ("paper", "strict")
    ]
    assert read_json(project / "runs/demo.json") == {"experiment": "demo", "runs": models}
    failed = step("check", "--experiment", "demos", "--output", "runs/demos.json", cwd=project, check=False)
    assert failed.returncode == 1
    assert failed.stderr.startswith("check: no experiment 'demos'; there are ")
    assert not (project / "runs/demos.json").exists()


def test_plan_writes_what_resolve_says(project: Path) -> None:
    names = ["--experiment", "demo", "--dataset", "demo", "--model", "hstu", "--protocol", "strict", "--seed", "0"]
    data = write_processed(project / "data/processed/demo", [5, 6, 9], 20)
    step("plan", *names, "--data", data, "--output", "runs/config.json", cwd=project)
    run = params.Run("demo", "demo", "hstu", "strict", 0)
    config = params.resolve(run, project / "params")
    assert read_json(project / "runs/config.json") == planned(config, data)


def test_yaml_cannot_run_code(project: Path) -> None:
    (project / "params/experiments/demo.yaml").write_text("title: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(StepError, match="not YAML"):
        params.load("experiments/demo", project / "params")


def test_a_feature_that_is_no_column_is_named(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "params", tmp_path / "params")
    path = tmp_path / "params/datasets.yaml"
    path.write_text(path.read_text().replace("features: {gender: category", "features: {sex: category"))
    with pytest.raises(StepError, match=r"datasets\.yaml, key demo\.files\.users\.features: 'sex' is none of its"):
        params.valid_of("ml-1m", tmp_path / "params")
