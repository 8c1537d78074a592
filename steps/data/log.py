"""A log of interactions on disk: written block by block, and read as a lazy frame, whatever its size."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq

#: Rows that are in memory at once where a log goes from one file to another.
ROWS_AT_ONCE = 1 << 20
_THREAD = ThreadPoolExecutor(1)
_SEED_OF_USERS, _SEED_OF_ITEMS = 1, 2


class Writer:
    """Writes rows into one Parquet file, a row group a block.

    Ids may be numbers in some blocks and texts in others; then all of them become texts, in `close`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: pq.ParquetWriter | None = None
        self._parts: list[Path] = []
        self._schema: pl.Schema | None = None
        self._pending: Future[None] | None = None

    def write(self, frame: pl.DataFrame) -> None:
        """Append the rows of a frame, in a thread of its own; what went wrong with the frame before is raised."""
        self._end()
        self._pending = _THREAD.submit(self._append, frame)

    def _end(self) -> None:
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def _append(self, frame: pl.DataFrame) -> None:
        if self._file is None or frame.schema != self._schema:
            self.begin(frame)
        self._writer.write_table(frame.to_arrow())

    def close(self) -> pl.LazyFrame:
        """End the file, and read it as a lazy frame."""
        self._end()
        if self._file is not None:
            self._file.close()
        if len(self._parts) > 1:
            parts = self._parts
            schemas = [pl.read_parquet_schema(part) for part in parts]
            texts = [name for name in ("user", "item") if any(schema[name] == pl.String for schema in schemas)]
            self._file, self._schema, self._parts = None, None, []
            whole = self.path.with_name(f"{self.path.name}.whole")
            final = Writer(whole)
            for part in parts:
                for frame in batches(pl.scan_parquet(part)):
                    final.write(frame.cast(dict.fromkeys(texts, pl.String)))
                part.unlink()
            final.close()
            whole.rename(self.path)
        elif self._parts:
            self._parts[0].rename(self.path)
        return pl.scan_parquet(self.path)

    @property
    def _writer(self) -> pq.ParquetWriter:
        assert self._file is not None  # noqa: S101
        return self._file

    def begin(self, frame: pl.DataFrame) -> None:
        """Begin a file for rows of the frame's columns."""
        if self._file is not None:
            self._file.close()
        self._parts.append(self.path.with_name(f"{self.path.name}.{len(self._parts)}"))
        self._schema = frame.schema
        # A dictionary and statistics cost time, and say little of ids and times.
        self._file = pq.ParquetWriter(
            self._parts[-1], frame.to_arrow().schema, compression="lz4", use_dictionary=False, write_statistics=False
        )


def batches(log: pl.LazyFrame, rows: int = ROWS_AT_ONCE) -> Any:
    """A log's rows, in order, as frames of about `rows` rows; memory holds a few of them."""
    return log.collect_batches(chunk_size=rows, maintain_order=True)


class Store:
    """The one log in a folder, whatever is made of it: each takes the place of the one before."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        self.path = folder / "log-0.parquet"

    def __call__(self, log: pl.LazyFrame) -> pl.LazyFrame:
        """Write a lazy log, which may read the one before, and read it from its file."""
        writer = self.writer()
        writer.begin(log.collect_schema().to_frame())  # as there may be no rows
        for frame in batches(log):
            writer.write(frame)
        return self.opened(writer)

    def writer(self) -> Writer:
        """A writer of the next log."""
        return Writer(self._folder / f"log-{self._count + 1}.parquet")

    def opened(self, writer: Writer) -> pl.LazyFrame:
        """The log of a writer, closed. The one before is deleted."""
        self.path.unlink(missing_ok=True)
        self._count += 1
        self.path = self._folder / f"log-{self._count}.parquet"
        return writer.close()


def repeats(log: pl.LazyFrame, num_rows: int) -> pl.LazyFrame:
    """The rows whose user had their item in an earlier row of the file: `row`, user, item.

    Pairs are packed into 8 bytes each and sorted; only those that look alike are compared as they are.
    """
    keys = np.empty(num_rows, dtype=np.uint64)
    start = 0
    pair = pl.col("user").hash(_SEED_OF_USERS) ^ pl.col("item").hash(_SEED_OF_ITEMS)
    for frame in batches(log.select(pair.alias("pair"))):
        keys[start : start + len(frame)] = frame["pair"].to_numpy()
        start += len(frame)
    keys.sort()
    alike = pl.Series("pair", np.unique(keys[1:][keys[1:] == keys[:-1]]))
    suspects = log.select("row", "user", "item").filter(pair.is_in(alike.implode()))
    return suspects.sort("row").filter(pl.struct("user", "item").is_first_distinct().not_())
