"""Loading models and tokenizers, mixing them in memory, and preparing a process to compute.

A model folder is what `from_pretrained` loads: config.json, safetensors, tokenizer files. Training is elsewhere.
"""

import contextlib
import copy
import ctypes
import hashlib
import math
import os
import re
import shutil
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
)

from salsa import soup
from salsa.rl import folders, linear
from salsa.rl.forward import ScoreModel
from salsa.workflow import runs, surroundings
from salsa.workflow.messages import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def prepare_process(execution):
    """Set this process's threads, precision and memory allocation. Returns its torch device.

    Raises UserError when a GPU is asked for and there is none.
    """
    surroundings.clean()
    torch.set_num_threads(execution.threads)
    torch.set_float32_matmul_precision("highest")  # TF32 would round what PPO's ratio is computed from
    if sys.platform == "linux":
        # Without this glibc gives each large buffer back to the kernel and faults it in again, at every layer.
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            m_trim_threshold, m_mmap_threshold = -1, -3
            libc.mallopt(m_mmap_threshold, 1 << 30)
            libc.mallopt(m_trim_threshold, (1 << 31) - 1)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if "LOCAL_RANK" not in os.environ:
        # If it saw several GPUs, transformers' Trainer would spread each batch over them, and so enlarge it.
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    if execution.device == "cuda" and not torch.cuda.is_available():
        raise UserError("execution.device=cuda, but torch finds no GPU; use execution.device=cpu or auto")
    return torch.device("cuda" if execution.device != "cpu" and torch.cuda.is_available() else "cpu")


def model_folder(parent):
    """The folder of a finished run's model, or `parent` itself where a plain model folder was given for a run."""
    return parent / "model" if (parent / "model").is_dir() else parent


def check_context(parent, lengths):
    """Raise UserError unless the model has positions for a prompt and a response of these lengths."""
    limit = folders.positions(folders.load_config(model_folder(parent)).to_dict())
    if limit and lengths.prompt + lengths.response > limit:
        raise UserError(
            f"lengths.prompt={lengths.prompt} and lengths.response={lengths.response} need "
            f"{lengths.prompt + lengths.response} positions, and the model holds {limit}; make them shorter"
        )


def load_tokenizer(folder, **options):
    """The tokenizer of a model folder, padding on the left. Raises UserError where it is damaged, or needs code."""
    with folders.loading(f"{folder}: the tokenizer", "save or download it again"):
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", trust_remote_code=False, **options)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if getattr(backend and backend.model, "dropout", None):
            backend.model.dropout = None  # BPE dropout would tokenize a text differently each time
    for name in ("is_local", "local_files_only", "trust_remote_code"):  # how it was loaded is not saved with it
        tokenizer.init_kwargs.pop(name, None)
    if not isinstance(tokenizer.model_max_length, int | float):
        longest = tokenizer.model_max_length
        raise UserError(f"{folder}/tokenizer_config.json: model_max_length={longest!r}: no number; mend it")
    return tokenizer


def load_policy(folder, device="cpu", dtype=torch.float32, pickled=False, **options):
    """A causal language model in evaluation mode; `options` change its configuration. Every stage loads models here.

    Weights that are `pickled` are read as tensors and nothing else. Raises UserError unless the folder holds all
    weights of the model, and no others.
    """
    folders.check(folder, pickled)
    config = folders.load_config(folder)
    check_causal(config)
    options["generation_config"] = _token_ids(folder, config)
    options |= {"use_safetensors": False, "weights_only": True} if pickled else {"use_safetensors": True}
    return load_whole(AutoModelForCausalLM, folder, dtype=dtype, **options).to(device).eval()


