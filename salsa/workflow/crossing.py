"""The axis of algorithms: each arm that names none is trained by all of those that the study chooses.

`algorithm=[ppo,grpo]` makes the arms grpo, grpo_salsa and grpo_other of the arms ppo, salsa and other. What an arm is
made of is crossed with it: grpo_rounds starts at the policy of grpo_salsa. So are claims: what is claimed of salsa and
ppo is claimed of grpo_salsa and grpo. After this step an arm has one algorithm, and all else reads arms alone.
"""

from dataclasses import replace

from salsa import algorithms, mixes
from salsa.workflow import config, policies
from salsa.workflow.messages import UserError
from salsa.workflow.weights import POLICY, named, renamed

DEFAULT = policies.DEFAULT


def crossed(study):
    """A `config.Config` with its arms, mixes and claims for each of its algorithms. UserError where a name is taken."""
    training = chosen(study)
    if training == [DEFAULT] and not study.algorithm_kl_coefs:
        return replace(study, algorithms={})  # the one of every study before there were others
    dependent = _dependent(study)
    arms = {name: arm for name, arm in study.arms.items() if f"{POLICY}{name}" not in dependent}
    made, claims = {}, {}
    for algorithm in training:
        moved = _moved(dependent, algorithm)
        for name, arm in study.arms.items():
            crossed_name = arm_name(algorithm, name)
            if f"{POLICY}{name}" not in dependent:
                continue
            if crossed_name in arms:
                raise UserError(f"arms.{crossed_name}: so is {name} called with algorithm={algorithm}; rename it")
            arms[crossed_name] = _arm(arm, algorithm, moved, study)
        made |= {moved.get(name, name): _mix(mix, moved) for name, mix in study.mixes.items()}
    for algorithm in training:
        for name, claim in study.claims.items():
            claims |= _claim(name, claim, algorithm, study, arms)
    return replace(study, arms=arms, mixes=made, claims=claims)


def chosen(study):
    """The names of the algorithms that train the arms that name none."""
    return [name for name, on in study.algorithms.items() if on] or [DEFAULT]


def arm_name(algorithm, arm):
    """What an arm is called when an algorithm trains it: salsa, grpo_salsa; of the arm ppo the algorithm's name."""
    if algorithm == DEFAULT:
        return arm
    return algorithm if arm == DEFAULT else f"{algorithm}_{arm}"


def _dependent(study):
    """The policies and mixes, as ingredients, that are others with another algorithm.

    They are the policies of arms that name no algorithm, and the mixes and untrained arms that are made of these. What
    names the policy of one algorithm (policy:grpo_salsa) means that one, and is crossed with none.
    """
    dependent = {f"{POLICY}{name}" for name, arm in study.arms.items() if arm.algorithm is None}
    made_from = {name: mixes.roles(mix) for name, mix in study.mixes.items()}
    for name, arm in study.arms.items():
        if arm.algorithm and not algorithms.kinds()[arm.algorithm].penalised:
            made_from[f"{POLICY}{name}"] = list(named(arm.start))
    written = {f"{POLICY}{name}" for name in study.arms}
    for _ in made_from:  # as long as the longest chain
        for name, ingredients in made_from.items():
            of_one = any(other.startswith(POLICY) and other not in written for other in ingredients)
            if dependent.intersection(ingredients) and not of_one:
                dependent.add(name)
    return dependent


def _moved(dependent, algorithm):
    """Ingredient -> its name with an algorithm, of those that depend on it."""
    if algorithm == DEFAULT:
        return {}
    return {
        name: POLICY + arm_name(algorithm, name.removeprefix(POLICY))
        if name.startswith(POLICY)
        else f"{algorithm}_{name}"
        for name in dependent
    }


def _renamed(weights, moved):
    if not any(name in moved for name in named(weights)):
        return weights
    return dict(renamed(weights, {name: moved.get(name, name) for name in named(weights)}))


def _arm(arm, algorithm, moved, study):
    reference = replace(arm.reference, weights=_renamed(arm.reference.weights, moved))
    arm = replace(arm, start=_renamed(arm.start, moved), reference=reference)
    if arm.algorithm:
        return arm
    kl_coefs = study.algorithm_kl_coefs.get(algorithm) if arm.kl_coefs is None else arm.kl_coefs
    return replace(arm, kl_coefs=kl_coefs, algorithm=None if algorithm == DEFAULT else algorithm)


def _mix(mix, moved):
    origin = mixes.kinds()[mix.kind].origin(mix)
    changes = {"origin": moved[origin]} if origin in moved else {}
    return replace(mix, weights=_renamed(mix.weights, moved), **changes)


def _claim(name, claim, algorithm, study, arms):
    """A claim of arms that an algorithm trains, by its name; nothing where it is of another algorithm or other arms."""
    own = claim.algorithm or algorithm
    if own != algorithm:
        return {}
    candidate = _side(own, claim.candidate, study)
    baseline = _side(claim.baseline_algorithm or own, claim.baseline, study)
    if own == DEFAULT or claim.algorithm:
        return {name: replace(claim, candidate=candidate, baseline=baseline)}
    if candidate not in arms or baseline not in arms or candidate == claim.candidate:
        return {}
    title = algorithms.kinds()[own].title
    text = f"{title}: {claim.text.replace('PPO', title)}"
    return {f"{own}_{name}": replace(claim, text=text, candidate=candidate, baseline=baseline)}


def _side(algorithm, arm, study):
    """The arm that a claim means by a name, and by the algorithm that trains it."""
    if arm == config.PLAIN and arm not in study.arms:
        arm = next((name for name, other in study.arms.items() if _is_plain(other, study)), arm)
    alone = arm in study.arms and f"{POLICY}{arm}" not in _dependent(study)
    return arm if alone else arm_name(algorithm, arm)


def _is_plain(arm, study):
    return not arm.algorithm and policies.spec_of(arm, study) == policies.plain_spec(study, DEFAULT)
