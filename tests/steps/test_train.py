"""Training: it learns, resumes after a kill, is deterministic, and runs on a machine with few libraries."""

import json
import math
import shutil
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from steps.common.cli import StepError
from steps.common.config import building, read_config
from steps.common.files import read_json, read_jsonl, sha256, write_json
from steps.common.locks import locked
from steps.common.params import Run, load, resolve
from steps.common.provenance import check_run, utc_now
from steps.data.sequences import load_sequences
from steps.models import ENCODERS
from steps.models.weights import load_weights, save_weights
from steps.tasks import build
from steps.training.checkpoint import State, read_state, write_state
from steps.training.loop import Training, doubt, reported_epoch
from tests.conftest import ROOT, step, write_processed
from tests.steps.runs import PAPER, config, planned, processed_by_its_steps, reproducible, states


def command(name: str, run: Path, data: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", f"steps.{name}", "--run", str(run), "--data", str(data), *more]


def make_run(folder: Path, settings: dict[str, Any], data: Path) -> Path:
    write_json(folder / "config.json", planned(settings, data))
    return folder


def finish(run: Path, data: Path, *more: str) -> str:
    """Train a run; returns what it printed."""
    return step("train", "--run", run, "--data", data, "--deterministic", "--device", "cpu", *more, cwd=ROOT).stdout


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_processed(tmp_path_factory.mktemp("data") / "t", [9 + user % 17 for user in range(150)], 80)


@pytest.mark.parametrize("model", ["hstu", "sasrec", "gru4rec"])
def test_a_killed_training_ends_with_the_bytes_of_an_uninterrupted_one(model: str, data: Path, tmp_path: Path) -> None:
    settings = config(model, epochs=12)
    whole, killed = make_run(tmp_path / "whole", settings, data), make_run(tmp_path / "killed", settings, data)
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
    # Nothing that looks finished, but a state to resume from.
    assert sorted(path.name for path in killed.iterdir()) == ["config.json", "resume"]
    again = step("train", "--run", killed, "--data", data, "--deterministic", "--device", "cpu", cwd=ROOT)
    assert "resuming after epoch" in again.stdout
    assert "epoch 1/12" not in again.stdout
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    kept = [reproducible(read_jsonl(run / "history.jsonl")) for run in (whole, killed)]
    assert kept[0] == kept[1]
    assert len(kept[0]) == 12
    assert not (killed / "resume").exists()


def test_a_state_of_another_config_is_not_resumed(data: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", config(epochs=300), data)
    train = command("train", run, data, "--device", "cpu")
    process = subprocess.Popen(train, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    next(line for line in process.stdout if line.startswith("epoch 3/"))
    process.kill()
    process.wait()
    assert (run / "resume" / "state.safetensors").is_file()
    make_run(run, config(epochs=2), data)
    again = step("train", "--run", run, "--data", data, "--device", "cpu", cwd=ROOT)
    assert "resuming" not in again.stdout
    assert "state.safetensors is of another config" in again.stdout
    assert len(read_jsonl(run / "history.jsonl")) == 2


def test_a_resumed_training_names_every_commit(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run", config(epochs=4), data)
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
        resumed = Training(config(epochs=4), found, digest, run)
        assert resumed.done == 2
    assert resumed.record()["commit"] == "a" * 40 + "-dirty+" + "c" * 40  # b's took no step


def test_earlier_results_stay_until_new_ones_are_written_and_are_not_taken_for_them(data: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", config(epochs=1), data)
    finish(run, data)
    step("evaluate", "--run", run, "--data", data, cwd=ROOT)
    results = contents(run)
    assert "metrics.json" in results
    diverges = config(epochs=2, optimizer={"lr": 1e18, "betas": [0.9, 0.98], "weight_decay": 0.0})
    make_run(run, diverges, data)
    assert "diverged" in fails("train", run, data)
    assert contents(run) == results | {"config.json": (run / "config.json").read_bytes()}
    assert "config.json is not the config that" in fails("evaluate", run, data)
    with pytest.raises(StepError, match=r"config\.json is not the config that"):
        check_run(run)
    make_run(run, config(epochs=2), data)
    finish(run, data)
    assert sorted(contents(run)) == ["config.json", "history.jsonl", "mllog.txt", "model.safetensors", "training.json"]


def contents(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}


def fails(name: str, run: Path, data: Path, *more: str) -> str:
    """The one line on stderr of a step that fails."""
    found = step(name, "--run", run, "--data", data, *more, check=False, cwd=ROOT)
    assert found.returncode == 1, found.stdout
    assert len(found.stderr.splitlines()) == 1, found.stderr
    assert "--debug" not in found.stderr, found.stderr
    return found.stderr


def test_a_model_is_not_evaluated_on_other_data(data: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", config("popular", epochs=1), data)
    finish(run, data)
    other = write_processed(tmp_path / "other", [9 + user % 17 for user in range(150)], 80, seed=1)
    evaluated = step("evaluate", "--run", run, "--data", other, check=False, cwd=ROOT)
    assert evaluated.returncode == 1
    assert "other sequences" in evaluated.stderr
    assert not (run / "metrics.json").exists()


def test_a_device_that_is_not_there_is_one_clear_line(data: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    run = make_run(tmp_path / "run", config(epochs=1), data)
    failed = step("train", "--run", run, "--data", data, "--device", "cuda", check=False, cwd=ROOT)
    assert (failed.returncode, len(failed.stderr.splitlines())) == (1, 1)
    assert "no CUDA device" in failed.stderr


@pytest.mark.parametrize(
    "damage", ["bit of a tensor", "bit of the history", "bit of the header", "cut", "text", "empty"]
)
def test_a_damaged_state_is_named_and_the_training_starts_again(damage: str, data: Path, tmp_path: Path) -> None:
    settings = config(epochs=3)
    whole = make_run(tmp_path / "whole", settings, data)
    finish(whole, data)
    run = make_run(tmp_path / "run", settings, data)
    _, state = states(run, settings, data)
    content = bytearray(state.read_bytes())
    offsets = {
        "bit of a tensor": len(content) - 40,
        "bit of the history": content.index(b"hr@10") + 11,
        "bit of the header": 3,
    }
    if damage in offsets:
        content[offsets[damage]] ^= 1
    state.write_bytes({"cut": content[:-9], "text": b"half of a file", "empty": b""}.get(damage, bytes(content)))
    done = finish(run, data)
    assert f"{state} is damaged" in done
    assert done.count("training starts at epoch 1") == 1
    assert "epoch 1/3" in done
    assert (run / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert reproducible(read_jsonl(run / "history.jsonl")) == reproducible(read_jsonl(whole / "history.jsonl"))


def test_a_state_that_does_not_fit_leaves_nothing_in_the_model(data: Path, tmp_path: Path) -> None:
    """As one of another version of the code, whose parameters had other names: with the right hash and identity."""
    settings = config(epochs=3)
    whole = make_run(tmp_path / "whole", settings, data)
    finish(whole, data)
    run = make_run(tmp_path / "run", settings, data)
    begun, path = states(run, settings, data)
    state = read_state(path, begun._identity)
    assert state is not None
    tensors = {name.replace("blocks.1", "layers.1"): tensor for name, tensor in state.tensors.items()}
    write_state(path, State(tensors, state.progress))
    assert "does not fit this code's model" in finish(run, data)
    assert (run / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_a_training_names_its_threads_and_those_it_resumed_with(data: Path, tmp_path: Path) -> None:
    """On a CPU the sums in layer norm's gradients depend on them."""
    settings = config(epochs=3)
    run = make_run(tmp_path / "run", settings, data)
    begun, _ = states(run, settings, data)
    others = begun.threads[0] + 1
    finish(run, data, "--threads", str(others))
    assert read_json(run / "training.json")["threads"] == f"{others - 1}+{others}"


def test_strict_keeps_the_best_validation_epoch_and_paper_the_last(data: Path, tmp_path: Path) -> None:
    strict, paper = (
        make_run(tmp_path / "s", config(epochs=6), data),
        make_run(tmp_path / "p", config("hstu", PAPER, epochs=6), data),
    )
    for run in (strict, paper):
        finish(run, data)
    step("evaluate", "--run", strict, paper, "--data", data, cwd=ROOT)
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
    assert set(load_file(strict / "outcomes.safetensors")) == {
        f"{split}{what}" for split in ("test", "valid") for what in ("", "_ties", "_users")
    }
    assert load_file(paper / "outcomes.safetensors")["test"].shape == (150,)
    for name in ("commit", "data_sha256", "device", "versions", "train_seconds", "peak_bytes"):
        assert name in metrics


def test_a_training_says_when_it_began_and_ended_also_after_a_kill(data: Path, tmp_path: Path) -> None:
    settings = config(epochs=3)
    run = make_run(tmp_path / "run", settings, data)
    before = utc_now()
    begun, _ = states(run, settings, data)
    between = utc_now()
    finish(run, data)
    trained = read_json(run / "training.json")
    assert trained["started"] == begun.started
    assert before <= trained["started"] <= between <= trained["ended"] <= utc_now()
    others = [make_run(tmp_path / name, config("popular"), data) for name in ("one", "other")]
    step("train", "--run", *others, "--data", data, cwd=ROOT)
    first, second = (read_json(other / "training.json") for other in others)
    assert first["started"] <= first["ended"] <= second["started"] <= second["ended"]
    for line in read_jsonl(run / "history.jsonl"):
        assert line["train/cpu_seconds"] >= 0
        assert 2**20 < line["train/resident_peak_bytes"] < 2**40


def test_ties_for_best_go_to_the_first_epoch() -> None:
    history = [{"epoch": epoch, "valid/ndcg@10": value} for epoch, value in [(1, 0.1), (2, 0.3), (3, 0.3)]]
    assert reported_epoch(config(), history) == 2


@pytest.mark.parametrize(
    ("best", "last", "said"),
    [(97, 100, "was best at epoch 97 of 100"), (4, 100, "overfits since"), (5, 25, "overfits since"), (60, 100, None)],
)
def test_a_schedule_whose_best_epoch_is_early_or_late_is_doubted(best: int, last: int, said: str | None) -> None:
    settings = config() | {"training": config()["training"] | {"epochs": 100}}
    history = [{"epoch": epoch, "valid/ndcg@10": float(epoch == best)} for epoch in range(1, last + 1)]
    strict = settings | {"protocol": settings["protocol"] | {"report": "best"}}
    found = doubt(strict, history)
    assert (found is None) if said is None else (said in str(found))
    assert doubt(settings | {"protocol": settings["protocol"] | {"report": "last"}}, history) is None


def test_train_and_evaluate_need_torch_numpy_and_safetensors_alone(data: Path, tmp_path: Path) -> None:
    models = (
        "hstu",
        "sasrec",
        "transformer++",
        "ligr",
        "fuxi-alpha",
        "fuxi-gamma",
        "bert4rec",
        "gru4rec",
        "popular",
        "markov",
        "item-knn",
    )
    runs = [make_run(tmp_path / model, config(model, epochs=1), data) for model in models]
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
        arguments = [f"steps.{name}", "--run", *map(str, runs), "--data", str(data)]
        subprocess.run([sys.executable, "-c", code, *arguments], check=True, cwd=ROOT)
    assert all((run / "metrics.json").is_file() for run in runs)


def test_equal_seeds_give_equal_weights_and_other_seeds_others(data: Path, tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / name, config(epochs=1) | {"seed": seed}, data)
        for name, seed in [("a", 3), ("b", 3), ("c", 4)]
    ]
    for run in runs:
        finish(run, data)
    first, again, other = [(run / "model.safetensors").read_bytes() for run in runs]
    assert first == again
    assert first != other


@pytest.mark.parametrize("loss", ["sampled-softmax", "in-batch-softmax"])
def test_equal_runs_on_several_threads_end_with_equal_bytes(loss: str, tmp_path: Path) -> None:
    """Without --deterministic, four threads add gradients of so many item vectors in an order of chance."""
    many_items = write_processed(tmp_path / "t", [9 + user % 17 for user in range(150)], 3000)
    about = {"name": loss, "similarity": "cosine", "temperature": 0.05}
    runs = [make_run(tmp_path / name, config(epochs=1, loss=about), many_items) for name in ("a", "b", "c")]
    for run in runs:
        finish(run, many_items, "--threads", "4")
        assert read_json(run / "training.json")["threads"] == "4"
    assert len({(run / "model.safetensors").read_bytes() for run in runs}) == 1


def test_divergence_is_one_line_and_leaves_no_weights(data: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", config(optimizer={"lr": 1e30, "betas": [0.9, 0.98], "weight_decay": 0.0}), data)
    result = step("train", "--run", run, "--data", data, check=False, cwd=ROOT)
    assert result.returncode == 1
    assert "training diverged; lower the learning rate" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (run / "model.safetensors").exists()


def test_weights_of_another_model_are_refused(data: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", config(epochs=1), data)
    finish(run, data)
    make_run(run, config("sasrec", epochs=1), data)
    result = step("evaluate", "--run", run, "--data", data, check=False, cwd=ROOT)
    assert result.returncode == 1
    assert "config.json is not the config that" in result.stderr
    assert not (run / "metrics.json").exists()


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real demo's sequences, made by its own steps."""
    return processed_by_its_steps("demo", tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def popularity(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> float:
    """Validation NDCG@10 of most-popular on the demo."""
    run = make_run(tmp_path_factory.mktemp("popular"), demo_config("most-popular"), demo)
    finish(run, demo)
    return read_jsonl(run / "history.jsonl")[0]["valid/ndcg@10"]


def demo_config(row: str) -> dict[str, Any]:
    """The row's config on the demo under protocol strict, with enough epochs to learn and few enough to test."""
    settings = resolve(Run("demo", "demo", row, "strict", 0), ROOT / "params")
    settings["training"]["epochs"] = {"bert4rec": 40, "sasrec-gbce": 80, "gru4rec": 4}.get(row, 10)
    return settings


TRAINED_ROWS = [
    name
    for name, row in load("models", ROOT / "params").items()
    if "loss" in row and row.get("shape") != "large"  # tests/steps/test_ranking_runs.py has the others
]


@pytest.mark.slow
@pytest.mark.parametrize("row", TRAINED_ROWS)
def test_every_trained_row_learns_on_the_demo(
    row: str, demo: Path, popularity: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the epochs that it has; the training ends once it has."""
    settings = demo_config(row)
    run = make_run(tmp_path / row, settings, demo)
    # gBCE with 256 of 380 items as negatives stays near popularity for long; the others leave it at once.
    enough = (1 if row == "sasrec-gbce" else 3) * popularity
    # The protocol's bound for a model that learns at all; an epoch of the demo is 16 steps, of ML-1M 48.
    bound = 0.9 * math.log(settings["training"]["negatives"] + 1)

    def learnt(history: list[dict[str, Any]]) -> bool:
        falls = settings["model"]["loss"]["name"] != "sampled-softmax" or history[-1]["train/loss"] < bound
        return falls and max(line["valid/ndcg@10"] for line in history) > enough

    all_done = Training.finished.fget
    monkeypatch.setattr(
        Training, "finished", property(lambda self: all_done(self) or (self.done > 0 and learnt(self.history)))
    )
    finish(run, demo)
    history = read_jsonl(run / "history.jsonl")
    assert learnt(history), history


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


def entries(content: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The path of every entry of nested objects."""
    found = [path] if path else []
    for key in content if isinstance(content, dict) else []:
        found += entries(content[key], (*path, key))
    return found


def changed(content: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """A copy without the entry, or with another value that is given as a list of one."""
    copy = json.loads(json.dumps(content))
    entry = copy
    for key in path[:-1]:
        entry = entry[key]
    del entry[path[-1]]
    if value:
        entry[path[-1]] = value[0]
    return copy


HASHES = dict.fromkeys(("train", "test", "valid"), "0" * 64)


MODELS = load("models", ROOT / "params")
_OF_ROWS = [(row, "temporal") for row in sorted(MODELS) if "task" not in MODELS[row]]
_OF_ROWS += [(row, "temporal-ranking") for row in sorted(MODELS) if "task" in MODELS[row]]


@pytest.mark.parametrize(("row", "protocol"), [*_OF_ROWS, ("hstu-ranking", "upstream-ranking")])
def test_a_missing_or_wrong_entry_of_a_config_is_named(row: str, protocol: str, tmp_path: Path) -> None:
    settings = resolve(Run("ml-1m", "ml-1m", row, protocol, 0), ROOT / "params")
    settings["split"] = HASHES
    write_json(tmp_path / "config.json", settings)
    assert read_config(tmp_path) == settings
    kind = settings["model"]["model"]
    read = {"model", "neighbours", "shrink"}
    if kind in ENCODERS:
        read |= {field.name for field in fields(ENCODERS[kind][1])} | {"loss", "optimizer", "items"}
        read |= {
            "mask_prob",
            "last_only",
            "output_layer",
            "samples",
            "sample_alpha",
            "logq",
            "tokens",
            "levels",
            "others_weight",
            "head",
        }
    texts = {("experiment",), ("dataset",), ("row",), ("protocol", "name")}
    optional = {"patience", "eval_every", "schedule", "items", "num_sink_tokens"}
    optional |= {"learned_norms", "last_only", "output_layer"}
    for path in entries(settings):
        if path[0] == "model" and len(path) > 1 and path[1] not in read:
            continue  # a size of the data set's shape that other models read
        for value in ([], [None], [[]], [-1], ["?"], [{"a": 1}]):
            if value == ["?"] and path in texts:
                continue
            if not value and path == ("protocol", "task"):  # it is then for retrieval, and lacks other entries
                continue
            if not value and (path[-1] in optional or path == ("model", "loss", "negatives")):
                continue
            write_json(tmp_path / "config.json", changed(settings, path, value))
            with pytest.raises(StepError) as failure, building(tmp_path):
                build(read_config(tmp_path), 10)
            assert str(failure.value).startswith(f"{tmp_path / 'config.json'}, key {'.'.join(path)}"), (path, value)
    write_json(tmp_path / "config.json", changed(settings, ("training", "dropout"), []) | {"mine": 1})
    with pytest.raises(StepError, match=r"key training\.dropout: is missing|key mine: nothing reads it"):
        read_config(tmp_path)


@pytest.mark.parametrize("wrong", ["key", "split", "json"])
def test_nothing_is_deleted_or_trained_before_every_run_is_checked(wrong: str, data: Path, tmp_path: Path) -> None:
    good, bad = (make_run(tmp_path / name, config("popular"), data) for name in ("good", "bad"))
    finish(good, data)
    results = contents(good)
    settings = planned(config(), data)
    match wrong:
        case "key":
            del settings["model"]["dim"]
        case "split":
            settings["split"]["test"] = "0" * 64
    write_json(bad / "config.json", settings)
    if wrong == "json":
        (bad / "config.json").write_text("{")
    line = fails("train", good, data, "--run", str(bad))
    assert {"key": "bad/config.json, key model.dim: is missing", "split": "bad/config.json, key split.test"}.get(
        wrong, "bad/config.json is not JSON"
    ) in line
    assert contents(good) == results


def test_a_run_that_fails_does_not_stop_the_others(data: Path, tmp_path: Path) -> None:
    """Of one item gBCE has no sampling rate: an error that is not of our own kind, in the middle of a training."""
    one_item = write_processed(tmp_path / "data", [5, 6, 5], 80)
    tensors = load_file(one_item / "sequences.safetensors")
    tensors["item"].fill_(1)
    save_file(tensors, one_item / "sequences.safetensors")
    digest = sha256(one_item / "sequences.safetensors")
    write_json(one_item / "manifest.json", {"catalogue_items": 1, "sequences_sha256": digest})
    loss = {"name": "gbce", "similarity": "dot", "temperature": 1.0, "calibration": 0.75}
    bad = make_run(tmp_path / "bad", config("sasrec", PAPER, epochs=1, loss=loss), one_item)
    others = [make_run(tmp_path / name, config(name, PAPER, epochs=1), one_item) for name in ("sasrec", "popular")]
    runs = [str(run) for run in others]
    found = step("train", "--run", bad, "--data", one_item, "--run", *runs, check=False, cwd=ROOT)
    assert found.returncode == 1
    assert len(found.stderr.splitlines()) == 1, found.stderr
    assert f"1 of 3 runs failed: {bad}: " in found.stderr
    assert not (bad / "training.json").exists()
    assert all((run / "training.json").is_file() for run in others)


def test_a_run_that_cannot_be_evaluated_does_not_stop_the_others(evaluated: Path, data: Path, tmp_path: Path) -> None:
    run, bad = shutil.copytree(evaluated, tmp_path / "run"), make_run(tmp_path / "bad", config(), data)
    (run / "metrics.json").unlink()
    line = fails("evaluate", bad, data, "--run", str(run))
    assert f"1 of 2 runs failed: {bad}: {bad} is not trained" in line
    check_run(run)


@pytest.fixture(scope="module")
def evaluated(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = make_run(tmp_path_factory.mktemp("evaluated") / "run", config(epochs=1), data)
    finish(run, data)
    step("evaluate", "--run", run, "--data", data, cwd=ROOT)
    return run


def tamper(run: Path, what: str) -> str:
    """Change a file of a run; returns its name."""
    name = {
        "bias": "config.json",
        "epoch": "training.json",
        "line": "history.jsonl",
        "outcomes": "outcomes.safetensors",
    }.get(what, "model.safetensors")
    path = run / name
    content = bytearray(path.read_bytes())
    match what:
        case "bias":
            settings = read_json(path)
            settings["model"]["bias"]["time"] = "self"
            write_json(path, settings)
            return name
        case "line":
            content = content.replace(b'"epoch": 1', b'"epoch": 2')
        case "epoch":
            content = content.replace(b'"epoch": 1', b'"epoch": 7')
        case "cut":
            content = content[:-9]
        case _:
            content[-30] ^= 1
    path.write_bytes(content)
    return name


@pytest.mark.parametrize("what", ["bias", "line", "weights", "cut", "outcomes", "epoch"])
def test_files_that_do_not_belong_together_are_named(what: str, evaluated: Path, data: Path, tmp_path: Path) -> None:
    run = shutil.copytree(evaluated, tmp_path / "run")
    check_run(run)
    name = tamper(run, what)
    with pytest.raises(StepError, match=rf"run/(metrics\.json and )?{name}.*(again|train)"):
        check_run(run)
    if what not in ("outcomes", "epoch"):  # which evaluate writes, or reads its figures from
        assert f"run/{name}" in fails("evaluate", run, data)


def test_a_record_without_weights_and_outcomes_is_checked_as_well(evaluated: Path, tmp_path: Path) -> None:
    for name in ("config.json", "history.jsonl", "metrics.json"):
        shutil.copyfile(evaluated / name, tmp_path / name)
    check_run(tmp_path)
    tamper(tmp_path, "line")
    with pytest.raises(StepError, match=r"history\.jsonl is not the file"):
        check_run(tmp_path)


def test_a_second_training_of_a_run_waits_for_the_first(data: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", config(epochs=2), data)
    with locked(run):
        second = subprocess.Popen(command("train", run, data), cwd=ROOT, stderr=subprocess.PIPE, text=True)
        assert second.stderr is not None
        assert second.stderr.readline() == f"train: another process works on {run}; waiting\n"
        assert second.poll() is None
    assert second.wait() == 0
    assert second.stderr.read() == ""
    assert (run / "training.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_threads_of_openmp_do_not_spin_while_they_wait() -> None:
    """Two trainings on two cores would take each other's: an epoch then lasted five times as long."""
    code = "import os, sys, steps; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True)
    assert found.stdout.split() == ["PASSIVE", "False"]
