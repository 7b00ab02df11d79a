"""Training in two processes, started by `accelerate launch`, against one: on CPUs, with gloo."""

import dataclasses
import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from distributed_script import run

from salsa.algorithms import ppo as ppo_stage
from salsa.algorithms.ppo import Ppo
from salsa.data import chat
from salsa.rl import models, processes, rollout, trainer
from salsa.workflow import config, jobs, runs, schema

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("distributed_script.py")
FSDP2_FILE, ZERO3_FILE = "conf/accelerate/fsdp2.yaml", "conf/accelerate/deepspeed_zero3.yaml"
BATCH = 16
SMALL = {
    "iterations": 3,
    "batch_size": BATCH,
    "epochs": 2,
    "mini_batches": 2,
    "learning_rate": 1e-3,
    "schedule": "constant",
    "clip_range": 0.05,
    "max_grad_norm": 0.5,
}
SOUP, START = {"kind": "soup", "weights": ["1/2", "1/2"]}, {"kind": "soup", "weights": ["1"]}
MULTI_KL, EMA = {**SOUP, "kind": "multi_kl"}, {**SOUP, "kind": "ema", "rate": 0.2}
IN_LOSS = {"kl_in": "loss", "kl_estimator": "k2"}


def case(reference, section=(), mixed_precision="no", kind="ppo", **execution):
    """Settings and execution of a run. A share of a mini-batch has 4 sequences: micro-batches of 3 and of 1."""
    lengths, section = config.Lengths(prompt=64, response=10), config.ALGORITHMS[kind](**SMALL | dict(section))
    settings = config.TRAINING[kind](11, 0.1, ["1"], config.Reference(**reference), section, lengths, mixed_precision)
    chosen = {"device": "cpu", "micro_batch": 3, "rollout_batch": 5, "checkpoint_every": 0, **execution}
    execution = dataclasses.asdict(config.Execution(**chosen))
    return {"kind": kind, "settings": dataclasses.asdict(settings), "execution": execution}


SEPARATE, ONE_TRUNK = case(MULTI_KL, IN_LOSS), {"value_model": "shared"}
PLAIN = {
    "separate": SEPARATE,
    "shared": case(EMA, ONE_TRUNK, gradient_checkpointing=True),
    "adapters": case(SOUP, {"lora_rank": 2}),
    "rloo": case(SOUP, {"samples": 4}, kind="rloo", rollout_batch=6),
    "grpo": case(MULTI_KL, {"samples": BATCH}, kind="grpo"),  # all responses to one prompt, half of them in a process
}
DIVERGES = {"diverges": case(START, {"learning_rate": 1e30})}
SHARDED = {
    "fsdp2_separate": {**SEPARATE, "stop_after": 2},
    "fsdp2_shared": case(SOUP, ONE_TRUNK, gradient_checkpointing=True),
    "fsdp2_grpo": case(SOUP, {"samples": 4}, kind="grpo"),
    "fsdp2_bf16": case(START, {"iterations": 1}, mixed_precision="bf16", gradient_checkpointing=True),
}
ZERO3 = {
    "zero3_separate": case(MULTI_KL, {**IN_LOSS, "max_grad_norm": 1e9}),  # it clips both networks together
    "zero3_shared": {**case(SOUP, ONE_TRUNK, gradient_checkpointing=True), "stop_after": 2},
}


def launched(*arguments, accelerate_config="", watch=lambda process: None):
    """The finished process of the workflow's own launcher, with both its streams as text; `watch` sees it run."""
    path = ROOT / accelerate_config if accelerate_config else ""
    execution = {"processes": 2, "accelerate_config": str(path), "gpus": 0}
    run = SimpleNamespace(stage="ppo", execution=execution, settings={"mixed_precision": "no"})
    command = shlex.split(jobs.launcher(run))
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    process = subprocess.Popen(
        [*command, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PATH": programs, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"},
        start_new_session=True,
    )
    try:
        watch(process)
        process.output, _ = process.communicate(timeout=600)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process


