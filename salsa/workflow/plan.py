"""From composed configurations to the runs of one DAG, each addressed by its content.

Pure: it reads no hardware, no results and no stage (only the VERSION in a stage's source), and imports neither torch,
Hydra nor Snakemake. Two studies that share a run share its address, and so its folder. What a run depends on is said
here once: its settings, its parents, and how it is executed.
"""

import functools
import hashlib
import re
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path, PurePath

from salsa import anchors, data, judges
from salsa.workflow import bounds, config, failures, policies, runs, schema, stages
from salsa.workflow.weights import decimal_text, used

LONGEST_LABEL = 200  # characters; a file name holds 255
LONGEST_REASON = 1000  # characters, of what is wrong with a plan file
LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")  # in paths, on command lines and in Snakemake's wildcards alike
SWEEP = "-sweep"  # ends the label of a comparison


@dataclass(slots=True)
class Run:
    """One stage, to be executed once.

    Attributes:
        address: the sha256 (hex) of its content, as `runs.execute` computes it.
        settings: the stage's settings dataclass as a dictionary.
        parents: role -> path of the run that plays it.
        execution: `config.Execution` as a dictionary.
        after: paths of runs that should be finished before, though it reads nothing of them.
    """

    stage: str
    label: str
    address: str
    settings: dict
    parents: dict[str, str]
    execution: dict
    replicate: int | None = None
    after: tuple[str, ...] = ()


@dataclass
class Plan:
    """The runs of all studies, parents before children, by path (`<stage>/<label>-<12 hex>`) below `results`."""

    results: str
    runs: dict[str, Run] = field(default_factory=dict)
    studies: list[dict] = field(default_factory=list)  # name, path, link (a path below results, or None)
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
            folder = runs.printable(repr(self.results))
            raise runs.UserError(f"results={folder}: no folder to write to ({error.strerror}); give another") from None
        return path


