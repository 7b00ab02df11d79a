"""The study of four algorithms, and ingredients of every kind, at the smallest sizes: every stage in this process."""

import json
from collections import Counter

import in_process
import pytest
from test_study import SMALL, rows, study_of

from salsa.base import ASSETS
from salsa.report import style
from salsa.workflow import compose, plan

GRIDS = "algorithm_kl_coefs={ppo:[0.3],rloo:[0.3],grpo:[0.3],dpo:[0.3]}"
SIZES = [
    *("experiment=algorithms", "arm=[ppo,strong_reference]", "kl_coefs=[0.3]", GRIDS, "benchmark=[in_distribution]"),
    *("benchmarks.in_distribution.prompts=6", "reward_model.pairs=64", "execution.keep_value_models=false"),
    *(f"{name}.{size}" for name in ("rloo", "grpo") for size in ("iterations=2", "batch_size=8")),
    *("data.task.demonstrations=100", "data.task.validation=8", "data.task.evaluation=8"),
    *("sft_variants.strong.task.demonstrations=400", "sft_variants.strong.sft.epochs=1"),
    # Rounds of GRPO on PPO's policy, a merged policy as the reference, a greedy soup, and a model from a folder.
    "+mixes.merged={kind:slerp,weights:'1/2 policy:ppo + 1/2 policy:grpo',origin:sft0,step:0.5}",
    "+mixes.picked={kind:greedy,weights:'1/3 sft0 + 1/3 sft1 + 1/3 strong'}",
    "+arms.again={algorithm:grpo,start:'policy:ppo',reference:{kind:multi_kl,weights:'1/2 merged + 1/2 picked'}}",
    "+arms.of_base={algorithm:rloo,reference:{weights:'1/2 base + 1/2 sft0'}}",
    "+arms.base_itself={algorithm:none,start:base}",
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    (shipped,) = (path for path in ASSETS.iterdir() if path.is_dir())
    given = {override.split("=")[0] for override in SIZES}
    small = [override for override in SMALL if override.split("=")[0] not in given]
    place = f"results={tmp_path_factory.mktemp('algorithms') / 'results'}"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(style, "save", in_process.without_pictures)
        made = plan.plan(compose.compose([place, *small, *SIZES, f"+models.base.path={shipped}"]))
        return in_process.execute_all(made)


def test_every_algorithm_trains_against_every_reference(results):
    stages = Counter(path.parent.parent.name for path in results.glob("*/*/manifest.json"))
    assert {name: stages[name] for name in ("ppo", "rloo", "grpo", "dpo", "none", "mix")} == {
        **{"ppo": 2, "rloo": 3, "grpo": 3, "dpo": 2},
        **{"none": 1, "mix": 2},
    }
    study = study_of(results)
    trained = {row["arm"]: row["algorithm"] for row in rows(study / "tables" / "arms.csv")}
    assert trained["grpo_strong_reference"] == "GRPO" and trained["dpo"] == "DPO" and len(trained) == 11
    final = {row["arm"]: row for row in rows(study / "tables" / "frontier.csv") if row["iteration"] in ("0", "2", "8")}
    assert set(final) == set(trained) and float(final["base_itself"]["kl_to_sft0"]) > 0.1


def test_what_is_made_of_others_starts_where_it_says(results):
    (again,) = (path for path in (results / "grpo").iterdir() if "ref_multi_kl" in path.name)
    manifest = json.loads((again / "manifest.json").read_text())
    assert [name.startswith("ingredient") for name in manifest["settings"]["start"]] == [True]
    first = json.loads((again / "metrics.jsonl").read_text().splitlines()[0])
    assert first["kl_to_sft0"] != 0 and first["kl_to_reference"] != 0  # PPO's policy is neither
    (search,) = results.glob("mix/*/search.json")
    assert next(step["accepted"] for step in json.loads(search.read_text())["steps"])


def test_ingredients_and_claims_of_each_algorithm_are_in_the_report(results):
    study = study_of(results)
    assert {row["ingredient"] for row in rows(study / "tables" / "ingredients.csv")} == {
        *("strong", "base", "merged", "picked")
    }
    report = (study / "report.md").read_text()
    assert "RLOO: 2 iterations of 2 prompts, 4 responses to each" in report
