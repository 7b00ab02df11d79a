"""What decides whether a study can show anything: gates before PPO and after it, which `evaluate.gates` words."""

import math

import numpy as np
import pandas as pd

from salsa.evaluate.gates import Measured, advantage, gates
from salsa.report import claims, selection, words
from salsa.report.formats import Table
from salsa.report.sections import Section, manipulation

BEFORE_PPO = (  # columns of gates.json
    "largest_manipulation",
    "claim_manipulation",
    "soup_minus_sft0_reward",
    "soup_minus_sft0_reward_se",
    "soup_minus_sft0_gold",
    "soup_minus_sft0_gold_se",
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
            **{name: before.get(name) for name in BEFORE_PPO},
            "gold_ppo_minus_sft0": gain,
            "gold_ppo_minus_sft0_in_errors": gain / max(error, 1e-9),
        }
        numbers = {name: x if name == "policy_pairs" else selection.number_or_nan(x) for name, x in row.items()}
        rows.append({"replicate": replicate} | numbers | {"warnings": "; ".join(before.get("warnings", []))})
    return pd.DataFrame(rows)


def policy_agreement(study, replicate):
    """(share, pairs): does the reward model order two final policies' responses to a prompt as gold does?

    Of several samples of a prompt, those of one number are a pair. Of a replicate with one policy: that policy's and
    sft0's. Pairs that either scores equally are left out; no pair: nan.
    """
    rows = study.frames.responses
    rows = rows[rows["replicate"] == replicate]
    policies = rows[rows["arm"] != ""]
    if len(policies[["model", "seed"]].drop_duplicates()) == 1:
        policies = pd.concat([policies, rows[rows["model"] == selection.SFT0]])
    models, prompts = ["model", "seed"], ["benchmark", "prompt_id", "sample"]
    scores = policies.pivot(index=models, columns=prompts, values=["reward", "gold"])
    first, second = np.triu_indices(len(scores), 1)
    with np.errstate(invalid="ignore"):  # of two infinite scores
        rewards, golds = (
            x[first] - x[second] for x in (scores["reward"].to_numpy(), scores["gold"].to_numpy())
        )  # (pairs of models, prompts)
        products = (rewards * golds).ravel()
    products = products[np.isfinite(products) & (products != 0)]
    return (float(np.mean(products > 0)) if len(products) else math.nan), len(products)


def plain_gain(study, replicate):
    """(gain, standard error): gold of the plain anchor at the claims' kl_coef minus sft0's; see `gates.advantage`."""
    if study.plain is None:
        return math.nan, math.nan
    kl_coef = selection.of_claims(study, study.plain)
    policies = study.of(arm=study.plain, replicate=replicate, kl_coef=kl_coef)
    rows = [row | {"model": study.plain} for policy in policies for row in policy.responses]
    gain = advantage(rows + selection.sft0_responses(study, replicate), "gold", study.plain)
    return tuple(selection.number_or_nan(number) for number in gain)


def checks(study, tables):
    """The gates that were measured (`evaluate.gates.Measured`), by the study's tables of gates and of manipulation."""
    limits, plain = study.config.evaluate.gates, study.plain or "plain PPO"
    numbers = _of_replicates(tables["gates"]) | _of_arms(study, tables["manipulation"])
    numbers["evaluation_noise"] = evaluation_noise(tables.get("claims"))
    wanted = gates(limits, words.reward_model(study.config), plain)
    return [Measured(gate, numbers[name]) for name, gate in wanted.items() if numbers.get(name)]


def _of_replicates(frame):
    """Column -> replicate -> number, where it is known."""
    by_replicate = frame.set_index("replicate")
    return {
        name: {f"r{replicate}": number for replicate, number in by_replicate[name].dropna().items()}
        for name in by_replicate
    }


def _of_arms(study, frame):
    """Name of a gate -> arm -> number."""
    return {
        "manipulation": manipulation.strengths(study, frame),
        "settled": manipulation.settled(frame),
        "reward_slope": manipulation.drifts(frame),
        "place_in_grid": manipulation.places(frame),
    }


def evaluation_noise(frame):
    """Claim -> the share of the deviation between replicates that evaluation alone makes, of its primary outcome.

    Left out are claims of which one of the two is not known.
    """
    if frame is None or frame.empty:
        return {}
    rows = claims.primary_rows(claims.tested_rows(frame)).dropna(subset=["sampling_deviation", "deviation"])
    rows = rows[rows["deviation"] > 0].set_index("claim")
    return (rows["sampling_deviation"] / rows["deviation"]).astype(float).to_dict()


def listed(checks):
    """The table of all gates that readers see, in words."""
    rows = [
        [
            check.gate.quantity,
            "after PPO" if check.gate.after_ppo else "before PPO",
            check.gate.wanted,
            check.words,
            check.held,
            "" if check.holds else check.gate.otherwise,
        ]
        for check in checks
    ]
    return Table(["gate", "known", "wanted", "measured", "held in", "where it fails"], rows)


def caption(study, tables):
    frame = tables["gates"]
    return (
        f"Gates of {words.replicates(study)}: KL(sft0 ‖ soup) {words.spread(frame['kl_sft0_soup'])} nats per response, "
        f"reward model's agreement with gold {words.spread(frame['gold_agreement'])} on held-out pairs and "
        f"{words.spread(frame['policy_gold_agreement'])} between final policies. On the benchmarks, the soup itself "
        f"has {words.spread(frame['soup_minus_sft0_reward'])} more proxy reward than sft0 and "
        f"{words.spread(frame['soup_minus_sft0_gold'])} more gold (standard errors over prompts in the table)."
        + averaged(study)
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


SECTION = Section(name="gates", heading="Checks", table=table, caption=caption)
