"""From a command line to checked configurations: Hydra's composition, its sweeps, and what a schema cannot say.

Everything that a user can get wrong in a configuration is refused here, as a `UserError` of one line, before anything
is computed. Stages do not import this module: they receive plain settings.
"""

import contextlib
import difflib
import hashlib
import importlib.util
import itertools
import math
import re
import typing
from dataclasses import asdict, fields, is_dataclass
from fractions import Fraction
from pathlib import Path

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, RangeSweep
from hydra.errors import HydraException
from omegaconf import OmegaConf, flag_override
from omegaconf.errors import OmegaConfBaseException

from salsa import anchors, data, judges
from salsa.data import sources
from salsa.rl import folders
from salsa.workflow import bounds, config, jobs, policies, runs, yaml_files
from salsa.workflow.runs import UserError

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"
TEMPLATES = ROOT / "salsa" / "data" / "templates"

ADAPTED = ("sft", "reward_model", "ppo")  # stages that may train low-rank adapters
LAUNCHED = ("MULTI_GPU", *jobs.SHARDED)  # for which `accelerate launch` starts several processes
TAKEN = re.compile(r"sft\d+|soup|alpha_\d.*", re.IGNORECASE)
MOST_POLICIES = 5000  # of a study: its plan takes a minute
MOST_POINTS = 10000  # of a plane: each is a model that answers prompts
GROUPS = ("model", "data", "benchmark", "judge", "arm", "experiment")
SEVERAL = ("arm", "benchmark", "judge")  # groups of which a study takes several presets
MOST_SWEPT = 1000  # points of a sweep
LONGEST_OVERRIDE = 10000  # characters
DEEPEST_OVERRIDE = 20  # brackets in each other
RESOLVER = re.compile(r"(?<!\\)\$\{\s*([\w.]+)\s*:")  # ${oc.env:HOME}, but not ${ppo.temperature}
# What Hydra and OmegaConf raise for a mistake; those of Python's own where they expect none.
HYDRAS = (
    *(HydraException, OmegaConfBaseException),
    *(ValueError, TypeError, AttributeError, AssertionError, ArithmeticError, OSError),
)
READ_BY = {  # settings that some kinds read alone -> those kinds
    config.Task: data.read_by(data.world_kinds()),
    config.Corpus: dict.fromkeys(("seed", "documents"), tuple(k for k, w in data.world_kinds().items() if w.corpus)),
    config.Benchmark: data.read_by(data.benchmark_kinds()),
    config.Judge: data.read_by(judges.kinds()),
}
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# Hydra adds no entry to a typed dictionary, and puts nothing into a null: OmegaConf merges these overrides.
MERGED = re.compile(r"\+(arms|benchmarks|judges|claims)\.[\w.+-]+=|arms\.[\w+-]+\.kl_schedule[.=]")
UNADDRESSED = re.compile(
    r"(experiment|results|execution\.\w+|objective\.\w+)="
)  # overrides that leave a study what its name says

ConfigStore.instance().store(name="schema", node=config.Config)


def compose(overrides=()):
    """The configurations that a list of Hydra overrides asks for, each checked, as plain dictionaries.

    Comma sweeps, `range()`, `choice()` and `glob()` are expanded by their Cartesian product, in order; see
    `compose_points` for what each point gives.

    Raises:
        UserError: one line; see `validate` for what is refused.
    """
    check_overrides(overrides)
    return compose_points(expand(list(overrides)))


def compose_points(points):
    """The configurations of the points of a sweep, each a list of overrides that are no sweeps.

    The companions of an experiment follow it: each is one override, composed with those of the point. Each dictionary
    is a `config.Config`, with three entries more: `files`, the content of the local files that its runs read (run ->
    name -> `<bytes>:<sha256>`); `link`, the readable name of the study's folder where nothing but the experiment was
    chosen, or None; `point`, what sets it apart in the sweep, or from its companions (key -> value as text; nothing
    where it is alone).

    Raises:
        UserError: one line; see `validate` for what is refused.
    """
    if not CONF.is_dir():
        raise UserError(f"{CONF}: no such folder; salsa reads its configuration from the repository (pip install -e .)")
    composed = []
    with _hydra():
        for point, label in zip(points, labels(points), strict=True):
            check_overrides(point)
            values, choices = _compose_one(point)
            companions = _companions(values["companions"], point)
            if len(points) == 1 and not companions:
                _check_read(values, point)
            together = [(values, choices), *(_compose_one(overrides) for _, overrides in companions)]
            keys = dict.fromkeys(key for key, _ in companions)
            apart = [
                {key: str(choices.get(key) or _value(values, key)) for key in keys} for values, choices in together
            ]
            together = [_checked(values, point, label | own) for (values, _), own in zip(together, apart, strict=True)]
            _check_links(together)
            composed += together
    return composed


def _companions(wanted, point):
    """The companions of a point: the key of what sets one apart, and its overrides.

    What the point itself overrides is the same for all, so that a companion which differs in nothing else is left out;
    the experiment it overrides is the one that names the companions.
    """
    given = {override.get_key_element(): text for override, text in zip(_parse(point), point, strict=True)}
    found = []
    for override, text in zip(_parse(wanted), wanted, strict=True):
        key = override.get_key_element()
        if override.is_sweep_override() or not re.match(r"[\w./]+=", text):
            raise UserError(f"companions: {text}: not one override; write key=value, such as experiment=reviews")
        of_one = next((name for name in (f"{key}.path", f"{key}.revision") if name in given), None)
        if key not in given and of_one:
            raise UserError(f"{given[of_one]}: one model's, and {text} is planned too; choose one with {key}=…")
        if key == "experiment" or key not in given:
            others = [other for name, other in given.items() if name != key]
            found.append((key, [text, *others]))
    return found


