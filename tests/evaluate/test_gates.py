"""The gates of a study: numbers against loops, limits at their edges, and the words that users see."""

import itertools
import math
import random

import pytest

from salsa.evaluate import gates
from salsa.workflow import config, runs

LIMITS = config.Gates()


def point(alpha, loss, kl, gold=0.4):
    straight = 1.0 + 0.1 * alpha
    return {"alpha": alpha, "loss": loss, "loss_interpolated": straight, "kl_from_sft0": kl, "gold_reward": gold}


LINE = [point(0.0, 1.0, 0.0), point(0.25, 1.06, 0.1), point(0.5, 1.04, 0.22, 0.5), point(1.0, 1.1, 0.9, 0.3)]
QUALITY = {"held_out_accuracy": 0.8, "gold_agreement": 0.9}


def row(benchmark, prompt, model, reward, gold, **further):
    return {"benchmark": benchmark, "prompt_id": prompt, "model": model, "reward": reward, "gold": gold, **further}


def responses(counts, samples=1, seed=0):
    """Rows of sft0, sft1 and the soup, some prompts' effects shared, in no order."""
    rng, rows = random.Random(seed), []
    for benchmark, count in counts.items():
        for prompt in range(count):
            effect = rng.gauss(0, 1)
            for model, _ in itertools.product(("sft0", "sft1", "soup"), range(samples)):
                rows.append(row(benchmark, prompt, model, effect + rng.gauss(0, 0.3), rng.random()))
    rng.shuffle(rows)
    return rows


def naive_advantage(rows, measure):
    """The difference of the soup and sft0 and its error, one prompt and one benchmark after the other."""
    means, squares = [], []
    for benchmark in sorted({row["benchmark"] for row in rows}):
        differences = []
        for prompt in sorted({row["prompt_id"] for row in rows if row["benchmark"] == benchmark}):
            at = [row for row in rows if (row["benchmark"], row["prompt_id"]) == (benchmark, prompt)]
            soup = [row[measure] for row in at if row["model"] == "soup"]
            sft0 = [row[measure] for row in at if row["model"] == "sft0"]
            differences.append(sum(soup) / len(soup) - sum(sft0) / len(sft0))
        mean = sum(differences) / len(differences)
        variance = sum((x - mean) ** 2 for x in differences) / (len(differences) - 1)
        means.append(mean)
        squares.append(variance / len(differences))
    return sum(means) / len(means), math.sqrt(sum(squares)) / len(means)


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("measure", ["reward", "gold"])
def test_the_soups_advantage_is_paired_by_prompt(samples, measure):
    rows = responses({"in": 40, "out": 9}, samples)
    assert gates.advantage(rows, measure) == pytest.approx(naive_advantage(rows, measure), rel=1e-12)


def test_what_has_no_advantage():
    rows = responses({"in": 5})
    scored_alone = responses({"alone": 4}, seed=1)
    assert gates.advantage(rows + [r | {"compared": False} for r in scored_alone], "gold") == gates.advantage(
        rows, "gold"
    )
    assert gates.advantage([r | {"gold": None} for r in rows], "gold") == (None, None)
    assert gates.advantage([], "reward") == (None, None)
    one_sided = [*rows, row("in", 99, "sft0", 50.0, 0.5)]
    assert gates.advantage(one_sided, "reward") == gates.advantage(rows, "reward")
    pair = [row("in", 0, "sft0", 1.0, None), row("in", 0, "soup", 1.5, None)]
    assert gates.advantage(pair, "reward") == (0.5, None)


def test_numbers_before_ppo():
    numbers = gates.before_ppo(LINE, QUALITY, responses({"in": 6}), 0.05)
    assert numbers["kl_sft0_soup"] == 0.22 and numbers["largest_manipulation"] == pytest.approx(0.011)
    assert numbers["barrier"] == pytest.approx(1.06 - 1.025)
    assert numbers["gold"] == {"sft0": 0.4, "sft1": 0.3, "soup": 0.5}
    assert numbers["claim_manipulation"] is numbers["claim_kl_coef"] is None
    claimed = gates.before_ppo(LINE, QUALITY, [], 0.3, 0.1)
    assert claimed["claim_manipulation"] == pytest.approx(0.022) and claimed["largest_manipulation"] is None
    without = gates.before_ppo(LINE, QUALITY, [], None)
    assert without["largest_kl_coef"] is without["largest_manipulation"] is without["soup_minus_sft0_gold_se"] is None


