"""Benchmark for stories: half held-out pairs of nouns at trained counts, half trained pairs at counts of five and six.

`salsa.data.worlds.stories` says what is held out.
"""

from salsa.data import Benchmark
from salsa.data.splits import ordered
from salsa.data.worlds import stories

KIND = "out_of_distribution"


def questions(benchmark, task):
    check(benchmark)
    pairs, counts = (ordered(texts, task.seed, "stories") for texts in _instructions())
    alternating = [
        ([text], "held_out_count" if i % 2 else "held_out_pair")
        for both in zip(pairs, counts, strict=False)
        for i, text in enumerate(both)
    ]
    return stories.questions(KIND, alternating[: benchmark.prompts or None])


def check(benchmark):
    stories.check_number(KIND, benchmark.prompts, 2 * min(map(len, _instructions())))


def _instructions():
    return stories.instructions(held=True), stories.instructions(counts=stories.HARDER_COUNTS)


BENCHMARK = Benchmark(kind=KIND, worlds=("stories",), exact=True, questions=questions, check=check)
