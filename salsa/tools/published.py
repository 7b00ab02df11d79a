"""Judgments that others published, as verdicts of this project, and the numbers that their own tables make of them.

    python -m salsa.tools.published FORMAT FILE [FILE …] --output VERDICTS.jsonl [--baseline NAME]

writes the files' verdicts as lines that `python -m salsa.evaluate.statistics` reads, and prints one JSON object: their
number, what was dropped and why, and the format's own leaderboard, computed from the same judgments as its authors
compute it. So this project's statistics can be compared with published tables, and published judgments get intervals.

| format | file | leaderboard |
|---|---|---|
| `mt-bench-pair` | FastChat's model_judgment/*_pair.jsonl | wins, ties and losses of show_result |
| `mt-bench-single` | FastChat's model_judgment/*_single.jsonl | mean scores by turn of show_result |
| `arena-hard` | arena-hard-auto's model_judgment/JUDGE/MODEL.jsonl, v0.1 | score and interval of v0.1's show_result |
| `alpaca-eval` | AlpacaEval's annotations.json | win rate, standard error, counts, length-controlled win rate |

Left out: downloading the files, and the versions of these benchmarks whose files differ.
"""

import argparse
import hashlib
import itertools
import json
import math
import sys
from collections import Counter, defaultdict

import numpy as np

from salsa.data import rows as reader
from salsa.evaluate import statistics, tournament
from salsa.judges.common import scoring
from salsa.judges.language_model import verdict_text
from salsa.workflow import runs
from salsa.workflow.messages import UserError

TIE_DELTA = 0.1  # FastChat's: scores no further apart than this are a tie
NO_SCORE = -1  # FastChat's, where the judge's answer holds no score or its API failed ($ERROR$)


def mt_bench_pair(rows, baseline=None):
    """Verdicts of FastChat's pairwise judgments, and what was dropped.

    Args:
        rows: with question_id, model_1, model_2, g1_winner and g2_winner ("model_1", "model_2", "tie" or "error"; a
            name, not a place, in both games), judge, and turn. In game 2 model_2 is shown first.
        baseline: where given, only rows with this model are used.

    An error drops its game alone, whereas show_result drops both games.
    """
    verdicts, dropped = [], Counter()
    for row in _with(rows, "question_id", "model_1", "model_2", "g1_winner", "g2_winner", "judge"):
        if baseline and baseline not in (row["model_1"], row["model_2"]):
            dropped["not against the baseline"] += 1
            continue
        for order, game in enumerate(("g1_winner", "g2_winner")):
            names = {"model_1": "model_a", "model_2": "model_b", "tie": "tie"}
            winner = names.get(row[game], "error")
            dropped["game without a winner"] += winner == "error"
            verdicts.append(_verdict(row, "mt_bench", row["model_1"], row["model_2"], order, winner))
    return verdicts, dropped


def mt_bench_pair_leaderboard(rows, baseline=None):
    """model -> its wins, losses, ties and rates, as FastChat's show_result prints them for pairwise judgments.

    A row counts as a win where both games name the same winner, as a tie where they differ or both say tie, and not at
    all where either is an error. "win_rate_adjusted" is (wins + ties/2) / all. Rows of both turns count alike.
    """
    counts = defaultdict(Counter)
    for row in _with(rows, "model_1", "model_2", "g1_winner", "g2_winner"):
        games, models = (row["g1_winner"], row["g2_winner"]), (row["model_1"], row["model_2"])
        if "error" in games or (baseline and baseline not in models):
            continue
        tie = games[0] == "tie" or games[0] != games[1]
        for name, model in zip(("model_1", "model_2"), models, strict=True):
            if model != baseline:
                counts[model]["tie" if tie else "win" if games[0] == name else "loss"] += 1
    table = {}
    for model, ends in counts.items():
        row = {end: ends[end] for end in ("win", "loss", "tie")}
        rates = {"win_rate": row["win"], "loss_rate": row["loss"], "win_rate_adjusted": row["win"] + row["tie"] / 2}
        table[model] = row | {name: value / ends.total() for name, value in rates.items()}
    return _best_first(table, "win_rate_adjusted")


def _best_first(table, measure):
    """A leaderboard (model -> its numbers) in the order of one of its numbers."""
    return dict(sorted(table.items(), key=lambda item: -item[1][measure]))


