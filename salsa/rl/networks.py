"""The networks that are trained, policy and value model, as one module: what Accelerate wraps, shards and saves.

Everything is computed through `forward`, because there a wrapper (DDP, FSDP, DeepSpeed) gathers weights and gradients.
The networks stay in evaluation mode: with dropout, the ratio would not start at 1.
"""

import shutil
from dataclasses import replace

import torch
from safetensors.torch import save_file
from transformers.modeling_layers import GradientCheckpointingLayer

from salsa.rl import forward, models, rollout
from salsa.rl.forward import ScoreModel
from salsa.workflow import runs


class ActorCritic(torch.nn.Module):
    """A policy and its value model: a ScoreModel, a linear head on the policy's trunk, or None.

    `networks("evaluate", sequences)` calls the method of this name. Tensors have a row for each sequence.
    """

    def __init__(self, policy, value_model, temperature, gradient_checkpointing=False):
        super().__init__()
        self.policy, self.value_model, self.temperature = policy.eval(), value_model, temperature
        if value_model is not None:
            value_model.eval()
        self.recomputing = gradient_checkpointing
        if gradient_checkpointing:
            for trunk in self.trunks:
                trunk.gradient_checkpointing_enable()

    @property
    def trunks(self):
        """The models of transformers that are trained."""
        return [self.policy, self.value_model.classifier] if self.has_own_value_model else [self.policy]

    @property
    def _no_split_modules(self):
        """Names of the classes of layers, each of which Accelerate shards by itself.

        All else is one unit, because tied weights (embedding and head) have to be in the same one.
        """
        return sorted({name for trunk in self.trunks for name in trunk._no_split_modules})

    def parameter_groups(self):
        """Trained parameters, a group for each network, the policy's first."""
        # Gradients are clipped in each group, so that a large value loss does not shrink the policy's steps.
        groups = [self.policy, self.value_model] if self.has_own_value_model else [self]
        return [{"params": [p for p in network.parameters() if p.requires_grad]} for network in groups]

    def recompute(self, on):
        """Switch the recomputation of activations in backward passes, where gradient_checkpointing asks for it."""
        # transformers recomputes, and can't sample, while a layer is in training mode. Only the layers' own flags are
        # set: those of the modules in them would switch dropout on.
        layers = [m for m in self.modules() if isinstance(m, GradientCheckpointingLayer)] if self.recomputing else []
        for layer in layers:
            layer.training = on

    def forward(self, task, *arguments):
        """Call the method `task`: DDP and FSDP see what goes through `forward` alone."""
        return getattr(self, task)(*arguments)

    @property
    def shared(self):
        """Whether the value model is a head on the policy's trunk."""
        return isinstance(self.value_model, torch.nn.Linear)

    @property
    def has_own_value_model(self):
        """Whether the value model is a network of its own."""
        return self.value_model is not None and not self.shared

    def evaluate(self, sequences):
        """The log-probabilities, entropies and values of response tokens, (B, T) each; values may be None."""
        if self.recomputing:  # which keeps no keys and values, so that no prompt can be computed for several rows
            sequences = replace(sequences, prompt_numbers=None)
        hidden = forward.hidden_states(self.policy, sequences) if self.shared else None
        logprobs, entropies = forward.response_logprobs(self.policy, sequences, self.temperature, hidden)
        if self.value_model is None:
            return logprobs, entropies, None
        if not self.shared:
            return logprobs, entropies, self.value_model.values(sequences)
        return logprobs, entropies, self._head(forward.before_responses(hidden, sequences))

    def logprobs(self, sequences):
        """The log-probabilities of response tokens, (B, T)."""
        return forward.response_logprobs(self.policy, sequences, self.temperature, entropies=False)[0]

    def values(self, sequences):
        """The values before each response token, (B, T)."""
        if not self.shared:
            return self.value_model.values(sequences)
        return self._head(forward.before_responses(forward.hidden_states(self.policy, sequences), sequences))

    def sample(self, prompts, noise, end_ids, pad_id, batch_size, samples=1):
        """Sequences, their log-probabilities and, with a shared trunk, their values; otherwise None."""
        head, policy = self._head if self.shared else None, self.policy
        return rollout.sample_batch(
            policy, prompts, noise, self.temperature, end_ids, pad_id, batch_size, head, samples
        )

    def save(self, output, state=None, value_model=True):
        """Write `output/model`, and `output/value_model` in the form of a reward model's run, or the head's tensors.

        Without a value model, the latter is left out.

        Args:
            state: the whole state dictionary, where this process holds a part of the weights.
            value_model: whether the value model, where there is one, is written.
        """
        models.save(self.policy, output / "model", _below("policy", state))
        folder = output / "value_model"
        shutil.rmtree(folder, ignore_errors=True)
        if not value_model or self.value_model is None:
            return
        if self.shared:
            folder.mkdir(exist_ok=True)
            save_file(_below("value_model", state) or self.value_model.state_dict(), folder / "head.safetensors")
        else:
            classifier = self.value_model.classifier
            models.save(classifier, folder / "model", _below("value_model.classifier", state))
            constants = {"mean": self.value_model.mean, "std": self.value_model.std}
            runs.write_json(folder / "normalisation.json", constants)

    def _head(self, hidden):
        return forward.at_least_float32(self.value_model(hidden).squeeze(-1))


def _below(prefix, state):
    """The part of a state dictionary below `prefix`, or None where there is no dictionary."""
    names = [name for name in state or () if name.startswith(f"{prefix}.")]
    return {name.removeprefix(f"{prefix}."): state[name] for name in names} or None


def value_model(kind, policy, reward_model, normalised=True):
    """The value model that a run starts from.

    Args:
        kind: reward_model, sft (the policy's start below a head of zeros), shared (a head on the policy's trunk), or
            None: none.
        reward_model: the folder of a reward model's run.
        normalised: whether rewards are shifted and scaled as on sft0's samples.
    """
    if kind is None:
        return None
    if kind == "shared":
        return _zeros(torch.nn.Linear(policy.config.get_text_config().hidden_size, 1))
    # The reward of a whole response is a fair guess at the value of its prefixes, so that a value model that starts
    # from the reward model gives useful advantages in the first iterations already (2403.17031).
    value_model = models.load_score_model(reward_model, normalised=normalised)
    if kind == "sft":
        value_model.mean, value_model.std = 0.0, 1.0
        value_model.classifier.base_model.load_state_dict(policy.base_model.state_dict())
        _zeros(value_model.classifier.score)
    return value_model


def _zeros(head):
    for parameter in head.parameters():
        torch.nn.init.zeros_(parameter)
    return head


def adapters(policy, value_model, section):
    """Low-rank adapters of both networks, where `lora_rank` asks for them; they are merged when training ends."""
    config = models.adapter_config(section.section, section)
    if config is None:
        return []
    from peft import get_peft_model  # an optional dependency, which adapter_config has looked for

    wrapped = [get_peft_model(policy, config).eval()]
    if isinstance(value_model, ScoreModel):
        config = models.adapter_config(section.section, section, score=True)
        wrapped.append(get_peft_model(value_model.classifier, config).eval())
    return wrapped
