"""Stage benchmark: prompts that no training sees, as benchmark.jsonl {"id", "turns", "category", "reference"}.

`turns` are the user's messages, answered one after the other; `reference` is a list of an answer to each, or null. Rows
of a kind that scores answers have `scored_by`, the kind. A prompt that occurs in any file of the task's prepare run is
dropped and counted.
"""

import collections

from salsa import data
from salsa.data import prepare as preparation
from salsa.data import sources
from salsa.data.splits import normalised
from salsa.workflow import runs, stages
from salsa.workflow.messages import UserError

VERSION = 4


def make(settings, parents, output, execution):
    """Write benchmark.jsonl and counts.json; returns the counts."""
    benchmark, task = settings.benchmark, settings.task
    kinds = data.benchmark_kinds(task.kind)
    if benchmark.kind not in kinds:
        raise UserError(f"benchmark {settings.name}: {task.kind} has no {benchmark.kind!r}; it has {', '.join(kinds)}")
    sources.check_unchanged(benchmark, settings.files)
    record = kinds[benchmark.kind]
    rows, read, dropped, facts = record.questions(benchmark, task)
    prompts = training_prompts(parents["prepare"])
    unseen = [row for row in rows if prompts.isdisjoint(map(normalised, row["turns"]))]
    dropped = {**dropped, "in_training": len(rows) - len(unseen)}
    kept = unseen[: benchmark.prompts or None]
    if not kept:
        raise UserError(f"benchmark {settings.name}: no prompts are left of {read}; dropped: {dropped}")
    if record.score:
        kept = [row | {"scored_by": benchmark.kind} for row in kept]
    counts = {
        "read": read,
        "kept": len(kept),
        "dropped": dropped,
        "not_wanted": len(unseen) - len(kept),
        "categories": dict(collections.Counter(row["category"] for row in kept)),
        **facts,
    }
    runs.write_jsonl(output / "benchmark.jsonl", kept)
    runs.write_json(output / "counts.json", counts)
    return counts


def training_prompts(folder):
    """The normalised user messages of all files of a prepare run."""
    prompts = set()
    for name in preparation.FILES.values():
        if (folder / name).is_file():
            for row in runs.read_jsonl(folder / name):
                messages = row["messages"] if "messages" in row else row["prompt"]
                prompts.update(normalised(m["content"]) for m in messages if m["role"] == "user")
    return prompts


if __name__ == "__main__":
    stages.BENCHMARK.command(make, VERSION, __doc__)
