"""A reward model as the judge: one that was trained on other preferences than PPO's, and with another seed."""

from salsa.judges import FLAWS, Judge
from salsa.judges.common.scoring import ScoringJudge, ScoringSettings


def rewards(rows, scorer, execution):
    """The rewards of rows of responses.jsonl, as means over their turns, in standard deviations of the scorer on sft0.

    The scorer reads each turn in its conversation, with its own tokenizer; a response that was cut has no end token. A
    turn that several rows share is scored once.
    """
    from salsa.data import chat
    from salsa.data.messages import assistant, user
    from salsa.rl import forward, models

    turns = list(dict.fromkeys(turn for row in rows for turn in _turns(row)))
    if not turns:
        return []
    device = models.prepare_process(execution)
    model, tokenizer = models.load_score_model(scorer, device), models.load_tokenizer(scorer / "model")
    ends = chat.folder_end_ids(scorer / "model", tokenizer)
    end, encoded = chat.ending(tokenizer, ends), []
    for messages, finish_reason in turns:
        roles = (user, assistant)
        conversation = [roles[place % 2](text) for place, text in enumerate(messages)]
        encoded.append(chat.encode_answer(tokenizer, conversation, end, ends, finish_reason != "length"))
    prompts, answers = zip(*encoded, strict=True)
    batch = forward.from_lists(prompts, answers, [], tokenizer.pad_token_id, device)
    scores = dict(zip(turns, model.scores(batch, execution.micro_batch).tolist(), strict=True))
    return [sum(scores[turn] for turn in _turns(row)) / len(row["responses"]) for row in rows]


def _turns(row):
    """For each turn: the texts of the conversation up to and with its response, and how the response ended."""
    texts = [text for pair in zip(row["prompt"], row["responses"], strict=True) for text in pair]
    return [(tuple(texts[: 2 * i + 2]), reason) for i, reason in enumerate(row["finish_reasons"])]


def _open(settings, parents, output, execution, comparisons):
    return ScoringJudge(lambda rows: rewards(rows, parents["scorer"], execution), settings.judge.tie_margin)


def _sees(world):
    """All flaws, where it was trained on answers to people's requests."""
    if world.preferences == "given":
        return FLAWS
    return f"its reward model is trained on {world.words}, and the pairs are answers to people's requests"


JUDGE = Judge(
    kind="reward_model",
    open=_open,
    settings=ScoringSettings,
    rank=2,
    scores_alone=True,
    scorer=True,
    loads_model=True,
    sees=_sees,
)
