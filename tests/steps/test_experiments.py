"""The list of experiments: what each is, what its committed runs took, and what data it needs."""

from pathlib import Path

import pytest

from steps import experiments
from steps.common import yaml_files
from tests.conftest import step
from tests.steps.runs import add_record


def test_every_experiment_is_listed_with_what_its_records_measured(project: Path) -> None:
    local = project / "params/local/experiments"
    local.mkdir(parents=True)
    chosen = {"datasets": ["demo", "amzn-beauty"], "models": ["hstu"], "protocols": ["strict"], "seeds": [0, 1]}
    (local / "a-mine.yaml").write_text(yaml_files.dump({"title": "My own", **chosen}))
    measured = [("NVIDIA H200", 600.0), ("NVIDIA H100 80GB HBM3", 660.0), ("CPU, 2 threads", 90.0)]
    for seed, (device, seconds) in enumerate(measured):
        metrics = {"device": device, "train_seconds": seconds}
        add_record(project / "reports/ml-1m/records", "hstu", seed, {}, metrics)
    found = {line[0]: line[1:] for line in experiments.lines(project / "params", project / "reports")}
    assert found["ml-1m"][2:] == ["21 (2)", "1.5 (1)", "MovieLens-1M (downloaded)"]
    assert found["demo"][1:4] == ["6", "-", "-"]
    assert found["demo"][4].endswith("(generated)")
    assert list(found)[-1] == "a-mine (local)"
    title, runs, gpu, cpu, data = found["a-mine (local)"]
    assert (title, runs, gpu, cpu) == ("My own", "4", "-", "-")
    assert data.endswith("(generated); Amazon Beauty, 5-core (to be provided by HSTU_DATA_MIRROR)")
    shown = step("experiments", cwd=project).stdout
    assert all(f"\n{name} " in shown for name in found)
    assert "reports/<experiment>/records" in shown  # where the minutes come from


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"publisher": "https://a.org/x.zip", "mirrors": []}, "downloaded"),
        ({"mirrors": ["/where/it/is"]}, "from /where/it/is"),
        ({}, "to be provided by HSTU_DATA_MIRROR"),
    ],
)
def test_where_data_come_from(source: dict, said: str) -> None:
    assert experiments.origin({"source": source}) == said
