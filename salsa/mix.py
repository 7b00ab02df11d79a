"""Stage mix: a model that is mixed from others before it is used, written as a model folder (salsa.mixes).

What a search asks of held-out data is measured here: the loss on the validation demonstrations as SFT measures it, in
nats per response token, or gold on sampled responses to the evaluation prompts. Averages that are tried are made in
memory. A killed run goes on with the first average that it had not measured.
"""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import torch

from salsa import mixes
from salsa.data import chat, rows, sources
from salsa.data import gold as gold_data
from salsa.data.worlds import ultra
from salsa.evaluate import generate, landscape
from salsa.evaluate.respond import evaluation_answers
from salsa.mixes import greedy
from salsa.rl import models
from salsa.rl.folders import load_config, positions
from salsa.workflow import config, runs, schema, stages
from salsa.workflow.messages import UserError

VERSION = 1
MICRO_BATCH = 8  # conversations of a forward pass, where nobody says how many


def mix(settings, parents, output, execution):
    """Write the mix to `output/model`, and of a search its path to search.json.

    Parents: the roles of the mix, each a run with a model/ or a plain model folder, and `prepare` for a search. Raises
    UserError, before anything is computed, where the models don't fit together or a measure can't be taken.
    """
    kind = mixes.kinds()[settings.mix.kind]
    needed = [*mixes.roles(settings.mix), *(["prepare"] if kind.searches else [])]
    missing = next((role for role in needed if role not in parents), None)
    if missing:
        raise UserError(f"mix: no parent {missing!r}; give the run or the model folder of each: {', '.join(needed)}")
    device = models.prepare_process(execution)
    folders = {role: models.model_folder(parents[role]) for role in mixes.roles(settings.mix)}
    shutil.rmtree(output / "model", ignore_errors=True)  # of a process that was killed before it had a manifest

    def held_out(measure):
        measured = MEASURES[measure](settings, parents["prepare"], next(iter(folders.values())), device, execution)
        return Averages(folders, measured, device, output / runs.CHECKPOINTS / "averages.json")

    summary, files = kind.make(settings.mix, folders, output / "model", held_out)
    for name, value in files.items():
        runs.write_json(output / name, value)
    return summary


def greedily(folders, file, output):
    """Write the greedy soup of model folders by their loss on a file of conversations; returns the folders taken.

    Conversations have the forms of `data.task.sft_file`; those longer than the model's context are left out.
    """
    candidates = {str(folder): Path(folder) for folder in folders}
    if len(candidates) < max(2, len(folders)):
        raise UserError("a greedy soup needs two or more models, each given once")
    lines = sources.located(rows.read(file, ultra.CONVERSATION.keys), ultra.conversation)
    demonstrations = [row for _, row in lines if not isinstance(row, str)]  # a text is why a row is dropped
    execution = config.Execution(threads=torch.get_num_threads(), micro_batch=MICRO_BATCH)
    device = models.prepare_process(execution)

    def measure():
        folder = next(iter(candidates.values()))
        tokenizer = models.load_tokenizer(folder)
        pairs, refused = landscape.encode_demonstrations(tokenizer, folder, demonstrations)
        limit = positions(load_config(folder).to_dict()) or schema.MOST
        pairs = [(prompt, response) for prompt, response in pairs if len(prompt) + len(response) <= limit]
        if not pairs:
            raise UserError(f"{file}: no conversation has an answer, and fits the model{chat.because(refused)}")
        print(f"{file}: measuring on {len(pairs)} conversations", flush=True)
        return Averages(candidates, _loss(tokenizer, pairs, device, execution), device)

    steps = greedy.write(candidates, output, measure, measured=f"the loss on {file}")
    return [step["candidate"] for step in greedy.taken_in(steps)]


class Averages:
    """Measures weighted averages of models, each once: a call takes role -> weight.

    Args:
        folders: role -> model folder.
        measure: policy -> number.
        device: where policies are measured.
        path: a file that keeps the finished measures, or None.
    """

    def __init__(self, folders, measure, device, path=None):
        self.folders, self.measure, self.device, self.path = folders, measure, device, path
        self.kept = runs.read_json(path) if path and path.exists() else {}

    def __call__(self, weights):
        """The measure of an average, or None where it is not finite."""
        key = json.dumps(weights)
        if key not in self.kept:
            sources = [self.folders[role] for role in weights]
            value = float(self.measure(models.mix_policies(sources, list(weights.values()), self.device)))
            self.kept[key] = value if math.isfinite(value) else None
            print(f"{' + '.join(weights)}: {value:.6g}", flush=True)
            if self.path:
                runs.write_json(self.path, self.kept)
        return self.kept[key]


def validation_loss(settings, prepare, folder, device, execution):
    """A function: policy -> mean loss on the validation demonstrations, in nats per response token.

    Args:
        folder: of a model with the policies' tokenizer.
    """
    tokenizer = models.load_tokenizer(folder)
    demonstrations = runs.read_jsonl(prepare / "sft_validation.jsonl")
    models.check_context(folder, settings.lengths)
    pairs = landscape.held_out_pairs(tokenizer, folder, demonstrations, settings.lengths)
    return _loss(tokenizer, pairs, device, execution)


def _loss(tokenizer, pairs, device, execution):
    return lambda policy: landscape.token_loss(policy, pairs, tokenizer.pad_token_id, device, execution)


def gold(settings, prepare, folder, device, execution):
    """A function: policy -> mean gold of its responses to the evaluation prompts, sampled with the same noise."""
    judge = gold_data.load(prepare)
    if judge is None:
        raise UserError("mix.measure=gold: the data has no gold judge; use validation_loss")
    tokenizer, first = models.load_tokenizer(folder), models.load_policy(folder)
    evaluation = runs.read_jsonl(prepare / "evaluation.jsonl")
    conversations = {"evaluation": generate.evaluation_rows(evaluation)}
    context = generate.check(first, tokenizer, conversations, settings.lengths)
    with models.on_device(first, device):
        engine = generate.make_engine(first, tokenizer, context, execution)

    def measure(policy):
        answers = evaluation_answers(policy, tokenizer, evaluation, settings, execution, engine=engine)
        return np.mean(judge.score(answers.conversations[0], answers.texts[0]))

    return measure


MEASURES = {"validation_loss": validation_loss, "gold": gold}


if __name__ == "__main__":
    stages.MIX.command(mix, VERSION, __doc__)
