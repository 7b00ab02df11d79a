"""SFT, reward models and DPO in two processes against one, with adapters, and after an interruption."""

import dataclasses
import os
import shlex
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import accelerate
import pytest
import torch
from conftest import SHAPE
from safetensors.torch import load_file
from training_script import run
from transformers import AutoModelForSequenceClassification, TrainingArguments

from salsa import base, reward, sft
from salsa.algorithms.dpo import Dpo
from salsa.rl import checkpoints, models, processes, training
from salsa.workflow import config, jobs, runs, schema

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("training_script.py")
FSDP2 = ROOT / "conf/accelerate/fsdp2.yaml"


def sft_case(mixed_precision="no", stop_after=None, execution=None, **changes):
    """48 demonstrations: batches of 20, 20 and 8, and 16 to validate with in shares of 2 x 3."""
    values = {"epochs": 2, "batch_size": 20, "learning_rate": 1e-3, "dropout": 0.0} | changes
    settings = config.SftSettings(1, config.Sft(**values), config.Lengths(64, 44), mixed_precision)
    return _case("sft", settings, stop_after, execution or {})


def reward_case(mixed_precision="no", stop_after=None, execution=None, **changes):
    """Some 50 pairs: three batches of 16, and what is left."""
    values = {"pairs": 50, "held_out": 16, "epochs": 2, "batch_size": 16, "learning_rate": 1e-3} | changes
    values |= {"gold_temperature": 0.05, "normalisation_prompts": 20}
    settings = config.RewardModelSettings(
        3, "sampled", config.RewardModel(**values), config.Lengths(64, 10), mixed_precision
    )
    return _case("reward_model", settings, stop_after, execution or {})


def dpo_case(kind, weights, stop_after=None, rate=0.0, execution=None, **changes):
    """Some 50 pairs, as of the reward model, against a reference of a kind."""
    values = {"pairs": 50, "epochs": 2, "batch_size": 16, "learning_rate": 1e-3, "warmup": 0.0} | changes
    anchor = config.Reference(kind, list(weights), rate=rate)
    settings = config.TRAINING["dpo"](3, 0.3, ["1"], anchor, Dpo(**values), config.Lengths(64, 10))
    return _case("dpo", settings, stop_after, execution or {})


def _case(stage, settings, stop_after, execution):
    chosen = config.Execution(device="cpu", **{"micro_batch": 3, "rollout_batch": 16} | execution)
    case = {"stage": stage, "settings": dataclasses.asdict(settings), "execution": dataclasses.asdict(chosen)}
    return case | ({"stop_after": stop_after} if stop_after else {})


CASES = {
    "sft": sft_case(),
    "sft_adapters": sft_case(
        stop_after=2,
        epochs=1,
        lora_rank=2,
        learning_rate=1e-2,
        execution={"micro_batch": 4, "gradient_checkpointing": True},  # 4 divides what is validated with
    ),
    "reward": reward_case(stop_after=6),
    "reward_adapters": reward_case(stop_after=2, epochs=1, lora_rank=2, learning_rate=1e-2),
    "dpo": dpo_case("ema", ["1"], stop_after=5, rate=0.3),
    "fsdp2_dpo": dpo_case("multi_kl", ["0.6", "0.4"], epochs=1, execution={"gradient_checkpointing": True}),
    "fsdp2_sft": sft_case(stop_after=4, execution={"gradient_checkpointing": True}),
    "fsdp2_reward": reward_case(epochs=1),
    "fsdp2_bf16": sft_case("bf16", epochs=1),
}
DIVERGE = {"sft_diverges": sft_case(learning_rate=1e30), "reward_diverges": reward_case(learning_rate=1e30)}


def launched(arguments, accelerate_config=""):
    execution = {"processes": 2, "accelerate_config": str(accelerate_config), "gpus": 0}
    made = SimpleNamespace(stage="sft", execution=execution, settings={"mixed_precision": "no"})
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        [*shlex.split(jobs.launcher(made)), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        env={**os.environ, "PATH": programs, "PYTHONPATH": str(ROOT)},
    )


@pytest.fixture(scope="module")
def family(parents, base_run):
    return parents | {"base": base_run}


