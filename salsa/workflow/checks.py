"""What a configuration may not be as a whole: rules between its sections, and what the machine has to have.

A section's own rules stand beside its settings, in `salsa.workflow.config`. Packages, files and folders are looked at
here, so that what a stage would lack is said while planning. All refusals are a `UserError` of one line.
"""

import hashlib
import importlib.util
import re
from pathlib import Path

from salsa import algorithms, anchors, data, judges
from salsa.data import sources
from salsa.rl import folders
from salsa.workflow import bounds, crossing, designs, ingredients, jobs, policies, regimes, runs, schema, yaml_files
from salsa.workflow.config import Arm, changed
from salsa.workflow.messages import UserError

TEMPLATES = Path(data.__file__).parent / "templates"
MOST_POLICIES = 5000  # of a study: its plan takes a minute
LAUNCHED = ("MULTI_GPU", *jobs.SHARDED)  # for which `accelerate launch` starts several processes
TAKEN = re.compile(r"sft\d+|soup|alpha_\d.*", re.IGNORECASE)
UNNAMED = Arm()  # whose penalty is as it is where an arm says nothing of it
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def check(config):
    """Refuse what every section allows and no run can honour. UserError, one line: what, where, what to do."""
    for rule in (
        _check_axes,
        _check_names,
        ingredients.check,
        regimes.check,
        _check_arms,
        _check_execution,
        _check_data,
        _check_sizes,
    ):
        rule(config)
    _check_regimes(config)
    _check_plane(config)
    _check_model(config)
    _check_other_models(config)
    arms = policies.expanded_arms(config)
    _check_objective(config, arms)
    composed = policies.Composed(config, arms)
    ingredients.check_policies(composed)
    designs.check(composed)
    _check_names_differ(composed)


def _check_regimes(config):
    """Hold the recipe of each regime to the rules that the study's own is held to."""
    for name, regime in config.regimes.items():
        ingredients.check_demonstrations(f"regimes.{name}.task", regime.task, config.data)
    for key, recipe in regimes.recipes(config).items():
        try:
            for rule in (_check_execution, _check_sizes, _check_rows):
                rule(recipe)
            _check_task(recipe.data.task)
        except UserError as error:
            raise UserError(f"{key}: {error}") from None


def _check_task(task):
    data.record(task).check(task)


def _check_names(config):
    """Refuse names that mean something else in tables, files or runs."""
    for name in config.arms:
        if TAKEN.fullmatch(name):
            raise UserError(f"arms.{name}: the name of an SFT model, a soup or an alpha; give the arm another")
    for group in ("arms", "benchmarks", "judges"):
        seen = {}
        for name in getattr(config, group):
            other = seen.setdefault(name.lower(), name)
            if other != name:
                raise UserError(f"{group}.{name}: differs from {other} in capitals alone; give it another name")
    if "evaluation" in config.benchmarks:
        raise UserError("benchmarks.evaluation: the name of the development prompts; give the benchmark another")


def _check_axes(config):
    for axis in ("replicates", "kl_coefs"):
        values = getattr(config, axis)
        _check_once_each(axis, values, [f"{value:.6g}" for value in values])  # as tables show them
        if not values:
            raise UserError(
                f"{axis} is empty; give at least one, such as {axis}=[{0 if axis == 'replicates' else 0.05}]"
            )
    subsets = {"alpha_kl_coefs": config.alpha_kl_coefs}
    subsets |= {f"algorithm_kl_coefs.{name}": subset for name, subset in config.algorithm_kl_coefs.items()}
    subsets |= {f"arms.{name}.kl_coefs": arm.kl_coefs for name, arm in config.arms.items()}
    for key, subset in subsets.items():
        if subset is not None:
            _check_once_each(key, subset, subset)
            others = [kl_coef for kl_coef in subset if kl_coef not in config.kl_coefs]
            if others:
                raise UserError(f"{key}: {others[0]} is not in kl_coefs={config.kl_coefs}; add it there")
            if not subset:
                raise UserError(f"{key} is empty; leave it out for all of kl_coefs")
    for key, alphas in (("alphas", config.alphas), ("evaluate.alphas", config.evaluate.alphas)):
        _check_once_each(key, alphas, [f"{float(bounds.fraction(alpha)):.5f}" for alpha in alphas])
    _check_algorithms(config)
    if config.alphas and config.sft.models < 2:
        raise UserError("alphas: need two SFT models, and sft.models=1; set sft.models=2")
    if not config.arms and not config.alphas:
        raise UserError("arms and alphas are empty: nothing to train; choose arms with arm=[ppo,salsa]")
    ways = len(config.arms) + len(config.alphas)
    seeds = max(getattr(config, name).seeds for name in algorithms.kinds())
    policies = max(ways * len(config.kl_coefs) * seeds, config.sft.models) * len(config.replicates)
    if policies > MOST_POLICIES:
        raise UserError(
            f"arms, alphas, kl_coefs, seeds, replicates and sft.models ask for up to {policies} models, and a study "
            f"may have {MOST_POLICIES}; leave some out"
        )


