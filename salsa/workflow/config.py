"""The schema of the whole configuration: pydantic dataclasses that name each setting, bound it, and say what it means.

Every value has one home: `conf/` holds the values, this module their names, types and bounds; the settings of a kind
(of world, benchmark, judge, reference, algorithm) stand in the kind's own file. Rules over several settings of a
section are its validators; what depends on several sections stands in `salsa.workflow.checks`. Stages receive the
smallest dataclass that determines their result, so that two runs with equal settings are the same run. What is
execution only (threads, device, micro-batch) lives in `Execution` and is never part of a run's address.

Numerics that read these settings run where neither Hydra nor Snakemake is installed: neither is imported here.
"""

import re
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import model_validator

from salsa import algorithms, anchors, data, judges, mixes
from salsa.algorithms import DEFAULT
from salsa.workflow import bounds, schema
from salsa.workflow.schema import (
    ADDED,
    ALWAYS,
    MOST,
    PATH,
    Alphas,
    Batch,
    EntryName,
    Items,
    Kind,
    KlCoef,
    KlCoefs,
    KlSchedule,
    Label,
    Labels,
    LearningRate,
    LoraAlpha,
    LoraRank,
    Part,
    Path,
    Precision,
    Prose,
    Range,
    ReadBy,
    Seed,
    Share,
    Switch,
    Temperature,
    Text,
    Tracker,
    Weights,
    dataclass,
    fault,
    listed,
)

Samples = Annotated[int, Range(1, 1000), ADDED]
MOST_POINTS = 10000  # of a plane: each is a model that answers prompts
PLAIN = "ppo"  # what studies and claims call the plain anchor, by the arm that it is in every preset
Task = data.task_settings()
Benchmark = data.benchmark_settings()
Judge = judges.settings()
Reference = anchors.settings()
Mix = mixes.settings()
MEASURES = (  # of claims
    "kl_to_sft0",
    "training_kl_to_sft0",
    "stable",
    "reward",
    "training_reward",
    "gold_reward",
    "win_rate",
    "matched_gold",
    "matched_win_rate",
)
SeedOfReplicate = Annotated[str, Text(20, r"\d+/\d+", "no replicate; write its root seed and number, as in 1000/3")]
EXPERIMENTS = "conf/experiment/"  # where files of the repository are experiments
RepositoryFile = Annotated[str, Text(1000, r"(?!/)(?!.*\.\.).+", "no file of the repository, such as conf/claims.yaml")]
Revision = Annotated[str, Text(100, r"[\w./-]+", "no revision; give a branch, a tag or a commit", empty=False)]
AlgorithmName = Literal[*algorithms.kinds()]
PRETRAINED_ON = tuple(kind for kind, world in data.world_kinds().items() if world.corpus)


@dataclass()
class Architecture:
    """A Llama that the project pretrains itself."""

    vocabulary_size: Annotated[int, Range(1, 2**20)] = 512
    """Size of the vocabulary of the tokenizer, which is trained too."""
    hidden_size: Annotated[int, Range(1, 2**14)] = 128
    """Width of the residual stream."""
    intermediate_size: Annotated[int, Range(1, 2**16)] = 384
    """Width of the MLP."""
    layers: Annotated[int, Range(1, 200)] = 4
    """Number of transformer blocks."""
    heads: Annotated[int, Range(1, 1024)] = 4
    """Attention heads of each block."""
    max_length: Annotated[int, Range(2, 2**20)] = 192
    """Longest text, in tokens."""


@dataclass()
class Model:
    """A base model: made by the project (`pretrain`), from a package's GGUF (`package`), or a hub id or folder."""

    name: Label
    """Name in labels of runs, tables and cards."""
    source: Literal["pretrain", "package", "hub"]
    """pretrain: the project makes it | package: a Python package holds it as GGUF | hub: the hub, or a folder."""
    path: Path = ""
    """Hub id or local folder (hub); the package's name (package)."""
    revision: Revision | None = None
    """Branch, tag or commit on the hub; null: the newest, whose commit is recorded."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights on disk."""
    pickled_weights: Switch = False
    """Read pickles (pytorch_model.bin), where there are no safetensors; tensors alone."""
    chat_template: Label | None = None
    """A file of salsa/data/templates, without .jinja; null: the model's own."""
    architecture: Architecture = field(default_factory=Architecture)
    """The Llama that is pretrained (source: pretrain)."""


@dataclass()
class Corpus(Kind):
    """Pretraining text."""

    kind: Literal[*PRETRAINED_ON, "none"]
    """The world whose text it is; none: no pretraining."""
    seed: Annotated[Seed, ReadBy(*PRETRAINED_ON), ALWAYS] = 0
    """Seed of what is generated or chosen."""
    documents: Annotated[int, Range(0, 10**7), ReadBy(*PRETRAINED_ON), ALWAYS] = 0
    """Stories or reviews that the model is pretrained on."""


