"""GRPO (2402.03300), and its variant Dr. GRPO (2503.20783) as options.

Each prompt has k responses, whose scores are shifted and scaled by their own mean and deviation. Every token of a
response has this advantage. The penalty is in the loss, and there is no value model.
"""

from typing import ClassVar, Literal

from salsa.algorithms import policy_gradient
from salsa.workflow import schema

VERSION = 1
EPSILON = 1e-4  # added to deviations, as TRL does: equal scores have an advantage of 0


@schema.dataclass()
class Grpo(policy_gradient.Grouped):
    """GRPO (2402.03300): k responses to a prompt, whose scores are compared with their own mean and deviation."""

    kl_in: ClassVar[str] = "loss"

    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the KL in the loss: k3, as published; k2, whose expected gradient is the KL's at each prefix with
    length_normalisation=none; k1 is refused.
    """
    scale_by_deviation: schema.Switch = True
    """Whether advantages are divided by the deviation of their prompt's scores; false: as in Dr. GRPO (2503.20783)."""
    length_normalisation: Literal["response", "none"] = "response"
    """response: the mean over each response's tokens | none: their sum over lengths.response, as in Dr. GRPO."""

    @property
    def response_means(self):
        return self.length_normalisation == "response"


def advantages(batch, grpo):
    """The advantage of each token (B, T): how far its response's score is above the mean of its prompt's."""
    scores = batch["paid"].view(-1, grpo.samples)  # (prompts, k)
    deviations = scores.std(dim=1, keepdim=True)
    advantages = scores - scores.mean(dim=1, keepdim=True)
    if grpo.scale_by_deviation:
        advantages = advantages / (deviations + EPSILON)
    return {"advantages": advantages.view(-1, 1) * batch.mask}, {"group_deviation": deviations.mean().item()}


def loss(batch, logprobs, values, grpo):
    """The clipped loss and the penalty of each token: means over a response's tokens, then over responses."""
    from salsa.rl import objective

    lengths = batch.mask.sum(dim=1)
    divisors = lengths if grpo.length_normalisation == "response" else batch.longest

    def mean(values):
        return (objective.sum_over_tokens(values, batch.mask) / divisors).mean()

    ratios = objective.token_ratios(logprobs, batch["old_logprobs"], batch.mask)
    losses, clipped = objective.clipped_losses(ratios, batch["advantages"], grpo.clip_range)
    policy_loss, penalty = mean(losses), mean(batch.kl(grpo.kl_estimator, logprobs))
    clip_fraction = (objective.sum_over_tokens(clipped, batch.mask) / lengths).mean()
    return policy_loss + batch.kl_coef * penalty, {"policy_loss": policy_loss, "policy_clip_fraction": clip_fraction}


ALGORITHM = policy_gradient.PolicyGradient(
    kind="grpo",
    title="GRPO",
    settings=Grpo,
    advantages=advantages,
    loss=loss,
    mean_over="response",
    logs={
        **policy_gradient.LOGS,
        "policy_loss": ("clipped loss of the policy, without the penalty", ""),
        "policy_clip_fraction": ("a response's tokens whose ratio is clipped", "share"),
        "group_deviation": ("deviation of the scores of a prompt's responses, as they are paid", ""),
    },
)


if __name__ == "__main__":
    ALGORITHM.command(VERSION, __doc__)
