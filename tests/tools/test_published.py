"""Published judgments: small files of each format, with their traps, and published files where a path to them is given.

SALSA_PUBLISHED names a folder that may hold `mt_bench_single.jsonl`, `mt_bench_pair.jsonl`, `arena_hard/*.jsonl` or
`alpaca_eval.json`, as their authors publish them; the tests of files that are not there are skipped.
"""

import json
import math
import os
from pathlib import Path

import pandas as pd
import pytest

from salsa.data import rows as reader
from salsa.evaluate import statistics
from salsa.tools import published
from salsa.workflow import runs

FOLDER = Path(os.environ.get("SALSA_PUBLISHED", "no such folder"))


def write(path, rows):
    text = json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text)
    return path


def command(tmp_path, capsys, form, rows, name="rows.jsonl", *more):
    """The printed object and the written verdicts, read and checked as any verdicts are."""
    output = tmp_path / "verdicts.jsonl"
    published.main([form, str(write(tmp_path / name, rows)), "--output", str(output), *more])
    return json.loads(capsys.readouterr().out), statistics.read_verdicts(output)


def pair(question, first, second, turn=1, **more):
    names = {"question_id": question, "model_1": "m", "model_2": "base"}
    return {**names, "g1_winner": first, "g2_winner": second, "judge": ["gpt-4", "pair-v2"], "turn": turn, **more}


PAIRS = [
    pair(81, "model_1", "model_1"),
    pair(81, "model_2", "model_2", turn=2),
    pair(82, "model_1", "model_2"),  # each time the one shown first: a tie
    pair(83, "tie", "model_1"),  # a tie there, three quarters here
    pair(84, "error", "model_1"),  # dropped there, one game here
]


def test_mt_bench_pairs(tmp_path, capsys):
    printed, verdicts = command(tmp_path, capsys, "mt-bench-pair", PAIRS)
    assert (printed["verdicts"], printed["dropped"]) == (10, {"game without a winner": 1})
    assert printed["leaderboard"]["m"] == {
        "win": 1, "loss": 1, "tie": 2, "win_rate": 0.25, "loss_rate": 0.25, "win_rate_adjusted": 0.5,
    }  # fmt: skip
    assert statistics.prompt_scores(statistics.battles(verdicts, "m", "base")[0]) == {
        ("mt_bench", 81): 0.5, ("mt_bench", 82): 0.5, ("mt_bench", 83): 0.75, ("mt_bench", 84): 1.0,
    }  # fmt: skip
    quality = statistics.judge_quality(verdicts)
    assert quality["errors"] == 1 and {v["judge"] for v in verdicts} == {"gpt-4"}
    assert quality["swap_consistency"] == 2 / 4
    # Of 8 decided games, the first shown won: 81/1 g1, 81/2 g2, 82 both.
    assert quality["first_position_share"] == 4 / 8


def test_mt_bench_pairs_against_a_baseline(tmp_path, capsys):
    rows = [*PAIRS, pair(81, "model_1", "model_1", model_2="other")]
    printed, verdicts = command(tmp_path, capsys, "mt-bench-pair", rows, "rows.jsonl", "--baseline", "base")
    assert printed["dropped"]["not against the baseline"] == 1 and list(printed["leaderboard"]) == ["m"]
    assert all(verdict["model_b"] == "base" for verdict in verdicts)


