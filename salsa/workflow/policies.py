"""The policies of a study: how each is trained, as arms say, and the names that follow from it.

Arms that say the same in other words are one policy. Pure: it imports no torch.
"""

from dataclasses import dataclass, field, replace
from fractions import Fraction

from salsa import algorithms, anchors, mixes
from salsa.algorithms import DEFAULT
from salsa.workflow import config, schema
from salsa.workflow.messages import UserError
from salsa.workflow.weights import (
    POLICY,
    SEED,
    SFT0,
    alpha_weights,
    canonical_weights,
    decimal_text,
    ingredients,
    number_label,
    renamed,
    used,
    weight_of,
    weights_label,
    written,
)

FIXED = schema.KlSchedule()
JUDGED = ("win_rate", "gold_reward")  # measures of claims beside which win rates stand


@dataclass(frozen=True)
class PolicySpec:
    """How a policy is trained, canonical: arms with equal specifications are one.

    Attributes:
        start: weights over ingredients, canonical.
        kind, weights, settings: of the reference; settings as pairs of a name, which its kind reads, and a value.
        kl_scale: factor of the study's kl_coef.
        algorithm: what trains it.
        seed: of the order of its prompts and of its noise.
        of_policies: whether it is trained by no penalty, and made of policies that are, at each of their kl_coefs.
        iterations_scale: factor of the iterations of its algorithm.
    """

    start: tuple[tuple[str, str], ...] = SFT0
    kind: str = "soup"
    weights: tuple[tuple[str, str], ...] = SFT0
    settings: tuple = ()
    kl_scale: float = 1.0
    kl_schedule: schema.KlSchedule = FIXED
    algorithm: str = DEFAULT
    seed: int = 0
    of_policies: bool = False
    iterations_scale: float = 1.0

    @property
    def penalised(self):
        """Whether its algorithm is anchored by a penalty."""
        return algorithms.kinds()[self.algorithm].penalised

    def kl_coef(self, kl_coef):
        """The effective kl_coef, without the noise of binary numbers: 3 times 0.1 is 0.3. Without a penalty it is 0."""
        if not self.penalised:
            return 0.0
        return float(Fraction(repr(kl_coef)) * Fraction(repr(self.kl_scale)))

    @property
    def reference(self):
        """The config.Reference, with the defaults of what its kind doesn't read."""
        return config.Reference(self.kind, written(self.weights), **dict(self.settings))

    def renamed(self, names):
        """It with other names of its ingredients."""
        return replace(self, start=renamed(self.start, names), weights=renamed(self.weights, names))

    def reference_label(self):
        """A readable name of the reference: soup0.50, noise0.50, ema0.05_sft0, reset10_sft0."""
        return anchors.kinds()[self.kind].label(self.reference)

    def kl_label(self, kl_coef):
        """A readable name of the penalty's strength: 0.05, 0.05x0.5, 0.05-linear0, 0.05-adaptive6_10000."""
        scale = "" if self.kl_scale == 1 else f"x{number_label(self.kl_scale)}"
        kind, values = self.kl_schedule.kind, self.kl_schedule.own_settings().values()
        schedule = "" if kind == "fixed" else f"-{kind}" + "_".join(map(number_label, values))
        return number_label(kl_coef) + scale + schedule

    def name(self, kl_coef):
        """The name of its policy within a replicate, from its content alone."""
        start = weights_label(self.start)
        name = f"start_{start}"
        if self.penalised:
            name += f"-ref_{self.reference_label()}"
        if self.penalised or self.of_policies:
            name += f"-kl_{self.kl_label(kl_coef)}"
        name += f"-seed{self.seed}" if self.seed else ""
        name += f"-iterations_x{number_label(self.iterations_scale)}" if self.iterations_scale != 1 else ""
        return name if self.algorithm == DEFAULT else f"{self.algorithm}-{name}"

    def run_label(self, kl_coef, seed=0):
        """The label of its training run, which knows the effective kl_coef alone: two policies may share the run.

        `seed`: the training seed, of those that a replicate has.
        """
        name = replace(self, kl_scale=1.0, of_policies=False).name(self.kl_coef(kl_coef))
        return f"{name}-t{seed}" if seed else name


