"""What a finished study says at its end: verdicts, SALSA against plain PPO, and rewards where nothing is decided."""

import csv
from pathlib import Path

import pytest

from salsa.workflow import answers, plan, runs, studies

PUBLISHED = Path(__file__).resolve().parents[2] / "results" / "published"
CLAIM = {"outcome": "primary", "candidate": "salsa", "baseline": "ppo", "candidate_kl_coef": 0.3, "level": 0.99}
NONE = ("", "")  # the bounds of what has no interval
LONG = "a claim of more words than a line of a terminal holds, which is why the names of claims are shown instead"


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, dict.fromkeys(name for row in rows for name in row))
        writer.writeheader()
        writer.writerows(rows)


def claim(name, verdict, measure="win_rate", bounds=(0.5, 1.5), **more):
    low, high = bounds
    row = {"claim": name, "text": f"{name} is said", "claim_verdict": verdict, "measure": measure, "replicates": 3}
    effect = (low + high) / 2 if bounds != NONE else ""
    return CLAIM | row | {"effect": effect, "effect_low": low, "effect_high": high} | more


def reward(arm, kl_coef, proxy, gold, kl):
    return {"arm": arm, "kl_coef": kl_coef, "reward": proxy, "gold_reward": gold, "kl_to_sft0": kl}


def test_verdicts_come_in_words_then_the_difference(tmp_path):
    claims = [
        claim("higher_gold", "undecided", "gold_reward", (-0.0512, 0.0812), text=LONG),
        claim("at_equal_kl", "undecided", text=LONG),
        claim("larger_kl", "supported", "training_kl_to_sft0", (0.1, 1.876)),
        claim("follows", "excluded", text="and so does another"),
        claim("seen", "reversed", origin="positive_control"),
        claim("elsewhere", "not tested", bounds=NONE),
        claim("seen", "reversed", "gold_reward", (5, 6), outcome="secondary"),
    ]
    write(tmp_path / answers.CLAIMS, claims)
    write(tmp_path / answers.REWARDS, [reward("ppo", 0.3, 1, 1, 1)])
    assert answers.lines(tmp_path) == [
        "5 claims tested: 1 supported, 1 excluded, 1 reversed, 2 undecided (all at once",
        "  with 95 %)",
        "supported: larger_kl is said",
        "excluded: follows",
        "reversed: seen is said (the positive control)",
        "undecided: higher gold, at equal KL",
        "salsa − ppo (kl_coef 0.3): gold +0.015 [-0.051, 0.081], KL +0.99 [0.1, 1.9]",
    ]
    assert answers.short(tmp_path) == answers.lines(tmp_path)[-1]


def test_without_gold_the_proxy_is_compared(tmp_path):
    write(tmp_path / answers.CLAIMS, [claim("higher_reward", "supported", "training_reward", (0.2, 0.4))])
    assert answers.lines(tmp_path) == [
        "1 claim tested: 1 supported",
        "supported: higher_reward is said",
        "salsa − ppo (kl_coef 0.3): proxy +0.3 [0.2, 0.4]",
    ]


def test_one_replicate_without_a_judge_shows_rewards_and_kl(tmp_path):
    claims = [claim("higher_reward", "undecided", bounds=NONE, replicates=1), claim("b", "not tested")]
    write(tmp_path / answers.CLAIMS, claims)
    rows = [reward("sft0", "", -0.25, "", ""), reward("ppo", 0.05, 1.25, "", 2), reward("salsa", 0.05, 1.5, "", 2.5)]
    write(tmp_path / answers.REWARDS, rows)
    assert answers.lines(tmp_path) == [
        "none of 2 claims is decided: one replicate tells nothing of other SFT models",
        "salsa − ppo (kl_coef 0.05): proxy +0.25, KL +0.5",
        "arm    kl_coef  proxy  KL to sft0",
        "sft0            -0.25",
        "ppo    0.05     1.25   2",
        "salsa  0.05     1.5    2.5",
    ]


def test_a_long_table_is_cut_and_says_so(tmp_path):
    write(tmp_path / answers.REWARDS, [reward(f"arm{number}", 0.1, number, number, number) for number in range(20)])
    lines = answers.lines(tmp_path)
    assert len(lines) == answers.MOST_ROWS + 2 and lines[-1] == "and 13 more in tables/rewards.md"
    assert answers.short(tmp_path) is None and answers.lines(tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    "content", ["", "claim\n", 'claim,effect\n"a,b', "\x00\xff,\n,,,\n", "arm,kl_coef\nsalsa\nppo\n"]
)
def test_damaged_tables_say_less(tmp_path, content):
    for name in (answers.CLAIMS, answers.REWARDS):
        runs.write_atomically(tmp_path / name, content.encode("latin1"))
    assert all(isinstance(line, str) for line in answers.lines(tmp_path))


def test_published_studies_fit_a_terminal():
    folders = [folder for folder in PUBLISHED.iterdir() if folder.is_dir()]
    assert folders
    for folder in folders:
        lines = answers.lines(folder, 78)
        assert 3 <= len(lines) <= 10 and max(map(len, lines)) <= 78, (folder, lines)
        assert any(line.startswith("salsa − ppo (kl_coef ") for line in lines)


def test_a_study_ends_with_its_answer_and_a_sweep_with_a_line_of_each(tmp_path):
    entries = []
    for name in ("one", "two"):
        path = f"studies/{name}-1"
        write(tmp_path / path / answers.CLAIMS, [claim("higher_gold", "supported", "gold_reward")])
        for file in ("report.html", "claims.md", "figures/a.png"):
            runs.write_atomically(tmp_path / path / file, "")
        runs.write_json(tmp_path / path / runs.MANIFEST, {})
        entries.append({"name": name, "path": path, "looks": [path], "link": f"studies/{name}"})
    link = tmp_path / "studies" / "one"
    assert list(studies.conclude(plan.Plan(str(tmp_path), studies=entries[:1]))) == [
        f"study one: {link} -> one-1",
        "  1 claim tested: 1 supported",
        "  supported: higher_gold is said",
        "  salsa − ppo (kl_coef 0.3): gold +1 [0.5, 1.5]",
        f"  {link}/report.html",
        "  beside it: claims.md, tables/, figures/ (1)",
    ]
    lines = list(studies.conclude(plan.Plan(str(tmp_path), studies=entries)))
    assert [line for line in lines if "−" in line] == ["  salsa − ppo (kl_coef 0.3): gold +1 [0.5, 1.5]"] * 2
    assert len(lines) == 4
