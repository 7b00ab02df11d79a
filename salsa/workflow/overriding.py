"""Overrides as people write them on a command line: what one changes, the points of a sweep, and what is none.

Left out: the configuration that they make (compose.py).
"""

import itertools
import math
import re

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, RangeSweep
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from salsa.workflow import bounds, repository, runs
from salsa.workflow.messages import UserError

CONF = repository.ROOT / "conf"
OF_HYDRA = re.compile(r"-|[+~]*hydra[./]")  # a flag, or an override of Hydra's own settings
GROUPS = ("model", "data", "benchmark", "judge", "algorithm", "arm", "experiment")
ELSEWHERE = re.compile(r"\+*(results|objective)(\.|=)")  # overrides of where a study lies and what a search makes of it
FOLDERS = re.compile(r"(?<![\w.:/-])/(?:[^/\s,'\"\[\]{}]+/)+")  # of an absolute path, which is one machine's
SEVERAL = ("algorithm", "arm", "benchmark", "judge")  # groups of which a study takes several presets
MOST_SWEPT = 1000  # points of a sweep
LONGEST_OVERRIDE = 10000  # characters
DEEPEST_OVERRIDE = 20  # brackets in each other
ENTRIES = (
    "arms",
    "sft_variants",
    "regimes",
    "models",
    "mixes",
    "benchmarks",
    "judges",
    "claims",
)  # groups of things, each by its name
ENTRY = re.compile(rf"({'|'.join(ENTRIES)})\.([\w+-]+)\.")  # the overridden key is an entry's


def check(overrides):
    """Refuse overrides of which something would be ignored, or is no preset. UserError, one line."""
    seen = {}
    for text, override in zip(overrides, parse(overrides), strict=True):
        key, quoted = override.get_key_element().lstrip("+~"), bounds.shown(text)
        if not key:
            raise UserError(f"{quoted}: no key stands before =; write key=value")
        if key in seen:
            raise UserError(f"{seen[key]} and {quoted}: {bounds.shown(key)} is given twice; leave one out")
        seen[key] = quoted
        if re.match(r"hydra(\.|/|$)", key):
            raise UserError(f"{quoted}: a setting of Hydra, which `salsa run` alone reads; leave it out")
        if not override.is_sweep_override():
            _check_value(override, quoted)


def _check_value(override, text):
    """Refuse a choice of presets that are none, or that one alone is chosen of, and a value that changes nothing."""
    key, value = override.key_or_group, override.value()
    if override.is_delete() and key not in GROUPS and not ENTRY.match(f"{key}."):
        raise UserError(f"{key}: removed, and needed; leave out ~{key}")
    if value == {} and not override.is_add():
        raise UserError(f"{text}: changes nothing; name the settings that it shall change")
    if key not in GROUPS or override.package is not None:
        return
    names = value if isinstance(value, list) else [value]
    if isinstance(value, list) and key not in SEVERAL:
        raise UserError(f"{text}: one {key} is chosen, not a list; write {key}=NAME")
    for name in map(str, names):
        if name not in presets(key):
            there = ", ".join(presets(key)) or "none"
            raise UserError(f"{key}={bounds.shown(name)}: no such preset; there are {there}")
    if len(set(map(str, names))) < len(names):
        raise UserError(f"{text}: a preset stands there twice; leave one out")


def read_points(path):
    """The points in a JSON file: a list of lists of overrides. UserError where it is no such file."""
    try:
        points = runs.read_json(path)
    except OSError as error:
        raise UserError(f"{path}: {first_line(error)}; give a JSON file with a list of lists of overrides") from None
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
        sweep = next((text for text, o in zip(point, parse(point), strict=True) if o.is_sweep_override()), None)
        if sweep:
            raise UserError(f"{sweep}: a sweep within a point; give each of its values a point of its own")
        pairs = ((override.get_key_element().lstrip("+"), override) for override in parse(point))
        parsed.append({key: "" if o.is_delete() else o.get_value_element_as_str() for key, o in pairs})
    keys = dict.fromkeys(key for point in parsed for key in point)
    swept = [key for key in keys if len({point.get(key) for point in parsed}) > 1]
    return [{key: point[key] for key in swept if key in point} for point in parsed]


def expand(overrides):
    """The points of a sweep, each a list of overrides that are no sweeps. UserError for more than `MOST_SWEPT`."""
    axes = []
    for text, override in zip(overrides, parse(overrides), strict=True):
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


def parse(overrides):
    """Hydra's Override of each text. UserError for what is none."""
    parser = OverridesParser.create()
    parsed = []
    for text in overrides:
        quoted = repr(bounds.shown(text))
        if len(text) > LONGEST_OVERRIDE:
            raise UserError(f"override {quoted}: {len(text)} characters; write it into a file of conf/experiment")
        if _depth(text) > DEEPEST_OVERRIDE:
            raise UserError(f"override {quoted}: brackets more than {DEEPEST_OVERRIDE} deep; write it flatter")
        try:
            parsed.append(parser.parse_override(text))
        except (HydraException, OmegaConfBaseException, RecursionError, ValueError, ArithmeticError) as error:
            reason = f"{first_line(error)}; write key=value, without spaces, or quote the value"
            raise UserError(f"override {quoted}: {reason}") from None
    return parsed


def _depth(text):
    """How deep the brackets of a text are nested, quoted ones too."""
    depth = deepest = 0
    for sign in text:
        depth += (sign in "([{") - (sign in ")]}")
        deepest = max(deepest, depth)
    return deepest


def applied(override):
    """An override as Hydra applies it to a tree that lacks what only the schema knows: pydantic holds it to that."""
    key = override.partition("=")[0]
    plain = re.fullmatch(r"\w[\w.+-]*", key) and key not in GROUPS and not OF_HYDRA.match(override)
    return f"++{override}" if plain else override


def presets(group):
    """The names of a configuration group's presets."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def recorded(overrides):
    """The overrides that make a study what it is, as its report tells them: no folder of this machine among them."""
    return [FOLDERS.sub("", override) for override in overrides if not ELSEWHERE.match(override)]


def first_line(error):
    """What an error of Hydra or OmegaConf says, in one line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    said = " ".join(lines[: 2 if lines[0].endswith(":") else 1])  # Hydra's "ValidationError raised while composing:"
    return bounds.printable(said.rstrip(".")[:300])
