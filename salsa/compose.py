"""From a command line to checked configurations: Hydra's composition, its sweeps, and what a schema cannot say.

Everything that a user can get wrong in a configuration is refused here, as a `UserError` of one line, before anything
is computed. Stages do not import this module: they receive plain settings.
"""

import contextlib
import difflib
import functools
import hashlib
import importlib.util
import itertools
import json
import math
import re
import types
import typing
from dataclasses import asdict, fields, is_dataclass
from fractions import Fraction
from pathlib import Path

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob
from hydra.errors import HydraException
from omegaconf import OmegaConf, flag_override
from omegaconf.errors import OmegaConfBaseException

from salsa import config, data, plan, runs, studies
from salsa.data import BENCHMARKS
from salsa.evaluate import judge_access
from salsa.runs import UserError

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"
TEMPLATES = Path(__file__).resolve().parent / "templates"

JUDGES = {  # kinds of judge, by kind of data
    "stories": ("gold", "reward_model", "openai"),
    "reviews": ("gold", "vader", "reward_model", "openai"),
    "ultra": ("reward_model", "openai"),
}
GOLD = ("stories", "reviews")
MEASURES = ("kl_to_sft0", "reward", "gold_reward", "win_rate", "matched_gold", "matched_win_rate", "stable")
OBJECTIVES = ("gold_reward", "reward", "win_rate")
CHOICES = {
    "model.source": ("pretrain", "package", "hub"),
    "model.dtype": ("float32", "bfloat16"),
    "data.preferences": ("sampled", "given"),
    "data.corpus.kind": ("stories", "reviews", "none"),
    "data.task.kind": tuple(BENCHMARKS),
    "sft.stop": ("validation", "epochs"),
    "ppo.schedule": ("linear", "constant"),
    "ppo.kl_estimator": ("k1", "k2", "k3"),
    "ppo.kl_in": ("reward", "loss"),
    "ppo.value_model": ("reward_model", "sft", "shared"),
    "ppo.score_normalisation": ("constants", "batch", "none"),
    "execution.device": ("auto", "cpu", "cuda"),
    "execution.rollouts": ("transformers", "vllm"),
    "mixed_precision": ("no", "bf16"),
}
ADAPTED = ("sft", "reward_model", "ppo")  # stages that may train low-rank adapters
LAUNCHED = ("MULTI_GPU", *studies.SHARDED)  # for which `accelerate launch` starts several processes
REFERENCES = ("soup", "noise", "multi_kl", *plan.MOVING)
AT_LEAST = {  # the smallest value that makes sense
    1: "lengths.prompt lengths.response base.epochs base.batch_size base.block_length sft.models sft.epochs "
    "sft.batch_size reward_model.pairs reward_model.held_out reward_model.epochs reward_model.batch_size "
    "reward_model.normalisation_prompts ppo.iterations ppo.batch_size ppo.epochs ppo.mini_batches ppo.rollouts_every "
    "report.bootstrap execution.threads execution.micro_batch execution.rollout_batch execution.memory_mb "
    "execution.runtime execution.processes execution.judge_concurrency evaluate.plane.prompts "
    "model.architecture.vocabulary_size model.architecture.hidden_size model.architecture.layers "
    "model.architecture.heads model.architecture.intermediate_size model.architecture.max_length",
    0: "sft.weight_decay sft.dropout ppo.warmup ppo.clip_range ppo.value_clip_range ppo.value_coef execution.gpus "
    "report.samples base.weight_decay ppo.missing_eos_penalty ppo.score_clip seed "
    "sft.lora_rank reward_model.lora_rank ppo.lora_rank "
    "execution.checkpoint_every execution.checkpoint_minutes "
    "execution.judge_retries execution.judge_requests execution.judge_tokens "
    "evaluate.plane.replicates report.reader stability.lowest_end_rate stability.shortest_length "
    "stability.largest_gold_loss data.task.demonstrations data.task.validation data.task.preferences "
    "data.task.prompts data.task.evaluation data.task.response_words data.corpus.documents",
}
POSITIVE = (
    "base.learning_rate sft.learning_rate reward_model.learning_rate ppo.learning_rate ppo.temperature "
    "ppo.max_grad_norm ppo.adam_epsilon ppo.lora_alpha sft.lora_alpha reward_model.lora_alpha evaluate.temperature "
    "reward_model.gold_temperature"
)
SHARES = "base.warmup sft.warmup reward_model.warmup sft.dropout ppo.gamma ppo.lam ppo.adam_beta1 ppo.adam_beta2"
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
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
            values, choices = _compose_one(point)
            companions = _companions(values["companions"], point)
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
        with initialize_config_dir(config_dir=str(CONF), version_base="1.3", job_name="salsa"):
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
    except (OSError, ValueError) as error:
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
        pairs = ((override.get_key_element().lstrip("+"), override) for override in _parse(point))
        parsed.append({key: "" if o.is_delete() else o.get_value_element_as_str() for key, o in pairs})
    keys = dict.fromkeys(key for point in parsed for key in point)
    swept = [key for key in keys if len({point.get(key) for point in parsed}) > 1]
    return [{key: point[key] for key in swept if key in point} for point in parsed]


