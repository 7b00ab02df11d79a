"""Where the noise is, in a report: outcomes value by value, the tables, and their words."""

import dataclasses
import math
import types

import numpy as np
import pandas as pd
import pytest
from tree import Tree

from salsa.evaluate import sequential, variance
from salsa.report import formats, noise, selection, study
from salsa.report.sections import allocation, sections
from salsa.report.selection import Pair

PAIR = Pair("salsa", "ppo", (0.1,), 0.1, 0.1)
SHAPE = 3, 2, 4, 2  # replicates, seeds, prompts, responses
VERDICT = ("judge", "benchmark", "prompt_id", "replicate", "seed", "sample", "order", "model_a", "model_b", "winner")


def simulated(seed, verdicts=()):
    """A study of two arms as far as `noise` reads it, and arm -> benchmark -> its gold scores (R, S, P, J)."""
    generator, rows, policies, scores = np.random.default_rng(seed), [], [], {}
    for arm in ("ppo", "salsa"):
        scores[arm] = {name: generator.normal(size=SHAPE) for name in ("first", "second")}
        for name, values in scores[arm].items():
            for (r, s, p, j), value in np.ndenumerate(values):
                row = {"arm": arm, "kl_coef": 0.1, "benchmark": name, "prompt_id": f"{name}-{p}", "replicate": 10 + r}
                rows.append(row | {"seed": s, "sample": j, "gold": value, "reward": math.nan})
        for r, s in np.ndindex(*SHAPE[:2]):
            row = {"arm": arm, "kl_coef": 0.1, "replicate": 10 + r, "seed": s, "name": f"{arm}-kl_0.1", "index": 0}
            policies.append(row | {"flat_kl_to_sft0": r + 10 * s + (arm == "salsa"), "evaluation": {}})
    lines = [dict(zip(VERDICT, verdict, strict=True)) for verdict in verdicts]
    frames = types.SimpleNamespace(
        responses=pd.DataFrame(rows).sample(frac=1, random_state=seed),
        policies=pd.DataFrame(policies),
    )
    members = [types.SimpleNamespace(**policy) for policy in policies]

    def of(arm, kl_coef):
        return [member for member in members if (member.arm, member.kl_coef) == (arm, kl_coef)]

    fake = {"frames": frames, "of": of, "compared": ["first", "second"], "verdicts": {("gold",): lines}}
    fake["config"] = types.SimpleNamespace(judges={"gold": types.SimpleNamespace(kind="gold")})
    return types.SimpleNamespace(**fake), scores


@pytest.fixture
def no_evaluation(monkeypatch):
    monkeypatch.setattr(selection, "evaluation_rows", lambda study, arm, kl_coef: pd.DataFrame())


def found(study, of, measure):
    return {o.benchmark: o for o in noise.outcomes(study, PAIR, alone=True) if (o.of, o.measure) == (of, measure)}


def test_tables_hold_every_value_at_its_place(no_evaluation):
    fake, scores = simulated(0)
    outcomes = found(fake, noise.DIFFERENCE, "gold_reward")
    assert list(outcomes) == [noise.MEAN, "first", "second"]
    for name in ("first", "second"):
        expected = scores["salsa"][name] - scores["ppo"][name]
        np.testing.assert_allclose(outcomes[name].tables, [expected], rtol=1e-12)
        np.testing.assert_allclose(found(fake, "salsa", "gold_reward")[name].tables, [scores["salsa"][name]])
    assert len(outcomes[noise.MEAN].tables) == 2
    assert {outcome.left_out for outcome in outcomes.values()} == {0}


def test_a_measure_that_the_data_lacks_has_no_outcome(no_evaluation):
    measures = {outcome.measure for outcome in noise.outcomes(simulated(0)[0], PAIR, alone=True)}
    assert measures == {"gold_reward", "training_kl_to_sft0"}


def test_what_is_one_number_a_policy_has_one_prompt(no_evaluation):
    (outcome,) = found(simulated(0)[0], "ppo", "training_kl_to_sft0").values()
    np.testing.assert_array_equal(outcome.tables[0][:, :, 0, 0], [[0, 10], [1, 11], [2, 12]])
    assert set(variance.components(outcome.tables)) == {"replicate", "seed"}


