"""From composed configurations to the runs of one DAG, each addressed by its content.

Pure: it reads no hardware, no results and no stage (only the VERSION in a stage's source), and imports neither torch,
Hydra nor Snakemake. Two studies that share a run share its address, and so its folder. What a run depends on is said
here once: its settings, its parents, and how it is executed.
"""

import graphlib
import hashlib
import re
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path, PurePath
from typing import NamedTuple

from salsa import algorithms, anchors, data, judges, mixes
from salsa.workflow import bounds, config, failures, policies, regimes, runs, schema, stages
from salsa.workflow.bounds import printable
from salsa.workflow.messages import UserError
from salsa.workflow.weights import POLICY, SEED, decimal_text, renamed, soup_words, used, written

LONGEST_LABEL = 200  # characters; a file name holds 255
LONGEST_REASON = 1000  # characters, of what is wrong with a plan file
LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")  # in paths, on command lines and in Snakemake's wildcards alike
SWEEP = "-sweep"  # ends the label of a comparison
NOT_COMPARED = "looks: studies that may end at other looks can't be compared; run one at a time, or give looks=[]"


@dataclass(slots=True)
class Run:
    """One stage, to be executed once.

    Attributes:
        address: the sha256 (hex) of its content, as `runs.execute` computes it.
        settings: the stage's settings dataclass as a dictionary.
        parents: role -> path of the run that plays it.
        execution: `config.Execution` as a dictionary.
        after: paths of runs that should be finished before, though it reads nothing of them.
        overrides: of a study, those of the command that planned it, for its report: another command may give the same
            study, so that they are no part of its address. None: not known.
    """

    stage: str
    label: str
    address: str
    settings: dict
    parents: dict[str, str]
    execution: dict
    replicate: int | None = None
    after: tuple[str, ...] = ()
    overrides: list[str] | None = None


@dataclass
class Plan:
    """The runs of all studies, parents before children, by path (`<stage>/<label>-<12 hex>`) below `results`."""

    results: str
    runs: dict[str, Run] = field(default_factory=dict)
    # name; path, with all replicates; looks, its path at each, of which that is the last; link, below results, or None
    studies: list[dict] = field(default_factory=list)
    comparison: str | None = None  # the path of the run that compares the points of a sweep

    def save(self):
        """Write the plan to `<results>/plans/<12 hex>.json`, named by its content, and return that path."""
        fields = Run.__slots__
        text = runs.canonical_json(
            {
                "results": self.results,
                "runs": {path: {name: getattr(run, name) for name in fields} for path, run in self.runs.items()},
                "studies": self.studies,
                "comparison": self.comparison,
            }
        )
        digest = hashlib.sha256(text.encode(errors=runs.ESCAPED)).hexdigest()
        path = Path(self.results) / "plans" / f"{digest[:12]}.json"
        try:
            if not path.exists():
                runs.write_atomically(path, text)
        except OSError as error:
            if failures.describe(error):
                raise
            folder = printable(repr(self.results))
            raise UserError(f"results={folder}: no folder to write to ({error.strerror}); give another") from None
        return path

    def needed(self, paths):
        """The part of the plan that some of its runs need, with these, in its order."""
        needed, waiting = set(), list(paths)
        while waiting:
            path = waiting.pop()
            if path not in needed:
                needed.add(path)
                waiting += [*self.runs[path].parents.values(), *self.runs[path].after]
        return replace(self, runs={path: run for path, run in self.runs.items() if path in needed})


def results_folder(text):
    """The results folder of a setting, without what names it twice (`a//b/`). UserError where it can't be one.

    Snakemake reads {…} as wildcards and <…> as variables, and the rest would be misunderstood: by a shell that didn't
    expand it, by who expects an object store, by a terminal that obeys it.
    """
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"results={text!r}: names no folder; leave it out, or give results=results")
    unfit = next((sign for sign in text if sign in "{}<>" or printable(sign) != sign), None)
    problem = None
    if unfit:
        problem = f"has {unfit!r} in it, which no results folder can have"
    elif text != text.strip():
        problem = "begins or ends with a space"
    elif text.startswith("~"):
        problem = "~ is expanded by shells alone, where it isn't quoted"
    elif "://" in text:
        problem = "is no folder of this machine, which all stages read and write"
    if problem:
        raise UserError(f"results={text!r}: {problem}; give another folder")
    return str(PurePath(text))


