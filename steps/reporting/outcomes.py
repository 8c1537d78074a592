"""What came of the test targets, as runs have it and as records keep it: of retrieval ranks, of ranking predictions.

Each kind says what belongs together: `BY_SEED`, a record for each run; else one for all seeds of a row.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import numpy as np
import polars as pl

LARGEST_RANK = 200  # no cut of HR or NDCG is larger; whoever raises it records all runs again
#: To 1, in what records keep of predictions. The mean over users of what rounding takes has to be small beside the
#: standard error of a difference of two nearly equal models. A user of n targets moves that difference by about the
#: root of n, so what is rounded is the user's sum over this root: users of many targets get finer steps a target.
_STEPS = 2**15


@dataclass(frozen=True)
class TestRanks:
    """Ranks of the test items: of `users` (U,), ascending; `best` and `ties` (U,) int64 as in `evaluation.metrics`.

    Recorded, ranks above `LARGEST_RANK` are LARGEST_RANK + 1 without ties: up to 200 they take three quarters of the
    bytes that they take up to 500. `largest` is then LARGEST_RANK, and of a run None.
    """

    __test__ = False  # no test of pytest's
    BY_SEED: ClassVar[bool] = True
    FILE: ClassVar[str] = "ranks.parquet"
    SCHEMA: ClassVar[dict[str, Any]] = {"user": pl.UInt32, "rank": pl.UInt16, "ties": pl.UInt32}

    users: np.ndarray
    best: np.ndarray
    ties: np.ndarray
    largest: int | None = field(default=None, kw_only=True)

    @classmethod
    def of_run(cls, tensors: Mapping[str, np.ndarray]) -> Self:
        """From the content of outcomes.safetensors."""
        return cls(*(tensors[name].astype(np.int64) for name in ("test_users", "test", "test_ties")))

    @classmethod
    def of_record(cls, part: pl.DataFrame) -> Self:
        """From the rows of a run, which `light` made."""
        return cls(*(part[name].to_numpy().astype(np.int64) for name in cls.SCHEMA), largest=LARGEST_RANK)

    def has(self, metric: str) -> bool:
        """Whether users' values of hr@k, ndcg@k or mrr follow from these ranks."""
        _, _, cut = metric.partition("@")
        return self.largest is None or (cut != "" and int(cut) <= self.largest)

    def light(self) -> pl.DataFrame:
        """What is recorded."""
        far = self.best > LARGEST_RANK
        columns = self.users, np.where(far, LARGEST_RANK + 1, self.best), np.where(far, 0, self.ties)
        return pl.DataFrame(dict(zip(self.SCHEMA, columns, strict=True)), schema=self.SCHEMA)


@dataclass(frozen=True)
class TestPredictions:
    """What the predictions for each user's test targets add up to, as in `evaluation.engagements.UserSums`: of `users`
    (U,) int64, ascending; all others (U,) float64, each the mean over so many `seeds`.

    Given examples and positives, users' values of every metric are linear in these sums: those of the mean are the mean
    of the seeds' own. So a row is recorded as its mean. It is rounded: each user's sum of n targets, over the root of
    n, to steps of 2**-15. Tables made of runs take the same rounded mean. No user's error reaches another, as intervals
    and tests read users' values. A loss over this root of more than 131,071 nats is kept as 131,072. The user's own AUC
    is exact: `twice_ordered` is, added up over seeds, twice the pairs of a positive and a negative of the user in which
    the positive scores higher, equal ones as half.
    """

    __test__ = False
    BY_SEED: ClassVar[bool] = False
    FILE: ClassVar[str] = "predictions.parquet"
    SCHEMA: ClassVar[dict[str, Any]] = {"user": pl.UInt32, "examples": pl.UInt32, "positives": pl.UInt32}
    SCHEMA |= {"loss": pl.UInt32, "twice_ordered": pl.UInt64, "above": pl.UInt32, "below": pl.UInt32}
    SCHEMA |= {"seeds": pl.UInt32}

    users: np.ndarray
    examples: np.ndarray
    positives: np.ndarray
    loss: np.ndarray
    own_auc: np.ndarray
    above: np.ndarray
    below: np.ndarray
    seeds: int = 1

    @classmethod
    def of_run(cls, tensors: Mapping[str, np.ndarray]) -> Self:
        """From the content of outcomes.safetensors; not rounded."""
        return cls(np.unique(tensors["test_users"]).astype(np.int64), *tensors["test_sums"].T)

    @classmethod
    def of_row(cls, runs: list[Self]) -> Self:
        """The mean over runs of the same targets that differ in their seed, rounded to what is recorded."""
        names = ("loss", "own_auc", "above", "below")
        means = {name: np.mean([getattr(run, name) for run in runs], axis=0) for name in names}
        return cls.of_record(replace(runs[0], **means, seeds=len(runs)).light())

    @classmethod
    def of_record(cls, part: pl.DataFrame) -> Self:
        """From the rows of a table's row, which `light` made."""
        users, *others = (part[name].to_numpy() for name in cls.SCHEMA)
        examples, positives, loss, twice_ordered, above, below, seeds = (one.astype(np.float64) for one in others)
        negatives = examples - positives
        pairs = positives * negatives
        own_auc = np.where(pairs > 0, twice_ordered / (2 * seeds * np.maximum(pairs, 1)), np.nan)
        sums = _sums(loss, examples), own_auc, _sums(above, positives), _sums(below, negatives)
        return cls(users.astype(np.int64), examples, positives, *sums, seeds=int(seeds.max(initial=1)))

    def light(self) -> pl.DataFrame:
        """What is recorded."""
        negatives = self.examples - self.positives
        pairs = self.positives * negatives
        columns = (
            *(values.astype(np.int64) for values in (self.users, self.examples, self.positives)),
            _steps(self.loss, self.examples),
            np.rint(2 * self.seeds * np.nan_to_num(self.own_auc) * pairs).astype(np.int64),
            _steps(self.above, self.positives),
            _steps(self.below, negatives),
            np.full(len(self.users), self.seeds),
        )
        return pl.DataFrame(dict(zip(self.SCHEMA, columns, strict=True)), schema=self.SCHEMA)

    def same_targets(self, other: Self) -> bool:
        """Whether both are of the same users, with as many targets and engagements each."""
        names = ("users", "examples", "positives")
        return all(np.array_equal(getattr(self, name), getattr(other, name)) for name in names)


def _steps(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Sums (U,) of so many (U,), over the root of their number, in whole steps of 1 / `_STEPS`; 0 of none."""
    return np.rint(_STEPS * sums / np.sqrt(np.maximum(counts, 1))).clip(0, 2**32 - 1).astype(np.int64)


def _sums(steps: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The sums (U,) that `_steps` has kept."""
    return steps / _STEPS * np.sqrt(np.maximum(counts, 1))


Outcomes = TestRanks | TestPredictions
Kind = type[TestRanks] | type[TestPredictions]
#: By task.
KINDS: dict[str, Kind] = {"retrieval": TestRanks, "ranking": TestPredictions}
