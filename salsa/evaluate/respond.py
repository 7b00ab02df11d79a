"""Stage respond: one process answers and scores all benchmarks of one trained policy, and measures how far it moved.

`geometry` measures how far the weights moved, KL how far the policy did. KL is measured on fresh samples on the fixed
evaluation prompts at temperature 1: to sft0, which all arms share, and to the arm's own reference. The reference is
mixed again from its ingredients, as training did.
"""

from salsa import anchors
from salsa.data import chat
from salsa.data import gold as gold_data
from salsa.evaluate import generate, geometry, score
from salsa.rl import forward, models, reference
from salsa.workflow import config, runs, schema, stages

VERSION = 5


def respond(settings, parents, output, execution):
    """Write responses.jsonl (benchmarks), evaluation.jsonl and evaluation.json (evaluation prompts), geometry.json.

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

    rows, left_out = [], {}
    for name, prompts in benchmarks.items():
        answers = generate.answer(
            policy, tokenizer, prompts, name, settings, execution, settings.temperature, kept, engine
        )
        with models.on_device(reward_model, device):
            rewards, golds = score.score(answers, reward_model, gold, end_ids, pad_id, execution)
        rows += score.response_rows(answers, name, "policy", rewards, golds)
        left_out[name] = answers.left_out
        print(f"{name}: {len(answers.rows)} prompts answered, {answers.left_out} left out", flush=True)
    runs.write_jsonl(output / "responses.jsonl", rows)

    answers = evaluation_answers(policy, tokenizer, evaluation, settings, execution, kept, engine)
    if answers.left_out:
        left_out["evaluation"] = answers.left_out
    with models.on_device(reward_model, device):
        rewards, golds = score.score(answers, reward_model, gold, end_ids, pad_id, execution)
    batch = score.sequences(answers, 0, end_ids, pad_id, device)
    kls = _kls(parents, policy, batch, tokenizer, device, execution)
    runs.write_jsonl(output / "evaluation.jsonl", _evaluation_rows(answers, rewards, golds, kls))
    summary = summarise(answers, rewards, golds)
    for name, values in kls.items():
        summary[name], summary[f"{name}_se"] = score.mean_and_error(values)
    metrics = runs.read_jsonl(parents["policy"] / "metrics.jsonl")
    summary["iteration"] = metrics[-1]["iteration"] + 1 if metrics else 0
    runs.write_json(output / "evaluation.json", summary)
    sft = [models.model_folder(parents[role]) for role in ("sft0", "sft1") if role in parents]
    where = geometry.describe(models.model_folder(parents["policy"]), *sft)
    runs.write_json(output / "geometry.json", where | {"start": _training(parents["policy"]).start})
    return summary | {"left_out": left_out}


def evaluation_answers(model, tokenizer, evaluation, settings, execution, kept=None, engine=None):
    """Answers to the fixed evaluation prompts at temperature 1."""
    rows = generate.evaluation_rows(evaluation)
    return generate.answer(model, tokenizer, rows, "evaluation", settings, execution, 1.0, kept, engine)


def summarise(answers, rewards, golds):
    """Means over evaluation prompts, with standard errors; lengths in tokens."""
    summary = {"prompts": len(answers.rows)}
    summary["reward"], summary["reward_se"] = score.mean_and_error(rewards[0])
    summary["gold_reward"], summary["gold_reward_se"] = score.mean_and_error(None if golds is None else golds[0])
    summary["response_length"] = sum(map(len, answers.responses[0])) / len(answers.rows)
    summary["eos_rate"] = answers.finish_reasons[0].count("stop") / len(answers.rows)
    return summary


def _kls(parents, policy, batch, tokenizer, device, execution):
    """KL(policy ‖ ·) of each response, to sft0 and to the policy's own reference at the end of its training.

    Both models have the weights that training used (bfloat16 rounds them), and KL is computed in float32.
    """
    training = _training(parents["policy"])
    ingredients = reference.load_ingredients(training, parents, tokenizer, device, execution.micro_batch)
    final = anchors.final(parents["policy"], training, ingredients)
    references = {"kl_to_sft0": reference.Reference([ingredients.sft0], {}), "kl_to_reference": final}
    if final.models == [ingredients.sft0]:
        del references["kl_to_sft0"]
    kls = {}
    for name, anchor in references.items():
        kls[name] = anchor.kl(policy, batch, execution.micro_batch, _kl_in_float32).double().cpu().numpy()
    return {"kl_to_sft0": kls["kl_to_reference"], **kls}


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
