"""Rewards, KL, lengths and ends of the SFT models, their soup and every arm."""

import numpy as np
import pandas as pd

from salsa.report import words
from salsa.report.frames import BEFORE, MEASURES, over_replicates
from salsa.report.sections import Section


def table(study):
    """Mean and t interval over replicates, of the SFT models and the soup, then of every arm at every kl_coef."""
    soups = study.frames.soups
    at = {name: np.isclose(soups["alpha"], alpha, rtol=0, atol=1e-6) for alpha, name in BEFORE.items()}
    rows = [soups[places].assign(arm=name) for name, places in at.items()]
    return over_replicates(pd.concat([*rows, study.frames.policies]), ["arm", "kl_coef"], MEASURES)


def caption(study, tables):
    return (
        f"Means over {words.replicates_by_arm(study)} on the evaluation prompts ({words.band(study)}); sft0, sft1 "
        "and their soup are those before training."
    ) + words.bounds(study)


SECTION = Section(name="rewards", heading="Rewards and KL", place=1, table=table, shares=("eos_rate",), caption=caption)
