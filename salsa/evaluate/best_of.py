"""Best of n: of n responses to a prompt, the one that the reward model scores highest is the answer.

A response that was cut may be the answer: missing_eos_penalty, which training takes off, is no part of the choice.

In a conversation of several turns the best of n is taken at each turn, and the conversation goes on with it. Draw 0
has the noise that a policy's only response has, so that this policy sees what the others see, and more. Where a prompt
gets several answers, each is the best of n draws of its own: answer k of draws k·n to k·n + n − 1. Draws that were made
once say what the best of any smaller number would be (`expected`). Left out: how responses are drawn and scored.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from salsa.workflow import runs

FRONTIER = (2, 4, 8, 16, 32)  # the n that are drawn in the figure of rewards and KL


def bound(n):
    """Upper bound of KL(best of n ‖ what is drawn from), in nats per response: log n − (n−1)/n.

    It is the KL where no two responses have one reward; ties lower it (2401.01879). The KL itself is not known, since
    the probability of a response is not.
    """
    return math.log(n) - (n - 1) / n


def best(scores):
    """The index (N,) of the highest of scores (N, n): the first, where several are equal."""
    return np.argmax(scores, axis=1)


@dataclass(frozen=True)
class BestOf:
    """Answers that are the best of n; without arguments, the only response.

    Attributes:
        n: how many responses are drawn for an answer.
        score: (prompts, responses as lists of token ids) -> their scores, (N,); None where n is 1.
    """

    n: int = 1
    score: Callable | None = None

    def sampler(self, draw):
        """A function (keys, numbers of the samples, prompts) -> responses, each the best of n that are drawn.

        Args:
            draw: (keys of the noise, prompts) -> responses.
        """

        def sample(keys, numbers, prompts):
            draws = [
                (runs.sample_key(key, number * self.n + i), prompt)
                for key, number, prompt in zip(keys, numbers, prompts, strict=True)
                for i in range(self.n)
            ]
            noise_keys, repeated = map(list, zip(*draws, strict=True))
            drawn = draw(noise_keys, repeated)
            if self.n == 1:
                return drawn
            places = best(self.score(repeated, drawn).reshape(-1, self.n))
            return [drawn[row * self.n + place] for row, place in enumerate(places)]

        return sample


def expected(scores, values, n):
    """What the best of n of a prompt's N samples has on average, over all their subsets of n; (N,) both, n ≤ N.

    A subset's best is the sample of rank j (1 is the lowest score) in C(j−1, n−1) of the C(N, n) subsets, so that the
    mean over subsets is Σ_j C(j−1, n−1) / C(N, n) · value_(j): unbiased for the best of n fresh samples. Among
    equal scores the sample that was drawn first counts as the highest, as in `best`.

    Args:
        scores: by which the best is chosen.
        values: of which the mean is taken: the scores, or gold.
    """
    count = len(scores)
    order = np.lexsort((-np.arange(count), scores))  # by score; among equal scores, the one drawn first comes last
    weights = [math.comb(rank, n - 1) / math.comb(count, n) for rank in range(count)]
    return math.fsum(np.asarray(values, dtype=np.float64)[order] * weights)
