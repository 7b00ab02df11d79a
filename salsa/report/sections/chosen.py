"""The kl_coefs at which arms are compared."""

import pandas as pd

from salsa.report import conclusions, selection, words
from salsa.report.sections import Section

COLUMNS = [
    "candidate",
    "baseline",
    "grid",
    "candidate_kl_coef",
    "baseline_kl_coef",
    "by",
    "candidate_value",
    "baseline_value",
]


def table(study):
    """One row per pair of arms that is compared: every arm and its plain anchor, and the pairs of the study's claims.

    The grid, the kl_coef chosen for each, and what it has on the development prompts (`by`).
    """
    rows, pairs = [], [(arm, study.plain_of(arm)) for arm in study.arms]
    for claim in study.config.claims.values():
        pairs.append((selection.arm_of(study, claim.candidate), selection.arm_of(study, claim.baseline)))
    for candidate, baseline in dict.fromkeys(pairs):
        if None in (candidate, baseline) or candidate == baseline:
            continue
        pair = selection.pair(study, candidate, baseline)
        if pair:
            values = (
                selection.development(study, candidate, pair.candidate_kl_coef),
                selection.development(study, baseline, pair.baseline_kl_coef),
            )
            grid, by = words.listed(pair.grid), selection.measured_by(study)
            rows.append((candidate, baseline, grid, pair.candidate_kl_coef, pair.baseline_kl_coef, by, *values))
    return pd.DataFrame(rows, columns=COLUMNS)


def caption(study, tables):
    frame = tables["chosen"]
    if frame.empty:
        return "No two arms to compare."
    if study.config.claim_kl_coef is not None:
        return "The pairs of arms that are compared. " + conclusions.compared_at(study)
    same = int((frame["candidate_kl_coef"] == frame["baseline_kl_coef"]).sum())
    return (
        "The kl_coef at which two arms are compared: for each the one that does best on the development prompts "
        f"({frame['by'].iloc[0].replace('_', ' ')}, mean over replicates), of those that both were run at, and of "
        f"equals the largest; {same} of {len(frame)} pairs have one kl_coef for both."
    )


SECTION = Section(name="chosen", heading="Claims", place=2, table=table, caption=caption)
