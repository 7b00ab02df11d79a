"""What policies are trained by, as pure functions of tensors: penalties, rewards, advantages and losses.

Shapes: B responses of up to T tokens. A mask is 1 up to and with the last token of each response, then 0. Places where
it is 0 may hold anything finite; they change no result and get no gradient.

Sources: PPO (1707.06347), GAE (1506.02438), the estimators k1, k2, k3 (Schulman, "Approximating KL divergence"),
N+ implementation details of RLHF with PPO (2403.17031).
"""

import torch

# (estimator, place) with the expected gradient, at each prefix, of KL(policy ‖ reference). The others are biased.
# Whitening rescales a penalty in the reward along with the score, but not a penalty in the loss: there, kl_coef is in
# standard deviations of the advantages.
UNBIASED = frozenset({("k1", "reward"), ("k2", "loss")})

LARGEST_LOG_RATIO = 30.0  # of a whole response; e^30 can still be squared in float32, for the norm of gradients


def masked_mean(values, mask):
    """The mean of `values` (B, T) where `mask` is 1."""
    return torch.where(mask.bool(), values, 0.0).sum() / mask.sum()


def sum_over_tokens(values, mask):
    """The sum (B,) of `values` (B, T) over each response's tokens."""
    return torch.where(mask.bool(), values, 0.0).sum(dim=1)


def kl_estimate(logprobs, reference_logprobs, estimator):
    """Estimate of KL(policy ‖ reference) from tokens that the policy sampled, (B, T), in nats per token.

    With Δ = log π − log ref: k1 = Δ (unbiased), k2 = Δ²/2 (biased; its gradient is the reverse KL's),
    k3 = exp(−Δ) − 1 + Δ (unbiased, never negative). Raises ValueError for another `estimator`.
    """
    delta = logprobs - reference_logprobs
    if estimator == "k1":
        return delta
    if estimator == "k2":
        return delta.square() / 2
    if estimator == "k3":
        return torch.expm1(-delta) + delta
    raise ValueError(f"unknown KL estimator {estimator!r}: k1, k2 or k3")


def kl_gradient(estimator, place, response_means=False):
    """Whether the expected gradient of an estimator in the `reward` or in the `loss` is `unbiased` or `biased`.

    Where a penalty in the loss is the mean over each response's own tokens (`response_means`) none is unbiased: a token
    decides how long its response becomes, so that its weight 1/T is correlated with its gradient.
    """
    by_length = place == "loss" and response_means
    return "unbiased" if (estimator, place) in UNBIASED and not by_length else "biased"


def kl_penalty(logprobs, reference_logprobs, weights, estimator):
    """The penalty Σ wᵢ·KL estimate to reference i, (B, T), in nats per token.

    `logprobs` (B, T) are the policy's, `reference_logprobs` (B, R, T) those of R references with R weights.
    """
    references = zip(weights, reference_logprobs.unbind(dim=1), strict=True)
    return sum(weight * kl_estimate(logprobs, reference, estimator) for weight, reference in references)


def next_kl_coef(schedule, initial, kl_coef, iteration, iterations, kl, responses):
    """The kl_coef of iteration + 1.

    Args:
        schedule: schema.KlSchedule. fixed: `initial`; linear: from `initial` in iteration 0 to schedule.final·initial
            in the last; adaptive: multiplied by 1 + clip(kl/target − 1, ±0.2)·responses/horizon (1909.08593, eq. 4).
        kl_coef: its value in `iteration`.
        kl: KL to the reference in `iteration`, in nats per response.
        responses: the number of responses in `iteration`.
    """
    if schedule.kind == "linear":
        share = (iteration + 1) / max(1, iterations - 1)
        return initial * (1 - share + schedule.final * share)
    if schedule.kind == "adaptive":
        error = min(0.2, max(-0.2, kl / schedule.target - 1))
        return kl_coef * (1 + error * responses / schedule.horizon)
    return initial


def paid_scores(scores, ended, normalisation, clip, missing_eos_penalty):
    """What each response is paid, (B,): its score, perhaps normalised and clipped, minus a penalty without an end.

    Args:
        scores: (B,) of the reward model.
        ended: (B,) bool, whether the response has an end token.
        normalisation: `batch` gives the scores mean 0 and standard deviation 1; other values leave them as they are.
        clip: the largest absolute score; 0 for no limit.
    """
    if normalisation == "batch":
        scores = (scores - scores.mean()) * torch.rsqrt(scores.var(unbiased=False) + 1e-8)
    if clip:
        scores = scores.clamp(-clip, clip)
    return scores - missing_eos_penalty * (~ended).to(scores.dtype)


