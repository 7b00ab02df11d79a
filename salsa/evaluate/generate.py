"""Answers of a policy to benchmarks and evaluation prompts.

An answer's noise depends on the seed, the benchmark, the prompt and the turn alone, so all policies of a replicate
answer with the same noise, and a batch's order changes nothing. In a conversation of several turns the model's own
earlier answers are fed back, through its own chat template.

Prompts are answered in chunks of `execution.rollout_batch`, shortest first, all turns of a chunk before the next one.
Finished chunks can be kept, so that a run that was killed goes on: its chunks are the same, and so are its answers, bit
for bit on a CPU.
"""

from dataclasses import dataclass, field
from pathlib import Path

from salsa.data import chat
from salsa.data.messages import assistant, user
from salsa.rl import rollout
from salsa.workflow import runs


@dataclass
class Answers:
    """One policy's answers: for each turn and prompt the conversation before it, token ids and text."""

    rows: list
    left_out: int = 0  # prompts longer than lengths.prompt, or that can't be encoded
    conversations: list = field(default_factory=list)  # a list a turn, of the messages of each prompt
    prompts: list = field(default_factory=list)  # likewise, token ids
    responses: list = field(default_factory=list)  # likewise, token ids with the end token
    texts: list = field(default_factory=list)
    finish_reasons: list = field(default_factory=list)  # "stop" or "length"


def read_benchmarks(parents):
    """Benchmark name -> rows, of a stage's parents `benchmark/<name>`, by name."""
    names = sorted(role.removeprefix("benchmark/") for role in parents if role.startswith("benchmark/"))
    return {name: runs.read_jsonl(parents[f"benchmark/{name}"] / "benchmark.jsonl") for name in names}


def evaluation_rows(evaluation):
    """The rows of evaluation.jsonl as those of a benchmark of one turn."""
    return [
        {"id": row["id"], "before": row["prompt"][:-1], "turns": [row["prompt"][-1]["content"]]} for row in evaluation
    ]


