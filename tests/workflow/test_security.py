"""What others wrote gets no hold: of a shell, of folders, of a terminal, of keys. And no hash seed gets one either.

Plan files, names of folders, labels, logs, manifests and servers' answers are all text that somebody else may have
written. (Text in reports, tables and cards: tests/report.)
"""

import copy
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import EXECUTION
from snakemake.cli import parse_config
from snakemake.spawn_jobs import format_cli_arg
from test_plan import make

from salsa import algorithms
from salsa.workflow import answers, config, gpus, jobs, places, plan, runs, stages, studies
from salsa.workflow.bounds import printable

ROOT = Path(__file__).resolve().parents[2]
CANARIES = {name: f"canary-{name.lower()}-Xy7" for name in ("OPENAI_API_KEY", "HF_TOKEN", "WANDB_API_KEY")}
NASTY = "-a $(touch pwned) `touch pwned`; touch pwned; 'q' \"d\" & #h *é,=[b]"  # a folder's name, and a shell's delight
ESCAPE = "\x1b]0;title\x07\x1b[2J\u202egnp.exe\r\x9b31m\u2028next"


def one_line(caught):
    text = str(caught.value)
    assert text and text == printable(text) and "\n" not in text
    return text


# A shell


def test_a_results_folder_is_no_shell_text_and_no_key_is_left_anywhere(tmp_path):
    """The real workflow's first stage, in folders whose names a shell would run, with keys in the environment."""
    work = tmp_path / NASTY
    work.mkdir()
    command = [sys.executable, "-m", "salsa", "run", f"results={hydra_quoted(NASTY)}", "replicates=[0]"]
    command += ["arm=[ppo,salsa]"]
    options = ["--", "--cores", "1", "--until", "prepare", "--printshellcmds", "--verbose", "--directory", str(work)]
    environment = os.environ | CANARIES | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *options], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list((work / NASTY / "prepare").glob("*/manifest.json"))) == 1
    assert sorted(path.name for path in work.iterdir()) == sorted([NASTY, ".snakemake"])
    assert list(tmp_path.iterdir()) == [work] and not list(tmp_path.rglob("pwned"))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "log.txt" for path in files) and any(".snakemake" in path.parts for path in files)
    for key in CANARIES.values():
        assert key not in done.stdout + done.stderr
        assert [path for path in files if key.encode() in path.read_bytes()] == []


