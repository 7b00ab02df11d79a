"""Runs: addresses by content, manifests written last, artefacts checked, one process at a time."""

import dataclasses
import errno
import gc
import importlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

import salsa
from salsa.workflow import config, plan, runs, stages


@config.dataclass()
class Settings:
    seed: int = 0
    rates: list[float] = dataclasses.field(default_factory=lambda: [0.5])
    files: dict[str, str] = dataclasses.field(default_factory=dict)
    source: dict[str, str] = dataclasses.field(default_factory=dict)


EXECUTION = config.Execution()
STAGE = stages.Stage(name="stage", module="tests", settings=Settings)


def write(settings, parents, output, execution):
    runs.write_json(output / "result.json", {"seed": settings.seed})
    runs.write_jsonl(output / "sub" / "rows.jsonl", [{"a": 1}, {"a": "ü"}])
    (output / "log.txt").write_text("a log is no part of the result")
    (output / runs.CHECKPOINTS).mkdir(exist_ok=True)
    (output / runs.CHECKPOINTS / "state.bin").write_bytes(b"0")
    return {"note": "done"}


def execute(folder, settings=None, parents=None, function=write, **more):
    return runs.execute("stage", 1, function, settings or Settings(), parents or {}, folder, EXECUTION, **more)


def never(settings, parents, output, execution):
    raise AssertionError("the stage was run")


def test_manifest_says_what_the_run_is(tmp_path):
    parent = execute(tmp_path / "parent")
    manifest = execute(tmp_path / "run", Settings(seed=4), {"base": tmp_path / "parent"})
    assert manifest == json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["settings"] == dataclasses.asdict(Settings(seed=4)) and manifest["summary"] == {"note": "done"}
    assert manifest["parents"] == {"base": {"folder": "parent", "address": parent["address"]}}
    expected = runs.address("stage", 1, dataclasses.asdict(Settings(seed=4)), {"base": parent["address"]})
    assert manifest["address"] == expected and len(expected) == 64
    assert set(manifest["artefacts"]) == {"result.json", "sub/rows.jsonl"}
    for name, recorded in manifest["artefacts"].items():
        path = tmp_path / "run" / name
        assert recorded == {"bytes": path.stat().st_size, "sha256": runs.file_sha256(path)}
    assert not (tmp_path / "run" / runs.CHECKPOINTS).exists()
    assert manifest["execution"]["threads"] == 1 and manifest["packages"]["python"]
    assert manifest["wall_seconds"] >= 0 and manifest["peak_memory_mib"] > 0
    assert runs.verify(tmp_path / "run") == manifest


def test_addresses_are_canonical():
    def made(settings, parents=None, stage="ppo", version=1):
        return runs.address(stage, version, settings, parents or {})

    assert made({"a": 1, "b": {"c": 2, "d": 3}}) == made({"b": {"d": 3, "c": 2}, "a": 1})
    assert made({}, {"x": "1", "y": "2"}) == made({}, {"y": "2", "x": "1"})
    different = [made({"a": 1}), made({"a": 2}), made({"a": "1"}), made({"b": 1}), made({"a": 1}, version=2)]
    different += [made({"a": 1}, stage="sft"), made({"a": 1}, {"base": "x"}), made({"a": 1}, {"sft0": "x"})]
    assert len(set(different)) == len(different)
    with pytest.raises(ValueError):
        made({"a": float("nan")})
    assert runs.canonical_json({"b": [1, "ü"], "a": None}) == '{"a":null,"b":[1,"ü"]}'


def test_a_policy_keeps_the_role_that_it_was_published_under(tmp_path):
    assert runs.address("study", 1, {}, {"policy/3": "a"}) == runs.address("study", 1, {}, {"ppo/3": "a"})
    execute(tmp_path / "parent")
    manifest = execute(tmp_path / "run", Settings(seed=4), {"policy": tmp_path / "parent"})
    assert list(manifest["parents"]) == ["ppo"] and runs.verify(tmp_path / "run") == manifest


def test_files_are_addressed_by_content_and_not_by_path(tmp_path):
    def made(path, content):
        return runs.address("prepare", 1, {"task": {"sft_file": path, "seed": 0}, "files": {"sft_file": content}}, {})

    (tmp_path / "a").write_text("text")
    content = runs.describe_file(tmp_path / "a")
    assert content == "4:982d9e3eb996f559e633f4d194def3761d909f5a3b647d1a851fead67c32c9d1"
    assert made("/here", content) == made("/there", content) != made("/here", "5:abc")


