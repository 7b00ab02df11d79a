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
import itertools
import re
from fractions import Fraction

from salsa import algorithms, data, mixes
from salsa.rl import folders, tokenizers
from salsa.workflow import bounds, config, policies
from salsa.workflow.messages import SettingError, UserError
from salsa.workflow.weights import POLICY, SEED, ingredients, named, soup_words

LIKE_SEED = re.compile(r"sft\d+", re.IGNORECASE)  # Sft0 and sft00, too, would be mistaken for sft0
SHAPES = (  # keys of config.json on which the names and shapes of weights depend
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "tie_word_embeddings", "attention_bias", "mlp_bias", "num_experts"),
    *("num_local_experts", "moe_intermediate_size", "n_embd", "n_inner", "n_layer", "n_head", "n_positions"),
)
COMPUTED = ("hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_theta")  # what a mix compares beside them
GROUPS = ("sft_variants", "models", "mixes")  # sections of the configuration whose entries are ingredients


def check(study):
    """Refuse ingredients that aren't any, that lack what they are made from, or that are made from themselves."""
    _check_names(study)
    for name, arm in study.arms.items():
        _check_weights(f"arms.{name}.start", arm.start, study)
        _check_weights(f"arms.{name}.reference.weights", arm.reference.weights, study)
    for name, mix in study.mixes.items():
        _check_weights(f"mixes.{name}.weights", mix.weights, study)
        _check_names_of(f"mixes.{name}", mixes.roles(mix), study)
        if mixes.kinds()[mix.kind].needs_gold(mix) and not data.world_kinds()[study.data.task.kind].gold:
            raise UserError(f"mixes.{name}: measures gold, and data={study.data.name} has none; measure something else")
    _check_circles(made_from(study))
    _check_all_are_ingredients(study)
    for name, variant in study.sft_variants.items():
        _check_variant(f"sft_variants.{name}", variant, study)


def made_from(study):
    """Arm as an ingredient, or mix -> the ingredients that it is made from."""
    arms = {name: ingredients(arm.start, arm.reference.weights) for name, arm in study.arms.items()}
    return {f"{POLICY}{name}": parts for name, parts in arms.items()} | {
        name: mixes.roles(mix) for name, mix in study.mixes.items()
    }


def unread(study):
    """Group -> the names of its entries that no arm and no mix is made from."""
    read = {name for names in made_from(study).values() for name in names}
    return {group: set(getattr(study, group)) - read for group in GROUPS}


def check_policies(composed):
    """Refuse an arm that is made of another one's policy at a kl_coef or seed at which that one is not trained."""
    for policy in policies.policies(composed):
        for weights in (policy.spec.start, policy.spec.weights):
            for arm in policies.ingredient_arms(weights, composed.config):
                try:
                    last = policies.seeds(policy.spec, composed.config) - 1  # which has all that the others have
                    policies.as_ingredient(composed, arm, policy.kl_coef, last)
                except UserError as error:
                    raise UserError(f"arms.{policy.arm}: {error}") from None


def _names(study):
    """All ingredients of a study."""
    names = [f"sft{i}" for i in range(study.sft.models)]
    names += [name for group in GROUPS for name in getattr(study, group)]
    return names + [f"{POLICY}{arm}" for arm in study.arms]


def _check_names(study):
    seen = {}
    for group in GROUPS:
        for name in getattr(study, group):
            if LIKE_SEED.fullmatch(name):
                raise UserError(f"{group}.{name}: the name of an SFT model of the study; give it another")
            other_group, other = seen.setdefault(name.lower(), (group, name))
            if other != name:
                raise UserError(f"{group}.{name}: differs from {other} in capitals alone; give it another name")
            if other_group != group:
                raise UserError(f"{group}.{name}: {other_group} has an entry of this name; give it another")


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
            f"{entry}: is made of itself ({' → '.join(circle)}); break the circle with another ingredient"
        ) from None


def _check_all_are_ingredients(study):
    for group, names in unread(study).items():
        for name in sorted(names):
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
    check_demonstrations(f"{key}.task", variant.task, study.data)
    if variant.best_share < 1 and not data.world_kinds()[study.data.task.kind].gold:
        raise UserError(
            f"{key}.best_share={variant.best_share:g}: data={study.data.name} has no gold to choose by; leave it "
            "out, and arms that are made of it (as arm=[ppo,salsa] does)"
        )


