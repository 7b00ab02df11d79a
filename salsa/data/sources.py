"""What a setting names that rows are read from: a local file, or a hub dataset ORG/NAME or ORG/NAME@REVISION.

Local files are read by `rows`, hub datasets by the datasets library; a row comes with its place, for messages. What a
file has to hold is a `Form`: the keys of its rows, and what its setting's splits are called on the hub.
"""

import contextlib
import functools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from salsa import data
from salsa.data import rows
from salsa.workflow import runs
from salsa.workflow.runs import UserError

HUB_DATASET = r"[A-Za-z0-9_-][A-Za-z0-9_.-]*/[A-Za-z0-9_-][A-Za-z0-9_.-]*(@[A-Za-z0-9_./-]+)?"  # and its revision


@dataclass(frozen=True)
class Form:
    """What each row of a source has.

    Attributes:
        required: keys that it must have.
        others: keys that are used where they are there.
        instead: required key -> what the hub's dataset has in its place.
    """

    required: tuple
    others: tuple = ()
    instead: dict = field(default_factory=dict, hash=False)

    @property
    def keys(self):
        return (*self.required, *self.others, *self.instead.values())

    def values(self, row):
        """The values of a row's required keys. UserError where one is missing."""
        missing = next((key for key in self.required if not row.keys() & {key, self.instead.get(key)}), None)
        if missing:
            there = f" but {rows.printable(', '.join(row))[:60]}" if row else ""
            raise UserError(f"no key {missing!r}{there}; each row needs {', '.join(self.required)}")
        return [row[key] if key in row else row[self.instead[key]] for key in self.required]


@dataclass
class Source:
    """A hub dataset or a local file that is being read.

    Attributes:
        rows: an iterator of (place, row).
        facts: what is worth recording of a hub dataset.
    """

    rows: Iterator
    facts: dict = field(default_factory=dict)

    def __iter__(self):
        return self.rows


def is_hub_id(value):
    """Whether a setting names a dataset of the hub, ORG/NAME or ORG/NAME@REVISION, rather than a local file.

    A file of that name is a file. What is there and is no file, and what can only mean a file that is not there, is a
    UserError: so a local folder never stands in for a hub dataset, which its name alone brings into an address.
    """
    if rows.local(value):
        return False
    shown = rows.printable(value)
    pattern = "; a pattern is not expanded, name one file" if re.search(r"[*?\[]", value) else ""
    if rows.holds_rows(value) or value.lower().endswith(rows.OTHER_SUFFIXES) or value.startswith(("/", ".", "~")):
        raise UserError(f"{shown}: no such file{pattern or f'; give {rows.FORMS}, or a hub dataset ORG/NAME'}")
    if not re.fullmatch(HUB_DATASET, value):
        raise UserError(f"{value!r}: neither a file nor a hub dataset ORG/NAME{pattern}")
    if "@" in value and rows.local(value.partition("@")[0]):
        raise UserError(f"{value}: a file lies at {value.partition('@')[0]}; name the file, or run from elsewhere")
    return True


def local_files(*names):
    """A record's function from settings to the local files that the settings `names` give: setting's name -> path.

    It leaves out hub datasets, and raises UserError for a path that does not exist.
    """

    def read(settings):
        values = {name: getattr(settings, name) for name in names}
        return {name: str(rows.local(value)) for name, value in values.items() if value and not is_hub_id(value)}

    return read


def size_and_time(path):
    """What a file that hasn't changed keeps: its bytes and its time, in nanoseconds."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def once(function):
    """The function, of a file's path and more, called once for the same size and time of the file."""
    kept = functools.cache(lambda path, status, *more: function(path, *more))
    return functools.wraps(function)(lambda path, *more: kept(str(path), size_and_time(path), *more))


_describe = once(runs.describe_file)


def describe(path):
    """`<bytes>:<sha256>` of a local file, read once for the same size and time; UserError where it can't be read."""
    try:
        return _describe(path)
    except OSError as error:
        raise UserError(f"{rows.printable(path)}: can't be read ({error.strerror}); see to its permissions") from None


def contents(settings):
    """Setting's name -> content of each local file that a config.Task, Corpus or Benchmark reads."""
    record = data.record(settings)
    paths = record.local_files(settings) if record else {}
    return {name: describe(path) for name, path in sorted(paths.items())}


def check_unchanged(settings, files):
    """UserError where a local file isn't what it was when the run was planned, and so not what its address says.

    Args:
        settings: config.Task or Benchmark.
        files: setting's name -> content, as `describe` gave it. Of a benchmark, its task's files may be there, too.
    """
    paths = data.record(settings).local_files(settings) if files else {}
    for name, content in files.items():
        path = paths.get(name)
        if path is None and not getattr(settings, name, ""):
            continue  # another's
        if path is None or describe(path) != content:
            place = rows.printable(path or getattr(settings, name))
            raise UserError(f"{place}: changed since the run was planned ({name}); plan again")


@contextlib.contextmanager
def opened(value, form, splits, setting):
    """The `Source` that a setting names; a local file is closed afterwards.

    Args:
        value: ORG/NAME, ORG/NAME@REVISION or a path.
        form: the `Form` of its rows.
        splits: of a hub dataset, the one to read: the first that there is.
        setting: its name, for messages.
    """
    if not is_hub_id(value):
        with contextlib.closing(rows.read(value, form.keys)) as lines:
            yield Source(lines)
        return
    dataset = from_hub(value, splits)
    columns = dataset.column_names
    for key in form.required:
        if key not in columns and form.instead.get(key) not in columns:
            raise UserError(f"{value}: no column {key!r} but {', '.join(columns)} ({setting})")
    lines = dataset.select_columns([column for column in columns if column in form.keys])
    facts = {"dataset": value, "split": str(dataset.split), "commit": _commit(dataset)}
    yield Source(((f"{value}: row {number}", row) for number, row in enumerate(lines, 1)), {"hub": facts})


def from_hub(value, splits):
    """The first of some splits that a hub dataset has. UserError where it has none of them."""
    import datasets

    offered = offered_splits(value)
    split = next((name for name in splits if name in offered), None)
    if split is None:
        raise UserError(f"{value}: no split {' or '.join(splits)} but {', '.join(offered)}")
    identifier, _, revision = value.partition("@")
    with _explained(value):
        return datasets.load_dataset(identifier, split=split, revision=revision or None)


def offered_splits(value):
    """The names of a hub dataset's splits."""
    import datasets

    identifier, _, revision = value.partition("@")
    with _explained(value):
        return datasets.get_dataset_split_names(identifier, revision=revision or None)


@contextlib.contextmanager
def _explained(value):
    """Turns what the datasets library raises into a UserError of one line."""
    try:
        yield
    except Exception as error:  # offline, no such dataset, a licence to accept: many classes, one remedy
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{value}: not readable from the hub ({reason}); accept its licence there and run "
            "`huggingface-cli login`, or give a local JSONL or Parquet file"
        ) from None


def _commit(dataset):
    """The commit of a hub dataset that was read, which the folder of its cache is named by; None where it isn't."""
    folders = {Path(file["filename"]).parent.name for file in dataset.cache_files}
    return next((name for name in sorted(folders) if re.fullmatch(r"[0-9a-f]{40}", name)), None)


def located(source, convert, *more):
    """Yield (place, converted) of a source's rows; a UserError of `convert` is told the row's place."""
    for place, row in source:
        try:
            converted = convert(row, *more)
        except UserError as error:
            raise UserError(f"{place}: {error}") from None
        yield place, converted
