"""Stage landscape: the line between the two SFT models, before any PPO. Is there anything to study?

Along (1 - alpha) sft0 + alpha sft1 it measures the loss on held-out demonstrations, reward, gold, and KL(sft0 ‖ soup).
From these and the reward model's quality come the gates (`evaluate.gates`). Policies are judged against the answers of
sft0, sft1 and the soup to the benchmarks.
"""

import csv
from fractions import Fraction

import torch

from salsa.data import chat
from salsa.data import gold as gold_data
from salsa.evaluate import generate, score
from salsa.evaluate.respond import evaluation_answers, summarise
from salsa.rl import forward, models
from salsa.workflow import runs, stages
from salsa.workflow.messages import UserError

VERSION = 4


def survey(settings, parents, output, execution):
    """Write line.csv (one row per alpha) and responses.jsonl (models "sft0", "sft1", "soup").

    Parents: `prepare`, `reward_model`, `sft0`, `sft1`, and `benchmark/<name>` for each benchmark. A killed run
    continues after its last finished chunk of answers.
    """
    device = models.prepare_process(execution)
    folders = [models.model_folder(parents["sft0"]), models.model_folder(parents["sft1"])]
    tokenizer = models.load_tokenizer(folders[0])
    gold = gold_data.load(parents["prepare"])
    reward_model = models.load_score_model(parents["reward_model"])
    evaluation = runs.read_jsonl(parents["prepare"] / "evaluation.jsonl")
    demonstrations = runs.read_jsonl(parents["prepare"] / "sft_validation.jsonl")
    validation = held_out_pairs(tokenizer, folders[0], demonstrations, settings.lengths)
    names = {Fraction(0): "sft0", Fraction(1, 2): "soup", Fraction(1): "sft1"}
    alphas = sorted({Fraction(alpha) for alpha in settings.alphas} | set(names))

    sft0 = models.load_policy(folders[0])
    end_ids, pad_id = chat.end_ids(sft0, tokenizer), tokenizer.pad_token_id
    benchmarks = generate.read_benchmarks(parents)
    conversations = benchmarks | {"evaluation": generate.evaluation_rows(evaluation)}
    context = generate.check(sft0, tokenizer, conversations, settings.lengths)
    with models.on_device(sft0, device):
        engine = generate.make_engine(sft0, tokenizer, context, execution)
    sft0_samples, line, rows, samples = None, [], [], settings.samples
    for alpha in alphas:
        model = models.mix_policies(folders, [1 - alpha, alpha], device)
        kept = output / runs.CHECKPOINTS / "answers" / str(alpha).replace("/", "_")
        answers = evaluation_answers(model, tokenizer, evaluation, settings, execution, kept, engine, samples)
        if sft0_samples is None:  # alpha 0 comes first
            sft0_samples = score.sequences(answers, 0, end_ids, pad_id, device)
        with models.on_device(reward_model, device):
            rewards, golds = score.score(answers, reward_model, gold, end_ids, pad_id, execution)
        with models.on_device(sft0, device):
            kl = (
                forward.exact_kl(sft0, model, sft0_samples, execution.micro_batch).tolist()
                if alpha
                else [0.0] * samples
            )
        kl_mean, kl_error = score.mean_and_error(kl, samples)
        point = {"alpha": float(alpha), "loss": token_loss(model, validation, pad_id, device, execution)}
        point |= {"kl_from_sft0": kl_mean, "kl_from_sft0_se": kl_error if alpha else 0.0}
        line.append(point | summarise(answers, rewards, golds, samples))
        print(f"alpha {float(alpha):.2f}: loss {point['loss']:.4f}, KL(sft0 ‖ soup) {kl_mean:.4f}", flush=True)
        if alpha in names:
            for name, prompts in benchmarks.items():
                how = execution, settings.temperature, kept, engine
                answers = generate.answer(model, tokenizer, prompts, name, settings, *how, samples=samples)
                with models.on_device(reward_model, device):
                    rewards, golds = score.score(answers, reward_model, gold, end_ids, pad_id, execution)
                rows += score.response_rows(answers, name, names[alpha], rewards, golds)
    runs.write_jsonl(output / "responses.jsonl", rows)
    for point in line:
        point["loss_interpolated"] = line[0]["loss"] + point["alpha"] * (line[-1]["loss"] - line[0]["loss"])
    _write_line(output / "line.csv", line)
    return {"alphas": len(line), "responses": len(rows)}


def held_out_pairs(tokenizer, folder, rows, lengths):
    """(prompt ids, response ids) of the demonstrations that fit `lengths`, as SFT reads them; UserError for none."""
    pairs, _ = encode_demonstrations(tokenizer, folder, rows)
    pairs = [pair for pair in pairs if len(pair[0]) <= lengths.prompt and len(pair[1]) <= lengths.response]
    if not pairs:
        raise UserError(
            f"no validation demonstration fits lengths.prompt={lengths.prompt} and "
            f"lengths.response={lengths.response} tokens; raise them"
        )
    return pairs


def encode_demonstrations(tokenizer, folder, rows):
    """(prompt ids, response ids) of rows {"messages"}, and the errors of those that can't be encoded.

    Args:
        folder: of a model, with whose end token responses end.
    """
    end = chat.ending(tokenizer, chat.folder_end_ids(folder, tokenizer))
    encoded, refused = chat.accepted(rows, lambda row: chat.encode_conversation(tokenizer, row["messages"], end))
    return [pair for _, pair in encoded], refused


@torch.no_grad()
def token_loss(model, pairs, pad_id, device, execution):
    """Mean negative log-likelihood of (prompt ids, response ids) pairs, in nats per response token."""
    total, tokens = 0.0, 0
    for start in range(0, len(pairs), execution.micro_batch):
        prompts, responses = zip(*pairs[start : start + execution.micro_batch], strict=True)
        batch = forward.from_lists(prompts, responses, [], pad_id, device)
        logprobs, _ = forward.response_logprobs(model, batch)
        total, tokens = total - logprobs.sum().item(), tokens + batch.response_mask.sum().item()
    return total / tokens


def _write_line(path, line):
    names = ["alpha", "loss", "loss_interpolated", "reward", "reward_se", "gold_reward", "gold_reward_se"]
    names += ["kl_from_sft0", "kl_from_sft0_se", "response_length", "eos_rate"]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(line)


if __name__ == "__main__":
    stages.LANDSCAPE.command(survey, VERSION, __doc__)
