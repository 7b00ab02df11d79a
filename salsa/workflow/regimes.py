"""Replicates that are made by other recipes than the study's: whose SFT models and reward model differ.

A regime changes how the SFT models and the reward model of its replicates are made. Prompts, preferences, benchmarks
and evaluation are the study's: what policies are trained and asked on is the same in every regime. Pure: no torch.
"""

from dataclasses import replace

from salsa import data
from salsa.workflow import config
from salsa.workflow.messages import SettingError, UserError

SKIPS = "skip_demonstrations"  # the setting of a task by which SFT models learn from different demonstrations


def of_replicate(study, number):
    """The `config.Regime` of a replicate; None where it is made by the study's own recipe."""
    return next((regime for regime in study.regimes.values() if number in regime.replicates), None)


def recipe(study, regime):
    """The `config.Config` of a regime: the study's, with the sections that the regime changes; None changes none."""
    if regime is None:
        return study
    task = config.changed(study.data.task, regime.task)
    return replace(
        study,
        sft=config.changed(study.sft, regime.sft),
        reward_model=config.changed(study.reward_model, regime.reward_model),
        data=replace(study.data, task=task),
    )


def recipes(study):
    """Key of each regime -> its `config.Config`."""
    return {f"regimes.{name}": recipe(study, regime) for name, regime in study.regimes.items()}


def demonstrations(study, regime, index, changes=()):
    """What is changed of the study's task for the SFT model of some seed: setting -> value; nothing: it is the study's.

    Where SFT models have demonstrations of their own, they take consecutive parts of one order, each as many.

    Args:
        study: the `recipe` of the regime.
        regime: a `config.Regime`, or None.
        index: of the seed: 0 is sft0's.
        changes: of an SFT variant.
    """
    if regime is None:
        return dict(changes)
    changes = regime.task | dict(changes)
    if regime.disjoint and index:
        task = config.changed(study.data.task, changes)
        changes[SKIPS] = task.skip_demonstrations + index * task.demonstrations
    return changes


def check(study):
    """Refuse regimes that can't be: UserError, one line. Rules between the sections of each are the study's own."""
    owner = {}
    for name, regime in study.regimes.items():
        key = f"regimes.{name}"
        for number in regime.replicates:
            other = owner.setdefault(number, key)
            if other != key:
                raise UserError(f"{key}.replicates: {number} is also of {other}; leave it out of one")
        if len(set(regime.replicates)) < len(regime.replicates):
            raise UserError(f"{key}.replicates={regime.replicates}: a number stands there twice; leave one out")
        _check_sections(key, regime, study)
    strange = sorted(owner.keys() - set(study.replicates))
    without = [number for number in study.replicates if number not in owner]
    if strange and without:  # one of them may be meant to be the other
        raise UserError(
            f"{owner[strange[0]]}.replicates: {strange[0]} is not in replicates, and replicate {without[0]} is of no "
            "regime; give one the number of the other, or leave it out"
        )


def _check_sections(key, regime, study):
    sections = {"sft": study.sft, "task": study.data.task, "reward_model": study.reward_model}
    for part, section in sections.items():
        try:
            config.changed(section, getattr(regime, part))
        except SettingError as error:
            raise UserError(f"{key}.{part}.{error}") from None
    for part in ("sft", "reward_model"):
        if "models" in getattr(regime, part):
            raise UserError(f"{key}.{part}.models: all replicates have as many; set {part}.models")
    if regime.disjoint:
        _check_parts(key, regime, study)


def _check_parts(key, regime, study):
    """Refuse demonstrations of each SFT model's own where there are none, or too few."""
    made, section = recipe(study, regime), study.data
    if section.task.kind not in type(section.task).readers()[SKIPS]:
        raise UserError(f"{key}.disjoint: demonstrations of data={section.name} are in no parts; leave it out")
    if study.sft.models < 2:
        raise UserError(f"{key}.disjoint: there is one SFT model, and sft.models=1; set sft.models=2")
    models = {f"sft{index}": (index, {}) for index in range(study.sft.models)}
    models |= {f"sft_variants.{name}": (variant.seed, variant.task) for name, variant in study.sft_variants.items()}
    for name, (index, changes) in models.items():
        task = config.changed(section.task, demonstrations(made, regime, index, changes))
        try:
            data.record(task).check(task)
        except UserError as error:
            raise UserError(f"{key}.disjoint, for {name}: {error}") from None
