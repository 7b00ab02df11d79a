"""Chat templates: from conversations to token ids, and from token ids of responses to text.

Two facts have their place here. Which token ends a response: the first of the model's end ids that its template writes
after an answer (`ending`); SFT and reward models learn up to it, sampling stops at it, judges read up to it. And which
token is a control token: one that the template writes, never one that a user, a data row or a policy spells. Text that
spells one is tokenized as text, or its row is refused.

Left out: loading models and tokenizers (rl/models.py), and sampling (rl/rollout.py).
"""

import collections
import contextlib
import datetime
import functools
import json
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import jinja2
from tokenizers import Tokenizer

from salsa.data.messages import assistant, user
from salsa.workflow import runs
from salsa.workflow.messages import UserError

TEMPLATES = Path(__file__).parent / "templates"
REMEDY = "set model.chat_template=roles"
CLOCK = datetime.datetime(2024, 7, 26)  # the time for any template that asks; Llama 3.1's own fallback
# A template that can be used changes neither of these texts.
QUESTION, ANSWER = 'Which  words,\n\n<b>&"these" é', 'Two  words,\n\n<b>&"quoted" é'
PADDING = "<|pad|>"
GENERATION_CONFIG = "generation_config.json"
NO_TEXT = "ÿ"  # how byte-level vocabularies write the byte 0xFF, which no text in UTF-8 has
# The first private characters for control tokens that contents spell, and for control tokens that templates write.
STAND_INS, ALIASES = 0xF0000, 0x100000


class Refused(UserError):
    """A conversation that can't become token ids. `reason` is its name in a stage's counts."""

    def __init__(self, reason, message):
        super().__init__(message)
        self.reason = reason


class Ending(NamedTuple):
    """How an answer ends: the end token's id, and how often the template writes it after an answer (0: never)."""

    id: int
    times: int


