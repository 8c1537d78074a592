"""A trained run's folder and its processed data, which belong together.

Needs torch, numpy and safetensors alone.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from steps.common.cli import StepError
from steps.common.config import building, read_config
from steps.common.device import pick_device, pick_precision, use_threads
from steps.common.files import read_json
from steps.common.provenance import require_trained
from steps.data.fields import FieldSizes
from steps.data.sequences import Sequences, load_sequences
from steps.models.weights import load_weights
from steps.tasks import Task, build


@dataclass(frozen=True)
class TrainedRun:
    """A run's folder, its config.json, the sequences that it was trained on, and the precision of its training."""

    folder: Path
    config: dict[str, Any]
    sequences: Sequences
    precision: str | None

    def model(self) -> torch.nn.Module:
        """The model that it was trained to, in eval mode, on the device of the sequences.

        Raises StepError that names the file if the config describes none, or the weights are not there.
        """
        use_threads(None, [self.config])
        with building(self.folder):
            model = build(self.config, self.sequences.num_items, FieldSizes.of(self.sequences))
        load_weights(model, self.folder / "model.safetensors")
        device = self.sequences.item.device
        if isinstance(model, Task):  # as `evaluate` has it
            as_trained = "bf16" if self.precision == "bf16" else "tf32"
            _, model.encoder.compute_dtype = pick_precision(as_trained, device)
        return model.to(device).eval()


def open_run(run: Path | str, data: Path | str, device: str = "cpu") -> TrainedRun:
    """A trained run, with its processed data on `device`.

    Raises StepError that names the file if the run is not trained, the data are not those it was trained on, or one of
    their files is not as its manifest says.
    """
    run, data = Path(run), Path(data)
    source = run / "training.json"
    if not run.is_dir():
        raise StepError(f"{run} does not exist; it is a folder runs/<experiment>/<dataset>/<model>/<protocol>/seed-N")
    if not source.is_file():
        raise StepError(f"{run} is not trained; run train first")
    config, trained = read_config(run), read_json(source, remedy="train again")
    require_trained(run, config, trained, source)
    sequences, digest = load_sequences(data, pick_device(device))
    if trained.get("data_sha256") != digest:
        raise StepError(f"{run} was trained on other sequences than {data} has; name its own")
    return TrainedRun(run, config, sequences, trained.get("precision"))
