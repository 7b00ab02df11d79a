"""The frames of a study: what they hold, how they are loaded, and that their page says what is true."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tree import LengthGold, Tree

import salsa
from salsa.algorithms import dpo, ppo
from salsa.report import frames, study
from salsa.workflow import config, runs

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "frames.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        made = Tree(tmp_path_factory.mktemp("frames"), kl_coefs=(0.05, 0.1))
        made.output = made.build(monkeypatch)
        (made.root / "studies" / "default").symlink_to(made.output.name)
        monkeypatch.setattr(study, "gold_judge", lambda prepare: LengthGold())
        yield made


@pytest.fixture
def loaded(tree):
    return salsa.load(tree.root / "studies" / "default")


def test_columns_are_those_that_are_documented(loaded):
    for name, columns in frames.COLUMNS.items():
        assert list(getattr(loaded, name))[: len(columns)] == list(columns)
        listed = [f"| `{column}` | {meaning} | {unit} |" for column, (meaning, unit) in columns.items()]
        assert "\n".join(["| column | what | unit |", "|---|---|---|", *listed]) in PAGE
    for algorithm in (ppo.ALGORITHM, dpo.ALGORITHM):
        assert all(f"| `{name}` | {meaning} | {unit} |" in PAGE for name, (meaning, unit) in algorithm.logs.items())


def test_rows(tree, loaded):
    policies, responses, verdicts = loaded.policies, loaded.responses, loaded.verdicts
    count = len(tree.policies)
    assert len(policies) == count and set(policies["algorithm"]) == {"ppo"}
    assert len(loaded.trajectories) == count * tree.iterations
    assert len(responses) == 2 * tree.prompts * (count + 2 * 3)  # and sft0, sft1, soup of two replicates
    files = [folder / "verdicts.jsonl" for role, folder in tree.parents.items() if role.startswith("judge/")]
    assert len(verdicts) == sum(len(runs.read_jsonl(path)) for path in files)
    answered = set(zip(responses["replicate"], responses["model"], strict=True))
    assert set(zip(verdicts["replicate"], verdicts["model_a"], strict=True)) <= answered
    first = runs.read_jsonl(tree.parents["policy/0"] / "metrics.jsonl")[1]
    row = loaded.trajectories.iloc[1]
    assert row["reward"] == first["score"] and row["paid_reward"] == first["reward"]
    assert row["kl_coef"] == 0.05 and row["current_kl_coef"] == first["kl_coef"]
    assert math.isnan(row["gold_reward"]) and not row["kept"] and loaded.trajectories.iloc[0]["gold_reward"] == 2
    assert loaded.claims["claim"].tolist() == pd.read_csv(tree.output / "tables" / "claims.csv")["claim"].tolist()


def test_over_replicates_is_the_table_of_rewards(tree, loaded):
    found = frames.over_replicates(loaded.policies, ["arm", "kl_coef"], frames.MEASURES)
    written = pd.read_csv(tree.output / "tables" / "rewards.csv").dropna(subset="kl_coef").reset_index(drop=True)
    pd.testing.assert_frame_equal(found, written, check_exact=True)


def test_over_replicates_leaves_out_what_is_unknown():
    frame = pd.DataFrame({"arm": ["b", "a", "b", "b"], "replicate": [0, 0, 1, 2], "x": [1.0, 5.0, 3.0, math.nan]})
    found = frames.over_replicates(frame, ["arm"], ["x"])
    assert found["arm"].tolist() == ["b", "a"] and found["replicates"].tolist() == [3, 1]
    half = 12.706204736 * np.std([1, 3], ddof=1) / math.sqrt(2)  # t of one degree of freedom
    assert found.loc[0, ["x", "x_low", "x_high"]].tolist() == pytest.approx([2, 2 - half, 2 + half])
    assert found.loc[1, "x"] == 5 and math.isnan(found.loc[1, "x_low"])


def test_the_example_of_the_page_draws_a_figure(tree, loaded, tmp_path, monkeypatch):
    (tmp_path / "results").symlink_to(tree.root)
    monkeypatch.chdir(tmp_path)
    five_lines, longer = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(five_lines.split("\n\n", 1)[1].splitlines()) + 1 == 5
    for example in (five_lines, longer):
        exec(compile(example, "docs/frames.md", "exec"), {})
    assert (tmp_path / "frontier.png").stat().st_size > 1000 and (tmp_path / "kl.png").stat().st_size > 1000
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert five_lines.replace("studies/default", "published/default") in readme


def test_a_sweep_has_the_frames_of_its_studies_by_point(tree, loaded):
    def write(settings, parents, output, execution):
        runs.write_atomically(output / "comparison.md", "")

    settings = config.ComparisonSettings([{"ppo.epochs": "1"}, {"ppo.epochs": "2"}])
    parents, output = {f"study/{i}": tree.output for i in (0, 1)}, tree.root / "studies" / "sweep"
    runs.execute("comparison", 1, write, settings, parents, output, config.Execution())
    sweep = salsa.load(output)
    assert list(sweep.policies)[:2] == ["point", "arm"] and len(sweep.policies) == 2 * len(loaded.policies)
    assert sweep.claims["point"].unique().tolist() == ["ppo.epochs=1", "ppo.epochs=2"]


def test_tables_are_those_of_the_report(tree, loaded):
    names = {path.name.partition(".")[0] for path in (tree.output / "tables").glob("*.csv*")}
    assert set(loaded.tables) == names and len(loaded.tables) == len(names) and {"claims", "prompt_scores"} <= names
    for name, frame in loaded.tables.items():
        (path,) = (tree.output / "tables").glob(f"{name}.csv*")
        assert list(frame) == list(pd.read_csv(path)) and len(frame) == len(pd.read_csv(path)), name
    del loaded.tables["frontier"]["arm"]
    assert "arm" in loaded.tables["frontier"] and "frontier" in loaded.tables and "nothing" not in loaded.tables
    with pytest.raises(runs.UserError, match=r"^no table 'nothing'; choose among .*claims, .*frontier"):
        loaded.tables["nothing"]


@pytest.mark.parametrize("name", ["decisive", "default", "reviews", "smollm2_reviews"])
def test_a_published_copy_has_its_tables_alone(name):
    copy = salsa.load(ROOT / "results" / "published" / name)
    assert len(copy.tables["frontier"]) and len(copy.tables["rewards"])
    assert len(copy.claims if "claims" in copy.tables else copy.tables["gates"])  # the oldest was made before claims
    with pytest.raises(runs.UserError, match="a published copy has no runs; `claims` and all other `tables`"):
        copy.policies  # noqa: B018


def test_a_notebooks_way_to_show_figures_is_left_alone():
    """Whether salsa or matplotlib is imported first; a backend that matplotlib doesn't know ends nothing."""
    code = "import salsa.report, matplotlib; print(matplotlib.rcParams['backend'])"
    for name, shown in {"svg": "svg", "no such backend": "agg"}.items():
        environment = os.environ | {"MPLBACKEND": name, "DISPLAY": ""}
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.stdout.strip() == shown, done.stderr


