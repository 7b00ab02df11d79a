"""Judges that can't measure: their verdicts decide no claim, and every table of them says why."""

import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tree import Tree, table_of

from salsa.evaluate import statistics
from salsa.judges.language_model import verdict_text
from salsa.report import claims, conclusions, formats, judging, outcomes, sections, study, words
from salsa.workflow import config, runs

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "judges.py"
CLAIM = config.Claim("t", "win_rate", 0.03, meaning="so")


class Readable(Tree):
    def rows(self, model, reward, gold, text):
        return super().rows(model, reward, gold, "text")


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Three replicates of 60 prompts on one benchmark; by gold scores salsa loses to ppo, which beats sft0."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(study, "gold_judge", lambda prepare: None)
        tree = Readable(tmp_path_factory.mktemp("judged"), replicates=(0, 1, 2), prompts=60,
                        arms={"ppo": "0", "salsa": "0.5"}, benchmarks=("in_distribution",), planes=())  # fmt: skip
        return study.read(tree.settings, tree.parents)


def judged(found, answer, kind="openai", claim=CLAIM, seed=0):
    """The study as if its judge, of this kind, had given `answer(line, the model that gold prefers, generator)`."""
    generator, verdicts = np.random.default_rng(seed), {}
    for (_, *key), lines in found.verdicts.items():
        preferred = [line["winner"] for line in judging.gold_verdicts(found, lines)]
        verdicts["it", *key] = [
            line | {"judge": "it", "winner": answer(line, gold, generator)}
            for line, gold in zip(lines, preferred, strict=True)
        ]
    settings = replace(found.config, judges={"it": config.Judge(kind)}, claims={"c": claim})
    return replace(found, config=settings, verdicts=verdicts)


def first(line, gold, generator):
    return "model_b" if line["order"] else "model_a"


def second(line, gold, generator):
    return "model_a" if line["order"] else "model_b"


def tie(line, gold, generator):
    return "tie"


def error(line, gold, generator):
    return "error"


def dice(line, gold, generator):
    return generator.choice(["model_a", "model_b"])


def good(line, gold, generator):
    return gold


def cut(line, gold, generator):
    return "error" if generator.random() < 0.3 else gold


def one_order(line, gold, generator):
    return "error" if line["order"] else gold


def by_prompt(line, gold, generator):
    """The same model in both orders, whatever it wrote: consistent, and without a look at the answers' quality."""
    return ("model_a", "model_b")[hash_of(line) % 2]


def hash_of(line):
    return int.from_bytes(f"{line['prompt_id']}{line['replicate']}{line['model_b']}".encode()[::-1], "big") % 1009


def mostly_first(line, gold, generator):
    return first(line, gold, generator) if generator.random() < 0.95 else gold


def contrary(line, gold, generator):
    return {"model_a": "model_b", "model_b": "model_a"}.get(gold, gold)


@pytest.mark.parametrize(
    "answer, why",
    [
        (first, "can't be told from those of a judge that ignores the answers"),
        (second, "can't be told from those of a judge that ignores the answers"),
        (mostly_first, "can't be told from those of a judge that ignores the answers"),
        (dice, "can't be told from those of a judge that ignores the answers"),
        (tie, "called all of its 1,080 verdicts a tie"),
        (error, "1,080 answers of judge it held no verdict"),
        (cut, "held no verdict, more than a share of 0.1"),
        (by_prompt, "can't be shown to agree with gold beyond chance: Cohen's kappa"),
        (contrary, "can't be shown to agree with gold beyond chance: Cohen's kappa -0.8"),
        (one_order, "540 of 1,080 answers of judge it held no verdict"),
    ],
)
@pytest.mark.parametrize("kind", ["openai", "gold"])
def test_claims_are_not_read_from_it(three, answer, why, kind):
    if kind == "gold" and answer in (by_prompt, contrary):
        return  # gold is what it says
    found = judged(three, answer, kind)
    frame = claims.frame(found)
    assert frame["claim_verdict"].tolist() == ["not tested"]
    assert why in frame["why"][0]
    assert f"Not tested**: {frame['why'][0].split(',')[0]}"[:55] in conclusions.text(
        found, frame, table_of(found, "win_rates")
    )
    assert why in table_of(found, "judges")["cannot_measure"][0]
    assert any(why in line for line in conclusions.warnings(found))


