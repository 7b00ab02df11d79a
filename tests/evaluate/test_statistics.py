"""Win rates, judges, curves and decisions against naive loops and hand-computed numbers."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, special
from scipy import stats as scipy_stats
from sklearn import metrics

from salsa.evaluate import statistics


def verdict(prompt_id, order, winner, benchmark="b", a="new", b="old", judge="gold", **more):
    return {
        "prompt_id": prompt_id,
        "benchmark": benchmark,
        "model_a": a,
        "model_b": b,
        "order": order,
        "winner": winner,
        "judge": judge,
        **more,
    }


HAND = [
    verdict(1, 0, "model_a"),
    verdict(1, 1, "model_a"),  # win, 1
    verdict(2, 0, "model_a"),
    verdict(2, 1, "model_b"),  # tie, 0.5, inconsistent
    verdict(3, 0, "tie"),
    verdict(3, 1, "model_b"),  # loss, 0.25, inconsistent
    verdict(4, 0, "tie"),
    verdict(4, 1, "tie"),  # tie, 0.5
    verdict(5, 0, "error"),
    verdict(5, 1, "model_a"),  # win, 1, one order
    verdict(6, 0, "error"),
    verdict(6, 1, "error"),  # no prompt
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_hand_computed():
    found = statistics.compare(HAND, "new", "old", seed=3)
    assert found["adjusted_win_rate"] == pytest.approx((1 + 0.5 + 0.25 + 0.5 + 1) / 5)
    assert (found["wins"], found["ties"], found["losses"], found["prompts"]) == (2, 2, 1, 5)
    assert found["errors"] == 3
    assert found["swap_consistency"] == 2 / 4
    assert found["sign_test_p"] == pytest.approx(1.0)
    assert found["ci_low"] <= found["adjusted_win_rate"] <= found["ci_high"]


def test_the_other_way_round_is_the_complement():
    there, back = statistics.compare(HAND, "new", "old"), statistics.compare(HAND, "old", "new")
    assert there["adjusted_win_rate"] + back["adjusted_win_rate"] == pytest.approx(1)
    assert (there["wins"], there["swap_consistency"]) == (back["losses"], back["swap_consistency"])


def test_a_candidate_may_be_model_b_in_some_lines():
    renamed = [verdict(1, 0, "model_a"), verdict(1, 0, "model_b", a="old", b="new")]  # shown first, then second
    found = statistics.compare(renamed, "new", "old")
    assert (found["adjusted_win_rate"], found["swap_consistency"]) == (1.0, 1.0)


def test_last_line_of_a_duplicate_wins():
    rows = [verdict(1, 0, "error"), verdict(1, 0, "model_b"), verdict(1, 0, "model_a")]
    found = statistics.compare(rows, "new", "old")
    assert (found["adjusted_win_rate"], found["errors"], found["prompts"]) == (1.0, 0, 1)


def test_same_id_in_two_benchmarks_is_two_prompts_and_replicates_share_one():
    rows = [verdict(1, 0, "model_a"), verdict(1, 0, "model_b", benchmark="c")]
    assert statistics.compare(rows, "new", "old")["prompts"] == 2
    rows = [verdict(1, 0, "model_a", replicate=0), verdict(1, 0, "tie", replicate=1)]
    assert statistics.prompt_scores(statistics.battles(rows, "new", "old")[0]) == {("b", 1): 0.75}


def test_copies_of_prompts_do_not_narrow_the_interval():
    once = [verdict(i, 0, "model_a" if i % 2 else "model_b", replicate=0) for i in range(40)]
    copies = [{**row, "replicate": r} for row in once for r in range(5)]
    first, second = statistics.compare(once, "new", "old"), statistics.compare(copies, "new", "old")
    assert (first["ci_low"], first["ci_high"]) == (second["ci_low"], second["ci_high"])


def test_a_turn_is_judged_by_itself():
    rows = [
        verdict(1, 0, "model_a", turn=1),
        verdict(1, 1, "model_a", turn=1),
        verdict(1, 0, "model_b", turn=2),
        verdict(1, 1, "tie", turn=2),
        verdict(1, 0, "model_a", turn=2),  # judged again
        verdict(2, 0, "model_b", turn=1),  # turn 2 of prompt 2 is lost
    ]
    found = statistics.compare(rows, "new", "old")
    assert statistics.prompt_scores(statistics.battles(rows, "new", "old")[0]) == {
        ("b", 1): (1 + 1 + 1 + 0.5) / 4,
        ("b", 2): 0.0,
    }
    assert (found["prompts"], found["swap_consistency"]) == (2, 0.5)


WINNERS = st.sampled_from(statistics.WINNERS)
ROWS = st.lists(
    st.builds(
        lambda prompt, order, winner, swap, more: verdict(
            prompt, order, winner, a="old" if swap else "new", b="new" if swap else "old", **more
        ),
        st.integers(0, 3),
        st.integers(0, 1),
        WINNERS,
        st.booleans(),
        st.fixed_dictionaries({"replicate": st.integers(0, 1), "turn": st.integers(1, 2)}),
    ),
    max_size=40,
)


def naive_scores(rows):
    """prompt -> score, by plain loops over a table of who was shown first."""
    scores = {}
    for prompt in {row["prompt_id"] for row in rows}:
        replicates = []
        for replicate in (0, 1):
            orders = []
            for turn, first_shown in [(1, "new"), (1, "old"), (2, "new"), (2, "old")]:
                last = None
                for row in rows:
                    shown = row["model_a"] if row["order"] == 0 else row["model_b"]
                    place = (row["prompt_id"], row["replicate"], row["turn"], shown)
                    if place == (prompt, replicate, turn, first_shown):
                        last = row
                if last is not None and last["winner"] != "error":
                    name = last.get(last["winner"], "tie")
                    orders.append({"new": 1.0, "old": 0.0, "tie": 0.5}[name])
            if orders:
                replicates.append(sum(orders) / len(orders))
        if replicates:
            scores["b", prompt] = sum(replicates) / len(replicates)
    return scores


@settings(max_examples=150, deadline=None)
@given(ROWS)
def test_scores_equal_naive_loops(rows):
    expected = naive_scores(rows)
    assert statistics.prompt_scores(statistics.battles(rows, "new", "old")[0]) == pytest.approx(expected)
    found = statistics.compare(rows, "new", "old", resamples=20)
    assert found["wins"] + found["ties"] + found["losses"] == found["prompts"] == len(expected)
    if expected:
        assert found["adjusted_win_rate"] == pytest.approx(sum(expected.values()) / len(expected))
        if len(expected) > 1:
            assert 0 <= found["ci_low"] <= found["ci_high"] <= 1
        else:
            assert math.isnan(found["ci_low"]) and math.isnan(found["ci_high"])
    else:
        assert math.isnan(found["adjusted_win_rate"])


@settings(max_examples=50, deadline=None)
@given(ROWS.filter(bool), st.randoms())
def test_line_order_across_prompts_changes_nothing(rows, random):
    unique = list(
        {
            (r["prompt_id"], r["order"], r["replicate"], r["turn"]): {**r, "model_a": "new", "model_b": "old"}
            for r in rows
        }.values()
    )
    shuffled = random.sample(unique, len(unique))
    first, second = (statistics.compare(r, "new", "old", resamples=50) for r in (unique, shuffled))
    assert json.dumps(first) == json.dumps(second)


def test_bootstrap_equals_a_naive_loop():
    scores = np.random.default_rng(0).choice([0, 0.25, 0.5, 0.75, 1], 60)
    generator, means = np.random.default_rng(5), []
    for row in generator.integers(60, size=(4000, 60)):
        means.append(sum(scores[i] for i in row) / 60)
    expected = np.quantile(means, [0.025, 0.975])
    assert statistics.bootstrap_interval(scores, 5, 20_000) == pytest.approx(tuple(expected), abs=0.01)  # 2 steps
    assert statistics.bootstrap_interval(scores, 5) == statistics.bootstrap_interval(scores[::-1], 5)
    assert statistics.bootstrap_interval(scores, 6) != statistics.bootstrap_interval(scores, 5)
    assert all(map(math.isnan, statistics.bootstrap_interval([])))


@pytest.mark.parametrize(
    "scores, low, high",
    [
        ([1.0] * 8, 0.025 ** (1 / 8), 1),  # Clopper and Pearson
        ([0.0] * 8, 0, 1 - 0.025 ** (1 / 8)),
        ([0.5] * 8, 0.025 ** (1 / 8) / 2, 1 - 0.025 ** (1 / 8) / 2),  # at least q of all there could be are ties
        ([1.0, 1.0], math.sqrt(0.025), 1),
        ([1.0, 0.75], 0.75 * math.sqrt(0.025), 1),  # two prompts exclude nothing
        ([1.0, 0.0], 0, 1),
        ([1.0], math.nan, math.nan),
        ([], math.nan, math.nan),
    ],
)
def test_intervals_know_how_many_prompts_there_are(scores, low, high):
    assert statistics.bootstrap_interval(scores) == pytest.approx((low, high), nan_ok=True)
    interval = statistics.length_controlled_interval(scores, np.arange(len(scores)), resamples=20)
    assert interval == pytest.approx((low, high), nan_ok=True)


def test_bounds_of_wins_alone_are_those_of_clopper_and_pearson():
    for wins, count in ((7, 7), (0, 7)):
        expected = scipy_stats.binomtest(wins, count).proportion_ci(method="exact")
        assert statistics.bootstrap_interval([float(wins > 0)] * count) == pytest.approx(tuple(expected))


def test_too_few_resamples_are_no_interval():
    assert all(map(math.isnan, statistics.bootstrap_interval([0, 1, 1], 0, 19)))
    assert all(map(math.isnan, statistics.length_controlled_interval([0, 1, 1], [1, 2, 3], 0, 19)))


def judged(prompts, place=0.0, better=0.6, dice=0.0, seed=0, errors=0.0, ties=0.0):
    """Verdicts in both orders of a judge that names the first place with this chance, or throws dice, makes errors and
    ties; otherwise it follows the answers, of which the candidate's are better on that share of prompts."""
    generator, rows = np.random.default_rng(seed), []
    for i, wins in enumerate(generator.random(prompts) < better):
        for order in (0, 1):
            kind = generator.choice(5, p=[place, dice, errors, ties, 1 - place - dice - errors - ties])
            winner = ("model_b" if order else "model_a", "model_a" if generator.random() < 0.5 else "model_b", "error",
                      "tie", "model_a" if wins else "model_b")[kind]  # fmt: skip
            rows.append(verdict(i, order, winner))
    return rows


