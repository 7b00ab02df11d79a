"""Every artefact of every kind of run, removed, emptied, cut and flipped: named and refused before a child computes."""

import random

import pytest

from salsa.algorithms import ppo as ppo_stage
from salsa.algorithms.ppo import Ppo
from salsa.workflow import runs

KINDS = {
    "missing": lambda content: None,
    "empty": lambda content: b"",
    "cut": lambda content: content[:-1],
    "a bit": lambda content: bytes([content[0] ^ 1]) + content[1:],
}


def never(*_):
    raise AssertionError("the stage was run")


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_artefact_of_any_parent(parents, kind, tmp_path, execution):
    from salsa.workflow import config

    generator = random.Random(0)
    settings = config.TRAINING["ppo"](0, 0.1, ["1"], config.Reference(), Ppo(), config.Lengths())
    for role, folder in parents.items():
        name = generator.choice(sorted(runs.verify(folder)["artefacts"]))
        path = folder / name
        content = path.read_bytes()
        damaged = KINDS[kind](content)
        try:
            path.unlink()
            if damaged is not None:
                path.write_bytes(damaged)
            with pytest.raises(runs.UserError) as caught:
                runs.execute("ppo", ppo_stage.VERSION, never, settings, parents, tmp_path / role, execution)
        finally:
            path.write_bytes(content)
        assert str(path) in str(caught.value) and "run again" in str(caught.value) and "\n" not in str(caught.value)
        assert runs.manifest_of(tmp_path / role) is None
