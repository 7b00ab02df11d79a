"""Every setting has a bound beside it, and nothing outside it is taken."""

import dataclasses
import inspect
import json
import math
import re
import types
import typing
from fractions import Fraction

import pytest
from pydantic import Discriminator

from salsa import anchors, data, judges
from salsa.algorithms.ppo import Ppo
from salsa.report.sections import arms
from salsa.workflow import bounds, compose, config, schema, stages
from salsa.workflow.bounds import Items, Range, Text, fraction
from salsa.workflow.messages import SettingError

SCHEMAS = [cls for _, cls in inspect.getmembers(config, dataclasses.is_dataclass) if cls.__module__ == config.__name__]
FIELDS = [(cls, f) for cls in SCHEMAS for f in dataclasses.fields(cls)]
ENTRIES = {"arms": "salsa", "benchmarks": "in_distribution", "judges": "gold", "claims": "stable"}
HUGE = [10**30, 10**400, 1e30, 1e308]
WRONG = {  # for a type, values of others
    int: [1.5, "1", True, None, [1], {"a": 1}, math.nan, math.inf],
    float: ["1", True, None, [1.0], {}, math.nan, math.inf, -math.inf],
    str: [1, 1.5, True, None, ["x"], {}],
    bool: [0, 1, "true", None, []],
    list: ["x", 1, None, {}],
    dict: ["x", 1, None, []],
}


def rule_of(hint):
    """The Range or Text of a type, its choices, or None."""
    rules = [mark for mark in bounds.marks(hint) if isinstance(mark, Range | Text)]
    if typing.get_origin(bounds.base_type(hint)) is typing.Literal:
        return typing.get_args(bounds.base_type(hint))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return rule_of(typing.get_args(hint)[0])
    return rules[0] if rules else None


def is_optional(hint):
    hint = hint.__origin__ if hasattr(hint, "__metadata__") else hint
    return type(None) in typing.get_args(hint)


def kind_of(hint):
    """int, float, str, bool, list, dict or a dataclass."""
    base = bounds.base_type(hint)
    origin = typing.get_origin(base)
    return str if origin is typing.Literal else origin or base


def leaves(cls=config.Config, path=()):
    """(path, field, type) of every setting, through one entry of each dictionary."""
    for f in dataclasses.fields(cls):
        hint = bounds.type_hints(cls)[f.name]
        if dataclasses.is_dataclass(kind_of(hint)):
            yield from leaves(kind_of(hint), (*path, f.name))
        elif f.name in ENTRIES and not path:
            yield from leaves(bounds.item_type(hint), (*path, f.name, ENTRIES[f.name]))
        else:
            yield (*path, f.name), f, hint


LEAVES = {".".join(path): (path, f, hint) for path, f, hint in leaves()}


@pytest.fixture(scope="module")
def values():
    (composed,) = compose.compose([])
    return schema.dump(composed.config)


def refused(values, path, value):
    """What `schema.from_dict` says of the values with another at a path, or None."""
    changed = json.loads(json.dumps(values))
    place = changed
    for name in path[:-1]:
        if place[name] is None:  # a null of a group
            place[name] = {}
        place = place[name]
    place[path[-1]] = value
    try:
        schema.from_dict(config.Config, changed)
    except SettingError as error:
        assert "\n" not in str(error) and len(str(error)) < 700
        if re.search(
            "alone, and this is|in the loss, its|longer than|of a batch|; change one|make it smaller|processes of a",
            str(error),
        ):
            return None  # a rule of several settings
        assert str(error).startswith(".".join(path)), str(error)
        return str(error)
    return None


@pytest.mark.parametrize(("cls", "f"), FIELDS, ids=lambda value: getattr(value, "__name__", getattr(value, "name", "")))
def test_every_field_declares_its_bound(cls, f):
    hint = bounds.type_hints(cls)[f.name]
    kind, rule = kind_of(hint), rule_of(hint)
    if dataclasses.is_dataclass(kind) or kind is bool:
        return
    if kind in (list, dict):
        if cls.__name__.endswith("Settings") and not any(isinstance(mark, Items) for mark in bounds.marks(hint)):
            return  # what the plan makes
        kind, rule = kind_of(bounds.item_type(hint)), rule_of(bounds.item_type(hint))
    if kind is int:
        assert rule.at_least is not None and rule.at_most is not None
    elif kind is float:
        assert None in (rule.at_least, rule.above) and (rule.at_least, rule.above) != (None,) * 2
    elif kind is str and not cls.__name__.endswith("Settings"):
        assert rule, f"{cls.__name__}.{f.name}: say in salsa/workflow/config.py what it may be"


