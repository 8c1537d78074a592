"""Raw tables, block by block, as texts with the row of each: delimited text, JSON lines and Parquet.

A block is small, so that a file of any size is read in little memory. What a file may hold of it is checked here: its
encoding, its first line, and the number of fields of every line. What the values mean is checked later.
"""

import json
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import polars as pl

from steps.common.cli import StepError
from steps.common.files import reading
from steps.data.blocks import SHOWN, Block, named_columns, wanted_columns
from steps.data.delimited import text_blocks
from steps.data.records import LINE_END, as_utf8, count, records

T = TypeVar("T")

#: Bytes of text that are parsed at once, and rows of Parquet.
BLOCK_BYTES, BLOCK_ROWS = 1 << 24, 1 << 20
_THREADS = 2
_TEXTS = (pl.Binary, pl.Categorical, pl.Enum)  # types of Parquet's columns that hold texts too
#: JSON's escape of the first half of a character, without its second, which polars reads as another character.
_HALF_CHARACTER = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])")


def read_blocks(
    folder: Path, table: Mapping[str, Any], then: Callable[[Block], T], block_bytes: int = BLOCK_BYTES
) -> Iterator[T]:
    """What `then` makes of the blocks of a file, in the file's order.

    folder, table: the file, and an entry `files.<table>` of params/datasets.yaml that describes it. Two threads parse,
    and call `then`. Raises StepError with file and line if the file cannot be read, or is not what the entry says.
    """
    path = folder / table["path"]
    kind = table.get("format", "text")
    blocks = {"text": text_blocks, "jsonl": _json_blocks, "parquet": _parquet_blocks}[kind](path, table, block_bytes)
    empty = True
    with reading(path, "params/datasets.yaml names it"):
        try:
            for made in _in_threads(blocks, then):
                empty = False
                yield made
        except pl.exceptions.PanicException as error:  # of damaged Parquet; it is no Exception
            raise StepError(f"{path} is damaged ({error}); fetch it again") from error
    if empty:
        raise StepError(f"{path} has no rows")


def _in_threads(blocks: Iterator[Callable[[], Block]], then: Callable[[Block], T]) -> Iterator[T]:
    """What `then` makes of each block, in order. What is wrong in a block is raised before what is wrong behind it."""
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(_THREADS) as threads:
        while True:
            try:
                parse = next(blocks, None)
            except StepError:
                for earlier in waiting:
                    earlier.result()
                raise
            if parse is None:
                break
            waiting.append(threads.submit(lambda parse=parse: then(parse())))  # type: ignore[misc]
            if len(waiting) > _THREADS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def read_table(folder: Path, table: Mapping[str, Any]) -> Block:
    """All rows of a table at once: of an items or a users file, which are small."""
    blocks = list(read_blocks(folder, table, lambda block: block))
    malformed = [line for block in blocks for line in block.malformed]
    return Block(pl.concat([block.frame for block in blocks], how="vertical"), malformed)


# JSON lines and Parquet


def _json_blocks(path: Path, table: Mapping[str, Any], block_bytes: int) -> Iterator[Callable[[], Block]]:
    columns = named_columns(table)
    keys = {name: str(there or name) for name, there in columns.items() if name in wanted_columns(table)}
    line = 1
    for content in records(path, block_bytes, quote=None):
        content = as_utf8(content, "utf-8", path, line)
        num_lines = count(content, LINE_END)
        yield partial(_parsed_json, content, num_lines, keys, line, path)
        line += num_lines


def _parsed_json(content: bytes, num_lines: int, keys: dict[str, str], first: int, path: Path) -> Block:
    try:
        frame = pl.read_ndjson(content, schema=dict.fromkeys(keys.values(), pl.String))
    except pl.exceptions.PolarsError:
        frame = pl.DataFrame()
    if len(frame) != num_lines or _HALF_CHARACTER.search(content):
        _check_json(content, path, first)
    if len(frame) != num_lines:
        raise StepError(f"{path}: lines from {first} on cannot be read as JSON; write one object a line")
    if first == 1:
        _check_keys(content, keys, path)
    rows = pl.int_range(first, first + num_lines, eager=True).cast(pl.UInt32).alias("row")
    return Block(_present([rows, *(frame[key].alias(name) for name, key in keys.items())]), [])


def _present(columns: list[pl.Series]) -> pl.DataFrame:
    """A frame of the columns, in which empty texts are missing."""
    return pl.DataFrame(columns).with_columns(pl.when(pl.col(pl.String) != "").then(pl.col(pl.String)))


def _check_json(content: bytes, path: Path, first: int) -> None:
    """Raise StepError that names the first line which is no JSON object, or has half a character."""
    for line, text in enumerate(content.decode().split("\n")[:-1], first):
        try:
            found = json.loads(text)
            json.dumps(found, ensure_ascii=False).encode()
            if isinstance(found, dict) and len(pl.read_ndjson(text.encode(), schema={"": pl.String})) == 1:
                continue
            problem = "is no JSON object"
        except (ValueError, pl.exceptions.PolarsError) as error:
            problem = "is empty" if not text.strip() else f"is not JSON ({error})"
        raise StepError(f"{path}, line {line}: {problem}; write one object a line")


def _check_keys(content: bytes, keys: dict[str, str], path: Path) -> None:
    """A key that the first object lacks is misspelt in the entry, rather than missing in every line."""
    there = json.loads(content.partition(LINE_END)[0])
    for name, key in keys.items():
        if key not in there:
            known = ", ".join(there)[:SHOWN]
            raise StepError(f"{path}, line 1: has no key {key!r}, from which `columns` takes {name}; it has {known}")


def _parquet_blocks(path: Path, table: Mapping[str, Any], block_bytes: int) -> Iterator[Callable[[], Block]]:
    columns = named_columns(table)
    wanted = {name: str(there or name) for name, there in columns.items() if name in wanted_columns(table)}
    with reading(path, "is it a Parquet file?"):
        schema = pl.read_parquet_schema(path)
    for name, there in wanted.items():
        if there not in schema:
            known = ", ".join(schema)[:SHOWN]
            raise StepError(f"{path} has no column {there!r}, from which `columns` takes {name}; it has {known}")
        if schema[there].is_nested():
            raise StepError(f"{path}: column {there!r} is {schema[there]}; a column has one value a row")
    num_rows = int(pl.scan_parquet(path).select(pl.len()).collect().item())
    texts = {there for there, kind in schema.items() if kind in _TEXTS}
    for start in range(0, num_rows, BLOCK_ROWS):
        yield partial(_parsed_parquet, path, wanted, texts, start)


def _parsed_parquet(path: Path, wanted: dict[str, str], texts: set[str], start: int) -> Block:
    selected = pl.scan_parquet(path).select(
        (pl.col(there).cast(pl.String) if there in texts else pl.col(there)).alias(name)
        for name, there in wanted.items()
    )
    frame = selected.slice(start, BLOCK_ROWS).collect()
    rows = pl.int_range(start + 1, start + 1 + len(frame), eager=True).cast(pl.UInt32).alias("row")
    return Block(_present([rows, *frame.get_columns()]), [])
