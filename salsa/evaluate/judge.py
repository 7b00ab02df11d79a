"""Pairwise verdicts on responses that are already written: the candidate against each of its baselines.

Most judges score each response by itself and compare the scores: `gold`, the score that PPO never sees; `vader`, the
compound sentiment of a lexicon (Hutto & Gilbert, ICWSM 2014); `reward_model`, one that was trained on other preferences
than PPO's. They can't prefer a place; both orders are judged all the same, so that every judge's verdicts have one
form. `openai` asks a language model over the network (salsa/judges/language_model.py). Verdicts are appended as they
come, so a killed run continues where it stopped.
"""

import contextlib
import functools
import math

from tqdm import tqdm

from salsa.data.messages import assistant, user
from salsa.judges import language_model
from salsa.judges.ledger import Comparison, Ledger, key
from salsa.workflow import config, runs

VERSION = 3
WINNERS = ("model_a", "model_b", "tie", "error")
ORDERS = (0, 1)  # 1: model_b is shown first


def judge(settings, parents, output, execution):
    """Write verdicts.jsonl: candidate (model_a) against every baseline (model_b), both orders of every prompt.

    Parents: `candidate`, a folder whose responses.jsonl has rows of model "policy", and `baseline/<name>` for each
    of `settings.baselines`, the value naming the model of the rows to take; of `reward_model` also `scorer`, of
    `openai` also `benchmark/<name>`. A line is a `Comparison.question` with `winner`, `judge`, `replicate`, and what
    the judge adds. When all is judged, the lines stand in the order of baselines, prompts, turns and orders.
    """
    candidate = responses(parents["candidate"], "policy")
    baselines = {name: responses(parents[f"baseline/{name}"], model) for name, model in settings.baselines.items()}
    check(candidate, baselines, parents)
    by_turn = settings.judge.kind == "openai"
    comparisons = list(compare(settings.candidate, candidate, baselines, by_turn))
    own = open_judge(settings, parents, output, execution, comparisons)
    verdicts = Ledger(output / "verdicts.jsonl", comparisons, lambda line: line["winner"] in WINNERS)
    kept = {key(line) for line in verdicts.lines}
    left = [comparison for comparison in comparisons if key(comparison.question) not in kept]
    named = {"judge": settings.name, "replicate": settings.replicate}
    try:
        with contextlib.closing(own.verdicts(left)) as judged:
            for comparison, found in tqdm(judged, settings.name, len(left), mininterval=10):
                verdicts.append(comparison.question | found | named)
    except language_model.Interrupted as interrupted:
        reason = f"judge {settings.name}: {interrupted}"
        raise runs.UserError(f"{reason}; {len(verdicts.lines)} of {len(comparisons)} verdicts are kept") from None
    verdicts.finish()
    counts = {"prompts": len(candidate), "baselines": len(baselines), "kept": len(kept)}
    return counts | {"errors": sum(line["winner"] == "error" for line in verdicts.lines)} | own.finish()


def compare(name, candidate, baselines, by_turn):
    """Every comparison, in the order of the finished file; `by_turn` makes one of each turn of a conversation."""
    for baseline, rows in baselines.items():
        for place, row in candidate.items():
            turns = len(row["responses"])
            for turn in range(1, turns + 1) if by_turn and turns > 1 else (None,):
                for order in ORDERS:
                    yield Comparison(name, baseline, row, rows[place], order, turn)


def open_judge(settings, parents, output, execution, comparisons):
    """The judge of the settings, ready to be asked. UserError for one that is unknown or lacks what it needs.

    It has `verdicts(comparisons)`, which yields each comparison with a dictionary of `winner` and what else is to be
    said, in any order, and `finish()`, which returns counts for the manifest.
    """
    kind, margin = settings.judge.kind, settings.judge.tie_margin
    if kind == "gold":
        return ScoringJudge(lambda rows: map(gold, rows), margin)
    if kind == "vader":
        sentiment = _vader()
        return ScoringJudge(lambda rows: map(sentiment, rows), margin)
    if kind == "reward_model":
        return ScoringJudge(lambda rows: rewards(rows, parents["scorer"], execution), margin)
    if kind == "openai":
        return language_model.LanguageModelJudge(settings, parents, output, execution, comparisons)
    raise runs.UserError(f"judge.kind: {kind!r} is no judge; choose gold, vader, reward_model or openai")


class ScoringJudge:
    """Prefers the response with the higher score.

    Args:
        scores: from rows of responses.jsonl to their scores.
        tie_margin: a difference up to this is a tie.
    """

    def __init__(self, scores, tie_margin):
        self.scores, self.tie_margin = scores, tie_margin

    def verdicts(self, comparisons):
        rows = [row for both in comparisons for row in (both.row_a, both.row_b)]
        scores = list(self.scores(rows))
        for row, score in zip(rows, scores, strict=True):  # before the first verdict is kept
            if not math.isfinite(score):
                raise runs.UserError(f"{_named(row)} scores {score}, which can't be compared; mend what scores it")
        for comparison, score_a, score_b in zip(comparisons, scores[::2], scores[1::2], strict=True):
            yield comparison, {"winner": winner(score_a, score_b, self.tie_margin)}

    def finish(self):
        return {}


def winner(score_a, score_b, tie_margin=0.0):
    """The name of the better response, "model_a" or "model_b", or "tie" for a difference up to `tie_margin`."""
    if abs(score_a - score_b) <= tie_margin:
        return "tie"
    return "model_a" if score_a > score_b else "model_b"