def _check_algorithms(config):
    training = crossing.chosen(config)
    for name in config.algorithm_kl_coefs:
        if name not in training:
            raise UserError(f"algorithm_kl_coefs.{name}: is none of algorithm=[{','.join(training)}]; leave it out")
    if config.alphas and algorithms.DEFAULT not in training:
        raise UserError(f"alphas: are trained by {algorithms.DEFAULT}; add it to algorithm=[…], or give alphas=[]")


def _check_once_each(key, given, values):
    if len(set(values)) < len(values):
        raise UserError(f"{key}={bounds.shown(given)}: a value stands there twice; leave one out")


def _check_arms(config):
    for name, arm in config.arms.items():
        trained_by = policies.algorithm_of(arm)
        training = policies.section(config, trained_by)
        _check_penalty(f"arms.{name}", arm)
        if arm.kl_schedule and training.kl_schedule is None:
            raise UserError(f"arms.{name}.kl_schedule: {trained_by} has none, its kl_coef is fixed; leave it out")
        _check_reference(f"arms.{name}.reference", arm.reference, training, f"{trained_by}.lora_rank")
        _check_words(anchors.kinds()[arm.reference.kind], arm.reference)
        algorithm = algorithms.kinds()[trained_by]
        if arm.iterations_scale != 1 and not issubclass(algorithm.settings, schema.OnPolicy):
            raise UserError(f"arms.{name}.iterations_scale: {trained_by} has no iterations; leave it out")
        if isinstance(training, schema.OnPolicy):
            designs.check_iterations(f"arms.{name}", arm, training)
        _check_words(algorithm, training)
        try:
            algorithm.check_arm(f"arms.{name}", arm, config)
        except ValueError as error:
            raise UserError(str(error)) from None


def _check_penalty(key, arm):
    """Refuse an arm that names a reference, a strength or an order of prompts where its algorithm reads none."""
    if algorithms.kinds()[policies.algorithm_of(arm)].penalised:
        return
    for setting in ("reference", "kl_scale", "kl_schedule", "kl_coefs", "seed"):
        if getattr(arm, setting) != getattr(UNNAMED, setting):
            raise UserError(f"{key}.{setting}: not read with algorithm={policies.algorithm_of(arm)}; leave it out")


def _check_words(record, settings):
    """Refuse a kind whose words for its settings fail: the report, which says them, comes after all training."""
    try:
        record.words(settings)
    except Exception as error:
        raise UserError(f"the words of kind {record.kind} fail ({error}); mend its file") from error


def _check_reference(key, reference, training, lora_rank):
    """Refuse a reference that can't be made, or can't move."""
    kind = anchors.kinds()[reference.kind]
    try:
        kind.check(key, reference, training)
    except ValueError as error:
        raise UserError(str(error)) from None
    if kind.moves and training.lora_rank:
        raise UserError(
            f"{key}.kind={kind.kind}: a moving reference follows all weights, and {lora_rank}={training.lora_rank} "
            f"trains adapters; set {lora_rank}=0 or leave the arm out"
        )


