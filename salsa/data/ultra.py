"""Ultra: real instructions. SFT conversations and given preferences, from hub datasets or local files of their form.

- `sft_file`: rows {"messages"}, as HuggingFaceH4/ultrachat_200k (splits train_sft, test_sft). Empty: demonstrations
  are the chosen answers of a share of the preference file that is used for nothing else.
- `preference_file`: rows {"prompt", "chosen", "rejected"}, the last two texts or conversations, as
  HuggingFaceH4/ultrafeedback_binarized (splits train_prefs, test_prefs). Split by a hash of the user's first message.
- `evaluation_file`: more rows with a prompt, for the development evaluation. Empty: a share of the preference file.

Local files are read by `rows`, a hub dataset (ORG/NAME, or ORG/NAME@REVISION) by the datasets library; the rows of
both go through the functions below, while planning (`check`) and in the stages. What can't be learned from is dropped
and counted, by reason: ties, identical texts, empty texts, tool calls, repeated prompts, prompts that another file or
another split already holds.
"""

import contextlib
import functools
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from salsa import data
from salsa.data import (
    REQUIRED_KEYS,
    assistant,
    first,
    is_hub_id,
    local_files,
    messages,
    normalised,
    ordered,
    required_keys,
    rows,
    split_of,
    user,
)
from salsa.data.messages import Dropped, blank
from salsa.workflow.runs import UserError

SHARES = {"preferences": 0.6, "prompts": 0.35, "evaluation": 0.05}  # of the preference file
SHARES_WITHOUT_SFT_FILE = {
    "demonstrations": 0.3,
    "validation": 0.05,
    "preferences": 0.35,
    "prompts": 0.25,
    "evaluation": 0.05,
}
SFT_SHARES = {"demonstrations": 0.95, "validation": 0.05}  # of an sft_file without a test split
# Whose answers MT-Bench's judge compares with a reference (FastChat's NEED_REF_CATS). A question of another category
# may have notes in its `reference`: they are no answers.
REFERENCE_CATEGORIES = {"math", "reasoning", "coding"}
OTHER_KEYS = {  # that are used where they are there
    REQUIRED_KEYS["preference_file"]: ("metadata", "score_chosen", "score_rejected"),
    REQUIRED_KEYS["mt_bench"]: ("prompt", "question_id", "prompt_id", "reference"),
    REQUIRED_KEYS["arena_hard"]: ("turns", "uid", "question_id"),
}
INSTEAD = {  # what the hub's dataset of a benchmark has in a required key's place
    REQUIRED_KEYS["mt_bench"]: {"turns": "prompt"},
    REQUIRED_KEYS["arena_hard"]: {"prompt": "turns"},
}
HUB_SPLITS = {  # setting -> the split to read, first that exists
    "sft_file": ("train_sft", "train"),
    "validation": ("test_sft",),
    "preference_file": ("train_prefs", "train"),
    "evaluation_file": ("test_prefs", "test", "train"),
    "file": ("test_prefs", "test", "train"),
}


@dataclass
class Source:
    """A hub dataset or a local file that is being read.

    Attributes:
        rows: an iterator of (place, row).
        facts: what is worth recording of a hub dataset.
        features: column -> type of a hub dataset; of a local file, each row says its own.
    """

    rows: Iterator
    facts: dict = field(default_factory=dict)
    features: dict = field(default_factory=dict)

    def __iter__(self):
        return self.rows


