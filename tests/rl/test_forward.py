"""Forward passes against one unpadded sequence at a time and the logits of every position."""

import copy
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import log_softmax
from transformers import (
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
)

from salsa.data import chat
from salsa.rl import forward, models, objective, rollout

PAD = 0


def random_rows(seed, count=5, vocabulary=150, longest=7):
    generator = torch.Generator().manual_seed(seed)

    def row():
        length = int(torch.randint(1, longest + 1, (1,), generator=generator))
        return torch.randint(6, vocabulary, (length,), generator=generator).tolist()

    return [row() for _ in range(count)], [row() for _ in range(count)]


def naive_logits(model, prompt, response, temperature=1.0):
    """(T, V): the logits that each response token was drawn from."""
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0].float() / temperature
    return logits[len(prompt) - 1 : -1]


def naive_logprobs(model, prompt, response, temperature=1.0):
    logprobs = log_softmax(naive_logits(model, prompt, response, temperature), dim=-1)
    return torch.stack([logprobs[t, token] for t, token in enumerate(response)])


def assert_rows(found, expected, tolerance=1e-5):
    """`expected`: a tensor a row, of the response's length; zero behind it."""
    for row, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(row[: len(wanted)], wanted, rtol=tolerance, atol=tolerance)
        assert (row[len(wanted) :] == 0).all()


