"""What the best of n responses gains, for several n, from the samples that were drawn once."""

import math

import numpy as np
import pandas as pd

from salsa.evaluate import best_of
from salsa.report import words
from salsa.report.frames import over_replicates
from salsa.report.sections import Section

MEASURES = ["reward", "gold_reward"]


def table(study):
    """One row per arm and n: the mean of the best of n by the reward model, and its t interval over replicates.

    Each prompt's mean is over all subsets of its samples (`best_of.expected`). kl_bound is the upper bound of KL to the
    model that responses are drawn from, nats per response.
    """
    policies = [policy for policy in study.ordered if policy.samples]
    rows = [
        {"arm": policy.arm, "kl_coef": policy.kl_coef, "replicate": policy.replicate, "n": n}
        | {"kl_bound": best_of.bound(n)}
        | _means(policy.samples, n)
        for policy in policies
        for n in best_of.FRONTIER
    ]
    frame = pd.DataFrame(rows, columns=["arm", "kl_coef", "replicate", "n", "kl_bound", *MEASURES])
    frame = frame.sort_values("n", kind="stable").sort_values(
        "arm", key=lambda arms: arms.map(study.arms.index), kind="stable"
    )
    return over_replicates(frame, ["arm", "kl_coef", "n", "kl_bound"], MEASURES)


def _means(samples, n):
    """Means over prompts of reward and gold of the best of n."""
    reward = [best_of.expected(row["reward"], row["reward"], n) for row in samples]
    gold = [math.nan if row["gold"] is None else best_of.expected(row["reward"], row["gold"], n) for row in samples]
    return {"reward": float(np.mean(reward)), "gold_reward": float(np.mean(gold))}


def caption(study, tables):
    drawn = {len(row["reward"]) for policy in study.policies for row in policy.samples}
    return (
        f"The best of n responses by the reward model, in the mean over all subsets of the {words.spread(drawn)} that "
        "were drawn for each development prompt; kl_bound, log n − (n−1)/n, is an upper bound of KL(best of n ‖ "
        f"start) in nats per response, which ties lower; {words.band(study)}."
    )


SECTION = Section(
    name="best_of_n",
    heading="Rewards and KL",
    place=3,
    table=table,
    caption=caption,
    present=lambda study: any(policy.samples for policy in study.policies),
)
