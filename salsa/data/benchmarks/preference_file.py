"""Benchmark of single-turn prompts from a file of preferences; the chosen answer is the reference."""

from salsa.data import Benchmark, Questions, sources
from salsa.data.questions import SPLITS, FileSettings, check_file_is_given
from salsa.data.splits import ordered
from salsa.data.worlds import ultra

KIND = "preference_file"
FILE = ultra.FILES["preference_file"]
local_files = sources.local_files("file")


def questions(benchmark, task):
    check_file_is_given(benchmark)
    with sources.opened(benchmark.file, FILE.form, SPLITS, "file") as source:
        pairs, counts = ultra.read(source, FILE)
    single = [pairs[key] for key in ordered(pairs, task.seed, "ultra") if len(pairs[key]["prompt"]) == 1]
    rows = [
        {
            "id": f"{KIND}-{i}",
            "turns": [row["prompt"][0]["content"]],
            "category": KIND,
            "reference": [row["chosen"][0]["content"]],
        }
        for i, row in enumerate(single)
    ]
    dropped = {**counts["dropped"], "several_turns": len(pairs) - len(single)}
    left_out = {"left_out": counts["left_out"]} if "left_out" in counts else {}
    return Questions(rows, counts["read"], dropped, source.facts | left_out)


def check(benchmark):
    check_file_is_given(benchmark)
    for path in local_files(benchmark).values():
        ultra.check_file(path, FILE)


BENCHMARK = Benchmark(
    kind=KIND, worlds=("ultra",), questions=questions, settings=FileSettings, local_files=local_files, check=check
)
