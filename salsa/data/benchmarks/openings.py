"""Benchmark for reviews: openings of reviews that nothing else sees, to be continued."""

from salsa.data import Benchmark, Questions
from salsa.data.worlds import reviews


def questions(benchmark, task):
    rows = [
        {"id": f"openings-{i}", "turns": [text], "category": "openings", "reference": None}
        for i, text in enumerate(reviews.openings("openings", 0, task))
    ]
    return Questions(rows, len(rows))


BENCHMARK = Benchmark(kind="openings", worlds=("reviews",), questions=questions, local_files=reviews.WORLD.local_files)