def _check_links(composed):
    """UserError where two studies of one command would have one readable name."""
    links = [values["link"] for values in composed if values["link"]]
    twice = next((link for link in links if links.count(link) > 1), None)
    if twice:
        raise UserError(f"companions: two studies are called {Path(twice).name}; let `name` say what sets them apart")


@contextlib.contextmanager
def _hydra():
    """Hydra's global state on the project's configuration, and afterwards as it was: a sweep may be under way."""
    before = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        opened = initialize_config_dir(config_dir=str(CONF), version_base="1.3", job_name="salsa")
        with opened, yaml_files.checked():
            yield
    finally:
        GlobalHydra.instance().hydra = before


def _checked(values, overrides, point):
    path = values["execution"]["accelerate_config"]
    if path and not Path(path).is_file() and (ROOT / path).is_file():  # a preset's, wherever one stands
        values["execution"]["accelerate_config"] = str(ROOT / path)
    validate(values)
    values["files"] = content_of_files(values)
    named = all(UNADDRESSED.match(override) for override in overrides)
    values["link"] = f"studies/{values['name']}" if named else None
    values["point"] = point
    return values


def read_points(path):
    """The points in a JSON file: a list of lists of overrides. UserError where it is no such file."""
    try:
        points = runs.read_json(path)
    except OSError as error:
        raise UserError(f"{path}: {_first_line(error)}; give a JSON file with a list of lists of overrides") from None
    proper = isinstance(points, list) and points and all(isinstance(point, list) for point in points)
    if not proper or not all(isinstance(override, str) for point in points for override in point):
        raise UserError(f'{path}: not a list of lists of overrides, such as [["seed=0"], ["seed=1"]]; mend the file')
    return points


def labels(points):
    """What sets each point apart: the overrides whose values differ between points, as key -> value.

    Values are as Hydra writes them (1e-5 is 1e-05), so that a point says the same of itself wherever it comes from.
    """
    parsed = []
    for point in points:
        sweep = next((text for text, o in zip(point, _parse(point), strict=True) if o.is_sweep_override()), None)
        if sweep:
            raise UserError(f"{sweep}: a sweep within a point; give each of its values a point of its own")
        pairs = ((override.get_key_element().lstrip("+"), override) for override in _parse(point))
        parsed.append({key: "" if o.is_delete() else o.get_value_element_as_str() for key, o in pairs})
    keys = dict.fromkeys(key for point in parsed for key in point)
    swept = [key for key in keys if len({point.get(key) for point in parsed}) > 1]
    return [{key: point[key] for key in swept if key in point} for point in parsed]


def expand(overrides):
    """The points of a sweep, each a list of overrides that are no sweeps. UserError for more than `MOST_SWEPT`."""
    axes = []
    for text, override in zip(overrides, _parse(overrides), strict=True):
        if not override.is_sweep_override():
            axes.append([text])
            continue
        key = override.get_key_element()
        values = _swept(override)
        if not values:
            raise UserError(f"{bounds.shown(text)}: a sweep without values; give them as {key}=a,b or range(1,4)")
        axes.append([f"{key}={value}" for value in values])
        if math.prod(map(len, axes)) > MOST_SWEPT:
            raise UserError(f"{bounds.shown(text)}: a sweep of more than {MOST_SWEPT} points; give fewer values")
    return [list(point) for point in itertools.product(*axes)]


def _swept(override):
    """The values of a sweep as texts; of a long one no more than show that it is too long."""
    value = override.value()
    if isinstance(value, Glob):
        return value.filter(presets(override.key_or_group))
    if not override.is_discrete_sweep():
        return []
    if isinstance(value, RangeSweep):
        ends = (value.start, value.stop, value.step)
        if not all(isinstance(end, int | float) and math.isfinite(end) for end in ends) or not value.step:
            return []
        value.shuffle = value.shuffle and (value.stop - value.start) / value.step <= MOST_SWEPT
    return list(itertools.islice(override.sweep_string_iterator(), MOST_SWEPT + 1))


def check_overrides(overrides):
    """Refuse overrides of which something would be ignored, or is no preset. UserError, one line."""
    seen = {}
    for text, override in zip(overrides, _parse(overrides), strict=True):
        key, shown = override.get_key_element().lstrip("+~"), bounds.shown(text)
        if not key:
            raise UserError(f"{shown}: no key stands before =; write key=value")
        if key in seen:
            raise UserError(f"{seen[key]} and {shown}: {bounds.shown(key)} is given twice; leave one out")
        seen[key] = shown
        if re.match(r"hydra(\.|/|$)", key):
            raise UserError(f"{shown}: a setting of Hydra, which `salsa run` alone reads; leave it out")
        if not override.is_delete() and not override.is_sweep_override():
            _check_value(override, shown)


def _check_value(override, shown):
    """Refuse a choice of presets that are none, or that one alone is chosen of, and a value that changes nothing."""
    key, value = override.key_or_group, override.value()
    if value == {} and not override.is_add():
        raise UserError(f"{shown}: changes nothing; name the settings that it shall change")
    if _type_of(key) is bool and not isinstance(value, bool) and not str(value).startswith("${"):
        raise UserError(f"{shown}: is neither true nor false; write one of them")  # which OmegaConf makes of a 2
    if key not in GROUPS or override.package is not None:
        return
    chosen = value if isinstance(value, list) else [value]
    if isinstance(value, list) and key not in SEVERAL:
        raise UserError(f"{shown}: one {key} is chosen, not a list; write {key}=NAME")
    for name in map(str, chosen):
        if name not in presets(key):
            there = ", ".join(presets(key)) or "none"
            raise UserError(f"{key}={bounds.shown(name)}: no such preset; there are {there}")
    if len(set(map(str, chosen))) < len(chosen):
        raise UserError(f"{shown}: a preset stands there twice; leave one out")