def gold(row):
    """The gold score that came with the response."""
    score = row.get("gold")
    if score is None:
        raise runs.UserError(
            f"judge gold: {_named(row)} has no gold score; this data has no gold judge: choose another"
        )
    if not isinstance(score, int | float) or isinstance(score, bool):
        raise runs.UserError(f"judge gold: {_named(row)} has the gold score {score!r}, which is no number; mend it")
    return score


def _named(row):
    """What names a response in a message."""
    return f"the response of {row['model']} to {row['benchmark']}/{row['prompt_id']}"


def _vader():
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise runs.UserError("judge vader: not installed; run `pip install vaderSentiment`") from None
    analyser = SentimentIntensityAnalyzer()
    compound = functools.cache(lambda text: analyser.polarity_scores(text)["compound"])
    return lambda row: sum(map(compound, row["responses"])) / len(row["responses"])


def rewards(rows, scorer, execution):
    """The rewards of rows of responses.jsonl, means over their turns, in units of the scorer's deviation on sft0.

    Each turn is read in its conversation, with the scorer's own tokenizer; a response that was cut has no end token.
    What several rows share is scored once.
    """
    from salsa.data import chat
    from salsa.rl import forward, models

    turns = list(dict.fromkeys(turn for row in rows for turn in _turns(row)))
    if not turns:
        return []
    device = models.prepare_process(execution)
    model, tokenizer = models.load_score_model(scorer, device), models.load_tokenizer(scorer / "model")
    ends = chat.folder_end_ids(scorer / "model", tokenizer)
    end, encoded = chat.ending(tokenizer, ends), []
    for messages, finish_reason in turns:
        roles = (user, assistant)
        conversation = [roles[place % 2](text) for place, text in enumerate(messages)]
        encoded.append(chat.encode_answer(tokenizer, conversation, end, ends, finish_reason != "length"))
    prompts, answers = zip(*encoded, strict=True)
    batch = forward.from_lists(prompts, answers, [], tokenizer.pad_token_id, device)
    scores = dict(zip(turns, model.scores(batch, execution.micro_batch).tolist(), strict=True))
    return [sum(scores[turn] for turn in _turns(row)) / len(row["responses"]) for row in rows]


def _turns(row):
    """Of each turn: the texts up to and with its response, user's and model's in turn, and how the response ended."""
    said = [text for pair in zip(row["prompt"], row["responses"], strict=True) for text in pair]
    return [(tuple(said[: 2 * i + 2]), reason) for i, reason in enumerate(row["finish_reasons"])]


def responses(folder, model):
    """(benchmark, prompt_id) -> row of responses.jsonl, for one model. UserError where it has none."""
    path, rows = folder / "responses.jsonl", {}
    for number, row in enumerate(runs.read_jsonl(path), 1):
        problem = _problem(row)
        if problem:
            raise runs.UserError(f"{path}:{number}: {problem}; answer the benchmarks again")
        place = row["benchmark"], row["prompt_id"]
        if row["model"] == model and place in rows:
            raise runs.UserError(f"{path}:{number}: {_named(row)} stands there twice; remove one")
        if row["model"] == model and row.get("compared", True):
            rows[place] = row
    if not rows:
        raise runs.UserError(f"{path}: no response of model {model!r}; give the folder of a run that answered with it")
    return rows


def _problem(row):
    """What a line of responses.jsonl lacks that every judge needs, or None."""
    if not isinstance(row, dict):
        return "not an object"
    missing = [name for name in ("benchmark", "prompt_id", "model", "prompt", "responses") if name not in row]
    if missing:
        return f"has no {missing[0]!r}"
    if not all(isinstance(row[name], str | int) for name in ("benchmark", "prompt_id", "model")):
        return "its benchmark, prompt_id or model is neither text nor a number"
    for name in ("prompt", "responses"):
        if not isinstance(row[name], list) or not row[name] or not all(isinstance(text, str) for text in row[name]):
            return f"its {name!r} is not a list of texts, one a turn"
    if len(row["prompt"]) != len(row["responses"]):
        return f"has {len(row['responses'])} responses to {len(row['prompt'])} turns"
    return None


def check(candidate, baselines, parents):
    """Refuse a prompt that the candidate answered and a baseline did not, or that was another one for the baseline."""
    for name, rows in baselines.items():
        other = next(
            (key for key in candidate if key in rows and rows[key]["prompt"] != candidate[key]["prompt"]), None
        )
        if other:
            raise runs.UserError(
                f"{parents[f'baseline/{name}'] / 'responses.jsonl'}: {other[0]}/{other[1]} is not the prompt that the "
                "candidate answered; answer the same benchmarks with both"
            )
        missing = [key for key in candidate if key not in rows]
        if missing:
            raise runs.UserError(
                f"{parents[f'baseline/{name}'] / 'responses.jsonl'}: {len(missing)} of the candidate's prompts have no "
                f"response of {name}, first {missing[0][0]}/{missing[0][1]}; answer the same benchmarks with both"
            )


if __name__ == "__main__":
    runs.command(
        "judge",
        VERSION,
        judge,
        config.JudgeSettings,
        roles=("candidate", "baseline/NAME", "scorer", "benchmark/NAME"),
        description=__doc__,
        writes=("verdicts.jsonl",),
        may_write=("answers.jsonl", "templates"),
    )