def checked(folder, line, quality, **settings):
    """What the stage says of a line, without responses."""
    (folder / "line.csv").write_text(
        "".join(",".join(map(str, row)) + "\n" for row in [line[0], *map(dict.values, line)])
    )
    (folder / "responses.jsonl").write_text("")
    runs.write_json(folder / "evaluation.json", quality)
    parents = {"landscape": folder, "reward_model": folder}
    numbers = gates.check(config.GatesSettings(LIMITS, **settings), parents, folder, config.Execution())
    assert runs.read_json(folder / "gates.json") == numbers
    return numbers


def test_the_stage_reads_the_line_and_warns(tmp_path, capsys):
    line = [point(0.0, 1.0, 0.0), point(0.5, 1.07, 0.5, ""), point(1.0, 1.1, 0.9)]
    quality = {"held_out_accuracy": 0.8, "gold_agreement": None}
    numbers = checked(tmp_path, line, quality)
    assert numbers["barrier"] == pytest.approx(0.02) and numbers["gold"] == {"sft0": 0.4, "sft1": 0.4, "soup": None}
    assert len(numbers["warnings"]) == 1 and "basin" in numbers["warnings"][0]
    line[1]["loss"] = 0.9
    assert checked(tmp_path, line, quality)["warnings"] == []
    averaged = quality | {"members": [{}, {}], "gold_agreement": 0.5}
    numbers = checked(tmp_path, line, averaged, largest_kl_coef=0.3, claim_kl_coef=0.05)
    assert numbers["claim_manipulation"] == 0.025 and numbers["largest_manipulation"] is None
    agreement, manipulation = numbers["warnings"]
    assert "reward model (average of 2)" in agreement and "can hardly matter there" in manipulation
    printed = capsys.readouterr().out
    assert "kl_coef · KL(sft0 ‖ soup) is 0.025 standard deviations of reward (kl_coef 0.05); claims need" in printed


def test_a_study_in_which_the_reference_cannot_matter_is_warned_before_ppo():
    numbers = gates.before_ppo(LINE, QUALITY, responses({"in": 6}), 0.05)
    warnings = gates.warnings(numbers, LIMITS)
    assert warnings == [
        "the rise of the loss between the SFT models above their ends' line is 0.035 nats per token, not at most 0.01: "
        "they do not share a basin",
        "the largest kl_coef · KL(sft0 ‖ soup) is 0.011 standard deviations of reward, not at least 0.05: whether the "
        "reference is sft0 or the soup can hardly matter; raise kl_coefs, or train SFT models that lie further apart",
    ]
    lines = gates.describe(numbers | {"warnings": warnings}, "tiny-r0", LIMITS).splitlines()
    assert lines[0] == (
        "gates of tiny-r0: reward model against gold 90.0%, KL(sft0 ‖ soup) 0.220 nats, barrier 0.0350 nats per token"
    )
    assert lines[1] == (
        "  kl_coef · KL(sft0 ‖ soup) is at most 0.011 standard deviations of reward (kl_coef 0.05); claims need 0.05, "
        "so a kl_coef of 0.227 or more"
    )
    assert lines[2].startswith("  the soup itself, minus sft0, on the benchmarks: proxy reward ")
    assert lines[3:] == [f"  failed: {warning}" for warning in warnings]


def test_what_is_not_known_fails_nothing():
    numbers = gates.before_ppo(LINE[:1] + LINE[2:], QUALITY | {"gold_agreement": None}, [], None)
    assert gates.warnings(numbers, LIMITS) == []
    lines = gates.describe(numbers | {"warnings": []}, "x", LIMITS).splitlines()
    assert len(lines) == 1 and "against gold none" in lines[0]


