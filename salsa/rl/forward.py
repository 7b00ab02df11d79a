"""Forward passes: from padded token sequences to log-probabilities, entropies, values, rewards and exact KL.

Prompts are padded on the left and responses on the right, so that a response starts at column P in every row. Forward
passes move each row to the left, where it needs no mask. Nothing of size B x T x vocabulary is kept: logits are
computed for response positions alone, a chunk of rows at a time. In training, large chunks are computed again in the
backward pass. A prompt that several rows share (`Sequences.prompt_numbers`) is computed once for them.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

CHUNK = 2**24  # logits (float32) in memory at once
PASS = 256  # tokens that a CPU computes in the time that another pass over a small model costs


@dataclass
class Sequences:
    """The prompts and responses of one batch.

    tokens (B, P + T) int64; attention_mask (B, P + T), 0 on padding; response_mask (B, T), 1 up to and with the last
    token of a response; `ended` (B,) bool, whether that token is an end-of-sequence token. Rows with the same of the
    prompt_numbers (B,) have the same prompt; without these, each row's prompt is computed by itself.
    """

    tokens: torch.Tensor
    attention_mask: torch.Tensor
    response_mask: torch.Tensor
    ended: torch.Tensor
    prompt_numbers: torch.Tensor | None = None

    @property
    def prompt_length(self):
        """Length of the prompts with their padding."""
        return self.tokens.shape[1] - self.response_mask.shape[1]

    @property
    def responses(self):
        """(B, T) tokens."""
        return self.tokens[:, self.prompt_length :]

    @property
    def prompt_lengths(self):
        """(B,) number of tokens in each prompt."""
        return self.attention_mask[:, : self.prompt_length].sum(dim=1)

    @property
    def lengths(self):
        """(B,) number of tokens in each response."""
        return self.response_mask.sum(dim=1)

    def response_ids(self):
        """The responses as lists of token ids, without padding."""
        rows = zip(self.responses.tolist(), self.lengths.tolist(), strict=True)
        return [tokens[:length] for tokens, length in rows]

    def __len__(self):
        return len(self.tokens)

    def rows(self, index):
        """The sequences at `index`, without the columns in which all of them are padding."""
        tokens, attention, mask = self.tokens[index], self.attention_mask[index], self.response_mask[index]
        length = int(mask.sum(dim=1).max())
        start = int((attention[:, : self.prompt_length].sum(dim=0) == 0).sum())
        end = self.prompt_length + length
        numbers = None if self.prompt_numbers is None else self.prompt_numbers[index]
        return Sequences(tokens[:, start:end], attention[:, start:end], mask[:, :length], self.ended[index], numbers)


def micro_batches(sequences, limit, rows=None, halve=True):
    """The rows (all, unless some are given) in parts of like length, shortest first: index tensors.

    Each has at most `limit` rows. On a CPU, with `halve`, parts are halved while that saves more padding than it costs.
    """
    rows = torch.arange(len(sequences)) if rows is None else rows
    lengths = (sequences.prompt_lengths + sequences.lengths).cpu()
    parts = rows[torch.argsort(lengths[rows], stable=True)].split(limit)
    if not halve or sequences.tokens.device.type != "cpu":  # a GPU is at its best with many rows
        return parts
    return [half for part in parts for half in _halved(part, lambda some: _tokens(sequences, some))]


def in_order(computed, parts):
    """What was computed of each of the `micro_batches`, in the order of the rows that they are parts of."""
    return torch.cat(computed)[torch.argsort(torch.cat(list(parts)))]


def of_like_length(lengths):
    """The rows of a batch on a CPU, from their `lengths` (B,), in as many parts as take the least time."""
    rows = torch.argsort(lengths, stable=True)
    return _halved(rows, lambda some: len(some) * int(lengths[some].max()))


def _halved(rows, tokens):
    """Rows, sorted by length, in the parts that cost least. `tokens`: how many a pass over some rows computes."""
    if len(rows) < 2:
        return [rows]
    halves = rows.split((len(rows) + 1) // 2)
    if PASS + sum(map(tokens, halves)) >= tokens(rows):
        return [rows]
    return [part for half in halves for part in _halved(half, tokens)]


def _tokens(sequences, rows):
    """How many tokens a pass over some rows computes, with their padding."""
    prompts, lengths = sequences.prompt_lengths[rows], sequences.lengths[rows]
    if sequences.prompt_numbers is None:
        return len(rows) * int((prompts + lengths).max())
    different = len(sequences.prompt_numbers[rows].unique())
    return different * int(prompts.max()) + len(rows) * int(lengths.max())


def pad_left(rows, pad_id, device=None):
    """Lists of token ids as tokens and attention mask, (B, P) each, padded on the left."""
    tokens, mask = _padded(rows, pad_id, "left")
    return tokens.to(device), mask.to(device)


def _padded(rows, pad_id, side):
    """Lists of token ids as tokens and mask, (B, longest) each, padded on one side."""
    tokens = [torch.tensor(row, dtype=torch.long) for row in rows]
    masks = [torch.ones_like(row) for row in tokens]
    return pad_sequence(tokens, True, pad_id, side), pad_sequence(masks, True, 0, side)


def from_lists(prompts, responses, end_ids, pad_id, device=None):
    """Sequences from lists of prompt ids and response ids."""
    tokens, attention = _padded(prompts, pad_id, "left")
    response_tokens, mask = _padded(responses, pad_id, "right")
    ended = torch.tensor([row[-1] in end_ids for row in responses])
    parts = torch.cat([tokens, response_tokens], dim=1), torch.cat([attention, mask], dim=1), mask, ended
    return Sequences(*(part.to(device) for part in parts))


def pad_right(values, length):
    """(B, T) `values` followed by zeros, (B, length)."""
    return torch.nn.functional.pad(values, (0, length - values.shape[1]))


def concatenate(batches, pad_id):
    """One Sequences made from several, padded to the longest prompt and the longest response."""
    prompt = max(batch.prompt_length for batch in batches)
    response = max(batch.response_mask.shape[1] for batch in batches)

    def padded(values, batch, fill):
        left, right = prompt - batch.prompt_length, response - batch.response_mask.shape[1]
        return torch.nn.functional.pad(values, (left, right), value=fill)

    return Sequences(
        torch.cat([padded(batch.tokens, batch, pad_id) for batch in batches]),
        torch.cat([padded(batch.attention_mask, batch, 0) for batch in batches]),
        torch.cat([pad_right(batch.response_mask, response) for batch in batches]),
        torch.cat([batch.ended for batch in batches]),
    )


def at_least_float32(values):
    """Lower precisions become float32; float64 stays what it is."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def positions(attention_mask):
    """Position ids (B, L): the first token after the padding has position 0."""
    return (attention_mask.cumsum(dim=1) - 1).clamp(min=0)


