"""Any configuration gives a plan or one line that says what is wrong, soon; never another exception."""

import contextlib
import functools
import time

from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import KEYS, configurations, dictionaries

from salsa import compose, plan
from salsa.runs import UserError

SEEDS = st.integers(0, 2**32)
LONGEST = 30  # seconds, on a machine that does other things too


@contextlib.contextmanager
def planned_or_refused():
    started = time.monotonic()
    try:
        yield
    except UserError as error:
        text = str(error)
        assert text and "\n" not in text and len(text) < 1500, text
        assert all(sign.isprintable() or sign == "\t" for sign in text), ascii(text)
    assert time.monotonic() - started < LONGEST


@functools.cache
def default():
    (values,) = compose.compose([])
    return values


def test_the_generator_knows_all_settings():
    assert len(KEYS) == len(set(KEYS)) > 150
    assert {"arms.salsa.kl_schedule.final", "claims.stable.measure", "evaluate.gates.smallest_kl"} <= set(KEYS)
    assert next(configurations(3)) == next(configurations(3)) != next(configurations(4))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(SEEDS)
def test_mutated_overrides(seed):
    with planned_or_refused():
        plan.plan(compose.compose(next(configurations(seed))))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(SEEDS)
def test_mutated_values(seed):
    """As `compose` checks them, without Hydra, which is most of its time."""
    values = default()
    told = {name: values[name] for name in ("files", "link", "point")}
    changed = next(dictionaries(seed, {name: value for name, value in values.items() if name not in told}))
    with planned_or_refused():
        compose.validate(changed)
        plan.plan([changed | told])