@pytest.mark.parametrize(
    ("name", "holding", "failing"),
    [
        ("kl_sft0_soup", [0.05, 3], [0.0499]),
        ("gold_agreement", [0.75, 0.95], [0.7499, 0.951]),
        ("barrier", [-0.1, 0.01], [0.0101]),
        ("largest_manipulation", [0.05, 1], [0.049]),
        ("manipulation", [0.05, 1], [0.049]),
        ("claim_manipulation", [0.05, 1], [0.049]),
        ("settled", [0.9, 1], [0.89]),
        ("reward_slope", [0, 0.1], [0.101]),
        ("evaluation_noise", [0, 1 / 3], [0.34, 1]),
        ("place_in_grid", [gates.INSIDE], [gates.LOWEST, gates.LARGEST, gates.ONLY]),
        ("policy_gold_agreement", [0.75, 1], [0.7]),
        ("gold_ppo_minus_sft0_in_errors", [2.1], [2, -5]),
    ],
)
def test_limits(name, holding, failing):
    gate = gates.gates(LIMITS)[name]
    assert all(map(gate.holds, holding)) and not any(map(gate.holds, failing))


def test_limits_are_the_configurations():
    limits = config.Gates(smallest_manipulation=0.2, largest_drift=0.3)
    wanted = gates.gates(limits, "reward model (average of 3)", "plain")
    assert not wanted["manipulation"].holds(0.19) and not wanted["largest_manipulation"].holds(0.19)
    assert wanted["reward_slope"].holds(0.3) and "average of 3" in wanted["gold_agreement"].quantity
    assert "gold reward of plain" in wanted["gold_ppo_minus_sft0_in_errors"].quantity


def test_a_measured_gate_says_where_it_fails():
    gate = gates.gates(LIMITS)["manipulation"]
    measured = gates.Measured(gate, {"salsa": 0.18, "other": 0.04})
    assert not measured.holds and measured.failing == ["other"] and measured.held == "1 of 2 arms"
    assert measured.words == "0.18 (salsa), 0.04 (other) standard deviations of reward"
    assert gates.Measured(gate, {"salsa": 0.18}).holds


def test_numbers_in_words():
    assert gates.each({"a": 0.123456, "b": 0.1234, "c": 2.0}) == "0.123 (a, b), 2 (c)"
    assert gates.each(dict(zip("abcde", (3, 1, 5, 2, 4), strict=True))) == "1 to 5"
    assert gates.each({"a": gates.INSIDE, "b": gates.LARGEST}) == f"{gates.INSIDE} (a), {gates.LARGEST} (b)"


def test_places_in_a_grid():
    grid = (0.3, 0.05, 0.1)
    assert [gates.place_in_grid(x, grid) for x in grid] == [gates.LARGEST, gates.LOWEST, gates.INSIDE]
    assert gates.place_in_grid(0.3, (0.3,)) == gates.ONLY


def test_the_sentence_of_manipulation():
    strengths, shares = {"salsa": 0.18, "other": 0.35}, {"ppo": 0.38, "salsa": 0.4, "other": 0.41}
    places = dict.fromkeys(shares, gates.INSIDE)
    assert gates.sentence(strengths, shares, {"yes": 48}, places, LIMITS) == (
        "Manipulation: kl_coef · KL(sft0 ‖ reference) = 0.18 (salsa), 0.35 (other) standard deviations of reward; at "
        "the end the penalty is 38% (ppo), 40% (salsa), 41% (other) of the reward gained; reward is flat in 48 of 48 "
        "runs; kl_coef is inside its grid."
    )
    weak = gates.sentence({"salsa": 0.011}, {}, {}, {"ppo": gates.ONLY, "salsa": gates.LARGEST}, LIMITS)
    assert weak == (
        "Manipulation: kl_coef · KL(sft0 ‖ reference) = 0.011 (salsa) standard deviations of reward, and under 0.05 a "
        "reference can hardly matter; kl_coef is the only one run (ppo), the largest of its grid (salsa)."
    )
    assert gates.sentence({}, {}, {}, {}, LIMITS) == ""
    assert gates.sentence({}, {}, {"yes": 40, "no": 2, "not known": 6}, {}, LIMITS) == (
        "Manipulation: reward is flat in 40 of 48 runs, clearly drifts in 2, and in 6 it is not known."
    )
