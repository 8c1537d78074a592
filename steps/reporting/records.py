"""The finished runs of an experiment: in runs/, or in the light records that are committed under reports/.

Records are two compressed columnar files an experiment. `runs.parquet` has a row a run: its config.json, history.jsonl
and metrics.json, the CRC-32 of its recorded history, and the SHA-256 of its recorded outcomes. Config and metrics come
back as they were written. The history comes back without the metrics that no report shows epoch by epoch: it has those
of `headline` and `compared` in params/tasks.yaml, and, but for trials of a search, losses, times and memory. It stands
there as one object, a list of all epochs for each key. Earlier commits recorded it whole, without CRC-32, and such
records are read too. The other file is of test users, `user` as in the processed sequences. Of retrieval it is
`ranks.parquet`, a row a run and user: `rank` the best rank of the held-out item (0: left out of the ranking), `ties`
the other candidates of equal score. Of ranking it is `predictions.parquet`, a row a table row (dataset, protocol,
model) and user: what the predictions for the user add up to, as the mean over `seeds`. All runs of the table row then
name the same SHA-256, and are recorded together. The rows of a user stand together, in the order of the runs.
"""

import hashlib
import json
import statistics
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq
from safetensors.numpy import load_file

from steps.common import params
from steps.common.cli import StepError
from steps.common.config import task_of
from steps.common.files import atomic_path, parse_jsonl, reading
from steps.common.provenance import check_run, content_sha256
from steps.evaluation.names import OF_TASK
from steps.reporting.outcomes import KINDS, Kind, Outcomes, TestPredictions
from steps.reporting.pinned import require_pinned

#: Outcomes of more test users stay in runs/: the tree stays small.
MOST_USERS = 30_000
RUNS = "runs.parquet"
HISTORY, HISTORY_CRC = "history.jsonl", "history_crc32"
TEXTS = ("config.json", HISTORY, "metrics.json")
_KEY = {"dataset": pl.String, "model": pl.String, "protocol": pl.String, "seed": pl.UInt32}
RUNS_SCHEMA = _KEY | dict.fromkeys(TEXTS, pl.String) | {HISTORY_CRC: pl.UInt32, "outcomes_sha256": pl.String}
_FORMER = {"ranks_sha256": "outcomes_sha256"}  # a column's name in records of earlier commits
#: Counters become runs of equal differences, and the bytes of others are compressed by their significance.
_ENCODINGS = {"seed": "DELTA_BINARY_PACKED", "user": "DELTA_BINARY_PACKED"}
_ENCODINGS |= {name: "BYTE_STREAM_SPLIT" for kind in KINDS.values() for name in kind.SCHEMA if name not in _ENCODINGS}
_REMEDY = "take it from git again, or record the runs again"


@dataclass(frozen=True)
class Record:
    """One finished run: what it is in the experiment, and the content of its small files.

    texts: these files as they were written; of a recorded run the history is what is kept of it. outcomes: reads them,
    of a recorded ranking run those of its table row; raises StepError where they are not kept. `outcomes_of` takes
    either.
    """

    run: params.Run
    config: dict[str, Any]
    history: list[dict[str, Any]]
    metrics: dict[str, Any]
    texts: dict[str, str]
    outcomes: Callable[[], Outcomes]

    @property
    def task(self) -> str:
        """What the run's protocol evaluates."""
        return task_of(self.config["protocol"])

    @property
    def row(self) -> tuple[str, str, str]:
        """What runs that differ in their seed alone share."""
        return self.run.dataset, self.run.protocol, self.run.model

    def light_texts(self) -> dict[str, str]:
        """`texts` as records have them: the history without the metrics that no report shows epoch by epoch, in two
        fifths of the bytes. Of a trial of a search it is the metrics that are shown, and no more."""
        task = params.load("tasks")[self.task]
        shown = {"epoch", *task["headline"], task["compared"]}
        left_out = set(OF_TASK[self.task]) - shown
        search = is_search(self.run.experiment)

        def is_kept(key: str) -> bool:
            name = key.rpartition("/")[2]
            return name in shown if search else name not in left_out

        lines = [{key: value for key, value in line.items() if is_kept(key)} for line in self.history]
        return self.texts | {HISTORY: "".join(json.dumps(line) + "\n" for line in lines)}

    def curve(self, metric: str) -> dict[int, float]:
        """A metric of the history, such as valid/ndcg@10, by epoch. Raises StepError if the history lacks it."""
        if any(metric not in line for line in self.history):
            raise StepError(
                f"the history of {self.run.path} lacks {metric}; records have what params/tasks.yaml named when they "
                f"were made: read runs/{self.run.experiment}, or record the runs again"
            )
        return {line["epoch"]: line[metric] for line in self.history}