@pytest.fixture(scope="module")
def by_two(family, tmp_path_factory):
    """The folders of the cases, as two processes wrote them: all at one start."""
    folder = tmp_path_factory.mktemp("two")
    asked = {"parents": {role: str(path) for role, path in family.items()}, "cases": DIVERGE | CASES}
    runs.write_json(folder / "cases.json", asked)
    process = launched([SCRIPT, folder / "cases.json"], FSDP2)
    assert process.returncode == 0, process.stdout
    return folder


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def furthest(one, other):
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.fixture(scope="module")
def by_one(family, tmp_path_factory):
    """A function: the folder and the summary of a case, as this process trains it, without an interruption."""
    root, done = tmp_path_factory.mktemp("one"), {}

    def trained(name, case=None):
        if name not in done:
            done[name] = root / name, run(case or CASES[name], family, root / name)
        return done[name]

    return trained


@pytest.mark.parametrize("name", CASES)
def test_two_processes_learn_what_one_does(by_two, by_one, name):
    """Also of batches that they can't share evenly, from validation losses, and when they were told to stop."""
    folder, summary = by_one(name)
    rounding = 1e-3 if name == "fsdp2_bf16" else 1e-5  # a step of Adam's, where a gradient is rounded to nothing
    assert furthest(weights(by_two / name), weights(folder)) <= rounding
    assert {tensor.dtype for tensor in weights(by_two / name).values()} == {torch.float32}
    configuration = (runs.read_json(path / "model/config.json") for path in (by_two / name, folder))
    assert next(configuration) == next(configuration)
    if CASES[name]["stage"] == "dpo":
        check_dpo(by_two / name, folder)
    else:
        assert approximately(runs.read_json(by_two / name / "summary.json"), summary, 1e-2 if rounding > 1e-5 else 1e-4)
    if CASES[name]["stage"] == "reward_model":
        constants = (runs.read_json(path / "normalisation.json") for path in (by_two / name, folder))
        assert next(constants) == pytest.approx(next(constants), rel=1e-3)
    if "stop_after" in CASES[name]:
        assert runs.read_json(by_two / name / runs.CHECKPOINTS / training.SAVED)["processes"] == 2


def check_dpo(folder, other):
    """Metrics are means over pairs, whoever computes them; a reference that moves is the same, too."""
    both = [runs.read_jsonl(path / "metrics.jsonl") for path in (folder, other)]
    for row, wanted in zip(*both, strict=True):
        assert row == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    assert (folder / "reference").exists() == (other / "reference").exists()
    if (folder / "reference").exists():
        moved = [load_file(path / "reference" / "model.safetensors") for path in (folder, other)]
        assert furthest(*moved) <= 1e-5


@pytest.mark.parametrize(("name", "section"), [("sft_diverges", "sft"), ("reward_diverges", "reward_model")])
def test_all_processes_end_where_one_diverges(by_two, name, section):
    said = runs.read_json(by_two / name / "summary.json")["refused"]
    assert f"{section}.learning_rate=1e+30: " in said and "not finite at step" in said
    assert load_file(by_two / name / "diverged.safetensors") and not (by_two / name / "model").exists()


def approximately(one, other, tolerance):
    losses = "validation_losses"
    same = [one[name] == pytest.approx(other[name], rel=tolerance) for name in one.keys() & {"validation_loss", losses}]
    return all(same) and all(one[name] == other[name] for name in one if not name.startswith("validation"))


def test_validation_is_a_mean_over_tokens_whatever_the_micro_batch(by_one):
    _, small = by_one("sft")
    _, whole = by_one("whole", sft_case(execution={"micro_batch": 64}))
    assert small["validation_losses"] == pytest.approx(whole["validation_losses"], rel=1e-5)


def test_a_reward_models_micro_batches_change_nothing(by_one):
    one, other = by_one("reward")[0], by_one("whole_reward", reward_case(execution={"micro_batch": 16}))[0]
    assert furthest(weights(one), weights(other)) < 1e-5


