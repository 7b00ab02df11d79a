"""Chat templates, and what text becomes: token ids of prompts and conversations, and texts of responses.

Two facts have their place here. Which token ends a response: the first of the model's end ids that its template writes
after an answer (`ending`); SFT and reward models learn up to it, sampling stops at it, judges read up to it. And what
is a control token: what the template writes, never what a user, a data row or a policy spells. Text that spells one is
tokenized as text, or its row is refused.

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

TEMPLATES = Path(__file__).parent / "templates"
REMEDY = "set model.chat_template=roles"
CLOCK = datetime.datetime(2024, 7, 26)  # what a template reads that asks for the time; Llama 3.1's own fallback
QUESTION, ANSWER = 'Which  words,\n\n<b>&"these" é', 'Two  words,\n\n<b>&"quoted" é'  # a template must not change them
PADDING = "<|pad|>"
GENERATION_CONFIG = "generation_config.json"
NO_TEXT = "ÿ"  # how byte-level vocabularies write the byte 0xFF, which no text in UTF-8 has
STAND_INS, ALIASES = 0xF0000, 0x100000  # private characters: control tokens as contents spell them, as templates do


class Refused(runs.UserError):
    """A conversation that has no token ids. `reason` is its name in a stage's counts."""

    def __init__(self, reason, message):
        super().__init__(message)
        self.reason = reason


class Ending(NamedTuple):
    """How an answer ends: with which token, and how often the template writes that after an answer (0: never)."""

    id: int
    times: int


def prepare(network, tokenizer, name):
    """Make a base model's tokenizer and generation configuration say what all later stages go by.

    The template `name` (None: its own), its clock stopped; the end token of the template's own turns among the end
    ids; a token that pads. Returns what of it is worth a record: the end tokens, the pad token, the clock.

    Raises UserError for a tokenizer without an end token, and for a template that can't be trained with.
    """
    if tokenizer.eos_token_id is None:
        raise runs.UserError("the model's tokenizer has no end token; set eos_token in its tokenizer_config.json")
    set_chat_template(tokenizer, name)
    rows = network.get_input_embeddings().weight.shape[0]
    ends, (words, own) = end_ids(network, tokenizer), _turn_end(tokenizer)
    if words:  # which a policy would spell, and judges would read
        raise runs.UserError(
            f"the chat template ends an answer with {words[:40]!r}, which is no token of the tokenizer; {REMEDY}"
        )
    if own is not None and own not in ends:
        ends = sorted([*ends, own])
        network.generation_config.eos_token_id = ends
    last = ending(tokenizer, ends).id
    if last >= rows:
        token = tokenizer.convert_ids_to_tokens(last)
        raise runs.UserError(f"the chat template ends a turn with {token}, of which the model has no row; {REMEDY}")
    ensure_padding(tokenizer, ends, rows)
    summary = {"end_tokens": tokenizer.convert_ids_to_tokens(ends), "pad_token": tokenizer.pad_token}
    if CLOCK_NAME in tokenizer.chat_template:
        summary["clock"] = CLOCK.date().isoformat()
    return summary


def set_chat_template(tokenizer, name):
    """Give the tokenizer the template `name` of salsa/data/templates; None keeps its own, with its clock stopped.

    Raises UserError where there is none of that name, or none of its own.
    """
    if name is not None:
        path = TEMPLATES / f"{name}.jinja"
        if not path.is_file():
            known = ", ".join(sorted(p.stem for p in TEMPLATES.glob("*.jinja")))
            raise runs.UserError(f"model.chat_template={name}: no such template; there are {known}")
        tokenizer.chat_template = path.read_text()
    if isinstance(tokenizer.chat_template, dict):  # several, by name
        tokenizer.chat_template = tokenizer.chat_template.get("default")
    if not tokenizer.chat_template:
        raise runs.UserError(f"the model's tokenizer has no chat template; {REMEDY}")
    if re.search(r"\|\s*random\b|\blipsum\s*\(", tokenizer.chat_template):
        raise runs.UserError(f"the chat template draws at random, so a study could not be repeated; {REMEDY}")
    tokenizer.chat_template = _stop_clock(tokenizer.chat_template)


CLOCK_NAME = "strftime_now"  # the one way in which transformers' templates read the clock
STOPPED = "{%- macro " + CLOCK_NAME


