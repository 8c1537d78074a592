"""Train runs: the models that their `config.json` describe, on processed sequences.

Writes `history.jsonl` (a line per epoch), `model.safetensors` and `training.json` beside each `config.json`.
A training that is killed goes on at its last saved epoch when the same command runs again, and ends where an
unbroken one would. Several runs are trained at once on a GPU, on a CPU one after the other; each as if alone.
All are checked before the first begins; one that fails later stops no other. Earlier results of a run stay until its
new ones are there. Of two processes that train or evaluate one run the second waits.

With --deterministic equal runs end with equal bytes on one device; on a CPU with equal --threads too, as the order of
the sums in layer norm's gradients follows their number. `training.json` names it.

Needs torch, numpy and safetensors alone; tqdm shows progress where it is installed.
"""

import argparse
import json
import os
import shutil
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch

from steps.common.cli import StepError, raise_failures, run_step
from steps.common.config import building, read_config
from steps.common.device import compute_type, device_name, pick_device, use_threads
from steps.common.files import sha256, write_json, write_text
from steps.common.locks import locked
from steps.common.provenance import commit, content_sha256, versions
from steps.data.sequences import Sequences, load_sequences
from steps.data.split import hold_out, require_split
from steps.models import CountingModel, build, is_counting
from steps.models.checkpoint import save_weights
from steps.training.loop import Training, reported_epoch, train_together
from steps.training.watching import Watch

#: Those that say that a run is done first, so that a process killed meanwhile leaves nothing that looks finished.
_RESULTS = ("metrics.json", "training.json", "ranks.safetensors", "history.jsonl", "model.safetensors")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--run", required=True, type=Path, nargs="+", action="extend", help="folders that hold a config.json each"
    )
    parser.add_argument("--data", required=True, type=Path, help="data/processed/<dataset>")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--precision", choices=["bf16", "tf32"], help="of matrix products on cuda (default: bf16)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: as many as the runs gain from)")
    parser.add_argument(
        "--deterministic",
        action="store_true",
        help="equal bytes from equal runs on one device; on a CPU with the same number of threads",
    )


def main(args: argparse.Namespace) -> None:
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it torch refuses matrix products
    torch.use_deterministic_algorithms(args.deterministic)
    torch.backends.cuda.matmul.allow_tf32 = True  # the parity contract
    device = pick_device(args.device)
    precision, compute = compute_type(args.precision, device)
    runs = list({run.resolve(): run for run in args.run}.values())
    for run in runs:
        if not run.is_dir():
            raise StepError(f"{run} does not exist; run plan first, which writes its config.json")
    use_threads(args.threads, _readable(runs))
    sequences, data_sha256 = load_sequences(args.data, device)
    about = {
        "precision": precision,
        "commit": commit(),
        "data_sha256": data_sha256,
        "device": device_name(device),
        "threads": str(torch.get_num_threads()),
        "versions": versions(),
    }
    with ExitStack() as held:
        for run in sorted(runs, key=Path.resolve):  # in one order, so that no two processes wait for each other
            held.enter_context(locked(run.resolve()))
        jobs = _prepare(runs, sequences, data_sha256, compute)
        raise_failures(_train(jobs, about, compute), len(runs))


def _readable(runs: list[Path]) -> list[dict[str, Any]]:
    """The configs that can be read; `_prepare` says what is wrong with the others."""
    configs = []
    for run in runs:
        with suppress(StepError):
            configs.append(read_config(run))
    return configs


class Fitting:
    """A run of a counting model, which has one epoch and no loss."""

    def __init__(self, config: dict[str, Any], sequences: Sequences) -> None:
        model = build(config, sequences.num_items).to(sequences.item.device)
        if not isinstance(model, CountingModel):
            raise TypeError(f"{type(model).__name__} is trained, not fitted")
        self.config, self.sequences, self.model = config, sequences, model
        self.holdout = hold_out(sequences, config["protocol"])

    def fit(self) -> dict[str, Any]:
        """Fit the model; returns the line of its history."""
        start = time.perf_counter()
        self.model.fit(self.sequences, self.holdout.train_drop)
        seconds = round(time.perf_counter() - start, 3)
        watch = Watch(self.model, self.config, self.sequences, self.holdout)
        return {"epoch": 1, "train/seconds": seconds, **watch()}


