"""A trained ranking run as it is served: what it loads, and that it predicts what training and evaluation predict."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from steps.common.cli import StepError
from steps.common.files import read_json, sha256, write_json
from steps.data.sequences import Sequences
from steps.evaluation.engagements import auc
from steps.serving.both_paths import both_paths
from steps.serving.ranker import CandidateRanker
from tests.conftest import ROOT, step
from tests.steps.runs import STRICT, planned
from tests.steps.runs import config as retrieval
from tests.steps.test_rankers import ITEMS, config, like, sequences
from tests.steps.test_ranking import OF_USERS, PROTOCOL

USERS = 200
FORMS = {
    "interleaved": {"features": False},
    "merged": {"features": False, "tokens": "merged"},
    "items": {"features": False, "tokens": "items"},
    "features": {},
    "merged, features": {"tokens": "merged"},
    "items, features": {"tokens": "items"},
}


def without_repeats(seed: int = 0) -> Sequences:
    """Users who like an item where group and kind differ, and each fourth one. None has an item twice, as its logits
    would be a tie that rounding breaks."""
    data, generator = sequences(USERS), torch.Generator().manual_seed(seed)
    lengths = data.offsets.diff()
    item = torch.cat([1 + torch.randperm(ITEMS, generator=generator)[: int(n)] for n in lengths])
    group = data.user_features["group"].repeat_interleave(lengths)
    liked = (group != data.item_features["kind"][item]) | (item % 4 == 0)
    liked ^= torch.rand(len(item), generator=generator) < 0.1
    rating = torch.where(liked, 4, 1) + torch.randint(0, 2, item.shape, generator=generator)
    return like(data, item, rating.float())


def write(folder: Path, data: Sequences) -> Path:
    """Processed data as preprocess would write them."""
    folder.mkdir(parents=True)
    tensors = {"offsets": data.offsets, "item": data.item.int(), "timestamp": data.timestamp, "rating": data.rating}
    save_file(tensors, folder / "sequences.safetensors")
    features = {f"user/{name}": values for name, values in data.user_features.items()}
    features |= {f"item/{name}": values for name, values in data.item_features.items()}
    save_file(features, folder / "features.safetensors")
    hashes = {f"{name}_sha256": sha256(folder / f"{name}.safetensors") for name in ("sequences", "features")}
    write_json(folder / "manifest.json", {"catalogue_items": data.num_items} | hashes)
    return folder


def train(run: Path, data: Path, settings: dict[str, Any]) -> Path:
    about = {"experiment": "t", "dataset": "t", "repeats": "none"}
    write_json(run / "config.json", planned(about | settings, data))
    step("train", "--run", run, "--data", data, "--device", "cpu", cwd=ROOT)
    return run


def of_users(model: str = "hstu", epochs: int = 1, **changes: Any) -> dict[str, Any]:
    settings = config(model, **changes) | {"protocol": OF_USERS}
    settings["training"] |= {"epochs": epochs, "schedule": "one-pass"}
    return settings


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "t", without_repeats())


@pytest.mark.parametrize("form", FORMS)
def test_auc_is_the_same_by_kept_histories_and_by_windows(form: str, data: Path, tmp_path: Path) -> None:
    """In float32: logits to 1e-5. Rounding may then turn one pair of targets, which the four digits of tables may show.
    Histories are longer and shorter than a window."""
    run = train(tmp_path / "run", data, of_users(epochs=15, **FORMS[form]))
    step("evaluate", "--run", run, "--data", data, "--device", "cpu", cwd=ROOT)
    windows, kept = both_paths(run, data)
    assert torch.equal(windows.label, kept.label)
    torch.testing.assert_close(kept.logit, windows.logit, rtol=0, atol=1e-5)
    assert float(windows.logit.std()) > 0.2
    reported = read_json(run / "metrics.json")["test"]["auc"]
    positives = int(windows.label.sum())
    pair = 1 / (positives * (len(windows.label) - positives))
    assert [float(auc(one.logit, one.label)) for one in (windows, kept)] == pytest.approx(
        [reported] * 2, abs=1.01 * pair
    )
    for part in both_paths(run, data, "valid"):
        assert float(auc(part.logit, part.label)) == pytest.approx(
            read_json(run / "metrics.json")["valid"]["auc"], abs=1e-4
        )


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_a_gpu_serves_a_run_as_a_cpu_does(form: str, data: Path, tmp_path: Path) -> None:
    run = train(tmp_path / "run", data, of_users(epochs=15, **FORMS[form]))
    (expected, _), (windows, kept) = both_paths(run, data), both_paths(run, data, device="cuda")
    for found in (windows, kept):
        torch.testing.assert_close(found.logit.cpu(), expected.logit, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_served_is_refused(data: Path, tmp_path: Path) -> None:
    recommends = retrieval("hstu", STRICT, epochs=1)
    sasrec = of_users("hstu", features=False)
    sasrec["model"] = {key: sasrec["model"][key] for key in ("dim", "blocks", "heads", "output_slots", "optimizer")}
    sasrec["model"] |= {"model": "sasrec", "tokens": "merged", "levels": [4.0], "others_weight": 0.0, "head": 4}
    mean = {"model": {"model": "mean-rating", "shrink": 1.0}, "row": "mean-rating"}
    not_served = (
        "no row of HSTU with `task: ranking`, and histories are kept of these alone; take the run of another row"
    )
    for name, settings, said in (
        ("retrieval", recommends, rf"config\.json: hstu is {not_served}"),
        ("din", of_users("din"), rf"config\.json: din is {not_served}"),
        ("mean", of_users() | mean, rf"config\.json: mean-rating is {not_served}"),
        ("sasrec", sasrec, r"config\.json, row hstu: histories are kept of HSTU alone, and this is a SASRec"),
        (
            "true_len",
            of_users(attention_scale="true_len"),
            r"config\.json, row hstu: attention_scale true_len divides every token",
        ),
    ):
        run = train(tmp_path / name, data, settings)
        with pytest.raises(StepError, match=said):
            CandidateRanker.from_run(run, data)
    run = train(tmp_path / "clock", data, of_users() | {"protocol": PROTOCOL})
    assert CandidateRanker.from_run(str(run), str(data)).task.num_items == 24
    with pytest.raises(StepError, match="protocol ranking predicts each interaction after those before it"):
        both_paths(run, data)
    with pytest.raises(StepError, match="tpu: cpu, cuda or cuda:<number>, please"):
        CandidateRanker.from_run(run, data, device="tpu")
    other = write(tmp_path / "other", without_repeats(seed=1))
    with pytest.raises(StepError, match=f"clock was trained on other sequences than {other} has"):
        CandidateRanker.from_run(run, other)
    (run / "model.safetensors").unlink()
    with pytest.raises(StepError, match=r"clock/model\.safetensors does not hold the weights of this model"):
        CandidateRanker.from_run(run, data)
    (run / "training.json").unlink()
    with pytest.raises(StepError, match="clock is not trained; run train first"):
        CandidateRanker.from_run(run, data)
    with pytest.raises(StepError, match=r"nowhere does not exist; it is a folder runs/<experiment>"):
        CandidateRanker.from_run(tmp_path / "nowhere", data)


def test_the_page_compares_both_paths(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "docs/ranking.md").read_text("utf-8")
    (block,) = (one for one in re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S) if "both_paths" in one)
    run, processed = re.findall(r'Path\("(.*?)"\)', block)
    monkeypatch.chdir(tmp_path)
    Path(processed).parent.mkdir(parents=True)
    Path(processed).symlink_to(data)
    train(tmp_path / run, data, of_users(epochs=15))
    capsys.readouterr()
    exec(block, {})  # noqa: S102
    windows, kept, largest = capsys.readouterr().out.split()
    assert re.fullmatch(r"0\.\d{4}", windows)
    assert abs(float(windows) - float(kept)) < 1.5e-4  # one pair of targets may change places
    assert 0.7 < float(windows) < 0.98
    assert float(largest) < 1e-5