@dataclass
class Composed:
    """A study as it was composed.

    Attributes:
        config: the `config.Config` as it was written.
        arms: its arms, those of the alphas among them (`expanded_arms`).
        files: the content of the local files that its runs read: run -> name -> `<bytes>:<sha256>`.
        link: the readable name of the study's folder where nothing but the experiment was chosen, or None.
        point: what sets it apart in a sweep, or from its companions (key -> value as text; nothing where it is alone).
        overrides: those that it was composed of, as its report tells them (`overriding.recorded`); None: not known.
    """

    config: config.Config
    arms: dict[str, config.Arm]
    files: dict[str, dict[str, str]] = field(default_factory=dict)
    link: str | None = None
    point: dict[str, str] = field(default_factory=dict)
    overrides: list[str] | None = None


def section(study, algorithm):
    """The section of the configuration that bears an algorithm's name."""
    return getattr(study, algorithm)


def algorithms_of(arms):
    """The algorithms that train some arms (name -> `config.Arm`), each once, in their order."""
    return list(dict.fromkeys(map(algorithm_of, arms.values())))


def algorithm_of(arm):
    """What trains the policies of a `config.Arm`, once arms are crossed with algorithms."""
    return arm.algorithm or DEFAULT


def penalised(arm):
    """Whether the policies of a `config.Arm` are anchored by a penalty."""
    return algorithms.kinds()[algorithm_of(arm)].penalised


def draws(arm, study):
    """How many responses the policy of an arm draws for each answer."""
    algorithm = algorithm_of(arm)
    return algorithms.kinds()[algorithm].draws(section(study, algorithm))


def iterations(spec, section):
    """The iterations for which a policy is trained, by the section of its algorithm."""
    return round(Fraction(repr(spec.iterations_scale)) * section.iterations)


def spec_of(arm, study):
    """The `PolicySpec` of a `config.Arm` of a study."""
    reference = arm.reference
    return PolicySpec(
        canonical_weights(arm.start),
        reference.kind,
        canonical_weights(reference.weights),
        tuple(reference.own_settings().items()),
        arm.kl_scale,
        arm.kl_schedule or section(study, algorithm_of(arm)).kl_schedule or FIXED,
        algorithm_of(arm),
        arm.seed,
        not penalised(arm) and bool(trained_ingredients(arm.start, study)),
        arm.iterations_scale,
    )


def parts(names, study, of_arm):
    """Yield ingredients and all that they are made of, each once.

    A mix is made of the models that it mixes, and the policy of an arm of the ingredients `of_arm(config.Arm)`.
    """
    names = list(names)
    for name in names:  # which grows by what an ingredient is made of
        yield name
        if name in study.mixes:
            made_of = mixes.roles(study.mixes[name])
        else:
            arm = study.arms.get(name.removeprefix(POLICY)) if name.startswith(POLICY) else None
            made_of = of_arm(arm) if arm else ()
        names += [part for part in made_of if part not in names]


def _arms_among(names):
    return [name.removeprefix(POLICY) for name in names if name.startswith(POLICY)]


def ingredient_arms(weights, study):
    """The names of the arms whose policies a start or a reference is mixed from, by mixes of the study too."""
    return _arms_among(parts(ingredients(weights), study, lambda arm: ()))


def sft_models_of(spec, study):
    """The numbers of the SFT models that a policy is made of, by mixes and by the policies of other arms too."""
    names = parts(used(spec.start, spec.weights), study, lambda arm: used(arm.start, arm.reference.weights))
    return [int(seed[1]) for seed in map(SEED.fullmatch, names) if seed]


def trained_ingredients(start, study):
    """The names of the arms with a penalty whose policies a start is made of, by untrained arms too."""
    names = parts(ingredients(start), study, lambda arm: () if penalised(arm) else ingredients(arm.start))
    return [arm for arm in _arms_among(names) if arm in study.arms and penalised(study.arms[arm])]


def seeds(spec, study):
    """How often a policy is trained in a replicate. What is not trained is made as often as what it is made of."""
    if spec.penalised:
        return section(study, spec.algorithm).seeds
    arms = [study.arms[arm] for arm in trained_ingredients(spec.start, study)]
    return max([section(study, algorithm_of(arm)).seeds for arm in arms], default=1)


def seed_of(spec, study, seed):
    """The training seed of the policy that goes with those of some `seed`; None where it was not trained with that.

    A policy with a single seed stands beside all, as sft0 does.
    """
    count = seeds(spec, study)
    return seed if seed < count else 0 if count == 1 else None


