"""Sampling: from the right distribution, with noise of its own for each prompt, ended by each end token."""

import copy

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import DynamicCache, MistralConfig, MistralForCausalLM
from transformers.cache_utils import DynamicLayer

from salsa.data import chat
from salsa.rl import forward, networks, rollout

LENGTH = 10


@pytest.fixture(scope="module")
def ends(sft_models, tokenizer):
    found = chat.end_ids(sft_models[0], tokenizer)
    assert len(found) == 31 and tokenizer.eos_token_id in found
    return found


def sample(model, ids, prompts, ends, seed=0, iteration=0, temperature=1.0, pad=0, length=LENGTH):
    return rollout.sample(model, prompts, rollout.uniforms(seed, iteration, ids, length), temperature, ends, pad)[:2]


def texts(sequences):
    """Response token ids without padding."""
    rows = zip(sequences.responses.tolist(), sequences.lengths.tolist(), strict=True)
    return [row[:length] for row, length in rows]


def test_uniforms_depend_on_their_key_alone():
    noise = rollout.uniforms(1, 2, ["a", "b", "c"], 50)
    assert noise.dtype == torch.float64 and noise.shape == (3, 50)
    assert ((noise >= 0) & (noise < 1)).all()
    assert torch.equal(rollout.uniforms(1, 2, ["c", "a"], 50), noise[[2, 0]])
    assert torch.equal(rollout.uniforms(1, 2, ["b"], 7), noise[1:2, :7])  # a longer response has the same beginning
    for other in (rollout.uniforms(2, 2, ["a"], 50), rollout.uniforms(1, 3, ["a"], 50), noise[1:2]):
        assert (other != noise[:1]).all()


