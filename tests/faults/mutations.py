"""Configurations as people mistype them, and as no one would write them: a generator for tests and for the soak.

`configurations(seed)` yields lists of overrides without end, the same for a seed. `dictionaries(seed, values)` yields
copies of a composed configuration with some values replaced, as JSON or Python could hold them.
"""

import copy
import random
from dataclasses import fields, is_dataclass

from salsa.workflow import bounds, config

# Of the default study.
ENTRIES = {
    "arms": "salsa",
    "benchmarks": "in_distribution",
    "judges": "gold",
    "claims": "stable",
}  # of the default study
CHOSEN = {  # groups, and presets of them
    "model": "tiny smollm2_135m gemma_2b llama2_7b_lora nothing ../config",
    "data": "stories reviews ultra nothing",
    "experiment": "default tiny_full reviews smollm2_reviews paper nothing glob(*)",
    "arm": "[ppo] [ppo,salsa,ema] [noise] [] ppo [ppo,ppo] [x]",
    "benchmark": "[two_turn] [openings] [mt_bench] []",
    "judge": "[gold] [vader] [openai] [reward_model] []",
}
# Values as texts of overrides. What follows a comma outside brackets is a sweep.
NUMBERS = (
    "0 1 -1 2 0.5 -0.5 1e-30 1e-320 1e30 1e308 1e400 -1e400 nan -nan inf 1e23 99999999999999999999 4294967296 0x1f "
    "1_0 007"
)
TEXTS = (
    "'' null true false maybe x ??? ${seed} ${oc.env:HOME} ${nothing} ${name} '${' \\\\ 'a b' 'a\nb' 'a\0b' "
    "'\x1b[31m' '\u202ex' é 🙂 '\udc80' ../x /etc/passwd . .. ~ con 'a;b' '$(touch x)' '`x`' '<b>' '{x}' a/b"
)
SHAPES = (
    "[] {} [[]] [1] [1,1] [null] [x,y] [1/2,1/2] [1/0] [1e999999999] ['1e999999999'] {a:1} {a:{b:{c:1}}} [nan] [-1] "
    "[{a:1}] (1) [1 1,2 range(0,3) range(0,1000000) range(0,1,0) choice(1,2) interval(0,1) sort(2,1) shuffle(1,2) "
    "glob(*) tag(a,1)"
)
OBJECTS = [None, True, False, 0, 1, -1, 2, 10**30, -(10**30), 0.5, float("nan"), float("inf"), 1e308, -0.0, 1e-320]
OBJECTS += ["", "x", "1/2", "1/0", "1e999999999", "nan", "a\nb", "a\0b", "\udc80", "x" * 5000, "../x", "~", "\u202ex"]
OBJECTS += [[], {}, [1], ["1"], [[1]], [None], {"a": 1}, [float("nan")], ["x" * 300], list(range(3000)), (1, 2), b"x"]


def keys(schema=config.Config, path=()):
    """The paths of all settings of the default study, such as arms.salsa.reference.kind."""
    for f in fields(schema):
        hint = bounds.base_type(bounds.type_hints(schema)[f.name])
        if is_dataclass(hint):
            yield from keys(hint, (*path, f.name))
        elif f.name in ENTRIES and not path:
            yield from keys(bounds.item_type(hint), (*path, f.name, ENTRIES[f.name]))
        else:
            yield ".".join([*path, f.name])


KEYS = list(keys())


def configurations(seed):
    """Lists of one to three overrides, mutated."""
    rng = random.Random(f"configurations/{seed}")
    while True:
        overrides = [_override(rng) for _ in range(rng.choice([1, 1, 1, 2, 3]))]
        if rng.random() < 0.05:
            overrides.append(overrides[0])
        yield overrides


def _override(rng):
    if rng.random() < 0.15:
        group = rng.choice(list(CHOSEN))
        return f"{group}={rng.choice(CHOSEN[group].split(' '))}"
    key = rng.choice(KEYS)
    if rng.random() < 0.1:
        key = _misspelt(key, rng)
    if rng.random() < 0.05:
        key = key.rsplit(".", rng.randint(1, 3))[0]  # a group of settings
    if rng.random() < 0.05:
        return f"~{key}"
    value = _value(rng)
    return f"{rng.choice(['', '', '', '', '', '+', '++'])}{key}={value}"


def _misspelt(key, rng):
    place = rng.randrange(len(key))
    return rng.choice(
        [
            key[:place] + key[place + 1 :],
            key[:place] + key[place] + key[place:],
            key[:place] + rng.choice("\u200b .=/@~é-\n\0") + key[place:],
            key + "." + rng.choice(KEYS),
            key.upper(),
        ]
    )


def _value(rng):
    value = rng.choice(rng.choice([NUMBERS, NUMBERS, TEXTS, SHAPES]).split(" "))
    if rng.random() < 0.05:
        long = ["9" * 30, "9" * 400, "9" * 5000, "x" * 3000, "[" * 5, "[" * 60, f"'{value * 50}'"]
        return rng.choice(long)
    return value


def dictionaries(seed, values):
    """Copies of a configuration, each with one to three values replaced, removed or added."""
    rng = random.Random(f"dictionaries/{seed}")
    while True:
        changed = copy.deepcopy(values)
        for _ in range(rng.choice([1, 1, 2, 3])):
            *path, name = rng.choice(KEYS).split(".")
            path = path[: rng.randint(0, len(path))] if rng.random() < 0.05 else path
            place = changed
            for part in path:
                place = place.get(part) if isinstance(place, dict) else None
            if not isinstance(place, dict):
                continue
            if rng.random() < 0.05:
                place.pop(name, None)
            else:
                place[name] = copy.copy(rng.choice(OBJECTS))
        yield changed
