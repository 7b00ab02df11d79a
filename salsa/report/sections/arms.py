"""The arms of a study: start, reference and strength of the penalty."""

from salsa.report import tables
from salsa.report.sections import Section, sides_at_all_kl_coefs


def caption(study, frames):
    return (
        f"{len(frames['arms'])} arms: where the policy starts, what its KL penalty is measured from, and the "
        "penalty's strength, kl_scale times the study's kl_coef, over the run as the schedule says; the kl_coef that "
        "tables and figures show is the study's, before the scale."
    )


SECTION = Section(name="arms", heading="Arms", table=tables.arms, caption=caption, sides=sides_at_all_kl_coefs)