def is_search(experiment: str) -> bool:
    """Whether an experiment's runs are trials to choose among, by metrics alone."""
    return "points" in params.load(f"experiments/{experiment}")


def read_records(experiment: str, folder: Path) -> tuple[list[Record], list[params.Run]]:
    """The finished runs in table order, and the runs that are missing.

    folder: runs/<experiment> or reports/<experiment>/records. Raises StepError if no run is finished, if a run's files
    do not belong together, or if runs of one row differ in more than their seed.
    """
    recorded = recorded_texts(folder)
    found, missing = [], []
    for run in params.runs(experiment):
        if run.path in recorded:
            found.append(_of_record(run, recorded[run.path], folder))
        elif (folder / run.path / "metrics.json").is_file():
            found.append(_of_run(run, folder / run.path))
        else:
            missing.append(run)
    if not found:
        raise StepError(f"{folder} holds no finished run of experiment {experiment}; train and evaluate first")
    require_pinned((record.row, folder / record.run.path, record.config, record.metrics) for record in found)
    return found, missing


def recorded_texts(folder: Path) -> dict[Path, dict[str, Any]]:
    """The rows of a records folder's `runs.parquet` by the run's path; none where there is no such file."""
    if not (folder / RUNS).is_file():
        return {}
    rows = _read(folder / RUNS, RUNS_SCHEMA).iter_rows(named=True)
    with reading(folder / RUNS, _REMEDY):
        return {_path(row): row | {HISTORY: _by_epoch(row[HISTORY])} for row in rows}


def write_records(experiment: str, records: list[Record], folder: Path) -> int:
    """Write the light records of these runs to `folder`, in place of those that it has of the same runs.

    Those of a search have no outcomes: its trials are many, and chosen among by metrics.
    Records of runs that the experiment no longer has are left out; returns how many. Raises StepError, before anything
    is written, if the outcomes of a run cannot be read, or if `folder` has a mean over seeds that are not all given.
    """
    search = is_search(experiment)
    rows = recorded_texts(folder)
    kind = KINDS[records[0].task]
    schema = _schema(kind)
    outcomes = _parts(_read(folder / kind.FILE, schema), kind) if rows else {}
    known = list(params.runs(experiment))
    if not kind.BY_SEED:
        _require_whole_rows(rows, {record.run.path for record in records}, {run.path for run in known}, folder)
    for together in kept_together(records):
        of, part, digest = _part_of(together[0].run, kind), None if search else outcomes_of(together).light(), None
        outcomes.pop(of, None)
        if part is not None and len(part) <= MOST_USERS:
            digest = _outcomes_sha256(part)
            key = [pl.lit(value, dtype).alias(name) for value, (name, dtype) in zip(of, schema.items(), strict=False)]
            outcomes[of] = part.select(*key, *kind.SCHEMA)
        for record in together:
            named = {name: getattr(record.run, name) for name in _KEY}
            texts = record.light_texts()
            digests = {HISTORY_CRC: _crc32(texts[HISTORY]), "outcomes_sha256": digest}
            rows[record.run.path] = named | texts | digests
    runs = [run for run in known if run.path in rows]
    parts = [of for of in dict.fromkeys(_part_of(run, kind) for run in runs) if of in outcomes]
    kept = pl.concat([pl.DataFrame(schema=schema), *(outcomes[of] for of in parts)])
    # What runs say of one user is alike: side by side it takes fewer bytes.
    _write(folder / kind.FILE, kept.sort("dataset", "protocol", "user", maintain_order=True))
    written = [rows[run.path] | {HISTORY: _by_key(rows[run.path][HISTORY])} for run in runs]
    _write(folder / RUNS, pl.DataFrame(written, schema=RUNS_SCHEMA, orient="row"))
    return len(rows) - len(runs)


def kept_together(records: list[Record]) -> list[list[Record]]:
    """The records by what their outcomes are kept for: of retrieval each alone, of ranking the seeds of a row."""
    rows = by_row(records).values()
    return [part for row in rows for part in ([[one] for one in row] if KINDS[row[0].task].BY_SEED else [row])]