def test_a_finished_run_is_not_computed_again(tmp_path, capsys):
    first = execute(tmp_path / "run")
    assert execute(tmp_path / "run", function=never) == first
    assert "already finished" in capsys.readouterr().out
    with pytest.raises(runs.UserError, match="holds another finished run"):
        execute(tmp_path / "run", Settings(seed=1), function=never)


def test_a_stage_that_fails_leaves_no_manifest(tmp_path):
    def fail(settings, parents, output, execution):
        write(settings, parents, output, execution)
        raise runs.UserError("it failed")

    with pytest.raises(runs.UserError, match="it failed"):
        execute(tmp_path / "run", function=fail)
    assert runs.manifest_of(tmp_path / "run") is None and not list((tmp_path / "run").glob("*manifest*"))
    with pytest.raises(runs.UserError, match="not finished"):
        runs.verify(tmp_path / "run")
    with pytest.raises(runs.UserError, match=r"not finished.*'base'"):
        execute(tmp_path / "child", parents={"base": tmp_path / "run"}, function=never)
    assert execute(tmp_path / "run")["summary"] == {"note": "done"}


def test_a_request_to_stop_does_not_lose_what_is_computed(tmp_path, monkeypatch):
    artefacts, asked = runs.artefacts, []

    def interrupted(output):
        os.kill(os.getpid(), signal.SIGTERM)
        return artefacts(output)

    monkeypatch.setattr(runs, "artefacts", interrupted)
    before = signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
    try:
        assert execute(tmp_path / "run") == runs.verify(tmp_path / "run") and not asked
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_run_that_goes_on_keeps_its_first_start(tmp_path, monkeypatch):
    times = iter(["2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z", "2026-01-03T00:00:00Z"])
    monkeypatch.setattr(runs.time, "strftime", lambda *_: next(times))

    def killed(*_):
        raise KeyboardInterrupt

    output = tmp_path / "run"
    for settings in (Settings(1), Settings(2)):  # the second is another run, in the same folder
        with pytest.raises(KeyboardInterrupt):
            execute(output, settings, function=killed)
    manifest = execute(output, Settings(2))
    assert manifest["started"] == "2026-01-02T00:00:00Z" and not (output / runs.CHECKPOINTS).exists()


def test_checkpoints_of_another_run_are_refused(tmp_path):
    def fail(settings, parents, output, execution):
        raise runs.UserError("rates: too many")

    def stop(settings, parents, output, execution):
        write(settings, parents, output, execution)
        raise SystemExit(143)

    with pytest.raises(runs.UserError, match="too many"):
        execute(tmp_path / "run", function=fail)
    with pytest.raises(SystemExit):
        execute(tmp_path / "run", Settings(rates=[]), function=stop)  # it failed before it had any
    with pytest.raises(runs.UserError, match=r"holds checkpoints of another run .*; remove .*run, or choose"):
        execute(tmp_path / "run", function=never)
    assert execute(tmp_path / "run", Settings(rates=[]))["summary"] == {"note": "done"}
    assert not (tmp_path / "run" / runs.CHECKPOINTS).exists()


def truncate(path):
    path.write_text(path.read_text()[:-1])


def alter(path):
    path.write_text(path.read_text().replace("1", "2"))


@pytest.mark.parametrize(
    ("damage", "message"), [(os.remove, "missing"), (truncate, "bytes instead of"), (alter, "altered")]
)
def test_a_damaged_parent_is_refused_by_name(tmp_path, damage, message):
    execute(tmp_path / "parent")
    damage(tmp_path / "parent" / "sub" / "rows.jsonl")
    with pytest.raises(runs.UserError, match=f"sub/rows.jsonl: .*{message}") as caught:
        execute(tmp_path / "run", parents={"base": tmp_path / "parent"}, function=never)
    assert "\n" not in str(caught.value) and not (tmp_path / "run" / "manifest.json").exists()


def test_logs_and_notes_beside_the_result_may_change(tmp_path):
    execute(tmp_path / "run")
    (tmp_path / "run" / "log.txt").write_text("more")
    (tmp_path / "run" / "benchmark.tsv").write_text("s")
    runs.verify(tmp_path / "run")


