"""Stage judge: pairwise verdicts on responses that are already written, of a candidate against each of its baselines.

salsa/judges says what a judge is, and which there are. Verdicts are appended as they come, so a killed run continues
where it stopped.
"""

import contextlib

from tqdm import tqdm

from salsa import judges
from salsa.judges.common.ledger import Comparison, Ledger, key
from salsa.judges.common.scoring import response_name
from salsa.workflow import runs, stages
from salsa.workflow.messages import UserError

VERSION = 3
WINNERS = ("model_a", "model_b", "tie", "error")
ORDERS = (0, 1)  # 1: model_b is shown first


def judge(settings, parents, output, execution):
    """Write verdicts.jsonl: candidate (model_a) against every baseline (model_b), both orders of every prompt.

    Where prompts have several responses, each is compared with the baseline's of the same `sample`, and the line says
    which; the line of a training seed above 0 has its `seed`.

    Parents: `candidate`, a folder whose responses.jsonl has rows of model "policy"; `baseline/<name>` for each of
    `settings.baselines`, whose values name the model of the rows to take; and `scorer` or `benchmark/<name>`, where the
    kind of judge needs them. A line is a `Comparison.question` with `winner`, `judge`, `replicate`, and fields that the
    judge adds. In the finished file the lines are in the order of baselines, prompts, samples, turns and orders.
    """
    candidate = responses(parents["candidate"], "policy")
    baselines = {name: responses(parents[f"baseline/{name}"], model) for name, model in settings.baselines.items()}
    check(candidate, baselines, parents)
    kind = judges.find(settings.judge.kind)
    comparisons = list(compare(settings.candidate, candidate, baselines, kind.by_turn))
    instance = kind.open(settings, parents, output, execution, comparisons)
    verdicts = Ledger(output / "verdicts.jsonl", comparisons, lambda line: line["winner"] in WINNERS)
    kept = {key(line) for line in verdicts.lines}
    left = [comparison for comparison in comparisons if key(comparison.question) not in kept]
    names = {"judge": settings.name, "replicate": settings.replicate}
    names |= {"seed": settings.seed} if settings.seed else {}
    try:
        with contextlib.closing(instance.verdicts(left)) as judged:
            for comparison, verdict in tqdm(judged, settings.name, len(left), mininterval=10):
                verdicts.append(comparison.question | verdict | names)
    except judges.Interrupted as interrupted:
        reason = f"judge {settings.name}: {interrupted}"
        raise UserError(f"{reason}; {len(verdicts.lines)} of {len(comparisons)} verdicts are kept") from None
    verdicts.finish()
    counts = {"prompts": len({place[:2] for place in candidate}), "baselines": len(baselines), "kept": len(kept)}
    return counts | {"errors": sum(line["winner"] == "error" for line in verdicts.lines)} | instance.finish()


def compare(name, candidate, baselines, by_turn):
    """Yield every comparison in the order of the finished file; with `by_turn`, one for each turn of a conversation."""
    several = any(sample for *_, sample in candidate)
    for baseline, rows in baselines.items():
        for place, row in candidate.items():
            turns, sample = len(row["responses"]), place[-1] if several else None
            for turn in range(1, turns + 1) if by_turn and turns > 1 else (None,):
                for order in ORDERS:
                    yield Comparison(name, baseline, row, rows[place], order, turn, sample)


def responses(folder, model):
    """(benchmark, prompt_id, sample) -> row of responses.jsonl, of one model. UserError where the file has none."""
    path, rows = folder / "responses.jsonl", {}
    for number, row in enumerate(runs.read_jsonl(path), 1):
        problem = _problem(row)
        if problem:
            raise UserError(f"{path}:{number}: {problem}; answer the benchmarks again")
        place = row["benchmark"], row["prompt_id"], row.get("sample", 0)
        if row["model"] != model:
            continue
        if place in rows:
            raise UserError(f"{path}:{number}: {response_name(row)} stands there twice; remove one")
        if row.get("compared", True):
            rows[place] = row
    if not rows:
        raise UserError(f"{path}: no response of model {model!r}; give the folder of a run that answered with it")
    return rows


def _problem(row):
    """What is wrong with a line of responses.jsonl for any judge, or None."""
    if not isinstance(row, dict):
        return "not an object"
    missing = [name for name in ("benchmark", "prompt_id", "model", "prompt", "responses") if name not in row]
    if missing:
        return f"has no {missing[0]!r}"
    if not all(isinstance(row[name], str | int) for name in ("benchmark", "prompt_id", "model")):
        return "its benchmark, prompt_id or model is neither text nor a number"
    sample = row.get("sample", 0)
    if type(sample) is not int or sample < 0:
        return f"its sample {sample!r} is no number of a response: 0, 1, …"
    for name in ("prompt", "responses"):
        if not isinstance(row[name], list) or not row[name] or not all(isinstance(text, str) for text in row[name]):
            return f"its {name!r} is not a list of texts, one per turn"
    if len(row["prompt"]) != len(row["responses"]):
        return f"has {len(row['responses'])} responses to {len(row['prompt'])} turns"
    return None


def check(candidate, baselines, parents):
    """UserError where the candidate answered a prompt that a baseline did not, or that was another for the baseline."""
    for name, rows in baselines.items():
        different = [
            place for place in candidate if place in rows and rows[place]["prompt"] != candidate[place]["prompt"]
        ]
        missing = [place for place in candidate if place not in rows]
        problem = None
        if different:
            problem = f"{place_words(different[0])} is not the prompt that the candidate answered"
        elif missing:
            first = place_words(missing[0])
            problem = f"{len(missing)} of the candidate's responses have none of {name} beside them, first {first}"
        if problem:
            path = parents[f"baseline/{name}"] / "responses.jsonl"
            raise UserError(f"{path}: {problem}; answer the same benchmarks with both")


def place_words(place):
    """A key of `responses` in a message: benchmark/prompt, and which sample where it is not the first."""
    benchmark, prompt, sample = place
    return f"{benchmark}/{prompt}" + f" (sample {sample})" * bool(sample)


if __name__ == "__main__":
    stages.JUDGE.command(judge, VERSION, __doc__)