@contextlib.contextmanager
def opened(name, value, required):
    """The `Source` of a setting; a local file is closed afterwards.

    Args:
        name: the setting, which says the hub's split, or `validation`.
        value: ORG/NAME, ORG/NAME@REVISION or a path.
        required: the keys of a row.
    """
    keys = (*required, *OTHER_KEYS.get(required, ()))
    if not is_hub_id(value):
        with contextlib.closing(rows.read(value, keys)) as lines:
            yield Source(lines)
        return
    dataset = _from_hub(value, HUB_SPLITS[name])
    columns = dataset.column_names
    for key in required:
        if key not in columns and INSTEAD.get(required, {}).get(key) not in columns:
            raise UserError(f"{value}: no column {key!r} but {', '.join(columns)} ({name})")
    wanted = dataset.select_columns([column for column in columns if column in keys])
    facts = {"dataset": value, "split": str(dataset.split), "commit": _commit(dataset)}
    numbered = ((f"{value}: row {number}", row) for number, row in enumerate(wanted, 1))
    yield Source(numbered, {"hub": facts}, wanted.features)


def _from_hub(value, splits):
    import datasets

    offered = _offered(value)
    split = next((name for name in splits if name in offered), None)
    if split is None:
        raise UserError(f"{value}: no split {' or '.join(splits)} but {', '.join(offered)}")
    identifier, pinned = _hub_name(value)
    with _explained(value):
        return datasets.load_dataset(identifier, split=split, **pinned)


def _offered(value):
    """The names of a hub dataset's splits."""
    import datasets

    identifier, pinned = _hub_name(value)
    with _explained(value):
        return datasets.get_dataset_split_names(identifier, **pinned)


def _hub_name(value):
    identifier, _, revision = value.partition("@")
    return identifier, {"revision": revision} if revision else {}


@contextlib.contextmanager
def _explained(value):
    """Turns what the datasets library raises into a UserError of one line."""
    try:
        yield
    except Exception as error:  # offline, no such dataset, a licence to accept: many classes, one remedy
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{value}: not readable from the hub ({reason}); accept its licence there and run "
            "`huggingface-cli login`, or give a local JSONL or Parquet file"
        ) from None


def _commit(dataset):
    """The commit of a hub dataset that was read, which the folder of its cache is named by; None where it isn't."""
    folders = {Path(file["filename"]).parent.name for file in dataset.cache_files}
    return next((name for name in sorted(folders) if re.fullmatch(r"[0-9a-f]{40}", name)), None)


def _has_split(value, name):
    """Whether a hub dataset has the split of `name` (a local file has none)."""
    return is_hub_id(value) and any(split in _offered(value) for split in HUB_SPLITS[name])


def prompt_key(conversation):
    """What makes two prompts the same."""
    return "\n".join(f"{m['role']}: {normalised(m['content'])}" for m in conversation)


def _user_turns(row):
    """The user's messages of a canonical row, wherever they stand, in their order, as they are compared."""
    return [normalised(m["content"]) for m in row.get("messages") or row["prompt"] if m["role"] == "user"]


def _needed(row, required):
    """The values of a row's required keys. UserError where one is missing."""
    values = []
    for key in required:
        other = INSTEAD.get(required, {}).get(key)
        if key not in row and other not in row:
            there = f" but {rows.printable(', '.join(row))[:60]}" if row else ""
            raise UserError(f"no key {key!r}{there}; each row needs {', '.join(required)}")
        values.append(row[key] if key in row else row[other])
    return values


def _prompt(value, left_out=None):
    """The messages of a prompt, a text or messages."""
    prompt = messages.text_or_messages("prompt", value, left_out)
    return [user(prompt)] if isinstance(prompt, str) else prompt


def _answer(key, value, left_out):
    """The text of an answer, and the messages before it: of a text, or of a conversation that ends with the answer."""
    value = messages.text_or_messages(key, value, left_out)
    if isinstance(value, str):
        return value, []
    return value[-1]["content"] if value and value[-1]["role"] == "assistant" else "", value[:-1]


def _refused_prompt(prompt):
    """Why a prompt is dropped, or None."""
    if not prompt or any(blank(m["content"]) for m in prompt):
        return "empty"
    return None if prompt[-1]["role"] == "user" else "no_user_message"


