"""Supervised fine-tuning with TRL's SFTTrainer, on responses only.

The SFT models of a replicate see the same demonstrations and differ in their seed: in the order of the data and, where
`sft.dropout` is above 0, in the dropout. `sft.stop` chooses between two regimes, because averaging may repair
over-fitting: `validation` keeps the epoch of lowest validation loss, `epochs` the last one.
"""

from datasets import Dataset
from transformers import set_seed
from trl import SFTConfig, SFTTrainer

from salsa.data import chat, gold
from salsa.rl import models, training
from salsa.workflow import runs, stages
from salsa.workflow.messages import UserError

VERSION = 3
IGNORED = -100  # the label of a token that has no loss


def train(settings, parents, output, execution):
    """Write the SFT model to `output/model`, and its losses to `log_history.json`.

    Parents: `prepare` (sft.jsonl, sft_validation.jsonl) and `base` (model/). Raises UserError where no demonstration
    fits the model.
    """
    sft = settings.sft
    device = models.prepare_process(execution)
    base = models.model_folder(parents["base"])
    tokenizer = models.load_tokenizer(base)
    end = chat.ending(tokenizer, chat.folder_end_ids(base, tokenizer))
    rows = {name: runs.read_jsonl(parents["prepare"] / f"{name}.jsonl") for name in ("sft", "sft_validation")}
    rows["sft"] = best(rows["sft"], settings.best_share, parents["prepare"])
    data = {name: tokenize(tokenizer, rows[name], settings.lengths, end, name) for name in rows}
    models.check_context(parents["base"], settings.lengths)
    set_seed(settings.seed)
    # Attention layers copy the rate when they are made, so it can't be set on a loaded model.
    options = models.attention_dropout(base, sft.dropout)
    trainer = _Trainer(
        model=models.load_policy(base, **options),
        args=SFTConfig(
            **training.arguments("sft", sft, settings, execution, output, device),
            per_device_eval_batch_size=execution.micro_batch,
            weight_decay=sft.weight_decay,
            max_length=settings.lengths.prompt + settings.lengths.response,
            completion_only_loss=True,
            eval_strategy="epoch",
        ),
        train_dataset=data["sft"][0],
        eval_dataset=data["sft_validation"][0],
        processing_class=tokenizer,
        peft_config=models.adapter_config("sft", sft),
        section="sft",
        empty={"input_ids": [tokenizer.pad_token_id], "labels": [IGNORED]},
    )
    validate = sft.stop == "validation"
    history = training.train(trainer, output, lambda: models.load_policy(base), execution, best=validate)
    if training.world()[1]:
        return None  # the first process writes
    losses = training.validation_losses(history)
    loss = min(losses) if validate else losses[-1]
    runs.write_json(output / "log_history.json", training.finite_or_null(history))
    return {
        "validation_loss": loss,
        "validation_losses": losses,
        "epoch": losses.index(loss) + 1,
        "counts": {name: counts for name, (_, counts) in data.items()},
    }


def best(rows, share, prepare):
    """The share of demonstrations {"messages"} whose answers have the highest gold, in their order; at least one."""
    if share == 1:
        return rows
    conversations = [row["messages"] for row in rows]
    answers = [messages[-1]["content"] for messages in conversations]
    scores = gold.load(prepare).score([messages[:-1] for messages in conversations], answers)
    order = sorted(range(len(rows)), key=lambda i: -scores[i])  # of equal ones the first
    return [rows[i] for i in sorted(order[: max(1, round(share * len(rows)))])]


class _Trainer(training.DistributedMixin, SFTTrainer):
    def __init__(self, **named):
        super().__init__(**named)
        self.validation_tokens = sum(label != IGNORED for row in self.eval_dataset["labels"] for label in row)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Scale the losses of validation, so that transformers' mean over rows becomes the mean over tokens."""
        if num_items_in_batch is None:
            share = len(inputs["labels"]) / len(self.eval_dataset)
            num_items_in_batch = self.validation_tokens * share * self.args.world_size
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def tokenize(tokenizer, rows, lengths, end=None, what="sft"):
    """A Dataset of input_ids and completion_mask from rows {"messages"}, and counts of the rows kept and dropped.

    Rows are dropped, and counted, whose prompt or response is longer than `lengths` allows, or which can't be encoded.

    Args:
        end: the chat.Ending of responses.
        what: a name of the rows, for messages.
    """
    encoded, refused = chat.accepted(rows, lambda row: chat.encode_conversation(tokenizer, row["messages"], end))
    inputs, masks = [], []
    for _, (prompt, response) in encoded:
        if len(prompt) <= lengths.prompt and len(response) <= lengths.response:
            inputs.append(prompt + response)
            masks.append([0] * len(prompt) + [1] * len(response))
    if not inputs:
        raise UserError(
            f"{what}.jsonl: none of {len(rows)} demonstrations fits lengths.prompt={lengths.prompt} and "
            f"lengths.response={lengths.response} tokens" + chat.because(refused)
        )
    counts = {"read": len(rows), "kept": len(inputs), "dropped_too_long": len(encoded) - len(inputs)}
    counts |= chat.counted(refused, what)
    return Dataset.from_dict({"input_ids": inputs, "completion_mask": masks}), counts


if __name__ == "__main__":
    stages.SFT.command(train, VERSION, __doc__)
