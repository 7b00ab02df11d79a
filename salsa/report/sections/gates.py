"""What decides whether a study can show anything: gates before PPO and after it."""

from dataclasses import dataclass

from salsa.report import selection, tables, words
from salsa.report.sections import Section

AFTER_PPO = (  # columns that need policies
    "policy_gold_agreement",
    "policy_pairs",
    "gold_ppo_minus_sft0",
    "gold_ppo_minus_sft0_in_errors",
)


@dataclass(frozen=True)
class Gate:
    """A condition without which a comparison of references says nothing.

    Attributes:
        text: what is wanted.
        values: what was measured, by replicate.
        held: in how many of them it is what is wanted.
        after_ppo: whether it is measured of policies.
    """

    text: str
    values: list[float]
    held: int
    after_ppo: bool

    @property
    def holds(self):
        return self.held == len(self.values)

    def __str__(self):
        measured = ", ".join(selection.number(x) for x in self.values)
        return f"{self.text}: held in {self.held} of {len(self.values)} replicates ({measured})"


def checks(study, frame):
    """The gates that were measured, by the study's frame of them."""
    measured = {name: frame[name].dropna().tolist() for name in frame}
    return [
        Gate(text, measured[name], sum(map(bool, map(holds, measured[name]))), name in AFTER_PPO)
        for name, (text, holds) in wanted(study).items()
        if measured.get(name)
    ]


def wanted(study):
    """Column of the frame -> (what is wanted, in words; whether a number is that)."""
    limits = study.config.evaluate.gates
    low, high = limits.lowest_agreement, limits.highest_agreement
    kl, barrier = limits.smallest_kl, limits.largest_barrier
    agreement = "reward model agrees with gold"
    return {
        "gold_agreement": (f"{agreement} on {low:.0%} to {high:.0%} of held-out pairs", lambda x: low <= x <= high),
        "kl_sft0_soup": (f"KL(sft0 ‖ soup) at least {kl:g} nats a response", lambda x: x >= kl),
        "barrier": (f"loss barrier at most {barrier:g} nats a token", lambda x: x <= barrier),
        "policy_gold_agreement": (
            f"{agreement} on at least {low:.0%} of pairs of two final policies' responses",
            lambda x: x >= low,
        ),
        "gold_ppo_minus_sft0_in_errors": (
            f"gold reward of {study.plain} above sft0's by more than two standard errors over prompts (errors)",
            lambda x: x > 2,
        ),
    }


def caption(study, frames):
    frame = frames["gates"]
    return (
        f"Gates of {words.replicates(study)}: KL(sft0 ‖ soup) {words.spread(frame['kl_sft0_soup'])} nats a response, "
        f"reward model's agreement with gold {words.spread(frame['gold_agreement'])} on held-out pairs and "
        f"{words.spread(frame['policy_gold_agreement'])} between final policies."
    )


SECTION = Section(name="gates", heading="Before PPO", table=tables.gates, caption=caption)
