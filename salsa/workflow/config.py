"""The schema of the whole configuration, as dataclasses, and how a command line becomes checked configurations.

Every value has one home: `conf/` holds the values, this module their names, types and bounds. Stages receive the
smallest dataclass that determines their result, so that two runs with equal settings are the same run. What is
execution only (threads, device, micro-batch) lives in `Execution` and is never part of a run's address.

Only the standard library is imported at the top: numerics that read these settings run where Hydra is not installed.
"""

import typing
from dataclasses import dataclass, field, is_dataclass
from typing import Any

from salsa.workflow import bounds, registry
from salsa.workflow.bounds import (
    choice,
    entries,
    fraction_text,
    label,
    many,
    number,
    planned,
    share,
    switch,
    text,
    whole,
)

MISSING = bounds.UNSET  # a value that the configuration has to give
MOST = 10**9  # of rows, and of what else is counted
LARGEST_BATCH = 10**6
LARGEST_SEED = 2**32 - 1  # that numpy and transformers take
ENVIRONMENT_VARIABLE = r"[A-Za-z_][A-Za-z0-9_]*"
PATH = 4096  # characters of the longest path
PROSE = 2000  # characters of a title or a description
TRACKERS = ("tensorboard", "wandb", "trackio", "comet_ml", "mlflow", "clearml", "dvclive", "swanlab")


def _seed(default=0):
    return whole(default, 0, LARGEST_SEED)


def _path(default=""):
    """A file, a folder or a hub id."""
    return text(default, PATH)


def _prose(default):
    """Sentences, for people."""
    return text(default, PROSE, lines=True)


def _weight():
    """Of a model in a soup; below 0 or above 1, the soup lies beyond its ingredients."""
    return fraction_text(at_least=-1000, at_most=1000)


def _alpha():
    """A place on the line from sft0 to sft1."""
    return fraction_text(at_least=0, at_most=1)


def _kl_coef(default=bounds.NEEDED):
    return number(default, at_least=0, at_most=10**6)


def _temperature(default=bounds.NEEDED):
    """Of sampling: logits are divided by it."""
    return number(default, at_least=0.01, at_most=100)


def _lora_rank():
    return whole(0, 0, 2**14)


def _lora_alpha():
    return number(16.0, above=0, at_most=10**6)


def _tracker():
    """What both Accelerate and transformers know by this name."""
    return choice(bounds.NEEDED, *TRACKERS)


def _learning_rate(default):
    """Whatever is above 0: one that is too large is found, and said, by the training that it breaks."""
    return number(default, above=0)


@dataclass
class Architecture:
    """A Llama that the project pretrains itself."""

    vocabulary_size: int = whole(512, 1, 2**20)
    hidden_size: int = whole(128, 1, 2**14)
    intermediate_size: int = whole(384, 1, 2**16)
    layers: int = whole(4, 1, 200)
    heads: int = whole(4, 1, 1024)
    max_length: int = whole(192, 2, 2**20)


@dataclass
class Model:
    """A base model: made by the project (`pretrain`), from a package's GGUF (`package`), or a hub id or folder."""

    name: str = label(MISSING)
    source: str = choice(MISSING, "pretrain", "package", "hub")
    path: str = _path()  # hub id or local folder (hub); the package's name (package)
    revision: str | None = text(None, 100, r"[\w./-]+", "no revision; give a branch, a tag or a commit", empty=False)
    dtype: str = choice("float32", "float32", "bfloat16")
    pickled_weights: bool = switch(
        False
    )  # read pickles (pytorch_model.bin), where there are no safetensors; tensors alone
    # a file of salsa/data/templates, without .jinja; null: the model's own
    chat_template: str | None = label(None)
    architecture: Architecture = field(default_factory=Architecture)


@dataclass
class Corpus:
    """Pretraining text."""

    kind: str = choice(MISSING, "stories", "reviews", "none")
    seed: int = _seed()
    documents: int = whole(0, 0, 10**7)


@dataclass
class Task:
    """What SFT, the reward model, PPO and evaluation prompts are made from. Sizes are upper limits for read data."""

    kind: str = choice(MISSING, *registry.names("salsa.data.worlds"))
    seed: int = _seed()
    demonstrations: int = whole(0, 0, MOST)
    validation: int = whole(0, 0, MOST)
    preferences: int = whole(0, 0, MOST)  # prompts (sampled preferences) or pairs (given preferences)
    prompts: int = whole(0, 0, MOST)  # for PPO
    # development prompts on which KL and rewards of final policies are reported
    evaluation: int = whole(0, 0, MOST)
    opening_words: int = whole(6, 1, 1000)  # reviews: words of a review that make its prompt
    # reviews: words of the continuation that gold and demonstrations see; 0: all
    response_words: int = whole(0, 0, 10000)
    sft_file: str = _path()  # ultra: ORG/NAME, ORG/NAME@REVISION, or a local file (docs/extending.md)
    preference_file: str = _path()
    evaluation_file: str = _path()


