"""What the stream's orders depend on: how many of its items open while it runs, and the concentration of its records.

The paper has one stream, and says of neither what another would give. Of each stream all rows are trained at once, in
one pass, and tested on its last tenth. Needs torch, numpy and safetensors alone.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch

from steps.common.device import pick_precision
from steps.data.generators.stream import Stream
from steps.data.sequences import load_sequences
from steps.data.streamed import write_stream
from steps.studies.rows import Row, row
from steps.training.loop import Training, train_together


def cases(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """A case for each stream: percent of the items that open after the first record, and the range of a."""
    given = plan["settings"]
    usual = stream_of(plan, {})
    found = [{"opened": opened, "least_a": usual.least_a, "most_a": usual.most_a} for opened in given["opened"]]
    for least, most in given["concentrations"]:
        found.append({"opened": usual.opened, "least_a": least, "most_a": most})
    return found


def stream_of(plan: dict[str, Any], case: dict[str, Any]) -> Stream:
    """The stream of a case."""
    (form,) = plan["generated"].values()
    settings: dict[str, Any] = {key: value for key, value in form["synthesize"].items() if key != "form"}
    return Stream(**settings | {"records": plan["settings"]["records"]} | case)


def measure(case: dict[str, Any], plan: dict[str, Any], data: Path) -> list[Row]:
    """Rows of a case: each model's metrics on test, by seed, and the seconds of its training beside all others."""
    del data
    device, found = torch.device(plan["device"]), []
    with tempfile.TemporaryDirectory() as folder:
        write_stream(stream_of(plan, case), Path(folder, "stream"))
        sequences, digest = load_sequences(Path(folder, "stream"), device)
        configs = [config for runs in plan["runs"] for config in runs["configs"]]
        dtype = pick_precision("bf16", device)[1]
        trainings = [
            Training(config, sequences, digest, Path(folder, str(number)), dtype)
            for number, config in enumerate(configs)
        ]
        for index, failure in train_together(trainings):
            if failure is not None:
                raise failure
            config, line = configs[index], trainings[index].history[-1]
            for metric in plan["settings"]["metrics"]:
                axes = case | {"model": config["row"]}
                found.append(
                    row(axes, metric, line[f"test/{metric}"], "fraction", repetition=config["seed"], data_sha256=digest)
                )
    return found
