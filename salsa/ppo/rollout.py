"""Sampling responses from the policy.

Each token is drawn by inverting the cumulative distribution at one uniform number, which depends on the seed, the
iteration, the prompt and the position alone. So neither the order of a batch, nor what else is in it, nor the number
of processes changes a response (beyond rounding), and two policies see the same noise on the same prompt.

Left out: top-p, top-k, penalties. PPO's ratio needs the probabilities that were sampled from, so the model's own
generation_config is ignored.
"""

import hashlib

import numpy as np
import torch
from transformers import DynamicCache

from salsa.forward import Sequences, concatenate, pad_left, pad_right


def uniforms(seed, iteration, prompt_ids, length):
    """Uniform numbers in [0, 1), (B, length) float64: one a prompt and position."""
    noise = np.empty((len(prompt_ids), length))
    for row, prompt_id in zip(noise, prompt_ids, strict=True):
        key = hashlib.sha256(f"{seed}/{iteration}/{prompt_id}".encode()).digest()
        row[:] = np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "big"))).random(length)
    return torch.from_numpy(noise)


def draw(logits, uniform):
    """Tokens (B,) from logits (B, V) at uniforms (B,), by inversion in float64. Temperature 0 is `argmax` instead."""
    cumulative = logits.double().softmax(dim=-1).cumsum(dim=-1)
    # Scaled to the last sum, which rounding keeps from being 1, so that every uniform finds a token.
    threshold = uniform.to(cumulative.device)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(1).clamp(max=logits.shape[1] - 1)


@torch.no_grad()
def sample(model, prompts, noise, temperature, end_ids, pad_id):
    """Sample one response to each prompt.

    Args:
        model: a causal language model.
        prompts: lists of token ids.
        noise: (B, T) from `uniforms`; T is the largest length of a response.
        temperature: logits are divided by it; 0 takes the likeliest token.
        end_ids: token ids of which each ends a response.

    Returns (Sequences, logprobs): logprobs (B, T) float32 of the sampled tokens, zero where masked.
    """
    device = next(model.parameters()).device
    tokens, attention = pad_left(prompts, pad_id, device)
    ends = torch.tensor(end_ids, device=device)
    alive = torch.ones(len(prompts), dtype=torch.bool, device=device)
    position = attention.sum(dim=1, keepdim=True)
    cache, inputs = DynamicCache(config=model.config), tokens
    place = (attention.cumsum(dim=1) - 1).clamp(min=0)
    sampled, logprobs, masks = [], [], []
    for t in range(noise.shape[1]):
        hidden = model.base_model(
            input_ids=inputs, attention_mask=attention, position_ids=place, past_key_values=cache, use_cache=True
        ).last_hidden_state[:, -1]
        logits = model.get_output_embeddings()(hidden).float()
        if temperature > 0:
            logits = logits / temperature
            token = draw(logits, noise[:, t])
        else:
            token = logits.argmax(dim=-1)
        logprob = logits.log_softmax(dim=-1).gather(1, token[:, None]).squeeze(1)
        masks.append(alive)
        sampled.append(torch.where(alive, token, pad_id))
        logprobs.append(torch.where(alive, logprob, 0.0))
        alive = alive & ~torch.isin(token, ends)
        if not alive.any():
            break
        inputs, place = sampled[-1][:, None], position + t
        # Ended rows go on with padding that nothing reads: their mask stays 0 from here on.
        attention = torch.cat([attention, masks[-1][:, None].long()], dim=1)
    mask = torch.stack(masks, dim=1).long()
    sequences = Sequences(
        torch.cat([tokens, torch.stack(sampled, dim=1)], dim=1),
        torch.cat([attention[:, : tokens.shape[1]], mask], dim=1),
        mask,
        ~alive,
    )
    return sequences, torch.stack(logprobs, dim=1)


def sample_batch(model, prompts, noise, temperature, end_ids, pad_id, batch_size):
    """`sample` for one batch, `batch_size` prompts at a time, in the order of `prompts`."""
    sampled = []
    for start in range(0, len(prompts), batch_size):
        rows = slice(start, start + batch_size)
        sampled.append(sample(model, prompts[rows], noise[rows], temperature, end_ids, pad_id))
    if len(sampled) == 1:
        return sampled[0]
    sequences = concatenate([batch for batch, _ in sampled], pad_id)
    length = sequences.response_mask.shape[1]
    return sequences, torch.cat([pad_right(logprobs, length) for _, logprobs in sampled])


def sample_in_batches(model, prompts, prompt_ids, seed, iteration, length, temperature, end_ids, pad_id, batch_size):
    """`sample` for many prompts, shortest together, yielding (indices, Sequences) a batch."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        noise = uniforms(seed, iteration, [prompt_ids[i] for i in rows], length)
        sequences, _ = sample(model, [prompts[i] for i in rows], noise, temperature, end_ids, pad_id)
        yield rows, sequences