class Hidden(NamedTuple):
    """Hidden states (B, L, H) of a trunk, and the column (B,) of the state before each row's response."""

    states: torch.Tensor
    start: torch.Tensor

    def after(self, counts):
        """The states (B, H) after so many (B,) tokens of each response."""
        return self.states[torch.arange(len(counts), device=counts.device), self.start + counts]


def hidden_states(model, sequences):
    """The `Hidden` states of `model`'s trunk, compiled where `models.compile_trunks` did that.

    Rows are moved to the left, so that each begins in column 0, and L is the length of the longest row. Attention is
    causal, so what follows the end of a row needs no mask, and most padding is not computed.
    """
    if sequences.prompt_numbers is not None and _can_share_prompts(model):
        return _hidden_after_shared_prompts(model, sequences)
    trunk, prompts = getattr(model, "compiled_trunk", model.base_model), sequences.prompt_lengths
    tokens = _moved_left(sequences, prompts, int((prompts + sequences.lengths).max()))
    return Hidden(trunk(input_ids=tokens, use_cache=False).last_hidden_state, prompts - 1)


def _moved_left(sequences, prompts, longest):
    """The first `longest` tokens (B, longest) of each row without the padding before its prompt."""
    columns = torch.arange(longest, device=prompts.device) + (sequences.prompt_length - prompts)[:, None]
    return sequences.tokens.gather(1, columns.clamp(max=sequences.tokens.shape[1] - 1))


