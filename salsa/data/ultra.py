"""Ultra: real instructions. SFT conversations and given preferences, from hub datasets or local files of their form.

- `sft_file`: rows {"messages"}, as HuggingFaceH4/ultrachat_200k (splits train_sft, test_sft). Empty: demonstrations
  are the chosen answers of a share of the preference file that is used for nothing else.
- `preference_file`: rows {"prompt", "chosen", "rejected"}, the last two texts or conversations, as
  HuggingFaceH4/ultrafeedback_binarized (splits train_prefs, test_prefs). Split by a hash of the prompt.
- `evaluation_file`: more rows with a prompt, for the development evaluation. Empty: a share of the preference file.

Local files are JSONL, JSONL.gz or Parquet. `check_file` finds their faults by name and line before the datasets
library does it with a long traceback. What can't be learned from is dropped and counted, by reason: ties, identical
texts, empty texts, repeated prompts, prompts that another file already holds.
"""

import gzip
import json
import tempfile
import zlib
from contextlib import contextmanager
from pathlib import Path

from salsa.data import assistant, is_hub_id, normalised, ordered, required_keys, split_of, user
from salsa.runs import UserError

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
HUB_SPLITS = {  # setting -> the split to read, first that exists
    "sft_file": ("train_sft", "train"),
    "validation": ("test_sft",),
    "preference_file": ("train_prefs", "train"),
    "evaluation_file": ("test_prefs", "test", "train"),
    "file": ("test_prefs", "test", "train"),
}


def check_file(path, required):
    """Check a local file cheaply: that it can be read, has rows, and each row has the `required` keys.

    JSONL (also .gz) is read line by line, and known keys are checked for their form; of Parquet the columns are.
    Raises UserError that names the file, the line and what is wrong.
    """
    path = Path(path)
    if path.suffix == ".parquet":
        _check_parquet(path, required)
        return
    number, empty = 0, True
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    _check_line(path, number, line, required)
                    empty = False
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{number + 1}: not UTF-8 ({error.reason}); mend the file") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}:{number + 1}: can't be read ({error}); mend or fetch the file again") from None
    if empty:
        raise UserError(f"{path}:1: the file is empty; give one with rows of {', '.join(required)}")


def _open(path):
    opener = gzip.open if path.suffix == ".gz" else open
    return opener(path, "rt", encoding="utf-8")


def _check_line(path, number, line, required):
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{number}: not JSON ({error.msg}); mend or remove the line") from None
    if not isinstance(row, dict):
        raise UserError(f"{path}:{number}: not a JSON object but {type(row).__name__}; mend or remove the line")
    for key in required:
        if key not in row:
            raise UserError(f"{path}:{number}: no key {key!r}; each row needs {', '.join(required)}")
        if not _FORMS.get(key, _anything)(row[key]):
            raise UserError(f"{path}:{number}: {key!r} has the wrong form; it is {_FORM_NAMES[key]}")


def _check_parquet(path, required):
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.read_metadata(path)
    except (OSError, ValueError) as error:  # pyarrow's errors are of these two classes
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a Parquet file ({reason}); mend or fetch the file again") from None
    columns = metadata.schema.to_arrow_schema().names
    for key in required:
        if key not in columns:
            raise UserError(f"{path}: no column {key!r} but {', '.join(columns)}; it needs {', '.join(required)}")
    if metadata.num_rows == 0:
        raise UserError(f"{path}: the file has no rows")


def _anything(value):
    return True


def _is_messages(value):
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
        )
    )


def _is_text_or_messages(value):
    return isinstance(value, str) or _is_messages(value)


def _is_texts(value):
    return isinstance(value, list) and len(value) > 0 and all(isinstance(item, str) for item in value)


def _is_choices(value):
    return isinstance(value, list) and len(value) > 0 and isinstance(value[0], dict) and "turns" in value[0]