def test_every_rule_quotes_what_it_hands_to_a_shell(tmp_path):
    """The commands of all rules, as Snakemake would run them: of a nasty folder's name each word is a whole path."""
    command = [sys.executable, "-m", "salsa", "run", f"results={hydra_quoted(NASTY)}", "replicates=[0]"]
    command += ["seed=0,1", "evaluate.plane.arms=[salsa]", "execution.processes=2", "execution.gpus=2"]
    command += [f"+arms.by_{kind}.algorithm={kind}" for kind in algorithms.kinds()]
    command += ["+mixes.arc.weights='1/2 sft0 + 1/2 sft1'", "+arms.of_mix.reference.weights=arc"]
    options = ["--", "-n", "--printshellcmds", "--directory", str(tmp_path), "--resources", "gpu=2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *options], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    commands = [line for line in (done.stdout + done.stderr).splitlines() if "; exec " in line]
    modules = {stage.module for stage in stages.ALL.values()}
    assert {module for module in modules if any(f" -m {module} " in line for line in commands)} == modules
    for line in commands:
        words = shlex.split(line)
        named = [word for word in words if "pwned" in word]
        assert len(named) >= 4 and all(word.startswith((f"{NASTY}/", f"./{NASTY}/plans/")) for word in named), line


def hydra_quoted(text):
    return "'" + text.replace("'", "\\'") + "'"


@pytest.mark.parametrize("path", ["a b", "$(touch x)`y`;\"'\\z", "it's $HOME", "é: {x} #[1, 2]", "-x", "12", "null"])
def test_a_plan_file_reaches_the_processes_that_snakemake_starts(path):
    """Snakemake makes a shell's command line of it, and reads it there as --config: the path comes out as it was."""
    text = format_cli_arg("--config", [jobs.snakemake_argument("plan", path)])
    (_, argument) = (
        subprocess.run(["bash", "-c", f"printf '%s\\0' {text}"], capture_output=True).stdout[:-1].split(b"\0")
    )
    assert parse_config([argument.decode()])["plan"].strip() == path
    assert shlex.split(text)[1] == argument.decode()


def test_settings_are_quoted_for_the_shell():
    execution = {"threads": 1, "processes": 2, "accelerate_config": "$(x).yaml", "gpus": 0}
    run = plan.Run("ppo", "label", "address", {"mixed_precision": "no; touch x"}, {}, execution)
    words = shlex.split(jobs.launcher(run))
    assert "$(x).yaml" in words and "no; touch x" in words


@pytest.mark.parametrize(
    "results",
    [
        "",
        "  ",
        " a",
        "a ",
        "a{run}",
        "a}",
        "a\nb",
        "a\0b",
        "a\tb",
        "a\x1b[1m",
        "\u202ea",
        "~/a",
        "~",
        "s3://a",
        "a\udcff",
        "<results>/a",
    ],
)
def test_a_results_folder_that_cannot_work_is_refused_while_planning(results):
    with pytest.raises(runs.UserError) as caught:
        plan.plan([make(results=results)])
    assert one_line(caught).startswith("results=")


@pytest.mark.parametrize("name", ["file", "file/a", "loop", "a" * 256])
def test_what_is_no_folder_to_write_to_is_refused_while_planning(name, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(runs.UserError) as caught:
        plan.plan([make(results=str(tmp_path / name))]).save()
    assert one_line(caught).startswith("results=") and "give another" in one_line(caught)


@pytest.mark.parametrize(
    ("given", "kept"),
    [("a//b/", "a/b"), ("./a", "a"), ("/a/../b", "/a/../b"), ("a b", "a b"), ("-x", "-x"), ("ä", "ä")],
)
def test_a_results_folder_is_named_once(given, kept):
    assert plan.plan([make(results=given)]).results == kept


# A plan file


def first(values, stage):
    return next(path for path in values["runs"] if path.startswith(f"{stage}/"))


def renamed(values, stage, label, folder=None):
    """Give a run of a plan file's values another label; its folder, or another one, and its children follow."""
    old = first(values, stage)
    run = values["runs"].pop(old)
    new = folder or f"{stages.ALL[stage].folder}/{label}-{run['address'][:12]}"
    values["runs"][new] = run | {"label": label}
    for other in values["runs"].values():
        other["parents"] = {role: new if path == old else path for role, path in other["parents"].items()}


def set_in(stage, key, value):
    return lambda values: values["runs"][first(values, stage)].update({key: value})


def execution(key, value):
    return lambda values: values["runs"][first(values, "sft")]["execution"].update({key: value})


def other_settings(values):
    values["runs"][first(values, "sft")]["settings"]["seed"] += 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda v: renamed(v, "judge", "$(touch x)"), "no label"),
        (lambda v: renamed(v, "judge", "a;b"), "no label"),
        (lambda v: renamed(v, "judge", "../../a"), "no label"),
        (lambda v: renamed(v, "judge", "a\nb"), "no label"),
        (lambda v: renamed(v, "judge", "-a"), "no label"),
        (lambda v: renamed(v, "judge", "a" * 201), "no label"),
        (lambda v: renamed(v, "judge", "a", "judge/../../a-" + "0" * 12), "not the folder"),
        (other_settings, "another address"),
        (set_in("sft", "address", "0" * 64), "another address"),
        (set_in("sft", "stage", "os"), "no stage"),
        (set_in("sft", "parents", {"base": "../../etc"}), "doesn't have"),
        (set_in("sft", "after", ["nothing/x"]), "doesn't have"),
        (lambda v: set_in("sft", "after", [first(v, "ppo")])(v), "after it"),
        (set_in("sft", "parents", ["base"]), "not a plan"),
        (set_in("sft", "settings", "no settings"), "not a plan"),
        (set_in("sft", "settings", {"seed": 1}), "sft"),
        (set_in("sft", "label", 5), "not a plan"),
        (set_in("sft", "replicate", "0; x"), "replicate"),
        (set_in("sft", "shell", "touch x"), "shell"),
        (execution("threads", "1; touch x"), "threads"),
        (execution("memory_mb", -1), "memory_mb"),
        (execution("accelerate_config", ["x"]), "accelerate_config"),
        (execution("trackers", [5]), "trackers"),
        (execution("gpus", True), "gpus"),
        (execution("more", 1), "more"),
        (lambda v: v.update(results="a{b}"), "results="),
        (lambda v: v.update(results=""), "results="),
        (lambda v: v.update(results=["a"]), "results="),
        (lambda v: v["studies"][0].update(link="../../x"), "linked"),
        (lambda v: v["studies"][0].update(link="/etc/x"), "linked"),
        (lambda v: v["studies"][0].update(name="../x", link="studies/../x"), "linked"),
        (lambda v: v["studies"][0].update(path="../x"), "../x"),
        (lambda v: v["studies"][0].update(path=first(v, "sft")), "not the last of its looks"),
        (lambda v: v["studies"][0].update(path=first(v, "sft"), looks=[first(v, "sft")]), "no study"),
        (lambda v: v.update(comparison=first(v, "sft")), "no comparison"),
        (lambda v: v.pop("runs"), "runs"),
        (lambda v: v.update(runs=[]), "not a plan"),
        (lambda v: v.update(studies={"a": 1}), "not a plan"),
    ],
)
def test_a_plan_file_that_was_changed_is_refused(tmp_path, change, says):
    values = copy.deepcopy(saved_plan())
    change(values)
    runs.write_json(tmp_path / "plan.json", values)
    with pytest.raises(runs.UserError, match=says) as caught:
        plan.load(tmp_path / "plan.json")
    assert one_line(caught).startswith(f"{tmp_path / 'plan.json'}: ") and "plan" in str(caught.value)


