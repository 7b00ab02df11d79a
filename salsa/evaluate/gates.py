"""The gates of a study: conditions without which a comparison of references says nothing. Decided and worded here.

Some are known before PPO, of the line between two SFT models (the stage gates, after `landscape`); others are read of
trained policies (the report). A gate that fails is a warning, and stops nothing.

**Manipulation strength** is kl_coef · KL(sft0 ‖ reference): what a policy that is still sft0 pays for having another
reference than sft0. Rewards have a standard deviation of 1 on sft0's samples, so that is its unit.

This module imports no torch.
"""

import csv
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from salsa.evaluate import flat
from salsa.workflow import runs, stages

VERSION = 1
INSIDE, LOWEST, LARGEST, ONLY = (
    "inside its grid",
    "the lowest of its grid",
    "the largest of its grid",
    "the only one run",
)
DEVIATIONS = "standard deviations of reward"
SETTLED = 0.9  # share of replicates in which an arm's reward may not be clearly drifting
LARGEST_NOISE = 1 / 3  # of the deviation between replicates, that evaluation alone may make
FEW = 4  # arms that a sentence names one by one


@dataclass(frozen=True)
class Gate:
    """A condition on a number that is measured of every replicate, or of every arm.

    Attributes:
        quantity: what is measured.
        wanted: what it has to be, in words.
        holds: the number -> whether it is.
        otherwise: what follows where it is not.
        unit: of the number; "" for a share.
        of: what has a number each.
        after_ppo: whether it is measured of trained policies.
    """

    quantity: str
    wanted: str
    holds: Callable
    otherwise: str
    unit: str = ""
    of: str = "replicates"
    after_ppo: bool = False

    def warning(self, number):
        """That a number is not what is wanted, in a line."""
        unit = f" {self.unit}" if self.unit else ""
        return f"{self.quantity} is {text(number)}{unit}, not {self.wanted}: {self.otherwise}"


def reward_model_name(models):
    """What the reward model of a study is called: one, or the average of several."""
    return "reward model" if models == 1 else f"reward model (average of {models})"


def gates(limits, reward_model="reward model", plain="ppo"):
    """Name of a number -> its Gate, in the order in which they are read.

    Args:
        limits: config.Gates.
        plain: the name of the arm whose reference is sft0.
    """
    agrees = f"in which the {reward_model} agrees with gold"
    return _known_before(limits, agrees) | _known_after(limits, agrees, plain)


def _known_before(limits, agrees):
    return {
        "kl_sft0_soup": Gate(
            "KL(sft0 ‖ soup)",
            f"at least {limits.smallest_kl:g}",
            lambda kl: kl >= limits.smallest_kl,
            "the soup is almost sft0, so SALSA is almost PPO",
            "nats per response",
        ),
        "gold_agreement": Gate(
            f"the share of held-out pairs {agrees}",
            f"{limits.lowest_agreement:g} to {limits.highest_agreement:g}",
            lambda share: limits.lowest_agreement <= share <= limits.highest_agreement,
            "under it differences between arms are noise in gold, above it there is nothing to over-optimise",
        ),
        "barrier": Gate(
            "the rise of the loss between the SFT models above their ends' line",
            f"at most {limits.largest_barrier:g}",
            lambda barrier: barrier <= limits.largest_barrier,
            "they do not share a basin",
            "nats per token",
        ),
        "largest_manipulation": Gate(
            "the largest kl_coef · KL(sft0 ‖ soup)",
            f"at least {limits.smallest_manipulation:g}",
            lambda strength: strength >= limits.smallest_manipulation,
            "whether the reference is sft0 or the soup can hardly matter; raise kl_coefs, or train SFT models that lie "
            "further apart",
            DEVIATIONS,
        ),
        "claim_manipulation": Gate(
            "kl_coef · KL(sft0 ‖ soup) at the claims' kl_coef",
            f"at least {limits.smallest_manipulation:g}",
            lambda strength: strength >= limits.smallest_manipulation,
            "whether the reference is sft0 or the soup can hardly matter there; raise claim_kl_coef, or train SFT "
            "models that lie further apart",
            DEVIATIONS,
        ),
    }


