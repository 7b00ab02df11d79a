"""Benchmark for stories: an instruction, and after its answer another one about other nouns."""

import random

from salsa.data import Benchmark
from salsa.data.worlds import stories

KIND = "two_turn"


def questions(benchmark, task):
    conversations = []
    for first in stories.prompts(KIND, benchmark.prompts or stories.available(KIND), task.seed):
        rng = random.Random(f"{KIND}/{task.seed}/{first}")
        conversations.append(([first, stories.pick(rng, stories.follow_ups(KIND, first.split()))], KIND))
    return stories.questions(KIND, conversations)


def check(benchmark):
    stories.check_number(KIND, benchmark.prompts, stories.available(KIND))


BENCHMARK = Benchmark(
    kind=KIND, worlds=("stories",), exact=True, questions=questions, check=check, turns=lambda benchmark: 2
)
