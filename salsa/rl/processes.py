"""Several processes that train one policy.

Accelerate averages their gradients (DDP) or shards weights (FSDP2, DeepSpeed's ZeRO-3). Each process samples and reads
its share of the batch, and `gather` then gives all of them the whole batch.
"""

import contextlib

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs
from transformers.integrations import unset_hf_deepspeed_config

from salsa import algorithms
from salsa.rl.forward import Sequences
from salsa.workflow import runs
from salsa.workflow.messages import UserError

SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)


def make_accelerator(settings, device, execution):
    """The Accelerator of a run."""
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False),  # which never change
            InitProcessGroupKwargs(timeout=runs.PATIENCE),
        ],
        mixed_precision=settings.mixed_precision,
    )
    keep_precision(accelerator)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config["train_micro_batch_size_per_gpu"] = execution.micro_batch
        # DeepSpeed clips both networks together.
        config["gradient_clipping"] = algorithms.section_of(settings).max_grad_norm
        unset_hf_deepspeed_config()  # or transformers would shard every model that it loads, frozen ones too
    return accelerator


def keep_precision(accelerator):
    """Where FSDP2 shards weights and computes in bfloat16, sum gradients in float32, and do not round inputs."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin and plugin.mixed_precision_policy:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        # Accelerate's policy would round sampling noise and log-probabilities, too.
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )


def check_batch(section, accelerator):
    """Raise UserError where the processes can't share a batch evenly. `section`: policy_gradient.Settings."""
    processes, name = accelerator.num_processes, section.section
    if processes > 1 and section.batch_size % (processes * section.mini_batches):
        raise UserError(
            f"{processes} processes can't share {name}.batch_size={section.batch_size} in {name}.mini_batches="
            f"{section.mini_batches} evenly; make it a multiple of {processes * section.mini_batches}"
        )


def check(section, accelerator, anchor, rollouts):
    """Raise UserError where the settings of a run do not fit how it was started."""
    check_batch(section, accelerator)
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise UserError("FSDP's first version is not supported; set fsdp_version: 2 in Accelerate's configuration")
    if accelerator.distributed_type in SHARDED and (anchor.moves or section.lora_rank or rollouts == "vllm"):
        raise UserError(
            f"{accelerator.distributed_type.value} shards the policy's weights: a reference that moves, "
            f"{section.section}.lora_rank and execution.rollouts=vllm need them whole; start the run without it"
        )


def sharded(accelerator):
    """Whether each process holds a part of the policy's weights."""
    return accelerator.distributed_type in SHARDED


def whole_state(accelerator, networks):
    """The state dictionary of sharded networks, gathered by all processes; None where each holds all weights."""
    return accelerator.get_state_dict(networks) if sharded(accelerator) else None


def share(accelerator, count):
    """The rows of a batch of `count` that this process samples and reads."""
    size = count // accelerator.num_processes
    return slice(accelerator.process_index * size, (accelerator.process_index + 1) * size)


def gather(accelerator, sequences, tensors, pad_id):
    """The whole batch, from the shares of all processes: Sequences, and tensors with a row for each."""
    if accelerator.num_processes == 1:
        return sequences, tensors
    width = sequences.prompt_length

    def all_rows(values, first=False, fill=0):
        if values.dim() > 1:
            values = accelerator.pad_across_processes(values, dim=values.dim() - 1, pad_index=fill, pad_first=first)
        return accelerator.gather(values.contiguous())

    tokens = [
        torch.cat([all_rows(x[:, :width], True, fill), all_rows(x[:, width:], False, fill)], dim=1)
        for x, fill in ((sequences.tokens, pad_id), (sequences.attention_mask, 0))
    ]
    gathered = Sequences(*tokens, all_rows(sequences.response_mask), all_rows(sequences.ended))
    return gathered, {name: all_rows(values) for name, values in tensors.items()}


def gradients_kept(accelerator, networks, last):
    """A context in which each process adds up its own gradients, until the last micro-batch of a mini-batch.

    Sharded gradients are always exchanged, because no process has room for the gradients of all weights.
    """
    accelerator.sync_gradients = last  # when DeepSpeed takes its step
    return contextlib.nullcontext() if last or sharded(accelerator) else accelerator.no_sync(networks)


@contextlib.contextmanager
def gathered(networks):
    """A context in which each process holds all weights that it samples with, though `networks` is sharded.

    Layers are gathered once instead of at every token. They have to be: each process samples until its own responses
    have ended, and gathering takes all processes.
    """
    if hasattr(networks, "zero_optimization_partition_weights"):  # DeepSpeed's engine
        with _gathered_by_deepspeed(networks):
            yield
        return
    # FSDP2's modules are known by a method: the import of their class takes a second.
    layers = [m for m in networks.modules() if hasattr(m, "set_reshard_after_forward") and m is not networks]
    for layer in layers:
        layer.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for layer in layers:
            layer.set_reshard_after_forward(True, recurse=False)
            layer.reshard()


@contextlib.contextmanager
def _gathered_by_deepspeed(engine):
    """A context with all weights of ZeRO-3, without the hooks that would shard each layer again after its pass."""
    if not engine.zero_optimization_partition_weights():
        yield
        return
    import deepspeed  # an optional dependency

    networks, shards = engine.module, engine.optimizer.parameter_offload
    sampling = networks if networks.shared else networks.policy
    with deepspeed.zero.GatheredParameters(list(sampling.parameters())):
        # As TRL does (trl.models.utils), whose functions are private.
        for parameter in networks.parameters():
            parameter.ds_active_sub_modules.clear()
        for hook in [*shards.forward_hooks, *shards.backward_hooks]:
            hook.remove()
        shards.forward_hooks, shards.backward_hooks = [], []
        yield
        if not shards.param_coordinator.is_invalid_trace():
            shards.param_coordinator._invalidate_trace()
        shards._register_deepspeed_module(shards.module)
