"""Sweeps with the real Snakemake and stages that only write a manifest; with the real ones: test_study.py."""

import json

import pytest
from test_workflow import TINY, Place

POINTS = [[*TINY.split(), f"ppo.learning_rate={rate}", f"sft.epochs={n}"] for rate in ("1e-5", "2e-5") for n in (1, 2)]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A list of four points, finished."""
    place = Place(tmp_path_factory.mktemp("swept"))
    (place.folder / "points.json").write_text(json.dumps(POINTS))
    place.counts, place.printed = place.run("", "--config", "points=points.json")
    return place


def test_what_points_share_is_computed_once(swept):
    assert len(swept.calls()) == len(set(swept.calls()))
    once = {"corpus": 1, "prepare": 1, "benchmark": 1, "base": 1}
    by_epochs = {"sft": 4, "reward_model": 2, "landscape": 2, "gates": 2}
    assert swept.counts == once | by_epochs | {"ppo": 8, "respond": 8, "judge": 8, "studies": 5}
    assert "comparison of the sweep: results/studies/default-sweep-" in swept.printed


def test_overrides_with_commas_are_the_same_dag(swept):
    counts, _ = swept.run(f"{TINY} ppo.learning_rate=1e-5,2e-5 sft.epochs=1,2")
    assert not counts


def test_a_point_that_fails_stops_no_other(swept, tmp_path):
    place = swept.copy(tmp_path / "copy")
    points = [[*POINTS[0], "seed=1", more] for more in ("evaluate.plane.arms=[salsa]", "evaluate.plane.arms=[]")]
    (place.folder / "points.json").write_text(json.dumps(points))
    (place.folder / "fail_plane").touch()  # which the first point alone has
    counts, printed = place.run("", "--config", "points=points.json", code=1)
    assert counts["studies"] == 1 and counts["ppo"] == 2 and "plane was told to fail" in printed
    (place.folder / "fail_plane").unlink()
    counts, _ = place.run("", "--config", "points=points.json")
    assert counts == {"plane": 1, "studies": 2}  # the first point's, and the comparison


@pytest.mark.parametrize(
    ("config", "says"),
    [(["points=nothing.json"], "nothing.json"), (["points=points.json", "overrides=seed=1"], "no overrides")],
)
def test_a_mistake_in_points_is_one_line(tmp_path, config, says):
    process = Place(tmp_path / "bad").start("", "-n", "--quiet", "--config", *config)
    printed, _ = process.communicate(timeout=120)
    lines = [line for line in printed.splitlines() if line and not line.startswith("Using workflow specific profile")]
    assert process.returncode == 1 and len(lines) == 1 and says in lines[0], printed
