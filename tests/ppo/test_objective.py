"""PPO's arithmetic against loops over single tokens, and numbers worked out by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from salsa.ppo import objective

EXACT = {"rtol": 1e-9, "atol": 1e-9}
FLOATS = torch.float64


@st.composite
def batches(draw):
    """(mask, generator): a prefix mask (B, T) with rows of any length from 1 to T, and a source of numbers."""
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 7))
    lengths = draw(st.lists(st.integers(1, columns), min_size=rows, max_size=rows))
    mask = (torch.arange(columns)[None] < torch.tensor(lengths)[:, None]).long()
    return mask, torch.Generator().manual_seed(draw(st.integers(0, 2**31)))


def numbers(case, scale=1.0):
    mask, generator = case
    return scale * torch.randn(mask.shape, generator=generator, dtype=FLOATS)


def places(mask):
    """(row, column) of the tokens that count."""
    return [(i, t) for i in range(mask.shape[0]) for t in range(mask.shape[1]) if mask[i, t]]


def garbled(values, mask, garbage):
    return torch.where(mask.bool(), values, torch.full_like(values, garbage))


def tensor(*rows):
    return torch.tensor(rows, dtype=FLOATS)


def same(found, expected):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=FLOATS), **EXACT)


def test_kl_estimators_by_hand():
    logprobs, reference = tensor([-1.0, -2.0]), tensor([-2.0, -2.0 + math.log(2)])
    same(objective.kl_estimate(logprobs, reference, "k1"), tensor([1.0, -math.log(2)]))
    same(objective.kl_estimate(logprobs, reference, "k2"), tensor([0.5, math.log(2) ** 2 / 2]))
    same(objective.kl_estimate(logprobs, reference, "k3"), tensor([math.exp(-1), 1 - math.log(2)]))


@pytest.mark.parametrize("estimator", ["k4", "K1", ""])
def test_an_unknown_estimator_is_refused(estimator):
    with pytest.raises(ValueError, match="k1, k2 or k3"):
        objective.kl_estimate(tensor([0.0]), tensor([0.0]), estimator)


@given(st.integers(0, 2**31), st.integers(2, 9))
def test_k1_and_k3_are_unbiased_and_the_gradient_of_k2_is_that_of_the_reverse_kl(seed, vocabulary):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(vocabulary, generator=generator, dtype=FLOATS).requires_grad_()
    reference = torch.randn(vocabulary, generator=generator, dtype=FLOATS).log_softmax(0)
    logprobs = logits.log_softmax(0)
    probabilities = logprobs.detach().exp()
    kl = (logprobs.exp() * (logprobs - reference)).sum()

    def expected(name):
        return (probabilities * objective.kl_estimate(logprobs, reference, name)).sum()

    same(expected("k1"), kl)
    same(expected("k3"), kl)
    assert (objective.kl_estimate(logprobs, reference, "k3") >= 0).all()
    gradients = {name: torch.autograd.grad(expected(name), logits, retain_graph=True)[0] for name in ("k1", "k2")}
    same(gradients["k2"], torch.autograd.grad(kl, logits)[0])
    same(gradients["k1"], torch.zeros(vocabulary))  # why k1 in the loss is refused


def test_gae_by_hand():
    # δ = r + γV' − V: row 0: 1 + ½·2 − 1 = 1; 0 + ½·4 − 2 = 0; 3 − 4 = −1. Row 1 ends after two tokens.
    rewards, values = tensor([1.0, 0, 3], [2, 1, 9]), tensor([1.0, 2, 4], [0, 4, 9])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    advantages, returns = objective.gae(rewards, values, mask, 0.5, 0.5)
    same(advantages, tensor([1 + 0.25 * -0.25, -0.25, -1], [4 + 0.25 * -3, -3, 0]))
    same(returns, tensor([1.9375, 1.75, 3], [3.25, 1, 0]))


@settings(deadline=None)
@given(batches(), st.floats(0, 1), st.floats(0, 1))
def test_gae_is_the_double_sum(case, gamma, lam):
    mask = case[0]
    rewards, values = numbers(case), numbers(case)
    advantages, returns = torch.zeros(mask.shape, dtype=FLOATS), torch.zeros(mask.shape, dtype=FLOATS)
    for i, t in places(mask):
        length = int(mask[i].sum())
        for later in range(t, length):
            following = values[i, later + 1] if later + 1 < length else 0.0
            delta = rewards[i, later] + gamma * following - values[i, later]
            advantages[i, t] += (gamma * lam) ** (later - t) * delta
        returns[i, t] = advantages[i, t] + values[i, t]
    found = objective.gae(rewards, values, mask, gamma, lam)
    same(found[0], advantages)
    same(found[1], returns)


@given(batches())
def test_gae_with_lambda_one_is_the_discounted_return_minus_the_value(case):
    mask = case[0]
    rewards, values = numbers(case), numbers(case)
    _, returns = objective.gae(rewards, values, mask, 0.9, 1.0)
    for i, t in places(mask):
        same(returns[i, t], sum(0.9 ** (s - t) * rewards[i, s] for s in range(t, int(mask[i].sum()))))


def test_policy_loss_by_hand():
    # ρ = 2, ½, 2, ½ at ε = 0.2, A = 1, 1, −1, −1. Clipping matters where it lowers the objective.
    ratio, advantages = tensor([2.0, 0.5, 2.0, 0.5, 7.0]), tensor([1.0, 1.0, -1.0, -1.0, 5.0])
    mask = torch.tensor([[1, 1, 1, 1, 0]])
    loss, fraction = objective.policy_loss(ratio.log(), torch.zeros_like(ratio), advantages, mask, 0.2)
    same(loss, (-1.2 - 0.5 + 2.0 + 0.8) / 4)
    assert fraction == 0.5


def test_a_loss_that_clipping_does_not_raise_is_not_counted_as_clipped():
    advantages, mask = tensor([1.0, -1.0, 0.0, 1.0]), torch.ones(1, 4)
    # Just inside, just inside, beyond but worth nothing, beyond where clipping would help.
    ratio = tensor([1.2 - 1e-9, 0.8 + 1e-9, 3.0, 0.1])
    assert objective.policy_loss(ratio.log(), torch.zeros_like(ratio), advantages, mask, 0.2)[1] == 0
    assert objective.policy_loss(tensor([0.0] * 4), tensor([0.0] * 4), advantages, mask, 0.0)[1] == 0
    just_beyond = tensor([1.2 + 1e-9, 0.8 - 1e-9, 1.0, 1.0])
    assert objective.policy_loss(just_beyond.log(), torch.zeros_like(ratio), advantages, mask, 0.2)[1] == 0.5
    values, old, returns = tensor([0.5, 2.0, 2.0]), tensor([0.0, 0.0, 0.0]), tensor([0.0, 2.0, 0.25])
    # At the range's end; beyond it and right; beyond it, where the clipped value happens to lie nearer.
    assert objective.value_loss(values, old, returns, torch.ones(1, 3), 0.5)[1] == pytest.approx(1 / 3)


@given(batches(), st.floats(0.01, 0.9))
def test_policy_loss_is_the_mean_over_single_tokens(case, clip_range):
    mask = case[0]
    logprobs, old, advantages = numbers(case), numbers(case), numbers(case)
    losses, clipped = [], []
    for i, t in places(mask):
        ratio = math.exp(logprobs[i, t] - old[i, t])
        bounded = min(max(ratio, 1 - clip_range), 1 + clip_range)
        unclipped, other = -advantages[i, t].item() * ratio, -advantages[i, t].item() * bounded
        losses.append(max(unclipped, other))
        clipped.append(other > unclipped)
    loss, fraction = objective.policy_loss(logprobs, old, advantages, mask, clip_range)
    same(loss, sum(losses) / len(losses))
    assert fraction.item() == pytest.approx(sum(clipped) / len(clipped))


@given(batches(), st.floats(0.01, 2))
def test_value_loss_is_the_mean_over_single_tokens(case, clip_range):
    mask = case[0]
    values, old, returns = numbers(case), numbers(case), numbers(case)
    losses, clipped = [], []
    for i, t in places(mask):
        value, before, wanted = values[i, t].item(), old[i, t].item(), returns[i, t].item()
        bounded = min(max(value, before - clip_range), before + clip_range)
        losses.append(max((value - wanted) ** 2, (bounded - wanted) ** 2) / 2)
        clipped.append((bounded - wanted) ** 2 > (value - wanted) ** 2)
    loss, fraction = objective.value_loss(values, old, returns, mask, clip_range)
    same(loss, sum(losses) / len(losses))
    assert fraction.item() == pytest.approx(sum(clipped) / len(clipped))


def test_the_gradient_at_ratio_one_is_the_advantage():
    logprobs = tensor([-1.0, -2.0]).requires_grad_()
    advantages = tensor([3.0, -5.0])
    objective.policy_loss(logprobs, logprobs.detach(), advantages, torch.ones(1, 2), 0.2)[0].backward()
    same(logprobs.grad, -advantages / 2)


@given(batches())
def test_whitened_values_have_mean_zero_and_deviation_one(case):
    mask = case[0]
    values = 3 * numbers(case) + 7
    found = objective.whiten(values, mask)
    chosen = [values[place].item() for place in places(mask)]
    mean = sum(chosen) / len(chosen)
    variance = sum((value - mean) ** 2 for value in chosen) / len(chosen)
    for place in places(mask):
        same(found[place], (values[place] - mean) / math.sqrt(variance + 1e-8))
    assert (found[mask == 0] == 0).all()


def test_whitening_equal_values_gives_zeros():
    same(objective.whiten(tensor([4.0, 4.0, 9.0]), torch.tensor([[1, 1, 0]])), tensor([0.0, 0.0, 0.0]))


@given(batches(), st.floats(0, 2))
def test_token_rewards_are_the_penalty_and_at_the_end_the_score(case, kl_coef):
    mask = case[0]
    kl, score = numbers(case), numbers(case)[:, 0]
    before = score.clone()
    found = objective.token_rewards(kl, score, mask, kl_coef)
    for i in range(len(mask)):
        length = int(mask[i].sum())
        for t in range(mask.shape[1]):
            wanted = -kl_coef * kl[i, t].item() if t < length else 0.0
            same(found[i, t], wanted + (score[i].item() if t == length - 1 else 0.0))
    same(score, before)


GARBAGE = [1e300, -1e300, 1.7e308, -1.7e308, 0.0]


@pytest.mark.parametrize("garbage", GARBAGE)
@settings(max_examples=15, deadline=None)
@given(case=batches())
def test_masked_garbage_changes_nothing(garbage, case):
    mask = case[0]
    clean = [numbers(case) for _ in range(3)]
    dirty = [garbled(values, mask, sign * garbage) for values, sign in zip(clean, (1, -1, 1), strict=True)]
    score = clean[0][:, 0]
    functions = [
        lambda a, b, c: objective.gae(a, b, mask, 0.9, 0.8),
        lambda a, b, c: objective.policy_loss(a, b, c, mask, 0.2),
        lambda a, b, c: objective.value_loss(a, b, c, mask, 0.2),
        lambda a, b, c: (objective.whiten(a, mask), objective.masked_mean(b, mask)),
        lambda a, b, c: (objective.token_rewards(a, score, mask, 0.5),),
    ]
    for function in functions:
        for found, expected in zip(function(*dirty), function(*clean), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("loss", [objective.policy_loss, objective.value_loss])
@pytest.mark.parametrize("garbage", GARBAGE)
@settings(max_examples=15, deadline=None)
@given(case=batches())
def test_masked_places_get_no_gradient(loss, garbage, case):
    mask = case[0]
    clean = [numbers(case) for _ in range(3)]
    gradients = []
    for signs in (None, (1, -1, 1), (1, 1, -1)):
        values = [
            garbled(v, mask, sign * garbage) if signs else v for v, sign in zip(clean, signs or (0, 0, 0), strict=True)
        ]
        trained = values[0].clone().requires_grad_()
        loss(trained, values[1], values[2], mask, 0.2)[0].backward()
        gradients.append(trained.grad)
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])
    assert (gradients[0][mask == 0] == 0).all()


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float32])
def test_masks_may_be_of_any_kind(kind):
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    a, b, c = (torch.randn(2, 3, dtype=FLOATS, generator=torch.Generator().manual_seed(i)) for i in range(3))
    for found, expected in zip(
        [*objective.gae(a, b, mask.to(kind), 0.9, 0.9), *objective.policy_loss(a, b, c, mask.to(kind), 0.2)],
        [*objective.gae(a, b, mask, 0.9, 0.9), *objective.policy_loss(a, b, c, mask, 0.2)],
        strict=True,
    ):
        same(found.double(), expected.double())
