"""The workflow itself, with real Snakemake and stages that only write a manifest: what re-runs, and what does not.

A `sitecustomize` on PYTHONPATH takes the place of `python -m salsa.<stage> --plan … --run …`.
"""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import termios
import time
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from salsa.workflow import interrupts

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 600  # seconds for what takes a few on an idle machine
SMALL = "replicates=[0] benchmark=[in_distribution]"
TINY = f"{SMALL} arm=[ppo,salsa]"
OTHER = f"{TINY} ppo.learning_rate=1e-5"

FAKE = """
import os, signal, sys, threading, time
from pathlib import Path

class Timer(threading.Timer):  # in which Snakemake waits to look at all its jobs again
    def start(self):
        if self.function.__module__.startswith("snakemake."):
            with open("timers.txt", "a") as file:
                file.write(self.function.__qualname__ + "\\n")
        super().start()

threading.Timer = Timer

def main(module, plan_file, path):
    from salsa.workflow import config, runs, schema, stages

    record = next(stage for stage in stages.ALL.values() if stage.module == module)
    stage = record.name
    run = runs.read_json(plan_file)["runs"][path]
    results = Path(runs.read_json(plan_file)["results"])

    rank, processes = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    with open("processes.txt", "a") as file:
        file.write(f"{stage} {rank} of {processes}\\n")

    def note(*_):
        with open("signalled.txt", "a") as file:
            file.write(stage + "\\n")
        os._exit(143)

    signal.signal(signal.SIGTERM, signal.SIG_IGN if Path(f"deaf_{stage}").exists() else note)

    def function(settings, parents, output, execution):
        print("computing", path, flush=True)
        if rank == 0:  # the others are the same run
            with open("calls.txt", "a") as file:
                file.write(path + "\\n")
            lent = [str(os.environ.get(name)) for name in ("SLURM_JOB_ID", "CUDA_VISIBLE_DEVICES")]
            with open("lent.txt", "a") as file:
                file.write(" ".join([stage, *lent]) + "\\n")
        while Path(f"hold_{stage}").exists():
            time.sleep(0.05)
        if Path(f"fail_{stage}").exists():
            raise runs.UserError(f"{stage} was told to fail")
        names = ["result.txt"]
        if stage == "study":
            names = ["report.md", "claims.md", "runs.csv", "tables/win_rates.md", "tables/win_rates.csv"]
            names += ["figures/frontier.png", "figures/loss_line.png"]
            if looks := settings.config.get("looks"):
                count, last = len(settings.config["replicates"]), int(Path("decided_at").read_text())
                decision = {"look": looks.index(count) + 1, "replicates": count, "goes_on": count < last}
                decision |= {"decided": [], "undecided": ["higher_gold"] if count < last else []}
                runs.write_json(output / "decision.json", decision)
        if stage == "comparison":
            names = ["comparison.md", "tables/comparison.csv", "figures/comparison.png"]
        for name in names:
            runs.write_atomically(output / name, path)

    runs.execute(stage, record.version, function, schema.from_dict(record.settings, run["settings"]),
                 {role: results / parent for role, parent in run["parents"].items()}, results / path,
                 schema.from_dict(config.Execution, run["execution"]), expected=run["address"])

arguments = [argument for argument in sys.orig_argv[1:] if argument != "-u"]  # which torch.distributed.run adds
if arguments[:1] == ["-m"] and arguments[1].startswith("salsa.") and arguments[2] == "--plan":
    code = 0
    try:
        main(arguments[1], arguments[arguments.index("--plan") + 1], arguments[arguments.index("--run") + 1])
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
"""


