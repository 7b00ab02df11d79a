"""Win rates of arms at their chosen kl_coefs: SALSA as the paper's table has it, and every other arm."""

import pandas as pd

from salsa.report import selection, words
from salsa.report.frames import bounded, identity, interval
from salsa.report.sections import Section

COLUMNS = [
    *["model", "data", "benchmark", "judge", "arm", "alpha", "kl_coef", "ppo_kl_coef"],
    *bounded("arm_vs_ppo", "arm_vs_sft0", "ppo_vs_sft0"),
    "how",
    "replicates",
]


def paper_table(study):
    """The paper's table of preferences: a row per benchmark; SALSA against PPO, each against sft0; t over replicates.

    Each arm stands at its chosen kl_coef and is judged by the main judge.
    """
    arm = salsa_arm(study)
    frame = preferences(study, [arm] if arm else []).drop(columns=["arm", "alpha"])
    return frame.rename(columns=lambda name: "salsa_kl_coef" if name == "kl_coef" else name.replace("arm_", "salsa_"))


def ablations(study):
    """As `paper_table`, a row per arm × benchmark: alphas by alpha, then the controls."""
    alphas = {policy.arm: policy.alpha for policy in study.policies}
    arms = [arm for arm in study.arms if arm != study.plain_of(arm)]
    return preferences(study, sorted(arms, key=lambda arm: (alphas[arm] is None, alphas[arm] or 0.0)))


def salsa_arm(study):
    """The arm called salsa, or the one with the soup of alpha ½ as its reference, or None."""
    return selection.arm_of(study, "salsa") or next((p.arm for p in study.policies if p.alpha == 0.5), None)


def preferences(study, arms):
    """One row per arm × benchmark, at chosen kl_coefs: the arm against its plain anchor, and both against sft0."""
    rows, judge = [], selection.main_judge(study)
    for arm in arms if judge else ():
        plain = study.plain_of(arm)
        pair = selection.pair(study, arm, plain) if plain else None
        for benchmark in study.compared if pair else ():
            effects, how = selection.preference(study, pair, judge, benchmark)
            rate = selection.rate_of(study, judge, [benchmark])
            row = identity(study) | {"benchmark": benchmark, "judge": judge, "arm": arm}
            row |= {"alpha": selection.number_or_nan(study.of(arm=arm)[0].alpha)}
            row |= {"kl_coef": pair.candidate_kl_coef, "ppo_kl_coef": pair.baseline_kl_coef}
            row |= interval("arm_vs_ppo", [0.5 + effect for effect in effects.values()])
            row |= interval("arm_vs_sft0", list(rate(arm, pair.candidate_kl_coef).values()))
            row |= interval("ppo_vs_sft0", list(rate(plain, pair.baseline_kl_coef).values()))
            rows.append(row | {"how": how, "replicates": len(effects)})
    return pd.DataFrame(rows, columns=COLUMNS)


def against_plain(study, arm, kl_coef, row):
    """(arm, kl_coef) of the two policies that a row compares."""
    return [(arm, kl_coef), (study.plain_of(arm), row["ppo_kl_coef"])]


def caption(study, frame, subject, column):
    """The caption of one of the two tables."""
    if frame.empty:
        return "No arm here that was judged against the plain anchor or sft0." + words.doubts(study)
    indirect = int((frame["how"] != selection.DIRECT).sum())
    other = (
        f"; {indirect} of {len(frame)} cells against it are of arms at two kl_coefs, which no judge compared: ½ plus "
        "the difference of their win rates against sft0"
        if indirect
        else ""
    )
    return (
        f"{subject} against the plain anchor, each at its chosen kl_coef: adjusted win rates of "
        f"{words.spread(frame[column])} by benchmark, judge {frame['judge'].iloc[0]}, beside both against sft0; "
        f"{words.replicates_by_arm(study)}, {words.band(study)}{other}; measured here, none of them the paper's."
    ) + words.doubts(study)


PAPER_TABLE = Section(
    name="paper_table",
    heading="Preferences",
    place=1,
    table=paper_table,
    left_out=("data",),
    shares=("salsa_vs_ppo", "salsa_vs_sft0", "ppo_vs_sft0"),
    caption=lambda study, tables: caption(study, tables["paper_table"], "SALSA", "salsa_vs_ppo"),
    sides=lambda study, row: against_plain(study, salsa_arm(study), row["salsa_kl_coef"], row),
)
ABLATIONS = Section(
    name="ablations",
    heading="Preferences",
    place=2,
    table=ablations,
    shares=("arm_vs_ppo", "arm_vs_sft0", "ppo_vs_sft0"),
    caption=lambda study, tables: caption(study, tables["ablations"], "Alphas and controls", "arm_vs_ppo"),
    sides=lambda study, row: against_plain(study, row["arm"], row["kl_coef"], row),
)