def load(path, only=None):
    """The plan that `Plan.save` wrote; UserError where there is none, or where it is not as `plan` makes them.

    What a plan says becomes folders and command lines, so nothing of it is taken on trust: each run's address is
    computed again from its settings and parents, and its folder follows from that and a label of safe characters.
    `only`: the path of the one run that is wanted, and so looked at.
    """
    again = "plan again (`salsa plan`)"
    try:
        values = runs.read_json(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such plan; `salsa plan` writes one") from None
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); {again}") from None
    except runs.Unreadable:
        raise UserError(f"{path}: not a plan, for it is no JSON; {again}") from None
    try:
        result = Plan(results_folder(values["results"]), {name: Run(**run) for name, run in values["runs"].items()})
        for name, run in result.runs.items():
            if only in (None, name):
                _check_run(name, run, result.runs)
        _check_order(result.runs)
        result.studies = [_loaded_study(study, result) for study in values["studies"]]
        result.comparison = values.get("comparison")
        if result.comparison is not None and result.runs[result.comparison].stage != "comparison":
            raise ValueError(f"{result.comparison} is no comparison")
        return result
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        problem = bounds.printable(f"lacks {error}" if isinstance(error, KeyError) else error)[:LONGEST_REASON]
        raise UserError(f"{path}: not a plan of this version of salsa: {problem}; {again}") from None


def _check_run(path, run, others):
    """ValueError unless a run of a plan file is what `add_run` makes of its settings and parents (among `others`)."""
    if run.stage not in stages.ALL:
        raise ValueError(f"{path}: no stage {run.stage!r}")
    if not LABEL.fullmatch(run.label) or len(run.label) > LONGEST_LABEL:
        raise ValueError(f"{path}: {run.label!r} is no label")
    stage = stages.ALL[run.stage]
    for other in [*run.parents.values(), *run.after]:
        if other not in others:
            raise ValueError(f"{path}: needs {other!r}, which the plan doesn't have")
    try:
        schema.from_dict(stage.settings, run.settings)
        schema.from_dict(config.Execution, run.execution)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from None
    addresses = {role: others[parent].address for role, parent in run.parents.items()}
    digest = runs.address(run.stage, stage.version, run.settings, addresses)
    if digest != run.address:
        raise ValueError(f"{path}: its settings have another address ({digest[:12]})")
    if path != f"{stage.folder}/{run.label}-{digest[:12]}":
        raise ValueError(f"{path!r}: not the folder of {run.label}-{digest[:12]}")
    if not isinstance(run.replicate, int | None):
        raise ValueError(f"{path}: replicate is {run.replicate!r}")
    overrides = run.overrides
    if overrides is not None and not (isinstance(overrides, list) and all(isinstance(o, str) for o in overrides)):
        raise ValueError(f"{path}: overrides are {overrides!r}")


def _check_order(all_runs):
    """ValueError where a run waits for itself. The order of a plan file says nothing: JSON has none."""
    needs = {path: [*run.parents.values(), *run.after] for path, run in all_runs.items()}
    try:
        graphlib.TopologicalSorter(needs).prepare()
    except graphlib.CycleError as error:
        other, path = error.args[1][:2]
        raise ValueError(f"{path}: needs {other!r}, which comes after it") from None


def _loaded_study(values, result):
    """A plan file's entry of a study, as `Plan.studies` holds it. ValueError where it is unsound."""
    name, path, looks, link = (values[key] for key in ("name", "path", "looks", "link"))
    for look in looks:
        if result.runs[look].stage != "study":
            raise ValueError(f"{look} is no study")
    if looks[-1:] != [path]:
        raise ValueError(f"{path} is not the last of its looks")
    if not LABEL.fullmatch(name) or link not in (None, f"studies/{name}"):
        raise ValueError(f"{path}: is linked as {link!r} by the name {name!r}")
    return {"name": name, "path": path, "looks": looks, "link": link}


