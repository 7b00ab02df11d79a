"""The schema of the whole configuration, as dataclasses, and how a command line becomes checked configurations.

Every value has one home: `conf/` holds the values, this module their names and types. Stages receive the smallest
dataclass that determines their result, so that two runs with equal settings are the same run. What is execution only
(threads, device, micro-batch) lives in `Execution` and is never part of a run's address.

Only the standard library is imported at the top: numerics that read these settings run where Hydra is not installed.
"""

import types
import typing
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

MISSING = "???"  # OmegaConf's mark of a value that the configuration has to give


@dataclass
class Architecture:
    """A Llama that the project pretrains itself."""

    vocabulary_size: int = 512
    hidden_size: int = 128
    intermediate_size: int = 384
    layers: int = 4
    heads: int = 4
    max_length: int = 192


@dataclass
class Model:
    """A base model: made by the project (`pretrain`), from a package's GGUF (`package`), or a hub id or folder."""

    name: str = MISSING
    source: str = MISSING  # pretrain | package | hub
    path: str = ""  # hub id or local folder (hub); the package's name (package)
    revision: str | None = None
    dtype: str = "float32"  # float32 | bfloat16
    chat_template: str | None = None  # a file of salsa/templates, without .jinja; null: the model's own
    architecture: Architecture = field(default_factory=Architecture)


@dataclass
class Corpus:
    """Pretraining text."""

    kind: str = MISSING  # stories | reviews | none
    seed: int = 0
    documents: int = 0


@dataclass
class Task:
    """What SFT, the reward model, PPO and evaluation prompts are made from. Sizes are upper limits for read data."""

    kind: str = MISSING  # stories | reviews | ultra
    seed: int = 0
    demonstrations: int = 0
    validation: int = 0
    preferences: int = 0  # prompts (sampled preferences) or pairs (given preferences)
    prompts: int = 0  # for PPO
    evaluation: int = 0  # development prompts on which KL and rewards of final policies are reported
    opening_words: int = 6  # reviews: words of a review that make its prompt
    response_words: int = 0  # reviews: words of the continuation that gold and demonstrations see; 0: all
    sft_file: str = ""  # ultra: hub dataset or local JSONL, JSONL.gz, Parquet
    preference_file: str = ""
    evaluation_file: str = ""


@dataclass
class Data:
    name: str = MISSING
    preferences: str = "sampled"  # sampled: pairs drawn from the SFT models, labelled by gold | given: read from data
    corpus: Corpus = field(default_factory=Corpus)
    task: Task = field(default_factory=Task)


@dataclass
class Benchmark:
    # in_distribution | out_of_distribution | two_turn | openings | preference_file | mt_bench | arena_hard
    kind: str = MISSING
    prompts: int = 0  # upper limit; 0: all
    file: str = ""
    reference_file: str = ""


@dataclass
class Judge:
    kind: str = MISSING  # gold | vader | reward_model | openai
    tie_margin: float = 0.0  # of the judges that score: a difference up to this is a tie
    tournament: bool = False  # not only against sft0 and plain PPO: every pair of policies at one kl_coef
    # openai: any server that speaks the API of that name
    model: str = ""
    base_url: str = ""  # "": the environment's OPENAI_BASE_URL, or OpenAI's own
    key_variable: str = "OPENAI_API_KEY"  # the environment variable that holds the key
    templates: str = ""  # a folder of prompts; "": the project's own, salsa/evaluate/templates
    # null leaves a parameter out of what is asked, for a server that refuses it
    temperature: float | None = 0.0
    max_tokens: int | None = 1024  # of an answer
    seed: int | None = 0  # of answers that are sampled; another seed draws others
    attempts: int = 3  # answers asked for until one holds a verdict


@dataclass
class Reference:
    """What the KL penalty is measured from."""

    # soup: the weight average of the SFT models | noise: sft0 moved at random, as far as that soup |
    # multi_kl: each SFT model with a weight, KLs averaged | ema: a soup that follows the policy slowly |
    # reset: a soup that is replaced by the policy now and then
    kind: str = "soup"
    weights: list[str] = field(default_factory=lambda: ["1"])  # decimals or fractions, one for each SFT model
    rate: float = 0.0  # ema: share of the policy that is mixed in after each iteration (WARP's mu)
    every: int = 0  # reset: iterations between two copies of the policy


@dataclass
class KlSchedule:
    """How kl_coef changes over a run."""

    kind: str = "fixed"  # fixed | linear | adaptive
    final: float = 0.0  # linear: share of kl_coef that is left in the last iteration
    target: float = 6.0  # adaptive: wanted KL to the reference, nats a response
    horizon: float = 10000.0  # adaptive: responses in which kl_coef follows (1909.08593)


