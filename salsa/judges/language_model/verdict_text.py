"""Which verdict an answer of a judge holds: what a person would read as the judge's own, and nothing else.

The last verdict in double brackets counts, among those that the judge gives as its own. Not counted are thinking,
answers that were cut, quotations, lists of options, and verdicts that are ascribed to an answer or denied. Where none
is left the judge is asked again: a missing verdict costs one question, a wrong one the study. docs/evaluation.md
explains the rule to users.
"""

import html
import itertools
import re
import unicodedata
from dataclasses import dataclass

GRADES = ("A>>B", "A>B", "A=B", "B>A", "B>>A")
CUT = ("length", "max_tokens", "max_output_tokens", "model_length")  # finish reasons of answers that were cut
BROKEN = ("error", "abort", "content_filter")  # of answers that ended early for other reasons
MOST = 100  # verdicts in an answer: a model that repeats itself more often has given none

# Thinking, as models and their servers mark it: <think>, [THINK], <|START_THINKING|>, ◁think▷, Gemma's channel, …
_TAG = r"(?:\w+:)?(?:think(?:ing)?|thoughts?|reason(?:ing)?|reflect(?:ion)?|scratchpad|analysis|inner_monologue)"
_OPENED = rf"<\|?(?:begin_of_|start_)?{_TAG}(?:\s[^<>]{{0,80}})?\|?>|\[think(?:ing)?\]|◁{_TAG}▷|<\|channel>\s*thought"
_CLOSED = rf"<\|?/{_TAG}\s*\|?>|<\|end_(?:of_)?{_TAG}\|>|\[/think(?:ing)?\]|◁/{_TAG}▷|<channel\|>"
THINKING = re.compile(f"(?P<opened>{_OPENED})|(?P<closed>{_CLOSED})", re.IGNORECASE)
CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)[^<]{0,80}(?:<\|constrain\|>[^<]{0,80})?<\|message\|>")  # Harmony's
BARE_CHANNEL = re.compile(r"\s*analysis(?=[A-Z])")  # Harmony's, from a server that drops control tokens

BRACKETS = re.compile(r"\[\s*\[([^\[\]]{1,60})\]\s*\]")
SIGNS = str.maketrans({"【": "[", "】": "]", "⟦": "[[", "⟧": "]]", "≫": ">>", "≪": "<<"})
INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]")
ORDERS = {">>": "A>>B", ">": "A>B", "=": "A=B", "==": "A=B", "≈": "A=B", "<": "B>A", "<<": "B>>A"}

_INSIDE = r"(?:(?!\n\s*\n)[^{0}])*?"  # the text of a quotation, within one paragraph
QUOTATIONS = re.compile(
    "|".join(
        [
            r"<(?P<block>(?:answer|response)_[ab]\w*|(?:request|conversation|reference)\w*)>.{0,8000}?</(?P=block)>",
            r"```.*?```|`[^`\n]+`",
            r"(?m:^[ ]{0,3}>(?!>).*$)",
            r'(?<!\w)"' + _INSIDE.format('"') + r'"(?!\w)',
            r"(?<!\w)'(?=\S)" + r"[^'\n]*?" + r"'(?!\w)",
            r"[“„]" + _INSIDE.format("”“") + r"[”“]",
            r"‘(?=\S)[^\n’]*’(?!\w)",
            r"«" + _INSIDE.format("»") + r"»",
            r"「[^」]*」",
        ]
    ),
    re.DOTALL,
)
PARENTHESES = re.compile(r"\([^()]*\)")
NOUNS = {"verdict", "judgement", "judgment", "decision", "conclusion", "grade", "rating", "preference"}
BESIDE = NOUNS | {"so", "thus", "therefore", "hence", "and", "my", "the", "a", "our", "this", "final", "overall"}
BESIDE |= {"answer", "is", "be", "as", "i", "give", "would"}
ASCRIBED = re.compile(
    r"\b(?:answers?|responses?|assistants?|candidates?|authors?|first|second|one|other|it|both|they|a|b|text|request|"
    r"prompt|user|instructions?)\b.*\b(?:says|said|saying|stat(?:es|ed|ing)|claim(?:s|ed|ing)|writes|wrote|writing|"
    r"contain(?:s|ed|ing)|inserts?|inserted|demand(?:s|ed|ing)|declar(?:es|ed|ing)|assert(?:s|ed|ing)|tell(?:s|ing)|"
    r"told|ask(?:s|ed|ing)|instruct(?:s|ed|ing)|quot(?:es|ed|ing)|mention(?:s|ed|ing)|(?:end|begin|start)s?\s+with)"
    r"(?:\s+(?:that|the|this|a|its|own|verdict|string|text|words?|line|grade|judges?|me|us|to|for|say|write|output|give|"
    r"answer|return|and|literally|simply))*\W*$",
    re.IGNORECASE,
)
DENIED = re.compile(
    r"\b(?:not|nor|neither|never|cannot|\w+n't|than|instead\s+of)(?:\s+(?:say|be|give|call|as|a|it|quite|really|to))*"
    r"\W*$",
    re.IGNORECASE,
)
CONDITION = re.compile(
    r"\W{0,6}(?:if|when)\s+(?:(?:the\s+)?(?:answer|response|assistant)s?\s+)?(?:[ab]|both|they|neither|the\s+two|are)\b",
    re.IGNORECASE,
)
JOINING = {"or", "and", "and or", "vs", "versus", "to"}


