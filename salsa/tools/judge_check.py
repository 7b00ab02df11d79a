"""`salsa judge check`: whether a judge can judge, asked about pairs of which it is known which answer is better.

The pairs are in salsa/judges/check_set.jsonl: a request, a sound answer, and one with a flaw that a reader sees at
once: it is empty, off topic, cut in the middle, in a language that the person does not read, or ill-mannered. In some
pairs both answers are one text. Each pair is judged in both orders, by the stage that judges a study
(salsa/evaluate/judge.py), so that templates, repeated questions and the reading of verdicts are those of a study. No
study is needed.

A judge can judge if it is right in both orders more often than one that does not know which answer is sound. The best
that such a judge can do is to name one of the texts in both orders. Which of them is sound is a toss to it, so it is
right on at most half of the pairs, and on a quarter if it throws dice. Left out: how well it tells answers apart that
are nearly as good, of which a study's own verdicts speak (salsa/report/judging.py).
"""

import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from scipy import stats

from salsa import data, judges
from salsa.evaluate import judge as stage
from salsa.evaluate import statistics
from salsa.workflow import compose, config, estimate, jobs, runs
from salsa.workflow import plan as planning
from salsa.workflow.bounds import printable
from salsa.workflow.messages import UserError

SET = Path(judges.__file__).with_name("check_set.jsonl")
BENCHMARK = "check_set"
SOUND, FLAWED = "sound", "flawed"  # the two models whose answers are compared
SAME = "same"  # the flaw of a pair whose answers are one text
CHANCE = 0.5  # of being right in both orders, at most, for a judge that does not know what is sound; see the module
FEWEST = statistics.FEWEST  # pairs; fewer that are all right leave ½ in their interval
MILLION = 10**6
LONGEST = 200  # characters of an answer that is cited


@dataclass(frozen=True)
class Measure:
    """A share of verdicts, pairs or answers, with its 95 % interval over pairs (nan: none).

    `at_random` says in words what a judge has that does not look at the answers.
    """

    name: str
    count: int
    of: int
    low: float = np.nan
    high: float = np.nan
    at_random: str = ""

    @property
    def share(self):
        """The share, or nan of nothing."""
        return self.count / self.of if self.of else np.nan


@dataclass(frozen=True)
class Cost:
    """What a verdict takes, repeated questions included: tokens, money and seconds; nan where that is not known."""

    prompt_tokens: float
    completion_tokens: float
    money: float
    seconds: float

    def words(self, verdicts):
        """What so many verdicts take, in words; "" where nothing is known."""
        tokens, money, seconds = (
            verdicts * each for each in (self.prompt_tokens + self.completion_tokens, self.money, self.seconds)
        )
        parts = [f"{tokens:,.0f} tokens"] if tokens == tokens else []
        parts += [f"{money:.3g} in money"] if money == money else []
        return ", ".join(parts + ([_time(seconds)] if seconds == seconds else []))


@dataclass(frozen=True)
class Finding:
    """What a check says of a judge.

    Attributes:
        measures: what its verdicts show: name -> `Measure`.
        by_flaw: flaw -> (pairs in which it was right in both orders, pairs).
        can: whether it can judge; None where the set has too few pairs to tell.
        conclusion: a sentence that says so, and why.
        cost: of a verdict.
        remarks: lines on questions that came to no verdict.
    """

    measures: dict
    by_flaw: dict
    can: bool | None
    conclusion: str
    cost: Cost
    remarks: list


def read_set(flaws=None):
    """The pairs (id, flaw, request, sound, flawed) of the set: all, or those of some flaws and of SAME."""
    pairs = runs.read_jsonl(SET)
    return [pair for pair in pairs if flaws is None or pair["flaw"] in (*flaws, SAME)]


