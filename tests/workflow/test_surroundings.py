"""What a shell, a scheduler or another project left in the environment enters no result."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import EXECUTION

from salsa import sft
from salsa.rl import models
from salsa.workflow import config, jobs, runs, surroundings

ROOT = Path(__file__).resolve().parents[2]
SCHEDULER = {
    "WORLD_SIZE": "2",
    "RANK": "1",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "NODE_RANK": "0",
    "GROUP_RANK": "0",
    "MASTER_ADDR": "node7",
    "MASTER_PORT": "29511",
    "SLURM_PROCID": "1",
    "SLURM_NTASKS": "2",
    "PMI_RANK": "1",
    "PMI_SIZE": "2",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "MV2_COMM_WORLD_SIZE": "2",
    "MPI_LOCALNRANKS": "2",
    "TORCHELASTIC_RUN_ID": "none",
    "PET_NNODES": "2",
}
SHELL = {
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
    "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_USE_CPU": "true",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    "ACCELERATE_TORCH_DEVICE": "meta",
    "FSDP_VERSION": "1",
    "PARALLELISM_CONFIG_TP_SIZE": "2",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "TORCHINDUCTOR_MAX_AUTOTUNE": "1",
    "PYTORCH_TENSOREXPR": "0",
    "NVIDIA_TF32_OVERRIDE": "1",
    "CUBLAS_WORKSPACE_CONFIG": ":16:8",
    "FLASH_ATTENTION_DETERMINISTIC": "1",
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_DEFAULT_FPMATH_MODE": "BF16",
    "MKL_CBWR": "COMPATIBLE",
    "OMP_DYNAMIC": "true",
    "OMP_THREAD_LIMIT": "1",
    "TRANSFORMERS_SDPA_FORCE_GQA": "1",
    "USE_HUB_KERNELS": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
}
FINE = {
    "CUDA_VISIBLE_DEVICES": "0,3",
    "HF_HOME": "/models",
    "HF_HUB_OFFLINE": "1",
    "HF_TOKEN": "secret",
    "NCCL_SOCKET_IFNAME": "ib0",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_CORETYPE": "Haswell",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    "SLURM_JOB_ID": "17",
    "TORCHINDUCTOR_CACHE_DIR": "/scratch",
    "TRANSFORMERS_OFFLINE": "1",
    "WANDB_API_KEY": "secret",
}


def test_only_what_changes_nothing_stays():
    environment = FINE | SCHEDULER | SHELL
    assert surroundings.clean(environment) == sorted(SCHEDULER | SHELL)
    assert environment == FINE
    assert surroundings.clean(environment) == []


def test_what_our_launcher_says_is_believed_and_nothing_else():
    ours = {
        name: SCHEDULER[name] for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
    }
    ours |= {"ACCELERATE_MIXED_PRECISION": "no", "FSDP_VERSION": "2"}
    environment = ours | {surroundings.MARK: "2", "PMI_SIZE": "4", "MKL_CBWR": "AVX"}
    surroundings.clean(environment)
    assert environment == ours | {surroundings.MARK: "2"}
    environment[surroundings.MARK] = "4"  # left of another launch
    surroundings.clean(environment)
    assert environment == {}


def environment_of(tmp_path, *command):
    """The environment that a command leaves to what it becomes, which prints it."""
    started = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)} | FINE
    shown = []
    for foreign in ({}, SCHEDULER | SHELL):
        done = subprocess.run(
            [sys.executable, "-m", *command, "env"], env=started | foreign, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0 and not done.stderr, done.stderr
        shown.append(dict(line.split("=", 1) for line in done.stdout.splitlines()))
    assert shown[0] == shown[1]
    return shown[0]


def test_modules_and_what_they_start_see_nothing_foreign(tmp_path):
    leased = environment_of(tmp_path, "salsa.workflow.gpus", "1")  # as any module does, before it imports anything
    assert leased["CUDA_VISIBLE_DEVICES"] == "0" and leased["HF_HOME"] == "/models"
    assert environment_of(tmp_path, "salsa.workflow.surroundings", "2")["SALSA_PROCESSES"] == "2"


def test_several_processes_do_not_depend_on_the_users_configuration_of_accelerate(monkeypatch, tmp_path):
    launch = pytest.importorskip("accelerate.commands.launch")
    run = SimpleNamespace(
        stage="sft",
        execution={"processes": 2, "accelerate_config": "", "gpus": 0},
        settings={"mixed_precision": "no"},
    )
    _, _, words = jobs.launcher(run).partition("accelerate launch ")
    file = tmp_path / "default_config.yaml"
    file.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: DEEPSPEED\nmachine_rank: 1\nnum_machines: 2\n"
        "num_processes: 4\nmixed_precision: bf16\ngpu_ids: '0'\nuse_cpu: true\nmain_process_ip: 10.0.0.1\n"
        "deepspeed_config: {zero_stage: 2}\n"
    )
    monkeypatch.delenv("OMP_NUM_THREADS")
    chosen = []
    for default in ("missing.yaml", str(file)):
        monkeypatch.setattr(launch, "default_config_file", default)
        monkeypatch.setattr("accelerate.commands.config.config_args.default_yaml_config_file", default)
        arguments = launch.launch_command_parser().parse_args([*words.split(), "-m", "salsa.sft"])
        chosen.append(vars(launch._validate_launch_command(arguments)[0]))
    assert chosen[0] == chosen[1]
    assert chosen[0]["multi_gpu"] and (chosen[0]["num_processes"], chosen[0]["machine_rank"]) == (2, 0)


def test_a_run_in_foreign_surroundings_is_the_same_run(prepare_run, base_run, tmp_path):
    """A whole SFT run as a process in them, against one in this process."""
    settings = config.SftSettings(1, config.Sft(epochs=1, batch_size=24, learning_rate=1e-3), config.Lengths(64, 44))
    runs.write_json(tmp_path / "settings.json", dataclasses.asdict(settings))
    runs.write_json(tmp_path / "execution.json", dataclasses.asdict(EXECUTION))
    words = ["--settings", tmp_path / "settings.json", "--execution", tmp_path / "execution.json"]
    words += ["--parent", f"prepare={prepare_run}", "--parent", f"base={base_run}", "--output", tmp_path / "foreign"]
    done = subprocess.run(
        [sys.executable, "-m", "salsa.sft", *words],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | SCHEDULER | SHELL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    parents = {"prepare": prepare_run, "base": base_run}
    clean = runs.execute("sft", sft.VERSION, sft.train, settings, parents, tmp_path / "clean", EXECUTION)
    foreign = runs.verify(tmp_path / "foreign")
    assert clean["address"] == foreign["address"] and clean["summary"] == foreign["summary"]
    weights = "model/model.safetensors"
    assert clean["artefacts"][weights] == foreign["artefacts"][weights]
    told = [line for line in done.stderr.splitlines() if line.startswith("not obeyed")]
    assert len(told) == 1 and "ACCELERATE_MIXED_PRECISION, " in told[0] and "SLURM" not in told[0]


def test_precision_is_set_and_not_inherited():
    import torch

    torch.set_float32_matmul_precision("medium")
    models.prepare_process(EXECUTION)
    assert torch.get_float32_matmul_precision() == "highest"