def outcomes_of(together: list[Record]) -> Outcomes:
    """What tables are made of, of records that are kept together: the same from runs and from records.

    Raises StepError if seeds of a row had other targets, or if the row's mean is recorded over other seeds too.
    """
    found = [record.outcomes() for record in together]
    of_seeds = [one for one in found if isinstance(one, TestPredictions)]
    if not of_seeds:
        return found[0]
    for record, one in zip(together, of_seeds, strict=True):
        if not one.same_targets(of_seeds[0]):
            raise StepError(
                f"{record.run.path} predicts other targets than {together[0].run.path}; train and evaluate it again"
            )
    seeds = {one.seeds for one in of_seeds}
    if seeds == {1}:
        return TestPredictions.of_row(of_seeds)
    if seeds != {len(of_seeds)}:
        raise StepError(
            f"{together[0].run.path.parent} is recorded as the mean over {max(seeds)} seeds, of which {len(of_seeds)} "
            "are here; put the others into the experiment again, or remove its records and record all runs again"
        )
    return of_seeds[0]


def by_row(records: list[Record]) -> dict[tuple[str, str, str], list[Record]]:
    """Records by (dataset, protocol, model), in table order."""
    rows: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        rows.setdefault(record.row, []).append(record)
    return rows


def labels(records: list[Record]) -> dict[str, str]:
    """The label of every model, by its name."""
    return {model: params.label(model) for model in dict.fromkeys(record.run.model for record in records)}


def mean_and_sd(values: Iterable[float]) -> tuple[float, float | None]:
    """Mean and standard deviation over seeds; no deviation of one seed."""
    numbers = list(values)
    deviation = round(statistics.stdev(numbers), 6) if len(numbers) > 1 else None
    return round(statistics.mean(numbers), 6), deviation


def cell(mean: float, deviation: float | None) -> str:
    """`mean ± deviation` to four digits."""
    return f"{mean:.4f}" + (f" ± {deviation:.4f}" if deviation is not None else "")


def _of_run(run: params.Run, folder: Path) -> Record:
    config, metrics = check_run(folder)
    texts = {name: (folder / name).read_text(encoding="utf-8") for name in TEXTS}
    history = parse_jsonl(texts[HISTORY], str(folder / HISTORY), "train again")

    def outcomes() -> Outcomes:
        path = folder / "outcomes.safetensors"
        with reading(path, "evaluate again"):
            return KINDS[task_of(config["protocol"])].of_run(load_file(path))

    return Record(run, config, history, metrics, texts, outcomes)


def _of_record(run: params.Run, row: dict[str, Any], folder: Path) -> Record:
    texts = {name: row[name] for name in TEXTS}
    where = f"{folder / RUNS}, {run.path}"
    with reading(folder / RUNS, _REMEDY):
        config, metrics = json.loads(texts["config.json"]), json.loads(texts["metrics.json"])
        history = parse_jsonl(texts[HISTORY], where, _REMEDY)
        if metrics.get("config_sha256") != content_sha256(config):
            raise StepError(f"{where}: metrics.json names another config; {_REMEDY}")
        if row[HISTORY_CRC] is None:  # a whole history, as earlier commits have it
            belongs = metrics.get("history_sha256") == hashlib.sha256(texts[HISTORY].encode()).hexdigest()
        else:
            belongs = row[HISTORY_CRC] == _crc32(texts[HISTORY])
        if not belongs:
            raise StepError(f"{where}: the history is another than was recorded; {_REMEDY}")

    def outcomes() -> Outcomes:
        if row["outcomes_sha256"] is None:
            raise StepError(
                f"{where}: records leave out the outcomes of searches, and of more than {MOST_USERS} users; compare "
                f"runs/{run.experiment}"
            )
        kind = KINDS[task_of(config["protocol"])]
        path = folder / kind.FILE
        part = _parts_of(path, path.stat().st_mtime_ns if path.is_file() else 0).get(_part_of(run, kind))
        if part is None or _outcomes_sha256(part.select(*kind.SCHEMA)) != row["outcomes_sha256"]:
            raise StepError(f"{path} has other outcomes of {run.path} than {folder / RUNS} names; {_REMEDY}")
        return kind.of_record(part)

    return Record(run, config, history, metrics, texts, outcomes)


def _path(row: dict[str, Any]) -> Path:
    return params.Run("", row["dataset"], row["model"], row["protocol"], row["seed"]).path