def expand(overrides):
    """The points of a sweep, each a list of overrides that are no sweeps."""
    axes = []
    for text, override in zip(overrides, _parse(overrides), strict=True):
        if not override.is_sweep_override():
            axes.append([text])
            continue
        key = override.get_key_element()
        if isinstance(override.value(), Glob):
            values = override.value().filter(presets(override.key_or_group))
        else:
            values = list(override.sweep_string_iterator()) if override.is_discrete_sweep() else []
        if not values:
            raise UserError(f"{text}: a sweep without values; give them as {key}=a,b or range(start,stop)")
        axes.append([f"{key}={value}" for value in values])
    return [list(point) for point in itertools.product(*axes)]


def _parse(overrides):
    parser = OverridesParser.create()
    parsed = []
    for text in overrides:
        try:
            parsed.append(parser.parse_override(text))
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(
                f"override {text!r}: {_first_line(error)}; write key=value, without spaces, or quote the value"
            ) from None
    return parsed


def _compose_one(overrides):
    """One configuration as a dictionary, by Hydra, and its presets (group -> name); errors as one line."""
    try:
        others, merged = split_merged(overrides)
        composed = hydra_compose(config_name="config", overrides=others, return_hydra_config=True)
        choices = dict(composed.hydra.runtime.choices)
        with flag_override(composed, ["struct", "readonly"], False):
            del composed["hydra"]
        composed = merge(composed, merged)
        missing = sorted(OmegaConf.missing_keys(composed))
        if missing:
            raise UserError(f"{missing[0]}: no value; give one with {missing[0]}=…, or choose another preset")
        values = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
        values["arms"] = _chosen_arms(values["arms"], merged)
        return values, choices
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise UserError(one_line(error, overrides)) from None


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
    key = getattr(cause, "full_key", None)
    if key is None:
        return f"{_first_line(error)} (overrides: {' '.join(overrides) or 'none'})"
    if re.search(r"Key '.*' (is )?not in|is not in struct", str(cause)):
        return _unknown(key)
    return f"{key}: {_first_line(cause)}"


def _first_line(error):
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__


def _unknown(key):
    """What is wrong with a key that the schema does not have: where its path leaves the schema, and what is there."""
    known, path = config.Config, []
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
        known = _required(typing.get_type_hints(known)[name])
    return f"{key}: no such setting"


def _required(hint):
    """A type hint without its `| None`."""
    return typing.get_args(hint)[0] if isinstance(hint, types.UnionType) else hint


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
    for check in (
        _check_choices,
        _check_ranges,
        _check_names,
        _check_axes,
        _check_arms,
        _check_schedules,
        _check_ppo,
        _check_execution,
        _check_data,
        _check_plane,
        _check_objective,
        _check_model,
        _check_names_differ,
    ):
        check(values)


def _check_keys(values, schema, path=()):
    """Refuse keys that `+` added or `~` removed: the schema is the whole configuration."""
    names = [f.name for f in fields(schema)]
    for name in values:
        if name not in names:
            raise UserError(_unknown(".".join([*path, name])))
    for name in names:
        if name not in values:
            raise UserError(f"{'.'.join([*path, name])}: removed, and needed; leave out ~{'.'.join([*path, name])}")
    for name, hint in typing.get_type_hints(schema).items():
        if is_dataclass(hint):
            _check_keys(values[name], hint, (*path, name))
        elif typing.get_origin(hint) is dict:
            for entry in values[name]:
                _check_keys(values[name][entry], typing.get_args(hint)[1], (*path, name, entry))