def gae(rewards, values, mask, gamma, lam):
    """Generalised advantage estimation (1506.02438, eq. 16).

    Args:
        rewards, values, mask: (B, T); values[:, t] is the value of the state before token t.
        gamma, lam: discount and GAE's λ.

    Returns (advantages, returns), both (B, T), zero where masked. The value after the last token is 0, also where a
    response was cut: an episode is one response.
    """
    mask = mask.bool()
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    advantages = torch.zeros_like(values)
    following = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        next_value = values[:, t + 1] if t + 1 < values.shape[1] else torch.zeros_like(following)
        following = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * following
        advantages[:, t] = following
    # Shorter rows start their recursion with zeros, since rewards and values are zero after the mask.
    return torch.where(mask, advantages, 0.0), torch.where(mask, advantages + values, 0.0)


def whiten(values, mask):
    """`values` (B, T) with mean 0 and standard deviation 1 over the mask, and zero where masked."""
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean).square(), mask)
    return torch.where(mask.bool(), (values - mean) * torch.rsqrt(variance + 1e-8), 0.0)


def response_ratios(logprobs, old_logprobs, mask):
    """The ratio ρ = π / π_old of each whole response, (B,), at most e^30.

    Its exponential would overflow, and make losses and gradients NaN even of responses that the clip silences or that
    have no advantage. No clip range reaches the limit. Gradients stay those of log ρ times ρ above it, too, so that a
    response that has become too likely is still pushed down.
    """
    log_ratios = sum_over_tokens(logprobs - old_logprobs, mask)
    return torch.exp(log_ratios - (log_ratios.detach() - LARGEST_LOG_RATIO).clamp(min=0))


def policy_loss(logprobs, old_logprobs, advantages, mask, clip_range):
    """PPO's clipped loss (1707.06347, eq. 7): the mean over the mask of max(−Aρ, −A·clip(ρ, 1−ε, 1+ε)).

    All tensors are (B, T). Returns (loss, clip_fraction), the latter the share of masked tokens whose clipped loss is
    strictly above the unclipped one.
    """
    losses, clipped = clipped_losses(token_ratios(logprobs, old_logprobs, mask), advantages, clip_range)
    return masked_mean(losses, mask), masked_mean(clipped, mask)


def token_ratios(logprobs, old_logprobs, mask):
    """The ratio ρ = π / π_old of each token, (B, T), 1 where masked."""
    return torch.exp(torch.where(mask.bool(), logprobs - old_logprobs, 0.0))


def clipped_losses(ratios, advantages, clip_range):
    """max(−Aρ, −A·clip(ρ, 1−ε, 1+ε)) of each ratio, and 1 where the clipped loss is strictly above the other."""
    unclipped = -advantages * ratios
    clipped = -advantages * ratios.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(unclipped, clipped), (clipped > unclipped).float()


def value_loss(values, old_values, returns, mask, clip_range):
    """Clipped value loss: the mean over the mask of ½·max((V − R)², (V_clip − R)²), V_clip within ε of the old value.

    All tensors are (B, T). Returns (loss, clip_fraction) as `policy_loss` does.
    """
    # Masked places are zeroed before the squares: an overflow there would make their gradient NaN.
    values, old_values, returns = (torch.where(mask.bool(), x, 0.0) for x in (values, old_values, returns))
    within = torch.minimum(torch.maximum(values, old_values - clip_range), old_values + clip_range)
    unclipped, clipped = (values - returns).square(), (within - returns).square()
    loss = masked_mean(torch.maximum(unclipped, clipped), mask) / 2
    return loss, masked_mean((clipped > unclipped).float(), mask)


def token_rewards(kl, score, mask, kl_coef):
    """Rewards (B, T): −kl_coef·kl at each token, plus `score` (B,) at the last token of each response."""
    mask = mask.bool()
    rewards = torch.where(mask, -kl_coef * kl, 0.0)
    last = mask.sum(dim=1) - 1
    rewards[torch.arange(len(rewards), device=rewards.device), last] += score
    return rewards
