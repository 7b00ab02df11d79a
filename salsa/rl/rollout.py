"""Sampling responses from the policy.

Each token is drawn by inverting the cumulative distribution at one uniform number, which depends only on the seed, the
iteration, the prompt and the position. So a response does not change (beyond rounding) with the order of a batch, with
the other prompts in it or with the number of processes, and two policies see the same noise on the same prompt.

There is no top-p, top-k or penalty: PPO's ratio needs the probabilities that tokens were sampled from, so the
generation_config of a model is ignored.
"""

import hashlib

import numpy as np
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from salsa.data import chat
from salsa.rl.forward import Sequences, at_least_float32, concatenate, pad_left, pad_right, positions
from salsa.workflow import runs


def prompt_order(count, iterations, batch_size, seed):
    """Prompt indices for each iteration: shuffled passes over all prompts, each without its incomplete last batch."""
    generator, batches = np.random.default_rng(runs.derive_seed(seed, "prompt order", 0)), []
    while len(batches) < iterations:
        permutation = generator.permutation(count)
        batches += [permutation[i : i + batch_size] for i in range(0, count - batch_size + 1, batch_size)]
    return batches[:iterations]


def sample_keys(prompt_ids, samples):
    """The keys of the noise of `samples` responses to each prompt."""
    return [runs.sample_key(prompt_id, sample) for prompt_id in prompt_ids for sample in range(samples)]


def uniforms(seed, iteration, keys, length):
    """Uniform numbers in [0, 1), (B, length) float64: one for each key (of a prompt and sample) and position."""
    noise = np.empty((len(keys), length))
    for row, key in zip(noise, keys, strict=True):
        # Keyed by prompt, not drawn in turn: no other prompt, and no other process, can shift a prompt's noise.
        digest = hashlib.sha256(f"{seed}/{iteration}/{key}".encode()).digest()
        row[:] = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "big"))).random(length)
    return torch.from_numpy(noise)


def draw(logits, uniform):
    """Tokens (B,) from logits (B, V) at uniforms (B,), by inversion in float64."""
    cumulative = logits.double().softmax(dim=-1).cumsum(dim=-1)
    # The last sum is 1 only up to rounding. Uniforms are scaled to it, so that each of them finds a token.
    threshold = uniform.to(cumulative.device)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(1).clamp(max=logits.shape[1] - 1)


class GrowingLayer(DynamicLayer):
    """Keys and values of an attention layer, in one buffer: concatenation would copy them at every token."""

    def __init__(self, capacity):
        super().__init__()
        self.capacity = capacity

    def lazy_initialization(self, key_states, value_states):
        super().lazy_initialization(key_states, value_states)
        shape = (*key_states.shape[:2], self.capacity, key_states.shape[-1])
        self.buffers = key_states.new_empty(shape), value_states.new_empty((*shape[:-1], value_states.shape[-1]))
        self.keys, self.values = (buffer[:, :, :0] for buffer in self.buffers)

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, end = self.keys.shape[-2], self.keys.shape[-2] + key_states.shape[-2]
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = states
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices):
        length = self.keys.shape[-2]
        self.buffers = tuple(buffer[indices] for buffer in self.buffers)
        self.keys, self.values = (buffer[:, :, :length] for buffer in self.buffers)


def make_cache(model, capacity):
    """A cache of keys and values for `capacity` tokens; transformers' own where the attention has a window."""
    cache = DynamicCache(config=model.config)
    if cache.layers and all(type(layer) is DynamicLayer for layer in cache.layers):
        cache.layers = [GrowingLayer(capacity) for _ in cache.layers]
    return cache