def mt_bench_single(rows, baseline=None):
    """Verdicts from FastChat's scores of single answers: of two models in a turn, the one with the higher score wins.

    Scores no further apart than `TIE_DELTA` are a tie, as in FastChat. The judge saw one answer at a time, so each pair
    has one verdict, of order 0, and no swap consistency. Without a baseline, all pairs of models are compared.

    Args:
        rows: with question_id, model, judge, score (1 to 10, -1 for none) and turn.
    """
    scores, dropped = _last_scores(rows)
    verdicts = []
    for _, models in itertools.groupby(sorted(scores, key=str), key=lambda key: key[:2]):
        rated = [(key[2], scores[key]) for key in models]
        for (model_a, row_a), (model_b, row_b) in itertools.combinations(rated, 2):
            if baseline == model_a:  # the candidate is model_a
                model_a, row_a, model_b, row_b = model_b, row_b, model_a, row_a
            if baseline in (None, model_b):
                winner = scoring.winner(row_a["score"], row_b["score"], TIE_DELTA)
                verdicts.append(_verdict(row_a, "mt_bench", model_a, model_b, 0, winner))
    return verdicts, dropped


def mt_bench_single_leaderboard(rows, baseline=None):
    """model -> its mean score in turn 1, turn 2 and over all rows, as FastChat's show_result prints them.

    Rows without a score are left out. Where a question's turn was judged twice the last score counts, whereas
    show_result takes both into its mean. `baseline` changes nothing.
    """
    scores, _ = _last_scores(rows)
    turns = defaultdict(lambda: defaultdict(list))
    for (_, turn, model), row in scores.items():
        turns[model][turn].append(row["score"])
    table = {}
    for model, by_turn in turns.items():
        scores = by_turn[1], by_turn[2], list(itertools.chain(*by_turn.values()))
        means = [float(np.mean(some)) if some else math.nan for some in scores]
        table[model] = dict(zip(("first_turn", "second_turn", "average"), means, strict=True))
    return _best_first(table, "average")


def _last_scores(rows):
    """(question, turn, model) -> the last row that judges it, if that has a score; and counts of dropped rows."""
    last, dropped = {}, Counter()
    for row in _with(rows, "question_id", "model", "judge", "score", "turn"):
        key = row["question_id"], row["turn"], row["model"]
        dropped["judged again later"] += key in last
        last[key] = row
    rated = {key: row for key, row in last.items() if row["score"] != NO_SCORE}
    dropped["no score"] = len(last) - len(rated)
    return rated, dropped


def arena_hard(rows, baseline="gpt-4-0314"):
    """Verdicts of Arena-Hard v0.1's judgments: each model (model_a) against the baseline (model_b).

    Args:
        rows: with question_id, model, judge, and games, two of {"score": a grade or null}. In game 1 the baseline is
            shown first (as A), in game 2 the model is.

    The line keeps the grade as `grade`; a decisive win counts as a win. A game without one of the five grades is an
    error.
    """
    verdicts, dropped = [], Counter()
    for game in _games(rows):
        graded = game["grade"] in verdict_text.GRADES
        winner = verdict_text.verdict(game["grade"], game["order"])["winner"] if graded else "error"
        dropped["game without a grade"] += not graded
        verdict = _verdict(game, "arena_hard", game["model"], baseline, game["order"], winner)
        verdicts.append(verdict | {"grade": game["grade"]})
    return verdicts, dropped


def arena_hard_leaderboard(rows, baseline="gpt-4-0314"):
    """Arena-Hard v0.1's own scores and intervals, see salsa.evaluate.tournament.arena_hard."""
    return tournament.arena_hard(_games(rows), baseline)


def _games(rows):
    """Yield a row for each game, with its `order` (1: the baseline is shown first) and `grade`."""
    for row in _with(rows, "question_id", "model", "judge", "games"):
        for order, game in zip((1, 0), row["games"], strict=False):
            yield row | {"order": order, "grade": (game or {}).get("score")}


def alpaca_eval(rows, baseline=None):
    """Verdicts of AlpacaEval's annotations: generator_2 (model_a) against generator_1 (model_b), the baseline.

    Args:
        rows: with instruction, generator_1, generator_2 and preference: from 1, the baseline's answer, to 2, 1.5 for a
            draw (0 in old files), or null.

    A preference above 1.5 is a win. The line keeps how sure the judge was as `score`, preference - 1. The file does not
    say which answer was shown first: all verdicts have order 0, and a share of first positions means nothing. A
    prompt's id is made from its instruction, so that it is the same in the files of all models.
    """
    verdicts, dropped, seen = [], Counter(), Counter()
    for row in _with(rows, "instruction", "generator_1", "generator_2", "preference"):
        if baseline and baseline != row["generator_1"]:
            dropped["not against the baseline"] += 1
            continue
        score = _alpaca_score(row)
        winner = "error" if score is None else scoring.winner(score, 0.5)
        dropped["no preference"] += winner == "error"
        digest = hashlib.sha256(row["instruction"].encode()).hexdigest()[:12]
        same = row["generator_2"], row["generator_1"], digest
        seen[same] += 1  # a set may hold an instruction twice
        names = {"question_id": digest if seen[same] == 1 else f"{digest}-{seen[same]}", "judge": row.get("annotator")}
        verdict = _verdict(names, "alpaca_eval", row["generator_2"], row["generator_1"], 0, winner)
        verdicts.append(verdict | {"score": score})
    return verdicts, dropped