def test_win_rates_are_of_the_pair_itself_where_it_was_judged(no_evaluation):
    """Orders are averaged, the last line on a comparison counts, errors are left out, model_a may be either."""
    lines = []
    for r, s, p, j in np.ndindex(*SHAPE):
        where = "gold", "first", f"first-{p}", 10 + r, s, j
        lines.append((*where, 0, "salsa-kl_0.1", "ppo-kl_0.1", "model_a"))
        lines.append((*where, 0, "ppo-kl_0.1", "salsa-kl_0.1", "tie" if j else "model_b"))
    lines.append(("gold", "first", "first-0", 10, 0, 0, 0, "salsa-kl_0.1", "ppo-kl_0.1", "model_b"))
    lines.append(("gold", "first", "first-1", 10, 0, 0, 1, "salsa-kl_0.1", "ppo-kl_0.1", "error"))
    (outcome,) = found(simulated(0, lines)[0], noise.DIFFERENCE, "win_rate").values()
    expected = np.full(SHAPE, 0.5)
    expected[..., 1] = 0.25
    expected[0, 0, 0, 0] = 0.0  # lost in one order, won in the other
    np.testing.assert_array_equal(outcome.tables[0], expected)


def test_an_arm_of_one_training_seed_stands_beside_each_of_the_others(no_evaluation):
    fake, scores = simulated(1)
    rows = fake.frames.responses
    fake.frames.responses = rows[(rows["arm"] == "salsa") | (rows["seed"] == 0)]
    for pair, sign in ((PAIR, 1), (Pair("ppo", "salsa", (0.1,), 0.1, 0.1), -1)):
        outcomes = noise.outcomes(fake, pair)
        (table,) = next(o for o in outcomes if (o.measure, o.benchmark) == ("gold_reward", "first")).tables
        expected = scores["salsa"]["first"] - scores["ppo"]["first"][:, :1]
        np.testing.assert_allclose(table, sign * expected, rtol=1e-12)


def wide(values):
    """Values (prompts, replicates × seeds × samples) of one benchmark, as `noise.measures` makes them."""
    index = pd.MultiIndex.from_product([["first"], range(len(values))], names=noise.PROMPT)
    columns = pd.MultiIndex.from_product([(0, 1, 2), (0, 1), (0,)], names=noise.CELL)
    return pd.DataFrame(values, index=index, columns=columns)


def test_a_prompt_without_a_number_is_left_out():
    values = np.arange(24.0).reshape(4, 6)
    values[1, 2] = math.nan
    (table,), left_out = noise.balanced([wide(values)])
    assert left_out == 1
    np.testing.assert_array_equal(table[:, :, :, 0], values[[0, 2, 3]].reshape(3, 3, 2).transpose(1, 2, 0))


def test_a_policy_without_most_of_its_numbers_is_left_out():
    values = np.arange(24.0).reshape(4, 6)
    values[:3, 1] = math.nan  # the second seed of the first replicate
    (table,), left_out = noise.balanced([wide(values)])
    assert (table.shape, left_out) == ((3, 1, 4, 1), 0)
    values[:, 0] = math.nan  # the first replicate has none
    (table,), _ = noise.balanced([wide(values)])
    np.testing.assert_array_equal(table[:, :, 0, 0], [[2, 3], [4, 5]])


def test_where_nothing_is_complete_there_is_no_table():
    assert noise.balanced([wide(np.full((4, 6), math.nan))]) == ([], 0)
    holes = np.where(np.eye(3, 6, dtype=bool) | np.eye(3, 6, 3, dtype=bool), math.nan, 1.0)
    assert noise.balanced([wide(holes)]) == ([], 3)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    tree = Tree(tmp_path_factory.mktemp("variance"))
    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        output = tree.build(context)
        yield tree, output


def test_a_study_says_where_its_noise_is(built):
    """In the tree, salsa − ppo is 0.2 + 0.05 r in proxy reward, on every prompt, and minus 2.2 + … in gold."""
    table = formats.read_csv(built[1] / "tables" / "variance.csv")
    rows = table[(table["of"] == "difference") & (table["measure"] == "reward") & (table["baseline"] == "ppo")]
    rows = rows[rows["benchmark"] == noise.MEAN].set_index("component")
    assert rows["variance"].to_dict() == pytest.approx(
        {"replicate": 0.05**2 / 2, "prompt_replicate": 0, "prompt": 0}, abs=1e-12
    )
    assert rows.loc["replicate", "varies"] == "SFT pairs + training seeds"
    assert rows.loc["replicate", ["share", "replicates", "seeds", "prompts", "responses"]].tolist() == [1, 2, 1, 24, 1]
    report = (built[1] / "report.md").read_text(encoding="utf-8")
    assert "## Where the noise is" in report and "figures/variance.png" in report
    low, high = (0.05 / math.sqrt(2) * factor for factor in (math.sqrt(1 / 5.0239), math.sqrt(1 / 0.00098207)))  # χ²(1)
    assert rows.loc["replicate", ["deviation", "deviation_low", "deviation_high"]].tolist() == pytest.approx(
        [0.05 / math.sqrt(2), low, high], rel=1e-4
    )
    assert rows.loc["replicate", ["share_low", "share_high"]].tolist() == pytest.approx([1, 1])
    assert "of this variance, 100 % [100, 100] is from SFT pairs + training seeds, 0 % [0, 0] is from prompts" in report