@pytest.mark.parametrize(
    "judge, low, high",
    [
        ({"better": 1.0}, 0.97, 1),  # the same model always
        ({"place": 1.0}, 0, 0),
        ({"dice": 1.0}, 0, 0.2),
        ({"ties": 1.0}, math.nan, math.nan),
        ({"errors": 1.0}, math.nan, math.nan),
        ({}, 0.97, 1),
        ({"place": 0.5}, 0.4, 0.55),
        ({"dice": 0.5}, 0.4, 0.6),
        ({"place": 0.3, "dice": 0.2}, 0.4, 0.6),
        ({"place": 0.95}, 0, 0),  # cannot be told from a judge of places alone
    ],
)
def test_how_much_of_a_preference_comes_from_the_answers(judge, low, high):
    found = statistics.discrimination(statistics.place_counts(judged(300, **judge)), resamples=200)
    if math.isnan(low):
        assert all(map(math.isnan, found))
    else:
        assert low <= found[0] <= high and found[1] <= found[0] <= found[2]
        assert found[1] == 0 or sum(judge.get(name, 0) for name in ("place", "dice")) < 0.9


def test_few_agreements_may_be_chance():
    assert statistics.discrimination([[1, 0, 0]] * 4)[1] == 0
    assert statistics.discrimination([[1, 0, 0]] * 40)[1] > 0.9


