"""The reference of every setting as a page in Markdown, made of conf/schema.json and the default study.

Left out: rules over several settings, which `salsa plan` says.
"""

import dataclasses
import json
import re
import typing

from salsa.workflow import bounds, compose, config, json_schema, overriding, runs, schema

HEAD = """# Every setting

An override is `key=value`, as in `salsa run ppo.iterations=20`. In a preset the dots are levels of YAML, and `<name>`
is a name that you choose. Where the default study has another value than the schema's default, it follows that; a dash
stands for no default in the schema. `salsa schema --markdown` prints this page.
"""
TABLE = "| setting | values | default | what it is |\n|---|---|---|---|"
STUDY = "The study"
WORDS = {"integer": "whole number", "number": "number", "boolean": "true or false", "string": "text", "null": "null"}
OF_EDITORS = ("defaults", "hydra")  # what a preset's file may hold beside settings
LONGEST = 60  # characters of a value that a table shows


def page():
    """The whole page."""
    presets = runs.read_json(overriding.CONF / "schema.json")
    study, readers = schema.dump(compose.compose()[0].config), _readers(config.Config)
    texts = [HEAD]
    for name, settings in _sections(presets, study).items():
        described = _prose(presets["properties"].get(name, {}).get("description", ""))
        rows = [_row(key, node, value, readers.get(key)) for key, node, value in settings]
        texts += [f"## {name}\n", *([f"{described}\n"] if described else []), "\n".join([TABLE, *rows]) + "\n"]
    return "\n".join(texts)


def _sections(presets, study):
    """Section -> the name, the schema and the default study's value of each of its settings."""
    sections = {STUDY: []}
    for name, node in presets["properties"].items():
        if name in OF_EDITORS:
            continue
        fields, prefix = _section(presets, name, node)
        if fields is None:
            sections[STUDY].append((name, node, study.get(name)))
        else:
            sections[name] = list(_settings(presets, fields, prefix, study.get(name)))
    return sections


def _readers(cls, before=""):
    """Name of a setting -> the kinds that read it, of those that not all kinds of their section read."""
    own = cls.readers() if issubclass(cls, schema.Kind) else {}
    readers = {f"{before}{name}": kinds for name, kinds in own.items()}
    for name, hint in bounds.type_hints(cls).items():
        inner, entry = bounds.base_type(hint), ""
        if typing.get_origin(inner) is dict:
            inner, entry = bounds.base_type(bounds.item_type(hint)), ".<name>"
        if dataclasses.is_dataclass(inner):
            readers |= _readers(inner, f"{before}{name}{entry}.")
    return readers


def _section(presets, name, node):
    """The fields of a section, or of each entry of a group such as arms, and what stands before their names."""
    entry = next(iter(node.get("patternProperties", {}).values()), {})
    if "$ref" in node:
        return _fields(presets, node), name
    return (_fields(presets, entry), f"{name}.<name>") if "$ref" in entry else (None, name)


def _fields(presets, node):
    return presets["$defs"][node["$ref"].rpartition("/")[2]]["properties"]


def _settings(presets, fields, prefix, values):
    """As `_sections`, of one section: settings of sections within it have their full names."""
    values = values if isinstance(values, dict) and "<name>" not in prefix else {}
    for name, node in fields.items():
        alternatives = [other for other in node.get("anyOf", [node]) if "$ref" in other]
        if alternatives:
            yield from _settings(presets, _fields(presets, alternatives[0]), f"{prefix}.{name}", values.get(name))
        elif name not in OF_EDITORS:
            yield f"{prefix}.{name}", node, values.get(name)


def _row(key, node, value, kinds):
    default = f"`{_shown(node['default'])}`" if "default" in node else "–"
    if value is not None and value != node.get("default"):
        default += f", default study: `{_shown(value)}`"
    text, of_kinds = _prose(node.get("description", "")), ", ".join(kinds or ())
    if kinds and not text.startswith(of_kinds):
        text = f"Kind {of_kinds}: {text}"
    cells = f"`{key}`", _values(node), default, text
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _shown(value):
    text = value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def _prose(text):
    return re.sub(r"\s+", " ", text).replace("<", "&lt;")


def _values(node):
    """The type and the bounds of a setting in words; that any may be an interpolation is not repeated."""
    if "enum" in node:
        return ", ".join(f"`{value}`" for value in node["enum"])
    alternatives = node.get("anyOf") or node.get("oneOf")
    if alternatives:
        words = [_values(other) for other in alternatives if not _is_interpolation(other)]
        return " or ".join(dict.fromkeys(words))
    kinds = node.get("type", [])
    kind = kinds if isinstance(kinds, str) else next(iter(kinds), "any")
    if kind == "array":
        return f"list of: {_values(node['items'])}"
    if kind == "object":
        inner = next(iter(node.get("patternProperties", {}).values()), node.get("additionalProperties", {}))
        return f"mapping of names to: {_values(inner)}" if inner else "mapping"
    return " ".join(filter(None, [WORDS.get(kind, kind), _bounds(node)]))


def _is_interpolation(node):
    return node.get("pattern") == json_schema.INTERPOLATION["pattern"] and node.get("type") == "string"


def _bounds(node):
    low, above = node.get("minimum"), node.get("exclusiveMinimum")
    high, below = node.get("maximum"), node.get("exclusiveMaximum")
    if low is not None and high is not None:
        return f"from {low:,} to {high:,}"
    bounds = {"from": low, "above": above, "up to": high, "below": below, "of up to": node.get("maxLength")}
    words = [f"{word} {value:,}" for word, value in bounds.items() if value is not None]
    return ", ".join(words) + " characters" * ("maxLength" in node)
