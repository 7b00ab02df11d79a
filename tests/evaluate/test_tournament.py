"""Bradley–Terry with ties against a plain optimiser, and Arena-Hard's scoring against a logistic regression."""

import json
import math

import numpy as np
import pytest
from scipy import optimize
from sklearn.linear_model import LogisticRegression

from salsa.evaluate import tournament
from salsa.workflow import runs


def verdict(prompt_id, a, b, winner, order=0, **more):
    names = {"prompt_id": prompt_id, "benchmark": "b", "model_a": a, "model_b": b}
    return {**names, "order": order, "winner": winner, "judge": "gold", **more}


def league(prompts=40, seed=0):
    """One verdict a pair and prompt, in order 0, of three models with scores 0, 0.7 and -0.5."""
    generator, scores = np.random.default_rng(seed), {"x": 0.0, "y": 0.7, "z": -0.5}
    rows = []
    for prompt in range(prompts):
        for a, b in (("x", "y"), ("y", "z"), ("z", "x")):
            odds = np.exp([scores[a], scores[b], (scores[a] + scores[b]) / 2 - 0.5])
            rows.append(
                verdict(prompt, a, b, str(generator.choice(["model_a", "model_b", "tie"], p=odds / odds.sum())))
            )
    return rows


def naive_scores(rows, models):
    """Davidson's likelihood, a verdict at a time, less the ridge."""

    def loss(parameters):
        scores, log_tie = dict(zip(models, parameters, strict=False)), parameters[-1]
        total = 0.005 * np.sum(parameters**2)
        for row in rows:
            a, b = scores[row["model_a"]], scores[row["model_b"]]
            odds = {"model_a": a, "model_b": b, "tie": log_tie + (a + b) / 2}
            total += np.logaddexp.reduce(list(odds.values())) - odds[row["winner"]]
        return total

    found = optimize.minimize(loss, np.zeros(len(models) + 1), method="BFGS", options={"gtol": 1e-6}).x
    return {model: found[i] - found[0] for i, model in enumerate(models)}


def test_scores_equal_a_plain_optimiser():
    rows = league()
    found = tournament.bradley_terry(rows, "x", resamples=50)
    expected = naive_scores(rows, ["x", "y", "z"])
    assert {model: values["score"] for model, values in found.items()} == pytest.approx(expected, abs=1e-4)
    assert list(found) == ["y", "x", "z"]
    assert found["x"] == {"score": 0, "low": 0, "high": 0}
    assert all(values["low"] <= values["score"] <= values["high"] for values in found.values())


def test_two_models_by_hand():
    """Of two models the scores' difference is the log of wins over losses, and ν the ties over their geometric mean."""
    rows = [verdict(i, "x", "y", "model_a" if i < 300 else "model_b" if i < 400 else "tie") for i in range(600)]
    found = tournament.bradley_terry(rows, "y", resamples=200, seed=1)
    assert found["x"]["score"] == pytest.approx(math.log(3), abs=1e-3)
    spread = math.sqrt(1 / 300 + 1 / 100)  # of a log of a ratio of counts
    assert found["x"]["high"] - found["x"]["low"] == pytest.approx(2 * 1.96 * spread, rel=0.2)


def test_anchor_moves_all_scores_alike():
    there, back = (tournament.bradley_terry(league(), anchor, resamples=2) for anchor in ("x", "z"))
    moved = {model: values["score"] - there["z"]["score"] for model, values in there.items()}
    assert {model: values["score"] for model, values in back.items()} == pytest.approx(moved)


def test_orders_turns_and_replicates_of_a_prompt_count_once():
    rows = league(12)
    copies = [
        {**row, "replicate": r, "turn": t, "order": o} for row in rows for r in (0, 1) for t in (1, 2) for o in (0, 1)
    ]
    once, often = (tournament.bradley_terry(r, "x", seed=3, resamples=50) for r in (rows, copies))
    assert json.dumps(once) == json.dumps(often)


def test_lines_in_another_order_and_errors_change_nothing():
    rows = league(12)
    more = [verdict(99, "x", "y", "error"), *reversed(rows)]
    first, second = (tournament.bradley_terry(r, "x", seed=3, resamples=50) for r in (rows, more))
    assert json.dumps(first) == json.dumps(second)


def test_a_chain_of_comparisons_joins_models_that_never_met():
    rows = [verdict(i, "x", "y", "model_a" if i < 60 else "model_b") for i in range(90)]
    rows += [verdict(i, "y", "z", "model_a" if i < 30 else "model_b") for i in range(90)]
    found = tournament.bradley_terry(rows, "z", resamples=2)
    assert found["y"]["score"] == pytest.approx(-math.log(2), abs=2e-3)
    assert found["x"]["score"] == pytest.approx(0, abs=2e-3)


