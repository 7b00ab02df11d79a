"""The records of a training run: metrics, kept rollouts, seconds and memory."""

import resource
import time

import torch

from salsa.data import chat
from salsa.workflow import runs
from salsa.workflow.messages import UserError


class Record:
    """The rows of metrics.jsonl (one per iteration) and of rollouts.jsonl (the responses of some iterations, as text).

    Args:
        output: the run's folder.
        iteration: the iteration with which the run goes on; rows of it and of later ones are dropped.
        writes: whether this process writes.
        rollouts_every: iterations between kept rollouts.

    Raises UserError where rows of earlier iterations are missing.
    """

    def __init__(self, output, iteration, writes, rollouts_every):
        self.output, self.writes = output, writes
        self.metrics, self.rollouts = (
            _before(output / name, iteration) for name in ("metrics.jsonl", "rollouts.jsonl")
        )
        incomplete = None
        if not {row["iteration"] for row in self.rollouts} >= set(range(0, iteration, rollouts_every)):
            incomplete = "rollouts.jsonl"
        if [row["iteration"] for row in self.metrics] != list(range(iteration)):
            incomplete = "metrics.jsonl"
        if incomplete:
            raise UserError(
                f"{output / incomplete}: lacks rows before iteration {iteration}, with which the checkpoint goes on; "
                f"remove {output} and run again"
            )

    def add(self, metrics, rollouts=()):
        """Write the metrics of an iteration, and its rollouts where they are kept."""
        self.metrics.append(metrics)
        self.rollouts += rollouts
        if not self.writes:
            return
        runs.write_jsonl(self.output / "metrics.jsonl", self.metrics)
        if rollouts:
            runs.write_jsonl(self.output / "rollouts.jsonl", self.rollouts)


def _before(path, iteration):
    """The rows of a file that belong to iterations before the given one."""
    rows = runs.read_jsonl(path) if iteration and path.is_file() else []
    return [row for row in rows if isinstance(row, dict) and row.get("iteration", iteration) < iteration]


def rollout_rows(iteration, rows, sequences, per_response, tokenizer):
    """The rows of rollouts.jsonl for the responses of one iteration, as many to each of the prompts `rows`."""
    numbers = {name: per_response[name].tolist() for name in ("score", "kl_to_reference", "kl_to_sft0")}
    samples = len(sequences) // len(rows)
    responses = []
    for place, text in enumerate(chat.decode(tokenizer, sequences)):
        row, sample = rows[place // samples], {"sample": place % samples} if samples > 1 else {}
        told = {"iteration": iteration, "prompt_id": row["id"], **sample, "prompt": row["prompt"], "response": text}
        responses.append(told | {name: values[place] for name, values in numbers.items()})
    return responses


def explained_variance(values, returns, mask):
    """1 − Var(returns − values) / Var(returns) over the mask: 1 is a perfect value model, 0 a constant one."""
    mask = mask.bool()
    variance = returns[mask].var(unbiased=False)
    return (1 - (returns - values)[mask].var(unbiased=False) / variance.clamp(min=1e-8)).item()


def peak_memory(device):
    """The peak memory of this process in MiB, on a GPU or (resident) on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Clock:
    """Measures the seconds of each phase of an iteration."""

    def __init__(self, device):
        self.device, self.laps = device, {}
        self.start = self.last = time.perf_counter()

    def lap(self, name):
        """End the phase `name`."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # kernels run on after their call returns
        now = time.perf_counter()
        self.laps[f"seconds_{name}"], self.last = now - self.last, now

    def seconds(self):
        """Name -> seconds of each phase, and of all."""
        return {**self.laps, "seconds": self.last - self.start}
