"""The columns of a table (CSV, TSV or Parquet), read in one pass: cells to numbers, times, and what is said of each video.

A table comes in chunks of rows; each column that is wanted takes its cells from them and keeps numbers, not objects. Faults
name the file, the line and the column.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import itertools
import math
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..extras import require
from ..files import one_line

MISSING = frozenset({"", "nan", "na", "n/a", "null", "none", "-", "<na>"})  # in lower case
NAMELESS = frozenset({"", "nan", "null", "<na>"})  # of a video, group or split: "none" may be a group's name
_MOST_FLOAT = float(np.finfo(np.float32).max)
_CHUNK = 1 << 16  # cells that are text at once
_ISO = re.compile(
    r"(\d{4}-\d\d-\d\d)(?:[T ](\d\d:\d\d)(?::(\d\d)(?:[.,](\d{1,9}))?)?)?\s*(Z|z|[+-]\d\d(?::?\d\d)?)?", re.ASCII
)
_DECIMAL_COMMA = re.compile(r"\s*[+-]?\d*,\d+(?:[eE][+-]?\d+)?\s*", re.ASCII)


def counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def first_few(names: Sequence[str], most: int) -> str:
    first = ", ".join(map(shown, names[:most]))
    return first if len(names) <= most else f"{first} and {len(names) - most:,} more"


def shown(name: str) -> str:
    """The name of a column, for a sentence of one line."""
    plain = name.isprintable() and name == name.strip() and name
    return name if plain and len(name) <= 60 else repr(name[:57] + "..." if len(name) > 60 else name)


# -------------------------------------------------------------------------------------------------------- the table read
class Fault(ValueError):
    """A cell that is not what its column is for: where in its chunk, what was expected, what came."""

    def __init__(self, index: int, expected: str, cell: object) -> None:
        text = str(cell).strip()
        super().__init__(f"expected {expected}, got {text[:57] + '...' if len(text) > 60 else text!r}")
        self.index = index


class Chunk(Protocol):
    """Some rows of the table, by the numbers of its columns."""

    @property
    def lines(self) -> Sequence[int]: ...  # where each row stands
    def __len__(self) -> int: ...
    def text(self, column: int) -> Sequence[str]: ...
    def numbers(self, column: int) -> np.ndarray | None: ...  # float64, NaN where missing; None: the column is text


class Source(Protocol):
    path: Path
    names: list[str]  # of its columns
    decimal_comma: bool  # a number with a comma in it is likely one of these

    def chunks(self) -> Iterator[Chunk]: ...
    def where(self, line: int) -> str: ...


def open_table(path: Path) -> Source:
    with open(path, "rb") as file:
        magic = file.read(4)
    if not magic:
        raise ValueError(f"{path}:1: expected a header and rows, got an empty file")
    if magic == b"PAR1":
        return _Parquet(path)
    for begin, what in ((b"PK", "a ZIP archive, as spreadsheets are"), (b"\x1f\x8b", "a gzip archive")):
        if magic.startswith(begin):
            raise ValueError(f"{path}: expected a table as CSV, TSV or Parquet, got {what}: save or unpack it as one")
    if magic.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(f"{path}:1: expected text in UTF-8, got UTF-16: save it as UTF-8")
    return _Csv(path)


class _Csv:
    """Text with a header; the delimiter is the one of `,`, `;` and tab that splits the header into the most columns."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, encoding="utf-8-sig", newline="") as file, _in_utf8(path):
            first = next((text for text in file if text.strip()), "")
        try:
            fields = {mark: len(next(csv.reader([first], delimiter=mark), [])) for mark in ",;\t"}
        except csv.Error as error:  # a name of more than 131,072 characters
            raise ValueError(
                f"{path}:1: expected a header with the names of the columns, got text that is none: {error}"
            ) from None
        self.delimiter = max(fields, key=fields.__getitem__)
        self.decimal_comma = self.delimiter != ","
        self.names = [name.strip() for name in next(self._records(), (1, []))[1]]
        if not any(self.names):
            raise ValueError(f"{path}:1: expected a header with the names of the columns, got a line without any")
        if all(_is_number(name) for name in self.names):
            raise ValueError(
                f"{path}:1: expected a header with the names of the columns, got numbers: {first.strip()[:60]!r}"
            )
        _check_different(self.names, f"{path}:1")

    def where(self, line: int) -> str:
        return f"{self.path}:{line}"

    def chunks(self) -> Iterator[Chunk]:
        width, most = len(self.names), min(max(_CHUNK // len(self.names), 1), 256)
        rows, lines, records = list[list[str]](), list[int](), self._records()
        next(records)
        for line, row in records:
            if len(row) != width:
                hint = ": is a comma in a number, or in text without quotes?" if len(row) > width else ""
                wanted = f"{counted(width, 'cell')}, as in the header"
                raise ValueError(f"{self.path}:{line}: expected {wanted}, got {len(row)}{hint}")
            rows.append(row)
            lines.append(line)
            if len(rows) == most:
                yield _TextChunk(rows, lines)
                rows, lines = [], []
        if rows:
            yield _TextChunk(rows, lines)

    def _records(self) -> Iterator[tuple[int, list[str]]]:
        """(line, cells) of each record but blank lines; the line is that of its end."""
        line, begun, mark = 0, 0, self.delimiter

        def count(file: Iterable[str]) -> Iterator[str]:
            nonlocal line
            for line, text in enumerate(file, start=1):  # noqa: B007  (the number is what is wanted)
                yield text

        with open(self.path, encoding="utf-8-sig", newline="") as file, _in_utf8(self.path):
            texts = count(file)
            try:
                for text in texts:
                    begun = line
                    if '"' in text:
                        row = next(csv.reader(itertools.chain((text,), texts), delimiter=mark, strict=True))
                    else:  # four times as fast
                        row = text.rstrip("\r\n").split(mark)
                    if row and row != [""]:
                        yield line, row
            except csv.Error as error:
                raise ValueError(f"{self.path}:{begun}: expected CSV, got what is none from here on: {error}") from None


@contextlib.contextmanager
def _in_utf8(path: Path) -> Iterator[None]:
    """For a block that reads text: names the line of what is not UTF-8."""
    try:
        yield
    except UnicodeDecodeError:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    line.decode("utf-8-sig")
                except UnicodeDecodeError as fault:
                    byte = fault.object[fault.start]
                    raise ValueError(f"{path}:{number}: expected text in UTF-8, got the byte {byte:#04x}") from None
        raise


class _TextChunk:
    def __init__(self, rows: list[list[str]], lines: list[int]) -> None:
        self.lines, self._columns = lines, list(zip(*rows))

    def __len__(self) -> int:
        return len(self.lines)

    def text(self, column: int) -> Sequence[str]:
        return self._columns[column]

    def numbers(self, column: int) -> np.ndarray | None:
        return None


class _Parquet:
    decimal_comma = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self._arrow = require("pyarrow", "parquet")
        parquet = require("pyarrow.parquet", "parquet")
        with self._reading():
            self._file = parquet.ParquetFile(path, buffer_size=1 << 16, pre_buffer=False)  # not whole groups
            self.names = [str(name) for name in self._file.schema_arrow.names]
        _check_different(self.names, str(path))

    def where(self, line: int) -> str:
        return f"{self.path}: row {line}"

    def chunks(self) -> Iterator[Chunk]:
        first = 1
        with self._reading():
            for batch in self._file.iter_batches(batch_size=min(max(_CHUNK // max(len(self.names), 1), 1), 1 << 16)):
                if len(batch):
                    yield _ArrowChunk(self._arrow, batch, first)
                first += len(batch)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Names the file in what pyarrow raises of a damaged one."""
        try:
            yield
        except (self._arrow.lib.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # of the operating system; "Couldn't deserialize thrift" has no number
            why = one_line(error, 200)
            raise ValueError(f"{self.path}: expected a Parquet file, got one that cannot be read: {why}") from None


class _ArrowChunk:
    def __init__(self, arrow: Any, batch: Any, first: int) -> None:
        self.lines, self._arrow, self._batch = range(first, first + len(batch)), arrow, batch

    def __len__(self) -> int:
        return len(self.lines)

    def text(self, column: int) -> Sequence[str]:
        types, values = self._arrow.types, self._batch.column(column)
        if types.is_dictionary(values.type):
            values = values.dictionary_decode()
        if types.is_timestamp(values.type):  # nanoseconds would need pandas
            values = values.cast(self._arrow.timestamp("us", values.type.tz), safe=False)
        return [_text(value) for value in values.to_pylist()]

    def numbers(self, column: int) -> np.ndarray | None:
        types, values = self._arrow.types, self._batch.column(column)
        if types.is_dictionary(values.type):
            values = values.dictionary_decode()
        kind = values.type
        if not (types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind) or types.is_decimal(kind)):
            return None
        if not types.is_floating(kind) or types.is_float16(kind):
            if types.is_boolean(kind):
                values = values.cast(self._arrow.uint8())
            values = values.cast(self._arrow.float32() if types.is_float16(kind) else self._arrow.float64(), safe=False)
        return values.to_numpy(zero_copy_only=False).astype(np.float64, copy=False)


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return str(int(value))  # 1.0, as whole numbers become where one is missing
    return str(value)


def _check_different(names: Sequence[str], where: str) -> None:
    first: dict[str, int] = {}
    for number, name in enumerate(names, start=1):
        if name and first.setdefault(name, number) != number:
            raise ValueError(
                f"{where}: expected columns of different names, got {shown(name)} twice, columns {first[name]} and {number}"
            )


def _is_number(text: str) -> bool:
    with contextlib.suppress(ValueError):
        _number(text)
        return True
    return False


# ----------------------------------------------------------------------------------------------------- cells to numbers
def _number(cell: str) -> float:
    """NaN where the cell says that there is none."""
    try:
        if "_" not in cell:
            return float(cell)
    except ValueError:
        if cell.strip().lower() in MISSING:
            return math.nan
    raise ValueError(cell)


def _numbers(cells: Sequence[str], decimal_comma: bool) -> np.ndarray:
    """float64, NaN where missing. Fault for a cell that is neither."""
    try:
        if "" in cells:
            values = np.array([float(cell) if cell else math.nan for cell in cells])
        else:
            values = np.fromiter(map(float, cells), np.float64, len(cells))
    except ValueError:
        for index, cell in enumerate(cells):
            if not _is_number(cell):
                raise Fault(index, _expected(cell, decimal_comma), cell) from None
        values = np.fromiter(map(_number, cells), np.float64, len(cells))
    if "_" in "".join(cells):  # Python reads 1_000
        index = next(index for index, cell in enumerate(cells) if "_" in cell)
        raise Fault(index, "a number", cells[index])
    return values


def _expected(cell: str, decimal_comma: bool) -> str:
    if decimal_comma and _DECIMAL_COMMA.fullmatch(cell):
        return "a number with a decimal point (a decimal comma is not read: write the table with points)"
    return "a number, or nothing (an empty cell, NaN, NA, null, None or -)"


def _seconds(cell: str) -> tuple[float, bool]:
    """Of an ISO 8601 date-time: seconds since 1970, and whether it names its offset from UTC."""
    text = cell.strip()
    match = _ISO.fullmatch(text)
    if match is None:
        raise ValueError(cell)
    day, minute, second, fraction, zone = match.groups()
    clock = f"{minute or '00:00'}:{second or '00'}.{(fraction or '0')[:6].ljust(6, '0')}"
    if zone is not None:
        zone = "+00:00" if zone in "Zz" else zone if len(zone) == 6 else f"{zone[:3]}:{zone[3:] or '00'}"
    moment = datetime.fromisoformat(f"{day}T{clock}{zone or ''}")
    begin = datetime(1970, 1, 1, tzinfo=None if zone is None else timezone.utc)
    return (moment - begin) / timedelta(seconds=1), zone is not None


# ------------------------------------------------------------------------------------------------------ columns that fill
class Numbers:
    """A column of numbers that grows chunk by chunk. `strict`: a cell that is no number is an error; else the column is
    text if its first cell that is not missing is none, and everything after that first cell an error."""

    def __init__(self, source: Source, column: int, code: str, strict: bool) -> None:
        self.source, self.column, self.name, self.strict = source, column, source.names[column], strict
        self.data, self.found, self.is_text = array(code), False, False

    def add(self, chunk: Chunk) -> None:
        if self.is_text:
            return
        values = chunk.numbers(self.column)
        try:
            if values is None:
                cells = chunk.text(self.column)
                if not (self.found or self.strict):
                    first = next((cell for cell in cells if cell.strip().lower() not in MISSING), None)
                    comma = first is not None and self.source.decimal_comma and _DECIMAL_COMMA.fullmatch(first)
                    if first is not None and not (_is_number(first) or comma):
                        self.is_text, self.data = True, array(self.data.typecode)
                        return
                values = _numbers(cells, self.source.decimal_comma)
            self._check(values)
        except Fault as fault:
            raise ValueError(f"{self.source.where(chunk.lines[fault.index])}: {shown(self.name)}: {fault}") from None
        self.found = self.found or not bool(np.isnan(values).all())
        self.data.frombytes(values.astype(self.data.typecode).tobytes())

    def _check(self, values: np.ndarray) -> None:
        most = _MOST_FLOAT if self.data.typecode == "f" else math.inf
        with np.errstate(invalid="ignore"):
            beyond = np.abs(values) > most if most < math.inf else np.isinf(values)
        if beyond.any():
            index = int(np.argmax(beyond))
            expected = "a finite number" if np.isinf(values[index]) else "a number of at most 3.4e38, as float32 holds"
            raise Fault(index, expected, values[index])

    @property
    def values(self) -> np.ndarray:
        return np.frombuffer(self.data, np.dtype(self.data.typecode))


class Times(Numbers):
    """Seconds as numbers, or date-times: what the first cell is, all are. Never missing."""

    def __init__(self, source: Source, column: int, whole: bool) -> None:
        super().__init__(source, column, "d", strict=True)
        self.whole = whole  # frame numbers
        self.dates: bool | None = None  # None: no cell was read yet
        self.aware: bool | None = None  # date-times that name their offset from UTC

    def add(self, chunk: Chunk) -> None:
        if self.dates is None and not self.whole and chunk.numbers(self.column) is None:
            self.dates = not _is_number(chunk.text(self.column)[0])
        if not self.dates:
            super().add(chunk)
            return
        cells, values = chunk.text(self.column), np.empty(len(chunk))
        index, expected = 0, "seconds, or an ISO 8601 date and time as in the other rows"
        try:
            for index, cell in enumerate(cells):
                values[index], aware = _seconds(cell)
                if self.aware not in (None, aware):
                    expected = "an offset from UTC in all date-times or in none"
                    raise ValueError(cell)
                self.aware = aware
        except ValueError:
            where = f"{self.source.where(chunk.lines[index])}: {shown(self.name)}"
            raise ValueError(f"{where}: {Fault(index, expected, cells[index])}") from None
        self.data.frombytes(values.tobytes())

    def _check(self, values: np.ndarray) -> None:
        super()._check(values)
        what = "a whole number, the frame's" if self.whole else "the time of the row"
        wrong = np.isnan(values)
        if self.whole:
            wrong |= (values != np.round(values)) | (np.abs(values) > 2**52)
        if wrong.any():
            index = int(np.argmax(wrong))
            raise Fault(index, what, "" if math.isnan(values[index]) else values[index])


class Videos:
    """The video of each row, as a number; 0 without a column."""

    def __init__(self, source: Source, column: int | None) -> None:
        self.source, self.column = source, column
        self.codes, self.names = array("i"), dict[str, int]()
        self._known = dict[str, int]()  # cells as they stand in the file
        if column is None:
            self.names[source.path.stem] = 0

    def add(self, chunk: Chunk) -> Sequence[int]:
        if self.column is None:
            codes = array("i", bytes(4 * len(chunk)))
        else:
            cells = chunk.text(self.column)
            for cell in dict.fromkeys(cells):
                if cell not in self._known:
                    name = cell.strip()
                    if name.lower() in NAMELESS:
                        where = self.source.where(chunk.lines[cells.index(cell)])
                        raise ValueError(
                            f"{where}: {shown(self.source.names[self.column])}: expected the name of a video, got {cell[:60]!r}"
                        )
                    self._known[cell] = self.names.setdefault(name, len(self.names))
            codes = array("i", map(self._known.__getitem__, cells))
        self.codes.extend(codes)
        return codes


class PerVideo:
    """A column that says one thing of each video. `what`: it must, for it is the column of groups or splits; without it the
    column is dropped at the first video of which it says two things, or nothing."""

    def __init__(self, source: Source, column: int, what: str | None) -> None:
        self.source, self.column, self.name, self.what = source, column, source.names[column], what
        self.said: dict[int, str] = {}  # by the video's number
        self.lines: dict[int, int] = {}
        self.dropped = False

    def add(self, chunk: Chunk, codes: Sequence[int]) -> None:
        if self.dropped:
            return
        cells = chunk.text(self.column)
        if self.what is not None:
            for code, line in zip(codes, chunk.lines):
                self.lines.setdefault(code, line)
        for code, cell in dict.fromkeys(zip(codes, cells)):
            text = cell.strip()
            if text.lower() in NAMELESS or self.said.setdefault(code, text) != text:
                if self.what is None:
                    self.dropped = True
                    return
                self._refuse(chunk, codes, cells, code, cell)

    def _refuse(self, chunk: Chunk, codes: Sequence[int], cells: Sequence[str], code: int, cell: str) -> None:
        index = next(index for index, pair in enumerate(zip(codes, cells)) if pair == (code, cell))
        where = f"{self.source.where(chunk.lines[index])}: {shown(self.name)}"
        if cell.strip().lower() in NAMELESS:
            raise ValueError(f"{where}: expected a {self.what}, got {cell[:60]!r}")
        before = self.source.where(self.lines[code])
        raise ValueError(
            f"{where}: expected one {self.what} in all rows of a video, {self.said[code][:60]!r} as in {before}, got "
            f"{cell.strip()[:60]!r}; --video names the column that tells videos apart"
        )