def _known_after(limits, agrees, plain):
    return {
        "manipulation": Gate(
            "kl_coef · KL(sft0 ‖ reference) at the kl_coef of the claims",
            f"at least {limits.smallest_manipulation:g}",
            lambda strength: strength >= limits.smallest_manipulation,
            "that an arm has another reference can hardly matter; raise kl_coefs",
            DEVIATIONS,
            of="arms",
            after_ppo=True,
        ),
        "settled": Gate(
            "the share of replicates in which reward is not clearly drifting over the last part of training",
            f"at least {SETTLED:g}",
            lambda share: share >= SETTLED,
            "training stopped before it settled; raise the number of iterations",
            of="arms",
            after_ppo=True,
        ),
        "reward_slope": Gate(
            "the change of reward over the last part of training (the end of its interval that is further from 0)",
            f"at most {limits.largest_drift:g} up or down",
            lambda change: change <= limits.largest_drift,
            "that training has settled is not shown; raise the number of iterations, or of replicates",
            DEVIATIONS,
            of="arms",
            after_ppo=True,
        ),
        "place_in_grid": Gate(
            "the kl_coef of the claims",
            INSIDE,
            lambda place: place == INSIDE,
            "a better one may lie beyond the grid; give kl_coefs on both sides",
            of="arms",
            after_ppo=True,
        ),
        "policy_gold_agreement": Gate(
            f"the share of pairs of two final policies' responses {agrees}",
            f"at least {limits.lowest_agreement:g}",
            lambda share: share >= limits.lowest_agreement,
            "what the policies were paid for says little of gold",
            after_ppo=True,
        ),
        "gold_ppo_minus_sft0_in_errors": Gate(
            f"gold reward of {plain} minus sft0's",
            "above 2",
            lambda errors: errors > 2,
            "training gained nothing in gold that an anchor could keep",
            "standard errors over prompts",
            after_ppo=True,
        ),
        "evaluation_noise": Gate(
            "the deviation that prompts, sampling and rollouts alone make, as a share of that between replicates",
            f"at most {LARGEST_NOISE:.2g}",
            lambda share: share <= LARGEST_NOISE,
            "replicates differ by how they are evaluated; give more prompts (benchmarks.*.prompts) or responses "
            "(evaluate.samples)",
            of="claims",
            after_ppo=True,
        ),
    }


def text(number):
    """A number as gates show it: three significant digits; a text as it is."""
    return number if isinstance(number, str) else f"{number:.3g}"


# Before PPO: the stage.


def check(settings, parents, output, execution):
    """Write gates.json: the numbers known before PPO, and `warnings`, a line for each gate that fails.

    Parents: `landscape`, `reward_model`, which other limits or kl_coefs of a study leave as they are.
    """
    line = _points(parents["landscape"] / "line.csv")
    responses = runs.read_jsonl(parents["landscape"] / "responses.jsonl")
    reward_model = runs.read_json(parents["reward_model"] / "evaluation.json")
    numbers = before_ppo(line, reward_model, responses, settings.largest_kl_coef, settings.claim_kl_coef)
    numbers["warnings"] = warnings(numbers, settings.gates, reward_model_name(len(reward_model.get("members", [None]))))
    runs.write_json(output / "gates.json", numbers)
    print(describe(numbers, output.name, settings.gates), flush=True)
    return numbers


def _points(path):
    """The rows of line.csv; None where a measure wasn't taken."""
    with open(path, encoding="utf-8", newline="") as file:
        return [{name: float(text) if text else None for name, text in row.items()} for row in csv.DictReader(file)]