def _type_of(key):
    """The type of a setting by its path, or None where the schema has no such path."""
    hint = config.Config
    for name in key.split("."):
        if is_dataclass(hint):
            hint = bounds.required(bounds.type_hints(hint).get(name))
        else:
            hint = bounds.item_type(hint) if typing.get_origin(hint) is dict else None
    return hint


def _check_read(values, overrides):
    """Refuse overrides of what makes a model, where the model is not made but taken."""
    source = values["model"]["source"]
    keys = [override.get_key_element().lstrip("+~") for override in _parse(overrides)]
    ignored = next((key for key in keys if re.match(r"(base|model\.architecture)(\.|$)", key)), None)
    if ignored and source != "pretrain":
        raise UserError(f"{ignored}: of model.source=pretrain alone, and this is {source}; leave it out")


def _parse(overrides):
    parser = OverridesParser.create()
    parsed = []
    for text in overrides:
        shown = repr(bounds.shown(text))
        if len(text) > LONGEST_OVERRIDE:
            raise UserError(f"override {shown}: {len(text)} characters; write it into a file of conf/experiment")
        if _depth(text) > DEEPEST_OVERRIDE:
            raise UserError(f"override {shown}: brackets more than {DEEPEST_OVERRIDE} deep; write it flatter")
        try:
            parsed.append(parser.parse_override(text))
        except (HydraException, OmegaConfBaseException, RecursionError, ValueError, ArithmeticError) as error:
            reason = f"{_first_line(error)}; write key=value, without spaces, or quote the value"
            raise UserError(f"override {shown}: {reason}") from None
    return parsed


def _depth(text):
    """How deep the brackets of a text are nested, quoted ones too."""
    depth = deepest = 0
    for sign in text:
        depth += (sign in "([{") - (sign in ")]}")
        deepest = max(deepest, depth)
    return deepest


def _compose_one(overrides):
    """One configuration as a dictionary, by Hydra, and its presets (group -> name); errors as one line."""
    try:
        others, merged = split_merged(overrides)
        composed = hydra_compose(config_name="config", overrides=others, return_hydra_config=True)
        choices = dict(composed.hydra.runtime.choices)
        with flag_override(composed, ["struct", "readonly"], False):
            del composed["hydra"]
        composed = merge(composed, merged)
        _check_resolvers(OmegaConf.to_container(composed, resolve=False))
        missing = sorted(OmegaConf.missing_keys(composed))
        if missing:
            raise UserError(f"{missing[0]}: no value; give one with {missing[0]}=…, or choose another preset")
        values = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
        _check_keys(values, config.Config)
        values["arms"] = _chosen_arms(values["arms"], merged)
        keys = {override.lstrip("+").partition("=")[0] for override in overrides}
        if "model.path" in keys and "model.revision" not in keys:
            values["model"]["revision"] = None  # the preset's commit is one of the preset's own path
        return values, choices
    except RecursionError:
        raise UserError(
            f"{' '.join(overrides)[:200]}: values that refer to each other; write one of them out"
        ) from None
    except HYDRAS as error:
        raise UserError(one_line(error, overrides)) from None


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


def _chosen_arms(arms, merged):
    """The arms of which more is said than their kl_coefs, or that are added on the command line.

    What an experiment says of an arm that another choice of arms has left out makes none. UserError where there is no
    arm of that name to leave out.
    """
    added = {override.split("=")[0].split(".")[1] for override in merged if override.startswith("+arms.")}
    nothing, known = asdict(config.Arm()), presets("arm")
    chosen = {name: arm for name, arm in arms.items() if name in added or arm | {"kl_coefs": None} != nothing}
    unknown = next((name for name in arms if name not in chosen and name not in known), None)
    if unknown:
        raise UserError(f"arms.{unknown}: no such arm; there are {', '.join(known)}, and conf/arm takes more")
    return chosen


def split_merged(overrides):
    """The overrides that Hydra can apply, and those that `merge` has to."""
    merged = [override for override in overrides if MERGED.match(override)]
    return [override for override in overrides if override not in merged], merged


def merge(composed, overrides):
    """A composed configuration with overrides that add entries to its typed dictionaries."""
    OmegaConf.set_struct(composed, False)
    return OmegaConf.merge(composed, *(_tree(override, composed) for override in overrides))


def _tree(text, composed):
    """One override as a configuration of its own, to be merged; without + before it, its entry must be there."""
    override = OverridesParser.create().parse_override(text)
    group, name, *_ = path = override.key_or_group.split(".")
    if not override.is_add() and name not in composed[group]:
        raise UserError(_unknown(f"{group}.{name}"))
    value = override.value()
    for key in reversed(path):
        value = {key: value}
    return OmegaConf.create(value)


def one_line(error, overrides):
    """What Hydra or OmegaConf says, in one line with what is possible instead."""
    text = str(error)
    missing = re.search(r"Could not (?:find|load) '([\w/-]+)/([^/']*)'", text)
    if missing:
        group, name = missing.groups()
        return f"{group}={name}: no such preset; there are {', '.join(presets(group)) or 'none'}"
    group = re.search(r"Could not override '([^']+)'\.\s+No match in the defaults list", text)
    if group:
        return _unknown(group[1])
    cause = error
    while cause is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__ or cause.__context__
    said_key = re.search(r"(?m)^\s*full_key: (\S+)$", text)  # of an error that is none of OmegaConf's own classes
    key = getattr(cause, "full_key", None) or (said_key and said_key[1])
    if not key:
        return f"{_first_line(error)} (overrides: {bounds.shown(' '.join(overrides) or 'none')})"
    if re.search(r"Key '.*' (is )?not in|is not in struct", str(cause)):
        return _unknown(key)
    return f"{key}: {_first_line(cause or error)}"


