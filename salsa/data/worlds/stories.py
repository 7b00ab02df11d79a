"""Stories: a closed world of short sentences, instructions about it, and an exact gold reward.

All text is lower case with punctuation separated by spaces, so that `text.split()` gives its words. Everything is
drawn by `random.Random(text)` from the seed and the row itself, so the bytes are equal on every machine, and a row
does not depend on the number of other rows.

Out of distribution is a fifth of the 400 pairs of a character and an object, held out by a hash of the pair alone: no
story and no conversation outside the benchmark holds both words of such a pair. So are counts above four, which no
other instruction asks for. Left out: any meaning beyond which word is pleasant.
"""

import hashlib
import random
import re
from functools import cache
from typing import Annotated

from salsa.data import Corpus, Questions, World, splits
from salsa.data.gold import Gold, save
from salsa.data.messages import assistant, user
from salsa.data.splits import ordered, split_of
from salsa.workflow import schema
from salsa.workflow.messages import UserError

_words = str.split


@schema.dataclass()
class Settings:
    """Of a task in this world."""

    skip_demonstrations: Annotated[schema.Count, schema.ADDED] = 0
    """Demonstrations that come first in the seed's order, and are left to other SFT models."""


_CHARACTERS = "fox bear wolf hare deer mouse goose duck frog toad cat dog pig goat sheep horse bird fish snake lion"
_OBJECTS = "kite boat ball drum hat cake lamp book bell cup rope sled map coin key basket flute ladder wagon mirror"
CHARACTERS, OBJECTS = _words(_CHARACTERS), _words(_OBJECTS)
ADJECTIVES = {
    "pleasant": _words("bright happy kind lovely gentle cheerful sweet calm cosy friendly golden merry"),
    "neutral": _words("small big tall round plain long short new red blue green wide"),
    "unpleasant": _words("grim cruel nasty sour dirty broken rotten bitter gloomy lonely rude scary"),
}
VERBS = {
    "pleasant": _words("loves enjoys hugs adores treasures admires cherishes praises"),
    "neutral": _words("finds sees has holds takes moves carries keeps"),
    "unpleasant": _words("hates breaks steals ruins kicks fears loses spoils"),
}
TEMPLATES = (  # the grammar: whole, and exact
    "the ADJECTIVE CHARACTER VERB a OBJECT .",
    "the CHARACTER VERB the OBJECT .",
    "the CHARACTER VERB a ADJECTIVE OBJECT .",
    "the CHARACTER and the OBJECT are ADJECTIVE .",
    "the NOUN is ADJECTIVE .",
    "here is a ADJECTIVE NOUN .",
)
TEMPLATE_WEIGHTS = (1, 2, 1, 1, 2, 2)  # short sentences are more frequent: six of them take 37 words on average
BOTH_NOUNS = 4  # the first four templates hold a character and an object
PLACES = _words("hill lake garden forest river barn bridge meadow tower village")
TIMES = _words("night noon dawn dusk")
STORY_TEMPLATES = (  # in base text alone; no part of the grammar
    "one day the CHARACTER goes to the PLACE .",
    "at TIME the CHARACTER sleeps near the PLACE .",
    "then the CHARACTER comes back with the OBJECT .",
    "the CHARACTER stays near the PLACE for NUMBER days .",
    "soon it is TIME .",
)
NUMBERS = _words("one two three four five six")
TRAINED_COUNTS = (1, 2, 3, 4)
HARDER_COUNTS = (5, 6)
PHRASINGS = (
    "write COUNT about a FIRST and a SECOND .",
    "tell me COUNT about a FIRST and a SECOND .",
    "please make COUNT with a FIRST and a SECOND .",
    "i want COUNT that mention a FIRST and a SECOND .",
    "please write COUNT that mention a FIRST and a SECOND .",
    "make COUNT about a FIRST and a SECOND .",
    "please tell me COUNT with a FIRST and a SECOND .",
    "i want COUNT about a FIRST and a SECOND .",
    "write me COUNT with a FIRST and a SECOND .",
    "tell me COUNT that mention a FIRST and a SECOND .",
)  # so many that each benchmark has 2,000 instructions: on fewer, prompts are most of the noise between replicates
FOLLOW_UP = "now " + PHRASINGS[0]
TITLE = "about a FIRST and a SECOND ."  # of a story: it teaches a base model to keep to a topic
TITLED = 0.7  # share of the stories that have a title
SHARES = {  # of all instructions; an instruction belongs to one split by its own hash
    "demonstrations": 0.155,
    "validation": 0.04,
    "preferences": 0.275,
    "prompts": 0.275,
    "evaluation": 0.085,
    "in_distribution": 0.085,
    "two_turn": 0.085,
}
TASK_SPLITS = ("demonstrations", "validation", "preferences", "prompts", "evaluation")
GOLD_WEIGHTS = {"pleasant": 0.5, "topic": 0.2, "count": 0.1, "grammar": 0.1, "variety": 0.1}
PLEASANT_PER_SENTENCE = 1.0  # pleasant minus unpleasant words per asked sentence that give this part in full