def preference(row, left_out=None):
    """A preference {"prompt", "chosen", "rejected"} in canonical form, or the reason (text) why it is dropped.

    Args:
        row: of a local file or the hub, with any further keys.
        left_out: a Counter of parts of messages that were left out, by type.

    Raises UserError where a key is missing or a value has another form than it should.
    """
    given, chosen, rejected = _needed(row, REQUIRED_KEYS["preference_file"])
    try:
        chosen, before = _answer("chosen", chosen, left_out)
        rejected, before_rejected = _answer("rejected", rejected, left_out)
        prompt = before or _prompt(given, left_out)
    except Dropped as reason:
        return str(reason)
    refused = _refused_prompt(prompt)
    if refused == "empty" or blank(chosen) or blank(rejected):
        return "empty"
    if before != before_rejected:
        return "different_prompts"
    if refused:
        return refused
    if messages.seen(chosen) == messages.seen(rejected):
        return "identical"
    metadata = _metadata(row.get("metadata"))
    scores = {**metadata, **{k: row[k] for k in ("score_chosen", "score_rejected") if row.get(k) is not None}}
    if scores.get("score_chosen") is not None and scores["score_chosen"] == scores.get("score_rejected"):
        return "tie"
    return {"prompt": prompt, "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}


def _metadata(value):
    """The metadata of a preference, also where it is the text of a JSON object; nothing where it is anything else."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return {}
    return value if isinstance(value, dict) else {}


def conversation(row, left_out=None):
    """A demonstration {"messages"} that ends with an answer, or the reason why it is dropped; as `preference`."""
    (given,) = _needed(row, REQUIRED_KEYS["sft_file"])
    try:
        told = messages.messages("messages", given, left_out)
    except Dropped as reason:
        return str(reason)
    if not told or any(blank(m["content"]) for m in told):
        return "empty"
    if len(told) < 2 or told[-1]["role"] != "assistant" or "user" not in {m["role"] for m in told[:-1]}:
        return "no_answer"
    return {"messages": told}


def evaluation_prompt(row, left_out=None):
    """A prompt {"prompt"}, or the reason why it is dropped; as `preference`."""
    (given,) = _needed(row, REQUIRED_KEYS["evaluation_file"])
    try:
        prompt = _prompt(given, left_out)
    except Dropped as reason:
        return str(reason)
    return _refused_prompt(prompt) or {"prompt": prompt}


def _located(source, convert, *more):
    """Yield (place, converted) of a source's rows; a UserError of `convert` is told the row's place."""
    for place, row in source:
        try:
            converted = convert(row, *more)
        except UserError as error:
            raise UserError(f"{place}: {error}") from None
        yield place, converted


def _read(source, convert, key_of, known=frozenset(), keep=lambda row: row):
    """Canonical rows by the key of their prompt, and counts; repeated prompts and those of other files are dropped.

    Args:
        source: (place, row) of each row.
        convert: row, Counter of left out parts -> canonical row, or the reason (text) why it is dropped.
        key_of: canonical row -> what makes two of them the same.
        known: normalised messages of the user that stand in other files.
        keep: canonical row -> what shall be kept of it.
    """
    kept, dropped, left_out, read = {}, Counter(), Counter(), 0
    for _, row in _located(source, convert, left_out):
        read += 1
        if isinstance(row, str):
            dropped[row] += 1
            continue
        key = key_of(row)
        if key in kept:
            dropped["duplicate_prompt"] += 1
        elif not known.isdisjoint(_user_turns(row)):
            dropped["in_other_file"] += 1
        else:
            kept[key] = keep(row)
    counts = {"read": read, "kept": len(kept), "dropped": dict(dropped)}
    return kept, counts | ({"left_out": dict(left_out)} if left_out else {})


def _row_prompt_key(row):
    return prompt_key(row["prompt"])


def _first_prompt_key(row):
    """The key of a conversation: of the user's first message, whatever system message stands before it."""
    return prompt_key([next(m for m in row.get("messages") or row["prompt"] if m["role"] == "user")])


def _without_answers(row):
    """What planning keeps of a canonical row: enough to say which split it belongs to."""
    return {"prompt": [m for m in row.get("messages") or row["prompt"] if m["role"] == "user"]}


def prepare(task):
    """The rows of every split, and counts for each file; for the stage of that name."""
    splits, files = _splits(task)
    if not task.sft_file:
        for name in ("demonstrations", "validation"):
            splits[name] = [{"messages": row["prompt"] + row["chosen"]} for row in splits[name]]
    made = {name: first(values, getattr(task, name), f"data.task.{name}") for name, values in splits.items()}
    for name in ("prompts", "evaluation"):
        made[name] = [{"id": f"{name}-{i}", "prompt": row["prompt"]} for i, row in enumerate(made[name])]
    return made, {"files": files}


def _splits(task, keep=lambda row: row):
    """All rows of every split, in the seed's order, and counts for each file.

    Args:
        task: config.Task.
        keep: canonical row -> what shall be kept of it.
    """
    if not task.preference_file:
        raise UserError("data.task.preference_file is empty; give a hub dataset ORG/NAME or a local file")
    files = {}

    def read(name, value, required, convert, key_of, known=frozenset(), file=None):
        with opened(name, value, REQUIRED_KEYS[required]) as source:
            kept, counts = _read(source, convert, key_of, known, keep)
        files[file or name] = counts | source.facts
        return kept

    pairs = read("preference_file", task.preference_file, "preference_file", preference, _row_prompt_key)
    known = {turn for row in pairs.values() for turn in _user_turns(row)}
    shares = SHARES if task.sft_file else SHARES_WITHOUT_SFT_FILE
    splits = _divided(pairs, shares, task.seed, files["preference_file"])
    if task.evaluation_file:
        others = read(
            "evaluation_file", task.evaluation_file, "evaluation_file", evaluation_prompt, _row_prompt_key, known
        )
        splits["evaluation"] = [others[key] for key in ordered(others, task.seed, "ultra")]
        known |= {turn for row in others.values() for turn in _user_turns(row)}
    if task.sft_file:
        told = read("sft_file", task.sft_file, "sft_file", conversation, _first_prompt_key, known)
        keys = ordered(told, task.seed, "ultra")
        if _has_split(task.sft_file, "validation"):
            known |= {_user_turns(row)[0] for row in told.values()}
            tests = read(
                "validation", task.sft_file, "sft_file", conversation, _first_prompt_key, known, "sft_file_validation"
            )
            splits["demonstrations"] = [told[key] for key in keys]
            splits["validation"] = [tests[key] for key in ordered(tests, task.seed, "ultra")]
        else:
            split = {key: split_of(key, SFT_SHARES, "ultra") for key in keys}
            splits |= {name: [told[key] for key in keys if split[key] == name] for name in SFT_SHARES}
    return splits, files


def _divided(pairs, shares, seed, counts):
    """Split name -> rows of the preference file, in the seed's order.

    The user's first message says which split a row belongs to, so that neither system messages nor the prompts of one
    tree of conversations part equal questions. A row whose later message is the first one of another split's row is
    dropped, and counted in `counts`. Two later messages may be equal: "go on" is no question.
    """
    split = {key: split_of(_first_prompt_key(row), shares, "ultra") for key, row in pairs.items()}
    firsts = {_user_turns(row)[0]: split[key] for key, row in pairs.items()}
    divided = {name: [] for name in shares}
    for key in ordered(pairs, seed, "ultra"):
        if any(firsts.get(turn, split[key]) != split[key] for turn in _user_turns(pairs[key])[1:]):
            counts["dropped"]["in_other_split"] = counts["dropped"].get("in_other_split", 0) + 1
            counts["kept"] -= 1
        else:
            divided[split[key]].append(pairs[key])
    return divided


def check(settings):
    """Find the faults of the local files of a config.Task or Benchmark, by what the stages read them with.

    Raises UserError of one line; each file is read once for the same size and time.
    """
    paths = local_files(settings)
    if settings.kind in _MAKE:
        if not is_hub_id(settings.file):
            turns(settings)
        else:
            _references(settings)
        return
    there = data.sizes(settings)
    if there is None:  # some of the task's rows are the hub's, or it is a benchmark
        for name, path in paths.items():
            check_file(path, required_keys(settings, name))
        return
    for split, number in there.items():
        if not number:
            raise UserError(f"{paths['preference_file']}: no rows for {split} ({_shown(there)}); give more rows")


def sizes(task):
    """Split name -> rows that there are of it, for a config.Task whose files are all local."""
    return _sizes(tuple((name, path, *data.size_and_time(path)) for name, path in local_files(task).items()))


@functools.cache
def _sizes(files):
    from salsa.workflow import config

    splits, _ = _splits(config.Task(kind="ultra", **{name: path for name, path, *_ in files}), _without_answers)
    return {name: len(values) for name, values in splits.items()}


def check_file(path, required):
    """Read a local file whose rows have the keys `required` as a stage would; returns its counts.

    Raises UserError for what can't be read, and where no row is kept.
    """
    return _check_file(str(path), tuple(required), *data.size_and_time(path))


@functools.cache
def _check_file(path, required, size, modified):
    convert, key_of = _CONVERT[required]
    _, counts = _read(rows.read(path, (*required, *OTHER_KEYS.get(required, ()))), convert, key_of, keep=bool)
    if not counts["kept"]:
        shown = _shown(counts["dropped"])
        raise UserError(f"{path}: none of its {counts['read']} rows can be used ({shown}); see what each row needs")
    return counts


def benchmark(settings, seed, facts=None):
    """All rows of config.Benchmark, how many were read, and the dropped by reason; for the stage of that name.

    `facts`, a dictionary, is given what else is worth recording: the hub's commit.
    """
    if not settings.file:
        raise UserError(f"a {settings.kind} benchmark needs `file`: a hub dataset ORG/NAME or a local file")
    if settings.kind == "preference_file":
        with opened("file", settings.file, REQUIRED_KEYS["preference_file"]) as source:
            made, counts = _read(source, preference, _row_prompt_key)
        made, read, dropped = _preference_benchmark(made, counts, seed)
        more = source.facts | ({"left_out": counts["left_out"]} if "left_out" in counts else {})
    else:
        kept, read, dropped, more = _questions(settings)
        # in random order: the files are sorted by category, and a benchmark may take the first so many
        made = [kept[identifier] for identifier in ordered(kept, seed, "ultra")]
    if facts is not None:
        facts.update(more)
    return made, read, dropped


def _preference_benchmark(pairs, counts, seed):
    """Single-turn prompts of preferences; the chosen answer is the reference."""
    single = [pairs[key] for key in ordered(pairs, seed, "ultra") if len(pairs[key]["prompt"]) == 1]
    dropped = {**counts["dropped"], "several_turns": len(pairs) - len(single)}
    made = [
        {
            "id": f"preference_file-{i}",
            "turns": [row["prompt"][0]["content"]],
            "category": "preference_file",
            "reference": [row["chosen"][0]["content"]],
        }
        for i, row in enumerate(single)
    ]
    return made, counts["read"], dropped


def _questions(settings):
    """Questions of MT-Bench or Arena-Hard: rows by id, how many were read, the dropped by reason, facts.

    Raises UserError, with the question's place: for an id that two questions have, for another number of turns than
    the question before it has, and where the reference file does not fit the questions. Answers to questions that are
    not in the file, as of a part of MT-Bench's, are counted.
    """
    references = _references(settings)
    make, numbers = _MAKE[settings.kind], itertools.count()
    kept, places, seen, dropped, read = {}, {}, set(), Counter({"empty_or_repeated": 0}), 0
    with opened("file", settings.file, REQUIRED_KEYS[settings.kind]) as source:
        for place, (identifier, row) in _located(source, lambda row: make(row, next(numbers))):
            read += 1
            words = () if isinstance(row, str) else tuple(map(normalised, row["turns"]))
            reason = "empty" if words in seen else row if isinstance(row, str) else None
            if reason:
                places.setdefault(identifier, place)
                dropped["empty_or_repeated" if reason == "empty" else reason] += 1
                continue
            if identifier in places:
                shown = rows.printable(identifier)
                raise UserError(f"{place}: the id {shown} is also that of {places[identifier]}; give each its own")
            number = next((len(other["turns"]) for other in kept.values()), len(words))
            if len(words) != number:
                said = f"{len(words)} turn{'s' if len(words) > 1 else ''}, where the questions before have {number}"
                raise UserError(f"{place}: {said}; make it two benchmarks")
            if settings.kind == "mt_bench":
                row["reference"] = _reference(settings, references, identifier, row, place)
            places[identifier] = place
            seen.add(words)
            kept[f"{settings.kind}-{identifier}"] = row
    unused = len(set(references) - set(places))
    if unused and unused == len(references):
        raise UserError(f"{settings.reference_file}: answers no question of {settings.file}; compare the ids")
    return kept, read, dict(dropped), source.facts | ({"references_unused": unused} if unused else {})


def _reference(settings, references, identifier, row, place):
    """The reference answers of an MT-Bench question, one a turn, or None.

    In the three categories that are judged by a reference, one of the reference file goes before the question's own.
    """
    if row["category"] not in REFERENCE_CATEGORIES:
        return None
    notes = row["reference"] and row["reference"] + [""] * (len(row["turns"]) - len(row["reference"]))
    place, answers = references.get(identifier, (place, notes))
    shown = rows.printable(identifier)
    if answers and len(answers) != len(row["turns"]):
        said = f"{len(answers)} reference answers to question {shown}, which has {len(row['turns'])} turns"
        raise UserError(f"{place}: {said}; give one a turn")
    if not answers and settings.reference_file:
        said = f"no answer to question {shown} of {row['category']} ({place})"
        raise UserError(f"{settings.reference_file}: {said}; add it, or leave the file out")
    return answers or None


def turns(settings):
    """The number of turns of the questions of a benchmark of local files, which are checked."""
    paths = local_files(settings)
    files = [(name, path, *data.size_and_time(path)) for name, path in paths.items()]
    return _turns(settings.kind, settings.file, settings.reference_file, *files)


@functools.cache
def _turns(kind, file, reference_file, *files):
    from salsa.workflow import config

    kept, read, dropped, _ = _questions(config.Benchmark(kind, file=file, reference_file=reference_file))
    if not kept:
        raise UserError(
            f"{file}: none of its {read} questions can be used ({_shown(dropped)}); see what each row needs"
        )
    return len(next(iter(kept.values()))["turns"])


def _shown(counts):
    return ", ".join(f"{name} {number}" for name, number in counts.items())


def _identifier(row, names, index):
    """A question's id, of the first of some keys that it has; its place in the file where it has none."""
    for name in names:
        if not messages.missing(row.get(name)):
            return _checked_identifier(name, row[name])
    return str(index)


def _checked_identifier(name, value):
    """An id as text: 81, "81" and the 81.0 that pandas writes are one."""
    form = "a text or a whole number"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise messages.wrong(name, value, form)
    try:
        return messages.text(name, str(value))
    except Dropped:
        raise messages.wrong(name, value, form) from None


def _texts(key, value):
    """A list of texts, none of them blank. Raises Dropped, or UserError where it is something else."""
    if messages.missing(value):
        raise Dropped("no_text")
    if not isinstance(value, list):
        raise messages.wrong(key, value, "a list of texts")
    texts = [messages.text(key, item, "a list of texts") for item in value]
    if not texts or any(map(blank, texts)):
        raise Dropped("empty")
    return texts


def _mt_bench_question(row, index):
    """The id and the row of FastChat's question.jsonl, or of HuggingFaceH4/mt_bench_prompts (prompt, prompt_id).

    The row may be the reason (text) why it is dropped.
    """
    value, category = _needed(row, REQUIRED_KEYS["mt_bench"])
    identifier = _identifier(row, ("question_id", "prompt_id"), index)
    reference = row.get("reference")
    if not isinstance(reference, list | None):
        raise messages.wrong("reference", reference, "a list of texts")
    try:
        made = {
            "id": f"mt_bench-{identifier}",
            "turns": _texts("turns", value),
            "category": messages.text("category", category),
            "reference": [_note(answer) for answer in reference or []],
        }
    except Dropped as reason:
        return identifier, str(reason)
    return identifier, made


def _note(answer):
    return "" if messages.missing(answer) else messages.text("reference", answer)


def _references(settings):
    """Question's id -> the place and the reference answers, one a turn; of MT-Bench's reference file."""
    if settings.kind != "mt_bench" or not settings.reference_file:
        return {}
    if is_hub_id(settings.reference_file):
        raise UserError(f"{settings.reference_file}: a reference_file is a local file; fetch it, or leave it out")
    answers = {}
    required = REQUIRED_KEYS["reference_file"]
    for place, (identifier, texts) in _located(rows.read(settings.reference_file, required), _reference_answers):
        if identifier in answers:
            said = f"question {rows.printable(identifier)} is answered in {answers[identifier][0]} too"
            raise UserError(f"{place}: {said}; remove one")
        answers[identifier] = (place, texts)
    return answers


def _reference_answers(row):
    """The question's id and the answers of a row of FastChat's reference_answer file."""
    identifier, choices = _needed(row, REQUIRED_KEYS["reference_file"])
    form = 'a list of {"turns": a list of texts}'
    identifier = _checked_identifier("question_id", identifier)
    if not (isinstance(choices, list) and choices and isinstance(choices[0], dict) and "turns" in choices[0]):
        raise messages.wrong("choices", choices, form)
    answers = choices[0]["turns"]
    if not (isinstance(answers, list) and answers and all(isinstance(answer, str) for answer in answers)):
        raise messages.wrong("choices", answers, form)
    try:
        return identifier, [messages.text("choices", answer) for answer in answers]
    except Dropped as reason:
        raise UserError(f"'choices' has an answer that can't be used ({reason}); mend it") from None


def _arena_hard_question(row, index):
    """The id and the row of question.jsonl (uid, cluster, prompt), or of lmarena-ai/arena-hard-auto-v0.1 (turns of
    {"content"}); the row may be the reason (text) why it is dropped.

    The category is the cluster, because `category` is the same in all rows.
    """
    value, cluster = _needed(row, REQUIRED_KEYS["arena_hard"])
    identifier = _identifier(row, ("uid", "question_id"), index)
    form = 'a text, or a list of {"content": a text}'
    if isinstance(value, list):
        if not all(isinstance(turn, dict) and "content" in turn for turn in value):
            raise messages.wrong("turns", value, form)
        value = [turn["content"] for turn in value]
    try:
        pieces = value if isinstance(value, list) else [value]
        prompt = "".join(messages.text("prompt", piece, form) for piece in pieces)
        if blank(prompt):
            raise Dropped("empty")
        category = messages.text("cluster", cluster)
    except Dropped as reason:
        return identifier, str(reason)
    return identifier, {"id": f"arena_hard-{identifier}", "turns": [prompt], "category": category, "reference": None}


_MAKE = {"mt_bench": _mt_bench_question, "arena_hard": _arena_hard_question}
_CONVERT = {  # a row's required keys -> what makes it canonical, and what makes two of them the same
    REQUIRED_KEYS["sft_file"]: (conversation, _first_prompt_key),
    REQUIRED_KEYS["preference_file"]: (preference, _row_prompt_key),
    REQUIRED_KEYS["evaluation_file"]: (evaluation_prompt, _row_prompt_key),
}
