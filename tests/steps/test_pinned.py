"""Runs whose pinned values differ get no row together."""

from pathlib import Path
from typing import Any

import pytest

from steps.common.cli import StepError
from steps.common.files import read_json, write_json
from steps.reporting.pinned import require_pinned
from steps.reporting.records import read_records
from tests.conftest import step
from tests.steps.runs import seal
from tests.steps.test_reporting import experiment, fake_run

ROW = ("t", "strict", "hstu")


def a_run(seed: int, **changes: Any) -> tuple[tuple[str, ...], Path, dict[str, Any], dict[str, Any]]:
    config = {"seed": seed, "training": {"batch": changes.get("batch", 16)}, "model": {"optimizer": {"lr": 1e-3}}}
    metrics = {"data_sha256": "d", "precision": "bf16", "commit": str(seed), "device": str(seed)} | changes
    return ROW, Path(f"seed-{seed}"), config, metrics


def test_seeds_commits_and_devices_may_differ() -> None:
    require_pinned([a_run(0), a_run(1), a_run(2)])
    other_row = (("t", "paper", "hstu"), *a_run(3, precision="tf32")[1:])
    require_pinned([a_run(0), other_row])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch": 32}, "config.training.batch is 16 in the first and 32 in the second"),
        ({"data_sha256": "e"}, "data_sha256 is 'd' in the first and 'e' in the second"),
        ({"precision": "tf32"}, "precision is 'bf16' in the first and 'tf32' in the second"),
    ],
)
def test_other_pinned_values_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(StepError, match="seed-0 and seed-7 cannot share a table row") as refused:
        require_pinned([a_run(0), a_run(1), a_run(7, **changes)])
    assert said in str(refused.value)
    assert str(refused.value).endswith("train and evaluate again the one that is out of date")


def test_a_value_that_one_run_alone_has_is_named() -> None:
    row, path, config, metrics = a_run(1)
    with pytest.raises(StepError, match=r"config\.schedule is absent in the first and 'windows' in the second"):
        require_pinned([a_run(0), (row, path, config | {"schedule": "windows"}, metrics)])


def test_the_tables_of_an_experiment_are_held_to_it(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    axes = {"datasets": ["demo"], "models": ["hstu"], "protocols": ["strict"], "seeds": [0, 1]}
    runs = experiment(project, "two", **axes)
    for run in runs:
        fake_run(project, run)
    assert len(read_records("two", Path("runs/two"))[0]) == 2
    folder = Path("runs/two", runs[1].path)
    changed = read_json(folder / "config.json")
    changed["training"]["batch"] += 1
    write_json(folder / "config.json", changed)
    seal(folder)
    arguments = ("--experiment", "two", "--runs", "runs/two", "--output", "reports/two")
    refused = step("tabulate", *arguments, cwd=project, check=False)
    assert refused.returncode == 1
    assert str(folder) in refused.stderr
    assert "config.training.batch" in refused.stderr
    assert not Path("reports/two").exists()
