"""Answers of a policy to benchmarks and evaluation prompts.

An answer's noise depends on the seed, the benchmark, the prompt, the turn and the number of the sample alone, so all
policies of a replicate and training seed answer with the same noise, and a batch's order changes nothing. In a
conversation of several turns the model's own earlier answers are fed back, through its own chat template.

Prompts are answered in chunks of `execution.rollout_batch` samples, shortest first, all turns of a chunk before the
next chunk. Finished chunks can be kept, so that a killed run continues with the same chunks, and on a CPU ends with the
same answers bit for bit.
"""

from dataclasses import dataclass, field
from pathlib import Path

from salsa.data import chat
from salsa.data.messages import assistant, user
from salsa.evaluate import best_of
from salsa.rl import rollout
from salsa.workflow import runs
from salsa.workflow.messages import UserError


@dataclass
class Answers:
    """One policy's answers: a list for each turn, with an item for each row.

    Attributes:
        rows: of a benchmark, each as often as it is answered, one after the other, with the number of the `sample`.
        left_out: number of prompts that are longer than lengths.prompt or can't be encoded.
        conversations: messages before the answer.
        prompts: their token ids.
        responses: token ids of the answers, with the end token.
        texts: of the answers.
        finish_reasons: "stop" or "length".
    """

    rows: list
    left_out: int = 0
    conversations: list = field(default_factory=list)
    prompts: list = field(default_factory=list)
    responses: list = field(default_factory=list)
    texts: list = field(default_factory=list)
    finish_reasons: list = field(default_factory=list)


def read_benchmarks(parents):
    """Benchmark name -> rows, of a stage's parents `benchmark/<name>`, by name."""
    names = sorted(role.removeprefix("benchmark/") for role in parents if role.startswith("benchmark/"))
    return {name: runs.read_jsonl(parents[f"benchmark/{name}"] / "benchmark.jsonl") for name in names}


def evaluation_rows(evaluation):
    """The rows of evaluation.jsonl as rows of a benchmark with one turn."""
    return [
        {"id": row["id"], "before": row["prompt"][:-1], "turns": [row["prompt"][-1]["content"]]} for row in evaluation
    ]