class Place:
    """A working directory with results, in which Snakemake runs the repository's workflow."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "fake").mkdir(exist_ok=True)
        (folder / "fake" / "sitecustomize.py").write_text(FAKE)

    def start(self, overrides="", *options, snakefile=ROOT / "Snakefile"):
        environment = os.environ | {"PYTHONPATH": str(self.folder / "fake")}
        config = ["--config", f"overrides={overrides}"] if overrides else []
        command = [sys.executable, "-m", "snakemake", "--snakefile", str(snakefile), "--directory", str(self.folder)]
        command += ["--cores", "4", *options, *config]
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=self.folder
        )

    def run(self, overrides="", *options, code=0, **where):
        """Run Snakemake to its end; returns how many runs of each stage computed, and what was printed."""
        before = len(self.calls())
        process = self.start(overrides, *options, **where)
        printed, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == code, printed
        return Counter(call.split("/")[0] for call in self.calls()[before:]), printed

    def calls(self):
        path = self.folder / "calls.txt"
        return path.read_text().splitlines() if path.exists() else []

    def copy(self, folder):
        shutil.copytree(self.folder, folder, symlinks=True)
        return Place(folder)


@pytest.fixture(scope="module")
def default(tmp_path_factory):
    """The default study, finished."""
    place = Place(tmp_path_factory.mktemp("default"))
    place.counts, place.printed = place.run()
    return place


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small study, finished."""
    place = Place(tmp_path_factory.mktemp("small"))
    place.counts, place.printed = place.run(TINY)
    return place


def test_default_runs_every_run_once(default):
    assert len(default.calls()) == len(set(default.calls())) == 53
    assert default.counts["ppo"] == 9 and default.counts["sft"] == 9 and default.counts["base"] == 1
    name = default.folder / "results" / "studies" / "default"
    assert name.is_symlink() and not os.path.isabs(os.readlink(name))
    assert (name / "report.md").is_file()
    assert "studies/default" in default.printed and "figures/ (2)" in default.printed


def test_snakemake_looks_at_its_jobs_when_one_ends_and_not_ever_more_often(default):
    assert not (default.folder / "timers.txt").exists()


def test_gates_come_before_ppo(default):
    stages = [call.split("/")[0] for call in default.calls()]
    assert stages.index("landscape") < stages.index("gates") < stages.index("ppo")


def test_run_folder_has_log_benchmark_and_manifest_of_the_plan(default):
    plan = json.loads(next((default.folder / "results" / "plans").glob("*.json")).read_text())
    for path, run in plan["runs"].items():
        folder = default.folder / "results" / path
        assert json.loads((folder / "manifest.json").read_text())["address"] == run["address"]
        assert (folder / "log.txt").exists() and (folder / "benchmark.tsv").exists()


def test_finished_study_does_nothing_again(small):
    counts, printed = small.run(TINY)
    assert not counts and "report.md" in printed


def test_a_name_leads_to_the_study_that_was_asked_for_last(default, tmp_path):
    place = default.copy(tmp_path / "copy")
    name = place.folder / "results" / "studies" / "default"
    study = name.readlink()
    name.unlink()
    name.symlink_to("default-of-another-version")
    for option in ("--dry-run", "--unlock"):
        place.run("", option)
        assert str(name.readlink()) == "default-of-another-version"
    counts, printed = place.run()
    assert not counts and name.readlink() == study and f"results/studies/default -> {study}" in printed