def check_demonstrations(key, changes, section):
    """Refuse other demonstrations than those of splits that hold no prompt of the evaluation or a benchmark."""
    fixed = data.world_kinds()[section.task.kind].fixed_splits
    for setting, value in changes.items():
        if setting not in ("demonstrations", "validation", *(["seed"] if fixed else [])):
            raise UserError(
                f"{key}.{setting}: other data than the study's may hold its evaluation or benchmark prompts; leave it "
                "out, since a variant may change " + ("demonstrations, validation and seed" if fixed else "sizes alone")
            )
        most = getattr(section.task, setting)
        if not fixed and most and not 0 < value <= most:  # benchmarks lack the prompts that the study's prepare took
            raise UserError(
                f"{key}.{setting}={value}: may take prompts that a benchmark asks; data={section.name} lets a variant "
                f"take {most} at most, data.task.{setting}"
            )


def check_tokenizers(folder, others):
    """Refuse models (key -> local folder) that read other tokens than the one in `folder`."""
    for key, other in others.items():
        tokenizers.check_same(folder, other, f"{key} has to read the same tokens as the base model")


def check_architectures(study, configurations):
    """Refuse ingredients of another architecture where they are mixed, moved or trained.

    Args:
        configurations: name of an entry of `models`, or "" for the base model -> what is known of its config.json.
    """
    sources = _Architectures(study, configurations)
    for name, mix in study.mixes.items():
        sources.check_mixed(f"mixes.{name}", mixes.roles(mix), "mixed; leave one out")
    for name, arm in study.arms.items():
        start, weights = ingredients(arm.start), ingredients(arm.reference.weights)
        sources.check_mixed(f"arms.{name}.start", start, "mixed; name one alone")
        if algorithms.kinds()[policies.algorithm_of(arm)].penalised:
            remedy = "trained; it may be a start that is not trained, or a reference of kind=soup by itself"
            sources.check_mixed(f"arms.{name}.start", ["sft0", *start], remedy, SHAPES)
        moved = ["sft0"] if arm.reference.kind != "soup" else []
        remedy = "mixed or moved; a reference of kind=soup may be it alone"
        sources.check_mixed(f"arms.{name}.reference.weights", [*moved, *weights], remedy)
    for name in study.evaluate.plane.arms:
        plane = ["sft0", f"{POLICY}{name}"]
        sources.check_mixed("evaluate.plane.arms", plane, "in a plane with sft0 and sft1; leave it out")


class _Architectures:
    """The architectures of ingredients, as far as they are known while planning."""

    def __init__(self, study, configurations):
        self.study, self.configurations = study, configurations

    def source(self, name):
        """The entry of `models` whose architecture an ingredient has, or "" where it is that of the base model."""
        if name in self.study.models:
            return name
        if name in self.study.mixes:
            parts = mixes.roles(self.study.mixes[name])
        elif name.startswith(POLICY):
            parts = ingredients(self.study.arms[name.removeprefix(POLICY)].start)
        else:
            return ""
        sources = [self.source(part) for part in parts]  # of one architecture, or they are refused
        return next((source for source in sources if self.configurations.get(source)), sources[0])

    def check_mixed(self, key, names, remedy, keys=None):
        """Refuse two ingredients that differ in what is known of both (in `keys`, or in all that a mix compares)."""
        ordered = sorted(dict.fromkeys(names), key=lambda name: self.source(name) != "")
        for first, second in itertools.combinations(ordered, 2):
            mine, its = (self.configurations.get(self.source(name), {}) for name in (first, second))
            for entry in keys or SHAPES + COMPUTED:
                if None not in (mine.get(entry), its.get(entry)) and mine[entry] != its[entry]:
                    raise UserError(
                        f"{key}: {self.shown(second)} has another architecture than {self.shown(first)} ({entry}: "
                        f"{its[entry]} and {mine[entry]}), so that it can't be {remedy}"
                    )

    def shown(self, name):
        """An ingredient, with the model that it has its architecture from."""
        source = self.source(name)
        if not source:
            return "the base model"
        return f"models.{name}" if name == source else f"{name} (as models.{source})"


def architecture(folder):
    """What config.json says of a local model, with that of its text model where it has several."""
    values = folders.configuration(folder)
    nested = values.get("text_config")
    return (nested if isinstance(nested, dict) else {}) | values


def pretrained_architecture(shape):
    """The same of the Llama that a `config.Architecture` describes, whose vocabulary is known once it is made."""
    return {
        "model_type": "llama",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "head_dim": shape.hidden_size // shape.heads,
        "tie_word_embeddings": True,
        "max_position_embeddings": shape.max_length,
    }