@dataclass
class _Verdict:
    """A verdict in a text.

    Attributes:
        start, end: where it stands, with its brackets.
        grade: one of `GRADES`.
        valid: whether it may be the judge's own.
    """

    start: int
    end: int
    grade: str
    valid: bool = True

    def within(self, spans):
        """The spans (start, end) that hold the verdict."""
        return [(start, end) for start, end in spans if start < self.start and self.end <= end]

    def is_alone(self, text, start, end):
        """Whether text[start:end] holds no word beside the verdict."""
        return not re.search(r"\w", text[start : self.start] + text[self.end : end])


def parse(text, finish_reason=None):
    """The grade, one of `GRADES`, that an answer of a judge ends with, or None; see the module.

    Args:
        text: the answer.
        finish_reason: why the answer ended, according to the server.
    """
    if str(finish_reason).lower() in (*CUT, *BROKEN):
        return None
    text = plain(without_thinking(html.unescape(html.unescape(text))))
    verdicts = [
        _Verdict(match.start(), match.end(), grade)
        for match in BRACKETS.finditer(text)
        if (grade := _grade(match[1])) is not None
    ]
    if not 0 < len(verdicts) <= MOST:
        return None
    _invalidate_options(text, verdicts)
    quotations = [match.span() for match in QUOTATIONS.finditer(text)]
    remarks = [match.span() for match in PARENTHESES.finditer(text)]
    for verdict in verdicts:
        before = re.split(r"[.!?\n]", text[max(0, verdict.start - 200) : verdict.start])[-1]
        if (
            ASCRIBED.search(before) or DENIED.search(before) or CONDITION.match(text, verdict.end)
            or not all(_meant(text, verdict, *span) for span in verdict.within(quotations))
        ):  # fmt: skip
            verdict.valid = False
    valid = [verdict for verdict in verdicts if verdict.valid]
    # "[[A>B]] (close to [[A=B]])": a verdict in parentheses with other words counts only where none stands outside.
    outside = [verdict for verdict in valid if all(verdict.is_alone(text, *span) for span in verdict.within(remarks))]
    return (outside or valid)[-1].grade if valid else None


def verdict(grade, order):
    """{"winner", "grade"} of the grade of an answer; in order 1 its A is model_b."""
    if order == 1:
        grade = GRADES[-1 - GRADES.index(grade)]
    winner = "tie" if "=" in grade else "model_a" if grade.startswith("A") else "model_b"
    return {"winner": winner, "grade": grade}


