"""The one reader of rows in local files, for planning, which checks them, and for the stages.

Names that end in .parquet, in any case, are Parquet; any other file is JSONL, or a JSON array if it begins with a
bracket. All but Parquet may be compressed (.gz). A path is not expanded: `p[1].jsonl` and `prefs*.jsonl` name one file
each. Rows come one by one in the file's order, as plain Python values, so that equal rows are equal whatever form they
are stored in. A fault is a UserError of one line: the file, the line (in arrays and Parquet the row), and what to do.
"""

import collections
import contextlib
import gzip
import io
import json
import os
import re
import stat
import zlib
from pathlib import Path

from salsa.workflow.messages import UserError

SUFFIXES = (".jsonl", ".json", ".parquet")
# What else people give for a file of rows.
OTHER_SUFFIXES = (".csv", ".tsv", ".txt", ".arrow", ".gz", ".zst", ".bz2", ".xz", ".zip", ".jsonlines", ".ndjson")
FORMS = "JSONL (.jsonl, .jsonl.gz), a JSON array (.json, .json.gz) or Parquet (.parquet)"
LARGEST = 64 * 2**20  # bytes of a row; anything longer is a file without line ends
CHUNK = 2**20  # characters of an array that are decoded at a time
BATCH = 256  # rows of Parquet that are converted to Python values at a time
MARK = b"\xef\xbb\xbf"  # the byte order mark of UTF-8
GZIP = b"\x1f\x8b"
LFS = b"version https://git-lfs"
OTHER_FORMS = {  # the first bytes of files that hold no text -> what to do
    b"\xff\xfe": "UTF-16; save it as UTF-8",
    b"\xfe\xff": "UTF-16; save it as UTF-8",
    b"PAR1": "Parquet by its content; name it .parquet",
    b"ARROW1": "Arrow by its content; save it as Parquet",
    GZIP: "compressed by gzip; name it .jsonl.gz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; decompress it",
    b"BZh": "compressed by bzip2; decompress it",
    b"\xfd7zXZ": "compressed by xz; decompress it",
    b"PK\x03\x04": "a ZIP archive; unpack it",
    LFS: "a pointer of Git LFS, not the file; run git lfs pull",
}
BLANK = re.compile(r"[ \t\r\n]*")  # of JSON
FETCH = "mend or fetch the file again"
MEND = "mend or remove it"


def holds_rows(name):
    """Whether a name has the ending of a file of rows."""
    return name.lower().removesuffix(".gz").endswith(SUFFIXES)


def local(value):
    """The path of the local file that a value names, or None where nothing of that name exists.

    Raises UserError for a folder, a pipe or a device, and for a file that can't be accessed.
    """
    path = Path(os.path.expanduser(value))
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            names = sorted(entry.name for entry in path.iterdir() if holds_rows(entry.name))
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise UserError(f"{value}: a link to a file that is not there; mend it") from None
        return None
    except (OSError, ValueError) as error:  # no permission, a NUL
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{value}: can't be read ({reason}); give a file that can be") from None
    if stat.S_ISDIR(mode):
        listing = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
        raise UserError(f"{value}: a folder, not a file; give one of its files ({listing or 'none holds rows'})")
    if not stat.S_ISREG(mode):
        raise UserError(f"{value}: a pipe or a device, not a file; write the rows to a file")
    return path


def read(path, keys=None):
    """Yield (place, row) for every row of a file, in its order; `place` is FILE:LINE, or FILE: row N.

    Args:
        path: a local file.
        keys: the keys that are used, None for all; other columns of Parquet aren't read.

    Raises UserError for a file that can't be read or has no row, and for the first row that is no JSON object, that
    has a key twice, or that is longer than LARGEST.
    """
    value, path = path, local(path)
    if path is None:
        raise UserError(f"{value}: no such file; give {FORMS}")
    name, empty = path.name.lower(), True
    compressed = name.endswith(".gz")
    reader = _parquet if name.removesuffix(".gz").endswith(".parquet") else _text
    try:
        with (
            open(path, "rb") as raw,
            _unpacked(path, raw) if compressed else contextlib.nullcontext(raw) as file,
            contextlib.closing(reader(path, file, keys, compressed)) as lines,
        ):
            for place, row in lines:
                empty = False
                yield place, row
    except (OSError, EOFError, zlib.error) as error:  # of the disk, of gzip
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: can't be read ({reason}); {FETCH}") from None
    if empty:
        raise UserError(f"{path}:1: the file is empty; give one with rows")


def _unpacked(path, raw):
    """The content of a gzipped file, as a file."""
    start = raw.peek(len(GZIP))
    if start and not start.startswith(GZIP):  # browsers unpack files that they fetch, and keep the name
        raise UserError(f"{path}: not compressed; name it without .gz")
    return gzip.open(raw)


def _text(path, file, keys, compressed):
    """Rows of JSONL or of a JSON array, by how the file begins: many programs give one the name of the other."""
    start = file.peek(64)
    if compressed and start.startswith(GZIP):
        raise UserError(f"{path}: compressed twice; decompress it once")
    for magic, advice in OTHER_FORMS.items():
        if start.startswith(magic):
            raise UserError(f"{path}: {advice}")
    content = start.removeprefix(MARK).lstrip()
    if content.startswith(b"["):
        file.read(len(start) - len(content) + 1)
        yield from _array(path, file)
    else:
        yield from _lines(path, file)