def saved_plan():
    made = plan.plan([make(link="studies/default", results="results")])
    values = {"results": made.results, "studies": made.studies, "comparison": None}
    return values | {
        "runs": {path: {n: getattr(run, n) for n in plan.Run.__slots__} for path, run in made.runs.items()}
    }


@pytest.mark.parametrize("content", [b"", b"[]", b"5", b"null", b"\xff\xfe\x00", b"[" * 100_000, b'{"runs": {}}'])
def test_a_file_that_is_no_plan_is_one_line(tmp_path, content):
    (tmp_path / "plan.json").write_bytes(content)
    for path in (tmp_path / "plan.json", tmp_path, tmp_path / "none.json", tmp_path / "plan.json" / "x"):
        with pytest.raises(runs.UserError) as caught:
            plan.load(path)
        one_line(caught)


def test_a_stage_takes_no_run_that_the_plan_does_not_sign_for(tmp_path):
    values = saved_plan() | {"results": str(tmp_path / "results")}
    path = first(values, "corpus")
    values["runs"][path]["settings"]["corpus"]["documents"] += 1
    runs.write_json(tmp_path / "plan.json", values)
    for wanted in (path, "../../x", first(values, "sft")):
        arguments = ["--plan", str(tmp_path / "plan.json"), "--run", wanted]
        with pytest.raises(SystemExit) as caught:
            stages.CORPUS.command(table, 1, argv=arguments)
        one_line(caught)
    assert not (tmp_path / "results").exists()


# Folders


def report(folder, write, settings=None, stage="study"):
    settings = settings or config.StudySettings({"name": "mine", "data": {"task": {"kind": "stories"}}}, [])
    runs.execute(stage, 1, lambda s, p, output, e: write(output), settings, {}, folder, EXECUTION)
    return folder


def table(output):
    runs.write_atomically(output / "tables" / "a.md", "a")


