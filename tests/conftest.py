"""What the tests of the numerical core share: models of a few thousand weights, small stories, and finished runs."""

import dataclasses
import importlib.util
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: many small jobs, few cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

from salsa.workflow import config, runs

HEADS = 1 if importlib.util.find_spec("vllm") else 2  # on a CPU the real vLLM takes heads of 32 numbers and more
SHAPE = config.Architecture(
    vocabulary_size=512, hidden_size=32, intermediate_size=48, layers=2, heads=HEADS, max_length=160
)
LENGTHS = config.Lengths(prompt=64, response=10)
TASK = config.Task(kind="stories", seed=3, demonstrations=48, validation=16, preferences=96, prompts=48, evaluation=16)


@dataclasses.dataclass
class Made:
    """Settings of a run that a fixture makes without its stage."""

    what: str


def finished(stage, folder, write, parents=None, settings=None):
    """A finished run whose content `write(folder)` makes."""
    settings = settings or Made(stage)
    runs.execute(stage, 1, lambda s, p, output, e: write(output), settings, parents or {}, folder, EXECUTION)
    return folder


def examples(count):
    """How many mutated inputs a test tries: `count`, or SALSA_MUTATIONS where a soak asks for more."""
    return max(count, int(os.environ.get("SALSA_MUTATIONS", "0")))


EXECUTION = config.Execution(device="cpu", threads=1, micro_batch=64)


def random_llama(tokenizer, seed, **changes):
    """A Llama whose weights are large enough that its predictions differ from token to token."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    values = {
        "vocab_size": len(tokenizer),
        "hidden_size": SHAPE.hidden_size,
        "intermediate_size": SHAPE.intermediate_size,
        "num_hidden_layers": SHAPE.layers,
        "num_attention_heads": SHAPE.heads,
        "num_key_value_heads": SHAPE.heads,
        "max_position_embeddings": SHAPE.max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
    }
    model = LlamaForCausalLM(LlamaConfig(**values | changes))
    # A fifth of the words ends a response too: random models would hardly ever end one otherwise.
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(10, 40)]
    return model.eval()


def move(model, seed, length):
    """Add Gaussian noise of standard deviation `length` to every weight."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(length * torch.randn(tensor.shape, generator=generator))
    return model


def save_model(model, tokenizer, folder, **options):
    model.save_pretrained(folder, **options)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def execution():
    return EXECUTION


@pytest.fixture(scope="session")
def lengths():
    return LENGTHS


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """The word-level tokenizer of the stories, with the chat template `roles`."""
    from salsa import base
    from salsa.data import chat
    from salsa.data.worlds import stories

    words = tmp_path_factory.mktemp("words") / "words.json"
    runs.write_json(words, stories.words())
    made = base.make_tokenizer([], words, SHAPE)
    chat.set_chat_template(made, "roles")
    return made


@pytest.fixture(scope="session")
def base_run(tokenizer, tmp_path_factory):
    """A finished run of the stage base: `model/`."""
    folder = tmp_path_factory.mktemp("base") / "base"
    return finished("base", folder, lambda f: save_model(random_llama(tokenizer, 0), tokenizer, f / "model") and None)


@pytest.fixture(scope="session")
def sft_runs(tokenizer, tmp_path_factory):
    """Two finished runs of the stage sft: the base model, moved a little in two random directions."""
    root = tmp_path_factory.mktemp("sft")

    def write(seed):
        model = move(random_llama(tokenizer, 0), seed, 0.03)
        return lambda folder: save_model(model, tokenizer, folder / "model") and None

    return [finished("sft", root / f"sft{seed}", write(seed + 1)) for seed in (0, 1)]


@pytest.fixture(scope="session")
def sft_models(sft_runs):
    """The two SFT models, in memory; not to be changed."""
    from salsa.rl import models

    return [models.load_policy(folder / "model") for folder in sft_runs]


@pytest.fixture(scope="session")
def prepare_run(tmp_path_factory):
    """A finished run of the stage prepare, of stories."""
    from salsa.data import prepare

    folder = tmp_path_factory.mktemp("prepare") / "prepare"
    settings = config.PrepareSettings(TASK)
    runs.execute("prepare", prepare.VERSION, prepare.prepare, settings, {}, folder, EXECUTION)
    return folder


@pytest.fixture(scope="session")
def reward_run(sft_runs, tokenizer, tmp_path_factory):
    """A finished run of the stage reward_model: a random classifier, and constants that are not 0 and 1."""
    import torch
    from transformers import AutoModelForSequenceClassification

    def write(folder):
        torch.manual_seed(5)
        model = AutoModelForSequenceClassification.from_pretrained(sft_runs[0] / "model", num_labels=1)
        torch.nn.init.normal_(model.score.weight, std=0.3)
        save_model(model, tokenizer, folder / "model")
        runs.write_json(folder / "normalisation.json", {"mean": 0.25, "std": 1.5, "samples": 16})
        quality = {"held_out_accuracy": 0.8, "gold_agreement": 0.9, "pairs": 10, "held_out": 10}
        runs.write_json(folder / "evaluation.json", quality)

    section = config.RewardModel(pairs=20, held_out=16, batch_size=10)
    settings = config.RewardModelSettings(3, "sampled", section, LENGTHS)
    return finished("reward_model", tmp_path_factory.mktemp("reward") / "reward_model", write, settings=settings)


@pytest.fixture(scope="session")
def parents(prepare_run, reward_run, sft_runs):
    """What PPO reads."""
    return {"prepare": prepare_run, "reward_model": reward_run, "sft0": sft_runs[0], "sft1": sft_runs[1]}


@pytest.fixture(scope="session")
def prompts(prepare_run, tokenizer):
    """(ids, token ids) of the prompts of PPO; their lengths differ."""
    from salsa.data import chat

    rows = runs.read_jsonl(prepare_run / "prompts.jsonl")
    encoded = chat.encode_prompts(tokenizer, [row["prompt"] for row in rows])
    return [row["id"] for row in rows], encoded


@pytest.fixture(scope="session")
def tiny_chat_model(tmp_path_factory):
    """A plain model folder: random weights, byte-level BPE, a chat template with roles, a context of 1,024 tokens."""
    from salsa import base
    from salsa.data import chat

    folder = tmp_path_factory.mktemp("chat") / "model"
    words = folder.parent / "words.json"  # not there: BPE
    texts = ["How do I cook rice? Wash it, then boil it in water.", "Write a poem about the sea."] * 20
    tokenizer = base.make_tokenizer(texts, words, config.Architecture(vocabulary_size=400, max_length=1024))
    chat.set_chat_template(tokenizer, "roles")
    save_model(random_llama(tokenizer, 5, max_position_embeddings=1024), tokenizer, folder)
    return folder
