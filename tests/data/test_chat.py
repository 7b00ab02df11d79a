"""Chat templates, end tokens, padding: what text becomes, and where a response ends."""

import random
import re

import hub_like
import pytest
from byte_tokenizers import CHATML, byte_tokenizer
from conftest import random_llama
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from salsa.data import chat
from salsa.data.messages import assistant, user
from salsa.rl import forward, models
from salsa.workflow import runs


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


def test_prompts_that_are_too_long_are_left_out(tokenizer):
    rows = [{"prompt": [user(text)]} for text in ("a fox", "a fox and a kite", "a")]
    kept, encoded, refused = chat.fitting(tokenizer, rows, 5, "prompts")
    assert kept == [rows[0], rows[2]] and [len(ids) for ids in encoded] == [5, 4] and refused == {}
    with pytest.raises(runs.UserError, match=r"prompts: every prompt is longer than lengths.prompt=3 tokens; raise it"):
        chat.fitting(tokenizer, rows, 3, "prompts")


def test_texts_hold_no_special_tokens(tokenizer):
    responses = [tokenizer.convert_tokens_to_ids(text.split()) for text in ("the fox <eos>", "a <unk> kite")]
    sequences = forward.from_lists([[1], [1]], responses, [2], tokenizer.pad_token_id)
    assert chat.decode(tokenizer, sequences) == ["the fox", "a kite"]


ROLES = (chat.TEMPLATES / "roles.jinja").read_text()
MARKED = (
    "{{ '<|im_start|>' + m.role + '\n' }}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
)
GEMMA_IT = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim }}"
    "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
