"""What several parts of a report say of a study in the same words: its title, its settings, how to run it again.

And how text that people and models wrote becomes part of a page, a table or a figure: `plain` once, where it is read;
`markdown` in Markdown. HTML is escaped by its templates, LaTeX and CSV by `formats`.
"""

import functools
import json
import re
import shlex
import unicodedata
from html import escape as escape_html
from pathlib import Path

import jinja2

from salsa import algorithms
from salsa.evaluate import gates
from salsa.report import judging, selection
from salsa.workflow import policies

TEMPLATES = Path(__file__).parent / "templates"

QUESTION = "What should a policy be anchored to while it is trained: the model it started from, or a soup?"

SAME_STUDY = re.compile(r"\+*(experiment=|companions=|execution\.)")  # overrides that change nothing in a study
FEW_CHANGES = 4  # that a title names

TAGS = range(0xE0000, 0xE1000)  # letters that no font draws, and variation selectors beyond emoji's
BREAKS = "\x85\u2028\u2029"  # what some programs take for the end of a line
TURNS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # bidirectional controls
UNSEEN = "\u00ad\u200b\u2060\ufeff\ufff9\ufffa\ufffb"
MARKUP = {ord(character): f"&#{ord(character)};" for character in "|*`[]~$\\#"}
OUTER = re.compile(r"(?<![^\W_])_|_(?![^\W_])")  # an underscore that is not within a word


@functools.lru_cache(maxsize=100_000)
def plain(text):
    """Text without signs that readers can't see and programs obey: controls, bidirectional and other, and tags.

    Lines and tabs stay; what ends a line in other ways becomes one; half of a surrogate pair becomes U+FFFD. What
    remains is text that UTF-8 can hold, reads in the order in which it is written, and hides nothing.
    """
    if text.isascii() and text.isprintable():
        return text
    text = text.replace("\r\n", "\n").replace("\r", "\n").translate(dict.fromkeys(map(ord, BREAKS), "\n"))
    return "".join(_visible(character) for character in text)


def _visible(character):
    if character in "\n\t":
        return character
    category = unicodedata.category(character)
    if category == "Cs":
        return "\ufffd"
    return "" if category == "Cc" or character in TURNS + UNSEEN or ord(character) in TAGS else character


def cleaned(value):
    """`plain` of all texts in a value of dictionaries and lists, keys included."""
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, list):
        return [cleaned(item) for item in value]
    if isinstance(value, dict):
        return {cleaned(key): cleaned(item) for key, item in value.items()}
    return value


def line(text):
    """Text as one line."""
    return re.sub(r"\s*\n\s*|\t", " ", text).strip() if "\n" in text or "\t" in text else text


def markdown(text):
    """Text that people or models wrote as one line of Markdown which no text can leave: no HTML, markup or pipe."""
    return OUTER.sub("&#95;", escape_html(line(plain(text)), quote=False).translate(MARKUP))


def title(study):
    """The study's title, and what was overridden, so that the points of a sweep are told apart."""
    overridden = changes(study)
    text = ", ".join(overridden[:FEW_CHANGES]) + f" and {len(overridden) - FEW_CHANGES} more" * (
        len(overridden) > FEW_CHANGES
    )
    return (study.config.title or study.config.name) + f" ({text})" * bool(text)


def changes(study):
    """The overrides that make the study another one than its experiment."""
    return [text for text in study.overrides or () if not SAME_STUDY.match(text)]


def facts(study):
    """The settings that a reader needs first: name -> text."""
    settings, sft = study.config, study.config.sft
    trained = {kind: algorithms.kinds()[kind] for kind in policies.algorithms_of(study.composed.arms)}
    stop = "the epoch of lowest validation loss" if sft.stop == "validation" else "the last epoch"
    return {
        "model and data": f"{settings.model.name}, {settings.data.name}",
        "arms": ", ".join(study.arms),
        "kl_coef": ", ".join(f"{value:g}" for value in study.kl_coefs),
        "replicates": f"{replicates_by_arm(study)}, each: its own SFT models, reward model, {training_seeds(study)}",
        **({"looks": look(study)} if settings.looks else {}),
        "SFT": f"{sft.models} models per replicate, {sft.epochs} epochs, kept: {stop}",
        **_recipes(settings),
        **{algorithm.title: algorithm.words(getattr(settings, kind)) for kind, algorithm in trained.items()},
        "precision": "float32" if settings.mixed_precision == "no" else "float32 weights, bfloat16 arithmetic",
        "benchmarks": (", ".join(study.benchmarks) or "none") + samples(study),
        "judges": ", ".join(settings.judges) or "none",
        "root seed": str(settings.seed),
    }


