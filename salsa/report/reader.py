"""What the page's reader of responses and verdicts, side by side, shows: plain values that the page holds as JSON.

What models wrote reaches the page as JSON alone, and the page's script shows it as text.
"""

import json
import math
import re

import markupsafe

from salsa.evaluate import statistics
from salsa.report import selection, words
from salsa.workflow import runs

READER = re.compile(r'(<script type="application/json" id="reader-data">)(.*?)(</script>)', re.DOTALL)


def embedded(value):
    """JSON that can stand in HTML: `<`, `>`, `&` and quotes become escapes, which JSON reads as the same text."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    escapes = {character: f"\\u{ord(character):04x}" for character in "<>&'\u2028\u2029"}
    return markupsafe.Markup(text.translate(str.maketrans(escapes)))


def without_prompts(text):
    """A report without the texts of its prompts, where these belong to other people."""

    def strip(match):
        data = json.loads(match[2])
        for benchmark in data["benchmarks"]:
            for prompt in benchmark["prompts"]:
                prompt["turns"] = ["(not published)"] * len(prompt["turns"])
        return match[1] + str(embedded(data)) + match[3]

    return READER.sub(strip, text)


def reader(study):
    """What the side-by-side reader shows, as plain values. Of several responses to a prompt, it shows the first.

    models: labels, sft0 first; replicates: labels, of each replicate and training seed; benchmarks: name and prompts
    (id, turns), the first by id; responses[replicate][model][benchmark][prompt]: [texts, tokens, finish reasons, proxy
    reward, gold reward] or None; verdicts: of a judge run on one pair and benchmark, `lines[prompt]` being its verdicts
    as [turn or None, first model shown, winner, grade], a winner being the index of a model, "tie" or "error".
    """
    policies = {(p.replicate, p.seed, p.name): p for p in study.policies}
    names = list(dict.fromkeys(p.name for p in study.ordered))
    labels = {
        p.name: f"{p.arm}, kl_coef {p.kl_coef:g}{selection.collapsed(study, p.arm, p.kl_coef)}" for p in study.policies
    }
    prompts = {name: first_prompts(study, name) for name in study.benchmarks}
    places = {
        (benchmark, row["prompt_id"]): (i, j)
        for i, (benchmark, rows) in enumerate(prompts.items())
        for j, row in enumerate(rows)
    }
    models = {"sft0": 0} | {name: place for place, name in enumerate(names, 1)}
    responses, trainings = [], _trainings(study)
    for replicate, seed in trainings:
        answered = [selection.sft0_responses(study, replicate)]
        for name in names:
            policy = policies.get((replicate, seed, name), policies.get((replicate, 0, name)))
            answered.append(policy.responses if policy else [])
        responses.append([placed(rows, places, prompts) for rows in answered])
    return {
        "models": ["sft0"] + [labels[name] for name in names],
        "replicates": [f"{replicate}, training seed {seed}" if seed else replicate for replicate, seed in trainings],
        "benchmarks": [
            {"name": name, "prompts": [{"id": str(row["prompt_id"]), "turns": row["prompt"]} for row in rows]}
            for name, rows in prompts.items()
        ],
        "responses": responses,
        "verdicts": [entry for policy in study.policies for entry in verdicts(study, policy, models, places, prompts)],
    }


def _trainings(study):
    """(replicate, training seed) of all policies, in order."""
    return sorted({(policy.replicate, policy.seed) for policy in study.policies})


def first_prompts(study, benchmark):
    """The first rows of a benchmark by prompt id, one per prompt, as many as the configuration says."""
    rows = {row["prompt_id"]: row for policy in study.policies for row in policy.responses
            if row["benchmark"] == benchmark}  # fmt: skip
    return sorted(rows.values(), key=words.natural)[: study.config.report.reader]


def placed(rows, places, prompts):
    """[benchmark][prompt] -> what is shown of a model's response, or None."""
    grid = [[None] * len(some) for some in prompts.values()]
    for row in rows:
        place = places.get((row["benchmark"], row["prompt_id"]))
        if place and row["sample"] == 0:
            scores = [finite(row["reward"]), finite(row["gold"])]
            grid[place[0]][place[1]] = [row["responses"], row["tokens"], row["finish_reasons"], *scores]
    return grid


def finite(x):
    """A number of four digits, or None where JSON has no sign for it."""
    return None if x is None or not math.isfinite(x) else float(f"{x:.4g}")


def verdicts(study, policy, models, places, prompts):
    """The verdicts on a policy's first responses to these prompts, an entry for each judge run, pair and benchmark."""
    entries, place_of_policy = {}, _trainings(study).index((policy.replicate, policy.seed))
    for judge, folder in words.judge_folders(study, policy).items():
        for row in statistics.latest(runs.read_jsonl(folder / "verdicts.jsonl")).values():
            place = places.get((row["benchmark"], row["prompt_id"]))
            pair = (models.get(row["model_a"]), models.get(row["model_b"]))
            if place is None or None in pair or row.get("sample"):
                continue
            entry = entries.setdefault(
                (judge, place[0], pair),
                {
                    "judge": judge,
                    "folder": f"{folder.parent.name}/{folder.name}",
                    "replicate": place_of_policy,
                    "benchmark": place[0],
                    "pair": sorted(pair),
                    "lines": [[] for _ in list(prompts.values())[place[0]]],
                },
            )
            winner = pair[("model_a", "model_b").index(row["winner"])] if row["winner"].startswith("model") else None
            line = [row.get("turn"), pair[row["order"]], row["winner"] if winner is None else winner, row.get("grade")]
            entry["lines"][place[1]].append(line)
    return list(entries.values())