def check(model, tokenizer, benchmarks, lengths):
    """Check, before anything is generated, that `model` can hold every conversation (benchmark name -> rows).

    Returns the tokens of the longest that may arise: the turns, and answers of lengths.response tokens to all of them.
    Raises UserError where that is more than the model's context. No conversation is left out for its model's sake: two
    models would be compared on different prompts.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    longest = 0
    for name, rows in benchmarks.items():
        rows = _wanted(tokenizer, rows, name, lengths)[0]
        turns = len(rows[0]["turns"])
        asked = max(len(chat.encode_prompt(tokenizer, _unanswered(row))) for row in rows)
        needed = asked + turns * lengths.response
        if limit and needed > limit:
            fits = (limit - asked) // turns
            remedy = f"set lengths.response={fits} or less" if fits > 0 else "leave the benchmark out"
            raise runs.UserError(
                f"benchmark {name}: with lengths.response={lengths.response} a conversation needs up to {needed} "
                f"tokens, the model holds {limit}; {remedy}"
            )
        longest = max(longest, needed)
    return longest


def make_engine(model, tokenizer, context, execution):
    """What samples, by execution.rollouts: None for transformers, or vLLM with room for `context` tokens."""
    if execution.rollouts == "transformers":
        return None
    from salsa.rl.vllm_rollout import Engine  # an extra: needed here alone

    return Engine(model, tokenizer, str(model.dtype).removeprefix("torch."), context, model.device)


def answer(model, tokenizer, rows, name, settings, execution, temperature, kept=None, engine=None):
    """Answer every turn of benchmark `rows` ({"id", "turns"}).

    Args:
        rows: may have `before`, the messages before the first turn. All have as many turns.
        name: the benchmark's; part of the noise's key.
        settings: has `seed` and `lengths`. First turns longer than lengths.prompt tokens are left out, for any model
            alike, and counted.
        temperature: 0 takes the likeliest token.
        kept: a folder for finished chunks of this model's answers; those that it holds are not sampled again.
        engine: of `make_engine`; None samples with transformers.

    Raises UserError when a conversation outgrows the model's context.
    """
    check(model, tokenizer, {name: rows}, settings.lengths)
    wanted, first, refused = _wanted(tokenizer, rows, name, settings.lengths)
    chat.counted(refused, f"benchmark {name}")
    ends = chat.end_ids(model, tokenizer)

    def sample(ids, prompts):
        _check_context(model, prompts, settings.lengths.response, name)
        if engine is not None:
            seeds = [runs.derive_seed(settings.seed, "answer", 0, key) for key in ids]
            return engine.respond(model, prompts, seeds, temperature, settings.lengths.response)[0]
        noise = rollout.uniforms(settings.seed, 0, ids, settings.lengths.response)
        sequences, _, _ = rollout.sample(model, prompts, noise, temperature, ends, tokenizer.pad_token_id)
        return sequences.response_ids()

    order = sorted(range(len(wanted)), key=lambda i: len(first[i]))
    parts = []
    for start in range(0, len(order), execution.rollout_batch):
        some = [wanted[i] for i in order[start : start + execution.rollout_batch]]
        path = kept and Path(kept) / name / f"{start:06d}.jsonl"
        finished = _finished(path, some, execution) if path else None
        parts.append(_converse(tokenizer, some, name, ends, sample, finished))
        if path and not finished:
            _keep(path, parts[-1], execution)
    return _in_order(parts, order, wanted, len(rows) - len(wanted))


def _wanted(tokenizer, rows, name, lengths):
    """The rows whose first turn has at most lengths.prompt tokens, its token ids, and what was refused.

    Left out are those, too, that can't be encoded, in any of their turns: for all models of a template alike.
    """
    counts = {len(row["turns"]) for row in rows}
    if len(counts) > 1:
        raise runs.UserError(
            f"benchmark {name}: prompts of {min(counts)} and of {max(counts)} turns; make it two benchmarks"
        )
    pairs, refused = chat.accepted(rows, lambda row: chat.encode_prompt(tokenizer, _unanswered(row)))
    if not pairs:
        raise runs.UserError(f"benchmark {name}: no prompt is left of {len(rows)}{chat.because(refused)}")
    kept, ids, _ = chat.fitting(
        tokenizer, [row for row, _ in pairs], lengths.prompt, f"benchmark {name}", lambda row: _unanswered(row, 1)
    )
    return kept, ids, refused


def _unanswered(row, turns=None):
    """A conversation up to its last question, or that of so many turns, with empty answers."""
    messages = [*row.get("before", []), user(row["turns"][0])]
    for turn in row["turns"][1:turns]:
        messages += [assistant(""), user(turn)]
    return messages


def _converse(tokenizer, rows, name, ends, sample, finished=None):
    """Answers to one chunk of rows, turn by turn: responses of `sample(ids, prompts)`, or those of `finished`."""
    answers = Answers(rows)
    conversations = [row.get("before", []) for row in rows]
    for turn in range(len(rows[0]["turns"])):
        conversations = [[*before, user(row["turns"][turn])] for before, row in zip(conversations, rows, strict=True)]
        prompts = chat.encode_prompts(tokenizer, conversations)
        ids = [f"{name}/{row['id']}/{turn}" for row in rows]
        responses = finished[turn] if finished else sample(ids, prompts)
        texts = [chat.text_of(tokenizer, tokens) for tokens in responses]
        answers.conversations.append(conversations)
        answers.prompts.append(prompts)
        answers.responses.append(responses)
        answers.texts.append(texts)
        answers.finish_reasons.append(["stop" if tokens[-1] in ends else "length" for tokens in responses])
        conversations = [[*before, assistant(text)] for before, text in zip(conversations, texts, strict=True)]
    return answers


def _in_order(parts, order, rows, left_out):
    """The chunks' answers as those of all `rows`, whose indices `order` lists chunk by chunk."""
    whole = Answers(rows, left_out)
    places = sorted(range(len(order)), key=order.__getitem__)
    for name in ("conversations", "prompts", "responses", "texts", "finish_reasons"):
        for turns in zip(*(getattr(part, name) for part in parts), strict=True):
            together = [item for items in turns for item in items]
            getattr(whole, name).append([together[place] for place in places])
    return whole


def _keep(path, answers, execution):
    """Write the responses of a finished chunk: a line a prompt, in the order of the chunk."""
    responses = zip(*answers.responses, strict=True)
    lines = [
        {"id": row["id"], "rollouts": execution.rollouts, "responses": list(turns)}
        for row, turns in zip(answers.rows, responses, strict=True)
    ]
    runs.write_jsonl(path, lines)


def _finished(path, rows, execution):
    """The responses of a kept chunk, a list a turn; None where there is none, or it is of other prompts or sampling."""
    lines = runs.read_jsonl(path) if path.exists() else []
    if [(line["id"], line["rollouts"]) for line in lines] != [(row["id"], execution.rollouts) for row in rows]:
        return None
    return [list(turn) for turn in zip(*(line["responses"] for line in lines), strict=True)]


def _check_context(model, prompts, response_length, name):
    """UserError where an answer, tokenised again as part of a prompt, has become longer than `check` could know."""
    limit = getattr(model.config, "max_position_embeddings", None)
    longest = max(map(len, prompts)) + response_length
    if limit and longest > limit:
        raise runs.UserError(
            f"benchmark {name}: a conversation needs {longest} tokens, the model holds {limit}; lower lengths.response"
        )
