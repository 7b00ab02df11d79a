"""`salsa judge check` against servers that judge well, by place, by dice, by length, or not at all."""

import hashlib
import json
import math
import random
import re
from collections import Counter

import numpy as np
import pytest
from scipy import stats
from test_openai_server import Handler, completion, environment, serve  # noqa: F401 (fixtures)

from salsa import judges
from salsa.__main__ import main
from salsa.tools import judge_check
from salsa.workflow import runs

pytest.importorskip("openai", reason="needs the extra salsa[judge]")
PAIRS = judge_check.read_set()
SOUND = {pair["sound"] for pair in PAIRS}
OPTIONS = "[[A>>B]] if A is much better\n[[A>B]] if A is a little better\n[[A=B]] if they are equally good\n"


class Judging(Handler):
    """Answers by what `server.judge` says of (answer A, answer B): a text, or (a text, its finish reason)."""

    def answer(self, fault, body):
        question = body["messages"][0]["content"]
        said = self.server.judge(*re.findall(r"<answer_[ab]>\n(.*?)\n</answer", question, re.DOTALL))
        text, reason = said if isinstance(said, tuple) else (said, "stop")
        content = completion(text)
        content["choices"][0]["finish_reason"] = reason
        self.send(200, {}, json.dumps(content).encode())


@pytest.fixture
def judging(serve):  # noqa: F811
    """Start a server with a judge, and return it with the overrides that name it."""

    def start(judge):
        server = serve()
        server.RequestHandlerClass, server.judge = Judging, judge
        return server, ["judge=[openai]", "judges.openai.model=judge-1", f"judges.openai.base_url={server.url}"]

    return start


def knows(a, b):
    return "[[A=B]]" if a == b else "Hm. [[A>>B]]" if a in SOUND else "[[B>A]]"


def names_the_first(a, b):
    return "[[A>B]]"


def ties(a, b):
    return "[[A=B]]"


def prefers_length(a, b):
    return "[[A=B]]" if len(a) == len(b) else "[[A>B]]" if len(a) > len(b) else "[[B>A]]"


def throws_dice(a, b):
    return ("[[A>B]]", "[[B>A]]")[hashlib.sha256(f"{a}|{b}".encode()).digest()[0] % 2]


def repeats_the_options(a, b):
    return OPTIONS * 5, "length"


def repeats_the_options_and_is_not_said_to_be_cut(a, b):
    return OPTIONS * 3 + "The answer is:\n[[A=B]]", "stop"


@pytest.mark.parametrize(
    ("judge", "code", "words"),
    [
        (knows, 0, "openai can judge: it is right in both orders on 20 of 20 pairs (0.83 to 1.00), and no liking"),
        (names_the_first, 1, "on 0 of 20 pairs (0.00 to 0.17), and one that does not know which answer is sound is so "
                             "on up to 0.5; 48 of 48 decided verdicts name the answer shown first"),
        (ties, 1, "it calls 40 of 40 different answers a tie"),
        (prefers_length, 1, "openai can't judge: it is right in both orders on 8 of 20 pairs (0.19 to 0.64)"),
        (throws_dice, 1, "openai can't judge: it is right in both orders on"),
        (repeats_the_options, 1, "openai can't judge: none of 48 questions came to a verdict"),
        (repeats_the_options_and_is_not_said_to_be_cut, 1, "it calls 40 of 40 different answers a tie"),
    ],
)  # fmt: skip
def test_the_last_line_says_whether_it_can_judge(judging, capsys, judge, code, words):
    _, overrides = judging(judge)
    assert main(["judge", "check", *overrides, "judges.openai.attempts=1"]) == code
    assert words in capsys.readouterr().out.splitlines()[-1]


