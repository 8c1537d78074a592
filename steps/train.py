"""Train runs: the models that their `config.json` describe, on processed sequences.

Writes `history.jsonl` (a line per epoch), `mllog.txt` (the same in MLPerf's form), `model.safetensors` and
`training.json` beside each `config.json`.
A training that was killed resumes from its last saved epoch when the same command runs again, and ends with the
weights of an uninterrupted one. Several runs are trained at once on a GPU, on a CPU one after the other; each ends as
it would alone. All runs are checked before the first begins. A run that fails later does not stop the others. Earlier
results of a run stay until the new ones are written. If two processes train or evaluate the same run, the second waits.
Started by torchrun, several processes train one run, each with a part of every batch, as one process would.

With --deterministic, equal runs on one device end with equal bytes. On a CPU they need equal --threads too, as the
order of the sums in layer norm's gradients depends on the number of threads, which `training.json` names. Without it
the order of sums is left to chance, on a CPU of several threads too: equal runs differ, at first by rounding.

Needs torch, numpy and safetensors alone; tqdm shows progress where it is installed.
"""

import argparse
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from steps.common.cli import StepError, raise_failures, run_step
from steps.common.config import building, read_config, task_of
from steps.common.device import device_name, pick_device, pick_precision, use_threads
from steps.common.files import sha256, write_json, write_text
from steps.common.locks import locked
from steps.common.processes import (
    Processes,
    device_of_process,
    joined,
    require_one_run,
    require_one_source,
)
from steps.common.provenance import commit, content_sha256, utc_now, versions
from steps.common.torchrun import first_to_end
from steps.data.sequences import Sequences, load_sequences
from steps.data.split import require_split, split_sequences
from steps.models import CountBasedModel, is_count_based
from steps.models.weights import save_weights
from steps.tasks import EVALUATIONS, build
from steps.training.loop import Training, doubt, reported_epoch, train_together
from steps.training.mllog import mllog
from steps.training.validation import Validation

#: In the order of deletion: those that mark a run as done come first, so that after a kill no run looks done.
_RESULTS = ("metrics.json", "training.json", "outcomes.safetensors", "mllog.txt", "history.jsonl", "model.safetensors")

_FEW_USERS, _FEW_SHARE = 500, 0.5  # a test on fewer users, which are a smaller share of all, is pointed at


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
    device = device_of_process(pick_device(args.device))
    with joined(device) as processes:
        _main(args, device, processes)


def _main(args: argparse.Namespace, device: torch.device, processes: Processes) -> None:
    precision, compute_dtype = pick_precision(args.precision, device)
    runs = list({run.resolve(): run for run in args.run}.values())
    for run in runs:
        if not run.is_dir():
            raise StepError(f"{run} does not exist; run plan first, which writes its config.json")
    require_one_run(processes, len(runs))
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
    with processes.first_alone(_locked(runs)):
        jobs = _prepare(runs, sequences, data_sha256, compute_dtype, processes)
        raise_failures(_train(jobs, about, compute_dtype, processes), len(runs))


@contextmanager
def _locked(runs: list[Path]) -> Iterator[None]:
    """Hold the locks of all runs."""
    with ExitStack() as held:
        for run in sorted(runs, key=Path.resolve):  # in one order, so that two processes never wait for each other
            held.enter_context(locked(run.resolve()))
        yield


def _readable(runs: list[Path]) -> list[dict[str, Any]]:
    """The configs that can be read; `_prepare` reports the errors of the others."""
    configs = []
    for run in runs:
        with suppress(StepError):
            configs.append(read_config(run))
    return configs


class Fitting:
    """A run of a count-based model, which has one epoch and no loss."""

    def __init__(self, config: dict[str, Any], sequences: Sequences) -> None:
        model = build(config, sequences.num_items).to(sequences.item.device)
        if not isinstance(model, CountBasedModel):
            raise TypeError(f"{type(model).__name__} is trained, not fitted")
        self.config, self.sequences, self.model = config, sequences, model
        self.split = split_sequences(sequences, config["protocol"])

    def fit(self) -> dict[str, Any]:
        """Fit the model; returns the line of its history."""
        start = time.perf_counter()
        self.model.fit(self.sequences, self.split.num_held_out)
        seconds = round(time.perf_counter() - start, 3)
        part = self.split.eval_part
        evaluate = EVALUATIONS[task_of(self.config["protocol"])]
        evaluation = evaluate(self.config, self.sequences, self.split.held_out[part])
        validation = Validation(self.model, evaluation, part)
        validation.queue()
        return {"epoch": 1, "train/seconds": seconds, **validation.line()}