@dataclass
class Data:
    name: str = label(MISSING)
    # sampled: pairs drawn from the SFT models, labelled by gold | given: read from data
    preferences: str = choice("sampled", "sampled", "given")
    corpus: Corpus = field(default_factory=Corpus)
    task: Task = field(default_factory=Task)


@dataclass
class Benchmark:
    kind: str = choice(MISSING, *registry.names("salsa.data.benchmarks"))
    prompts: int = whole(0, 0, MOST)  # upper limit; 0: all
    file: str = _path()
    reference_file: str = _path()


@dataclass
class Judge:
    kind: str = choice(MISSING, *registry.names("salsa.judges"))
    # of the judges that score: a difference up to this is a tie
    tie_margin: float = number(0.0, at_least=0, at_most=10**6)
    tournament: bool = switch(False)  # not only against sft0 and plain PPO: every pair of policies at one kl_coef
    # openai: any server that speaks the API of that name
    model: str = text("", 200)
    base_url: str = text("", PATH, secret=True)  # "": the environment's OPENAI_BASE_URL, or OpenAI's own
    # the environment variable that holds the key
    key_variable: str = text(
        "OPENAI_API_KEY",
        100,
        ENVIRONMENT_VARIABLE,
        "must be the name of an environment variable, such as OPENAI_API_KEY, and not a key itself",
        empty=False,
        secret=True,
    )
    templates: str = _path()  # a folder of prompts; "": the project's own, salsa/judges/templates
    # null leaves a parameter out of what is asked, for a server that refuses it
    temperature: float | None = number(0.0, at_least=0, at_most=100)
    max_tokens: int | None = whole(1024, 1, 2**20)  # of an answer
    seed: int | None = _seed()  # of answers that are sampled; another seed draws others
    attempts: int = whole(3, 1, 100)  # answers asked for until one holds a verdict


@dataclass
class Reference:
    """What the KL penalty is measured from."""

    # soup: the weight average of the SFT models | noise: sft0 moved at random, as far as that soup |
    # multi_kl: each SFT model with a weight, KLs averaged | ema: a soup that follows the policy slowly |
    # reset: a soup that is replaced by the policy now and then
    kind: str = choice("soup", *registry.names("salsa.anchors"))
    weights: list[str] = many(["1"], _weight())  # decimals or fractions, one for each SFT model
    rate: float = share(0.0)  # ema: share of the policy that is mixed in after each iteration (WARP's mu)
    every: int = whole(0, 0, MOST)  # reset: iterations between two copies of the policy


@dataclass
class KlSchedule:
    """How kl_coef changes over a run."""

    kind: str = choice("fixed", "fixed", "linear", "adaptive")
    final: float = share(0.0)  # linear: share of kl_coef that is left in the last iteration
    target: float = number(6.0, above=0, at_most=10**6)  # adaptive: wanted KL to the reference, nats a response
    # adaptive: responses in which kl_coef follows (1909.08593)
    horizon: float = number(10000.0, above=0, at_most=10**12)


@dataclass
class Arm:
    """A way to run PPO: where the policy starts (weights over the SFT models) and what its reference is."""

    description: str = _prose("")
    start: list[str] = many(["1"], _weight())
    reference: Reference = field(default_factory=Reference)
    kl_scale: float = number(1.0, above=0, at_most=10**6)  # of the study's kl_coef
    kl_schedule: KlSchedule | None = None  # null: ppo.kl_schedule
    kl_coefs: list[float] | None = many(None, _kl_coef())  # those of the study's that it is run at; null: all


@dataclass
class Lengths:
    """Tokens. A prompt longer than `prompt` is dropped and counted, never cut silently."""

    prompt: int = whole(32, 1, 2**20)
    response: int = whole(40, 1, 2**20)