def test_what_is_printed_kept_and_asked_no_second_time(judging, tmp_path, capsys):
    def likes_the_first(a, b):
        """Sound answers win, but for ill manners; of one text, and of ill manners, the first."""
        manners = any(pair["flaw"] == "ill_mannered" and pair["flawed"] in (a, b) for pair in PAIRS)
        return "[[A>B]]" if manners or a == b else knows(a, b)

    server, overrides = judging(likes_the_first)
    prices = ["execution.judge_prompt_price=2", "execution.judge_completion_price=10"]
    command = ["judge", "check", *overrides, *prices, "--output", str(tmp_path / "kept")]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert len(server.bodies) == 48
    assert "judge openai (judge-1), 24 pairs in both orders:" in out
    assert "empty 4 of 4, off topic 4 of 4, truncated 4 of 4, other language 4 of 4, ill mannered 0 of 4" in out
    cells = [" ".join(line.split()) for line in out.splitlines()]
    assert "right in both orders 16 of 20 0.80 0.56 to 0.94 at most 0.5" in cells
    assert any(line.startswith("same verdict in both orders 16 of 24 0.67") for line in cells)
    assert any(line.startswith("ties, one text twice 0 of 8 0.00") for line in cells)
    assert "answers without verdict 0 of 48 0.00" in cells
    each = (50 * 2 + 7 * 10) / 1e6
    assert f"a verdict took 57 tokens, {each:.3g} in money, " in out
    questions = int(re.search(r"the study still asks about ([\d,]+) questions", out)[1].replace(",", ""))
    assert f"questions: {57 * questions:,} tokens, {each * questions:.3g} in money" in out
    assert "openai can judge: it is right in both orders on 16 of 20 pairs (0.56 to 0.94)" in out.splitlines()[-1]
    found = runs.read_json(tmp_path / "kept" / "openai" / "check.json")
    assert found["can"] is True and found["measures"]["first"]["of"] == 48 and found["by_flaw"]["empty"] == [4, 4]
    assert main(command) == 0 and len(server.bodies) == 48  # all are kept
    assert "57 tokens, 0.00017 in money\n" in capsys.readouterr().out


def test_why_there_was_no_verdict_is_cited(judging, capsys):
    _, overrides = judging(lambda a, b: repeats_the_options(a, b) if not b or not a else knows(a, b))
    assert main(["judge", "check", *overrides, "judges.openai.attempts=2"]) == 1
    out = capsys.readouterr().out
    assert "no verdict on 8 questions: no verdict in 2 answers, 2 of which max_tokens=1024 cut" in out
    assert "such an answer: [[A>>B]] if A is much better [[A>B]]" in out
    assert "8 of 48 questions came to no verdict, more than a share of 0.1" in out.splitlines()[-1]
    assert "answers without verdict 16 of 56 0.29" in [" ".join(line.split()) for line in out.splitlines()]


def test_a_server_that_can_not_be_asked_is_one_line(judging, capsys, monkeypatch):
    server, overrides = judging(knows)
    server.RequestHandlerClass, server.faults = Handler, {0: (401, {}, {"error": {"message": "who?"}})}
    assert main(["judge", "check", *overrides]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("salsa:")]
    assert "judge-1 at 127.0.0.1" in line and "answers 401: who?" in line and len(server.bodies) == 1
    monkeypatch.delenv("OPENAI_API_KEY")
    assert main(["judge", "check", "judge=[openai]"]) == 1
    assert "OPENAI_API_KEY is not set" in capsys.readouterr().err
    assert main(["judge", "check", "judge=[]"]) == 1
    assert "this configuration has no judge" in capsys.readouterr().err


