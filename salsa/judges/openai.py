"""A language model as the judge, asked through any server that offers OpenAI's chat completions.

Every answer is kept in answers.jsonl, so that a reader can check each verdict and a killed run asks nothing again. The
model sees two responses as A and B and ends its answer with one of Arena-Hard's five grades (2406.11939). Each turn of
a conversation of two turns is judged by itself, as in MT-Bench (2306.05685). Where the benchmark has a reference
answer, the model sees it. The prompts are text files (salsa/judges/templates), which a user can replace.
salsa/judges/language_model reaches the server and reads verdicts.

VERSION of salsa/evaluate/judge.py also counts changes of this module, of that folder and of the templates.
"""

import asyncio
import re
import sys
import time
from pathlib import Path
from typing import Annotated

from salsa.judges import Interrupted, Judge
from salsa.judges.common.ledger import Ledger, key
from salsa.judges.language_model import access
from salsa.judges.language_model.client import Client, Failed, Refused, readable
from salsa.judges.language_model.verdict_text import CUT, GRADES, parse, verdict
from salsa.workflow import bounds, runs, schema
from salsa.workflow.messages import UserError

TEMPLATES = Path(__file__).parent / "templates"
_ONE = ("question", "answer_a", "answer_b")
_TWO = tuple(f"{name}_{turn}" for turn in (1, 2) for name in _ONE)
PLACEHOLDERS = {  # what each template has to hold, in braces
    "single": _ONE,
    "single_reference": (*_ONE, "reference"),
    "two_turn": _TWO,
    "two_turn_reference": (*_TWO, "reference_1", "reference_2"),
}
MOST_TURNS = 2  # the templates have places for no more
NO_REFERENCE = "(none)"  # stands for the reference of one turn where only the other turn has one
REMINDER = (
    "\n\nYour answer has to end with exactly one verdict, in double square brackets: "
    + ", ".join(f"[[{grade}]]" for grade in GRADES[:-1])
    + f" or [[{GRADES[-1]}]]."
)
VARIABLE = "must be the name of an environment variable, such as OPENAI_API_KEY, and not a key itself"
HARMLESS = {"question": "How much is two plus two?", "answer_a": "It is four.", "answer_b": "It is five."}
RIGHT = ("A>>B", "A>B")  # the grades of that question which make sense


@schema.dataclass()
class Settings:
    """How a language model is asked."""

    model: Annotated[str, schema.Text(200), schema.ALWAYS] = ""
    """The name by which the server knows it; any server that speaks OpenAI's API."""
    base_url: Annotated[str, schema.Text(schema.PATH, secret=True), schema.ALWAYS] = ""
    """Empty: the environment's OPENAI_BASE_URL, or OpenAI's own server."""
    key_variable: Annotated[
        str, schema.Text(100, r"[A-Za-z_][A-Za-z0-9_]*", VARIABLE, empty=False, secret=True), schema.ALWAYS
    ] = "OPENAI_API_KEY"
    """The environment variable that holds the key."""
    templates: Annotated[schema.Path, schema.ALWAYS] = ""
    """A folder of prompts; "": the project's own, salsa/judges/templates."""
    temperature: Annotated[float, schema.Range(0, 100), schema.ALWAYS] | None = 0.0
    """Temperature of answers; null leaves the parameter out of requests, for a server that refuses it."""
    max_tokens: Annotated[int, schema.Range(1, 2**20), schema.ALWAYS] | None = 1024
    """Longest answer, in tokens."""
    seed: Annotated[schema.Seed, schema.ALWAYS] | None = 0
    """Seed of answers that are sampled."""
    attempts: Annotated[int, schema.Range(1, 100), schema.ALWAYS] = 3
    """Answers asked for until one holds a verdict."""


