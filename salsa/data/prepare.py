"""Stage prepare: what SFT, the reward model, PPO and its development evaluation are made from, and the gold judge.

Writes sft.jsonl and sft_validation.jsonl {"messages"}, prompts.jsonl and evaluation.jsonl {"id", "prompt"}; for
sampled preferences preference_prompts.jsonl {"id", "prompt"}, for given ones preferences.jsonl {"prompt", "chosen",
"rejected"}; gold/; counts.json with the rows read, kept and dropped and why.
"""

import statistics

from salsa.data import check_unchanged, gold, reviews, stories, user
from salsa.workflow import config, runs
from salsa.workflow.runs import UserError

VERSION = 2
FILES = {  # split -> file; every task has all but one of preference_prompts and preferences
    "demonstrations": "sft.jsonl",
    "validation": "sft_validation.jsonl",
    "preference_prompts": "preference_prompts.jsonl",
    "preferences": "preferences.jsonl",
    "prompts": "prompts.jsonl",
    "evaluation": "evaluation.jsonl",
}


def prepare(settings, parents, output, execution):
    """Write the files above; returns the counts."""
    makers = {"stories": _stories, "reviews": _reviews, "ultra": _ultra}
    if settings.task.kind not in makers:
        raise UserError(f"data.task.kind is {settings.task.kind!r}; there are {', '.join(makers)}")
    check_unchanged(settings.task, settings.files)
    rows, counts = makers[settings.task.kind](settings.task, output / "gold")
    for split, values in rows.items():
        if not values:
            raise UserError(f"data.task: no rows for {split}; counts: {runs.canonical_json(counts)}")
        runs.write_jsonl(output / FILES[split], values)
    counts = {**counts, "rows": {split: len(values) for split, values in rows.items()}}
    runs.write_json(output / "counts.json", counts)
    return counts


def prompt_rows(split, texts):
    """Rows {"id", "prompt"} of one user message each."""
    return [{"id": f"{split}-{i}", "prompt": [user(text)]} for i, text in enumerate(texts)]


def _stories(task, gold_folder):
    rows = {
        split: stories.demonstrations(split, getattr(task, split), task.seed)
        for split in ("demonstrations", "validation")
    }
    names = {"preferences": "preference_prompts", "prompts": "prompts", "evaluation": "evaluation"}
    for split, name in names.items():
        rows[name] = prompt_rows(split, stories.prompts(split, getattr(task, split), task.seed))
    gold.save(gold_folder, "stories")
    quality = {split: _mean_gold(gold.StoriesGold(), rows[split]) for split in ("demonstrations", "validation")}
    return rows, {"read": 0, "generated": sum(map(len, rows.values())), "dropped": {}, "gold": quality}


def _reviews(task, gold_folder):
    rows = {split: reviews.demonstrations(split, task) for split in ("demonstrations", "validation")}
    names = {"preferences": "preference_prompts", "prompts": "prompts", "evaluation": "evaluation"}
    for split, name in names.items():
        rows[name] = prompt_rows(split, reviews.openings(split, getattr(task, split), task))
    classifier, facts = reviews.train_gold(task)
    gold.save(gold_folder, "reviews", classifier)
    quality = {
        split: _mean_gold(gold.ReviewsGold(classifier), rows[split]) for split in ("demonstrations", "validation")
    }
    return rows, {**reviews.splits(task.opening_words)[1], "gold": {**facts, **quality}}


def _mean_gold(judge, rows):
    """Mean gold of the last answers of demonstrations."""
    if not rows:
        return None
    scores = judge.score([row["messages"][:-1] for row in rows], [row["messages"][-1]["content"] for row in rows])
    return round(statistics.fmean(scores), 4)


def _ultra(task, gold_folder):
    from salsa.data import ultra

    gold.save(gold_folder, "none")
    return ultra.prepare(task)


if __name__ == "__main__":
    runs.command(
        "prepare",
        VERSION,
        prepare,
        config.PrepareSettings,
        description=__doc__,
        writes=("sft.jsonl", "sft_validation.jsonl", "prompts.jsonl", "evaluation.jsonl", "gold/*", "counts.json"),
        may_write=("preference_prompts.jsonl", "preferences.jsonl"),
    )
