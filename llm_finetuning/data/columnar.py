"""Opens what holds its data in columns: a parquet file, an arrow file or stream, a folder of Dataset.save_to_disk."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from llm_finetuning.data.containers import ARROW_FILE, PARQUET, open_content

ROWS = 8192
Batches = Callable[..., Iterator[pa.RecordBatch]]


def open_columns(path: Path) -> tuple[list[str], Batches]:
    """Returns (names of the columns, batches(columns=None) → record batches); raises ValueError if it is damaged."""
    if path.is_dir():
        return _saved_dataset(path)
    stream, compressed = open_content(path)
    with stream:
        magic = stream.peek(8)[:8]
        source = pa.BufferReader(stream.read()) if compressed else None
    if magic.startswith(PARQUET):
        with _named("a complete parquet file", path):
            file = pq.ParquetFile(source or path)
            return file.schema_arrow.names, lambda columns=None: file.iter_batches(ROWS, columns=columns)
    with _named("a complete arrow file", path):
        source = source or pa.memory_map(str(path))
        is_file = magic.startswith(ARROW_FILE)
        reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
        batches = (reader.get_batch(n) for n in range(reader.num_record_batches)) if is_file else iter(reader)
    return reader.schema.names, lambda columns=None: (_sound(batch, columns) for batch in batches)


def _sound(batch: pa.RecordBatch, columns: list[str] | None) -> pa.RecordBatch:
    """Returns these columns. Raises pa.ArrowInvalid where offsets lead out of the file: reading does not check them."""
    batch = batch.select(columns or batch.schema.names)
    batch.validate(full=True)
    return batch


def _saved_dataset(path: Path) -> tuple[list[str], Batches]:
    """Opens a folder of `Dataset.save_to_disk` with `datasets`, which knows selections and the order of rows in it."""
    from datasets import load_from_disk

    with _named("a complete folder of Dataset.save_to_disk", path):
        dataset = load_from_disk(str(path)).with_format("arrow")

    def batches(columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
        for table in (dataset.select_columns(columns) if columns else dataset).iter(ROWS):
            yield from (_sound(batch, columns) for batch in table.combine_chunks().to_batches())

    return dataset.column_names, batches


@contextmanager
def _named(what: str, path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not {what} ({error}). Download or copy it again.") from error


@contextmanager
def named_damage(path: Path, done: list[int]) -> Iterator[None]:
    """Turns what pyarrow raises while it reads into a ValueError; done[0] = the rows read before."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise ValueError(f"{path}, after row {done[0]}: damaged ({error}). Download or copy it again.") from error