def _require_whole_rows(rows: dict[Path, dict[str, Any]], given: set[Path], known: set[Path], folder: Path) -> None:
    """Raise StepError if what is recorded as one mean (`rows`) is to be replaced, or left out, in part.

    given: the runs to be recorded. known: the runs that the experiment has.
    """
    means: dict[Path, set[Path]] = {}
    for path, row in rows.items():
        if row["outcomes_sha256"] is not None:
            means.setdefault(path.parent, set()).add(path)
    for mean, seeds in means.items():
        others = seeds - given
        stays = others == seeds and (seeds <= known or seeds.isdisjoint(known))
        if others and not stays:
            raise StepError(
                f"{folder} has {mean} as the mean over {_listed(seeds)}, of which {_listed(others)} "
                f"{'is' if len(others) == 1 else 'are'} not among the runs given; give the runs of all its seeds "
                f"together, or remove {folder} and record all runs again"
            )


def _listed(seeds: set[Path]) -> str:
    return ", ".join(sorted((path.name for path in seeds), key=lambda name: (len(name), name)))


def _schema(kind: Kind) -> dict[str, Any]:
    """The columns of what is kept of a kind's outcomes: those that name the run, or the row, come first."""
    return {name: dtype for name, dtype in _KEY.items() if kind.BY_SEED or name != "seed"} | kind.SCHEMA


def _part_of(run: params.Run, kind: Kind) -> tuple[Any, ...]:
    """The values of those first columns for a run."""
    return tuple(getattr(run, name) for name in _schema(kind) if name in _KEY)


def _parts(outcomes: pl.DataFrame, kind: Kind) -> dict[tuple[Any, ...], pl.DataFrame]:
    """The rows of each run or table row, by `_part_of`."""
    key = [name for name in _schema(kind) if name in _KEY]
    return outcomes.partition_by(key, as_dict=True, maintain_order=True)


@cache
def _parts_of(path: Path, modified: int) -> dict[tuple[Any, ...], pl.DataFrame]:
    """`_parts` of a file; read once, unless it was `modified` (ns) meanwhile."""
    (kind,) = (kind for kind in KINDS.values() if path.name == kind.FILE)
    return _parts(_read(path, _schema(kind)), kind)


def _outcomes_sha256(part: pl.DataFrame) -> str:
    """Of the columns of a run or table row, as little-endian int64 or float32."""
    digest = hashlib.sha256()
    for column in part:
        digest.update(column.to_numpy().astype("<f4" if column.dtype == pl.Float32 else "<i8").data)
    return digest.hexdigest()


def _crc32(text: str) -> int:
    return zlib.crc32(text.encode())


def _by_key(lines: str) -> str:
    """JSON lines as one object of lists: compressed, four fifths of the bytes. As they are, if they would not come back
    the same."""
    found = [json.loads(line) for line in lines.splitlines()]
    lists = json.dumps({key: [line.get(key) for line in found] for key in (found[0] if found else {})})
    return lists if _by_epoch(lists) == lines else lines


def _by_epoch(text: str) -> str:
    """The JSON lines of which `_by_key` made the text."""
    if not text or text.endswith("\n"):
        return text
    lists = json.loads(text)
    lines = zip(*lists.values(), strict=True)
    return "".join(json.dumps(dict(zip(lists, line, strict=True))) + "\n" for line in lines)


def _read(path: Path, schema: dict[str, Any]) -> pl.DataFrame:
    with reading(path, _REMEDY):
        found = pl.read_parquet(path).rename(_FORMER, strict=False)
        if path.name == TestPredictions.FILE and "seed" in found.columns:
            raise StepError(
                f"{path} has a row a seed, as earlier commits have it; take {path.parent} from a later commit, or "
                "remove it and record all runs again"
            )
        if path.name == RUNS and HISTORY_CRC not in found.columns:
            found = found.with_columns(pl.lit(None, pl.UInt32).alias(HISTORY_CRC))
        if dict(found.schema) != schema:
            raise StepError(f"{path} has columns {dict(found.schema)}, and not {schema}; {_REMEDY}")
    return found


def _write(path: Path, table: pl.DataFrame) -> None:
    """As Parquet, compressed as far as Brotli goes: written once, read seldom, kept in git for ever."""
    encodings = {name: kind for name, kind in _ENCODINGS.items() if name in table.columns}
    with atomic_path(path) as temporary:
        pq.write_table(
            table.to_arrow(compat_level=pl.CompatLevel.oldest()),
            temporary,
            compression="brotli",
            compression_level=11,
            use_dictionary=[name for name in table.columns if name not in encodings],
            column_encoding=encodings,
            write_statistics=False,
            # One page a column: each is compressed alone.
            data_page_size=2**30,
            max_rows_per_page=2**30,
        )