def test_a_truncated_manifest_is_none(tmp_path):
    execute(tmp_path / "run")
    truncate(tmp_path / "run" / "manifest.json")
    truncate(tmp_path / "run" / "manifest.json")
    assert runs.manifest_of(tmp_path / "run") is None
    with pytest.raises(runs.UserError, match=r"manifest.json"):
        runs.verify(tmp_path / "run")


def test_no_flipped_bit_of_a_manifest_passes(tmp_path):
    execute(tmp_path / "run", Settings(rates=[1e-05]))
    path = tmp_path / "run" / "manifest.json"
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), 7):  # each bit of a byte in turn, and so 1e-05 to 1E-05 too
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(runs.UserError, match=r"run and run again") as caught:
            runs.verify(tmp_path / "run")
        assert "\n" not in str(caught.value)
    path.write_bytes(whole.replace(b"1e-05", b"1E-05"))
    with pytest.raises(runs.UserError, match="altered"):
        runs.verify(tmp_path / "run")
    path.write_bytes(whole)
    assert runs.verify(tmp_path / "run")["settings"]["rates"] == [1e-05]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": {"seed": 1}}, "says another address"),
        ({"parents": {"base": {"folder": "base", "address": "0" * 64}}}, "says another address"),
    ],
)
def test_a_manifest_that_is_sealed_anew_still_has_its_address(tmp_path, change, message):
    manifest = execute(tmp_path / "run")
    runs.write_manifest(tmp_path / "run", manifest | change)
    with pytest.raises(runs.UserError, match=message):
        runs.verify(tmp_path / "run")
    runs.write_json(tmp_path / "run" / "manifest.json", {"address": manifest["address"], "artefacts": {}})
    with pytest.raises(runs.UserError, match="without its digest"):
        runs.verify(tmp_path / "run")


def test_an_altered_manifest_is_not_taken_for_finished(tmp_path):
    manifest = execute(tmp_path / "run")
    runs.write_json(tmp_path / "run" / "manifest.json", manifest | {"summary": {"note": "better"}})
    with pytest.raises(runs.UserError, match="altered since it was written"):
        execute(tmp_path / "run", function=never)


def test_a_survey_goes_on_after_what_it_cannot_read(tmp_path, monkeypatch):
    for name in "abc":
        execute(tmp_path / "stage" / name)
    (tmp_path / "stage" / "unfinished").mkdir()
    (tmp_path / "a file").write_text("")
    (tmp_path / "stage" / "a" / "result.json").unlink()
    (tmp_path / "stage" / "d" / "manifest.json").mkdir(parents=True)
    digest = runs.file_sha256

    def unreadable(path):
        if path.parent.name == "b":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return digest(path)

    monkeypatch.setattr(runs, "file_sha256", unreadable)
    found = {folder.name: problem for folder, problem in runs.survey(tmp_path)}
    assert list(found) == ["a", "b", "c", "d"] and found["c"] is None
    assert "result.json: missing" in found["a"] and "b/result.json: can't be read (Input/output error)" in found["b"]
    assert "d" in found["d"] and all("\n" not in (problem or "") for problem in found.values())


def test_the_manifest_is_made_of_what_the_stage_declares(tmp_path):
    declared = {"writes": ("result.json", "sub/*.jsonl"), "may_write": ("more",)}

    def forgets(settings, parents, output, execution):
        write(settings, parents, output, execution)
        (output / "sub" / "rows.jsonl").unlink()

    def leaves(settings, parents, output, execution):
        write(settings, parents, output, execution)
        runs.write_json(output / "stray.json", {})
        runs.write_json(output / "more" / "a.json", {})

    with pytest.raises(runs.UserError, match=r"run: the stage has ended, and sub/\*.jsonl is not there"):
        execute(tmp_path / "run", function=forgets, **declared)
    assert set(execute(tmp_path / "run", function=leaves, **declared)["artefacts"]) == {
        "result.json",
        "sub/rows.jsonl",
        "more/a.json",
    }


def test_a_folder_that_is_removed_meanwhile_is_not_finished(tmp_path):
    def lose(settings, parents, output, execution):
        (output / "first.json").write_text("{}")
        shutil.rmtree(output)
        write(settings, parents, output, execution)

    with pytest.raises(runs.UserError, match="run: removed while it was written; run again"):
        execute(tmp_path / "run", function=lose)
    assert runs.manifest_of(tmp_path / "run") is None
    assert execute(tmp_path / "run")["summary"] == {"note": "done"}