def test_places_are_counted_by_prompt():
    counts = statistics.place_counts(
        [*HAND, verdict(7, 0, "model_b", a="x", b="y"), verdict(7, 1, "model_b", a="x", b="y")]
    )
    assert counts.sum(axis=0).tolist() == [2, 1, 0]  # 1 and 7; 2; the others have a tie or an error


def test_intervals_of_a_judge():
    rows = judged(200, place=0.5)
    quality, found = statistics.judge_quality(rows), statistics.judge_intervals(rows, resamples=300)
    for name in ("swap_consistency", "first_position_share"):
        assert found[f"{name}_low"] < quality[name] < found[f"{name}_high"]
        assert found[f"{name}_high"] - found[f"{name}_low"] == pytest.approx(
            4 * math.sqrt(quality[name] * (1 - quality[name]) / 200), rel=0.5
        )
    nothing = statistics.judge_intervals(judged(9, errors=1.0))
    assert set(map(str, nothing.values())) == {"nan"}


def test_interval_of_kappa():
    gold = judged(150)
    noisy = [row | {"judge": "other"} for row in judged(150, dice=0.4)]
    blind = [row | {"judge": "other"} for row in judged(150, dice=1.0, seed=3)]
    for rows, above in ((noisy, True), (blind, False)):
        kappa = statistics.agreement(gold + rows, "gold", "other")["kappa"]
        low, high = statistics.kappa_interval(gold + rows, "gold", "other", resamples=200)
        assert low < kappa < high and (low > 0) == above
    assert all(map(math.isnan, statistics.kappa_interval(gold, "gold", "other")))


