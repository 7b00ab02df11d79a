"""The models that starts and references are mixed from: their names, and what has to hold of them before anything runs.

| name | model |
|---|---|
| `sft0`, `sft1`, … | the SFT models of a replicate, which differ in their seed alone |
| that of an entry of `sft_variants` | an SFT model of another recipe |
| that of an entry of `models` | a model from a folder or the hub |
| that of an entry of `mixes` | a SLERP or a greedy soup of other ingredients |
| `policy:<arm>` | the policy that another arm has trained, at the same kl_coef |
"""

import difflib
import graphlib
from fractions import Fraction

from salsa import data, mixes
from salsa.rl import folders, tokenizers
from salsa.workflow import bounds, config, policies
from salsa.workflow.messages import SettingError, UserError
from salsa.workflow.weights import POLICY, SEED, canonical_weights, named, soup_words

GROUPS = ("sft_variants", "models", "mixes")  # sections of the configuration whose entries are ingredients


def check(study):
    """Refuse ingredients that aren't any, that lack what they are made from, or that are made from themselves."""
    _check_names(study)
    made_from = {}  # arm as an ingredient, or mix -> the ingredients that it is made from
    for name, arm in study.arms.items():
        both = {f"arms.{name}.start": arm.start, f"arms.{name}.reference.weights": arm.reference.weights}
        for key, weights in both.items():
            _check_weights(key, weights, study)
        made_from[f"{POLICY}{name}"] = [other for weights in both.values() for other in _used(weights)]
    for name, mix in study.mixes.items():
        _check_weights(f"mixes.{name}.weights", mix.weights, study)
        made_from[name] = mixes.roles(mix)
        _check_names_of(f"mixes.{name}", mixes.roles(mix), study)
        if mixes.kinds()[mix.kind].needs_gold(mix) and not data.world_kinds()[study.data.task.kind].gold:
            raise UserError(f"mixes.{name}: measures gold, and data={study.data.name} has none; measure something else")
    _check_circles(made_from)
    _check_all_are_used(study, {name for names in made_from.values() for name in names})
    for name, variant in study.sft_variants.items():
        _check_variant(f"sft_variants.{name}", variant, study)


def check_policies(composed):
    """Refuse an arm that is made of another one's policy at a kl_coef at which that one is not trained."""
    for policy in policies.policies(composed):
        for weights in (policy.spec.start, policy.spec.weights):
            for arm in policies.ingredient_arms(weights, composed.config):
                try:
                    policies.as_ingredient(composed, arm, policy.kl_coef)
                except UserError as error:
                    raise UserError(f"arms.{policy.arm}: {error}") from None


def _used(weights):
    return [name for name, _ in canonical_weights(weights)]


def _names(study):
    """All ingredients of a study."""
    names = [f"sft{i}" for i in range(study.sft.models)]
    names += [name for group in GROUPS for name in getattr(study, group)]
    return names + [f"{POLICY}{arm}" for arm in study.arms]


def _check_names(study):
    seen = {}
    for group in GROUPS:
        for name in getattr(study, group):
            if SEED.fullmatch(name):
                raise UserError(f"{group}.{name}: the name of an SFT model of the study; give it another")
            if name in seen:
                raise UserError(f"{group}.{name}: {seen[name]} has an entry of this name; give it another")
            seen[name] = group


def _check_weights(key, weights, study):
    """Refuse weights over what is no ingredient, and those that do not sum to 1 within 1e-6."""
    text = bounds.shown(weights) if isinstance(weights, list) else soup_words(weights)
    _check_names_of(f"{key}={text}", named(weights), study)
    total = sum(bounds.fraction(weight) for weight in named(weights).values())
    if abs(total - 1) > Fraction(1, 10**6):
        raise UserError(f"{key}={text}: the weights sum to {float(total):g}, not 1")


def _check_names_of(key, given, study):
    """Refuse names that are no ingredients."""
    names = _names(study)
    for name in given:
        if name in names:
            continue
        if SEED.fullmatch(name):
            count = f"{study.sft.models} SFT model" + "s" * (study.sft.models > 1)
            raise UserError(f"{key}: needs {name}, and there are {count}; set sft.models")
        nearest = difflib.get_close_matches(name, names, 1)
        rest = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(names)}"
        raise UserError(f"{key}: {name} is no ingredient of this study; {rest}")


def _check_circles(made_from):
    try:
        graphlib.TopologicalSorter(made_from).prepare()
    except graphlib.CycleError as error:
        circle = [name.removeprefix(POLICY) for name in error.args[1]]
        first = error.args[1][0]
        entry = f"arms.{circle[0]}" if first.startswith(POLICY) else f"mixes.{first}"
        raise UserError(
            f"{entry}: is made of itself ({' → '.join(circle)}); start the circle at another ingredient"
        ) from None


def _check_all_are_used(study, names):
    for group in GROUPS:
        for name in getattr(study, group):
            if name not in names:
                raise UserError(f"{group}.{name}: no arm is made of it; name it in one's start or reference")


def _check_variant(key, variant, study):
    for part, section in (("sft", study.sft), ("task", study.data.task)):
        changes = getattr(variant, part)
        try:
            config.changed(section, changes)
        except SettingError as error:
            raise UserError(f"{key}.{part}.{error}") from None
    if "models" in variant.sft:
        raise UserError(f"{key}.sft.models: a variant is one model; leave it out")
    if "kind" in variant.task:
        raise UserError(f"{key}.task.kind: a variant learns from the world of the study; leave it out")
    if variant.best_share < 1 and not data.world_kinds()[study.data.task.kind].gold:
        raise UserError(f"{key}.best_share={variant.best_share:g}: data={study.data.name} has no gold; leave it out")


def check_tokenizers(folder, others):
    """Refuse models (key -> local folder) that read other tokens than the one in `folder`."""
    for key, other in others.items():
        tokenizers.check_same(folder, other, f"{key} has to read the same tokens as the base model")


def check_architectures(study, folder, others):
    """Refuse a local model of another architecture where it is mixed with others, or moved weight by weight.

    Args:
        folder: the local folder of the base model.
        others: `models.<name>` -> its local folder.
    """
    shape = _architecture(folder)
    for name, arm in study.arms.items():
        moved = arm.reference.kind != "soup"
        for key, weights, alone in (
            (f"arms.{name}.start", arm.start, True),
            (f"arms.{name}.reference.weights", arm.reference.weights, not moved),
        ):
            names = _used(weights)
            for other in names:
                there = others.get(f"models.{other}")
                if there and _architecture(there) != shape and (len(names) > 1 or not alone):
                    raise UserError(
                        f"{key}: models.{other} has another architecture than the base model, so that it can't be "
                        "mixed or moved; a reference of kind=soup may be it alone"
                    )


def _architecture(folder):
    values = folders.configuration(folder)
    return {name: values.get(name) for name in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")}