_FORMS = {
    "messages": _is_messages,
    "prompt": _is_text_or_messages,
    "chosen": _is_text_or_messages,
    "rejected": _is_text_or_messages,
    "turns": _is_texts,
    "choices": _is_choices,
}
_MESSAGES = 'a list of {"role", "content"}'
_FORM_NAMES = {
    "messages": _MESSAGES,
    "prompt": f"a text or {_MESSAGES}",
    "chosen": f"a text or {_MESSAGES}",
    "rejected": f"a text or {_MESSAGES}",
    "turns": "a list of texts",
    "choices": 'a list of {"turns"}',
}


@contextmanager
def opened(name, value, required):
    """The rows of a setting's hub dataset or local file, as a datasets.Dataset; a local file leaves no cache behind.

    Args:
        name: the setting, which says the hub's split, or `validation`.
        value: ORG/NAME or a path.
        required: the keys of a row.
    """
    if is_hub_id(value):
        dataset = _from_hub(value, HUB_SPLITS[name])
        missing = [key for key in required if key not in dataset.column_names]
        if missing:
            raise UserError(f"{value}: no column {missing[0]!r} but {', '.join(dataset.column_names)} ({name})")
        yield dataset
        return
    path = Path(value).expanduser()
    check_file(path, required)
    with tempfile.TemporaryDirectory() as cache:
        yield _from_file(path, cache)


def _from_file(path, cache):
    import datasets

    form = "parquet" if path.suffix == ".parquet" else "json"
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(form, data_files=str(path), split="train", cache_dir=cache)
    except Exception as error:  # the library's own classes differ from version to version
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise UserError(f"{path}: datasets can't read it ({reason}); give every row the same keys and types") from None


def _from_hub(identifier, splits):
    import datasets

    try:
        offered = datasets.get_dataset_split_names(identifier)
        split = next((name for name in splits if name in offered), None)
        if split is not None:
            return datasets.load_dataset(identifier, split=split)
    except Exception as error:  # offline, no such dataset, a licence to accept: many classes, one remedy
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{identifier}: not readable from the hub ({reason}); accept its licence there and run "
            "`huggingface-cli login`, or give a local JSONL or Parquet file"
        ) from None
    raise UserError(f"{identifier}: no split {' or '.join(splits)} but {', '.join(offered)}")


def _has_split(value, name):
    """Whether a hub dataset has the split of `name` (a local file has none)."""
    if not is_hub_id(value):
        return False
    import datasets

    try:
        return any(split in datasets.get_dataset_split_names(value) for split in HUB_SPLITS[name])
    except Exception:  # `opened` says what is wrong
        return False


def prompt_key(messages):
    """What makes two prompts the same."""
    return "\n".join(f"{m['role']}: {normalised(m['content'])}" for m in messages)


def _as_messages(prompt):
    return [user(prompt)] if isinstance(prompt, str) else [_message(m) for m in prompt]


def _message(message):
    return {"role": message["role"], "content": message["content"]}


def _answer(value):
    """The text of an answer, and the messages before it: of a text, or of a conversation that ends with the answer."""
    if isinstance(value, str):
        return value, []
    return value[-1]["content"] if value and value[-1]["role"] == "assistant" else "", value[:-1]