def test_no_json_holds_what_is_not_finite(tmp_path):
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(runs.UserError, match=rf"a.json: losses.1.value is {value}, which no JSON can hold"):
            runs.write_json(tmp_path / "a.json", {"losses": [0.5, {"value": value}]})
        with pytest.raises(runs.UserError, match="which no JSON can hold"):
            runs.write_jsonl(tmp_path / "a.jsonl", [{"loss": value}])
    assert list(tmp_path.iterdir()) == []


def test_half_a_surrogate_is_written_as_its_escape(tmp_path):
    runs.write_json(tmp_path / "a.json", {"text": "a\ud800b"})
    assert b'"a\\ud800b"' in (tmp_path / "a.json").read_bytes()
    assert runs.read_json(tmp_path / "a.json") == {"text": "a\ud800b"}


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"1" * 5000])
def test_what_is_no_json_is_one_line(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    for read in (runs.read_json, runs.read_jsonl) if content else (runs.read_json,):
        with pytest.raises(runs.UserError, match=r"a.json(:1)?: not JSON \(.+\); mend or remove") as caught:
            read(tmp_path / "a.json")
        assert "\n" not in str(caught.value)


def test_parents_that_are_no_runs(tmp_path):
    with pytest.raises(runs.UserError, match=r"no such folder.*'base'"):
        execute(tmp_path / "run", parents={"base": tmp_path / "none"}, function=never)
    (tmp_path / "model").mkdir()
    with pytest.raises(runs.UserError, match=r"no manifest.json.*'base'"):
        execute(tmp_path / "run", parents={"base": tmp_path / "model"}, function=never)
    (tmp_path / "model" / "config.json").write_text("{}")
    first = execute(tmp_path / "run", parents={"base": tmp_path / "model"})
    (tmp_path / "model" / "config.json").write_text("{ }")
    with pytest.raises(runs.UserError, match="holds another finished run"):
        execute(tmp_path / "run", parents={"base": tmp_path / "model"}, function=never)
    assert len(first["parents"]["base"]["address"]) == 64


def test_the_plans_address_is_checked(tmp_path):
    right = runs.address("stage", 1, dataclasses.asdict(Settings()), {})
    with pytest.raises(runs.UserError, match="plan again"):
        execute(tmp_path / "run", function=never, expected="0" * 64)
    assert execute(tmp_path / "run", expected=right)["address"] == right


def test_a_second_one_waits_and_finds_the_result(tmp_path):
    entered, release, calls = threading.Event(), threading.Event(), []

    def slow(settings, parents, output, execution):
        calls.append(1)
        entered.set()
        assert release.wait(20)
        return {"by": "the first"}

    def run(found):
        found.append(execute(tmp_path / "run", function=slow))

    results = [], []
    first = threading.Thread(target=run, args=(results[0],))
    second = threading.Thread(target=run, args=(results[1],))
    first.start()
    assert entered.wait(20)
    second.start()
    time.sleep(0.3)
    assert second.is_alive() and not results[1]
    release.set()
    first.join(20)
    second.join(20)
    assert len(calls) == 1 and results[0] == results[1] and results[1][0]["summary"] == {"by": "the first"}


SLOW = """
import sys, time
from pathlib import Path
from salsa.workflow import config, runs

def slow(settings, parents, output, execution):
    print("computing", flush=True)
    time.sleep(float(sys.argv[2]))

runs.execute("stage", 1, slow, config.CorpusSettings(config.Corpus(kind="stories")), {}, Path(sys.argv[1]),
             config.Execution())
print("finished", flush=True)
"""


def test_a_second_process_waits_even_for_one_that_is_killed(tmp_path):
    def start(seconds):
        command = [sys.executable, "-c", SLOW, str(tmp_path / "run"), str(seconds)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    first = start(60)
    assert first.stdout.readline() == "computing\n"
    second = start(0)
    time.sleep(0.5)
    assert second.poll() is None and runs.manifest_of(tmp_path / "run") is None
    first.kill()
    first.communicate()
    assert second.communicate(timeout=20)[0] == "computing\nfinished\n"
    assert start(0).communicate(timeout=20)[0].endswith("already finished\nfinished\n")


def test_seeds_depend_on_root_stage_replicate_and_index():
    seeds = [runs.derive_seed(*key) for key in [(0, "sft", 0), (1, "sft", 0), (0, "ppo", 0), (0, "sft", 1)]]
    seeds += [runs.derive_seed(0, "sft", 0, 1)]
    assert len(set(seeds)) == 5 and all(0 <= seed < 2**31 for seed in seeds)
    assert runs.derive_seed(0, "sft", 0) == runs.derive_seed(0, "sft", 0, 0) == 934455317


def test_a_malformed_line_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": \n{"a": 3}\n')
    with pytest.raises(runs.UserError, match=r"rows.jsonl:2: not JSON"):
        runs.read_jsonl(path)
    runs.write_jsonl(path, [{"a": "ü"}])
    assert path.read_bytes() == '{"a": "ü"}\n'.encode() and runs.read_jsonl(path) == [{"a": "ü"}]


def test_writing_is_all_or_nothing(tmp_path, monkeypatch):
    runs.write_atomically(tmp_path / "a.txt", "old")

    def fail(*arguments):
        raise OSError("power cut")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError):
        runs.write_atomically(tmp_path / "a.txt", "new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def command(*arguments):
    STAGE.command(write, 1, argv=[str(argument) for argument in arguments])


@pytest.fixture
def planned(tmp_path, monkeypatch):
    """A function that adds a run of the stage `stage` to a plan file, and returns the run's path."""
    monkeypatch.setattr(stages, "ALL", {"stage": STAGE})
    monkeypatch.setattr(stages.Stage, "version", 1)
    result = plan.Plan(str(tmp_path))

    def add(label, settings, execution):
        path = plan.add_run(result, "stage", label, dataclasses.asdict(settings), {}, execution)
        result.save().replace(tmp_path / "plan.json")
        return path

    return add


def test_a_stage_is_a_command(tmp_path, planned):
    runs.write_json(tmp_path / "settings.json", {"seed": 5})
    command("--settings", tmp_path / "settings.json", "--output", tmp_path / "run")
    assert runs.read_json(tmp_path / "run" / "result.json") == {"seed": 5}
    path = planned("b", Settings(seed=6), {"threads": 2})
    command("--plan", tmp_path / "plan.json", "--run", path)
    manifest = runs.verify(tmp_path / path)
    assert manifest["settings"]["seed"] == 6 and manifest["execution"]["threads"] == 2


def test_no_garbage_is_looked_for_while_a_stage_is_imported(tmp_path, monkeypatch):
    runs.write_json(tmp_path / "plan.json", {"results": str(tmp_path), "runs": {}, "studies": []})
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "salsa.sft", "--plan", "plan.json"])
    try:
        importlib.reload(salsa)
        assert not gc.isenabled()
        with pytest.raises(SystemExit, match="no run"):
            command("--plan", tmp_path / "plan.json", "--run", "stage/b")
        assert gc.isenabled()
    finally:
        gc.enable()
        gc.unfreeze()


