"""Trains a run for some steps, in float64 where its item vectors may be, and writes what test_distributed compares."""

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from kernels.rowwise_table import naive, sharded
from steps.common.files import read_json
from steps.common.processes import ALONE, Processes, device_of_process, joined
from steps.data.sequences import load_sequences
from steps.evaluation.exact_ranks import Ranker, Rules
from steps.models.weights import save_weights
from steps.training import distributed
from steps.training.loop import Training

STEPS = 20


CPU = torch.device("cpu")


def steps(
    config: dict[str, Any], data: Path, folder: Path, device: torch.device = CPU, processes: Processes = ALONE
) -> dict[str, torch.Tensor]:
    """The losses by step, the weights after them, and the ranks and the best items of all test targets by these."""
    only_float32 = "items" in config["model"] or device.type == "cuda"
    torch.set_default_dtype(torch.float32 if only_float32 else torch.float64)
    try:
        sequences, digest = load_sequences(data, device)
        training = Training(config, sequences, digest, folder, processes=processes)
        losses: list[float] = []
        epoch = 0
        while len(losses) < STEPS:
            epoch += 1
            with training.stream.active():
                for _ in training._epoch(epoch, ""):
                    if len(losses) < STEPS:
                        losses.append(float(training.execution.total))
                        training.execution.total.zero_()
        training.stream.wait()
        if isinstance(training.model.items, sharded.ShardedRowwiseTable):
            assert (training.model.items._fused is not None) == (sys.argv[3] == "torchrec")
        name = f"saved-{processes.size}.safetensors"
        save_weights(training.model, folder / name, processes)
        processes.wait()  # until all of it is there
        found = {f"weights/{name}": tensor for name, tensor in load_file(folder / name).items()}
        found["losses"] = torch.tensor(losses)
        held_out = training.split.held_out["test"]
        rules = [Rules("rated", "history"), Rules("catalogue", "window")]
        ranker = Ranker(sequences, held_out, rules, config["training"]["max_len"], 16, top=3, processes=processes)
        if (folder / "weights.pt").exists():  # so that only the evaluation is compared
            training.model.load_state_dict(torch.load(folder / "weights.pt", weights_only=True))
        finite, rankings = ranker.rank(training.model)
        assert finite
        for number, ranking in enumerate(rankings):
            found |= {f"best/{number}": ranking.ranks.best, f"ties/{number}": ranking.ranks.ties}
            found[f"top/{number}"] = ranking.top
        return {name: tensor.cpu().contiguous() for name, tensor in found.items()}
    finally:
        torch.set_default_dtype(torch.float32)


def main() -> None:
    folder, data = Path(sys.argv[1]), Path(sys.argv[2])
    device = device_of_process(torch.device(sys.argv[4]))
    torch.set_num_threads(1)
    sharded.ShardedRowwiseTable.whole = None  # nobody may gather a table
    if sys.argv[3] in ("torch", "padded"):
        sharded.torchrec.fits = lambda *_: False
    if sys.argv[3] == "padded":  # as on CUDA, where the host does not wait for the number of items
        distributed.unique = naive.padded_unique
    with joined(device) as processes:
        found = steps(read_json(folder / "config.json"), data, folder, device, processes)
        save_file(found, folder / f"found-{processes.rank}.safetensors")


if __name__ == "__main__":
    main()
