"""Answers of a policy to benchmarks and evaluation prompts.

An answer's noise depends on the seed, the benchmark, the prompt and the turn alone, so all policies of a replicate
answer with the same noise, and a batch's order changes nothing. In a conversation of several turns the model's own
earlier answers are fed back.
"""

from dataclasses import dataclass, field

from salsa import models, runs
from salsa.data import user
from salsa.ppo.rollout import sample_in_batches


@dataclass
class Answers:
    """One policy's answers: for each prompt and turn the conversation before it, token ids and text."""

    rows: list
    conversations: list = field(default_factory=list)  # a list a turn, of the messages of each prompt
    prompts: list = field(default_factory=list)  # likewise, token ids
    responses: list = field(default_factory=list)  # likewise, token ids with the end token
    texts: list = field(default_factory=list)
    finish_reasons: list = field(default_factory=list)  # "stop" or "length"


def answer(model, tokenizer, rows, name, settings, execution, temperature):
    """Answer every turn of benchmark `rows` ({"id", "turns"}).

    Args:
        rows: may have `before`, the messages before the first turn.
        name: the benchmark's; part of the noise's key.
        settings: has `seed` and `lengths`. First turns longer than lengths.prompt tokens are left out, for any model
            alike.
        temperature: 0 takes the likeliest token.

    Raises UserError when a conversation outgrows the model's context.
    """
    first = models.encode_prompts(tokenizer, [[*row.get("before", []), user(row["turns"][0])] for row in rows])
    rows, _ = models.within_length(rows, first, settings.lengths.prompt, f"benchmark {name}")
    answers = Answers(rows)
    conversations = [row.get("before", []) for row in rows]
    for turn in range(max(len(row["turns"]) for row in rows)):
        conversations = [
            [*conversation, user(row["turns"][turn])] for conversation, row in zip(conversations, rows, strict=True)
        ]
        encoded = models.encode_prompts(tokenizer, conversations)
        _check_context(model, encoded, settings.lengths.response, name)
        ids = [f"{name}/{row['id']}/{turn}" for row in rows]
        responses, ended = [None] * len(rows), [None] * len(rows)
        for indices, sequences in sample_in_batches(
            model,
            encoded,
            ids,
            settings.seed,
            0,
            settings.lengths.response,
            temperature,
            models.end_ids(model, tokenizer),
            tokenizer.pad_token_id,
            execution.rollout_batch,
        ):
            tokens, lengths, ends = sequences.responses.tolist(), sequences.lengths.tolist(), sequences.ended.tolist()
            for place, index in enumerate(indices):
                responses[index], ended[index] = tokens[place][: lengths[place]], ends[place]
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in responses]
        answers.conversations.append(conversations)
        answers.prompts.append(encoded)
        answers.responses.append(responses)
        answers.texts.append(texts)
        answers.finish_reasons.append(["stop" if end else "length" for end in ended])
        conversations = [
            [*conversation, {"role": "assistant", "content": text}]
            for conversation, text in zip(conversations, texts, strict=True)
        ]
    return answers


def _check_context(model, encoded, response_length, name):
    limit = getattr(model.config, "max_position_embeddings", None)
    longest = max(map(len, encoded)) + response_length
    if limit and longest > limit:
        raise runs.UserError(
            f"benchmark {name}: a conversation needs {longest} tokens, the model holds {limit}; "
            "lower lengths.prompt or lengths.response"
        )
