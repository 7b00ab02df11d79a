"""What of the environment may enter a result: only what our launcher sets, and nothing that changes numbers.

A scheduler, a shell's start-up files or another project leave variables that torch, Accelerate and transformers obey:
they take a run for one of several processes, train in another precision, or choose other kernels. A run's address says
nothing of them, so they are removed: before anything but the standard library is imported (`salsa/__init__.py`), and
again where a run starts (`runs.execute`).

`python -m salsa.workflow.surroundings N COMMAND…` becomes COMMAND, in an environment without them and with
SALSA_PROCESSES=N. It stands before `accelerate launch` (`jobs.launcher`), and before `accelerate launch` or
`torchrun` by hand: what a launcher tells the processes that it starts is believed where there are as many of them as
SALSA_PROCESSES says.

Left alone: paths, tokens, proxies, verbosity, the network of NCCL and Gloo, how memory is allocated, which devices
are seen, how many threads (`execution.threads` says it again), and for which kind of CPU numpy computes
(`OPENBLAS_CORETYPE`), which some machines set so that all of their nodes agree.
"""

import os
import sys

MARK = "SALSA_PROCESSES"  # how many processes our launcher started

# Names, and beginnings of names where they end with "_".
LAUNCHERS = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "CROSS_RANK", "CROSS_SIZE"),
    *("GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("TORCHELASTIC_", "PET_", "ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_", "MEGATRON_LM_", "FORK_LAUNCHED"),
)
SCHEDULERS = (
    *("SLURM_", "PMI_", "PMIX_", "OMPI_", "MV2_", "MPI_", "I_MPI_", "JSM_", "PALS_", "FLUX_"),
    *("SM_FRAMEWORK_PARAMS", "SM_HP_MP_PARAMETERS", "SMDATAPARALLEL_"),
)
NUMBERS = (
    # torch and what it computes with
    *("TORCH_", "TORCHINDUCTOR_", "TORCHDYNAMO_", "PYTORCH_", "ATEN_", "TRITON_", "FLASH_ATTENTION_"),
    *("NVIDIA_TF32_OVERRIDE", "CUBLAS_", "CUBLASLT_", "NCCL_ALGO", "NCCL_PROTO"),
    *("MKL_", "MKLDNN_", "DNNL_", "ONEDNN_", "OMP_", "KMP_DETERMINISTIC_REDUCTION", "KMP_FORCE_REDUCTION"),
    # Hugging Face's and vLLM
    *("TRANSFORMERS_", "TRL_", "USE_TORCH", "USE_TF", "USE_JAX", "USE_FLAX", "USE_TORCH_XLA", "USE_HUB_KERNELS"),
    *("XLA_USE_BF16", "XLA_DOWNCAST_BF16", "VLLM_"),
)
KEPT = (
    "SLURM_JOB_ID",  # by which leases of GPUs are told apart
    *("TORCH_HOME", "TORCH_LOGS", "TORCH_TRACE", "TORCH_CPP_LOG_LEVEL", "TORCH_SHOW_CPP_STACKTRACES", "TORCH_NCCL_"),
    *("TORCH_GLOO_", "TORCH_DISTRIBUTED_DEBUG", "TORCH_FR_", "TORCH_EXTENSIONS_DIR", "TORCH_CUDA_ARCH_LIST"),
    *("TORCHINDUCTOR_CACHE_DIR", "TORCHINDUCTOR_COMPILE_THREADS", "TRITON_CACHE_DIR", "TRITON_HOME"),
    *("TRITON_PTXAS_PATH", "TRITON_LIBCUDA_PATH", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"),
    *("PYTORCH_ALLOC_CONF", "PYTORCH_NVML_BASED_CUDA_CHECK", "PYTORCH_KERNEL_CACHE_PATH"),
    *("MKL_NUM_THREADS", "OMP_NUM_THREADS", "OMP_PROC_BIND", "OMP_PLACES", "OMP_STACKSIZE", "OMP_WAIT_POLICY"),
    *("OMP_DISPLAY_ENV", "TRANSFORMERS_OFFLINE", "TRANSFORMERS_CACHE", "TRANSFORMERS_VERBOSITY"),
    *("TRANSFORMERS_NO_ADVISORY_WARNINGS", "VLLM_CPU_", "VLLM_CACHE_ROOT"),
    *("VLLM_CONFIG_ROOT", "VLLM_LOGGING_", "VLLM_CONFIGURE_LOGGING", "VLLM_NO_USAGE_STATS", "VLLM_DO_NOT_TRACK"),
    *("VLLM_HOST_IP", "VLLM_PORT", "VLLM_TARGET_DEVICE", "VLLM_WORKER_MULTIPROC_METHOD"),
    "VLLM_ENABLE_V1_MULTIPROCESSING",
)

removed = set()  # names that `clean` took from this process's environment


def clean(environment=os.environ):
    """Remove from an environment what must enter no result. Returns the names, sorted."""
    foreign = SCHEDULERS + NUMBERS + (() if launched(environment) else (*LAUNCHERS, MARK))
    names = sorted(name for name in environment if _among(name, foreign) and not _among(name, KEPT))
    for name in names:
        del environment[name]
    if environment is os.environ:
        removed.update(names)
    return names


def launched(environment=os.environ):
    """Whether our launcher started this process, and as many as it says."""
    return MARK in environment and environment[MARK] == environment.get("WORLD_SIZE", "1")


def world():
    """How many processes were started together, and which of them this is; to be asked in a clean environment."""
    return int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))


def warn():
    """Say in one line which variables were removed; nothing of a scheduler's own, which nobody set on purpose."""
    names = sorted(name for name in removed if not _among(name, SCHEDULERS))
    if names:
        what = f"not obeyed, because they would enter results that name no environment: {', '.join(names)}"
        print(f"{what} (see salsa/workflow/surroundings.py)", file=sys.stderr, flush=True)


def _among(name, names):
    return any(name.startswith(known) if known.endswith("_") else name == known for known in names)


def main(arguments):
    """`N COMMAND…`: become COMMAND, in a clean environment that is marked as that of N processes."""
    if len(arguments) < 2 or not arguments[0].isdigit():
        sys.exit("usage: python -m salsa.workflow.surroundings N COMMAND…")
    clean()
    os.environ.pop(MARK, None)
    os.environ[MARK] = arguments[0]
    try:
        os.execvp(arguments[1], arguments[1:])
    except OSError as error:
        sys.exit(f"salsa: {arguments[1]}: {error.strerror}")


if __name__ == "__main__":
    main(sys.argv[1:])
