"""Loading models and tokenizers, mixing them in memory, and preparing a process to compute.

Left out: training. A model folder is what `from_pretrained` loads: config.json, safetensors, tokenizer files.
"""

import contextlib
import ctypes
import hashlib
import math
import os
import shutil
import sys

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from salsa import runs, soup, surroundings
from salsa.chat import set_chat_template  # noqa: F401  an old name of it
from salsa.forward import ScoreModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def prepare_process(execution, output=None):
    """Set threads, precision, memory allocation and the trackers' folder of this process, and return its torch device.

    Raises UserError when a GPU is asked for and there is none.
    """
    surroundings.clean()
    torch.set_num_threads(execution.threads)
    torch.set_float32_matmul_precision("highest")  # no TF32, whatever was set before
    if sys.platform == "linux":
        # Without this glibc gives each large buffer back to the kernel and faults it in again, at every layer.
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            m_trim_threshold, m_mmap_threshold = -1, -3
            libc.mallopt(m_mmap_threshold, 1 << 30)
            libc.mallopt(m_trim_threshold, (1 << 31) - 1)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if output is not None:
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(output / runs.TRACKERS))
    if "LOCAL_RANK" not in os.environ:
        # With several GPUs in sight transformers' Trainer would spread, and so enlarge, each batch.
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    if execution.device == "cuda" and not torch.cuda.is_available():
        raise runs.UserError("execution.device=cuda, but torch finds no GPU; use execution.device=cpu or auto")
    use_gpu = execution.device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if use_gpu else "cpu")


def model_folder(parent):
    """The model of a finished run (its `model/`), or a plain model folder that was given in a run's place."""
    return parent / "model" if (parent / "model").is_dir() else parent


def check_context(parent, lengths):
    """UserError unless the model holds a prompt and a response of these lengths."""
    limit = runs.read_json(model_folder(parent) / "config.json").get("max_position_embeddings")
    if limit and lengths.prompt + lengths.response > limit:
        raise runs.UserError(
            f"lengths.prompt={lengths.prompt} and lengths.response={lengths.response} need "
            f"{lengths.prompt + lengths.response} positions, and the model holds {limit}; make them shorter"
        )


def load_tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder, padding_side="left")


def load_policy(folder, device="cpu", dtype=torch.float32, **options):
    """A causal language model in evaluation mode: dropout is off, in PPO too. `options` change its configuration."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).to(device).eval()


def even_micro_batch(batch_size, limit):
    """The largest micro-batch of at most `limit` sequences that divides `batch_size`, which so stays what it is."""
    return max(size for size in range(1, min(batch_size, limit) + 1) if batch_size % size == 0)


def adapter_config(section, settings, score=False):
    """PEFT's configuration of adapters (LoRA, 2106.09685) on every linear layer but the head; None for rank 0.

    Args:
        section: where the settings stand: sft, reward_model or ppo.
        settings: what has lora_rank and lora_alpha.
        score: of a classifier, whose head is trained whole.
    """
    if not settings.lora_rank:
        return None
    try:
        from peft import LoraConfig  # an extra: needed here alone
    except ImportError:
        raise runs.UserError(f"{section}.lora_rank={settings.lora_rank} needs peft: pip install -e '.[lora]'") from None

    task = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]} if score else {}
    return LoraConfig(r=settings.lora_rank, lora_alpha=settings.lora_alpha, target_modules="all-linear", **task)


@contextlib.contextmanager
def lent(model, device):
    """A model on `device` for as long as it is needed there, then in the machine's own memory."""
    yield model.to(device)
    model.to("cpu")


def save(model, folder, state=None):
    """Write a model's folder. `state`: its whole state dictionary, where this process holds a part of the weights.

    Gathered from several processes, what is tied comes twice; a model's file has it once.
    """
    if state is not None:
        state = {name: tensor for name, tensor in state.items() if name not in model.all_tied_weights_keys}
    model.save_pretrained(folder, state_dict=state)


def load_score_model(folder, device="cpu", dtype=torch.float32, normalised=True):
    """A reward model folder, with the shift and scale that were fitted on sft0's samples.

    Raises UserError where they are none: a standard deviation of 0, say.
    """
    constants = runs.read_json(folder / "normalisation.json") if normalised else {"mean": 0.0, "std": 1.0}
    if not (0 < constants["std"] < math.inf and math.isfinite(constants["mean"])):
        raise runs.UserError(
            f"{folder / 'normalisation.json'}: the reward on sft0's samples has mean {constants['mean']:g} and "
            f"standard deviation {constants['std']:g}, by which nothing can be divided; train the reward model again"
        )
    classifier = AutoModelForSequenceClassification.from_pretrained(folder / "model", dtype=dtype)
    return ScoreModel(classifier, constants["mean"], constants["std"]).to(device).eval()


def mix_policies(folders, weights, device="cpu", dtype=torch.float32):
    """The soup of model folders, in memory: a causal language model in evaluation mode.

    Args:
        folders: model folders, one for each weight; those of weight 0 are not read.
        weights: decimals or fractions that sum to 1.
    """
    parsed = soup.parse_weights(weights, len(folders))
    used = [(folder, weight) for folder, weight in zip(folders, parsed, strict=True) if weight]
    folders, parsed = [folder for folder, _ in used], [weight for _, weight in used]
    model = load_policy(folders[0], dtype=dtype)
    if len(folders) > 1:
        soup.check_ingredients(folders)
        state = model.state_dict()
        with torch.no_grad():
            for name, tensor in soup.mixed_tensors(folders, parsed):
                state[name].copy_(tensor)
        model.tie_weights()
    return model.to(device)


@torch.no_grad()
def check_head(model):
    """UserError where a model's logits are more than its head's: a cap or a scale behind it (Gemma 2, Cohere, Granite).

    Log-probabilities here are of the head's output, at response positions alone.
    """
    device = next(model.parameters()).device
    tokens = torch.arange(8, device=device)[None] % model.config.vocab_size
    whole = model(input_ids=tokens).logits.float()
    head = model.get_output_embeddings()(model.base_model(input_ids=tokens).last_hidden_state).float()
    if not torch.allclose(whole, head, rtol=1e-2, atol=1e-2):
        raise runs.UserError(
            f"{type(model).__name__} changes its logits behind its head, which is not computed here; choose a model "
            "without a cap or scale of logits"
        )


def compile_trunks(trained_or_frozen):
    """Compile the trunks of models for `forward.hidden_states`. Returns whether it did: not without a C++ compiler."""
    compilers = [os.environ.get("CXX", "g++"), "clang++"]
    if not any(map(shutil.which, compilers)):
        print(f"execution.compile: no C++ compiler ({' or '.join(compilers)}) on PATH; not compiled", flush=True)
        return False
    for model in trained_or_frozen:
        model.compiled_trunk = torch.compile(model.base_model.forward)
    return True


def content_sha256(model):
    """The sha256 (hex) of a model's weights: names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
