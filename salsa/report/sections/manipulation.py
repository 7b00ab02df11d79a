"""How strongly a study manipulates what its policies are anchored to, and whether they were trained to the end."""

import math
from collections import Counter

import pandas as pd

from salsa import algorithms, anchors
from salsa.evaluate import flat, gates, statistics
from salsa.report import selection, words
from salsa.report.sections import Section
from salsa.report.selection import number_or_nan
from salsa.workflow import policies
from salsa.workflow.weights import SFT0, is_sft0, weight_of

COLUMNS = [
    "arm",
    "kl_coef",
    "replicate",
    "seed",
    "kl_sft0_reference",
    "manipulation",
    "penalty",
    "reward_gain",
    "penalty_share",
    "reward_slope",
    "reward_slope_se",
    "flat",
    "place_in_grid",
    "chosen",
]


def table(study):
    """One row per policy with a penalty; a number that is not known, or not in this unit, is nan.

    In standard deviations of reward: `manipulation`, kl_coef · KL(sft0 ‖ reference); `penalty`, the mean of kl_coef ·
    KL(policy ‖ own reference) over the flat part of training; `reward_gain`, the mean proxy reward there minus that of
    the first iteration. `penalty_share` is the penalty divided by the size of this gain. `place_in_grid` is that of the
    row's kl_coef, and `chosen` says whether claims compare the arm at it.
    """
    grids = {arm: selection.grid(study, arm) for arm in study.arms if study.penalised(arm)}
    best = {arm: selection.of_claims(study, arm) for arm in grids}
    rows = []
    for policy, end in zip(study.ordered, study.frames.policies.to_dict("records"), strict=True):
        if policy.arm in grids:
            row = _measures(study, policy, end)
            row["place_in_grid"] = gates.place_in_grid(policy.kl_coef, grids[policy.arm])
            row["chosen"] = "yes" if policy.kl_coef == best[policy.arm] else "no"
            rows.append(row)
    return pd.DataFrame(rows, columns=COLUMNS)


def _measures(study, policy, end):
    """The columns of a policy but for its place among others; `end` is its row in the frame of policies."""
    limits, start = study.config.evaluate.gates, policy.metrics[0] if policy.metrics else {}
    penalty = _penalty(study, policy)
    gain = end["flat_reward"] - number_or_nan(start.get("score"))
    return {
        "arm": policy.arm,
        "kl_coef": policy.kl_coef,
        "replicate": policy.replicate,
        "seed": policy.seed,
        "kl_sft0_reference": reference_kl(study, policy),
        "manipulation": _strength(study, policy),
        "penalty": penalty,
        "reward_gain": gain,
        "penalty_share": share(penalty, gain),
        "reward_slope": end["reward_slope"],
        "reward_slope_se": end["reward_slope_se"],
        "flat": flat.flatness(end["reward_slope"], end["reward_slope_se"], limits.largest_drift),
    }


def strength(study, arm, kl_coef):
    """kl_coef · KL(sft0 ‖ reference) of an arm at one of its kl_coefs, a mean over replicates; nan where not known."""
    values = selection.over_seeds(study.of(arm=arm, kl_coef=kl_coef), lambda policy: _strength(study, policy))
    return sum(values.values()) / len(values) if values else math.nan


def _strength(study, policy):
    """In standard deviations of reward, with the weight that the penalty starts with; nan where it has another unit."""
    if not in_deviations(study, policy.arm):
        return math.nan
    start = policy.metrics[0] if policy.metrics else {}
    return reference_kl(study, policy) * number_or_nan(start.get("kl_coef"))


def share(penalty, gain):
    """The penalty as a share of the reward gained, whether that was gained or lost; nan for no change at all."""
    return penalty / abs(gain) if gain else math.nan


def in_deviations(study, arm):
    """Whether the penalty of an arm is in standard deviations of reward, as a part of what its policies are paid."""
    algorithm = policies.algorithm_of(study.composed.arms[arm])
    return algorithms.kinds()[algorithm].pays_deviations(policies.section(study.config, algorithm))


def has_other_reference(study, arm):
    """Whether an arm's reference is, or becomes, another model than sft0."""
    reference = study.composed.arms[arm].reference
    moves = anchors.kinds()[reference.kind].moves
    return moves or not is_sft0(reference.weights)


