"""What the design of a study may not be: its looks, the replicates of its arms, its claims, and what registers them.

Refusals are a `UserError` of one line. What is allowed and yet may surprise is a note, which `salsa plan` prints.
"""

import posixpath
from fractions import Fraction

from salsa import algorithms
from salsa.algorithms import DEFAULT
from salsa.workflow import bounds, config, crossing, policies, repository
from salsa.workflow.messages import UserError

ONCE = "looks=[] to decide once, after all of them"


def check(composed):
    """Refuse a design that can't be run or that decides nothing: UserError, one line."""
    for rule in (
        _check_replicates,
        _check_kl_coef,
        _check_looks,
        _check_grid,
        _check_training_times,
        _check_chosen_on,
    ):
        rule(composed)


def _check_replicates(composed):
    """Refuse an arm that names a replicate twice, and a study without any policy."""
    study = composed.config
    for name, arm in study.arms.items():
        if isinstance(arm.replicates, list) and len(set(arm.replicates)) < len(arm.replicates):
            numbers = bounds.shown(arm.replicates)
            raise UserError(f"arms.{name}.replicates={numbers}: a number stands there twice; leave one out")
    if not any(policy.replicates for policy in policies.policies(composed)):
        raise UserError(
            f"arms: none is run in replicates={bounds.shown(study.replicates)}; give one of them a number of these"
        )


def check_count(study, name):
    """Refuse more replicates of an arm than the study has, where a command line asks for them.

    A preset's count may be above that of a study which is a part of the preset's design.
    """
    arm, count = study.arms.get(name), len(study.replicates)
    if arm and isinstance(arm.replicates, int) and arm.replicates > count:
        raise UserError(f"arms.{name}.replicates={arm.replicates}: the study has {count}; give fewer, or leave it out")


def _check_looks(composed):
    """Refuse looks that are none, that end elsewhere than the study, or that nothing could be decided at."""
    study = composed.config
    looks, count = study.looks, len(study.replicates)
    if not looks:
        return
    key = f"looks={bounds.shown(looks)}"
    if sorted(set(looks)) != looks:
        raise UserError(f"{key}: has to rise from look to look; order it, each number once")
    if looks[-1] != count:
        instead = [look for look in looks if look < count] + [count] * (count > 1)
        give = f"looks={bounds.shown(instead)}, or {ONCE}" if instead else ONCE
        raise UserError(f"{key}: the last has to be the number of replicates, {count}; give {give}")
    _check_decidable(key, composed)
    for name, arm in study.arms.items():
        _check_arm_at_looks(name, arm, composed)


def _check_decidable(key, composed):
    """Refuse looks of a study that can test no claim of the abstract: the first one would end it."""
    primary = _primary(composed.config)
    if not primary:
        raise UserError(f"{key}: the study has no claim of the abstract, to be decided; give looks=[]")
    if any(_compares(claim, composed) for claim in primary.values()):
        return
    name, claim = next(iter(primary.items()))
    at = composed.config.claim_kl_coef
    where = "" if at is None else f" at claim_kl_coef={at}"
    raise UserError(
        f"{key}: no claim of the abstract has both of its arms{where} in this study ({name}: {claim.candidate} and "
        f"{claim.baseline}), so that none could be decided; choose such arms, or give looks=[]"
    )


def _check_arm_at_looks(name, arm, composed):
    """Refuse an arm whose replicates don't end at a look, or that the abstract's claims need in all of them."""
    study = composed.config
    numbers = policies.replicates_of([arm], study)
    if len(numbers) == len(study.replicates):
        return
    where = f"arms.{name}.replicates={bounds.shown(arm.replicates)}"
    waiting = [claim for claim, each in _primary(study).items() if name in _arms_of(each, composed)]
    if waiting:
        raise UserError(f"{where}: {waiting[0]} is to be decided, which takes all replicates; leave it out")
    for look in study.looks:  # intervals that allow for looks are made for these numbers of replicates
        there = len(set(numbers).intersection(study.replicates[:look]))
        if there not in study.looks:
            problem = f"{there} of them are among the first {look}, and that is none of looks={study.looks}"
            raise UserError(f"{where}: {problem}; give the first {study.looks[0]}, for instance")


def _check_grid(composed):
    """Refuse a grid on some replicates where claims may want it on all, or where its end lies between looks."""
    study = composed.config
    count = study.grid_replicates
    if count is None:
        return
    if study.claim_kl_coef is None:
        raise UserError(f"grid_replicates={count}: all others need a kl_coef to be run at; set claim_kl_coef")
    if study.looks and min(count, len(study.replicates)) not in study.looks:
        raise UserError(f"grid_replicates={count}: is none of looks={bounds.shown(study.looks)}; give one of them")


def _primary(study):
    """The claims of the abstract, by name: those that keep a study going."""
    return {name: claim for name, claim in study.claims.items() if claim.origin == "abstract"}


def _arms_of(claim, composed):
    """The arms of a claim's candidate and baseline; None for one that the study lacks."""
    return [_arm_of(side, composed) for side in (claim.candidate, claim.baseline)]


def _arm_of(name, composed):
    """The arm that a claim means by a name: `ppo` is the plain anchor, whatever its arm is called."""
    if name in composed.arms:
        return name
    if name != config.PLAIN:
        return None
    plain = policies.plain_spec(composed.config, DEFAULT)
    specs_of_arms = {arm: policies.spec_of(each, composed.config) for arm, each in composed.arms.items()}
    return next((arm for arm, spec in specs_of_arms.items() if spec == plain), None)