def _check_execution(config):
    execution, training = config.execution, _training(config)
    for name, section in training.items():
        try:
            algorithms.kinds()[name].check(section, execution)
        except ValueError as error:
            raise UserError(str(error)) from None
    for stage, section in {**_sft_sections(config), "reward_model": config.reward_model}.items():
        batch_size = section.batch_size
        if batch_size % execution.processes:
            raise UserError(
                f"execution.processes={execution.processes}: cannot share {stage}.batch_size="
                f"{batch_size} evenly; change one of them"
            )
    if execution.rollouts == "vllm":
        _check_installed("vllm", "vllm", "execution.rollouts=vllm")
        for name, section in training.items():
            if section.lora_rank and not algorithms.kinds()[name].takes_pairs:  # which samples nothing from its policy
                adapters = f"{name}.lora_rank={section.lora_rank}"
                raise UserError(f"{adapters}: execution.rollouts=vllm samples from whole models; leave one of them out")
    for stage, section in _adapted(config).items():
        _check_installed("peft", "lora", f"{stage}.lora_rank={section.lora_rank}")
    if execution.accelerate_config:
        _check_accelerate(config)
    for tracker in execution.trackers:
        if importlib.util.find_spec(tracker) is None:
            raise UserError(f"execution.trackers: {tracker} is not installed; pip install {tracker}, or leave it out")
    _check_once_each("execution.trackers", execution.trackers, execution.trackers)


def _training(config):
    """Algorithm -> its section, of those that train a policy of the study."""
    return {name: policies.section(config, name) for name in policies.algorithms_of(policies.expanded_arms(config))}


def _sft_sections(config):
    """Key -> section, of the recipes by which SFT models are trained: the study's, and those of its variants."""
    variants = config.sft_variants.items()
    return {"sft": config.sft} | {f"sft_variants.{name}.sft": changed(config.sft, each.sft) for name, each in variants}


def _adapted(config):
    """Stage -> its section, of those that train low-rank adapters."""
    sections = {**_sft_sections(config), "reward_model": config.reward_model, **_training(config)}
    return {stage: section for stage, section in sections.items() if section.lora_rank}


def _check_accelerate(config):
    """Refuse a configuration of Accelerate that isn't there, or that the study's runs don't go with."""
    execution, path = config.execution, config.execution.accelerate_config
    key = f"execution.accelerate_config={path}"
    if not Path(path).is_file():
        raise UserError(f"{key}: no such file; `accelerate config` writes one")
    yaml_files.check(path)
    kind = jobs.distributed_type(path)
    if execution.processes > 1 and kind not in LAUNCHED:
        raise UserError(
            f"{key}: its distributed_type is {kind}, which starts one process, and execution.processes="
            f"{execution.processes}; it may be {', '.join(LAUNCHED)}"
        )
    if kind == "DEEPSPEED":
        _check_installed("deepspeed", "deepspeed", key)
    if kind == "FSDP" and not re.search(r"(?m)^\W*fsdp_version\W+2", Path(path).read_text(encoding="utf-8")):
        raise UserError(f"{key}: FSDP's first version is not supported; set fsdp_version: 2 in it")
    kinds = anchors.kinds()
    moving = [f"the arm {name}" for name, arm in config.arms.items() if kinds[arm.reference.kind].moves]
    whole = moving + ["execution.rollouts=vllm"] * (execution.rollouts == "vllm")
    whole += [f"{stage}.lora_rank" for stage in _adapted(config)]
    if kind in jobs.SHARDED and whole:
        raise UserError(f"{key}: {kind} shares weights out, and {whole[0]} needs them whole; leave one out")


def _check_installed(package, extra, setting):
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{setting}: needs {package}, of the extra salsa[{extra}]; pip install -e '.[{extra}]'")


def _check_data(config):
    section = config.data
    kind = section.task.kind
    world, offered = data.world_kinds()[kind], data.benchmark_kinds(kind)
    for name, benchmark in config.benchmarks.items():
        if benchmark.kind not in offered:
            raise UserError(
                f"benchmarks.{name}: data={section.name} has no benchmark {benchmark.kind}; "
                f"choose among {', '.join(offered)} with benchmark=[…]"
            )
    for name, judge in config.judges.items():
        fitting = judges.kinds(kind)
        if judge.kind not in fitting:
            raise UserError(
                f"judges.{name}: data={section.name} cannot be judged by {judge.kind}; "
                f"choose {', '.join(fitting)} with judge=[…]"
            )
        fitting[judge.kind].check(f"judges.{name}", judge)
    if section.preferences == "sampled" and not world.gold:
        raise UserError(f"data.preferences=sampled: data={section.name} has no gold to label them; use given")
    if section.preferences == "sampled" and config.sft.models < 2:
        raise UserError("data.preferences=sampled: pairs are drawn from two SFT models; set sft.models=2")
    if section.preferences == "given" and world.preferences != "given":
        raise UserError(f"data.preferences=given: data={section.name} comes without preferences; use sampled")
    if config.model.source == "pretrain" and section.corpus.kind == "none":
        raise UserError(
            f"model={config.model.name} is pretrained by the project, and data={section.name} has no corpus; "
            "choose another model, or set data.corpus.kind and data.corpus.documents"
        )


