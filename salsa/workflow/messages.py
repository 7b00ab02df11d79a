"""A mistake of the user, in one line; of what pydantic refuses: the setting's key, its value, and what is allowed.

Left out: what Hydra refuses, which `salsa.workflow.compose` says.
"""

import argparse
import difflib
import re
import types
import typing
from dataclasses import fields, is_dataclass

from salsa.workflow import bounds

TYPES = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    list: "a list",
    dict: "a group of settings",
    types.NoneType: "null",
}
WANTED = {"int": int, "float": float, "string": str, "bool": bool, "list": list, "dict": dict}  # by pydantic's words


class UserError(Exception):
    """A mistake that the user can mend: shown as one line, without a traceback, whatever text it quotes."""

    def __init__(self, message):
        super().__init__(bounds.printable(message))


class Parser(argparse.ArgumentParser):
    """A parser of command lines whose errors are one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {bounds.printable(message)}; see {self.prog} --help\n")


class SettingError(ValueError):
    """A value that its field does not allow, in one line that begins with the path of its key."""


class UnknownKey(SettingError):
    """A key that the schema does not have; `path` are the names that lead to it."""

    def __init__(self, schema, path):
        super().__init__(unknown_key(schema, path))
        self.path = path


def refusal(error, schema, values):
    """The `SettingError` of the first problem of a ValidationError of `schema` on nested dictionaries `values`."""
    problems = error.errors(include_url=False)
    unknown = (problem for problem in problems if problem["type"] == "unexpected_keyword_argument")
    problem = next(unknown, problems[0])
    path = _path(problem, values)
    if problem["type"] == "unexpected_keyword_argument":
        return UnknownKey(schema, path)
    context = problem.get("ctx", {})
    value = context.get("value", problem["input"])
    shows = context.get("shows", True)
    path += [context["key"]] if context.get("key") else []
    key = ".".join(bounds.printable(name) for name in path) or getattr(schema, "__name__", "the settings")
    if problem["type"] == "missing":
        return SettingError(f"{key}: no value; give one")
    whole = isinstance(value, dict) and problem["type"] == bounds.FAULT  # a section
    shows = shows and not whole and not _is_secret(schema, path)
    if problem["loc"] and isinstance(problem["loc"][-1], int):  # of a list
        return SettingError(f"{key}: {bounds.shown(value)}: {_words(problem, value)}")
    return SettingError(f"{key}{f'={bounds.shown(value)}' if shows else ''}: {_words(problem, value)}")


def _path(problem, values):
    """The names that lead to a problem, without what pydantic adds: places in a list, kinds, the mark of a key."""
    path, place = [], values
    for name in problem["loc"]:
        if isinstance(name, str) and name[:1] != "[" and (not isinstance(place, list)):
            path.append(name)
        place = place.get(name) if isinstance(place, dict) else None
    return path


def _words(problem, value):
    """What is wrong with a value, and what is allowed."""
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == bounds.FAULT:
        return context["text"]
    if kind == "literal_error":
        choices = filter(None, re.findall(r"'([^']*)'", context["expected"]))
        return f"no such choice; there are {', '.join(choices)}"
    if kind in ("dataclass_type", "dict_type"):
        return "no group of settings; give them by name"
    if kind == "float_type" and type(value) is int:
        return "is too large; give a smaller one"
    wanted = WANTED.get(kind.split("_")[0])
    if wanted and type(value) is not wanted:
        return f"is {TYPES.get(type(value), type(value).__name__)}, and has to be {TYPES[wanted]}"
    return bounds.printable(problem["msg"])


def _is_secret(schema, path):
    """Whether a setting may hold a secret, so that no message may show it."""
    hint = schema
    for name in path:
        hint = bounds.base_type(hint)
        if is_dataclass(hint):
            hint = bounds.type_hints(hint).get(name)
        else:
            hint = bounds.item_type(hint) if hint is not None else None
        if hint is None:
            return False
    return any(getattr(mark, "secret", False) for mark in bounds.marks(hint))


def unknown_key(schema, path, groups=()):
    """What is wrong with a key that the schema does not have: where its path leaves the schema, and what is there.

    Args:
        groups: names beside those of the schema that the configuration's top level has.
    """
    key, walked = ".".join(bounds.printable(name) for name in path), []
    hint = schema
    for name in path:
        hint = bounds.base_type(hint)
        where = ".".join(walked)
        walked.append(name)
        if not is_dataclass(hint):
            hint = bounds.item_type(hint) if typing.get_origin(hint) is dict else None
            if hint is not None and name is not path[-1]:
                continue
            return f"{key}: no such setting; a new entry of {where} is written with + before it"
        names = [f.name for f in fields(hint)]
        if name not in names:
            close = difflib.get_close_matches(name, names, 1)
            hint_text = f"did you mean {'.'.join([*walked[:-1], close[0]])}? " if close else ""
            there = sorted({*names, *groups}) if not where else names
            owner = where or ("the configuration" if groups else schema.__name__)
            return f"{key}: no such setting; {hint_text}{owner} has {', '.join(there)}"
        hint = bounds.type_hints(hint)[name]
    return f"{key}: no such setting"