def test_judges_that_score_are_held_to_what_the_set_has_for_them(capsys, tmp_path):
    assert main(["judge", "check", "judge=[gold,reward_model]"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("judge gold is not checked: its verdicts are scores that come with the data")
    assert lines[1].startswith(
        "judge reward_model is not checked: its reward model is trained on generated instructions"
    )
    assert main(["judge", "check", "experiment=smollm2_ultra", "judge=[reward_model]", f"results={tmp_path}"]) == 1
    line = capsys.readouterr().err
    assert "holds no finished reward model; train it, or name another with --scorer" in line


def test_a_lexicon_sees_manners_alone(capsys):
    pytest.importorskip("vaderSentiment", reason="needs the extra salsa[reviews]")
    assert main(["judge", "check", "data=reviews", "benchmark=[openings]", "judge=[vader]"]) == 0
    out = capsys.readouterr().out
    assert "8 pairs in both orders" in out and "ill mannered 4 of 4" in out
    assert "is not known: right in both orders on 4 of 4 pairs" in out.splitlines()[-1]


def test_the_set():
    flaws = Counter(pair["flaw"] for pair in PAIRS)
    assert flaws == dict.fromkeys([*judges.FLAWS, "same"], 4) and len({pair["id"] for pair in PAIRS}) == 24
    for pair in PAIRS:
        assert set(pair) == {"id", "flaw", "request", "sound", "flawed"} and pair["sound"] and pair["request"]
        assert (pair["flaw"] == "same") == (pair["sound"] == pair["flawed"])
        assert (pair["flaw"] == "empty") == (pair["flawed"] == "")
        if pair["flaw"] == "truncated":
            assert pair["sound"].startswith(pair["flawed"])
    longer = sum(len(pair["flawed"]) > len(pair["sound"]) for pair in PAIRS)
    assert longer == 12  # so that length says nothing


def verdict(pair, order, winner):
    models = {"model_a": "sound", "model_b": "flawed", "judge": "it"}
    return {"prompt_id": pair["id"], "benchmark": "b", "order": order, "winner": winner} | models


@pytest.mark.parametrize(
    ("always", "words"),
    [(("model_a", "model_a"), "no liking for a place shows"),
     (("model_a", "model_b"), "likes the answer shown first"), (("model_b", "model_a"), "likes the answer shown last")],
)  # fmt: skip
def test_a_liking_for_a_place_is_said_of_a_judge_that_can_judge(always, words):
    verdicts = [verdict(pair, order, always[order]) for pair in PAIRS for order in (0, 1)]
    sound = judge_check.measures(PAIRS, [line | {"winner": "model_a"} for line in verdicts], {})
    liking = judge_check.measures(PAIRS, verdicts, {})["first"]
    can, conclusion = judge_check.conclude("it", sound | {"first": liking}, 0.1)
    assert can and words in conclusion


def test_measures_are_those_of_a_loop():
    generator = random.Random(3)
    choices = ["model_a", "model_a", "model_b", "tie", "error"]
    verdicts = [verdict(pair, order, generator.choice(choices)) for pair in PAIRS for order in (0, 1)]
    winners = {(line["prompt_id"], line["order"]): line["winner"] for line in verdicts}
    counts = Counter()
    for pair in PAIRS:
        both = [winners[pair["id"], order] for order in (0, 1)]
        same = pair["flaw"] == "same"
        counts["right"] += not same and both[0] == both[1] == "model_a"
        counts["consistent"] += both[0] == both[1] and "error" not in both
        counts["complete"] += "error" not in both
        for order, winner in enumerate(both):
            counts["errors"] += winner == "error"
            counts["same" if same else "ties"] += winner == "tie" and "error" not in both
            counts["decided"] += winner in ("model_a", "model_b")
            counts["first"] += winner == ("model_a" if order == 0 else "model_b")
    found = judge_check.measures(PAIRS, verdicts, {"malformed": 5, "asked": 60})
    for name in ("right", "consistent", "errors", "same", "ties", "first"):
        assert found[name].count == counts[name], name
    assert (found["right"].of, found["errors"].of, found["malformed"].of) == (20, 48, 60)
    assert (found["consistent"].of, found["first"].of) == (counts["complete"], counts["decided"])
    k = counts["right"]  # Clopper and Pearson's bounds solve these two equations
    assert stats.binom.sf(k - 1, 20, found["right"].low) == pytest.approx(0.025)
    assert stats.binom.cdf(k, 20, found["right"].high) == pytest.approx(0.025)


def test_the_limit_is_what_no_ignorant_judge_passes():
    """Of judges that name texts with any chances p and q, none is right in both orders more often than CHANCE."""
    grid = np.linspace(0, 1, 21)
    p, q = np.meshgrid(grid, grid)
    assert ((p * q + (1 - p) * (1 - q)) / 2).max() == judge_check.CHANCE
    enough = next(k for k in range(21) if stats.binomtest(k, 20).proportion_ci(0.95, "exact").low > 0.5)
    for right, can in ((enough - 1, False), (enough, True)):
        pairs = [pair for pair in PAIRS if pair["flaw"] != "same"]
        ends = ["model_a"] * right + ["tie"] * (20 - right)
        verdicts = [verdict(pair, order, end) for pair, end in zip(pairs, ends, strict=True) for order in (0, 1)]
        assert judge_check.conclude("it", judge_check.measures(pairs, verdicts, {}), 0.1)[0] is can
    assert enough == 15
    few = judge_check.FEWEST
    assert stats.binomtest(few - 1, few - 1).proportion_ci(0.95, "exact").low <= 0.5
    assert stats.binomtest(few, few).proportion_ci(0.95, "exact").low > 0.5


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.1234, "0.123 s"), (119, "119 s"), (180, "3 minutes"), (7200, "2 hours")]
)
def test_times_are_read_as_people_do(seconds, words):
    assert judge_check.Cost(math.nan, math.nan, math.nan, seconds).words(1) == words
