"""SFT pairs: what was known of each before training, and what SALSA and others then did better than plain anchors."""

import math

import numpy as np
import pandas as pd

from salsa.report import selection, words
from salsa.report.sections import Section
from salsa.workflow import regimes, schema

KNOWN = {  # column -> what it is, and its unit; all of it is measured before any policy is trained
    "kl_sft0_soup": "KL(sft0 ‖ soup), nats per response",
    "soup_minus_sft0": "proxy reward of the soup minus sft0's, in standard deviations on sft0's responses",
    "gain_per_kl_coef": "the same, by kl_coef: nats that the reward of the soup would pay for",
    "gold_agreement": "agreement of the reward model with gold, share of held-out pairs",
    "barrier": "loss barrier between sft0 and sft1, nats per token",
    "sft0_to_sft1": "distance of sft1's weights from sft0's",
}
SCORES = {"gold_reward": "gold", "reward": "reward"}  # response of a regression -> column of the frame of responses
TRAINING = "flat_kl_to_sft0"  # the third: KL(policy ‖ sft0) over the flat part of training
RESPONSES = (*SCORES, TRAINING)
CONTRAST = ["candidate", "baseline", "kl_coef"]


def table(study):
    """One row per SFT pair × arm × kl_coef: recipe, what was known of the pair, and the arm minus its plain anchor.

    gold_reward and reward are means over benchmarks of differences paired by prompt; their _variance is that of prompts
    and responses alone (`sampling_variances`). flat_kl_to_sft0 is KL(policy ‖ sft0) over the flat part of training.
    """
    scores, means = _scores(study), _training(study)
    rows = []
    for candidate, baseline, kl_coef in contrasts(study):
        sides = (candidate, kl_coef), (baseline, kl_coef)
        effects = {name: _effects(*(scores[name].get(side) for side in sides)) for name in SCORES}
        for replicate in _in_common(study, candidate, baseline, kl_coef):
            row = {"regime": _regime_name(study, replicate), "replicate": replicate}
            row |= dict(zip(CONTRAST, (candidate, baseline, kl_coef), strict=True))
            row |= _recipe(study, replicate) | _known(study, replicate, kl_coef, means)
            for name in SCORES:
                row[name], row[f"{name}_variance"] = effects[name].get(replicate, (math.nan, math.nan))
            ours, theirs = (means[TRAINING].get((*side, replicate), math.nan) for side in sides)
            rows.append(row | {TRAINING: ours - theirs})
    return pd.DataFrame(rows)


def contrasts(study):
    """(arm, its plain anchor, kl_coef) of every arm that has another one as its plain anchor, in the study's order."""
    return [
        (arm, plain, kl_coef)
        for arm in study.arms
        if (plain := study.plain_of(arm)) not in (None, arm)
        for kl_coef in selection.grid(study, arm)
        if kl_coef in selection.grid(study, plain)
    ]


def _in_common(study, candidate, baseline, kl_coef):
    ours, theirs = ({p.replicate for p in study.of(arm=arm, kl_coef=kl_coef)} for arm in (candidate, baseline))
    return sorted(ours & theirs)


def _scores(study):
    """Response -> (arm, kl_coef) -> its mean score: rows (benchmark, prompt), columns replicates."""
    frame = study.frames.responses
    frame = frame[(frame["arm"] != "") & frame["benchmark"].isin(study.compared)]
    scores = {}
    for name, column in SCORES.items():
        cells = frame.groupby(["arm", "kl_coef", "replicate", "benchmark", "prompt_id"])[column].mean()
        sides = cells.groupby(["arm", "kl_coef"])
        scores[name] = {side: part.droplevel([0, 1]).unstack("replicate") for side, part in sides}
    return scores


def _training(study):
    """Column of the frame of policies -> (arm, kl_coef, replicate) -> its mean over seeds."""
    means = study.frames.policies.groupby(["arm", "kl_coef", "replicate"])[[TRAINING, "sft0_to_sft1"]].mean()
    return {name: means[name].to_dict() for name in means}