def padded(sequences, left, right):
    """The same rows with garbage as further padding."""

    def widen(tensor, fill, on_left=left):
        rows = len(tensor)
        return torch.cat([torch.full((rows, on_left), fill), tensor, torch.full((rows, right), fill)], dim=1)

    return forward.Sequences(
        widen(sequences.tokens, 77),
        widen(sequences.attention_mask, 0),
        widen(sequences.response_mask, 0, on_left=0),
        sequences.ended,
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_entropies_are_those_of_the_full_logits(sft_models, temperature):
    prompts, responses = random_rows(0)
    model = sft_models[0]
    sequences = forward.from_lists(prompts, responses, [], PAD)
    with torch.no_grad():
        logprobs, entropies = forward.response_logprobs(model, sequences, temperature)
        pairs = list(zip(prompts, responses, strict=True))
        assert_rows(logprobs, [naive_logprobs(model, *pair, temperature) for pair in pairs])
        naive = [torch.distributions.Categorical(logits=naive_logits(model, *p, temperature)).entropy() for p in pairs]
        assert_rows(entropies, naive)
        hidden = forward.hidden_states(model, sequences)
        again, _ = forward.response_logprobs(model, sequences, temperature, hidden)
        torch.testing.assert_close(again, logprobs, rtol=0, atol=1e-6)


@settings(max_examples=10, deadline=None)
@given(left=st.integers(0, 5), right=st.integers(0, 5), seed=st.integers(0, 99), order=st.permutations(range(5)))
def test_padding_and_order_change_nothing(sft_models, left, right, seed, order):
    sequences = forward.from_lists(*random_rows(seed), [], PAD)
    wider = padded(sequences, left, right).rows(torch.tensor(order))
    widest = padded(sequences, left, right)
    length = sequences.response_mask.shape[1]
    with torch.no_grad():
        plain, _ = forward.response_logprobs(sft_models[0], sequences)
        for found in (
            forward.response_logprobs(sft_models[0], widest)[0],
            forward.response_logprobs(sft_models[0], wider)[0][torch.argsort(torch.tensor(order))],
        ):
            torch.testing.assert_close(found[:, :length], plain, rtol=1e-5, atol=1e-5)
            assert (found[:, length:] == 0).all()
        kl = forward.exact_kl(*sft_models, sequences, 2)
        torch.testing.assert_close(forward.exact_kl(*sft_models, widest, 3), kl, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral with a window"])
def test_a_prompt_is_computed_once_for_all_responses_to_it(sft_models, kind):
    """Log-probabilities, their gradients and scores are those of each row alone, whatever rows are together."""
    model, once = copy.deepcopy(sft_models[0]), kind != "mistral with a window"
    shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32}
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=200, n_positions=64, n_embd=32, n_layer=2, n_head=2)).eval()
    if kind == "mistral with a window":
        config = MistralConfig(vocab_size=200, **shape, intermediate_size=48, num_key_value_heads=1, sliding_window=3)
        model = MistralForCausalLM(config).eval()
    prompts, responses = random_rows(3)
    repeated = [prompt for prompt in prompts for _ in range(3)]
    several = [row[: 1 + i] for row in responses for i in range(3)]
    alone = forward.from_lists(repeated, several, [], PAD)
    together = dataclasses.replace(alone, prompt_numbers=torch.arange(len(repeated)) // 3)
    tokens = []
    model.base_model.register_forward_pre_hook(
        lambda module, _, inputs: tokens.append(inputs["input_ids"].numel()), with_kwargs=True
    )

    def gradients(sequences):
        model.zero_grad()
        tokens.clear()
        logprobs, entropies = forward.response_logprobs(model, sequences, 0.8)
        (logprobs * torch.arange(logprobs.numel()).view_as(logprobs).cos()).sum().backward()
        return [logprobs, entropies, *(p.grad.clone() for p in model.parameters())]

    for rows in (torch.arange(len(repeated)), torch.tensor([7, 0, 3, 1]), torch.tensor([4])):
        expected, plain = gradients(alone.rows(rows)), sum(tokens)
        for ours, theirs in zip(expected, gradients(together.rows(rows)), strict=True):
            torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
        assert (sum(tokens) < plain) == (once and len(rows) > 1)
        assert len(tokens) == (2 if once else 1)
    assert forward.response_logprobs(model, together, entropies=False)[1] is None


def test_a_score_after_a_shared_prompt_is_that_of_the_row_alone(reward_run):
    prompts, responses = random_rows(4)
    alone = forward.from_lists([prompts[i] for i in (0, 1, 0, 1, 2)], responses, [], PAD)
    together = dataclasses.replace(alone, prompt_numbers=torch.tensor([5, 1, 5, 1, 0]))
    model = models.load_score_model(reward_run)
    torch.testing.assert_close(model.scores(together, 3), model.scores(alone, 3), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.scores(together, 8), model.scores(alone, 8), rtol=1e-5, atol=1e-5)


def test_rows_are_trimmed_to_what_they_hold():
    prompts, responses = [[11], [21, 22, 23], [31, 32]], [[41, 42, 43], [51], [61, 62]]
    sequences = forward.from_lists(prompts, responses, [43, 62], PAD)
    assert sequences.prompt_length == 3 and sequences.lengths.tolist() == [3, 1, 2]
    assert sequences.ended.tolist() == [True, False, True]
    assert sequences.tokens.tolist() == [
        [PAD, PAD, 11, 41, 42, 43],
        [21, 22, 23, 51, PAD, PAD],
        [PAD, 31, 32, 61, 62, PAD],
    ]
    some = sequences.rows(torch.tensor([2, 0]))
    assert some.tokens.tolist() == [[31, 32, 61, 62, PAD], [PAD, 11, 41, 42, 43]]
    assert some.attention_mask.tolist() == [[1, 1, 1, 1, 0], [0, 1, 1, 1, 1]]
    assert some.response_mask.tolist() == [[1, 1, 0], [1, 1, 1]] and some.prompt_length == 2
    assert some.ended.tolist() == [True, True] and some.responses.tolist() == [[61, 62, PAD], [41, 42, 43]]
    assert sequences.rows(torch.tensor([1])).tokens.tolist() == [[21, 22, 23, 51]]


def test_chunks_change_nothing_and_no_prompt_position_gets_logits(sft_runs, monkeypatch):
    model = models.load_policy(sft_runs[0] / "model")
    sequences = forward.from_lists(*random_rows(3), [], PAD)
    tokens, sizes = int(sequences.response_mask.sum()), []
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    weights = torch.randn(sequences.response_mask.shape, generator=torch.Generator().manual_seed(0))

    def gradients():
        sizes.clear()
        model.zero_grad()
        logprobs, entropies = forward.response_logprobs(model, sequences, 0.9)
        assert not entropies.requires_grad
        (logprobs * weights).sum().backward()
        return logprobs.detach(), entropies, [p.grad.clone() for p in model.parameters()]

    whole = gradients()
    assert sizes == [tokens]
    monkeypatch.setattr(forward, "CHUNK", 3 * model.config.vocab_size)
    chunked = gradients()
    assert max(sizes) == 3 and sum(sizes) == 2 * tokens  # each chunk once more in the backward pass
    for found, expected in zip([*chunked[:2], *chunked[2]], [*whole[:2], *whole[2]], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    kl = forward.exact_kl(model, model, sequences, 2)
    assert kl.abs().max() < 1e-6


def naive_kl(model, reference, prompt, response):
    """The sum over prefixes and over the vocabulary, one word at a time."""
    ours, theirs = (log_softmax(naive_logits(m, prompt, response).double(), dim=-1) for m in (model, reference))
    total = 0.0
    for t in range(len(response)):
        for word in range(ours.shape[1]):
            total += ours[t, word].exp().item() * (ours[t, word] - theirs[t, word]).item()
    return total


def test_exact_kl_is_the_sum_over_the_vocabulary(sft_models, monkeypatch):
    prompts, responses = random_rows(1, count=4, longest=4)
    sequences = forward.from_lists(prompts, responses, [], PAD)
    with torch.no_grad():
        pairs = zip(prompts, responses, strict=True)
        expected = torch.tensor([naive_kl(*sft_models, *pair) for pair in pairs])
    assert (expected > 1e-3).all()
    torch.testing.assert_close(forward.exact_kl(*sft_models, sequences, 3), expected, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(forward, "CHUNK", 2 * sft_models[0].config.vocab_size)
    torch.testing.assert_close(forward.exact_kl(*sft_models, sequences, 64), expected, rtol=1e-4, atol=1e-5)
    assert forward.exact_kl(sft_models[0], sft_models[0], sequences, 2).tolist() == [0.0] * 4


def test_exact_kl_is_the_mean_of_k1_and_k3_with_less_variance(sft_models, prompts, tokenizer):
    policy, other = sft_models
    ids = [f"{name}-{i}" for i in range(20) for name in prompts[0]]
    encoded = [row for _ in range(20) for row in prompts[1]]
    noise = rollout.uniforms(0, 0, ids, 6)
    ends = chat.end_ids(policy, tokenizer)
    sequences, logprobs, _ = rollout.sample(policy, encoded, noise, 1.0, ends, tokenizer.pad_token_id)
    with torch.no_grad():
        reference, _ = forward.response_logprobs(other, sequences)
    exact = forward.exact_kl(policy, other, sequences, 256).double()
    estimates = {
        name: (objective.kl_estimate(logprobs, reference, name) * sequences.response_mask).sum(dim=1).double()
        for name in ("k1", "k3")
    }
    for estimate in estimates.values():
        difference = estimate - exact
        error = difference.std() / len(difference) ** 0.5
        assert difference.mean().abs() < 4 * error and error < 0.05 * exact.mean()
    assert exact.var() < 0.5 * estimates["k1"].var()


def of_lengths(lengths, prompt=4):
    """Sequences whose responses have these lengths."""
    return forward.from_lists([[7] * prompt] * len(lengths), [[8] * length for length in lengths], [], PAD)


def computed(sequences, rows):
    """How many tokens a pass over some rows computes, with their padding."""
    return len(rows) * max(len_of(sequences, row) for row in rows.tolist())


def len_of(sequences, row):
    return int(sequences.attention_mask[row].sum())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=80), st.integers(1, 64), st.booleans())
def test_micro_batches_hold_each_row_once_and_cost_no_more_than_whole_ones(lengths, limit, halve):
    sequences = of_lengths(lengths)
    parts = forward.micro_batches(sequences, limit, halve=halve)
    rows = torch.cat(list(parts))
    assert sorted(rows.tolist()) == list(range(len(lengths)))
    assert [lengths[row] for row in rows] == sorted(lengths)
    assert max(map(len, parts)) <= limit
    whole = rows.split(limit)
    cost, cost_of_whole = (sum(forward.PASS + computed(sequences, part) for part in x) for x in (parts, whole))
    assert cost <= cost_of_whole
    assert halve or len(parts) == len(whole)
    restored = forward.in_order([torch.tensor(lengths)[part] for part in parts], parts)
    assert restored.tolist() == lengths


def test_micro_batches_are_halved_where_that_saves_padding():
    assert len(forward.micro_batches(of_lengths([50] * 64), 64)) == 1
    assert len(forward.micro_batches(of_lengths([10] * 32 + [50] * 32), 64)) == 2
    few = torch.tensor([3, 40, 1])
    assert torch.cat(forward.micro_batches(of_lengths([50] * 64), 2, few)).tolist() == few.tolist()


def test_micro_batches_keep_together_what_shares_a_long_prompt():
    sequences = of_lengths([10] * 32 + [30] * 32, prompt=60)
    assert len(forward.micro_batches(sequences, 64)) == 2
    sequences.prompt_numbers = torch.arange(64) % 32  # each prompt has a short and a long response
    assert len(forward.micro_batches(sequences, 64)) == 1


@pytest.fixture(scope="module")
def classifier(reward_run):
    return AutoModelForSequenceClassification.from_pretrained(reward_run / "model").eval()


def naive_scores(classifier, prompt, response):
    """(P + T,): the head at each position of one unpadded sequence."""
    hidden = classifier.model(input_ids=torch.tensor([prompt + response])).last_hidden_state[0]
    return (hidden @ classifier.score.weight[0]).detach()


@pytest.mark.parametrize("end", [PAD, 9])
def test_scores_are_read_at_the_last_position_even_of_padding(classifier, end, monkeypatch):
    prompts, responses = random_rows(2)
    responses = [[*row, end] for row in responses]
    sequences = forward.from_lists(prompts, responses, [end], PAD)
    model = forward.ScoreModel(classifier, mean=0.5, std=2.0)
    raw = [naive_scores(classifier, *pair) for pair in zip(prompts, responses, strict=True)]
    expected = torch.stack([(row[-1] - 0.5) / 2 for row in raw])
    before = torch.stack([(row[-2] - 0.5) / 2 for row in raw])
    assert (expected - before).abs().min() > 1e-3  # where transformers' own classifier would read, were `end` padding
    for micro_batch in (2, 64):
        torch.testing.assert_close(model.scores(sequences, micro_batch), expected, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(forward, "PASS", 0)  # then rows of different lengths are computed apart
    torch.testing.assert_close(model.scores(padded(sequences, 2, 3), 3), expected, rtol=1e-5, atol=1e-5)


def test_values_are_those_of_the_state_before_each_token(classifier):
    prompts, responses = random_rows(4)
    sequences = forward.from_lists(prompts, responses, [], PAD)
    values = forward.ScoreModel(classifier, mean=0.5, std=2.0).values(sequences)
    assert values.shape == sequences.response_mask.shape and values.requires_grad
    for row, prompt, response in zip(values, prompts, responses, strict=True):
        expected = (naive_scores(classifier, prompt, response)[len(prompt) - 1 : -1] - 0.5) / 2
        torch.testing.assert_close(row[: len(response)].detach(), expected, rtol=1e-5, atol=1e-5)


def test_positions_start_where_the_padding_ends():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    assert forward.positions(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2]]
