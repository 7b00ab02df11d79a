"""Win rates of arms at their chosen kl_coefs: SALSA as the paper's table has it, and every other arm."""

from salsa.report import selection, tables, words
from salsa.report.sections import Section, sides


def preferred(study, frame, subject, column):
    """What the win rates against PPO of a table say."""
    if frame.empty:
        return "No arm here that was judged against plain PPO or sft0." + words.doubts(study)
    direct = int((frame["how"] == selection.DIRECT).sum())
    other = (
        f"; {len(frame) - direct} of {len(frame)} cells against PPO are of arms at two kl_coefs, which no judge "
        "compared: ½ plus the difference of their win rates against sft0"
        if direct < len(frame)
        else ""
    )
    return (
        f"{subject} against PPO, each at its chosen kl_coef: adjusted win rates of {words.spread(frame[column])} by "
        f"benchmark, judge {frame['judge'].iloc[0]}, beside both against sft0; {len(study.replicates)} replicates, "
        f"{words.band(study)}{other}; measured here, none of them the paper's."
    ) + words.doubts(study)


PAPER_TABLE = Section(
    name="paper_table",
    heading="Preferences",
    place=1,
    table=tables.paper_table,
    left_out=("data",),
    caption=lambda study, frames: preferred(study, frames["paper_table"], "SALSA", "salsa_vs_ppo"),
    sides=lambda study, row: [
        (tables.salsa_arm(study), row["salsa_kl_coef"]),
        (study.plain, row["ppo_kl_coef"]),
    ],
)
ABLATIONS = Section(
    name="ablations",
    heading="Preferences",
    place=2,
    table=tables.ablations,
    caption=lambda study, frames: preferred(study, frames["ablations"], "Alphas and controls", "arm_vs_ppo"),
    sides=lambda study, row: [*sides(study, row), (study.plain, row["ppo_kl_coef"])],
)
