"""Whether a judge's verdicts can decide anything: what they say of the judge, on a benchmark or on all.

A judge that names the place, throws dice, ties or errs pulls every win rate towards ½, so that an interval below the
smallest effect says nothing of the true one. What is asked here: how many answers held a verdict, how much of the
verdicts comes from the answers (`statistics.discrimination`), and whether they agree with gold beyond chance. The
limits are `config.JudgeLimits`. A judge of which claims can be read is warned of all the same where most of what it
says has nothing to do with the answers. Nothing is decided here: `claims` does that.
"""

import dataclasses
import math

from salsa.evaluate import statistics
from salsa.report import selection
from salsa.workflow import runs

GOLD_SCORES = "gold scores"  # what stands for a gold judge where none was asked
ALL = "all"
MOST = 0.5  # of verdicts or answers: beyond it a judge says more about something else than about the answers
# The share of verdicts that name the answer shown first is ½ ± (1 - d)/2 at most, where d is the share of verdicts that
# follow the answers: beyond ½ ± this, fewer than MOST do.
PLACE = (1 - MOST) / 2
STANDS = "every verdict of this judge stands under that sentence"


@dataclasses.dataclass(frozen=True)
class Quality:
    """What the verdicts of a judge on a benchmark say of it.

    Attributes:
        row: columns of the table of judges: the numbers of `statistics.judge_quality` with intervals over prompts,
            discrimination, and agreement with gold.
        seen: how much of an effect the judge shows at least, in (0, 1]: the lower bound of its discrimination, less
            its ties; 1 for judges that score each response by itself.
        reason: why claims can't be read from it, in words; "" where they can.
        doubt: why its verdicts say little although claims can be read from them, in words; "" where nothing says so.
    """

    row: dict
    seen: float
    reason: str
    doubt: str = ""


def quality(study, judge, benchmark=ALL):
    """`Quality` of a judge on a benchmark, or on all; measured once and kept."""
    if (judge, benchmark) not in study.known_qualities:
        measured = _measure(study, judge, lines_of(study, judge).get(benchmark, []))
        if benchmark != ALL and not measured.row["verdicts"]:
            overall = quality(study, judge)
            if not overall.row["verdicts"]:
                measured = dataclasses.replace(measured, reason=overall.reason)
        study.known_qualities[judge, benchmark] = measured
    return study.known_qualities[judge, benchmark]


def asked(study):
    """The judges of which there are verdicts, errors included, in the configuration's order."""
    present = {judge for judge, *_ in study.verdicts}
    return [judge for judge in study.config.judges if judge in present]


def judged(study):
    """The (judge, benchmark) pairs that have verdicts, in the configuration's order."""
    present = {key[:2] for key in study.verdicts}
    return [(judge, name) for judge in study.config.judges for name in study.benchmarks if (judge, name) in present]


def unfit(study):
    """Sentences that name each judge from which no claim can be read, on all benchmarks or on some, and say why."""
    sentences = []
    for judge in asked(study):
        reasons = [quality(study, judge).reason]
        if not reasons[0]:
            by_benchmark = {name: quality(study, judge, name).reason for other, name in judged(study) if other == judge}
            reasons = [f"on {name}, {reason}" for name, reason in by_benchmark.items() if reason]
        sentences += [f"{reason}: no claim is read from it, and {STANDS}" for reason in reasons if reason]
    return sentences


def warnings(study):
    """Sentences on judges that can't tell which answer is better, or of whose verdicts most have another cause."""
    doubts = []
    for judge in asked(study):
        measured = quality(study, judge)
        reasons = [measured.doubt, malformed(study, judge)] if not measured.reason else []
        doubts += [f"{reason}: {STANDS}" for reason in reasons if reason]
    return unfit(study) + doubts


def malformed(study, judge):
    """Why most answers of a judge that is asked in words say nothing of it; "" where most of them held a verdict."""
    folders = [folder for role, folder in study.parents.items() if role.startswith(f"judge/{judge}/")]
    summaries = [(runs.manifest_of(folder) or {}).get("summary") or {} for folder in folders]
    answers, without = (sum(summary.get(name, 0) for summary in summaries) for name in ("asked", "malformed"))
    if without <= MOST * answers:
        return ""
    return (
        f"{without:,} of {answers:,} answers of judge {judge} held no verdict and were asked for again, so that its "
        "verdicts are those of the answers that happened to have the form"
    )


def lines_of(study, judge):
    """benchmark -> all verdicts of a judge on it; `all` comes first."""
    by_benchmark = {ALL: []}
    for (name, benchmark, *_), lines in study.verdicts.items():
        if name == judge:
            by_benchmark[ALL] += lines
            by_benchmark.setdefault(benchmark, []).extend(lines)
    return {name: by_benchmark[name] for name in (ALL, *study.benchmarks) if name in by_benchmark}


