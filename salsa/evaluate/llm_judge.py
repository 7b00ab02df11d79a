"""A language model as the judge: asked over the network, of any server that speaks OpenAI's chat completions.

Every answer is kept in answers.jsonl, so that a reader can check each verdict and a killed run asks nothing again. The
model is shown two responses as A and B and ends its answer with one of Arena-Hard's five grades (2406.11939); of a
conversation of two turns, each is judged by itself, as MT-Bench does (2306.05685). Where the benchmark has a reference
answer, the model sees it. The prompts are text files (salsa/evaluate/templates), which a user can replace. Left out:
what is compared with what, and how verdicts are written (salsa/evaluate/judge.py).

VERSION of salsa/evaluate/judge.py is this module's and its templates' too.
"""

import json
import re
import threading
import time
from collections import defaultdict
from multiprocessing.pool import ThreadPool
from pathlib import Path

from salsa import runs
from salsa.evaluate.judge_access import access_key, check_access, check_base_url  # noqa: F401 (the last for others)
from salsa.evaluate.ledger import Ledger, key

TEMPLATES = Path(__file__).parent / "templates"
_ONE = ("question", "answer_a", "answer_b")
_TWO = tuple(f"{name}_{turn}" for turn in (1, 2) for name in _ONE)
PLACEHOLDERS = {  # what each template has to hold, in braces
    "single": _ONE,
    "single_reference": (*_ONE, "reference"),
    "two_turn": _TWO,
    "two_turn_reference": (*_TWO, "reference_1", "reference_2"),
}
NO_REFERENCE = "(none)"  # of one turn, where the other has one
GRADES = ("A>>B", "A>B", "A=B", "B>A", "B>>A")
GRADE = re.compile(r"\[\[\s*(A>>B|A>B|A=B|B>A|B>>A)\s*\]\]")
REMINDER = (
    "\n\nYour answer has to end with exactly one verdict, in double square brackets: "
    + ", ".join(f"[[{grade}]]" for grade in GRADES[:-1])
    + f" or [[{GRADES[-1]}]]."
)
REFUSALS = ("context_length_exceeded", "content_filter")  # error codes that concern one question alone
TOO_LONG = "maximum context length"  # as servers without codes say it
LONGEST_WAIT = 8.0  # seconds between two tries, as the package openai waits


class Interrupted(Exception):
    """Why the judge can't be asked any more for now; what it judged is kept."""


class Refused(Exception):
    """Why the server will never answer one question."""