def results_folder(text):
    """The results folder of a setting, without what names it twice (`a//b/`). UserError where it can't be one.

    Snakemake reads {…} as wildcards and <…> as variables, and the rest would be misunderstood: by a shell that didn't
    expand it, by who expects an object store, by a terminal that obeys it.
    """
    if not isinstance(text, str) or not text.strip():
        raise runs.UserError(f"results={text!r}: names no folder; leave it out, or give results=results")
    unfit = next((sign for sign in text if sign in "{}<>" or runs.printable(sign) != sign), None)
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
        raise runs.UserError(f"results={text!r}: {problem}; give another folder")
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
        raise runs.UserError(f"{path}: no such plan; `salsa plan` writes one") from None
    except OSError as error:
        raise runs.UserError(f"{path}: can't be read ({error.strerror}); {again}") from None
    except runs.Unreadable:
        raise runs.UserError(f"{path}: not a plan, for it is no JSON; {again}") from None
    try:
        result = Plan(results_folder(values["results"]), {name: Run(**run) for name, run in values["runs"].items()})
        for name, run in result.runs.items():
            if only in (None, name):
                _check_run(name, run, result.runs)
        result.studies = [_loaded_study(study, result) for study in values["studies"]]
        result.comparison = values.get("comparison")
        if result.comparison is not None and result.runs[result.comparison].stage != "comparison":
            raise ValueError(f"{result.comparison} is no comparison")
        return result
    except runs.UserError as error:
        raise runs.UserError(f"{path}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        problem = bounds.printable(f"lacks {error}" if isinstance(error, KeyError) else error)[:LONGEST_REASON]
        raise runs.UserError(f"{path}: not a plan of this version of salsa: {problem}; {again}") from None


def _check_run(path, run, others):
    """ValueError unless a run of a plan file is what `add_run` makes of its settings and parents (among `others`)."""
    if run.stage not in stages.ALL:
        raise ValueError(f"{path}: no stage {run.stage!r}")
    if not LABEL.fullmatch(run.label) or len(run.label) > LONGEST_LABEL:
        raise ValueError(f"{path}: {run.label!r} is no label")
    stage = stages.ALL[run.stage]
    earlier = list(stages.ALL)[: list(stages.ALL).index(run.stage)]
    for other in [*run.parents.values(), *run.after]:
        if other not in others:
            raise ValueError(f"{path}: needs {other!r}, which the plan doesn't have")
        if others[other].stage not in earlier:  # so that nothing waits for itself
            raise ValueError(f"{path}: needs {other!r}, which comes after it")
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


def _loaded_study(values, result):
    """A plan file's entry of a study, as `Plan.studies` holds it. ValueError where it is unsound."""
    name, path, link = values["name"], values["path"], values["link"]
    if result.runs[path].stage != "study":
        raise ValueError(f"{path} is no study")
    if not LABEL.fullmatch(name) or link not in (None, f"studies/{name}"):
        raise ValueError(f"{path}: is linked as {link!r} by the name {name!r}")
    return {"name": name, "path": path, "link": link}


def plan(studies):
    """The runs of several studies, as one `Plan`.

    Args:
        studies: a list of `policies.Composed`, as `compose.compose` returns it.

    Raises:
        runs.UserError: the studies disagree on the results folder, or it can't be one.
    """
    folders = sorted({composed.config.results for composed in studies})
    if len(folders) > 1:
        raise runs.UserError(f"results: one plan has one results folder, not {' and '.join(folders)}")
    result = Plan(results_folder(folders[0]))
    points = []
    for composed in studies:
        study = _Study(composed, result).add()
        if study["path"] not in {known["path"] for known in result.studies}:
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
    settings = {"points": [point for point, _ in points]}
    parents = {f"study/{place}": path for place, path in enumerate(paths)}
    label = "+".join(dict.fromkeys(study["name"] for _, study in points))[: LONGEST_LABEL - len(SWEEP)] + SWEEP
    return add_run(result, "comparison", label, settings, parents, schema.dump(config.Execution()))


def add_run(result, stage, label, settings, parents, execution, replicate=None, after=()):
    """Add a run to the plan `result`, unless it is there; returns its path."""
    addresses = {role: result.runs[path].address for role, path in parents.items()}
    digest = runs.address(stage, stages.ALL[stage].version, settings, addresses)
    label = label[:LONGEST_LABEL]
    path = f"{stages.ALL[stage].folder}/{label}-{digest[:12]}"
    if path not in result.runs:
        result.runs[path] = Run(stage, label, digest, settings, parents, execution, replicate, after)
    return path


def _adapters(settings):
    """Settings of a stage that may train adapters: without them their alpha is not read, and has its default."""
    return settings if settings.lora_rank else replace(settings, lora_alpha=schema.Training.lora_alpha)


class _Study:
    """Adds the runs of one study to a plan. One method a stage; each returns the path of the run."""

    def __init__(self, composed, result):
        self.config = composed.config
        self.files = composed.files
        self.link = composed.link
        self.result = result
        self.execution = schema.dump(self.config.execution)
        self.names = f"{self.config.model.name}-{self.config.data.name}"
        self.policies = policies.policies(composed)

    def add(self):
        """Add every run of the study; returns its entry in the plan's list of studies."""
        self.prepare = self.add_prepare()
        kinds = [data.benchmark_kinds()[benchmark.kind] for benchmark in self.config.benchmarks.values()]
        self.judges = list(self.config.judges) if any(kind.compared for kind in kinds) else []
        self.benchmarks = {f"benchmark/{name}": self.add_benchmark(name) for name in self.config.benchmarks}
        self.base = self.add_base()
        members, parents = [], {"prepare": self.prepare}
        for replicate in self.config.replicates:
            self.add_replicate(replicate, members, parents)
        path = self.add_study(members, parents)
        return {"name": self.config.name, "path": path, "link": self.link}

    def add_run(self, stage, label, settings, parents, replicate=None, after=()):
        """`add_run`; `settings` are a dictionary of values and of dataclasses."""
        settings = schema.dump(settings)
        return add_run(self.result, stage, label, settings, parents, self.execution, replicate, after)

    def seed(self, stage, replicate, index=0):
        return runs.derive_seed(self.config.seed, stage, replicate, index)

    def add_prepare(self):
        data = self.config.data
        settings = {"task": data.task, "files": self.files.get("prepare", {})}
        return self.add_run("prepare", data.name, settings, {})

    def add_benchmark(self, name):
        data = self.config.data
        settings = {
            "name": name,
            "benchmark": self.config.benchmarks[name],
            "task": data.task,
            "files": self.files.get("prepare", {}) | self.files.get(f"benchmark/{name}", {}),
        }
        return self.add_run("benchmark", f"{data.name}-{name}", settings, {"prepare": self.prepare})

    def add_base(self):
        model = self.config.model
        settings = {"model": model, "base": None, "files": self.files.get("base", {})}
        parents = {}
        label = model.name
        if model.source == "pretrain":
            corpus = self.config.data.corpus
            content = {"corpus": corpus, "sha256": self.files.get("corpus", {}).get("sha256", "")}
            parents["corpus"] = self.add_run("corpus", corpus.kind, content, {})
            settings["base"] = self.config.base
            label += f"-{corpus.kind}"
        return self.add_run("base", label, settings, parents)

    def add_replicate(self, replicate, members, parents):
        """Add the runs of a replicate; appends its policies to `members` and the study's parents to `parents`."""
        label = f"{self.names}-r{replicate}"
        sft = [self.add_sft(label, replicate, index) for index in range(self.config.sft.models)]
        reward_model = self.add_reward_model(label, replicate, sft)
        judging = self.add_judging_reward_model(label, replicate, sft)
        landscape = self.add_landscape(label, replicate, sft, reward_model) if len(sft) > 1 else None
        parents[f"reward_model/r{replicate}"] = reward_model
        if landscape:
            parents[f"landscape/r{replicate}"] = landscape
        answered = []
        for policy in self.policies:
            run = self.add_policy(label, replicate, policy, sft, reward_model, landscape)
            answered.append((policy, run, self.add_respond(label, replicate, policy, sft, reward_model, run)))
        plain = {
            (policy["spec"].algorithm, policy["kl_coef"]): (policy["name"], respond)
            for policy, _, respond in answered
            if self.is_plain(policy)
        }
        for policy, run, respond in answered:
            index = len(members)
            parents[f"policy/{index}"] = run
            parents[f"respond/{index}"] = respond
            if len(sft) > 1 and self.spans_plane(policy, replicate):
                parents[f"plane/{index}"] = self.add_plane(label, replicate, policy, sft, reward_model, run)
            baselines = self.baselines(policy, landscape, plain.get((policy["spec"].algorithm, policy["kl_coef"])))
            for judge in self.judges:
                opponents = baselines | self.opponents(judge, policy, answered)
                if opponents:
                    verdicts = self.add_judge(label, replicate, policy, judge, respond, opponents, judging)
                    parents[f"judge/{judge}/{index}"] = verdicts
            members.append(
                {name: policy[name] for name in ("arm", "alpha", "kl_coef", "name")}
                | {"replicate": replicate, "index": index}
                | {"baselines": {role: name for role, (name, _, _) in baselines.items()}}
            )

    def is_plain(self, policy):
        return policy["spec"] == policies.plain_spec(self.config, policy["spec"].algorithm)

    @staticmethod
    def baselines(policy, landscape, plain):
        """Role -> (baseline's name, the model whose rows are its responses, the run that has them)."""
        found = {}
        if landscape:
            found["sft0"] = ("sft0", "sft0", landscape)
        if plain and plain[0] != policy["name"]:
            found[config.PLAIN] = (plain[0], "policy", plain[1])
        return found

    def opponents(self, judge, policy, answered):
        """In a tournament, the policies before this one at its kl_coef, as `baselines` returns them."""
        if not self.config.judges[judge].tournament:
            return {}
        at = [(other, respond) for other, _, respond in answered if other["kl_coef"] == policy["kl_coef"]]
        place = [other["name"] for other, _ in at].index(policy["name"])
        if self.is_plain(policy):  # which is a baseline of all
            return {}
        return {
            f"opponent{i}": (other["name"], "policy", respond)
            for i, (other, respond) in enumerate(at[:place])
            if not self.is_plain(other)
        }

    def add_sft(self, label, replicate, index):
        settings = {
            "seed": self.seed("sft", replicate, index),
            "sft": self.sft,
            "lengths": self.config.lengths,
            "mixed_precision": self.config.mixed_precision,
        }
        parents = {"prepare": self.prepare, "base": self.base}
        return self.add_run("sft", f"{label}-s{index}", settings, parents, replicate)

    @functools.cached_property
    def sft(self):
        """SFT's settings as they determine a model: how many others are trained beside it does not."""
        return _adapters(replace(self.config.sft, models=config.Sft.models))

    def add_reward_model(self, label, replicate, sft):
        return self._reward_model(label, self.seed("reward_model", replicate), "", replicate, sft)

    def add_judging_reward_model(self, label, replicate, sft):
        """The reward model of a judge: other preferences, another seed. None where no judge has one."""
        if not any(judges.find(judge.kind).scorer for judge in self.config.judges.values()):
            return None
        seed = self.seed("reward_model", replicate, 1)
        return self._reward_model(f"{label}-judge", seed, "_for_judge", replicate, sft)

    def _reward_model(self, label, seed, preferences, replicate, sft):
        sampled = self.config.data.preferences == "sampled"
        settings = {
            "seed": seed,
            "preferences": self.config.data.preferences + preferences,
            "reward_model": _adapters(self.config.reward_model),
            "lengths": self.config.lengths,
            "mixed_precision": self.config.mixed_precision,
        }
        parents = {"prepare": self.prepare, "sft0": sft[0]}
        if sampled and len(sft) > 1:
            parents["sft1"] = sft[1]
        return self.add_run("reward_model", label, settings, parents, replicate)

    def add_landscape(self, label, replicate, sft, reward_model):
        settings = {
            "seed": self.seed("respond", replicate),  # as the policies answer, so that noise is shared
            "alphas": [decimal_text(alpha) for alpha in self.config.evaluate.alphas],
            "temperature": self.config.evaluate.temperature,
            "lengths": self.config.lengths,
            "gates": self.config.evaluate.gates,
        }
        parents = {"prepare": self.prepare, "reward_model": reward_model, "sft0": sft[0], "sft1": sft[1]}
        return self.add_run("landscape", label, settings, parents | self.benchmarks, replicate)

    def add_policy(self, label, replicate, policy, sft, reward_model, landscape):
        spec = policy["spec"]
        settings = {
            "seed": self.seed(spec.algorithm, replicate),
            "kl_coef": spec.kl_coef(policy["kl_coef"]),
            "start": list(spec.start),
            "reference": spec.reference,
            spec.algorithm: self.section(spec),
            "lengths": self.config.lengths,
            "mixed_precision": self.config.mixed_precision,
        }
        parents = {"prepare": self.prepare, "reward_model": reward_model}
        parents |= {f"sft{i}": sft[i] for i in used(spec.start, spec.weights)}
        after = (landscape,) if landscape else ()
        name = f"{label}-{spec.run_label(policy['kl_coef'])}"
        return self.add_run(spec.algorithm, name, settings, parents, replicate, after)

    def section(self, spec):
        """The algorithm's settings as they determine a policy: what is not read there has its default."""
        kind, *values = spec.kl_schedule
        schedule = schema.KlSchedule(kind, **dict(zip(policies.SCHEDULES[kind], values, strict=True)))
        return _adapters(replace(policies.section(self.config, spec.algorithm), kl_schedule=schedule))

    def add_respond(self, label, replicate, policy, sft, reward_model, run):
        own = policy["spec"]
        settings = {
            "seed": self.seed("respond", replicate),
            "temperature": self.config.evaluate.temperature,
            "lengths": self.config.lengths,
        }
        parents = {"prepare": self.prepare, "reward_model": reward_model, "policy": run}
        # Where the policy went is said by the first two.
        needed = sorted({*anchors.needed(own.reference), *range(min(2, len(sft)))})
        parents |= {f"sft{i}": sft[i] for i in needed} | self.benchmarks
        return self.add_run("respond", f"{label}-{own.run_label(policy['kl_coef'])}", settings, parents, replicate)

    def spans_plane(self, policy, replicate):
        plane = self.config.evaluate.plane
        kl_coefs = [other["kl_coef"] for other in self.policies if other["spec"] == policy["spec"]]
        return (
            policy["arm"] in plane.arms
            and replicate in self.config.replicates[: plane.replicates]
            and policy["kl_coef"] == policies.kl_coefs_of(plane.kl_coef, kl_coefs[0])
        )

    def add_plane(self, label, replicate, policy, sft, reward_model, run):
        plane = self.config.evaluate.plane
        settings = {
            "seed": self.seed("respond", replicate),
            "step": str(Fraction(plane.step)),
            "margin": str(Fraction(plane.margin)),
            "prompts": plane.prompts,
            "lengths": self.config.lengths,
        }
        parents = {"prepare": self.prepare, "reward_model": reward_model, "sft0": sft[0], "sft1": sft[1], "policy": run}
        name = policy["spec"].run_label(policy["kl_coef"])
        return self.add_run("plane", f"{label}-{name}", settings, parents, replicate)

    def add_judge(self, label, replicate, policy, judge, respond, baselines, judging):
        own = self.config.judges[judge]
        settings = {
            "name": judge,
            "judge": replace(own, tournament=False),  # its opponents say so
            "replicate": replicate,
            "candidate": policy["name"],
            "baselines": {name: model for name, model, _ in baselines.values()},
            "files": self.files.get(f"judge/{judge}", {}),
        }
        parents = {"candidate": respond} | {f"baseline/{name}": run for name, _, run in baselines.values()}
        kind = judges.find(own.kind)
        if kind.shown_references:
            parents |= self.benchmarks
        if kind.scorer:
            parents["scorer"] = judging
        return self.add_run("judge", f"{label}-{policy['name']}-{judge}", settings, parents, replicate)

    def add_study(self, members, parents):
        settings = {"config": self.described(), "policies": members}
        return self.add_run("study", self.config.name, settings, parents)

    def described(self):
        """The configuration as the report shows it: without what is execution only, and local files by name."""
        left_out = {"execution", "results", "companions", "objective"}
        left_out |= {*config.ALGORITHMS} - {policy["spec"].algorithm for policy in self.policies}
        shown = {key: value for key, value in schema.dump(self.config).items() if key not in left_out}
        parts = {"prepare": shown["data"]["task"], "base": shown["model"]}
        parts |= {f"benchmark/{name}": benchmark for name, benchmark in shown["benchmarks"].items()}
        for part, values in parts.items():
            for name in self.files.get(part, {}):
                if values.get(name):
                    values[name] = Path(values[name]).name
        return shown