@pytest.mark.parametrize("key", LEAVES)
def test_what_no_bound_allows_is_refused(key, values):
    path, _, hint = LEAVES[key]
    rule, kind, optional = rule_of(hint), kind_of(hint), is_optional(hint)
    mix = any(isinstance(mark, schema.Sum) for mark in bounds.marks(hint))  # may be the name of an ingredient
    listed = any(isinstance(mark, Discriminator) for mark in bounds.marks(hint))  # a number, or a list of some
    for value in WRONG[kind]:
        if listed and value == [1]:
            assert refused(values, path, value) is None
        elif not (value is None and optional) and not taken_as_text(kind, rule, value) and not (mix and value == "x"):
            assert refused(values, path, value), value
    if kind is list:
        item = kind_of(bounds.item_type(hint))
        rule = rule_of(bounds.item_type(hint))
        for value in WRONG[item]:
            assert taken_as_text(item, rule, value) or refused(values, path, [value]), value
        assert refused(values, path, _good(rule, item) * 1001)
        return
    if isinstance(rule, Range) and not rule.in_text:
        for value in [-1, 0, *HUGE]:
            inside = _inside(rule, value) and abs(value) <= 1e308 and (kind is float or isinstance(value, int))
            assert (refused(values, path, value) is None) == inside, value
        for end, outside in ((rule.at_least, -1), (rule.at_most, 1)):
            if end is not None:
                step = 1 if kind is int else abs(end) * 1e-9 or 1e-12
                assert refused(values, path, kind(end)) is None
                assert refused(values, path, end + outside * step)
        for end in (rule.above, rule.below):
            assert end is None or refused(values, path, kind(end))
    if isinstance(rule, tuple):
        assert refused(values, path, "something else") and refused(values, path, "\x1b[31m")
        assert all(refused(values, path, choice) is None for choice in rule)
    if isinstance(rule, Text):
        assert (refused(values, path, "") is None) == rule.empty
        assert refused(values, path, "x" * (rule.longest + 1)) and refused(values, path, "a\0b")
        assert refused(values, path, "\ud800")
        assert (refused(values, path, "a\nb") is None) == rule.lines


def taken_as_text(kind, rule, value):
    """Whether a number stands for its text: YAML reads 1 and 0.25 as numbers where a text is asked for."""
    return kind is str and not isinstance(rule, tuple) and type(value) in (int, float)


def _good(rule, kind):
    """A list with one item that its rule allows."""
    if isinstance(rule, tuple):
        return [rule[0]]
    return [{int: 0, float: 0.5}.get(kind, "1")]


def _inside(rule, value):
    return not (
        (rule.at_least is not None and value < rule.at_least)
        or (rule.above is not None and value <= rule.above)
        or (rule.at_most is not None and value > rule.at_most)
        or (rule.below is not None and value >= rule.below)
    )


def test_choices_are_those_of_the_code():
    def choices(settings):
        return set(rule_of(bounds.type_hints(settings)["kind"]))

    assert choices(schema.KlSchedule) == set(arms.SCHEDULES)
    assert choices(config.Reference) == set(anchors.kinds())
    assert choices(config.Judge) == set(judges.kinds())
    assert choices(config.Benchmark) == set(data.benchmark_kinds())
    assert choices(config.Task) == set(data.world_kinds())
    kinds = (schema.KlSchedule, config.Reference, config.Judge, config.Benchmark, config.Task, config.Corpus)
    for settings in kinds:
        readers = settings.readers()
        assert set(readers) <= {f.name for f in dataclasses.fields(settings)}
        assert set().union(*readers.values()) <= choices(settings)


