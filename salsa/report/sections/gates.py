"""What decides whether a study can show anything: gates before training and after it."""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from salsa.report import selection, words
from salsa.report.sections import Section

AFTER_PPO = (  # columns that need policies
    "policy_gold_agreement",
    "policy_pairs",
    "gold_ppo_minus_sft0",
    "gold_ppo_minus_sft0_in_errors",
)


def table(study):
    """One row per replicate: what decides whether a study can show anything."""
    rows = []
    for replicate in study.replicates:
        before, reward_model = study.landscape(replicate).gates, study.reward_models.get(replicate, {})
        gold = before.get("gold") or {}
        agreement, pairs = policy_agreement(study, replicate)
        gain, error = plain_gain(study, replicate)
        row = {
            "held_out_accuracy": reward_model.get("held_out_accuracy", before.get("held_out_accuracy")),
            "gold_agreement": reward_model.get("gold_agreement", before.get("gold_agreement")),
            "policy_gold_agreement": agreement,
            "policy_pairs": pairs,
            "kl_sft0_soup": before.get("kl_sft0_soup"),
            "barrier": before.get("barrier"),
            "gold_sft0": gold.get("sft0"),
            "gold_sft1": gold.get("sft1"),
            "gold_soup": gold.get("soup"),
            "gold_ppo_minus_sft0": gain,
            "gold_ppo_minus_sft0_in_errors": gain / max(error, 1e-9),
        }
        numbers = {name: x if name == "policy_pairs" else selection.number_or_nan(x) for name, x in row.items()}
        rows.append({"replicate": replicate} | numbers | {"warnings": "; ".join(before.get("warnings", []))})
    return pd.DataFrame(rows)


def policy_agreement(study, replicate):
    """(share, pairs): does the reward model order two final policies' responses to a prompt as gold does?

    Of a replicate with one policy: that policy's and sft0's. Pairs that either scores equally are left out; no pair:
    nan.
    """
    rows = study.frames.responses
    rows = rows[rows["replicate"] == replicate]
    policies = rows[rows["arm"] != ""]
    if policies["model"].nunique() == 1:
        policies = pd.concat([policies, rows[rows["model"] == selection.SFT0]])
    scores = policies.pivot(index="model", columns=["benchmark", "prompt_id"], values=["reward", "gold"])
    first, second = np.triu_indices(len(scores), 1)
    with np.errstate(invalid="ignore"):  # of two infinite scores
        rewards, golds = (
            x[first] - x[second] for x in (scores["reward"].to_numpy(), scores["gold"].to_numpy())
        )  # (pairs of models, prompts)
        products = (rewards * golds).ravel()
    products = products[np.isfinite(products) & (products != 0)]
    return (float(np.mean(products > 0)) if len(products) else math.nan), len(products)


def plain_gain(study, replicate):
    """(gain, standard error): gold of the plain anchor minus sft0's, paired by prompt, at its first kl_coef."""
    policies = sorted(study.of(arm=study.plain, replicate=replicate), key=lambda p: study.kl_coefs.index(p.kl_coef))
    if not policies:
        return math.nan, math.nan
    rows = study.frames.responses
    rows = rows[rows["replicate"] == replicate].set_index(["benchmark", "prompt_id"])
    plain, sft0 = (rows[rows["model"] == model]["gold"] for model in (policies[0].name, selection.SFT0))
    gains = (plain - sft0.reindex(plain.index)).dropna().to_numpy()  # in the order of the file
    if len(gains) < 2:
        return math.nan, math.nan
    return float(np.mean(gains)), float(np.std(gains, ddof=1) / math.sqrt(len(gains)))


@dataclass(frozen=True)
class Gate:
    """A condition without which a comparison of references says nothing.

    Attributes:
        text: what is wanted.
        values: what was measured, by replicate.
        held: in how many of them it is what is wanted.
        after_ppo: whether it is measured of policies.
    """

    text: str
    values: list[float]
    held: int
    after_ppo: bool

    @property
    def holds(self):
        return self.held == len(self.values)

    def __str__(self):
        measured = ", ".join(selection.number(x) for x in self.values)
        return f"{self.text}: held in {self.held} of {len(self.values)} replicates ({measured})"


def checks(study, frame):
    """The gates that were measured, by the study's table of them."""
    measured = {name: frame[name].dropna().tolist() for name in frame}
    return [
        Gate(text, measured[name], sum(bool(holds(x)) for x in measured[name]), name in AFTER_PPO)
        for name, (text, holds) in wanted(study).items()
        if measured.get(name)
    ]


def wanted(study):
    """Column of the table -> (what is wanted, in words; whether a number is that)."""
    limits = study.config.evaluate.gates
    low, high = limits.lowest_agreement, limits.highest_agreement
    kl, barrier = limits.smallest_kl, limits.largest_barrier
    agreement = f"{words.reward_model(study.config)} agrees with gold"
    return {
        "gold_agreement": (f"{agreement} on {low:.0%} to {high:.0%} of held-out pairs", lambda x: low <= x <= high),
        "kl_sft0_soup": (f"KL(sft0 ‖ soup) at least {kl:g} nats per response", lambda x: x >= kl),
        "barrier": (f"loss barrier at most {barrier:g} nats per token", lambda x: x <= barrier),
        "policy_gold_agreement": (
            f"{agreement} on at least {low:.0%} of pairs of two final policies' responses",
            lambda x: x >= low,
        ),
        "gold_ppo_minus_sft0_in_errors": (
            f"gold reward of {study.plain} above sft0's by more than two standard errors over prompts (errors)",
            lambda x: x > 2,
        ),
    }


def caption(study, tables):
    frame = tables["gates"]
    return (
        f"Gates of {words.replicates(study)}: KL(sft0 ‖ soup) {words.spread(frame['kl_sft0_soup'])} nats per response, "
        f"reward model's agreement with gold {words.spread(frame['gold_agreement'])} on held-out pairs and "
        f"{words.spread(frame['policy_gold_agreement'])} between final policies." + averaged(study)
    )


def averaged(study):
    """What the members of an averaged reward model do alone, in a sentence; nothing of one that was trained."""
    count = study.config.reward_model.models
    if count == 1:
        return ""
    averages = [model["held_out_accuracy"] for model in study.reward_models.values()]
    members = [member["held_out_accuracy"] for model in study.reward_models.values() for member in model["members"]]
    return (
        f" The reward model is the average of {count}: of held-out pairs, its share in the right order is "
        f"{words.spread(averages)}, and that of its members alone {words.spread(members)}."
    )


SECTION = Section(name="gates", heading="Before training", table=table, caption=caption)