def _first_line(error):
    lines = str(error).strip().splitlines() or [type(error).__name__]
    said = " ".join(lines[: 2 if lines[0].endswith(":") else 1])  # Hydra's "ValidationError raised while composing:"
    return bounds.printable(said.rstrip(".")[:300])


def _unknown(key):
    """What is wrong with a key that the schema does not have: where its path leaves the schema, and what is there."""
    known, path = config.Config, []
    key = bounds.printable(key)
    for name in key.split("."):
        names = [f.name for f in fields(known)] if is_dataclass(known) else []
        if typing.get_origin(known) is dict and key != ".".join([*path, name]):
            known = typing.get_args(known)[1]  # an entry's own name, as in arms.salsa
            path.append(name)
            continue
        if name not in names:
            where = ".".join(path)
            close = difflib.get_close_matches(name, names, 1)
            hint = f"did you mean {'.'.join([*path, close[0]])}? " if close else ""
            if not path:
                groups = {p.name for p in CONF.iterdir() if p.is_dir()} - {"accelerate", "hydra"}  # not of a study
                names = sorted({*names, *groups})
            there = f"{where or 'the configuration'} has {', '.join(names)}"
            if not names:
                there = f"a new entry of {where} is written with + before it"
            return f"{key}: no such setting; {hint}{there}"
        path.append(name)
        known = bounds.required(bounds.type_hints(known)[name])
    return f"{key}: no such setting"


def presets(group):
    """The names of a configuration group's presets."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def _value(values, key):
    for name in key.split("."):
        values = values[name]
    return values


def validate(values):
    """Refuse what the schema's types allow and no run can honour. UserError, one line: what, where, what to do."""
    _check_keys(values, config.Config)
    try:
        bounds.check(config.Config, values)
    except bounds.SettingError as error:
        raise UserError(str(error)) from None
    for check in (
        _check_kinds,
        _check_axes,
        _check_names,
        _check_arms,
        _check_schedules,
        _check_ppo,
        _check_execution,
        _check_data,
        _check_sizes,
        _check_plane,
        _check_gates,
        _check_objective,
        _check_claims,
        _check_model,
        _check_names_differ,
    ):
        check(values)


def _check_keys(values, schema, path=()):
    """Refuse keys that `+` added or `~` removed: the schema is the whole configuration."""
    names = [f.name for f in fields(schema)]
    if not isinstance(values, dict):
        raise UserError(f"{'.'.join(path)}={bounds.shown(values)}: no group of settings; give them by name")
    for name in values:
        if name not in names:
            raise UserError(_unknown(".".join([*path, str(name)])))
    for name in names:
        if name not in values:
            raise UserError(f"{'.'.join([*path, name])}: removed, and needed; leave out ~{'.'.join([*path, name])}")
    for name, hint in bounds.type_hints(schema).items():
        if is_dataclass(hint):
            _check_keys(values[name], hint, (*path, name))
        elif typing.get_origin(hint) is dict and isinstance(values[name], dict):
            for entry in values[name]:
                _check_keys(values[name][entry], bounds.item_type(hint), (*path, name, str(entry)))


def _check_kinds(values):
    """Refuse settings that the kind of a thing would ignore: `READ_BY` says which kinds read a setting."""
    things = {
        "data.task": (config.Task, values["data"]["task"]),
        "data.corpus": (config.Corpus, values["data"]["corpus"]),
    }
    things |= {f"benchmarks.{name}": (config.Benchmark, thing) for name, thing in values["benchmarks"].items()}
    things |= {f"judges.{name}": (config.Judge, thing) for name, thing in values["judges"].items()}
    for key, (schema, thing) in things.items():
        defaults = {f.name: f.default for f in fields(schema)}
        for name, kinds in READ_BY[schema].items():
            if thing["kind"] not in kinds and thing[name] != defaults[name]:
                of = ", ".join(kinds)
                raise UserError(f"{key}.{name}: read by kind {of} alone, and this is {thing['kind']}; leave it out")


def _check_names(values):
    """Refuse names that mean something else in tables, files or runs."""
    for name in values["arms"]:
        if TAKEN.fullmatch(name):
            raise UserError(f"arms.{name}: the name of an SFT model, a soup or an alpha; give the arm another")
    for group in ("arms", "benchmarks", "judges"):
        seen = {}
        for name in values[group]:
            other = seen.setdefault(name.lower(), name)
            if other != name:
                raise UserError(f"{group}.{name}: differs from {other} in capitals alone; give it another name")
    if "evaluation" in values["benchmarks"]:
        raise UserError("benchmarks.evaluation: the name of the development prompts; give the benchmark another")


def _check_axes(values):
    for axis in ("replicates", "kl_coefs"):
        _check_once_each(axis, values[axis], [f"{value:.6g}" for value in values[axis]])  # as tables show them
        if not values[axis]:
            raise UserError(
                f"{axis} is empty; give at least one, such as {axis}=[{0 if axis == 'replicates' else 0.05}]"
            )
    chosen = {"alpha_kl_coefs": values["alpha_kl_coefs"]}
    chosen |= {f"arms.{name}.kl_coefs": arm["kl_coefs"] for name, arm in values["arms"].items()}
    for key, some in chosen.items():
        if some is not None:
            _check_once_each(key, some, some)
            others = [kl_coef for kl_coef in some if kl_coef not in values["kl_coefs"]]
            if others:
                raise UserError(f"{key}: {others[0]} is not in kl_coefs={values['kl_coefs']}; add it there")
            if not some:
                raise UserError(f"{key} is empty; leave it out for all of kl_coefs")
    for key, alphas in (("alphas", values["alphas"]), ("evaluate.alphas", values["evaluate"]["alphas"])):
        _check_once_each(key, alphas, [f"{float(bounds.fraction(alpha)):.5f}" for alpha in alphas])
    if values["alphas"] and values["sft"]["models"] < 2:
        raise UserError("alphas: need two SFT models, and sft.models=1; set sft.models=2")
    if not values["arms"] and not values["alphas"]:
        raise UserError("arms and alphas are empty: nothing to train; choose arms with arm=[ppo,salsa]")
    ways = len(values["arms"]) + len(values["alphas"])
    policies = max(ways * len(values["kl_coefs"]), values["sft"]["models"]) * len(values["replicates"])
    if policies > MOST_POLICIES:
        raise UserError(
            f"arms, alphas, kl_coefs, replicates and sft.models ask for up to {policies} models, and a study may have "
            f"{MOST_POLICIES}; leave some out"
        )


