"""Kills and requests to stop: a training run that goes on ends as it would have without them, to the last bit."""

import copy
import dataclasses
import errno
import io
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from salsa import algorithms
from salsa.rl import checkpoints, models, networks, processes, rollout, trainer
from salsa.workflow import config, interrupts, runs, schema, stages

# Most runs are forks of a process that has imported everything: start-up takes longer than they do.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["salsa.rl.trainer", "transformers.models.llama.modeling_llama", "pytest"])

HALVES = ["1/2", "1/2"]
REFERENCES = {
    "ema": config.Reference("ema", HALVES, rate=0.2),
    "reset": config.Reference("reset", ["1"], every=4),
    "noise": config.Reference("noise", HALVES),
    "multi_kl": config.Reference("multi_kl", HALVES),
}


def make_settings(kind="ema", mixed_precision="no", seed=3, algorithm="ppo", **section):
    """Settings in which all changes that may: the learning rate, kl_coef, the reference."""
    chosen = {
        "iterations": 6,
        "batch_size": 8,
        "epochs": 2,
        "mini_batches": 2,
        "learning_rate": 1e-3,
        "schedule": "linear",
        "kl_schedule": schema.KlSchedule("adaptive", target=0.3, horizon=40.0),
        "rollouts_every": 2,
    }
    lengths, section = config.Lengths(64, 8), config.ALGORITHMS[algorithm](**chosen | section)
    return config.TRAINING[algorithm](seed, 0.1, ["1"], REFERENCES[kind], section, lengths, mixed_precision)


SHORT = make_settings()
LONG = make_settings(iterations=45)
SHARED = make_settings("reset", iterations=30, value_model="shared")


class Run:
    """A training run's folder and command; processes start it, end before it does, and start it again."""

    def __init__(self, folder, settings, parents, checkpoint_every=2):
        self.settings, self.output, self.log = settings, folder / "run", folder / "log.txt"
        self.algorithm = algorithms.section_of(settings).section
        execution = config.Execution(device="cpu", checkpoint_every=checkpoint_every)
        for name, value in (("settings", settings), ("execution", execution)):
            runs.write_json(folder / f"{name}.json", dataclasses.asdict(value))
        self.arguments = [f"--{name}={folder / name}.json" for name in ("settings", "execution")]
        self.arguments += [f"--parent={role}={path}" for role, path in parents.items()] + [f"--output={self.output}"]

    def start(self, interruption=None, log=None):
        arguments = self.algorithm, self.arguments, log or self.log, interruption
        process = FORKS.Process(target=stage, args=arguments, daemon=True)
        process.start()
        return process

    def finish(self, interruption=None):
        """Run until it ends. Returns the exit status."""
        return ended(self.start(interruption))

    @property
    def checkpoints(self):
        """Names of checkpoints, and of one that is being written."""
        return {path.name for path in (self.output / runs.CHECKPOINTS).glob("*") if path.is_dir()}

    @property
    def metrics(self):
        return runs.read_jsonl(self.output / "metrics.jsonl")

    @property
    def summary(self):
        return runs.manifest_of(self.output)["summary"]

    def result(self):
        """The artefacts' bytes by name, and what metrics say beside time and memory."""
        found = {name: (self.output / name).read_bytes() for name in runs.verify(self.output)["artefacts"]}
        found["metrics.jsonl"] = [computed(row) for row in self.metrics]
        return found