def check(model, tokenizer, benchmarks, lengths):
    """Check, before anything is generated, that `model` can hold every conversation.

    Args:
        benchmarks: name -> rows.

    Returns the number of tokens of the longest conversation that may arise, where every answer has lengths.response
    tokens. Raises UserError where that is more than the model's context: conversations are not left out for one model,
    because two models would then be compared on different prompts.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    longest = 0
    for name, rows in benchmarks.items():
        rows = _wanted(tokenizer, rows, name, lengths)[0]
        turns = len(rows[0]["turns"])
        unanswered = max(len(chat.encode_prompt(tokenizer, _unanswered(row))) for row in rows)
        needed = unanswered + turns * lengths.response
        if limit and needed > limit:
            fits = (limit - unanswered) // turns
            remedy = f"set lengths.response={fits} or less" if fits > 0 else "leave the benchmark out"
            raise UserError(
                f"benchmark {name}: with lengths.response={lengths.response} a conversation needs up to {needed} "
                f"tokens, the model holds {limit}; {remedy}"
            )
        longest = max(longest, needed)
    return longest


def make_engine(model, tokenizer, context, execution):
    """The engine that execution.rollouts asks for: vLLM with room for `context` tokens, or None for transformers."""
    if execution.rollouts == "transformers":
        return None
    from salsa.rl.vllm_rollout import Engine  # an extra: needed here alone

    return Engine(model, tokenizer, str(model.dtype).removeprefix("torch."), context, model.device)


def answer(
    model, tokenizer, rows, name, settings, execution, temperature, kept=None, engine=None, best=None, samples=1
):
    """Answer every turn of benchmark `rows` ({"id", "turns"}).

    Args:
        rows: all have as many turns; they may have `before`, the messages before the first turn.
        name: the benchmark's name, which is part of the noise's key.
        settings: has `seed` and `lengths`. Prompts whose first turn is longer than lengths.prompt tokens are left out,
            for all models alike, and counted.
        temperature: 0 takes the likeliest token.
        kept: a folder for finished chunks of this model's answers; chunks that it holds are not sampled again.
        engine: from `make_engine`; None samples with transformers.
        best: a `best_of.BestOf`, where the best of several responses is the answer at each turn.
        samples: how many answers each row gets, with other noise; the first has the noise of a single one.

    Raises UserError when a conversation outgrows the model's context.
    """
    check(model, tokenizer, {name: rows}, settings.lengths)
    accepted, first, refused = _wanted(tokenizer, rows, name, settings.lengths)
    chat.counted(refused, f"benchmark {name}")
    wanted = [row | {"sample": sample} for row in accepted for sample in range(samples)]
    lengths = [len(ids) for ids in first for _ in range(samples)]
    ends = chat.end_ids(model, tokenizer)

    def draw(keys, prompts):
        _check_context(model, prompts, settings.lengths.response, name)
        if engine is not None:
            seeds = [runs.derive_seed(settings.seed, "answer", 0, key) for key in keys]
            return engine.respond(model, prompts, seeds, temperature, settings.lengths.response)[0]
        noise = rollout.uniforms(settings.seed, 0, keys, settings.lengths.response)
        sequences, _, _ = rollout.sample_batch(
            model, prompts, noise, temperature, ends, tokenizer.pad_token_id, execution.rollout_batch
        )
        return sequences.response_ids()

    best = best or best_of.BestOf()
    sample, size = best.sampler(draw), max(1, execution.rollout_batch // best.n)
    order = sorted(range(len(wanted)), key=lengths.__getitem__)
    parts = []
    for start in range(0, len(order), size):
        chunk = [wanted[i] for i in order[start : start + size]]
        path = kept and Path(kept) / name / f"{start:06d}.jsonl"
        finished = _finished(path, chunk, execution) if path else None
        parts.append(_converse(tokenizer, chunk, name, ends, sample, finished))
        if path and not finished:
            _keep(path, parts[-1], execution)
    return _in_order(parts, order, wanted, len(rows) - len(accepted))


def _wanted(tokenizer, rows, name, lengths):
    """The rows whose first turn has at most lengths.prompt tokens, its token ids, and errors of the rows refused.

    Rows with a turn that can't be encoded are left out, too, for all models with this chat template alike.
    """
    counts = {len(row["turns"]) for row in rows}
    if len(counts) > 1:
        raise UserError(
            f"benchmark {name}: prompts of {min(counts)} and of {max(counts)} turns; make it two benchmarks"
        )
    pairs, refused = chat.accepted(rows, lambda row: chat.encode_prompt(tokenizer, _unanswered(row)))
    if not pairs:
        raise UserError(f"benchmark {name}: no prompt is left of {len(rows)}{chat.because(refused)}")
    kept, ids, _ = chat.fitting(
        tokenizer, [row for row, _ in pairs], lengths.prompt, f"benchmark {name}", lambda row: _unanswered(row, 1)
    )
    return kept, ids, refused


def _unanswered(row, turns=None):
    """The conversation of a row with empty answers, up to its last question or to that of the turn number `turns`."""
    messages = [*row.get("before", []), user(row["turns"][0])]
    for turn in row["turns"][1:turns]:
        messages += [assistant(""), user(turn)]
    return messages


def _converse(tokenizer, rows, name, ends, sample, finished=None):
    """Answers to one chunk of rows, turn by turn, from `sample(keys, numbers, prompts)` or, if given, `finished`."""
    numbers = [row["sample"] for row in rows]
    answers = Answers(rows)
    conversations = [row.get("before", []) for row in rows]
    for turn in range(len(rows[0]["turns"])):
        conversations = [[*before, user(row["turns"][turn])] for before, row in zip(conversations, rows, strict=True)]
        prompts = chat.encode_prompts(tokenizer, conversations)
        keys = [f"{name}/{row['id']}/{turn}" for row in rows]
        responses = finished[turn] if finished else sample(keys, numbers, prompts)
        texts = [chat.text_of(tokenizer, tokens) for tokens in responses]
        answers.conversations.append(conversations)
        answers.prompts.append(prompts)
        answers.responses.append(responses)
        answers.texts.append(texts)
        answers.finish_reasons.append(["stop" if tokens[-1] in ends else "length" for tokens in responses])
        conversations = [[*before, assistant(text)] for before, text in zip(conversations, texts, strict=True)]
    return answers


def _in_order(parts, order, rows, left_out):
    """The answers to all `rows` in their order; `order` lists the rows' indices chunk by chunk."""
    whole = Answers(rows, left_out)
    places = sorted(range(len(order)), key=order.__getitem__)
    for name in ("conversations", "prompts", "responses", "texts", "finish_reasons"):
        for turns in zip(*(getattr(part, name) for part in parts), strict=True):
            together = [item for items in turns for item in items]
            getattr(whole, name).append([together[place] for place in places])
    return whole


def taken(answers, places):
    """The answers at some places, in the order of these."""
    lists = ("conversations", "prompts", "responses", "texts", "finish_reasons")
    parts = {name: [[items[i] for i in places] for items in getattr(answers, name)] for name in lists}
    return Answers([answers.rows[i] for i in places], answers.left_out, **parts)


def _keep(path, answers, execution):
    """Write the responses of a finished chunk, one line per prompt, in the order of the chunk."""
    responses = zip(*answers.responses, strict=True)
    lines = [
        {"id": row["id"], "rollouts": execution.rollouts, "responses": list(turns)}
        for row, turns in zip(answers.rows, responses, strict=True)
    ]
    runs.write_jsonl(path, lines)


def _finished(path, rows, execution):
    """The responses of a kept chunk, one list per turn, or None where none is kept for these rows and this sampler."""
    lines = runs.read_jsonl(path) if path.exists() else []
    if [(line["id"], line["rollouts"]) for line in lines] != [(row["id"], execution.rollouts) for row in rows]:
        return None
    return [list(turn) for turn in zip(*(line["responses"] for line in lines), strict=True)]


def _check_context(model, prompts, response_length, name):
    """UserError where an answer, tokenised again as part of a prompt, is longer than `check` could foresee."""
    limit = getattr(model.config, "max_position_embeddings", None)
    longest = max(map(len, prompts)) + response_length
    if limit and longest > limit:
        raise UserError(
            f"benchmark {name}: a conversation needs {longest} tokens, the model holds {limit}; lower lengths.response"
        )
