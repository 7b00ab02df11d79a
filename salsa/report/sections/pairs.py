"""SFT pairs: what was known of each before training, and what SALSA and others then did better than plain anchors."""

import math

import numpy as np
import pandas as pd

from salsa.evaluate import sampling
from salsa.report import selection, words
from salsa.report.noise import SCORES
from salsa.report.outcomes import FLAT
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
TRAINING = FLAT["training_kl_to_sft0"]  # the third response of a regression, beside the scores
RESPONSES = (*SCORES, TRAINING)
CONTRAST = ["candidate", "baseline", "kl_coef"]


def table(study):
    """One row per SFT pair × arm × kl_coef: recipe, what was known of the pair, and the arm minus its plain anchor.

    gold_reward and reward are means over benchmarks of differences paired by prompt; their _variance is that of prompts
    and responses alone (`sampling.residual_variances`). flat_kl_to_sft0 is KL(policy ‖ sft0) over the flat part of
    training.
    """
    measured, distances = differences(study), _weight_distances(study)
    rows = []
    for candidate, baseline, kl_coef in contrasts(study):
        effects = {name: _effects(by_contrast[candidate, baseline, kl_coef]) for name, by_contrast in measured.items()}
        for replicate in _in_common(study, candidate, baseline, kl_coef):
            row = {"regime": _regime_name(study, replicate), "replicate": replicate}
            row |= dict(zip(CONTRAST, (candidate, baseline, kl_coef), strict=True))
            row |= _recipe(study, replicate) | _known(study, replicate, kl_coef, distances)
            for name in RESPONSES:
                row[name], variance = effects[name].get(replicate, (math.nan, math.nan))
                row |= {f"{name}_variance": variance} if name in SCORES else {}
            rows.append(row)
    return pd.DataFrame(rows)


def beside(study, pairs, other, main):
    """The rows of a contrast in `table`, with the main contrast's responses taken off: what the other arm does more.

    Differences are taken prompt by prompt, before any variance is: what both contrasts share, such as the plain anchor,
    is in neither the difference nor its variance.

    Args:
        pairs: the table.
        other, main: (candidate, baseline).
    """
    measured, parts = differences(study), []
    rows = pairs[(pairs["candidate"] == other[0]) & (pairs["baseline"] == other[1])]
    for kl_coef, part in rows.groupby("kl_coef"):
        changes = {}
        for name, by_contrast in measured.items():
            first, second = (by_contrast.get((*contrast, kl_coef), pd.DataFrame()) for contrast in (other, main))
            effects = _effects(first - second)
            numbers = [effects.get(replicate, (math.nan, math.nan)) for replicate in part["replicate"]]
            changes[name] = [mean for mean, _ in numbers]
            changes[f"{name}_variance"] = [variance for _, variance in numbers]
        parts.append(part.assign(**{name: values for name, values in changes.items() if name in part}))
    return pd.concat(parts) if parts else rows


def differences(study):
    """Response -> (candidate, baseline, kl_coef) -> candidate minus baseline, rows (benchmark, prompt) × replicates.

    What was measured in training is a single row.
    """
    measured = {}
    for name, by_side in (_scores(study) | {TRAINING: _flat(study)}).items():
        measured[name] = {}
        for candidate, baseline, kl_coef in contrasts(study):
            ours, theirs = (by_side.get((arm, kl_coef), pd.DataFrame()) for arm in (candidate, baseline))
            measured[name][candidate, baseline, kl_coef] = ours - theirs
    return measured


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


def _flat(study):
    """(arm, kl_coef) -> KL(policy ‖ sft0) over the flat part of training: one row, columns replicates."""
    means = study.frames.policies.groupby(["arm", "kl_coef", "replicate"])[TRAINING].mean()
    sides = means.groupby(["arm", "kl_coef"])
    index = pd.MultiIndex.from_tuples([("", "")], names=["benchmark", "prompt_id"])
    return {side: part.droplevel([0, 1]).to_frame().T.set_axis(index) for side, part in sides}


def _weight_distances(study):
    """replicate -> distance of sft1's weights from sft0's, of any policy that knows it."""
    return study.frames.policies.groupby("replicate")["sft0_to_sft1"].max().to_dict()


def _effects(differences):
    """replicate -> (mean over benchmarks, its sampling variance), of a frame (benchmark, prompt) × replicate.

    A replicate without every score has none. The variance of a single prompt, or number, is not known, and 0 here.
    """
    differences = differences.dropna(axis="columns")
    if differences.empty:
        return {}
    parts = [part.to_numpy() for _, part in differences.groupby(level="benchmark")]
    means = np.mean([part.mean(axis=0) for part in parts], axis=0)
    variances = [np.nan_to_num(sampling.residual_variances(part.T)) / len(part) for part in parts]
    variances = np.sum(variances, axis=0) / len(parts) ** 2
    return dict(zip(differences.columns, zip(means.tolist(), variances.tolist(), strict=True), strict=True))


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
        values["disjoint"] = regime is not None and regime.disjoint
    return values


def _known(study, replicate, kl_coef, distances):
    """The columns of KNOWN."""
    landscape = study.landscape(replicate)
    gates, rewards = landscape.gates, {row["alpha"]: row["reward"] for row in landscape.line}
    gain = rewards.get(0.5, math.nan) - rewards.get(0.0, math.nan)
    values = {
        "kl_sft0_soup": gates.get("kl_sft0_soup"),
        "soup_minus_sft0": gain,
        "gain_per_kl_coef": gain / kl_coef if kl_coef else None,
        "gold_agreement": study.reward_models.get(replicate, gates).get("gold_agreement"),
        "barrier": gates.get("barrier"),
        "sft0_to_sft1": distances.get(replicate),
    }
    return {name: selection.number_or_nan(value) for name, value in values.items()}


def caption(study, tables):
    frame = tables["pairs"]
    pairs = frame.drop_duplicates("replicate")
    return (
        f"{len(pairs)} SFT pair{'s' if len(pairs) > 1 else ''}: KL(sft0 ‖ soup) {words.spread(pairs['kl_sft0_soup'])} "
        "nats per response, the soup's "
        f"proxy reward above sft0's {words.spread(pairs['soup_minus_sft0'])} standard deviations, agreement of the "
        f"{words.reward_model(study.config)} with gold {words.spread(pairs['gold_agreement'])}. Responses are an arm "
        "minus its plain anchor: mean gold and proxy reward over benchmarks, with the variance of prompts and "
        "responses alone, and KL(policy ‖ sft0) over the flat part of training, nats per response."
    )


def present(study):
    """Whether a study has pairs of several recipes, and arms to compare on them."""
    return bool(study.config.regimes) and bool(contrasts(study))


SECTION = Section(name="pairs", heading="Claims", place=91, table=table, caption=caption, present=present)
