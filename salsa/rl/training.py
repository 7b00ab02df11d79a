"""What SFT, reward models and DPO share around TRL's trainers: processes, adapters, checkpoints and interruptions.

Any number of processes, with micro-batches of any size, takes the steps that one process would take: the rows of a
batch are the same, and losses are divided by the size of the whole batch. Accelerate averages gradients (DDP) or shards
weights (FSDP2, DeepSpeed's ZeRO-3); models are written whole. A run that is told to stop saves what it needs to go on.
"""

import contextlib
import math
import os
import shutil
import sys
import time
from pathlib import Path

import torch
from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset, concatenate_datasets
from torch.utils.data import Sampler
from transformers import TrainerCallback
from transformers.integrations import unset_hf_deepspeed_config
from transformers.trainer_utils import align_special_tokens

from salsa.rl import checkpoints, divergence, models, processes, trackers
from salsa.workflow import runs
from salsa.workflow.messages import UserError
from salsa.workflow.surroundings import world

KEPT = "kept"  # beside the checkpoints: the model, or its adapters, that is the result so far
SAVED = "saved.json"  # beside the checkpoints: which of them is complete, and the loss of the first step
EXPLODED = 10  # times the loss of the first step: no training that learned anything ends above


def common_arguments(section, seed, bfloat16, output, device):
    """The TrainingArguments that pretraining, SFT, reward models and DPO have in common."""
    return {
        "output_dir": str(output / runs.CHECKPOINTS),
        "num_train_epochs": section.epochs,
        "learning_rate": section.learning_rate,
        "warmup_steps": section.warmup,
        "lr_scheduler_type": "cosine",
        "seed": seed,
        "use_cpu": device.type == "cpu",
        "bf16": bfloat16,
        "save_strategy": "no",  # the callback of `train` says when
        "logging_nan_inf_filter": False,  # or means would leave out a loss that is not finite
        "dataloader_pin_memory": False,
        "ddp_timeout": int(runs.PATIENCE.total_seconds()),  # others wait while the first process samples pairs
    }


def arguments(name, section, settings, execution, output, device):
    """The TrainingArguments that SFT, reward models and DPO have in common.

    `section` are the settings of the stage that stand under `name`. Raises UserError where the processes can't share a
    batch evenly.
    """
    share = batch_share(name, section)
    micro_batch = models.even_micro_batch(share, execution.micro_batch)
    # A process that holds a part of the weights has no room for the gradients of all of them.
    sharded = "ACCELERATE_USE_FSDP" in os.environ
    return common_arguments(section, settings.seed, settings.mixed_precision == "bf16", output, device) | {
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": share // micro_batch,
        "gradient_checkpointing": execution.gradient_checkpointing,
        "logging_steps": 10,
        "report_to": "none",  # but see `train`
        "ddp_find_unused_parameters": False,
        "ddp_broadcast_buffers": False,  # which never change
        "accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": sharded}},
    }


def batch_share(name, section):
    """The number of rows of a batch for each process. Raises UserError where they can't share it evenly."""
    count, _ = world()
    if section.batch_size % count:
        raise UserError(
            f"{count} processes can't share {name}.batch_size={section.batch_size} evenly; make it a multiple of "
            f"{count}"
        )
    return section.batch_size // count


class EpochSampler(Sampler):
    """The `rows` of a dataset in the order of an epoch, then the empty row after them, up to a `multiple` of rows.

    The order is the one that Accelerate gives a random sampler, and so the same in all processes.
    """

    def __init__(self, rows, multiple, seed):
        self.rows, self.empty = rows, -rows % multiple
        self.shuffled = SeedableRandomSampler(range(rows), data_seed=seed)

    def __len__(self):
        return self.rows + self.empty

    def __iter__(self):
        yield from self.shuffled
        yield from [self.rows] * self.empty