def _effects(ours, theirs):
    """replicate -> (mean difference, its sampling variance), of two frames (benchmark, prompt) × replicate."""
    if ours is None or theirs is None:
        return {}
    differences = (ours - theirs).dropna(axis="columns")  # a replicate without every score has none
    parts = [part.to_numpy() for _, part in differences.groupby(level="benchmark")]
    if not parts:
        return {}
    means = np.mean([part.mean(axis=0) for part in parts], axis=0)
    variances = np.sum([sampling_variances(part) for part in parts], axis=0) / len(parts) ** 2
    return dict(zip(differences.columns, zip(means.tolist(), variances.tolist(), strict=True), strict=True))


def sampling_variances(differences):
    """The variance of the mean of each column of differences (P prompts, R pairs) from responses alone, (R,).

    All pairs answer the same prompts, so that what a prompt adds to every pair's difference is no difference between
    pairs: it is taken out. What is left of a pair is its prompts' own part and the noise of responses. Of one pair,
    nothing can be taken out. One prompt has no variance that is known: 0.
    """
    prompts, pairs = differences.shape
    if prompts < 2:
        return np.zeros(pairs)
    left = differences - differences.mean(axis=0)
    share = 1.0
    if pairs > 1:
        left, share = left - left.mean(axis=1, keepdims=True), 1 - 1 / pairs
    return (left**2).sum(axis=0) / (share * (prompts - 1) * prompts)


def _regime_name(study, replicate):
    names = (name for name, regime in study.config.regimes.items() if replicate in regime.replicates)
    return next(names, "")


def _recipe(study, replicate):
    """The settings that differ between regimes, as they are in a replicate: sft.epochs, task.demonstrations, …"""
    regime = regimes.of_replicate(study.config, replicate)
    made = regimes.recipe(study.config, regime)
    sections = {"sft": made.sft, "task": made.data.task, "reward_model": made.reward_model}
    values = {}
    for part, section in sections.items():
        changed = {name: None for other in study.config.regimes.values() for name in getattr(other, part)}
        values |= {f"{part}.{name}": schema.dump(getattr(section, name)) for name in changed}
    if any(other.disjoint for other in study.config.regimes.values()):
        values["disjoint"] = regime.disjoint
    return values


def _known(study, replicate, kl_coef, means):
    """The columns of KNOWN."""
    landscape = study.landscape(replicate)
    gates, rewards = landscape.gates, {row["alpha"]: row["reward"] for row in landscape.line}
    gain = rewards.get(0.5, math.nan) - rewards.get(0.0, math.nan)
    distances = [x for (_, _, other), x in means["sft0_to_sft1"].items() if other == replicate and x == x]
    values = {
        "kl_sft0_soup": gates.get("kl_sft0_soup"),
        "soup_minus_sft0": gain,
        "gain_per_kl_coef": gain / kl_coef if kl_coef else None,
        "gold_agreement": study.reward_models.get(replicate, gates).get("gold_agreement"),
        "barrier": gates.get("barrier"),
        "sft0_to_sft1": distances[0] if distances else None,
    }
    return {name: selection.number_or_nan(value) for name, value in values.items()}


def caption(study, tables):
    frame = tables["pairs"]
    pairs = frame.drop_duplicates("replicate")
    return (
        f"{len(pairs)} SFT pairs: KL(sft0 ‖ soup) {words.spread(pairs['kl_sft0_soup'])} nats per response, the soup's "
        f"proxy reward above sft0's {words.spread(pairs['soup_minus_sft0'])} standard deviations, agreement of the "
        f"{words.reward_model(study.config)} with gold {words.spread(pairs['gold_agreement'])}. Responses are an arm "
        "minus its plain anchor: mean gold and proxy reward over benchmarks, with the variance of prompts and "
        "responses alone, and KL(policy ‖ sft0) over the flat part of training, nats per response."
    )


def present(study):
    """Whether a study has pairs of several recipes, and arms to compare on them."""
    return bool(study.config.regimes) and bool(contrasts(study))


SECTION = Section(name="pairs", heading="Claims", place=91, table=table, caption=caption, present=present)
