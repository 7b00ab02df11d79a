"""The kl_coefs at which arms are compared."""

from salsa.report import tables
from salsa.report.sections import Section


def caption(study, frames):
    frame = frames["chosen"]
    if frame.empty:
        return "No two arms to compare."
    same = int((frame["candidate_kl_coef"] == frame["baseline_kl_coef"]).sum())
    return (
        "The kl_coef at which two arms are compared: for each the one that does best on the development prompts "
        f"({frame['by'].iloc[0].replace('_', ' ')}, mean over replicates), of those that both were run at, and of "
        f"equals the largest; {same} of {len(frame)} pairs have one kl_coef for both."
    )


SECTION = Section(name="chosen", heading="Claims", place=2, table=tables.chosen, caption=caption)