class LanguageModelJudge:
    """Asks a language model about each comparison; see `Judge.open` for what it offers.

    Args:
        comparisons: all of the run, with those that are judged already.

    Raises UserError, before anything is asked, for a missing template, placeholder or benchmark, and for a prompt of
    more than two turns; and for a missing key or package, where anything is left to ask.
    """

    def __init__(self, settings, parents, output, execution, comparisons):
        self.settings, self.execution = settings, execution
        self.templates = load_templates(settings.judge.templates)
        self.references = _references(parents, comparisons)
        self.answers = Ledger(output / "answers.jsonl", comparisons, _usable)
        self.kept = {(key(line), line["attempt"]): line for line in self.answers.lines}
        self.budget = Budget(execution, self.answers.lines)
        self.client = self.interrupted = None
        self.taken = False  # whether the server took a question of this run
        for name, text in self.templates.items():
            runs.write_atomically(output / "templates" / f"{name}.txt", text)

    def verdicts(self, comparisons):
        """Yield (comparison, {"winner", "grade"} or {"winner": "error", "reason"}) as they come.

        The grade, one of `GRADES`, compares the models and not their places: A is model_a in both orders. Raises
        Interrupted when the budget is used up or the server fails, after the verdicts that were under way then and are
        paid for. Closing the generator, as an exception does, cuts off what is under way.
        """
        if not comparisons:
            return
        judged = self._as_they_come(comparisons)

        async def following():
            return await anext(judged, None)

        with asyncio.Runner() as runner:  # whose end cancels what is under way
            while pair := runner.run(following()):
                if pair[1]:
                    yield pair
        if self.interrupted:
            raise self.interrupted

    async def _as_they_come(self, comparisons):
        """Yield (comparison, its verdict, or None where the judge was interrupted), several being judged at a time."""
        left, slots = iter(comparisons), asyncio.Semaphore(self.execution.judge_concurrency)
        async with Client(self.settings.judge, self.execution) as self.client:
            for comparison in left:  # one at a time until the server takes one: many would be refused as one is
                yield await self._judged(comparison, slots)
                if self.taken:
                    break
            tasks = [asyncio.create_task(self._judged(comparison, slots)) for comparison in left]
            for judged in asyncio.as_completed(tasks):
                yield await judged

    def finish(self):
        """Bring answers.jsonl into the comparisons' order; returns counts of the whole run, from its first start on."""
        self.answers.finish()
        lines = self.answers.lines
        changed = {name: new for line in lines for name, new in line.get("changed_parameters", {}).items()}
        return {
            "asked": len(lines),
            "malformed": sum(_grade(line) is None for line in lines),
            "prompt_tokens": sum(line["prompt_tokens"] or 0 for line in lines),
            "completion_tokens": sum(line["completion_tokens"] or 0 for line in lines),
            "models": sorted({line["served_model"] for line in lines if line["served_model"]}),
        } | ({"changed_parameters": changed} if changed else {})

    async def _judged(self, comparison, slots):
        try:
            async with slots:
                return comparison, await self._verdict(comparison)
        except Refused as refused:
            return comparison, {"winner": "error", "reason": str(refused)}
        except Interrupted as interrupted:
            self.interrupted = self.interrupted or interrupted
            self.client.stop()
            return comparison, None

    async def _verdict(self, comparison):
        attempts, cut = self.settings.judge.attempts, 0
        for attempt in range(attempts):
            line = self.kept.get((key(comparison.question), attempt)) or await self._ask(comparison, attempt)
            grade = _grade(line)
            if grade:
                return verdict(grade, comparison.order)
            cut += str(line["finish_reason"]).lower() in CUT
        reason = f"no verdict in {attempts} answers"
        if cut:
            reason += f", {cut} of which max_tokens={self.settings.judge.max_tokens} cut"
        return {"winner": "error", "reason": reason}

    async def _ask(self, comparison, attempt):
        """Ask once more, and keep the answer; returns its line of answers.jsonl."""
        if self.interrupted:
            raise self.interrupted
        judge, prompt, seed = self.settings.judge, self.prompt(comparison), None
        if judge.temperature == 0:  # where the same prompt gets the same answer again
            prompt += REMINDER * attempt
        elif judge.seed is not None:
            question = readable(runs.canonical_json(comparison.question))
            root = f"{self.settings.replicate}/{judge.seed}" if judge.seed else self.settings.replicate
            root = f"{root}/training {self.settings.seed}" if self.settings.seed else root
            seed = runs.derive_seed(root, "judge", question, attempt)
        try:
            answer = await self._request(prompt, seed)
        except Failed as failed:
            await self._check_others(failed, seed)
            answer = await self._request(prompt, seed, retries=0)  # the server may have come up only now
        except Refused as refused:
            await self._check_others(refused, seed)
            raise
        line = comparison.question | {"attempt": attempt} | answer
        self.answers.append(line)
        return line

    async def _request(self, prompt, seed, **retries):
        """Ask the client, within the budget."""
        self.budget.begin()
        answer = await self.client.answer(prompt, seed, **retries)
        self.taken = True
        self.budget.count(answer)
        return answer

    async def _check_others(self, refused, seed):
        """Interrupted where a harmless question is not answered either: then the server answers none."""
        server = refused.server or self.settings.judge.model
        try:
            once = {"retries": 0} if isinstance(refused, Failed) else {}
            await self._request(fill(self.templates["single"], HARMLESS), seed, **once)
        except Failed as failed:
            raise Interrupted(f"{server} {failed}") from None
        except Refused:
            raise Interrupted(f"{server} refuses every question: {refused}") from None

    def prompt(self, comparison):
        """The text that asks for a verdict on a comparison."""
        rows = [comparison.row_a, comparison.row_b]
        a, b = rows if comparison.order == 0 else reversed(rows)
        questions, last = comparison.row_a["prompt"], comparison.turn or 1
        references = self.references[comparison.row_a["benchmark"], comparison.row_a["prompt_id"]] or []
        references = [*references, None, None]
        values = {}
        for turn in range(last):
            suffix = f"_{turn + 1}" if last > 1 else ""
            values[f"question{suffix}"] = questions[turn]
            values[f"answer_a{suffix}"] = a["responses"][turn]
            values[f"answer_b{suffix}"] = b["responses"][turn]
            values[f"reference{suffix}"] = references[turn] or NO_REFERENCE
        name = ("single", "two_turn")[last - 1] + ("_reference" if references[last - 1] else "")
        return fill(self.templates[name], values)


