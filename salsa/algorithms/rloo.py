"""RLOO: REINFORCE with a leave-one-out baseline (2402.14740).

Each prompt has k responses, and the baseline of one is the mean reward of the k − 1 others. The penalty is in the
reward, a response is one action, and there is no value model.
"""

from salsa.algorithms import policy_gradient
from salsa.workflow import schema

VERSION = 1


@schema.dataclass()
class Rloo(policy_gradient.Grouped):
    """RLOO (2402.14740): k responses to a prompt, each with the mean reward of the others as its baseline."""


def advantages(batch, rloo):
    """The advantage of each response (B,): its reward minus the mean reward of the other responses to its prompt.

    The reward of a response is what it is paid minus kl_coef times its KL, which k1 estimates.
    """
    from salsa.rl import objective

    kl = objective.sum_over_tokens(batch.kl(rloo.kl_estimator), batch.mask)
    rewards = (batch["paid"] - batch.kl_coef * kl).view(-1, rloo.samples)  # (prompts, k)
    baselines = (rewards.sum(dim=1, keepdim=True) - rewards) / (rloo.samples - 1)
    return {"advantages": (rewards - baselines).flatten()}, {"group_deviation": rewards.std(dim=1).mean().item()}


def loss(batch, logprobs, values, rloo):
    """The clipped loss of whole responses: the ratio ρ of one is the product of its tokens' ratios."""
    from salsa.rl import objective

    ratios = objective.response_ratios(logprobs, batch["old_logprobs"], batch.mask)
    losses, clipped = objective.clipped_losses(ratios, batch["advantages"], rloo.clip_range)
    return losses.mean(), {"policy_loss": losses.mean(), "policy_clip_fraction": clipped.mean()}


ALGORITHM = policy_gradient.PolicyGradient(
    kind="rloo",
    title="RLOO",
    settings=Rloo,
    advantages=advantages,
    loss=loss,
    mean_over="response",
    logs={
        **policy_gradient.LOGS,
        "policy_loss": ("clipped loss of the policy", ""),
        "importance": ("mean weight of a response for how it was sampled", ""),
        "policy_clip_fraction": ("responses whose ratio is clipped", "share"),
        "group_deviation": ("deviation of the rewards, less the penalty, of a prompt's responses", ""),
    },
)


if __name__ == "__main__":
    ALGORITHM.command(VERSION, __doc__)