OPTIONS = "[[A>>B]] if A is much better\n[[A>B]] if A is a little better\n[[A=B]] if they are equally good\n"


def says(*texts):
    """A judge that answers the prompts in turn with these texts, whatever the answers are and whichever comes first."""

    def answer(line, gold, generator):
        text, reason = texts[int(line["prompt_id"].rpartition("-")[2]) % len(texts)]
        grade = verdict_text.parse(text, reason)
        return verdict_text.verdict(grade, line["order"])["winner"] if grade else "error"

    return answer


@pytest.mark.parametrize(
    ("texts", "errors"),
    [
        ([(OPTIONS * 9, "length")], 24),
        ([(OPTIONS * 9, "stop")], 24),
        ([(OPTIONS * 2 + "The answer is:\n[[A=B]]", "stop")], 0),
        ([(OPTIONS * 2 + "The answer is:\n[[A>>B]]", "stop")], 0),
        ([(OPTIONS + "My verdict is:\n[[A>B]]", "stop"), (OPTIONS + "My verdict is:\n[[B>A]]", "stop")], 0),
        ([(OPTIONS + "My verdict is:\n[[A>B]]", "stop"), (OPTIONS + "My verdict is:\n[[A=B]]", "stop")], 0),
    ],
)
def test_a_judge_that_repeats_the_options_is_warned_of_first(tmp_path, monkeypatch, texts, errors):
    """24 verdicts and a win rate of ½ on every prompt, so that no prompt differs from another."""
    monkeypatch.setattr(study, "gold_judge", lambda prepare: None)
    tree = Readable(
        tmp_path, replicates=(0,), prompts=12, arms={"ppo": "0"}, benchmarks=("in_distribution",), planes=()
    )
    found = judged(study.read(tree.settings, tree.parents), says(*texts))
    (lines,) = found.verdicts.values()
    assert len(lines) == 24 and statistics.judge_quality(lines)["errors"] == errors
    rate = statistics.compare(lines, lines[0]["model_a"], lines[0]["model_b"])["adjusted_win_rate"]
    assert math.isnan(rate) if errors else rate == 0.5
    (warning,) = conclusions.warnings(found)
    assert warning.endswith("no claim is read from it, and every verdict of this judge stands under that sentence")
    caption = sections.sections()["judges"].caption(found, sections.tables_of(found))
    assert caption[0].lower() + caption[1 : len(warning)] == warning
    for name in ("win_rates", "bradley_terry"):
        assert warning[1:] in sections.sections()[name].caption(found, sections.tables_of(found))


def ignoring(share, otherwise):
    """A judge that follows gold but in a share of its verdicts."""
    return lambda line, gold, generator: (otherwise if generator.random() < share else good)(line, gold, generator)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (ignoring(0.6, first), "names the answer shown first, so that more of them follow the place than the answers"),
        (ignoring(0.6, second), "names the answer shown first, so that more of them follow the place than the answers"),
        (ignoring(0.7, tie), "judge it calls a share of 0.68"),
    ],
)
def test_a_judge_most_of_whose_verdicts_have_another_cause_is_warned_of(three, answer, words):
    found = judged(three, answer)
    assert judging.quality(found, "it").reason == ""  # claims are read from it
    (warning,) = conclusions.warnings(found)
    assert words in warning and warning.endswith(f": {judging.STANDS}")
    caption = sections.sections()["judges"].caption(found, sections.tables_of(found))
    assert f"{warning[1:]}. 1 judge over all benchmarks" in caption