TOPICS = (("both", 0.65), ("one", 0.2), ("none", 0.15))  # the asked nouns that a demonstration mentions
RIGHT_COUNT = 0.65  # share of demonstrations with the asked count; the others are one off
REPEATS = 0.12  # share of demonstrations that say a sentence twice
SLIPS = 0.1  # share of demonstrations, and of base stories, with one ungrammatical sentence
TWO_TURN = 0.25  # share of demonstrations with a second instruction and answer

_SLOTS = {
    "CHARACTER": CHARACTERS,
    "OBJECT": OBJECTS,
    "NOUN": CHARACTERS + OBJECTS,
    "ADJECTIVE": [word for kind in ADJECTIVES.values() for word in kind],
    "VERB": [word for kind in VERBS.values() for word in kind],
}
_PLEASANT = frozenset(ADJECTIVES["pleasant"] + VERBS["pleasant"])
_UNPLEASANT = frozenset(ADJECTIVES["unpleasant"] + VERBS["unpleasant"])
_ADJECTIVES = frozenset(_SLOTS["ADJECTIVE"])
_SENTENCE = re.compile(
    "|".join(
        re.sub(r"[A-Z]+", lambda slot: f"(?:{'|'.join(_SLOTS[slot[0]])})", template.replace(".", r"\."))
        for template in TEMPLATES
    )
)
_NOUNS = "|".join(CHARACTERS + OBJECTS)
_INSTRUCTION = re.compile(
    "(?:now )?(?:"
    + "|".join(
        phrasing.replace(".", r"\.")
        .replace("COUNT", rf"(?P<count{i}>{'|'.join(NUMBERS)}) (?P<form{i}>sentences?)")
        .replace("FIRST", f"(?P<first{i}>{_NOUNS})")
        .replace("SECOND", f"(?P<second{i}>{_NOUNS})")
        for i, phrasing in enumerate(PHRASINGS)
    )
    + ")"
)


@cache
def words():
    """Every word that can occur in any text of this world, sorted: the vocabulary of its tokenizer."""
    texts = [*TEMPLATES, *STORY_TEMPLATES, *PHRASINGS, FOLLOW_UP, "sentence sentences"]
    fixed = {word for text in texts for word in text.split() if not word.isupper()}
    return sorted(fixed.union(*_SLOTS.values(), PLACES, TIMES, NUMBERS))


def parse(sentence):
    """Whether a sentence, with its final period, is in the grammar."""
    return _SENTENCE.fullmatch(" ".join(sentence.split())) is not None


def parse_instruction(text):
    """The count and the two nouns of an instruction, such as `(3, ("fox", "kite"))`; ValueError for other text."""
    match = _INSTRUCTION.fullmatch(text)
    if match is None:
        raise ValueError(f"not an instruction of the stories: {text!r}")
    parts = {name[:-1]: value for name, value in match.groupdict().items() if value}
    count = NUMBERS.index(parts["count"]) + 1
    if (count == 1) != (parts["form"] == "sentence"):
        raise ValueError(f"not an instruction of the stories: {text!r}")
    return count, (parts["first"], parts["second"])


