"""`salsa forget`: what is moved aside, in which order, and what is refused with nothing moved."""

import json
import os

import pytest
from filelock import FileLock

from salsa.__main__ import main
from salsa.workflow import forget, progress, runs
from salsa.workflow.messages import UserError
from salsa.workflow.plan import Plan

PARENTS = {  # a small study's runs, and what each reads
    "prepare/data-1": [],
    "sft/a-1": ["prepare/data-1"],
    "ppo/p-1": ["sft/a-1"],
    "ppo/p-2": ["sft/a-1"],
    "respond/p-1": ["ppo/p-1"],
    "studies/mine-1": ["ppo/p-1", "ppo/p-2", "respond/p-1"],
}


def name(path):
    """A folder's name with the beginning of an address, as the workflow gives it: no two stages share one."""
    return f"{path.replace('/', '_')}-{'0' * 12}"


def folder(results, path):
    return results / path.split("/")[0] / name(path)


def finish(results, path):
    parents = {f"role/{k}": {"folder": name(p), "address": p} for k, p in enumerate(PARENTS[path])}
    runs.write_atomically(folder(results, path) / "artefact.txt", path)
    runs.write_manifest(folder(results, path), {"stage": path, "address": path, "parents": parents})


@pytest.fixture
def results(tmp_path):
    for path in PARENTS:
        finish(tmp_path / "results", path)
    (tmp_path / "results" / "studies" / "mine").symlink_to(name("studies/mine-1"))
    return tmp_path / "results"


def there(results):
    return {path for path in PARENTS if (folder(results, path) / "manifest.json").exists()}


def test_a_run_on_which_nothing_rests_is_moved_and_can_be_moved_back(results, capsys):
    place = results / "forgotten" / "studies" / name("studies/mine-1")
    assert main(["forget", str(results / "studies" / "mine")]) == 0  # by its readable name
    assert there(results) == PARENTS.keys() - {"studies/mine-1"} and (place / "artefact.txt").is_file()
    assert str(place) in capsys.readouterr().out
    assert not list(forget._finished(results).keys() & {"forgotten"})
    place.rename(folder(results, "studies/mine-1"))
    assert there(results) == PARENTS.keys()


def test_a_run_on_which_others_rest_is_kept_unless_they_go_too(results):
    with pytest.raises(UserError, match=f"2 finished runs rest .*{name('studies/mine-1')}.* add --dependents"):
        forget.forget([folder(results, "ppo/p-1")])
    assert there(results) == PARENTS.keys() and not (results / "forgotten").exists()
    moved = [before for before, _ in forget.forget([folder(results, "ppo/p-1")], dependents=True)]
    assert moved == [folder(results, path) for path in ("studies/mine-1", "respond/p-1", "ppo/p-1")]
    assert there(results) == {"prepare/data-1", "sft/a-1", "ppo/p-2"}


def test_all_that_rests_on_it_may_be_named(results):
    named = [folder(results, path) for path in ("ppo/p-2", "studies/mine-1")]
    assert [before for before, _ in forget.forget(named)] == named[::-1]


def test_what_was_forgotten_before_stays(results):
    places = []
    for _ in range(3):
        ((_, place),) = forget.forget([folder(results, "studies/mine-1")])
        places.append(place)
        finish(results, "studies/mine-1")
    assert len(set(places)) == 3 and all((place / "manifest.json").is_file() for place in places)


def test_a_run_whose_manifest_is_damaged_is_still_what_others_rest_on(results):
    (folder(results, "ppo/p-1") / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="2 finished runs rest on"):
        forget.forget([folder(results, "ppo/p-1")])


def test_what_is_no_run_is_refused(results, tmp_path):
    unfinished = results / "ppo" / "begun"
    unfinished.mkdir()
    outside = tmp_path / "elsewhere" / "ppo" / "x"
    outside.mkdir(parents=True)
    (results / "ppo" / "link").symlink_to(outside)
    runs.write_json(outside / "manifest.json", {})
    published = results / "published" / "mine"
    runs.write_json(published / "manifest.json", {})
    refused = {
        unfinished: "not finished, and nothing to forget",
        results / "ppo" / "link": "no run's folder below results",
        results / "ppo" / "nowhere": "no run's folder below results",
        results / "ppo": "no run's folder below results",
        published: "no run's folder below results",
        outside: "of other results",
    }
    for path, says in refused.items():
        with pytest.raises(UserError, match=says):
            forget.forget([folder(results, "studies/mine-1"), path])
    assert there(results) == PARENTS.keys()


def test_a_run_that_a_process_works_on_is_refused(results):
    lock = FileLock(folder(results, "studies/mine-1") / ".lock")
    with lock, pytest.raises(UserError, match="a process works on it"):
        forget.forget([folder(results, "ppo/p-2")], dependents=True)
    assert there(results) == PARENTS.keys()


def test_a_run_that_another_is_computed_from_is_refused(results):
    (folder(results, "studies/mine-1") / "manifest.json").unlink()
    planned = {f"{path.split('/')[0]}/{name(path)}": path for path in PARENTS}
    plan = {
        below: {"parents": {str(k): f"{p.split('/')[0]}/{name(p)}" for k, p in enumerate(PARENTS[path])}}
        for below, path in planned.items()
    }
    runs.write_atomically(results / "plans" / "1.json", json.dumps({"runs": plan}))
    lock = FileLock(folder(results, "studies/mine-1") / ".lock")
    with lock, pytest.raises(UserError, match="is computed now, from"):
        forget.forget([folder(results, "ppo/p-2")])
    progress.hold_session(Plan(str(results), plan), "salsa run", 2)
    with pytest.raises(UserError, match=f"runs now .process {os.getpid()} on"):
        forget.forget([folder(results, "ppo/p-2")])
    progress._held.pop().close()
    assert forget.forget([folder(results, "ppo/p-2")])