class FiniteMixin:
    """Makes a trainer of transformers stop where a number is not finite.

    `section` is the name of the stage's settings, for messages: base, sft, reward_model or dpo.
    """

    def __init__(self, *arguments, section, **named):
        super().__init__(*arguments, **named)
        self.section, self.output = section, Path(self.args.output_dir).parent
        self.losses = []  # those of the current step's micro-batches
        self.batch = []  # the inputs of the micro-batches of the current step, or of the last one
        self.first_loss = None
        divergence.forget(self.output)

    def create_scheduler(self, num_training_steps, optimizer=None):
        """Leave out the warm-up of a single step, whose learning rate would be 0: nothing would be trained."""
        if num_training_steps == 1:
            self.args.warmup_steps = 0
        return super().create_scheduler(num_training_steps, optimizer)

    def training_step(self, model, inputs, *arguments, **named):
        loss = super().training_step(model, inputs, *arguments, **named)
        if not self.losses:
            self.batch = []
        self.losses.append(loss)
        self.batch.append(inputs)
        return loss

    def _get_grad_norm(self, *arguments, **named):
        """Raise UserError where losses or gradients are not finite: a step asks for its norm before it is taken."""
        norm = super()._get_grad_norm(*arguments, **named)
        loss, self.losses = sum(self.losses, torch.zeros(())), []
        self.stop_where(not torch.isfinite(loss), "the loss is not finite", taken=False)
        self.stop_where(norm is not None and not math.isfinite(norm), "gradients are not finite", taken=False)
        if self.first_loss is None:
            self.first_loss = loss.item()
        return norm

    @torch.no_grad()
    def check_weights(self):
        """Raise UserError where weights, or outputs for the last batch, are not finite; before it is saved."""
        model = self.model_wrapped
        self.stop_where(not divergence.finite_weights(model), "weights are not finite")
        # Finite weights can still be so large that the model's outputs overflow.
        for inputs in self.batch[-1:]:
            names = ("input_ids", "attention_mask", "position_ids")
            inputs = self._prepare_inputs({name: inputs[name] for name in names if name in inputs})
            was_training = model.training
            output = model.eval()(**inputs).logits  # (B, T, V), or (B, labels)
            model.train(was_training)
            if output.dim() == 3 and "attention_mask" in inputs:
                output = output[inputs["attention_mask"].bool()]
            self.stop_where(not torch.isfinite(output).all(), "what the model computes is not finite")

    def stop_where(self, flag, what, taken=True):
        """Raise UserError in all processes where `flag` is true in one of them, which keeps its batch.

        `what` is a sentence that says what is wrong; `taken`, whether the step with this fault was taken.
        """
        ranks = divergence.anywhere(self.accelerator, flag)
        if not ranks:
            return
        rate, step = f"{self.section}.learning_rate={self.args.learning_rate:g}", self.state.global_step + (not taken)
        fault = f"{what} at step {step} of {self.state.max_steps}"
        message = f"{rate}: {fault}; lower it"
        if step == 1 and not taken:
            message = (
                f"{self.section}: {fault}, before anything was learned; look at the model it starts from, and the data"
            )
        divergence.stop(
            self.output,
            message,
            {"step": step, "process": ranks[0]},
            {
                f"{place}.{name}": tensor
                for place, inputs in enumerate(self.batch)
                for name, tensor in inputs.items()
                if isinstance(tensor, torch.Tensor)
            },
            writes=self.accelerator.process_index == ranks[0],
        )


class DistributedMixin(FiniteMixin):
    """Makes the steps of a trainer of TRL independent of the number of processes that take them.

    `empty` is a row, in the form in which the trainer prepares rows, that adds nothing to a loss.
    """

    def __init__(self, *arguments, empty, **named):
        super().__init__(*arguments, **named)
        count = self.args.world_size
        self.rows = len(self.train_dataset)
        self.batch_size = count * self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        self.steps_per_epoch = -(-self.rows // self.batch_size)
        multiple = count * self.args.per_device_train_batch_size if count > 1 else 1
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self.epoch_sampler = EpochSampler(self.rows, multiple, seed)
        if count > 1:
            # Accelerate would fill up the last batch with rows of the first, and so train on these twice.
            self.train_dataset = _with_rows(self.train_dataset, empty, 1)
            if self.eval_dataset is not None:
                missing = -len(self.eval_dataset) % (count * self.args.per_device_eval_batch_size)
                self.eval_dataset = _with_rows(self.eval_dataset, empty, missing)

    def create_accelerator_and_postprocess(self):
        if self.args.deepspeed_plugin is not None:
            config = self.args.deepspeed_plugin.hf_ds_config.config
            config |= {"gradient_accumulation_steps": "auto", "gradient_clipping": "auto"}  # take the trainer's
        super().create_accelerator_and_postprocess()
        processes.keep_precision(self.accelerator)

    def _get_train_sampler(self, train_dataset=None):
        return self.epoch_sampler

    def _load_from_checkpoint(self, checkpoint, *arguments, **named):
        with checkpoints.reading(Path(checkpoint)):
            return super()._load_from_checkpoint(checkpoint, *arguments, **named)

    def _load_optimizer_and_scheduler(self, checkpoint):
        with checkpoints.reading(Path(checkpoint)) if checkpoint else contextlib.nullcontext():
            return super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint):
        with checkpoints.reading(Path(checkpoint)) if checkpoint else contextlib.nullcontext():
            return super()._load_rng_state(checkpoint)

    def in_this_step(self):
        """The number of rows of data, over all processes, in the batch of this step."""
        done = self.state.global_step % self.steps_per_epoch
        return min(self.batch_size, self.rows - done * self.batch_size)