def _token_ids(folder, config):
    """The generation settings of a model, reduced to its special ids: PPO samples from the policy's own distribution.

    Published settings can contradict each other: transformers reads those with a warning, and refuses to write them.
    """
    path = Path(folder) / "generation_config.json"
    published = folders.read_object(path) if path.is_file() else config.to_dict()
    ids = {name: published.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for name, value in ids.items():
        candidates = value if isinstance(value, list) else [value]
        if any(type(i) is not int for i in candidates if i is not None):
            raise UserError(f"{path}: {name}={value!r}: neither a token id nor a list of such; mend it")
        # Some models write -1 for none. An id outside the vocabulary is never sampled.
        valid = [i for i in candidates if i is not None and 0 <= i < config.get_text_config().vocab_size]
        ids[name] = valid if isinstance(value, list) and valid else next(iter(valid), None)
    return GenerationConfig(**ids)


# Older versions of transformers stored masks and frequencies beside the weights; newer ones compute them.
COMPUTED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|(attn|attention)\.(masked_)?bias|position_ids)$")


def load_whole(cls, folder, head="", trunk="", besides=(), **options):
    """A model of class `cls` that takes all of its weights from a folder's files, and leaves none of theirs over.

    transformers initialises missing weights at random, and drops surplus ones, with no more than a warning.

    Args:
        cls: a class with transformers' `from_pretrained`.
        folder: a model folder that `folders.check` accepts.
        head: prefix of tensors that may be missing, because the head is new.
        trunk: prefix of tensors of which none may be surplus; "" for all.
        besides: names of tensors that may be surplus all the same.
        options: those of `from_pretrained`; a `state_dict` replaces the folder's weights.

    Raises UserError, naming the first tensor, where weights are missing, surplus, of another shape, or not finite.
    """
    with folders.loading(folder):
        model, report = cls.from_pretrained(
            None if "state_dict" in options else folder,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
            **options,
        )
    for name, given, wanted in sorted(report["mismatched_keys"]):
        raise UserError(
            f"{folder}: tensor {name} has shape {list(given)}, and config.json makes it {list(wanted)}; "
            "give the configuration and the weights of one model"
        )
    missing = sorted(name for name in report["missing_keys"] if not (head and name.startswith(head)))
    if missing:
        # A wrapper (torch.compile, DDP, PEFT) may have put its prefix before all names.
        prefixed = (name for name in sorted(report["unexpected_keys"]) if name.endswith(tuple(missing)))
        instead = next((f" (the files have {name})" for name in prefixed), "")
        raise UserError(
            f"{folder}: tensor {missing[0]} is missing{_more(missing)}, of {type(model).__name__}{instead}; it would "
            "start at random: give a whole model, with weights, names and number of layers as config.json says"
        )
    surplus = (name for name in report["unexpected_keys"] if name.startswith(trunk) and name not in besides)
    surplus = sorted(name for name in surplus if not COMPUTED.search(name))
    if surplus:
        raise UserError(
            f"{folder}: tensor {surplus[0]}{_more(surplus)} is none of {type(model).__name__}, and would be "
            "dropped; give a causal language model, with as many layers as config.json says"
        )
    _check_finite(model, folder)
    return linear.accelerate(model)


def _more(names):
    return f" ({len(names) - 1} more)" if len(names) > 1 else ""


def _check_finite(model, folder):
    """Raise UserError, naming the first tensor, where a weight is not finite."""
    for name, tensor in model.state_dict().items():
        if tensor.is_meta:
            continue
        # One sum tells most tensors to be finite; only where it is not, each number is looked at.
        if tensor.is_floating_point() and not tensor.sum().isfinite() and not tensor.isfinite().all():
            raise UserError(f"{folder}: tensor {name} holds NaN or infinity; save or download the model again")


def even_micro_batch(batch_size, limit):
    """The largest micro-batch of at most `limit` sequences that divides `batch_size`, so that no batch is smaller."""
    return max(size for size in range(1, min(batch_size, limit) + 1) if batch_size % size == 0)