@dataclass(kw_only=True)
class Data:
    """What models learn from: text to pretrain on, and the task."""

    name: Label
    """Name in labels of runs and tables."""
    preferences: Literal["sampled", "given"] = "sampled"
    """sampled: pairs drawn from the SFT models, labelled by gold | given: read from data."""
    corpus: Corpus
    """Text that a model of the project's own is pretrained on."""
    task: Task
    """What SFT, reward model, training and evaluation are made from."""


@dataclass()
class Arm:
    """A way to train a policy: by what algorithm, from where (weights over ingredients), against what reference."""

    description: Prose = ""
    """What the table of arms says of it."""
    start: Weights = listed("1")
    """Where the policy starts: weights over ingredients, as a list over sft0, sft1, … or by name: those of
    sft_variants, models and mixes, and policy:<arm>, the policy that another arm has trained.
    """
    reference: Reference = field(default_factory=Reference)
    """What its KL penalty is measured from."""
    kl_scale: Annotated[float, Range(above=0, at_most=10**6)] = 1.0
    """Factor by which this arm multiplies the study's kl_coef."""
    kl_schedule: KlSchedule | None = None
    """How kl_coef changes over the run; null: as in the algorithm's section."""
    kl_coefs: KlCoefs | None = None
    """The study's kl_coefs at which this arm is run; null: all."""
    algorithm: Annotated[AlgorithmName | None, ADDED] = None
    """What trains the policy; null: each of the study's algorithms, which gives as many arms."""
    seed: Annotated[Seed, ADDED] = 0
    """Another order of the prompts and other noise than the arms of seed 0, which all see the same."""
    iterations_scale: Annotated[float, Range(above=0, at_most=1000), ADDED] = 1.0
    """Factor by which this arm multiplies the iterations of its algorithm; it is compared with the plain anchor that is
    trained as long.
    """
    replicates: Annotated[schema.Replicates | None, ADDED] = None
    """Replicates in which this arm is run: the first so many of the study's, or those of a list; null: all."""


@dataclass()
class SftVariant:
    """An SFT model of another recipe, an ingredient by its name. One that changes nothing is sft0, or sft1, …"""

    seed: Annotated[int, Range(0, 1000)] = 0
    """Which of the replicate's seeds: 0 is sft0's, 1 is sft1's, …"""
    best_share: Annotated[float, Range(above=0, at_most=1)] = 1.0
    """Share of the demonstrations that it is trained on, those of highest gold; 1: all."""
    sft: Annotated[dict[EntryName, Any], Items(100)] = field(default_factory=dict)
    """Settings of `sft` that are others: epochs, learning_rate, dropout, stop, …"""
    task: Annotated[dict[EntryName, Any], Items(100)] = field(default_factory=dict)
    """Settings of `data.task` that are others, for other demonstrations: demonstrations, validation and, where splits
    don't depend on it (stories, reviews), seed. Others could train on the prompts of the evaluation or a benchmark.
    """


@dataclass()
class OtherModel:
    """A model from a folder or the hub, an ingredient by its name, which has to read the same tokens as the study's.

    One of another size or architecture can be a reference by itself, and a start that is not trained.
    """

    path: Annotated[str, Text(PATH, empty=False)]
    """Local folder or hub id."""
    revision: Revision | None = None
    """Branch, tag or commit on the hub; null: the newest, whose commit is recorded."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights on disk."""
    pickled_weights: Switch = False
    """Read pickles (pytorch_model.bin), where there are no safetensors; tensors alone."""

    def model(self, study):
        """It as a `Model`, under the chat template of the study's own."""
        name = re.sub(r"[^\w.+-]", "_", self.path.rstrip("/").rpartition("/")[2]).lstrip("_.+-")[:60] or "model"
        template = study.model.chat_template
        return Model(name, "hub", self.path, self.revision, self.dtype, self.pickled_weights, template)


@dataclass()
class Regime:
    """Replicates whose SFT models and reward model are made by another recipe than the study's. All else is shared."""

    replicates: Annotated[schema.ReplicateNumbers, Items(at_least=1)]
    """Numbers of replicates. One that the study doesn't have is not run, so that replicates=[0,1] is a part of it."""
    sft: Annotated[dict[EntryName, Any], Items(100)] = field(default_factory=dict)
    """Settings of `sft` that are others: epochs, learning_rate, dropout, stop, …"""
    task: Annotated[dict[EntryName, Any], Items(100)] = field(default_factory=dict)
    """Settings of `data.task` that are others for SFT alone, as in `sft_variants`: demonstrations, validation, seed."""
    reward_model: Annotated[dict[EntryName, Any], Items(100)] = field(default_factory=dict)
    """Settings of `reward_model` that are others: pairs, epochs, gold_temperature, …"""
    disjoint: Switch = False
    """sft0, sft1, … learn from demonstrations of their own, none in common. An SFT variant takes the part of its seed,
    in parts of its own size: where that is another, it may share demonstrations with them.
    """


