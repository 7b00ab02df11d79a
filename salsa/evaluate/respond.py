"""Stage respond: one process answers and scores all benchmarks of one trained policy, and measures how far it moved.

`geometry` measures how far the weights moved, KL how far the policy did. KL is measured on fresh samples on the fixed
evaluation prompts at temperature 1: to sft0, which all arms share, and to the arm's own reference. The reference is
mixed again from its ingredients, as training did. Where the best of n responses is the answer, KL is an
upper bound (`evaluate.best_of`).
"""

import contextlib

import numpy as np
import torch

from salsa import algorithms, anchors
from salsa.data import chat
from salsa.data import gold as gold_data
from salsa.evaluate import best_of, generate, geometry, score
from salsa.rl import forward, models, reference
from salsa.workflow import config, runs, schema, stages

VERSION = 6


def respond(settings, parents, output, execution):
    """Write responses.jsonl (benchmarks), evaluation.jsonl and evaluation.json (evaluation prompts), geometry.json.

    Where the best of n is the answer, samples.jsonl has the scores of all samples of each evaluation prompt.
    Parents: `policy`, `prepare`, `reward_model`, `sft0`, `sft1` where there is one, what the reference needs, and
    `benchmark/<name>` for each benchmark. A killed run continues after its last finished chunk of answers.
    """
    device = models.prepare_process(execution)
    tokenizer = models.load_tokenizer(models.model_folder(parents["policy"]))
    policy = models.load_policy(models.model_folder(parents["policy"]), device)
    reward_model = models.load_score_model(parents["reward_model"])
    gold = gold_data.load(parents["prepare"])
    end_ids, pad_id = chat.end_ids(policy, tokenizer), tokenizer.pad_token_id

    benchmarks = generate.read_benchmarks(parents)
    evaluation = runs.read_jsonl(parents["prepare"] / "evaluation.jsonl")
    conversations = benchmarks | {"evaluation": generate.evaluation_rows(evaluation)}
    context = generate.check(policy, tokenizer, conversations, settings.lengths)
    engine = generate.make_engine(policy, tokenizer, context, execution)
    kept = output / runs.CHECKPOINTS / "answers"
    n, best, samples = draws(parents["policy"]), None, settings.samples
    if n > 1:
        best = best_of.BestOf(n, _scorer(reward_model, end_ids, pad_id, device, execution.micro_batch))

    rows, left_out = [], {}
    for name, prompts in benchmarks.items():
        with models.on_device(reward_model, device) if best else contextlib.nullcontext():
            answers = generate.answer(
                policy, tokenizer, prompts, name, settings, execution, settings.temperature, kept, engine, best, samples
            )
        with models.on_device(reward_model, device):
            rewards, golds = score.score(answers, reward_model, gold, end_ids, pad_id, execution)
        rows += score.response_rows(answers, name, "policy", rewards, golds)
        left_out[name] = answers.left_out
        print(f"{name}: {len(answers.rows) // samples} prompts answered, {answers.left_out} left out", flush=True)
    runs.write_jsonl(output / "responses.jsonl", rows)

    drawn = max(n * samples, *best_of.FRONTIER) if best else samples
    answers = evaluation_answers(policy, tokenizer, evaluation, settings, execution, kept, engine, drawn)
    if answers.left_out:
        left_out["evaluation"] = answers.left_out
    with models.on_device(reward_model, device):
        rewards, golds = score.score(answers, reward_model, gold, end_ids, pad_id, execution)
    if best:
        runs.write_jsonl(output / "samples.jsonl", _sample_rows(answers, rewards, golds, drawn))
        answers, rewards, golds = _best(answers, rewards, golds, drawn, samples, n)
    batch = score.sequences(answers, 0, end_ids, pad_id, device)
    kls = _kls(parents, policy, batch, n, tokenizer, device, execution)
    runs.write_jsonl(output / "evaluation.jsonl", _evaluation_rows(answers, rewards, golds, kls))
    summary = summarise(answers, rewards, golds, samples)
    for name, values in kls.items():
        summary[name], summary[f"{name}_se"] = score.mean_and_error(values, samples)
    if best:
        summary["kl_is_bound"] = True
    metrics = runs.read_jsonl(parents["policy"] / "metrics.jsonl")
    summary["iteration"] = metrics[-1]["iteration"] + 1 if metrics else 0
    runs.write_json(output / "evaluation.json", summary)
    sft = [models.model_folder(parents[role]) for role in ("sft0", "sft1") if role in parents]
    folder = models.model_folder(parents["policy"])
    where = geometry.describe(folder, *sft) if geometry.alike(folder, sft[0]) else geometry.nowhere()
    runs.write_json(output / "geometry.json", where | {"start": _training(parents["policy"]).start})
    return summary | {"left_out": left_out}


def draws(policy):
    """How many responses the policy of a training run draws for each answer."""
    training, stage = _training(policy), runs.manifest_of(policy)["stage"]
    return algorithms.kinds()[stage].draws(getattr(training, stage))


def _scorer(reward_model, end_ids, pad_id, device, micro_batch):
    """The function (prompts, responses as lists of token ids) -> rewards (N,)."""

    def rewards(prompts, responses):
        batch = forward.from_lists(prompts, responses, end_ids, pad_id, device)
        return reward_model.scores(batch, micro_batch).double().cpu().numpy()

    return rewards