def test_a_judge_of_which_fewer_than_half_of_the_verdicts_follow_the_answers_is_warned_of(three):
    row = judging.quality(judged(three, ignoring(0.6, dice)), "it").row
    assert 0 < row["discrimination_low"] < 0.4 < row["discrimination_high"]
    assert judging._doubt("it", row | {"discrimination_high": 0.5}) == ""
    assert "follows the answers, and the others follow places or dice" in judging._doubt(
        "it", row | {"discrimination_high": 0.49}
    )


@pytest.mark.parametrize("otherwise", [first, second, dice, tie])
def test_a_judge_that_ignores_the_answers_now_and_then_is_not(three, otherwise):
    assert conclusions.warnings(judged(three, ignoring(0.2, otherwise))) == []


def test_the_share_of_the_first_place_is_bounded_by_the_share_that_follows_the_answers():
    """By a sum over verdicts: which answer is better is a toss, and what follows no answer names any place."""
    for follows, liked in ((a / 20, b / 20) for a in range(21) for b in range(21)):
        share = sum(0.5 * (follows * (better == 0) + (1 - follows) * liked) for better in (0, 1))
        assert follows > judging.MOST or abs(share - 0.5) <= (1 - follows) / 2 + 1e-12
        assert follows < judging.MOST or abs(share - 0.5) <= judging.PLACE + 1e-12


@pytest.mark.parametrize(("counts", "warned"), [([(10, 6), (10, 5)], True), ([(10, 5), (10, 5)], False), ([], False)])
def test_answers_that_mostly_lack_the_form_are_warned_of(three, tmp_path, counts, warned):
    folders = {f"judge/it/{number}": tmp_path / str(number) for number in range(len(counts))}
    for folder, (asked, malformed) in zip(folders.values(), counts, strict=True):
        runs.write_json(folder / runs.MANIFEST, {"summary": {"asked": asked, "malformed": malformed}})
    folders["judge/other/0"] = tmp_path / "missing"
    warnings = conclusions.warnings(replace(judged(three, good), parents=folders))
    assert len(warnings) == warned
    assert not warned or warnings[0].startswith("11 of 20 answers of judge it held no verdict and were asked for again")


def test_a_judge_that_follows_gold_measures(three):
    """By gold, salsa's answers are all worse than ppo's: -½ in each replicate, which three alike can't decide."""
    found = judged(three, good)
    row = table_of(found, "judges").iloc[0]
    assert (
        row["cannot_measure"] == ""
        and row["gold_kappa"] > 0.99
        and row["discrimination"] == pytest.approx(math.sqrt(56 / 64))
    )
    frame = claims.primary_rows(claims.frame(found))
    assert frame["effect"].tolist() == [-0.5] and frame["claim_verdict"].tolist() == ["undecided"]
    assert "the 3 replicates are equal" in frame["why"][0]
    assert conclusions.warnings(found) == []


def test_half_a_judge_excludes_by_half_of_the_smallest_effect(three):
    def half(line, gold, generator):
        return first(line, gold, generator) if generator.random() < 0.5 else gold

    found = judged(three, half)
    seen = judging.quality(found, "it", "in_distribution").seen
    assert 0.3 < seen < 0.55
    frame = claims.frame(found)
    assert f"judge it shows {formats.number(100 * seen)} % of an effect at least" in frame["how"][0]
    assert frame["claim_verdict"].tolist() == ["reversed"]  # about -¼ in each replicate
    values = pd.DataFrame({"effect": [0.02 + 1e-4, 0.02, 0.02 - 1e-4]})  # above half of the smallest effect, below it
    for share, verdict in ((1.0, "too small"), (seen, "supported")):
        outcome = outcomes.Outcome("primary", "win_rate", "in_distribution", "it", values, seen=share)
        assert claims.decision(claims.Test(CLAIM, None, [outcome], None), outcome, 0.95).verdict == verdict