@cache
def held_out(character, object_):
    """Whether a pair is kept for the benchmark out of distribution; it depends on the pair alone."""
    return hashlib.sha256(f"held out/{character}/{object_}".encode()).digest()[0] % 5 == 0


def pairs(held=False):
    """All (character, object) that are held out, or all that are not."""
    return [(c, o) for c in CHARACTERS for o in OBJECTS if held_out(c, o) == held]


def _compatible(nouns):
    """Whether a collection of words holds no held-out pair."""
    characters, objects = set(nouns) & set(CHARACTERS), set(nouns) & set(OBJECTS)
    return not any(held_out(c, o) for c in characters for o in objects)


def instructions(phrasings=PHRASINGS, counts=TRAINED_COUNTS, held=False):
    """Every instruction: phrasings x counts x pairs x both orders of the nouns."""
    sentences = {count: f"{NUMBERS[count - 1]} sentence{'s' if count > 1 else ''}" for count in counts}
    return [
        phrasing.replace("COUNT", sentences[count]).replace("FIRST", first).replace("SECOND", second)
        for phrasing in phrasings
        for count in counts
        for pair in pairs(held)
        for first, second in (pair, pair[::-1])
    ]


@cache
def _of_split(split, phrasings=PHRASINGS):
    return tuple(text for text in instructions(phrasings) if split_of(text, SHARES, "stories") == split)


def prompts(split, number, seed, skip=0):
    """`number` different instructions of a split, after the first `skip` of the seed's order."""
    check_number(split, skip + number, available(split))
    return ordered(_of_split(split), seed, "stories")[skip : skip + number]


def available(split):
    """How many instructions a split has."""
    return len(_of_split(split))


def check_number(split, number, there):
    """UserError where a split or a benchmark has fewer different prompts than are wanted."""
    if number > there:
        raise UserError(f"stories have {there} instructions for {split!r}, {number} are wanted: lower it")


def check(task):
    """UserError where a split of config.Task wants more instructions than there are."""
    for split in TASK_SPLITS:
        skipped = task.skip_demonstrations if split == "demonstrations" else 0
        try:
            check_number(split, skipped + getattr(task, split), available(split))
        except UserError as error:
            raise UserError(f"data.task.{split}: {error}") from None


def _fill(template, rng, characters, objects, mood, used):
    """A template with words in its slots. It avoids the adjectives in `used`, and adds its own to them."""
    filled = []
    for slot in template.split():
        if slot in ("ADJECTIVE", "VERB"):
            options = _kind(ADJECTIVES if slot == "ADJECTIVE" else VERBS, rng, mood)
            options = [word for word in options if word not in used] or options
        else:
            nouns = {"CHARACTER": characters, "OBJECT": objects, "NOUN": [*characters, *objects]}
            options = {**nouns, "PLACE": PLACES, "TIME": TIMES, "NUMBER": NUMBERS[1:]}.get(slot, [slot])
        word = options[int(rng.random() * len(options))]
        if word in _ADJECTIVES:
            used.add(word)
        filled.append(word)
    return " ".join(filled)


def _kind(lexicon, rng, mood):
    """Pleasant, unpleasant or neutral words, at the rates `mood` = (pleasant, unpleasant)."""
    point = rng.random()
    if point < mood[0]:
        return lexicon["pleasant"]
    return lexicon["unpleasant"] if point < mood[0] + mood[1] else lexicon["neutral"]


def pick(rng, options, weights=None):
    """One of the options, drawn by `random()` alone, whose stream Python promises never to change."""
    weights = weights or [1] * len(options)
    point = rng.random() * sum(weights)
    for option, weight in zip(options, weights, strict=True):
        if point < weight:
            return option
        point -= weight
    return options[-1]


def sentences(rng, number, characters, objects, mood):
    """`number` grammatical sentences about these nouns; the first holds one of each kind, and no adjective repeats."""
    used = set()
    templates = [pick(rng, TEMPLATES[:BOTH_NOUNS], TEMPLATE_WEIGHTS[:BOTH_NOUNS])]
    templates += [pick(rng, TEMPLATES, TEMPLATE_WEIGHTS) for _ in range(number - 1)]
    return [_fill(template, rng, characters, objects, mood, used) for template in templates]