def _check_once_each(key, shown, values):
    if len(set(values)) < len(values):
        raise UserError(f"{key}={bounds.shown(shown)}: a value stands there twice; leave one out")


def _check_arms(values):
    for name, arm in values["arms"].items():
        for key, weights in (("start", arm["start"]), ("reference.weights", arm["reference"]["weights"])):
            check_weights(f"arms.{name}.{key}", weights, values["sft"]["models"])
        _check_reference(f"arms.{name}.reference", arm["reference"], values["ppo"])


def _check_reference(key, reference, ppo):
    """Refuse a reference that can't be made, that can't move, or with settings that its kind would ignore."""
    kind, defaults = anchors.kinds()[reference["kind"]], config.Reference()
    for other in anchors.kinds().values():
        for name in other.reads:
            if name not in kind.reads and reference[name] != getattr(defaults, name):
                raise UserError(
                    f"{key}.{name}={reference[name]}: of kind={other.kind} alone, and this is {kind.kind}; leave it out"
                )
    try:
        kind.check(key, config.Reference(**reference), config.Ppo(**ppo))
    except ValueError as error:
        raise UserError(str(error)) from None
    if kind.moves and ppo["lora_rank"]:
        raise UserError(
            f"{key}.kind={kind.kind}: a moving reference follows all weights, and ppo.lora_rank={ppo['lora_rank']} "
            "trains adapters; set ppo.lora_rank=0 or leave the arm out"
        )


def check_weights(key, weights, models):
    """Refuse weights over `models` SFT models that are no numbers, too many, or do not sum to 1 within 1e-6."""
    fractions = [bounds.fraction(weight) for weight in weights]
    if None in fractions:
        wrong = weights[fractions.index(None)]
        raise UserError(f"{key}: {wrong!r} is no number; write a decimal (0.25) or a fraction (1/3)")
    total = sum(fractions)
    if len(weights) > models:
        raise UserError(f"{key}={_shown(weights)}: {len(weights)} weights for {models} SFT models; set sft.models")
    if abs(total - 1) > Fraction(1, 10**6):
        raise UserError(f"{key}={_shown(weights)}: the weights sum to {float(total):g}, not 1")


def _shown(items):
    return "[" + ",".join(map(str, items)) + "]"


def _check_schedules(values):
    """Refuse settings of a schedule that its kind would ignore, and one that has nothing to change."""
    defaults = asdict(config.KlSchedule())
    schedules = {"ppo": values["ppo"]["kl_schedule"]}
    schedules |= {f"arms.{name}": arm["kl_schedule"] for name, arm in values["arms"].items()}
    for key, schedule in schedules.items():
        for name in () if schedule is None else sorted(set(defaults) - {"kind", *policies.SCHEDULES[schedule["kind"]]}):
            if schedule[name] != defaults[name]:
                raise UserError(
                    f"{key}.kl_schedule.{name}={schedule[name]}: not of kind={schedule['kind']}; leave it out, or "
                    "change the kind"
                )


def _check_ppo(values):
    ppo = values["ppo"]
    if ppo["kl_estimator"] == "k1" and ppo["kl_in"] == "loss":
        raise UserError("ppo.kl_estimator=k1 ppo.kl_in=loss: its gradient is zero on average; use kl_estimator=k2")
    if ppo["warmup"] > ppo["iterations"]:
        raise UserError(f"ppo.warmup={ppo['warmup']}: longer than ppo.iterations={ppo['iterations']}; make it shorter")
    if ppo["score_normalisation"] == "batch" and ppo["batch_size"] < 2:
        raise UserError("ppo.score_normalisation=batch: one score of a batch has no deviation; raise ppo.batch_size")
    if ppo["batch_size"] % ppo["mini_batches"]:
        raise UserError(
            f"ppo.batch_size={ppo['batch_size']}: not divisible by ppo.mini_batches={ppo['mini_batches']}; change one"
        )


def _check_execution(values):
    execution, ppo = values["execution"], values["ppo"]
    if execution["gpus"] not in (0, execution["processes"]):
        raise UserError(
            f"execution.gpus={execution['gpus']}: each of the {execution['processes']} processes of a training run has "
            f"one; set execution.processes={execution['gpus']}, or execution.gpus={execution['processes']}"
        )
    size = ppo["batch_size"] // ppo["mini_batches"]
    if size % execution["processes"]:
        raise UserError(
            f"execution.processes={execution['processes']}: cannot share the {size} prompts of a mini-batch evenly; "
            "change it, ppo.batch_size or ppo.mini_batches"
        )
    for stage in ("sft", "reward_model"):
        if values[stage]["batch_size"] % execution["processes"]:
            raise UserError(
                f"execution.processes={execution['processes']}: cannot share {stage}.batch_size="
                f"{values[stage]['batch_size']} evenly; change one of them"
            )
    if execution["rollouts"] == "vllm":
        _check_installed("vllm", "vllm", "execution.rollouts=vllm")
        if ppo["lora_rank"]:
            adapters = f"ppo.lora_rank={ppo['lora_rank']}"
            raise UserError(f"{adapters}: execution.rollouts=vllm samples from whole models; leave one of them out")
    for stage in ADAPTED:
        if values[stage]["lora_rank"]:
            _check_installed("peft", "lora", f"{stage}.lora_rank={values[stage]['lora_rank']}")
    if execution["accelerate_config"]:
        _check_accelerate(values)
    for tracker in execution["trackers"]:
        if importlib.util.find_spec(tracker) is None:
            raise UserError(f"execution.trackers: {tracker} is not installed; pip install {tracker}, or leave it out")
    _check_once_each("execution.trackers", execution["trackers"], execution["trackers"])