def _largest_batch(config):
    """(setting and value, the value): of a study's algorithms, the largest number of prompts that one takes at once."""
    sizes = {
        f"{name}.batch_size" + f" / {name}.samples" * (section.samples > 1): section.batch_size // section.samples
        for name, section in _training(config).items()
        if not algorithms.kinds()[name].takes_pairs
    }
    named = {f"{setting}={size}": size for setting, size in sizes.items()}
    return max(named.items(), key=lambda item: item[1], default=("one prompt", 1))


def _check_sizes(config):
    """Sizes against each other, where they are exact: what is too small is known before anything is made."""
    task, reward_model, (batch, size) = config.data.task, config.reward_model, _largest_batch(config)
    if 0 < task.preferences <= reward_model.held_out:
        raise UserError(
            f"data.task.preferences={task.preferences}: no more than reward_model.held_out="
            f"{reward_model.held_out}, so that none is left to train on; change one"
        )
    if 0 < task.prompts < max(2, size):
        raise UserError(
            f"data.task.prompts={task.prompts}: fewer than {batch}, or than the two that a reward's deviation takes; "
            "change one"
        )
    worlds = data.world_kinds()
    if not worlds[task.kind].exact:
        return
    for size, smallest, needed in (
        ("prompts", 1, "training"),
        ("preferences", reward_model.held_out + 1, "reward_model.held_out and a pair to train on"),
        ("demonstrations", 1, "SFT"),
        ("validation", 1, "SFT and the landscape"),
        ("evaluation", 1, "reported KL and rewards"),
    ):
        given = {f"data.task.{size}": getattr(task, size)}
        variants = config.sft_variants.items()
        given |= {f"sft_variants.{name}.task.{size}": each.task[size] for name, each in variants if size in each.task}
        for key, rows in given.items():
            if rows < smallest:
                raise UserError(f"{key}={rows}: at least {smallest} are needed by {needed}; give more")
    for name, benchmark in config.benchmarks.items():
        if data.benchmark_kinds()[benchmark.kind].exact and benchmark.prompts < 1:
            raise UserError(f"benchmarks.{name}.prompts={benchmark.prompts}: generated, so it must be at least 1")
    corpus = config.data.corpus
    if config.model.source == "pretrain" and worlds[corpus.kind].exact and not corpus.documents:
        raise UserError("data.corpus.documents=0: nothing to pretrain on; give some, such as 30000")


def _check_plane(config):
    plane, key = config.evaluate.plane, "evaluate.plane"
    _check_once_each(f"{key}.arms", plane.arms, plane.arms)
    for arm in plane.arms:
        if arm not in config.arms:
            raise UserError(f"{key}.arms: {arm} is no arm of this study; it has {', '.join(config.arms)}")
        if policies.draws(config.arms[arm], config) > 1:
            raise UserError(f"{key}.arms: {arm} chooses among responses, and has no weights of its own; leave it out")
    if plane.arms and config.sft.models < 2:
        raise UserError(f"{key}.arms={plane.arms}: a plane needs two SFT models; set sft.models=2, or {key}.arms=[]")
    if plane.kl_coef is not None and plane.kl_coef not in config.kl_coefs:
        raise UserError(f"{key}.kl_coef: {plane.kl_coef} is not in kl_coefs={config.kl_coefs}; add it there")
    for names, kl_coefs in policies.specs(policies.Composed(config, policies.expanded_arms(config))).values():
        for arm in plane.arms:
            if arm in names and plane.kl_coef not in (None, *kl_coefs):
                at = ", ".join(map(str, kl_coefs))
                raise UserError(
                    f"{key}.kl_coef={plane.kl_coef}: {arm} is run at {at} alone; choose that, or leave the arm out"
                )


def _check_objective(config, arms):
    objective, key = config.objective, "objective"
    if objective.arm and objective.arm not in arms:
        raise UserError(f"{key}.arm={objective.arm}: no arm of this study; it has {', '.join(arms)}")
    if objective.kl_coef is not None and objective.kl_coef not in config.kl_coefs:
        raise UserError(f"{key}.kl_coef: {objective.kl_coef} is not in kl_coefs={config.kl_coefs}; add it there")