@torch.no_grad()
def sample(model, prompts, noise, temperature, end_ids, pad_id, value_head=None, samples=1):
    """Sample one response to each of B prompts.

    Args:
        model: a causal language model.
        prompts: lists of token ids.
        noise: (B, T) from `uniforms`, where T is the largest length of a response.
        temperature: logits are divided by it; 0 takes the likeliest token.
        end_ids: token ids, each of which ends a response.
        value_head: a function from hidden states of the trunk (n, H) to their values (n,).
        samples: how often each prompt stands there, one after the other; it is computed once.

    Returns (Sequences, logprobs, values): the log-probabilities of the sampled tokens and the values of the states
    before them, (B, T) of at least float32 and zero where masked. values is None without a `value_head`.
    """
    device = next(model.parameters()).device
    tokens, prompt_attention = pad_left(prompts, pad_id, device)
    ends = torch.tensor(end_ids, device=device, dtype=torch.long)
    count, length, width = len(prompts), noise.shape[1], tokens.shape[1]
    sampled = torch.full((count, length), pad_id, dtype=torch.long, device=device)
    mask = torch.zeros((count, length), dtype=torch.long, device=device)
    per_token = {}  # name -> (B, T)
    ended = torch.zeros(count, dtype=torch.bool, device=device)

    rows = torch.arange(count, device=device)  # the responses that are still in the cache
    cache = make_cache(model, width + length)
    droppable = all(hasattr(layer, "batch_select_indices") for layer in cache.layers)  # linear attention has no rows
    samples = samples if droppable else 1
    attention, position = prompt_attention, prompt_attention.sum(dim=1, keepdim=True)
    inputs, place = tokens[::samples], positions(prompt_attention[::samples])
    noise = noise.to(device)
    for t in range(length):
        hidden = model.base_model(
            input_ids=inputs,
            attention_mask=attention if t else attention[::samples],
            position_ids=place,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        if t == 0 and samples > 1:  # from here on, each response has a copy of its prompt's keys and values
            cache.batch_select_indices(rows // samples)
            hidden = hidden.repeat_interleave(samples, dim=0)
        logits = at_least_float32(model.get_output_embeddings()(hidden))
        if temperature > 0:
            logits = logits / temperature
            token = draw(logits, noise[rows, t])
        else:
            token = logits.argmax(dim=-1)
        alive = ~ended[rows]
        step = {"logprobs": logits.log_softmax(dim=-1).gather(1, token[:, None]).squeeze(1)}
        if value_head:
            step["values"] = value_head(hidden)
        for name, values in step.items():
            recorded = per_token.setdefault(name, torch.zeros((count, length), dtype=values.dtype, device=device))
            recorded[rows, t] = torch.where(alive, values, 0.0)
        token = torch.where(alive, token, pad_id)
        sampled[rows, t], mask[rows, t] = token, alive.long()
        alive = alive & ~torch.isin(token, ends)
        ended[rows] = ~alive
        remaining = int(alive.sum())
        if remaining == 0:
            break
        inputs, place = token[:, None], position + t
        # Responses that have ended go on with padding that nothing reads. To drop them from the cache copies it, so
        # they are dropped when they are half of its rows.
        attention = torch.cat([attention, mask[rows, t : t + 1]], dim=1)
        if remaining <= len(rows) // 2 and droppable:
            (going_on,) = alive.nonzero(as_tuple=True)
            cache.batch_select_indices(going_on)
            rows, inputs, place, position, attention = (x[going_on] for x in (rows, inputs, place, position, attention))
    longest = int(mask.sum(dim=1).max())
    sampled, mask = sampled[:, :longest], mask[:, :longest]
    attention = torch.cat([prompt_attention, mask], dim=1)
    sequences = Sequences(torch.cat([tokens, sampled], dim=1), attention, mask, ended)
    return sequences, *(per_token[name][:, :longest] if name in per_token else None for name in ("logprobs", "values"))


def sample_batch(model, prompts, noise, temperature, end_ids, pad_id, batch_size, value_head=None, samples=1):
    """Apply `sample` to one batch, at most `batch_size` prompts at a time, in the order of `prompts`."""
    if batch_size < samples:  # then responses to one prompt are in several parts, which compute it again
        samples = 1
    step = batch_size - batch_size % samples
    slices = [slice(start, start + step) for start in range(0, len(prompts), step)]
    parts = [sample(model, prompts[i], noise[i], temperature, end_ids, pad_id, value_head, samples) for i in slices]
    if len(parts) == 1:
        return parts[0]
    batches, logprobs, values = zip(*parts, strict=True)
    sequences = concatenate(batches, pad_id)
    length = sequences.response_mask.shape[1]
    logprobs = torch.cat([pad_right(part, length) for part in logprobs])
    return sequences, logprobs, torch.cat([pad_right(part, length) for part in values]) if value_head else None


def sample_in_batches(model, tokenizer, prompts, prompt_ids, seed, length, batch_size):
    """Sample from many prompts at temperature 1, shortest together; yields (indices, Sequences) for each batch."""
    end_ids, pad_id = chat.end_ids(model, tokenizer), tokenizer.pad_token_id
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        noise = uniforms(seed, 0, [prompt_ids[i] for i in rows], length)
        sequences, _, _ = sample(model, [prompts[i] for i in rows], noise, 1.0, end_ids, pad_id)
        yield rows, sequences