def _grade(line):
    """The grade of a line of answers.jsonl, or None."""
    return parse(line["text"], line["finish_reason"])


def _usable(line):
    """Whether this version could have written a line of answers.jsonl."""
    counts = line["prompt_tokens"], line["completion_tokens"]
    return (
        isinstance(line["text"], str)
        and type(line["attempt"]) is int
        and all(count is None or (type(count) is int and count >= 0) for count in counts)
        and all(isinstance(line[name], str | None) for name in ("finish_reason", "served_model"))
        and isinstance(line.get("changed_parameters", {}), dict)
    )


def load_templates(folder):
    """Name -> text of the templates in `folder`, or of the project's own where `folder` is "".

    Raises UserError for a missing file or placeholder, or a file that is no text.
    """
    folder, templates = Path(folder) if folder else TEMPLATES, {}
    for name, placeholders in PLACEHOLDERS.items():
        path = folder / f"{name}.txt"
        if not path.is_file():
            needed = ".txt, ".join(PLACEHOLDERS)
            raise UserError(f"{path}: missing; a folder of judge.templates has {needed}.txt")
        try:
            templates[name] = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: can't be read ({error}); save it as UTF-8 text") from None
        for placeholder in placeholders:
            if f"{{{placeholder}}}" not in templates[name]:
                raise UserError(f"{path}: has no {{{placeholder}}}; write it where that text shall stand")
    return templates


def fill(template, values):
    """The template with each `{name}` of `values` replaced; other braces, and those in the values, stay as they are."""
    return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), template)


