"""Which policies are stable, and which have collapsed."""

from salsa.report import tables, words
from salsa.report.sections import Section


def caption(study, frames):
    frame, wanted = frames["stability"], study.config.stability
    collapsed, total = int(frame["collapsed"].sum()), frame["replicates"].sum()
    return (
        f"{frame['stable'].sum()} of {total} policies are stable: of their development responses "
        f"at least {wanted.lowest_end_rate:g} of sft0's share end, they are at least "
        f"{wanted.shortest_length:g} times as long, and gold of the last kept rollouts is at most "
        f"{wanted.largest_gold_loss:g} below its peak; {words.band(study)}. {collapsed} of {total} have "
        "collapsed: they hardly end or write their responses, or write what sft0 would not; both are counted by arm."
    )


SECTION = Section(
    name="stability",
    heading="Training and stability",
    place=2,
    table=tables.stability,
    caption=caption,
    sides=None,
)
