"""Words of the field that a page explains where they first stand, and lists at its end.

Where a word first stands, it is marked: its meaning shows when a pointer is above it, when it has the focus, and so
when it is touched; on paper a number leads to the list. What is put into a page is escaped here.
"""

import re
from dataclasses import dataclass

from markupsafe import Markup, escape


@dataclass(frozen=True)
class Word:
    """A word, how it may stand in a text (a regular expression), and what it means, in a sentence."""

    name: str
    pattern: str
    meaning: str


WORDS = (
    Word("SALSA", r"SALSA", "PPO whose KL penalty is measured from a soup of two SFT models, not from its start."),
    Word("PPO", r"PPO", "Proximal policy optimisation: the training that raises a policy's reward in small steps."),
    Word("soup", r"soups?", "A model whose weights are the weighted average of the weights of other models."),
    Word("anchor", r"anchors?|anchored", "The reference: the model from which the KL penalty of a policy is measured."),
    Word("policy", r"polic(?:y|ies)", "The language model that is trained by its reward."),
    Word(
        "replicate",
        r"replicates?",
        "One repetition of the study, with SFT models, a reward model and training seeds of its own.",
    ),
    Word("arm", r"arms?", "What is compared: an algorithm, where its policy starts, and what it is anchored to."),
    Word(
        "sft0",
        r"sft0",
        "The first model fine-tuned (SFT) from the base model. sft1, sft2, … differ from it in the seed alone.",
    ),
    Word("SFT", r"SFT", "Supervised fine-tuning: training on demonstrations, before any reward."),
    Word(
        "gold",
        r"[Gg]old",
        "A score or a judge that training never sees, and that stands for what is really wanted.",
    ),
    Word(
        "proxy reward",
        r"[Pp]rox(?:y reward|y|ies)",
        "The reward model's score, which training raises; in standard deviations on sft0's responses.",
    ),
    Word("reward model", r"[Rr]eward models?", "A model trained on preferences, whose score training raises."),
    Word(
        "KL",
        r"KL",
        "Kullback–Leibler divergence: how far a model's responses are from another's, in nats per response.",
    ),
    Word("nats", r"nats?", "The unit of KL: natural logarithms of probabilities."),
    Word("kl_coef", r"kl_coefs?", "The weight of the KL penalty, in standard deviations of reward per nat (β)."),
    Word(
        "win rate",
        r"(?:[Aa]djusted )?win rates?",
        "The share of prompts on which a judge prefers one model's response to another's; a tie counts half.",
    ),
    Word(
        "positive control",
        r"[Pp]ositive control",
        "An arm whose anchor is better by construction: if no gain is seen there, none would be seen elsewhere.",
    ),
    Word(
        "claim",
        r"claims?",
        "A hypothesis with the smallest effect that would matter; its verdict is read from the effect's interval.",
    ),
    Word("Holm", r"Holm", "Holm's correction of p-values for the number of tests."),
)


class Glossary:
    """Marks each of `WORDS` where it first stands in the texts of one page, in the order in which they come."""

    def __init__(self):
        self.marked = []  # the words that stand in the page, by where they first stood

    def text(self, text):
        """A text as HTML, the words that stand in it for the first time marked; `code` between back quotes."""
        parts = str(text).split("`")
        return Markup("").join(
            Markup("<code>{}</code>").format(part) if place % 2 else self._marked(part)
            for place, part in enumerate(parts)
        )

    def _marked(self, text):
        first = self._first(text)
        if first is None:
            return escape(text)
        word, match = first
        self.marked.append(word)
        return escape(text[: match.start()]) + self._mark(word, match[0]) + self._marked(text[match.end() :])

    def _first(self, text):
        """(word, match) of the unmarked word that stands first in a text, the longest of several; None: none does."""
        unmarked = [word for word in WORDS if word not in self.marked]
        matches = [(word, re.search(rf"(?<![\w.-])(?:{word.pattern})(?![\w-])", text)) for word in unmarked]
        matches = [(word, match) for word, match in matches if match]
        return min(matches, key=lambda pair: (pair[1].start(), -pair[1].end()), default=None)

    def _mark(self, word, shown):
        number = len(self.marked)
        return Markup(
            '<abbr class="word" tabindex="0" aria-describedby="word-{number}">{shown}<sup>{number}</sup>'
            '<span class="meaning" role="tooltip">{meaning}</span></abbr>'
        ).format(number=number, shown=shown, meaning=word.meaning)
