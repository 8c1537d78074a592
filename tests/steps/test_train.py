"""Training: it learns, survives a kill, repeats itself bit for bit, and runs on a bare machine."""

import math
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from steps.common.files import read_json, read_jsonl, write_json
from steps.common.params import Run, load, resolve
from steps.data.sequences import load_sequences
from steps.models import build
from steps.models.checkpoint import load_weights, save_weights
from steps.training.loop import Training, reported_epoch
from tests.conftest import ROOT, write_processed
from tests.steps.runs import PAPER, config, lasting


def command(name: str, run: Path, data: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", f"steps.{name}", "--run", str(run), "--data", str(data), *more]


def make_run(folder: Path, settings: dict[str, Any]) -> Path:
    write_json(folder / "config.json", settings)
    return folder


def finish(run: Path, data: Path, *more: str) -> None:
    deterministic = command("train", run, data, "--deterministic", "--device", "cpu", *more)
    subprocess.run(deterministic, check=True, cwd=ROOT, capture_output=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_processed(tmp_path_factory.mktemp("data") / "t", [9 + user % 17 for user in range(150)], 80)


@pytest.mark.parametrize("model", ["hstu", "sasrec", "gru4rec"])
def test_a_killed_training_ends_with_the_bytes_of_an_unbroken_one(model: str, data: Path, tmp_path: Path) -> None:
    settings = config(model, epochs=12)
    whole, killed = make_run(tmp_path / "whole", settings), make_run(tmp_path / "killed", settings)
    finish(whole, data)
    process = subprocess.Popen(
        command("train", killed, data, "--deterministic", "--device", "cpu"),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch 3/"):
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    # Nothing that looks finished, but a state to go on from.
    assert sorted(path.name for path in killed.iterdir()) == ["config.json", "resume"]
    again = subprocess.run(
        command("train", killed, data, "--deterministic", "--device", "cpu"),
        check=True,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert "resuming after epoch" in again.stdout
    assert "epoch 1/12" not in again.stdout
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    kept = [lasting(read_jsonl(run / "history.jsonl")) for run in (whole, killed)]
    assert kept[0] == kept[1]
    assert len(kept[0]) == 12
    assert not (killed / "resume").exists()


def test_a_state_of_another_config_is_not_gone_on_from(data: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", config(epochs=300))
    train = command("train", run, data, "--device", "cpu")
    process = subprocess.Popen(train, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    next(line for line in process.stdout if line.startswith("epoch 3/"))
    process.kill()
    process.wait()
    assert (run / "resume" / "state.safetensors").is_file()
    make_run(run, config(epochs=2))
    again = subprocess.run(train, check=True, cwd=ROOT, capture_output=True, text=True)
    assert "resuming" not in again.stdout
    assert len(read_jsonl(run / "history.jsonl")) == 2


def test_a_training_that_went_on_names_every_commit(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", config(epochs=4))
    found, digest = load_sequences(data, torch.device("cpu"))
    monkeypatch.setenv("HSTU_COMMIT", "a" * 40 + "-dirty")
    begun = Training(config(epochs=4), found, digest, run)
    steps = begun.epochs()
    while begun.done < 2:
        next(steps)
    steps.close()
    begun._states.finish()
    for name in ("b", "c"):
        monkeypatch.setenv("HSTU_COMMIT", name * 40)
        went_on = Training(config(epochs=4), found, digest, run)
        assert went_on.done == 2
    assert went_on.record()["commit"] == "a" * 40 + "-dirty+" + "c" * 40  # b's took no step


def test_results_of_an_earlier_training_do_not_outlive_a_failed_one(data: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", config(epochs=1))
    finish(run, data)
    subprocess.run(command("evaluate", run, data), check=True, cwd=ROOT)
    assert (run / "metrics.json").is_file()
    make_run(run, config(epochs=2, optimizer={"lr": 1e18, "betas": [0.9, 0.98], "weight_decay": 0.0}))
    failed = subprocess.run(command("train", run, data), cwd=ROOT, capture_output=True, text=True, check=False)
    assert failed.returncode == 1, failed.stdout
    assert [path.name for path in run.iterdir() if path.is_file()] == ["config.json"]
    evaluated = subprocess.run(command("evaluate", run, data), cwd=ROOT, capture_output=True, text=True, check=False)
    assert evaluated.returncode == 1
    assert "is not trained" in evaluated.stderr


def test_a_model_is_not_evaluated_on_other_data(data: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", config("popular", epochs=1))
    finish(run, data)
    other = write_processed(tmp_path / "other", [9 + user % 17 for user in range(150)], 80, seed=1)
    evaluated = subprocess.run(command("evaluate", run, other), cwd=ROOT, capture_output=True, text=True, check=False)
    assert evaluated.returncode == 1
    assert "other sequences" in evaluated.stderr
    assert not (run / "metrics.json").exists()


def test_a_device_that_is_not_there_is_one_clear_line(data: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    run = make_run(tmp_path / "run", config(epochs=1))
    failed = subprocess.run(
        command("train", run, data, "--device", "cuda"), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (failed.returncode, len(failed.stderr.splitlines())) == (1, 1)
    assert "no CUDA device" in failed.stderr


def test_a_damaged_state_is_not_gone_on_from(data: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", config(epochs=2))
    (run / "resume").mkdir()
    (run / "resume" / "state.safetensors").write_bytes(b"half of a file")
    finish(run, data)
    assert len(read_jsonl(run / "history.jsonl")) == 2


def test_strict_keeps_the_best_validation_epoch_and_paper_the_last(data: Path, tmp_path: Path) -> None:
    strict, paper = (
        make_run(tmp_path / "s", config(epochs=6)),
        make_run(tmp_path / "p", config("hstu", PAPER, epochs=6)),
    )
    for run in (strict, paper):
        finish(run, data)
    subprocess.run(command("evaluate", strict, data, "--run", str(paper)), check=True, cwd=ROOT)
    history, metrics = read_jsonl(strict / "history.jsonl"), read_json(strict / "metrics.json")
    best = max(history, key=lambda line: line["valid/ndcg@10"])
    assert metrics["epoch"] == best["epoch"]
    assert metrics["valid"]["ndcg@10"] == pytest.approx(best["valid/ndcg@10"], abs=1e-6)
    assert not [key for line in history for key in line if key.startswith("test/")]  # test is looked at once
    history, metrics = read_jsonl(paper / "history.jsonl"), read_json(paper / "metrics.json")
    assert metrics["epoch"] == 6
    assert metrics["test"]["ndcg@10"] == pytest.approx(history[-1]["test/ndcg@10"], abs=1e-6)
    assert metrics["test_best"]["ndcg@10"] == max(line["test/ndcg@10"] for line in history)
    assert "valid" not in metrics
    assert set(load_file(strict / "ranks.safetensors")) == {
        f"{split}{what}" for split in ("test", "valid") for what in ("", "_ties", "_users")
    }
    assert load_file(paper / "ranks.safetensors")["test"].shape == (150,)
    for name in ("commit", "data_sha256", "device", "versions", "train_seconds", "peak_bytes"):
        assert name in metrics


def test_ties_for_best_go_to_the_first_epoch() -> None:
    history = [{"epoch": epoch, "valid/ndcg@10": value} for epoch, value in [(1, 0.1), (2, 0.3), (3, 0.3)]]
    assert reported_epoch(config(), history) == 2


@pytest.mark.parametrize(
    "model", ["hstu", "sasrec", "transformer++", "bert4rec", "gru4rec", "popular", "markov", "item-knn"]
)
def test_train_and_evaluate_need_torch_numpy_and_safetensors_alone(model: str, data: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", config(model, epochs=1))
    absent = [
        "tqdm",
        "yaml",
        "polars",
        "pandera",
        "mlflow",
        "fbgemm_gpu",
        "jsonschema",
        "pandas",
        "requests",
        "matplotlib",
    ]
    code = (
        "import runpy, sys\n"
        f"sys.modules.update(dict.fromkeys({absent!r}))\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_module(sys.argv[0], run_name='__main__')"
    )
    for name in ("train", "evaluate"):
        arguments = [f"steps.{name}", "--run", str(run), "--data", str(data)]
        subprocess.run([sys.executable, "-c", code, *arguments], check=True, cwd=ROOT)
    assert (run / "metrics.json").is_file()


def test_one_seed_one_model_and_another_seed_another(data: Path, tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / name, config(epochs=1) | {"seed": seed}) for name, seed in [("a", 3), ("b", 3), ("c", 4)]
    ]
    for run in runs:
        finish(run, data)
    first, again, other = [(run / "model.safetensors").read_bytes() for run in runs]
    assert first == again
    assert first != other


def test_divergence_is_one_line_and_leaves_no_weights(data: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", config(optimizer={"lr": 1e30, "betas": [0.9, 0.98], "weight_decay": 0.0}))
    result = subprocess.run(command("train", run, data), check=False, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert "training diverged; lower the learning rate" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (run / "model.safetensors").exists()


def test_weights_of_another_model_are_refused(data: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", config(epochs=1))
    finish(run, data)
    make_run(run, config("sasrec", epochs=1))
    result = subprocess.run(command("evaluate", run, data), check=False, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert "does not hold the weights of this model" in result.stderr
    assert not (run / "metrics.json").exists()


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real demo's sequences, made by its own steps."""
    folder = tmp_path_factory.mktemp("demo")
    arguments = {
        "synthesize": ["--dataset", "demo", "--output", folder / "mirror/demo.zip"],
        "download": ["--dataset", "demo", "--output", folder / "raw"],
        "validate": ["--dataset", "demo", "--raw", folder / "raw", "--output", folder / "valid"],
        "preprocess": ["--dataset", "demo", "--valid", folder / "valid", "--output", folder / "processed"],
    }
    for name, values in arguments.items():
        environment = {"HSTU_DATA_MIRROR": str(folder / "mirror"), "PATH": "/usr/bin:/bin"}
        subprocess.run(
            [sys.executable, "-m", f"steps.{name}", *map(str, values)], check=True, cwd=ROOT, env=environment
        )
    return folder / "processed"


@pytest.fixture(scope="module")
def popularity(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> float:
    """Validation NDCG@10 of most-popular on the demo."""
    run = make_run(tmp_path_factory.mktemp("popular"), demo_config("most-popular"))
    finish(run, demo)
    return read_jsonl(run / "history.jsonl")[0]["valid/ndcg@10"]


def demo_config(row: str) -> dict[str, Any]:
    """The row's config on the demo under protocol strict, with enough epochs to learn and few enough to test."""
    settings = resolve(Run("demo", "demo", row, "strict", 0), ROOT / "params")
    settings["training"]["epochs"] = {"bert4rec": 40, "sasrec-gbce": 80, "gru4rec": 4}.get(row, 10)
    return settings


TRAINED_ROWS = [name for name, row in load("models", ROOT / "params").items() if row.get("shape") == "base"]


@pytest.mark.slow
@pytest.mark.parametrize("row", TRAINED_ROWS)
def test_every_trained_row_learns_on_the_demo(row: str, demo: Path, popularity: float, tmp_path: Path) -> None:
    settings = demo_config(row)
    run = make_run(tmp_path / row, settings)
    finish(run, demo)
    history = read_jsonl(run / "history.jsonl")
    # gBCE with 256 of 380 items as negatives stays near popularity for long; the others leave it at once.
    assert max(line["valid/ndcg@10"] for line in history) > (1 if row == "sasrec-gbce" else 3) * popularity
    if settings["model"]["loss"]["name"] == "sampled-softmax":
        # The protocol's bound for a model that learns at all; an epoch of the demo is 16 steps, of ML-1M 48.
        assert history[-1]["train/loss"] < 0.9 * math.log(settings["training"]["negatives"] + 1)


def test_saved_weights_give_the_scores_of_the_trained_model(data: Path, tmp_path: Path) -> None:
    sequences, _ = load_sequences(data, torch.device("cpu"))
    torch.manual_seed(0)
    settings = config()
    model = build(settings, sequences.num_items).eval()
    save_weights(model, tmp_path / "w.safetensors")
    other = build(settings, sequences.num_items).eval()
    load_weights(other, tmp_path / "w.safetensors")
    batch = sequences.batch(torch.arange(5), torch.zeros(5, dtype=torch.int64), 20)
    assert torch.equal(model.score(batch), other.score(batch))
    shutil.copyfile(tmp_path / "w.safetensors", tmp_path / "cut.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "cut.safetensors").read_bytes()[:-10])
    with pytest.raises(Exception, match="Train again"):
        load_weights(other, tmp_path / "cut.safetensors")
