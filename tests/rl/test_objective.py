"""PPO's arithmetic against loops over single tokens, and numbers worked out by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from salsa.rl import objective
from salsa.workflow import schema

settings.register_profile("unhurried", deadline=None)  # the first example of a kind warms up
settings.load_profile("unhurried")

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


def policy_and_reference(seed, vocabulary):
    """Logits of a policy, which are trained, and log-probabilities of a reference, (V,) each."""
    generator = torch.Generator().manual_seed(seed)
    logits, reference = torch.randn(2, vocabulary, generator=generator, dtype=FLOATS)
    return logits.requires_grad_(), reference.log_softmax(0)


def expected_kl_gradient(logits, reference, estimator, place):
    """PPO's expected gradient of the penalty alone, at ratio 1: responses of one token, each as often as it comes."""
    logprobs = logits.log_softmax(0)[:, None]  # (B, T) of one response a word
    share = len(logits) * logprobs.detach().exp()  # the losses are means over responses
    mask = torch.ones_like(logprobs)
    penalty = objective.kl_penalty(logprobs, reference[:, None, None], [1.0], estimator)
    if place == "loss":
        loss = objective.masked_mean(share * penalty, mask)
    else:
        rewards = objective.token_rewards(penalty.detach(), torch.zeros(len(logits), dtype=FLOATS), mask, 1.0)
        advantages, _ = objective.gae(rewards, torch.zeros_like(rewards), mask, 1.0, 1.0)
        loss, _ = objective.policy_loss(logprobs, logprobs.detach(), share * advantages, mask, 0.2)
    return torch.autograd.grad(loss, logits)[0]


def kl_and_gradient(logits, reference):
    logprobs = logits.log_softmax(0)
    kl = (logprobs.exp() * (logprobs - reference)).sum()
    return kl.item(), torch.autograd.grad(kl, logits)[0]


CASES = {"seed": st.integers(0, 2**31), "vocabulary": st.integers(2, 9)}


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@given(**CASES)
def test_the_expectation_of_k1_and_k3_is_the_kl_and_that_of_k2_is_not(estimator, seed, vocabulary):
    logits, reference = policy_and_reference(seed, vocabulary)
    logprobs = logits.detach().log_softmax(0)
    estimate = objective.kl_estimate(logprobs, reference, estimator)
    kl, _ = kl_and_gradient(logits, reference)
    if estimator == "k2":
        # Δ²/2 differs from k3 by e^(−Δ) − 1 + Δ − Δ²/2, of the third order in Δ.
        delta = logprobs - reference
        same((logprobs.exp() * (torch.exp(-delta) - 1 + delta - delta**2 / 2 + estimate)).sum(), kl)
    else:
        same((logprobs.exp() * estimate).sum(), kl)
    assert estimator == "k1" or (estimate >= 0).all()


def test_the_bias_of_k2_by_hand():
    logprobs, reference = tensor([0.5, 0.5]).log(), tensor([0.8, 0.2]).log()
    deltas = math.log(0.5 / 0.8), math.log(0.5 / 0.2)
    same((0.5 * objective.kl_estimate(logprobs, reference, "k2")).sum(), (deltas[0] ** 2 + deltas[1] ** 2) / 4)
    kl = (deltas[0] + deltas[1]) / 2
    assert (deltas[0] ** 2 + deltas[1] ** 2) / 4 - kl > 0.04  # 0.265 instead of 0.223


@pytest.mark.parametrize(("estimator", "place"), sorted(objective.UNBIASED))
@given(**CASES)
def test_the_penaltys_expected_gradient_is_that_of_the_kl(estimator, place, seed, vocabulary):
    logits, reference = policy_and_reference(seed, vocabulary)
    same(expected_kl_gradient(logits, reference, estimator, place), kl_and_gradient(logits, reference)[1])


