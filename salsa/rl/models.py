"""Loading models and tokenizers, mixing them in memory, and preparing a process to compute.

Left out: training. A model folder is what `from_pretrained` loads: config.json, safetensors, tokenizer files.
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
from salsa.rl import folders
from salsa.rl.forward import ScoreModel
from salsa.workflow import runs, surroundings

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
    limit = folders.positions(folders.load_config(model_folder(parent)).to_dict())
    if limit and lengths.prompt + lengths.response > limit:
        raise runs.UserError(
            f"lengths.prompt={lengths.prompt} and lengths.response={lengths.response} need "
            f"{lengths.prompt + lengths.response} positions, and the model holds {limit}; make them shorter"
        )


def load_tokenizer(folder, **options):
    """A model folder's tokenizer, padding on the left. UserError where it can't be read, or needs code of its own."""
    with folders.loading(f"{folder}: the tokenizer", "save or download it again"):
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", trust_remote_code=False, **options)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if getattr(backend and backend.model, "dropout", None):
            backend.model.dropout = None  # which would make other tokens of a text each time
    for name in ("is_local", "local_files_only", "trust_remote_code"):  # how it was loaded: no part of it
        tokenizer.init_kwargs.pop(name, None)
    if not isinstance(tokenizer.model_max_length, int | float):
        longest = tokenizer.model_max_length
        raise runs.UserError(f"{folder}/tokenizer_config.json: model_max_length={longest!r}: no number; mend it")
    return tokenizer


def load_policy(folder, device="cpu", dtype=torch.float32, pickled=False, **options):
    """A causal language model in evaluation mode: dropout is off, in PPO too. `options` change its configuration.

    Here every stage takes a model in. Raises UserError unless all of its weights, and no others, are in the folder.
    `pickled`: whether they are pickles; then nothing but tensors is read of them.
    """
    folders.check(folder, pickled)
    config = folders.load_config(folder)
    check_causal(config)
    options["generation_config"] = _token_ids(folder, config)
    options |= {"use_safetensors": False, "weights_only": True} if pickled else {"use_safetensors": True}
    return load_whole(AutoModelForCausalLM, folder, dtype=dtype, **options).to(device).eval()


def _token_ids(folder, config):
    """Of a model's generation settings the ids that begin, end and pad: nothing else of them is used here.

    Published ones hold values that contradict each other, which transformers reads with a warning and doesn't write.
    """
    path = Path(folder) / "generation_config.json"
    published = folders.read_object(path) if path.is_file() else config.to_dict()
    ids = {name: published.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for name, value in ids.items():
        several = value if isinstance(value, list) else [value]
        if any(type(i) is not int for i in several if i is not None):
            raise runs.UserError(f"{path}: {name}={value!r}: neither a token id nor a list of such; mend it")
        # Some write -1 for none; what no row of the model stands for is never sampled.
        several = [i for i in several if i is not None and 0 <= i < config.get_text_config().vocab_size]
        ids[name] = several if isinstance(value, list) and several else next(iter(several), None)
    return GenerationConfig(**ids)


# What older versions of transformers stored beside the weights: masks and frequencies, which are computed now.
COMPUTED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|(attn|attention)\.(masked_)?bias|position_ids)$")


def load_whole(cls, folder, head="", trunk="", besides=(), **options):
    """A model of class `cls` whose weights all come from the folder's files, and which takes all that they hold.

    transformers fills what is missing at random, and drops what is left over, with no more than a warning.

    Args:
        cls: what has transformers' `from_pretrained`.
        folder: as `folders.check` accepts it.
        head: prefix of names that may be missing: those of a head that is new.
        trunk: prefix of names of which none may be left over; "": all names.
        besides: names that may be left over all the same.
        options: of `from_pretrained`; with a `state_dict`, the weights are those.

    Raises UserError, naming the first tensor, where weights are missing, left over, of another shape, or not finite.
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
        raise runs.UserError(
            f"{folder}: tensor {name} has shape {list(given)}, and config.json makes it {list(wanted)}; "
            "give the configuration and the weights of one model"
        )
    missing = sorted(name for name in report["missing_keys"] if not (head and name.startswith(head)))
    if missing:
        # Wrappers (torch.compile, DDP, PEFT) put a prefix of theirs before all names.
        others = sorted(report["unexpected_keys"])
        alike = next((other for other in others if other.endswith(tuple(missing))), None)
        instead = f" (the files have {alike})" if alike else ""
        raise runs.UserError(
            f"{folder}: tensor {missing[0]} is missing{_more(missing)}, of {type(model).__name__}{instead}; it would "
            "start at random: give a whole model, with weights, names and number of layers as config.json says"
        )
    left_over = sorted(
        name
        for name in report["unexpected_keys"]
        if name.startswith(trunk) and name not in besides and not COMPUTED.search(name)
    )
    if left_over:
        raise runs.UserError(
            f"{folder}: tensor {left_over[0]}{_more(left_over)} is none of {type(model).__name__}, and would be "
            "dropped; give a causal language model, with as many layers as config.json says"
        )
    _check_finite(model, folder)
    return model


def _more(names):
    return f" ({len(names) - 1} more)" if len(names) > 1 else ""