def test_a_folder_that_is_no_study(tree, tmp_path):
    for folder in (tmp_path, tree.parents["policy/0"]):
        with pytest.raises(runs.UserError, match="no finished study; give a folder like results/studies/default"):
            salsa.load(folder)


def test_settings_of_another_version_are_refused_in_one_line(tree):
    settings = config.StudySettings(tree.settings.config | {"kl_coef": 0.1}, tree.settings.policies)
    with pytest.raises(runs.UserError, match=r"^kl_coef.*planned by another version: plan and run it again$"):
        study.read(settings, tree.parents)


def test_no_torch_is_imported(tree):
    code = (
        "import salsa, sys; from salsa.report import study; study.gold_judge = lambda prepare: None; "
        "loaded = salsa.load(sys.argv[1]); [getattr(loaded, name) for name in sys.argv[2:]]; "
        "assert not {'torch', 'transformers', 'hydra', 'snakemake'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, tree.output, *frames.COLUMNS, "claims"], cwd=ROOT, check=True)


def test_the_flat_part_of_training_is_averaged_by_hand(tree, loaded):
    """The fake runs have 6 iterations, of which the last quarter is 2; gold was kept at iterations 0 and 5."""
    for row in loaded.policies.itertuples():
        index = next(p["index"] for p in tree.policies if (p["name"], p["replicate"]) == (row.name, row.replicate))
        first, second = runs.read_jsonl(tree.parents[f"policy/{index}"] / "metrics.jsonl")[4:]
        assert row.flat_reward == pytest.approx((first["score"] + second["score"]) / 2)
        for name in ("kl_to_sft0", "kl_to_reference", "response_length", "eos_rate"):
            assert getattr(row, f"flat_{name}") == pytest.approx((first[name] + second[name]) / 2)
        assert row.flat_gold == (1 + 5 + 2 + 5 + 3 + 5) / 3
        assert math.isnan(row.reward_slope) and math.isnan(row.reward_slope_se)  # two iterations are on any line


def test_the_flat_part_is_as_long_as_the_study_says(tree):
    result = study.read(tree.settings, tree.parents)
    result.config.evaluate.flat_share = 1.0
    row, lines = result.frames.policies.iloc[0], result.ordered[0].metrics
    assert row["flat_reward"] == pytest.approx(sum(line["score"] for line in lines) / 6)
    slope = np.polyfit(range(6), [line["score"] for line in lines], 1)[0]
    assert row["reward_slope"] == pytest.approx(5 * slope) and row["reward_slope_se"] > 0


def test_a_policy_without_rollouts_has_no_flat_part(tree):
    result = study.read(tree.settings, tree.parents)
    first, second = result.ordered[:2]
    first.metrics, second.metrics = [], [{"iteration": 0, "loss": 0.7}, {"iteration": 1, "loss": 0.6}]  # as none, dpo
    policies = result.frames.policies.iloc[:2]
    assert policies[[*frames.FLAT.values(), *frames.DRIFT]].isna().all(axis=None)
