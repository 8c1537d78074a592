"""What came of the test targets, as runs have it and as records keep it: of retrieval ranks, of ranking predictions."""

from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Any, ClassVar, Self

import numpy as np
import polars as pl

LARGEST_RANK = 500  # no cut of HR or NDCG is larger
#: The bits of a float32 that records keep: an error of at most a share of 2**-12.
_KEPT_BITS = np.uint32(0xFFFFF000)


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

    They are rounded to what is recorded, so that tables made of runs are those made of their records.
    """

    __test__ = False
    FILE: ClassVar[str] = "predictions.parquet"
    SCHEMA: ClassVar[dict[str, Any]] = {"user": pl.UInt32, "examples": pl.UInt32, "positives": pl.UInt32}
    SCHEMA |= dict.fromkeys(("loss", "probability", "own_auc", "above", "below"), pl.Float32)

    users: np.ndarray
    examples: np.ndarray
    positives: np.ndarray
    loss: np.ndarray
    probability: np.ndarray
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
        return cls(users.astype(np.int64), *(values.astype(np.float64) for values in others))

    def light(self) -> pl.DataFrame:
        """What is recorded: floats without the last bits of their mantissa, which compression could not shorten."""
        columns = {}
        for (name, kind), values in zip(self.SCHEMA.items(), astuple(self), strict=True):
            if kind == pl.Float32:
                rounded = values.astype(np.float32).view(np.uint32) + np.uint32(0x800)
                columns[name] = (rounded & _KEPT_BITS).view(np.float32)
            else:
                columns[name] = values.astype(np.int64)
        return pl.DataFrame(columns, schema=self.SCHEMA)


Outcomes = TestRanks | TestPredictions
#: By task.
KINDS: dict[str, type[TestRanks] | type[TestPredictions]] = {"retrieval": TestRanks, "ranking": TestPredictions}