def plan(studies):
    """The runs of several studies, as one `Plan`.

    Args:
        studies: a list of `policies.Composed`, as `compose.compose` returns it.

    Raises:
        UserError: the studies disagree on the results folder, or it can't be one.
    """
    folders = sorted({composed.config.results for composed in studies})
    if len(folders) > 1:
        raise UserError(f"results: one plan has one results folder, not {' and '.join(folders)}")
    result = Plan(results_folder(folders[0]))
    points = []
    for composed in studies:
        study = _Study(composed, result).add()
        if study["path"] not in {other["path"] for other in result.studies}:
            result.studies.append(study)
        if composed.point and (composed.point, study) not in points:
            points.append((composed.point, study))
    result.comparison = _add_comparison(points, result)
    return result


def _add_comparison(points, result):
    """The path of the run that compares the studies of a sweep's points; None where they are not several."""
    paths = [study["path"] for _, study in points]
    if len(set(paths)) < 2:
        return None
    if any(has_looks(study) for _, study in points):
        raise UserError(NOT_COMPARED)
    settings = {"points": [point for point, _ in points]}
    parents = {f"study/{place}": path for place, path in enumerate(paths)}
    label = "+".join(dict.fromkeys(study["name"] for _, study in points))[: LONGEST_LABEL - len(SWEEP)] + SWEEP
    return add_run(result, "comparison", label, settings, parents, schema.dump(config.Execution()))


def has_looks(study):
    """Whether a study, a plan's entry, may end before its last replicate."""
    return len(study["looks"]) > 1


def add_run(result, stage, label, settings, parents, execution, replicate=None, after=()):
    """Add a run to the plan `result`, unless it is there; returns its path."""
    addresses = {role: result.runs[path].address for role, path in parents.items()}
    digest = runs.address(stage, stages.ALL[stage].version, settings, addresses)
    label = label[:LONGEST_LABEL]  # for people alone: the digest after it tells runs apart
    path = f"{stages.ALL[stage].folder}/{label}-{digest[:12]}"
    if path not in result.runs:  # of another study or arm, which asks for the same
        result.runs[path] = Run(stage, label, digest, settings, parents, execution, replicate, after)
    return path


def _adapters(settings):
    """Settings of a stage that may train adapters: without them their alpha is not read, and has its default."""
    # What a run doesn't read must not enter its address, or the same would be trained twice.
    if settings.lora_rank or not hasattr(settings, "lora_alpha"):
        return settings
    return replace(settings, lora_alpha=schema.Adapters.lora_alpha)


def _of_one_seed(section):
    """The section of an algorithm as one training run reads it: how often others are trained changes none."""
    return replace(section, seeds=schema.Seeded.seeds) if isinstance(section, schema.Seeded) else section


