"""How many CPU threads a run gains from. Needs no library, so that a workflow can ask before torch is imported."""

from typing import Any

#: Numbers in a layer's activations of one step. With fewer, threads wait for one another longer than they compute.
_WORTH_THREADS = 2**18
_DIM = 64  # of models that have none


def cpu_threads(config: dict[str, Any], available: int) -> int:
    """One for a small run's config, otherwise `available`."""
    training = config["training"]
    numbers = training["batch"] * training["max_len"] * config["model"].get("dim", _DIM)
    return 1 if numbers < _WORTH_THREADS else available
