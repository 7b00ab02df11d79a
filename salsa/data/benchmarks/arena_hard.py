"""Arena-Hard (2406.11939): 500 hard prompts of one turn, from question.jsonl or lmarena-ai/arena-hard-auto-v0.1."""

from salsa.data import Benchmark, messages, sources
from salsa.data import questions as files
from salsa.data.messages import Dropped, blank

KIND = "arena_hard"
FORM = sources.Form(("prompt", "cluster"), ("uid", "question_id"), {"prompt": "turns"})
CONTENT = 'a text, or a list of {"content": a text}'


def questions(benchmark, task):
    return files.questions(benchmark, task, FORM, _question)[0]


def _question(row, index):
    """The id and the question of a row of question.jsonl (uid, cluster, prompt) or of the hub's (turns of {"content"}).

    For a dropped question it is the reason (text). The category is the cluster: all rows have the same `category`.
    """
    value, cluster = FORM.values(row)
    identifier = files.identifier_of(row, ("uid", "question_id"), index)
    if isinstance(value, list):
        if not all(isinstance(turn, dict) and "content" in turn for turn in value):
            raise messages.wrong("turns", value, CONTENT)
        value = [turn["content"] for turn in value]
    try:
        pieces = value if isinstance(value, list) else [value]
        prompt = "".join(messages.text("prompt", piece, CONTENT) for piece in pieces)
        if blank(prompt):
            raise Dropped("empty")
        category = messages.text("cluster", cluster)
    except Dropped as reason:
        return identifier, str(reason)
    return identifier, {"id": f"{KIND}-{identifier}", "turns": [prompt], "category": category, "reference": None}


BENCHMARK = Benchmark(
    kind=KIND,
    worlds=("ultra",),
    questions=questions,
    settings=files.FileSettings,
    local_files=sources.local_files("file"),
    check=files.check,
)