class LanguageModelJudge:
    """Asks a language model about each comparison; see `judge.open_judge` for what it offers.

    Args:
        comparisons: all of the run; those that are judged already among them.

    Raises UserError, before anything is asked, for a missing key, package, template, placeholder or benchmark, and for
    a prompt of more than two turns.
    """

    def __init__(self, settings, parents, output, execution, comparisons):
        self.settings = settings
        self.templates = load_templates(settings.judge.templates)
        self.references = _references(parents, comparisons)
        self.client = Client(settings.judge, execution)
        self.answers = Ledger(output / "answers.jsonl", comparisons)
        self.kept = defaultdict(list)  # key of a comparison -> its answers
        for line in self.answers.lines:
            self.kept[key(line)].append(line)
        self.budget = Budget(execution, self.answers.lines)
        self.concurrency = execution.judge_concurrency
        self.interrupted = None
        for name, text in self.templates.items():
            runs.write_atomically(output / "templates" / f"{name}.txt", text)

    def verdicts(self, comparisons):
        """Yield (comparison, {"winner", "grade"} or {"winner": "error", "reason"}) as they come.

        The grade, one of `GRADES`, is of the models and not of the places: A is model_a in both orders. Raises
        Interrupted when the budget is used up or the server fails; what was under way then is yielded before.
        """
        # Its threads are daemons: a process that is told to stop waits for no answer.
        with ThreadPool(self.concurrency) as pool:
            for comparison, found in pool.imap_unordered(self._judged, comparisons):
                if found:
                    yield comparison, found
        if self.interrupted:
            raise self.interrupted

    def finish(self):
        """Bring answers.jsonl into the comparisons' order; returns counts over the whole run, interruptions and all."""
        self.answers.finish()
        lines = self.answers.lines
        return {
            "asked": len(lines),
            "malformed": sum(parse(line["text"]) is None for line in lines),
            "prompt_tokens": sum(line["prompt_tokens"] or 0 for line in lines),
            "completion_tokens": sum(line["completion_tokens"] or 0 for line in lines),
            "models": sorted({line["served_model"] for line in lines if line["served_model"]}),
        }

    def _judged(self, comparison):
        try:
            return comparison, self._verdict(comparison)
        except Refused as refused:
            return comparison, {"winner": "error", "reason": str(refused)}
        except Interrupted as interrupted:
            self.interrupted = self.interrupted or interrupted
            return comparison, None

    def _verdict(self, comparison):
        kept = self.kept.get(key(comparison.question), [])
        attempts = self.settings.judge.attempts
        for attempt in range(attempts):
            line = kept[attempt] if attempt < len(kept) else self._ask(comparison, attempt)
            grade = parse(line["text"])
            if grade:
                return verdict(grade, comparison.order)
        return {"winner": "error", "reason": f"no verdict in {attempts} answers"}

    def _ask(self, comparison, attempt):
        """Ask once more; returns the line of answers.jsonl."""
        if self.interrupted:
            raise self.interrupted
        prompt, seed = self.prompt(comparison), None
        if self.settings.judge.temperature:
            question = runs.canonical_json(comparison.question)
            seed = runs.derive_seed(self.settings.replicate, "judge", question, attempt)
        else:  # which gives the same answer to the same prompt
            prompt += REMINDER * attempt
        self.budget.begin()
        line = comparison.question | {"attempt": attempt} | self.client.ask(prompt, seed)
        self.answers.append(line)
        self.budget.count(line)
        return line

    def prompt(self, comparison):
        """The text that asks for a verdict on a comparison."""
        shown = [comparison.row_a, comparison.row_b]
        a, b = shown if comparison.order == 0 else reversed(shown)
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


def parse(answer):
    """The grade, one of `GRADES`, that an answer of the judge ends with: the last in double brackets. None without."""
    found = GRADE.findall(answer)
    return found[-1] if found else None


def verdict(grade, order):
    """{"winner", "grade"} of the grade of an answer; in order 1 its A is model_b."""
    if order == 1:
        grade = GRADES[-1 - GRADES.index(grade)]
    winner = "tie" if "=" in grade else "model_a" if grade.startswith("A") else "model_b"
    return {"winner": winner, "grade": grade}


def load_templates(folder):
    """Name -> text of the templates in `folder`; of the project's own where it is "".

    Raises UserError for a missing file or placeholder.
    """
    folder, templates = Path(folder) if folder else TEMPLATES, {}
    for name, placeholders in PLACEHOLDERS.items():
        path = folder / f"{name}.txt"
        if not path.is_file():
            needed = ", ".join(f"{name}.txt" for name in PLACEHOLDERS)
            raise runs.UserError(f"{path}: missing; a folder of judge.templates has {needed}")
        templates[name] = path.read_text(encoding="utf-8")
        for placeholder in placeholders:
            if f"{{{placeholder}}}" not in templates[name]:
                raise runs.UserError(f"{path}: has no {{{placeholder}}}; write it where that text shall stand")
    return templates


def fill(template, values):
    """The template with each `{name}` of `values` replaced; braces in what is put in, and others, stay as they are."""
    return re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], found[0]), template)


def _references(parents, comparisons):
    """(benchmark, prompt_id) -> a list of a reference answer (or None) a turn, or None."""
    roles = {role: folder for role, folder in parents.items() if role.startswith("benchmark/")}
    references = {
        (role.removeprefix("benchmark/"), row["id"]): row["reference"]
        for role, folder in roles.items()
        for row in runs.read_jsonl(folder / "benchmark.jsonl")
    }
    for comparison in comparisons:
        benchmark, prompt_id = place = comparison.row_a["benchmark"], comparison.row_a["prompt_id"]
        if place not in references:
            raise runs.UserError(f"{benchmark}/{prompt_id}: no such prompt; give --parent benchmark/{benchmark}=FOLDER")
        if len(comparison.row_a["prompt"]) > 2:
            raise runs.UserError(f"{benchmark}/{prompt_id}: more than two turns; an openai judge is shown one or two")
    return references