def before_ppo(line, reward_model, responses, largest_kl_coef, claim_kl_coef=None):
    """The numbers of a replicate that are known before PPO, for gates.json; None where one was not measured.

    Args:
        line: points of the line between the SFT models: `alpha`, `loss`, `loss_interpolated`, `kl_from_sft0` and
            `gold_reward`; alphas 0, ½ and 1 are among them.
        reward_model: evaluation.json of the reward model.
        responses: rows of the responses of sft0 and the soup to the benchmarks.
        largest_kl_coef: of the study's penalties that are in standard deviations of reward, or None.
        claim_kl_coef: of those, the one of the claims, or None. The largest then says nothing of the claims.
    """
    at = {point["alpha"]: point for point in line}
    kl = at[0.5]["kl_from_sft0"]
    numbers = {
        "held_out_accuracy": reward_model["held_out_accuracy"],
        "gold_agreement": reward_model["gold_agreement"],
        "kl_sft0_soup": kl,
        "barrier": max(point["loss"] - point["loss_interpolated"] for point in line),
        "gold": {"sft0": at[0.0]["gold_reward"], "sft1": at[1.0]["gold_reward"], "soup": at[0.5]["gold_reward"]},
        "largest_kl_coef": largest_kl_coef,
        "largest_manipulation": None if largest_kl_coef is None or claim_kl_coef is not None else largest_kl_coef * kl,
        "claim_kl_coef": claim_kl_coef,
        "claim_manipulation": None if claim_kl_coef is None else claim_kl_coef * kl,
    }
    for measure in ("reward", "gold"):
        mean, error = advantage(responses, measure)
        numbers |= {f"soup_minus_sft0_{measure}": mean, f"soup_minus_sft0_{measure}_se": error}
    return numbers


def advantage(responses, measure, model="soup"):
    """(mean, standard error) of a model's `reward` or `gold` minus sft0's, over the benchmarks, paired by prompt.

    A prompt's difference is that of the means of its responses, a benchmark's the mean over its prompts, and the result
    the mean over benchmarks, whose prompts are independent. (None, None) without such a benchmark, and None for the
    error where one has a single prompt.
    """
    by_prompt = defaultdict(lambda: defaultdict(list))  # (benchmark, prompt) -> model -> values
    for row in responses:
        if row.get("compared", True):
            by_prompt[row["benchmark"], row["prompt_id"]][row["model"]].append(row[measure])
    differences = defaultdict(list)
    for (benchmark, _), values in by_prompt.items():
        if values[model] and values["sft0"] and None not in values[model] + values["sft0"]:
            differences[benchmark].append(_mean(values[model]) - _mean(values["sft0"]))
    if not differences:
        return None, None
    means = [_mean(values) for values in differences.values()]
    if min(map(len, differences.values())) < 2:
        return _mean(means), None
    squares = sum(np.var(values, ddof=1) / len(values) for values in differences.values())
    return _mean(means), float(math.sqrt(squares) / len(means))


def _mean(values):
    return math.fsum(values) / len(values)


def warnings(numbers, limits, reward_model="reward model"):
    """A line for each gate that fails, of those whose numbers are known."""
    return [
        gate.warning(numbers[name])
        for name, gate in gates(limits, reward_model).items()
        if numbers.get(name) is not None and not gate.holds(numbers[name])
    ]


def describe(numbers, name, limits):
    """A replicate's gates as lines for the terminal, where the user sees them before PPO begins."""
    agreement = "none" if numbers["gold_agreement"] is None else f"{numbers['gold_agreement']:.1%}"
    lines = [
        f"gates of {name}: reward model against gold {agreement}, KL(sft0 ‖ soup) {numbers['kl_sft0_soup']:.3f} nats, "
        f"barrier {numbers['barrier']:.4f} nats per token"
    ]
    for which, words in (("claim", "is"), ("largest", "is at most")):
        if (strength := numbers[f"{which}_manipulation"]) is not None:
            lines.append(
                f"  kl_coef · KL(sft0 ‖ soup) {words} {text(strength)} {DEVIATIONS} "
                f"(kl_coef {numbers[f'{which}_kl_coef']:g}){_wanted(numbers['kl_sft0_soup'], limits)}"
            )
    if numbers["soup_minus_sft0_reward"] is not None:
        reward, gold = (_with_error(numbers, f"soup_minus_sft0_{measure}") for measure in ("reward", "gold"))
        lines.append(f"  the soup itself, minus sft0, on the benchmarks: proxy reward {reward}, gold {gold}")
    return "\n".join([*lines, *(f"  failed: {warning}" for warning in numbers["warnings"])])