def reference_kl(study, policy):
    """KL(sft0 ‖ reference) in nats per response; nan where the reference moves, or is not known from there.

    Of a soup of sft0 and sft1 it is the landscape's, exact over the vocabulary on the development prompts. Of any other
    reference it is what a policy that starts as sft0 has to its reference in the first iteration.
    """
    spec = policies.spec_of(study.composed.arms[policy.arm], study.config)
    if anchors.kinds()[spec.kind].moves:
        return math.nan
    if spec.kind == "soup" and {"sft0", "sft1"}.issuperset(dict(spec.weights)):
        alpha = float(weight_of("sft1", spec.weights))
        line = {point["alpha"]: point["kl_from_sft0"] for point in study.landscape(policy.replicate).line}
        if alpha == 0 or alpha in line:
            return line.get(alpha, 0.0)
    start = policy.metrics[0] if policy.metrics else {}
    return number_or_nan(start.get("kl_to_reference")) if spec.start == SFT0 else math.nan


def _penalty(study, policy):
    """The mean of kl_coef · KL(policy ‖ own reference) over the flat part of training."""
    if not in_deviations(study, policy.arm):
        return math.nan
    rows = study.frames.flat_rows(policy)
    penalties = [number_or_nan(row.get("current_kl_coef")) * row["kl_to_reference"] for row in rows]
    return sum(penalties) / len(penalties) if penalties else math.nan


def chosen(frame):
    """The rows of the kl_coefs that claims compare arms at."""
    return frame[frame["chosen"] == "yes"]


def by_arm(frame, name):
    """Arm -> mean over replicates (of means over training seeds) of a column, of the chosen rows, where it is known."""
    of_replicates = selection.seed_means(chosen(frame).dropna(subset=name), ["arm"], [name])
    means = of_replicates.groupby("arm", sort=False)[name].mean()
    return {arm: float(mean) for arm, mean in means.items()}


def strengths(study, frame):
    """Arm -> its manipulation, of the arms with another reference than sft0."""
    return {arm: x for arm, x in by_arm(frame, "manipulation").items() if has_other_reference(study, arm)}


def settled(frame):
    """Arm -> share of replicates in which its reward is not clearly drifting, of those in which it was measured."""
    known = frame[frame["flat"] != ""]
    return by_arm(known.assign(settled=(known["flat"] != flat.DRIFTING).astype(float)), "settled")


def drifts(frame):
    """Arm -> the end further from 0, as a size, of the interval of its change of reward over replicates.

    The interval is that of t. One replicate has none, and there it is the run's own change ± 2 standard errors.
    """
    names, ends = ["reward_slope", "reward_slope_se"], {}
    changes = selection.seed_means(chosen(frame).dropna(subset=names), ["arm"], names)
    for arm, rows in changes.groupby("arm", sort=False):
        mean, low, high = statistics.replicate_interval(rows["reward_slope"])
        if len(rows) == 1:
            half = flat.ERRORS * float(rows["reward_slope_se"].iloc[0])
            low, high = mean - half, mean + half
        ends[arm] = max(abs(low), abs(high))
    return ends


def places(frame):
    """Arm -> where its chosen kl_coef lies in its grid."""
    return dict(zip(chosen(frame)["arm"], chosen(frame)["place_in_grid"], strict=True))


def sentence(study, frame):
    """What a reader has to know of the manipulation before any verdict, by the study's table of it."""
    penalties, gains = by_arm(frame, "penalty"), by_arm(frame, "reward_gain")
    shares = {arm: share(penalties[arm], gains[arm]) for arm in penalties if gains.get(arm)}
    return gates.sentence(
        strengths(study, frame),
        shares,
        Counter(frame["flat"][frame["flat"] != ""]),
        places(frame),
        study.config.evaluate.gates,
    )


def caption(study, tables):
    return sentence(study, tables["manipulation"]) or "Manipulation: no policy has a penalty."


def reading(study, tables):
    """What the numbers are."""
    settings = study.config.evaluate
    if tables["manipulation"].empty:
        return ""
    return (
        "Rewards have a standard deviation of 1 on sft0's responses. The penalty is kl_coef · KL(policy ‖ own "
        f"reference) over the last {settings.flat_share:.0%} of training, the reward gained the proxy reward there "
        "minus that of the first iteration. Reward is flat where the change of its least-squares line over this part, "
        f"± {flat.ERRORS} standard errors, lies within ±{settings.gates.largest_drift:g}, and clearly drifts where it "
        f"lies outside. Strengths and shares are means over {words.replicates(study)}."
    )


SECTION = Section(
    name="manipulation",
    heading="Training and stability",
    place=0,
    table=table,
    caption=caption,
    reading=reading,
)
