"""The runs of a plan, called in this process: a process for each would spend most of its time on imports."""

import importlib
from pathlib import Path

from salsa import algorithms
from salsa.workflow import config, runs, schema, stages

FUNCTIONS = {  # stage -> the function of its module; an algorithm's is its `train`
    **dict.fromkeys(("corpus", "base", "benchmark"), "make"),
    **dict.fromkeys(("sft", "reward_model"), "train"),
    **dict.fromkeys(("study", "comparison"), "build"),
    **{name: name for name in ("prepare", "mix", "respond", "judge")},
    "landscape": "survey",
    "gates": "check",
}


def execute_all(made, wanted=lambda path, run: True):
    """Execute a plan's runs in its order, as the commands of their stages do. Returns the results' folder."""
    for path, run in made.runs.items():
        if wanted(path, run):
            execute(made, path, run)
    return Path(made.results)


def execute(made, path, run):
    stage, results = stages.ALL[run.stage], Path(made.results)
    module, algorithm = importlib.import_module(stage.module), algorithms.kinds().get(run.stage)
    runs.execute(
        stage.name,
        module.VERSION,
        algorithm.train if algorithm else getattr(module, FUNCTIONS[run.stage]),
        schema.from_dict(stage.settings, run.settings),
        {role: results / parent for role, parent in run.parents.items()},
        results / path,
        schema.from_dict(config.Execution, run.execution),
        expected=run.address,
        writes=stage.writes,
        may_write=stage.may_write,
    )


def without_pictures(figure, folder, name):
    """In place of `style.save`: a file of the figure's name, in which nothing is drawn, which takes long."""
    runs.write_atomically(folder / f"{name}.png", "not rendered")
