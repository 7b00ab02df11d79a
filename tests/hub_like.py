"""Folders as the hub has the paper's three base models: their own classes, what is special of each, a few layers.

Weights are random; the tokenizers are the models' own classes, on a byte-level-fallback BPE of a little text, without
a chat template, and with the special tokens of the originals: Llama and Mistral have none to pad with.
"""

import json

TEXTS = [
    "the a of is to how do I you we cook rice wash boil it in water then write poem about sea and number comes after",
    "please tell me list answer question good bad Hello World What Why 0 1 2 3 4 5 6 7 8 9 . , ? !",
] * 4
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def bpe(special, newlines=False):
    """A vocabulary and merges as SentencePiece's: special tokens, bytes, then pieces in which ▁ stands for a space.

    `newlines`: whether runs of newlines are tokens, as Gemma's are; Llama has bytes for them.
    """
    from tokenizers import Tokenizer, pre_tokenizers, trainers
    from tokenizers.models import BPE

    trained = Tokenizer(BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=480, special_tokens=special + BYTES, show_progress=False)
    trained.train_from_iterator(TEXTS, trainer)
    model = json.loads(trained.to_str())["model"]
    vocabulary, merges = model["vocab"], [tuple(merge) for merge in model["merges"]]
    if newlines:
        for run in ("\n", "\n\n", "\n\n\n"):
            vocabulary[run] = len(vocabulary)
        merges += [("\n", "\n"), ("\n", "\n\n"), ("\n\n", "\n")]
    return vocabulary, merges


def tokenizer_of(name):
    from transformers import GemmaTokenizer, LlamaTokenizer

    if name == "gemma_2b":
        vocabulary, merges = bpe(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"], newlines=True)
        return GemmaTokenizer(vocab=vocabulary, merges=merges)
    vocabulary, merges = bpe(["<unk>", "<s>", "</s>"])
    return LlamaTokenizer(vocab=vocabulary, merges=merges, legacy=name == "mistral_7b")


def model_of(name, tokenizer, seed=0, **changes):
    """A random model of the preset's class; its weights are large enough that predictions differ from token to token.

    Gemma: heads of another size than hidden/heads, one of keys and values, tied embeddings. Mistral: grouped keys and
    values, and a window that is shorter than most sequences. Llama: a head of its own.
    """
    import torch
    from transformers import (
        GemmaConfig,
        GemmaForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
        MistralConfig,
        MistralForCausalLM,
    )

    own = {
        "gemma_2b": (GemmaConfig, GemmaForCausalLM, {"num_key_value_heads": 1, "head_dim": 16}),
        "mistral_7b": (MistralConfig, MistralForCausalLM, {"num_key_value_heads": 2, "sliding_window": 12}),
        "llama2_7b": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 4}),
    }
    config_class, model_class, special = own[name]
    special |= {"pad_token_id": tokenizer.pad_token_id, "max_position_embeddings": 2048}
    special |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(seed)
    values = SIZES | special | {"vocab_size": len(tokenizer), "initializer_range": 0.2}
    return model_class(config_class(**values | changes)).eval()


def write(name, folder):
    """The folder of a base model, in bfloat16, as the hub has it; returns the folder."""
    import torch

    tokenizer = tokenizer_of(name)
    model_of(name, tokenizer).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