def changed(section, changes):
    """A section with some settings changed. SettingError for one that it lacks, or that its schema refuses."""
    return schema.from_dict(type(section), schema.dump(section) | changes)


@dataclass()
class Lengths:
    """Tokens. A prompt longer than `prompt` is dropped and counted, never cut silently."""

    prompt: Annotated[int, Range(1, 2**20)] = 32
    """Longest prompt, with its template."""
    response: Annotated[int, Range(1, 2**20)] = 40
    """Longest response: sampling ends there; demonstrations and pairs with a longer one are dropped."""


@dataclass()
class Base:
    """Pretraining, for `model.source: pretrain`."""

    seed: Seed = 0
    """Seed of the first weights and of the order of documents."""
    epochs: Annotated[int, Range(1, 10000)] = 1
    """Passes over the corpus."""
    batch_size: Batch = 64
    """Blocks per optimizer step."""
    block_length: Annotated[int, Range(2, 2**20)] = 128
    """Tokens of a block."""
    learning_rate: LearningRate = 0.001
    """Learning rate after the warm-up, from where it falls to 0."""
    weight_decay: Annotated[float, Range(0, 100)] = 0.01
    """Weight decay of AdamW."""
    warmup: Part = 0.05
    """Share of the steps in which the learning rate rises, from 0; of a single step, none."""


@dataclass()
class Sft:
    """Supervised fine-tuning of several models from one base, which differ in their seed."""

    models: Annotated[int, Range(1, 100)] = 2
    """SFT models per replicate, differing in the seed alone."""
    epochs: Annotated[int, Range(1, 10000)] = 3
    """Passes over the demonstrations."""
    batch_size: Batch = 32
    """Demonstrations per optimizer step, over all processes."""
    learning_rate: LearningRate = 0.0001
    """Learning rate after the warm-up, from where it falls to 0."""
    weight_decay: Annotated[float, Range(0, 100)] = 0.0
    """Weight decay of AdamW."""
    warmup: Part = 0.05
    """Share of the steps in which the learning rate rises, from 0; of a single step, none."""
    dropout: Part = 0.0
    """Attention dropout while training; with the data order, what a seed changes."""
    stop: Literal["validation", "epochs"] = "validation"
    """validation: the epoch of lowest validation loss | epochs: the last, over-fitted or not."""
    lora_rank: LoraRank = 0
    """Rank of low-rank adapters on every linear layer but the head, merged in the end; 0: all weights are trained."""
    lora_alpha: LoraAlpha = 16.0
    """Adapters are scaled by lora_alpha / lora_rank."""


@dataclass()
class RewardModel:
    """The proxy that training maximises: a Bradley-Terry model of preference pairs."""

    pairs: Annotated[int, Range(1, MOST)] = 1000
    """Preference pairs to train on."""
    held_out: Annotated[int, Range(1, MOST)] = 256
    """Pairs kept apart, on which its accuracy is measured."""
    epochs: Annotated[int, Range(1, 10000)] = 1
    """Passes over the pairs."""
    batch_size: Batch = 64
    """Pairs per optimizer step, over all processes."""
    learning_rate: LearningRate = 0.0001
    """Learning rate after the warm-up, from where it falls to 0."""
    warmup: Part = 0.05
    """Share of the steps in which the learning rate rises, from 0; of a single step, none."""
    gold_temperature: Annotated[float, Range(above=0, at_most=10**6)] = 0.1
    """Bradley-Terry noise of sampled preferences, in units of gold."""
    normalisation_prompts: Annotated[int, Range(2, MOST)] = 256
    """Prompts on which sft0's samples fix the reward's shift and scale: a deviation takes two."""
    lora_rank: LoraRank = 0
    """Rank of low-rank adapters; 0: all weights are trained. The head, which sft0 has none of, is trained whole."""
    lora_alpha: LoraAlpha = 16.0
    """Adapters are scaled by lora_alpha / lora_rank."""
    models: Annotated[int, Range(1, 100), ADDED] = 1
    """Reward models per replicate, of which the study's is the weight average (WARM, 2401.12187)."""

    @model_validator(mode="after")
    def _a_batch_at_least(self):
        if self.batch_size > self.pairs:
            raise fault(f"more than reward_model.pairs={self.pairs}; make it smaller", "batch_size", self)
        return self


