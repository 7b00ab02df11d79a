"""DPO (2305.18290) against any reference; with one that moves it is TR-DPO (2404.09656).

What there is to know of it without torch. The training itself is salsa/dpo.py. DPO is offline: it learns from pairs
that are there before it begins, and samples nothing from the policy that it trains. An iteration is an optimizer step.
"""

from typing import Annotated, Literal

from pydantic import model_validator

from salsa import algorithms, anchors, judges
from salsa.workflow import resources, schema
from salsa.workflow.schema import fault

VERSION = 1
LOGS = {
    "loss": ("loss of the batch before the step, −log σ(margin)", "nats per pair"),
    "accuracy": ("pairs whose margin is above 0", "share"),
    "margin": ("chosen_reward − rejected_reward", ""),
    "chosen_reward": ("kl_coef · log(policy/reference) of the chosen response", ""),
    "rejected_reward": ("likewise of the rejected one", ""),
    "chosen_logprob": ("log-probability of the chosen response", "nats per response"),
    "rejected_logprob": ("likewise of the rejected one", "nats per response"),
    "gradient_norm": ("norm of the policy's gradient before it is clipped", ""),
    "learning_rate": ("learning rate of this step", ""),
}


@schema.dataclass()
class Dpo(schema.Adapters):
    """DPO (2305.18290), whose β is kl_coef; TR-DPO (2404.09656) where the reference moves. Steps are its iterations."""

    pairs: Annotated[int, schema.Range(1, schema.MOST)] = 1000
    """Most preference pairs to train on: the data's, or drawn from sft0 and sft1 and labelled by the reward model."""
    label_temperature: Annotated[float, schema.Range(above=0, at_most=10**6)] = 1.0
    """Bradley-Terry noise of the reward model's labels, in units of the normalised reward: with 1, DPO has the optimum
    of a policy that is paid this reward, at the same kl_coef.
    """
    epochs: Annotated[int, schema.Range(1, 10000)] = 1
    """Passes over the pairs."""
    batch_size: schema.Batch = 64
    """Pairs per optimizer step, over all processes."""
    learning_rate: schema.LearningRate = 0.0001
    """Learning rate of AdamW after the warm-up."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate goes on: linear or cosine, to 0 over the run | constant."""
    warmup: schema.Part = 0.05
    """Share of the steps in which the learning rate rises, from 0; of a single step, none."""
    max_grad_norm: Annotated[float, schema.Range(above=0, at_most=10**9)] = 1.0
    """Norm to which the gradient is clipped."""

    @property
    def iterations(self):
        """Optimizer steps, where there are as many pairs as `pairs`."""
        return self.epochs * -(-self.pairs // self.batch_size)

    @model_validator(mode="after")
    def _a_batch_at_least(self):
        if self.batch_size > self.pairs:
            raise fault(f"more than dpo.pairs={self.pairs}; make it smaller", "batch_size", self)
        return self


def train(settings, parents, output, execution):
    """The stage; see `salsa.dpo.train`."""
    from salsa import dpo

    return dpo.train(settings, parents, output, execution)


def resources_of(case):
    """The `resources.Resources` of a run: of training or, before it, of the first process that draws pairs."""
    settings, shape = case.settings["dpo"], case.shape
    drawn = case.runs[case.run.parents["reward_model"]].settings["preferences"].startswith("sampled")
    reference = anchors.settings()(**case.settings["reference"])
    kind = anchors.kinds()[reference.kind]
    anchor, _ = case.frozen_models(case.run)
    held = kind.models(reference)
    rows = 2 * case.share(settings["batch_size"])
    memory = {"process": resources.TRAINER, **case.trained(settings)}
    memory["frozen models"] = held * anchor.parameters * (resources.FLOAT if kind.held_in_float32 else case.frozen)
    memory["activations"] = case.activations(rows, case.length)
    memory["logits"] = min(rows * case.length, resources.TILE[0]) * resources.TILE[1] * case.number
    if not settings["lora_rank"]:
        memory["logits"] += shape.vocabulary * shape.hidden * resources.FLOAT  # the head's gradient of one micro-batch
    labelling = {"process": resources.TRAINER, "frozen models": 2 * shape.parameters * resources.FLOAT}
    labelling["activations"] = case.sampling(case.execution["rollout_batch"], resources.FLOAT)
    tokens = 2 * settings["pairs"] * case.length
    # A response is sampled and labelled once; in each epoch the references read it, and the policy is trained on it.
    passes = 2 * drawn + settings["epochs"] * (3 + held * anchor.matrices / shape.matrices)
    state = memory["weights"] + memory["optimizer"]
    return resources.Resources(
        memory,
        2 * shape.matrices * tokens * passes,
        resources.FLOAT * shape.parameters * (1 + kind.moves),
        2 * state * (case.processes if case.sharded else 1),
        alone=labelling if drawn else {},
    )


def check(section, execution):
    """ValueError where processes can't share a batch evenly."""
    if section.batch_size % execution.processes:
        raise ValueError(
            f"execution.processes={execution.processes}: cannot share dpo.batch_size={section.batch_size} evenly; "
            "change one"
        )


def check_arm(key, arm, study):
    """ValueError where β would be 0, and where the data's preferences are too few, or labelled already."""
    kl_coefs = study.kl_coefs if arm.kl_coefs is None else arm.kl_coefs
    if 0 in kl_coefs:
        raise ValueError(
            f"{key}: kl_coef=0 is DPO's β, which must be above 0, for else no pair moves the policy; "
            f"give {key}.kl_coefs without 0"
        )
    if study.data.preferences == "given":
        _check_given(study)


def _check_given(study):
    section, reward, count = study.dpo, study.reward_model, study.data.task.preferences
    if 0 < count < reward.held_out + section.batch_size:
        raise ValueError(
            f"data.task.preferences={count}: without reward_model.held_out={reward.held_out} of them, which are kept "
            f"apart, fewer than dpo.batch_size={section.batch_size}; give more, or lower one"
        )
    if section.label_temperature != Dpo.label_temperature:
        raise ValueError(
            f"dpo.label_temperature={section.label_temperature:g}: no pair is labelled with data.preferences=given; "
            "leave it out"
        )
    for name, judge in study.judges.items():
        if judges.find(judge.kind).scorer and section.pairs > reward.pairs:
            raise ValueError(
                f"dpo.pairs={section.pairs}: more than reward_model.pairs={reward.pairs}, and the reward model of "
                f"judges.{name} learns from the pairs after these; lower it, or leave the judge out"
            )


ALGORITHM = algorithms.Algorithm(
    kind="dpo",
    title="DPO",
    settings=Dpo,
    train=train,
    words=lambda dpo: f"{dpo.epochs} pass{'es' * (dpo.epochs > 1)} over at most {dpo.pairs} pairs, offline",
    resources=resources_of,
    logs=LOGS,
    processes=True,
    resumes=True,
    takes_pairs=True,
    check=check,
    check_arm=check_arm,
)


if __name__ == "__main__":
    ALGORITHM.command(VERSION, __doc__)