def evaluation_answers(model, tokenizer, evaluation, settings, execution, kept=None, engine=None, samples=1):
    """Answers to the fixed evaluation prompts at temperature 1; those to one prompt follow each other."""
    rows, how = generate.evaluation_rows(evaluation), (execution, 1.0, kept, engine)
    return generate.answer(model, tokenizer, rows, "evaluation", settings, *how, samples=samples)


def _sample_rows(answers, rewards, golds, drawn):
    """Yield a row for each prompt: its id, and `reward` and `gold` of each of the responses that were drawn."""
    for start in range(0, len(answers.rows), drawn):
        of_prompt = slice(start, start + drawn)
        yield {
            "prompt_id": answers.rows[start]["id"],
            "reward": rewards[0, of_prompt].tolist(),
            "gold": None if golds is None else golds[0, of_prompt].tolist(),
        }


def _best(answers, rewards, golds, drawn, samples, n):
    """(answers, rewards, golds) of each prompt's answers: each is the best of its n of the responses drawn."""
    first = drawn * np.arange(len(answers.rows) // drawn)[:, None] + n * np.arange(samples)  # (prompts, samples)
    scores = rewards[0, first[..., None] + np.arange(n)]  # (prompts, samples, n)
    places = (first + scores.argmax(axis=2)).ravel()
    chosen = generate.taken(answers, places)
    chosen.rows = [row | {"sample": row["sample"] // n} for row in chosen.rows]
    return chosen, rewards[:, places], None if golds is None else golds[:, places]


def summarise(answers, rewards, golds, samples=1):
    """Means over evaluation prompts and the samples of each, with standard errors over prompts; lengths in tokens."""
    summary = {"prompts": len(answers.rows) // samples}
    summary["reward"], summary["reward_se"] = score.mean_and_error(rewards[0], samples)
    summary["gold_reward"], summary["gold_reward_se"] = score.mean_and_error(
        None if golds is None else golds[0], samples
    )
    summary["response_length"] = sum(map(len, answers.responses[0])) / len(answers.rows)
    summary["eos_rate"] = answers.finish_reasons[0].count("stop") / len(answers.rows)
    return summary


def _kls(parents, policy, batch, n, tokenizer, device, execution):
    """KL(policy ‖ ·) of each response, to sft0 and to the policy's own reference at the end of its training, if any.

    Both models have the weights that training used (bfloat16 rounds them), and KL is computed in float32.
    """
    training, stage = _training(parents["policy"]), runs.manifest_of(parents["policy"])["stage"]
    if not algorithms.kinds()[stage].penalised:
        sft0 = models.load_policy(models.model_folder(parents["sft0"]), device)
        measure = forward.exact_kl if n == 1 else _log_ratios
        kls = measure(policy, sft0, batch, execution.micro_batch).double().cpu().numpy()
        return {"kl_to_sft0": kls if n == 1 else kls + best_of.bound(n)}
    ingredients = reference.load_ingredients(training, parents, tokenizer, device, execution.micro_batch)
    final = anchors.final(parents["policy"], training, ingredients)
    references = {"kl_to_sft0": reference.Reference([ingredients.sft0], {}), "kl_to_reference": final}
    if final.models == [ingredients.sft0]:
        del references["kl_to_sft0"]
    kls = {}
    for name, anchor in references.items():
        kls[name] = anchor.kl(policy, batch, execution.micro_batch, _kl_in_float32).double().cpu().numpy()
    return {"kl_to_sft0": kls["kl_to_reference"], **kls}


@torch.no_grad()
def _log_ratios(policy, model, sequences, micro_batch):
    """log policy − log model (B,) of whole responses.

    Their mean, over responses that were chosen among some of the policy's, is what KL(chosen ‖ model) has beside
    KL(chosen ‖ policy). The sum over the vocabulary, as in `forward.exact_kl`, would be over what was not chosen.
    """
    batches = [sequences.rows(rows) for rows in torch.arange(len(sequences)).split(micro_batch)]
    ours, theirs = (
        torch.cat([forward.response_logprobs(m, b)[0].sum(dim=1) for b in batches]) for m in (policy, model)
    )
    return ours - theirs


def _training(folder):
    """The settings that a policy was trained with."""
    manifest = runs.manifest_of(folder)
    return schema.from_dict(config.TRAINING[manifest["stage"]], manifest["settings"])


def _kl_in_float32(policy, model, sequences, micro_batch):
    """`forward.exact_kl` to a model that is in float32 during this call only: a GPU may not hold several like this."""
    dtype = next(model.parameters()).dtype
    kl = forward.exact_kl(policy, model.float(), sequences, micro_batch)
    model.to(dtype)
    return kl


def _evaluation_rows(answers, rewards, golds, kls):
    for i, row in enumerate(answers.rows):
        yield {
            "prompt_id": row["id"],
            "sample": row["sample"],
            "prompt": answers.conversations[0][i],
            "response": answers.texts[0][i],
            "tokens": len(answers.responses[0][i]),
            "finish_reason": answers.finish_reasons[0][i],
            "reward": float(rewards[0, i]),
            "gold": None if golds is None else float(golds[0, i]),
            **{name: float(values[i]) for name, values in kls.items()},
        }


if __name__ == "__main__":
    stages.RESPOND.command(respond, VERSION, __doc__)