def _check_model(config):
    model = config.model
    template = model.chat_template
    if template is not None and not (TEMPLATES / f"{template}.jinja").is_file():
        templates = sorted(path.stem for path in TEMPLATES.glob("*.jinja"))
        raise UserError(f"model.chat_template={template}: no such template; there are {', '.join(templates)}, or null")
    if model.source == "pretrain" and model.path:
        raise UserError("model.path: nothing is read with model.source=pretrain; set model.source=hub, or leave it out")
    local = model.source == "hub" and model.path and local_folder(model)
    if model.revision is not None and (local or model.source != "hub"):
        raise UserError(f"model.revision={model.revision}: of a model of the hub alone; leave it out")
    if model.source == "package" and model.dtype != "float32":
        raise UserError(
            f"model.dtype={model.dtype}: a package's GGUF is read as float32; for speed, mixed_precision=bf16"
        )
    if model.source == "pretrain":
        architecture = model.architecture
        if architecture.hidden_size % (2 * architecture.heads):  # rotary positions turn pairs of dimensions
            raise UserError(
                f"model.architecture.hidden_size={architecture.hidden_size}: not divisible by twice "
                f"heads={architecture.heads}; change one"
            )
        _check_length(config.lengths, architecture.max_length, "model.architecture.max_length")
        if config.base.block_length > architecture.max_length:
            raise UserError(
                f"base.block_length={config.base.block_length}: more than "
                f"model.architecture.max_length={architecture.max_length}; make it smaller"
            )
    elif not model.path:
        raise UserError(f"model.path is empty, and model.source={model.source} needs it")
    folder = local_folder(model)
    if folder:
        key, positions = folders.limit(_check_folder(folder, model.pickled_weights))
        if positions:
            _check_length(config.lengths, positions, f"{folder}/config.json's {key}")


def _check_length(lengths, positions, where):
    if lengths.prompt + lengths.response > positions:
        raise UserError(
            f"lengths.prompt={lengths.prompt} and lengths.response={lengths.response} need "
            f"{lengths.prompt + lengths.response} positions, and {where} is {positions}; make them shorter"
        )


def local_folder(model, key="model"):
    """The folder of a local model, or None where its path is a hub id. UserError for a path that is not there."""
    if model.source != "hub":
        return None
    path = Path(model.path).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{key}.path={model.path}: a file, not a model folder; give the folder")
    if model.path.startswith((".", "/", "~")) or not HUB_ID.fullmatch(model.path):
        raise UserError(f"{key}.path={model.path}: no such folder; give a model folder, or a hub id (owner/name)")
    return None


def _other_folders(config):
    """Key -> folder, of the local ones among a study's other models."""
    located = {f"models.{name}": other.model(config) for name, other in config.models.items()}
    found = {key: local_folder(model, key) for key, model in located.items()}
    return {key: folder for key, folder in found.items() if folder}


def _check_other_models(config):
    """Refuse other models that lack something, or that the base model, where it lies on this machine, can't go with."""
    others = _other_folders(config)
    for name, other in config.models.items():
        key = f"models.{name}"
        if key in others and other.revision is not None:
            raise UserError(f"{key}.revision={other.revision}: of a model of the hub alone; leave it out")
        if key in others:
            limit, positions = folders.limit(_check_folder(others[key], other.pickled_weights))
            if positions:
                _check_length(config.lengths, positions, f"{others[key]}/config.json's {limit}")
    base = local_folder(config.model)
    if base:
        ingredients.check_tokenizers(base, others)
    if others:
        ingredients.check_architectures(config, _known_architectures(config, base, others))


def _known_architectures(config, base, others):
    """Name of another model, or "" for the base model -> what is known of its config.json."""
    known = {key.removeprefix("models."): ingredients.architecture(folder) for key, folder in others.items()}
    if base:
        known[""] = ingredients.architecture(base)
    elif config.model.source == "pretrain":
        known[""] = ingredients.pretrained_architecture(config.model.architecture)
    return known


def _check_folder(folder, pickled):
    """The configuration of a local model. UserError where the folder lacks what a model needs."""
    configuration = folders.check(folder, pickled, headers=False)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        raise UserError(f"{folder}: no tokenizer (tokenizer.json); save the model's tokenizer there")
    return configuration


def _check_names_differ(composed):
    """Labels show two decimals: two policies that differ in the third cannot be told apart in tables and figures."""
    seen = set()
    for policy in policies.policies(composed):
        if policy.name in seen:
            raise UserError(f"two arms or alphas are both shown as {policy.name}; remove one")
        seen.add(policy.name)