def preference(row):
    """A preference {"prompt", "chosen", "rejected"} in canonical form, or the reason (text) why it is dropped."""
    chosen, before = _answer(row["chosen"])
    rejected, before_rejected = _answer(row["rejected"])
    prompt = _as_messages(before or row["prompt"])
    if not prompt or not all(m["content"].strip() for m in prompt) or not chosen.strip() or not rejected.strip():
        return "empty"
    if list(map(_message, before)) != list(map(_message, before_rejected)):
        return "different_prompts"
    if prompt[-1]["role"] != "user":
        return "no_user_message"
    if chosen.strip() == rejected.strip():
        return "identical"
    scores = {**(row.get("metadata") or {}), **{k: row[k] for k in ("score_chosen", "score_rejected") if k in row}}
    if scores.get("score_chosen") is not None and scores.get("score_chosen") == scores.get("score_rejected"):
        return "tie"
    return {"prompt": prompt, "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}


def conversation(row):
    """A demonstration {"messages"} that ends with an answer, or the reason why it is dropped."""
    messages = [_message(m) for m in row["messages"]]
    if not all(m["content"].strip() for m in messages):
        return "empty"
    if len(messages) < 2 or messages[-1]["role"] != "assistant" or "user" not in {m["role"] for m in messages[:-1]}:
        return "no_answer"
    return {"messages": messages}


def evaluation_prompt(row):
    """A prompt {"prompt"}, or the reason why it is dropped."""
    messages = _as_messages(row["prompt"])
    if not messages or not all(m["content"].strip() for m in messages):
        return "empty"
    return {"prompt": messages} if messages[-1]["role"] == "user" else "no_user_message"


def _read(dataset, convert, key_of, known=frozenset()):
    """Canonical rows by the key of their prompt, and counts; repeated keys and those of `known` are dropped."""
    rows, dropped = {}, {}
    for row in dataset:
        converted = convert(row)
        if not isinstance(converted, str):
            key = key_of(converted)
            reason = "duplicate_prompt" if key in rows else "in_other_file" if key in known else None
        else:
            reason = converted
        if reason:
            dropped[reason] = dropped.get(reason, 0) + 1
        else:
            rows[key] = converted
    return rows, {"read": len(dataset), "kept": len(rows), "dropped": dropped}


def _read_setting(name, value, required, convert, key_of, known=frozenset()):
    with opened(name, value, required) as dataset:
        return _read(dataset, convert, key_of, known)


def _row_prompt_key(row):
    return prompt_key(row["prompt"])


def _first_prompt_key(row):
    """The key of a conversation: of the user's first message, whatever system message stands before it."""
    return prompt_key([next(m for m in row["messages"] if m["role"] == "user")])


def prepare(task):
    """The rows of every split, and counts for each file; for the stage of that name."""
    if not task.preference_file:
        raise UserError("data.task.preference_file is empty; give a hub dataset ORG/NAME or a local file")
    shares = SHARES if task.sft_file else SHARES_WITHOUT_SFT_FILE
    pairs, counts = _read_setting(
        "preference_file", task.preference_file, ("prompt", "chosen", "rejected"), preference, _row_prompt_key
    )
    files, known = {"preference_file": counts}, set(pairs)
    splits = {name: [] for name in shares}
    for key in ordered(pairs, task.seed, "ultra"):
        splits[split_of(key, shares, "ultra")].append(pairs[key])
    if task.evaluation_file:
        others, files["evaluation_file"] = _read_setting(
            "evaluation_file", task.evaluation_file, ("prompt",), evaluation_prompt, _row_prompt_key, known
        )
        splits["evaluation"] = [others[key] for key in ordered(others, task.seed, "ultra")]
        known |= set(others)
    if task.sft_file:
        splits.update(_demonstrations(task, known, files))
    else:
        for name in ("demonstrations", "validation"):
            splits[name] = [{"messages": row["prompt"] + row["chosen"]} for row in splits[name]]
    return _limited(task, splits), {"files": files}


def _demonstrations(task, known, files):
    """Demonstrations and validation from `sft_file`: its own test split, or a share by the first prompt's hash."""
    rows, files["sft_file"] = _read_setting(
        "sft_file", task.sft_file, ("messages",), conversation, _first_prompt_key, known
    )
    keys = ordered(rows, task.seed, "ultra")
    if not _has_split(task.sft_file, "validation"):
        split = {key: split_of(key, SFT_SHARES, "ultra") for key in keys}
        return {name: [rows[key] for key in keys if split[key] == name] for name in SFT_SHARES}
    tests, files["sft_file_validation"] = _read_setting(
        "validation", task.sft_file, ("messages",), conversation, _first_prompt_key, known | set(rows)
    )
    return {
        "demonstrations": [rows[key] for key in keys],
        "validation": [tests[key] for key in ordered(tests, task.seed, "ultra")],
    }


def _limited(task, splits):
    """At most as many rows a split as the task wants (0: all), and only what its file shall hold."""
    rows = {name: values[: getattr(task, name) or None] for name, values in splits.items()}
    for name in ("prompts", "evaluation"):
        rows[name] = [{"id": f"{name}-{i}", "prompt": row["prompt"]} for i, row in enumerate(rows[name])]
    return rows


def benchmark(settings, seed):
    """All rows of config.Benchmark, how many were read, and the dropped by reason; for the stage of that name."""
    if not settings.file:
        raise UserError(f"a {settings.kind} benchmark needs `file`: a hub dataset ORG/NAME or a local file")
    if settings.kind == "preference_file":
        rows, counts = _read_setting(
            "file", settings.file, ("prompt", "chosen", "rejected"), preference, _row_prompt_key
        )
        return _preference_benchmark(rows, counts, seed)
    with opened("file", settings.file, () if is_hub_id(settings.file) else required_keys(settings, "file")) as dataset:
        questions = list(dataset)
    references = _references(settings) if settings.kind == "mt_bench" else {}
    make = _mt_bench_row if settings.kind == "mt_bench" else _arena_hard_row
    rows = [make(question, i, references) for i, question in enumerate(questions)]
    kept = {row["id"]: row for row in rows if row["turns"] and all(turn.strip() for turn in row["turns"])}
    # in random order: the files are sorted by category, and a benchmark may take the first so many
    return (
        [kept[identifier] for identifier in ordered(kept, seed, "ultra")],
        len(rows),
        {"empty_or_repeated": len(rows) - len(kept)},
    )


def _preference_benchmark(rows, counts, seed):
    """Single-turn prompts of preferences; the chosen answer is the reference."""
    single = [rows[key] for key in ordered(rows, seed, "ultra") if len(rows[key]["prompt"]) == 1]
    dropped = {**counts["dropped"], "several_turns": len(rows) - len(single)}
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


def _mt_bench_row(question, index, references):
    """A row of FastChat's question.jsonl, or of HuggingFaceH4/mt_bench_prompts (prompt, prompt_id, reference).

    In the three categories that are judged by a reference, one of the reference file goes before the question's own.
    """
    identifier = question.get("question_id", question.get("prompt_id", index))
    reference = references.get(identifier) or list(question.get("reference") or [])
    return {
        "id": f"mt_bench-{identifier}",
        "turns": list(question.get("turns") or question.get("prompt") or []),
        "category": question["category"],
        "reference": (reference or None) if question["category"] in REFERENCE_CATEGORIES else None,
    }


def _references(settings):
    """Question's id -> the reference answer to each turn."""
    if not settings.reference_file:
        return {}
    path = Path(settings.reference_file).expanduser()
    is_hub_id(settings.reference_file)  # says so when the path does not exist
    check_file(path, required_keys(settings, "reference_file"))
    with _open(path) as file:
        rows = [json.loads(line) for line in file if line.strip()]
    return {row["question_id"]: row["choices"][0]["turns"] for row in rows}


def _arena_hard_row(question, index, references):
    """A row of question.jsonl (uid, cluster, prompt), or of lmarena-ai/arena-hard-auto-v0.1 (turns of {"content"}).

    The category is the cluster, because `category` is the same in all rows.
    """
    prompt = question.get("prompt") or "".join(turn["content"] for turn in question.get("turns") or [])
    identifier = question.get("uid") or question.get("question_id") or index
    return {"id": f"arena_hard-{identifier}", "turns": [prompt], "category": question["cluster"], "reference": None}