def _lines(path, file):
    advice = "give one row a line, as JSON"  # if the first line is no JSON, the file has another form
    for number, line in enumerate(iter(lambda: file.readline(LARGEST + 1), b""), 1):
        place = f"{path}:{number}"
        if len(line) > LARGEST:
            raise UserError(f"{place}: longer than {LARGEST >> 20} MiB; give one row a line")
        line = line.removeprefix(MARK)
        if line.strip():
            with _explained(place, advice):
                row = _DECODER.decode(line.decode())
            yield place, _object(place, row)
            advice = MEND


def _array(path, file):
    """The items of a JSON array after its bracket, decoded from a buffer: the whole text is never in memory."""
    # With surrogateescape, bytes that are no UTF-8 fail where their row is decoded, whose number the message then says.
    stream = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape")
    buffer, at, number = "", 0, 0
    try:
        while True:
            place = f"{path}: row {number + 1}"
            with _explained(place):
                buffer, at = _next_sign(stream, buffer, at)
                if buffer[at : at + 1] == "]":
                    rest, end = _next_sign(stream, buffer, at + 1)
                    if rest[end:]:
                        raise json.JSONDecodeError("more text after the array", "", 0)
                    return
                if number:
                    if buffer[at : at + 1] != ",":
                        reason = "no comma before it" if buffer[at:] else "the array doesn't end"
                        raise json.JSONDecodeError(reason, "", 0)
                    buffer, at = _next_sign(stream, buffer, at + 1)
                row, buffer, at = _item(place, stream, buffer, at)
            number += 1
            yield place, _object(place, row)
    finally:
        stream.detach()  # whoever opened the file closes it


def _next_sign(stream, buffer, at):
    """The buffer, refilled where needed, and the place in it of the next sign that is no white space, or its end."""
    while True:
        at = BLANK.match(buffer, at).end()
        if at < len(buffer):
            return buffer, at
        buffer, at = stream.read(CHUNK), 0
        if not buffer:
            return buffer, at


def _item(place, stream, buffer, at):
    """The value at a place of the buffer, the buffer, and the place after the value."""
    while True:
        try:
            row, end = _DECODER.raw_decode(buffer, at)
            if not buffer.isascii():
                buffer[at:end].encode("utf-8", "surrogateescape").decode()
            return row, buffer, end
        except json.JSONDecodeError:
            more = stream.read(max(CHUNK, len(buffer) - at))
            if not more:
                raise
            buffer, at = buffer[at:] + more, 0
            if len(buffer) > 2 * LARGEST:
                raise UserError(f"{place}: not JSON, or longer than {LARGEST >> 20} MiB; mend it") from None


def _parquet(path, file, keys, compressed):
    """Rows of Parquet, of the columns `keys`."""
    import pyarrow.parquet

    if compressed:
        raise UserError(f"{path}: compressed Parquet; decompress it")
    if file.peek(64).startswith(LFS):
        raise UserError(f"{path}: {OTHER_FORMS[LFS]}")
    number = 0
    try:
        table = pyarrow.parquet.ParquetFile(file)
        names = table.schema_arrow.names
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise UserError(f"{path}: two columns {doubled[0]!r}; remove one")
        columns = [name for name in names if keys is None or name in keys]
        if not columns:
            raise UserError(f"{path}: no column {', '.join(keys)} but {', '.join(names) or 'none'}")
        for batch in table.iter_batches(batch_size=BATCH, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", row
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        place = f" after row {number}" if number else ""
        raise UserError(f"{path}: not a Parquet file that can be read{place} ({reason}); {FETCH}") from None


class _Doubled(Exception):
    """One JSON object has a key twice."""


def _once(pairs):
    """An object's dictionary. Python by itself would silently keep the last of two values."""
    values = dict(pairs)
    if len(values) < len(pairs):
        counts = collections.Counter(key for key, _ in pairs)
        raise _Doubled(next(key for key, count in counts.items() if count > 1))
    return values


_DECODER = json.JSONDecoder(object_pairs_hook=_once)


@contextlib.contextmanager
def _explained(place, advice=MEND):
    """Turn any error of decoding into a UserError of one line."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not UTF-8 ({error.reason}); save it as UTF-8") from None
    except _Doubled as error:
        raise UserError(f"{place}: the key {str(error)!r} stands twice in one object; remove one") from None
    except RecursionError:
        raise UserError(f"{place}: nested too deep; {MEND}") from None
    except ValueError as error:  # a JSONDecodeError, or an integer of more than 4,300 digits
        reason = str(getattr(error, "msg", None) or error).split(";")[0]
        if reason == "Extra data":  # "{…}," as in an array, or rows without line ends between them
            advice = "give each row a line of its own, with nothing after it"
        raise UserError(f"{place}: not JSON ({reason}); {advice}") from None


def _object(place, row):
    if isinstance(row, dict):
        return row
    raise UserError(f"{place}: not a JSON object but {type(row).__name__}; {MEND}")