def content_of_files(config):
    """Run ("prepare", "benchmark/<name>", "base", "corpus", "judge/<name>") -> name -> content of a file it reads.

    Raises UserError for a file that is missing or malformed.
    """
    section = config.data
    content = {"prepare": _checked_files(section.task)}
    for name, benchmark in config.benchmarks.items():
        try:
            content[f"benchmark/{name}"] = _checked_files(benchmark)
        except UserError as error:
            raise UserError(f"benchmarks.{name}: {error}") from None
        _check_turns(name, benchmark, config)
    corpus = sources.contents(section.corpus)
    if corpus and config.model.source == "pretrain":
        text = runs.canonical_json(corpus)
        content["corpus"] = {"sha256": hashlib.sha256(text.encode()).hexdigest()}
    for name, judge in config.judges.items():
        read = judges.find(judge.kind).folders(judge)
        content[f"judge/{name}"] = {setting: _describe_folder(Path(path)) for setting, path in read.items()}
    folder = local_folder(config.model)
    if folder:
        content["base"] = {"path": _describe_folder(folder)}
    for key, folder in _other_folders(config).items():
        content[key.replace("models.", "model/", 1)] = {"path": _describe_folder(folder)}
    for name, variant in config.sft_variants.items():
        try:
            _check_task(changed(section.task, variant.task))
        except UserError as error:
            raise UserError(str(error).replace("data.task.", f"sft_variants.{name}.task.")) from None
    _check_rows(config)
    return {run: files for run, files in content.items() if files}


def _checked_files(settings):
    """Setting's name -> content of each local file that a Task or Benchmark reads, once it is checked."""
    data.record(settings).check(settings)
    return sources.contents(settings)


def _check_rows(config):
    """UserError where local files hold fewer rows of a split than are taken at once; a hub dataset's are not known."""
    task, reward_model, (batch, size) = config.data.task, config.reward_model, _largest_batch(config)
    there = data.world_kinds()[task.kind].sizes(task) or {}
    held_out = f"reward_model.held_out={reward_model.held_out}"
    needs = [
        ("prompts", max(2, size), batch),
        (
            "preferences",
            reward_model.held_out + reward_model.batch_size,
            f"{held_out} and .batch_size={reward_model.batch_size}",
        ),
    ]
    for name, section in _training(config).items():
        if algorithms.kinds()[name].takes_pairs:
            least = reward_model.held_out + section.batch_size
            needs.append(("preferences", least, f"{held_out} and {name}.batch_size={section.batch_size}"))
    for split, smallest, needed in needs:
        if there.get(split, smallest) < smallest:
            file = task.preference_file
            raise UserError(f"{file}: {there[split]} rows for {split}, and {needed} need {smallest}; give more rows")


def _check_turns(name, benchmark, config):
    """UserError where a benchmark has more turns than a judge is shown, or than fit into the model."""
    turns = data.benchmark_kinds()[benchmark.kind].turns(benchmark) or 0
    for judge, settings in config.judges.items():
        most = judges.find(settings.kind).most_turns
        if most is not None and turns > most:
            raise UserError(
                f"benchmarks.{name}: prompts of {turns} turns, and judges.{judge} is shown {most} at most; leave the "
                "benchmark or the judge out"
            )
    response, (where, positions) = config.lengths.response, _positions(config.model)
    # A question has a token at least; how many they have, a stage will see that has the tokenizer.
    if positions and turns > 1 and turns * (1 + response) > positions:
        raise UserError(
            f"benchmarks.{name}: {turns} turns of lengths.response={response} fill all positions of "
            f"{where}={positions}; change one"
        )


def _positions(model):
    """Where it is said how many tokens a model holds, and the number; it is None where only the hub says."""
    if model.source == "pretrain":
        return "model.architecture.max_length", model.architecture.max_length
    folder = local_folder(model)
    key, positions = folders.limit(folders.configuration(folder)) if folder else (None, None)
    return f"{folder}/config.json's {key}", positions


def _describe_folder(folder):
    """`<bytes>:<sha256>` of a model folder: its files' names and contents."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    content = {path.name: sources.describe(path) for path in files}
    total = sum(path.stat().st_size for path in files)
    return f"{total}:{hashlib.sha256(runs.canonical_json(content).encode()).hexdigest()}"
