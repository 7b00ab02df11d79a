"""What a setting may be, said in its type: ranges, forms of text, lengths of lists, and what a kind does not read.

`Annotated[int, Range(1, 1000)]`, `Annotated[str, Text(200)]`, `Literal["linear", "constant"]`: pydantic holds values to
them, and puts them into the JSON schema. `salsa.workflow.messages` turns what pydantic refuses into one line.
"""

import functools
import math
import re
import types
import typing
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

from pydantic_core import PydanticCustomError, core_schema

OBEYED = ("Cc", "Cf", "Cs", "Zl", "Zp")  # Unicode's categories of signs that do something and show nothing
JOINERS = "\u200c\u200d"
LONGEST_NUMBER = 100  # characters of a weight that is written as text
LARGEST_EXPONENT = 50  # of a weight in text: Fraction("1e999999999") would take hours and all memory
LONGEST_SHOWN = 60  # characters of a value in a message
FILE_NAME = r"[A-Za-z0-9][A-Za-z0-9_.+-]*"
INTERPOLATION = r"\$\{"  # in a file of Hydra's, where ${ppo.temperature} may stand for a value
FORBIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # control characters, half surrogates
FAULT = "fault"  # the type of pydantic's error for what this module refuses


def fault(text, key="", owner=None, shows=True):
    """The error of a validator, to be raised: `text` says what is wrong and what to do.

    Args:
        key: the setting that is meant, below where the validator stands; "": all of it.
        owner: the section whose `key` the message shows; None: the value that was validated is shown.
        shows: whether the message shows a value at all.
    """
    value = {} if owner is None else {"value": getattr(owner, key)}
    return PydanticCustomError(FAULT, "{text}", {"text": text, "key": key, "shows": shows} | value)


class Rule:
    """A rule that stands in a type. What has `problem` to say is refused; numbers are no text, and text no number."""

    shows = True  # a message may show the value

    def __get_pydantic_core_schema__(self, source, handler):
        schema = handler(source)
        schema["strict"] = True
        return core_schema.no_info_after_validator_function(self._held, schema)

    def __get_pydantic_json_schema__(self, schema, handler):
        return handler(schema) | self.json_schema()

    def _held(self, value):
        problem = self.problem(value)
        if problem:
            raise fault(problem, shows=self.shows)
        return value


def _as_text(schema):
    """A number is taken as its text, for YAML and Hydra read 1 and 0.25 as numbers where a text is asked for."""
    number = (int, float)
    return core_schema.no_info_before_validator_function(
        lambda value: str(value) if isinstance(value, number) and not isinstance(value, bool) else value, schema
    )


@dataclass(frozen=True)
class Range(Rule):
    """Numbers, or texts of numbers (`in_text`: decimals and fractions, so that they are exact)."""

    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None
    in_text: bool = False

    def __get_pydantic_core_schema__(self, source, handler):
        schema = super().__get_pydantic_core_schema__(source, handler)
        return _as_text(schema) if self.in_text else schema

    def json_schema(self):
        if self.in_text:
            return {"type": ["string", "number"]}
        limits = {
            "minimum": self.at_least,
            "maximum": self.at_most,
            "exclusiveMinimum": self.above,
            "exclusiveMaximum": self.below,
        }
        return {name: limit for name, limit in limits.items() if limit is not None}

    def problem(self, value):
        """What is wrong with a value of the field's type, or None."""
        number = value
        if self.in_text:
            number = fraction(value)
            if number is None:
                return "no number; write a decimal (0.25) or a fraction (1/3)"
        elif isinstance(value, float) and not math.isfinite(value):
            return self.words()
        elif value == 0 and math.copysign(1, value) < 0:  # which would name and address another run than 0 does
            return "is 0 with a sign; write 0"
        inside = (
            (self.at_least is None or number >= self.at_least)
            and (self.above is None or number > self.above)
            and (self.at_most is None or number <= self.at_most)
            and (self.below is None or number < self.below)
        )
        return None if inside else self.words()

    def words(self):
        """What is allowed, for messages."""
        if self.at_least is not None and self.at_most is not None and self.at_most - self.at_least < 10:
            return f"must lie between {self.at_least} and {self.at_most}"
        low = f"at least {self.at_least}" if self.above is None else f"above {self.above}"
        high = "finite" if self.at_most is None else f"at most {self.at_most}"
        return f"must be {low}, and {high if self.below is None else f'below {self.below}'}"