def _check_accelerate(values):
    """Refuse a configuration of Accelerate that isn't there, or that the study's runs don't go with."""
    execution, path = values["execution"], values["execution"]["accelerate_config"]
    key = f"execution.accelerate_config={path}"
    if not Path(path).is_file():
        raise UserError(f"{key}: no such file; `accelerate config` writes one")
    yaml_files.check(path)
    kind = jobs.distributed_type(path)
    if execution["processes"] > 1 and kind not in LAUNCHED:
        raise UserError(
            f"{key}: its distributed_type is {kind}, which starts one process, and execution.processes="
            f"{execution['processes']}; it may be {', '.join(LAUNCHED)}"
        )
    if kind == "DEEPSPEED":
        _check_installed("deepspeed", "deepspeed", key)
    if kind == "FSDP" and not re.search(r"(?m)^\W*fsdp_version\W+2", Path(path).read_text(encoding="utf-8")):
        raise UserError(f"{key}: FSDP's first version is not supported; set fsdp_version: 2 in it")
    kinds = anchors.kinds()
    moving = [f"the arm {name}" for name, arm in values["arms"].items() if kinds[arm["reference"]["kind"]].moves]
    whole = moving + ["execution.rollouts=vllm"] * (execution["rollouts"] == "vllm")
    whole += [f"{stage}.lora_rank" for stage in ADAPTED if values[stage]["lora_rank"]]
    if kind in jobs.SHARDED and whole:
        raise UserError(f"{key}: {kind} shares weights out, and {whole[0]} needs them whole; leave one out")


def _check_installed(package, extra, setting):
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{setting}: needs {package}, of the extra salsa[{extra}]; pip install -e '.[{extra}]'")


def _check_data(values):
    chosen = values["data"]
    kind = chosen["task"]["kind"]
    world, offered = data.world_kinds()[kind], data.benchmark_kinds(kind)
    for name, benchmark in values["benchmarks"].items():
        if benchmark["kind"] not in offered:
            raise UserError(
                f"benchmarks.{name}: data={chosen['name']} has no benchmark {benchmark['kind']}; "
                f"choose among {', '.join(offered)} with benchmark=[…]"
            )
    for name, judge in values["judges"].items():
        fitting = judges.kinds(kind)
        if judge["kind"] not in fitting:
            raise UserError(
                f"judges.{name}: data={chosen['name']} cannot be judged by {judge['kind']}; "
                f"choose {', '.join(fitting)} with judge=[…]"
            )
        fitting[judge["kind"]].check(f"judges.{name}", config.from_dict(config.Judge, judge))
    if chosen["preferences"] == "sampled" and not world.gold:
        raise UserError(f"data.preferences=sampled: data={chosen['name']} has no gold to label them; use given")
    if chosen["preferences"] == "given" and world.preferences != "given":
        raise UserError(f"data.preferences=given: data={chosen['name']} comes without preferences; use sampled")
    if values["model"]["source"] == "pretrain" and chosen["corpus"]["kind"] == "none":
        raise UserError(
            f"model={values['model']['name']} is pretrained by the project, and data={chosen['name']} has no corpus; "
            "choose another model, or set data.corpus.kind and data.corpus.documents"
        )


def _check_sizes(values):
    """Sizes against each other, where they are exact: what is too small is known before anything is made."""
    task, reward_model, ppo = values["data"]["task"], values["reward_model"], values["ppo"]
    if reward_model["batch_size"] > reward_model["pairs"]:
        raise UserError(
            f"reward_model.batch_size={reward_model['batch_size']}: more than reward_model.pairs="
            f"{reward_model['pairs']}; make it smaller"
        )
    if 0 < task["preferences"] <= reward_model["held_out"]:
        raise UserError(
            f"data.task.preferences={task['preferences']}: no more than reward_model.held_out="
            f"{reward_model['held_out']}, so that none is left to train on; change one"
        )
    if 0 < task["prompts"] < max(2, ppo["batch_size"]):
        raise UserError(
            f"data.task.prompts={task['prompts']}: fewer than ppo.batch_size={ppo['batch_size']}, or than the two that "
            "a reward's deviation takes; change one"
        )
    worlds = data.world_kinds()
    if not worlds[task["kind"]].exact:
        return
    for size, smallest, needed in (
        ("prompts", 1, "PPO"),
        ("preferences", reward_model["held_out"] + 1, "reward_model.held_out and a pair to train on"),
        ("demonstrations", 1, "SFT"),
        ("validation", 1, "SFT and the landscape"),
        ("evaluation", 1, "reported KL and rewards"),
    ):
        if task[size] < smallest:
            raise UserError(f"data.task.{size}={task[size]}: at least {smallest} are needed by {needed}; give more")
    for name, benchmark in values["benchmarks"].items():
        if data.benchmark_kinds()[benchmark["kind"]].exact and benchmark["prompts"] < 1:
            raise UserError(f"benchmarks.{name}.prompts={benchmark['prompts']}: generated, so it must be at least 1")
    corpus = values["data"]["corpus"]
    if values["model"]["source"] == "pretrain" and worlds[corpus["kind"]].exact and not corpus["documents"]:
        raise UserError("data.corpus.documents=0: nothing to pretrain on; give some, such as 30000")