def check(name, judge, execution, pairs, output, scorer=None, largest_error_share=0.1):
    """Ask a judge about pairs; verdicts that are in the folder `output` already are kept.

    Args:
        judge, execution: a config.Judge and a config.Execution.
        scorer: the folder of a reward model's run, for kinds of judges that want one.
        largest_error_share: of questions without a verdict, beyond which it can't judge.

    Returns a `Finding`. Raises UserError where the judge can't be asked.
    """
    settings = config.JudgeSettings(name, replace(judge, tournament=False), 0, SOUND, {FLAWED: FLAWED})
    parents = write_set(pairs, output) | ({"scorer": scorer} if scorer else {})
    begun = time.monotonic()
    summary = stage.judge(settings, parents, output, execution)
    seconds = time.monotonic() - begun
    verdicts = runs.read_jsonl(output / "verdicts.jsonl")
    measured = measures(pairs, verdicts, summary)
    can, conclusion = conclude(name, measured, largest_error_share)
    asked = len(verdicts) - summary["kept"]
    cost = cost_of(summary, len(verdicts), seconds / asked if asked else np.nan, execution)
    remarks = without_verdict(verdicts, output / "answers.jsonl")
    return Finding(measured, right_by_flaw(pairs, verdicts), can, conclusion, cost, remarks)


def write_set(pairs, output):
    """Write the pairs as runs write answers and prompts; returns the parents of a judge's run, roles -> folders."""
    for model, written in ((SOUND, "policy"), (FLAWED, FLAWED)):
        runs.write_jsonl(output / model / "responses.jsonl", [_row(pair, model, written) for pair in pairs])
    questions = [{"id": pair["id"], "turns": [pair["request"]], "category": "", "reference": None} for pair in pairs]
    runs.write_jsonl(output / BENCHMARK / "benchmark.jsonl", questions)
    roles = {"candidate": SOUND, f"baseline/{FLAWED}": FLAWED, f"benchmark/{BENCHMARK}": BENCHMARK}
    return {role: output / folder for role, folder in roles.items()}


def _row(pair, answer, model):
    """A line of responses.jsonl: the sound or the flawed answer of a pair, as a model's."""
    cut = answer == FLAWED and pair["flaw"] == "truncated"
    return {
        "benchmark": BENCHMARK,
        "prompt_id": pair["id"],
        "model": model,
        "prompt": [pair["request"]],
        "responses": [pair[answer]],
        "finish_reasons": ["length" if cut else "stop"],
    }


def measures(pairs, verdicts, summary):
    """Name -> `Measure` of a judge's verdicts on the pairs; `summary` is what the stage returned."""
    winners = _winners(verdicts)
    known = [winners[pair["id"]] for pair in pairs if pair["flaw"] != SAME]
    same = [winners[pair["id"]] for pair in pairs if pair["flaw"] == SAME]
    measured = {
        "right": _exact("right in both orders", list(map(_is_right, known)), f"at most {CHANCE:g}"),
        "consistent": _of_pairs(
            "same verdict in both orders", [[one == other] for one, other in _complete(known + same)], "at most 0.5"
        ),
        "first": _first_place(verdicts),
        "ties": _of_pairs("ties, different answers", _are("tie", _complete(known))),
        "same": _of_pairs("ties, one text twice", _are("tie", _complete(same))),
        "errors": _of_pairs("questions without verdict", _are("error", known + same)),
    }
    if "malformed" in summary:
        measured["malformed"] = Measure("answers without verdict", summary["malformed"], summary["asked"])
    return measured


def _winners(verdicts):
    """Pair's id -> the winners in order 0, where the sound answer is shown first, and in order 1."""
    winners = defaultdict(dict)
    for line in verdicts:
        winners[line["prompt_id"]][line["order"]] = line["winner"]
    return {name: (of_orders[0], of_orders[1]) for name, of_orders in winners.items()}


def _is_right(both):
    return both == ("model_a", "model_a")


def _complete(winners):
    """Of pairs' two winners, those without an error."""
    return [both for both in winners if "error" not in both]


def _are(wanted, winners):
    """For each pair, whether each of its two winners is the wanted one."""
    return [[winner == wanted for winner in both] for both in winners]


def _exact(name, outcomes, at_random):
    """A `Measure` of independent pairs, with the interval of Clopper and Pearson (Biometrika 26, 1934)."""
    count, of = sum(outcomes), len(outcomes)
    bounds = stats.binomtest(count, of).proportion_ci(0.95, "exact") if of else (np.nan, np.nan)
    return Measure(name, count, of, *map(float, bounds), at_random)


