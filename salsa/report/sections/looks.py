"""The interval of every claim at every look of a study, which together decide it."""

from salsa.report import claims
from salsa.report.sections import Section


def caption(study, tables):
    count = tables["looks"]["claim"].nunique()
    return (
        f"The intervals of {count} claims at their looks until now, each from the replicates that it had: mean ± "
        "critical · deviation/√n, where deviation is that between these replicates, or the floor that sampling alone "
        "gives if it is larger. What all intervals of a claim have in common decides it; the effects of the "
        "replicates, with the first look that has each, are in replicates.csv."
    )


SECTION = Section(
    name="looks",
    heading="Claims",
    place=4,
    table=claims.looks,
    caption=caption,
    present=lambda study: bool(study.config.looks),
)
