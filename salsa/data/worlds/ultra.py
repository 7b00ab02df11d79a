"""Ultra: real instructions. SFT conversations and given preferences, from hub datasets or local files of their form.

- `sft_file`: rows {"messages"}, as in HuggingFaceH4/ultrachat_200k (splits train_sft, test_sft). Empty: demonstrations
  are the chosen answers of a share of the preference file that is used for nothing else.
- `preference_file`: rows {"prompt", "chosen", "rejected"}, the last two texts or conversations, as in
  HuggingFaceH4/ultrafeedback_binarized (splits train_prefs, test_prefs). A hash of the user's first message splits it.
- `evaluation_file`: more rows with a prompt, for the development evaluation. Empty: a share of the preference file.

`rows` reads local files, the datasets library reads hub datasets (ORG/NAME, or ORG/NAME@REVISION). The rows of both go
through the functions below, while planning (`check`) and in the stages. Rows that can't be learned from are dropped and
counted, by reason: ties, identical texts, empty texts, tool calls, repeated prompts, prompts that another file or
another split holds already.
"""

import functools
import json
from collections import Counter
from collections.abc import Callable
from typing import Annotated, NamedTuple

from salsa import data
from salsa.data import World, messages, rows, sources
from salsa.data.messages import Dropped, assistant, blank, user
from salsa.data.sources import Form, is_hub_id
from salsa.data.splits import normalised, ordered, split_of
from salsa.workflow import schema
from salsa.workflow.messages import UserError

CONVERSATION = Form(("messages",))
PREFERENCE = Form(("prompt", "chosen", "rejected"), ("metadata", "score_chosen", "score_rejected"))
PROMPT = Form(("prompt",))
SHARES = {"preferences": 0.6, "prompts": 0.35, "evaluation": 0.05}  # of the preference file, with an sft_file
SHARES_WITHOUT_SFT_FILE = {
    "demonstrations": 0.3,
    "validation": 0.05,
    "preferences": 0.35,
    "prompts": 0.25,
    "evaluation": 0.05,
}
SFT_SHARES = {"demonstrations": 0.95, "validation": 0.05}  # of an sft_file without a test split
VALIDATION = ("test_sft",)  # the split of a hub's sft_file that SFT is validated on


def prompt_key(conversation):
    """The text that is equal for two prompts that count as the same."""
    return "\n".join(f"{m['role']}: {normalised(m['content'])}" for m in conversation)


def _user_turns(row):
    """All of the user's messages in a canonical row, normalised so that they can be compared."""
    return [normalised(m["content"]) for m in row.get("messages") or row["prompt"] if m["role"] == "user"]


def _prompt(value, left_out=None):
    """The messages of a prompt that is a text or messages."""
    prompt = messages.text_or_messages("prompt", value, left_out)
    return [user(prompt)] if isinstance(prompt, str) else prompt


def _answer(key, value, left_out):
    """The text of an answer and the messages before it, from a text or a conversation that ends with the answer."""
    value = messages.text_or_messages(key, value, left_out)
    if isinstance(value, str):
        return value, []
    return value[-1]["content"] if value and value[-1]["role"] == "assistant" else "", value[:-1]


def _refused_prompt(prompt):
    """The reason why a prompt is dropped, or None."""
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
    given, chosen, rejected = PREFERENCE.values(row)
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
    """The metadata of a preference, an object or its JSON text; {} for anything else."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return {}
    return value if isinstance(value, dict) else {}


def conversation(row, left_out=None):
    """A demonstration {"messages"} that ends with an answer, or the reason why it is dropped; see `preference`."""
    (given,) = CONVERSATION.values(row)
    try:
        turns = messages.messages("messages", given, left_out)
    except Dropped as reason:
        return str(reason)
    if not turns or any(blank(m["content"]) for m in turns):
        return "empty"
    if len(turns) < 2 or turns[-1]["role"] != "assistant" or "user" not in {m["role"] for m in turns[:-1]}:
        return "no_answer"
    return {"messages": turns}


def evaluation_prompt(row, left_out=None):
    """A prompt {"prompt"}, or the reason why it is dropped; see `preference`."""
    (given,) = PROMPT.values(row)
    try:
        prompt = _prompt(given, left_out)
    except Dropped as reason:
        return str(reason)
    return _refused_prompt(prompt) or {"prompt": prompt}


def _prompt_of_row(row):
    return prompt_key(row["prompt"])


def _first_prompt(row):
    """The key of a conversation, which is that of the user's first message, without any system message."""
    return prompt_key([next(m for m in row.get("messages") or row["prompt"] if m["role"] == "user")])


