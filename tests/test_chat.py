"""Chat templates, end tokens, padding: what text becomes, and where a response ends."""

import pytest
from conftest import random_llama

from salsa import chat, forward, models, runs
from salsa.data import assistant, user


@pytest.fixture
def fresh(tokenizer, tmp_path):
    """A copy of the tokenizer that may be changed."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return models.load_tokenizer(tmp_path / "tokenizer")


def in_words(tokenizer, ids):
    return " ".join(tokenizer.convert_ids_to_tokens(ids))


def test_prompts_end_where_a_response_begins(tokenizer):
    messages = [user("write one sentence"), assistant("a fox"), user("now two")]
    found = chat.encode_prompts(tokenizer, [messages, messages[:1]])
    asked = "<bos> <|user|> write one sentence <|assistant|>"
    assert in_words(tokenizer, found[0]) == f"{asked} a fox <eos> <|user|> now two <|assistant|>"
    assert in_words(tokenizer, found[1]) == asked
    prompt, response = chat.encode_conversation(tokenizer, [*messages, assistant("the fox . the kite")])
    assert prompt == found[0]
    assert in_words(tokenizer, response) == "the fox . the kite <eos>"


def test_what_follows_the_end_token_is_no_response(fresh):
    fresh.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|> {{ m.content }} <eos> <unk>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|> {% endif %}"
    )
    _, response = chat.encode_conversation(fresh, [user("a"), assistant("fox")])
    assert fresh.convert_ids_to_tokens(response) == ["fox", "<eos>"]
    fresh.chat_template = fresh.chat_template.replace(" <eos> <unk>", "")
    _, response = chat.encode_conversation(fresh, [user("a"), assistant("fox")])
    assert fresh.convert_ids_to_tokens(response) == ["fox", "<eos>"]
    fresh.chat_template = (
        "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}fox{% endif %}"
    )
    with pytest.raises(runs.UserError, match="chat template"):
        chat.encode_conversation(fresh, [user("a"), assistant("kite")])


def test_chat_templates(fresh):
    with pytest.raises(runs.UserError, match=r"model.chat_template=none: .* plain, roles"):
        chat.set_chat_template(fresh, "none")
    chat.set_chat_template(fresh, None)  # its own
    fresh.chat_template = None
    with pytest.raises(runs.UserError, match=r"no chat template; set model.chat_template=roles"):
        chat.set_chat_template(fresh, None)
    chat.set_chat_template(fresh, "plain")
    assert fresh.convert_ids_to_tokens(chat.encode_prompts(fresh, [[user("the fox")]])[0]) == ["<bos>", "the", "fox"]


def test_padding_never_ends_a_response(fresh):
    chat.ensure_padding(fresh)
    assert fresh.pad_token == "<pad>"
    fresh.pad_token = fresh.eos_token
    chat.ensure_padding(fresh)
    assert fresh.pad_token == "<unk>"
    fresh.pad_token = None
    chat.ensure_padding(fresh)
    assert fresh.pad_token == "<unk>"


def test_every_end_token_counts(tokenizer):
    model = random_llama(tokenizer, 0)
    for configured, expected in ((None, [2]), (5, [2, 5]), ([9, 2, 7], [2, 7, 9])):
        model.generation_config.eos_token_id = configured
        assert chat.end_ids(model, tokenizer) == expected


def test_prompts_that_are_too_long_are_left_out():
    rows, encoded = chat.within_length("abc", [[1], [1, 2], [1, 2, 3]], 2, "prompts")
    assert (rows, encoded) == (["a", "b"], [[1], [1, 2]])
    with pytest.raises(runs.UserError, match=r"prompts: every prompt is longer than lengths.prompt=0"):
        chat.within_length("abc", [[1], [1, 2], [1, 2, 3]], 0, "prompts")


def test_texts_hold_no_special_tokens(tokenizer):
    responses = [tokenizer.convert_tokens_to_ids(text.split()) for text in ("the fox <eos>", "a <unk> kite")]
    sequences = forward.from_lists([[1], [1]], responses, [2], tokenizer.pad_token_id)
    assert chat.decode(tokenizer, sequences) == ["the fox", "a kite"]