def _check_choices(values):
    keys = dict(CHOICES)
    keys |= {f"arms.{name}.reference.kind": REFERENCES for name in values["arms"]}
    keys |= {f"{key}.kind": tuple(plan.SCHEDULES) for key in _schedules(values)}
    keys |= {f"judges.{name}.kind": sum(JUDGES.values(), ()) for name in values["judges"]}
    keys |= {f"claims.{name}.measure": MEASURES for name in values["claims"]}
    keys |= {f"claims.{name}.origin": ("abstract", "control") for name in values["claims"]}
    keys |= {f"benchmarks.{name}.kind": sum(BENCHMARKS.values(), ()) for name in values["benchmarks"]}
    for key, choices in keys.items():
        _choose(key, _value(values, key), choices)
    if values["ppo"]["kl_estimator"] == "k1" and values["ppo"]["kl_in"] == "loss":
        raise UserError("ppo.kl_estimator=k1 ppo.kl_in=loss: its gradient is zero on average; use kl_estimator=k2")


def _choose(key, value, choices):
    if value not in choices:
        raise UserError(f"{key}={value}: no such choice; there are {', '.join(choices)}")


def _schedules(values):
    """The keys of the study's schedule of kl_coef, and of the arms' own."""
    own = [f"arms.{name}.kl_schedule" for name, arm in values["arms"].items() if arm["kl_schedule"] is not None]
    return ["ppo.kl_schedule", *own]


def _check_ranges(values):
    schedules = _schedules(values)
    positive = [f"arms.{name}.kl_scale" for name in values["arms"]]
    positive += [f"{key}.{name}" for key in schedules for name in ("target", "horizon")]
    positive += [f"claims.{name}.smallest_effect" for name in values["claims"]]
    positive += ["execution.judge_timeout", "objective.kl_penalty"]
    for smallest, keys in AT_LEAST.items():
        for key in keys.split():
            if not smallest <= _value(values, key) < math.inf:
                raise UserError(f"{key}={_value(values, key)}: must be at least {smallest}")
    for key in [*POSITIVE.split(), *positive]:
        if not 0 < _value(values, key) < math.inf:
            raise UserError(f"{key}={_value(values, key)}: must be above 0")
    for key in [*SHARES.split(), *(f"{key}.final" for key in schedules)]:
        if not 0 <= _value(values, key) <= 1:
            raise UserError(f"{key}={_value(values, key)}: must lie between 0 and 1")


def _check_names(values):
    """Names become parts of folder names."""
    named = {"name": values["name"], "model.name": values["model"]["name"], "data.name": values["data"]["name"]}
    for group in ("arms", "benchmarks", "judges", "claims"):
        named |= {f"{group}.{name}": name for name in values[group]}
    for key, name in named.items():
        if not FILE_NAME.fullmatch(name):
            raise UserError(f"{key}: {name!r} cannot be part of a file name; use letters, digits, and _ . + -")


def _check_axes(values):
    for axis in ("replicates", "kl_coefs"):
        _check_axis(axis, values[axis])
        if not values[axis]:
            raise UserError(
                f"{axis} is empty; give at least one, such as {axis}=[{0 if axis == 'replicates' else 0.05}]"
            )
    for key in ("alpha_kl_coefs", *(f"arms.{name}.kl_coefs" for name in values["arms"])):
        some = _value(values, key)
        if some is not None:
            _check_axis(key, some)
            others = [kl_coef for kl_coef in some if kl_coef not in values["kl_coefs"]]
            if others:
                raise UserError(f"{key}: {others[0]} is not in kl_coefs={values['kl_coefs']}; add it there")
            if not some:
                raise UserError(f"{key} is empty; leave it out for all of kl_coefs")
    for key in ("alphas", "evaluate.alphas"):
        alphas = _value(values, key)
        numbers = [_fraction(key, alpha) for alpha in alphas]
        for alpha, number in zip(alphas, numbers, strict=True):
            if not 0 <= number <= 1:
                raise UserError(f"{key}: {alpha} lies outside 0 to 1, where sft0 and sft1 are")
        if len(set(numbers)) < len(numbers):
            raise UserError(f"{key}={alphas}: a value stands there twice")
    if values["alphas"] and values["sft"]["models"] < 2:
        raise UserError("alphas: need two SFT models, and sft.models=1; set sft.models=2")
    if not values["arms"] and not values["alphas"]:
        raise UserError("arms and alphas are empty: nothing to train; choose arms with arm=[ppo,salsa]")


