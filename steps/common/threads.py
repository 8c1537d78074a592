"""How many CPU threads a run gains from. Needs no library, so that a workflow can call it without torch."""

from typing import Any

#: Numbers in a layer's activations of one step. With fewer, threads wait for one another longer than they compute.
_MIN_ACTIVATIONS = 2**18
_DEFAULT_DIM = 64  # for models without one


def cpu_threads(config: dict[str, Any], available: int) -> int:
    """The number of threads for a run's config: one for a small run, otherwise `available`."""
    training = config["training"]
    numbers = training["batch"] * training["max_len"] * config["model"].get("dim", _DEFAULT_DIM)
    return 1 if numbers < _MIN_ACTIVATIONS else available