class _Study:
    """Adds the runs of one study to a plan. Each `add_…` returns the path of the run."""

    def __init__(self, composed, result):
        self.config, self.files, self.link, self.result = composed.config, composed.files, composed.link, result
        self.execution, self.composed = schema.dump(self.config.execution), composed
        self.policies, self.claimed = policies.policies(composed), policies.claimed(composed)
        self.prepare = self.add_prepare()
        kinds = [data.benchmark_kinds()[benchmark.kind] for benchmark in self.config.benchmarks.values()]
        self.judges = self.config.judges if any(kind.compared for kind in kinds) else {}
        self.benchmarks = {f"benchmark/{name}": self.add_benchmark(name) for name in self.config.benchmarks}
        self.base = self.add_base()
        # A model with another tokenizer is refused before anything is trained.
        self.models = tuple(map(self.add_model, self.config.models))

    def add(self):
        """Add the other runs of the study; returns its entry in the plan's list of studies."""
        members, parents, looks = [], {"prepare": self.prepare}, []
        for count, number in enumerate(self.config.replicates, 1):
            _Replicate(self, number).add(members, parents)
            if count in self.config.looks or count == len(self.config.replicates):
                looks.append(self.add_study(count, members, parents))
        return {"name": self.config.name, "path": looks[-1], "looks": looks, "link": self.link}

    def add_study(self, count, members, parents):
        """The run that reports on the first `count` replicates: each look is a study of its own, of what is shared."""
        described = self.described()
        described["replicates"] = described["replicates"][:count]
        label = f"{self.config.name}-{count}replicates" if self.config.looks else self.config.name
        path = self.add_run("study", label, config.StudySettings(described, list(members)), dict(parents))
        run = self.result.runs[path]
        if run.overrides is None:  # else another point of the sweep is this study too
            run.overrides = self.composed.overrides
        return path

    def add_run(self, stage, label, settings, parents, replicate=None, after=(), alone=False):
        """`add_run`, of a stage's settings as its dataclass; `alone`: in one process, of a stage that may share."""
        execution = self.execution
        if alone:
            execution = execution | {"processes": 1, "gpus": min(1, execution["gpus"]), "accelerate_config": ""}
        return add_run(self.result, stage, label, schema.dump(settings), parents, execution, replicate, after)

    def add_prepare(self, changes=()):
        """The run that makes demonstrations, preferences and prompts, or other ones for other SFT models."""
        task = config.changed(self.config.data.task, dict(changes))
        files = self.files_of("prepare")  # other demonstrations are of the same files
        return self.add_run("prepare", self.config.data.name, config.PrepareSettings(task, files), {})

    def files_of(self, run):
        """Name -> content of the local files that a run reads."""
        return self.files.get(run, {})

    def add_benchmark(self, name):
        """The run that makes a benchmark's prompts."""
        section, benchmark = self.config.data, self.config.benchmarks[name]
        files = self.files_of("prepare") | self.files_of(f"benchmark/{name}")
        settings = config.BenchmarkSettings(name, benchmark, section.task, files)
        return self.add_run("benchmark", f"{section.name}-{name}", settings, {"prepare": self.prepare})

    def add_base(self):
        """The run that makes or takes the base model, after its corpus."""
        model, corpus = self.config.model, self.config.data.corpus
        if model.source != "pretrain":
            return self.add_run("base", model.name, config.BaseSettings(model, files=self.files_of("base")), {})
        content = config.CorpusSettings(corpus, self.files_of("corpus").get("sha256", ""))
        parents = {"corpus": self.add_run("corpus", corpus.kind, content, {})}
        settings = config.BaseSettings(model, self.config.base, self.files_of("base"))
        return self.add_run("base", f"{model.name}-{corpus.kind}", settings, parents)

    def add_model(self, name):
        """The run that takes in another model, and holds its tokenizer to that of the base model."""
        model = self.config.models[name].model(self.config)
        settings = config.BaseSettings(model, files=self.files_of(f"model/{name}"))
        return self.add_run("base", model.name, settings, {"base": self.base})

    @property
    def largest_kl_coef(self):
        """The largest weight of a penalty in standard deviations of reward; None where there is none, or no limit."""
        paid = [policy for policy in self.policies if self.pays_deviations(policy.spec.algorithm)]
        if any(policy.spec.kl_schedule.kind == "adaptive" for policy in paid):  # which may raise it
            return None
        return max((policy.spec.kl_coef(policy.kl_coef) for policy in paid), default=None)

    def pays_deviations(self, algorithm):
        """Whether what an algorithm pays, and the penalty in it, are in standard deviations of reward."""
        return algorithms.kinds()[algorithm].pays_deviations(policies.section(self.config, algorithm))

    def described(self):
        """The configuration as the report shows it: without what is execution only, and local files by name."""
        left_out = {"execution", "results", "companions", "objective"}
        # A section that no arm reads is no part of the study, so that a new algorithm changes no study's address.
        left_out |= {*config.ALGORITHMS} - {policy.spec.algorithm for policy in self.policies}
        values = {key: value for key, value in schema.dump(self.config).items() if key not in left_out}
        parts = {"prepare": values["data"]["task"], "base": values["model"]}
        parts |= {f"benchmark/{name}": benchmark for name, benchmark in values["benchmarks"].items()}
        parts |= {f"model/{name}": model for name, model in values.get("models", {}).items()}
        for part, settings in parts.items():
            for name in self.files_of(part):
                if settings.get(name):
                    settings[name] = Path(settings[name]).name
        return values


