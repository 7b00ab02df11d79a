"""Any configuration, model folder and judge's reply is taken, or refused in one line, soon; never another exception.

Rows are mutated in tests/data/test_rows.py. `benchmarks/soak.py mutations` tries more of each.
"""

import contextlib
import functools
import json
import random
import re
import shutil
import time

import pytest
import torch
from conftest import EXECUTION, examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import KEYS, configurations, dictionaries

from salsa.judges.language_model import client as judge_client
from salsa.judges.language_model import verdict_text
from salsa.rl import intake, models
from salsa.workflow import checks, compose, config, plan, policies, schema
from salsa.workflow.runs import UserError

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
    (composed,) = compose.compose([])
    return schema.dump(composed.config)


def test_the_generator_knows_all_settings():
    assert len(KEYS) == len(set(KEYS)) > 150
    assert {"arms.salsa.kl_schedule.final", "claims.stable.measure", "evaluate.gates.smallest_kl"} <= set(KEYS)
    assert next(configurations(3)) == next(configurations(3)) != next(configurations(4))


@settings(max_examples=examples(25), deadline=None, derandomize=True)
@given(SEEDS)
def test_mutated_overrides(seed):
    with planned_or_refused():
        plan.plan(compose.compose(next(configurations(seed))))


@settings(max_examples=examples(200), deadline=None, derandomize=True)
@given(SEEDS)
def test_mutated_values(seed):
    """As `compose` checks them, without Hydra, which is most of its time."""
    changed = next(dictionaries(seed, default()))
    with planned_or_refused():
        study = compose.validated(changed)
        checks.check(study)
        plan.plan([policies.Composed(study, policies.expanded_arms(study))])


@pytest.fixture(scope="module")
def model_files(tiny_chat_model):
    return {path.name: path.read_bytes() for path in tiny_chat_model.iterdir()}


def mutated(content, rng):
    """Bytes with one fault: cut, emptied, a bit flipped, a piece doubled or removed, a number or word replaced."""
    if not content:
        return content
    at, other = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    kind = rng.choice(["cut", "empty", "flip", "double", "remove", "number", "word"])
    if kind == "cut":
        return content[:at]
    if kind == "empty":
        return b""
    if kind == "flip":
        place = min(at, len(content) - 1)
        return content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]
    if kind == "double":
        return content[:other] + content[at:]
    if kind == "remove":
        return content[:at] + content[other:]
    pattern, pieces = (rb"[0-9]+", NUMBERS) if kind == "number" else (rb'"[^"]*"', WORDS)
    places = list(re.finditer(pattern, content[:20_000]))
    if not places:
        return content
    place = rng.choice(places)
    return content[: place.start()] + rng.choice(pieces) + content[place.end() :]


NUMBERS = [b"0", b"-1", b"3", b"1e400", b"NaN", b"null", b"[]", b"99999999999999999999", b"1048576"]
WORDS = [b"null", b"7", b"{}", b'""', b'"\\ud800"', b"[[[]]]", b"true", b'"x"']


@settings(max_examples=examples(20), deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(SEEDS)
def test_mutated_model_folders(model_files, tmp_path_factory, seed):
    rng, folder = random.Random(seed), tmp_path_factory.mktemp("mutated")
    for name, content in model_files.items():
        (folder / name).write_bytes(content)
    name = rng.choice(sorted(model_files))
    if rng.random() < 0.1:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(mutated(model_files[name], rng))
    with planned_or_refused():
        intake.load(config.Model("m", "hub", path=str(folder)), folder / "output", EXECUTION)
        files = {path.name for path in (folder / "output" / "model").iterdir()}
        assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= files
        assert torch.isfinite(next(models.load_policy(folder / "output" / "model").parameters())).all()
    shutil.rmtree(folder)


REPLY = {
    "id": "chatcmpl-1",
    "model": "judge",
    "choices": [
        {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": "<think>[[B>A]]</think> My verdict is: [[A>>B]]"},
        }
    ],
    "usage": {"prompt_tokens": 12, "completion_tokens": 7, "total_tokens": 19},
}
ERROR = {"error": {"message": "Unsupported parameter: 'temperature'", "param": "temperature", "code": "unsupported"}}


@settings(max_examples=examples(200), deadline=None, derandomize=True)
@given(SEEDS)
def test_mutated_replies_of_a_judge(seed):
    rng = random.Random(seed)
    content = json.dumps(rng.choice([REPLY, ERROR]), indent=rng.choice([None, 1])).encode()
    for _ in range(rng.randint(0, 3)):
        content = mutated(content, rng)
    status = rng.choice([200, 200, 200, 204, 301, 400, 401, 403, 422, 429, 500, 503])
    reply = judge_client.judged(judge_client.Reply(status, {}, *judge_client._parsed(content)))
    assert reply.status in (0, 200, 301, 400, 401, 402, 403, 404, 405, 429)
    if reply.status != 200:
        assert reply.words.strip()
        return
    client = judge_client.Client(config.Judge("openai", model="m", base_url="http://127.0.0.1:9"), EXECUTION)
    line = client._taken(reply.content["choices"][0], reply.content, {}, {})
    assert json.loads(json.dumps(line, allow_nan=False, ensure_ascii=False).encode()) == line
    assert verdict_text.parse(line["text"], line["finish_reason"]) in {None, *verdict_text.GRADES}
