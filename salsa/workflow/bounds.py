"""What a setting may be, said beside its field: ranges, choices and forms of text, and one walk that checks them all.

`whole(40, 1, 1000)`, `number(0.2, above=0)`, `choice("linear", "linear", "constant")`, `text("")` and the like make a
dataclass field with its rule in the field's metadata; `check` walks nested dictionaries against a dataclass of such
fields. What depends on several settings is not said here: those rules are functions of `salsa.workflow.compose`.

Only the standard library is imported.
"""

import dataclasses
import functools
import math
import re
import types
import typing
import unicodedata
from dataclasses import dataclass, field, fields, is_dataclass
from fractions import Fraction

RULE, ITEMS = "rule", "items"  # of a field's metadata: what a value is held to; how many items it may have
NEEDED = dataclasses.MISSING  # of a field without a default
UNSET = "???"  # OmegaConf's mark of a value that the configuration has to give
OBEYED = ("Cc", "Cf", "Cs", "Zl", "Zp")  # Unicode's categories of signs that do something and show nothing
JOINERS = "\u200c\u200d"
LONGEST_NUMBER = 100  # characters of a weight that is written as text
LARGEST_EXPONENT = 50  # of a weight in text: Fraction("1e999999999") would take hours and all memory
TYPES = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    list: "a list",
    dict: "a group of settings",
    types.NoneType: "null",
}
LONGEST_SHOWN = 60  # characters of a value in a message
FILE_NAME = r"[A-Za-z0-9][A-Za-z0-9_.+-]*"
FORBIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # control characters, half surrogates


class SettingError(ValueError):
    """A value that its field does not allow, in one line that begins with the path of its key."""


@dataclass(frozen=True)
class Range:
    """Numbers, or texts of numbers (`in_text`: decimals and fractions)."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    in_text: bool = False

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
        if self.at_least is not None and self.at_most is not None and self.at_most - self.at_least < 10:
            return f"must lie between {self.at_least} and {self.at_most}"
        low, high = self._ends()
        return f"must be {low}, and {high}"

    def of_item(self, item):
        """`words` of an item of a list."""
        low, high = (end.removeprefix("at least ").removeprefix("at most ") for end in self._ends())
        return f"{shown(item)} lies outside {low} to {high}: no value may be below {low} or above {high}"

    def _ends(self):
        low = "any size" if self.at_least is None else f"at least {self.at_least}"
        high = "finite" if self.at_most is None else f"at most {self.at_most}"
        return (
            low if self.above is None else f"above {self.above}",
            high if self.below is None else f"below {self.below}",
        )


@dataclass(frozen=True)
class Choice:
    choices: tuple

    def problem(self, value):
        return None if value in self.choices else f"no such choice; there are {', '.join(filter(None, self.choices))}"


@dataclass(frozen=True)
class Text:
    """Text of at most `longest` characters, that is wholly `pattern`; `hint` says in words what that is.

    Line breaks are for prose: `lines` allows them. What is `secret`, or may be by mistake, stands in no message.
    """

    longest: int = 1000
    pattern: str | None = None
    hint: str = ""
    lines: bool = False
    empty: bool = True
    secret: bool = False

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
class Free:
    """Anything of the field's type: switches, and what the plan itself makes."""

    def problem(self, value):
        return None


def whole(default=NEEDED, at_least=None, at_most=None):
    """A whole number; both ends are given, since none is without an end."""
    return field(default=default, metadata={RULE: Range(at_least=at_least, at_most=at_most)})


def number(default=NEEDED, at_least=None, above=None, at_most=None, below=None):
    """A finite number."""
    return field(default=default, metadata={RULE: Range(at_least, above, at_most, below)})


def share(default=NEEDED):
    """A number from 0 to 1."""
    return number(default, at_least=0, at_most=1)


def fraction_text(default=NEEDED, at_least=None, above=None, at_most=None):
    """A number as text, a decimal or a fraction, so that it is exact."""
    return field(default=default, metadata={RULE: Range(at_least, above, at_most, in_text=True)})


def choice(default, *choices):
    return field(default=default, metadata={RULE: Choice(choices)})


def text(default=NEEDED, longest=1000, pattern=None, hint="", lines=False, empty=True, secret=False):
    return field(default=default, metadata={RULE: Text(longest, pattern, hint, lines, empty, secret)})


def label(default=NEEDED, longest=100):
    """A name that becomes a part of names of files."""
    return field(default=default, metadata={RULE: file_name(longest)})


def file_name(longest=100):
    hint = "cannot be part of a file name; use letters, digits, and _ . + -"
    return Text(longest, FILE_NAME, hint, empty=False)


def switch(default):
    return field(default=default, metadata={RULE: Free()})


def many(default, rule, at_most=1000):
    """A list whose items are held to `rule`, a field of such an item; `default` is copied, or null."""
    metadata = {RULE: rule.metadata[RULE], ITEMS: at_most}
    if default is None or default is NEEDED:
        return field(default=default, metadata=metadata)
    return field(default_factory=lambda: list(default), metadata=metadata)


