"""What algorithms have in common that sample responses and take clipped policy-gradient steps on them.

Sampling, scoring, references, mini-batches, checkpoints and processes are those of one engine, salsa/rl/trainer.py. An
algorithm is a `PolicyGradient` record: its settings, its advantages and its loss. This module imports no torch.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Annotated, ClassVar, Literal

from pydantic import model_validator

from salsa import algorithms, anchors
from salsa.workflow import resources, schema
from salsa.workflow.schema import fault

Epochs = Annotated[int, schema.Range(1, 1000)]
ClipRange = Annotated[float, schema.Range(0, 1000)]
PHASES = ("rollout", "score", "reference", "optimise")  # of an iteration, in their order
LOGS = {
    "kl_k1": ("KL to the reference, estimated by k1: log-ratios", "nats per response"),
    "kl_k2": ("likewise by k2: half their squares", "nats per response"),
    "kl_k3": ("likewise by k3: ratio − 1 − log-ratio", "nats per response"),
    "reward": ("mean score as it is paid: normalised and clipped, less missing_eos_penalty without an end", ""),
    "kl_coef": ("weight of the penalty in this iteration", "reward per nat"),
    "learning_rate": ("learning rate of this iteration", ""),
    "importance": ("mean weight of a token for how it was sampled", ""),
    "sampling_difference": ("log-probabilities in sampling and in training differ by", "nats per token"),
    "entropy": ("entropy of the policy", "nats per token"),
    "gradient_norm": ("norm of the policy's gradient before it is clipped", ""),
    **{f"seconds_{phase}": (f"time of the phase {phase}", "seconds") for phase in PHASES},
    "seconds": ("time of the iteration", "seconds"),
    "peak_memory_mib": ("most memory so far", "MiB"),
}
"""What the engine logs of every algorithm, beside what `algorithms.CONTRACT` asks for."""


@schema.dataclass()
class Settings(schema.OnPolicy):
    """The settings that the engine reads of every algorithm, and constants where an algorithm has no such choice."""

    kl_estimator: ClassVar[str] = "k1"
    kl_in: ClassVar[str] = "reward"
    value_model: ClassVar[str | None] = None

    epochs: Epochs = 1
    """Passes over an iteration's responses."""
    mini_batches: schema.Batch = 1
    """Optimizer steps per pass."""
    learning_rate: schema.LearningRate = 0.0001
    """Learning rate of Adam."""
    schedule: Literal["linear", "constant"] = "linear"
    """How the learning rate goes on: linear, to 0 over the run | constant."""
    warmup: Annotated[int, schema.Range(0, 10**6)] = 0
    """Iterations in which the learning rate rises."""
    adam_beta1: schema.Part = 0.9
    """Decay of Adam's first moment."""
    adam_beta2: schema.Part = 0.999
    """Decay of Adam's second moment."""
    adam_epsilon: Annotated[float, schema.Range(1e-30, 1)] = 1e-05
    """Adam's epsilon, above 0 in float32, too."""
    max_grad_norm: Annotated[float, schema.Range(above=0, at_most=10**9)] = 1.0
    """Norm to which the gradient of each network is clipped."""
    temperature: schema.Temperature = 1.0
    """Temperature of sampling in training; log-probabilities are taken at it."""
    score_normalisation: Literal["constants", "batch", "none"] = "constants"
    """constants: scores are shifted and scaled as on sft0's samples | batch: to mean 0 and deviation 1 in each batch |
    none.
    """
    score_clip: Annotated[float, schema.Range(0, 10**6)] = 0.0
    """Largest absolute score that is paid, after normalisation; 0: no limit."""
    missing_eos_penalty: Annotated[float, schema.Range(0, 10**6)] = 1.0
    """What is taken off the score of a response that does not end by itself."""

    @property
    def section(self):
        """The name of the section, which is that of the file that its schema stands in."""
        return type(self).__module__.rpartition(".")[2]

    @property
    def response_means(self):
        """Whether the loss has the mean over each response's own tokens."""
        return False

    @property
    def prompts(self):
        """Prompts an iteration."""
        return self.batch_size // self.samples

    @property
    def batch_words(self):
        """The settings that say how many prompts an iteration has."""
        return self._words("batch_size", *["samples"] * (self.samples > 1))

    @property
    def penalty_words(self):
        """The settings that say what the penalty is."""
        settings = {field.name for field in fields(self)}
        return self._words(*(name for name in ("kl_estimator", "kl_in", "length_normalisation") if name in settings))

    def _words(self, *names):
        return " ".join(f"{self.section}.{name}={getattr(self, name)}" for name in names)

    @model_validator(mode="after")
    def _consistent(self):
        name = self.section
        if self.kl_estimator == "k1" and self.kl_in == "loss":
            text = "of a penalty in the loss, its gradient is zero on average; use kl_estimator=k2"
            raise fault(text, "kl_estimator", self)
        if self.warmup > self.iterations:
            raise fault(f"longer than {name}.iterations={self.iterations}; make it shorter", "warmup", self)
        if self.score_normalisation == "batch" and self.batch_size < 2:
            raise fault(f"one score of a batch has no deviation; raise {name}.batch_size", "score_normalisation", self)
        if self.batch_size % self.mini_batches:
            raise fault(f"not divisible by {name}.mini_batches={self.mini_batches}; change one", "batch_size", self)
        return self