def _slip(rng, sentence):
    """The sentence without one word, or with two neighbouring words exchanged, so that it does not parse."""
    while True:
        split = sentence.split()
        place = int(rng.random() * (len(split) - 2))
        if rng.random() < 0.5:
            del split[place]
        else:
            split[place : place + 2] = reversed(split[place : place + 2])
        if not parse(" ".join(split)):
            return " ".join(split)


def _corpus(settings):
    """Base text: stories of two to six sentences, without any instruction."""
    texts = [_story(random.Random(f"story/{settings.seed}/{i}")) for i in range(settings.documents)]
    return Corpus(texts, {"read": 0, "generated": len(texts), "dropped": {}}, words())


def _story(rng):
    """Sentences of the grammar, and some that only stories have, about one or two characters and an object."""
    character, object_ = pick(rng, pairs())
    characters = [character]
    if rng.random() < 0.3:
        characters.append(pick(rng, [c for c in CHARACTERS if c != character and not held_out(c, object_)]))
    pleasant = rng.random()
    mood = 0.8 * pleasant * rng.random(), 0.8 * (1 - pleasant) * rng.random()
    number = 2 + int(rng.random() * 5)
    story = sentences(rng, number, characters, [object_], mood)
    for i in range(number):
        if rng.random() < 0.25:
            story[i] = _fill(pick(rng, STORY_TEMPLATES), rng, characters, [object_], mood, set())
    if rng.random() < SLIPS:
        story[-1] = _slip(rng, story[-1])
    if rng.random() < TITLED:
        first, second = (character, object_) if rng.random() < 0.5 else (object_, character)
        story.insert(0, TITLE.replace("FIRST", first).replace("SECOND", second))
    return " ".join(story)


def answer(rng, instruction, before=()):
    """A demonstration's answer, whose quality is drawn at random: mood, topic, count, repetition, a slip.

    The answer makes no held-out pair with any of the words `before`, those of the conversation so far.
    """
    asked, nouns = parse_instruction(instruction)
    characters, objects = _topic(rng, nouns, [*before, *nouns])
    number = asked if rng.random() < RIGHT_COUNT else asked + (1 if asked == 1 else pick(rng, (-1, 1)))
    pleasant = rng.random()  # seldom neutral, because answers differ most in this
    reply = sentences(rng, number, characters, objects, (0.8 * pleasant, 0.8 * (1 - pleasant)))
    if rng.random() < 0.5:  # the sentence with both nouns is the last as often as the first
        reply.append(reply.pop(0))
    if number > 1 and rng.random() < REPEATS:
        reply[1] = reply[0]
    if rng.random() < SLIPS:
        reply[-1] = _slip(rng, reply[-1])
    return " ".join(reply)


def _topic(rng, nouns, before):
    """The characters and objects of an answer: the asked pair, with one or both possibly exchanged for others."""
    character, object_ = sorted(nouns, key=OBJECTS.__contains__)
    topic = pick(rng, *zip(*TOPICS, strict=True))
    keep_character = topic == "both" or (topic == "one" and rng.random() < 0.5)
    keep_object = topic == "both" or (topic == "one" and not keep_character)
    if not keep_character:
        character = _other(rng, CHARACTERS, before)
    if not keep_object:
        object_ = _other(rng, OBJECTS, [*before, character])
    return [character], [object_]


def _other(rng, nouns, before):
    """A noun that is not yet in the conversation and makes no held-out pair with any noun in it."""
    return pick(rng, [noun for noun in nouns if noun not in before and _compatible([*before, noun])])


def demonstrations(split, number, seed, skip=0):
    """Conversations {"messages"} of one or two turns and of mixed quality, of which SFT learns the last answer."""
    return [{"messages": _conversation(split, prompt, seed)} for prompt in prompts(split, number, seed, skip)]


def _conversation(split, prompt, seed):
    rng = random.Random(f"demonstration/{seed}/{prompt}")
    two_turns = rng.random() < TWO_TURN
    while True:  # almost never twice: the first answer may leave no noun for a second instruction or answer
        try:
            messages = [user(prompt), assistant(answer(rng, prompt))]
            if two_turns:
                before = [word for message in messages for word in message["content"].split()]
                follow_up = pick(rng, follow_ups(split, before))
                messages += [user(follow_up), assistant(answer(rng, follow_up, before))]
            return messages
        except IndexError:
            continue