def _kl_coefs(arm, composed):
    """The kl_coefs at which the policy of an arm is run; None where it is one policy for all of them."""
    spec = policies.spec_of(composed.arms[arm], composed.config)
    return set(policies.specs(composed)[spec][1]) if spec.penalised or spec.of_policies else None


def _compares(claim, composed):
    """Whether both arms of a claim are run, and at a kl_coef at which it may compare them."""
    arms = _arms_of(claim, composed)
    if None in arms:
        return False
    wanted = composed.config.claim_kl_coef
    common = set(composed.config.kl_coefs) if wanted is None else {wanted}
    for arm in arms:
        kl_coefs = _kl_coefs(arm, composed)
        common = common if kl_coefs is None else common & kl_coefs
    return bool(common)


def _check_kl_coef(composed):
    """Refuse a kl_coef of claims that nothing is run at, or that an arm lacks which claims compare."""
    study, at = composed.config, composed.config.claim_kl_coef
    if at is None:
        return
    if at not in study.kl_coefs:
        raise UserError(f"claim_kl_coef: {at} is not in kl_coefs={study.kl_coefs}; add it there")
    for name, claim in study.claims.items():
        arms = _arms_of(claim, composed)
        for arm in arms if None not in arms else ():
            kl_coefs = _kl_coefs(arm, composed)
            if kl_coefs is not None and at not in kl_coefs:
                key = f"arms.{arm}.kl_coefs" if arm in study.arms else "alpha_kl_coefs"
                raise UserError(f"{key}: {at} is missing, at which claims compare it ({name}); add it")


def _check_training_times(composed):
    """Refuse to compare arms that are trained for other times, unless a claim names both and so means it.

    Not named are `salsa` and `ppo`, which stand in every claim that says nothing else.
    """
    usual = {crossing.arm_name(algorithm, side) for algorithm in algorithms.kinds() for side in _usual_sides()}
    for name, claim in composed.config.claims.items():
        arms = _arms_of(claim, composed)
        if None in arms or not usual.intersection((claim.candidate, claim.baseline)):
            continue
        candidate, baseline = (policies.spec_of(composed.arms[arm], composed.config).iterations_scale for arm in arms)
        if candidate != baseline:
            raise UserError(
                f"claims.{name}: {arms[0]} has iterations_scale={candidate:g} and {arms[1]} {baseline:g}; give both "
                "the same, or name both in a claim of its own (candidate: salsa_long, baseline: ppo_long)"
            )


def _usual_sides():
    return config.Claim.candidate, config.Claim.baseline


def _check_chosen_on(composed):
    """Refuse claims on replicates that settings were chosen on."""
    study = composed.config
    chosen_on = {tuple(map(int, replicate.split("/"))) for replicate in study.chosen_on}
    used = next((number for number in study.replicates if study.claims and (study.seed, number) in chosen_on), None)
    if used is not None:
        raise UserError(
            f"chosen_on: settings were chosen on replicate {used} of root seed {study.seed}, and this study would "
            "decide on it; give other replicates, or another seed"
        )


def check_registered(study, experiment):
    """Refuse to register a study in files that are none, that are one, or that are another experiment's.

    `experiment`: the name of the preset that was chosen, or None.
    """
    paths = {}
    for name in study.registered:
        path = posixpath.normpath(name)
        if path in paths:
            raise UserError(f"registered: {paths[path]} and {name} are one file; leave one out")
        paths[path] = name
        if not (repository.ROOT / path).is_file():
            raise UserError(f"registered: {name}: no such file of the repository; name one, such as conf/claims.yaml")
        own = f"{config.EXPERIMENTS}{experiment}.yaml"
        if path.startswith(config.EXPERIMENTS) and path != own:
            instead = f"name {own}" if experiment else "choose it with experiment=…"
            raise UserError(f"registered: {name}: is not the experiment of this study; {instead}, or leave it out")


def check_iterations(key, arm, section):
    """Refuse a length of training that rounds to none, or to that of an arm without a scale."""
    wanted = Fraction(repr(arm.iterations_scale)) * section.iterations
    if round(wanted) < 1 or (arm.iterations_scale != 1 and round(wanted) == section.iterations):
        raise UserError(
            f"{key}.iterations_scale={arm.iterations_scale:g}: {section.iterations} iterations become {round(wanted)}; "
            "give another, or leave it out"
        )


def notes(composed):
    """A line for each arm that is run nowhere, or without the plain arm that it is compared with."""
    replicates, plain = {}, policies.plain_arms(composed)
    for policy in policies.policies(composed):
        replicates.setdefault(policy.spec, set()).update(policy.replicates)
    of_arms = {
        name: replicates[policies.spec_of(arm, composed.config)]
        if arm.replicates is None
        else set(policies.replicates_of([arm], composed.config))
        for name, arm in composed.arms.items()
    }
    for name, numbers in of_arms.items():
        if not numbers:
            yield f"arm {name}: in none of the replicates"
            continue
        if not policies.penalised(composed.arms[name]):
            continue
        anchor = plain[name]
        if anchor is None:
            scale = composed.arms[name].iterations_scale
            long = f" trained {scale:g} times as long" if scale != 1 else ""
            yield f"arm {name}: the study has no plain arm{long} to compare it with"
        elif missing := numbers - of_arms[anchor]:
            yield f"arm {name}: in {len(missing)} of its {len(numbers)} replicates without {anchor}, its plain arm"
