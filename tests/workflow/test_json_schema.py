"""An editor can check each preset while it is typed: by a schema that the preset names, and that is the settings'."""

import json
import re
import subprocess
import sys

import jsonschema
import pytest
import yaml

from salsa.workflow import overriding, yaml_files

SCHEMA = overriding.CONF / "schema.json"
PRESETS = [path for path in sorted(overriding.CONF.rglob("*.yaml")) if path.parent.name != "accelerate"]
LINE = re.compile(
    r"(# @package (?P<package>[\w.]+)\n)?# yaml-language-server: \$schema=(?P<file>[\w./]+)(?P<place>\S*)\n"
)
TINY, ARM, JUDGE, PAPER = "model/tiny.yaml", "arm/reset.yaml", "judge/openai.yaml", "experiment/paper.yaml"


def problems(place, values):
    """What an editor says of values, by the schema at a place (#/$defs/arms) of the file, or by all of it ("")."""
    schema = json.loads(SCHEMA.read_text())
    if place:
        schema = schema["$defs"][place.removeprefix("#/$defs/")] | {"$defs": schema["$defs"]}
    return [error.message for error in jsonschema.Draft7Validator(schema).iter_errors(values)]


def read(path):
    """The line by which an editor finds a preset's schema, as a match, and the preset's values."""
    text = path.read_text(encoding="utf-8")
    return LINE.match(text), yaml.load(text, Loader=yaml_files.LOADER)


def test_the_file_is_what_the_command_prints():
    command = [sys.executable, "-m", "salsa", "schema"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert SCHEMA.read_text() == printed, "settings have changed: salsa schema > conf/schema.json"


def test_every_setting_says_what_it_means():
    schema = json.loads(SCHEMA.read_text())
    sections = {"": schema, **schema["$defs"]}
    settings = {
        (name, key): value for name, own in sections.items() for key, value in own.get("properties", {}).items()
    }
    assert len(settings) > 100
    for place, setting in settings.items():
        section = schema["$defs"].get(setting.get("$ref", "").rpartition("/")[2], {})
        assert setting.get("description") or section.get("description"), place


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_presets_name_the_schema_that_they_hold_to(path):
    line, values = read(path)
    assert line, "its first lines are no `# @package` and no `# yaml-language-server: $schema=`"
    assert (path.parent / line["file"]).resolve() == SCHEMA
    whole = (line["package"] or "_global_") == "_global_"
    assert line["place"] == ("" if whole else f"#/$defs/{line['package'].partition('.')[0]}")
    assert problems(line["place"], values) == []


@pytest.mark.parametrize(
    ("preset", "keys", "value", "says"),
    [
        (TINY, ("sft", "epoch"), 8, "'epoch' was unexpected"),
        (TINY, ("sft", "epochs"), 0, "0 is less than the minimum of 1"),
        (TINY, ("sft", "epochs"), 1.5, "1.5 is not of type 'integer', 'string'"),
        (TINY, ("sft", "epochs"), "many", "'many' does not match"),
        (TINY, ("sft", "epochs"), "${ppo.epochs}", None),
        (TINY, ("sft", "stop"), "soon", "'soon' is not valid under any"),
        (TINY, ("sft", "stop"), "${oc.env:STOP}", None),
        (TINY, ("execution", "compile"), 1, "1 is not of type 'boolean', 'string'"),
        (TINY, ("ppo", "learning_rate"), 0, "0 is less than or equal to the minimum of 0"),
        (TINY, ("defaults",), "tiny", "'tiny' is not of type 'array'"),
        (ARM, ("strat",), ["1"], "'strat' was unexpected"),
        (ARM, ("reference", "every"), -1, "-1 is less than the minimum of 0"),
        (ARM, ("reference", "kind"), "rest", "'rest' is not valid under any"),
        (ARM, ("kl_schedule",), {"kind": "linear", "final": 2}, "is not valid under any"),
        (ARM, ("kl_schedule",), {"kind": "linear", "final": 1}, None),
        (ARM, ("defaults",), ["ppo@_here_", "_self_"], None),
        (JUDGE, ("max_tokens",), None, None),
        (JUDGE, ("attempts",), None, "None is not of type 'integer', 'string'"),
        (JUDGE, ("key_variable",), "sk-1", "'sk-1' does not match"),
        (PAPER, ("name",), "a/b", "'a/b' does not match"),
        (PAPER, ("judges",), {"gold": {"tie_margins": 1}}, "'tie_margins' was unexpected"),
        (PAPER, ("judges",), {"a b": {}}, "'a b' does not match any of the regexes"),
        (PAPER, ("claims",), {"stable": {"smallest_effect": 0}}, "0 is less than or equal to the minimum of 0"),
        (PAPER, ("sead",), 1, "'sead' was unexpected"),
    ],
)
def test_what_no_setting_allows_is_seen_by_an_editor(preset, keys, value, says):
    line, values = read(overriding.CONF / preset)
    place = values
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    said = problems(line["place"], values)
    assert said == [] if says is None else len(said) == 1 and says in said[0], said