@dataclass()
class Gates:
    """Conditions without which a comparison of references says nothing. They warn, not stop."""

    smallest_kl: Annotated[float, Range(0, 10**6)] = 0.05
    """Smallest KL(sft0 ‖ soup), nats per response; nearer to sft0, SALSA is PPO."""
    lowest_agreement: Share = 0.75
    """Lowest agreement of the reward model with gold, on held-out pairs."""
    highest_agreement: Share = 0.95
    """Highest agreement; above it, the proxy is as good as gold, and nothing is over-optimised."""
    largest_barrier: Annotated[float, Range(0, 10**6)] = 0.01
    """Largest rise of the loss between the SFT models above their ends' line, nats per token."""
    smallest_manipulation: Annotated[float, Range(0, 10**6), ADDED] = 0.05
    """Smallest kl_coef · KL(sft0 ‖ reference), in standard deviations of reward on sft0's samples: what exchanging the
    reference changes in what a policy is paid. Under 0.05, rounding alone changes as much.
    """
    largest_drift: Annotated[float, Range(0, 10**6), ADDED] = 0.1
    """Largest change of reward over the last part of training (evaluate.flat_share) at which it counts as flat, in the
    same unit.
    """

    @model_validator(mode="after")
    def _ordered(self):
        if self.lowest_agreement > self.highest_agreement:
            where = f"evaluate.gates.highest_agreement={self.highest_agreement}"
            raise fault(f"above {where}; change one", "lowest_agreement", self)
        return self


@dataclass()
class Plane:
    """Reward over the plane through sft0, sft1 and a trained policy, and along sft0 -> policy beyond both ends."""

    arms: Labels = listed()
    """Arms whose policies span a plane; none named: no plane."""
    kl_coef: KlCoef | None = None
    """The kl_coef of these policies; null: the first that the arm is run at."""
    replicates: Annotated[int, Range(0, 1000)] = 1
    """How many of the study's replicates have a plane, from the first on."""
    step: Annotated[str, Range(above=0, at_most=1, in_text=True)] = "1/4"
    """Distance between points of the grid, in weight."""
    margin: Annotated[str, Range(0, 5, in_text=True)] = "1/2"
    """How far the grid goes beyond the three models, in weight."""
    prompts: Annotated[int, Range(1, MOST)] = 64
    """Evaluation prompts answered at each point."""

    @model_validator(mode="after")
    def _a_grid(self):
        step, margin = bounds.fraction(self.step), bounds.fraction(self.margin)
        if (1 / step).denominator != 1:
            raise fault("1 must be a multiple of it; give 1/2, 1/3, 1/4, …", "step", self)
        points = (int((1 + 2 * margin) / step) + 1) ** 2
        if points > MOST_POINTS:
            where = f"with evaluate.plane.margin={self.margin}"
            raise fault(f"{where}, up to {points} models, and {MOST_POINTS} may be; take larger steps", "step", self)
        return self


@dataclass()
class Evaluate:
    """How policies answer benchmarks, and what is measured of SFT models and of the space of weights."""

    temperature: Temperature = 1.0
    """Temperature of benchmark answers; reported KL is always at temperature 1."""
    alphas: Alphas = listed("0", "0.25", "0.5", "0.75", "1")
    """Places on the line from sft0 to sft1 whose soups are measured."""
    samples: Samples = 1
    """Responses of every model to each benchmark prompt and each evaluation prompt, all with other noise."""
    gates: Gates = field(default_factory=Gates)
    """What has to hold before PPO, and after it."""
    flat_share: Annotated[float, Range(above=0, at_most=1), ADDED] = 0.25
    """The last part of training, as a share of iterations: reward has to be flat there, and measures are averaged."""
    plane: Plane = field(default_factory=Plane)
    """The plane of weights over which rewards are measured."""


@dataclass()
class Claim:
    """A hypothesis, fixed before the run: candidate minus baseline is above 0, and by how much it would matter."""

    text: Prose
    """The hypothesis in words."""
    measure: Literal[*MEASURES]
    """What is compared, each arm at the claims' kl_coef."""
    smallest_effect: Annotated[float, Range(above=0, at_most=10**6)]
    """The smallest difference that would matter, in the measure's unit. `stable` has none: there it is the share of the
    margins of which it is said how many replicates its support takes.
    """
    origin: Literal["abstract", "control", "positive_control"] = "abstract"
    """abstract: the paper says so | control: what another explanation denies | positive_control: known to be true, so
    that a study which doesn't support it can't see what it looks for. The claims of all origins are decided together.
    """
    candidate: Label = "salsa"
    """The arm that is claimed to do better."""
    baseline: Label = PLAIN
    """The arm that it is compared with; `ppo` is the plain anchor, whatever its arm is called."""
    benchmarks: Labels = listed()
    """win_rate and rewards: benchmarks over which the claim's outcome is the mean; none named: each of the study's."""
    win_rate_without_gold: Annotated[Annotated[float, Range(above=0, at_most=0.5)] | None, ADDED] = None
    """gold_reward: the smallest win rate minus ½ that would matter where the data has no gold, and the claim is read
    from win rates instead; null: it is not tested there.
    """
    algorithm: Annotated[AlgorithmName | None, ADDED] = None
    """What trains the candidate; null: it is claimed of each of the study's algorithms."""
    baseline_algorithm: Annotated[AlgorithmName | None, ADDED] = None
    """What trains the baseline; null: what trains the candidate."""
    meaning: Prose = ""
    """control: what it says of the explanation when an effect that would matter is excluded."""

    @model_validator(mode="after")
    def _of_two_arms(self):
        same = self.baseline_algorithm in (None, self.algorithm)
        if same and self.candidate == self.baseline:
            raise fault("is the candidate itself; name another arm", "baseline", self)
        return self