def test_publishing_takes_nothing_elses_place(tmp_path):
    folder = report(tmp_path / "studies" / "mine-0", table)
    target = tmp_path / "published" / "mine-0"
    target.mkdir(parents=True)
    (target / "thesis.tex").write_text("years of work")
    with pytest.raises(runs.UserError, match="in the way"):
        studies.publish(folder)
    assert (target / "thesis.tex").read_text() == "years of work"
    target.rename(tmp_path / "elsewhere")
    target.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(runs.UserError, match="in the way"):
        studies.publish(folder)
    target.unlink()
    assert studies.publish(folder) == target and studies.publish(folder) == target  # its own place, twice
    with pytest.raises(runs.UserError, match="published copy"):
        studies.publish(target)
    assert runs.verify(target) and sorted(path.name for path in target.parent.iterdir()) == ["mine-0"]


@pytest.mark.parametrize("name", ["../../out", "/tmp/salsa-out", "a/../../../out"])
def test_a_manifest_that_names_files_elsewhere_is_not_published(tmp_path, name):
    folder = report(tmp_path / "studies" / "mine-0", table)
    manifest = runs.read_json(folder / runs.MANIFEST)
    manifest["artefacts"][name] = manifest["artefacts"]["tables/a.md"]
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("a")
    runs.write_manifest(folder, manifest)
    with pytest.raises(runs.UserError, match="outside") as caught:
        studies.publish(folder)
    one_line(caught)
    (folder / name).unlink()


def test_a_name_in_a_manifest_is_no_way_out(tmp_path):
    settings = config.StudySettings({"name": "../../gone", "data": {"task": {"kind": "stories"}}}, [])
    folder = report(tmp_path / "a" / "studies" / "mine-0", table, settings)
    gone = tmp_path / "gone"
    gone.symlink_to(folder)
    with pytest.raises(runs.UserError, match="name"):
        studies.publish(folder)
    assert gone.is_symlink() and runs.verify(folder)


def test_only_reports_are_published_and_exported(tmp_path):
    folder = report(tmp_path / "sft" / "a-0", table, config.SftSettings(0, config.Sft(), config.Lengths()), "sft")
    for attempt in (lambda: studies.publish(folder), lambda: studies.export(folder, "ppo", tmp_path / "out")):
        with pytest.raises(runs.UserError, match="a run of sft"):
            attempt()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["publish", "none"], "none"),
        (["publish", "file"], "file"),
        (["export", "none", "ppo", "--output", "out"], "none"),
        (["export", "file", "ppo", "--output", "out"], "file"),
        (["export", "none", "ppo", "--output", "out", "--kl-coef", "abc"], "abc"),
        (["export", "none", "ppo"], "--output"),
        (["export", "none", "ppo", "--output", "file"], "already"),
        (["verify", "file"], "file"),
        (["verify", "none"], "none"),
        (["plan", "results="], "results"),
        (["run", "--", "--directory", "file"], "file"),
        (["plan", "--tflops", "x"], "tflops"),
        (["plan", "--tflops", "-1"], "tflops"),
        (["plan", "--gpu-memory", "nan"], "gpu-memory"),
        (["plan", "--memory", "0"], "memory"),
        (["publish", "."], "no finished study"),
        (["export", ".", "ppo", "--output", "out"], "no finished study"),
        (["unknown"], "unknown"),
        (["plan", f"name={ESCAPE}"], "name"),
        ([], "COMMAND"),
    ],
)
def test_mistakes_of_the_command_line_are_one_line(tmp_path, monkeypatch, capfd, words, says):
    from salsa import __main__

    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("a")
    try:
        code = __main__.main(words)
    except SystemExit as stopped:
        code = stopped.code
    printed = capfd.readouterr()
    lines = printed.err.splitlines()
    assert code in (1, 2) and len(lines) == 1 and says in lines[0] and lines[0] == printable(lines[0]), printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_a_point_of_a_points_file_is_no_sweep():
    from salsa.workflow import compose

    with pytest.raises(runs.UserError, match="seed=0,1: a sweep within a point"):
        compose.compose_points([["ppo.iterations=3"], ["seed=0,1"]])