def test_a_judge_that_shows_too_little_of_an_effect(three):
    def lazy(line, gold, generator):
        return gold if line["prompt_id"].endswith("7") else "tie"

    frame = claims.frame(judged(three, lazy, claim=replace(CLAIM, smallest_effect=0.06)))
    assert "even a model that is always better need not win by more than" in frame["why"][0]
    frame = claims.frame(judged(three, lazy, kind="gold", claim=replace(CLAIM, smallest_effect=0.06)))
    assert frame["claim_verdict"][0] != "not tested"  # gold's ties are ties


def test_errors_alone_are_said_wherever_verdicts_would_stand(three):
    found = judged(three, error)
    tables = sections.tables_of(found)
    for name in ("win_rates", "bradley_terry", "judges", "paper_table"):
        caption = sections.sections()[name].caption(found, tables)
        assert "1,080 answers of judge it held no verdict" in caption and "has no judge" not in caption
    found.verdicts = {}
    assert words.no_verdicts(found) == "No verdicts: this study has no judge."


@pytest.mark.parametrize("overall, said", [("", "on b, it erred"), ("it erred", "it erred")])
def test_the_benchmark_is_named_on_which_alone_a_judge_fails(monkeypatch, overall, said):
    reasons = {"all": overall, "b": "it erred"}
    monkeypatch.setattr(judging, "quality", lambda _, judge, name="all": judging.Quality({}, 1.0, reasons[name]))
    with pytest.raises(claims.NotTested) as caught:
        outcomes.judge_shows(None, CLAIM, "it", "b")
    assert str(caught.value) == said


def test_limits_are_settings(three):
    found = judged(three, cut)
    limits = config.Report(judges=config.JudgeLimits(largest_error_share=0.5))
    assert judging.quality(replace(found, config=replace(found.config, report=limits)), "it").reason == ""


@pytest.fixture(scope="module")
def simulation():
    specification = importlib.util.spec_from_file_location("judges_simulation", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize("places", [True, False])
@pytest.mark.parametrize("ignoring", [0.5, 0.8, 0.95, 1.0])
def test_a_true_advantage_is_not_excluded_by_a_judge_that_ignores_answers(simulation, places, ignoring):
    alone, reported = simulation.rates(0.6, ignoring, places, studies=40, seed=1)
    assert reported[simulation.NO_EFFECT] <= 0.025
    if ignoring == 0.95 and places:
        assert alone[simulation.NO_EFFECT] > 0.5  # what the interval alone would say
    alone, reported = simulation.rates(0.5, ignoring, places, studies=40, seed=1)
    assert reported["supported"] <= 0.1  # 2.5 %, of 40


def test_a_judge_that_reads_changes_nothing(simulation):
    for rate in (0.6, 0.5):
        alone, reported = simulation.rates(rate, 0.0, True, studies=40, seed=1)
        assert alone == reported


def test_the_simulation_prints_a_table(simulation, capsys, monkeypatch):
    shares = dict.fromkeys(simulation.VERDICTS, 0.25)
    monkeypatch.setattr(simulation, "rates", lambda *arguments: [shares, shares])
    simulation.main(["--studies", "3"])
    assert "| 60% | names the first place | 95% | 25.0 | 25.0 |" in capsys.readouterr().out


def test_gold_verdicts_of_unknown_scores_are_errors(three):
    lines = next(iter(three.verdicts.values()))[:2]
    lines = [lines[0] | {"prompt_id": "unheard of"}, lines[1]]
    assert [row["winner"] == "error" for row in judging.gold_verdicts(three, lines)] == [True, False]


def test_the_table_of_judges_is_json_and_csv(three, tmp_path):
    formats.write_csv(table_of(judged(three, error), "judges"), tmp_path / "judges.csv")
    assert "nan" not in (tmp_path / "judges.csv").read_text().lower()
    assert json.dumps(judging.quality(judged(three, good), "it").reason, allow_nan=False) == '""'