def stage(algorithm, arguments, log, interruption):
    """The command of an algorithm's stage, in this process, which `interruption` (a name) ends."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    if interruption:
        INTERRUPTIONS[interruption]()
    stages.ALL[algorithm].command(trainer.train, stages.ALL[algorithm].version, argv=arguments)


def ended(process):
    """The exit status of a forked process, minus the signal where one killed it."""
    process.join(120)
    return process.exitcode


def computed(metrics):
    return {name: value for name, value in metrics.items() if not name.startswith(("seconds", "peak"))}


def until(condition):
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def assert_same(run, other):
    found, expected = run.result(), other.result()
    assert list(found) == list(expected)
    for name in expected:
        assert found[name] == expected[name], name
    assert not (run.output / runs.CHECKPOINTS).exists()


@pytest.fixture(scope="module")
def uninterrupted(parents, tmp_path_factory):
    """The finished run of some settings, which nothing interrupted and no checkpoint delayed."""
    made = []

    def run(settings):
        for one in made:
            if one.settings == settings:
                return one
        one = Run(tmp_path_factory.mktemp("uninterrupted"), settings, parents, checkpoint_every=0)
        assert one.finish() == 0 and one.summary["resumed_at"] == []
        made.append(one)
        return one

    return run


# What ends a process at a given moment.


def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def ask_to_stop(*_):
    os.kill(os.getpid(), signal.SIGTERM)


def fill_the_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def write_half(value, path, *_):
    Path(path).write_bytes(b"half of i")
    kill()


def remove_half(folder, *_):
    next(Path(folder).rglob("custom_checkpoint_0.pkl")).unlink()
    kill()


def write_half_of_the_model(networks, output, *_):
    (output / "model").mkdir()
    (output / "model" / "model.safetensors").write_bytes(b"half of i")
    kill()


def wait_for_a_file(trainer, *_):
    until((trainer.output.parent / "go on").exists)


def say_that_it_starts(*arguments):
    """Of `runs.execute`: requests to stop are heard from here on."""
    (Path(arguments[5]).parent / "starts").touch()


def at(owner, name, number, act, when=lambda *_: True):
    """What lets `act` go before call number `number` (from 1) of `owner.name`, of those whose arguments pass `when`."""

    def prepare():
        original, calls = getattr(owner, name), []

        def replaced(*arguments, **options):
            if when(*arguments):
                calls.append(arguments)
                if len(calls) == number:
                    act(*arguments)
            return original(*arguments, **options)

        setattr(owner, name, replaced)

    return prepare


def replacing(number, name):
    """A kill before a file or folder of this name is moved, or replaced, for the `number`-th time."""
    return at(os, "replace", number, kill, lambda source, target: name in (Path(source).name, Path(target).name))


def removing(name, act):
    return at(shutil, "rmtree", 1, act, lambda folder: Path(folder).name == name)


# name -> how, the exit status, the checkpoints that are left, and where the run goes on: None where it is finished
KILLS = {
    "in a file of a checkpoint": (at(torch, "save", 5, write_half), -9, {"000002", ".partial"}, [2]),
    "after a checkpoint's files": (replacing(2, ".partial"), -9, {"000002", ".partial"}, [2]),
    "before the old checkpoint is removed": (removing("000002", kill), -9, {"000002", "000004"}, [4]),
    "while the old checkpoint is removed": (removing("000002", remove_half), -9, {"000002", "000004"}, [4]),
    "between metrics and rollouts": (replacing(2, "rollouts.jsonl"), -9, {"000002"}, [2]),
    "in a file of the model": (at(networks.ActorCritic, "save", 1, write_half_of_the_model), -9, {"000006"}, [6]),
    "before the manifest": (replacing(1, "manifest.json"), -9, {"000006"}, [6]),
    "while the last checkpoint is removed": (removing(runs.CHECKPOINTS, remove_half), -9, {"000006"}, None),
    "by a full disk": (at(torch, "save", 5, fill_the_disk), 1, {"000002", ".partial"}, [2]),
}
# name -> how, the checkpoint that is left, and the frequency of others
REQUESTS = {
    "while it loads": (at(trainer, "load", 1, ask_to_stop), set(), 0),
    "while it samples": (at(rollout, "sample_batch", 3, ask_to_stop), {"000002"}, 0),
    "while it steps": (at(trainer.Trainer, "_step", 10, ask_to_stop), {"000003"}, 0),
    "while it saves": (at(Accelerator, "save_state", 2, ask_to_stop), {"000004"}, 2),
    "in its last steps": (at(trainer.Trainer, "_step", 24, ask_to_stop), {"000006"}, 0),
}
INTERRUPTIONS = {name: how for name, (how, *_) in (KILLS | REQUESTS).items()} | {
    "while it samples at first": at(rollout, "sample_batch", 1, ask_to_stop),
    "while it writes its result": at(networks.ActorCritic, "save", 1, ask_to_stop),
    "by nothing, once it starts": at(runs, "execute", 1, say_that_it_starts),
    "for a while": at(trainer.Trainer, "_step", 10, wait_for_a_file),
}


def start_command(run, before=None):
    """The real command, in a process and a group of its own."""
    with open(run.log, "w") as log:
        command = [sys.executable, "-m", "salsa.algorithms.ppo", *run.arguments]
        return subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=before
        )


def interrupt(run, end, iterations, seconds):
    """Call `end` when the process that was started last has gone on for some iterations, at least one, and seconds."""
    metrics = run.output / "metrics.jsonl"
    before = metrics.stat().st_mtime_ns if metrics.exists() else None
    until(lambda: metrics.exists() and metrics.stat().st_mtime_ns != before)
    wanted = len(run.metrics) + iterations - 1
    until(lambda: len(run.metrics) >= wanted)
    time.sleep(seconds)
    end()


def seconds_per_iteration(run):
    return sum(row["seconds"] for row in run.metrics) / len(run.metrics)


def test_a_run_that_is_killed_at_random_moments(uninterrupted, parents, tmp_path):
    expected = uninterrupted(LONG)
    coefficients = [row["kl_coef"] for row in expected.metrics]
    assert max(coefficients) > 1.2 * min(coefficients)  # it would tell a kl_coef that started again
    run, generator = Run(tmp_path, LONG, parents, checkpoint_every=1), random.Random(0)
    for _ in range(5):
        process = start_command(run)
        moment = generator.uniform(0, 1.5) * seconds_per_iteration(expected)
        interrupt(run, process.kill, generator.randint(1, 4), moment)
        assert process.wait(60) == -signal.SIGKILL
        assert len(run.checkpoints - {".partial"}) <= 2
    process = start_command(run)
    interrupt(run, process.terminate, iterations=1, seconds=0)
    assert process.wait(60) == 143
    assert run.checkpoints == {f"{len(run.metrics):06d}"}
    assert run.finish() == 0
    assert_same(run, expected)
    resumed = run.summary["resumed_at"]
    assert len(resumed) >= 3 and resumed == sorted(resumed)


def heed_interrupts():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # which whoever runs the tests may ignore


def test_ctrl_c_saves_a_checkpoint(uninterrupted, parents, tmp_path):
    """SIGINT to the whole group, as a terminal sends it: 130, one line, and the end of an uninterrupted run."""
    run = Run(tmp_path, SHORT, parents, checkpoint_every=0)
    process = start_command(run, heed_interrupts)
    interrupt(run, lambda: os.killpg(process.pid, signal.SIGINT), iterations=1, seconds=0)
    assert process.wait(60) == 130
    (checkpoint,) = run.checkpoints
    assert int(checkpoint) == len(run.metrics) < SHORT.ppo.iterations
    log = run.log.read_text()
    assert "Traceback" not in log and f"stopped before iteration {int(checkpoint)}; run again to go on" in log
    assert run.finish() == 0
    assert_same(run, uninterrupted(SHORT))
    assert run.summary["resumed_at"] == [int(checkpoint)]


def test_an_ignored_interrupt_stays_ignored(parents, tmp_path):
    run = Run(tmp_path, SHORT, parents, checkpoint_every=0)
    process = start_command(run, interrupts.ignore_interrupts)
    interrupt(run, lambda: os.killpg(process.pid, signal.SIGINT), iterations=1, seconds=0)
    assert process.wait(120) == 0 and run.summary["resumed_at"] == []


def test_a_head_on_the_policy_and_a_reference_that_is_reset(uninterrupted, parents, tmp_path):
    expected = uninterrupted(SHARED)
    run, generator = Run(tmp_path, SHARED, parents, checkpoint_every=3), random.Random(1)
    for _ in range(3):
        process = run.start()
        moment = generator.uniform(0, 1.5) * seconds_per_iteration(expected)
        interrupt(run, process.kill, generator.randint(1, 6), moment)
        assert ended(process) == -signal.SIGKILL
    assert run.finish() == 0
    assert_same(run, expected)
    assert run.summary["resumed_at"] and not any(iteration % 3 for iteration in run.summary["resumed_at"])


@pytest.mark.parametrize("moment", KILLS)
def test_a_run_that_is_killed(uninterrupted, parents, tmp_path, moment):
    _, status, left, resumed_at = KILLS[moment]
    run = Run(tmp_path, SHORT, parents)
    assert run.finish(moment) == status
    assert run.checkpoints == left and (runs.manifest_of(run.output) is None) == bool(resumed_at)
    assert run.finish() == 0
    assert_same(run, uninterrupted(SHORT))
    assert run.summary["resumed_at"] == (resumed_at or [])
    assert ("already finished" in run.log.read_text()) == (resumed_at is None)


@pytest.mark.parametrize(("algorithm", "kind"), [("rloo", "multi_kl"), ("grpo", "ema")])
@pytest.mark.parametrize("moment", ["after a checkpoint's files", "while it steps"])
def test_a_run_of_another_algorithm(uninterrupted, parents, tmp_path, algorithm, kind, moment):
    settings = make_settings(kind, algorithm=algorithm, samples=4)
    run = Run(tmp_path, settings, parents)
    assert run.finish(moment) == (KILLS[moment][1] if moment in KILLS else 143)
    assert run.finish() == 0
    assert_same(run, uninterrupted(settings))
    assert len(run.summary["resumed_at"]) == 1


# Requests to stop


@pytest.mark.parametrize("moment", REQUESTS)
def test_a_run_that_is_asked_to_stop(uninterrupted, parents, tmp_path, moment):
    _, left, every = REQUESTS[moment]
    run = Run(tmp_path, SHORT, parents, every)
    assert run.finish(moment) == 143
    assert run.checkpoints == left and runs.manifest_of(run.output) is None
    assert "Traceback" not in run.log.read_text()
    assert run.finish() == 0
    assert_same(run, uninterrupted(SHORT))
    assert run.summary["resumed_at"] == [int(name) for name in left]


def test_asked_to_stop_again_before_it_has_gone_on(uninterrupted, parents, tmp_path):
    run = Run(tmp_path, SHORT, parents, checkpoint_every=0)
    for _ in range(2):
        assert run.finish("while it samples at first") == 143
        assert run.checkpoints == {"000000"} and "Traceback" not in run.log.read_text()
    assert run.finish() == 0
    assert_same(run, uninterrupted(SHORT))


def test_asked_to_stop_while_it_writes_its_result_it_finishes(uninterrupted, parents, tmp_path):
    run = Run(tmp_path, SHORT, parents, checkpoint_every=0)
    assert run.finish("while it writes its result") == 0
    assert_same(run, uninterrupted(SHORT))


def test_a_request_to_stop_is_noted_and_ends_with_its_block():
    before = signal.getsignal(signal.SIGTERM)
    request = checkpoints.StopRequest()
    with pytest.raises(KeyError), request:
        assert not request.asked
        ask_to_stop()
        assert request.asked
        raise KeyError
    assert signal.getsignal(signal.SIGTERM) is before and request.exit_code == 143


def test_of_two_interrupts_the_second_ends_at_once():
    script = "import os, signal; from salsa.rl import checkpoints; request = checkpoints.StopRequest().__enter__()\n"
    script += "os.kill(os.getpid(), signal.SIGINT); print(request.asked, request.exit_code, flush=True)\n"
    script += "os.kill(os.getpid(), signal.SIGINT); print('no')"
    command = [sys.executable, "-c", script]
    ended = subprocess.run(command, capture_output=True, text=True, preexec_fn=heed_interrupts)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "True 130\n", "")


# Who may go on


def test_a_second_process_waits_and_finds_the_result(parents, tmp_path):
    run = Run(tmp_path, SHORT, parents)
    first = run.start("for a while")
    until(lambda: run.checkpoints == {"000002"})
    second = run.start(log=tmp_path / "second.txt")
    until((tmp_path / "second.txt").exists)
    third = run.start("by nothing, once it starts", log=tmp_path / "third.txt")
    until((tmp_path / "starts").exists)
    second.join(2)
    assert first.is_alive() and second.is_alive() and third.is_alive()
    third.terminate()
    assert ended(third) == 143 and not (tmp_path / "third.txt").read_text()
    (tmp_path / "go on").touch()
    assert ended(first) == 0
    artefacts = [path.stat() for path in sorted(run.output.rglob("*")) if path.name != ".lock"]
    assert ended(second) == 0 and (tmp_path / "second.txt").read_text() == f"{run.output}: already finished\n"
    after = [path.stat() for path in sorted(run.output.rglob("*")) if path.name != ".lock"]
    assert [(s.st_ino, s.st_mtime_ns) for s in artefacts] == [(s.st_ino, s.st_mtime_ns) for s in after]


@pytest.fixture(scope="module")
def stopped(parents, tmp_path_factory):
    """A run that was asked to stop, with a plain folder of its own as sft1."""
    folder = tmp_path_factory.mktemp("stopped")
    shutil.copytree(parents["sft1"] / "model", folder / "sft1")
    run = Run(folder, SHORT, parents | {"sft1": folder / "sft1"}, checkpoint_every=0)
    assert run.finish("while it samples") == 143
    return run


def other_settings(run):
    path = run.output.parent / "settings.json"
    runs.write_json(path, dataclasses.asdict(make_settings(seed=4)))


def other_sft1(run):
    path = run.output.parent / "sft1" / "generation_config.json"
    path.write_text(path.read_text() + "\n")


def other_reference(run):
    path = run.output / runs.CHECKPOINTS / checkpoints.ANCHOR
    anchor = runs.read_json(path)
    assert [len(digest) for digest in anchor["sha256"]] == [64]
    runs.write_json(path, anchor | {"sha256": ["0" * 64]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_settings, "holds checkpoints of another run"),
        (other_sft1, "holds checkpoints of another run"),
        (other_reference, "the one that this run was anchored to"),
    ],
)
def test_checkpoints_of_something_else_are_refused(stopped, tmp_path, change, message):
    shutil.copytree(stopped.output.parent, tmp_path, dirs_exist_ok=True)
    run = copy.copy(stopped)
    run.output, run.log = tmp_path / "run", tmp_path / "log.txt"
    run.arguments = [text.replace(str(stopped.output.parent), str(tmp_path)) for text in stopped.arguments]
    change(run)
    assert run.finish() == 1
    *_, last = log = run.log.read_text().splitlines()
    assert last.startswith("python -m salsa.algorithms.ppo: ") and message in last and "; remove " in last
    assert not [line for line in log[:-1] if line and not line.startswith("Loading weights")]
    assert run.checkpoints == {"000002"}


def test_the_manifest_says_what_the_policy_was_anchored_to(uninterrupted, sft_runs):
    run = uninterrupted(SHORT)
    soup = models.mix_policies([folder / "model" for folder in sft_runs], HALVES)
    assert run.summary["reference"]["sha256"] == [models.content_sha256(soup)]
    final = models.load_policy(run.output / "reference")
    assert run.summary["final_reference"] == [models.content_sha256(final)] != [models.content_sha256(soup)]


# What is saved


class Frozen:
    """A reference with a weight."""

    def __init__(self, weight, moves=True):
        self.models, self.moves = [torch.nn.Linear(1, 1, bias=False)], moves
        torch.nn.init.constant_(self.models[0].weight, weight)


@pytest.mark.parametrize("moves", [True, False])
def test_progress_is_what_it_was(moves):
    progress = checkpoints.Progress(0.1, Frozen(5.0, moves))
    progress.iteration, progress.steps, progress.kl_coef, progress.resumed_at = 3, 12, 0.3, [1, 2]
    file = io.BytesIO()
    torch.save(progress.state_dict(), file)
    file.seek(0)
    found = checkpoints.Progress(0.1, Frozen(1.0, moves))
    found.load_state_dict(torch.load(file))
    assert (found.iteration, found.steps, found.kl_coef, found.resumed_at) == (3, 12, 0.3, [1, 2])
    assert found.reference.models[0].weight.item() == (5.0 if moves else 1.0)


@pytest.fixture
def make(parents, tokenizer, execution, tmp_path):
    """A Trainer of the given settings, made as `train` makes it."""

    def build(settings):
        AcceleratorState._reset_state(True)  # the precision is fixed once a process
        accelerator = processes.make_accelerator(settings, torch.device("cpu"), execution)
        anchor = checkpoints.anchored_to(tmp_path)
        participants = trainer.load(settings, parents, tokenizer, accelerator.device, execution, anchor)
        return trainer.Trainer(settings, participants, tokenizer, accelerator, execution, tmp_path)

    yield build
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize(
    ("kind", "precision", "ppo"),
    [
        ("ema", "no", {}),
        ("reset", "no", {"value_model": "shared"}),
        ("noise", "no", {"value_model": "sft"}),
        ("multi_kl", "no", {"lora_rank": 2}),
        ("ema", "bf16", {}),
    ],
)
def test_the_iteration_after_a_checkpoint(make, prompts, tmp_path, kind, precision, ppo):
    if "lora_rank" in ppo:
        pytest.importorskip("peft")
    settings = make_settings(kind, precision, **ppo)

    def iterate(made, iteration):
        found, _, _ = made.iterate(iteration, prompts[0][:8], prompts[1][:8])
        made._move_on(iteration, found)
        return computed(found)

    def everything(made):
        optimizer = made.optimizer.state_dict()["state"]
        modules = [made.networks, *made.reference.models]
        tensors = [*(t for m in modules for t in m.state_dict().values())]
        return tensors + [value for index in sorted(optimizer) for _, value in sorted(optimizer[index].items())]

    made = make(settings)
    for iteration in range(4):
        iterate(made, iteration)
    checkpoints.save(made.accelerator, made.progress, tmp_path)
    saved = copy.deepcopy(everything(made))
    expected = iterate(made, 4)
    again = make(settings)
    assert again.reference.summary == made.reference.summary
    assert checkpoints.load(again.accelerator, again.progress, tmp_path)
    assert again.progress.resumed_at == [4] and again.progress.kl_coef != settings.kl_coef
    assert all(map(torch.equal, everything(again), saved))
    assert iterate(again, 4) == expected
    assert again.progress.kl_coef == made.progress.kl_coef and again.progress.steps == made.progress.steps == 20
    assert len(saved) == len(everything(again)) and all(map(torch.equal, everything(again), everything(made)))
    assert not all(map(torch.equal, everything(again), saved))


def test_there_is_nothing_to_load_in_a_new_run(make, tmp_path):
    made = make(SHORT)
    (tmp_path / runs.CHECKPOINTS / ".partial").mkdir(parents=True)
    assert not checkpoints.load(made.accelerator, made.progress, tmp_path)
    assert made.progress.resumed_at == [] and checkpoints.anchored_to(tmp_path) is None


def test_a_checkpoint_of_another_number_of_processes_is_refused(make, prompts, tmp_path):
    made = make(make_settings("ema", "no"))
    made.iterate(0, prompts[0][:8], prompts[1][:8])
    checkpoints.save(made.accelerator, made.progress, tmp_path)
    layout = tmp_path / runs.CHECKPOINTS / checkpoints.LAYOUT
    runs.write_json(layout, {**runs.read_json(layout), "processes": 2})
    with pytest.raises(runs.UserError, match=r"saved by 2 process\(es\) of NO, and this is 1"):
        checkpoints.load(made.accelerator, made.progress, tmp_path)


class Malice:
    """What makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def saved(make, prompts, tmp_path):
    """(Trainer, folder) of a checkpoint after an iteration."""
    made = make(make_settings("ema", "no"))
    made.iterate(0, prompts[0][:8], prompts[1][:8])
    checkpoints.save(made.accelerator, made.progress, tmp_path)
    return made, next((tmp_path / runs.CHECKPOINTS).glob("0*"))


