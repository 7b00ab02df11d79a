"""From overrides to checked configurations: what Hydra composes, pydantic validates and `checks` looks over.

Everything that a user can get wrong in a configuration is refused here, as a `UserError` of one line, before anything
is computed. Stages do not import this module: they receive plain settings.
"""

import contextlib
import re
from dataclasses import replace
from pathlib import Path

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, flag_override
from omegaconf.errors import OmegaConfBaseException

from salsa.workflow import (
    bounds,
    checks,
    config,
    crossing,
    designs,
    ingredients,
    messages,
    overriding,
    policies,
    repository,
    schema,
    yaml_files,
)
from salsa.workflow.messages import UserError
from salsa.workflow.overriding import ENTRIES, ENTRY, applied, expand, first_line, labels, parse, presets, recorded

RESOLVER = re.compile(r"(?<!\\)\$\{\s*([\w.]+)\s*:")  # ${oc.env:HOME}, but not ${ppo.temperature}
# What Hydra and OmegaConf raise for a mistake; those of Python's own where they expect none.
HYDRAS = (
    *(HydraException, OmegaConfBaseException),
    *(ValueError, TypeError, AttributeError, AssertionError, ArithmeticError, OSError),
)
# Overrides that leave a study what its name says.
UNADDRESSED = re.compile(r"(experiment|results|execution\.\w+|objective\.\w+)=")

ConfigStore.instance().store(name="schema", node=schema.defaults(config.Config))


def compose(overrides=()):
    """The configurations that a list of Hydra overrides asks for, each checked: a list of `policies.Composed`.

    Comma sweeps, `range()`, `choice()` and `glob()` are expanded by their Cartesian product, in order; see
    `compose_points` for what each point gives.

    Raises:
        UserError: one line; see `checks` for what is refused.
    """
    overriding.check(overrides)
    return compose_points(expand(list(overrides)))


def compose_points(points):
    """The configurations of the points of a sweep, each a list of overrides that are no sweeps.

    The companions of an experiment follow it: each is one override, composed with those of the point. Each is a
    `policies.Composed`.

    Raises:
        UserError: one line; see `checks` for what is refused.
    """
    if not overriding.CONF.is_dir():
        raise UserError(
            f"{overriding.CONF}: no such folder; salsa reads its configuration from the repository (pip install -e .)"
        )
    composed = []
    with _hydra():
        for point, label in zip(points, labels(points), strict=True):
            overriding.check(point)
            study, choices = _compose_one(point)
            companions = _companions(study.companions, point)
            if len(points) == 1 and not companions:
                _check_read(study, point)
            written = [point, *(overrides for _, overrides in companions)]
            together = [(study, choices), *map(_compose_one, written[1:])]
            keys = dict.fromkeys(key for key, _ in companions)
            apart = [{key: _choice(study, choices, key) for key in keys} for study, choices in together]
            together = [
                replace(_planned(study, point, label | values, choices.get("experiment")), overrides=recorded(own))
                for (study, choices), values, own in zip(together, apart, written, strict=True)
            ]
            _check_links(together)
            composed += together
    return composed


def _companions(wanted, point):
    """The companions of a point: the key of what sets one apart, and its overrides.

    What the point itself overrides is the same for all, so that a companion which differs in nothing else is left out;
    the experiment it overrides is the one that names the companions.
    """
    given = {override.get_key_element(): text for override, text in zip(parse(point), point, strict=True)}
    companions = []
    for override, text in zip(parse(wanted), wanted, strict=True):
        key = override.get_key_element()
        if override.is_sweep_override() or not re.match(r"[\w./]+=", text):
            raise UserError(f"companions: {text}: not one override; write key=value, such as experiment=reviews")
        of_one = next((name for name in (f"{key}.path", f"{key}.revision") if name in given), None)
        if key not in given and of_one:
            raise UserError(f"{given[of_one]}: one model's, and {text} is planned too; choose one with {key}=…")
        if key == "experiment" or key not in given:
            others = [other for name, other in given.items() if name != key]
            companions.append((key, [text, *others]))
    return companions


def _check_links(composed):
    """UserError where two studies of one command would have one readable name."""
    links = [study.link for study in composed if study.link]
    twice = next((link for link in links if links.count(link) > 1), None)
    if twice:
        raise UserError(f"companions: two studies are called {Path(twice).name}; let `name` say what sets them apart")


@contextlib.contextmanager
def _hydra():
    """Hydra's global state on the project's configuration, and afterwards as it was: a sweep may be under way."""
    before = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        opened = initialize_config_dir(config_dir=str(overriding.CONF), version_base="1.3", job_name="salsa")
        with opened, yaml_files.checked():
            yield
    finally:
        GlobalHydra.instance().hydra = before


