"""What starts and references are mixed from beside the SFT models of several seeds."""

import pandas as pd

from salsa import mixes
from salsa.report.sections import Section


def table(study):
    """One row per ingredient that the study names: what kind of model it is, and what it is made of."""
    config = study.config
    rows = [(name, "SFT variant", _recipe(variant)) for name, variant in config.sft_variants.items()]
    rows += [(name, "other model", _source(model)) for name, model in config.models.items()]
    rows += [(name, "mix", mixes.kinds()[mix.kind].words(mix)) for name, mix in config.mixes.items()]
    return pd.DataFrame(rows, columns=["ingredient", "kind", "made_of"])


def _recipe(variant):
    """What sets an SFT variant apart from the study's own SFT models."""
    parts = [f"the seed of sft{variant.seed}"]
    if variant.best_share < 1:
        parts.append(f"the {variant.best_share:.0%} of demonstrations of highest gold")
    parts += [f"sft.{name}={value}" for name, value in variant.sft.items()]
    parts += [f"data.task.{name}={value}" for name, value in variant.task.items()]
    return ", ".join(parts)


def _source(model):
    return model.path + (f" at {model.revision}" if model.revision else "")


def caption(study, tables):
    """How many there are, and what stands beside them."""
    count = len(tables["ingredients"])
    return (
        f"{count} ingredient{'s' * (count > 1)} of starts and references, beside sft0, sft1, … and policies of arms: "
        "what an SFT variant changes of the study's SFT, where another model comes from, how a mix is made."
    )


SECTION = Section(
    name="ingredients",
    heading="Arms",
    table=table,
    caption=caption,
    present=lambda study: bool(study.config.sft_variants or study.config.models or study.config.mixes),
)