@dataclass()
class Stability:
    """When a trained policy counts as stable, and when as collapsed."""

    lowest_end_rate: Annotated[float, Range(0, 1000)] = 0.9
    """Lowest share of evaluation responses that end by themselves, relative to sft0's."""
    shortest_length: Annotated[float, Range(0, 1000)] = 0.5
    """Shortest mean response length, relative to sft0's."""
    largest_gold_loss: Annotated[float, Range(0, 10**6)] = 0.02
    """Largest fall of gold from its peak to the last kept rollouts."""
    collapsed_end_rate: Annotated[float, Range(0, 1000)] = 0.5
    """Share of responses that end, relative to sft0's, under which a policy counts as collapsed."""
    collapsed_length: Annotated[float, Range(0, 1000)] = 0.1
    """Mean response length, relative to sft0's, under which a policy counts as collapsed."""
    collapsed_kl: Annotated[float, Range(above=0, at_most=10**6)] = 5.0
    """KL(policy ‖ sft0), nats per token, above which a policy counts as collapsed: its tokens are such as sft0 gives
    less than 1 % (e⁻⁵).
    """
    end_rate_margin: Annotated[float, Range(above=0, at_most=1000), ADDED] = 0.05
    """A claim of stability: by how much a candidate's share of responses that end may lie below the baseline's, both
    relative to sft0's.
    """
    length_margin: Annotated[float, Range(above=0, at_most=1000), ADDED] = 0.1
    """Likewise of the mean response length, relative to sft0's."""
    gold_margin: Annotated[float, Range(above=0, at_most=10**6), ADDED] = 0.02
    """Likewise how much further gold may have fallen from its peak than the baseline's, in gold's unit."""


@dataclass()
class JudgeLimits:
    """What a judge's verdicts must show for claims to be read from them; docs/evaluation.md says why these.

    The last two are of the lower bounds of 95 % intervals over prompts, so that few verdicts show little.
    """

    largest_error_share: Share = 0.1
    """Largest share of answers without a verdict: errors on 10 % of the prompts that differ from the others by 30
    points move a rate by 3.
    """
    smallest_discrimination: Share = 0.0
    """Smallest share of verdicts that follow the answers."""
    smallest_kappa: Annotated[float, Range(-1, 1)] = 0.0
    """Smallest agreement with gold beyond chance, where there is gold."""


@dataclass()
class Report:
    """How large the report's bootstrap is, and how many responses it shows."""

    bootstrap: Annotated[int, Range(1, 100000)] = 2000
    """Resamples of prompts for each interval."""
    seed: Seed = 0
    """Seed of the resamples."""
    samples: Annotated[int, Range(0, 1000)] = 5
    """Prompts per benchmark, answered by every arm side by side."""
    reader: Annotated[int, Range(0, 10000)] = 20
    """Prompts per benchmark, with every policy's responses and verdicts, in report.html."""
    judges: JudgeLimits = field(default_factory=JudgeLimits)
    """Limits beyond which no claim is read from a judge's verdicts."""


@dataclass()
class Objective:
    """The number that a sweeper maximises, read from a finished study; no part of any address."""

    arm: Annotated[str, Text(64)] = ""
    """The arm; nothing: salsa, or the last arm where there is none of that name."""
    kl_coef: KlCoef | None = None
    """One of the study's kl_coefs; null: the first that the arm is run at."""
    measure: Literal["", "gold_reward", "reward", "win_rate"] = ""
    """gold_reward | reward: the arm's mean minus sft0's | win_rate: against sft0, by the first judge, mean over
    benchmarks | "": gold_reward, or win_rate where the data has no gold.
    """
    kl_budget: Annotated[float, Range(0, 10**6)] | None = None
    """Largest KL(policy ‖ sft0) that costs nothing, nats per response; null: no limit."""
    kl_penalty: Annotated[float, Range(above=0, at_most=10**6)] = 0.1
    """Taken off for each nat above the budget, in the measure's unit."""