class Trained(NamedTuple):
    """A policy of a replicate and its training seed, with the paths of the runs that train it and let it answer."""

    policy: policies.Policy
    seed: int
    run: str
    respond: str

    @property
    def name(self):
        """Its name in verdicts."""
        return self.policy.name


class _Replicate:
    """Adds the runs of one replicate: SFT models that differ in their seed alone, and all that follows from them."""

    def __init__(self, study, number):
        self.study, self.number = study, number
        self.regime = regimes.of_replicate(study.config, number)
        self.config = regimes.recipe(study.config, self.regime)
        self.label = f"{self.config.model.name}-{self.config.data.name}-r{number}"
        self.policies = [policy for policy in study.policies if number in policy.replicates]
        self.common = {"lengths": self.config.lengths, "mixed_precision": self.config.mixed_precision}
        # How many other SFT models there are, changes none.
        self.alone = _adapters(replace(self.config.sft, models=config.Sft.models))
        self.sft = [self.add_sft(index, self.alone) for index in range(self.sft_models())]
        self.sft_pair = {f"sft{i}": path for i, path in enumerate(self.sft[:2])}
        self.reward_model = self.add_reward_model(self.label, 0, "")
        self.scorer = None  # the reward model of a judge: other preferences, another seed
        if any(judges.find(judge.kind).scorer for judge in self.config.judges.values()):
            self.scorer = self.add_reward_model(f"{self.label}-judge", 1, "_for_judge")
        self.landscape = self.add_landscape() if len(self.sft) > 1 else None
        self.gates = self.add_gates() if self.landscape else None
        self.trained = {}  # (policies.Policy, training seed) -> Trained

    @property
    def parents(self):
        """What most runs of a replicate read."""
        return {"prepare": self.study.prepare, "reward_model": self.reward_model}

    def add(self, members, parents):
        """Add the policies and what is made of them.

        Appends the policies to `members` and to `parents` the runs that the study reads.
        """
        parents[f"reward_model/r{self.number}"] = self.reward_model
        if self.landscape:
            parents |= {f"landscape/r{self.number}": self.landscape, f"gates/r{self.number}": self.gates}
        for seed in range(max((policies.seeds(policy.spec, self.config) for policy in self.policies), default=0)):
            trained = [self.add_policy(policy, seed) for policy in self.policies if self.has(policy, seed)]
            for one in trained:
                if one.seed == seed:  # a policy of a single seed is compared with all, and a member once
                    self.add_member(one, trained, members, parents)

    def has(self, policy, seed):
        """Whether there is a policy to stand beside those of a training seed."""
        return policies.seed_of(policy.spec, self.config, seed) is not None

    def add_member(self, one, trained, members, parents):
        """Add what is made of a policy; `trained` are the policies to compare it with, itself among them."""
        index = len(members)
        parents |= {f"policy/{index}": one.run, f"respond/{index}": one.respond}
        if self.spans_plane(one):
            parents[f"plane/{index}"] = self.add_plane(one)
        baselines = self.baselines(one, trained)  # judged in one run, which shares the candidate's answers
        for judge in self.study.judges:
            opponents = dict(baselines)
            if self.config.judges[judge].tournament:
                opponents |= self.opponents(one, trained)
            opponents |= self.claimed(one, trained, self.config.judges[judge].tournament)
            if opponents:
                parents[f"judge/{judge}/{index}"] = self.add_judge(judge, one, opponents)
        names = {role: name for role, (name, _, _) in baselines.items()}
        place = {"replicate": self.number, "seed": one.seed, "index": index}
        members.append(one.policy.described() | place | {"baselines": names})

    def baselines(self, one, trained):
        """Role -> (baseline's name, the model whose rows are its responses, the run that has them)."""
        baselines = {}
        if self.landscape:
            baselines["sft0"] = ("sft0", "sft0", self.landscape)
        plain = next((other for other in trained if other.policy.is_plain_anchor_of(one.policy)), None)
        if plain and plain.name != one.name:
            baselines[config.PLAIN] = (plain.name, "policy", plain.respond)
        return baselines

    def opponents(self, one, trained):
        """In a tournament, the policies before this one at its kl_coef, as `baselines` returns them.

        A policy and its plain anchor are left out: they are judged against each other as candidate and baseline.
        """
        at = [other for other in trained if other.policy.kl_coef == one.policy.kl_coef]
        return {
            f"opponent{i}": (other.name, "policy", other.respond)
            for i, other in enumerate(at[: at.index(one)])
            if not other.policy.is_plain_anchor_of(one.policy) and not one.policy.is_plain_anchor_of(other.policy)
        }

    def claimed(self, one, trained, tournament):
        """The policies that claims compare this one with, as `baselines` returns them.

        Those at its kl_coef are left out of a tournament, which compares them anyhow.
        """
        rivals = self.study.claimed.get(one.policy)
        if not rivals:
            return {}
        others = [other for other in trained if other.policy in rivals]
        others = [other for other in others if not (tournament and other.policy.kl_coef == one.policy.kl_coef)]
        return {f"claimed{i}": (other.name, "policy", other.respond) for i, other in enumerate(others)}

    def seed(self, stage, index=0):
        """The replicate's seed of a stage."""
        return runs.derive_seed(self.config.seed, stage, self.number, index)

    def seed_of_training(self, stage, seed, index=0):
        """The replicate's seed of a stage, of policies with one of its training seeds: all arms share it."""
        return self.seed(f"{stage}/{seed}" if seed else stage, index)

    def add_run(self, stage, label, settings, parents, after=(), alone=False):
        return self.study.add_run(stage, label, settings, parents, self.number, after, alone)

    def sft_models(self):
        """How many SFT models are trained: the first two, and those that its policies are made of."""
        read = [index for policy in self.policies for index in policies.sft_models_of(policy.spec, self.config)]
        return min(self.config.sft.models, max([2, *(index + 1 for index in read)]))

    def add_sft(self, index, section, task=(), **recipe):
        """The run that trains one SFT model: by the replicate's recipe, or by that of a variant."""
        settings = config.SftSettings(seed=self.seed("sft", index), sft=section, **self.common, **recipe)
        changes = regimes.demonstrations(self.config, self.regime, index, dict(task))
        prepare = self.study.add_prepare(changes) if changes else self.study.prepare
        parents = {"prepare": prepare, "base": self.study.base}
        return self.add_run("sft", f"{self.label}-s{index}", settings, parents, self.study.models)

    def ingredient(self, name, kl_coef, seed):
        """The path of the run that makes an ingredient; of a trained policy, at the kl_coef and seed that need it."""
        if of_study := SEED.fullmatch(name):
            return self.sft[int(of_study[1])]
        if name in self.config.sft_variants:
            return self.add_variant(name)
        if name in self.config.models:
            return self.study.add_model(name)
        if name in self.config.mixes:
            return self.add_mix(name, kl_coef, seed)
        arm = name.removeprefix(POLICY)
        return self.add_policy(policies.as_ingredient(self.study.composed, arm, kl_coef, seed), seed).run

    def add_variant(self, name):
        """The run that trains an SFT model of another recipe."""
        variant = self.config.sft_variants[name]
        section = _adapters(config.changed(self.alone, variant.sft))
        return self.add_sft(variant.seed, section, variant.task, best_share=variant.best_share)

    def add_mix(self, name, kl_coef, seed):
        """The run that makes a mix."""
        mix = self.config.mixes[name]
        kind = mixes.kinds()[mix.kind]
        ingredients = self.roles(mixes.roles(mix), kl_coef, seed, kind.by_name(mix))
        roles = {name: role for name, (role, _) in ingredients.items()}
        if len(set(roles.values())) < len(roles):
            raise UserError(f"mixes.{name}: two of {', '.join(sorted(roles))} are one model; name it once")
        changes = {"weights": dict(renamed(mixes.weights_of(mix), roles))}
        if kind.origin(mix):
            changes["origin"] = roles[mix.origin]
        search = {"seed": self.seed("mix"), "lengths": self.config.lengths} if kind.searches else {}
        parents = dict(ingredients.values()) | ({"prepare": self.study.prepare} if kind.searches else {})
        settings = config.MixSettings(replace(mix, **changes), **search)
        return self.add_run("mix", f"{self.label}-{mix.kind}", settings, parents)

    def roles(self, names, kl_coef, seed, by_name=False):
        """Ingredient -> (the role in which runs have it, its path): what it is called changes no address.

        `by_name`: roles are numbered in the order of names, because what is made of them depends on their order.
        """
        paths = {name: self.ingredient(name, kl_coef, seed) for name in sorted(names)}
        ordered = list(dict.fromkeys(path for path in paths.values() if path not in self.sft))
        if not by_name:
            ordered.sort(key=lambda path: self.study.result.runs[path].address)
        roles = {path: f"sft{i}" for i, path in enumerate(self.sft)}
        roles |= {path: f"ingredient{i}" for i, path in enumerate(ordered)}
        return {name: (roles[path], path) for name, path in paths.items()}

    def add_reward_model(self, label, index, preferences):
        """A run that makes a reward model, on preferences that the SFT models' samples or the data give.

        It trains one, or averages several, whose runs are then added before it.
        """
        source = self.config.data.preferences
        settings = config.RewardModelSettings(
            seed=self.seed("reward_model", index),
            preferences=source + preferences,
            reward_model=_adapters(self.config.reward_model),
            **self.common,
        )
        parents = {"prepare": self.study.prepare, "sft0": self.sft[0]}
        if source == "sampled":
            parents |= self.sft_pair
        count = settings.reward_model.models
        if count == 1:
            return self.add_run("reward_model", label, settings, parents)
        members = self.add_members(label, settings, parents)
        # Only the first process would have anything to do: there is nothing to train.
        return self.add_run("reward_model", f"{label}-average{count}", settings, parents | members, alone=True)

    def add_members(self, label, settings, parents):
        """The runs that train the members of an averaged reward model, by their roles in the average's run."""
        alone = replace(settings.reward_model, models=config.RewardModel.models)  # other members change none
        members = {}
        for member in range(settings.reward_model.models):
            own = replace(settings, reward_model=alone, member=member)
            own_label = f"{label}-m{member}" if member else label  # the first is the one of a study of one model
            members[f"reward_model/{member}"] = self.add_run("reward_model", own_label, own, parents)
        return members

    def add_landscape(self):
        """The run that measures the line between the first two SFT models."""
        evaluate = self.config.evaluate
        settings = config.LandscapeSettings(
            seed=self.seed("respond"),  # as the policies answer, so that noise is shared
            alphas=[decimal_text(alpha) for alpha in evaluate.alphas],
            temperature=evaluate.temperature,
            lengths=self.config.lengths,
            samples=evaluate.samples,
        )
        return self.add_run("landscape", self.label, settings, self.parents | self.sft_pair | self.study.benchmarks)

    def add_gates(self):
        """The run that says, of a measured line, whether a study at these kl_coefs can show anything."""
        largest, claimed = self.study.largest_kl_coef, self.config.claim_kl_coef
        settings = config.GatesSettings(self.config.evaluate.gates, largest, None if largest is None else claimed)
        parents = {"landscape": self.landscape, "reward_model": self.reward_model}
        return self.add_run("gates", self.label, settings, parents)

    def add_policy(self, policy, seed):
        """Add the runs that train a policy with a seed, or its only one, and let it answer; returns a `Trained`."""
        seed = policies.seed_of(policy.spec, self.config, seed)
        if (policy, seed) not in self.trained:  # as the ingredient of another, or beside policies of another seed
            self.trained[policy, seed] = self._train(policy, seed)
        return self.trained[policy, seed]

    def _train(self, policy, seed):
        ingredients = self.roles(used(policy.spec.start, policy.spec.weights), policy.kl_coef, seed)
        spec = policy.spec.renamed({name: role for name, (role, _) in ingredients.items()})
        self.check_reference(policy, spec)
        settings = config.TRAINING[spec.algorithm](
            seed=self.seed_of_training("ppo", seed if spec.penalised else 0, spec.seed),  # of every algorithm
            kl_coef=spec.kl_coef(policy.kl_coef),
            start=written(spec.start),
            reference=spec.reference,
            **{spec.algorithm: self.section(spec)},
            **self.common,
        )
        parents = self.parents | dict(ingredients.values())
        if algorithms.kinds()[spec.algorithm].takes_pairs and self.config.data.preferences == "sampled":
            parents |= self.sft_pair
        # Gates are printed before hours of training, so that a study that can show nothing is stopped in time.
        after = (self.gates,) if self.gates else ()
        label = f"{self.label}-{spec.run_label(policy.kl_coef, seed)}"
        run = self.add_run(spec.algorithm, label, settings, parents, after)
        # KL to the reference is measured again on fresh samples, so that it is mixed once more.
        needed = anchors.needed(spec.reference)
        mixed = {role: path for role, path in ingredients.values() if role in needed}
        return Trained(policy, seed, run, self.add_respond(label, mixed, run, seed))

    def check_reference(self, policy, spec):
        """Refuse a reference whose ingredients turn out to be one model (a variant that is sft0)."""
        reference = spec.reference
        try:
            anchors.kinds()[spec.kind].check(f"arms.{policy.arm}.reference", reference, self.section(spec))
        except ValueError as error:
            raise UserError(f"{error} ({soup_words(policy.spec.weights)} is {soup_words(spec.weights)})") from None

    def section(self, spec):
        """The algorithm's settings as they determine a policy, with the arm's own schedule and length."""
        section = _of_one_seed(policies.section(self.config, spec.algorithm))
        if section.kl_schedule is not None:
            section = replace(section, kl_schedule=spec.kl_schedule)
        if spec.iterations_scale != 1:
            section = replace(section, iterations=policies.iterations(spec, section))
        return _adapters(section)

    def add_respond(self, label, mixed, run, seed):
        """The run that lets a policy answer; with other noise for each training seed, whose noise is then averaged."""
        evaluate, own_seed = self.config.evaluate, self.seed_of_training("respond", seed)
        settings = config.RespondSettings(own_seed, evaluate.temperature, self.config.lengths, evaluate.samples)
        parents = self.parents | {"policy": run} | mixed | self.sft_pair | self.study.benchmarks
        return self.add_run("respond", label, settings, parents)

    def spans_plane(self, one):
        """Whether the study wants the plane through a policy: of its first training seed alone."""
        plane, policy = self.config.evaluate.plane, one.policy
        kl_coefs = [other.kl_coef for other in self.study.policies if other.spec == policy.spec]
        return (
            len(self.sft) > 1
            and one.seed == 0
            and policy.arm in plane.arms
            and self.number in self.config.replicates[: plane.replicates]
            and policy.kl_coef == policies.kl_coefs_of(plane.kl_coef, kl_coefs[0])
        )

    def add_plane(self, one):
        """The run that measures the plane through a policy."""
        plane = self.config.evaluate.plane
        settings = config.PlaneSettings(
            seed=self.seed("respond"),
            step=str(Fraction(plane.step)),
            margin=str(Fraction(plane.margin)),
            prompts=plane.prompts,
            lengths=self.config.lengths,
        )
        parents = self.parents | self.sft_pair | {"policy": one.run}
        return self.add_run("plane", self.study.result.runs[one.run].label, settings, parents)

    def add_judge(self, name, one, opponents):
        """The run in which a judge compares a policy with its opponents."""
        judge = self.config.judges[name]
        settings = config.JudgeSettings(
            name=name,
            judge=replace(judge, tournament=False),  # its opponents say so
            replicate=self.number,
            candidate=one.name,
            baselines={opponent: model for opponent, model, _ in opponents.values()},
            files=self.study.files_of(f"judge/{name}"),
            seed=one.seed,
        )
        parents = {"candidate": one.respond} | {f"baseline/{other}": run for other, _, run in opponents.values()}
        kind = judges.find(judge.kind)
        if kind.shown_references:
            parents |= self.study.benchmarks
        if kind.scorer:
            parents["scorer"] = self.scorer
        label = f"{self.label}-{one.name}" + f"-t{one.seed}" * bool(one.seed)
        return self.add_run("judge", f"{label}-{name}", settings, parents)
