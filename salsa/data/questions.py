"""Files of questions, as MT-Bench's and Arena-Hard's: each with an id of its own, all with as many turns.

A benchmark's file says with a function what is made of a row; what all have in common is checked here, while planning
and in the stage alike.
"""

import functools
import itertools
from collections import Counter
from typing import Annotated

from salsa import data
from salsa.data import Questions, messages, rows, sources
from salsa.data.messages import Dropped, blank
from salsa.data.splits import normalised, ordered
from salsa.workflow import schema
from salsa.workflow.runs import UserError

SPLITS = ("test_prefs", "test", "train")  # of a hub dataset, the first that there is


@schema.dataclass()
class FileSettings:
    """Where the questions come from."""

    file: Annotated[schema.Path, schema.ALWAYS] = ""
    """A hub dataset ORG/NAME, ORG/NAME@REVISION, or a local file."""


def check_file_is_given(benchmark):
    if not benchmark.file:
        raise UserError(f"a {benchmark.kind} benchmark needs `file`: a hub dataset ORG/NAME or a local file")


def questions(benchmark, task, form, make, reference=None):
    """`Questions` of a benchmark's `file`, in random order: files are sorted by category, and a part may be wanted.

    Args:
        benchmark: config.Benchmark.
        task: config.Task, of whose seed is the order; None: in the file's order.
        form: the `sources.Form` of the rows.
        make: (row, its number) -> its id, and a row of a benchmark or the reason (text) why it is dropped.
        reference: (place, id, row of the benchmark) -> the reference answers; None: the row's own.

    Raises UserError, with the question's place, for an id that two questions have, and for another number of turns
    than the question before it has.
    """
    check_file_is_given(benchmark)
    numbers = itertools.count()
    kept, places, asked, dropped, read = {}, {}, set(), Counter({"empty_or_repeated": 0}), 0
    with sources.opened(benchmark.file, form, SPLITS, "file") as source:
        for place, (identifier, row) in sources.located(source, lambda row: make(row, next(numbers))):
            read += 1
            turns = () if isinstance(row, str) else tuple(map(normalised, row["turns"]))
            reason = "empty" if turns in asked else row if isinstance(row, str) else None
            if reason:
                places.setdefault(identifier, place)
                dropped["empty_or_repeated" if reason == "empty" else reason] += 1
                continue
            if identifier in places:
                of = rows.printable(identifier)
                raise UserError(f"{place}: the id {of} is also that of {places[identifier]}; give each its own")
            _check_turns(place, turns, kept)
            places[identifier] = place
            asked.add(turns)
            if reference:
                row["reference"] = reference(place, identifier, row)
            kept[row["id"]] = row
    order = ordered(kept, task.seed, "ultra") if task else kept
    return Questions([kept[identifier] for identifier in order], read, dict(dropped), source.facts), set(places)


def _check_turns(place, turns, kept):
    """UserError where a question has another number of turns than those before it."""
    number = next((len(row["turns"]) for row in kept.values()), len(turns))
    if len(turns) != number:
        said = f"{len(turns)} turn{'s' if len(turns) > 1 else ''}, where the questions before have {number}"
        raise UserError(f"{place}: {said}; make it two benchmarks")


def check(benchmark):
    """UserError for a fault in the local files of a benchmark of questions; a hub dataset is read by the stage."""
    check_file_is_given(benchmark)
    turns(benchmark)


def turns(benchmark):
    """The number of turns of a benchmark's questions, which are checked; None where only its hub dataset says."""
    if sources.is_hub_id(benchmark.file):
        return None
    paths = data.benchmark_kinds()[benchmark.kind].local_files(benchmark)
    files = [(name, path, *sources.size_and_time(path)) for name, path in paths.items()]
    return _turns(benchmark.kind, benchmark.file, benchmark.reference_file, *files)


@functools.cache
def _turns(kind, file, reference_file, *files):
    benchmark = data.benchmark_settings()(kind, file=file, reference_file=reference_file)
    made = data.benchmark_kinds()[kind].questions(benchmark, None)
    if not made.rows:
        dropped = ", ".join(f"{name} {number}" for name, number in made.dropped.items())
        raise UserError(f"{file}: none of its {made.read} questions can be used ({dropped}); see what each row needs")
    return len(made.rows[0]["turns"])


def identifier_of(row, names, index):
    """A question's id, of the first of some keys that it has; its place in the file where it has none."""
    for name in names:
        if not messages.missing(row.get(name)):
            return checked_identifier(name, row[name])
    return str(index)


def checked_identifier(name, value):
    """An id as text: 81, "81" and the 81.0 that pandas writes are one."""
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
    made = [messages.text(key, item, "a list of texts") for item in value]
    if not made or any(map(blank, made)):
        raise Dropped("empty")
    return made