@dataclass()
class Execution:
    """How a run is executed. No part of its address: none of this may change what it computes, beyond rounding.

    But for random numbers: vLLM samples with others (`rollouts`), and with `sft.dropout` above 0 the masks depend on
    `processes` and `micro_batch`.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one."""
    threads: Annotated[int, Range(1, 1024)] = 1
    """CPU threads of a training or sampling job."""
    micro_batch: Batch = 64
    """Sequences per forward and backward pass."""
    rollout_batch: Batch = 128
    """Sequences sampled at once."""
    gradient_checkpointing: Switch = False
    """Compute activations again in the backward pass: less memory, more time."""
    compile: Switch = False
    """torch.compile of PPO's training passes; needs a C++ compiler, warms up for a minute."""
    rollouts: Literal["transformers", "vllm"] = "transformers"
    """What samples a policy's responses, in training and evaluation."""
    processes: Annotated[int, Range(1, 1024)] = 1
    """Processes of a run of SFT, a reward model or a policy, started by `accelerate launch`."""
    accelerate_config: Path = ""
    """Configuration file of Accelerate, for FSDP or DeepSpeed (conf/accelerate)."""
    checkpoint_every: Annotated[int, Range(0, 10**6)] = 10
    """Iterations of an algorithm that samples between checkpoints; 0: only when it is told to stop."""
    keep_value_models: Switch = True
    """Write PPO's value models too, which take as much disk as its policies."""
    checkpoint_minutes: Annotated[float, Range(0, 10**6)] = 30.0
    """Minutes between checkpoints of SFT, reward models and DPO; 0: only when they are told to stop."""
    memory_mb: Annotated[int, Range(1, 10**9)] = 2000
    """Memory of a job in MB, for the scheduler."""
    runtime: Annotated[int, Range(1, 10**6)] = 60
    """Time limit of a job in minutes, for the scheduler."""
    gpus: Annotated[int, Range(0, 1024)] = 0
    """GPUs of a job; 0: none."""
    judge_concurrency: Annotated[int, Range(1, 1000)] = 8
    """Questions at once, to a judge over the network."""
    judge_timeout: Annotated[float, Range(above=0, at_most=86400)] = 120.0
    """Seconds that an answer may take."""
    judge_retries: Annotated[int, Range(0, 1000)] = 6
    """Further tries after a failure of the network or the server."""
    judge_requests: Annotated[int, Range(0, 10**12)] = 0
    """Most requests of a judge run; 0: no limit. A run whose budget is used up ends, and can go on."""
    judge_tokens: Annotated[int, Range(0, 10**15)] = 0
    """Most tokens of a judge run; 0: no limit."""
    judge_prompt_price: Annotated[float, Range(0, 10**9)] = 0.0
    """Money for a million tokens of questions to a judge, in any currency; `salsa judge check` counts with it."""
    judge_completion_price: Annotated[float, Range(0, 10**9)] = 0.0
    """Money for a million tokens of a judge's answers."""
    judge_check: Switch = True
    """Ask the judge's server one question before the first job."""
    trackers: Annotated[list[Tracker], Items()] = listed()
    """Where SFT, reward models and policies log their metrics while they train: tensorboard, wandb, …"""
    shipped_base: Switch = True
    """Copy the checkpoint that comes with the project where its address is the run's."""

    @model_validator(mode="after")
    def _a_gpu_a_process(self):
        if self.gpus not in (0, self.processes):
            raise fault(
                f"each of the {self.processes} processes of a training run has one; set "
                f"execution.processes={self.gpus}, or execution.gpus={self.processes}",
                "gpus",
                self,
            )
        return self


