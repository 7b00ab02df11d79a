"""What verdicts say of the judges that gave them, and where they lie."""

from salsa.report import tables, words
from salsa.report.sections import Section


def judges_caption(study, frames):
    frame = frames["judges"]
    if frame.empty:
        return "No verdicts: this study has no judge." + words.doubts(study)
    own = frame[(frame["benchmark"] == "all") & (frame["verdicts"] > 0)]
    if own.empty:
        return "No verdicts, as said next." + words.doubts(study)
    gold = own["gold_agreement"].dropna()
    agreed = f"; they agree with gold on a share of {words.spread(gold)} (win, tie or loss)" if len(gold) else ""
    return (
        f"{len(own)} judge{'s' * (len(own) != 1)} over all benchmarks: the same verdict in both orders on a share of "
        f"{words.spread(own['swap_consistency'])}, the answer shown first preferred in "
        f"{words.spread(own['first_position_share'])} of decided verdicts, ties {words.spread(own['ties'])}{agreed}; "
        "discrimination: the share of verdicts that follows the answers, not places or dice (1 by definition of a "
        "judge that scores each answer by itself)."
    ) + words.doubts(study)


def pairs_caption(study, frames):
    frame = frames["judge_pairs"]
    if frame.empty:
        return "No comparison was judged by two judges."
    return (
        "Pairs of judges on what both judged, win, tie or loss: they agree on a share of "
        f"{words.spread(frame['agreement'])}, Cohen's kappa {words.spread(frame['kappa'])}."
    )


def sources_caption(study, frames):
    return (
        f"Where verdicts lie, in {len(frames['sources'])} rows: each names a file of a judge run, below the results "
        "folder, which `python -m salsa.evaluate.statistics FILE --candidate CANDIDATE_MODEL --baseline "
        "BASELINE_MODEL` counts again; a row of another table rests on the files of its judge, arms and kl_coef."
    )


JUDGES = Section(name="judges", heading="Judges", place=1, table=tables.judges, caption=judges_caption)
PAIRS = Section(name="judge_pairs", heading="Judges", place=2, table=tables.judge_pairs, caption=pairs_caption)
SOURCES = Section(name="sources", heading="Judges", place=3, table=tables.sources, caption=sources_caption)