def _prepare(
    runs: list[Path], sequences: Sequences, data_sha256: str, compute: torch.dtype | None
) -> dict[Path, Fitting | Training]:
    """Every run's config, split and model, checked. Raises StepError that lists what is wrong with any of them."""
    jobs: dict[Path, Fitting | Training] = {}
    failures: dict[str, Exception] = {}
    for run in runs:
        try:
            config = read_config(run)
            name = f"{config['row']}, seed {config['seed']}: " if len(runs) > 1 else ""
            with building(run):
                if is_counting(config):
                    jobs[run] = Fitting(config, sequences)
                else:
                    jobs[run] = Training(config, sequences, data_sha256, run, compute, title=name)
            require_split(sequences, jobs[run].holdout, config, run)
        except Exception as error:  # all are named, whatever is wrong with the first
            failures[str(run)] = error
    raise_failures(failures, len(runs))
    return jobs


def _train(
    jobs: dict[Path, Fitting | Training], about: dict[str, Any], compute: torch.dtype | None
) -> dict[str, Exception]:
    """Train every run and write its results; returns why those failed that did."""
    failures: dict[str, Exception] = {}
    for run, job in jobs.items():
        config = job.config
        title = f"{config['row']} on {config['dataset']}, protocol {config['protocol']['name']}, seed {config['seed']}"
        print(f"training {title}, {about['device']}", flush=True)
        if isinstance(job, Fitting):
            try:
                _write(run, job, [job.fit()], about)
            except Exception as error:
                failures[str(run)] = error
    trainings = {run: job for run, job in jobs.items() if isinstance(job, Training)}
    together = [list(trainings)]
    if any(training.device.type == "cpu" for training in trainings.values()):
        together = [[run] for run in trainings]
    written: list[Path] = []
    for runs in together:
        for index, failure in train_together([trainings[run] for run in runs]):
            run, training = runs[index], trainings[runs[index]]
            try:
                if failure is not None:
                    raise failure
                how = training.record() | {"runs_at_once": len(runs)}
                if training.model.compute is not compute:
                    how["precision"] = "tf32"
                _write(run, training, training.history, about | how)
                written.append(run)
            except Exception as error:
                failures[str(run)] = error
    for run in written:  # not before, so that no finished run is trained again where another is killed
        _forget(run)
    return failures


def _write(run: Path, job: Fitting | Training, history: list[dict[str, Any]], about: dict[str, Any]) -> None:
    """Put the results of a run in the place of earlier ones; training.json, which names the others, at last."""
    for name in _RESULTS:
        (run / name).unlink(missing_ok=True)
    save_weights(job.model, run / "model.safetensors")
    write_text(run / "history.jsonl", "".join(json.dumps(line) + "\n" for line in history))
    record = {
        "epoch": reported_epoch(job.config, history),
        "train_seconds": round(sum(line["train/seconds"] for line in history), 3),
        "peak_bytes": max(line.get("train/peak_bytes", 0) for line in history) or None,  # none on a CPU
    }
    hashes = {
        "config_sha256": content_sha256(job.config),
        "weights_sha256": sha256(run / "model.safetensors"),
        "history_sha256": sha256(run / "history.jsonl"),
    }
    write_json(run / "training.json", record | about | hashes)


def _forget(run: Path) -> None:
    """Remove the state that a training would go on from."""
    shutil.rmtree(run / "resume", ignore_errors=True)


if __name__ == "__main__":
    run_step("train", __doc__, add_arguments, main)
