"""What pages say of pairs: with the sign of the question, and how sure seeds are."""

import math
from pathlib import Path

import polars as pl
import pytest

from steps.common.cli import StepError
from steps.docs import Figures


def test_a_lead_has_the_sign_of_the_question_and_its_interval_over_seeds(tmp_path: Path) -> None:
    pair = {"dataset": "d", "protocol": "strict", "better": "a", "worse": "b", "difference": 0.02}
    pair |= {"low": 0.01, "high": 0.04, "p": 0.001, "users": 9, "p_holm": 0.003, "seeds": 5, "seeds_sd": 0.01}
    counted = pair | {"better": "a", "worse": "c", "seeds": None, "seeds_sd": None}
    once = pair | {"better": "a", "worse": "d", "seeds": 1, "seeds_sd": None}
    (tmp_path / "e").mkdir()
    pl.DataFrame([pair, counted, once]).write_csv(tmp_path / "e/comparisons.csv")
    figures = Figures(tmp_path)
    found = figures.lead("e", "d", "strict", "b", "a")
    assert (found["difference"], found["low"], found["high"], found["p"]) == (-0.02, -0.04, -0.01, 0.003)
    assert found["over_seeds"] == pytest.approx(2.776 * 0.01 / 5**0.5, rel=1e-3)  # t(4) at 97.5 %
    assert figures.lead("e", "d", "strict", "a", "c")["over_seeds"] == 0
    assert figures.lead("e", "d", "strict", "a", "d")["over_seeds"] == math.inf


def test_the_longest_training_of_a_protocol(tmp_path: Path) -> None:
    (tmp_path / "e").mkdir()
    runs = {"protocol": ["paper", "paper", "strict"], "train_seconds": [2.5, 7.25, 9.0]}
    pl.DataFrame(runs).write_csv(tmp_path / "e/runs.csv")
    figures = Figures(tmp_path)
    assert figures.longest("e", "paper") == 7.25
    with pytest.raises(StepError, match=r"runs\.csv has no run of protocol temporal"):
        figures.longest("e", "temporal")
