"""YAML files that people write, looked at before Hydra reads them: what is wrong with one is a line with its number.

A file is one mapping with each key once, of plain values; what aliases stand for is bounded, and so is how deep it is
nested. Left out: what the keys mean, which `salsa.workflow.compose` checks.
"""

import contextlib
import functools
import re
from pathlib import Path
from unittest import mock

import yaml
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins
from omegaconf._utils import get_yaml_loader

from salsa.workflow.messages import UserError

LARGEST = 2**17  # bytes
DEEPEST = 50  # mappings and lists in each other
MOST_VALUES = 20000  # with aliases written out
PLAIN = ("str", "int", "float", "bool", "null", "seq", "map", "merge", "timestamp")  # tags that YAML gives by itself
TAG = "tag:yaml.org,2002:"
LOADER = get_yaml_loader()  # what reads the files afterwards: another one would take other texts for YAML
LONGEST_NUMBER = 100  # characters
# Numbers and switches of YAML 1.1, which few know: 010 is 8, 1:30 is 90, and a name "on" is true.
UNCLEAR = re.compile(r"[-+]?0[0-7_]+|[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?|yes|no|on|off", re.IGNORECASE)


@contextlib.contextmanager
def checked():
    """Here, Hydra looks at each file of a configuration before it reads it, and raises UserError."""
    Plugins.instance()  # which registers what reads files
    reader = SourcesRegistry.instance().resolve("file")
    load = reader.load_config

    def load_checked(source, config_path):
        path = Path(source.path) / source._normalize_file_name(config_path)
        if path.is_file():
            check(path)
        return load(source, config_path)

    with mock.patch.object(reader, "load_config", load_checked):
        yield


def check(path):
    """UserError, in one line with file and line number, for a file that is no sound mapping."""
    try:
        status = Path(path).stat()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    problem = _problem(str(path), status.st_mtime_ns, status.st_size)
    if problem:
        line, reason = problem
        raise UserError(f"{path}:{line}: {reason}")


@functools.lru_cache(maxsize=1000)
def _problem(path, _, size):
    """(line, reason) of what is wrong with a file of that time and size, or None."""
    if size > LARGEST:
        return 1, f"{size} bytes, and a file of settings may have {LARGEST}; make it smaller"
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        return 1, error.strerror
    if content.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        return 1, "begins with a byte-order mark; save it as UTF-8 without one"
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        return content.count(b"\n", 0, error.start) + 1, "not UTF-8; save it as UTF-8"
    try:
        problem = _deep(text) or _odd(yaml.compose(text, Loader=LOADER))
        if not problem:
            yaml.load(text, Loader=LOADER)  # which finds what is wrong with merged mappings
        return problem
    except yaml.YAMLError as error:
        return _told(error, text)


def _told(error, text):
    """(line, reason) of an error of PyYAML in a text."""
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return line, f"no YAML (the character U+{error.character:04X}: {error.reason}); remove it"
    mark, begun = getattr(error, "problem_mark", None), getattr(error, "context_mark", None)
    line = min((mark or begun).line + 1, max(len(text.splitlines()), 1)) if mark or begun else 1
    said = getattr(error, "problem", None) or str(error)
    if begun and begun.line + 1 < line:
        said += f", in what begins in line {begun.line + 1}"
    return line, re.sub(r"\s+", " ", f"no YAML ({said}); mend it there, or in the line before")


def _deep(text):
    """The place where mappings and lists are nested too deep, before anything recursive reads them."""
    depth = 0
    for event in yaml.parse(text, Loader=LOADER):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            return event.start_mark.line + 1, f"nested more than {DEEPEST} deep; write it flatter"
    return None


def _odd(root):
    """What is wrong with a composed document."""
    if root is None:
        return 1, "holds nothing; write `key: value` lines, or remove it"
    if not isinstance(root, yaml.MappingNode):
        return root.start_mark.line + 1, "no mapping; write `key: value` lines"
    sizes = {}
    problem = _look(root, sizes)
    if not problem and sizes[id(root)] > MOST_VALUES:
        problem = 1, f"{sizes[id(root)]} values, with aliases written out, and at most {MOST_VALUES} may be; write less"
    return problem


def _look(node, sizes):
    """The first thing that is wrong below a node; `sizes` takes how many values it has with aliases written out."""
    line = node.start_mark.line + 1
    if id(node) in sizes:  # an alias
        return (line, "an alias of itself; remove it") if sizes[id(node)] is None else None
    if node.tag.removeprefix(TAG) not in PLAIN:
        return line, f"a tag, {node.tag.replace(TAG, '!!')}, that no setting has; remove it"
    if isinstance(node, yaml.ScalarNode):
        sizes[id(node)] = 1
        return _unclear(node)
    sizes[id(node)] = None
    children = node.value
    if isinstance(node, yaml.MappingNode):
        problem = _keys(node)
        if problem:
            return problem
        children = [child for pair in node.value for child in pair]
    for child in children:
        problem = _look(child, sizes)
        if problem:
            return problem
    sizes[id(node)] = 1 + sum(sizes[id(child)] for child in children)
    return None


def _unclear(node):
    """What is wrong with a number or a switch that YAML reads otherwise than most people do."""
    text, line = node.value, node.start_mark.line + 1
    if node.style or node.tag.removeprefix(TAG) not in ("int", "float", "bool"):
        return None
    if len(text) > LONGEST_NUMBER:
        return line, f"a number of {len(text)} characters; write a shorter one, or quote it where it is text"
    if UNCLEAR.fullmatch(text):
        return line, f"YAML reads {text} as {yaml.load(text, Loader=LOADER)}; write that, or quote it where it is text"
    return None


def _keys(node):
    seen = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if key.tag not in (f"{TAG}str", f"{TAG}merge"):
            said = key.value if isinstance(key, yaml.ScalarNode) else "…"
            return line, f"the key {said:.40} is no text; quote it"
        if key.value in seen:
            return line, f"the key {key.value!r:.60} stands there twice, first in line {seen[key.value]}; remove one"
        seen[key.value] = line
    return None