def prepare(network, tokenizer, name):
    """Set a base model's tokenizer and generation configuration for all later stages.

    They get the template `name` (None: their own) with a fixed clock, the end token of the template's turns among the
    end ids, and a padding token. Returns facts for the record: the end tokens, the padding token, the clock.

    Raises UserError for a tokenizer without an end token, and for a template that can't be trained with.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the model's tokenizer has no end token; set eos_token in its tokenizer_config.json")
    set_chat_template(tokenizer, name)
    rows = network.get_input_embeddings().weight.shape[0]
    ends, (words, turn_end) = end_ids(network, tokenizer), _turn_end(tokenizer)
    if words:  # a policy would spell them, and judges would read them
        raise UserError(
            f"the chat template ends an answer with {words[:40]!r}, which is no token of the tokenizer; {REMEDY}"
        )
    if turn_end is not None and turn_end not in ends:
        ends = sorted([*ends, turn_end])
        network.generation_config.eos_token_id = ends
    last = ending(tokenizer, ends).id
    if last >= rows:
        token = tokenizer.convert_ids_to_tokens(last)
        raise UserError(f"the chat template ends a turn with {token}, of which the model has no row; {REMEDY}")
    ensure_padding(tokenizer, ends, rows)
    summary = {"end_tokens": tokenizer.convert_ids_to_tokens(ends), "pad_token": tokenizer.pad_token}
    if CLOCK_NAME in tokenizer.chat_template:
        summary["clock"] = CLOCK.date().isoformat()
    return summary


def set_chat_template(tokenizer, name):
    """Give the tokenizer the template `name` of salsa/data/templates, or None to keep its own, with a fixed clock.

    Raises UserError where there is no such template.
    """
    if name is not None:
        path = TEMPLATES / f"{name}.jinja"
        if not path.is_file():
            names = ", ".join(sorted(p.stem for p in TEMPLATES.glob("*.jinja")))
            raise UserError(f"model.chat_template={name}: no such template; there are {names}")
        tokenizer.chat_template = path.read_text()
    if isinstance(tokenizer.chat_template, dict):  # several, by name
        tokenizer.chat_template = tokenizer.chat_template.get("default")
    if not tokenizer.chat_template:
        raise UserError(f"the model's tokenizer has no chat template; {REMEDY}")
    if re.search(r"\|\s*random\b|\blipsum\s*\(", tokenizer.chat_template):
        raise UserError(f"the chat template draws at random, so a study could not be repeated; {REMEDY}")
    tokenizer.chat_template = _stop_clock(tokenizer.chat_template)


CLOCK_NAME = "strftime_now"  # the only way in which transformers' templates read the clock
STOPPED = "{%- macro " + CLOCK_NAME


@functools.lru_cache(maxsize=8)
def _stop_clock(template):
    """The template with `CLOCK` as the time, so that prompts are the same on every day."""
    if CLOCK_NAME not in template or template.startswith(STOPPED):
        return template
    try:
        strings = [value[1:-1] for _, kind, value in jinja2.Environment().lex(template) if kind == "string"]
    except jinja2.TemplateError as error:
        raise UserError(f"the chat template can't be read ({error}); {REMEDY}") from None
    formats = [text for text in dict.fromkeys(strings) if "%" in text]
    cases = "".join(
        f"{{%- elif format == '{text}' -%}}{{{{ '{CLOCK.strftime(text)}' }}}}" for text in formats if "'" not in text
    )
    unknown = "{{ raise_exception('it reads the clock in a way of its own') }}"
    body = f"{{%- if false -%}}{cases}{{%- else -%}}{unknown}{{%- endif -%}}"
    return f"{STOPPED}(format) -%}}{body}{{%- endmacro +%}}{template}"  # +: keeps a newline that follows


def ensure_padding(tokenizer, ends=(), rows=None):
    """Give the tokenizer a padding token that ends no response: classifiers look for the last token that is not pad.

    Args:
        ends: the model's end ids.
        rows: number of tokens that the model has embeddings of; None where it is unknown.

    It is another special token if there is one, else a new token if the model has a row to spare, else one that no text
    has.
    """

    def pads(id):
        return id is not None and id not in ends and id != tokenizer.eos_token_id and (rows is None or id < rows)

    if pads(tokenizer.pad_token_id):
        return
    for token in [tokenizer.unk_token, tokenizer.bos_token, *tokenizer.all_special_tokens]:
        if token is not None and pads(tokenizer.convert_tokens_to_ids(token)):
            tokenizer.pad_token = token
            return
    vocabulary = tokenizer.get_vocab()
    if rows is not None and max(vocabulary.values()) + 1 < rows:
        tokenizer.add_special_tokens({"pad_token": PADDING})
    elif NO_TEXT in vocabulary and vocabulary[NO_TEXT] not in _plain_ids(tokenizer, NO_TEXT):
        tokenizer.pad_token = NO_TEXT
    else:
        raise UserError("the tokenizer has no special token beside its end token that could pad; add one to it")


def end_ids(model, tokenizer):
    """Every token id that ends a response: the tokenizer's and all of the model's generation configuration."""
    return _end_ids(getattr(model.generation_config, "eos_token_id", None), tokenizer)


def folder_end_ids(folder, tokenizer):
    """`end_ids` of the model in a folder, without loading it."""
    names = (GENERATION_CONFIG, "config.json")  # the second is used without the first, as in transformers
    path = next(folder / name for name in names if (folder / name).is_file())
    return _end_ids(runs.read_json(path).get("eos_token_id"), tokenizer)


def copy_end_ids(source, target):
    """Give a classifier's folder (`target`), which has none, the end ids of its policy's folder (`source`)."""
    if (source / GENERATION_CONFIG).is_file():
        shutil.copyfile(source / GENERATION_CONFIG, target / GENERATION_CONFIG)


def _end_ids(configured, tokenizer):
    configured = configured if isinstance(configured, list) else [configured]
    return sorted({i for i in [tokenizer.eos_token_id, *configured] if i is not None})


def ending(tokenizer, ends):
    """The `Ending` of every response: the first of the end ids `ends` that the template writes after an answer.

    Where it writes none of them, the tokenizer's end token is appended. Raises UserError for a template that can't be
    trained with.
    """
    after = _plain_ids(tokenizer, _around_answer(tokenizer)[1])
    for token in after:
        if token in ends:
            return Ending(token, after.count(token))
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end token; set eos_token in its tokenizer_config.json")
    return Ending(tokenizer.eos_token_id, 0)


def _turn_end(tokenizer):
    """The words that the template writes directly after an answer, and the id of the token that follows (or None)."""
    after = _around_answer(tokenizer)[1]
    tokens = [token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip()]
    first = re.search(_any_of(tokens), after)
    words = after[: first.start()] if first else after
    return words.strip(), tokenizer.convert_tokens_to_ids(first.group()) if first else None


def _around_answer(tokenizer):
    """The text between the prompt and an answer, and the text after it. UserError for a template that can't be used."""
    question = [user(QUESTION)]
    try:
        before, whole = _render(tokenizer, question, True), _render(tokenizer, [*question, assistant(ANSWER)])
    except Refused as refused:
        raise UserError(f"a question with its answer: {refused}; {REMEDY}") from None
    if not whole.startswith(before):
        raise UserError(f"the chat template doesn't begin a conversation with its generation prompt; {REMEDY}")
    lead, answer, after = whole.removeprefix(before).partition(ANSWER)
    if not answer or QUESTION not in before:
        raise UserError(f"the chat template changes what is said, beyond white space around it; {REMEDY}")
    # Marks of thinking may stand before an answer: a policy then writes them, too.
    marks = [token.content for token in tokenizer.added_tokens_decoder.values() if not token.special]
    if re.sub(_any_of(marks), "", lead).strip():
        raise UserError(
            f"the chat template writes {lead.strip()[:40]!r} before an answer, but not as a generation prompt; {REMEDY}"
        )
    return lead, after


