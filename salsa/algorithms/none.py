"""No training: the start itself is the policy.

A soup, a merged or an external model so enters tables and figures beside the policies that were trained from it.
"""

from salsa import algorithms
from salsa.workflow import resources, runs, schema

VERSION = 1


@schema.dataclass()
class Settings(schema.Training):
    """No training, and so no settings: the start is the policy."""


def train(settings, parents, output, execution):
    """Write the start of an arm as its policy: `model/`, in float32 as trained policies are, and no metrics.

    Parents: those of every algorithm, of which sft0 and what the start is mixed from are read.
    """
    import torch

    from salsa.rl import models, reference

    models.prepare_process(execution)
    tokenizer = models.load_tokenizer(models.model_folder(parents["sft0"]))
    policy = reference.mix(reference.ingredient_folders(parents), settings.start, "cpu", torch.float32)
    models.check_head(policy)
    models.save(policy, output / "model")
    tokenizer.save_pretrained(output / "model")
    runs.write_jsonl(output / "metrics.jsonl", [])  # there are no iterations
    return {"parameters": policy.num_parameters()}


def resources_of(case):
    """The `resources.Resources` of a run: one model is loaded, and written."""
    weights = case.shape.parameters * resources.FLOAT
    return resources.Resources({"process": resources.PROCESS, "weights": weights}, 0, weights)


ALGORITHM = algorithms.Algorithm(
    kind="none",
    title="no training",
    settings=Settings,
    train=train,
    words=lambda section: "the start itself is the policy",
    resources=resources_of,
    penalised=False,
)


if __name__ == "__main__":
    ALGORITHM.command(VERSION, __doc__)