@dataclass
class Arm:
    """A way to run PPO: where the policy starts (weights over the SFT models) and what its reference is."""

    description: str = ""
    start: list[str] = field(default_factory=lambda: ["1"])
    reference: Reference = field(default_factory=Reference)
    kl_scale: float = 1.0  # of the study's kl_coef
    kl_schedule: KlSchedule | None = None  # null: ppo.kl_schedule
    kl_coefs: list[float] | None = None  # those of the study's kl_coefs that it is run at; null: all


@dataclass
class Lengths:
    """Tokens. A prompt longer than `prompt` is dropped and counted, never cut silently."""

    prompt: int = 32
    response: int = 40


@dataclass
class Base:
    """Pretraining, for `model.source: pretrain`."""

    seed: int = 0
    epochs: int = 1
    batch_size: int = 64
    block_length: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup: float = 0.05  # share of the steps


@dataclass
class Sft:
    models: int = 2  # SFT models a replicate, differing in the seed alone
    epochs: int = 3
    batch_size: int = 32
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    warmup: float = 0.05
    dropout: float = 0.0  # attention dropout while training; with the data order, what a seed changes
    stop: str = "validation"  # validation: the epoch of lowest validation loss | epochs: the last, over-fitted or not
    lora_rank: int = 0  # low-rank adapters on every linear layer but the head, merged in the end; 0: all are trained
    lora_alpha: float = 16.0


@dataclass
class RewardModel:
    pairs: int = 1000
    held_out: int = 256
    epochs: int = 1
    batch_size: int = 64
    learning_rate: float = 1e-4
    warmup: float = 0.05
    gold_temperature: float = 0.1  # Bradley-Terry noise of sampled preferences, in units of gold
    normalisation_prompts: int = 256  # prompts on which sft0's samples fix the reward's shift and scale
    lora_rank: int = 0  # as in Sft; the head, which sft0 has none of, is trained whole
    lora_alpha: float = 16.0


@dataclass
class Ppo:
    iterations: int = 40
    batch_size: int = 128  # prompts an iteration, over all processes
    epochs: int = 2
    mini_batches: int = 1
    learning_rate: float = 1e-4
    schedule: str = "linear"  # linear: to 0 over the run | constant
    warmup: int = 0  # iterations
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-5
    kl_estimator: str = "k1"  # k1 | k2 | k3
    kl_in: str = "reward"  # reward | loss
    kl_schedule: KlSchedule = field(default_factory=KlSchedule)
    gamma: float = 1.0
    lam: float = 0.95
    clip_range: float = 0.2
    value_clip_range: float = 0.2
    value_coef: float = 0.1
    # a network of its own that starts as the reward model (reward_model) or as the policy does, with a head of zeros
    # (sft), or a head of zeros on the policy's trunk (shared)
    value_model: str = "reward_model"
    max_grad_norm: float = 1.0
    temperature: float = 1.0
    # constants: shifted and scaled as on sft0's samples | batch: to mean 0 and deviation 1 in each batch | none
    score_normalisation: str = "constants"
    score_clip: float = 0.0  # largest absolute score that is paid, after normalisation; 0: no limit
    missing_eos_penalty: float = 1.0
    # rescales what is paid, but not a penalty in the loss: with kl_in=loss it makes the penalty several times weaker
    whiten_advantages: bool = True
    lora_rank: int = 0  # low-rank adapters on every linear layer of policy and value model; 0: all weights are trained
    lora_alpha: float = 16.0
    rollouts_every: int = 5  # iterations between kept rollouts (text), from which gold trajectories are read


@dataclass
class Gates:
    """Conditions, read before PPO, without which a comparison of references says nothing. They warn, not stop."""

    smallest_kl: float = 0.05  # KL(sft0 ‖ soup), nats a response; nearer to sft0, SALSA is PPO
    lowest_agreement: float = 0.75  # of the reward model with gold, on held-out pairs
    highest_agreement: float = 0.95  # above it, the proxy is as good as gold, and nothing is over-optimised
    largest_barrier: float = 0.01  # nats a token, of the loss between the SFT models above their ends' line


@dataclass
class Plane:
    """Reward over the plane through sft0, sft1 and a trained policy, and along sft0 -> policy beyond both ends."""

    arms: list[str] = field(default_factory=list)  # whose policies span a plane; none: no plane
    kl_coef: float | None = None  # of these policies; null: the first that the arm is run at
    replicates: int = 1  # of the study's, the first so many
    step: str = "1/4"  # of the weights on the grid
    margin: str = "1/2"  # how far the grid goes beyond the three models
    prompts: int = 64  # evaluation prompts answered at each point