def test_a_place_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, capsys):
    from salsa import __main__

    monkeypatch.setattr(studies, "export", lambda *arguments: (tmp_path / "file" / "out").mkdir(parents=True))
    (tmp_path / "file").write_text("a")
    assert __main__.main(["export", "study", "ppo", "--output", str(tmp_path / "file" / "out")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"salsa: {tmp_path / 'file'}")


# A terminal


def test_what_a_terminal_would_obey_is_spelt_out():
    text = "a\x1b[31mb\n\t\x9b\u202e\u2028\udcff\ufeff\u200b\U000e0041"
    assert printable(text) == r"a\x1b[31mb\n\t\x9b\u202e\u2028\udcff\ufeff\u200b\U000e0041"
    plain = "naïve 日本語 שלום 👩‍🔬 – a\\b {x} [y]"  # with a joiner, which only joins
    assert printable(plain) == plain
    assert str(runs.UserError(f"x{ESCAPE}y")) == printable(f"x{ESCAPE}y")


def test_the_end_of_a_log_is_shown_whatever_it_holds(tmp_path):
    made = plan.plan([make(results=str(tmp_path), replicates=[0])])
    logs = [tmp_path / path / jobs.LOG for path in list(made.runs)[:5]]
    for log in logs:
        log.parent.mkdir(parents=True)
    logs[0].write_bytes(b"first\n" + os.urandom(300_000) + b"\nlast \xff" + ESCAPE.encode() + b"\n\n")
    with open(logs[1], "wb") as file:
        file.truncate(2**40)  # a terabyte, of which the disk holds nothing
        file.seek(2**40)
        file.write(b"\nthe end\n")
    os.mkfifo(logs[2])
    logs[3].write_text("10%\r50%\r100% done\nboom: " + "x" * 5000)
    logs[4].touch()
    lines = list(jobs.failures(made))
    shown = [line for line in lines if line.startswith("not finished: ")]
    assert all(line == printable(line) and len(line) < 1000 for line in lines) and len(lines) < 60
    assert len(shown) == 4 and shown[0].endswith("\\u2028next")
    assert shown[1].endswith(": the end") and "is no file" in shown[2] and ": boom: xxx" in shown[3]
    assert "  | 100% done" in lines


def test_what_a_study_says_at_its_end_is_text_alone(tmp_path):
    made = plan.plan([make(results=str(tmp_path), replicates=[0])])
    folder = tmp_path / made.studies[0]["path"]
    header = "claim,text,claim_verdict,outcome,measure,candidate,baseline,effect,effect_low,effect_high"
    row = f'"{ESCAPE}","{ESCAPE}",supported,primary,gold_reward,salsa,ppo,1,0.5,1.5'
    runs.write_atomically(folder / answers.CLAIMS, f"{header}\n{row}\n")
    runs.write_atomically(folder / answers.REWARDS, f"arm,kl_coef,reward\n{ESCAPE},0.1,1\n")
    runs.write_json(folder / runs.MANIFEST, {})
    lines = list(studies.conclude(made))
    assert any("supported: " in line for line in lines) and all(line == printable(line) for line in lines)
    runs.write_atomically(folder / answers.CLAIMS, "")
    lines = list(studies.conclude(made))
    assert any("0.1" in line for line in lines) and all(line == printable(line) for line in lines)


# Places


def home(monkeypatch, path, **more):
    for name in ("XDG_CACHE_HOME", "HF_HOME", "TRITON_CACHE_DIR", "MPLCONFIGDIR", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(name, "")  # so that what the test sets is taken back
        monkeypatch.delenv(name)
    for name, value in ({"HOME": path} | more).items():
        monkeypatch.setenv(name, str(value))


def test_a_home_that_can_be_written_stays(tmp_path, monkeypatch):
    home(monkeypatch, tmp_path)
    before = dict(os.environ)
    places.use()
    assert dict(os.environ) == before
    home(monkeypatch, tmp_path / "to" / "be" / "made")
    before = dict(os.environ)
    places.use()
    assert dict(os.environ) == before


@pytest.mark.parametrize("path", ["/dev/null", "file"])
def test_without_a_home_caches_have_another_place(tmp_path, monkeypatch, path):
    (tmp_path / "file").write_text("")
    home(monkeypatch, tmp_path / path)
    monkeypatch.setattr(places.tempfile, "tempdir", str(tmp_path))
    places.use()
    for name in ("HOME", "XDG_CACHE_HOME", "TRITON_CACHE_DIR", "MPLCONFIGDIR"):
        assert os.environ[name].startswith(str(tmp_path / f"salsa-{os.getuid()}")) and places.usable(os.environ[name])
    assert "HF_HOME" not in os.environ


def test_a_read_only_home_keeps_the_models_in_it(tmp_path, monkeypatch):
    (tmp_path / ".cache" / "huggingface").mkdir(parents=True)
    home(monkeypatch, tmp_path)
    monkeypatch.setattr(places, "usable", lambda path: not str(path).startswith(str(tmp_path)))
    places.use()
    assert os.environ["HOME"] == str(tmp_path) and os.environ["HF_HOME"] == str(tmp_path / ".cache" / "huggingface")
    assert not os.environ["HF_DATASETS_CACHE"].startswith(str(tmp_path))


def test_a_cache_that_is_a_file_is_passed_over(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    home(monkeypatch, tmp_path, XDG_CACHE_HOME=tmp_path / "file")
    places.use()
    assert os.environ["XDG_CACHE_HOME"] != str(tmp_path / "file") and places.usable(os.environ["XDG_CACHE_HOME"])


def test_a_cache_beside_whatever_a_process_works_in_is_none(tmp_path, monkeypatch):
    home(monkeypatch, tmp_path, XDG_CACHE_HOME="cache", XDG_CONFIG_HOME="")
    places.use()
    assert "XDG_CACHE_HOME" not in os.environ and "XDG_CONFIG_HOME" not in os.environ


def test_a_user_without_a_name_has_one(monkeypatch):
    def unknown(uid):
        raise KeyError(uid)

    for name in places.NAMES:
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(places.pwd, "getpwuid", unknown)
    places.use()
    assert os.environ["LOGNAME"] == f"uid{os.getuid()}"


def test_another_users_folder_is_not_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(places.tempfile, "tempdir", str(tmp_path))
    (tmp_path / "theirs").mkdir()
    (tmp_path / f"salsa-{os.getuid()}").symlink_to(tmp_path / "theirs")
    assert places.own_folder().parent == tmp_path and not places.own_folder().is_symlink()


@pytest.mark.parametrize(
    ("visible", "devices"),
    [
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("0,1", ["0", "1"]),
        ("0,-1,1", ["0"]),
        (" 2 , 2,3", ["2", "3"]),
        ("GPU-1a-2b,GPU-3c", ["GPU-1a-2b", "GPU-3c"]),
        ("MIG-GPU-1a-2b/1/0,MIG-3c", ["MIG-GPU-1a-2b/1/0", "MIG-3c"]),
        ("../../x", []),
    ],
)
def test_devices_are_those_that_cuda_sees(tmp_path, monkeypatch, visible, devices):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(gpus.tempfile, "tempdir", str(tmp_path))
    assert gpus.devices() == devices
    code = "import sys; from salsa.workflow import gpus; sys.exit(gpus.lease(2, gpus.devices()) != sys.argv[1:])"
    if len(devices) == 2 and "/" in visible:  # a file for each, whatever its name
        environment = os.environ | {"TMPDIR": str(tmp_path)}
        assert subprocess.run([sys.executable, "-c", code, *devices], env=environment, cwd=ROOT).returncode == 0


# Hash seeds

ADDRESSES = """
import sys
from salsa.workflow import compose, plan
made = plan.plan(compose.compose(sys.argv[1:]))
print(made.save().read_text(), *made.runs, sep="\\n")
"""


def test_a_plan_is_the_same_under_six_hash_seeds(tmp_path):
    overrides = ["arm=[ppo,salsa,noise,ema]", "alphas=[0.25,1/3]", "seed=0,1", "judges.gold.tournament=true"]
    command = [sys.executable, "-c", ADDRESSES, *overrides]
    started = [
        subprocess.Popen(
            command,
            env=os.environ | {"PYTHONHASHSEED": str(seed), "PYTHONPATH": str(ROOT)},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
        )
        for seed in range(6)
    ]
    printed = [process.communicate()[0] for process in started]
    assert len(set(printed)) == 1 and len(printed[0]) > 10_000