@functools.lru_cache(maxsize=8)
def _stop_clock(template):
    """The template, in which any time that it asks for is `CLOCK`: tomorrow's prompts are today's."""
    if CLOCK_NAME not in template or template.startswith(STOPPED):
        return template
    try:
        strings = [value[1:-1] for _, kind, value in jinja2.Environment().lex(template) if kind == "string"]
    except jinja2.TemplateError as error:
        raise runs.UserError(f"the chat template can't be read ({error}); {REMEDY}") from None
    formats = [text for text in dict.fromkeys(strings) if "%" in text]
    cases = "".join(
        f"{{%- elif format == '{text}' -%}}{{{{ '{CLOCK.strftime(text)}' }}}}" for text in formats if "'" not in text
    )
    unknown = "{{ raise_exception('it reads the clock in a way of its own') }}"
    body = f"{{%- if false -%}}{cases}{{%- else -%}}{unknown}{{%- endif -%}}"
    return f"{STOPPED}(format) -%}}{body}{{%- endmacro +%}}{template}"  # +: a newline that follows stays


def ensure_padding(tokenizer, ends=(), rows=None):
    """Give the tokenizer a padding token that ends no response: classifiers look for the last token that is not pad.

    Args:
        ends: the model's end ids.
        rows: how many tokens the model has embeddings of; None where that is not known.

    Without another special token it is a new one, where the model has a row to spare, or one that no text has.
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
        raise runs.UserError("the tokenizer has no special token beside its end token that could pad; add one to it")


def end_ids(model, tokenizer):
    """Every token id that ends a response: the tokenizer's and all of the model's generation configuration."""
    return _end_ids(getattr(model.generation_config, "eos_token_id", None), tokenizer)


def folder_end_ids(folder, tokenizer):
    """`end_ids` of the model in a folder, which need not be loaded."""
    names = (GENERATION_CONFIG, "config.json")  # the second makes up for the first, as in transformers
    path = next(folder / name for name in names if (folder / name).is_file())
    return _end_ids(runs.read_json(path).get("eos_token_id"), tokenizer)


def copy_end_ids(source, target):
    """Let `folder_end_ids` find in a classifier's folder `target` what it finds in its policy's: it has none itself."""
    if (source / GENERATION_CONFIG).is_file():
        shutil.copyfile(source / GENERATION_CONFIG, target / GENERATION_CONFIG)


def _end_ids(configured, tokenizer):
    configured = configured if isinstance(configured, list) else [configured]
    return sorted({i for i in [tokenizer.eos_token_id, *configured] if i is not None})


def ending(tokenizer, ends):
    """The `Ending` of every response: of the first of the end ids `ends` that the template writes after an answer.

    Where it writes none of them, the tokenizer's own end token is appended. Raises UserError for a template that can't
    be trained with.
    """
    after = _plain_ids(tokenizer, _around_answer(tokenizer)[1])
    for token in after:
        if token in ends:
            return Ending(token, after.count(token))
    if tokenizer.eos_token_id is None:
        raise runs.UserError("the tokenizer has no end token; set eos_token in its tokenizer_config.json")
    return Ending(tokenizer.eos_token_id, 0)


def _turn_end(tokenizer):
    """(The words, the id of the token) that the template writes after an answer first; the id is None without one."""
    after = _around_answer(tokenizer)[1]
    tokens = [token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip()]
    first = re.search(_any_of(tokens), after)
    words = after[: first.start()] if first else after
    return words.strip(), tokenizer.convert_tokens_to_ids(first.group()) if first else None


def _around_answer(tokenizer):
    """What the template writes between the prompt and an answer, and after the answer. UserError, where it can't be."""
    asked = [user(QUESTION)]
    try:
        before, whole = _render(tokenizer, asked, True), _render(tokenizer, [*asked, assistant(ANSWER)])
    except Refused as refused:
        raise runs.UserError(f"a question with its answer: {refused}; {REMEDY}") from None
    if not whole.startswith(before):
        raise runs.UserError(f"the chat template doesn't begin a conversation with its generation prompt; {REMEDY}")
    lead, answer, after = whole.removeprefix(before).partition(ANSWER)
    if not answer or QUESTION not in before:
        raise runs.UserError(f"the chat template changes what is said, beyond white space around it; {REMEDY}")
    # Marks of thinking may stand before an answer, which a policy then writes too.
    marks = [token.content for token in tokenizer.added_tokens_decoder.values() if not token.special]
    if re.sub(_any_of(marks), "", lead).strip():
        raise runs.UserError(
            f"the chat template writes {lead.strip()[:40]!r} before an answer, but not as a generation prompt; {REMEDY}"
        )
    return lead, after


