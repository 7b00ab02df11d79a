"""Rewards, KL, lengths and ends of the SFT models, their soup and every arm."""

from salsa.report import tables, words
from salsa.report.sections import Section


def caption(study, frames):
    return (
        f"Mean over {words.replicates(study)} on the evaluation prompts ({words.band(study)}); sft0, sft1 and their "
        "soup before PPO."
    )


SECTION = Section(name="rewards", heading="Rewards and KL", place=1, table=tables.rewards, caption=caption)
