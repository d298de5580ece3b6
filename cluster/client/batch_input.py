"""What a batch is read from: JSON Lines, also compressed by gzip, and Parquet; files, globs, pipes and standard input;
and rows in memory. Each can be read as often as asked. What a record means is batch_rows.py's."""

from __future__ import annotations

import glob
import gzip
import json
import os
import shutil
import stat
import sys
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import IO, Any, Protocol, cast

from isotherm.cluster.client.errors import BatchError

MAX_LINE_BYTES = 64 << 20  # no server takes a body as large; a file without line ends is not read into memory whole
STANDARD_INPUT = "-"
_BOM = b"\xef\xbb\xbf"
_PARQUET_ROWS = 64  # decoded at once


class Kind(Enum):
    ROW = "a value"
    BLANK = "a line with nothing in it"
    UNREADABLE = "a line that is no JSON"
    TORN = "the end of a file that is not all there"


@dataclass(frozen=True)
class Record:
    """One line, or one row of a table. `place` is where it stands, as in.jsonl:7; `problem` says why it cannot be
    read."""

    place: str
    kind: Kind
    value: Any = None
    problem: str = ""


class Source(Protocol):
    """What has records."""

    def records(self) -> Iterator[Record]:
        """From the first one, each time. Raises BatchError, OSError."""


class MemorySource:
    """Rows that are there already: texts (a chat's one user message), or mappings as a file would have them."""

    def __init__(self, rows: Iterable[Any]) -> None:
        self._rows = list(rows)

    def records(self) -> Iterator[Record]:
        for number, row in enumerate(self._rows):
            value = {"messages": [{"role": "user", "content": row}]} if isinstance(row, str) else row
            yield Record(f"row-{number}", Kind.ROW, value)


@contextmanager
def opened(inputs: str | Path | Sequence[str | Path], output: Path) -> Iterator[FileSource]:
    """All files that are named, by paths, globs or `-`, one after the other; what cannot be read twice is copied to a
    temporary file. Raises BatchError, OSError."""
    with ExitStack() as stack:
        yield FileSource([(name, stack.enter_context(_readable(path))) for path, name in _named(inputs, output)])


def check_there(inputs: str | Path | Sequence[str | Path], output: Path) -> None:
    """Raises BatchError or OSError where a file that is named cannot be opened; reads nothing."""
    for path, _ in _named(inputs, output):
        if path != STANDARD_INPUT and stat.S_ISREG(os.stat(path).st_mode):
            open(path, "rb").close()


class FileSource:
    """Open files with the names that their records have."""

    def __init__(self, files: Sequence[tuple[str, IO[bytes]]]) -> None:
        self._files = files

    def records(self) -> Iterator[Record]:
        for name, file in self._files:
            file.seek(0)
            begin = file.read(4)
            file.seek(0)
            if begin == b"PAR1":
                yield from _table(file, name)
            elif begin[:2] == b"\x1f\x8b":
                yield from _lines(cast("IO[bytes]", gzip.GzipFile(fileobj=file)), name)
            elif begin[:2] in (b"\xff\xfe", b"\xfe\xff"):
                raise BatchError(f"{name}: is UTF-16; JSON Lines are UTF-8")
            else:
                yield from _lines(file, name)


def _named(inputs: str | Path | Sequence[str | Path], output: Path) -> list[tuple[str, str]]:
    """(path, name) of every file, once each. Names are those of the files, with their folders where that is needed to
    tell them apart."""
    paths: dict[str, str] = {}  # by what they really are
    for given in [inputs] if isinstance(inputs, str | Path) else inputs:
        for path in _expanded(str(given), output):
            paths.setdefault(os.path.realpath(path), path)
    if output.exists() and (same := paths.get(os.path.realpath(output))) is not None:
        raise BatchError(f"{same}: is the output too; give another file for the results")
    names = [os.path.basename(path) for path in paths.values()]
    return [(path, name if names.count(name) == 1 else path) for path, name in zip(paths.values(), names, strict=True)]


def _expanded(given: str, output: Path) -> list[str]:
    """The files of a glob, sorted; the results of an earlier run are none of them."""
    if given == STANDARD_INPUT or os.path.exists(given) or not glob.has_magic(given):
        return [given]
    found = sorted(path for path in glob.glob(given, recursive=True) if not os.path.isdir(path))
    if not (found := [path for path in found if os.path.realpath(path) != os.path.realpath(output)]):
        raise BatchError(f"{given}: matches no file")
    return found


@contextmanager
def _readable(path: str) -> Iterator[IO[bytes]]:
    """The file, to be read more than once."""
    with ExitStack() as stack:
        file: IO[bytes] = sys.stdin.buffer if path == STANDARD_INPUT else stack.enter_context(open(path, "rb"))
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            copy = stack.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(file, copy)
            file = copy
        yield file


def _lines(file: IO[bytes], name: str) -> Iterator[Record]:
    number = 0
    try:
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if number == 1:
                line = line.removeprefix(_BOM)
            if len(line) > MAX_LINE_BYTES:
                _skip_line(file, line)
                problem = f"the line has more than {MAX_LINE_BYTES >> 20} MiB"
                yield Record(f"{name}:{number}", Kind.UNREADABLE, problem=problem)
            else:
                yield _line(line, f"{name}:{number}")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        yield Record(f"{name}:{number + 1}", Kind.TORN, problem=f"gzip: {error}")


def _line(line: bytes, place: str) -> Record:
    if not line.strip():
        return Record(place, Kind.BLANK)
    try:
        return Record(place, Kind.ROW, json.loads(line.decode("utf-8")))
    except (ValueError, RecursionError) as error:
        # Whoever writes a file ends each line; one that was killed, or still writes, has not ended its last.
        kind = Kind.UNREADABLE if line.endswith(b"\n") else Kind.TORN
        return Record(place, kind, problem=f"not JSON: {error}")


def _skip_line(file: IO[bytes], part: bytes) -> None:
    while part and not part.endswith(b"\n"):
        part = file.readline(MAX_LINE_BYTES)


def _table(file: IO[bytes], name: str) -> Iterator[Record]:
    """Rows of a Parquet file. Cells without a value are fields that are not there."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise BatchError(
            f"{name}: reading Parquet needs pyarrow; install it with: pip install 'isotherm[batch]'"
        ) from None
    number = 0
    try:
        for batch in ParquetFile(file).iter_batches(_PARQUET_ROWS):
            for row in batch.to_pylist():
                number += 1
                yield Record(f"{name}:{number}", Kind.ROW, _without_none(row))
    except ArrowException as error:
        raise BatchError(f"{name}: cannot be read as Parquet: {error}") from None


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(one) for key, one in value.items() if one is not None}
    return [_without_none(one) for one in value] if isinstance(value, list) else value