def adapter_config(section, settings, score=False):
    """PEFT's configuration of adapters (LoRA, 2106.09685) on every linear layer but the head; None for rank 0.

    Args:
        section: the section of the settings, for messages: sft, reward_model or an algorithm's.
        settings: a section with lora_rank and lora_alpha.
        score: whether the model is a classifier, whose head is trained whole.
    """
    if not settings.lora_rank:
        return None
    try:
        from peft import LoraConfig  # an optional dependency
    except ImportError:
        raise UserError(f"{section}.lora_rank={settings.lora_rank} needs peft: pip install -e '.[lora]'") from None

    task = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]} if score else {}
    return LoraConfig(r=settings.lora_rank, lora_alpha=settings.lora_alpha, target_modules="all-linear", **task)


@contextlib.contextmanager
def on_device(model, device):
    """Within this context the model is on `device`; then it goes back to the CPU, to leave a GPU's memory to others."""
    yield model.to(device)
    model.to("cpu")


def save(model, folder, state=None):
    """Write a model's folder; `state` is its whole state dictionary where this process holds a part of the weights."""
    if state is not None:  # what processes gather has tied tensors twice, and a file has them once
        state = {name: tensor for name, tensor in state.items() if name not in model.all_tied_weights_keys}
    model.save_pretrained(folder, state_dict=state)


def load_score_model(folder, device="cpu", dtype=torch.float32, normalised=True):
    """The reward model of a run, with the shift and scale that were fitted on sft0's samples.

    Raises UserError where nothing can be divided by the scale: a standard deviation of 0, say.
    """
    constants = runs.read_json(folder / "normalisation.json") if normalised else {"mean": 0.0, "std": 1.0}
    if not (0 < constants["std"] < math.inf and math.isfinite(constants["mean"])):
        raise UserError(
            f"{folder / 'normalisation.json'}: the reward on sft0's samples has mean {constants['mean']:g} and "
            f"standard deviation {constants['std']:g}, by which nothing can be divided; train the reward model again"
        )
    folders.check(folder / "model")
    cls = classifier_class(folders.load_config(folder / "model"))
    classifier = load_whole(cls, folder / "model", dtype=dtype)
    return ScoreModel(classifier, constants["mean"], constants["std"]).to(device).eval()


def check_whole(folder, cls=None, besides=()):
    """Make the checks of `load_whole` without reading weights.

    The class is the one that the configuration names, unless `cls` is given; a model that transformers does not know is
    not checked. The tensors named `besides` may be surplus.
    """
    if cls is None:
        cls = _named_class(folder)
    else:
        folders.check(folder)
        check_causal(folders.load_config(folder))
    options = {"device_map": "meta", "use_safetensors": True, "generation_config": GenerationConfig()}
    if cls is not None:
        load_whole(cls, folder, besides=besides, **options)


def _named_class(folder):
    """The class of transformers that a folder names, or None; a trunk alone counts as a causal language model."""
    try:
        config = folders.load_config(folder)
    except UserError:
        return None
    name = str((*config.architectures, "")[0]) if isinstance(config.architectures, list) else ""
    cls = None if name.endswith("Model") else getattr(transformers, name, None)
    if cls is None and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return classifier_class(config) if name.endswith("ForSequenceClassification") else AutoModelForCausalLM
    return cls


def new_classifier(folder, pad_id):
    """A classifier in float32: the trunk of a causal language model below a new head `score` with one output."""
    folders.check(folder)
    cls = classifier_class(folders.load_config(folder))
    trunk = f"{cls.base_model_prefix}."
    classifier = load_whole(cls, folder, "score.", trunk, num_labels=1, dtype=torch.float32)
    classifier.config.get_text_config().pad_token_id = pad_id
    return classifier


def classifier_class(config):
    """The class of sequence classifiers with the trunk of `config`'s causal language model and a linear head `score`.

    It is transformers' own where there is one; otherwise it is made from the parts that transformers makes its own of.
    Raises UserError where the configuration is of no causal language model.
    """
    check_causal(config)
    causal = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        cls = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]
        head = getattr(outline(cls, config), "score", None)
        if cls.base_model_prefix == causal.base_model_prefix and isinstance(head, torch.nn.Linear):
            return cls
    base = next(parent for parent in causal.__mro__ if parent.__name__.endswith("PreTrainedModel"))
    name = re.sub("(For|LMHead).*", "", causal.__name__) + "ForSequenceClassification"
    # transformers looks up in a class's module what the class can do.
    inherited = {"base_model_prefix": causal.base_model_prefix, "__module__": causal.__module__}
    return type(name, (GenericForSequenceClassification, base), inherited)


