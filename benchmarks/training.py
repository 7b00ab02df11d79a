#!/usr/bin/env python3
"""Time iterations of PPO, RLOO or GRPO by phase, on random weights and prompts: the work counts, not what is learned.

    python benchmarks/training.py --geometry tiny --batch 64 --prompt-length 24 --response-length 48 --epochs 4

    accelerate launch --multi_gpu --num_processes 2 benchmarks/training.py --threads 1 …

    python benchmarks/training.py --algorithm grpo --epochs 1 --threads 2 --peer ../shared/bench/trl_online_peer.py

It runs `Trainer.iterate` as a study does, with sft0 as the reference, one mini-batch an epoch. No end token is ever
sampled, so that every response has the full length. `--json` ends with one line of JSON alone. `--peer` runs a script
that takes the same work as options, and prints such a line, in turn with this one: seconds and memory of both.

Left out: what surrounds the iterations (loading, checkpoints, writing), and learning.
"""

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

sys.path.insert(0, str(Path(__file__).parent.parent))

from salsa import algorithms
from salsa.rl import forward, linear, models, networks, processes, reference, trainer
from salsa.workflow import config

GEOMETRIES = {
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    },
    "smollm2_135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "llama_1b": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
    "llama2_7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "tie_word_embeddings": False,
    },
}
PHASES = ("rollout", "score", "reference", "value", "optimise")
SAME_WORK = ("geometry", "batch", "prompt_length", "response_length", "epochs", "updates")  # options of peers, too


def main():
    arguments = parse()
    if arguments.peer:
        compare(arguments)
    else:
        measure(arguments)


def compare(arguments):
    """Run this script and a peer in turn, and print the seconds and the memory of both."""
    names = [*SAME_WORK, *["algorithm", "samples"] * (arguments.algorithm != "ppo")]
    work = [text for name in names for text in (f"--{name.replace('_', '-')}", str(getattr(arguments, name)))]
    own = [sys.executable, __file__, "--algorithm", arguments.algorithm, "--json", *work]
    peer = [arguments.peer_python or sys.executable, arguments.peer, *work]
    for number in range(arguments.rounds):
        ours, theirs = (result_of(command, arguments.threads) for command in (own, peer))
        seconds, others = (result["seconds_per_update"] for result in (ours, theirs))
        print(
            f"round {number + 1}: {seconds:.3f} s and {ours['peak_rss_gib']:.2f} GiB an update; {theirs['peer']} "
            f"{others:.3f} s and {theirs['peak_gib']:.2f} GiB; {others / seconds:.2f} times as fast",
            flush=True,
        )


def result_of(command, threads):
    """The line of JSON that a command ends with; it gets a number of threads where one is given."""
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(arguments):
    """Time the updates that the arguments ask for, and print what they took."""
    torch.manual_seed(0)
    execution = config.Execution(
        device=arguments.device,
        threads=arguments.threads or torch.get_num_threads(),
        micro_batch=arguments.micro_batch or arguments.batch,
        rollout_batch=arguments.rollout_batch or arguments.batch,
        gradient_checkpointing=arguments.gradient_checkpointing,
        compile=arguments.compile,
        gpus=1,
    )
    device = models.prepare_process(execution)
    made = make_trainer(arguments, execution, device)
    length = arguments.prompt_length
    vocabulary = GEOMETRIES[arguments.geometry]["vocab_size"]
    seconds, phases = [], []
    rate = matrix_rate(device, torch.bfloat16 if arguments.bf16 else torch.float32)
    for update in range(arguments.updates):
        prompts = torch.randint(3, vocabulary, (made.section.prompts, length)).tolist()
        start = time.perf_counter()
        found, _, _ = made.iterate(update, [f"{update}/{i}" for i in range(len(prompts))], prompts)
        made.progress.iteration = update + 1
        seconds.append(time.perf_counter() - start)
        phases.append({name: found[f"seconds_{name}"] for name in PHASES if f"seconds_{name}" in found})
        made.accelerator.print(f"update {update}: {seconds[-1]:.3f} s", file=sys.stderr, flush=True)
    peak = resident_peak()  # before the operations are counted, which takes memory of its own
    processes = made.accelerator.num_processes
    peak = sum(made.accelerator.gather(torch.tensor([peak], device=made.device)).tolist())
    counts = processes == 1 and not arguments.compile  # which torch's counter sees
    operations = count_operations(made, arguments, vocabulary) if counts else None
    if not made.accelerator.is_main_process:
        return
    median = statistics.median(seconds[1:] or seconds)
    tokens = arguments.batch * arguments.response_length
    result = {
        "algorithm": arguments.algorithm,
        **{name: getattr(arguments, name) for name in ("geometry", "batch", "prompt_length", "response_length")},
        **{name: getattr(arguments, name) for name in ("epochs", "bf16", "compile")},
        "samples": made.section.samples,
        "value_model": made.section.value_model,
        "micro_batch": execution.micro_batch,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "processes": processes,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "seconds_per_update": round(median, 4),
        "phases": {name: round(statistics.median([p[name] for p in phases[1:] or phases]), 4) for name in phases[0]},
        "all_seconds": [round(s, 3) for s in seconds],
        "tokens_per_second": round(tokens / median, 1),
        "peak_rss_gib": round(peak, 3),
        "peak_gpu_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if device.type == "cuda" else None,
        "matrix_gflops_per_second": round(rate / 1e9, 1),
        "matrix_gflop_per_update": operations and round(operations / 1e9, 1),
        "fraction_of_matrix_rate": operations and round(operations / median / rate, 3),
    }
    if not arguments.json:
        show(result)
    print(json.dumps(result))


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithm", choices=("ppo", "rloo", "grpo"), default="ppo")
    parser.add_argument("--geometry", choices=GEOMETRIES, default="tiny")
    parser.add_argument("--batch", type=int, default=64, help="responses an update")
    parser.add_argument("--samples", type=int, default=4, help="responses a prompt, of rloo and grpo")
    parser.add_argument("--prompt-length", type=int, default=24)
    parser.add_argument("--response-length", type=int, default=48)
    parser.add_argument("--epochs", type=int, default=4, help="epochs, one mini-batch each")
    parser.add_argument("--updates", type=int, default=6, help="the first one is left out of the medians")
    parser.add_argument("--micro-batch", type=int, help="sequences a forward pass; default: the batch")
    parser.add_argument("--rollout-batch", type=int, help="sequences sampled at once; default: the batch")
    parser.add_argument("--value-model", choices=("reward_model", "shared"), default="reward_model")
    parser.add_argument("--bf16", action="store_true", help="mixed_precision: bf16")
    parser.add_argument("--compile", action="store_true", help="execution.compile")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--peer", help="a script to be timed in turn with this one")
    parser.add_argument("--peer-python", help="the interpreter that runs it; default: this one")
    parser.add_argument("--rounds", type=int, default=3, help="of this script and the peer")
    parser.add_argument("--json", action="store_true", help="nothing but the line of JSON on standard output")
    return parser.parse_args()