def _of_pairs(name, by_pair, at_random=""):
    """A `Measure` of as many outcomes of each pair: its interval resamples pairs, and is no narrower than Wilson's."""
    low, high = statistics.bootstrap_interval([np.mean(outcomes) for outcomes in by_pair])
    return Measure(name, sum(map(sum, by_pair)), sum(map(len, by_pair)), low, high, at_random)


def _first_place(verdicts):
    """The `Measure` of the answer shown first among the verdicts that have a winner."""
    decided = [line for line in verdicts if line["winner"] in ("model_a", "model_b")]
    count = sum(line["winner"] == ("model_a", "model_b")[line["order"]] for line in decided)
    bounds = statistics.judge_intervals(verdicts)
    low, high = bounds["first_position_share_low"], bounds["first_position_share_high"]
    return Measure("answer shown first preferred", count, len(decided), low, high, "any; dice: 0.5")


def right_by_flaw(pairs, verdicts):
    """Flaw -> (pairs in which the judge named the sound answer in both orders, pairs), in the set's order."""
    winners, counts = _winners(verdicts), defaultdict(lambda: (0, 0))
    for pair in pairs:
        if pair["flaw"] != SAME:
            right, of = counts[pair["flaw"]]
            counts[pair["flaw"]] = right + _is_right(winners[pair["id"]]), of + 1
    return dict(counts)


def conclude(name, measured, largest_error_share):
    """(whether the judge can judge, or None where the pairs are too few to tell; a sentence that says so, and why)."""
    right, errors = measured["right"], measured["errors"]
    if errors.count == errors.of:
        return False, f"{name} can't judge: none of {errors.of} questions came to a verdict."
    if errors.share > largest_error_share:
        return False, (
            f"{name} can't judge: {errors.count} of {errors.of} questions came to no verdict, more than a share of "
            f"{largest_error_share:g} (report.judges.largest_error_share)."
        )
    numbers = f"right in both orders on {right.count} of {right.of} pairs ({right.low:.2f} to {right.high:.2f})"
    if right.of < FEWEST:
        return None, f"Whether {name} can judge is not known: {numbers}, and fewer than {FEWEST} pairs tell nothing."
    if right.low > CHANCE:
        return True, f"{name} can judge: it is {numbers}, {_liking(measured)}."
    return False, (
        f"{name} can't judge: it is {numbers}, and one that does not know which answer is sound is so on up to "
        f"{CHANCE:g}; {_habit(measured)}."
    )


def _liking(measured):
    """Whether a judge that can judge likes a place, which both orders together cancel."""
    first = measured["first"]
    if not (first.low > 0.5 or first.high < 0.5):
        return "and no liking for a place shows"
    place = "first" if first.share > 0.5 else "last"
    return f"though it likes the answer shown {place}, which is why a study asks both orders"


def _habit(measured):
    """What a judge that can't judge does instead, in words."""
    ties, first, consistent = measured["ties"], measured["first"], measured["consistent"]
    if ties.share > 0.5:
        return f"it calls {ties.count} of {ties.of} different answers a tie"
    if first.low > 0.5 or first.high < 0.5:
        return f"{first.count} of {first.of} decided verdicts name the answer shown first"
    return f"it gives {consistent.count} of {consistent.of} pairs the same verdict in both orders"


def cost_of(summary, count, seconds, execution):
    """The `Cost` of each of `count` verdicts: tokens from the stage's summary, money where prices are set."""
    prompt, completion = (summary.get(name, np.nan) / count for name in ("prompt_tokens", "completion_tokens"))
    prices = execution.judge_prompt_price, execution.judge_completion_price
    money = (prompt * prices[0] + completion * prices[1]) / MILLION if any(prices) else np.nan
    return Cost(prompt, completion, money, seconds)


def _time(seconds):
    for unit, of in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * of:
            return f"{seconds / of:.3g} {unit}"
    return f"{seconds:.3g} s"


def without_verdict(verdicts, answers):
    """Lines that say why questions came to no verdict, most frequent first, and cite the first such answer."""
    lost = [line for line in verdicts if line["winner"] == "error"]
    reasons = Counter(line.get("reason", "not said") for line in lost)
    lines = [f"no verdict on {count} questions: {reason}" for reason, count in reasons.most_common(3)]
    if lost and answers.exists():
        places = {(line["prompt_id"], line["order"]) for line in lost}
        texts = (line["text"] for line in runs.read_jsonl(answers) if (line["prompt_id"], line["order"]) in places)
        text = " ".join(next(texts, "").split())
        lines += [f"such an answer: {text[:LONGEST]}" + "…" * (len(text) > LONGEST)] if text else []
    return [printable(line) for line in lines]


