"""Parameters: what is written in params/ is checked, and resolves into one run's config."""

from pathlib import Path

import pytest
import yaml

from steps.common import params
from steps.common.cli import StepError
from steps.common.files import read_json
from tests.conftest import ROOT, step


@pytest.mark.parametrize("experiment", params.experiments(ROOT / "params"))
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
        for key in ("source", "files", "checks", "training"):
            assert variant[key] == datasets["ml-1m"][key]


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
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | change))
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
    assert config["model"]["label"] == "HSTU, model.optimizer.lr=0.003, training.dropout=0.2"
    # The other points, and the row itself, keep their own values.
    assert params.resolve(runs[0], project / "params")["model"]["optimizer"]["lr"] == 0.001
    path = project / "params/experiments/sweep-demo.yaml"
    path.write_text(path.read_text().replace("model.optimizer.lr", "model.optimizer.rate"))
    with pytest.raises(StepError, match=r"sweep-demo\.yaml, grid: no parameter 'model\.optimizer\.rate'"):
        params.resolve(next(params.runs("sweep-demo", project / "params")), project / "params")


def test_values_of_a_grid_make_names_of_folders(project: Path) -> None:
    path = project / "params/experiments/sweep-demo.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"grid": {"model.alpha": [1.0, "1/sqrt(dqk)"]}}))
    run = list(params.runs("sweep-demo", project / "params"))[1]
    assert run.model == "hstu+model.alpha=1%2Fsqrt%28dqk%29"
    config = params.resolve(run, project / "params")
    assert config["model"]["alpha"] == "1/sqrt(dqk)"
    assert config["model"]["label"] == "HSTU, model.alpha=1/sqrt(dqk)"


def test_heads_that_do_not_divide_the_width_are_named(project: Path) -> None:
    path = project / "params/datasets.yaml"
    datasets = yaml.safe_load(path.read_text())
    datasets["demo"]["training"]["base"]["heads"] = 5
    path.write_text(yaml.safe_dump(datasets))
    with pytest.raises(StepError, match="entry demo: 5 heads do not divide dim 32, as model sasrec needs"):
        params.resolve(params.Run("demo", "demo", "sasrec", "strict", 0), project / "params")


def test_a_name_with_plus_signs_is_no_point_of_a_grid() -> None:
    config = params.resolve(params.Run("ml-1m", "ml-1m", "transformer++", "strict", 0), ROOT / "params")
    assert config["model"]["label"] == "Transformer++"


def test_plan_writes_what_resolve_says(project: Path) -> None:
    names = ["--experiment", "demo", "--dataset", "demo", "--model", "hstu", "--protocol", "strict", "--seed", "0"]
    step("plan", *names, "--output", "runs/config.json", cwd=project)
    run = params.Run("demo", "demo", "hstu", "strict", 0)
    assert read_json(project / "runs/config.json") == params.resolve(run, project / "params")


def test_yaml_cannot_run_code(project: Path) -> None:
    (project / "params/experiments/demo.yaml").write_text("title: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(StepError, match="not YAML"):
        params.load("experiments/demo", project / "params")
