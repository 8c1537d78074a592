"""What the order of models on the stream depends on: how many items open while it runs, and its concentration.

The paper has one stream. Here one of the two settings is another in each case, and all runs of a case are trained at
once, in one pass, and tested on its last tenth. Beside them stands what a predictor that knows everything expects.
Needs torch, numpy and safetensors alone.
"""

import gc
import tempfile
from pathlib import Path
from typing import Any

import torch

from steps.common.cli import StepError
from steps.common.device import pick_precision
from steps.data.generators.stream import Stream
from steps.data.sequences import load_sequences
from steps.data.streamed import write_stream
from steps.studies.rows import FAILED, Row, row
from steps.studies.stream_ceiling import CUTS, KNOWN, TOLD, expected
from steps.training.loop import Training, train_together

_CEILINGS = {"known": KNOWN, "told": TOLD}
_DIGITS = 6


def cases(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """A case for each stream: percent of the items that open after the first record, and the range of a."""
    settings, usual = plan["settings"], stream_of(plan, {})
    found = [{"opened": opened, "least_a": usual.least_a, "most_a": usual.most_a} for opened in settings["opened"]]
    found += [{"opened": usual.opened, "least_a": least, "most_a": most} for least, most in settings["concentrations"]]
    return [case for number, case in enumerate(found) if case not in found[:number]]


def stream_of(plan: dict[str, Any], case: dict[str, Any]) -> Stream:
    """The stream of a case; of none, the usual one with this study's number of records."""
    (entry,) = plan["generated"].values()
    settings = {key: value for key, value in entry["synthesize"].items() if key != "form"}
    return Stream(**settings | {"records": plan["settings"]["records"]} | case)


def require(cases: list[dict[str, Any]], plan: dict[str, Any]) -> None:
    """Raise StepError, which names the case, where a stream cannot be made."""
    for case in cases:
        try:
            stream_of(plan, case)
        except ValueError as error:
            raise StepError(f"{case}: {error}") from None


def measure(case: dict[str, Any], plan: dict[str, Any], data: Path) -> list[Row]:
    """Rows of a case: the metrics on test of each model, with the seed as repetition, and of the two predictors that
    know more. A seed that fails says so."""
    del data  # nothing is read
    device, stream = torch.device(plan["device"]), stream_of(plan, case)
    gc.collect()  # the memory of the last case's graphs, which are cycles
    if device.type == "cuda":
        torch.cuda.empty_cache()
    configs = [config for runs in plan["runs"] for config in runs["configs"]]
    with tempfile.TemporaryDirectory() as folder:
        write_stream(stream, Path(folder, "stream"))
        sequences, digest = load_sequences(Path(folder, "stream"), device)
        dtype = pick_precision("bf16", device)[1]
        trainings = [
            Training(config, sequences, digest, Path(folder, str(number)), dtype, title=f"{_name(config)}: ")
            for number, config in enumerate(configs)
        ]
        failed = {index: failure for index, failure in train_together(trainings) if failure is not None}
    found: list[Row] = []
    for index, (config, training) in enumerate(zip(configs, trainings, strict=True)):
        axes, seed = case | {"model": config["row"]}, config["seed"]
        if index in failed:
            if not isinstance(failed[index], StepError):
                raise failed[index]
            found.append(row(axes, FAILED, 1, "of 1", repetition=seed, seen=str(failed[index])))
            continue
        line = training.history[-1]
        found += [row(axes, name, line[f"test/{name}"], "fraction", repetition=seed) for name in _metrics(plan)]
    tested = trainings[0].split.held_out["test"].users
    found += _ceilings(case, plan, stream, int(tested.min()), int(tested.max()) + 1)
    return [one | {"data_sha256": digest} for one in found]


def _ceilings(case: dict[str, Any], plan: dict[str, Any], stream: Stream, first: int, last: int) -> list[Row]:
    """The rows of the two predictors, of records `first` to `last` - 1."""
    values = expected(stream, first, last)
    return [
        row(case | {"model": name}, metric, round(values[key][CUTS.index(int(metric[3:]))], _DIGITS), "fraction")
        for key, name in _CEILINGS.items()
        for metric in _metrics(plan)
    ]


def _metrics(plan: dict[str, Any]) -> list[str]:
    return list(plan["settings"]["metrics"])


def _name(config: dict[str, Any]) -> str:
    return f"{config['row']}-{config['seed']}"