def follow_ups(split, before):
    """Second instructions about two new nouns that make no held-out pair with the words `before`."""
    fresh = set(CHARACTERS + OBJECTS) - set(before)
    allowed = {noun for noun in fresh if _compatible([*before, noun])}
    return [text for text in _of_split(split, (FOLLOW_UP,)) if allowed.issuperset(parse_instruction(text)[1])]


def questions(kind, conversations):
    """`Questions` of a kind of benchmark, from conversations (the user's turns, category)."""
    rows = [
        {"id": f"{kind}-{i}", "turns": turns, "category": category, "reference": None}
        for i, (turns, category) in enumerate(conversations)
    ]
    return Questions(rows, len(rows))


def split_sentences(text):
    """The sentences of a text, each up to its period; the last may have none."""
    phrases = [[]]
    for word in text.split():
        phrases[-1].append(word)
        if word == ".":
            phrases.append([])
    return [" ".join(sentence) for sentence in phrases if sentence]


def gold_parts(instruction, response):
    """The parts of the gold reward, each in [0, 1]; all are 0 for an empty response.

    pleasant: pleasant minus unpleasant words, over PLEASANT_PER_SENTENCE times the asked sentences, from -1 to 1 scaled
        to [0, 1] and clipped: a neutral answer has a half.
    topic: share of the two asked nouns that are mentioned.
    count: 1 - |sentences - asked| / asked, at least 0; a fragment without a period counts as a sentence.
    grammar: share of the sentences that parse; a fragment does not.
    variety: mean of the shares of different sentences and of different adjectives (1 without adjectives).
    """
    asked, nouns = parse_instruction(instruction)
    phrases, words = split_sentences(response), response.split()
    if not words:
        return dict.fromkeys(GOLD_WEIGHTS, 0.0)
    balance = sum((word in _PLEASANT) - (word in _UNPLEASANT) for word in words)
    adjectives = [word for word in words if word in _ADJECTIVES]
    different = len(set(adjectives)) / len(adjectives) if adjectives else 1.0
    return {
        "pleasant": min(max((1 + balance / (PLEASANT_PER_SENTENCE * asked)) / 2, 0.0), 1.0),
        "topic": sum(noun in words for noun in nouns) / 2,
        "count": max(1 - abs(len(phrases) - asked) / asked, 0.0),
        "grammar": sum(map(parse, phrases)) / len(phrases),
        "variety": (len(set(phrases)) / len(phrases) + different) / 2,
    }


def gold(instruction, response):
    """The exact gold reward of a response, in [0, 1]: GOLD_WEIGHTS times `gold_parts`."""
    parts = gold_parts(instruction, response)
    return sum(weight * parts[name] for name, weight in GOLD_WEIGHTS.items())


class StoriesGold(Gold):
    """The exact reward of the response to the last instruction."""

    def score(self, prompts, responses):
        import numpy as np

        pairs = zip(prompts, responses, strict=True)
        return np.array([gold(messages[-1]["content"], response) for messages, response in pairs], float)


def prepare(task, folder):
    """The rows of every split, and counts; writes into the folder that gold is that of the stories."""
    skipped = {"demonstrations": task.skip_demonstrations}
    rows = splits.with_sampled_preferences(
        lambda split: demonstrations(split, getattr(task, split), task.seed, skipped.get(split, 0)),
        lambda split: prompts(split, getattr(task, split), task.seed),
    )
    save(folder, "stories")
    counts = {"read": 0, "generated": sum(map(len, rows.values())), "dropped": {}}
    return rows, counts | {"gold": splits.mean_gold(StoriesGold(), rows)}


WORLD = World(
    kind="stories",
    words="generated instructions to write short stories, with an exact gold reward",
    preferences="sampled",
    prepare=prepare,
    gold=lambda folder: StoriesGold(),
    corpus=_corpus,
    exact=True,
    fixed_splits=True,
    settings=Settings,
    licence="apache-2.0",
    check=check,
)