def make_trainer(arguments, execution, device):
    """A Trainer whose models have random weights, and in which no token ends a response."""
    llama = LlamaConfig(
        max_position_embeddings=arguments.prompt_length + arguments.response_length + 8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        **{"tie_word_embeddings": True, **GEOMETRIES[arguments.geometry]},
    )
    frozen = torch.bfloat16 if arguments.bf16 else torch.float32
    policy = linear.accelerate(LlamaForCausalLM(llama))
    sft0 = linear.accelerate(LlamaForCausalLM(llama)).to(device, frozen).eval()
    sft0.load_state_dict(policy.state_dict())
    reward_model = forward.ScoreModel(classifier(llama)).to(device, frozen).eval().requires_grad_(False)
    own = {"value_model": arguments.value_model} if arguments.algorithm == "ppo" else {"samples": arguments.samples}
    section = algorithms.kinds()[arguments.algorithm].settings(
        iterations=arguments.updates,
        batch_size=arguments.batch,
        epochs=arguments.epochs,
        mini_batches=1,
        learning_rate=1e-5,
        **own,
    )
    if section.value_model == "reward_model":
        value_model = forward.ScoreModel(classifier(llama))
    else:
        value_model = networks.value_model(section.value_model, policy, None)
    anchor = reference.Reference([sft0], {"kind": "soup", "weights": ["1"]})
    settings = config.TRAINING[arguments.algorithm](
        0,
        0.05,
        ["1"],
        config.Reference("soup", ["1"]),
        section,
        config.Lengths(arguments.prompt_length, arguments.response_length),
        "bf16" if arguments.bf16 else "no",
    )
    output = Path(tempfile.gettempdir())  # where nothing is written
    accelerator = processes.make_accelerator(settings, device, execution)
    participants = trainer.Participants(policy, value_model, reward_model, anchor, sft0)
    tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=None)
    return trainer.Trainer(settings, participants, tokenizer, accelerator, execution, output)


def classifier(llama):
    one_label = LlamaConfig(**{**llama.to_dict(), "num_labels": 1, "id2label": {0: "reward"}})
    return linear.accelerate(LlamaForSequenceClassification(one_label))


def matrix_rate(device, dtype):
    """Floating-point operations a second of a large matrix product: the processor's measured best."""
    size = 8192 if device.type == "cuda" else 4096
    a = torch.randn(size, size, device=device, dtype=dtype)
    by_onednn = linear.worthwhile() and device.type == "cpu" and dtype == torch.float32
    multiply = linear.product if by_onednn else torch.matmul  # as linear layers do
    best = float("inf")
    for _ in range(6):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        multiply(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def count_operations(made, arguments, vocabulary):
    """Floating-point operations of the matrix products of one update, counted by torch."""
    prompts = torch.randint(3, vocabulary, (made.section.prompts, arguments.prompt_length)).tolist()
    made.section.iterations += 1
    by_onednn = {torch.ops.mkldnn._linear_pointwise: linear_operations}
    with FlopCounterMode(display=False, custom_mapping=by_onednn) as counter:
        made.iterate(arguments.updates, [f"counted/{i}" for i in range(len(prompts))], prompts)
    return counter.get_total_flops()


def linear_operations(inputs, weight, *_, **__):
    """Floating-point operations of a product of inputs (…, I) and weight (O, I)ᵀ, from these shapes."""
    return 2 * math.prod(inputs) * weight[0]


def resident_peak():
    """Largest resident memory of this process, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def show(result):
    seconds = result["seconds_per_update"]
    what = f"{result['algorithm']}, {result['geometry']}"
    print(f"{what}: {seconds:.3f} s an update, {result['tokens_per_second']} tokens/s")
    for name, part in result["phases"].items():
        print(f"  {name:10s} {part:8.3f} s  {part / seconds:6.1%}")


if __name__ == "__main__":
    main()
