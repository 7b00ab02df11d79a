"""What the documentation says can be followed: links lead somewhere, the site has all pages, commands are plans."""

import itertools
import json
import re
import shlex
import string
import tomllib
from pathlib import Path

import pytest

from salsa.workflow import compose, json_schema, plan, settings_page

ROOT = Path(__file__).parents[1]
PAGES = [path for path in sorted((ROOT / "docs").glob("*.md")) if path.name != "settings.md"]  # which the site makes
LINKED = [ROOT / "README.md", ROOT / "results" / "published" / "README.md", *PAGES]
FOLLOWED = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("quick_start", "recipes"))]


def without_code(text):
    """Lines of a page outside of its fenced blocks, whose first words may look like headings."""
    inside, kept = False, []
    for line in text.splitlines():
        inside ^= line.lstrip().startswith("```")
        kept += [] if inside else [line]
    return "\n".join(kept)


def anchors(path):
    """The anchors of a page's headings, as GitHub makes them."""
    names, count = [], {}
    for heading in re.findall(r"(?m)^#+ (.*)$", without_code(path.read_text(encoding="utf-8"))):
        kept = "".join(c for c in heading.lower() if c not in string.punctuation.replace("-", "").replace("_", ""))
        name = kept.strip().replace(" ", "-")
        count[name] = count.get(name, -1) + 1
        names.append(f"{name}-{count[name]}" if count[name] else name)
    return names


@pytest.mark.parametrize("page", LINKED, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    broken = []
    text = re.sub(r"`[^`\n]*`", "", without_code(page.read_text(encoding="utf-8")))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
        elif page.parent.name == "docs" and target.parent != page.parent:
            broken.append(f"{link} (outside of docs/, where the site can't follow)")
    assert broken == []


def test_the_site_has_every_page():
    nav = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]["nav"]
    values = itertools.chain.from_iterable(entry.values() for entry in nav)
    names = [name for value in values for name in ([value] if isinstance(value, str) else merged(value).values())]
    assert sorted(names) == sorted([*(path.name for path in PAGES), "settings.md"])


def merged(entries):
    return {title: name for entry in entries for title, name in entry.items()}


def commands():
    """`salsa plan` and `salsa run` in the blocks of the pages that are to be followed: the page, and the arguments."""
    for page in FOLLOWED:
        for block in re.findall(r"(?ms)^```\n(.*?)^```", page.read_text(encoding="utf-8")):
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith(("salsa plan", "salsa run")):
                    yield page.name, shlex.split(line, comments=True)[2:]


@pytest.fixture
def files(tmp_path, monkeypatch, tiny_chat_model):
    """The current folder, with what recipes speak of."""
    rows = [{"prompt": f"Question {i}?", "chosen": f"Yes, {i}.", "rejected": "No."} for i in range(4000)]
    (tmp_path / "prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:3000]))
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[3000:]))
    turns = [[("user", f"Chat {i}?"), ("assistant", f"Indeed, {i}.")] for i in range(3000)]
    chats = [{"messages": [{"role": role, "content": text} for role, text in pair]} for pair in turns]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    (tmp_path / "my-model").symlink_to(tiny_chat_model)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "none")


def test_commands_plan_something(files):
    seen = 0
    for page, arguments in commands():
        arguments = arguments[: arguments.index("--")] if "--" in arguments else arguments
        if "--pilot" in arguments or any(argument.startswith("hydra") for argument in arguments):
            continue
        assert plan.plan(compose.compose([each for each in arguments if each != "-m"])).runs, (page, arguments)
        seen += 1
    assert seen > 15


def test_the_page_of_settings_has_every_setting():
    page = settings_page.page()
    keys = re.findall(r"(?m)^\| `([^`]+)` \| .+ \| .+ \| .+ \|$", page)
    assert len(keys) == len(set(keys)) == page.count("\n| `")
    assert set(leaves(json_schema.of_presets()["properties"], json_schema.of_presets()["$defs"])) == set(keys)
    assert "| `ppo.gamma` | number from 0 to 1 | `1.0` |" in page
    assert "| `execution.device` | `auto`, `cpu`, `cuda` | `auto` | auto: a GPU where there is one. |" in page
    assert "default study: `[0.3]`" in page
    assert "| Kind ema: Share of the policy that is mixed in after each iteration (WARP's mu). |" in page


def leaves(properties, sections, before=""):
    """The full names of all settings, by a walk of its own."""
    for name, node in properties.items():
        text = json.dumps(node.get("patternProperties", node))
        section = re.search(r'"#/\$defs/(\w+)"', text)
        if name in ("defaults", "hydra"):
            continue
        entry = ".<name>" if "patternProperties" in node and section else ""
        if section:
            yield from leaves(sections[section[1]]["properties"], sections, f"{before}{name}{entry}.")
        else:
            yield before + name