def _check_gates(values):
    gates = values["evaluate"]["gates"]
    if gates["lowest_agreement"] > gates["highest_agreement"]:
        raise UserError(
            f"evaluate.gates.lowest_agreement={gates['lowest_agreement']}: above evaluate.gates.highest_agreement="
            f"{gates['highest_agreement']}; change one"
        )


def _check_plane(values):
    plane, key = values["evaluate"]["plane"], "evaluate.plane"
    _check_once_each(f"{key}.arms", plane["arms"], plane["arms"])
    for arm in plane["arms"]:
        if arm not in values["arms"]:
            raise UserError(f"{key}.arms: {arm} is no arm of this study; it has {', '.join(values['arms'])}")
    if plane["arms"] and values["sft"]["models"] < 2:
        raise UserError(f"{key}.arms={plane['arms']}: a plane needs two SFT models; set sft.models=2, or {key}.arms=[]")
    step, margin = bounds.fraction(plane["step"]), bounds.fraction(plane["margin"])
    if (1 / step).denominator != 1:
        raise UserError(f"{key}.step={plane['step']}: 1 must be a multiple of it; give 1/2, 1/3, 1/4, …")
    points = (int((1 + 2 * margin) / step) + 1) ** 2
    if points > MOST_POINTS:
        raise UserError(
            f"{key}.step={plane['step']} {key}.margin={plane['margin']}: up to {points} models, and {MOST_POINTS} may "
            "be; take larger steps"
        )
    if plane["kl_coef"] is not None and plane["kl_coef"] not in values["kl_coefs"]:
        raise UserError(f"{key}.kl_coef: {plane['kl_coef']} is not in kl_coefs={values['kl_coefs']}; add it there")


def _check_objective(values):
    objective, key = values["objective"], "objective"
    arms = [name for names, _ in policies.specs(values).values() for name in names]
    if objective["arm"] and objective["arm"] not in arms:
        raise UserError(f"{key}.arm={objective['arm']}: no arm of this study; it has {', '.join(arms)}")
    if objective["kl_coef"] is not None and objective["kl_coef"] not in values["kl_coefs"]:
        raise UserError(f"{key}.kl_coef: {objective['kl_coef']} is not in kl_coefs={values['kl_coefs']}; add it there")


def _check_claims(values):
    """Refuse what compares an arm with itself; one that the study doesn't have makes a claim that isn't tested."""
    for name, claim in values["claims"].items():
        if claim["candidate"] == claim["baseline"] and claim["measure"] != "stable":
            raise UserError(f"claims.{name}.baseline={claim['baseline']}: is the candidate itself; name another arm")


def _check_model(values):
    model = values["model"]
    template = model["chat_template"]
    if template is not None and not (TEMPLATES / f"{template}.jinja").is_file():
        known = sorted(path.stem for path in TEMPLATES.glob("*.jinja"))
        raise UserError(f"model.chat_template={template}: no such template; there are {', '.join(known)}, or null")
    if model["source"] == "pretrain" and model["path"]:
        raise UserError("model.path: nothing is read with model.source=pretrain; set model.source=hub, or leave it out")
    local = model["source"] == "hub" and model["path"] and local_folder(model)
    if model["revision"] is not None and (local or model["source"] != "hub"):
        raise UserError(f"model.revision={model['revision']}: of a model of the hub alone; leave it out")
    if model["source"] == "package" and model["dtype"] != "float32":
        raise UserError(
            f"model.dtype={model['dtype']}: a package's GGUF is read as float32; for speed, mixed_precision=bf16"
        )
    if model["source"] == "pretrain":
        architecture = model["architecture"]
        if architecture["hidden_size"] % (2 * architecture["heads"]):  # rotary positions turn pairs of dimensions
            raise UserError(
                f"model.architecture.hidden_size={architecture['hidden_size']}: not divisible by twice "
                f"heads={architecture['heads']}; change one"
            )
        _check_length(values["lengths"], architecture["max_length"], "model.architecture.max_length")
        if values["base"]["block_length"] > architecture["max_length"]:
            raise UserError(
                f"base.block_length={values['base']['block_length']}: more than "
                f"model.architecture.max_length={architecture['max_length']}; make it smaller"
            )
    elif not model["path"]:
        raise UserError(f"model.path is empty, and model.source={model['source']} needs it")
    folder = local_folder(model)
    if folder:
        key, positions = folders.limit(_check_folder(folder, model["pickled_weights"]))
        if positions:
            _check_length(values["lengths"], positions, f"{folder}/config.json's {key}")


def _check_length(lengths, positions, where):
    if lengths["prompt"] + lengths["response"] > positions:
        raise UserError(
            f"lengths.prompt={lengths['prompt']} and lengths.response={lengths['response']} need "
            f"{lengths['prompt'] + lengths['response']} positions, and {where} is {positions}; make them shorter"
        )


def local_folder(model):
    """The folder of a local model, or None where `model.path` is a hub id. UserError for a path that is not there."""
    if model["source"] != "hub":
        return None
    path = Path(model["path"]).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"model.path={model['path']}: a file, not a model folder; give the folder")
    if model["path"].startswith((".", "/", "~")) or not HUB_ID.fullmatch(model["path"]):
        raise UserError(f"model.path={model['path']}: no such folder; give a model folder, or a hub id (owner/name)")
    return None


def _check_folder(folder, pickled):
    """The configuration of a local model. UserError where the folder lacks what a model needs."""
    found = folders.check(folder, pickled, headers=False)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        raise UserError(f"{folder}: no tokenizer (tokenizer.json); save the model's tokenizer there")
    return found


def _check_names_differ(values):
    """Labels show two decimals: two policies that differ in the third cannot be told apart in tables and figures."""
    seen = set()
    for policy in policies.policies(values):
        if policy["name"] in seen:
            raise UserError(f"two arms or alphas are both shown as {policy['name']}; remove one")
        seen.add(policy["name"])