class Budget:
    """Counts answers and tokens of a run, those of `lines` (of answers.jsonl) with them, against the run's limits.

    What is under way when the last token is spent is still answered and counted: the limit of tokens is passed by as
    much, the limit of requests never.
    """

    def __init__(self, execution, lines):
        self.limits = {"requests": execution.judge_requests, "tokens": execution.judge_tokens}
        self.spent = {"requests": len(lines), "tokens": 0}
        self.uncounted = False  # whether an answer came without its tokens
        self._lock = threading.Lock()
        for line in lines:
            self.count(line)

    def begin(self):
        """Count a request. Interrupted where nothing more may be asked."""
        with self._lock:
            for name, limit in self.limits.items():
                if limit and self.spent[name] >= limit:
                    raise Interrupted(f"the budget execution.judge_{name}={limit} is used up; raise it and run again")
            if self.limits["tokens"] and self.uncounted:
                raise Interrupted("the server doesn't say how many tokens it used; leave out execution.judge_tokens")
            self.spent["requests"] += 1

    def count(self, line):
        """Count the tokens of an answer."""
        tokens = line["prompt_tokens"], line["completion_tokens"]
        with self._lock:
            if None in tokens:
                self.uncounted = True
            else:
                self.spent["tokens"] += sum(tokens)


class Client:
    """The server of a judge.

    The package openai waits and tries again after 429, 5xx and timeouts, up to `execution.judge_retries` times.
    """

    def __init__(self, judge, execution):
        check_access(judge)
        import openai

        self.openai, self.judge, self.retries = openai, judge, execution.judge_retries
        self.secret = access_key(judge)
        self.api = openai.OpenAI(
            api_key=self.secret or "none",
            base_url=judge.base_url or None,
            timeout=execution.judge_timeout,
            max_retries=execution.judge_retries,
        )
        # OpenAI's own newer models refuse the old name of this limit; not every other server knows the new one.
        own = self.api.base_url.host == "api.openai.com"
        self.limit = {"max_completion_tokens" if own else "max_tokens": judge.max_tokens}
        self.name = f"{judge.model} at {self.api.base_url.netloc.decode()}"

    def ask(self, prompt, seed=None):
        """One answer: {"text", "finish_reason", "prompt_tokens", "completion_tokens", "served_model"}.

        Raises Refused where the server says that it can't take this prompt, Interrupted where it fails for good.
        """
        options = {} if seed is None else {"seed": seed}
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(min(0.5 * 2 ** (attempt - 1), LONGEST_WAIT))
            try:
                return self._answer(
                    self.api.chat.completions.with_raw_response.create(
                        model=self.judge.model,
                        messages=[{"role": "user", "content": prompt}],
                        temperature=self.judge.temperature,
                        **self.limit,
                        **options,
                    ).text
                )
            except self.openai.APIStatusError as error:
                reason = self._shown(f"answers {error.status_code}: {error.message}")
                if error.code in REFUSALS or TOO_LONG in error.message:
                    raise Refused(reason) from None
                raise Interrupted(f"{self.name} {reason}") from None
            except self.openai.APIError as error:
                reason = self._shown(f"can't be reached: {error.message}")
                raise Interrupted(f"{self.name} {reason}") from None
            except (ValueError, LookupError, TypeError, AttributeError):
                continue  # a torn answer, or an error in the place of one, that came with status 200
        raise Interrupted(f"{self.name} answers what is no chat completion")

    @staticmethod
    def _answer(text):
        answer = json.loads(text)
        choice, usage = answer["choices"][0], answer.get("usage") or {}
        return {
            "text": choice["message"].get("content") or "",
            "finish_reason": choice.get("finish_reason"),
            "prompt_tokens": usage.get("prompt_tokens"),
            "completion_tokens": usage.get("completion_tokens"),
            "served_model": answer.get("model"),
        }

    def _shown(self, text):
        """One line of at most 300 characters, without the key."""
        text = " ".join(text.split())
        return (text.replace(self.secret, "(key)") if self.secret else text)[:300]