def test_replicate_interval():
    mean, low, high = statistics.replicate_interval([1.0, 2.0, 3.0])
    half = 4.302652729911275 / math.sqrt(3)  # t(0.975, 2) x sd 1
    assert (mean, low, high) == pytest.approx((2, 2 - half, 2 + half))
    mean, low, high = statistics.replicate_interval([4.0])
    assert mean == 4 and math.isnan(low) and math.isnan(high)
    assert math.isnan(statistics.replicate_interval([float("nan")])[0])


@pytest.mark.parametrize("wins, losses, expected", [(0, 0, 1), (5, 0, 2 / 32), (3, 1, 10 / 16), (2, 2, 1)])
def test_sign_test(wins, losses, expected):
    assert statistics.sign_test(wins, losses) == pytest.approx(expected)


def test_holm():
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.9, 0.8]).tolist() == [1.0, 1.0]
    assert statistics.holm([]).size == 0


def test_swap_consistency_of_nothing():
    assert math.isnan(statistics.swap_consistency([verdict(1, 0, "tie")], "new", "old"))


def test_judge_quality_by_hand():
    found = statistics.judge_quality(
        [*HAND, verdict(7, 0, "model_b", a="x", b="y"), verdict(7, 1, "model_b", a="x", b="y")]
    )
    # Prompts 1, 2, 4 and 7 have both orders; 2 has them apart, and so has 3.
    assert found == {
        "verdicts": 11,
        "errors": 3,
        "ties": pytest.approx(3 / 11),
        "swap_consistency": 3 / 5,
        # Decided, shown first is the winner: 1/0, 2/0, 2/1, 3/1, 7/1; shown second: 1/1, 5/1, 7/0.
        "first_position_share": 5 / 8,
    }
    nothing = statistics.judge_quality([verdict(1, 0, "error")])
    assert (nothing["verdicts"], nothing["errors"]) == (0, 1)
    assert all(math.isnan(nothing[name]) for name in ("ties", "swap_consistency", "first_position_share"))