class File(NamedTuple):
    """The content of a setting's file.

    Attributes:
        form: the `Form` of its rows.
        convert: (row, Counter of left out parts) -> canonical row, or the reason (text) why it is dropped.
        key: canonical row -> a key, which is equal for rows that count as the same.
        splits: names of splits; the first that a hub dataset has is read.
    """

    form: Form
    convert: Callable
    key: Callable
    splits: tuple


FILES = {  # of `Settings`
    "preference_file": File(PREFERENCE, preference, _prompt_of_row, ("train_prefs", "train")),
    "evaluation_file": File(PROMPT, evaluation_prompt, _prompt_of_row, ("test_prefs", "test", "train")),
    "sft_file": File(CONVERSATION, conversation, _first_prompt, ("train_sft", "train")),
}
local_files = sources.local_files(*FILES)


@schema.dataclass()
class Settings:
    """Where the rows come from."""

    sft_file: Annotated[schema.Path, schema.ALWAYS] = ""
    """Conversations: ORG/NAME, ORG/NAME@REVISION, or a local file (docs/extending.md)."""
    preference_file: Annotated[schema.Path, schema.ALWAYS] = ""
    """Preference pairs, in the same forms."""
    evaluation_file: Annotated[schema.Path, schema.ALWAYS] = ""
    """Development prompts, in the same forms; nothing: a share of the pairs' prompts."""


def read(source, file, others=frozenset(), keep=lambda row: row):
    """Canonical rows by the key of their prompt, and counts; repeated prompts and those of other files are dropped.

    Args:
        source: (place, row) of each row of a `File`.
        others: normalised messages of the user in other files.
        keep: canonical row -> the part of it to keep.
    """
    kept, dropped, left_out, number = {}, Counter(), Counter(), 0
    for _, row in sources.located(source, file.convert, left_out):
        number += 1
        if isinstance(row, str):
            dropped[row] += 1
            continue
        key = file.key(row)
        if key in kept:
            dropped["duplicate_prompt"] += 1
        elif not others.isdisjoint(_user_turns(row)):
            dropped["in_other_file"] += 1
        else:
            kept[key] = keep(row)
    counts = {"read": number, "kept": len(kept), "dropped": dict(dropped)}
    return kept, counts | ({"left_out": dict(left_out)} if left_out else {})


def _without_answers(row):
    """The part of a canonical row that planning keeps, which decides its split."""
    return {"prompt": [m for m in row.get("messages") or row["prompt"] if m["role"] == "user"]}


def prepare(task, folder=None):
    """The rows of every split, and counts for each file; there is no gold to write."""
    by_split, files = _splits(task)
    if not task.sft_file:
        for name in ("demonstrations", "validation"):
            by_split[name] = [{"messages": row["prompt"] + row["chosen"]} for row in by_split[name]]
    by_split = {name: values[: getattr(task, name) or None] for name, values in by_split.items()}
    for name in ("prompts", "evaluation"):
        by_split[name] = [{"id": f"{name}-{i}", "prompt": row["prompt"]} for i, row in enumerate(by_split[name])]
    return by_split, {"files": files}


