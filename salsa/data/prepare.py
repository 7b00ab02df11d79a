"""Stage prepare: the data for SFT, the reward model, policies and their development evaluation, and gold.

It writes sft.jsonl and sft_validation.jsonl {"messages"}, prompts.jsonl and evaluation.jsonl {"id", "prompt"}; for
sampled preferences preference_prompts.jsonl {"id", "prompt"}, for given ones preferences.jsonl {"prompt", "chosen",
"rejected"}; gold/; counts.json with the numbers of rows read, kept, and dropped by reason.
"""

from salsa import data
from salsa.data import gold, sources
from salsa.workflow import runs, stages
from salsa.workflow.messages import UserError

VERSION = 3
FILES = {  # split -> file; every task has either preference_prompts or preferences, and all the others
    "demonstrations": "sft.jsonl",
    "validation": "sft_validation.jsonl",
    "preference_prompts": "preference_prompts.jsonl",
    "preferences": "preferences.jsonl",
    "prompts": "prompts.jsonl",
    "evaluation": "evaluation.jsonl",
}


def prepare(settings, parents, output, execution):
    """Write the files above; returns the counts."""
    task, worlds = settings.task, data.world_kinds()
    world = worlds[task.kind]
    sources.check_unchanged(task, settings.files)
    rows, counts = world.prepare(task, output / "gold")
    if world.gold is None:
        gold.save(output / "gold", gold.NONE)
    for split, values in rows.items():
        if not values:
            raise UserError(f"data.task: no rows for {split}; counts: {runs.canonical_json(counts)}")
        runs.write_jsonl(output / FILES[split], values)
    counts = {**counts, "rows": {split: len(values) for split, values in rows.items()}}
    runs.write_json(output / "counts.json", counts)
    return counts


if __name__ == "__main__":
    stages.PREPARE.command(prepare, VERSION, __doc__)
