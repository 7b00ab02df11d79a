"""What several parts of a report say of a study in the same words: its title, its settings, how to run it again."""

import functools
import re
from pathlib import Path

import jinja2

TEMPLATES = Path(__file__).parent / "templates"

QUESTION = "What should a policy be anchored to while it is trained: the model it started from, or a soup?"

REPORT = {  # heading -> tables and figures, in their order
    "Claims": ("claims", "chosen"),
    "Preferences": ("paper_table", "ablations", "win_rates", "bradley_terry"),
    "Rewards and KL": ("rewards", "frontier", "matched_kl", "over_optimisation"),
    "Training and stability": ("training_curves", "stability", "lengths_and_ends"),
    "The space of weights": ("alpha_curve", "geometry", "plane", "loss_line"),
    "Judges": ("judges", "judge_pairs", "sources"),
}


def title(study):
    return study.config["title"] or study.config["name"]


def facts(study):
    """The settings that a reader needs first: name -> text."""
    settings = study.config
    sft, ppo = settings["sft"], settings["ppo"]
    stop = "the epoch of lowest validation loss" if sft["stop"] == "validation" else "the last epoch"
    return {
        "model and data": f"{settings['model']['name']}, {settings['data']['name']}",
        "arms": ", ".join(study.arms),
        "kl_coef": ", ".join(f"{value:g}" for value in study.kl_coefs),
        "replicates": f"{len(study.replicates)} (each with its own SFT models, reward model and PPO seed)",
        "SFT": f"{sft['models']} models a replicate, {sft['epochs']} epochs, kept: {stop}",
        "PPO": f"{ppo['iterations']} iterations of {ppo['batch_size']} prompts",
        "precision": "float32" if settings["mixed_precision"] == "no" else "float32 weights, bfloat16 arithmetic",
        "benchmarks": ", ".join(study.benchmarks) or "none",
        "judges": ", ".join(settings["judges"]) or "none",
        "root seed": str(settings["seed"]),
    }


def command(study):
    """The command that runs the study again, without values that were overridden."""
    name = study.config["name"]
    override = "" if name == "default" else f' --config overrides="experiment={name}"'
    return f"snakemake --cores all{override}"


def natural(row):
    """Sort key of a row's prompt id: 2 before 10."""
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part)
            for part in re.findall(r"\d+|\D+", str(row["prompt_id"]))]  # fmt: skip


def judge_folders(study, policy):
    """judge -> the folder of its run on a policy's responses."""
    named = {role: role.split("/") for role in study.parents if role.startswith("judge/")}
    return {parts[1]: study.parents[role] for role, parts in named.items() if parts[2] == str(policy.index)}


@functools.cache
def template(name, autoescape):
    """A template of salsa/report/templates; with `autoescape`, what is put into it is text and never markup."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=autoescape,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)