def _any_of(tokens):
    """A pattern for any of the tokens, as tokenizers look for them: the first, and there the longest."""
    return "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)"


def _plain_ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _render(tokenizer, messages, generation=False):
    """The text of a conversation, up to where an answer begins for `generation`. Refused where the template refuses."""
    template = tokenizer.chat_template
    # A folder that was given by hand has not been through `prepare`.
    stopped = {"chat_template": _stop_clock(template)} if isinstance(template, str) else {}
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=generation, tokenize=False, **stopped)
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise Refused("dropped_by_template", f"the chat template refuses it ({reason})") from None


class _Controls(NamedTuple):
    """The tokens that no text may become: special ones, and those that the template writes between texts."""

    ids: dict  # text -> id
    marks: frozenset  # ids of those that are not special
    normalised: tuple  # texts of those that are looked for in normalised text


def _controls(tokenizer):
    return _controls_of(tokenizer, str(tokenizer.chat_template), tuple(tokenizer.all_special_tokens), len(tokenizer))


@functools.lru_cache(maxsize=8)
def _controls_of(tokenizer, template, special, size):
    added = {
        token.content: (id, token) for id, token in tokenizer.added_tokens_decoder.items() if token.content.strip()
    }
    written = ""
    for messages in ([user("")], [user(""), assistant(""), user("")], [{"role": "system", "content": ""}, user("")]):
        with contextlib.suppress(Refused):  # rows like this one are refused too
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

    Where no message spells a control token the template's text is tokenized as it is. Else each token that is spelled
    is replaced by a stand-in, and what then looks like a control token in the template's text is the template's own.
    """

    def __init__(self, tokenizer, messages):
        self.tokenizer, self.messages = tokenizer, messages
        self.stand_ins = {}  # a private character -> the text that it stands for
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
        """Refused where text becomes a control token only by the tokenizer's own normalisation."""
        tokens, backend = self.controls.normalised, getattr(self.tokenizer, "backend_tokenizer", None)
        normalizer = backend.normalizer if backend and tokens else None
        normalised = normalizer.normalize_str(contents) if normalizer else ""
        if any(token in normalised for token in tokens):
            raise Refused("dropped_control_token", "it spells a control token in other characters")

    def text(self, count, generation=False):
        """What the template makes of the first `count` messages."""
        return _render(self.tokenizer, self.messages[:count], generation)

    def ids(self, text):
        """Token ids of (a part of) the template's text."""
        return self._careful_ids(text) if self.stand_ins else _plain_ids(self.tokenizer, text)

    def _careful_ids(self, text):
        """Of text with stand-ins: as always, but what they stand for is text."""
        backend, aliases, ids = _aliased(self.tokenizer, tuple(self.controls.ids), len(self.tokenizer))
        text = re.sub(_any_of(aliases), lambda match: aliases[match.group()], text)
        written = sum(map(text.count, aliases.values()))
        for character, spelled in self.stand_ins.items():
            text = text.replace(character, spelled)
        tokens = backend.encode(text, add_special_tokens=False).ids
        controls = set(self.controls.ids.values()) - {self.tokenizer.unk_token_id}
        named = {backend.token_to_id(alias) for alias in aliases.values()}
        if any(token not in ids and token in controls for token in tokens) or written != sum(
            token in named for token in tokens
        ):
            shown = ", ".join(self.stand_ins.values())
            raise Refused("dropped_control_token", f"it spells {shown}, which this tokenizer can't read as text")
        return [ids.get(token, token) for token in tokens]


@functools.lru_cache(maxsize=2)
def _aliased(tokenizer, controls, size):
    """A tokenizer that reads the spelling of a control token as text, and knows the token by a private character.

    Returns (a `tokenizers.Tokenizer`, spelling -> alias, its ids of added tokens -> the tokenizer's own). Refused where
    a tokenizer has no such backend.
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
    """Chat messages (a list a prompt) as lists of token ids, ready for a response to follow. Refused, a UserError."""
    return [encode_prompt(tokenizer, prompt) for prompt in prompts]


def encode_prompt(tokenizer, messages):
    """Chat messages as token ids, ready for a response to follow. Refused where the template or tokenizer can't."""
    conversation = _Conversation(tokenizer, messages)
    return conversation.ids(conversation.text(len(messages), True))


