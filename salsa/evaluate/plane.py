"""Stage plane: reward over the plane through sft0, sft1 and a policy, and on the line sft0 -> policy beyond both ends.

A point is w_sft0·sft0 + w_sft1·sft1 + w_policy·policy, where the weights add up to 1; points with a weight below 0 lie
beyond the models. Every point answers the same evaluation prompts with the same noise, so that neighbours differ by
their weights alone. Far out, models fall apart: their answers are measured all the same, and a KL that is not finite
is recorded as missing.
"""

import csv
import math
from fractions import Fraction

from salsa.data import chat
from salsa.data import gold as gold_data
from salsa.evaluate import generate, score
from salsa.evaluate.respond import evaluation_answers, summarise
from salsa.rl import forward, models
from salsa.workflow import runs, stages
from salsa.workflow.messages import UserError

VERSION = 2

WEIGHTS = ("w_sft0", "w_sft1", "w_policy")
MEASURES = ("reward", "reward_se", "gold_reward", "gold_reward_se", "kl_from_sft0", "response_length", "eos_rate")
SFT0 = (Fraction(1), Fraction(0), Fraction(0))


def survey(settings, parents, output, execution):
    """Write plane.csv: one row per point of `triangle` (kind "plane") and of `line` (kind "line").

    Parents: `prepare`, `reward_model`, `sft0`, `sft1`, `policy`. Rewards are means over the prompts with their standard
    errors, `kl_from_sft0` is KL(sft0 ‖ point) on samples of sft0, in nats per response, `response_length` is in tokens.
    Returns the best point by reward and, where there is gold, by gold. A killed run continues with the first point that
    it had not finished.
    """
    rows = {"plane": triangle(Fraction(settings.step), Fraction(settings.margin))}
    rows["line"] = line(Fraction(settings.step) / 2, Fraction(settings.margin))
    points = list(dict.fromkeys([SFT0, *rows["plane"], *rows["line"]]))  # sft0 first: KL is on its samples
    measured = _measure(points, settings, parents, output, execution)
    with open(output / "plane.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["kind", *WEIGHTS, *MEASURES])
        for kind, places in rows.items():
            writer.writerows([kind, *map(float, at), *(measured[at][name] for name in MEASURES)] for at in places)
    best = {"best_by_reward": _best(measured, "reward"), "best_by_gold": _best(measured, "gold_reward")}
    return {"points": len(points), **best}


def triangle(step, margin):
    """Weights (w_sft0, w_sft1, w_policy), as fractions: the multiples of `step` that sum to 1, each at least -`margin`.

    Raises UserError unless 1 is a multiple of `step`, so that the models are points themselves.
    """
    if (1 / step).denominator != 1:
        raise UserError(f"evaluate.plane.step={step}: 1 must be a multiple of it; give 1/2, 1/3, 1/4, …")
    steps, beyond = int(1 / step), math.floor(margin / step)
    return [
        (1 - (sft1 + policy) * step, sft1 * step, policy * step)
        for sft1 in range(-beyond, steps + 2 * beyond + 1)
        for policy in range(-beyond, steps - sft1 + beyond + 1)
    ]


def line(step, margin):
    """Weights of points `step` apart on the line from sft0 to the policy, and beyond both by up to `margin`."""
    beyond = math.floor(margin / step)
    return [(1 - i * step, Fraction(0), i * step) for i in range(-beyond, int(1 / step) + beyond + 1)]


def _measure(points, settings, parents, output, execution):
    """Weights of each point -> its MEASURES. Finished points are kept with the run's checkpoints."""
    device = models.prepare_process(execution)
    folders = [models.model_folder(parents[role]) for role in ("sft0", "sft1", "policy")]
    tokenizer = models.load_tokenizer(folders[0])
    gold = gold_data.load(parents["prepare"])
    reward_model = models.load_score_model(parents["reward_model"])
    evaluation = runs.read_jsonl(parents["prepare"] / "evaluation.jsonl")[: settings.prompts]
    sft0 = models.load_policy(folders[0])
    end_ids, pad_id = chat.end_ids(sft0, tokenizer), tokenizer.pad_token_id
    conversations = {"evaluation": generate.evaluation_rows(evaluation)}
    context = generate.check(sft0, tokenizer, conversations, settings.lengths)
    kept_answers = output / runs.CHECKPOINTS / "answers"  # only sft0's, whose samples every point needs
    with models.on_device(sft0, device):
        engine = generate.make_engine(sft0, tokenizer, context, execution)
        answers = evaluation_answers(sft0, tokenizer, evaluation, settings, execution, kept_answers, engine)
    samples = score.sequences(answers, 0, end_ids, pad_id, device)

    path = output / runs.CHECKPOINTS / "points.json"
    kept = runs.read_json(path) if path.exists() else {}
    for number, at in enumerate(points, 1):
        name = " ".join(map(str, at))
        if name in kept:
            continue
        if at != SFT0:
            model = models.mix_policies(folders, at, device)
            answers = evaluation_answers(model, tokenizer, evaluation, settings, execution, engine=engine)
        with models.on_device(reward_model, device):
            rewards, golds = score.score(answers, reward_model, gold, end_ids, pad_id, execution)
        kl = 0.0
        if at != SFT0:
            with models.on_device(sft0, device):
                kl = forward.exact_kl(sft0, model, samples, execution.micro_batch).double().mean().item()
        point = summarise(answers, rewards, golds) | {"kl_from_sft0": kl}
        kept[name] = {measure: _finite(point[measure]) for measure in MEASURES}
        runs.write_json(path, kept)
        print(f"{number}/{len(points)}: weights {name}: reward {point['reward']:.3f}, KL {kl:.3f}", flush=True)
    return {at: kept[" ".join(map(str, at))] for at in points}


def _finite(x):
    """A finite number as it is, and None for any other value, which JSON can't hold."""
    return x if x is not None and math.isfinite(x) else None


def _best(measured, measure):
    """The point where `measure` is largest, with its weights; None where no point has a number."""
    numbers = {at: point for at, point in measured.items() if point[measure] is not None}
    if not numbers:
        return None
    best = max(numbers, key=lambda at: numbers[at][measure])
    return dict(zip(WEIGHTS, map(str, best), strict=True)) | numbers[best]


if __name__ == "__main__":
    stages.PLANE.command(survey, VERSION, __doc__)
