"""Win rates against naive loops, hand-computed numbers, and the coverage that their interval promises."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
    assert statistics.prompt_scores(rows, "new", "old") == {("b", 1): 0.75}


def test_copies_of_prompts_do_not_narrow_the_interval():
    once = [verdict(i, 0, "model_a" if i % 2 else "model_b", replicate=0) for i in range(40)]
    copies = [{**row, "replicate": r} for row in once for r in range(5)]
    first, second = statistics.compare(once, "new", "old"), statistics.compare(copies, "new", "old")
    assert (first["ci_low"], first["ci_high"]) == (second["ci_low"], second["ci_high"])


WINNERS = st.sampled_from(statistics.WINNERS)
ROWS = st.lists(
    st.builds(
        lambda prompt, order, winner, swap, replicate: verdict(
            prompt, order, winner, a="old" if swap else "new", b="new" if swap else "old", replicate=replicate
        ),
        st.integers(0, 5),
        st.integers(0, 1),
        WINNERS,
        st.booleans(),
        st.integers(0, 1),
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
            for first_shown in ("new", "old"):
                last = None
                for row in rows:
                    shown = row["model_a"] if row["order"] == 0 else row["model_b"]
                    if (row["prompt_id"], row["replicate"], shown) == (prompt, replicate, first_shown):
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
    assert statistics.prompt_scores(rows, "new", "old") == pytest.approx(expected)
    found = statistics.compare(rows, "new", "old", resamples=20)
    assert found["wins"] + found["ties"] + found["losses"] == found["prompts"] == len(expected)
    if expected:
        assert found["adjusted_win_rate"] == pytest.approx(sum(expected.values()) / len(expected))
        assert 0 <= found["ci_low"] <= found["ci_high"] <= 1
    else:
        assert math.isnan(found["adjusted_win_rate"])


@settings(max_examples=50, deadline=None)
@given(ROWS.filter(bool), st.randoms())
def test_line_order_across_prompts_changes_nothing(rows, random):
    unique = list(
        {(r["prompt_id"], r["order"], r["replicate"]): {**r, "model_a": "new", "model_b": "old"} for r in rows}.values()
    )
    shuffled = random.sample(unique, len(unique))
    first, second = (statistics.compare(r, "new", "old", resamples=50) for r in (unique, shuffled))
    assert json.dumps(first) == json.dumps(second)


def test_bootstrap_equals_a_naive_loop():
    scores = np.random.default_rng(0).choice([0, 0.25, 0.5, 0.75, 1], 60)
    generator, means = np.random.default_rng(5), []
    indices = generator.integers(60, size=(300, 60))
    for row in indices:
        means.append(sum(scores[i] for i in row) / 60)
    expected = np.quantile(means, [0.025, 0.975])
    assert statistics.bootstrap_interval(scores, 5, 300) == pytest.approx(tuple(expected))
    assert statistics.bootstrap_interval(scores, 5) == statistics.bootstrap_interval(scores, 5)
    assert statistics.bootstrap_interval(scores, 6) != statistics.bootstrap_interval(scores, 5)
    assert all(map(math.isnan, statistics.bootstrap_interval([])))


def test_bootstrap_covers_what_it_promises():
    """200 prompts, 600 simulated studies: 94 to 96 %, give or take three Monte-Carlo standard errors."""
    generator, covered, studies = np.random.default_rng(7), 0, 600
    chances = np.array([0.35, 0.15, 0.1, 0.15, 0.25])
    values = np.linspace(0, 1, 5)
    for study in range(studies):
        low, high = statistics.bootstrap_interval(generator.choice(values, 200, p=chances), study, 400)
        covered += low <= chances @ values <= high
    tolerance = 3 * math.sqrt(0.95 * 0.05 / studies)
    assert 0.94 - tolerance < covered / studies < 0.96 + tolerance


def test_replicate_interval():
    mean, low, high = statistics.replicate_interval([1.0, 2.0, 3.0])
    half = 4.302652729911275 / math.sqrt(3)  # t(0.975, 2) x sd 1
    assert (mean, low, high) == pytest.approx((2, 2 - half, 2 + half))
    mean, low, high = statistics.replicate_interval([4.0])
    assert mean == 4 and math.isnan(low) and math.isnan(high)
    assert math.isnan(statistics.replicate_interval([float("nan")])[0])


def test_paired_differences_use_shared_replicates():
    assert statistics.paired_differences({0: 3.0, 1: 5.0, 2: 9.0}, {1: 1.0, 0: 2.0}).tolist() == [1.0, 4.0]


@pytest.mark.parametrize("wins, losses, expected", [(0, 0, 1), (5, 0, 2 / 32), (3, 1, 10 / 16), (2, 2, 1)])
def test_sign_test(wins, losses, expected):
    assert statistics.sign_test(wins, losses) == pytest.approx(expected)


def test_holm():
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.9, 0.8]).tolist() == [1.0, 1.0]
    assert statistics.holm([]).size == 0


def test_swap_consistency_of_nothing():
    assert math.isnan(statistics.swap_consistency([verdict(1, 0, "tie")], "new", "old"))


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
        ([{"winner": "tie"}], ["old"], "verdicts.jsonl:1: no field 'prompt_id'"),
        (["text"], ["old"], "verdicts.jsonl:1: a verdict is a JSON object"),
    ],
)
def test_mistakes_are_one_line(tmp_path, rows, arguments, message):
    path = tmp_path / "verdicts.jsonl"
    if rows is not None:
        write(path, rows)
    with pytest.raises(SystemExit) as error:
        statistics.main([str(path), "--candidate", "new", "--baseline", *arguments])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_judge_is_chosen(tmp_path, capsys):
    path = write(tmp_path / "verdicts.jsonl", [verdict(1, 0, "model_a"), verdict(1, 0, "model_b", judge="vader")])
    statistics.main([str(path), "--candidate", "new", "--baseline", "old", "--judge", "vader"])
    assert json.loads(capsys.readouterr().out)["losses"] == 1


def test_only_errors_give_null_and_no_prompts(tmp_path, capsys):
    path = write(tmp_path / "verdicts.jsonl", [verdict(1, 0, "error")])
    statistics.main([str(path), "--candidate", "new", "--baseline", "old"])
    found = json.loads(capsys.readouterr().out)
    assert (found["adjusted_win_rate"], found["prompts"], found["errors"]) == (None, 0, 1)