def _check_axis(axis, numbers):
    if len(set(numbers)) < len(numbers):
        raise UserError(f"{axis}={numbers}: a value stands there twice")
    if any(not number >= 0 or math.isinf(number) for number in numbers):
        raise UserError(f"{axis}={numbers}: no value may be below 0")


def _fraction(key, text):
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise UserError(f"{key}: {text!r} is no number; write a decimal (0.25) or a fraction (1/3)") from None


def _check_arms(values):
    for name, arm in values["arms"].items():
        for key, weights in (("start", arm["start"]), ("reference.weights", arm["reference"]["weights"])):
            check_weights(f"arms.{name}.{key}", weights, values["sft"]["models"])
        _check_reference(f"arms.{name}.reference", arm["reference"])
        _check_moving(f"arms.{name}.reference", arm["reference"], values["ppo"])


def _check_reference(key, reference):
    """Refuse weights that a kind of reference can't be made from."""
    weights = [Fraction(weight) for weight in reference["weights"]]
    if reference["kind"] == "noise" and weights[0] == 1:
        raise UserError(f"{key}: noise as far as sft0 from sft0 is none; give a soup's weights")
    if reference["kind"] == "multi_kl":
        if min(weights) < 0:
            raise UserError(f"{key}.weights={_shown(reference['weights'])}: a KL has no weight below 0; change them")
        if sum(weight != 0 for weight in weights) < 2:
            raise UserError(f"{key}: a KL to one model is that of kind=soup; write soup, or give two models a weight")


def _check_moving(key, reference, ppo):
    """Refuse a reference that should move and can't, and settings of moving that another kind would ignore."""
    kind, rate, every = reference["kind"], reference["rate"], reference["every"]
    for moving, setting in plan.MOVING.items():
        if kind != moving and reference[setting] != 0:
            raise UserError(
                f"{key}.{setting}={reference[setting]}: of kind={moving} alone, and this is {kind}; leave it out"
            )
    if kind == "ema" and not 0 < rate <= 1:
        raise UserError(f"{key}.rate={rate}: must be above 0 and at most 1, the policy's share after each iteration")
    if kind == "reset" and not 1 <= every < ppo["iterations"]:
        raise UserError(
            f"{key}.every={every}: must be at least 1 and below ppo.iterations={ppo['iterations']}, or nothing is reset"
        )
    if kind in plan.MOVING and ppo["lora_rank"]:
        raise UserError(
            f"{key}.kind={kind}: a moving reference follows all weights, and ppo.lora_rank={ppo['lora_rank']} trains "
            "adapters; set ppo.lora_rank=0 or leave the arm out"
        )


def check_weights(key, weights, models):
    """Refuse weights over `models` SFT models that are no numbers, too many, or do not sum to 1 within 1e-6."""
    total = sum(_fraction(key, weight) for weight in weights)
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
        for name in () if schedule is None else sorted(set(defaults) - {"kind", *plan.SCHEDULES[schedule["kind"]]}):
            if schedule[name] != defaults[name]:
                raise UserError(
                    f"{key}.kl_schedule.{name}={schedule[name]}: not of kind={schedule['kind']}; leave it out, or "
                    "change the kind"
                )


def _check_ppo(values):
    ppo = values["ppo"]
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


def _check_accelerate(values):
    """Refuse a configuration of Accelerate that isn't there, or that the study's runs don't go with."""
    execution, path = values["execution"], values["execution"]["accelerate_config"]
    key = f"execution.accelerate_config={path}"
    if not Path(path).is_file():
        raise UserError(f"{key}: no such file; `accelerate config` writes one")
    kind = studies.distributed_type(path)
    if execution["processes"] > 1 and kind not in LAUNCHED:
        raise UserError(
            f"{key}: its distributed_type is {kind}, which starts one process, and execution.processes="
            f"{execution['processes']}; it may be {', '.join(LAUNCHED)}"
        )
    if kind == "DEEPSPEED":
        _check_installed("deepspeed", "deepspeed", key)
    if kind == "FSDP" and not re.search(r"(?m)^\W*fsdp_version\W+2", Path(path).read_text(encoding="utf-8")):
        raise UserError(f"{key}: FSDP's first version is not supported; set fsdp_version: 2 in it")
    moving = [f"the arm {name}" for name, arm in values["arms"].items() if arm["reference"]["kind"] in plan.MOVING]
    whole = moving + ["execution.rollouts=vllm"] * (execution["rollouts"] == "vllm")
    whole += [f"{stage}.lora_rank" for stage in ADAPTED if values[stage]["lora_rank"]]
    if kind in studies.SHARDED and whole:
        raise UserError(f"{key}: {kind} shares weights out, and {whole[0]} needs them whole; leave one out")


