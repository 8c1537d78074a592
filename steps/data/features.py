"""Features of users and items as numbers that models embed."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl

Vocabularies = dict[str, dict[str, list[str]]]


def build_features(
    declared: Mapping[str, Mapping[str, Any]], ids: Mapping[str, pl.Series], tables: Mapping[str, pl.DataFrame]
) -> tuple[dict[str, np.ndarray], Vocabularies]:
    """The features of users and items. All arguments are by `user` and `item`, of those that there are.

    Args:
        declared: by feature, as in params/datasets.yaml: `category`, or the separator of `categories`. What a `pattern`
            found is a category.
        ids: raw ids in the order of the features' rows.
        tables: a row for each id, which the column `user` or `item` has, and a String column for each feature, without
            nulls.

    Returns:
        tensors: by `user/<feature>`, a row for each user; by `item/<feature>`, a row for each item behind a row of
            zeros, which is padding. A category is (rows,) int32, the value's place in the vocabulary, from 1.
            Categories are (rows, K) uint8: column k is 1 where the row has value k, from 0, of the vocabulary's K.
        vocabularies: by user or item, and feature, the values that occur, sorted: as numbers if all of them are.
    """
    tensors: dict[str, np.ndarray] = {}
    vocabularies: Vocabularies = {}
    for kind, features in declared.items():
        if not features:
            continue
        rows = ids[kind].to_frame(kind).join(tables[kind], on=kind, how="left", maintain_order="left")
        vocabularies[kind] = {}
        for name, values in features.items():
            codes, vocabularies[kind][name] = _encode(rows[name], values)
            padding = np.zeros_like(codes[:1])
            tensors[f"{kind}/{name}"] = np.concatenate([padding, codes]) if kind == "item" else codes
    return tensors, vocabularies


def _encode(column: pl.Series, values: Any) -> tuple[np.ndarray, list[str]]:
    if values == "category" or "pattern" in values:
        vocabulary = _sorted(column)
        places = range(1, len(vocabulary) + 1)
        return column.replace_strict(vocabulary, places, return_dtype=pl.Int32).to_numpy(), vocabulary
    lists = column.str.split(values["categories"])
    vocabulary = _sorted(lists.explode())
    columns = [lists.list.contains(value).to_numpy() for value in vocabulary]
    return np.stack(columns, axis=1).astype(np.uint8), vocabulary


def _sorted(values: pl.Series) -> list[str]:
    distinct: list[str] = values.unique().sort().to_list()
    numbers = values.unique().sort().cast(pl.Float64, strict=False)
    if numbers.null_count() or not numbers.is_finite().all():
        return distinct
    return [value for _, value in sorted(zip(numbers, distinct, strict=True))]