def test_no_file_of_a_checkpoint_runs_code(saved, tmp_path):
    """Neither where it is altered, nor where its digest was altered too."""
    made, folder = saved
    pickles = [path for path in sorted(folder.iterdir()) if path.suffix in (".pkl", ".bin")]
    assert [path.name for path in pickles] == ["custom_checkpoint_0.pkl", "optimizer.bin", "random_states_0.pkl"]
    for path in pickles:
        before = path.read_bytes()
        torch.save(Malice(tmp_path / "made"), path)
        with pytest.raises(runs.UserError, match=rf"{path.name} (has \d+ bytes instead of|was altered)"):
            checkpoints.load(made.accelerator, made.progress, tmp_path)
        checkpoints.describe_files(folder)
        with pytest.raises(
            runs.UserError, match=r"can't be read as a checkpoint \(Unsupported .*; remove .*/checkpoints"
        ):
            checkpoints.load(made.accelerator, made.progress, tmp_path)
        assert not (tmp_path / "made").exists()
        path.write_bytes(before)
        checkpoints.describe_files(folder)
    assert checkpoints.load(made.accelerator, made.progress, tmp_path)


def test_a_damaged_checkpoint_is_named(saved, tmp_path):
    made, folder = saved
    path = folder / "optimizer.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    with pytest.raises(
        runs.UserError, match=r"000000: optimizer\.bin was altered since it was written; remove .*checkpoints"
    ):
        checkpoints.load(made.accelerator, made.progress, tmp_path)
    path.unlink()
    with pytest.raises(runs.UserError, match=r"optimizer\.bin is missing"):
        checkpoints.load(made.accelerator, made.progress, tmp_path)
    path.write_bytes(whole)
    beside = [folder / checkpoints.FILES, folder.parent / checkpoints.LAYOUT, folder.parent / checkpoints.ANCHOR]
    for path in beside:
        whole = path.read_bytes()
        for content in (None, b"", whole[:-3], b"[1]", b'{"a": 1}', b'{"optimizer.bin": 1}'):
            path.unlink()
            if content is not None:
                path.write_bytes(content)
            with pytest.raises(runs.UserError, match=r"; remove .*checkpoints and run again"):
                checkpoints.anchored_to(tmp_path)
                checkpoints.load(made.accelerator, made.progress, tmp_path)
            path.write_bytes(whole)
    assert checkpoints.load(made.accelerator, made.progress, tmp_path)


def test_an_index_of_sharded_weights_runs_no_code(tmp_path):
    from torch.distributed import checkpoint

    checkpoint.save({"weight": torch.ones(3), "step": 4}, checkpoint_id=tmp_path, no_dist=True)
    with checkpoints.reading(tmp_path):
        pass
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Malice(tmp_path / "made")))
    with pytest.raises(runs.UserError, match="Unsupported global"), checkpoints.reading(tmp_path):
        pass
    assert not (tmp_path / "made").exists()