def _check_installed(package, extra, setting):
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{setting}: needs {package}, of the extra salsa[{extra}]; pip install -e '.[{extra}]'")


def _check_data(values):
    chosen = values["data"]
    kind = chosen["task"]["kind"]
    for name, benchmark in values["benchmarks"].items():
        if benchmark["kind"] not in BENCHMARKS[kind]:
            raise UserError(
                f"benchmarks.{name}: data={chosen['name']} has no benchmark {benchmark['kind']}; "
                f"choose among {', '.join(BENCHMARKS[kind])} with benchmark=[…]"
            )
    for name, judge in values["judges"].items():
        if judge["kind"] not in JUDGES[kind]:
            raise UserError(
                f"judges.{name}: data={chosen['name']} cannot be judged by {judge['kind']}; "
                f"choose {_shown(JUDGES[kind])} with judge=[…]"
            )
        _check_judge(name, judge)
    if chosen["preferences"] == "sampled" and kind not in GOLD:
        raise UserError(f"data.preferences=sampled: data={chosen['name']} has no gold to label them; use given")
    if kind == "stories":  # whose sizes are exact: what is too small is known before anything is made
        for size, smallest, needed in (
            ("prompts", values["ppo"]["batch_size"], "ppo.batch_size"),
            ("preferences", values["reward_model"]["held_out"] + 1, "reward_model.held_out and one to train on"),
        ):
            if chosen["task"][size] < smallest:
                raise UserError(f"data.task.{size}={chosen['task'][size]}: {needed} need at least {smallest}")
    if values["model"]["source"] == "pretrain" and chosen["corpus"]["kind"] == "none":
        raise UserError(
            f"model={values['model']['name']} is pretrained by the project, and data={chosen['name']} has no corpus; "
            "choose another model, or set data.corpus.kind and data.corpus.documents"
        )


def _check_judge(name, judge):
    if judge["kind"] == "openai":
        if not judge["model"]:
            raise UserError(f"judges.{name}.model is missing; name the model that shall judge")
        judge_access.check_base_url(judge["base_url"], f"judges.{name}.base_url")
        for key in ("max_tokens", "attempts"):
            if judge[key] is not None and judge[key] < 1:
                raise UserError(f"judges.{name}.{key}={judge[key]}: must be at least 1")
        if judge["templates"] and not Path(judge["templates"]).is_dir():
            raise UserError(f"judges.{name}.templates={judge['templates']}: no such folder")
    for key in ("tie_margin", "temperature"):
        if judge[key] is not None and not 0 <= judge[key] < math.inf:
            raise UserError(f"judges.{name}.{key}={judge[key]}: must be at least 0")


def _check_plane(values):
    plane, key = values["evaluate"]["plane"], "evaluate.plane"
    for arm in plane["arms"]:
        if arm not in values["arms"]:
            raise UserError(f"{key}.arms: {arm} is no arm of this study; it has {', '.join(values['arms'])}")
    if plane["arms"] and values["sft"]["models"] < 2:
        raise UserError(f"{key}.arms={plane['arms']}: a plane needs two SFT models; set sft.models=2, or {key}.arms=[]")
    step = _fraction(f"{key}.step", plane["step"])
    if not 0 < step <= 1:
        raise UserError(f"{key}.step={plane['step']}: must be above 0, and at most 1")
    if (1 / step).denominator != 1:
        raise UserError(f"{key}.step={plane['step']}: 1 must be a multiple of it; give 1/2, 1/3, 1/4, …")
    if not 0 <= _fraction(f"{key}.margin", plane["margin"]) <= 5:
        raise UserError(f"{key}.margin={plane['margin']}: must lie between 0 and 5")
    if plane["kl_coef"] is not None and plane["kl_coef"] not in values["kl_coefs"]:
        raise UserError(f"{key}.kl_coef: {plane['kl_coef']} is not in kl_coefs={values['kl_coefs']}; add it there")