def _recipes(settings):
    """A fact of a study whose replicates are made by different recipes; nothing of any other."""
    count = len(settings.regimes)
    text = f"{count} recipe{'s' * (count != 1)} of SFT and reward model that differ from this (table of pairs)"
    return {"regimes": text} if count else {}


def command(study):
    """The shell command that runs the study again; where its overrides are not known, that of its experiment."""
    name, overrides = study.config.name, study.overrides
    if overrides is None:
        overrides = [] if name == "default" else [f"experiment={name}"]
    return shlex.join(["salsa", "run", *overrides])


def reproduction(study):
    """Sentences that stand below the command."""
    if study.overrides is None:
        return (
            "This report was made without a plan, so that overrides are not known: add those by which the settings "
            "of the study, or of the run, differ from its experiment's."
        )
    files = "; files are named without their folders, so give their paths" if _names_files(study) else ""
    return f"These are all overrides that the study was planned with{files}."


def _names_files(study):
    """Whether local files make the data or the models of a study."""
    settings = [row["settings"] for row in study.runs]
    return any(json.loads(text).get("files") for text in settings)


def natural(row):
    """Sort key of a row's prompt id: 2 before 10."""
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part)
            for part in re.findall(r"\d+|\D+", str(row["prompt_id"]))]  # fmt: skip


def judge_folders(study, policy):
    """judge -> the folder of its run on a policy's responses."""
    roles = {role: role.split("/") for role in study.parents if role.startswith("judge/")}
    return {parts[1]: study.parents[role] for role, parts in roles.items() if parts[2] == str(policy.index)}


@functools.cache
def template(name, autoescape):
    """A template of salsa/report/templates; with `autoescape`, what is put into it is text and never markup."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=autoescape,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["text"] = markdown
    return environment.get_template(name)


def replicates(study):
    """ "1 replicate", "2 replicates"."""
    count = len(study.replicates)
    return f"{count} replicate" + "s" * (count != 1)


def training_seeds(study):
    """ "training seed", "2 training seeds"."""
    count = len(selection.seeds(study))
    return "training seed" if count == 1 else f"{count} training seeds"


def samples(study):
    """How many responses a prompt gets, after the names of benchmarks; nothing of one."""
    count = study.config.evaluate.samples
    return f" ({count} responses to each prompt)" if count > 1 else ""


def replicates_by_arm(study):
    """As `replicates`, with the numbers of arms run on a part of them: 48 replicates (other and noise: 16)."""
    numbers = {}
    for arm in study.arms:
        numbers.setdefault(len({policy.replicate for policy in study.of(arm=arm)}), []).append(arm)
    fewer = [f"{' and '.join(arms)}: {count}" for count, arms in numbers.items() if count < len(study.replicates)]
    return replicates(study) + (f" ({'; '.join(fewer)})" if fewer else "")


def look(study):
    """Which look at its claims a study is: look 2 of 6, at 16 of up to 48 replicates."""
    looks, count = study.config.looks, len(study.config.replicates)
    return f"look {looks.index(count) + 1} of {len(looks)}, at {count} of up to {looks[-1]} replicates"


def reward_model(settings):
    """The reward model of a study's configuration: one, or the average of several."""
    return gates.reward_model_name(settings.reward_model.models)


def band(study):
    """What an interval of means over replicates is."""
    several = len(study.replicates) > 1
    return "95 % t intervals over replicates" if several else "no interval: conditional on one SFT pair"


def spread(values):
    """The smallest and the largest of numbers, in words; unknown where none is known."""
    values = [float(x) for x in values if x is not None and x == x]
    if not values:
        return "unknown"
    low, high = selection.number(min(values)), selection.number(max(values))
    return low if low == high else f"{low} to {high}"


def bounds(study):
    """A sentence on the arms whose KL is no more than bounded, for captions; it begins with a space, or is ""."""
    arms = [arm for arm in study.arms if selection.kl_bounded(study, arm)]
    return f" KL of {' and '.join(arms)} is not known: it is an upper bound, log n − (n−1)/n." if arms else ""


def listed(kl_coefs):
    """ "0.02, 0.05"."""
    return ", ".join(f"{kl_coef:g}" for kl_coef in kl_coefs)


def no_verdicts(study):
    """Why there is no win rate: a sentence."""
    if not judging.asked(study):
        return "No verdicts: this study has no judge."
    return "No verdicts." if not judging.unfit(study) else "No verdicts, as said next."


def doubts(study):
    """Sentences about judges that can't tell, for captions of win rates; they begin with a space, or are ""."""
    return "".join(f" {line[:1].upper()}{line[1:]}." for line in judging.warnings(study))