@dataclass
class Base:
    """Pretraining, for `model.source: pretrain`."""

    seed: int = _seed()
    epochs: int = whole(1, 1, 10000)
    batch_size: int = whole(64, 1, LARGEST_BATCH)
    block_length: int = whole(128, 2, 2**20)
    learning_rate: float = _learning_rate(1e-3)
    weight_decay: float = number(0.01, at_least=0, at_most=100)
    warmup: float = number(0.05, at_least=0, below=1)  # share of the steps


@dataclass
class Sft:
    models: int = whole(2, 1, 100)  # SFT models a replicate, differing in the seed alone
    epochs: int = whole(3, 1, 10000)
    batch_size: int = whole(32, 1, LARGEST_BATCH)
    learning_rate: float = _learning_rate(1e-4)
    weight_decay: float = number(0.0, at_least=0, at_most=100)
    warmup: float = number(0.05, at_least=0, below=1)  # share of the steps
    # attention dropout while training; with the data order, what a seed changes
    dropout: float = number(0.0, at_least=0, below=1)
    # validation: the epoch of lowest validation loss | epochs: the last, over-fitted or not
    stop: str = choice("validation", "validation", "epochs")
    # low-rank adapters on every linear layer but the head, merged in the end; 0: all are trained
    lora_rank: int = _lora_rank()
    lora_alpha: float = _lora_alpha()


@dataclass
class RewardModel:
    pairs: int = whole(1000, 1, MOST)
    held_out: int = whole(256, 1, MOST)
    epochs: int = whole(1, 1, 10000)
    batch_size: int = whole(64, 1, LARGEST_BATCH)
    learning_rate: float = _learning_rate(1e-4)
    warmup: float = number(0.05, at_least=0, below=1)  # share of the steps
    # Bradley-Terry noise of sampled preferences, in units of gold
    gold_temperature: float = number(0.1, above=0, at_most=10**6)
    # prompts on which sft0's samples fix the reward's shift and scale: a deviation takes two
    normalisation_prompts: int = whole(256, 2, MOST)
    lora_rank: int = _lora_rank()  # as in Sft; the head, which sft0 has none of, is trained whole
    lora_alpha: float = _lora_alpha()


@dataclass
class Ppo:
    iterations: int = whole(40, 1, 10**6)
    batch_size: int = whole(128, 1, LARGEST_BATCH)  # prompts an iteration, over all processes
    epochs: int = whole(2, 1, 1000)
    mini_batches: int = whole(1, 1, LARGEST_BATCH)
    learning_rate: float = _learning_rate(1e-4)
    schedule: str = choice("linear", "linear", "constant")  # linear: to 0 over the run
    warmup: int = whole(0, 0, 10**6)  # iterations
    adam_beta1: float = number(0.9, at_least=0, below=1)
    adam_beta2: float = number(0.999, at_least=0, below=1)
    adam_epsilon: float = number(1e-5, at_least=1e-30, at_most=1)  # above 0 in float32, too
    kl_estimator: str = choice("k1", "k1", "k2", "k3")
    kl_in: str = choice("reward", "reward", "loss")
    kl_schedule: KlSchedule = field(default_factory=KlSchedule)
    gamma: float = share(1.0)
    lam: float = share(0.95)
    clip_range: float = number(0.2, at_least=0, at_most=1000)
    value_clip_range: float = number(0.2, at_least=0, at_most=10**6)
    value_coef: float = number(0.1, at_least=0, at_most=10**6)
    # a network of its own that starts as the reward model (reward_model) or as the policy does, with a head of zeros
    # (sft), or a head of zeros on the policy's trunk (shared)
    value_model: str = choice("reward_model", "reward_model", "sft", "shared")
    max_grad_norm: float = number(1.0, above=0, at_most=10**9)
    temperature: float = _temperature(1.0)
    # constants: shifted and scaled as on sft0's samples | batch: to mean 0 and deviation 1 in each batch | none
    score_normalisation: str = choice("constants", "constants", "batch", "none")
    # largest absolute score that is paid, after normalisation; 0: no limit
    score_clip: float = number(0.0, at_least=0, at_most=10**6)
    missing_eos_penalty: float = number(1.0, at_least=0, at_most=10**6)
    # rescales what is paid, but not a penalty in the loss: with kl_in=loss it makes the penalty several times weaker
    whiten_advantages: bool = switch(True)
    # low-rank adapters on every linear layer of policy and value model; 0: all weights are trained
    lora_rank: int = _lora_rank()
    lora_alpha: float = _lora_alpha()
    # iterations between kept rollouts (text), from which gold trajectories are read
    rollouts_every: int = whole(5, 1, 10**6)


