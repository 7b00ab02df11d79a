"""The responses of an iteration, with what was computed of them: what the equations of an algorithm read."""

from dataclasses import dataclass, replace

import torch

from salsa.rl import objective
from salsa.rl.forward import Sequences


@dataclass
class Batch:
    """B responses of up to T tokens, and tensors with a row for each: `batch["paid"]`.

    What the advantages are made from, with R references: paid (B,), what a response is paid; old_logprobs (B, T), those
    of the policy that sampled; reference_logprobs (B, R, T); and where there is a value model, old_values (B, T). A
    loss finds what its advantages have made, too. Places where `mask` (B, T) is 0 may hold anything finite.

    Attributes:
        weights: that of each reference in the penalty.
        kl_coef: the weight of the penalty in this iteration.
        longest: the most tokens that a response can have, T or more.
    """

    sequences: Sequences
    tensors: dict[str, torch.Tensor]
    weights: list[float]
    kl_coef: float
    longest: int

    def __getitem__(self, name):
        return self.tensors[name]

    def __len__(self):
        return len(self.sequences)

    @property
    def mask(self):
        """(B, T), 1 up to and with the last token of each response."""
        return self.sequences.response_mask

    @property
    def of_responses(self):
        """Whether advantages are those of whole responses, (B,), so that the loss takes the ratio of a response."""
        return self["advantages"].dim() == 1

    def kl(self, estimator, logprobs=None):
        """The penalty Σ wᵢ·KL to reference i, (B, T) in nats per token, of `logprobs` or of the policy that sampled."""
        logprobs = self["old_logprobs"] if logprobs is None else logprobs
        return objective.kl_penalty(logprobs, self["reference_logprobs"], self.weights, estimator)

    def rows(self, index):
        """The responses at `index`, without the columns in which all of them are padding."""
        sequences = self.sequences.rows(index)
        length = sequences.response_mask.shape[1]
        chosen = {name: values[index] for name, values in self.tensors.items()}
        cut = {name: values[..., :length] if values.dim() > 1 else values for name, values in chosen.items()}
        return replace(self, sequences=sequences, tensors=cut)
