"""Chat templates, and what text becomes: token ids of prompts and conversations, and texts of responses.

Left out: loading models and tokenizers (models.py), and sampling (ppo/rollout.py).
"""

from pathlib import Path

from salsa import runs

TEMPLATES = Path(__file__).parent / "templates"


def set_chat_template(tokenizer, name):
    """Give the tokenizer the template `name` of salsa/templates; None keeps its own (UserError if it has none)."""
    if name is not None:
        path = TEMPLATES / f"{name}.jinja"
        if not path.is_file():
            known = ", ".join(sorted(p.stem for p in TEMPLATES.glob("*.jinja")))
            raise runs.UserError(f"model.chat_template={name}: no such template; there are {known}")
        tokenizer.chat_template = path.read_text()
    if not tokenizer.chat_template:
        raise runs.UserError("the model's tokenizer has no chat template; set model.chat_template=roles")


def ensure_padding(tokenizer):
    """Give the tokenizer a padding token that ends no response: classifiers look for the last token that is not pad."""
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    for token in [tokenizer.unk_token, tokenizer.bos_token, *tokenizer.all_special_tokens]:
        if token is not None and token != tokenizer.eos_token:
            tokenizer.pad_token = token
            return
    raise runs.UserError("the tokenizer has no special token beside its end token that could pad; add one to it")


def end_ids(model, tokenizer):
    """Every token id that ends a response: the tokenizer's and all of the model's generation configuration."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    configured = configured if isinstance(configured, list) else [configured]
    return sorted({i for i in [tokenizer.eos_token_id, *configured] if i is not None})


def encode_prompts(tokenizer, prompts):
    """Chat messages (a list a prompt) as lists of token ids, ready for a response to follow."""
    return [
        tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=False)
        for prompt in prompts
    ]


def encode_conversation(tokenizer, messages):
    """Token ids of a conversation's prompt and of its last message, which ends with an end token.

    What a template writes behind the last message's end token is dropped: a response stops there.
    """
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=True, return_dict=False)
    whole = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    response = whole[len(prompt) :] if whole[: len(prompt)] == prompt else _encode_behind(tokenizer, messages)
    end = tokenizer.eos_token_id
    response = response[: response.index(end) + 1] if end in response else [*response, end]
    return prompt, response


def _encode_behind(tokenizer, messages):
    """Token ids of what follows a conversation's generation prompt, where whole it has a token that spans both.

    Gemma has tokens for runs of newlines: an answer that begins with one would share it with the prompt. A policy,
    which is given the prompt alone, samples no such token.
    """
    before = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    if not whole.startswith(before):
        raise runs.UserError("the chat template doesn't begin a conversation with its generation prompt; set another")
    return tokenizer(whole.removeprefix(before), add_special_tokens=False)["input_ids"]


def within_length(rows, encoded, length, what):
    """The rows whose encoded prompt has at most `length` tokens, with their ids. UserError if none is left."""
    kept = [(row, ids) for row, ids in zip(rows, encoded, strict=True) if len(ids) <= length]
    if not kept:
        raise runs.UserError(f"{what}: every prompt is longer than lengths.prompt={length} tokens; raise it")
    return [row for row, _ in kept], [ids for _, ids in kept]


def decode(tokenizer, sequences):
    """Response texts, without special tokens."""
    texts = []
    for row, length in zip(sequences.responses.tolist(), sequences.lengths.tolist(), strict=True):
        texts.append(tokenizer.decode(row[:length], skip_special_tokens=True))
    return texts