def _prepare(
    runs: list[Path],
    sequences: Sequences,
    data_sha256: str,
    compute_dtype: torch.dtype | None,
    processes: Processes,
) -> dict[Path, Fitting | Training]:
    """Check every run's config, split and model. Raises StepError that lists the error of every run."""
    jobs: dict[Path, Fitting | Training] = {}
    failures: dict[str, Exception] = {}
    for run in runs:
        try:
            config = read_config(run)
            require_one_source(processes, {str(run / "config.json"): config, "--data": data_sha256})
            name = f"{config['row']}, seed {config['seed']}: " if len(runs) > 1 else ""
            with building(run):
                if is_count_based(config):
                    jobs[run] = Fitting(config, sequences)
                else:
                    jobs[run] = Training(
                        config, sequences, data_sha256, run, compute_dtype, title=name, processes=processes
                    )
            require_split(sequences, jobs[run].split, config, run)
            tested = jobs[run].split.held_out["test"].users
            if len(tested) < min(_FEW_USERS, _FEW_SHARE * sequences.num_users):
                print(
                    f"{name}protocol {config['protocol']['name']} tests {len(tested.unique())} of "
                    f"{sequences.num_users} users: too few to mean much; raise test_share in params/protocols.yaml, or "
                    "take another protocol",
                    flush=True,
                )
        except Exception as error:  # of one run; the message lists all
            failures[str(run)] = error
    raise_failures(failures, len(runs))
    return jobs


def _train(
    jobs: dict[Path, Fitting | Training],
    about: dict[str, Any],
    compute_dtype: torch.dtype | None,
    processes: Processes,
) -> dict[str, Exception]:
    """Train every run, and write its results. Returns the errors of those that failed."""
    failures: dict[str, Exception] = {}
    for run, job in jobs.items():
        config = job.config
        title = f"{config['row']} on {config['dataset']}, protocol {config['protocol']['name']}, seed {config['seed']}"
        print(f"training {title}, {about['device']}", flush=True)
        if isinstance(job, Fitting):
            try:
                started = utc_now()
                history = [job.fit()]
                _write(run, job, history, about | {"started": started}, processes)
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
                if training.model.encoder.compute_dtype is not compute_dtype:
                    how["precision"] = "tf32"
                _write(run, training, training.history, about | how, processes)
                if not processes.writes:
                    continue
                written.append(run)
                if said := doubt(training.config, training.history):
                    print(f"{training.config['row']}, seed {training.config['seed']}, {said}", flush=True)
            except Exception as error:
                failures[str(run)] = error
    for run in written:  # at the end, so that a finished run is not trained again if another is killed
        _remove_state(run)
    return failures


def _write(
    run: Path,
    job: Fitting | Training,
    history: list[dict[str, Any]],
    about: dict[str, Any],
    processes: Processes,
) -> None:
    """Replace the earlier results of a run by the new ones; training.json, which has the others' hashes, at last.

    One of `processes` does, with what others have of the weights.
    """
    if processes.writes:
        for name in _RESULTS:
            (run / name).unlink(missing_ok=True)
    save_weights(job.model, run / "model.safetensors", processes)
    if not processes.writes:
        return
    write_text(run / "history.jsonl", "".join(json.dumps(line) + "\n" for line in history))
    record = {
        "epoch": reported_epoch(job.config, history),
        "train_seconds": round(sum(line["train/seconds"] for line in history), 3),
        "peak_bytes": max(line.get("train/peak_bytes", 0) for line in history) or None,  # none on a CPU
        "ended": utc_now(),
    }
    hashes = {
        "config_sha256": content_sha256(job.config),
        "weights_sha256": sha256(run / "model.safetensors"),
        "history_sha256": sha256(run / "history.jsonl"),
    }
    training = record | about | hashes
    write_text(run / "mllog.txt", mllog(job.config, history, training, *_samples(job), _optimizer(job)))
    write_json(run / "training.json", training)


def _samples(job: Fitting | Training) -> tuple[int, int]:
    """How many sequences an epoch goes over, and how many targets an evaluation."""
    trained = len(job.schedule.lengths) if isinstance(job, Training) else job.sequences.num_users
    return trained, len(job.split.held_out[job.split.eval_part].users)


def _optimizer(job: Fitting | Training) -> str | None:
    return job.model.optimizer if isinstance(job, Training) else None


def _remove_state(run: Path) -> None:
    """Remove the state that a training would resume from."""
    shutil.rmtree(run / "resume", ignore_errors=True)


if __name__ == "__main__":
    run_step("train", __doc__, add_arguments, main, says=first_to_end)
