"""PPO with a KL penalty to any reference (1707.06347; 2403.17031 for its details in RLHF).

What is PPO's own: its settings, its advantages and its losses. The loop around them is salsa/rl/trainer.py.
"""

from typing import Annotated, Literal

from salsa.algorithms import policy_gradient
from salsa.workflow import schema

VERSION = 3


@schema.dataclass()
class Ppo(policy_gradient.Settings):
    """PPO with a KL penalty to the reference (1707.06347; 2403.17031)."""

    epochs: policy_gradient.Epochs = 2
    learning_rate: schema.LearningRate = 0.0001
    """Learning rate of Adam, for policy and value model."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of the KL to the reference, from sampled tokens (joschu.net/blog/kl-approx.html)."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Where the penalty enters: each token's reward, or the loss."""
    gamma: schema.Share = 1.0
    """Discount of rewards per token."""
    lam: schema.Share = 0.95
    """GAE's λ (1506.02438)."""
    clip_range: policy_gradient.ClipRange = 0.2
    """How far the probability ratio may move from 1 before it is clipped."""
    value_clip_range: Annotated[float, schema.Range(0, 10**6)] = 0.2
    """How far a value may move from the old one before it is clipped."""
    value_coef: Annotated[float, schema.Range(0, 10**6)] = 0.1
    """Weight of the value loss."""
    value_model: Literal["reward_model", "sft", "shared"] = "reward_model"
    """reward_model: a network of its own that starts as the reward model | sft: one that starts as the policy does,
    with a head of zeros | shared: a head of zeros on the policy's trunk.
    """
    whiten_advantages: schema.Switch = True
    """Whether advantages are whitened. It rescales what is paid, but not a penalty in the loss: kl_in=loss is several
    times weaker with it.
    """


def advantages(batch, ppo):
    """The advantage of each token (B, T) by GAE, and the returns (B, T) that the values are trained towards."""
    from salsa.rl import objective, record

    kl_coef = batch.kl_coef if ppo.kl_in == "reward" else 0.0
    rewards = objective.token_rewards(batch.kl(ppo.kl_estimator), batch["paid"], batch.mask, kl_coef)
    advantages, returns = objective.gae(rewards, batch["old_values"], batch.mask, ppo.gamma, ppo.lam)
    if ppo.whiten_advantages:  # over the whole batch, so that neither mini-batches nor processes change them
        advantages = objective.whiten(advantages, batch.mask)
    explained = record.explained_variance(batch["old_values"], returns, batch.mask)
    return {"advantages": advantages, "returns": returns}, {"explained_variance": explained}


def loss(batch, logprobs, values, ppo):
    """The clipped losses of policy and values, and the penalty where it is in the loss: means over tokens."""
    from salsa.rl import objective

    policy_loss, policy_clipped = objective.policy_loss(
        logprobs, batch["old_logprobs"], batch["advantages"], batch.mask, ppo.clip_range
    )
    value_loss, value_clipped = objective.value_loss(
        values, batch["old_values"], batch["returns"], batch.mask, ppo.value_clip_range
    )
    loss = policy_loss + ppo.value_coef * value_loss
    if ppo.kl_in == "loss":
        kl = objective.masked_mean(batch.kl(ppo.kl_estimator, logprobs), batch.mask)
        loss = loss + batch.kl_coef * kl
    return loss, {
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "policy_clip_fraction": policy_clipped,
        "value_clip_fraction": value_clipped,
    }


ALGORITHM = policy_gradient.PolicyGradient(
    kind="ppo",
    title="PPO",
    settings=Ppo,
    advantages=advantages,
    loss=loss,
    logs={
        **policy_gradient.LOGS,
        "policy_loss": ("clipped loss of the policy", ""),
        "policy_clip_fraction": ("tokens whose ratio is clipped", "share"),
        "explained_variance": ("variance of the returns that the values explain", "share"),
        "value_loss": ("clipped loss of the values", ""),
        "value_clip_fraction": ("tokens whose value is clipped", "share"),
        "seconds_value": ("time of the phase value", "seconds"),
    },
    may_write=("value_model",),
    remedy="share the value model (ppo.value_model=shared)",
)


if __name__ == "__main__":
    ALGORITHM.command(VERSION, __doc__)