@dataclass
class Gates:
    """Conditions, read before PPO, without which a comparison of references says nothing. They warn, not stop."""

    # KL(sft0 ‖ soup), nats a response; nearer to sft0, SALSA is PPO
    smallest_kl: float = number(0.05, at_least=0, at_most=10**6)
    lowest_agreement: float = share(0.75)  # of the reward model with gold, on held-out pairs
    highest_agreement: float = share(0.95)  # above it, the proxy is as good as gold, and nothing is over-optimised
    # nats a token, of the loss between the SFT models above their ends' line
    largest_barrier: float = number(0.01, at_least=0, at_most=10**6)


@dataclass
class Plane:
    """Reward over the plane through sft0, sft1 and a trained policy, and along sft0 -> policy beyond both ends."""

    arms: list[str] = many([], label())  # whose policies span a plane; none: no plane
    kl_coef: float | None = _kl_coef(None)  # of these policies; null: the first that the arm is run at
    replicates: int = whole(1, 0, 1000)  # of the study's, the first so many
    step: str = fraction_text("1/4", above=0, at_most=1)  # of the weights on the grid
    margin: str = fraction_text("1/2", at_least=0, at_most=5)  # how far the grid goes beyond the three models
    prompts: int = whole(64, 1, MOST)  # evaluation prompts answered at each point


@dataclass
class Evaluate:
    temperature: float = _temperature(1.0)  # of benchmark answers; reported KL is always at temperature 1
    alphas: list[str] = many(["0", "0.25", "0.5", "0.75", "1"], _alpha())  # SFT soups along the line
    gates: Gates = field(default_factory=Gates)
    plane: Plane = field(default_factory=Plane)


@dataclass
class Claim:
    """A hypothesis, fixed before the run: candidate minus baseline is above 0, and by how much it would matter."""

    text: str = _prose(MISSING)  # in words
    measure: str = choice(
        MISSING, "kl_to_sft0", "reward", "gold_reward", "win_rate", "matched_gold", "matched_win_rate", "stable"
    )
    # the smallest difference that would matter, in the measure's unit
    smallest_effect: float = number(MISSING, above=0, at_most=10**6)
    origin: str = choice("abstract", "abstract", "control")  # the paper says so | what another explanation denies
    candidate: str = label("salsa")
    baseline: str = label("ppo")
    # win_rate and rewards: benchmarks that must all pass; none named: each of the study's
    benchmarks: list[str] = many([], label())
    meaning: str = _prose("")  # control: what it says of the explanation when this is refuted


@dataclass
class Stability:
    """When a trained policy counts as stable, and when as collapsed."""

    # share of evaluation responses that end by themselves, relative to sft0's
    lowest_end_rate: float = number(0.9, at_least=0, at_most=1000)
    shortest_length: float = number(0.5, at_least=0, at_most=1000)  # mean response length, relative to sft0's
    largest_gold_loss: float = number(
        0.02, at_least=0, at_most=10**6
    )  # gold of the last kept rollouts below their peak
    # Beyond any of these a policy is marked as collapsed wherever it is shown, as it is where a number is not finite.
    collapsed_end_rate: float = number(0.5, at_least=0, at_most=1000)  # share of responses that end, by sft0's
    collapsed_length: float = number(0.1, at_least=0, at_most=1000)  # mean response length, by sft0's
    # KL(policy ‖ sft0), nats a token: its tokens are such as sft0 gives less than 1 % (e⁻⁵)
    collapsed_kl: float = number(5.0, above=0, at_most=10**6)


@dataclass
class JudgeLimits:
    """What a judge's verdicts must show for claims to be read from them; docs/evaluation.md says why these.

    The last two are of the lower bounds of 95 % intervals over prompts, so that few verdicts show little.
    """

    # of its answers: errors on 10 % of the prompts that differ from the others by 30 points move a rate by 3
    largest_error_share: float = number(0.1, at_least=0, at_most=1)
    smallest_discrimination: float = number(0.0, at_least=0, at_most=1)  # share of verdicts that follow the answers
    smallest_kappa: float = number(0.0, at_least=-1, at_most=1)  # agreement with gold beyond chance, where gold is


@dataclass
class Report:
    bootstrap: int = whole(2000, 1, 100000)
    seed: int = _seed()
    samples: int = whole(5, 0, 1000)  # prompts a benchmark, answered by every arm side by side
    reader: int = whole(20, 0, 10000)  # prompts a benchmark, with every policy's responses and verdicts, in report.html
    judges: JudgeLimits = field(default_factory=JudgeLimits)