@dataclass
class Evaluate:
    temperature: float = 1.0  # of benchmark answers; reported KL is always at temperature 1
    alphas: list[str] = field(default_factory=lambda: ["0", "0.25", "0.5", "0.75", "1"])  # SFT soups along the line
    gates: Gates = field(default_factory=Gates)
    plane: Plane = field(default_factory=Plane)


@dataclass
class Claim:
    """A hypothesis, fixed before the run: candidate minus baseline is above 0, and by how much it would matter."""

    text: str = MISSING  # in words
    measure: str = MISSING  # kl_to_sft0 | reward | gold_reward | win_rate | matched_gold | matched_win_rate | stable
    smallest_effect: float = MISSING  # the smallest difference that would matter, in the measure's unit
    origin: str = "abstract"  # abstract: the paper says so | control: what another explanation denies
    candidate: str = "salsa"
    baseline: str = "ppo"
    # win_rate and rewards: benchmarks that must all pass; none named: each of the study's
    benchmarks: list[str] = field(default_factory=list)
    meaning: str = ""  # control: what it says of the explanation when this is refuted


@dataclass
class Stability:
    """When a trained policy counts as stable."""

    lowest_end_rate: float = 0.9  # share of evaluation responses that end by themselves, relative to sft0's
    shortest_length: float = 0.5  # mean response length, relative to sft0's
    largest_gold_loss: float = 0.02  # gold of the last kept rollouts below their peak


@dataclass
class Report:
    bootstrap: int = 2000
    seed: int = 0
    samples: int = 5  # prompts a benchmark, answered by every arm side by side
    reader: int = 20  # prompts a benchmark, with every policy's responses and verdicts, in report.html


@dataclass
class Objective:
    """The number that a sweeper maximises, read from a finished study; no part of any address."""

    arm: str = ""  # "": salsa, or the last arm where there is none of that name
    kl_coef: float | None = None  # of the study's; null: the first that the arm is run at
    # gold_reward | reward: the arm's mean minus sft0's | win_rate: against sft0, by the first judge, mean over
    # benchmarks | "": gold_reward, or win_rate where the data has no gold
    measure: str = ""
    kl_budget: float | None = None  # of KL(policy ‖ sft0), nats a response; null: no limit
    kl_penalty: float = 0.1  # taken off for each nat above the budget, in the measure's unit


@dataclass
class Execution:
    """How a run is executed. No part of its address: none of this may change what it computes, beyond rounding.

    But for random numbers: vLLM samples with others (`rollouts`), and with `sft.dropout` above 0 the masks depend on
    `processes` and `micro_batch`.
    """

    device: str = "auto"  # auto | cpu | cuda
    threads: int = 1  # CPU threads of a training or sampling job
    micro_batch: int = 64  # sequences a forward and backward pass
    rollout_batch: int = 128  # sequences sampled at once
    gradient_checkpointing: bool = False
    compile: bool = False  # torch.compile of PPO's training passes; needs a C++ compiler, warms up for a minute
    rollouts: str = "transformers"  # transformers | vllm: what samples PPO's responses and answers
    processes: int = 1  # of a run of SFT, a reward model or PPO, started by `accelerate launch`
    accelerate_config: str = ""  # its configuration file: FSDP, DeepSpeed (conf/accelerate)
    checkpoint_every: int = 10  # PPO iterations between checkpoints; 0: only when it is told to stop
    keep_value_models: bool = True  # write PPO's value models too, which take as much disk as its policies
    checkpoint_minutes: float = 30.0  # between checkpoints of SFT and reward models; 0: only when told to stop
    memory_mb: int = 2000
    runtime: int = 60  # minutes
    gpus: int = 0
    # of a judge that is asked over the network: questions at once, seconds an answer may take, tries after a failure
    judge_concurrency: int = 8
    judge_timeout: float = 120.0
    judge_retries: int = 6
    judge_requests: int = 0  # budget of a judge run; 0: no limit. One that is used up ends the run, which can go on
    judge_tokens: int = 0
    judge_check: bool = True  # try, before the first job, whether the judge's server takes a connection
    trackers: list[str] = field(default_factory=list)  # Accelerate's: tensorboard, wandb, …
    shipped_base: bool = True  # copy the checkpoint that comes with the project where its address is the run's


