"""Stage benchmark: prompts that no training sees, as benchmark.jsonl {"id", "turns", "category", "reference"}.

`turns` are the user's messages, answered one after the other; `reference` is a list of an answer to each, or null.
A prompt that occurs in any file of the task's prepare run is dropped and counted.
"""

from salsa.data import BENCHMARKS, check_unchanged, first, normalised, reviews, stories
from salsa.data import prepare as preparation
from salsa.workflow import config, runs
from salsa.workflow.runs import UserError

VERSION = 3


def make(settings, parents, output, execution):
    """Write benchmark.jsonl and counts.json; returns the counts."""
    benchmark, task = settings.benchmark, settings.task
    if benchmark.kind not in BENCHMARKS.get(task.kind, ()):
        offered = ", ".join(BENCHMARKS.get(task.kind, ()))
        raise UserError(f"benchmark {settings.name}: {task.kind} has no {benchmark.kind!r}; it has {offered}")
    check_unchanged(benchmark, settings.files)
    facts = {}
    rows, read, dropped = _rows(benchmark, task, facts)
    known = known_prompts(parents["prepare"])
    unseen = [row for row in rows if not known & {normalised(turn) for turn in row["turns"]}]
    dropped = {**dropped, "in_training": len(rows) - len(unseen)}
    kept = first(unseen, benchmark.prompts, f"benchmarks.{settings.name}.prompts")
    if not kept:
        raise UserError(f"benchmark {settings.name}: no prompts are left of {read}; dropped: {dropped}")
    categories = {}
    for row in kept:
        categories[row["category"]] = categories.get(row["category"], 0) + 1
    counts = {
        "read": read,
        "kept": len(kept),
        "dropped": dropped,
        "not_wanted": len(unseen) - len(kept),
        "categories": categories,
        **facts,
    }
    runs.write_jsonl(output / "benchmark.jsonl", kept)
    runs.write_json(output / "counts.json", counts)
    return counts


def _rows(benchmark, task, facts):
    """All rows of the benchmark, how many were read, and the dropped by reason; `facts` is given what else is known."""
    if task.kind == "stories":
        rows = stories.benchmark(benchmark.kind, benchmark.prompts, task.seed)
        return rows, len(rows), {}
    if task.kind == "reviews":
        texts = reviews.openings("openings", 0, task)
        rows = [
            {"id": f"openings-{i}", "turns": [text], "category": "openings", "reference": None}
            for i, text in enumerate(texts)
        ]
        return rows, len(rows), {}
    from salsa.data import ultra

    return ultra.benchmark(benchmark, task.seed, facts)


def known_prompts(folder):
    """The normalised user messages of all files of a prepare run."""
    known = set()
    for name in preparation.FILES.values():
        if (folder / name).is_file():
            for row in runs.read_jsonl(folder / name):
                messages = row["messages"] if "messages" in row else row["prompt"]
                known.update(normalised(m["content"]) for m in messages if m["role"] == "user")
    return known


if __name__ == "__main__":
    runs.command(
        "benchmark",
        VERSION,
        make,
        config.BenchmarkSettings,
        roles=("prepare",),
        description=__doc__,
        writes=("benchmark.jsonl", "counts.json"),
    )