def plain_spec(study, algorithm, iterations_scale=1.0):
    """The plain anchor of an algorithm: sft0 is start and reference, the penalty is the study's own."""
    kl_schedule = section(study, algorithm).kl_schedule or FIXED
    return PolicySpec(kl_schedule=kl_schedule, algorithm=algorithm, iterations_scale=iterations_scale)


def expanded_arms(study):
    """The arms of a `config.Config`, with one more for each alpha that is none of them: alpha_0.25.

    Raises:
        UserError: two alphas have one name, which has two decimals.
    """
    arms = dict(study.arms)
    specs_of_arms = {spec_of(arm, study) for arm in arms.values()}
    for alpha in study.alphas:
        reference = config.Reference(weights=written(alpha_weights(alpha)))
        arm = config.Arm(reference=reference, kl_coefs=study.alpha_kl_coefs or study.algorithm_kl_coefs.get(DEFAULT))
        name = f"alpha_{float(Fraction(alpha)):.2f}"
        if spec_of(arm, study) in specs_of_arms:
            continue
        if name in arms:
            raise UserError(f"two alphas are both shown as {name}; remove one")
        arms[name] = arm
    return arms


def specs(composed):
    """The distinct policies of a study, in order: PolicySpec -> (the names of its arms, its kl_coefs).

    Without a penalty there is one policy, which tables and figures show at one kl_coef. Where it is made of policies
    that have one, it is another at each of their kl_coefs.
    """
    study, specs = composed.config, {}
    for name, arm in composed.arms.items():
        spec = spec_of(arm, study)
        names, kl_coefs = specs.setdefault(spec, ([], []))
        names.append(name)
        wanted = kl_coefs_of(arm.kl_coefs, study.kl_coefs) if spec.penalised else []
        kl_coefs += [kl_coef for kl_coef in wanted if kl_coef not in kl_coefs]
    for spec, (_, kl_coefs) in specs.items():
        if not spec.penalised:
            kl_coefs += _kl_coefs_without_penalty(spec, specs, study)
    return specs


def _kl_coefs_without_penalty(spec, specs, study):
    """The kl_coefs of an untrained policy, by those of the `specs` that have a penalty.

    They are those that all trained ingredients have, in the study's order; one that has a single kl_coef serves others
    where it has to. Without such ingredients it is the first at which anything is trained, or the study's first.
    """
    if not spec.of_policies:
        trained = {kl_coef for other, (_, kl_coefs) in specs.items() if other.penalised for kl_coef in kl_coefs}
        return [next((kl_coef for kl_coef in study.kl_coefs if kl_coef in trained), study.kl_coefs[0])]
    grids = [specs[spec_of(study.arms[arm], study)][1] for arm in trained_ingredients(spec.start, study)]
    several = [grid for grid in grids if len(grid) > 1] or grids[:1]
    # Where several grids share nothing, `as_ingredient` refuses the first of them.
    return _shared(grids, study) or _shared(several, study) or several[0]


def _shared(grids, study):
    return [kl_coef for kl_coef in study.kl_coefs if all(kl_coef in grid for grid in grids)]


def kl_coefs_of(kl_coefs, otherwise):
    """Those that are given, or else the others."""
    return otherwise if kl_coefs is None else kl_coefs


@dataclass(frozen=True)
class Policy:
    """A policy of every replicate.

    Attributes:
        arm: the name of the first arm that says so.
        kl_coef: the study's, before the arm's scale.
        plain: whether it is the plain anchor of its algorithm, trained for its time.
        alpha: the reference's place on the line from sft0 to sft1 as text, or None.
        replicates: the numbers of the replicates in which it is trained.
    """

    arm: str
    spec: PolicySpec
    kl_coef: float
    plain: bool
    alpha: str | None
    replicates: tuple[int, ...]

    @property
    def name(self):
        """Its name in verdicts, the same in every replicate."""
        return self.spec.name(self.kl_coef)

    def is_plain_anchor_of(self, other):
        """Whether it is what another policy is compared with; without a penalty, it is so at all kl_coefs."""
        same_kl_coef = self.kl_coef == other.kl_coef or not self.spec.penalised
        return self.plain and training_of(self.spec) == training_of(other.spec) and same_kl_coef

    def described(self):
        """What the settings of a study say of it."""
        return {"arm": self.arm, "alpha": self.alpha, "kl_coef": self.kl_coef, "name": self.name}


