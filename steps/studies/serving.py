"""How fast a trained run is served, and what its recommendations lose where nobody says when things happened.

The run is trained, saved as an MLflow model, and served by `mlflow models serve`. A client on the same machine sends
histories of the data's users, as ids without times: one after the other, many in a request, many requests at once. The
same requests are timed without HTTP too. Then every test user's target is looked for among ten recommendations, with
the times that the user has and without any.
"""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from steps.common.cli import StepError
from steps.common.device import usable_cores, use_threads
from steps.data.sequences import Sequences, load_sequences
from steps.data.split import HeldOut, split_sequences, split_sha256
from steps.serving.mlflow_model import write_model
from steps.serving.recommender import History, Recommender
from steps.serving.run import popular, recommender_of
from steps.studies.rows import Row, row
from steps.training.loop import Training, train_together

HTTP, PYTHON = "HTTP", "Python"
GIVEN, NONE = "the user's", "none"
_TOP = 10
_PATIENCE = 120  # seconds until a server answers


def cases(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """A case for every run."""
    return [
        {"data": config["dataset"], "model": config["row"], "epochs": config["training"]["epochs"]}
        for config in _configs(plan)
    ]


def measure(case: dict[str, Any], plan: dict[str, Any], data: Path) -> list[Row]:
    """Rows of a run: latencies and requests a second of every load, and HR@10 with times and without."""
    config = next(one for one in _configs(plan) if (one["dataset"], one["row"]) == (case["data"], case["model"]))
    folder = data / "processed" / case["data"]
    sequences, digest = load_sequences(folder, torch.device("cpu"))
    split = split_sequences(sequences, config["protocol"])
    config = config | {"split": split_sha256(sequences, split)}
    use_threads(None, [config])
    found: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        training = Training(config, sequences, digest, Path(temporary, "run"))
        for _, failure in train_together([training]):
            if failure is not None:
                raise failure
        recommender = recommender_of(config, training.model, sequences, folder)
        write_model(recommender, popular(sequences, 3), Path(temporary, "model"))
        for kind, histories in _tested(sequences, split.held_out["test"]).items():
            hits = _hit_rate(recommender, histories, _targets(sequences, split.held_out["test"]))
            found.append(row(case | {"times": kind}, f"hr@{_TOP}", round(hits, 6), "fraction", data_sha256=digest))
        bodies = _histories(sequences, recommender)
        settings = plan["settings"]
        with _served(Path(temporary, "model")) as port:
            for load in settings["loads"]:
                asking = {HTTP: lambda: _asks_over_http(port)}
                if load["at_once"] == 1:
                    asking[PYTHON] = lambda: _asks_directly(Path(temporary, "model"))
                for through, connect in asking.items():
                    axes = case | {"through": through, "histories": load["histories"], "at_once": load["at_once"]}
                    axes |= {"max_len": config["training"]["max_len"], "cores": usable_cores()}
                    numbers = timed(connect, bodies, load, settings)
                    found += [row(axes, *number, data_sha256=digest) for number in numbers]
    return found


def _configs(plan: dict[str, Any]) -> list[dict[str, Any]]:
    return [config for group in plan["runs"] for config in group["configs"]]


def timed(
    connect: Callable[[], Callable[[list[Any]], None]],
    bodies: list[Any],
    load: dict[str, int],
    settings: dict[str, Any],
) -> list[tuple[str, float, str]]:
    """Metric, value and unit of a load: latencies of its requests in ms, and how many are answered in a second.

    connect: makes what asks, of which each of the requests under way at once has its own. bodies: the histories, which
    requests take one after the other, from the first again after the last.
    """
    at_once, size = load["at_once"], load["histories"]
    each = -(-load["requests"] // at_once)
    seconds = np.zeros((at_once, each))
    ready = threading.Barrier(at_once + 1)
    failures: list[Exception] = []

    def client(number: int) -> None:
        try:
            ask = connect()
            requests = [
                [bodies[(first + place) % len(bodies)] for place in range(size)]
                for first in range(number * size, (number + each) * size, size)
            ]
            for request in islice(requests, max(1, settings["warm_up"] // at_once)):
                ask(request)
            ready.wait()
            for place, request in enumerate(requests):
                start = time.perf_counter()
                ask(request)
                seconds[number, place] = time.perf_counter() - start
        except Exception as error:  # of a thread, which the others would wait for
            failures.append(error)
            ready.abort()

    clients = [threading.Thread(target=client, args=(number,)) for number in range(at_once)]
    for one in clients:
        one.start()
    with suppress(threading.BrokenBarrierError):
        ready.wait()
    start = time.perf_counter()
    for one in clients:
        one.join()
    total = time.perf_counter() - start
    if failures:
        raise failures[0]
    wanted = settings["percentiles"]
    found = zip(wanted, np.percentile(seconds * 1000, wanted), strict=True)
    return [
        *((f"p{percentile}", round(float(ms), 3), "ms") for percentile, ms in found),
        ("requests", round(seconds.size / total, 2), "1/s"),
    ]


def _asks_over_http(port: int) -> Callable[[list[Any]], None]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_PATIENCE)

    def ask(histories: list[Any]) -> None:
        body = json.dumps({"inputs": histories})
        connection.request("POST", "/invocations", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read()
        if response.status != 200:
            raise StepError(f"the server answers {response.status}: {text[:500]!r}")

    return ask


def _asks_directly(model: Path) -> Callable[[list[Any]], None]:
    import mlflow.pyfunc  # late: seconds

    loaded = mlflow.pyfunc.load_model(str(model))
    return lambda histories: loaded.predict(histories)


@contextmanager
def _served(model: Path) -> Iterator[int]:
    """The port of a server of a model, for as long as the block runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", str(model), "--env-manager", "local"]
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "-p", str(port)],
        cwd=model.parent,
        env=variables | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # so that the processes it starts end with it
    )
    try:
        until = time.monotonic() + _PATIENCE
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > until:
                    raise StepError("`mlflow models serve` does not start; run it by hand to see why") from None
                time.sleep(0.1)
        yield port
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def _histories(sequences: Sequences, recommender: Recommender) -> list[dict[str, Any]]:
    """Every user's whole history, as ids."""
    return [
        {"history": [f"id:{recommender.catalogue.ids[item - 1]}" for item in items.tolist()]}
        for items in sequences.item.split(sequences.offsets.diff().tolist())
    ]


def _tested(sequences: Sequences, held_out: HeldOut) -> dict[str, list[History]]:
    """The test users' histories before their targets, with their times and that of the target, and without."""
    given, none = [], []
    ends = sequences.offsets[held_out.users + 1] - 1 - held_out.num_after
    for begin, end in zip(sequences.offsets[held_out.users].tolist(), ends.tolist(), strict=True):
        items, times = sequences.item[begin:end].tolist(), sequences.timestamp[begin : end + 1].tolist()
        given.append(History(items, times[:-1], times[-1]))
        none.append(History(items))
    return {GIVEN: given, NONE: none}


def _targets(sequences: Sequences, held_out: HeldOut) -> list[int]:
    return sequences.item[sequences.offsets[held_out.users + 1] - 1 - held_out.num_after].tolist()


def _hit_rate(recommender: Recommender, histories: list[History], targets: list[int]) -> float:
    found = recommender.recommend(histories, _TOP)
    hits = [target in [one.item for one in scored] for target, scored in zip(targets, found, strict=True)]
    return sum(hits) / len(hits)