def largest_difference(one, other):
    assert set(one) == set(other)
    return max((one[name] - other[name]).abs().max().item() for name in one)


def comparable(metrics):
    return [{name: value for name, value in row.items() if not name.startswith(("seconds", "peak"))} for row in metrics]


def run_by_two(cases, accelerate_config, parents, folder):
    """What cases leave that two processes run: name -> (its result, its folder)."""
    asked = {"parents": {role: str(path) for role, path in parents.items()}, "cases": cases}
    runs.write_json(folder / "cases.json", asked)
    process = launched(SCRIPT, folder / "cases.json", accelerate_config=accelerate_config)
    assert process.returncode == 0, process.output
    return {name: (torch.load(folder / name / "result.pt"), folder / name) for name in cases}


@pytest.fixture(scope="module")
def results(parents, tmp_path_factory):
    """All that needs nothing installed, at one start."""
    return run_by_two(DIVERGES | PLAIN | SHARDED, FSDP2_FILE, parents, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def zero3_results(parents, tmp_path_factory):
    return run_by_two(ZERO3, ZERO3_FILE, parents, tmp_path_factory.mktemp("zero3"))


@pytest.fixture(scope="module")
def alone(parents, tmp_path_factory):
    """A function that runs a case in this process."""
    return lambda chosen, **options: run(chosen, parents, tmp_path_factory.mktemp("alone"), **options)[1]


def test_all_processes_end_where_the_policy_diverges(results):
    result, folder = results["diverges"]
    assert "iteration 0, optimise: " in result["refused"] and "lower ppo.learning_rate=1e+30" in result["refused"]
    assert (folder / "diverged.safetensors").exists() and not (folder / "metrics.jsonl").exists()


def assert_same(found, expected, tolerance):
    """Two processes sampled, logged and learned what one did."""
    for ours, theirs in zip(expected["sampled"][-len(found["sampled"]) :], found["sampled"], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    for ours, theirs in zip(comparable(expected["metrics"]), comparable(found["metrics"]), strict=True):
        assert theirs == pytest.approx(ours, abs=max(1e-7, tolerance), rel=max(1e-7, tolerance))
    assert largest_difference(expected["weights"], found["weights"]) < tolerance
    for ours, theirs in zip(expected["reference"], found["reference"], strict=True):
        assert largest_difference(ours, theirs) < tolerance


def assert_resumed(found, chosen):
    assert found["resumed_at"] == ([chosen["stop_after"]] if "stop_after" in chosen else [])


def widths(sampled):
    """(longest prompt, longest response) of each process's share of a batch."""
    _, attention, mask = sampled
    prompts = attention.sum(dim=1) - mask.sum(dim=1)
    return [(int(prompts[i : i + BATCH // 2].max()), int(mask.sum(dim=1)[i : i + BATCH // 2].max())) for i in (0, 8)]


def assert_whole(folder, weights):
    """The saved models are those of the whole state, and load as such."""
    policy = models.load_policy(folder / "model", dtype="auto")
    expected = {name.removeprefix("policy."): tensor for name, tensor in weights.items() if name.startswith("policy.")}
    assert largest_difference(policy.state_dict(), expected) < 1e-10
    assert policy.lm_head.weight is policy.model.embed_tokens.weight
    if (folder / "value_model/model").exists():
        classifier = models.load_score_model(folder / "value_model", dtype="auto").classifier
        expected = {f"value_model.classifier.{name}": tensor for name, tensor in classifier.state_dict().items()}
        assert largest_difference(expected, {name: weights[name] for name in expected}) < 1e-10


@pytest.mark.parametrize("name", PLAIN)
def test_two_processes_learn_what_one_does(results, alone, name):
    (found, _), expected = results[name], alone(PLAIN[name])
    assert_same(found, expected, 1e-10)
    assert all(row["gradient_norm"] > 0 for row in found["metrics"]) and abs(found["metrics"][-1]["kl_to_sft0"]) > 0.01
    shares = [widths(sampled) for sampled in expected["sampled"]]
    for part in () if name in ("rloo", "grpo") else (0, 1):  # of few prompts, the longest may be in both shares
        assert any(one[part] != other[part] for one, other in shares)


@pytest.mark.parametrize(("name", "units"), [("fsdp2_separate", 5), ("fsdp2_shared", 3), ("fsdp2_grpo", 3)])
def test_fsdp2_learns_what_one_process_does(results, alone, name, units):
    """Each decoder layer is a unit, and the rest one; a case is interrupted, and goes on from sharded checkpoints."""
    (found, folder), expected = results[name], alone(SHARDED[name])
    assert found["units"] == units
    assert_resumed(found, SHARDED[name])
    assert_same(found, expected, 1e-10)
    assert_whole(folder, expected["weights"])


def test_fsdp2_in_bfloat16_rounds_neither_noise_nor_logprobs(results, prompts, parents, tokenizer):
    """Weights are trained in float32, and computed with in bfloat16, as the frozen model of the same weights is."""
    found, _ = results["fsdp2_bf16"]
    assert {tensor.dtype for tensor in found["weights"].values()} == {torch.float32}
    assert found["metrics"][0]["kl_k2"] < 1e-6  # at its reference: 1e-3 where outputs are rounded
    frozen = models.load_policy(parents["sft0"] / "model", dtype=torch.bfloat16)
    chosen = rollout.prompt_order(len(prompts[0]), 1, BATCH, 11)[0]
    noise = rollout.uniforms(11, 0, [prompts[0][i] for i in chosen], 10)
    ends = chat.end_ids(frozen, tokenizer)
    expected, _, _ = rollout.sample_batch(
        frozen, [prompts[1][i] for i in chosen], noise, 1.0, ends, tokenizer.pad_token_id, BATCH
    )
    tokens, _, mask = found["sampled"][0]
    responses = [row[: int(n)].tolist() for row, n in zip(tokens[:, -mask.shape[1] :], mask.sum(dim=1), strict=True)]
    same = [row[: len(ours)].tolist() == ours for row, ours in zip(expected.responses, responses, strict=True)]
    assert sum(same) >= BATCH - 3  # 9 of 16 with noise in bfloat16


@pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="DeepSpeed is not installed")
@pytest.mark.parametrize("name", ZERO3)
def test_zero3_learns_what_one_process_does(zero3_results, alone, name):
    (found, folder), expected = zero3_results[name], alone(ZERO3[name], double=False)
    for row in (*found["metrics"], *expected["metrics"]):
        del row["gradient_norm"]  # of policy and value model together
    assert_resumed(found, ZERO3[name])
    assert_same(found, expected, 1e-4)
    assert_whole(folder, found["weights"])


@pytest.mark.parametrize(
    ("path", "kind"), [(FSDP2_FILE, DistributedType.FSDP), (ZERO3_FILE, DistributedType.DEEPSPEED)]
)
def test_accelerate_reads_the_configurations(path, kind):
    loaded = load_config_from_file(str(ROOT / path))
    assert loaded.distributed_type == kind and loaded.mixed_precision == "bf16"
    stage = loaded.fsdp_config.get("fsdp_version"), loaded.deepspeed_config.get("zero_stage")
    assert stage == ((2, None) if kind == DistributedType.FSDP else (None, 3))


def test_a_stopped_run_goes_on_to_what_one_process_ends_with(parents, tmp_path, execution):
    """SIGTERM to the launcher: all processes end their phase, save and leave, in the 30 seconds that it gives them."""
    chosen = case(EMA, {"iterations": 10, "learning_rate": 3e-4, "rollouts_every": 1})
    settings = schema.from_dict(config.TRAINING["ppo"], chosen["settings"])
    expected = runs.execute("ppo", ppo_stage.VERSION, trainer.train, settings, parents, tmp_path / "one", execution)
    for name in ("settings", "execution"):
        runs.write_json(tmp_path / f"{name}.json", chosen[name])
    output = tmp_path / "two"
    arguments = ["-m", "salsa.algorithms.ppo", "--output", output]
    arguments += ["--settings", tmp_path / "settings.json", "--execution", tmp_path / "execution.json"]
    arguments += [text for role, folder in parents.items() for text in ("--parent", f"{role}={folder}")]
    metrics = output / "metrics.jsonl"

    def terminate(process):
        while process.poll() is None and not (metrics.exists() and len(runs.read_jsonl(metrics)) >= 2):
            time.sleep(0.02)
        process.terminate()

    stopped = launched(*arguments, watch=terminate)
    assert stopped.returncode not in (0, -signal.SIGKILL), stopped.output
    assert runs.manifest_of(output) is None and stopped.output.count("run again to go on") == 1
    done = len(runs.read_jsonl(metrics))
    assert [path.name for path in (output / "checkpoints").glob("0*")] == [f"{done:06d}"]

    resumed = launched(*arguments)
    assert resumed.returncode == 0, resumed.output
    manifest = runs.verify(output)
    assert manifest["address"] == expected["address"] and manifest["summary"]["resumed_at"] == [done]
    ours, theirs = (runs.read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    for row, other in zip(comparable(ours), comparable(theirs), strict=True):
        assert other == pytest.approx(row, abs=1e-4)
    ours, theirs = (runs.read_jsonl(tmp_path / name / "rollouts.jsonl") for name in ("one", "two"))
    assert len(ours) == 10 * BATCH
    assert [(row["prompt_id"], row["response"]) for row in theirs] == [
        (row["prompt_id"], row["response"]) for row in ours
    ]

    written = (output / "manifest.json").stat().st_mtime_ns
    again = launched(*arguments)
    assert again.returncode == 0 and again.output.count("already finished") == 1, again.output
    assert (output / "manifest.json").stat().st_mtime_ns == written


def test_uneven_shares_are_refused_in_one_line(parents, tmp_path):
    runs.write_json(tmp_path / "settings.json", case(SOUP, {"mini_batches": 16})["settings"])
    arguments = ["-m", "salsa.algorithms.ppo", "--settings", tmp_path / "settings.json", "--output", tmp_path / "run"]
    arguments += [text for role, folder in parents.items() for text in ("--parent", f"{role}={folder}")]
    refused = launched(*arguments)
    assert refused.returncode == 1
    said = "python -m salsa.algorithms.ppo: 2 processes can't share ppo.batch_size=16 in ppo.mini_batches=16"
    assert refused.output.count(said) == refused.output.count("python -m salsa") == 1, refused.output
    assert not (tmp_path / "run" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("ppo", "moves", "changes", "message"),
    [
        ({"batch_size": 20, "mini_batches": 4}, False, {}, "multiple of 8"),  # mini-batches of 5
        ({}, True, {"distributed_type": DistributedType.FSDP}, "a reference that moves"),
        ({"lora_rank": 2}, False, {"distributed_type": DistributedType.FSDP}, r"ppo\.lora_rank"),
        ({}, False, {"distributed_type": DistributedType.FSDP, "is_fsdp2": False}, "fsdp_version: 2"),
    ],
)
def test_what_several_processes_can_not_do_is_refused(ppo, moves, changes, message):
    usual = {"num_processes": 2, "distributed_type": DistributedType.MULTI_CPU, "is_fsdp2": True}
    processes.check(Ppo(**SMALL), SimpleNamespace(**usual), SimpleNamespace(moves=True), "transformers")
    accelerator, anchor = SimpleNamespace(**usual | changes), SimpleNamespace(moves=moves)
    with pytest.raises(runs.UserError, match=message):
        processes.check(Ppo(**SMALL | ppo), accelerator, anchor, "transformers")
