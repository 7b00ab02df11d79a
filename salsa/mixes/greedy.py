"""The greedy soup (2203.05482, recipe 1): models join a uniform average while it does not get worse on held-out data.

Candidates are sorted by their own measure, the best first. Each in turn is averaged with those taken before, and is
taken itself where the average is at least as good as without it. So the soup is never worse than the best candidate,
on the data that it was chosen on.
"""

import math
from typing import Literal

from salsa import mixes
from salsa.workflow import schema
from salsa.workflow.messages import UserError

HIGHER_IS_BETTER = {"validation_loss": False, "gold": True}


@schema.dataclass()
class Settings:
    """The greedy soup's own settings."""

    measure: Literal[*HIGHER_IS_BETTER] = "validation_loss"
    """validation_loss: nats per token of held-out demonstrations | gold: mean gold of sampled responses to the
    evaluation prompts.
    """


def make(mix, folders, output, held_out):
    """Write the soup of the candidates that were taken; search.json says how they were found."""
    candidates = {role: folders[role] for role in mixes.weights_of(mix)}
    higher, measured = HIGHER_IS_BETTER[mix.measure], f"{mix.measure.replace('_', ' ')} on the study's held-out data"
    steps = write(candidates, output, lambda: held_out(mix.measure), higher, measured)
    taken = taken_in(steps)
    summary = {"mix": words(mix), "taken": [step["candidate"] for step in taken]}
    summary |= {mix.measure: taken[-1]["value"], f"{mix.measure}_of_best": steps[0]["alone"]}
    return summary, {"search.json": {"measure": mix.measure, "steps": steps}}


def write(candidates, output, measure, higher_is_better=False, measured="the loss on held-out data"):
    """Write the greedy soup of model folders; returns the steps of its search, as `search` does.

    Args:
        candidates: name -> model folder.
        measure: a function without arguments, which is called when the models are known to fit together. It returns a
            function: name -> weight of some candidates -> the measure of their average; see `search`.
        measured: what that is, for the card.
    """
    from salsa import mix_card, soup

    folders = list(candidates.values())
    soup.prepare(folders, [output])
    value = measure()
    steps = search(list(candidates), lambda names: value(uniform(names)), higher_is_better)
    weights = uniform([step["candidate"] for step in taken_in(steps)])
    shares = [weights.get(name, "0") for name in candidates]
    names = None if list(candidates) == list(map(str, folders)) else list(candidates)
    title = f"The greedy soup of {len(folders)} models"
    card = mix_card.Card(folders, title, f"{mix_card.LINEAR} {method_words(measured)}", names)
    soup.soup(folders, shares, output, lambda number, folder: card.write(folder, shares, search_table(steps)))
    return steps


def method_words(measured):
    """How a greedy soup is found, for its card."""
    return (
        f"Which models take part was found by {measured}: the best comes first, and each of the others joins the "
        "uniform average where that does not get worse (greedy soup, arXiv:2203.05482, recipe 1)."
    )


def search_table(steps):
    """The steps of a search as Markdown."""
    from salsa import mix_card

    rows = [
        [step["candidate"], *(_number(step[key]) for key in ("alone", "value")), ["no", "yes"][step["accepted"]]]
        for step in steps
    ]
    rows = [[mix_card.code(row[0]), *row[1:]] for row in rows]
    return mix_card.table(["tried", "its own measure", "with those taken before", "taken"], rows)


def _number(value):
    return "not finite" if value is None else f"{value:.6g}"


def search(candidates, value, higher_is_better):
    """The steps of the search, in order: candidate, its own measure `alone`, `value` with those taken, `accepted`.

    Args:
        candidates: names. Of two that are equally good, the one that stands first is tried first.
        value: names, in the candidates' order -> the measure of their uniform average, None where it is not finite,
            which is worse than any number.

    Raises UserError where no candidate can be measured.
    """

    def goodness(measured):
        if measured is None:
            return -math.inf
        return measured if higher_is_better else -measured

    alone = {name: value([name]) for name in candidates}
    taken, best, steps = set(), -math.inf, []
    for name in sorted(candidates, key=lambda name: goodness(alone[name]), reverse=True):
        together = value([other for other in candidates if other in taken | {name}]) if taken else alone[name]
        accepted = together is not None and goodness(together) >= best
        if accepted:
            taken, best = taken | {name}, goodness(together)
        steps.append({"candidate": name, "alone": alone[name], "value": together, "accepted": accepted})
    if not taken:
        raise UserError("no candidate of the greedy soup has a finite measure; give models that can be measured")
    return steps


def taken_in(steps):
    """The steps of a search whose candidates were taken; the value of the last is that of the soup."""
    return [step for step in steps if step["accepted"]]


def uniform(names):
    """Name -> weight, as text, in the average of those named."""
    return dict.fromkeys(names, f"1/{len(names)}")


def words(mix):
    """The mix in words."""
    return f"greedy soup of {', '.join(mixes.weights_of(mix))}, by {mix.measure.replace('_', ' ')}"


def check(mix):
    """Refuse weights that differ, which the search would not heed."""
    weights = mixes.weights_of(mix)
    if len(set(weights.values())) > 1:
        raise mixes.wrong_weights("a greedy soup finds the weights itself; give each candidate the same")
    if len(weights) < 2:
        raise mixes.wrong_weights("one model is no mix; give weights to two or more")


MIX = mixes.Mix(
    kind="greedy",
    make=make,
    words=words,
    settings=Settings,
    searches=True,
    needs_gold=lambda mix: mix.measure == "gold",
    writes=("search.json",),
    check=check,
)
