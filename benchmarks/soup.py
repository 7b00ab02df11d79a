#!/usr/bin/env python3
"""Time a grid of soups of two models, in one command, against mergekit.

    python benchmarks/soup.py --gib 1.4 --points 11 --mergekit /path/to/bin/mergekit-yaml

It writes two random models in the shape of a Llama (bfloat16, in shards), then runs, in turn and each in a new process,
`python -m salsa.soup` for the whole grid, mergekit's linear merge for one point, whose time counts `--points` times,
and `mergekit-multi`, beside mergekit-yaml, for the whole grid. Every value of every soup is read back and compared with
the float32 average, rounded once. What it wrote it removes. The last line is JSON. It needs (points + 2) x gib of disk.

Left out: a cold disk. The ingredients are read before each run, so that every program finds them in the page cache.
"""

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent
SHARD = 2**29  # bytes
PIECE = 2**22  # numbers compared at once
MERGEKIT = ["--no-copy-tokenizer", "--quiet"]
# Runs a command. A process's peak memory counts that of the process which started it, so that one has to be small.
LAUNCHER = """
import json, os, subprocess, sys, time
os.sync()  # what came before is none of its
start = time.perf_counter()
child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
seconds = time.perf_counter() - start
counts = dict(line.split(": ") for line in open(f"/proc/{child.pid}/io").read().splitlines())
_, status, usage = os.wait4(child.pid, 0)
os.sync()
print(json.dumps({
    "seconds": round(seconds, 2),
    "seconds_to_disk": round(time.perf_counter() - start, 2),
    "processor_seconds": round(usage.ru_utime + usage.ru_stime, 2),
    "peak_rss_mb": round(usage.ru_maxrss * 1024 / 1e6),
    "bytes_read": int(counts["rchar"]),
}))
sys.exit(os.waitstatus_to_exitcode(status) != 0)
"""


def main():
    arguments = parse()
    config = llama(arguments.gib, arguments.vocabulary)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    free, needed = shutil.disk_usage(arguments.folder).free, (arguments.points + 2) * parameters(config) * 2
    if free < needed:
        sys.exit(f"{arguments.folder}: needs {needed / 1e9:.3g} GB, {free / 1e9:.3g} GB are free; choose --folder")
    alphas = [round(i / (arguments.points - 1), 6) for i in range(arguments.points)]
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="soups-") as folder:
        folder = Path(folder)
        models = [write_model(config, folder / name, seed) for seed, name in enumerate(("a", "b"))]
        size = sum(path.stat().st_size for model in models for path in model.glob("*.safetensors"))
        idle = measured([sys.executable, "-m", "salsa.soup", "--help"])["bytes_read"]
        programs = {"salsa": lambda: our_grid(models, alphas, folder / "soups")}
        if arguments.mergekit:
            multi = Path(arguments.mergekit).with_name("mergekit-multi")
            alpha = alphas[arguments.points // 3]
            programs["mergekit_yaml"] = lambda: their_merge(models, alpha, folder, arguments.mergekit)
            programs["mergekit_multi"] = lambda: their_grid(models, alphas, folder, multi)
        runs = {who: [] for who in programs}
        for _ in range(arguments.peer_runs):
            for who, program in programs.items():
                into_cache(models)
                run = program()
                if who == "salsa":
                    run["ingredients_read"] = round((run["bytes_read"] - idle) / size, 3)
                runs[who].append(run)
                print(who, *(f"{name} {value}" for name, value in run.items()), sep=", ", file=sys.stderr, flush=True)
    print(json.dumps(result(arguments, parameters(config), runs)))
    if any(run["values_differing"] for run in runs["salsa"]):
        sys.exit("values differ from the float32 average")


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.4, help="size of a model, about")
    parser.add_argument("--points", type=int, default=11, help="soups in the grid, from alpha 0 to 1")
    parser.add_argument("--peer-runs", type=int, default=2, help="runs of each program, in turn")
    parser.add_argument("--vocabulary", type=int, default=32000, help="rows of the embedding and of the head")
    parser.add_argument("--mergekit", metavar="PROGRAM", help="mergekit-yaml; without it only ours is timed")
    parser.add_argument("--folder", type=Path, default=tempfile.gettempdir(), help="where to write")
    arguments = parser.parse_args()
    if arguments.points < 2:
        parser.error("--points: a grid has 2 at least")
    return arguments


def llama(gib, vocabulary):
    """The configuration of a Llama of about this size in bfloat16, with one layer at least."""
    shape = {"vocab_size": vocabulary, "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32}
    sizes = [parameters(LlamaConfig(**shape, num_hidden_layers=layers)) for layers in (0, 1)]
    layers = max(1, round((gib * 2**29 - sizes[0]) / (sizes[1] - sizes[0])))
    return LlamaConfig(**shape, num_hidden_layers=layers, dtype="bfloat16", architectures=["LlamaForCausalLM"])


def tensor_shapes(config):
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}