def _any_of(tokens):
    """A pattern for any of the tokens that matches as tokenizers do: the first, and at its place the longest."""
    return "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)"


def _plain_ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _render(tokenizer, messages, generation=False):
    """The text of a conversation, with `generation` up to where an answer begins. Refused if the template refuses."""
    template = tokenizer.chat_template
    # The tokenizer of a folder that a user gives has not been through `prepare`.
    stopped = {"chat_template": _stop_clock(template)} if isinstance(template, str) else {}
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=generation, tokenize=False, **stopped)
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise Refused("dropped_by_template", f"the chat template refuses it ({reason})") from None


class _Controls(NamedTuple):
    """The tokens that no text may become: special ones, and those that the template writes between texts.

    Attributes:
        ids: text of each -> id.
        marks: ids of those that are not special.
        normalised: texts of those that the tokenizer looks for in normalised text.
    """

    ids: dict
    marks: frozenset
    normalised: tuple


def _controls(tokenizer):
    return _controls_of(tokenizer, str(tokenizer.chat_template), tuple(tokenizer.all_special_tokens), len(tokenizer))


@functools.lru_cache(maxsize=8)
def _controls_of(tokenizer, template, special, size):
    added = {
        token.content: (id, token) for id, token in tokenizer.added_tokens_decoder.items() if token.content.strip()
    }
    written = ""
    for messages in ([user("")], [user(""), assistant(""), user("")], [{"role": "system", "content": ""}, user("")]):
        with contextlib.suppress(Refused):  # rows of this form are refused, too
            written += _render(tokenizer, messages) + "\n"
    between = set(re.findall(_any_of(added), written))
    ids = {text: id for text, (id, token) in added.items() if token.special or text in between or text in special}
    return _Controls(
        ids,
        frozenset(id for text, id in ids.items() if not added[text][1].special and text not in special),
        tuple(text for text in ids if added[text][1].normalized),
    )


