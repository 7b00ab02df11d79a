"""Files of questions, such as MT-Bench's and Arena-Hard's: each with an id of its own, all with as many turns.

Each benchmark has a function that turns a row into a question. Everything that they have in common is checked here, in
the same way while planning and in the stage.
"""

import functools
import itertools
from collections import Counter
from typing import Annotated

from salsa import data
from salsa.data import Questions, messages, sources
from salsa.data.messages import Dropped, blank
from salsa.data.splits import normalised, ordered
from salsa.workflow import schema
from salsa.workflow.messages import UserError

SPLITS = ("test_prefs", "test", "train")  # the first of these that a hub dataset has is read


@schema.dataclass()
class FileSettings:
    """Where the questions come from."""

    file: Annotated[schema.Path, schema.ALWAYS] = ""
    """A hub dataset ORG/NAME, ORG/NAME@REVISION, or a local file."""


def check_file_is_given(benchmark):
    if not benchmark.file:
        raise UserError(f"a {benchmark.kind} benchmark needs `file`: a hub dataset ORG/NAME or a local file")


def questions(benchmark, task, form, make, reference=None):
    """`Questions` of a benchmark's `file`, and their ids, in random order: files are sorted by category.

    Args:
        benchmark: config.Benchmark.
        task: config.Task, whose seed decides the order; None: in the file's order.
        form: the `sources.Form` of the rows.
        make: (row, its number) -> its id, and a row of a benchmark or the reason (text) why it is dropped.
        reference: (place, id, row of the benchmark) -> the reference answers; None: those in the row.

    Raises UserError, with the question's place, for an id that two questions have, and for another number of turns
    than the question before it has.
    """
    check_file_is_given(benchmark)
    numbers = itertools.count()
    kept, places, seen, dropped, read = {}, {}, set(), Counter({"empty_or_repeated": 0}), 0
    with sources.opened(benchmark.file, form, SPLITS, "file") as source:
        for place, (identifier, row) in sources.located(source, lambda row: make(row, next(numbers))):
            read += 1
            turns = () if isinstance(row, str) else tuple(map(normalised, row["turns"]))
            reason = "empty" if turns in seen else row if isinstance(row, str) else None
            if reason:
                places.setdefault(identifier, place)
                dropped["empty_or_repeated" if reason == "empty" else reason] += 1
                continue
            if identifier in places:
                raise UserError(f"{place}: the id {identifier} is also that of {places[identifier]}; give each its own")
            number = len(next(iter(kept.values()), row)["turns"])
            if len(turns) != number:
                words = f"{len(turns)} turn{'s' if len(turns) > 1 else ''}, where the questions before have {number}"
                raise UserError(f"{place}: {words}; make it two benchmarks")
            places[identifier] = place
            seen.add(turns)
            if reference:
                row["reference"] = reference(place, identifier, row)
            kept[row["id"]] = row
    order = ordered(kept, task.seed, "ultra") if task else kept
    return Questions([kept[identifier] for identifier in order], read, dict(dropped), source.facts), set(places)


def check(benchmark):
    """UserError for a fault in the local files of a benchmark of questions; only the stage reads a hub dataset."""
    check_file_is_given(benchmark)
    turns(benchmark)


def turns(benchmark):
    """The number of turns of a benchmark's questions, which are checked; None where only its hub dataset can tell."""
    if sources.is_hub_id(benchmark.file):
        return None
    paths = data.benchmark_kinds()[benchmark.kind].local_files(benchmark)
    files = [(name, path, *sources.size_and_time(path)) for name, path in paths.items()]
    return _turns(benchmark.kind, benchmark.file, benchmark.reference_file, *files)


@functools.cache
def _turns(kind, file, reference_file, *files):
    benchmark = data.benchmark_settings()(kind, file=file, reference_file=reference_file)
    rows, read, dropped, _ = data.benchmark_kinds()[kind].questions(benchmark, None)
    if not rows:
        reasons = ", ".join(f"{name} {number}" for name, number in dropped.items())
        raise UserError(f"{file}: none of its {read} questions can be used ({reasons}); see what each row needs")
    return len(rows[0]["turns"])


def identifier_of(row, names, index):
    """A question's id, under the first of some keys that its row has; without any, its number in the file."""
    for name in names:
        if not messages.missing(row.get(name)):
            return checked_identifier(name, row[name])
    return str(index)


def checked_identifier(name, value):
    """An id as text: 81, "81" and the 81.0 that pandas writes are the same."""
    form = "a text or a whole number"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise messages.wrong(name, value, form)
    try:
        return messages.text(name, str(value))
    except Dropped:
        raise messages.wrong(name, value, form) from None


def texts(key, value):
    """A list of texts, none of them blank. Raises Dropped, or UserError where it is something else."""
    if messages.missing(value):
        raise Dropped("no_text")
    if not isinstance(value, list):
        raise messages.wrong(key, value, "a list of texts")
    items = [messages.text(key, item, "a list of texts") for item in value]
    if not items or any(map(blank, items)):
        raise Dropped("empty")
    return items