def _wanted(kl, limits):
    smallest = limits.smallest_manipulation
    return f"; claims need {text(smallest)}, so a kl_coef of {text(smallest / kl)} or more" if kl > 0 else ""


def _with_error(numbers, name):
    mean, error = numbers[name], numbers[f"{name}_se"]
    if mean is None:
        return "none"
    return f"{mean:+.3f}" + ("" if error is None else f" (standard error {error:.3f})")


# After PPO: what the report knows.


@dataclass(frozen=True)
class Measured:
    """A Gate with the numbers of a study: label of a replicate or an arm -> number."""

    gate: Gate
    numbers: dict

    @property
    def failing(self):
        """The labels where it does not hold."""
        return [label for label, number in self.numbers.items() if not self.gate.holds(number)]

    @property
    def holds(self):
        return not self.failing

    @property
    def held(self):
        """In how many of them it holds, in words."""
        return f"{len(self.numbers) - len(self.failing)} of {len(self.numbers)} {self.gate.of}"

    @property
    def words(self):
        """The numbers, with their labels where they are few."""
        unit = f" {self.gate.unit}" if self.gate.unit else ""
        return each(self.numbers) + unit


def place_in_grid(kl_coef, grid):
    """Where a kl_coef lies among those that an arm was run at."""
    if len(grid) == 1:
        return ONLY
    return LOWEST if kl_coef == min(grid) else LARGEST if kl_coef == max(grid) else INSIDE


def each(numbers):
    """Numbers by label in words: "0.18 (salsa), 0.35 (other)", or how far they range where they are many."""
    if len(numbers) <= FEW or any(isinstance(number, str) for number in numbers.values()):
        by_text = defaultdict(list)
        for label, number in numbers.items():
            by_text[text(number)].append(label)
        return ", ".join(f"{number} ({', '.join(labels)})" for number, labels in by_text.items())
    return f"{text(min(numbers.values()))} to {text(max(numbers.values()))}"


def sentence(strengths, shares, flatness, places, limits):
    """What a reader has to know of the manipulation before any verdict; "" where no policy was paid a reward.

    Args:
        strengths: arm with another reference than sft0 -> kl_coef · KL(sft0 ‖ reference) at its chosen kl_coef.
        shares: arm -> what the penalty takes of the reward gained, at its chosen kl_coef.
        flatness: `flat.flatness` of reward -> number of runs of which it was measured.
        places: arm -> `place_in_grid` of its chosen kl_coef.
        limits: config.Gates.
    """
    parts = []
    if strengths:
        parts.append(f"kl_coef · KL(sft0 ‖ reference) = {each(strengths)} {DEVIATIONS}")
        if min(strengths.values()) < limits.smallest_manipulation:
            parts[0] += f", and under {limits.smallest_manipulation:g} a reference can hardly matter"
    if shares:
        percent = {arm: f"{share:.0%}" for arm, share in shares.items()}
        parts.append(f"at the end the penalty is {each(percent)} of the reward gained")
    if flatness:
        parts.append(_flat_words(flatness))
    if places:
        parts.append(f"kl_coef is {each(places) if len(set(places.values())) > 1 else min(places.values())}")
    return f"Manipulation: {'; '.join(parts)}." if parts else ""


def _flat_words(flatness):
    numbers = {word: flatness.get(word, 0) for word in (flat.FLAT, flat.DRIFTING, flat.UNDECIDED)}
    words = f"reward is flat in {numbers[flat.FLAT]} of {sum(numbers.values())} runs"
    if numbers[flat.DRIFTING]:
        words += f", clearly drifts in {numbers[flat.DRIFTING]}"
    return words + (f", and in {numbers[flat.UNDECIDED]} it is not known" if numbers[flat.UNDECIDED] else "")


if __name__ == "__main__":
    stages.GATES.command(check, VERSION, __doc__)