def _measure(study, judge, lines):
    report = study.config.report
    counts = statistics.judge_quality(lines)
    intervals = statistics.judge_intervals(lines, report.seed, report.bootstrap)
    share, low, high = statistics.discrimination(statistics.place_counts(lines), report.seed, report.bootstrap)
    scores_alone = selection.kind_of(study, judge).scores_alone and not counts["swap_consistency"] < 1
    if scores_alone and counts["ties"] < 1:
        share, low, high = 1.0, math.nan, math.nan  # by its kind, and no verdict hangs on the places
    row = counts | intervals | {"discrimination": share, "discrimination_low": low, "discrimination_high": high}
    row |= _agreement(study, judge, lines)
    seen = 1.0 if scores_alone else (low if low == low else 0.0) * (1 - counts["ties"] if lines else 0.0)
    reason = _reason(study, judge, row, scores_alone)
    doubt = "" if reason or scores_alone else _doubt(judge, row)
    return Quality(row, seen if seen == seen else 0.0, reason, doubt)


def _reason(study, judge, row, scores_alone):
    limits, number = study.config.report.judges, selection.number
    answers = row["verdicts"] + row["errors"]
    if not answers:
        return ""
    if not row["verdicts"]:
        return f"{answers:,} answers of judge {judge} held no verdict"
    if row["errors"] > limits.largest_error_share * answers:
        return (
            f"{row['errors']:,} of {answers:,} answers of judge {judge} held no verdict, more than a share of "
            f"{limits.largest_error_share:g} (report.judges.largest_error_share)"
        )
    if row["ties"] == 1:
        return f"judge {judge} called all of its {row['verdicts']:,} verdicts a tie"
    if not scores_alone:
        if math.isnan(row["swap_consistency"]):
            return f"judge {judge} gave a verdict in both orders on no pair of answers"
        if not row["discrimination_low"] > limits.smallest_discrimination:
            return (
                f"the verdicts of judge {judge} can't be told from those of a judge that ignores the answers: both "
                f"orders came to the same end in a share of {number(row['swap_consistency'])} of the pairs, and "
                f"a share of {number(row['first_position_share'])} of the decided verdicts names the answer shown first"
            )
    if row["gold_kappa_low"] <= limits.smallest_kappa:
        return (
            f"the verdicts of judge {judge} can't be shown to agree with gold beyond chance: Cohen's kappa "
            f"{number(row['gold_kappa'])} [{number(row['gold_kappa_low'])}, {number(row['gold_kappa_high'])}]"
        )
    return ""


def _doubt(judge, row):
    """Why most verdicts of a judge that sees both answers have another cause, with 95 % confidence; "" otherwise."""
    number = selection.number
    if row["ties_low"] > MOST:
        return f"judge {judge} calls a share of {number(row['ties'])} of its verdicts a tie"
    low, high = row["first_position_share_low"], row["first_position_share_high"]
    if low > 0.5 + PLACE or high < 0.5 - PLACE:
        return (
            f"a share of {number(row['first_position_share'])} of the decided verdicts of judge {judge} names the "
            "answer shown first, so that more of them follow the place than the answers"
        )
    if row["discrimination_high"] < MOST:
        return (
            f"of the verdicts of judge {judge} a share of {number(row['discrimination'])} "
            f"[{number(row['discrimination_low'])}, {number(row['discrimination_high'])}] follows the answers, and the "
            "others follow places or dice"
        )
    return ""


def _agreement(study, judge, lines):
    """The columns gold_… of a judge: agreement with gold on these lines; nan where there is no gold beside it."""
    gold, report = gold_judge(study), study.config.report
    numbers = dict.fromkeys(("comparisons", "agreement", "kappa", "kappa_low", "kappa_high"), math.nan)
    if gold == GOLD_SCORES:
        lines = lines + gold_verdicts(study, lines)
    elif gold not in (None, judge):
        benchmarks = {line["benchmark"] for line in lines}
        lines = lines + [line for line in lines_of(study, gold)[ALL] if line["benchmark"] in benchmarks]
    if gold not in (None, judge):
        numbers |= statistics.agreement(lines, judge, gold)
        low, high = statistics.kappa_interval(lines, judge, gold, report.seed, report.bootstrap)
        numbers |= {"kappa_low": low, "kappa_high": high}
    return {f"gold_{name}": number for name, number in numbers.items()}


def gold_judge(study):
    """The judge that is gold, else GOLD_SCORES where the responses carry gold scores, else None."""
    for judge in asked(study):
        if selection.kind_of(study, judge).is_gold:
            return judge
    scored = all(row["gold"] is not None for policy in study.policies for row in policy.responses)
    return GOLD_SCORES if scored and study.verdicts else None


def gold_verdicts(study, lines):
    """What gold says of the comparisons of some verdicts, from the scores that came with the responses.

    A comparison of which a score is unknown, or not finite, is an error.
    """
    responses, verdicts = study.frames.responses, []
    keys = ["replicate", "seed", "model", "benchmark", "prompt_id", "sample"]
    gold = responses.set_index(keys)["gold"].to_dict()
    for line in lines:
        training = statistics.trained_as(line)
        answer = line["benchmark"], line["prompt_id"], line.get("sample") or 0
        first, second = (selection.response_of(gold, *training, line[side], *answer) for side in ("model_a", "model_b"))
        winner = "tie" if first == second else "model_a" if first > second else "model_b"
        winner = winner if math.isfinite(first) and math.isfinite(second) else "error"
        verdicts.append(line | {"winner": winner, "judge": GOLD_SCORES})
    return verdicts
