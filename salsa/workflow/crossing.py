"""The axis of algorithms: each arm that names none is trained by all of those that the study chooses.

`algorithm=[ppo,grpo]` makes the arms grpo, grpo_salsa and grpo_other of the arms ppo, salsa and other. What an arm is
made of is crossed with it: grpo_rounds starts at the policy of grpo_salsa. So are claims: what is claimed of salsa and
ppo is claimed of grpo_salsa and grpo. After this step an arm has one algorithm, and all else reads arms alone.
"""

from dataclasses import replace

from salsa import algorithms, mixes
from salsa.algorithms import DEFAULT
from salsa.workflow import config, policies
from salsa.workflow.messages import UserError
from salsa.workflow.weights import POLICY, named, renamed


def crossed(study, grids_of_others=False):
    """A `config.Config` with its arms, mixes and claims for each of its algorithms.

    Args:
        grids_of_others: whether kl_coefs of algorithms that train nothing stay, to be refused; a preset's are dropped.

    Raises UserError where no algorithm is chosen for an arm that names none, and where a name is taken.
    """
    training = [name for name, on in study.algorithms.items() if on]
    free = next((name for name, arm in study.arms.items() if arm.algorithm is None), None)
    if free and not training:
        raise UserError(f"algorithm: none is chosen, and arms.{free} names none; choose some, such as algorithm=[ppo]")
    if not grids_of_others:
        grids = {name: grid for name, grid in study.algorithm_kl_coefs.items() if name in training}
        study = replace(study, algorithm_kl_coefs=grids)
    arms = _arms(study, training)
    claims = _claims(study, training, arms)
    if training == [DEFAULT] and not study.algorithm_kl_coefs:
        return replace(study, algorithms={}, claims=claims)  # the one of every study before there were others
    return replace(study, arms=arms, mixes=_mixes(study, training), claims=claims)


def chosen(study):
    """The names of the algorithms that train the arms that name none, of a study whose arms are crossed."""
    return [name for name, on in study.algorithms.items() if on] or [DEFAULT]


def _arms(study, training):
    dependent = _dependent(study)
    arms = {name: arm for name, arm in study.arms.items() if f"{POLICY}{name}" not in dependent}
    for algorithm in training:
        moved = _moved(dependent, algorithm)
        for name, arm in study.arms.items():
            if f"{POLICY}{name}" in dependent and _can_train(algorithm, arm, study):
                _add(arms, "arms", name, arm_name(algorithm, name), algorithm)
                arms[arm_name(algorithm, name)] = _arm(arm, algorithm, moved, study)
    return arms


def _can_train(algorithm, arm, study):
    """Whether an arm goes with an algorithm: one whose penalty changes does not, where the algorithm's can't."""
    return arm.kl_schedule is None or arm.algorithm or policies.section(study, algorithm).kl_schedule is not None


def _mixes(study, training):
    dependent, made = _dependent(study), {}
    made |= {name: mix for name, mix in study.mixes.items() if name not in dependent}
    for algorithm in training:
        moved = _moved(dependent, algorithm)
        for name, mix in study.mixes.items():
            if name in dependent:
                _add(made, "mixes", name, moved.get(name, name), algorithm)
                made[moved.get(name, name)] = _mix(mix, moved)
    return made


def _add(entries, group, name, crossed_name, algorithm):
    """UserError where what an algorithm makes of an entry has the name of another."""
    if crossed_name in entries:
        raise UserError(f"{group}.{crossed_name}: is also what algorithm={algorithm} calls {name}; rename one")


def arm_name(algorithm, arm):
    """What an arm is called when an algorithm trains it: salsa, grpo_salsa; of the arm ppo the algorithm's name."""
    if algorithm == DEFAULT:
        return arm
    return algorithm if arm == config.PLAIN else f"{algorithm}_{arm}"


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


def _claims(study, training, arms):
    """The claims of a study, of arms as they are called once they are crossed."""
    dependent, claims = _dependent(study), {}
    for name, claim in study.claims.items():
        if claim.algorithm or claim.baseline_algorithm or training != [DEFAULT]:
            for crossed_name, made in _crossed_claim(name, claim, training, study, arms, dependent).items():
                if crossed_name in claims or (crossed_name != name and crossed_name in study.claims):
                    raise UserError(f"claims.{crossed_name}: is also what {name} is called when crossed; rename one")
                claims[crossed_name] = made
        else:
            claims[name] = claim
    return claims


def _crossed_claim(name, claim, training, study, arms, dependent):
    """A claim for each algorithm that trains its arms; once where it names an algorithm, or arms that name theirs."""
    for key in ("algorithm", "baseline_algorithm"):
        algorithm = getattr(claim, key)
        if algorithm and algorithm not in training:
            raise UserError(
                f"claims.{name}.{key}={algorithm}: is none of algorithm=[{','.join(training)}]; add it there"
            )
    sides = (claim.candidate, claim.baseline)
    alone = all(side in study.arms and f"{POLICY}{side}" not in dependent for side in sides)
    if alone:
        return {name: claim}
    result = {}
    for algorithm in [claim.algorithm] if claim.algorithm else training:
        candidate = _side(algorithm, claim.candidate, study, dependent)
        baseline = _side(claim.baseline_algorithm or algorithm, claim.baseline, study, dependent)
        named_so = claim.algorithm or claim.baseline_algorithm
        if algorithm == DEFAULT and not named_so:
            result[name] = claim  # also of arms that the study lacks: it says that it is not tested
        elif candidate in arms and baseline in arms and candidate != baseline:
            made = replace(claim, candidate=candidate, baseline=baseline)
            if not claim.algorithm and algorithm != DEFAULT:
                made = replace(made, text=_text(claim, algorithm))
            result[name if claim.algorithm or algorithm == DEFAULT else f"{algorithm}_{name}"] = made
    return result


def _text(claim, algorithm):
    """What a claim says of arms that another algorithm trains; its baseline may be PPO's."""
    title = algorithms.kinds()[algorithm].title
    text = claim.text if claim.baseline_algorithm else claim.text.replace("PPO", title)
    return f"{title}: {text}"


def _side(algorithm, arm, study, dependent):
    """The arm that a claim means by a name, and by the algorithm that trains it."""
    if arm == config.PLAIN and arm not in study.arms:
        arm = next((name for name, other in study.arms.items() if _is_plain(other, study)), arm)
    alone = arm in study.arms and f"{POLICY}{arm}" not in dependent
    return arm if alone else arm_name(algorithm, arm)


def _is_plain(arm, study):
    return not arm.algorithm and policies.spec_of(arm, study) == policies.plain_spec(study, DEFAULT)