@dataclass
class Config:
    """A study: its list axes, what every stage does, and how it is executed."""

    name: str = "default"
    title: str = ""
    seed: int = 0
    results: str = "results"
    mixed_precision: str = (
        "no"  # no | bf16: autocast of trained models, whose weights stay float32; frozen ones bfloat16
    )
    replicates: list[int] = field(default_factory=lambda: [0])
    kl_coefs: list[float] = field(default_factory=lambda: [0.05])
    alphas: list[str] = field(default_factory=list)
    alpha_kl_coefs: list[float] | None = None  # kl_coefs of the alphas that are no arm; null: all of the study's
    # studies planned along with this one, in the same DAG, and compared with it: each is one override, such as
    # experiment=reviews or model=mistral_7b
    companions: list[str] = field(default_factory=list)
    arms: dict[str, Arm] = field(default_factory=dict)
    benchmarks: dict[str, Benchmark] = field(default_factory=dict)
    judges: dict[str, Judge] = field(default_factory=dict)
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    lengths: Lengths = field(default_factory=Lengths)
    base: Base = field(default_factory=Base)
    sft: Sft = field(default_factory=Sft)
    reward_model: RewardModel = field(default_factory=RewardModel)
    ppo: Ppo = field(default_factory=Ppo)
    evaluate: Evaluate = field(default_factory=Evaluate)
    report: Report = field(default_factory=Report)
    claims: dict[str, Claim] = field(default_factory=dict)
    stability: Stability = field(default_factory=Stability)
    objective: Objective = field(default_factory=Objective)
    execution: Execution = field(default_factory=Execution)


# What each stage receives: the slice of the configuration that determines its result, and nothing else.


@dataclass
class CorpusSettings:
    corpus: Corpus
    sha256: str = ""  # of the package's file that the corpus is read from


@dataclass
class PrepareSettings:
    task: Task
    files: dict[str, str] = field(default_factory=dict)  # settings name -> "<bytes>:<sha256>" of each local file


@dataclass
class BenchmarkSettings:
    name: str
    benchmark: Benchmark
    task: Task
    files: dict[str, str] = field(default_factory=dict)


@dataclass
class BaseSettings:
    model: Model
    base: Base | None = None  # pretraining, where the project makes the model
    files: dict[str, str] = field(default_factory=dict)  # content of a local model folder


@dataclass
class SftSettings:
    seed: int
    sft: Sft
    lengths: Lengths
    mixed_precision: str = "no"


@dataclass
class RewardModelSettings:
    seed: int
    preferences: str  # sampled | given; sampled_for_judge | given_for_judge: others, that PPO's reward model never sees
    reward_model: RewardModel
    lengths: Lengths
    mixed_precision: str = "no"


@dataclass
class PpoSettings:
    seed: int
    kl_coef: float
    start: list[str]
    reference: Reference
    ppo: Ppo
    lengths: Lengths
    mixed_precision: str = "no"


@dataclass
class LandscapeSettings:
    """The line between the first two SFT models, before PPO."""

    seed: int
    alphas: list[str]
    temperature: float
    lengths: Lengths
    gates: Gates


@dataclass
class PlaneSettings:
    seed: int
    step: str
    margin: str
    prompts: int
    lengths: Lengths


@dataclass
class RespondSettings:
    seed: int
    temperature: float
    lengths: Lengths


@dataclass
class JudgeSettings:
    name: str
    judge: Judge
    replicate: int
    candidate: str
    baselines: dict[str, str]  # baseline's name -> the `model` field of its rows in its responses
    files: dict[str, str] = field(default_factory=dict)  # content of a folder of prompt templates


@dataclass
class StudySettings:
    config: dict[str, Any]  # the resolved configuration without `execution`
    policies: list[dict[str, Any]]  # arm, alpha, kl_coef, replicate, name, index (among the parents), baselines


@dataclass
class ComparisonSettings:
    points: list[dict[str, str]]  # swept key -> its value at the point; its study is the parent study/<place>


def from_dict(cls, values):
    """Build dataclass `cls` from nested dictionaries; an unknown or missing key is a ValueError that names it."""
    hints = typing.get_type_hints(cls)
    known = {f.name for f in fields(cls)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"{cls.__name__} has no setting {unknown[0]!r}; it has {', '.join(sorted(known))}")
    return cls(**{name: _convert(hints[name], value) for name, value in values.items()})


def _convert(hint, value):
    if is_dataclass(hint) and isinstance(value, dict):
        return from_dict(hint, value)
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is dict and is_dataclass(arguments[1]):
        return {key: _convert(arguments[1], item) for key, item in value.items()}
    if typing.get_origin(hint) in (typing.Union, types.UnionType) and value is not None:
        return _convert(arguments[0], value)
    return value
