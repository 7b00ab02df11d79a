"""What verdicts say of the judges that gave them, and where they lie."""

import itertools

import pandas as pd

from salsa.evaluate import statistics
from salsa.report import judging, words
from salsa.report.sections import Section

JUDGES = [
    "judge",
    "benchmark",
    "verdicts",
    "errors",
    "ties",
    "swap_consistency",
    "first_position_share",
    "gold_comparisons",
    "gold_agreement",
    "gold_kappa",
    "swap_consistency_low",
    "swap_consistency_high",
    "first_position_share_low",
    "first_position_share_high",
    "discrimination",
    "discrimination_low",
    "discrimination_high",
    "gold_kappa_low",
    "gold_kappa_high",
    "ties_low",
    "ties_high",
    "cannot_measure",
]
PAIRS = ["judge", "other_judge", "benchmark", "comparisons", "agreement", "kappa"]
SOURCES = ["judge", "candidate", "baseline", "kl_coef", "replicate", "seed", "verdicts", "candidate_model",
           "baseline_model"]  # fmt: skip


def judges(study):
    """One row per judge × benchmark, and `all`: what its verdicts say of it, and how far they agree with gold's.

    `cannot_measure` says why no claim is read from a judge's verdicts there; it is empty where they can be.
    """
    rows = []
    for judge in judging.asked(study):
        for benchmark in judging.lines_of(study, judge):
            quality = judging.quality(study, judge, benchmark)
            rows.append({"judge": judge, "benchmark": benchmark} | quality.row | {"cannot_measure": quality.reason})
    return pd.DataFrame(rows, columns=JUDGES)


def judge_pairs(study):
    """One row per pair of judges × benchmark, and `all`: agreement and Cohen's kappa on what both judged."""
    rows = []
    for first, second in itertools.combinations(judging.asked(study), 2):
        others = judging.lines_of(study, second)
        for benchmark, lines in judging.lines_of(study, first).items():
            agreement = statistics.agreement(lines + others.get(benchmark, []), first, second)
            rows.append({"judge": first, "other_judge": second, "benchmark": benchmark} | agreement)
    return pd.DataFrame(rows, columns=PAIRS)


def sources(study):
    """Where verdicts lie: one row per judge × pair × replicate × seed, `verdicts` a file below the results folder.

    `python -m salsa.evaluate.statistics FILE --candidate CANDIDATE_MODEL --baseline BASELINE_MODEL` counts them again.
    """
    arms = {policy.name: policy.arm for policy in study.policies}
    pairs = sorted({(judge, first, second) for judge, _, first, second in study.verdicts})
    rows = []
    for policy in study.policies:
        for judge, first, second in pairs:
            folder = study.parents.get(f"judge/{judge}/{policy.index}")
            if first == policy.name and folder:
                file = f"{folder.parent.name}/{folder.name}/verdicts.jsonl"
                baseline = arms.get(second, second)
                trained = policy.kl_coef, policy.replicate, policy.seed
                rows.append((judge, policy.arm, baseline, *trained, file, first, second))
    return pd.DataFrame(rows, columns=SOURCES)


def judges_caption(study, tables):
    """What the verdicts say of the judges; sentences on those that can't tell come first."""
    warned = words.doubts(study).lstrip()
    frame = tables["judges"]
    if frame.empty:
        return "No verdicts: this study has no judge."
    overall = frame[(frame["benchmark"] == "all") & (frame["verdicts"] > 0)]
    if overall.empty:
        return f"{warned} So there are no verdicts."
    gold = overall["gold_agreement"].dropna()
    agreed = f"; they agree with gold on a share of {words.spread(gold)} (win, tie or loss)" if len(gold) else ""
    return (
        f"{warned}{' ' if warned else ''}{len(overall)} judge{'s' * (len(overall) != 1)} over all benchmarks: the same "
        f"verdict in both orders on a share of {words.spread(overall['swap_consistency'])}, the answer shown first "
        f"preferred in {words.spread(overall['first_position_share'])} of decided verdicts, ties "
        f"{words.spread(overall['ties'])}{agreed}; discrimination: the share of verdicts that follows the answers, not "
        "places or dice (1 by definition of a judge that scores each answer by itself)."
    )


def pairs_caption(study, tables):
    frame = tables["judge_pairs"]
    if frame.empty:
        return "No comparison was judged by two judges."
    return (
        "Pairs of judges on what both judged, win, tie or loss: they agree on a share of "
        f"{words.spread(frame['agreement'])}, Cohen's kappa {words.spread(frame['kappa'])}."
    )


def sources_caption(study, tables):
    return (
        f"Where verdicts lie, in {len(tables['sources'])} rows: each names a file of a judge run, below the results "
        "folder, which `python -m salsa.evaluate.statistics FILE --candidate CANDIDATE_MODEL --baseline "
        "BASELINE_MODEL` counts again; a row of another table rests on the files of its judge, arms and kl_coef."
    )


OF_JUDGES = Section(name="judges", heading="Judges", place=1, table=judges, caption=judges_caption)
OF_PAIRS = Section(name="judge_pairs", heading="Judges", place=2, table=judge_pairs, caption=pairs_caption)
OF_SOURCES = Section(name="sources", heading="Judges", place=3, table=sources, caption=sources_caption)