def _references(parents, comparisons):
    """(benchmark, prompt_id) -> a list of reference answers, one per turn (or None for a turn), or None."""
    references = {
        (role.removeprefix("benchmark/"), row["id"]): row["reference"]
        for role, folder in parents.items()
        if role.startswith("benchmark/")
        for row in runs.read_jsonl(folder / "benchmark.jsonl")
    }
    for comparison in comparisons:
        benchmark, prompt_id = place = comparison.row_a["benchmark"], comparison.row_a["prompt_id"]
        if place not in references:
            raise UserError(f"{benchmark}/{prompt_id}: no such prompt; give --parent benchmark/{benchmark}=FOLDER")
        if len(comparison.row_a["prompt"]) > MOST_TURNS:
            raise UserError(f"{benchmark}/{prompt_id}: more than two turns; an openai judge is shown one or two")
    return references


class Budget:
    """Counts the requests and tokens of a run, with those of `lines` (of answers.jsonl), against the run's limits.

    Questions that are under way when the last token is spent are still answered and counted: a run may exceed its
    limit of tokens by as much, and never its limit of requests.
    """

    def __init__(self, execution, lines):
        self.limits = {"requests": execution.judge_requests, "tokens": execution.judge_tokens}
        self.spent = {"requests": len(lines), "tokens": 0}
        self.largest = 0  # tokens of the largest answer; an answer without its number of tokens counts as much
        self.uncounted = False  # whether an answer came without its number of tokens before any came with it
        for line in lines:
            self.count(line)

    def begin(self):
        """Count a request. Interrupted where nothing more may be asked."""
        for name, limit in self.limits.items():
            if limit and self.spent[name] >= limit:
                raise Interrupted(f"the budget execution.judge_{name}={limit} is used up; raise it and run again")
        if self.limits["tokens"] and self.uncounted:
            raise Interrupted("the server doesn't say how many tokens it used; leave out execution.judge_tokens")
        self.spent["requests"] += 1

    def count(self, line):
        """Count the tokens of an answer."""
        tokens = line["prompt_tokens"], line["completion_tokens"]
        if None not in tokens:
            self.largest, self.uncounted = max(self.largest, sum(tokens)), False
        elif not self.largest:
            self.uncounted = True
        self.spent["tokens"] += self.largest if None in tokens else sum(tokens)


def _check(key, judge):
    if not judge.model:
        raise UserError(f"{key}.model is missing; name the model that shall judge")
    if judge.templates and not Path(judge.templates).is_dir():
        raise UserError(f"{key}.templates={bounds.shown(judge.templates)}: no such folder")
    access.check_base_url(judge.base_url, f"{key}.base_url")


def _check_access(judge, execution):
    access.check_access(judge)
    templates = load_templates(judge.templates)
    if execution:
        access.check_reachable(judge)
        try_question(judge, fill(templates["single"], HARMLESS), execution)


def try_question(judge, question, execution):
    """Ask one question, and say how long the answer took. UserError where there is no answer.

    So a wrong key, an unknown model, a spent quota or a server that answers nothing is known before anything is
    trained. A fault is tried once more; a rate limit is waited for as in a judge's run.
    """

    async def answer():
        async with Client(judge, execution) as client:
            return client.name, await client.answer(question, judge.seed if judge.temperature else None, retries=1)

    begun = time.monotonic()
    try:
        server, line = asyncio.run(answer())
    except (Refused, Interrupted) as error:
        reason = f"{error.server} {error}" if isinstance(error, Refused) else str(error)
        raise UserError(
            f"judge {reason} (one question, before the first job); mend the key or judges.*, or set "
            "execution.judge_check=false where only the judge's job will reach it"
        ) from None
    said, grade = f"judge {server} answered a question in {time.monotonic() - begun:.1f} s", _grade(line)
    if grade not in RIGHT:
        fault = f"says {grade} where A is right" if grade else "without a verdict"
        said += f", but {fault}; see whether it can judge: salsa judge check OVERRIDES"
    print(bounds.printable(said), file=sys.stderr, flush=True)


JUDGE = Judge(
    kind="openai",
    open=LanguageModelJudge,
    settings=Settings,
    rank=1,
    by_turn=True,
    most_turns=MOST_TURNS,
    shown_references=True,
    takes_long=True,
    check=_check,
    check_access=_check_access,
    folders=lambda judge: {"templates": judge.templates} if judge.templates else {},
)
