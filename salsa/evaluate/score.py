"""Scores of answers: the reward model's reward, gold where there is gold, and what benchmarks score themselves."""

import numpy as np

from salsa import data
from salsa.rl import forward


def score(answers, reward_model, gold, end_ids, pad_id, execution):
    """Reward and gold of each turn: (rewards, golds), both (turns, N) float64.

    golds is None without gold, and for a benchmark that is not compared, whose questions the world's gold can't read.
    """
    rewards, golds = [], []
    if not all(_compared(row) for row in answers.rows):
        gold = None
    for turn in range(len(answers.texts)):
        batch = sequences(answers, turn, end_ids, pad_id, next(reward_model.parameters()).device)
        rewards.append(reward_model.scores(batch, execution.micro_batch).double().cpu().numpy())
        if gold is not None:
            golds.append(gold.score(answers.conversations[turn], answers.texts[turn]))
    return np.stack(rewards), np.stack(golds) if gold is not None else None


def sequences(answers, turn, end_ids, pad_id, device):
    """The answers of one turn as forward.Sequences."""
    return forward.from_lists(answers.prompts[turn], answers.responses[turn], end_ids, pad_id, device)


def response_rows(answers, benchmark, model_name, rewards, golds):
    """Yield rows of responses.jsonl; where the kind of benchmark scores answers, with `scores` and `compared`."""
    for i, row in enumerate(answers.rows):
        texts = [texts[i] for texts in answers.texts]
        yield {
            "benchmark": benchmark,
            "prompt_id": row["id"],
            "sample": row["sample"],
            "category": row.get("category"),
            "model": model_name,
            "prompt": row["turns"],
            "responses": texts,
            "tokens": [len(responses[i]) for responses in answers.responses],
            "finish_reasons": [reasons[i] for reasons in answers.finish_reasons],
            "reward": float(rewards[:, i].mean()),
            "gold": None if golds is None else float(golds[:, i].mean()),
            **_scores(texts, row),
        }


def _scores(texts, row):
    """`scores` (measure -> number) of the answers to a benchmark's row, and `compared`; {} where nothing is scored."""
    if "scored_by" not in row:
        return {}
    score_of = data.benchmark_kinds()[row["scored_by"]].score
    scores = {measure: float(value) for measure, value in score_of(texts, row).items()}
    return {"scores": scores, "compared": _compared(row)}


def _compared(row):
    """Whether judges compare the answers to a benchmark's row."""
    return "scored_by" not in row or data.benchmark_kinds()[row["scored_by"]].compared


def mean_and_error(values, samples=1):
    """Mean and standard error over prompts; (None, None) without values, and None for the error of one prompt.

    The values of a prompt's samples follow each other. They are no independent evidence of other prompts, so that the
    error is that of prompts' means.
    """
    if values is None:
        return None, None
    values = np.asarray(values, dtype=np.float64).reshape(-1, samples).mean(axis=1)
    error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
    return float(values.mean()), error