def _with_rows(dataset, row, count):
    more = {name: [value] * count for name, value in row.items()}
    return concatenate_datasets([dataset, Dataset.from_dict(more, features=dataset.features)])


class CheckpointCallback(TrainerCallback):
    """Gives each epoch its own order, keeps the best model, saves checkpoints, and stops where `stop` asks for it."""

    def __init__(self, trainer, output, stop, best, minutes):
        self.trainer, self.output, self.stop, self.best = trainer, output, stop, best
        self.seconds, self.saved = 60 * minutes or math.inf, time.monotonic()
        self.stopped = False

    def on_epoch_begin(self, args, state, control, **_):
        # From the step, so that a run that goes on within an epoch gets the order of this epoch.
        self.trainer.epoch_sampler.shuffled.set_epoch(state.global_step // self.trainer.steps_per_epoch)

    def on_step_end(self, args, state, control, **_):
        if state.global_step % self.trainer.steps_per_epoch:
            self._save_or_stop(control)

    def on_epoch_end(self, args, state, control, **_):
        if self.stopped:  # within the epoch, so that there is nothing to evaluate yet
            control.should_evaluate = control.should_log = control.should_save = False
        else:  # the checkpoint comes after the evaluation
            self._save_or_stop(control)

    def on_evaluate(self, args, state, control, **_):
        losses = validation_losses(state.log_history)
        self.trainer.stop_where(not math.isfinite(losses[-1]), "the validation loss is not finite")
        if self.best and losses.index(min(losses)) == len(losses) - 1:
            keep(self.trainer, self.output)

    def on_save(self, args, state, control, **_):
        self.trainer.accelerator.wait_for_everyone()  # each process writes its part
        self.saved = time.monotonic()
        if state.is_world_process_zero:
            path = self.output / runs.CHECKPOINTS / SAVED
            name = f"checkpoint-{state.global_step}"
            (path.with_name(name) / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing reads
            checkpoints.describe_files(path.with_name(name))
            checkpoints.sync(path.with_name(name))
            layout = checkpoints.layout(self.trainer.accelerator)
            runs.write_json(path, {"checkpoint": name, "first_loss": self.trainer.first_loss, **layout})
            for other in path.parent.glob("checkpoint-*"):  # complete or not, they are not named any more
                if other.name != name:
                    shutil.rmtree(other, ignore_errors=True)

    def _save_or_stop(self, control):
        """Let all processes save or stop as soon as one of them has to."""
        accelerator = self.trainer.accelerator
        late = time.monotonic() - self.saved > self.seconds
        wanted = torch.tensor([self.stop.asked, late], dtype=torch.float32, device=accelerator.device)
        stop, save = (accelerator.reduce(wanted) > 0).tolist()
        if stop or save:
            self.trainer.check_weights()
        if stop:
            self.stopped = control.should_training_stop = True
        control.should_save = stop or save


def validation_losses(history):
    """The loss after each epoch, in nats per response token, from a trainer's log history."""
    return [entry["eval_loss"] for entry in history if "eval_loss" in entry]


def finite_or_null(history):
    """A trainer's log history with None for numbers that are not finite (an entropy, say), which JSON can't hold."""
    return [
        {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()}
        for row in history
    ]


def train(trainer, output, load, execution, best=False):
    """Train, and write `output/model` with adapters merged. Returns the log history. Called by every process.

    An interrupted run goes on from its last checkpoint; a run that is told to stop saves one, and exits with 143, or
    with 130 after SIGINT.
    Raises UserError, with the batch kept, where losses, gradients or weights are not finite; these are never saved.

    Args:
        trainer: a trainer with the DistributedMixin.
        load: a function that returns the model as it was before training, on a CPU in float32.
        execution: config.Execution: minutes between checkpoints (0: only when the run is told to stop), and trackers.
        best: whether the result is the model of lowest validation loss, and not the last.
    """
    with checkpoints.StopRequest() as stop:
        callback = CheckpointCallback(trainer, output, stop, best, execution.checkpoint_minutes)
        trainer.add_callback(callback)
        trainer.add_callback(trackers.TrackerCallback(execution.trackers, output))
        trainer.train(resume_from_checkpoint=_saved(trainer, output))
        if callback.stopped and trainer.state.global_step < trainer.state.max_steps:
            trainer.accelerator.wait_for_everyone()  # after the first exit, the launcher gives the others 30 seconds
            trainer.accelerator.print(f"stopped after step {trainer.state.global_step}; run again to go on")
            sys.exit(stop.exit_code)
        _check_explosion(trainer, best)
        if not best:
            keep(trainer, output)
    if world()[1] == 0:
        _finish(trainer, output, load)
    unset_hf_deepspeed_config()  # or transformers would shard the models that are loaded from here on
    return trainer.state.log_history


def _check_explosion(trainer, best):
    """Raise UserError where the result is finite, but predicts far worse than the model that training began with."""
    losses = validation_losses(trainer.state.log_history)
    loss = (min(losses) if best else losses[-1]) if losses else 0.0
    first = trainer.first_loss
    exploded = first is not None and loss > EXPLODED * max(first, 1.0)
    trainer.stop_where(
        exploded, f"the validation loss is {loss:.3g} nats per token, and was about {first or 0:.3g} before,"
    )


def _saved(trainer, output):
    """The folder of the checkpoint to go on from, or None. Raises UserError where other processes wrote it."""
    path = output / runs.CHECKPOINTS / SAVED
    if not path.exists():
        return None
    saved = checkpoints.read_object(path, "checkpoint", *checkpoints.layout(trainer.accelerator))
    folder = path.parent / str(saved.pop("checkpoint"))
    trainer.first_loss = saved.pop("first_loss", None)
    checkpoints.check_layout(trainer.accelerator, saved, folder)
    checkpoints.check_files(folder)
    return str(folder)


def keep(trainer, output):
    """Write the current model, or its adapters. Called by every process. Raises UserError where it has diverged."""
    trainer.check_weights()
    accelerator = trainer.accelerator
    state = processes.whole_state(accelerator, trainer.model_wrapped)
    if accelerator.is_main_process:
        partial = output / runs.CHECKPOINTS / f".{KEPT}"
        shutil.rmtree(partial, ignore_errors=True)
        model = accelerator.unwrap_model(trainer.model)
        models.end_dropout(model.config)
        model.config.use_cache = True
        models.save(model, partial, state)
        checkpoints.describe_files(partial)
        shutil.rmtree(partial.with_name(KEPT), ignore_errors=True)
        partial.rename(partial.with_name(KEPT))
    accelerator.wait_for_everyone()


def _finish(trainer, output, load):
    """Make `output/model` from the model, or the adapters, that was kept."""
    kept, folder = output / runs.CHECKPOINTS / KEPT, output / "model"
    checkpoints.check_files(kept)
    shutil.rmtree(folder, ignore_errors=True)  # a run that was killed here may have left it incomplete
    tokenizer = trainer.processing_class
    if (kept / "adapter_config.json").exists():
        from peft import PeftModel  # an optional dependency, which adapter_config has looked for

        merged = PeftModel.from_pretrained(load(), kept).merge_and_unload()
        align_special_tokens(merged, tokenizer)  # as the trainer did with its own model
        merged.save_pretrained(folder)
    else:
        # Linked, not moved: a run that is killed from here on finds what was kept, and a large model is not copied.
        shutil.copytree(kept, folder, copy_function=_link, ignore=shutil.ignore_patterns(checkpoints.FILES))
    tokenizer.save_pretrained(folder)


def _link(source, target):
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)