def check_causal(config):
    """Raise UserError where transformers has no causal language model for a loaded configuration."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f"model_type {config.model_type!r}: transformers has no causal language model of it; choose another model"
        )


def outline(cls, config):
    """A model without memory for weights: the names, shapes and layers that `cls` makes from a configuration."""
    config = copy.deepcopy(config)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return cls(config)


@torch.no_grad()
def mix_policies(sources, weights, device="cpu", dtype=torch.float32):
    """The soup of model folders, in memory: a causal language model in evaluation mode.

    Args:
        sources: a model folder for each weight; those of weight 0 are not read.
        weights: decimals or fractions that sum to 1.
    """
    parsed = soup.parse_weights(weights, len(sources))
    used = [(folder, weight) for folder, weight in zip(sources, parsed, strict=True) if weight]
    sources, parsed = [folder for folder, _ in used], [weight for _, weight in used]
    model = load_policy(sources[0], dtype=dtype)
    if len(sources) > 1:
        soup.check_ingredients(sources, loaded=True)
        mixed, state = soup.mixed_tensors(sources, parsed), model.state_dict()
        if folders.stored(sources[0]).keys() <= state.keys():
            for name, tensor in mixed:
                state[name].copy_(tensor)
            model.tie_weights()
        else:  # the files have other names (experts one by one, GPT-NeoX's head), which transformers has to translate
            whole = load_whole(type(model), sources[0], state_dict=dict(mixed), config=model.config, dtype=dtype)
            whole.generation_config = model.generation_config
            model = whole.eval()
    return model.to(device)


# How architectures name the dropout of their attention.
ATTENTION_DROPOUT = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")


def attention_dropout(folder, rate):
    """Options with which `load_policy` sets the attention dropout of a model; a rate of 0 leaves it as it is.

    Raises UserError where the architecture has no attention dropout.
    """
    config = folders.load_config(folder)
    names = [name for name in ATTENTION_DROPOUT if hasattr(config, name)]
    if rate and not names:
        raise UserError(f"sft.dropout={rate}: {config.model_type} has no attention dropout; set sft.dropout=0")
    return dict.fromkeys(names, rate) if rate else {}


def end_dropout(config):
    """Set the attention dropout of a configuration to 0, for a model whose training is over."""
    for name in ATTENTION_DROPOUT:
        if hasattr(config, name):
            setattr(config, name, 0.0)


@torch.no_grad()
def check_head(model):
    """Raise UserError where a model caps or scales the output of its head (Gemma 2, Cohere, Granite).

    Log-probabilities are computed here from the head's output, at response positions alone (forward.py).
    """
    advice = "choose a model without a cap or scale of logits"
    name, cap = type(model).__name__, getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    if cap:  # a comparison of logits would miss it: it hardly changes those of an untrained model
        raise UserError(
            f"{name} changes its logits after its head (final_logit_softcapping={cap}), which is not computed here; "
            + advice
        )
    device = next(model.parameters()).device
    tokens = torch.arange(8, device=device)[None] % rows(model)
    logits = model(input_ids=tokens).logits.float()
    from_head = model.get_output_embeddings()(model.base_model(input_ids=tokens).last_hidden_state).float()
    if logits.isnan().any():
        raise UserError(f"{name}: its predictions are NaN; save or download the model again")
    if logits.shape != from_head.shape or not torch.allclose(logits, from_head, rtol=1e-2, atol=1e-2):
        raise UserError(f"{name} changes its logits after its head, which is not computed here; {advice}")


def rows(model):
    """The number of rows of a model's embedding: the tokens that it can read."""
    return model.get_input_embeddings().weight.shape[0]


def compile_trunks(trained_or_frozen):
    """Compile the trunks of models for `forward.hidden_states`. Returns False where there is no C++ compiler."""
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