def alpaca_eval_leaderboard(rows, baseline=None):
    """model -> the columns of AlpacaEval's leaderboard: rates × 100, `standard_error` s/√n with s over n - 1.

    `win_rate` is the mean of preference - 1, `discrete_win_rate` that of wins and half the draws. The published
    `length_controlled_winrate` comes from a regression with one more term, each instruction's difficulty, fitted on all
    models of the leaderboard, with two gamed baselines added and an L1 penalty chosen by cross-validation. Ours,
    `length_controlled`, leaves these out, and comes near it without being equal.
    """
    models = defaultdict(list)
    for row in _with(rows, "generator_1", "generator_2", "preference"):
        if baseline in (None, row["generator_1"]) and _alpaca_score(row) is not None:
            models[row["generator_2"]].append(row)
    table = {}
    for model, judged in models.items():
        scores = np.array([_alpaca_score(row) for row in judged])
        wins, draws, losses = statistics.outcomes(scores)
        error = float(scores.std(ddof=1)) / math.sqrt(len(scores)) if len(scores) > 1 else math.nan
        table[model] = {
            "win_rate": 100 * float(scores.mean()),
            "standard_error": 100 * error,
            "n_wins": wins,
            "n_wins_base": losses,
            "n_draws": draws,
            "n_total": len(scores),
            "discrete_win_rate": 100 * (wins + draws / 2) / len(scores),
        }
        if all("output_1" in row and "output_2" in row for row in judged):
            lengths = np.array([[len(row["output_2"]), len(row["output_1"])] for row in judged])
            table[model]["avg_length"] = int(lengths[:, 0].mean())
            rate = statistics.length_controlled(scores, lengths[:, 0] - lengths[:, 1])
            table[model]["length_controlled"] = 100 * rate
    return _best_first(table, "win_rate")


def _alpaca_score(row):
    """preference - 1, where the 0 of old files is a draw; None without a preference."""
    preference = row["preference"]
    if preference == 0:
        return 0.5
    return preference - 1 if preference is not None and 1 <= preference <= 2 else None  # not for nan either


def _verdict(row, benchmark, model_a, model_b, order, winner):
    judge = row["judge"]
    verdict = {
        "prompt_id": row["question_id"],
        "benchmark": benchmark,
        "model_a": model_a,
        "model_b": model_b,
        "order": order,
        "winner": winner,
        "judge": judge[0] if isinstance(judge, list) else judge or "unknown",  # FastChat: [model, name of the prompt]
    }
    return verdict | ({"turn": row["turn"]} if "turn" in row else {})


def _with(rows, *fields):
    """Yield the rows, each of which must have the fields, else UserError."""
    for number, row in enumerate(rows, 1):
        missing = [name for name in fields if name not in row] if isinstance(row, dict) else fields
        if missing:
            raise UserError(f"row {number}: no field {missing[0]!r}; is the file of this format?")
        yield row


FORMATS = {
    "mt-bench-pair": (mt_bench_pair, mt_bench_pair_leaderboard),
    "mt-bench-single": (mt_bench_single, mt_bench_single_leaderboard),
    "arena-hard": (arena_hard, arena_hard_leaderboard),
    "alpaca-eval": (alpaca_eval, alpaca_eval_leaderboard),
}


def main(argv=None):
    """The command line; a user's mistake ends it with one line."""
    parser = argparse.ArgumentParser(prog="python -m salsa.tools.published", description=__doc__.split("\n")[0])
    parser.add_argument("format", choices=FORMATS)
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument("--output", required=True, help="the verdicts to write")
    parser.add_argument("--baseline", help="the model that others are compared with; arena-hard: gpt-4-0314")
    arguments = parser.parse_args(argv)
    runs.print_anything()
    convert, leaderboard = FORMATS[arguments.format]
    options = {"baseline": arguments.baseline} if arguments.baseline else {}
    try:
        rows = [row for path in arguments.files for _, row in reader.read(path)]
        verdicts, dropped = convert(rows, **options)
        table = leaderboard(rows, **options)
    except UserError as error:
        sys.exit(f"{parser.prog}: {error}")
    runs.write_jsonl(arguments.output, verdicts)
    result = {"verdicts": len(verdicts), "dropped": {why: n for why, n in dropped.items() if n}, "leaderboard": table}
    print(json.dumps(_plain(result), ensure_ascii=False, indent=2))


def _plain(value):
    """The value with None, JSON's null, in place of nan."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if value != value else value


if __name__ == "__main__":
    main()