@pytest.mark.parametrize(("name", "start"), [("sft_adapters", "base"), ("reward_adapters", "sft0")])
def test_merged_adapters_are_plain_models(by_one, family, name, start, monkeypatch):
    """The stored weights plus the adapters' product, in float32; all else is as it was."""
    folder, _ = by_one(name)
    before, after = weights(family[start]), weights(folder)
    adapters = load_file(folder / runs.CHECKPOINTS / training.KEPT / "adapter_model.safetensors")
    changed = 0
    for tensor_name, tensor in after.items():
        key = f"base_model.model.{tensor_name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" in adapters:
            product = adapters[f"{key}.lora_B.weight"] @ adapters[f"{key}.lora_A.weight"]
            assert product.abs().max() > 1e-3 and torch.equal(tensor, before[tensor_name] + 16.0 / 2 * product)
            changed += 1
        elif tensor_name != "score.weight":
            assert torch.equal(tensor, before[tensor_name])
    assert changed == 2 * 7 and before.keys() - {"lm_head.weight"} <= after.keys() | {"lm_head.weight"}
    assert not (folder / "model/adapter_config.json").exists()
    plain = by_one(name.removesuffix("_adapters"))[0]
    assert runs.read_json(folder / "model/config.json") == runs.read_json(plain / "model/config.json")
    monkeypatch.setitem(sys.modules, "peft", None)
    if name == "sft_adapters":
        assert models.load_policy(folder / "model").lm_head.weight is not None
    else:
        torch.manual_seed(3)  # the run's own: of the head that it began with
        begun = AutoModelForSequenceClassification.from_pretrained(family[start] / "model", num_labels=1)
        moved = (after["score.weight"] - begun.score.weight).abs()
        assert 1e-3 < moved.mean() < 0.1 and torch.equal(
            models.load_score_model(folder).classifier.score.weight, after["score.weight"]
        )


class Interrupted(Exception):
    """A kill that leaves no time to save."""


@pytest.fixture
def interrupt(monkeypatch):
    """A function that lets a training do something behind its step of a number; returns the steps that were taken."""

    def at(step, act):
        step_end, steps = training.CheckpointCallback.on_step_end, []

        def watched(watch, args, state, control, **named):
            steps.append(state.global_step)
            step_end(watch, args, state, control, **named)
            if len(steps) == step:
                act()

        monkeypatch.setattr(training.CheckpointCallback, "on_step_end", watched)
        return steps

    return at


@pytest.fixture(scope="module")
def uninterrupted(family, tmp_path_factory):
    """(A function that executes a stage's case into a folder, its manifest) of SFT and of a reward model."""
    cases = {
        "sft": sft_case(dropout=0.3, epochs=3, learning_rate=2e-2),
        "reward_model": reward_case(execution={"checkpoint_minutes": 1e-9}),
    }

    def execute(stage, folder):
        settings_class, module = {
            "sft": (config.SftSettings, sft),
            "reward_model": (config.RewardModelSettings, reward),
        }[stage]
        parents = {name: family[name] for name in ("prepare", *(["base"] if stage == "sft" else ["sft0", "sft1"]))}
        settings, execution = (
            schema.from_dict(kind, cases[stage][name])
            for kind, name in ((settings_class, "settings"), (config.Execution, "execution"))
        )
        return runs.execute(stage, module.VERSION, module.train, settings, parents, folder, execution)

    root = tmp_path_factory.mktemp("uninterrupted")
    return execute, {stage: execute(stage, root / stage) for stage in cases}


def assert_as(found, expected):
    """Bit for bit; but the log, which says seconds."""
    assert found["summary"] == expected["summary"]
    for name in found["artefacts"].keys() - {"log_history.json"}:
        assert found["artefacts"][name] == expected["artefacts"][name], name