def parameters(config):
    return sum(shape.numel() for shape in tensor_shapes(config).values())


def write_model(config, folder, seed):
    """A model folder of random weights, without a tokenizer."""
    generator, shards = torch.Generator().manual_seed(seed), [{}]
    for name, shape in tensor_shapes(config).items():
        if sum(s.numel() * 2 for s in shards[-1].values()) > SHARD:
            shards.append({})
        shards[-1][name] = shape
    config.save_pretrained(folder)
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: (0.02 * torch.randn(shape, generator=generator)).bfloat16() for name, shape in shard.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": parameters(config) * 2}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def into_cache(models):
    buffer = bytearray(2**24)
    for path in (path for model in models for path in model.glob("*.safetensors")):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def our_grid(models, alphas, folder):
    command = [sys.executable, "-m", "salsa.soup", *models]
    for alpha in alphas:
        command += ["--weights", weight(1 - alpha), weight(alpha), "--output", folder / f"{alpha:g}"]
    run = measured(command)
    run["values_differing"] = sum(differing(models, alpha, folder / f"{alpha:g}") for alpha in alphas)
    shutil.rmtree(folder)
    return run


def their_merge(models, alpha, folder, program):
    """One linear merge by mergekit."""
    (folder / "recipe.yaml").write_text(recipe(models, alpha))
    run = measured([program, folder / "recipe.yaml", folder / "merged", *MERGEKIT])
    run["values_differing"] = differing(models, alpha, folder / "merged")
    shutil.rmtree(folder / "merged")
    return run


def their_grid(models, alphas, folder, program):
    """All linear merges by mergekit in one process, which reads the models for each anew."""
    (folder / "recipes.yaml").write_text("\n---\n".join(recipe(models, alpha, name=f"{alpha:g}") for alpha in alphas))
    run = measured([program, folder / "recipes.yaml", "--intermediate-dir", folder / "merged", *MERGEKIT])
    run["values_differing"] = sum(differing(models, alpha, folder / "merged" / f"{alpha:g}") for alpha in alphas)
    shutil.rmtree(folder / "merged")
    return run


def recipe(models, alpha, **more):
    """What mergekit is told, as JSON, which is YAML."""
    weights = [
        {"model": str(model), "parameters": {"weight": float(weight(value))}}
        for model, value in zip(models, (1 - alpha, alpha), strict=True)
    ]
    return json.dumps({"merge_method": "linear", "models": weights, "dtype": "bfloat16", **more})


def weight(value):
    return f"{value:.6g}"


def measured(command):
    """Run a command in a new process: its seconds, the seconds until all is on the disk, peak memory, bytes it read.

    Bytes read are those of system calls; a file that is mapped into memory is none.
    """
    done = subprocess.run(
        [sys.executable, "-I", "-c", LAUNCHER, *map(str, command)], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{command[0]} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)


def files_of(folder):
    """Tensor name -> open file."""
    files = [safe_open(path, framework="pt") for path in sorted(folder.glob("*.safetensors"))]
    return {name: file for file in files for name in file.keys()}  # noqa: SIM118 (an open file is no dictionary)


def differing(models, alpha, merged):
    """How many values of a merged model aren't the float32 average of whole tensors, rounded once."""
    first, second, found = map(files_of, (*models, merged))
    if first.keys() != found.keys():
        sys.exit(f"{merged}: other tensors than the ingredients': {sorted(first.keys() ^ found.keys())[:3]}")
    count = 0
    for name in first:
        a, b, soup = (files[name].get_tensor(name).flatten().split(PIECE) for files in (first, second, found))
        for x, y, z in zip(a, b, soup, strict=True):
            average = (x.float() * float(weight(1 - alpha))).add_(y.float(), alpha=float(weight(alpha)))
            count += int((average.to(x.dtype) != z).sum())
    return count


def result(arguments, numbers, runs):
    """Everything measured; times of mergekit's grid over ours are of medians."""
    found = {
        **{name: getattr(arguments, name) for name in ("points", "vocabulary")},
        "gib": round(numbers / 2**29, 3),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **runs,
    }
    for what in ("seconds", "seconds_to_disk"):
        median = {who: statistics.median(run[what] for run in made) for who, made in runs.items()}
        if arguments.mergekit:
            found[f"{what}_mergekit_yaml_to_ours"] = round(
                median["mergekit_yaml"] * arguments.points / median["salsa"], 2
            )
            found[f"{what}_mergekit_multi_to_ours"] = round(median["mergekit_multi"] / median["salsa"], 2)
    return found


if __name__ == "__main__":
    main()