@dataclass(kw_only=True)
class Sections:
    """A study: its list axes, what every stage does, and how it is executed. `Config` adds each algorithm's section."""

    name: Label = "default"
    """Name of the study, of its folder and its report."""
    title: Prose = ""
    """Title of the report; nothing: the name."""
    seed: Seed = 0
    """The root of all seeds."""
    results: Annotated[str, Text(PATH, empty=False)] = "results"
    """The folder that everything is written to."""
    mixed_precision: Precision = "no"
    """bf16: autocast of trained models, whose weights stay float32; frozen ones are bfloat16."""
    replicates: Annotated[schema.ReplicateNumbers, Items()] = listed(0)
    """Numbers of replicates; each has its own SFT models, reward model and seeds."""
    kl_coefs: KlCoefs = listed(0.05)
    """Weights of the KL penalty, in reward per nat."""
    claim_kl_coef: Annotated[KlCoef | None, ADDED] = None
    """The kl_coef at which all claims compare arms, fixed in advance; null: each arm's best on development prompts."""
    grid_replicates: Annotated[Annotated[int, Range(1, 10**6)] | None, ADDED] = None
    """The first so many replicates are run at all kl_coefs, further ones at claim_kl_coef alone; null: all at all."""
    looks: Annotated[list[Annotated[int, Range(2, 1000)]], Items(100), ADDED] = listed()
    """Numbers of replicates after which claims are decided, increasing to all of them: where none of the abstract's is
    left undecided, the study ends. None: once, after all.
    """
    alphas: Alphas = listed()
    """Further arms: policies from sft0 whose reference is the soup at this place on the line from sft0 to sft1."""
    alpha_kl_coefs: KlCoefs | None = None
    """kl_coefs of the alphas that are no arm; null: all of the study's."""
    companions: Annotated[list[Annotated[str, Text(2000)]], Items(100)] = listed()
    """Studies planned along with this one, in the same DAG, and compared with it: each is one override, such as
    experiment=reviews or model=mistral_7b.
    """
    algorithms: Annotated[dict[AlgorithmName, Switch], Items(), ADDED] = field(default_factory=dict)
    """What trains the arms that name no algorithm: each of those that are true, as algorithm=[…] chooses them."""
    algorithm_kl_coefs: Annotated[dict[AlgorithmName, KlCoefs], Items(), ADDED] = field(default_factory=dict)
    """Algorithm -> those of the study's kl_coefs at which its arms are run; left out: all."""
    arms: Annotated[dict[EntryName, Arm], Items()] = field(default_factory=dict)
    """Ways to train a policy, by name."""
    sft_variants: Annotated[dict[EntryName, SftVariant], Items(), ADDED] = field(default_factory=dict)
    """SFT models of other recipes that starts and references are mixed from, by name."""
    regimes: Annotated[dict[EntryName, Regime], Items(), ADDED] = field(default_factory=dict)
    """Recipes of SFT models and reward models by which some of the replicates are made, by name."""
    models: Annotated[dict[EntryName, OtherModel], Items(), ADDED] = field(default_factory=dict)
    """Other models that starts and references are mixed from, by name."""
    mixes: Annotated[dict[EntryName, Mix], Items(), ADDED] = field(default_factory=dict)
    """Mixes beside the weight average, each made once and then an ingredient like any other, by name."""
    benchmarks: Annotated[dict[EntryName, Benchmark], Items()] = field(default_factory=dict)
    """Prompts that policies are compared on, by name."""
    judges: Annotated[dict[EntryName, Judge], Items()] = field(default_factory=dict)
    """Judges that compare policies, by name."""
    model: Model
    """The base model."""
    data: Data
    """What models learn from."""
    lengths: Lengths = field(default_factory=Lengths)
    """Lengths of prompts and responses."""
    base: Base = field(default_factory=Base)
    """How the base model is pretrained."""
    sft: Sft = field(default_factory=Sft)
    """Supervised fine-tuning, from the base model."""
    reward_model: RewardModel = field(default_factory=RewardModel)
    """The proxy that training maximises."""
    evaluate: Evaluate = field(default_factory=Evaluate)
    """How policies answer, and what is measured beside them."""
    report: Report = field(default_factory=Report)
    """Intervals and samples of the report."""
    claims: Annotated[dict[EntryName, Claim], Items()] = field(default_factory=dict)
    """Hypotheses that are fixed before the run, by name."""
    registered: Annotated[list[RepositoryFile], Items(100), ADDED] = listed()
    """Files that fix the study in advance, such as conf/claims.yaml: the report shows their digests and commits,
    whether these are older than the first run, and what the study does otherwise.
    """
    chosen_on: Annotated[list[SeedOfReplicate], Items(), ADDED] = listed()
    """Replicates on which settings were chosen, as <root seed>/<replicate>: no study may decide on them."""
    stability: Stability = field(default_factory=Stability)
    """When a policy counts as stable or collapsed."""
    objective: Objective = field(default_factory=Objective)
    """What a sweeper maximises."""
    execution: Execution = field(default_factory=Execution)
    """How runs are executed."""


# PPO's section is read first: others take its values where they have none, and a mistake is named where it stands.
ALGORITHMS = {
    kind: algorithms.kinds()[kind].settings for kind in sorted(algorithms.kinds(), key=lambda kind: kind != DEFAULT)
}
Config = schema.extended(
    "Config",
    (Sections,),
    ALGORITHMS,
    **{kind: field(default_factory=section, kw_only=True) for kind, section in ALGORITHMS.items()},
)


# What each stage receives: the slice of the configuration that determines its result, and nothing else.


@dataclass()
class CorpusSettings:
    """Text to pretrain on."""

    corpus: Corpus
    sha256: str = ""
    """Of the package's file that the corpus is read from."""


@dataclass()
class PrepareSettings:
    """Demonstrations, preferences and prompts."""

    task: Task
    files: dict[str, str] = field(default_factory=dict)
    """Settings name -> "<bytes>:<sha256>" of each local file."""