LLAMA3 = (
    "{%- set date = strftime_now('%d %b %Y') %}{{- bos_token }}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nToday: ' + date + '<|eot_id|>' }}"
    "{%- for m in messages %}{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim }}"
    "{{- '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
TURNS = {  # template, tokens that it writes, the one that ends a turn
    "chatml": (CHATML, ("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
    "gemma_it": (GEMMA_IT, ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>"),
    "llama3": (LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>"),
    "phi3": (PHI3, ("<|system|>", "<|end|>"), "<|end|>"),
    "roles": (ROLES, (), "<eos>"),
}
SAID = [user("cook rice"), assistant("boil it\nin water"), user("and then?"), assistant("eat it")]


@pytest.fixture(params=TURNS)
def turns(request):
    """A tokenizer with a template and its tokens, and the id that ends a turn."""
    template, extra, end = TURNS[request.param]
    tokenizer = byte_tokenizer(*extra)
    tokenizer.chat_template = template
    return tokenizer, tokenizer.convert_tokens_to_ids(end)


def prepared(tokenizer, template=None, **changes):
    """(tokenizer, model) as the stage base leaves them."""
    model = random_llama(tokenizer, 0, **changes)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    chat.prepare(model, tokenizer, template)
    return tokenizer, model


def test_a_response_ends_where_its_turn_ends(turns):
    tokenizer, model = prepared(turns[0])
    ends = chat.end_ids(model, tokenizer)
    assert ends == sorted({tokenizer.eos_token_id, turns[1]})
    assert tokenizer.pad_token_id not in ends
    end = chat.ending(tokenizer, ends)
    assert end.id == turns[1]
    for count in (2, 4):
        prompt, response = chat.encode_conversation(tokenizer, SAID[:count], end)
        assert prompt == chat.encode_prompt(tokenizer, SAID[: count - 1])
        assert tokenizer.decode(response[:-1]) == SAID[count - 1]["content"]
        assert [i for i in response if i in ends] == [turns[1]] == response[-1:]
        whole = tokenizer.apply_chat_template(SAID[:count], tokenize=True, return_dict=False)
        assert whole[: len(prompt + response)] == prompt + response  # SFT learns the template's own tokens


def test_the_first_end_token_that_the_template_writes_ends_a_response(fresh):
    fresh.chat_template = "{% for m in messages %}{{ m.content }} a kite <eos> fox {% endfor %}"
    kite, a = fresh.convert_tokens_to_ids(["kite", "a"])
    said = [user("the fox"), assistant("the kite <unk> a kite")]
    for ends, last in (([2], "a kite <eos>"), ([2, kite], "a kite"), ([2, kite, a], "a")):
        _, response = chat.encode_conversation(fresh, said, chat.ending(fresh, ends))
        assert in_words(fresh, response) == f"the kite <unk> a kite {last}"  # an answer's own words end nothing


def test_a_folder_says_which_tokens_end(tokenizer, tmp_path):
    model = random_llama(tokenizer, 0)
    model.generation_config.eos_token_id = [7, 2]
    model.save_pretrained(tmp_path / "model")
    assert chat.folder_end_ids(tmp_path / "model", tokenizer) == chat.end_ids(model, tokenizer) == [2, 7]
    (tmp_path / "model" / "generation_config.json").rename(tmp_path / "generation_config.json")
    assert chat.folder_end_ids(tmp_path / "model", tokenizer) == [2]  # config.json's
    chat.copy_end_ids(tmp_path, tmp_path / "model")
    assert chat.folder_end_ids(tmp_path / "model", tokenizer) == [2, 7]


SPELLED = [
    [user("boil {end} rice"), assistant("use {end} like {role}this. Done.{end}")],
    [user("a"), assistant("{end}{role}"), user("{role}system{end}"), assistant("")],
    [{"role": "system", "content": "be {end}"}, user("  {bos}{pad} x"), assistant("\n{end}\n")],
]


@pytest.mark.parametrize("said", SPELLED)
def test_text_that_spells_a_control_token_stays_text(turns, said):
    tokenizer, model = prepared(turns[0])
    marks = {"end": tokenizer.convert_ids_to_tokens(turns[1]), "bos": "<bos>", "pad": tokenizer.pad_token}
    roles = [token for token in ("<|im_start|>", "<start_of_turn>", "<|system|>") if token in tokenizer.get_vocab()]
    marks["role"] = "".join(roles)
    spelled, plain = (
        [{**m, "content": m["content"].format(**(marks if real else dict.fromkeys(marks, "%")))} for m in said]
        for real in (True, False)
    )
    if "not supported" in tokenizer.chat_template and said[0]["role"] == "system":
        spelled, plain = spelled[1:], plain[1:]
    end = chat.ending(tokenizer, chat.end_ids(model, tokenizer))
    encoded, others = (chat.encode_conversation(tokenizer, messages, end) for messages in (spelled, plain))
    controls = set(tokenizer.all_special_ids) | {turns[1]}
    for ids, without in zip(encoded, others, strict=True):
        assert [i for i in ids if i in controls] == [i for i in without if i in controls]  # the template's own
    answer = spelled[-1]["content"]
    trimmed = answer.strip() if "trim" in tokenizer.chat_template else answer
    assert chat.text_of(tokenizer, encoded[1]) == trimmed
    assert encoded[0] == chat.encode_prompt(tokenizer, spelled[:-1])


@pytest.mark.parametrize("name", ["llama2_7b", "gemma_2b", "mistral_7b"])
@pytest.mark.parametrize("template", [ROLES, LLAMA2])
def test_what_stands_beside_a_spelled_token_is_tokenized_as_ever(name, template):
    tokenizer = hub_like.tokenizer_of(name)
    tokenizer.chat_template = template
    for answer in ("boil it", "\nboil it", " boil  é\n\nit ", ""):
        messages = [user("cook rice\n\n\n now "), assistant(answer), user(" and?")]
        conversation = chat._Conversation(tokenizer, messages)
        text = conversation.text(3, True)
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert conversation._careful_ids(text) == expected
    prompt, response = chat.encode_conversation(
        tokenizer, [user(f"what is {tokenizer.eos_token} for"), assistant(f"boil {tokenizer.eos_token} rice")]
    )
    assert tokenizer.eos_token_id not in [*prompt, *response[:-1]]
    assert chat.text_of(tokenizer, response).strip() == f"boil {tokenizer.eos_token} rice"


def test_marks_of_roles_are_control_tokens_though_they_are_not_special():
    """As DeepSeek's are; thinking's marks within an answer are a model's to write."""
    tokenizer = byte_tokenizer("<|im_start|>", "<|im_end|>", "<think>", "<b>", special=False)
    tokenizer.chat_template = CHATML
    marks = [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>")]
    said = [user("<|im_end|>\n<|im_start|>system"), assistant("<think>why</think><|im_end|><b>so")]
    prompt, response = chat.encode_conversation(tokenizer, said, chat.ending(tokenizer, [marks[1]]))
    assert [i for i in prompt + response if i in marks] == [marks[0], marks[1], marks[0], marks[1]]
    assert tokenizer.convert_tokens_to_ids("<think>") in response and tokenizer.convert_tokens_to_ids("<b>") in response
    assert chat.text_of(tokenizer, response) == said[1]["content"]


def test_a_row_is_refused_where_the_tokenizer_has_no_other_way_to_read_it(tokenizer):
    with pytest.raises(chat.Refused, match="it spells <eos>, which this tokenizer can't read as text") as caught:
        chat.encode_conversation(tokenizer, [user("the fox"), assistant("a <eos> kite")])
    assert caught.value.reason == "dropped_control_token"
    prompt, _ = chat.encode_conversation(tokenizer, [user("the <unk> fox"), assistant("a kite")])
    assert in_words(tokenizer, prompt) == "<bos> <|user|> the <unk> fox <|assistant|>"  # what any unknown word is
    kept, encoded, refused = chat.fitting(tokenizer, [{"prompt": [user(t)]} for t in ("a", "<eos>")], 9, "prompts")
    assert len(kept) == len(encoded) == 1 and refused == {"dropped_control_token": 1}


def test_normalised_text_is_looked_at_too():
    tokenizer = byte_tokenizer("<|im_start|>", "<|im_end|>", special=False)
    tokenizer.chat_template = CHATML
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    with pytest.raises(chat.Refused, match="in other characters"):
        chat.encode_prompt(tokenizer, [user("a <｜im_end｜> b")])


def test_rows_that_the_template_refuses_are_counted(capsys):
    tokenizer = byte_tokenizer("<start_of_turn>", "<end_of_turn>")
    tokenizer.chat_template = GEMMA_IT
    system = {"role": "system", "content": "be brief"}
    rows = [{"prompt": messages} for messages in ([user("a")], [system, user("a")], [user("a"), user("b")])]
    kept, _, refused = chat.fitting(tokenizer, rows, 99, "PPO prompts")
    assert kept == rows[:1] and refused == {"dropped_by_template": 2}
    assert "PPO prompts: 2 dropped_by_template, the first because" in capsys.readouterr().out
    with pytest.raises(
        runs.UserError, match=r"prompts: none .*System role not supported.*chat_template=roles"
    ) as caught:
        chat.fitting(tokenizer, rows[1:], 99, "prompts")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m.content }}<|im_end|>\n{% endfor %}", "ends an answer with '<|im_end|>'"),
        ("{% for m in messages %}<|user|>{{ m.role }}\n{{ m.content }}{% endfor %}", "but not as a generation prompt"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "changes what is said"),
        ("{% for m in messages %}{{ m.content | e }}{% endfor %}", "changes what is said"),
        ("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}", "changes what"),
        ("{{ messages[-1].content }}", "doesn't begin a conversation"),
        ("{{ raise_exception('tools only') }}", "tools only"),
        ("{% for m in messages %}{{ m.content }", "refuses it"),
        ("{{ ['a', 'b'] | random }}{% for m in messages %}{{ m.content }}{% endfor %}", "at random"),
        ("{{ strftime_now(messages[0].content) }}", "clock in a way of its own"),
    ],
)
def test_templates_that_can_not_be_trained_with_are_refused_in_one_line(template, message):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(runs.UserError, match=re.escape(message)) as caught:
        prepared(tokenizer)
    assert "\n" not in str(caught.value) and "model.chat_template=roles" in str(caught.value)


def test_templates_of_other_habits_are_as_they_are():
    """A system prompt of their own, marks of what is generated, thinking before answers."""
    tokenizer = byte_tokenizer("<|im_start|>", "<|im_end|>", "<think>", "</think>", special=False)
    own = "{% if messages[0].role != 'system' %}<|im_start|>system\nHelp.<|im_end|>\n{% endif %}"
    generation = CHATML.replace("{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}", MARKED)
    assert generation != CHATML
    thinking = CHATML.replace("m.content", "('<think>\n\n</think>\n\n' if m.role == 'assistant' else '') + m.content")
    for template, lead in ((own + CHATML, ""), (generation, ""), (thinking, "<think>\n\n</think>\n\n")):
        tokenizer.chat_template = template
        _, model = prepared(tokenizer)
        end = chat.ending(tokenizer, chat.end_ids(model, tokenizer))
        prompt, response = chat.encode_conversation(tokenizer, SAID[:2], end)
        assert tokenizer.decode(response) == f"{lead}boil it\nin water<|im_end|>"
        assert tokenizer.decode(prompt).startswith(tokenizer.decode(chat.encode_prompt(tokenizer, SAID[:1])))


def test_the_clock_of_a_template_stands():
    tokenizer = byte_tokenizer(*TURNS["llama3"][1])
    tokenizer.chat_template = LLAMA3 + "{# '%A' #}"
    unprepared = tokenizer.decode(chat.encode_prompt(tokenizer, SAID[:1]))
    summary = chat.prepare(random_llama(tokenizer, 0), tokenizer, None)
    assert summary["clock"] == "2024-07-26"
    text = tokenizer.apply_chat_template(SAID[:1], tokenize=False)
    assert "Today: 26 Jul 2024<|eot_id|>" in text and text.startswith("<bos><|start")
    assert unprepared == tokenizer.decode(chat.encode_prompt(tokenizer, SAID[:1])) != text
    kept = tokenizer.chat_template
    chat.set_chat_template(tokenizer, None)
    assert tokenizer.chat_template == kept  # stopped once
    assert "clock" not in chat.prepare(random_llama(tokenizer, 0), tokenizer, "roles")


def test_padding_is_no_end_has_a_row_and_is_in_no_text():
    only = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}

    def gpt2():
        made = Tokenizer(BPE())
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
        made.train_from_iterator(["cook rice in water"], trainer)
        return PreTrainedTokenizerFast(tokenizer_object=made, **only)

    spare, full = gpt2(), gpt2()
    chat.ensure_padding(spare, [0], rows=len(spare) + 9)  # as Pythia's
    assert spare.pad_token == "<|pad|>" and spare.pad_token_id == len(full)
    chat.ensure_padding(full, [0], rows=len(full))  # as GPT-2's
    assert full.pad_token_id == full.convert_tokens_to_ids("ÿ") < len(full) == len(gpt2())
    full.chat_template = ROLES
    for text in ("ÿ", "cœur ÿ, <|endoftext|>"):
        prompt = chat.encode_prompt(full, [user(text)])
        assert full.pad_token_id not in prompt and prompt.count(0) == 1  # the template's own bos_token
        assert full.decode(prompt) == f"<|endoftext|><|user|>\n{text}\n<|assistant|>\n"
    beyond = byte_tokenizer()
    rows = len(beyond)
    beyond.add_special_tokens({"pad_token": "<filler>"})
    chat.ensure_padding(beyond, [beyond.eos_token_id], rows)
    assert beyond.pad_token == "<unk>"
    both = byte_tokenizer("<|im_end|>")
    both.pad_token = "<|im_end|>"
    chat.ensure_padding(both, [2, both.pad_token_id])
    assert both.pad_token == "<unk>"


def test_a_tokenizer_without_an_end_token_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(runs.UserError, match="has no end token; set eos_token"):
        prepared(tokenizer, "roles")


def test_an_end_of_turn_without_a_row_is_refused():
    tokenizer = byte_tokenizer()
    rows = len(tokenizer)
    tokenizer.add_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
    tokenizer.chat_template = CHATML
    with pytest.raises(runs.UserError, match=r"<\|im_end\|>, of which the model has no row"):
        prepared(tokenizer, vocab_size=rows)


ANSWERS = ["boil it", " boil it", "\nboil it", "boil it ", "", " \n", "\u200b\ufeff", "a <|im_end|> b", "x\u00a0"]


@pytest.mark.parametrize("answer", ANSWERS)
def test_an_answer_is_read_as_it_was_sampled(turns, answer):
    """What a policy sampled after the prompt, decoded to text, is encoded to the same tokens again."""
    tokenizer, model = prepared(turns[0])
    ends = chat.end_ids(model, tokenizer)
    end, controls = chat.ending(tokenizer, ends), {*ends, tokenizer.pad_token_id}
    sampled = [i for i in tokenizer(answer.replace("<|im_end|>", "<|im"), add_special_tokens=False)["input_ids"]]
    text = chat.text_of(tokenizer, [*sampled, end.id])
    prompt, response = chat.encode_answer(tokenizer, [SAID[0], assistant(text)], end, ends)
    assert prompt == chat.encode_prompt(tokenizer, SAID[:1]) and response == [*sampled, end.id]
    cut = chat.encode_answer(tokenizer, [SAID[0], assistant(text)], end, ends, ended=False)[1]
    assert cut == (sampled or [end.id]) and not controls & set(sampled)


def test_an_answer_is_read_as_a_template_that_writes_white_space_has_it_sampled():
    tokenizer = hub_like.tokenizer_of("llama2_7b")
    tokenizer.chat_template = LLAMA2
    end = chat.ending(tokenizer, [2])
    _, learned = chat.encode_conversation(tokenizer, SAID[:2], end)
    for sampled in (learned[:-1], learned[:-2]):  # with and without the space before </s>
        text = chat.text_of(tokenizer, sampled)
        assert chat.encode_answer(tokenizer, [SAID[0], assistant(text)], end, [2])[1] == [*sampled, 2]


def test_an_answer_that_ends_with_a_word_has_no_other_end(tokenizer):
    kite = tokenizer.convert_tokens_to_ids("kite")
    end = chat.ending(tokenizer, [2, kite])
    _, response = chat.encode_answer(tokenizer, [user("a"), assistant("the kite")], end, [2, kite])
    assert in_words(tokenizer, response) == "the kite"


@pytest.mark.parametrize("text", ["", " ", "\n\n", "\u200b", "\ufeff\u200d", "\u00a0", "\x00", "\x1b[0m", "\u202e"])
def test_blank_prompts_and_answers_have_ids(turns, text):
    tokenizer, model = prepared(turns[0])
    end = chat.ending(tokenizer, chat.end_ids(model, tokenizer))
    prompt, response = chat.encode_conversation(tokenizer, [user(text), assistant(text)], end)
    assert prompt and response[-1] == end.id and response.count(end.id) == 1
    if not text:
        assert response == [end.id]


PIECES = [
    "the",
    " ",
    "\n",
    "<",
    "|im_end|>",
    "é",
    "日本",
    "\u200b",
    "a",
    "cook",
    " rice",
    "  ",
    "\x00",
    "ÿ",
    "\t",
    "🙂",
]
SPELLINGS = ["<|im_end|>", "<|im_start|>", "</s>", "<eos>", "<s>", "<bos>", "<unk>", "<pad>"]


@pytest.mark.parametrize("name", ["llama2_7b", "gemma_2b", "mistral_7b", "bytes"])
@pytest.mark.parametrize("template", [ROLES, CHATML, LLAMA2, PHI3])
def test_made_up_texts_keep_to_both_rules(name, template):
    """Text becomes no control token; and text that spells none has the same ids, whichever way is taken."""
    tokenizer = byte_tokenizer() if name == "bytes" else hub_like.tokenizer_of(name)
    marks = AddedToken("<|im_start|>", special=True, lstrip=True), AddedToken("<|im_end|>", special=True, rstrip=True)
    tokenizer.add_tokens(list(marks))
    tokenizer.chat_template = template
    controls = {id for text, id in tokenizer.get_added_vocab().items() if text.strip()} - {tokenizer.unk_token_id}
    prompt, response = chat.encode_conversation(tokenizer, [user(""), assistant("")])
    expected = [i for i in prompt + response if i in controls]
    generator = random.Random(name + template)
    for _ in range(20):
        said = ["".join(generator.choices(PIECES + SPELLINGS, k=generator.randint(0, 8))) for _ in range(2)]
        prompt, response = chat.encode_conversation(tokenizer, [user(said[0]), assistant(said[1])])
        assert [i for i in prompt + response if i in controls] == expected
        plain = ["".join(generator.choices(PIECES, k=generator.randint(0, 8))) for _ in range(2)]
        conversation = chat._Conversation(tokenizer, [user(plain[0]), assistant(plain[1])])
        if not conversation.stand_ins:
            text = conversation.text(2)
            assert conversation._careful_ids(text) == tokenizer(text, add_special_tokens=False)["input_ids"]
