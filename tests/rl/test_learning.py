"""Policies end at the optimum known in closed form: the reference, times exp(reward / kl_coef), normalised."""

import pytest
import torch
from accelerate import Accelerator
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from salsa.rl import forward, objective, reference, trainer
from salsa.workflow import config

WORDS, PAD, ENDS = 12, 0, [1, 2, 3]
PROMPTS = [[6, 7, 8], [9, 6]]
KL_COEF = 0.5
REWARDS = torch.tensor([0.0, 0.6, -0.4, 0.3, 1.0, 0.1] * 2, dtype=torch.float64)  # of a response's last word
FINE = 0.3  # of a response without an end
PAID = REWARDS - FINE * torch.tensor([word not in ENDS for word in range(WORDS)], dtype=torch.float64)
TOKENIZER = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(WordLevel({f"w{word}": word for word in range(WORDS)}, unk_token="w4")),
    pad_token=f"w{PAD}",
    eos_token=f"w{ENDS[0]}",
)


def small_llama(seed, kind=LlamaForCausalLM, **changes):
    """Random weights, large enough that some words are ten times as likely as others."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = kind(LlamaConfig(vocab_size=WORDS, pad_token_id=PAD, initializer_range=0.3, **shape, **changes)).eval()
    if kind is LlamaForCausalLM:
        model.generation_config.eos_token_id = ENDS
    return model


class Paying:
    """A reward model that pays for the last word of a response."""

    def scores(self, sequences, micro_batch):
        return REWARDS[sequences.responses.gather(1, sequences.lengths[:, None] - 1).squeeze(1)].float()


PPO = {"lam": 1.0, "value_coef": 1.0, "value_clip_range": 10.0, "whiten_advantages": False}


def train(folder, references, weights=(1.0,), length=1, prompts=PROMPTS, iterations=120, algorithm="ppo", **section):
    """The policy that an algorithm makes of the first reference, anchored to all of them."""
    values = {
        "iterations": iterations,
        "batch_size": 256,
        "epochs": 1,
        "learning_rate": 1e-2,
        "max_grad_norm": 10.0,
        "missing_eos_penalty": FINE,
        "rollouts_every": iterations,
    }
    values |= PPO if algorithm == "ppo" else {}
    kind, chosen = "soup" if len(references) == 1 else "multi_kl", config.ALGORITHMS[algorithm](**values | section)
    settings = config.TRAINING[algorithm](
        0, KL_COEF, ["1"], config.Reference(kind, ["1"]), chosen, config.Lengths(3, length)
    )
    execution = config.Execution(device="cpu", micro_batch=256, rollout_batch=256, checkpoint_every=0)
    policy = small_llama(0)
    policy.load_state_dict(references[0].state_dict())
    value_model = None
    if algorithm == "ppo":
        value_model = forward.ScoreModel(small_llama(9, LlamaForSequenceClassification, num_labels=1))
    anchor = reference.Reference(references, {}, weights)
    participants = trainer.Participants(policy, value_model, Paying(), anchor, references[0])
    made = trainer.Trainer(settings, participants, TOKENIZER, Accelerator(cpu=True), execution, folder)
    count = chosen.prompts
    made.fit([{"id": i, "prompt": ""} for i in range(count)], [prompts[i % len(prompts)] for i in range(count)])
    return policy


@torch.no_grad()
def distributions(model, prefixes=PROMPTS, temperature=1.0):
    """(prefixes, V) log-probabilities of the next word."""
    logits = torch.stack([model(input_ids=torch.tensor([prefix])).logits[0, -1] for prefix in prefixes])
    return (logits.double() / temperature).log_softmax(dim=-1)


def averaged(references, weights, prefixes=PROMPTS, temperature=1.0):
    """(prefixes, V): what several references anchor to, up to a constant a prefix."""
    logprobs = [distributions(model, prefixes, temperature) for model in references]
    return sum(weight * each for weight, each in zip(weights, logprobs, strict=True))


def kl(ours, theirs):
    return (ours.exp() * (ours - theirs)).sum(dim=-1)


def total_variation(ours, theirs):
    return (ours.exp() - theirs.exp()).abs().sum(dim=-1) / 2


def assert_optimal(policy, references, weights=(1.0,), temperature=1.0, kl_coef=KL_COEF, tolerance=0.03):
    anchor = averaged(references, weights, temperature=temperature)
    optimum = (anchor + PAID / kl_coef).log_softmax(dim=-1)
    assert (total_variation(distributions(references[0], temperature=temperature), optimum) > 0.2).all()
    found = distributions(policy, temperature=temperature)
    assert (total_variation(found, optimum) < tolerance).all()
    assert (kl(found, optimum) < tolerance).all()
    torch.testing.assert_close(kl(found, anchor), kl(optimum, anchor), rtol=0.05, atol=0)


PLACES = [("k1", "reward"), ("k2", "loss"), ("k2", "reward"), ("k3", "reward"), ("k3", "loss")]


@pytest.mark.parametrize(("estimator", "place"), PLACES)
def test_the_optimum_is_found_where_the_penaltys_gradient_is_the_kls(tmp_path, estimator, place):
    first = small_llama(0)
    unbiased = objective.kl_gradient(estimator, place) == "unbiased"
    policy = train(tmp_path, [first], kl_estimator=estimator, kl_in=place, iterations=120 if unbiased else 60)
    if unbiased:
        assert_optimal(policy, [first])
    else:
        optimum = (distributions(first) + PAID / KL_COEF).log_softmax(dim=-1)
        assert total_variation(distributions(policy), optimum).max() > 0.15


DR_GRPO = {"kl_estimator": "k2", "scale_by_deviation": False, "length_normalisation": "none"}


def test_rloo_finds_the_optimum(tmp_path):
    """Exactly: there, all responses to a prompt have the same reward less the penalty, so that no noise is left."""
    references, weights = [small_llama(0), small_llama(1)], [0.4, 0.6]
    policy = train(tmp_path, references, weights, algorithm="rloo", samples=4, iterations=150)
    assert_optimal(policy, references, weights, tolerance=0.01)


def test_grpo_finds_the_optimum_of_a_larger_kl_coef(tmp_path):
    """Its baseline is a mean with the response itself in it, so that (k − 1)/k of the score counts."""
    first = small_llama(0)
    policy = train(tmp_path, [first], algorithm="grpo", samples=4, iterations=150, **DR_GRPO)
    assert_optimal(policy, [first], kl_coef=KL_COEF * 4 / 3)
    optimum = (distributions(first) + PAID / KL_COEF).log_softmax(dim=-1)
    assert (total_variation(distributions(policy), optimum) > 0.03).all()


def reversed_optimum(reference, kl_coef):
    """(prefixes, V): the optimum of KL(reference ‖ policy), β·r / (λ − paid), where λ makes each row sum to 1."""
    lowest = PAID.max().expand(len(reference)).clone()
    highest = lowest + kl_coef
    for _ in range(60):
        middle = (lowest + highest) / 2
        above = (kl_coef * reference.exp() / (middle[:, None] - PAID)).sum(dim=-1) > 1
        lowest, highest = torch.where(above, middle, lowest), torch.where(above, highest, middle)
    return (kl_coef * reference.exp() / (highest[:, None] - PAID)).log()


def test_k3_in_the_loss_has_the_optimum_of_the_reversed_kl(tmp_path):
    first = small_llama(0)
    policy = train(tmp_path, [first], algorithm="grpo", samples=4, **DR_GRPO | {"kl_estimator": "k3"})
    anchor, found = distributions(first), distributions(policy)
    assert (total_variation(found, reversed_optimum(anchor, KL_COEF * 4 / 3)) < 0.03).all()
    optimum = (anchor + PAID / (KL_COEF * 4 / 3)).log_softmax(dim=-1)
    assert (total_variation(found, optimum) > 0.06).any()


@pytest.mark.parametrize(
    "ppo",
    [{"kl_estimator": "k1", "temperature": 0.8}, {"kl_estimator": "k2", "kl_in": "loss"}],
)
def test_several_references_anchor_to_their_geometric_mean(tmp_path, ppo):
    references, weights = [small_llama(0), small_llama(1)], [0.4, 0.6]
    policy = train(tmp_path, references, weights, **ppo)
    assert_optimal(policy, references, weights, ppo.get("temperature", 1.0))


def test_whitening_scales_a_penalty_in_the_reward_but_not_one_in_the_loss(tmp_path):
    first = small_llama(0)
    assert_optimal(train(tmp_path, [first], whiten_advantages=True), [first])
    policy = train(tmp_path, [first], whiten_advantages=True, kl_estimator="k2", kl_in="loss", iterations=60)
    optimum = (distributions(first) + PAID / KL_COEF).log_softmax(dim=-1)
    # Advantages of less than a standard deviation of 1 are made larger, so that the penalty counts less.
    assert (total_variation(distributions(policy), optimum) > 0.3).all()
    assert (kl(distributions(policy), distributions(first)) > 2 * kl(optimum, distributions(first))).all()


@pytest.mark.parametrize("algorithm", ["ppo", "rloo"])
def test_over_two_words_the_optimum_is_that_of_whole_responses(tmp_path, algorithm):
    """The first word is chosen with a view to the reward and to the KL that follow it."""
    references, weights, prompt = [small_llama(0), small_llama(1)], [0.3, 0.7], PROMPTS[0]
    longer = [[*prompt, word] for word in range(WORDS)]
    first = averaged(references, weights, [prompt])[0]  # (V,)
    second = averaged(references, weights, longer) + PAID / KL_COEF  # (V, V)
    worth = KL_COEF * second.logsumexp(dim=-1)  # of each first word: the reward to come, less its KL
    second = second.log_softmax(dim=-1)
    ending = torch.isin(torch.arange(WORDS), torch.tensor(ENDS))

    def of_first_words(worth):
        return (first + torch.where(ending, REWARDS, worth) / KL_COEF).log_softmax(dim=-1)

    optimum, short_sighted = of_first_words(worth), of_first_words((second.exp() * PAID).sum(dim=-1))
    options = {"prompts": [prompt], "iterations": 150, "learning_rate": 2e-2}
    policy = train(tmp_path, references, weights, length=2, algorithm=algorithm, **options)
    found = distributions(policy, [prompt])[0]
    assert total_variation(distributions(references[0], [prompt])[0], optimum) > 0.2
    assert total_variation(found, optimum) < 0.05 < 0.1 < total_variation(found, short_sighted)
    after, before = (total_variation(distributions(model, longer), second) for model in (policy, references[0]))
    assert (found.exp() * after)[~ending].sum() < 0.06 < 0.2 < (found.exp() * before)[~ending].sum()