@dataclass()
class BenchmarkSettings:
    """One benchmark's prompts; the task says what training sees, which they must not hold."""

    name: Label
    benchmark: Benchmark
    task: Task
    files: dict[str, str] = field(default_factory=dict)


@dataclass()
class BaseSettings:
    """The base model."""

    model: Model
    base: Base | None = None
    """Pretraining, where the project makes the model."""
    files: dict[str, str] = field(default_factory=dict)
    """Content of a local model folder."""


@dataclass()
class SftSettings:
    """One SFT model."""

    seed: Seed
    sft: Sft
    lengths: Lengths
    mixed_precision: Precision = "no"
    best_share: Annotated[float, Range(above=0, at_most=1), ADDED] = 1.0
    """Share of the demonstrations, those of highest gold."""


@dataclass()
class RewardModelSettings:
    """One reward model, or the average of reward_model.models, which has the settings of its members."""

    seed: Seed
    preferences: Literal["sampled", "given", "sampled_for_judge", "given_for_judge"]
    """The last two: others, that PPO's reward model never sees."""
    reward_model: RewardModel
    lengths: Lengths
    mixed_precision: Precision = "no"
    member: Annotated[int, Range(0, 99), ADDED] = 0
    """Place in an average: each member has its own order of the pairs. The first is what a study of one model has."""


@dataclass()
class PolicySettings:
    """What the stage of every algorithm receives, beside its own section, the lengths and the precision."""

    seed: Seed
    kl_coef: KlCoef
    start: Weights
    reference: Reference


TRAINING = {
    kind: schema.extended(
        f"{kind.title()}Settings",
        (PolicySettings,),
        {kind: section, "lengths": Lengths, "mixed_precision": Precision},
        mixed_precision="no",
    )
    for kind, section in ALGORITHMS.items()
}
"""Algorithm -> the settings of its stage, `PolicySettings` with the section of its name."""


@dataclass()
class LandscapeSettings:
    """The line between the first two SFT models, before PPO."""

    seed: Seed
    alphas: Alphas
    temperature: Temperature
    lengths: Lengths
    samples: Samples = 1
    """Responses of each model to each prompt."""


@dataclass()
class GatesSettings:
    """What a replicate has to be before PPO, so that a comparison of references can say something."""

    gates: Gates
    largest_kl_coef: KlCoef | None = None
    """Of the study's penalties that are in standard deviations of reward; null: there is none."""
    claim_kl_coef: KlCoef | None = None
    """Of those, the one of the claims; null: there is none, or claims take each arm's own."""


@dataclass()
class MixSettings:
    """One mix of models, made as a model folder."""

    mix: Mix
    """Its weights are of the run's parents, by their roles."""
    seed: Seed = 0
    """Of the responses that a search samples."""
    lengths: Lengths | None = None
    """Of what a search measures with; null for a mix without one."""

    @model_validator(mode="after")
    def _searches_with_lengths(self):
        if mixes.kinds()[self.mix.kind].searches and self.lengths is None:
            raise fault(f"a {self.mix.kind} mix is searched for with data; give its lengths", "lengths", shows=False)
        return self


@dataclass()
class PlaneSettings:
    """The plane through sft0, sft1 and one policy."""

    seed: Seed
    step: Annotated[str, Range(above=0, at_most=1, in_text=True)]
    margin: Annotated[str, Range(0, 5, in_text=True)]
    prompts: Annotated[int, Range(1, MOST)]
    lengths: Lengths


@dataclass()
class RespondSettings:
    """One policy's answers, and its distance from sft0 and its reference."""

    seed: Seed
    temperature: Temperature
    lengths: Lengths
    samples: Samples = 1
    """Responses to each prompt."""


@dataclass()
class JudgeSettings:
    """One judge's verdicts on one policy against others."""

    name: Label
    judge: Judge
    replicate: Annotated[int, Range(0, 10**6)]
    candidate: Annotated[str, Text()]
    baselines: dict[str, str]
    """Baseline's name -> the `model` field of its rows in its responses."""
    files: dict[str, str] = field(default_factory=dict)
    """Content of a folder of prompt templates."""
    seed: Annotated[int, Range(0, 99), ADDED] = 0
    """Training seed of the candidate, among those of its replicate."""


@dataclass()
class StudySettings:
    """The report of a study."""

    config: dict[str, Any]
    """The resolved configuration without `execution`."""
    policies: list[dict[str, Any]]
    """Arm, alpha, kl_coef, replicate, training seed, name, index, baselines."""


@dataclass()
class ComparisonSettings:
    """The studies of a sweep, side by side."""

    points: list[dict[str, str]]
    """Swept key -> its value at the point; its study is study/<place>."""
