"""MT-Bench (2306.05685): 80 questions of two turns, from FastChat's question.jsonl or HuggingFaceH4/mt_bench_prompts.

`reference_file` may be FastChat's reference answers.
"""

from typing import Annotated

from salsa.data import Benchmark, messages, rows, sources
from salsa.data import questions as files
from salsa.data.messages import Dropped
from salsa.workflow import schema
from salsa.workflow.messages import UserError

KIND = "mt_bench"
FILES = ("file", "reference_file")
FORM = sources.Form(("turns", "category"), ("question_id", "prompt_id", "reference"), {"turns": "prompt"})
REFERENCE_FORM = sources.Form(("question_id", "choices"))
# In these categories MT-Bench's judge compares answers with a reference (FastChat's NEED_REF_CATS). In others a
# question's `reference` may hold notes, which are no answers.
REFERENCE_CATEGORIES = {"math", "reasoning", "coding"}
CHOICES = 'a list of {"turns": a list of texts}'


@schema.dataclass()
class Settings(files.FileSettings):
    """Its files."""

    reference_file: Annotated[schema.Path, schema.ALWAYS] = ""
    """Reference answers, as FastChat's."""


def questions(benchmark, task):
    """`Questions` of the file.

    Raises UserError where the reference file does not fit the questions. Answers to questions that are not in the file,
    which may be a part of MT-Bench, are counted.
    """
    answers = _answers(benchmark)
    questions, identifiers = files.questions(
        benchmark, task, FORM, _question, lambda *question: _reference(benchmark.reference_file, answers, *question)
    )
    unused = len(answers.keys() - identifiers)
    if unused and unused == len(answers):
        raise UserError(f"{benchmark.reference_file}: answers no question of {benchmark.file}; compare the ids")
    return questions._replace(facts=questions.facts | ({"references_unused": unused} if unused else {}))


def _question(row, index):
    """The id and the row of a question; in the place of a row that is dropped stands the reason (text)."""
    value, category = FORM.values(row)
    identifier = files.identifier_of(row, ("question_id", "prompt_id"), index)
    notes = row.get("reference")
    if not isinstance(notes, list | None):
        raise messages.wrong("reference", notes, "a list of texts")
    try:
        question = {
            "id": f"{KIND}-{identifier}",
            "turns": files.texts("turns", value),
            "category": messages.text("category", category),
            "reference": ["" if messages.missing(note) else messages.text("reference", note) for note in notes or []],
        }
    except Dropped as reason:
        return identifier, str(reason)
    return identifier, question


def _reference(file, answers, place, identifier, row):
    """The reference answers of a question, one per turn, or None outside the categories that are judged by a reference.

    Answers of the reference file take precedence over the question's own.
    """
    if row["category"] not in REFERENCE_CATEGORIES:
        return None
    notes = row["reference"] and row["reference"] + [""] * (len(row["turns"]) - len(row["reference"]))
    answered_at, texts = answers.get(identifier, (place, notes))
    turns = len(row["turns"])
    if texts and len(texts) != turns:
        problem = f"{len(texts)} reference answers to question {identifier}, which has {turns} turns"
        raise UserError(f"{answered_at}: {problem}; give one per turn")
    if not texts and file:
        problem = f"no answer to question {identifier} of {row['category']} ({place})"
        raise UserError(f"{file}: {problem}; add it, or leave the file out")
    return texts or None


def _answers(benchmark):
    """Question's id -> (place, reference answers, one per turn) in the reference file."""
    if not benchmark.reference_file:
        return {}
    if sources.is_hub_id(benchmark.reference_file):
        raise UserError(f"{benchmark.reference_file}: a reference_file is a local file; fetch it, or leave it out")
    answers = {}
    source = rows.read(benchmark.reference_file, REFERENCE_FORM.keys)
    for place, (identifier, texts) in sources.located(source, _answers_of_row):
        if identifier in answers:
            problem = f"question {identifier} is answered in {answers[identifier][0]} too"
            raise UserError(f"{place}: {problem}; remove one")
        answers[identifier] = (place, texts)
    return answers


def _answers_of_row(row):
    """The question's id and the answers of a row of FastChat's reference_answer file."""
    identifier, choices = REFERENCE_FORM.values(row)
    identifier = files.checked_identifier("question_id", identifier)
    if not (isinstance(choices, list) and choices and isinstance(choices[0], dict) and "turns" in choices[0]):
        raise messages.wrong("choices", choices, CHOICES)
    answers = choices[0]["turns"]
    if not (isinstance(answers, list) and answers and all(isinstance(answer, str) for answer in answers)):
        raise messages.wrong("choices", answers, CHOICES)
    try:
        return identifier, [messages.text("choices", answer) for answer in answers]
    except Dropped as reason:
        raise UserError(f"'choices' has an answer that can't be used ({reason}); mend it") from None


def check(benchmark):
    files.check(benchmark)
    if sources.is_hub_id(benchmark.file):  # the stage reads the questions, but the answers are here already
        _answers(benchmark)


BENCHMARK = Benchmark(
    kind=KIND,
    worlds=("ultra",),
    questions=questions,
    turns=files.turns,
    settings=Settings,
    local_files=sources.local_files(*FILES),
    check=check,
)