@pytest.mark.parametrize(
    ("cls", "given", "says"),
    [
        (config.SftSettings, {}, "seed: no value"),
        (config.Model, {}, "name: no value"),
        (config.Sft, {"epoch": 1}, "epoch: no such setting; did you mean epochs? Sft has batch_size,"),
        (config.TRAINING["ppo"], {"ppo": {}}, "seed: no value"),
        (
            config.BaseSettings,
            {"model": {"name": "a", "source": "hub", "layers": 1}},
            "model.layers: no such setting; model has",
        ),
        (config.BaseSettings, {"model": {"name": "a", "source": "disk"}}, "model.source=disk: no such choice"),
        (config.BaseSettings, {"model": [1]}, "model=[1]: no group"),
        (config.Sft, {"warmup": 1}, "warmup=1: must be at least 0, and below 1"),
        (Ppo, {"adam_beta1": 1}, "adam_beta1=1: must"),
        (Ppo, {"epochs": True}, "epochs=True: is true or false, and has to be a whole number"),
        (Ppo, {"learning_rate": math.nan}, "learning_rate=nan: must be above 0, and finite"),
        (config.Arm, {"start": ["1e999999999"]}, "start: 1e999999999: no number"),
        (
            config.Arm,
            {"reference": {"weights": [True]}},
            "reference.weights: True: is true or false, and has to be text",
        ),
        (config.Config, {"arms": {"../x": {}}}, "cannot be part of a file name"),
        (config.Config, {"arms": {"x": {"kl_scale": 0}}}, "arms.x.kl_scale=0: must be above 0"),
        (config.Judge, {"kind": "openai", "key_variable": "sk-secret"}, "key_variable: must be the name"),
        (config.Execution, {"trackers": ["wandb", "a"]}, "trackers: a: no such choice"),
        (config.Report, {"seed": 2**32}, "seed=4294967296: must be at least 0, and at most 4294967295"),
    ],
)
def test_settings_by_hand_are_held_to_the_same(cls, given, says):
    with pytest.raises(SettingError) as error:
        schema.from_dict(cls, given)
    assert says in str(error.value) and "\n" not in str(error.value) and "sk-secret" not in str(error.value)


def test_settings_by_hand_become_dataclasses():
    given = {"seed": 1, "kl_coef": 0, "start": ["1"], "reference": {"weights": ["1/2", "1/2"]}, "ppo": {}}
    made = schema.from_dict(config.TRAINING["ppo"], given | {"lengths": {"prompt": 8}})
    reference = config.Reference(weights=["1/2", "1/2"])
    assert made == config.TRAINING["ppo"](1, 0.0, ["1"], reference, Ppo(), config.Lengths(8))
    assert isinstance(made.kl_coef, float)  # so that 0 has the address of 0.0
    for cls in (Ppo, config.Execution, config.Evaluate, config.Stability):
        assert schema.from_dict(cls, schema.dump(cls())) == cls()
    assert schema.from_dict(config.BaseSettings, {"model": {"name": "a", "source": "hub"}, "base": None}).base is None


def test_a_stage_names_the_file_of_what_it_refuses(tmp_path):
    file = tmp_path / "settings.json"
    file.write_text('{"seed": 0, "sft": {"epochs": 0}, "lengths": {}}')
    with pytest.raises(SystemExit) as stopped:
        arguments = ["--settings", str(file), "--output", str(tmp_path / "out")]
        stages.SFT.command(lambda *_: None, 1, argv=arguments)
    assert "sft.epochs=0: must be at least 1, and at most 10000" in str(stopped.value) and str(file) in str(
        stopped.value
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["1", "0.25", "1/3", "-1/2", "1e-3", " 2/4 ", "+3", "1E2", ".5"])
def test_fractions_are_those_of_the_standard_library(text):
    assert fraction(text) == Fraction(text)


@pytest.mark.parametrize("text", ["", "x", "nan", "inf", "1/0", "1e999999999", "1e-999999999", "9" * 200, "1/2/3", "½"])
def test_what_is_no_moderate_fraction_is_none(text):
    assert fraction(text) is None