def test_a_judge_of_places_and_one_of_models():
    places = [verdict(i, order, "model_b" if order else "model_a") for i in range(4) for order in (0, 1)]
    models = [verdict(i, order, "model_a") for i in range(4) for order in (0, 1)]
    found = [statistics.judge_quality(rows) for rows in (places, models)]
    assert [(f["first_position_share"], f["swap_consistency"]) for f in found] == [(1.0, 0.0), (0.5, 1.0)]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(WINNERS, WINNERS, st.booleans()), max_size=30))
def test_agreement_equals_sklearn(rows):
    verdicts, labels = [], []
    for i, (first, second, swapped) in enumerate(rows):
        verdicts.append(verdict(i, 0, first, judge="one"))
        name = {"model_a": "model_b", "model_b": "model_a"}.get(second, second) if swapped else second
        # Calling the models by each other's letters, and so showing the other one first, is the same comparison.
        models = {"a": "old", "b": "new", "order": 1} if swapped else {"order": 0}
        verdicts.append(verdict(i, winner=name, judge="two", **models))
        if "error" not in (first, second):
            labels.append((first, second))
    found = statistics.agreement(verdicts, "one", "two")
    back = statistics.agreement(verdicts, "two", "one")
    assert found["comparisons"] == len(labels)
    if not labels:
        assert math.isnan(found["agreement"]) and math.isnan(found["kappa"])
        return
    assert found["agreement"] == pytest.approx(np.mean([a == b for a, b in labels]))
    if len({label for pair in labels for label in pair}) == 1:
        assert math.isnan(found["kappa"])
    else:
        assert found["kappa"] == pytest.approx(metrics.cohen_kappa_score(*zip(*labels, strict=True)))
        assert back == pytest.approx(found)


def naive_length_controlled(scores, differences):
    feature = np.tanh(differences / np.std(differences, ddof=1))

    def loss(weights):
        chances = special.expit(weights[0] + weights[1] * feature)
        entropy = special.xlogy(scores, chances) + special.xlogy(1 - scores, 1 - chances)
        return 0.005 * weights[1] ** 2 - entropy.sum()

    return special.expit(optimize.minimize(loss, [0, 0], method="BFGS", options={"gtol": 1e-7}).x[0])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0, 0.25, 0.5, 1]), st.integers(-40, 40)), min_size=2, max_size=30))
def test_length_control_equals_a_naive_fit(rows):
    scores, differences = np.array(rows, dtype=float).T
    found = statistics.length_controlled(scores, differences)
    assert 0 <= found <= 1
    if np.ptp(differences) == 0 or scores.mean() in (0, 1):
        assert found == pytest.approx(scores.mean())
    else:
        assert found == pytest.approx(naive_length_controlled(scores, differences), abs=1e-4)
        assert statistics.length_controlled(scores, 7 * differences) == pytest.approx(found)  # words, letters, tokens
        assert statistics.length_controlled(1 - scores, -differences) == pytest.approx(1 - found)


def test_length_is_controlled_for():
    """Wins by length alone are no wins; wins whatever the length are."""
    differences = np.array([-30, -20, -10, 10, 20, 30, 40, 50])
    assert statistics.length_controlled(differences > 0, differences) == pytest.approx(0.5, abs=0.15)
    assert np.mean(differences > 0) == 0.625
    assert statistics.length_controlled([1, 0, 1, 1] * 2, differences) == pytest.approx(0.75, abs=0.05)
    assert statistics.length_controlled([1, 0], [5, 5]) == 0.5  # no spread
    assert statistics.length_controlled([0.75], [5]) == 0.75
    assert math.isnan(statistics.length_controlled([], []))