def test_uniforms_are_uniform():
    noise = rollout.uniforms(0, 0, range(200), 50).numpy()
    assert stats.kstest(noise.ravel(), "uniform").pvalue > 1e-3
    for column in (0, 49):
        assert stats.kstest(noise[:, column], "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(noise[:, 0], noise[:, 1])[0, 1]) < 0.3


def test_draw_inverts_the_cumulative_distribution():
    logits = torch.tensor([0.0, 0.5, 0.25, 0.0, 0.25]).log()
    uniforms = torch.tensor([0.0, 0.3, 0.4999, 0.5001, 0.7499, 0.7501, 1 - 2**-53], dtype=torch.float64)
    found = rollout.draw(logits.repeat(len(uniforms), 1), uniforms)
    assert found.tolist() == [1, 1, 1, 2, 2, 4, 4]  # tokens of probability 0 never come


def test_draw_has_the_frequencies_of_the_softmax():
    logits = 2 * torch.randn(12, generator=torch.Generator().manual_seed(0))
    count = 20000
    uniforms = rollout.uniforms(3, 0, range(count), 1)[:, 0]
    found = np.bincount(rollout.draw(logits.repeat(count, 1), uniforms).numpy(), minlength=12)
    assert stats.chisquare(found, count * logits.double().softmax(0).numpy()).pvalue > 1e-3


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_a_fresh_forward_pass(sft_models, prompts, ends, temperature):
    sequences, logprobs = sample(sft_models[0], *prompts, ends, temperature=temperature)
    assert logprobs.dtype == torch.float32 and logprobs.shape == sequences.response_mask.shape
    with torch.no_grad():
        fresh, _ = forward.response_logprobs(sft_models[0], sequences, temperature)
    torch.testing.assert_close(logprobs, fresh, rtol=1e-4, atol=1e-4)
    assert len(set(sequences.attention_mask.sum(dim=1).tolist())) > 3  # rows of different lengths


def test_neither_order_nor_company_changes_a_response(sft_models, prompts, ends, tokenizer):
    ids, encoded = prompts
    sequences, logprobs = sample(sft_models[0], ids, encoded, ends)
    whole = texts(sequences)
    order = np.random.default_rng(0).permutation(len(ids))
    permuted, _ = sample(sft_models[0], [ids[i] for i in order], [encoded[i] for i in order], ends)
    assert texts(permuted) == [whole[i] for i in order]
    for i in range(6):
        alone, its = sample(sft_models[0], [ids[i]], [encoded[i]], ends)
        assert texts(alone) == [whole[i]]
        torch.testing.assert_close(its[0], logprobs[i, : its.shape[1]], rtol=1e-4, atol=1e-4)
    longest = encoded[0] * 3
    assert texts(sample(sft_models[0], [*ids, "long"], [*encoded, longest], ends)[0])[:-1] == whole
    batched = [None] * len(ids)
    for indices, some in rollout.sample_in_batches(sft_models[0], tokenizer, encoded, ids, 0, LENGTH, 7):
        for index, row in zip(indices, texts(some), strict=True):
            batched[index] = row
    assert batched == whole
    assert texts(sample(sft_models[0], ids, encoded, ends, iteration=1)[0]) != whole


def test_a_shorter_limit_cuts_the_same_responses(sft_models, prompts, ends):
    whole, _ = sample(sft_models[0], *prompts, ends)
    short, _ = sample(sft_models[0], *prompts, ends, length=3)
    assert texts(short) == [row[:3] for row in texts(whole)]


def test_every_end_token_ends_and_nothing_follows(sft_models, prompts, ends):
    pad = 5
    sequences, logprobs = sample(sft_models[0], *prompts, ends, pad=pad)
    assert sequences.prompt_length == max(map(len, prompts[1]))
    last = set()
    for i, row in enumerate(texts(sequences)):
        length = len(row)
        assert not set(row[:-1]) & set(ends)
        assert (row[-1] in ends) == bool(sequences.ended[i])
        assert bool(sequences.ended[i]) or length == LENGTH
        assert sequences.response_mask[i].tolist() == [1] * length + [0] * (sequences.response_mask.shape[1] - length)
        assert (sequences.responses[i, length:] == pad).all() and (logprobs[i, length:] == 0).all()
        assert (logprobs[i, :length] < 0).all()
        start = sequences.prompt_length - len(prompts[1][i])
        assert sequences.tokens[i, start : sequences.prompt_length].tolist() == prompts[1][i]
        attended = [0] * start + [1] * len(prompts[1][i]) + sequences.response_mask[i].tolist()
        assert sequences.attention_mask[i].tolist() == attended
        last |= {row[-1]} if sequences.ended[i] else set()
    assert len(last) > 3 and 0 < sequences.ended.sum() < len(sequences)


def test_an_end_token_may_be_the_padding(sft_models, prompts, ends):
    sequences, _ = sample(sft_models[0], *prompts, ends)
    same_id, _ = sample(sft_models[0], *prompts, ends, pad=ends[1])
    assert texts(same_id) == texts(sequences) and torch.equal(same_id.response_mask, sequences.response_mask)
    assert torch.equal(same_id.ended, sequences.ended)


@torch.no_grad()
def test_temperature_zero_takes_the_likeliest_token(sft_models, prompts, ends):
    model, (ids, encoded) = sft_models[0], (prompts[0][:4], prompts[1][:4])
    found = texts(sample(model, ids, encoded, ends, temperature=0)[0])
    for prompt, response in zip(encoded, found, strict=True):
        row = []
        while len(row) < LENGTH and (not row or row[-1] not in ends):
            row.append(int(model(input_ids=torch.tensor([prompt + row])).logits[0, -1].argmax()))
        assert response == row
    assert texts(sample(model, ids, encoded, ends, temperature=0, seed=1)[0]) == found


def test_the_models_own_generation_settings_are_ignored(sft_models, prompts, ends):
    model = copy.deepcopy(sft_models[0])
    model.generation_config.update(top_k=1, top_p=0.1, temperature=0.1, repetition_penalty=5.0, max_new_tokens=2)
    assert texts(sample(model, *prompts, ends)[0]) == texts(sample(sft_models[0], *prompts, ends)[0])


@torch.no_grad()
def test_first_tokens_have_the_models_probabilities(sft_models, prompts, ends):
    count = 3000
    sequences, _ = sample(sft_models[0], range(count), [prompts[1][0]] * count, ends, length=1)
    probabilities = sft_models[0](input_ids=torch.tensor([prompts[1][0]])).logits[0, -1].double().softmax(0).numpy()
    found = np.bincount(sequences.responses[:, 0].numpy(), minlength=len(probabilities))
    likely = probabilities * count > 5
    observed, expected = found[likely], probabilities[likely] * count
    observed, expected = np.append(observed, count - observed.sum()), np.append(expected, count - expected.sum())
    assert stats.chisquare(observed, expected).pvalue > 1e-3


def test_a_batch_sampled_in_parts_is_the_batch(sft_models, prompts, ends):
    ids, encoded = prompts[0][:7], prompts[1][:7]
    noise = rollout.uniforms(0, 0, ids, LENGTH)
    whole, logprobs, _ = rollout.sample(sft_models[0], encoded, noise, 1.0, ends, 0)
    parts, again, _ = rollout.sample_batch(sft_models[0], encoded, noise, 1.0, ends, 0, 3)
    torch.testing.assert_close(parts.tokens, whole.tokens)
    torch.testing.assert_close(parts.attention_mask, whole.attention_mask)
    torch.testing.assert_close(parts.response_mask, whole.response_mask)
    torch.testing.assert_close(parts.ended, whole.ended)
    torch.testing.assert_close(again, logprobs, rtol=1e-4, atol=1e-4)


def test_a_growing_layer_holds_what_a_dynamic_one_does():
    growing, dynamic = rollout.GrowingLayer(12), DynamicLayer()
    generator = torch.Generator().manual_seed(0)
    rows, buffers = 6, []
    for step, kept in ((5, None), (1, [4, 0, 3]), (1, None), (3, [1]), (2, None)):
        keys, values = (torch.randn(rows, 2, step, size, generator=generator) for size in (4, 3))
        assert growing.get_mask_sizes(step) == dynamic.get_mask_sizes(step)
        for found, expected in zip(growing.update(keys, values), dynamic.update(keys, values), strict=True):
            assert torch.equal(found, expected)
        buffers.append(growing.keys.data_ptr())
        if kept:
            for layer in (growing, dynamic):
                layer.batch_select_indices(torch.tensor(kept))
            rows = len(kept)
        assert growing.get_seq_length() == dynamic.get_seq_length()
        assert torch.equal(growing.keys, dynamic.keys) and torch.equal(growing.values, dynamic.values)
    assert growing.get_seq_length() == 12
    assert len(set(buffers)) == 3  # made once, and once more at each selection


@pytest.fixture
def selections(monkeypatch):
    """How many rows are left, a number each time that ended ones are dropped."""
    original, kept = DynamicCache.batch_select_indices, []

    def note(self, indices):
        kept.append(len(indices))
        return original(self, indices)

    monkeypatch.setattr(DynamicCache, "batch_select_indices", note)
    return kept


def values_of(model):
    weights = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    return lambda hidden: hidden @ weights


def test_dropping_ended_rows_changes_no_response(sft_models, prompts, ends, selections):
    ids, encoded = prompts
    model, noise = sft_models[0], rollout.uniforms(0, 0, ids, LENGTH)
    head = values_of(model)
    sequences, *found = rollout.sample(model, encoded, noise, 1.0, ends, 0, head)
    assert len(selections) > 1 and selections[-1] < len(ids) / 4
    assert (sequences.lengths < LENGTH).sum() > len(ids) / 4
    selections.clear()
    endless, *expected = rollout.sample(model, encoded, noise, 1.0, [], 0, head)
    assert selections == [] and endless.lengths.tolist() == [LENGTH] * len(ids) and not endless.ended.any()
    for i, row in enumerate(texts(endless)):
        length = next((t + 1 for t, token in enumerate(row) if token in ends), LENGTH)
        assert texts(sequences)[i] == row[:length]
        for mine, other in zip(found, expected, strict=True):
            torch.testing.assert_close(mine[i, :length], other[i, :length], rtol=1e-5, atol=1e-5)
            assert (mine[i, length:] == 0).all()
    for i in range(8):  # alone, nothing can be dropped
        alone, *its = rollout.sample(model, encoded[i : i + 1], noise[i : i + 1], 1.0, ends, 0, head)
        assert texts(alone) == [texts(sequences)[i]]
        for mine, other in zip(its, found, strict=True):
            torch.testing.assert_close(mine[0], other[i, : mine.shape[1]], rtol=1e-4, atol=1e-4)
    assert selections == []


def test_no_sample_has_the_noise_of_another_prompt():
    ids = ["p", "p/1", "p/1/1", "p/0", "p sample 1"]
    keys = rollout.sample_keys(ids, 3)
    assert keys[::3] == ids and len(set(keys)) == len(keys)
    noise = rollout.uniforms(0, 0, keys, 4)
    assert len({tuple(row) for row in noise.tolist()}) == len(keys)


@pytest.mark.parametrize("window", [None, 4])
def test_several_responses_to_a_prompt_are_those_of_single_ones(prompts, tokenizer, ends, selections, window):
    """The prompt is computed once for them; a layer may keep its last keys and values alone."""
    model, ids = small_mistral(len(tokenizer), window), prompts[0][:6]
    encoded = [row[-2 - i :] for i, row in enumerate(prompts[1][:6])]
    keys, repeated = rollout.sample_keys(ids, 3), [prompt for prompt in encoded for _ in range(3)]
    assert keys[:4] == [ids[0], f"{ids[0]}\nsample 1", f"{ids[0]}\nsample 2", ids[1]]
    noise, widths = rollout.uniforms(0, 0, keys, LENGTH), []
    model.model.register_forward_pre_hook(
        lambda module, _, inputs: widths.append(inputs["input_ids"].shape), with_kwargs=True
    )
    expected, logprobs, values = rollout.sample(model, repeated, noise, 0.9, ends, 0, values_of(model))
    assert widths[0] == (18, 7) and selections
    for batch_size, rows in ((64, [6]), (7, [2, 2, 2]), (2, [2] * 9)):
        widths.clear()
        found, *others = rollout.sample_batch(
            model, repeated, noise, 0.9, ends, 0, batch_size, values_of(model), samples=3
        )
        assert [count for count, width in widths if width > 1] == rows
        assert texts(found) == texts(expected)
        for ours, theirs in zip((logprobs, values), others, strict=True):
            torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch_size", [64, 5])
def test_values_while_sampling_are_those_of_a_fresh_pass(sft_models, prompts, ends, batch_size):
    head = torch.nn.Linear(sft_models[0].config.hidden_size, 1)
    made = networks.ActorCritic(sft_models[0], head, 0.8)
    noise = rollout.uniforms(0, 0, prompts[0], LENGTH)
    with torch.no_grad():
        sequences, logprobs, values = made("sample", prompts[1], noise, ends, 0, batch_size)
        mask = sequences.response_mask
        torch.testing.assert_close(values, made("values", sequences) * mask, rtol=1e-4, atol=1e-4)
        fresh, _, again = made("evaluate", sequences)
        torch.testing.assert_close(values, again * mask, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logprobs, fresh, rtol=1e-4, atol=1e-4)
    assert values[mask.bool()].std() > 0.1
    separate = networks.ActorCritic(sft_models[0], torch.nn.Identity(), 1.0)
    assert separate("sample", prompts[1], noise, ends, 0, batch_size)[2] is None


def small_mistral(vocabulary, window):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return MistralForCausalLM(
        MistralConfig(
            vocab_size=vocabulary, **shape, num_key_value_heads=1, sliding_window=window, initializer_range=0.3
        )
    ).eval()


@torch.no_grad()
def naive_response(model, prompt, uniforms, ends):
    """Tokens, their log-probabilities and values, without cache, padding or company."""
    response, logprobs, values = [], [], []
    for uniform in uniforms:
        hidden = model.model(input_ids=torch.tensor([prompt + response])).last_hidden_state[:, -1]
        distribution = model.lm_head(hidden)[0].double().log_softmax(0)
        response.append(int((distribution.exp().cumsum(0) <= uniform).sum()))
        logprobs.append(distribution[response[-1]].item())
        values.append(values_of(model)(hidden).item())
        if response[-1] in ends:
            break
    return response, logprobs, values


def test_models_with_a_sliding_window_are_sampled_as_by_a_plain_loop(prompts, tokenizer, ends, selections):
    assert {type(layer) for layer in rollout.make_cache(small_mistral(len(tokenizer), None), 9).layers} == {
        rollout.GrowingLayer
    }
    model = small_mistral(len(tokenizer), 4)
    assert not any(isinstance(layer, rollout.GrowingLayer) for layer in rollout.make_cache(model, 9).layers)
    ids, encoded = prompts[0][:12], [row[-2 - i :] for i, row in enumerate(prompts[1][:12])]
    noise = rollout.uniforms(0, 0, ids, LENGTH)
    sequences, logprobs, values = rollout.sample(model, encoded, noise, 1.0, ends, 0, values_of(model))
    assert selections and len(set(map(len, encoded))) > 3
    for i, (prompt, uniforms) in enumerate(zip(encoded, noise, strict=True)):
        response, *expected = naive_response(model, prompt, uniforms, ends)
        assert texts(sequences)[i] == response
        for found, wanted in zip((logprobs, values), expected, strict=True):
            assert found[i, : len(response)].tolist() == pytest.approx(wanted, abs=1e-4)
    fresh, _ = forward.response_logprobs(model, sequences)
    torch.testing.assert_close(logprobs, fresh.detach(), rtol=1e-4, atol=1e-4)
    whole = rollout.sample(small_mistral(len(tokenizer), None), encoded, noise, 1.0, ends, 0)[0]
    assert texts(whole) != texts(sequences)  # the window matters