def entries(at_most=1000):
    """A dictionary of names, which become parts of names of files, to dataclasses."""
    return field(default_factory=dict, metadata={RULE: file_name(64), ITEMS: at_most})


def planned(default=NEEDED):
    """What the plan makes, and no one writes."""
    made = {"default_factory": default} if callable(default) else {"default": default}
    return field(**made, metadata={RULE: Free()})


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
    return typing.get_type_hints(schema)


def required(hint):
    """A type hint without its `| None`."""
    return typing.get_args(hint)[0] if isinstance(hint, types.UnionType) else hint


def item_type(hint):
    """The type of what a list or a dictionary holds."""
    return typing.get_args(hint)[-1]


def choices(schema, name):
    """What a field of a dataclass may be."""
    (rule,) = (f.metadata[RULE] for f in fields(schema) if f.name == name)
    return rule.choices


def check(schema, values, path=()):
    """Hold nested dictionaries to a dataclass, and return them with its defaults where they leave something out.

    A whole number where the field is of numbers is returned as such a number.

    Args:
        schema: a dataclass whose fields have rules.
        values: a dictionary of settings.
        path: the names that lead to `values`, for messages.

    Raises:
        SettingError: an unknown or missing key, a wrong type, or a value that a rule does not allow.
    """
    where = ".".join(path)
    if not isinstance(values, dict):
        raise SettingError(f"{where or schema.__name__}: {shown(values)} is no group of settings; give them by name")
    known = {f.name: f for f in fields(schema)}
    unknown = next((name for name in values if name not in known), None)
    if unknown is not None:
        raise SettingError(f"{where or schema.__name__} has no setting {unknown!r}; it has {', '.join(sorted(known))}")
    hints = type_hints(schema)
    checked = {}
    for name, f in known.items():
        key = ".".join([*path, name])
        if name in values:
            checked[name] = _value(hints[name], f.metadata, values[name], (*path, name))
        else:
            checked[name] = _default(f, key)
    return checked


def _default(f, key):
    if f.default_factory is not NEEDED:
        made = f.default_factory()
        return dataclasses.asdict(made) if is_dataclass(made) else made
    if f.default is NEEDED or f.default == UNSET:
        raise SettingError(f"{key}: no value; give one")
    return f.default


def _value(hint, metadata, value, path):
    """`check` of one field."""
    if value is None and isinstance(hint, types.UnionType):
        return None
    hint = required(hint)
    if is_dataclass(hint):
        return check(hint, value, path)
    key, rule = ".".join(path), metadata.get(RULE, Free())
    kind = typing.get_origin(hint) or hint
    value = _typed(kind, value, key, rule)
    if kind is list:
        return _list(item_type(hint), metadata, value, path)
    if kind is dict:
        return _dictionary(item_type(hint), metadata, value, path)
    problem = rule.problem(value)
    if problem:
        raise SettingError(f"{_told(key, value, rule)}: {problem}")
    return value


def _told(key, value, rule):
    """A key with its value, unless that may be a secret."""
    return key if getattr(rule, "secret", False) else f"{key}={shown(value)}"


def _typed(kind, value, key, rule):
    """The value, if it is of a type; of whole numbers are numbers made where those are asked for."""
    if kind is float and type(value) is int:
        return float(value) if abs(value) < 10**300 else math.inf
    if kind is not typing.Any and type(value) is not kind:
        given, wanted = TYPES.get(type(value), type(value).__name__), TYPES.get(kind, kind.__name__)
        raise SettingError(f"{_told(key, value, rule)}: is {given}, and has to be {wanted}")
    return value


def _list(hint, metadata, value, path):
    """`check` of a list."""
    key, rule = ".".join(path), metadata.get(RULE, Free())
    _count(key, value, metadata.get(ITEMS))
    if is_dataclass(hint) or typing.get_origin(hint):
        return [_value(hint, {RULE: rule}, item, path) for item in value]
    items = [_typed(hint, item, key, rule) for item in value]
    for item in items:
        problem = rule.problem(item)
        if problem and isinstance(rule, Range) and problem == rule.words():
            raise SettingError(f"{key}={shown(value)}: {rule.of_item(item)}")
        if problem:
            raise SettingError(f"{key}: {shown(item)!r}: {problem}")
    return items


def _dictionary(hint, metadata, value, path):
    """`check` of a dictionary whose keys are names."""
    key, rule = ".".join(path), metadata.get(RULE, Free())
    _count(key, value, metadata.get(ITEMS))
    for name in value:
        problem = rule.problem(name) if isinstance(name, str) else "is no text"
        if problem:
            raise SettingError(f"{key}.{shown(name)}: {shown(name)!r} {problem}")
    return {name: _value(hint, {}, item, (*path, name)) for name, item in value.items()}


def _count(key, value, most):
    if most is not None and len(value) > most:
        raise SettingError(f"{key}: {len(value)} entries, and at most {most} are allowed; leave some out")
