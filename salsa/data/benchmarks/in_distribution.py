"""Benchmark for stories: new instructions of the form that policies are trained on."""

from salsa.data import Benchmark
from salsa.data.worlds import stories

KIND = "in_distribution"


def questions(benchmark, task):
    number = benchmark.prompts or stories.available(KIND)
    return stories.questions(KIND, [([text], KIND) for text in stories.prompts(KIND, number, task.seed)])


def check(benchmark):
    stories.check_number(KIND, benchmark.prompts, stories.available(KIND))


BENCHMARK = Benchmark(kind=KIND, worlds=("stories",), exact=True, questions=questions, check=check)
