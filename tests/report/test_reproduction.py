"""The command that a report prints: composed again, it plans the study that the report is of."""

import json
import shlex

import pytest
from tree import Tree

from salsa.report import study, words
from salsa.workflow import command, compose, overriding, plan, runs, stages


def paths(planned):
    """The addresses of all looks of the studies of a plan."""
    return {planned.runs[look].address for entry in planned.studies for look in entry["looks"]}


def printed(overrides):
    """The overrides of the command that the report of a study of these overrides prints."""
    known = study.Study(compose.compose(["experiment=default"])[0].config, [], {}, {}, {}, [])
    known.overrides = overrides
    program, subcommand, *rest = shlex.split(words.command(known))
    assert (program, subcommand) == ("salsa", "run")
    return rest


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["experiment=decisive"],
        ["kl_coefs=[0.03, 0.1]", "arm=[ppo,salsa]", "ppo.iterations=7,8"],
        ["+arms.own={start: '1/2 sft0 + 1/2 sft1', description: 'a \"quoted\" $HOME ; word'}", "results=elsewhere"],
        ["~arms.strong_soup", "claim_kl_coef=null", "execution.threads=1", "title='two words'"],
    ],
)  # fmt: skip
def test_the_printed_command_plans_the_same_studies(overrides):
    planned = plan.plan(compose.compose(overrides))
    entries = [planned.runs[entry["path"]] for entry in planned.studies]
    again = [plan.plan(compose.compose(printed(run.overrides))) for run in entries]
    for run, other in zip(entries, again, strict=True):
        assert run.address in paths(other)
    assert len(entries) == (2 if "ppo.iterations=7,8" in overrides else 1)


def test_two_spellings_are_one_study_and_the_first_is_told():
    one, other = (plan.plan(compose.compose([text])) for text in ("ppo.learning_rate=1e-4", "ppo.learning_rate=0.0001"))
    assert paths(one) == paths(other)
    both = plan.plan([*compose.compose(["ppo.learning_rate=0.0001"]), *compose.compose(["ppo.learning_rate=1e-4"])])
    assert both.runs[both.studies[0]["path"]].overrides == ["ppo.learning_rate=0.0001"] and len(both.studies) == 1


def test_what_is_recorded_names_no_folder_of_a_machine():
    overrides = ["data.task.sft_file=/home/me/x/demos.jsonl", "judges.a.base_url=http://a.b/c/d", "results=/tmp/x"]
    overrides += ["++x=[/a/b/c.txt,1/2]", "objective.arm=salsa", "arms.x.start='1/2 sft0 + 1/2 sft1'"]
    recorded = ["data.task.sft_file=demos.jsonl", "judges.a.base_url=http://a.b/c/d"]
    recorded += ["++x=[c.txt,1/2]", "arms.x.start='1/2 sft0 + 1/2 sft1'"]
    assert overriding.recorded(overrides) == recorded


def test_overrides_survive_the_plan_file_and_others_are_refused(tmp_path):
    planned = plan.plan(compose.compose(["ppo.iterations=7", f"results={tmp_path}"]))
    path, name = planned.save(), planned.studies[0]["path"]
    assert plan.load(path).runs[name].overrides == ["ppo.iterations=7"]
    values = json.loads(path.read_text())
    values["runs"][name]["overrides"] = "ppo"
    path.write_text(json.dumps(values))
    with pytest.raises(plan.UserError, match="overrides are 'ppo'"):
        plan.load(path)


def test_a_stage_gets_the_overrides_of_its_plan(tmp_path, monkeypatch):
    planned = plan.plan(compose.compose(["ppo.iterations=7", f"results={tmp_path}"]))
    path, name = planned.save(), planned.studies[0]["path"]
    calls = []
    monkeypatch.setattr(command, "_link", lambda plan, path: None)  # of a study that is never finished here
    monkeypatch.setattr(runs, "execute", lambda stage, version, function, *rest, **options: calls.append(function))
    command.main(
        stages.STUDY, lambda overrides=None: overrides, study.VERSION, argv=["--plan", str(path), "--run", name]
    )
    assert calls[0]() == ["ppo.iterations=7"]


def test_title_page_and_cards_say_what_was_overridden(tmp_path, monkeypatch):
    tree = Tree(tmp_path, replicates=(0,), arms={"ppo": "0"})
    overrides = ["experiment=reviews", "ppo.learning_rate=1e-05", "execution.threads=1"]
    monkeypatch.setattr(study, "gold_judge", lambda prepare: None)
    found = study.read(tree.settings, tree.parents)
    assert words.title(found) == "A test" and "overrides are not known" in words.reproduction(found)
    build = study.build
    monkeypatch.setattr(study, "build", lambda *arguments: build(*arguments, overrides=overrides))
    output = tree.build(monkeypatch)
    line = "salsa run experiment=reviews ppo.learning_rate=1e-05 execution.threads=1"
    for name in ("report.md", "report.html", "cards/ppo-kl0.05-r0.md"):
        text = (output / name).read_text(encoding="utf-8")
        assert line in text and "A test (ppo.learning&#95;rate=1e-05)".replace("&#95;", "_") in text.replace(
            "&#95;", "_"
        )
    assert runs.manifest_of(output)["summary"]["overrides"] == overrides


def test_a_long_list_of_overrides_is_cut_in_the_title():
    known = study.Study(compose.compose([])[0].config, [], {}, {}, {}, [])
    known.overrides = [f"ppo.x{i}={i}" for i in range(6)]
    assert words.title(known).endswith("(ppo.x0=0, ppo.x1=1, ppo.x2=2, ppo.x3=3 and 2 more)")
