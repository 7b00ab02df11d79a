"""Where a setting says that rows are read from: a local file, or a hub dataset ORG/NAME or ORG/NAME@REVISION.

`rows` reads local files, the datasets library reads hub datasets; each row comes with its place, for messages. A `Form`
says which keys the rows of a file must have.
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
from salsa.workflow.messages import UserError

HUB_DATASET = r"[A-Za-z0-9_-][A-Za-z0-9_.-]*/[A-Za-z0-9_-][A-Za-z0-9_.-]*(@[A-Za-z0-9_./-]+)?"  # and its revision


@dataclass(frozen=True)
class Form:
    """What each row of a source has.

    Attributes:
        required: keys that it must have.
        others: keys that are used if they are there.
        instead: required key -> the key that the hub's dataset has in its place.
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
            there = f" but {', '.join(row)[:60]}" if row else ""
            raise UserError(f"no key {missing!r}{there}; each row needs {', '.join(self.required)}")
        return [row[key] if key in row else row[self.instead[key]] for key in self.required]


@dataclass
class Source:
    """A hub dataset or a local file that is being read.

    Attributes:
        rows: an iterator of (place, row).
        facts: facts worth recording about a hub dataset.
    """

    rows: Iterator
    facts: dict = field(default_factory=dict)

    def __iter__(self):
        return self.rows


def is_hub_id(value):
    """Whether a setting names a dataset of the hub, ORG/NAME or ORG/NAME@REVISION, rather than a local file.

    An existing file of that name is meant as a file. A folder of that name, and a name that can only mean a file that
    does not exist, is a UserError: a local folder must not take the place of a hub dataset, of which an address holds
    the name alone.
    """
    if rows.local(value):
        return False
    pattern = "; a pattern is not expanded, name one file" if re.search(r"[*?\[]", value) else ""
    if rows.holds_rows(value) or value.lower().endswith(rows.OTHER_SUFFIXES) or value.startswith(("/", ".", "~")):
        raise UserError(f"{value}: no such file{pattern or f'; give {rows.FORMS}, or a hub dataset ORG/NAME'}")
    if not re.fullmatch(HUB_DATASET, value):
        raise UserError(f"{value!r}: neither a file nor a hub dataset ORG/NAME{pattern}")
    if "@" in value and rows.local(value.partition("@")[0]):
        raise UserError(f"{value}: a file lies at {value.partition('@')[0]}; name the file, or run from elsewhere")
    return True


def local_files(*names):
    """A function for a record: settings -> (setting's name -> path) of the local files that the settings `names` give.

    It leaves out hub datasets, and raises UserError for a path that does not exist.
    """

    def read(settings):
        values = {name: getattr(settings, name) for name in names}
        return {name: str(rows.local(value)) for name, value in values.items() if value and not is_hub_id(value)}

    return read


def size_and_time(path):
    """A file's size in bytes and its time of modification in nanoseconds: unchanged, if the file is."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def once(function):
    """The function, whose first argument is a path, called once as long as the file keeps its size and time."""
    kept = functools.cache(lambda path, status, *more: function(path, *more))
    return functools.wraps(function)(lambda path, *more: kept(str(path), size_and_time(path), *more))


_describe = once(runs.describe_file)


def describe(path):
    """`<bytes>:<sha256>` of a local file, which is read `once`; UserError where it can't be read."""
    try:
        return _describe(path)
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); see to its permissions") from None


def contents(settings):
    """Setting's name -> content of each local file that a config.Task, Corpus or Benchmark reads."""
    record = data.record(settings)
    paths = record.local_files(settings) if record else {}
    return {name: describe(path) for name, path in sorted(paths.items())}


def check_unchanged(settings, files):
    """UserError where a local file has changed since the run was planned, so that the run's address would be wrong.

    Args:
        settings: config.Task or Benchmark.
        files: setting's name -> content, from `describe`. For a benchmark it may hold its task's files, too.
    """
    paths = data.record(settings).local_files(settings) if files else {}
    for name, content in files.items():
        path = paths.get(name)
        if path is None and not getattr(settings, name, ""):
            continue  # a file of the benchmark's task
        if path is None or describe(path) != content:
            place = path or getattr(settings, name)
            raise UserError(f"{place}: changed since the run was planned ({name}); plan again")


@contextlib.contextmanager
def opened(value, form, splits, setting):
    """The `Source` that a setting names; a local file is closed afterwards.

    Args:
        value: ORG/NAME, ORG/NAME@REVISION or a path.
        form: the `Form` of its rows.
        splits: names of splits; the first that a hub dataset has is read.
        setting: the setting's name, for messages.
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
    # The commit that was read names the folder of the cache, if the dataset comes from one.
    folders = sorted({Path(file["filename"]).parent.name for file in dataset.cache_files})
    commit = next((name for name in folders if re.fullmatch(r"[0-9a-f]{40}", name)), None)
    facts = {"dataset": value, "split": str(dataset.split), "commit": commit}
    yield Source(((f"{value}: row {number}", row) for number, row in enumerate(lines, 1)), {"hub": facts})


def from_hub(value, splits):
    """A hub dataset's split, the first of `splits` that it has. UserError where it has none of them."""
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
    """Turn any error of the datasets library into a UserError of one line."""
    try:
        yield
    except Exception as error:  # offline, no such dataset, a licence to accept: many classes of errors, one remedy
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{value}: not readable from the hub ({reason}); accept its licence there and run "
            "`huggingface-cli login`, or give a local JSONL or Parquet file"
        ) from None


def located(source, convert, *more):
    """Yield (place, converted) for a source's rows; a UserError of `convert` gets the row's place in front."""
    for place, row in source:
        try:
            converted = convert(row, *more)
        except UserError as error:
            raise UserError(f"{place}: {error}") from None
        yield place, converted
