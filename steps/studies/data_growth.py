"""How time and memory of preprocessing grow with a log: from a generated file to sequences, each in its own process.

Seconds do not count imports. Memory is the process's peak, with its libraries and the pages of files that it maps.
`pandas` makes the same arrays, to the byte, as a reader of its documentation would, without blocks and threads. `lists
as text` goes on as published code of recommenders does, the authors' of HSTU among it: a list per user, written as text
into a CSV file.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from steps.common.cli import StepError
from steps.common.device import usable_cores
from steps.common.files import sha256
from steps.data.generators import generator
from steps.data.sources import unpack
from steps.preprocess import read_validation, write_sequences
from steps.studies.rows import Row, row
from steps.validate import write_valid

OURS, PANDAS, LISTS = "this project", "pandas", "pandas, lists as text"


def cases(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """A case for every data set, number of rows and implementation."""
    return [
        {"dataset": name, "rows": rows, "implementation": implementation, "cores": usable_cores()}
        for name, sizes in plan["settings"]["rows"].items()
        for rows in sizes
        for implementation in (OURS, PANDAS, LISTS)
        if implementation == OURS or rows in plan["settings"]["pandas"].get(name, [])
    ]


def measure(case: dict[str, Any], plan: dict[str, Any], data: Path) -> list[Row]:
    """Rows of a case: seconds of the parts, and the peak of memory. The file is made anew each time."""
    dataset = plan["generated"][case["dataset"]]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        generator(**scaled(dataset["synthesize"], case["rows"])).write(folder / "raw.zip")
        unpack(folder / "raw.zip", "raw.zip", folder / "raw")
        (folder / "raw.zip").unlink()
        found = _in_own_process(case["implementation"], folder, dataset)
        if case["implementation"] != OURS:
            ours = _in_own_process(OURS, folder, dataset)
            if ours["sha256"] != found["sha256"]:
                raise StepError(f"{case['dataset']}, {case['rows']} rows: pandas and this project differ in a byte")
    digest = found.pop("sha256")
    return [
        row(case, name, value, "bytes" if name == "peak" else "s", data_sha256=digest) for name, value in found.items()
    ]


def scaled(synthesize: dict[str, Any], rows: int) -> dict[str, Any]:
    """The settings of a generator with another number of rows: users, and where there is no catalogue items, in
    proportion."""
    grows = [name for name in ("users", "items") if name in synthesize]
    return synthesize | {"rows": rows} | {name: max(1, synthesize[name] * rows // synthesize["rows"]) for name in grows}


def _in_own_process(implementation: str, folder: Path, dataset: dict[str, Any]) -> dict[str, Any]:
    """What `timed` measures in a new process, with `peak`, its largest memory in bytes."""
    code = f"from {__name__} import timed; timed()"
    command = [sys.executable, "-c", code, implementation, str(folder), json.dumps(dataset)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        text = process.stdout.read() if process.stdout else b""
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise StepError(f"{implementation}: the measurement ended with exit code {process.returncode}")
    return json.loads(text) | {"peak": usage.ru_maxrss * 1024}


def timed() -> None:
    """What the new process does: print the seconds from raw files to sequences, and the SHA-256 of these."""
    implementation, folder, dataset = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    processed = folder / implementation
    processed.mkdir()
    start = time.perf_counter()
    if implementation in (PANDAS, LISTS):
        by_pandas(folder / "raw", dataset, processed, lists=implementation == LISTS)
        seconds = {"total": time.perf_counter() - start}
    else:
        valid = folder / "valid"
        valid.mkdir()
        told = write_valid(folder / "raw", dataset, valid)
        files = {path.name: sha256(path) for path in sorted(valid.iterdir())}
        (valid / "validation.json").write_text(json.dumps(told | {"files": files}), encoding="utf-8")
        middle = time.perf_counter()
        write_sequences(valid, read_validation(valid), processed, "file-order")
        end = time.perf_counter()
        seconds = {"validate": middle - start, "preprocess": end - middle, "total": end - start}
    path = processed / "sequences.safetensors"
    print(json.dumps({name: round(value, 3) for name, value in seconds.items()} | {"sha256": sha256(path)}))


def by_pandas(raw: Path, dataset: dict[str, Any], processed: Path, lists: bool) -> None:
    """The sequences of files in MovieLens' csv form, checked by the same rules, as pandas' documentation does it; and
    `lists` of them as text."""
    import pandas as pd  # late, as imports are not counted

    files, checks = dataset["files"], dataset["checks"]
    ratings = pd.read_csv(raw / files["interactions"]["path"])
    ratings.columns = pd.Index(files["interactions"]["columns"])
    movies = pd.read_csv(raw / files["items"]["path"])
    movies.columns = pd.Index(files["items"]["columns"])
    low, high = checks["rating"]
    wrong = ratings.isna().any(axis=1) | ~ratings["rating"].between(low, high) | (ratings["timestamp"] < 0)
    wrong |= ratings["rating"] % checks["rating_step"] != 0
    wrong |= ~ratings["item"].isin(movies["item"])
    wrong |= ratings.duplicated(["user", "item"])
    wrong |= ratings.groupby("user")["item"].transform("size") < checks["min_user_interactions"]
    if wrong.any() or not movies["item"].is_unique:
        raise StepError(f"{raw}: {wrong.sum()} rows are not as the entry says")
    ids = pd.Series(np.arange(1, len(movies) + 1), index=np.sort(movies["item"]))
    ratings = ratings.sort_values(["user", "timestamp"], kind="stable")
    lengths = ratings.groupby("user").size()
    tensors: dict[str, np.ndarray] = {
        "offsets": np.concatenate([[0], np.cumsum(lengths.to_numpy())]).astype(np.int64),
        "item": ratings["item"].map(ids).to_numpy().astype(np.int32),
        "timestamp": ratings["timestamp"].to_numpy().astype(np.int64),
        "rating": ratings["rating"].to_numpy().astype(np.float32),
    }
    save_file(tensors, processed / "sequences.safetensors")
    lengths.index.to_frame(index=False).to_parquet(processed / "users.parquet")
    movies.sort_values("item").to_parquet(processed / "items.parquet")
    if lists:
        columns = ["item", "rating", "timestamp"]
        users = ratings.groupby("user")[columns].agg(list)
        for column in columns:
            users[column] = users[column].map(lambda values: ",".join(map(str, values)))
        users.to_csv(processed / "sequences.csv")