def test_finished_runs_are_computed_again_when_they_are_forgotten_and_not_when_forced(small, tmp_path):
    place = small.copy(tmp_path / "copy")
    policy, _ = sorted((place.folder / "results" / "ppo").iterdir())
    for file in place.folder.glob("results/*/*/benchmark.tsv"):
        file.write_text("as it was")
    counts, printed = place.run(TINY, "--forcerun", "ppo", code=1)
    assert not counts and "finished runs are kept" in printed and "`salsa forget results/ppo/" in printed
    assert {file.read_text() for file in place.folder.glob("results/*/*/benchmark.tsv")} == {"as it was"}
    forget = [sys.executable, "-m", "salsa", "forget", f"results/ppo/{policy.name}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    refused = subprocess.run(forget, cwd=place.folder, env=environment, stderr=subprocess.PIPE)
    assert refused.returncode == 1 and b"4 finished runs rest on" in refused.stderr
    subprocess.run([*forget, "--dependents"], cwd=place.folder, env=environment, check=True)
    counts, _ = place.run(TINY)
    assert counts == {"ppo": 1, "respond": 1, "judge": 2, "studies": 1}


def test_verify_finds_an_altered_file(small, tmp_path):
    place = small.copy(tmp_path / "copy")
    verify = [sys.executable, "-m", "salsa", "verify", str(place.folder / "results")]
    sound = subprocess.run(verify, capture_output=True, text=True, cwd=ROOT)
    assert sound.returncode == 0, sound.stdout
    altered = next((place.folder / "results" / "sft").glob("*/result.txt"))
    altered.write_text("x" * altered.stat().st_size)
    found = subprocess.run(verify, capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 1 and str(altered) in found.stdout


def test_copied_touched_results_and_an_edited_rule_rerun_nothing(small, tmp_path):
    place = Place(tmp_path / "copy")
    shutil.copytree(small.folder / "results", place.folder / "results", symlinks=True)  # new mtimes, no .snakemake
    for path in sorted((place.folder / "results").rglob("*"), reverse=True):
        os.utime(path, (time.time(), time.time()), follow_symlinks=False)
        if path.name == "manifest.json" and path.parent.parent.name in ("corpus", "sft"):
            os.utime(path, (time.time() + 100, time.time() + 100))
    workflow = tmp_path / "repository"
    for name in ("workflow", "profiles", "conf", "salsa"):
        shutil.copytree(ROOT / name, workflow / name)
    for name in ("Snakefile", "environment.yml"):
        shutil.copy(ROOT / name, workflow)
    rules = workflow / "workflow" / "rules" / "runs.smk"
    rules.write_text(rules.read_text().replace('"{params.command}"', '"true; {params.command}"'))
    counts, _ = place.run(TINY, snakefile=workflow / "Snakefile")
    assert not counts


def test_a_missing_parent_is_not_made_again_for_finished_runs(small, tmp_path):
    place = small.copy(tmp_path / "copy")
    shutil.rmtree(place.folder / "results" / "landscape")
    shutil.rmtree(place.folder / "results" / "corpus")
    assert not place.run(TINY)[0]
    assert place.run(f"{SMALL} arm=[ppo,salsa,other]")[0] == {
        "landscape": 1,  # the new arm's baseline
        "ppo": 1,
        "respond": 1,
        "judge": 2,  # SALSA's too, which a claim compares with the new arm
        "studies": 1,
    }


def test_what_an_override_runs(small, tmp_path):
    place = small.copy(tmp_path / "copy")
    counts, _ = place.run(f"{TINY} ppo.learning_rate=1e-5")
    assert counts == {"ppo": 2, "respond": 2, "judge": 2, "studies": 1}
    link = place.folder / "results" / "studies" / "default"
    assert not link.exists()  # nothing but an experiment gives a study its plain name
    counts, _ = place.run(f"{SMALL} arm=[ppo,salsa,noise]")
    assert counts == {"ppo": 1, "respond": 1, "judge": 2, "studies": 1}  # SALSA's judge too, of a claim's new baseline
    counts, _ = place.run(f"{TINY} ppo.learning_rate=1e-5,2e-5 execution.micro_batch=3")
    assert counts == {"ppo": 2, "respond": 2, "judge": 2, "studies": 2}  # with the comparison
    counts, _ = place.run(f"{TINY} evaluate.gates.smallest_kl=0.1")
    assert counts == {"gates": 1, "studies": 1}  # PPO comes after the gates, and reads nothing of them
    assert len(place.calls()) == len(set(place.calls()))


def test_ppo_runs_as_several_processes(small, tmp_path):
    place = small.copy(tmp_path / "copy")
    (place.folder / "processes.txt").unlink()
    options = "ppo.learning_rate=1e-5 execution.processes=2"
    counts, printed = place.run(f"{SMALL} arm=[ppo] {options}", "--printshellcmds")
    assert counts == {"ppo": 1, "respond": 1, "judge": 1, "studies": 1}
    processes = (place.folder / "processes.txt").read_text().splitlines()
    assert sorted(line for line in processes if line.startswith("ppo")) == ["ppo 0 of 2", "ppo 1 of 2"]
    assert "respond 0 of 1" in processes
    ppo = printed.split("rule ppo:")[1].split("rule ")[0]
    assert (
        "threads: 2" in ppo
        and "salsa.workflow.surroundings 2 env TORCHELASTIC" in ppo
        and " PET_STANDALONE=1 accelerate launch --config_file " in ppo
    )


def test_a_plan_file_is_run_as_it_stands(small):
    plan = next((small.folder / "results" / "plans").glob("*.json")).relative_to(small.folder)
    process = small.start("", "--config", f"plan={plan}")
    printed, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0 and "report.md" in printed, printed


def test_sigkill_in_the_middle_repeats_no_finished_run(tmp_path):
    place = Place(tmp_path / "killed")
    (place.folder / "hold_ppo").touch()
    process = place.start(TINY)
    deadline = time.monotonic() + PATIENCE
    while not any(call.startswith("ppo/") for call in place.calls()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (place.folder / "hold_ppo").unlink()  # the killed Snakemake's job lives on, and finishes
    place.run(TINY)
    assert len(place.calls()) == len(set(place.calls()))
    assert Counter(call.split("/")[0] for call in place.calls())["studies"] == 1


def start_on_a_terminal(place, *command):
    """Start a command as the first process of a terminal of its own; returns it and the terminal's other end."""
    keys, screen = os.openpty()
    environment = os.environ | {"PYTHONPATH": f"{place.folder / 'fake'}{os.pathsep}{ROOT}", "TERM": "dumb"}

    def take_terminal():
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # which whoever runs the tests may ignore
        fcntl.ioctl(screen, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        command,
        cwd=place.folder,
        env=environment,
        stdin=screen,
        stdout=screen,
        stderr=screen,
        start_new_session=True,
        preexec_fn=take_terminal,
    )
    os.close(screen)
    return process, keys


def printed_on(keys):
    """What was printed on a terminal whose processes have ended."""
    chunks = []
    with contextlib.suppress(OSError), open(keys, "rb", buffering=0) as file:
        while chunk := file.read(2**16):
            chunks.append(chunk)
    return b"".join(chunks).decode(errors="replace")


def wait_for_ppo(place, process, before):
    """Return when two runs of PPO compute, beside the calls that were there before."""
    deadline = time.monotonic() + PATIENCE
    while sum(call.startswith("ppo/") for call in place.calls()[before:]) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)


RUN = (sys.executable, "-m", "salsa", "run")
COMMANDS = {
    "salsa run": (*RUN, *OTHER.split(), "--", "--cores", "4"),
    "salsa run -m": (*RUN, "-m", *OTHER.split(), "--", "--cores", "4"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_ctrl_c_stops_every_job_and_the_same_command_goes_on(small, tmp_path, name):
    place = small.copy(tmp_path / "copy")
    before = len(place.calls())
    (place.folder / "hold_ppo").touch()
    process, keys = start_on_a_terminal(place, *COMMANDS[name])
    try:
        wait_for_ppo(place, process, before)
        os.write(keys, b"\x03")
        assert process.wait(PATIENCE) == 130
    finally:
        process.kill()
    printed = printed_on(keys)
    said = printed[printed.index("^C") + 2 :].split("\r\n")
    assert said[0].startswith("salsa: stopping 2 jobs, which save what they have done"), printed
    assert [line for line in said[1:] if line.startswith("salsa: ")] == [interrupts.INTERRUPTED], printed
    assert "Traceback" not in printed and len(said) <= 5, printed
    assert (place.folder / "signalled.txt").read_text() == "ppo\n" * 2  # SIGTERM, once each
    (place.folder / "hold_ppo").unlink()
    (place.folder / "signalled.txt").unlink()
    process, keys = start_on_a_terminal(place, *COMMANDS[name])
    assert process.wait(PATIENCE) == 0, printed_on(keys)
    counts = Counter(call.split("/")[0] for call in place.calls()[before:])
    assert counts == {"ppo": 4, "respond": 2, "judge": 2, "studies": 1}


def test_a_second_ctrl_c_ends_at_once(small, tmp_path):
    place = small.copy(tmp_path / "copy")
    before = len(place.calls())
    (place.folder / "hold_ppo").touch()
    (place.folder / "deaf_ppo").touch()
    process, keys = start_on_a_terminal(place, *COMMANDS["salsa run"])
    try:
        wait_for_ppo(place, process, before)
        os.write(keys, b"\x03")
        time.sleep(1)
        assert process.poll() is None
        os.write(keys, b"\x03")
        assert process.wait(10) == 130
    finally:
        process.kill()
    assert interrupts.INTERRUPTED in printed_on(keys)


def test_two_at_once_compute_each_run_once(tmp_path):
    place = Place(tmp_path / "two")
    (place.folder / "hold_sft").touch()
    processes = [place.start(TINY), place.start(f"{TINY} ppo.learning_rate=1e-5")]
    logs, before = [], []
    while len(before) < 2 or not all(text.startswith("computing sft/") for text in before):  # one of each seed
        assert processes[0].poll() is None and processes[1].poll() is None
        time.sleep(0.1)
        logs = list((place.folder / "results" / "sft").glob("*/log.txt"))
        before = [log.read_text() for log in logs]
    time.sleep(3)  # both have built their DAG by now, and wait for the same runs
    (place.folder / "hold_sft").unlink()
    for process in processes:
        printed, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, printed
    assert len(place.calls()) == len(set(place.calls()))
    assert len(logs) == 2 and all(log.read_text().startswith(text) for log, text in zip(logs, before, strict=True))


def test_a_failure_is_named_and_leaves_nothing_that_looks_finished(small, tmp_path):
    place = small.copy(tmp_path / "copy")
    (place.folder / "fail_respond").touch()
    _, printed = place.run(f"{TINY} ppo.learning_rate=1e-5", code=1)
    assert "respond was told to fail" in printed and "not finished: results/respond/" in printed
    (_, log) = sorted((place.folder / "results" / "respond").glob("*/log.txt"), key=os.path.getmtime)[-2:]
    (place.folder / "fail_respond").unlink()
    counts, _ = place.run(f"{TINY} ppo.learning_rate=1e-5")
    assert counts == {"respond": 2, "judge": 2, "studies": 1}
    assert "was told to fail" in log.read_text() and log.read_text().count("computing ") == 2  # both tries are kept


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ("overide=model=tiny", "overide"),
        ("overrides=5", "not text"),
        ("overrides=model=foo", "model=foo"),
        ("plan=nothing.json", "nothing.json"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, config, says):
    place = Place(tmp_path / "bad")
    process = place.start("", "-n", "--quiet", "--config", config)
    printed, _ = process.communicate(timeout=PATIENCE)
    lines = [line for line in printed.splitlines() if line and not line.startswith("Using workflow specific profile")]
    assert process.returncode == 1 and len(lines) == 1 and says in lines[0], printed
    assert not (place.folder / "results").exists()


def test_report_shows_figures_with_captions(small, tmp_path):
    small.run(TINY, "--report", str(tmp_path / "report.zip"))
    with zipfile.ZipFile(tmp_path / "report.zip") as archive:
        text = archive.read("report/report.html").decode()
    assert "frontier.png" in text and "over the strengths of the" in text  # the figure, and its caption
    assert "win_rates.csv" in text and "claims.md" in text
