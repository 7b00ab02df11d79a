"""What the page's reader of responses and verdicts, side by side, shows: plain values that the page holds as JSON.

What models wrote reaches the page as JSON alone, and the page's script shows it as text.
"""

import json
import math
import re

import markupsafe

from salsa.evaluate import statistics
from salsa.judges import openai
from salsa.judges.common import ledger
from salsa.report import selection, words
from salsa.workflow import runs

LONGEST = 4000  # characters of a judge's answer; of a longer one the middle is left out, for the verdict is at its end
NOT_PUBLISHED = "(not published)"
READER = re.compile(r'(<script type="application/json" id="reader-data">)(.*?)(</script>)', re.DOTALL)


def embedded(value):
    """JSON that can stand in HTML: `<`, `>`, `&` and quotes become escapes, which JSON reads as the same text."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    escapes = {character: f"\\u{ord(character):04x}" for character in "<>&'\u2028\u2029"}
    return markupsafe.Markup(text.translate(str.maketrans(escapes)))


def without_prompts(text):
    """A report without the texts of its prompts, where these belong to other people, nor what may quote them."""

    def strip(match):
        data = json.loads(match[2])
        for benchmark in data["benchmarks"]:
            for prompt in benchmark["prompts"]:
                prompt["turns"] = [NOT_PUBLISHED] * len(prompt["turns"])
                if prompt.get("reference"):  # which pages of earlier versions lack, as they do the judges' words
                    prompt["reference"] = [NOT_PUBLISHED] * len(prompt["reference"])
        for line in (line for entry in data.get("verdicts", ()) for lines in entry["lines"] for line in lines):
            line[4:5] = [[NOT_PUBLISHED] * len(words) for words in line[4:5]]
        return match[1] + str(embedded(data)) + match[3]

    return READER.sub(strip, text)


def reader(study):
    """What the side-by-side reader shows, as plain values. Of several responses to a prompt, it shows the first.

    models: labels, sft0 first; replicates: labels, of each replicate and training seed; benchmarks: name and prompts
    (id, turns, reference answers or None), the first by id; responses[replicate][model][benchmark][prompt]: [texts,
    tokens, finish reasons, proxy reward, gold reward] or None; verdicts: of a judge run on one pair and benchmark,
    `lines[prompt]` being its verdicts as [turn or None, first model shown, winner, grade, the judge's answers in
    words], a winner being the index of a model, "tie" or "error"; `asked` is the place in `templates` of the prompts
    that the judge was asked by, or None; reminder: what is added to a prompt that is asked again at temperature 0.
    """
    templates = []
    policies = {(p.replicate, p.seed, p.name): p for p in study.policies}
    names = list(dict.fromkeys(p.name for p in study.ordered))
    labels = {policy.name: label(study, (policy.arm, policy.kl_coef)) for policy in study.policies}
    references = _references(study)
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
            {"name": name, "prompts": [_prompt(row, references) for row in rows]} for name, rows in prompts.items()
        ],
        "responses": responses,
        "verdicts": [
            entry for policy in study.policies for entry in verdicts(study, policy, models, places, prompts, templates)
        ],
        "templates": templates,
        "reminder": openai.REMINDER,
    }


def label(study, policy):
    """What the reader calls the policies (arm, kl_coef): with a mark where they have collapsed."""
    arm, kl_coef = policy
    return f"{arm}, kl_coef {kl_coef:g}{selection.collapsed(study, arm, kl_coef)}"


def _prompt(row, references):
    reference = references.get((row["benchmark"], row["prompt_id"]))
    return {"id": str(row["prompt_id"]), "turns": row["prompt"], "reference": reference}


def _references(study):
    """(benchmark, prompt's id) -> the reference answers that judges were shown, where a judge was shown any."""
    folders = {}
    for policy in study.policies:
        for folder in words.judge_folders(study, policy).values():
            parents = (runs.manifest_of(folder) or {}).get("parents", {})
            folders |= {role: parent["folder"] for role, parent in parents.items() if role.startswith("benchmark/")}
    results = study.parents["prepare"].parent.parent
    rows = {
        (role.removeprefix("benchmark/"), row["id"]): words.cleaned(row["reference"])
        for role, name in folders.items()
        for row in _rows(results / "benchmark" / name / "benchmark.jsonl")
    }
    return {place: reference for place, reference in rows.items() if reference}


def _rows(path):
    """The rows of a file; none where it isn't there, as after a run's folder was moved away."""
    return runs.read_jsonl(path) if path.is_file() else []


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


def verdicts(study, policy, models, places, prompts, templates):
    """The verdicts on a policy's first responses to these prompts, an entry for each judge run, pair and benchmark.

    `templates` gets those of the judges' prompts that it lacks.
    """
    entries, place_of_policy = {}, _trainings(study).index((policy.replicate, policy.seed))
    for judge, folder in words.judge_folders(study, policy).items():
        answers, asked = _answers(folder), _asked(folder, templates)
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
                    "asked": asked,
                    "lines": [[] for _ in list(prompts.values())[place[0]]],
                },
            )
            winner = pair[("model_a", "model_b").index(row["winner"])] if row["winner"].startswith("model") else None
            winner = row["winner"] if winner is None else winner
            said = answers.get(ledger.key(row), [])
            entry["lines"][place[1]].append([row.get("turn"), pair[row["order"]], winner, row.get("grade"), said])
    return list(entries.values())


def _answers(folder):
    """Comparison (`ledger.key`) -> the judge's answers in words, in the order of its attempts; {} of one without."""
    answers = {}
    for row in sorted(_rows(folder / "answers.jsonl"), key=lambda row: row["attempt"]):
        answers.setdefault(ledger.key(row), []).append(shortened(words.plain(row["text"])))
    return answers


def shortened(text):
    """A judge's answer without the middle of a long one."""
    if len(text) <= LONGEST:
        return text
    left = len(text) - LONGEST
    return f"{text[: LONGEST // 2]}\n[… {left:,} characters more: answers.jsonl …]\n{text[-LONGEST // 2 :]}"


def _asked(folder, templates):
    """The place in `templates` of the prompts that a judge run was asked by; None where it was asked in no words."""
    texts = {path.stem: path.read_text("utf-8") for path in sorted(folder.glob("templates/*.txt"))}
    if not texts:
        return None
    if texts not in templates:
        templates.append(texts)
    return templates.index(texts)