def _check_finite(model, folder):
    """UserError, naming the first tensor, where a weight is no finite number."""
    for name, tensor in model.state_dict().items():
        if tensor.is_meta:
            continue
        # The sum is one pass, and finite but where a number isn't, or many large ones overflow.
        if tensor.is_floating_point() and not tensor.sum().isfinite() and not tensor.isfinite().all():
            raise runs.UserError(f"{folder}: tensor {name} holds NaN or infinity; save or download the model again")


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
    folders.check(folder / "model")
    cls = classifier_class(folders.load_config(folder / "model"))
    classifier = load_whole(cls, folder / "model", dtype=dtype)
    return ScoreModel(classifier, constants["mean"], constants["std"]).to(device).eval()


def check_whole(folder, cls=None, besides=()):
    """`load_whole` of a folder without reading its weights.

    Args:
        cls: as there; None: the class of transformers that the configuration names. Nothing is checked of a model that
            transformers doesn't know.
        besides: names that may be left over all the same.
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
    """The class that a folder's configuration names, or None. A trunk alone counts as a causal language model."""
    try:
        config = folders.load_config(folder)
    except runs.UserError:
        return None
    name = str((*config.architectures, "")[0]) if isinstance(config.architectures, list) else ""
    named = None if name.endswith("Model") else getattr(transformers, name, None)
    if named is None and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return classifier_class(config) if name.endswith("ForSequenceClassification") else AutoModelForCausalLM
    return named


def new_classifier(folder, pad_id):
    """The trunk of a causal language model below a head of one number, `score`, that is new, in float32."""
    folders.check(folder)
    cls = classifier_class(folders.load_config(folder))
    trunk = f"{cls.base_model_prefix}."
    classifier = load_whole(cls, folder, "score.", trunk, num_labels=1, dtype=torch.float32)
    classifier.config.get_text_config().pad_token_id = pad_id
    return classifier


def classifier_class(config):
    """The class of sequence classifiers with the trunk of `config`'s causal language model and a linear head `score`.

    transformers' own, where it has one like that; else one is made, of the parts that its own are made of. UserError
    where the configuration is of no causal language model.
    """
    check_causal(config)
    causal = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        known = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]
        if known.base_model_prefix == causal.base_model_prefix and _has_score(known, config):
            return known
    base = next(parent for parent in causal.__mro__ if parent.__name__.endswith("PreTrainedModel"))
    name = re.sub("(For|LMHead).*", "", causal.__name__) + "ForSequenceClassification"
    # transformers reads from the module's source what its classes can.
    inherited = {"base_model_prefix": causal.base_model_prefix, "__module__": causal.__module__}
    return type(name, (GenericForSequenceClassification, base), inherited)


def check_causal(config):
    """UserError where transformers has no causal language model of a loaded configuration."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise runs.UserError(
            f"model_type {config.model_type!r}: transformers has no causal language model of it; choose another model"
        )


def _has_score(cls, config):
    """Whether a transformers class reads its scores from `score`, a linear layer on the trunk's states."""
    return isinstance(getattr(outline(cls, config), "score", None), torch.nn.Linear)


def outline(cls, config):
    """A model without weights: names, shapes and layers of what `cls` makes of a configuration."""
    config = copy.deepcopy(config)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return cls(config)


@torch.no_grad()
def mix_policies(sources, weights, device="cpu", dtype=torch.float32):
    """The soup of model folders, in memory: a causal language model in evaluation mode.

    Args:
        sources: model folders, one for each weight; those of weight 0 are not read.
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
        else:  # stored by other names (experts one by one, GPT-NeoX's head), which transformers has to read
            made = load_whole(type(model), sources[0], state_dict=dict(mixed), config=model.config, dtype=dtype)
            made.generation_config = model.generation_config
            model = made.eval()
    return model.to(device)


# By the names that architectures have for the dropout of their attention.
ATTENTION_DROPOUT = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")


def attention_dropout(folder, rate):
    """The options with which `load_policy` sets a model's attention dropout; none for 0, which leaves it as it is.

    Raises UserError where its architecture has none.
    """
    config = folders.load_config(folder)
    names = [name for name in ATTENTION_DROPOUT if hasattr(config, name)]
    if rate and not names:
        raise runs.UserError(f"sft.dropout={rate}: {config.model_type} has no attention dropout; set sft.dropout=0")
    return dict.fromkeys(names, rate) if rate else {}


def end_dropout(config):
    """Let a configuration say that training is over: no attention dropout."""
    for name in ATTENTION_DROPOUT:
        if hasattr(config, name):
            setattr(config, name, 0.0)


@torch.no_grad()
def check_head(model):
    """UserError where a model's logits are more than its head's: a cap or a scale after it (Gemma 2, Cohere, Granite).

    Log-probabilities here are of the head's output, at response positions alone.
    """
    advice = "choose a model without a cap or scale of logits"
    name, cap = type(model).__name__, getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    if cap:  # which hardly changes the logits of an untrained model
        raise runs.UserError(
            f"{name} changes its logits after its head (final_logit_softcapping={cap}), which is not computed here; "
            + advice
        )
    device = next(model.parameters()).device
    tokens = torch.arange(8, device=device)[None] % rows(model)
    whole = model(input_ids=tokens).logits.float()
    head = model.get_output_embeddings()(model.base_model(input_ids=tokens).last_hidden_state).float()
    if whole.isnan().any():
        raise runs.UserError(f"{name}: its predictions are NaN; save or download the model again")
    if whole.shape != head.shape or not torch.allclose(whole, head, rtol=1e-2, atol=1e-2):
        raise runs.UserError(f"{name} changes its logits after its head, which is not computed here; {advice}")


def rows(model):
    """How many tokens a model's embedding has rows for."""
    return model.get_input_embeddings().weight.shape[0]


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