def _check_objective(values):
    objective, key = values["objective"], "objective"
    arms = [name for names, _ in plan.ways(values).values() for name in names]
    if objective["arm"] and objective["arm"] not in arms:
        raise UserError(f"{key}.arm={objective['arm']}: no arm of this study; it has {', '.join(arms)}")
    _choose(f"{key}.measure", objective["measure"] or OBJECTIVES[0], OBJECTIVES)
    if objective["kl_coef"] is not None and objective["kl_coef"] not in values["kl_coefs"]:
        raise UserError(f"{key}.kl_coef: {objective['kl_coef']} is not in kl_coefs={values['kl_coefs']}; add it there")
    if not 0 <= (objective["kl_budget"] or 0) < math.inf:
        raise UserError(f"{key}.kl_budget={objective['kl_budget']}: must be at least 0")


def _check_model(values):
    model = values["model"]
    template = model["chat_template"]
    if template is not None and not (TEMPLATES / f"{template}.jinja").is_file():
        known = sorted(path.stem for path in TEMPLATES.glob("*.jinja"))
        raise UserError(f"model.chat_template={template}: no such template; there are {', '.join(known)}, or null")
    if model["source"] == "package" and model["dtype"] != "float32":
        raise UserError(
            f"model.dtype={model['dtype']}: a package's GGUF is read as float32; for speed, mixed_precision=bf16"
        )
    if model["source"] == "pretrain":
        architecture = model["architecture"]
        if architecture["hidden_size"] % architecture["heads"]:
            raise UserError(
                f"model.architecture.hidden_size={architecture['hidden_size']}: not divisible by "
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
        positions = _check_folder(folder).get("max_position_embeddings")
        if positions:
            _check_length(values["lengths"], positions, f"{folder}/config.json's max_position_embeddings")


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


def _check_folder(folder):
    """The configuration of a local model. UserError where the folder lacks what a model needs."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json, so it is no model folder; give one that save_pretrained wrote")
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder}: no weights (*.safetensors); save the model again with safetensors")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        raise UserError(f"{folder}: no tokenizer (tokenizer.json); save the model's tokenizer there")
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{folder}/config.json: not JSON; save the model again") from None


def _check_names_differ(values):
    """Labels show two decimals: two policies that differ in the third cannot be told apart in tables and figures."""
    seen = set()
    for policy in plan.policies(values):
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
    ways = plan.ways(values).values()  # a policy has the first of its way's names
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
    gold = values["data"]["task"]["kind"] in GOLD
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
    found = {"prepare": _local_files(config.Task, chosen["task"])}
    for name, benchmark in values["benchmarks"].items():
        found[f"benchmark/{name}"] = _local_files(config.Benchmark, benchmark)
    corpus = _local_files(config.Corpus, chosen["corpus"])
    if corpus and values["model"]["source"] == "pretrain":
        text = runs.canonical_json(corpus)
        found["corpus"] = {"sha256": hashlib.sha256(text.encode()).hexdigest()}
    for name, judge in values["judges"].items():
        if judge["templates"]:
            found[f"judge/{name}"] = {"templates": _describe_folder(Path(judge["templates"]))}
    folder = local_folder(values["model"])
    if folder:
        found["base"] = {"path": _describe_folder(folder)}
    return {run: files for run, files in found.items() if files}


def _local_files(cls, values):
    settings = config.from_dict(cls, values)
    paths = data.local_files(settings)
    content = {name: _describe(path) for name, path in sorted(paths.items())}
    _check_once(cls, runs.canonical_json([values, content]))
    return content


@functools.cache
def _check_once(cls, text):
    """`data.check` of the settings in `text`, once for the same content: it reads whole files."""
    data.check(config.from_dict(cls, json.loads(text)[0]))


def _describe(path):
    status = Path(path).stat()
    return _describe_once(str(path), status.st_size, status.st_mtime_ns)


@functools.cache
def _describe_once(path, size, modified):
    return runs.describe_file(path)


def _describe_folder(folder):
    """`<bytes>:<sha256>` of a model folder: its files' names and contents."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    content = {path.name: _describe(path) for path in files}
    total = sum(path.stat().st_size for path in files)
    return f"{total}:{hashlib.sha256(runs.canonical_json(content).encode()).hexdigest()}"