def test_a_study_says_what_an_hour_would_buy(built):
    table = formats.read_csv(built[1] / "tables" / "allocation.csv")
    rows = table[table["measure"] == "reward"].set_index("design")
    run = rows.loc["as it is"]
    assert run[["replicates", "seeds", "prompts", "responses"]].tolist() == [2, 1, 24, 1]
    expected = variance.half_width({"replicate": 0.00125}, variance.Design(2, 1, 24, 1), run["level"])
    levels = formats.read_csv(built[1] / "tables" / "claims.csv")["level"].dropna()
    assert run["level"] in set(levels)
    assert run["half_width"] == pytest.approx(expected)
    assert "an hour more of replicates" in rows.index and "an hour more of training seeds" not in rows.index
    assert "the next hour of a core buys most as replicates" in (built[1] / "report.md").read_text(encoding="utf-8")


def test_half_widths_are_those_that_decide_claims():
    """At the claims' level, and with the critical value of the study's last look; the best design stays the same."""
    design, looks, level = variance.Design(48, 1, 24, 1), (8, 16, 48), 1 - 0.05 / 6
    settings = ({"replicate": 0.01}, variance.Cost(1, 1, 0.1, 0.1), design, variance.choices(design, 1))
    once, looked = (list(allocation.designs(*settings, level=level, looks=each)) for each in (None, looks))
    assert [row["design"] for row in once] == [row["design"] for row in looked]
    run = looked[0]
    assert run["half_width"] == pytest.approx(
        variance.half_width({"replicate": 0.01}, design) * sequential.critical_values(looks, level)[-1] / 2.01174,
        rel=1e-4,
    )
    ratio = run["half_width"] / once[0]["half_width"]
    for name in ("half_width", "half_width_new_prompts", "narrower_by_an_hour"):
        numbers = [(row[name], ratio * other[name]) for row, other in zip(looked, once, strict=True)]
        assert all(first == pytest.approx(second, nan_ok=True) for first, second in numbers)


def test_one_replicate_is_not_enough(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "gold_judge", lambda prepare: None)
    tree = Tree(tmp_path, replicates=(0,), prompts=3, planes=())
    result = study.read(tree.settings, tree.parents)
    tables = {name: sections()[name].table(result) for name in ("variance", "allocation")}
    assert set(tables["variance"]["component"]) == {"prompt"} and tables["allocation"].empty
    captions = [sections()[name].words(result, tables) for name in tables]
    assert captions[0].startswith("What replicates differ by is not known: it takes two of them")
    assert captions[1].startswith("What a further hour would buy is not known: it takes two replicates")


def test_costs_are_core_minutes_of_the_runs_that_two_arms_need(built, monkeypatch):
    """Every fake run takes a minute on two cores; a replicate has 2 SFT models, a reward model and a landscape."""
    tree, _ = built
    monkeypatch.setattr(study, "gold_judge", lambda prepare: None)
    result = study.read(tree.settings, tree.parents)
    manifest_of = noise.runs.manifest_of

    def slow(folder):
        manifest = manifest_of(folder)
        return manifest and manifest | {"wall_seconds": 60, "execution": manifest["execution"] | {"threads": 2}}

    monkeypatch.setattr(noise.runs, "manifest_of", slow)
    paid, answers = noise.cost(result, Pair("salsa", "ppo", (0.05,), 0.05, 0.05))
    after, before = 24 / (24 + 40), 72 / (72 + 5 * 40)  # shares of the answers to benchmarks
    assert answers == 24
    assert dataclasses.asdict(paid) == pytest.approx(
        {
            "replicate": 2 * 3 + 2 * (1 - before),
            "seed": 2 * 2 + 2 * 2 * (1 - after),
            "before": 2 * before / 24,
            "response": (2 * 2 * after + 2 * 2) / 24,
        }
    )
    monkeypatch.setattr(noise.runs, "manifest_of", lambda folder: manifest_of(folder) | {"wall_seconds": None})
    assert noise.cost(result, Pair("salsa", "ppo", (0.05,), 0.05, 0.05)) is None


def test_readers_see_the_first_pair_over_all_benchmarks(built):
    section, frame = sections()["variance"], formats.read_csv(built[1] / "tables" / "variance.csv")
    shown = section.rows(frame)
    assert set(shown["benchmark"].fillna("")) == {noise.MEAN, ""}
    assert set(shown["baseline"]) == {"ppo"} and set(shown["of"]) == {"difference"}