@pytest.mark.parametrize("place", ["reward", "loss"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_every_other_one_is_marked_biased_and_is_far_from_it(estimator, place):
    for seed in range(20):
        logits, reference = policy_and_reference(seed, 8)
        _, wanted = kl_and_gradient(logits, reference)
        distance = (expected_kl_gradient(logits, reference, estimator, place) - wanted).norm() / wanted.norm()
        marked = objective.kl_gradient(estimator, place)
        assert distance < 1e-9 if marked == "unbiased" else distance > 0.1


def test_k1_in_the_loss_has_no_expected_gradient():  # why it is refused
    logits, reference = policy_and_reference(0, 8)
    same(expected_kl_gradient(logits, reference, "k1", "loss"), torch.zeros(8))


@pytest.mark.parametrize("seed", range(3))
def test_over_several_tokens_k1_in_the_reward_also_sees_where_a_token_leads(seed):
    """Responses of two tokens: k1's returns give the gradient of the KL between distributions over responses; k2 in
    the loss that of each prefix's KL, with the prefixes as they come."""
    size, generator = 4, torch.Generator().manual_seed(seed)
    first, second = (torch.randn(*shape, generator=generator, dtype=FLOATS) for shape in ((size,), (size, size)))
    their_first, their_second = (
        torch.randn(x.shape, generator=generator, dtype=FLOATS).log_softmax(-1) for x in (first, second)
    )
    logits = [first.requires_grad_(), second.requires_grad_()]
    a, b = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    a, b = a.flatten(), b.flatten()  # one response a pair of words
    ours, theirs = (
        torch.stack([one.log_softmax(-1)[a], two.log_softmax(-1)[a, b]], dim=1)
        for one, two in ((first, second), (their_first, their_second))
    )  # (B, T)
    probability = ours.detach().sum(dim=1, keepdim=True).exp()
    share, mask = len(a) * probability, torch.ones_like(ours)

    penalty = objective.kl_penalty(ours, theirs[:, None], [1.0], "k1").detach()
    rewards = objective.token_rewards(penalty, torch.zeros(len(a), dtype=FLOATS), mask, 1.0)
    advantages, _ = objective.gae(rewards, torch.zeros_like(rewards), mask, 1.0, 1.0)
    loss, _ = objective.policy_loss(ours, ours.detach(), share * advantages, mask, 0.2)
    in_reward = torch.autograd.grad(2 * loss, logits, retain_graph=True)  # a mean over two tokens a response
    joint = ours.sum(dim=1)
    whole = torch.autograd.grad((joint.exp() * (joint - theirs.sum(dim=1))).sum(), logits, retain_graph=True)
    for found, wanted in zip(in_reward, whole, strict=True):
        same(found, wanted)

    penalty = objective.kl_penalty(ours, theirs[:, None], [1.0], "k2")
    in_loss = torch.autograd.grad(2 * objective.masked_mean(share * penalty, mask), logits)
    kls = [
        (mine.log_softmax(-1).exp() * (mine.log_softmax(-1) - other)).sum(-1)
        for mine, other in ((first, their_first), (second, their_second))
    ]
    myopic = torch.autograd.grad(kls[0] + (first.detach().softmax(-1) * kls[1]).sum(), logits)
    for found, wanted in zip(in_loss, myopic, strict=True):
        same(found, wanted)
    assert (in_loss[0] - whole[0]).norm() > 0.02 * whole[0].norm()


@given(batches(), st.lists(st.floats(0, 1), min_size=1, max_size=3), st.sampled_from(["k1", "k2", "k3"]))
def test_the_penalty_is_the_weighted_sum_over_references(case, weights, estimator):
    mask = case[0]
    logprobs, references = numbers(case), torch.stack([numbers(case) for _ in weights], dim=1)
    found = objective.kl_penalty(logprobs, references, weights, estimator)
    for i in range(mask.shape[0]):
        for t in range(mask.shape[1]):
            total = 0.0
            for weight, reference in zip(weights, references[i, :, t].tolist(), strict=True):
                delta = logprobs[i, t].item() - reference
                total += weight * {"k1": delta, "k2": delta**2 / 2, "k3": math.exp(-delta) - 1 + delta}[estimator]
            same(found[i, t], total)


def test_weights_must_fit_the_references():
    with pytest.raises(ValueError):
        objective.kl_penalty(torch.zeros(2, 3), torch.zeros(2, 2, 3), [1.0], "k1")


def kl_coefs(schedule, initial, kls, responses=8):
    """kl_coef in each iteration, of which each finds its KL in `kls`."""
    found = [initial]
    for iteration, kl in enumerate(kls[:-1]):
        found.append(objective.next_kl_coef(schedule, initial, found[-1], iteration, len(kls), kl, responses))
    return found


def test_a_fixed_kl_coef_stays():
    assert kl_coefs(schema.KlSchedule(), 0.1, [3.0, 1e9, -5.0, 0.0]) == [0.1] * 4


@pytest.mark.parametrize("final", [0.0, 0.1, 0.25, 1.0])
def test_a_linear_kl_coef_begins_and_ends_exactly_where_it_shall(final):
    for iterations in (2, 3, 7, 40):
        found = kl_coefs(schema.KlSchedule("linear", final=final), 0.3, [9.0] * iterations)
        assert found[0] == 0.3 and found[-1] == 0.3 * final
        for iteration, value in enumerate(found):
            assert value == pytest.approx(0.3 + (0.3 * final - 0.3) * iteration / (iterations - 1), rel=1e-12)
    assert kl_coefs(schema.KlSchedule("linear", final=final), 0.3, [9.0]) == [0.3]


def test_an_adaptive_kl_coef_by_hand():
    # Target 4, 8 responses of a horizon of 80: a tenth of the error. Errors: 0, 0.1, −0.1, then cut at ±0.2.
    schedule = schema.KlSchedule("adaptive", target=4.0, horizon=80.0)
    found = kl_coefs(schedule, 0.5, [4.0, 4.4, 3.6, 400.0, -1.0, 4.8, 3.2, 0.0])
    factors = [1.0, 1.01, 0.99, 1.02, 0.98, 1.02, 0.98]
    assert found == pytest.approx([0.5 * math.prod(factors[:i]) for i in range(8)], rel=1e-12)
    assert kl_coefs(schedule, 0.5, [4.4, 0.0], responses=16)[1] == pytest.approx(0.5 * 1.02, rel=1e-12)


@given(
    case=batches(),
    normalisation=st.sampled_from(["constants", "batch", "none"]),
    clip=st.sampled_from([0.0, 0.3, 1.0, 1e9]),
    penalty=st.floats(0, 3),
)
def test_what_a_response_is_paid(case, normalisation, clip, penalty):
    scores = 2 * numbers(case)[:, 0] + 1
    ended = torch.rand(len(scores), generator=case[1]) < 0.5
    before, paid = scores.clone(), []
    for score, end in zip(scores.tolist(), ended.tolist(), strict=True):
        if normalisation == "batch":
            mean = sum(scores.tolist()) / len(scores)
            variance = sum((other - mean) ** 2 for other in scores.tolist()) / len(scores)
            score = (score - mean) / math.sqrt(variance + 1e-8)
        if clip > 0:
            score = max(-clip, min(clip, score))
        paid.append(score if end else score - penalty)  # a fine is not clipped
    same(objective.paid_scores(scores, ended, normalisation, clip, penalty), torch.tensor(paid, dtype=FLOATS))
    assert torch.equal(scores, before)


def test_gae_by_hand():
    # δ = r + γV' − V: row 0: 1 + ½·2 − 1 = 1; 0 + ½·4 − 2 = 0; 3 − 4 = −1. Row 1 ends after two tokens.
    rewards, values = tensor([1.0, 0, 3], [2, 1, 9]), tensor([1.0, 2, 4], [0, 4, 9])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    advantages, returns = objective.gae(rewards, values, mask, 0.5, 0.5)
    same(advantages, tensor([1 + 0.25 * -0.25, -0.25, -1], [4 + 0.25 * -3, -3, 0]))
    same(returns, tensor([1.9375, 1.75, 3], [3.25, 1, 0]))


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
@settings(max_examples=15)
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
@settings(max_examples=15)
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