def _check_read(study, overrides):
    """Refuse overrides of what nothing reads: how a model is made that is taken, an algorithm that trains nothing."""
    source = study.model.source
    for override in parse(overrides):
        key = override.get_key_element().lstrip("+~")
        section = key.partition(".")[0]
        if re.match(r"(base|model\.architecture)(\.|$)", key) and source != "pretrain":
            raise UserError(f"{key}: of model.source=pretrain alone, and this is {source}; leave it out")
        if section in config.ALGORITHMS and section not in policies.algorithms_of(policies.expanded_arms(study)):
            raise UserError(f"{key}: no arm of this study is trained by {section}; leave it out")


def _compose_one(overrides):
    """One configuration, by Hydra, as a `config.Config`, and its presets (group -> name); errors as one line."""
    try:
        composed = hydra_compose("config", [applied(override) for override in overrides], return_hydra_config=True)
        return configuration(composed, overrides), dict(composed.hydra.runtime.choices)
    except RecursionError:
        raise UserError(
            f"{' '.join(overrides)[:200]}: values that refer to each other; write one of them out"
        ) from None
    except HYDRAS as error:
        raise UserError(one_line(error, overrides)) from None


def configuration(composed, overrides):
    """The `config.Config` of what Hydra composed, its arms crossed. UserError or one of `HYDRAS` for what is wrong."""
    with flag_override(composed, ["struct", "readonly"], False):
        tree = OmegaConf.masked_copy(composed, [key for key in composed if key != "hydra"])
    _check_resolvers(OmegaConf.to_container(tree, resolve=False))
    _check_entries(tree, overrides)
    missing = sorted(OmegaConf.missing_keys(tree))
    if missing:
        raise UserError(f"{missing[0]}: no value; give one with {missing[0]}=…, or choose another preset")
    values = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    keys = {override.lstrip("+").partition("=")[0] for override in overrides}
    if "model.path" in keys and "model.revision" not in keys:
        values["model"]["revision"] = None  # the preset's commit is one of the preset's own path
    grids = any(re.match(r"\+*algorithm_kl_coefs\b", override) for override in overrides)
    return crossing.crossed(validated(values, overrides), grids_of_others=grids)


def _check_entries(tree, overrides):
    """Refuse overrides of an arm, benchmark, judge or claim that is none: a new one is written with +."""
    stated = [override for override in overrides if ENTRY.match(override)]
    if not stated:
        return
    before = hydra_compose("config", [applied(override) for override in overrides if override not in stated])
    for group, name in (ENTRY.match(override).groups() for override in stated):
        if name not in before[group]:
            raise UserError(f"{group}.{name}: no such setting; a new entry of {group} is written with + before it")


def fill_entries(composed):
    """Fill in the defaults of arms, benchmarks, judges and claims, of which Hydra's tree has what is written alone.

    What is said of an arm that was not chosen stays as it is: filled in, it would make one.
    """
    hints = bounds.type_hints(config.Config)
    for group in ENTRIES:
        for name, entry in composed[group].items():
            if isinstance(entry, DictConfig) and (group != "arms" or _makes_an_arm(name, entry)):
                composed[group][name] = OmegaConf.merge(schema.defaults(bounds.item_type(hints[group])), entry)


def validated(values, overrides=()):
    """The `config.Config` of nested dictionaries. UserError where pydantic refuses them."""
    left_out = _left_out_arms(values.get("arms"), overrides)
    arms = {name: arm for name, arm in values["arms"].items() if name not in left_out} if left_out else values["arms"]
    try:
        study = schema.from_dict(config.Config, values | {"arms": arms})
        return _without_ingredients_of(left_out, study, overrides)
    except messages.UnknownKey as error:
        raise UserError(_unknown(error.path)) from None
    except messages.SettingError as error:
        raise UserError(str(error)) from None


def _unknown(path):
    folders = {path.name for path in overriding.CONF.iterdir() if path.is_dir()}
    groups = folders - {"accelerate", "hydra", "model_data"}  # which nobody chooses
    return messages.unknown_key(config.Config, path, groups)


