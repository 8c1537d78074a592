"""What came of the test targets, as runs have it and as records keep it: of retrieval ranks, of ranking predictions."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import polars as pl

LARGEST_RANK = 500  # no cut of HR or NDCG is larger
#: Of a mean to 1, in what records keep of predictions: two nearly equal models differ by thousandths of a user's mean,
#: and the mean over users of what rounding takes has to be small beside that difference's standard error.
_STEPS = 2**18


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
    """What the predictions for each user's test targets add up to, as in `evaluation.engagements.UserSums`: of `users`
    (U,) int64, ascending; all others (U,) float64.

    They are rounded to what is recorded, so that tables made of runs are those made of their records: each user's means
    a target, to steps of 2**-18, of which compression leaves two or three bytes. No user's error reaches another, as
    intervals and tests read users' values. A mean loss of more than 16,383 nats is kept as 16,384.
    """

    __test__ = False
    FILE: ClassVar[str] = "predictions.parquet"
    SCHEMA: ClassVar[dict[str, Any]] = {"user": pl.UInt32, "examples": pl.UInt32, "positives": pl.UInt32}
    SCHEMA |= dict.fromkeys(("loss", "own_auc", "above", "below"), pl.UInt32)

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
        sums = loss / _STEPS * examples, own_auc, above / _STEPS * positives, below / _STEPS * negatives
        return cls(users.astype(np.int64), examples, positives, *sums)

    def light(self) -> pl.DataFrame:
        """What is recorded."""
        negatives = self.examples - self.positives
        columns = (
            *(values.astype(np.int64) for values in (self.users, self.examples, self.positives)),
            _steps(self.loss, self.examples),
            _steps(np.nan_to_num(self.own_auc), np.ones(len(self.users))),
            _steps(self.above, self.positives),
            _steps(self.below, negatives),
        )
        return pl.DataFrame(dict(zip(self.SCHEMA, columns, strict=True)), schema=self.SCHEMA)


def _steps(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The means (U,) of sums (U,) of so many (U,), in whole steps of 1 / `_STEPS`; 0 of none."""
    means = sums / np.maximum(counts, 1)
    return np.rint(_STEPS * means).clip(0, 2**32 - 1).astype(np.int64)


Outcomes = TestRanks | TestPredictions
#: By task.
KINDS: dict[str, type[TestRanks] | type[TestPredictions]] = {"retrieval": TestRanks, "ranking": TestPredictions}
