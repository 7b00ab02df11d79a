"""Which policies are stable, and which have collapsed."""

import pandas as pd

from salsa.report import words
from salsa.report.frames import STABILITY, bounded, over_replicates
from salsa.report.sections import Section


def table(study):
    """One row per arm × kl_coef: lengths and ends of responses by sft0's, and gold's loss from its peak.

    Mean and t interval over replicates; `stable` counts the `policies` of which every known number is within the
    configuration's `stability`, `collapsed` those that have collapsed (`selection.collapse`).
    """
    policies, by, measures = study.frames.policies, ["arm", "kl_coef"], STABILITY.values()
    holds = policies.assign(stable=[x is not False for x in policies["stable"]], collapsed=policies["collapse"] != "")
    counts = holds.assign(policies=1).groupby(by, sort=False)[["policies", "stable", "collapsed"]].sum()
    frame = pd.concat([over_replicates(policies, by, measures), counts.reset_index(drop=True)], axis=1)
    return frame[[*by, "replicates", "policies", "stable", *bounded(*measures), "collapsed"]]


def caption(study, tables):
    frame, limits = tables["stability"], study.config.stability
    collapsed, total = int(frame["collapsed"].sum()), frame["policies"].sum()
    return (
        f"{frame['stable'].sum()} of {total} policies are stable: of their development responses "
        f"at least {limits.lowest_end_rate:g} of sft0's share end, they are at least "
        f"{limits.shortest_length:g} times as long, and gold of the last kept rollouts is at most "
        f"{limits.largest_gold_loss:g} below its peak; {words.band(study)}. {collapsed} of {total} have "
        "collapsed: they hardly end or write their responses, or write what sft0 would not; both are counted by arm."
    )


SECTION = Section(
    name="stability",
    heading="Training and stability",
    place=2,
    table=table,
    caption=caption,
    sides=None,
)
