"""What came of the test targets, as runs have it and as records keep it: of retrieval ranks, of ranking predictions."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import polars as pl

LARGEST_RANK = 500  # no cut of HR or NDCG is larger
_STEPS, _STEPS_OF_LOSS = 64, 32  # of a mean to 1, in what records keep of predictions


@dataclass(frozen=True)
class TestRanks:
    """Ranks of the test items: of `users` (U,), ascending; `best` and `ties` (U,) int64 as in `evaluation.metrics`.

    Recorded, ranks above `LARGEST_RANK` are LARGEST_RANK + 1 without ties: a run takes half the bytes.
    """

    __test__ = False  # no test of pytest's
    FILE: ClassVar[str] = "ranks.parquet"
    SCHEMA: ClassVar[dict[str, Any]] = {"user": pl.UInt32, "rank": pl.UInt16, "ties": pl.UInt32}

    users: np.ndarray
    best: np.ndarray
    ties: np.ndarray

    @classmethod
    def of_run(cls, tensors: Mapping[str, np.ndarray]) -> Self:
        """From the content of outcomes.safetensors."""
        return cls(*(tensors[name].astype(np.int64) for name in ("test_users", "test", "test_ties")))

    @classmethod
    def of_record(cls, part: pl.DataFrame) -> Self:
        """From the rows of a run, which `light` made."""
        return cls(*(part[name].to_numpy().astype(np.int64) for name in cls.SCHEMA))

    def light(self) -> pl.DataFrame:
        """What is recorded."""
        far = self.best > LARGEST_RANK
        columns = self.users, np.where(far, LARGEST_RANK + 1, self.best), np.where(far, 0, self.ties)
        return pl.DataFrame(dict(zip(self.SCHEMA, columns, strict=True)), schema=self.SCHEMA)


@dataclass(frozen=True)
class TestPredictions:
    """What the predictions for each user's test targets add up to, as in `evaluation.clicks.UserSums`: of `users` (U,)
    int64, ascending; all others (U,) float64.

    They are rounded to what is recorded, so that tables made of runs are those made of their records: means a target,
    to steps of 1/64 (of losses 1/32), of which a byte's compression leaves half. What rounding takes from a user the
    next one gets, so that sums over users stay what they are.
    """

    __test__ = False
    FILE: ClassVar[str] = "predictions.parquet"
    SCHEMA: ClassVar[dict[str, Any]] = {"user": pl.UInt32, "examples": pl.UInt32, "positives": pl.UInt32}
    SCHEMA |= dict.fromkeys(("loss", "own_auc", "above", "below"), pl.UInt8)

    users: np.ndarray
    examples: np.ndarray
    positives: np.ndarray
    loss: np.ndarray
    own_auc: np.ndarray
    above: np.ndarray
    below: np.ndarray

    @classmethod
    def of_run(cls, tensors: Mapping[str, np.ndarray]) -> Self:
        """From the content of outcomes.safetensors."""
        return cls.of_record(cls(np.unique(tensors["test_users"]), *tensors["test_sums"].T).light())

    @classmethod
    def of_record(cls, part: pl.DataFrame) -> Self:
        """From the rows of a run, which `light` made."""
        users, *others = (part[name].to_numpy() for name in cls.SCHEMA)
        examples, positives, loss, own_auc, above, below = (values.astype(np.float64) for values in others)
        negatives = examples - positives
        own_auc = np.where((positives > 0) & (negatives > 0), own_auc / _STEPS, np.nan)
        sums = loss / _STEPS_OF_LOSS * examples, own_auc, above / _STEPS * positives, below / _STEPS * negatives
        return cls(users.astype(np.int64), examples, positives, *sums)

    def light(self) -> pl.DataFrame:
        """What is recorded."""
        negatives = self.examples - self.positives
        weight = np.where(np.isnan(self.own_auc), 0, self.examples)
        columns = (
            *(values.astype(np.int64) for values in (self.users, self.examples, self.positives)),
            _steps(self.loss, self.examples, _STEPS_OF_LOSS),
            _steps(np.nan_to_num(self.own_auc) * weight, weight, _STEPS),
            _steps(self.above, self.positives, _STEPS),
            _steps(self.below, negatives, _STEPS),
        )
        return pl.DataFrame(dict(zip(self.SCHEMA, columns, strict=True)), schema=self.SCHEMA)


def _steps(sums: np.ndarray, counts: np.ndarray, steps: int) -> np.ndarray:
    """Whole numbers (U,) from 0 to 255, over `steps` about the means of sums (U,) of so many (U,).

    From the largest count to the smallest, the error of a sum is added to the next sum.
    """
    found, left = np.zeros(len(sums), dtype=np.int64), 0.0
    for user in np.argsort(-counts, kind="stable"):
        if counts[user]:
            wanted = sums[user] + left
            found[user] = min(255, max(0, round(steps * wanted / counts[user])))
            left = wanted - found[user] * counts[user] / steps
    return found


Outcomes = TestRanks | TestPredictions
#: By task.
KINDS: dict[str, type[TestRanks] | type[TestPredictions]] = {"retrieval": TestRanks, "ranking": TestPredictions}
