"""How studies time on a GPU: on a stream of their own; and what a case says that was tried and did not run."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton

from kernels.tools.timing import Unwritten
from steps.common.cli import StepError
from steps.studies.rows import FAILED, Row, row

_LETTERS = 200  # of an error


@contextmanager
def own_stream(device: str) -> Iterator[None]:
    """Within it a stream is current that is not the default one, and no memory is cached; nothing on a CPU.

    A graph is captured on the stream that its backward pass had its forward pass on, and the default one cannot be.
    """
    if device != "cuda":
        yield
        return
    torch.cuda.empty_cache()
    with torch.cuda.stream(torch.cuda.Stream()):
        yield


def did_not_run(case: dict[str, Any], error: Exception, may_fail: bool) -> Row:
    """The row of a case that a backend or a compiler refuses. Raises StepError of a call that did not write its
    outputs, and `error` itself, where the case may not fail."""
    if not may_fail:
        if isinstance(error, Unwritten):
            raise StepError(f"{case}: {error}; no time of it is kept") from error
        raise error
    text = " ".join(f"{type(error).__name__}: {error}".split())[:_LETTERS]
    return row(case, FAILED, 1, "of 1", seen=f"torch {torch.__version__}, triton {triton.__version__}: {text}")