def test_mt_bench_pair_leaderboard_equals_a_data_frame():
    winners = ["model_1", "model_2", "tie", "error"]
    rows = [pair(i, winners[i % 4], winners[i // 4 % 4], model_1=f"m{i % 3}") for i in range(60)]
    frame = pd.DataFrame(rows)
    frame = frame[(frame.g1_winner != "error") & (frame.g2_winner != "error")]
    frame["score"] = [
        0.5 if a == "tie" or a != b else float(a == "model_1")
        for a, b in zip(frame.g1_winner, frame.g2_winner, strict=True)
    ]
    found = published.mt_bench_pair_leaderboard(rows, "base")
    rates = {model: values["win_rate_adjusted"] for model, values in found.items()}
    assert rates == pytest.approx(frame.groupby("model_1").score.mean().to_dict())


def single(question, model, score, turn=1):
    judge = ["gpt-4", "single-v1"]
    return {"question_id": question, "model": model, "judge": judge, "score": score, "turn": turn}


SINGLES = [
    single(81, "m", 8),
    single(81, "n", 7.95),  # within 0.1: a tie
    single(81, "m", 9, turn=2),
    single(81, "n", 4, turn=2),
    single(82, "m", 3),  # judged again below
    single(82, "n", 5),
    single(82, "m", 7),
    single(82, "m", -1, turn=2),  # $ERROR$
    single(82, "n", 10, turn=2),
    single(82, "o", 5),
]


def test_mt_bench_singles(tmp_path, capsys):
    printed, verdicts = command(tmp_path, capsys, "mt-bench-single", SINGLES)
    assert printed["dropped"] == {"judged again later": 1, "no score": 1}
    assert printed["leaderboard"]["m"] == {"first_turn": 7.5, "second_turn": 9.0, "average": 8.0}  # of 3 rows
    assert printed["leaderboard"]["n"]["average"] == pytest.approx((7.95 + 4 + 5 + 10) / 4)
    assert printed["leaderboard"]["o"]["second_turn"] is None
    winners = {(v["prompt_id"], v["turn"], v["model_a"], v["model_b"]): v["winner"] for v in verdicts}
    assert winners == {
        (81, 1, "m", "n"): "tie",
        (81, 2, "m", "n"): "model_a",
        (82, 1, "m", "n"): "model_a",
        (82, 1, "m", "o"): "model_a",
        (82, 1, "n", "o"): "tie",
    }
    assert math.isnan(statistics.judge_quality(verdicts)["swap_consistency"])  # nothing was shown in two orders


def test_mt_bench_singles_against_a_baseline(tmp_path, capsys):
    _, verdicts = command(tmp_path, capsys, "mt-bench-single", SINGLES, "rows.jsonl", "--baseline", "m")
    assert {(v["model_a"], v["model_b"]) for v in verdicts} == {("n", "m"), ("o", "m")}
    assert statistics.prompt_scores(statistics.battles(verdicts, "n", "m")[0]) == {
        ("mt_bench", 81): 0.25,
        ("mt_bench", 82): 0.0,
    }


def arena(question, first, second):
    games = [None if score == "no game" else {"score": score} for score in (first, second)]
    return {"question_id": question, "model": "m", "judge": "gpt-4-1106-preview", "games": games}


ARENA = [
    arena("a", "B>>A", "A>B"),  # the model wins both, the first decisively
    arena("b", "A>B", "A=B"),
    arena("c", None, "B>>A"),
    arena("d", "A>>B", "no game"),
    arena("e", "A<B", "A>B"),  # the first is none of the five grades
]


def test_arena_hard(tmp_path, capsys):
    printed, verdicts = command(tmp_path, capsys, "arena-hard", ARENA)
    assert (printed["verdicts"], printed["dropped"]) == (10, {"game without a grade": 3})
    # Won 3 + 1 + 1, lost 1 + 3 + 3, and a tie.
    assert printed["leaderboard"]["m"]["score"] == pytest.approx(100 * 5.5 / 13)
    assert printed["leaderboard"]["gpt-4-0314"]["score"] == 50
    assert statistics.prompt_scores(statistics.battles(verdicts, "m", "gpt-4-0314")[0]) == {
        ("arena_hard", "a"): 1.0, ("arena_hard", "b"): 0.25, ("arena_hard", "c"): 0.0, ("arena_hard", "d"): 0.0,
        ("arena_hard", "e"): 1.0,
    }  # fmt: skip
    first = verdicts[0]
    assert (first["model_a"], first["model_b"], first["order"], first["grade"]) == ("m", "gpt-4-0314", 1, "B>>A")


def annotation(instruction, preference, **more):
    row = {"instruction": instruction, "generator_1": "base", "generator_2": "m", "annotator": "judge"}
    return {**row, "preference": preference, "output_1": "12345", "output_2": "1234567", "dataset": "d", **more}


ANNOTATIONS = [
    annotation("one", 2),
    annotation("two", 1.25, output_2="1"),
    annotation("three", 1.5),
    annotation("four", 0),  # a draw of old files
    annotation("five", None),
    annotation("six", math.nan),
    annotation("seven", -1),
    annotation("one", 1.0, output_2="123"),  # the instruction stands in the set twice
]


def test_alpaca_eval(tmp_path, capsys):
    printed, verdicts = command(tmp_path, capsys, "alpaca-eval", ANNOTATIONS, "annotations.json")
    assert (printed["verdicts"], printed["dropped"]) == (8, {"no preference": 3})
    found = printed["leaderboard"]["m"]
    scores = pd.Series([1, 0.25, 0.5, 0.5, 0])
    assert found["win_rate"] == pytest.approx(100 * scores.mean())
    assert found["standard_error"] == pytest.approx(100 * scores.sem())
    counts = ("n_wins", "n_wins_base", "n_draws", "n_total", "avg_length")
    assert [found[name] for name in counts] == [1, 2, 2, 5, 5]
    assert found["discrete_win_rate"] == 100 * 2 / 5
    expected = statistics.length_controlled(scores, [2, -4, 2, 2, -2])
    assert found["length_controlled"] == pytest.approx(100 * expected)
    compared = statistics.compare(verdicts, "m", "base")
    assert 100 * compared["adjusted_win_rate"] == found["discrete_win_rate"]
    assert (compared["prompts"], compared["errors"]) == (5, 3)
    assert verdicts[1]["score"] == 0.25 and verdicts[0]["prompt_id"] + "-2" == verdicts[-1]["prompt_id"]


def test_alpaca_eval_has_the_same_prompts_for_every_model_and_one_baseline(tmp_path, capsys):
    rows = [*ANNOTATIONS[:2], annotation("one", 2, generator_2="n"), annotation("one", 2, generator_1="other")]
    printed, verdicts = command(tmp_path, capsys, "alpaca-eval", rows, "a.json", "--baseline", "base")
    assert printed["dropped"] == {"not against the baseline": 1}
    assert verdicts[0]["prompt_id"] == verdicts[2]["prompt_id"] and verdicts[2]["model_a"] == "n"
    assert printed["leaderboard"]["n"]["n_total"] == 1 and printed["leaderboard"]["n"]["standard_error"] is None


@pytest.mark.parametrize(
    "form, name, text, message",
    [
        ("arena-hard", "a.jsonl", None, "no such file"),
        ("arena-hard", "a.jsonl", "{", "a.jsonl:1: not JSON"),
        ("arena-hard", "a.jsonl", '{"uid": 1}', "row 1: no field 'question_id'"),
        ("mt-bench-pair", "a.jsonl", "3", "a.jsonl:1: not a JSON object"),
        ("mt-bench-single", "a.jsonl", json.dumps(PAIRS[0]), "row 1: no field 'model'"),
        ("alpaca-eval", "a.json", "[1,", "a.json: row 1: not a JSON object"),
        ("alpaca-eval", "a.json", "{}", "no field 'instruction'"),
    ],
)
def test_mistakes_are_one_line(tmp_path, form, name, text, message):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit) as error:
        published.main([form, str(path), "--output", str(tmp_path / "out.jsonl")])
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out.jsonl").exists()


def user_file(pattern):
    found = sorted(FOLDER.glob(pattern))
    if not found:
        pytest.skip(f"SALSA_PUBLISHED names no folder with {pattern}")
    return [row for path in found for _, row in reader.read(path)]


def test_users_mt_bench_singles():
    rows = user_file("mt_bench_single.jsonl")
    frame = pd.DataFrame(rows)[["question_id", "model", "score", "turn"]]
    frame = frame.drop_duplicates(["question_id", "model", "turn"], keep="last")
    expected = frame[frame.score != -1].groupby("model").score.mean().to_dict()
    found = {model: values["average"] for model, values in published.mt_bench_single_leaderboard(rows).items()}
    assert found == pytest.approx(expected)


def test_users_mt_bench_pairs():
    verdicts, _ = published.mt_bench_pair(user_file("mt_bench_pair.jsonl"))
    assert 0 < statistics.judge_quality(verdicts)["swap_consistency"] < 1


def test_users_arena_hard():
    rows = user_file("arena_hard/*.jsonl")
    found = published.arena_hard_leaderboard(rows)
    assert set(found) == {row["model"] for row in rows} | {"gpt-4-0314"}
    assert all(values["low"] <= values["score"] <= values["high"] for values in found.values())


def test_users_alpaca_eval():
    rows = user_file("alpaca_eval.json")
    preferences = pd.DataFrame(rows).groupby("generator_2").preference
    found = published.alpaca_eval_leaderboard(rows)
    expected = ((preferences.mean() - 1) * 100).to_dict()
    assert {model: values["win_rate"] for model, values in found.items()} == pytest.approx(expected)


def test_unknown_rows_are_refused_from_python_too():
    with pytest.raises(runs.UserError, match="row 2: no field 'g1_winner'"):
        published.mt_bench_pair([PAIRS[0], {"question_id": 1, "model_1": "a", "model_2": "b"}])