def _splits(task, keep=lambda row: row):
    """All rows of every split, in the seed's order, and counts for each file.

    Args:
        task: config.Task.
        keep: canonical row -> the part of it to keep.
    """
    _check_given(task)
    files, others = {}, set()

    def rows_of(setting, file=None, name=None):
        """The rows of a file by key, without those with a message of the user that an earlier file holds."""
        file = file or FILES[setting]
        with sources.opened(getattr(task, setting), file.form, file.splits, setting) as source:
            kept, counts = read(source, file, others, keep)
        files[name or setting] = counts | source.facts
        return kept

    def in_order(kept):
        return [kept[key] for key in ordered(kept, task.seed, "ultra")]

    pairs = rows_of("preference_file")
    others |= {turn for row in pairs.values() for turn in _user_turns(row)}
    shares = SHARES if task.sft_file else SHARES_WITHOUT_SFT_FILE
    by_split = _divided(pairs, shares, task.seed, files["preference_file"])
    if task.evaluation_file:
        prompts = rows_of("evaluation_file")
        by_split["evaluation"] = in_order(prompts)
        others |= {turn for row in prompts.values() for turn in _user_turns(row)}
    if task.sft_file:
        conversations = rows_of("sft_file")
        # Only a hub dataset has a split to validate on.
        if is_hub_id(task.sft_file) and not set(VALIDATION).isdisjoint(sources.offered_splits(task.sft_file)):
            others |= {_user_turns(row)[0] for row in conversations.values()}
            tests = rows_of("sft_file", FILES["sft_file"]._replace(splits=VALIDATION), "sft_file_validation")
            by_split |= {"demonstrations": in_order(conversations), "validation": in_order(tests)}
        else:
            split = {key: split_of(key, SFT_SHARES, "ultra") for key in conversations}
            for name in SFT_SHARES:
                by_split[name] = in_order({key: row for key, row in conversations.items() if split[key] == name})
    return by_split, files


def _divided(pairs, shares, seed, counts):
    """Split name -> rows of the preference file, in the seed's order.

    The user's first message decides the split of a row, so that equal questions stay together whatever system message
    precedes them, and so do the prompts of one tree of conversations. A row with a later message that is the first one
    of a row of another split is dropped, and counted in `counts`. Two later messages may be equal: "go on" is no
    question.
    """
    split = {key: split_of(_first_prompt(row), shares, "ultra") for key, row in pairs.items()}
    firsts = {_user_turns(row)[0]: split[key] for key, row in pairs.items()}
    divided = {name: [] for name in shares}
    for key in ordered(pairs, seed, "ultra"):
        if any(firsts.get(turn, split[key]) != split[key] for turn in _user_turns(pairs[key])[1:]):
            counts["dropped"]["in_other_split"] = counts["dropped"].get("in_other_split", 0) + 1
            counts["kept"] -= 1
        else:
            divided[split[key]].append(pairs[key])
    return divided


def _check_given(task):
    if not task.preference_file:
        raise UserError("data.task.preference_file is empty; give a hub dataset ORG/NAME or a local file")


def check(task):
    """UserError of one line for a fault in the local files of a config.Task, which are read as prepare reads them.

    Each file is read once as long as it keeps its size and time.
    """
    _check_given(task)
    paths, numbers = local_files(task), sizes(task)
    if numbers is None:  # some of the rows are the hub's
        for name, path in paths.items():
            check_file(path, FILES[name])
        return
    for split, number in numbers.items():
        if not number:
            raise UserError(f"{paths['preference_file']}: no rows for {split} ({shown(numbers)}); give more rows")


def sizes(task):
    """Split name -> number of its rows, for a config.Task whose files are all local; None for any other."""
    paths = local_files(task)
    if len(paths) < sum(bool(getattr(task, name)) for name in FILES):
        return None
    return _sizes(tuple((name, path, *sources.size_and_time(path)) for name, path in paths.items()))


@functools.cache
def _sizes(files):
    made, _ = _splits(data.task_settings()(kind="ultra", **{name: path for name, path, *_ in files}), _without_answers)
    return {name: len(values) for name, values in made.items()}


@sources.once
def check_file(path, file):
    """Read a local file, whose content is a `File`, as a stage would; returns its counts.

    Raises UserError where the file can't be read, and where no row is kept.
    """
    _, counts = read(rows.read(path, file.form.keys), file, keep=bool)
    if not counts["kept"]:
        dropped = shown(counts["dropped"])
        raise UserError(f"{path}: none of its {counts['read']} rows can be used ({dropped}); see what each row needs")
    return counts


def shown(counts):
    return ", ".join(f"{name} {number}" for name, number in counts.items())


WORLD = World(
    kind="ultra",
    words="instructions with given preferences",
    preferences="given",
    prepare=prepare,
    settings=Settings,
    local_files=local_files,
    check=check,
    sizes=sizes,
)