def _can_share_prompts(model):
    """Whether keys and values of a prompt can be those of several rows: whether a layer keeps all of them."""
    layers = DynamicCache(config=model.config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def _hidden_after_shared_prompts(model, sequences):
    """The states from the last token of each prompt on, L = T + 1: prompts are computed once, then the responses."""
    _, first, place = np.unique(sequences.prompt_numbers.cpu().numpy(), return_index=True, return_inverse=True)
    device = sequences.tokens.device
    first, place = (torch.from_numpy(x).to(device) for x in (first, place))  # (U,) rows of prompts, (B,) in 0…U-1
    prompts = sequences.prompt_lengths
    longest = int(prompts.max())
    shared, cache = _moved_left(sequences, prompts, longest)[first], DynamicCache(config=model.config)
    states = model.base_model(input_ids=shared, past_key_values=cache, use_cache=True).last_hidden_state
    for layer in cache.layers:
        layer.keys, layer.values = (x.index_select(0, place) for x in (layer.keys, layer.values))
    steps = torch.arange(sequences.response_mask.shape[1], device=device)
    before = torch.arange(longest, device=device) < prompts[:, None]  # (B, longest), the tokens of each row's prompt
    following = model.base_model(
        input_ids=sequences.responses,
        attention_mask=torch.cat([before, torch.ones_like(sequences.responses, dtype=torch.bool)], dim=1).long(),
        position_ids=prompts[:, None] + steps,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    last = states[torch.arange(len(first), device=device), prompts[first] - 1].index_select(0, place)
    return Hidden(torch.cat([last[:, None], following], dim=1), torch.zeros_like(prompts))


def before_responses(hidden, sequences):
    """The states (B, T, H) from which each response token was sampled; masked places hold anything."""
    columns = _columns_before(hidden, sequences).clamp(max=hidden.states.shape[1] - 1)
    return hidden.states.gather(1, columns[:, :, None].expand(-1, -1, hidden.states.shape[2]))


def _columns_before(hidden, sequences):
    """The columns (B, T) of hidden states that hold the state before each response token."""
    steps = torch.arange(sequences.response_mask.shape[1], device=sequences.tokens.device)
    return hidden.start[:, None] + steps


def _states_before(hidden, sequences):
    """The states (N, H) of `before_responses` for the N tokens that are not masked."""
    states, columns = hidden.states, _columns_before(hidden, sequences)
    rows = torch.arange(len(sequences), device=states.device)[:, None] * states.shape[1]
    return states.flatten(0, 1).index_select(0, (rows + columns)[sequences.response_mask.bool()])


def response_logprobs(model, sequences, temperature=1.0, hidden=None, entropies=True):
    """Log-probabilities and entropies of response tokens under logits / temperature.

    `hidden` are the trunk's states, where they are computed already. Returns (logprobs, entropies), both (B, T) of at
    least float32 and zero where masked; without `entropies`, None for these. They carry no gradient.
    """
    hidden = hidden_states(model, sequences) if hidden is None else hidden
    mask = sequences.response_mask.bool()
    states, tokens = _states_before(hidden, sequences), sequences.responses[mask]  # (N, H), (N,)
    rows, results = max(1, CHUNK // model.config.get_text_config().vocab_size), []
    recompute = torch.is_grad_enabled() and len(states) > rows
    for chunk, chunk_tokens in zip(states.split(rows), tokens.split(rows), strict=True):
        arguments = (model.get_output_embeddings(), chunk, chunk_tokens, temperature, entropies)
        results.append(
            checkpoint(_chunk_logprobs, *arguments, use_reentrant=False) if recompute else _chunk_logprobs(*arguments)
        )

    def placed(values):
        values = torch.cat(values)
        return torch.zeros(mask.shape, dtype=values.dtype, device=mask.device).masked_scatter(mask, values)

    logprobs, of_tokens = zip(*results, strict=True)
    return placed(logprobs), placed(of_tokens) if entropies else None


def _chunk_logprobs(head, states, tokens, temperature, with_entropies):
    logits = at_least_float32(head(states)) / temperature  # (n, V)
    normaliser = logits.logsumexp(dim=-1)
    logprobs = logits.gather(1, tokens[:, None]).squeeze(1) - normaliser
    if not with_entropies:
        return logprobs, None
    with torch.no_grad():
        probabilities = torch.exp(logits - normaliser[:, None])
        entropies = normaliser - (probabilities * logits).sum(dim=-1)
    return logprobs, entropies


@torch.no_grad()
def exact_kl(model, reference, sequences, micro_batch):
    """KL(model ‖ reference) (B,) in nats per response, exact over the vocabulary at each sampled prefix.

    `sequences` must be samples of `model` at temperature 1. The expectation over prefixes is sampled, and at each
    prefix the sum over the vocabulary is exact: this has the same mean as k1, and far less variance.
    """
    parts, per_response = micro_batches(sequences, micro_batch), []
    for rows in parts:
        batch = sequences.rows(rows)
        mask = batch.response_mask.bool()
        ours, theirs = (_states_before(hidden_states(m, batch), batch) for m in (model, reference))
        size = max(1, CHUNK // model.config.get_text_config().vocab_size)
        chunks = zip(ours.split(size), theirs.split(size), strict=True)
        heads = model.get_output_embeddings(), reference.get_output_embeddings()
        kls = torch.cat([_chunk_kl(heads[0](a), heads[1](b)) for a, b in chunks])
        per_token = torch.zeros(mask.shape, dtype=kls.dtype, device=mask.device)
        per_response.append(per_token.masked_scatter(mask, kls).sum(dim=1))
    return in_order(per_response, parts)


def _chunk_kl(logits, reference_logits):
    logprobs, reference_logprobs = (at_least_float32(x).log_softmax(dim=-1) for x in (logits, reference_logits))
    return (logprobs.exp() * (logprobs - reference_logprobs)).sum(dim=-1)


class ScoreModel(torch.nn.Module):
    """A sequence classifier with one output, read by position, and a constant shift and scale.

    transformers' own classifier reads the last token whose id is not the padding's, and so never sees an end token
    that shares this id. Here a score is read at the last token of the response, whatever its id.
    """

    def __init__(self, classifier, mean=0.0, std=1.0):
        super().__init__()
        self.classifier = classifier
        self.mean, self.std = mean, std

    def _head(self, states):
        return (at_least_float32(self.classifier.score(states)).squeeze(-1) - self.mean) / self.std

    def values(self, sequences):
        """The value (B, T) of the state before each response token."""
        return self._head(before_responses(hidden_states(self.classifier, sequences), sequences))

    @torch.no_grad()
    def scores(self, sequences, micro_batch):
        """The reward (B,) of each response."""
        parts, scores = micro_batches(sequences, micro_batch), []
        for rows in parts:
            batch = sequences.rows(rows)
            scores.append(self._head(hidden_states(self.classifier, batch).after(batch.lengths)))
        return in_order(scores, parts)