def _left_out_arms(arms, overrides):
    """The names of the arms that are none, because their presets were not chosen.

    What an experiment says of an arm that another choice of arms has left out makes none: it would be trained as plain
    PPO. UserError where there is no arm of that name to leave out, and where an override is of one that is left out.
    """
    if not isinstance(arms, dict):
        return []
    left_out = [name for name, arm in arms.items() if isinstance(arm, dict) and not _makes_an_arm(name, arm)]
    for name in left_out:
        if name not in presets("arm"):
            raise UserError(f"arms.{name}: no such arm; there are {', '.join(presets('arm'))}, and conf/arm takes more")
        if name in _stated("arms", overrides):
            raise UserError(f"arms.{name}: is not among the chosen arms; add {name} to arm=[…], or leave this out")
    return left_out


def _makes_an_arm(name, arm):
    """Whether what is said of an arm makes one, of a name that is a preset's or a new one."""
    said_of_both = {"kl_coefs", "replicates", "description"}
    if name in presets("arm"):  # whose file says where it starts and what it is anchored to
        said_of_both |= {"seed", "kl_schedule"}
    return not {*arm} <= said_of_both


def _stated(group, overrides):
    """The entries of a group that overrides speak of."""
    matches = (re.match(rf"[+~]*{group}\.([\w+-]+)", override) for override in overrides)
    return {match[1] for match in matches if match}


def _without_ingredients_of(left_out, study, overrides):
    """The study without the SFT variants, models and mixes that left-out arms alone are made of.

    What an override speaks of stays, and is refused where nothing reads it.
    """
    files = [OmegaConf.load(overriding.CONF / "arm" / f"{name}.yaml") for name in left_out]
    unread = ingredients.unread(study) if files else {}
    for group, names in unread.items():
        own = {name for file in files for name in file.get(group, ())} - _stated(group, overrides)
        entries = getattr(study, group)
        study = replace(study, **{group: {name: entries[name] for name in entries if name not in own & names}})
    return study


def _planned(study, overrides, point, experiment):
    """The `policies.Composed` of a configuration. UserError where its sections do not go together."""
    path = study.execution.accelerate_config
    if path and not Path(path).is_file() and (repository.ROOT / path).is_file():  # a preset's, wherever one stands
        study.execution.accelerate_config = str(repository.ROOT / path)
    checks.check(study)
    designs.check_registered(study, experiment)
    for arm in _stated("arms", overrides):
        if any(re.match(rf"\+*arms\.{re.escape(arm)}\.replicates=", override) for override in overrides):
            designs.check_count(study, arm)
    named = all(UNADDRESSED.match(override) for override in overrides)
    link = f"studies/{study.name}" if named else None
    return policies.Composed(study, policies.expanded_arms(study), checks.content_of_files(study), link, point)


def _check_resolvers(value, path=()):
    """Refuse values that something else makes when they are read, such as the environment: files would hold them."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in inner:
        _check_resolvers(item, (*path, str(name)))
    resolver = RESOLVER.search(value) if isinstance(value, str) else None
    if resolver:
        raise UserError(
            f"{'.'.join(path)}: calls {resolver[1]}, and what it finds would stand in manifests and reports; write the "
            "value itself"
        )


def one_line(error, overrides):
    """What Hydra or OmegaConf says, in one line with what is possible instead."""
    text = str(error)
    missing = re.search(r"Could not (?:find|load) '([\w/-]+)/([^/']*)'", text)
    if missing:
        group, name = missing.groups()
        return f"{group}={name}: no such preset; there are {', '.join(presets(group)) or 'none'}"
    group = re.search(r"Could not override '([^']+)'\.\s+No match in the defaults list", text)
    if group:
        return _unknown(group[1].split("."))
    cause = error
    while cause is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__ or cause.__context__
    said_key = re.search(r"(?m)^\s*full_key: (\S+)$", text)  # of an error that is none of OmegaConf's own classes
    key = getattr(cause, "full_key", None) or (said_key and said_key[1])
    if not key:
        return f"{first_line(error)} (overrides: {bounds.shown(' '.join(overrides) or 'none')})"
    if "Cannot merge DictConfig with ListConfig" in str(cause):
        return f"{key}: is a list, which no mapping takes the place of; write it as text, such as '1/2 sft0 + 1/2 sft1'"
    if re.search(r"Key '.*' (is )?not in|is not in struct", str(cause)):
        return _unknown(key.split("."))
    return f"{key}: {first_line(cause or error)}"


def _choice(study, choices, key):
    """A study's value of an overridden key, or of a group its presets, as text."""
    if key == "algorithm":
        return "[" + ",".join(crossing.chosen(study)) + "]"
    if key in overriding.SEVERAL:
        return "[" + ",".join(getattr(study, f"{key}s")) + "]"
    return str(choices.get(key) or _value(study, key))


def _value(study, key):
    value = study
    for name in key.split("."):
        value = value[name] if isinstance(value, dict) else getattr(value, name)
    return value