def test_length_controlled_interval():
    generator = np.random.default_rng(1)
    differences = generator.normal(20, 50, 300)
    chances = special.expit(0.4 + np.tanh(differences / 50))
    scores = (generator.random(300) < chances).astype(float)
    low, high = statistics.length_controlled_interval(scores, differences, seed=2, resamples=200)
    assert low < statistics.length_controlled(scores, differences) < high
    naive = []
    for _ in range(60):
        drawn = generator.integers(300, size=300)
        naive.append(statistics.length_controlled(scores[drawn], differences[drawn]))
    assert high - low == pytest.approx(4 * np.std(naive), rel=0.35)
    again = statistics.length_controlled_interval(scores, differences, seed=2, resamples=200)
    assert again == (low, high)
    assert statistics.length_controlled_interval([1] * 9, range(9), resamples=20) == (0.025 ** (1 / 9), 1)
    assert all(map(math.isnan, statistics.length_controlled_interval([], [])))


@pytest.mark.parametrize(
    "first, second, expected",
    [
        ([(0, 0), (2, 2)], [(1, 0), (3, 0)], 1.5),  # over [1, 2], x - 0
        ([(2, 2), (0, 0)], [(3, 0), (1, 0)], 1.5),  # in any order
        ([(0, 0), (1, 1), (2, 0)], [(0, 0), (2, 0)], 0.5),  # a tent
        ([(0, 0), (2, 2)], [(0, 0), (1, 3), (2, 0)], -0.5),  # knots of the second
        ([(0, 1), (0, 3), (2, 2)], [(0, 0), (2, 0)], 2),  # two values at one kl
        ([(0, 1), (1, 5)], [(1, 2), (2, 9)], 3),  # they touch where both were measured
        ([(1, 5)], [(1, 2)], 3),
        ([(1, 5)], [(0, 1), (2, 3)], math.nan),  # not measured at 1
        ([(1, 5)], [(0, 1), (1, 2), (2, 3)], 3),
        ([(0, 0), (1, 1)], [(1.1, 0), (2, 0)], math.nan),  # never beyond
        ([(0, 0), (math.nan, 5), (1, 1)], [(0, 0), (1, 0), (2, math.nan)], 0.5),
        ([], [(0, 0), (1, 0)], math.nan),
    ],
)
def test_matched_difference_by_hand(first, second, expected):
    found = statistics.matched_difference(np.array(first), np.array(second))
    assert found == pytest.approx(expected, nan_ok=True)


CURVE = st.lists(
    st.tuples(st.integers(0, 20), st.integers(-5, 5)), min_size=2, max_size=6, unique_by=lambda point: point[0]
)


@settings(max_examples=100, deadline=None)
@given(CURVE, CURVE)
def test_matched_difference_equals_a_fine_grid(first, second):
    found = statistics.matched_difference(first, second)
    assert statistics.matched_difference(second, first) == pytest.approx(-found, nan_ok=True)
    first, second = sorted(first), sorted(second)
    low, high = max(first[0][0], second[0][0]), min(first[-1][0], second[-1][0])
    if low >= high:
        return
    middles = low + (high - low) * (np.arange(20_000) + 0.5) / 20_000
    grid = [np.interp(middles, *np.transpose(curve)) for curve in (first, second)]
    assert found == pytest.approx(np.mean(grid[0] - grid[1]), abs=1e-5)


def test_command_prints_one_object_without_torch(tmp_path):
    path = write(tmp_path / "verdicts.jsonl", HAND)
    code = (
        "import sys; from salsa.evaluate import statistics; statistics.main(sys.argv[1:]);"
        "assert not {'torch', 'pandas', 'hydra'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, str(path), "--candidate", "new", "--baseline", "old", "--seed", "1"]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert set(found) == {
        "adjusted_win_rate", "ci_low", "ci_high", "wins", "ties", "losses", "prompts", "swap_consistency",
        "sign_test_p", "errors",
    }  # fmt: skip
    assert found["adjusted_win_rate"] == pytest.approx(0.65)