def train(settings, parents, output, execution):
    """The stage; see `salsa.rl.trainer.train`."""
    from salsa.rl import trainer

    return trainer.train(settings, parents, output, execution)


def words(section):
    """For how long it trains, and on what."""
    each = f", {section.samples} responses to each" if section.samples > 1 else ""
    return f"{section.iterations} iterations of {section.prompts} prompts{each}"


def resources_of(case):
    """The `resources.Resources` of a run: of training, or of sampling where that is more."""
    settings, shape, execution = case.settings[case.run.stage], case.shape, case.execution
    value_model = settings.get("value_model")
    own_network = value_model not in (None, "shared")
    networks = 1 + own_network
    trained = case.trained(settings, networks)
    reference = anchors.settings()(**case.settings["reference"])
    kind = anchors.kinds()[reference.kind]
    anchor, parameters = case.frozen_models(case.run)
    frozen = (parameters + shape.trunk) * case.frozen  # and the reward model
    if kind.held_in_float32:
        frozen += shape.parameters * (resources.FLOAT - case.frozen)
    rows = case.share(settings["batch_size"] // settings["mini_batches"])
    training = case.activations(rows, case.length, networks) + case.logits(rows * case.response)
    sampling = case.sampling(min(execution["rollout_batch"], settings["batch_size"] // case.processes), case.number)
    if case.sharded:  # the policy is whole where it samples
        sampling += shape.parameters * case.number
    memory = {"process": resources.PROCESS, **trained, "frozen models": frozen, "activations": max(training, sampling)}
    # The reward, the references, values where a network of their own says them, and training. Sampling computes a
    # prompt once for all responses to it.
    passes = 1 + own_network + 3 * networks * settings["epochs"]
    passes += kind.models(reference) * anchor.matrices / shape.matrices
    responses = settings["batch_size"] * settings["iterations"]
    tokens = responses * case.length
    sampled = responses // settings.get("samples", 1) * case.prompt + responses * case.response
    state = trained["weights"] + trained["optimizer"]
    kept_values = shape.trunk * (own_network and execution["keep_value_models"])
    disk = resources.FLOAT * (shape.parameters * (1 + kind.moves) + kept_values)
    checkpoints = 2 * state * (case.processes if case.sharded else 1)
    return resources.Resources(memory, 2 * shape.matrices * (tokens * passes + sampled), disk, checkpoints)


def pays_deviations(section):
    """Whether scores are divided by their deviation on sft0's samples, and the penalty is taken off them."""
    return section.score_normalisation == "constants" and section.kl_in == "reward"


def check(section, execution):
    """ValueError where processes can't share a mini-batch evenly."""
    size, name = section.batch_size // section.mini_batches, section.section
    if size % execution.processes:
        raise ValueError(
            f"execution.processes={execution.processes}: cannot share the {size} responses of a mini-batch evenly; "
            f"change it, {name}.batch_size or {name}.mini_batches"
        )


@schema.dataclass()
class Grouped(Settings):
    """Of an algorithm that compares the responses to one prompt with each other, and so needs no value model."""

    samples: Annotated[int, schema.Range(2, 1000)] = 4
    """Responses to each prompt. batch_size counts responses: batch_size / samples prompts an iteration."""
    clip_range: ClipRange = 0.2
    """How far the probability ratio may move from 1 before it is clipped."""

    @model_validator(mode="after")
    def _groups(self):
        if self.batch_size % self.samples:
            raise fault(f"not divisible by {self.section}.samples={self.samples}; change one", "batch_size", self)
        return self


@dataclass(frozen=True, kw_only=True)
class PolicyGradient(algorithms.Algorithm):
    """An algorithm that the engine trains. A new one gives its settings, advantages, loss and what they log.

    Attributes:
        settings: a `Settings`.
        advantages: (rl.batches.Batch of a whole iteration, its section) -> (tensors, metrics). The tensors, by name,
            have a row for each response, and the loss finds them in its batch; `advantages` is one of them: (B, T),
            or (B,) where the loss takes the ratio of a whole response. Metrics are numbers, by name.
        loss: (rl.batches.Batch of a micro-batch, log-probabilities (B, T), values (B, T) or None, its section) ->
            (loss, metrics), all tensors of one number, and means over tokens or responses as `mean_over` says.
        mean_over: token or response.
    """

    advantages: Callable
    loss: Callable
    mean_over: Literal["token", "response"] = "token"
    train: Callable = train
    words: Callable = words
    resources: Callable = resources_of
    check: Callable = check
    pays_deviations: Callable = pays_deviations
    processes: bool = True
    resumes: bool = True