class _Conversation:
    """Messages on their way to token ids.

    Where no message spells a control token the template's text is tokenized as it is. Otherwise a private character
    stands in for each control token that is spelled: all that then look like control tokens are the template's.
    """

    def __init__(self, tokenizer, messages):
        self.tokenizer, self.messages = tokenizer, messages
        self.stand_ins = {}  # private character -> the text that it stands for
        contents = "\0".join(m["content"] for m in messages if isinstance(m.get("content"), str))
        try:
            contents.encode()
        except UnicodeEncodeError:
            raise Refused("dropped_half_surrogate", "it holds half a surrogate pair, which is no text") from None
        self.controls = _controls(tokenizer)
        spelled = [token for token in self.controls.ids if token in contents]
        if not spelled:
            self._check_normalised(contents)
            return
        if re.search(f"[{chr(STAND_INS)}-\U0010ffff]", contents):
            raise Refused("dropped_control_token", "it has private characters beside control tokens")
        self.stand_ins = {chr(STAND_INS + place): text for place, text in enumerate(spelled)}
        private = {text: character for character, text in self.stand_ins.items()}
        pattern = re.compile(_any_of(spelled))
        self.messages = [
            {**m, "content": pattern.sub(lambda match: private[match.group()], m["content"])}
            if isinstance(m.get("content"), str)
            else m
            for m in messages
        ]

    def _check_normalised(self, contents):
        """Raise Refused where only the tokenizer's normalisation turns text into a control token."""
        tokens, backend = self.controls.normalised, getattr(self.tokenizer, "backend_tokenizer", None)
        normalizer = backend.normalizer if backend and tokens else None
        normalised = normalizer.normalize_str(contents) if normalizer else ""
        if any(token in normalised for token in tokens):
            raise Refused("dropped_control_token", "it spells a control token in other characters")

    def text(self, count, generation=False):
        """The template's text of the first `count` messages."""
        return _render(self.tokenizer, self.messages[:count], generation)

    def ids(self, text):
        """Token ids of (a part of) the template's text."""
        return self._careful_ids(text) if self.stand_ins else _plain_ids(self.tokenizer, text)

    def _careful_ids(self, text):
        """Token ids of text with stand-ins, where the words that these stand for become tokens of text."""
        backend, aliases, ids = _aliased(self.tokenizer, tuple(self.controls.ids), len(self.tokenizer))
        text = re.sub(_any_of(aliases), lambda match: aliases[match.group()], text)
        written = sum(map(text.count, aliases.values()))
        for character, spelled in self.stand_ins.items():
            text = text.replace(character, spelled)
        tokens = backend.encode(text, add_special_tokens=False).ids
        controls = set(self.controls.ids.values()) - {self.tokenizer.unk_token_id}
        alias_ids = {backend.token_to_id(alias) for alias in aliases.values()}
        if any(token not in ids and token in controls for token in tokens) or written != sum(
            token in alias_ids for token in tokens
        ):
            words = ", ".join(self.stand_ins.values())
            raise Refused("dropped_control_token", f"it spells {words}, which this tokenizer can't read as text")
        return [ids.get(token, token) for token in tokens]


@functools.lru_cache(maxsize=2)
def _aliased(tokenizer, controls, size):
    """A tokenizer that reads the spelling of a control token as text, and a private character as the token.

    Returns (a `tokenizers.Tokenizer`, spelling -> private character, its ids of added tokens -> the tokenizer's ids).
    Raises Refused where the tokenizer has no such backend.
    """
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        name = type(tokenizer).__name__
        raise Refused("dropped_control_token", f"it spells a control token, which a {name} can't read as text")
    state, aliases = json.loads(tokenizer.backend_tokenizer.to_str()), {}
    for token in state["added_tokens"]:
        if token["content"] in controls:
            aliases[token["content"]] = token["content"] = chr(ALIASES + len(aliases))
    backend = Tokenizer.from_str(json.dumps(state | {"post_processor": None, "truncation": None, "padding": None}))
    return backend, aliases, {backend.token_to_id(token["content"]): token["id"] for token in state["added_tokens"]}


def encode_prompts(tokenizer, prompts):
    """Prompts (a list of chat messages each) as lists of token ids, ready for a response to follow. Raises Refused."""
    return [encode_prompt(tokenizer, prompt) for prompt in prompts]


def encode_prompt(tokenizer, messages):
    """Chat messages as token ids, ready for a response to follow. Raises Refused."""
    conversation = _Conversation(tokenizer, messages)
    return conversation.ids(conversation.text(len(messages), True))