def policies(composed):
    """The policies of a replicate (`Policy`), one for each specification and kl_coef."""
    study = composed.config
    return [
        Policy(
            arm=names[0],
            spec=spec,
            kl_coef=kl_coef,
            plain=spec == plain_spec(study, *training_of(spec)),
            alpha=_alpha_of(spec, study),
            replicates=_at(kl_coef, replicates_of([composed.arms[name] for name in names], study), study),
        )
        for spec, (names, kl_coefs) in specs(composed).items()
        for kl_coef in kl_coefs
    ]


def _at(kl_coef, replicates, study):
    """Those of an arm's replicates in which it is run at a kl_coef."""
    if study.grid_replicates is None or kl_coef == study.claim_kl_coef:
        return replicates
    grid = study.replicates[: study.grid_replicates]
    return tuple(number for number in replicates if number in grid)


def training_of(spec):
    """What trains a policy and for how long, by which it has its plain anchor: (algorithm, iterations_scale)."""
    return spec.algorithm, spec.iterations_scale


def replicates_of(arms, study):
    """The study's replicates in which one of several arms is run."""
    wanted = set()
    for arm in arms:
        chosen = arm.replicates
        if not isinstance(chosen, list):  # the first so many, or all
            chosen = study.replicates[:chosen]
        wanted.update(chosen)
    return tuple(number for number in study.replicates if number in wanted)


def as_ingredient(composed, arm, kl_coef, seed=0):
    """The policy of an arm that another, at some kl_coef and training seed, is made of: that at the same, or its only.

    Raises UserError where the arm has several, and none at this kl_coef or seed, or where its policy is no model.
    """
    if draws(composed.arms[arm], composed.config) > 1:
        raise UserError(f"{POLICY}{arm}: chooses among responses, and has no weights of its own; name another arm")
    spec = spec_of(composed.arms[arm], composed.config)
    if seed_of(spec, composed.config, seed) is None:
        count = seeds(spec, composed.config)
        raise UserError(
            f"{POLICY}{arm}: is needed at training seed {seed}, and is trained with {count} seeds; give the algorithms "
            f"of both as many ({spec.algorithm}.seeds)"
        )
    trained = [policy for policy in policies(composed) if policy.spec == spec]
    for policy in trained:
        if policy.kl_coef == kl_coef or len(trained) == 1:
            return policy
    at = ", ".join(number_label(policy.kl_coef) for policy in trained)
    raise UserError(
        f"{POLICY}{arm}: is needed at kl_coef {number_label(kl_coef)}, and trained at {at}; "
        f"give both arms the same kl_coefs (arms.{arm}.kl_coefs)"
    )


def claimed(composed):
    """Candidate -> the set of baselines: the pairs of policies that a claim reads verdicts on.

    Both are at the kl_coef of claims, or where that is chosen after training, at the same one; a policy without a
    penalty goes with all. Left out are those that are compared anyhow: a policy and its plain anchor.
    """
    study, every, pairs = composed.config, policies(composed), {}
    for claim in study.claims.values():
        if claim.measure in JUDGED and {claim.candidate, claim.baseline} <= composed.arms.keys():
            first, second = (spec_of(composed.arms[arm], study) for arm in (claim.candidate, claim.baseline))
            candidates, baselines = ([policy for policy in every if policy.spec == spec] for spec in (first, second))
            for one in candidates:
                pairs.setdefault(one, set()).update(other for other in baselines if _meet(one, other, study))
    return pairs


def _meet(one, other, study):
    """Whether claims may compare two policies at their kl_coefs, and nothing else does."""
    at = {policy.kl_coef for policy in (one, other) if policy.spec.penalised}
    anchored = one.is_plain_anchor_of(other) or other.is_plain_anchor_of(one)
    return one != other and not anchored and len(at) < 2 and study.claim_kl_coef in (None, *at)


def plain_arms(composed):
    """Arm -> the plain anchor with which it is compared, of its algorithm and time; None: the study has none."""
    arms = {training_of(policy.spec): policy.arm for policy in policies(composed) if policy.plain}
    specs_of_arms = {name: spec_of(arm, composed.config) for name, arm in composed.arms.items()}
    return {name: arms.get(training_of(spec)) for name, spec in specs_of_arms.items()}


def _alpha_of(spec, study):
    if replace(spec, weights=SFT0) != plain_spec(study, DEFAULT) or not {"sft0", "sft1"}.issuperset(dict(spec.weights)):
        return None
    return decimal_text(weight_of("sft1", spec.weights))
