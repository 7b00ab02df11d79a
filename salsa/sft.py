"""Supervised fine-tuning with TRL's SFTTrainer, on responses only.

The SFT models of a replicate see the same demonstrations and differ in their seed: the order of the data and, where
`sft.dropout` is above 0, the dropout. `sft.stop` chooses between two regimes, because averaging may repair
over-fitting: `validation` keeps the epoch of lowest validation loss, `epochs` the last one.
"""

from datasets import Dataset
from transformers import set_seed
from trl import SFTConfig, SFTTrainer

from salsa import config, models, runs

VERSION = 2


def train(settings, parents, output, execution):
    """Write the SFT model's folder to `output/model` and its losses to `log_history.json`.

    Parents: `prepare` (sft.jsonl, sft_validation.jsonl), `base` (model/).
    Raises UserError when no demonstration fits the model.
    """
    sft = settings.sft
    device = models.prepare_process(execution, output)
    tokenizer = models.load_tokenizer(models.model_folder(parents["base"]))
    length = settings.lengths.prompt + settings.lengths.response
    data = {
        name: tokenize(tokenizer, runs.read_jsonl(parents["prepare"] / f"{name}.jsonl"), settings.lengths)
        for name in ("sft", "sft_validation")
    }
    models.check_context(parents["base"], settings.lengths)
    set_seed(settings.seed)
    # Attention layers copy the value when they are made, so that it can't be set on a loaded model.
    options = {"attention_dropout": sft.dropout} if sft.dropout else {}
    model = models.load_policy(models.model_folder(parents["base"]), **options)
    micro_batch = models.even_micro_batch(sft.batch_size, execution.micro_batch)
    validate = sft.stop == "validation"
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(output / runs.CHECKPOINTS),
            num_train_epochs=sft.epochs,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=sft.batch_size // micro_batch,
            per_device_eval_batch_size=execution.micro_batch,
            learning_rate=sft.learning_rate,
            weight_decay=sft.weight_decay,
            warmup_steps=sft.warmup,
            lr_scheduler_type="cosine",
            max_length=length,
            completion_only_loss=True,
            seed=settings.seed,
            use_cpu=device.type == "cpu",
            bf16=settings.mixed_precision == "bf16",
            gradient_checkpointing=execution.gradient_checkpointing,
            eval_strategy="epoch",
            save_strategy="best" if validate else "no",
            save_only_model=True,
            load_best_model_at_end=validate,
            metric_for_best_model="eval_loss",
            greater_is_better=False,
            save_total_limit=1,
            logging_steps=10,
            report_to=execution.trackers or "none",
            dataloader_pin_memory=False,
        ),
        train_dataset=data["sft"][0],
        eval_dataset=data["sft_validation"][0],
        processing_class=tokenizer,
    )
    trainer.train()
    history = trainer.state.log_history
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    chosen = min(losses) if validate else losses[-1]
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.config.attention_dropout = 0.0
    model.config.use_cache = True
    model.save_pretrained(output / "model")
    tokenizer.save_pretrained(output / "model")
    runs.write_json(output / "log_history.json", history)
    return {
        "validation_loss": chosen,
        "validation_losses": losses,
        "epoch": losses.index(chosen) + 1,
        "counts": {name: counts for name, (_, counts) in data.items()},
    }


def tokenize(tokenizer, rows, lengths):
    """Rows {"messages"} as a Dataset of input_ids and completion_mask, and how many were kept and dropped.

    A row is dropped and counted when its prompt or its response is longer than `lengths` allows.
    """
    inputs, masks = [], []
    for row in rows:
        prompt, response = models.encode_conversation(tokenizer, row["messages"])
        if len(prompt) <= lengths.prompt and len(response) <= lengths.response:
            inputs.append(prompt + response)
            masks.append([0] * len(prompt) + [1] * len(response))
    if not inputs:
        raise runs.UserError(
            f"no demonstration fits lengths.prompt={lengths.prompt} and lengths.response={lengths.response} tokens"
        )
    counts = {"read": len(rows), "kept": len(inputs), "dropped_too_long": len(rows) - len(inputs)}
    return Dataset.from_dict({"input_ids": inputs, "completion_mask": masks}), counts


if __name__ == "__main__":
    runs.command("sft", VERSION, train, config.SftSettings, roles=("prepare", "base"), description=__doc__)
