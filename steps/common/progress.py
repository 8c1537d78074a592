"""A progress bar where tqdm is installed, nothing where it is not (as on a GPU machine with torch alone)."""

import os
import sys
from collections.abc import Iterable
from typing import Any


def progress(iterable: Iterable[Any] | None = None, **options: Any) -> Any:
    """`tqdm(iterable, **options)`, shown on a terminal only; without tqdm, a bar that shows nothing."""
    try:
        from tqdm import tqdm
    except ImportError:
        return _Silent(iterable)
    shown = sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"  # of several processes by the first
    return tqdm(iterable, disable=not shown, leave=False, dynamic_ncols=True, **options)


class _Silent:
    def __init__(self, iterable: Iterable[Any] | None) -> None:
        self.iterable = iterable

    def __iter__(self) -> Any:
        return iter(self.iterable or ())

    def __enter__(self) -> "_Silent":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, _: int = 1) -> None:
        pass

    def set_postfix(self, *_: object, **__: object) -> None:
        pass