@pytest.mark.parametrize(
    ("settings", "message"), [({"sed": 5}, "sed: no such setting"), ({}, None), ("not json", "settings.json|Expecting")]
)
def test_mistakes_on_the_command_line_are_one_line(tmp_path, settings, message):
    text = settings if isinstance(settings, str) else json.dumps(settings)
    (tmp_path / "settings.json").write_text(text)
    arguments = ["--settings", tmp_path / "settings.json", "--output", tmp_path / "run"]
    if message is None:
        arguments += ["--parent", f"base={tmp_path / 'none'}"]
        message = "no such folder"
    with pytest.raises(SystemExit, match=message) as caught:
        command(*arguments)
    assert "\n" not in str(caught.value) and caught.value.code
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_a_log_that_is_not_utf8_stops_nothing(tmp_path):
    code = r"from salsa.workflow import runs; runs.print_anything(); print('KL(sft0 \u2016 soup)')"
    ascii_alone = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    environment = os.environ | ascii_alone
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
    assert done.stdout == b"KL(sft0 \\u2016 soup)\n"


def test_an_error_has_a_line_of_its_own(tmp_path, capsys):
    """Where a progress bar is open, too."""
    from tqdm import tqdm

    def stage(settings, parents, output, execution):
        bar.update()
        raise runs.UserError("too few rows")

    bar = tqdm(total=3, mininterval=0)
    runs.write_json(tmp_path / "settings.json", {})
    with pytest.raises(SystemExit) as ended:
        arguments = ["--settings", str(tmp_path / "settings.json"), "--output", str(tmp_path / "run")]
        STAGE.command(stage, 1, argv=arguments)
    assert str(ended.value.code).endswith(": too few rows") and capsys.readouterr().err.endswith("\n")
