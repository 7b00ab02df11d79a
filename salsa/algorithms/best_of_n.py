"""Best of n: n responses to each prompt, of which the one that the reward model scores highest is the answer.

Nothing is trained: it is the yardstick of the reward-KL frontier (2009.01325, 2210.10760). Its model is the start, and
whatever lets a policy answer draws n responses from it (`draws` of its record, salsa/evaluate/best_of.py).
"""

from typing import Annotated

from salsa import algorithms
from salsa.algorithms import none
from salsa.workflow import schema

VERSION = 1


@schema.dataclass()
class Settings(schema.Training):
    """Best of n responses by the reward model."""

    n: Annotated[int, schema.Range(2, 1024)] = 16
    """Responses drawn for each answer, of which the one of the highest reward is kept."""


ALGORITHM = algorithms.Algorithm(
    kind="best_of_n",
    title="best of n",
    settings=Settings,
    train=none.train,
    words=lambda section: f"the best of {section.n} responses by the reward model",
    resources=none.resources_of,
    penalised=False,
    draws=lambda section: section.n,
)


if __name__ == "__main__":
    ALGORITHM.command(VERSION, __doc__)
