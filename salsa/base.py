"""The base model: pretrained by the project, read from a package's GGUF, or taken from the hub or a local folder.

The default study's base ships with the project (`salsa/assets/`). It is copied when its address is the run's, that is,
when corpus, settings and version are those that it was made with; `execution.shipped_base=false` trains it anew (`make
base`). A copy needs no torch, so torch is imported where it is used.
"""

import math
from pathlib import Path

from salsa.workflow import runs, schema, stages
from salsa.workflow.messages import UserError

VERSION = 2
ASSETS = Path(__file__).parent / "assets"


def make(settings, parents, output, execution):
    """Write the base model to `output/model`. Raises UserError where there is none to be had."""
    if "base" in parents:  # another model that references are mixed from
        from salsa.rl import intake

        return intake.load(settings.model, output, execution, parents["base"] / "model")
    addresses = {role: runs.manifest_of(folder)["address"] for role, folder in parents.items()}
    shipped = ASSETS / runs.address("base", VERSION, schema.dump(settings), addresses)[:12]
    if execution.shipped_base and shipped.is_dir():
        runs.copy_files(shipped, output / "model")
        return {"shipped": shipped.name, **runs.read_json(shipped / "training.json")}
    if settings.model.source == "pretrain":
        return pretrain(settings, parents["corpus"], output, execution)
    from salsa.rl import intake

    return intake.load(settings.model, output, execution)


def pretrain(settings, corpus, output, execution):
    """Pretrain a small Llama on a corpus, with the next-token loss on blocks of concatenated documents.

    Raises UserError where the corpus is too small, or where a loss, a gradient or a weight is not finite.
    """
    import torch
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments, default_data_collator, set_seed

    from salsa.data import chat
    from salsa.rl import models, training

    class FiniteTrainer(training.FiniteMixin, Trainer):
        pass

    device = models.prepare_process(execution)
    base, shape = settings.base, settings.model.architecture
    texts = [row["text"] for row in runs.read_jsonl(corpus / "corpus.jsonl")]
    tokenizer = make_tokenizer(texts, corpus / "words.json", shape)
    chat.set_chat_template(tokenizer, settings.model.chat_template)
    blocks = _blocks(tokenizer, texts, base.block_length)
    if len(blocks) < 2:
        raise UserError(
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
    """A new Llama for a tokenizer, with the shape of a config.Architecture."""
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
    """A word-level tokenizer where the file `words` lists the vocabulary, otherwise byte-level BPE from `texts`."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers import models as tokenizer_models
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<bos>", "<eos>", "<unk>", "<|user|>", "<|assistant|>"]
    if words.is_file():
        vocabulary = special + runs.read_json(words)
        if len(vocabulary) > shape.vocabulary_size:
            raise UserError(
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
    """Blocks of `length` tokens, cut from the concatenation of documents, each between <bos> and <eos>."""
    ids = []
    for encoded in tokenizer(texts, add_special_tokens=False)["input_ids"]:
        ids += [tokenizer.bos_token_id, *encoded, tokenizer.eos_token_id]
    return [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]


if __name__ == "__main__":
    stages.BASE.command(make, VERSION, __doc__)