@dataclass
class Objective:
    """The number that a sweeper maximises, read from a finished study; no part of any address."""

    arm: str = text("", 64)  # "": salsa, or the last arm where there is none of that name
    kl_coef: float | None = _kl_coef(None)  # of the study's; null: the first that the arm is run at
    # gold_reward | reward: the arm's mean minus sft0's | win_rate: against sft0, by the first judge, mean over
    # benchmarks | "": gold_reward, or win_rate where the data has no gold
    measure: str = choice("", "", "gold_reward", "reward", "win_rate")
    # of KL(policy ‖ sft0), nats a response; null: no limit
    kl_budget: float | None = number(None, at_least=0, at_most=10**6)
    # taken off for each nat above the budget, in the measure's unit
    kl_penalty: float = number(0.1, above=0, at_most=10**6)


@dataclass
class Execution:
    """How a run is executed. No part of its address: none of this may change what it computes, beyond rounding.

    But for random numbers: vLLM samples with others (`rollouts`), and with `sft.dropout` above 0 the masks depend on
    `processes` and `micro_batch`.
    """

    device: str = choice("auto", "auto", "cpu", "cuda")
    threads: int = whole(1, 1, 1024)  # CPU threads of a training or sampling job
    micro_batch: int = whole(64, 1, LARGEST_BATCH)  # sequences a forward and backward pass
    rollout_batch: int = whole(128, 1, LARGEST_BATCH)  # sequences sampled at once
    gradient_checkpointing: bool = switch(False)
    # torch.compile of PPO's training passes; needs a C++ compiler, warms up for a minute
    compile: bool = switch(False)
    rollouts: str = choice("transformers", "transformers", "vllm")  # what samples PPO's responses and answers
    processes: int = whole(1, 1, 1024)  # of a run of SFT, a reward model or PPO, started by `accelerate launch`
    accelerate_config: str = _path()  # its configuration file: FSDP, DeepSpeed (conf/accelerate)
    checkpoint_every: int = whole(10, 0, 10**6)  # PPO iterations between checkpoints; 0: only when it is told to stop
    keep_value_models: bool = switch(True)  # write PPO's value models too, which take as much disk as its policies
    # between checkpoints of SFT and reward models; 0: only when told to stop
    checkpoint_minutes: float = number(30.0, at_least=0, at_most=10**6)
    memory_mb: int = whole(2000, 1, 10**9)
    runtime: int = whole(60, 1, 10**6)  # minutes
    gpus: int = whole(0, 0, 1024)
    # of a judge that is asked over the network: questions at once, seconds an answer may take, tries after a failure
    judge_concurrency: int = whole(8, 1, 1000)
    judge_timeout: float = number(120.0, above=0, at_most=86400)
    judge_retries: int = whole(6, 0, 1000)
    # budget of a judge run; 0: no limit. One that is used up ends the run, which can go on
    judge_requests: int = whole(0, 0, 10**12)
    judge_tokens: int = whole(0, 0, 10**15)
    judge_check: bool = switch(True)  # try, before the first job, whether the judge's server takes a connection
    trackers: list[str] = many([], _tracker())  # Accelerate's: tensorboard, wandb, …
    shipped_base: bool = switch(True)  # copy the checkpoint that comes with the project where its address is the run's


@dataclass
class Config:
    """A study: its list axes, what every stage does, and how it is executed."""

    name: str = label("default")
    title: str = _prose("")
    seed: int = _seed()
    results: str = text("results", PATH, empty=False)
    # bf16: autocast of trained models, whose weights stay float32; frozen ones are bfloat16
    mixed_precision: str = choice("no", "no", "bf16")
    replicates: list[int] = many([0], whole(0, 0, 10**6))
    kl_coefs: list[float] = many([0.05], _kl_coef())
    alphas: list[str] = many([], _alpha())
    # kl_coefs of the alphas that are no arm; null: all of the study's
    alpha_kl_coefs: list[float] | None = many(None, _kl_coef())
    # studies planned along with this one, in the same DAG, and compared with it: each is one override, such as
    # experiment=reviews or model=mistral_7b
    companions: list[str] = many([], text("", PROSE), at_most=100)
    arms: dict[str, Arm] = entries()
    benchmarks: dict[str, Benchmark] = entries()
    judges: dict[str, Judge] = entries()
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    lengths: Lengths = field(default_factory=Lengths)
    base: Base = field(default_factory=Base)
    sft: Sft = field(default_factory=Sft)
    reward_model: RewardModel = field(default_factory=RewardModel)
    ppo: Ppo = field(default_factory=Ppo)
    evaluate: Evaluate = field(default_factory=Evaluate)
    report: Report = field(default_factory=Report)
    claims: dict[str, Claim] = entries()
    stability: Stability = field(default_factory=Stability)
    objective: Objective = field(default_factory=Objective)
    execution: Execution = field(default_factory=Execution)