def resolve_objective(values):
    """What of a finished study is its objective, as a dictionary of `config.Objective` with every choice made.

    `values` is a configuration that `compose` returned; the dictionary names the judge, too.

    Raises:
        UserError: the study will not have the number.
    """
    objective = dict(values["objective"])
    ways = policies.specs(values).values()  # a policy has the first of its way's names
    arms = [name for names, _ in ways for name in names]
    wanted = objective["arm"] or ("salsa" if "salsa" in arms else arms[-1])
    names, kl_coefs = next(way for way in ways if wanted in way[0])
    objective["arm"] = names[0]
    if objective["kl_coef"] is None:
        objective["kl_coef"] = kl_coefs[0]
    elif objective["kl_coef"] not in kl_coefs:
        raise UserError(
            f"objective.kl_coef={objective['kl_coef']}: {wanted} is not run at it; choose among {_shown(kl_coefs)}"
        )
    objective["judge"] = next(iter(values["judges"]), None)
    gold = data.world_kinds()[values["data"]["task"]["kind"]].gold
    if not objective["measure"]:
        objective["measure"] = "gold_reward" if gold else "win_rate"
    if objective["measure"] == "gold_reward" and not gold:
        raise UserError(f"objective.measure=gold_reward: data={values['data']['name']} has no gold; use win_rate")
    if objective["measure"] == "win_rate" and not objective["judge"]:
        raise UserError("objective.measure=win_rate: the study has no judge; choose judge=[…], or measure=reward")
    if values["sft"]["models"] < 2:
        raise UserError("objective: is measured against sft0, which is evaluated beside sft1; set sft.models=2")
    return objective


def content_of_files(values):
    """Run ("prepare", "benchmark/<name>", "base", "corpus", "judge/<name>") -> name -> content of a file it reads.

    Raises UserError for a file that is missing or malformed.
    """
    chosen = values["data"]
    found = {"prepare": _checked_files(config.from_dict(config.Task, chosen["task"]))}
    for name, benchmark in values["benchmarks"].items():
        try:
            found[f"benchmark/{name}"] = _checked_files(config.from_dict(config.Benchmark, benchmark))
        except UserError as error:
            raise UserError(f"benchmarks.{name}: {error}") from None
        _check_turns(name, benchmark, values)
    corpus = sources.contents(config.from_dict(config.Corpus, chosen["corpus"]))
    if corpus and values["model"]["source"] == "pretrain":
        text = runs.canonical_json(corpus)
        found["corpus"] = {"sha256": hashlib.sha256(text.encode()).hexdigest()}
    for name, judge in values["judges"].items():
        read = judges.find(judge["kind"]).folders(config.from_dict(config.Judge, judge))
        found[f"judge/{name}"] = {setting: _describe_folder(Path(path)) for setting, path in read.items()}
    folder = local_folder(values["model"])
    if folder:
        found["base"] = {"path": _describe_folder(folder)}
    _check_rows(values)
    return {run: files for run, files in found.items() if files}


def _checked_files(settings):
    """Setting's name -> content of each local file that a Task or Benchmark reads, once it is checked."""
    data.record(settings).check(settings)
    return sources.contents(settings)


def _check_rows(values):
    """UserError where local files hold fewer rows of a split than are taken at once; a hub dataset's are not known."""
    task, reward_model, ppo = values["data"]["task"], values["reward_model"], values["ppo"]
    there = data.world_kinds()[task["kind"]].sizes(config.from_dict(config.Task, task)) or {}
    for split, smallest, needed in (
        ("prompts", max(2, ppo["batch_size"]), f"ppo.batch_size={ppo['batch_size']}"),
        (
            "preferences",
            reward_model["held_out"] + reward_model["batch_size"],
            f"reward_model.held_out={reward_model['held_out']} and .batch_size={reward_model['batch_size']}",
        ),
    ):
        if there.get(split, smallest) < smallest:
            file = task["preference_file"]
            raise UserError(f"{file}: {there[split]} rows for {split}, and {needed} need {smallest}; give more rows")


def _check_turns(name, benchmark, values):
    """UserError where a benchmark has more turns than a judge is shown, or than fit into the model."""
    turns = data.benchmark_kinds()[benchmark["kind"]].turns(config.from_dict(config.Benchmark, benchmark)) or 0
    for judge, settings in values["judges"].items():
        most = judges.find(settings["kind"]).most_turns
        if most is not None and turns > most:
            raise UserError(
                f"benchmarks.{name}: prompts of {turns} turns, and judges.{judge} is shown {most} at most; leave the "
                "benchmark or the judge out"
            )
    response, (where, positions) = values["lengths"]["response"], _positions(values["model"])
    # A question has a token at least; how many they have, a stage will see that has the tokenizer.
    if positions and turns > 1 and turns * (1 + response) > positions:
        raise UserError(
            f"benchmarks.{name}: {turns} turns of lengths.response={response} fill all positions of "
            f"{where}={positions}; change one"
        )


def _positions(model):
    """Where it is said how many tokens a model holds, and the number; it is None where only the hub says."""
    if model["source"] == "pretrain":
        return "model.architecture.max_length", model["architecture"]["max_length"]
    folder = local_folder(model)
    key, positions = folders.limit(folders.configuration(folder)) if folder else (None, None)
    return f"{folder}/config.json's {key}", positions


def _describe_folder(folder):
    """`<bytes>:<sha256>` of a model folder: its files' names and contents."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    content = {path.name: sources.describe(path) for path in files}
    total = sum(path.stat().st_size for path in files)
    return f"{total}:{hashlib.sha256(runs.canonical_json(content).encode()).hexdigest()}"