@dataclass(frozen=True)
class Text(Rule):
    """Text of at most `longest` characters, that is wholly `pattern`; `hint` says in words what that is.

    Line breaks are for prose: `lines` allows them. What is `secret`, or may be by mistake, stands in no message.
    """

    longest: int = 1000
    pattern: str | None = None
    hint: str = ""
    lines: bool = False
    empty: bool = True
    secret: bool = False

    @property
    def shows(self):
        return not self.secret

    def __get_pydantic_core_schema__(self, source, handler):
        return _as_text(super().__get_pydantic_core_schema__(source, handler))

    def json_schema(self):
        pattern = rf"^({self.pattern})$|{INTERPOLATION}"
        return {"maxLength": self.longest} | ({"pattern": pattern} if self.pattern else {})

    def problem(self, value):
        if value == "":
            return None if self.empty else "is empty; give one"
        if len(value) > self.longest:
            return f"{len(value)} characters, and at most {self.longest} are allowed; shorten it"
        if FORBIDDEN.search(value) or (not self.lines and re.search("[\n\t\u2028\u2029]", value)):
            return "holds a control character or a line break; remove it"
        if self.pattern and not re.fullmatch(self.pattern, value):
            return self.hint
        return None


@dataclass(frozen=True)
class Items(Rule):
    """A list or a dictionary of at most so many, and at least so many."""

    at_most: int = 1000
    at_least: int = 0
    shows = False

    def json_schema(self):
        return {}

    def problem(self, value):
        if len(value) < self.at_least:
            return "is empty; give one"
        if len(value) > self.at_most:
            return f"{len(value)} entries, and at most {self.at_most} are allowed; leave some out"
        return None


@dataclass(frozen=True)
class ReadBy:
    """Of a setting that not all kinds read: of others it may have its default alone (`config.Kind` checks it)."""

    kinds: tuple[str, ...]

    def __init__(self, *kinds):
        object.__setattr__(self, "kinds", kinds)


ALWAYS = "always"  # marks a kind's own setting that is part of the addresses of other kinds too, as it always was
ADDED = "added"  # marks a setting that came later: it is no part of an address while it has its default


def file_name(longest=100):
    """A name that becomes a part of names of files."""
    hint = "cannot be part of a file name; use letters, digits, and _ . + -"
    return Text(longest, FILE_NAME, hint, empty=False)


def fraction(value):
    """A text as a Fraction, within moderate digits; None where it is no number."""
    text = str(value).strip()
    exponent = re.search(r"[eE]([+-]?\d+)$", text)
    if len(text) > LONGEST_NUMBER or (exponent and abs(int(exponent[1])) > LARGEST_EXPONENT):
        return None
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        return None


def printable(text):
    """A text in one line, without what a terminal would act on or hide: controls, line ends, turns of direction.

    They become their escapes. The joiners of Indic scripts and of pictures stay: without them a text reads wrongly.
    """
    return "".join(
        ascii(sign)[1:-1] if unicodedata.category(sign) in OBEYED and sign not in JOINERS else sign
        for sign in str(text)
    )


def shown(value):
    """A value for a message: short, in one line, and nothing in it that a terminal would act on."""
    if isinstance(value, list):
        written = "[" + ", ".join(shown(item) for item in value[:20]) + (", …]" if len(value) > 20 else "]")
    elif isinstance(value, int) and abs(value) >= 10**LONGEST_SHOWN:
        return "a number of too many digits"
    else:
        written = printable(str(value))
    return written if len(written) <= LONGEST_SHOWN else written[: LONGEST_SHOWN - 1] + "…"


@functools.cache
def type_hints(schema):
    """Name -> type of each field of a dataclass, with what `Annotated` says."""
    return typing.get_type_hints(schema, include_extras=True)


def marks(hint):
    """What `Annotated` says of a type on all its levels, `| None` left aside."""
    if hasattr(hint, "__metadata__"):
        return [*hint.__metadata__, *marks(hint.__origin__)]
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return [mark for inner in typing.get_args(hint) for mark in marks(inner)] if union else []


def base_type(hint):
    """A type without `Annotated` and `| None`."""
    if hasattr(hint, "__metadata__"):
        return base_type(hint.__origin__)
    arguments = [argument for argument in typing.get_args(hint) if argument is not types.NoneType]
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return base_type(arguments[0]) if union else hint


def item_type(hint):
    """The type of what a list or a dictionary holds."""
    return typing.get_args(base_type(hint))[-1]