@pytest.mark.parametrize("step", [2, 4])  # whose look for a request is at an epoch's end, and within one
def test_a_run_that_is_told_to_stop_goes_on(uninterrupted, interrupt, tmp_path, step):
    """With dropout, and from the epoch of lowest loss."""
    execute, expected = uninterrupted
    steps = interrupt(step, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as stopped:
        execute("sft", tmp_path)
    assert stopped.value.code == 143 and runs.manifest_of(tmp_path) is None and not (tmp_path / "model").exists()
    assert len(steps) == step + 1
    assert_as(execute("sft", tmp_path), expected["sft"])
    assert steps == list(range(1, 10)) and not (tmp_path / runs.CHECKPOINTS).exists()


def test_a_killed_run_goes_on_from_its_last_checkpoint(uninterrupted, interrupt, tmp_path):
    """Saved behind each step, in these minutes."""
    execute, expected = uninterrupted

    def kill():
        raise Interrupted

    steps = interrupt(6, kill)
    with pytest.raises(Interrupted):
        execute("reward_model", tmp_path)
    execute("reward_model", tmp_path)
    assert_as(runs.manifest_of(tmp_path), expected["reward_model"])
    assert steps == [1, 2, 3, 4, 5, 6, 6, 7, 8]


def test_a_kill_while_saving_leaves_the_checkpoint_before(uninterrupted, interrupt, tmp_path, monkeypatch):
    execute, expected = uninterrupted

    def kill(*_):
        raise Interrupted

    steps = interrupt(3, kill)
    with pytest.raises(Interrupted):
        execute("reward_model", tmp_path)
    (tmp_path / runs.CHECKPOINTS / "checkpoint-4").mkdir()  # a part of what a killed process was writing
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(checkpoints, "sync", kill)
        execute("reward_model", tmp_path)
    execute("reward_model", tmp_path)
    assert_as(runs.manifest_of(tmp_path), expected["reward_model"])
    assert steps == [1, 2, 3, 3, 3, 4, 5, 6, 7, 8]


def test_what_processes_can_not_share_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    for case in (sft_case(), reward_case()):
        section, settings = case["stage"], case["settings"][case["stage"]]
        chosen = SimpleNamespace(**settings)
        with pytest.raises(runs.UserError, match=rf"3 processes can't share {section}.batch_size=\d+ .* multiple of 3"):
            training.arguments(section, chosen, None, None, tmp_path, torch.device("cpu"))


def test_processes_wait_while_the_first_one_samples_for_hours(family, tmp_path, monkeypatch):
    """Where a run makes the group of its processes, and where Accelerate or transformers would."""
    day, cpu, timeouts = timedelta(days=1), torch.device("cpu"), []
    section = SimpleNamespace(**sft_case()["settings"]["sft"])
    assert TrainingArguments(**training.common_arguments(section, 1, False, tmp_path, cpu)).ddp_timeout_delta == day
    accelerator = processes.make_accelerator(SimpleNamespace(mixed_precision="no"), cpu, config.Execution())
    assert accelerator.init_handler.timeout == day

    def group(timeout, **_):
        timeouts.append(timeout)
        raise InterruptedError

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(accelerate, "PartialState", group)
    with pytest.raises(InterruptedError), runs._only_one(tmp_path, config.Execution(device="cpu")):
        pass
    assert timeouts == [day]


def test_a_checkpoint_of_other_processes_is_refused(family, tmp_path):
    saved = {"checkpoint": "checkpoint-3", "processes": 2, "distributed_type": "MULTI_CPU"}
    runs.write_json(tmp_path / runs.CHECKPOINTS / training.SAVED, saved)
    with pytest.raises(runs.UserError, match=r"saved by 2 process\(es\) of MULTI_CPU, and this is 1"):
        run(sft_case(), family, tmp_path)


def test_without_peft_only_adapters_are_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert models.adapter_config("sft", config.Sft()) is None
    with pytest.raises(runs.UserError, match=r"reward_model\.lora_rank=2 needs peft: pip install .*\[lora\]"):
        models.adapter_config("reward_model", config.RewardModel(lora_rank=2))


@pytest.mark.parametrize("stage", ["sft", "reward_model"])
def test_a_learning_rate_that_explodes_ends_the_run(family, tmp_path, stage):
    """In one line, with the batch, and without a model."""
    case, folder = sft_case(learning_rate=1e30) if stage == "sft" else reward_case(learning_rate=1e30), tmp_path / "run"
    says = rf"{stage}\.learning_rate=1e\+30: .* not finite at step \d of \d; lower it"
    with pytest.raises(runs.UserError, match=says) as refused:
        run(case, family, folder)
    batch = load_file(folder / "diverged.safetensors")
    assert "input_ids" in {name.split(".")[1] for name in batch} and str(refused.value).count("\n") == 0
    assert {path.name for path in folder.iterdir()} == {"checkpoints", "diverged.json", "diverged.safetensors"}


def test_an_explosion_to_finite_numbers_is_none_the_less_one(family, tmp_path):
    with pytest.raises(runs.UserError, match=r"sft\.learning_rate=1000: the validation loss is \d\S+ nats .* lower it"):
        run(sft_case(learning_rate=1e3, stop="epochs"), family, tmp_path / "run")
    assert not (tmp_path / "run" / "model").exists()


def test_what_is_broken_before_anything_is_learned_is_said(family, tmp_path, tokenizer):
    model = models.load_policy(family["base"] / "model")
    model.model.norm.weight.data.fill_(1e38)  # NaN itself is not loaded
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(runs.UserError, match="sft: the loss is not finite at step 1 of 6, before anything was learned"):
        run(sft_case(), family | {"base": tmp_path}, tmp_path / "run")


def test_weights_that_are_not_finite_are_not_saved(family, tmp_path, monkeypatch):
    """Nor is a checkpoint of them: the one before stays, and a run goes on from it."""
    step_end = training.CheckpointCallback.on_step_end

    def explode(watch, args, state, control, model, **named):
        if state.global_step == 2:
            model.model.norm.weight.data.fill_(float("inf"))
        step_end(watch, args, state, control, model=model, **named)

    case, folder = sft_case(execution={"checkpoint_minutes": 1e-9}), tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(runs.UserError, match="weights are not finite at step 2 of 6"):
        patch.setattr(training.CheckpointCallback, "on_step_end", explode)
        run(case, family, folder)
    assert runs.read_json(folder / runs.CHECKPOINTS / training.SAVED)["checkpoint"] == "checkpoint-1"
    assert (folder / "diverged.json").exists()
    run(case, family, folder)
    assert not (folder / "diverged.json").exists() and (folder / "model").exists()


def test_a_log_says_null_where_a_number_is_none():
    history = [{"loss": 1.0, "entropy": float("nan"), "step": 3}]
    assert training.finite_or_null(history) == [{"loss": 1.0, "entropy": None, "step": 3}]


class Malice:
    """What makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_no_file_of_a_checkpoint_runs_code(family, tmp_path, interrupt):
    case, folder = sft_case(execution={"checkpoint_minutes": 1e-9}), tmp_path / "run"

    def kill():
        raise Interrupted

    interrupt(2, kill)
    with pytest.raises(Interrupted):
        run(case, family, folder)
    saved = folder / runs.CHECKPOINTS / "checkpoint-1"
    pickles = [path for path in sorted(saved.iterdir()) if path.suffix in (".pt", ".pth", ".bin", ".pkl")]
    assert [path.name for path in pickles] == ["optimizer.pt", "rng_state.pth", "scheduler.pt"]
    for path in pickles:
        before = path.read_bytes()
        torch.save(Malice(tmp_path / "made"), path)
        with pytest.raises(runs.UserError, match=path.name):
            run(case, family, folder)
        checkpoints.describe_files(saved)  # altered, too
        with pytest.raises(runs.UserError, match=r"can't be read as a checkpoint \(Unsupported"):
            run(case, family, folder)
        assert not (tmp_path / "made").exists()
        path.write_bytes(before)
        checkpoints.describe_files(saved)


@pytest.mark.parametrize(
    ("rate", "says"), [(1e30, r"base\.learning_rate=1e\+30: .* not finite at step"), (None, "two are")]
)
def test_pretraining_that_diverges_or_has_no_text_ends(tmp_path, rate, says):
    corpus = tmp_path / "corpus"
    runs.write_jsonl(corpus / "corpus.jsonl", [{"text": "Wash the rice, then boil it."}] * (60 if rate else 1))
    settings = config.BaseSettings(
        config.Model("tiny", "pretrain", chat_template="roles", architecture=SHAPE),
        config.Base(batch_size=4, block_length=16, learning_rate=rate or 1e-3),
    )
    with pytest.raises(runs.UserError, match=says):
        base.pretrain(settings, corpus, tmp_path / "run", config.Execution(device="cpu"))
    assert (tmp_path / "run" / "diverged.safetensors").exists() == bool(rate)
    assert not (tmp_path / "run" / "model").exists()