def encode_conversation(tokenizer, messages, end=None):
    """Token ids of a conversation's prompt and of its last message, which ends with an end token.

    What the template writes after the end token is dropped: a response stops there. Raises Refused.

    Args:
        end: the `Ending`; without it that of a model that `prepare` has made a base, and that had one end token.
    """
    end = end or ending(tokenizer, [tokenizer.eos_token_id, _turn_end(tokenizer)[1]])
    conversation = _Conversation(tokenizer, messages)
    before, whole = conversation.text(-1, True), conversation.text(len(messages))
    if not whole.startswith(before):
        raise Refused("dropped_by_template", "the chat template doesn't begin it with its generation prompt")
    prompt = conversation.ids(before)
    response = _ids_after(conversation, prompt, before, whole)
    place = _place(response, end)
    return prompt, [*response, end.id] if place is None else response[: place + 1]


def _place(response, end):
    """Where in a response's ids the template wrote its end token: an answer, too, may hold one that is a word."""
    places = [place for place, token in enumerate(response) if token == end.id]
    return places[-end.times] if 0 < end.times <= len(places) else None


def _ids_after(conversation, prompt, before, whole):
    """Token ids of what follows the text `before`, of token ids `prompt`, in the text `whole`.

    Gemma has tokens for runs of newlines: an answer that begins with one would share it with the prompt. A policy,
    which is given the prompt alone, samples no such token.
    """
    ids = conversation.ids(whole)
    if ids[: len(prompt)] == prompt:
        return ids[len(prompt) :]
    return conversation.ids(whole.removeprefix(before))


def encode_answer(tokenizer, messages, end, ends, ended=True):
    """Token ids of a prompt and of a policy's own answer to it (the last message), as near as text tells.

    A template may trim the answer or write white space around it, where a policy sampled what its text says.

    Args:
        end: the `Ending` of responses.
        ends: all end ids of the model; an answer whose text ends with one has no other.
        ended: whether the policy ended it; one that was cut has no end token.
    """
    prompt, response = encode_conversation(tokenizer, messages, end)
    answer, whole = messages[-1]["content"], response[:-1]
    if text_of(tokenizer, whole) != answer:
        conversation = _Conversation(tokenizer, messages)
        before, said = conversation.text(-1, True), conversation.messages[-1]["content"]
        for lead in dict.fromkeys([_around_answer(tokenizer)[0], ""]):
            ids = _ids_after(conversation, prompt, before, before + lead + said)
            if text_of(tokenizer, ids) == answer:
                whole = ids
                break
    if ended and not (whole and whole[-1] in ends):
        whole = [*whole, end.id]
    return prompt, whole or [end.id]


def accepted(rows, encode):
    """The rows that `encode` makes token ids of, as (row, ids), and the `Refused` of the others."""
    pairs, refused = [], []
    for row in rows:
        try:
            pairs.append((row, encode(row)))
        except Refused as error:
            refused.append(error)
    return pairs, refused


def counted(refused, what):
    """How many rows were refused, by reason; says so, and why, where there are any."""
    counts = dict(collections.Counter(error.reason for error in refused))
    for reason, count in counts.items():
        first = next(error for error in refused if error.reason == reason)
        print(f"{what}: {count} {reason}, the first because {first}", flush=True)
    return counts


def fitting(tokenizer, rows, length, what, messages=lambda row: row["prompt"]):
    """The rows whose prompt the template accepts and that has at most `length` tokens.

    Args:
        what: what the rows are, for messages.
        messages: of a row.

    Returns (rows, lists of token ids, how many were refused, by reason). UserError if none is left.
    """
    pairs, refused = accepted(rows, lambda row: encode_prompt(tokenizer, messages(row)))
    kept = [(row, ids) for row, ids in pairs if len(ids) <= length]
    if not kept:
        raise runs.UserError(
            f"{what}: none of the {len(rows)} rows is left{because(refused)}"
            if len(refused) == len(rows)
            else f"{what}: every prompt is longer than lengths.prompt={length} tokens; raise it{because(refused)}"
        )
    return [row for row, _ in kept], [ids for _, ids in kept], counted(refused, what)


def because(refused):
    """The end of an error: how many rows were refused, and why the first."""
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