def test_a_model_that_never_lost_is_finite_and_one_apart_has_no_score():
    rows = [verdict(i, "x", "y", "model_a") for i in range(80)] + [verdict(i, "u", "v", "tie") for i in range(80)]
    found = tournament.bradley_terry(rows, "y", resamples=20)
    assert 3 < found["x"]["score"] < 100 and math.isfinite(found["x"]["high"])
    assert all(math.isnan(value) for model in "uv" for value in found[model].values())
    assert list(found)[:2] == ["x", "y"]


def test_unknown_anchor():
    with pytest.raises(runs.UserError, match="the models are: x, y, z"):
        tournament.bradley_terry(league(2), "w")


def games(seed=0, number=120):
    generator = np.random.default_rng(seed)
    grades = [*tournament.GRADES, None, "A>B]]"]
    return [
        {"model": model, "order": int(generator.integers(2)), "grade": grades[generator.integers(len(grades))]}
        for model in ("m", "n")
        for _ in range(number)
    ]


def naive_arena_hard(rows, baseline):
    """Arena-Hard v0.1 as published: battles repeated by grade, ties both ways, a logistic regression, base 10."""
    models, features, wins = [baseline, "m", "n"], [], []
    for row in rows:
        if row["grade"] not in ("A>>B", "A>B", "A=B", "B>A", "B>>A"):
            continue
        a, b = (baseline, row["model"]) if row["order"] else (row["model"], baseline)
        line = [math.log(10) * ((model == a) - (model == b)) for model in models]
        for won in [1, 0] if row["grade"] == "A=B" else [row["grade"][0] == "A"] * 2:
            for _ in range(3 if ">>" in row["grade"] else 1):
                features.append(line)
                wins.append(int(won))
    fit = LogisticRegression(fit_intercept=False, C=np.inf, tol=1e-10, max_iter=1000).fit(features, wins)
    ratings = 400 * fit.coef_[0]
    return {model: 100 / (1 + 10 ** ((ratings[0] - ratings[i]) / 400)) for i, model in enumerate(models)}


def test_arena_hard_equals_its_logistic_regression():
    found = tournament.arena_hard(games(), "base")
    expected = naive_arena_hard(games(), "base")
    assert {model: values["score"] for model, values in found.items()} == pytest.approx(expected, abs=1e-3)


def test_arena_hard_by_hand():
    rows = [
        ("A>>B", 0),
        ("B>A", 0),
        ("A=B", 1),
        ("B>>A", 1),
        ("A>B", 1),
        (None, 0),
    ]  # 3 won, 1 lost, tie, 3 won, 1 lost
    found = tournament.arena_hard([{"model": "m", "grade": g, "order": o} for g, o in rows], "base", resamples=20)
    assert found["m"]["score"] == pytest.approx(100 * 6.5 / 9)
    assert (found["m"]["battles"], found["base"]["score"]) == (9, 50.0)


def test_arena_hard_resamples_battles():
    rows = games()
    battles = []  # of m, by hand
    for row in rows:
        if row["model"] == "m" and row["grade"] in tournament.GRADES:
            score, copies = tournament.GRADES[row["grade"]]
            battles += [1 - score if row["order"] else score] * copies
    found = tournament.arena_hard(rows, "base", resamples=2000)["m"]
    width = 2 * 1.96 * 100 * np.std(battles) / math.sqrt(len(battles))
    assert found["high"] - found["low"] == pytest.approx(width, rel=0.1)
    assert found == tournament.arena_hard(rows, "base", resamples=2000)["m"]


def test_arena_hard_without_a_game_and_without_a_loss():
    assert list(tournament.arena_hard([{"model": "m", "grade": None, "order": 0}], "base")) == ["base"]
    assert tournament.arena_hard([{"model": "m", "grade": "A>B", "order": 0}], "base")["m"]["score"] == 100


def test_one_prompt_has_no_interval():
    rows = [verdict(1, "x", "y", "model_a")]
    assert all(math.isnan(tournament.bradley_terry(rows, "y")[name][side]) for name in "xy" for side in ("low", "high"))
    many = [verdict(i, "x", "y", "model_a" if i % 3 else "model_b") for i in range(9)]
    assert math.isnan(tournament.bradley_terry(many, "y", resamples=19)["x"]["low"])
    assert math.isfinite(tournament.bradley_terry(many, "y", resamples=20)["x"]["low"])
