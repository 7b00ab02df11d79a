"""PPO with a KL penalty to any reference (1707.06347; 2403.17031 for its details in RLHF).

What there is to know of it without torch. The loop itself is salsa/rl/trainer.py.
"""

from typing import Annotated, Literal

from pydantic import model_validator

from salsa import algorithms, anchors
from salsa.workflow import resources, schema
from salsa.workflow.schema import fault

VERSION = 3
PHASES = ("rollout", "score", "reference", "value", "optimise")  # of an iteration, in their order
LOGS = {
    "kl_k1": ("KL to the reference, estimated by k1: log-ratios", "nats per response"),
    "kl_k2": ("likewise by k2: half their squares", "nats per response"),
    "kl_k3": ("likewise by k3: ratio − 1 − log-ratio", "nats per response"),
    "reward": ("mean score as it is paid: normalised, clipped, fined for a missing end", ""),
    "explained_variance": ("variance of the returns that the values explain", "share"),
    "kl_coef": ("weight of the penalty in this iteration", "reward per nat"),
    "learning_rate": ("learning rate of this iteration", ""),
    "importance": ("mean weight of a token for how it was sampled", ""),
    "sampling_difference": ("log-probabilities in sampling and in training differ by", "nats per token"),
    "policy_loss": ("clipped loss of the policy", ""),
    "value_loss": ("clipped loss of the values", ""),
    "policy_clip_fraction": ("tokens whose ratio is clipped", "share"),
    "value_clip_fraction": ("tokens whose value is clipped", "share"),
    "entropy": ("entropy of the policy", "nats per token"),
    "gradient_norm": ("norm of the policy's gradient before it is clipped", ""),
    **{f"seconds_{phase}": (f"time of the phase {phase}", "seconds") for phase in PHASES},
    "seconds": ("time of the iteration", "seconds"),
    "peak_memory_mib": ("most memory so far", "MiB"),
}


@schema.dataclass()
class Ppo(schema.OnPolicy):
    """PPO with a KL penalty to the reference (1707.06347; 2403.17031)."""

    epochs: Annotated[int, schema.Range(1, 1000)] = 2
    """Passes over an iteration's responses."""
    mini_batches: schema.Batch = 1
    """Optimizer steps per pass."""
    learning_rate: schema.LearningRate = 0.0001
    """Learning rate of Adam, for policy and value model."""
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
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of the KL to the reference, from sampled tokens (joschu.net/blog/kl-approx.html)."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Where the penalty enters: each token's reward, or the loss."""
    gamma: schema.Share = 1.0
    """Discount of rewards per token."""
    lam: schema.Share = 0.95
    """GAE's λ (1506.02438)."""
    clip_range: Annotated[float, schema.Range(0, 1000)] = 0.2
    """How far the probability ratio may move from 1 before it is clipped."""
    value_clip_range: Annotated[float, schema.Range(0, 10**6)] = 0.2
    """How far a value may move from the old one before it is clipped."""
    value_coef: Annotated[float, schema.Range(0, 10**6)] = 0.1
    """Weight of the value loss."""
    value_model: Literal["reward_model", "sft", "shared"] = "reward_model"
    """reward_model: a network of its own that starts as the reward model | sft: one that starts as the policy does,
    with a head of zeros | shared: a head of zeros on the policy's trunk.
    """
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
    whiten_advantages: schema.Switch = True
    """Whether advantages are whitened. It rescales what is paid, but not a penalty in the loss: kl_in=loss is several
    times weaker with it.
    """

    @model_validator(mode="after")
    def _consistent(self):
        if self.kl_estimator == "k1" and self.kl_in == "loss":
            raise fault("of kl_in=loss, its gradient is zero on average; use kl_estimator=k2", "kl_estimator", self)
        if self.warmup > self.iterations:
            raise fault(f"longer than ppo.iterations={self.iterations}; make it shorter", "warmup", self)
        if self.score_normalisation == "batch" and self.batch_size < 2:
            raise fault("one score of a batch has no deviation; raise ppo.batch_size", "score_normalisation", self)
        if self.batch_size % self.mini_batches:
            raise fault(f"not divisible by ppo.mini_batches={self.mini_batches}; change one", "batch_size", self)
        return self


def train(settings, parents, output, execution):
    """The stage; see `salsa.rl.trainer.train`."""
    from salsa.rl import trainer

    return trainer.train(settings, parents, output, execution)


def resources_of(case):
    """The `resources.Resources` of a run: of training, or of sampling where that is more."""
    settings, shape, execution = case.settings["ppo"], case.shape, case.execution
    shared = settings["value_model"] == "shared"
    networks = 1 if shared else 2
    trained = case.trained(settings, networks)
    reference = anchors.settings()(**case.settings["reference"])
    kind = anchors.kinds()[reference.kind]
    frozen = (anchors.frozen_models(reference) * shape.parameters + shape.trunk) * case.frozen  # and the reward model
    if kind.held_in_float32:
        frozen += shape.parameters * (resources.FLOAT - case.frozen)
    rows = case.share(settings["batch_size"] // settings["mini_batches"])
    training = case.activations(rows, case.length, networks) + case.logits(rows * case.response)
    sampling = case.sampling(min(execution["rollout_batch"], settings["batch_size"] // case.processes), case.number)
    if case.sharded:  # the policy is whole where it samples
        sampling += shape.parameters * case.number
    memory = {"process": resources.PROCESS, **trained, "frozen models": frozen, "activations": max(training, sampling)}
    tokens = settings["batch_size"] * case.length * settings["iterations"]
    # Sampling, the reward, the references, values where a network of their own says them, and training.
    passes = 1 + 1 + kind.models(reference) + (0 if shared else 1) + 3 * networks * settings["epochs"]
    state = trained["weights"] + trained["optimizer"]
    value_model = shape.trunk * (not shared and execution["keep_value_models"])
    disk = resources.FLOAT * (shape.parameters * (1 + kind.moves) + value_model)
    checkpoints = 2 * state * (case.processes if case.sharded else 1)
    return resources.Resources(memory, 2 * shape.matrices * tokens * passes, disk, checkpoints)


def check(section, execution):
    """ValueError where processes can't share a mini-batch evenly."""
    size = section.batch_size // section.mini_batches
    if size % execution.processes:
        raise ValueError(
            f"execution.processes={execution.processes}: cannot share the {size} prompts of a mini-batch evenly; "
            "change it, ppo.batch_size or ppo.mini_batches"
        )


ALGORITHM = algorithms.Algorithm(
    kind="ppo",
    title="PPO",
    settings=Ppo,
    train=train,
    words=lambda ppo: f"{ppo.iterations} iterations of {ppo.batch_size} prompts",
    resources=resources_of,
    logs=LOGS,
    may_write=("value_model",),
    processes=True,
    resumes=True,
    remedy="share the value model (ppo.value_model=shared)",
    check=check,
)


if __name__ == "__main__":
    ALGORITHM.command(VERSION, __doc__)