@pytest.mark.parametrize(
    "rows, arguments, message",
    [
        (None, ["old"], "no such file"),
        (HAND, ["other"], "its pairs are: new and old"),
        (HAND, ["new"], "compare two models"),
        ([*HAND, verdict(1, 0, "tie", judge="vader")], ["old"], "choose one with --judge"),
        (HAND, ["old", "--judge", "vader"], "its judges: gold"),
        ([HAND[0], verdict(1, 0, "A")], ["old"], "verdicts.jsonl:2: winner 'A'"),
        ([verdict(1, 2, "tie")], ["old"], "verdicts.jsonl:1: order 2"),
        ([verdict(1, 0, "tie", turn="2")], ["old"], "verdicts.jsonl:1: turn '2'"),
        ([verdict(1, True, "tie")], ["old"], "verdicts.jsonl:1: order True"),
        ([verdict(math.nan, 0, "tie")], ["old"], "verdicts.jsonl:1: prompt_id nan is neither"),
        ([verdict([1], 0, "tie")], ["old"], "verdicts.jsonl:1: prompt_id [1] is neither"),
        ([verdict(1, 0, "tie", replicate={})], ["old"], "verdicts.jsonl:1: replicate {} is neither"),
        ([verdict(1, 0, "tie", a=3)], ["old"], "verdicts.jsonl:1: model_a 3 is no text"),
        ([verdict(1, 0, ["tie"])], ["old"], "verdicts.jsonl:1: winner ['tie']"),
        ([verdict(i, 0, "tie", a=f"m{i}", b="x") for i in range(30)], ["old"], "; and 10 more"),
        ([{"winner": "tie"}], ["old"], "verdicts.jsonl:1: no field 'prompt_id'"),
        (["text"], ["old"], "verdicts.jsonl:1: not a JSON object"),
    ],
)
def test_mistakes_are_one_line(tmp_path, rows, arguments, message):
    path = tmp_path / "verdicts.jsonl"
    if rows is not None:
        write(path, rows)
    with pytest.raises(SystemExit) as error:
        statistics.main([str(path), "--candidate", "new", "--baseline", *arguments])
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("begin, between", [("", "\n\n"), ("\ufeff", "\n"), ("\n \n", "\r\n")])
def test_files_of_other_programs(tmp_path, capsys, begin, between):
    path = tmp_path / "verdicts.jsonl"
    text = between.join(json.dumps(row) for row in [*HAND, HAND[0]])  # a line twice is one
    path.write_text(begin + text + between, encoding="utf-8", newline="")
    statistics.main([str(path), "--candidate", "new", "--baseline", "old"])
    assert json.loads(capsys.readouterr().out)["adjusted_win_rate"] == pytest.approx(0.65)


def test_a_negative_seed_is_refused(tmp_path, capsys):
    path = write(tmp_path / "verdicts.jsonl", HAND)
    with pytest.raises(SystemExit):
        statistics.main([str(path), "--candidate", "new", "--baseline", "old", "--seed", "-1"])
    assert "-1 is negative" in capsys.readouterr().err


def test_the_command_prints_no_nan(tmp_path, capsys):
    for rows in ([verdict(1, 0, "tie")], [verdict(1, 0, "error")], [verdict(i, 0, "model_a") for i in range(3)]):
        statistics.main([str(write(tmp_path / "v.jsonl", rows)), "--candidate", "new", "--baseline", "old"])
        found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
        assert found["ci_low"] is None or 0 <= found["ci_low"] <= found["ci_high"] <= 1


def test_judge_is_chosen(tmp_path, capsys):
    path = write(tmp_path / "verdicts.jsonl", [verdict(1, 0, "model_a"), verdict(1, 0, "model_b", judge="vader")])
    statistics.main([str(path), "--candidate", "new", "--baseline", "old", "--judge", "vader"])
    assert json.loads(capsys.readouterr().out)["losses"] == 1


def test_only_errors_give_null_and_no_prompts(tmp_path, capsys):
    path = write(tmp_path / "verdicts.jsonl", [verdict(1, 0, "error")])
    statistics.main([str(path), "--candidate", "new", "--baseline", "old"])
    found = json.loads(capsys.readouterr().out)
    assert (found["adjusted_win_rate"], found["prompts"], found["errors"]) == (None, 0, 1)