def encode_conversation(tokenizer, messages, end=None):
    """Token ids of a conversation's prompt and of its last message, which ends with an end token.

    Text that the template writes after the end token is dropped: a response stops there. Raises Refused.

    Args:
        end: the `Ending`; None: that of a base model from `prepare` that had one end token.
    """
    end = end or ending(tokenizer, [tokenizer.eos_token_id, _turn_end(tokenizer)[1]])
    conversation = _Conversation(tokenizer, messages)
    before, whole = conversation.text(-1, True), conversation.text(len(messages))
    if not whole.startswith(before):
        raise Refused("dropped_by_template", "the chat template doesn't begin it with its generation prompt")
    prompt = conversation.ids(before)
    response = _ids_after(conversation, prompt, before, whole)
    # The template writes the last `end.times` end tokens; an answer may hold that token before them, as a word.
    places = [place for place, token in enumerate(response) if token == end.id]
    if 0 < end.times <= len(places):
        return prompt, response[: places[-end.times] + 1]
    return prompt, [*response, end.id]


def _ids_after(conversation, prompt, before, whole):
    """Token ids of the rest of the text `whole` after the text `before`, whose token ids are `prompt`.

    Gemma has tokens for runs of newlines, so an answer that begins with a newline would share one with the prompt. A
    policy, which gets the prompt alone, samples no such token.
    """
    ids = conversation.ids(whole)
    if ids[: len(prompt)] == prompt:
        return ids[len(prompt) :]
    return conversation.ids(whole.removeprefix(before))


def encode_answer(tokenizer, messages, end, ends, ended=True):
    """Token ids of a prompt and of a policy's answer to it (the last message), as near as the text can tell.

    A template may trim the answer or write white space around it, which the policy did not sample.

    Args:
        end: the `Ending` of responses.
        ends: all end ids of the model; an answer whose text ends with one gets no other.
        ended: whether the policy ended the answer; one that was cut gets no end token.
    """
    prompt, response = encode_conversation(tokenizer, messages, end)
    answer, whole = messages[-1]["content"], response[:-1]
    if text_of(tokenizer, whole) != answer:
        conversation = _Conversation(tokenizer, messages)
        before, content = conversation.text(-1, True), conversation.messages[-1]["content"]
        for lead in dict.fromkeys([_around_answer(tokenizer)[0], ""]):
            ids = _ids_after(conversation, prompt, before, before + lead + content)
            if text_of(tokenizer, ids) == answer:
                whole = ids
                break
    if ended and not (whole and whole[-1] in ends):
        whole = [*whole, end.id]
    return prompt, whole or [end.id]


def accepted(rows, encode):
    """The rows that `encode` turns into token ids, as (row, ids), and the `Refused` errors of the others."""
    pairs, refused = [], []
    for row in rows:
        try:
            pairs.append((row, encode(row)))
        except Refused as error:
            refused.append(error)
    return pairs, refused


def counted(refused, what):
    """The number of rows refused, by reason; prints them, with the first error of each reason."""
    counts = dict(collections.Counter(error.reason for error in refused))
    for reason, count in counts.items():
        first = next(error for error in refused if error.reason == reason)
        print(f"{what}: {count} {reason}, the first because {first}", flush=True)
    return counts


def fitting(tokenizer, rows, length, what, messages=lambda row: row["prompt"]):
    """The rows whose prompt the template accepts and that have at most `length` tokens.

    Args:
        what: a name of the rows, for messages.
        messages: row -> its messages.

    Returns (rows, lists of token ids, number of rows refused, by reason). UserError if no row is left.
    """
    pairs, refused = accepted(rows, lambda row: encode_prompt(tokenizer, messages(row)))
    kept = [(row, ids) for row, ids in pairs if len(ids) <= length]
    if not kept:
        raise UserError(
            f"{what}: none of the {len(rows)} rows is left{because(refused)}"
            if len(refused) == len(rows)
            else f"{what}: every prompt is longer than lengths.prompt={length} tokens; raise it{because(refused)}"
        )
    return [row for row, _ in kept], [ids for _, ids in kept], counted(refused, what)


def because(refused):
    """The end of an error's text: the number of rows refused, and why the first was."""
    if not refused:
        return ""
    return f"; {len(refused)} can't be encoded, the first because {refused[0]}: change the rows, or {REMEDY}"


def text_of(tokenizer, ids):
    """The text of a response, without control tokens."""
    marks = _controls(tokenizer).marks
    ids = [id for id in ids if id not in marks] if marks else ids
    return tokenizer.decode(ids, skip_special_tokens=True)


def decode(tokenizer, sequences):
    """Response texts, without control tokens."""
    return [text_of(tokenizer, ids) for ids in sequences.response_ids()]
