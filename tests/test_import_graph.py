"""The order of the house: no module imports one that stands above it, and none is imported in a circle.

Counted are imports at the top of a module. What a function imports when it is called is how a record without torch
reaches its implementation, and how a stage run alone finds its plan.
"""

import ast
from pathlib import Path

import salsa

ROOT = Path(salsa.__file__).parent
LAYERS = (  # lowest first: a module may import those of its own line, and of the lines before it
    ("workflow.weights",),
    ("workflow.bounds", "workflow.failures", "workflow.gpus", "workflow.places"),
    ("workflow.interrupts", "workflow.repository", "workflow.surroundings"),
    ("workflow.answers", "workflow.messages", "workflow.registry", "workflow.schema"),
    ("workflow.runs", "workflow.overriding", "workflow.yaml_files"),
    ("anchors", "data", "judges", "mixes"),
    ("workflow.resources",),
    ("algorithms",),
    ("workflow.config",),
    ("workflow.policies", "workflow.regimes", "workflow.stages"),
    ("workflow.families",),
    ("data.benchmark", "data.corpus", "data.prepare", "mix_card", "rl", "soup"),
    ("base", "sft", "reward", "dpo", "evaluate", "mix"),
    ("workflow.plan",),
    ("workflow.command",),
    ("report", "tools"),
    ("workflow.crossing", "workflow.designs", "workflow.ingredients"),
    (
        "workflow.checks",
        "workflow.compose",
        "workflow.estimate",
        "workflow.jobs",
        "workflow.objectives",
        "workflow.pilot",
        "workflow.studies",
    ),
    ("tools.judge_check", "workflow.durations"),
    ("workflow.progress",),
    ("workflow.screen",),
    ("workflow.forget", "workflow.status"),
    (
        "workflow.json_schema",
        "workflow.multirun",
        "workflow.search",
        "workflow.settings_page",
        "workflow.snakemake",
        "__main__",
    ),
)


def modules():
    """Dotted name below salsa -> path, of every module and package."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in ROOT.rglob("*.py")
        if path != ROOT / "__init__.py"
    }


def imported(path, known):
    """The modules of the project that a file imports when it is imported itself."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}".removeprefix("salsa.")
                names.add(f"salsa.{inner}" if inner in known else node.module)
    return {name.removeprefix("salsa.") for name in names} & set(known)


def graph():
    known = modules()
    return {name: imported(path, known) for name, path in known.items()}


def layer(name):
    """The place of a module in LAYERS, by its longest prefix there; None where it has none."""
    prefixes = [".".join(name.split(".")[:length]) for length in range(name.count(".") + 1, 0, -1)]
    return next((place for prefix in prefixes for place, line in enumerate(LAYERS) if prefix in line), None)


def test_every_module_has_its_place():
    assert [name for name in modules() if layer(name) is None and name != "workflow"] == []


def test_no_module_imports_one_above_it():
    upwards = [
        f"{name} imports {other}"
        for name, others in graph().items()
        for other in others
        if None not in (layer(name), layer(other)) and layer(other) > layer(name)
    ]
    assert upwards == []


def circle(edges):
    """The first circle of a graph (name -> names) as a list of names, or None."""
    done = set()

    def visit(name, trail):
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name in done:
            return None
        found = next(filter(None, (visit(other, [*trail, name]) for other in sorted(edges[name]))), None)
        done.add(name)
        return found

    return next(filter(None, (visit(name, []) for name in sorted(edges))), None)


def test_imports_go_in_no_circle():
    assert circle(graph()) is None


def test_a_circle_would_be_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None