# What each stage receives: the slice of the configuration that determines its result, and nothing else. What the plan
# makes of settings, and no one writes, is `planned`.


@dataclass
class CorpusSettings:
    corpus: Corpus
    sha256: str = planned("")  # of the package's file that the corpus is read from


@dataclass
class PrepareSettings:
    task: Task
    files: dict[str, str] = planned(dict)  # settings name -> "<bytes>:<sha256>" of each local file


@dataclass
class BenchmarkSettings:
    name: str = label()
    benchmark: Benchmark = field()
    task: Task = field()
    files: dict[str, str] = planned(dict)


@dataclass
class BaseSettings:
    model: Model
    base: Base | None = None  # pretraining, where the project makes the model
    files: dict[str, str] = planned(dict)  # content of a local model folder


@dataclass
class SftSettings:
    seed: int = _seed(bounds.NEEDED)
    sft: Sft = field()
    lengths: Lengths = field()
    mixed_precision: str = choice("no", "no", "bf16")


@dataclass
class RewardModelSettings:
    seed: int = _seed(bounds.NEEDED)
    # the last two: others, that PPO's reward model never sees
    preferences: str = choice(bounds.NEEDED, "sampled", "given", "sampled_for_judge", "given_for_judge")
    reward_model: RewardModel = field()
    lengths: Lengths = field()
    mixed_precision: str = choice("no", "no", "bf16")


@dataclass
class PpoSettings:
    seed: int = _seed(bounds.NEEDED)
    kl_coef: float = _kl_coef()
    start: list[str] = many(bounds.NEEDED, _weight())
    reference: Reference = field()
    ppo: Ppo = field()
    lengths: Lengths = field()
    mixed_precision: str = choice("no", "no", "bf16")


@dataclass
class LandscapeSettings:
    """The line between the first two SFT models, before PPO."""

    seed: int = _seed(bounds.NEEDED)
    alphas: list[str] = many(bounds.NEEDED, _alpha())
    temperature: float = _temperature()
    lengths: Lengths = field()
    gates: Gates = field()


@dataclass
class PlaneSettings:
    seed: int = _seed(bounds.NEEDED)
    step: str = fraction_text(above=0, at_most=1)
    margin: str = fraction_text(at_least=0, at_most=5)
    prompts: int = whole(at_least=1, at_most=MOST)
    lengths: Lengths = field()


@dataclass
class RespondSettings:
    seed: int = _seed(bounds.NEEDED)
    temperature: float = _temperature()
    lengths: Lengths = field()


@dataclass
class JudgeSettings:
    name: str = label()
    judge: Judge = field()
    replicate: int = whole(at_least=0, at_most=10**6)
    candidate: str = text()
    baselines: dict[str, str] = planned()  # baseline's name -> the `model` field of its rows in its responses
    files: dict[str, str] = planned(dict)  # content of a folder of prompt templates


@dataclass
class StudySettings:
    config: dict[str, Any] = planned()  # the resolved configuration without `execution`
    policies: list[dict[str, Any]] = planned()  # arm, alpha, kl_coef, replicate, name, index, baselines


@dataclass
class ComparisonSettings:
    points: list[dict[str, str]] = planned()  # swept key -> its value at the point; its study is study/<place>


def from_dict(cls, values):
    """Build dataclass `cls` from nested dictionaries, with its defaults where they leave something out.

    Raises:
        bounds.SettingError: a ValueError of one line, which names the key of an unknown or missing setting, of a wrong
            type, or of a value that its field does not allow.
    """
    return _made(cls, bounds.check(cls, values))


def _made(hint, value):
    """A checked value as the type of its field says."""
    hint = bounds.required(hint)
    if is_dataclass(hint) and value is not None:
        hints = bounds.type_hints(hint)
        return hint(**{name: _made(hints[name], item) for name, item in value.items()})
    if typing.get_origin(hint) is dict:
        return {name: _made(bounds.item_type(hint), item) for name, item in value.items()}
    return value