def without_thinking(text):
    """The text without a reasoning model's thinking: blocks, also without an end or without a beginning."""
    channels = list(CHANNEL.finditer(text))
    if channels:  # Harmony: analysis, commentary, final
        ends = [channel.start() for channel in channels[1:]] + [len(text)]
        text = "\n".join(
            text[channel.end() : end] for channel, end in zip(channels, ends, strict=True) if channel[1] == "final"
        )
    elif BARE_CHANNEL.match(text):
        text = text.rpartition("assistantfinal")[2] if "assistantfinal" in text else ""
    kept, place, thinking = [], 0, False
    for tag in THINKING.finditer(text):
        if tag["opened"] and not thinking:
            kept.append(text[place : tag.start()])
            thinking = True
        elif tag["closed"]:
            if not thinking:  # the chat template opened the block before the answer
                kept = []
            thinking, place = False, tag.end()
    return "".join(kept if thinking else [*kept, text[place:]])


def plain(text):
    """The text with one spelling of brackets and signs, without escapes, invisible marks and what is struck out."""
    text = INVISIBLE.sub("", unicodedata.normalize("NFKC", text).translate(SIGNS))
    text = re.sub(r"\\+(?=[\[\]<>=*_])", "", text)
    return re.sub(r"~~[^~\n]*~~", "", text)


def _grade(inner):
    """The grade that stands between double brackets, in other spellings too ("a > b", "**A>>B**", "B<A"); or None."""
    inner = inner.replace("\\gg", ">>").replace("\\ll", "<<").replace("»", ">>").replace("«", "<<")
    inner = re.sub(r"answer|response|assistant|[\s*_`$\"'“”{}]", "", inner, flags=re.IGNORECASE).upper()
    match = re.fullmatch(r"([AB])([<>=≈]{1,2})([AB])", inner)
    grade = ORDERS.get(match[2]) if match and match[1] != match[3] else None
    return GRADES[-1 - GRADES.index(grade)] if grade and match[1] == "B" else grade


def _invalidate_options(text, verdicts):
    """Mark verdicts that are only listed: three or more in a row, two joined by a word, or all five in order."""
    lists, joined = [], []
    for verdict in verdicts:
        gap = text[lists[-1][-1].end : verdict.start] if lists else None
        link = _link(gap) if lists else None
        if link is None:
            lists.append([])
            joined.append(False)
        lists[-1].append(verdict)
        joined[-1] |= link == "word"
    for options, word in zip(lists, joined, strict=True):
        if len({option.grade for option in options}) >= (2 if word else 3):
            _invalidate(options)
    valid = [verdict for verdict in verdicts if verdict.valid]
    for place in range(len(valid) - len(GRADES) + 1):
        five = valid[place : place + len(GRADES)]
        apart = all(0 < b.start - a.end < 120 for a, b in itertools.pairwise(five))
        if apart and tuple(option.grade for option in five) in (GRADES, GRADES[::-1]):
            _invalidate(five)


def _link(gap):
    """How two verdicts with `gap` between them belong to one list: "word", "sign", or None."""
    words = " ".join(re.findall(r"[^\W\d_]+", gap.lower())) if len(gap) < 40 else None
    if words in JOINING or (words == "" and re.search(r"[/|]", gap)):
        return "word"
    return "sign" if words == "" and re.search(r"[,;\n]", gap) else None


def _invalidate(verdicts):
    for verdict in verdicts:
        verdict.valid = False


def _meant(text, verdict, start, end):
    """Whether a quotation, text[start:end], is the judge's way to write its verdict.

    It is where the answer is nothing else, or ends with the quotation and calls it the verdict, or writes it as code.
    """
    if not verdict.is_alone(text, start, end) or not _beside(text[end:]):
        return False
    lines = [line for line in re.split(r"[.!?;,{}()]\s|\n|[{}()]", text[max(0, start - 200) : start]) if line.strip()]
    line = lines[-1] if lines else ""
    if set(_words(f"{line} {text[end:]}")) & NOUNS and _beside(line):
        return True
    opened = text[:start].rstrip()
    if not opened or (text[start] == "`" and opened[-1] in ".!?"):
        return True
    return _beside(line) and "final" in _words(line)


def _beside(text):
    """Whether the text says no more than "my final verdict is"."""
    return set(_words(text)) <= BESIDE


def _words(text):
    return re.findall(r"[^\W_]+", text.lower())