def run(overrides, output=None, scorer=None):
    """The command: check each judge of a configuration, and print what was found.

    Args:
        overrides: Hydra's.
        output: the folder that keeps verdicts and answers, in one folder for each judge; None: they are not kept.
        scorer: the folder of a finished reward model's run, for judges that want one.

    Returns the exit code: 1 where one of the judges can't judge.
    """
    composed = compose.compose(overrides)
    chosen = {name: (judge, study.config) for study in composed for name, judge in study.config.judges.items()}
    if not chosen:
        raise UserError("this configuration has no judge; name one, such as judge=[openai] judges.openai.model=gpt-4.1")
    plan = planning.plan(composed)
    with tempfile.TemporaryDirectory() as folder:
        findings = [
            check_configured(name, judge, study, plan, Path(output or folder) / name, scorer)
            for name, (judge, study) in chosen.items()
        ]
    return 1 if any(finding and finding.can is False for finding in findings) else 0


def check_configured(name, judge, study, plan, output, scorer=None):
    """Check a judge of a configuration and its plan, and print it; returns the `Finding`, None where no pair fits."""
    kind = judges.find(judge.kind)
    flaws = kind.sees(data.world_kinds()[study.data.task.kind])
    if isinstance(flaws, str):
        print(f"judge {name} is not checked: {flaws}.")
        return None
    scorer = scorer_folder(name, plan, scorer) if kind.scorer else None
    kind.check_access(judge, None)
    pairs, limit = read_set(flaws), study.report.judges.largest_error_share
    print(printable(f"judge {name} ({judge.model or judge.kind}), {len(pairs)} pairs in both orders:"), flush=True)
    finding = check(name, judge, study.execution, pairs, output, scorer, limit)
    runs.write_json(output / "check.json", _without_nan(asdict(finding)))
    questions = sum(
        estimate.questions(run, plan.runs)
        for path, run in plan.runs.items()
        if run.stage == "judge" and run.settings["name"] == name and not jobs.finished(plan, path)
    )
    show(finding, questions)
    return finding


def scorer_folder(name, plan, given):
    """The folder of the reward model that a judge of a plan reads; UserError where it is not trained."""
    wanted = [run.parents["scorer"] for run in plan.runs.values() if run.stage == "judge" and "scorer" in run.parents]
    folder = Path(given) if given else Path(plan.results, wanted[0])
    if not (folder / runs.MANIFEST).exists():
        raise UserError(
            f"judge {name}: {folder} holds no finished reward model; train it, or name another with --scorer"
        )
    return folder


def _without_nan(value):
    """Plain data with null in the place of numbers that are not known."""
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if value != value else value


def show(finding, questions=0):
    """Print a finding; `questions`: how many a study still asks this judge."""
    table = Table(box=box.SIMPLE, pad_edge=False)
    for heading, side in (("", "left"), ("", "right"), ("share", "right"), ("95 %", "right"), ("at random", "left")):
        table.add_column(heading, justify=side)
    for measure in finding.measures.values():
        interval = f"{measure.low:.2f} to {measure.high:.2f}" if measure.low == measure.low else ""
        share = f"{measure.share:.2f}" if measure.of else ""
        table.add_row(measure.name, f"{measure.count} of {measure.of}", share, interval, measure.at_random)
    Console().print(table)
    of_flaws = [f"{flaw.replace('_', ' ')} {right} of {of}" for flaw, (right, of) in finding.by_flaw.items()]
    lines = [f"right in both orders, by flaw: {', '.join(of_flaws)}", *finding.remarks]
    if each := finding.cost.words(1):
        lines.append(f"a verdict took {each}")
    if questions and (total := finding.cost.words(questions)):
        lines.append(f"the study still asks about {questions:,} questions: {total}, without repeated ones")
    for line in [*lines, finding.conclusion]:
        print(printable(line))
