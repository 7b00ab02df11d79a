"""What the intervals of a study allow to say of each arm against plain PPO, and no more.

Differences are paired: the same replicate (SFT models, reward model, PPO seed) and the same kl_coef. The interval is a
t interval over replicates; one replicate has none. The text names a direction only where the interval excludes zero.
"""

import pandas as pd

from salsa.evaluate import statistics
from salsa.report import tables

BASELINE = "ppo"  # the role; the arm that plays it is `study.plain`
QUANTITIES = {  # key of evaluation.json -> words; reward first, since that is what an arm is chosen for
    "gold_reward": "gold reward",
    "reward": "proxy reward",
    "kl_to_sft0": "KL(policy ‖ sft0), nats a response",
}
HEADER = f"""# Claims

Each row is the difference of an arm and `{BASELINE}` at the same kl_coef: paired by replicate, averaged, with a 95 % t
interval over replicates. SALSA's claims, and the rows that test them: *the policy deviates further from its start*,
KL(policy ‖ sft0); *its rewards are higher*, gold reward (proxy reward shows what was optimised, not what was wanted);
*it is preferred, also out of distribution*, the win rates. Two arms at one kl_coef are not at the same KL; the frontier
figure shows them there, without an interval. An arm that scales kl_coef is paired at the kl_coef before the scale. Rows
are many and each interval stands alone: at 95 %, one in twenty excludes 0 where there is no difference at all."""


def text(study):
    """The whole of claims.md."""
    arms = [arm for arm in study.arms if arm != study.plain]
    parts = [HEADER]
    if study.plain is None or not arms:
        parts.append(f"This study has no arm beside `{BASELINE}` to compare with it: no claim can be tested.")
    if len(study.replicates) == 1:
        parts.append("**One replicate: everything here is conditional on one SFT pair.**")
    for arm in sorted(arms, key=lambda name: name != "salsa") if study.plain else ():
        for kl_coef in study.kl_coefs:
            rows = differences(study, arm, kl_coef)
            if rows:
                parts += [f"## {arm} against {BASELINE}, kl_coef {kl_coef:g}", described(study, arm)]
                parts.append(tables.markdown(_table(rows)))
    signs = sign_tests(study)
    if len(signs):
        parts += ["## Sign tests over prompts", _sign_text(signs), tables.markdown(tables.readable(signs))]
    return "\n\n".join(part for part in parts if part) + "\n"


def described(study, arm):
    """What the configuration says of an arm; nothing of an alpha that is no arm."""
    text = study.config["arms"].get(arm, {}).get("description", "")
    return text[:1].upper() + text[1:]


def differences(study, arm, kl_coef):
    """(quantity, paired differences (R,)) of an arm and ppo: rewards, KL, and win rate against ppo minus ½."""
    first = {policy.replicate: policy for policy in study.of(arm=arm, kl_coef=kl_coef)}
    second = {policy.replicate: policy for policy in study.of(arm=study.plain, kl_coef=kl_coef)}
    rows = []
    for key, words in QUANTITIES.items():
        values = [
            {k: policy.evaluation[key] for k, policy in policies.items() if policy.evaluation.get(key) is not None}
            for policies in (first, second)
        ]
        rows.append((words, statistics.paired_differences(*values)))
    name = next((p.name for p in first.values()), None)
    baseline = next((p.baselines[BASELINE] for p in first.values() if BASELINE in p.baselines), None)
    for judge, benchmark in tables.judged(study):
        rates = tables.replicate_win_rates(study, name, baseline, judge, [benchmark])
        words = f"win rate against {BASELINE} minus ½: {benchmark}, judge {judge}"
        rows.append((words, statistics.paired_differences(rates, dict.fromkeys(rates, 0.5))))
    return [(words, values) for words, values in rows if len(values)]


def _table(rows):
    shown = []
    for words, values in rows:
        mean, low, high = statistics.replicate_interval(values)
        interval = f"[{tables.number(low)}, {tables.number(high)}]" if low == low else "none"
        cells = [words, tables.number(mean), interval, str(len(values)), verdict(low, high, len(values))]
        shown.append(dict(zip(("quantity", "difference", "95 % interval", "n", "what it allows"), cells, strict=True)))
    return pd.DataFrame(shown)


def verdict(low, high, count):
    """What a t interval over `count` replicates allows to say of a difference."""
    if count == 1:
        return "conditional on one SFT pair: no interval, no statement about the arm"
    if low > 0:
        return f"above {BASELINE}: the interval excludes 0 with {count} replicates"
    if high < 0:
        return f"below {BASELINE}: the interval excludes 0 with {count} replicates"
    return f"the interval contains 0: undecided with {count} replicates"


def sign_tests(study):
    """Exact sign tests over prompts of every arm against ppo, and Holm's correction over all of them."""
    rows = []
    for arm in study.arms:
        for kl_coef in study.kl_coefs:
            policies = study.of(arm=arm, kl_coef=kl_coef)
            baseline = policies[0].baselines.get(BASELINE) if policies else None
            for judge, benchmark in tables.judged(study) if baseline else ():
                lines = study.verdicts.get((judge, benchmark, policies[0].name, baseline), [])
                found = statistics.compare(lines, policies[0].name, baseline, resamples=1)
                if found["prompts"]:
                    row = {"arm": arm, "kl_coef": kl_coef, "benchmark": benchmark, "judge": judge}
                    kept = ("wins", "ties", "losses", "swap_consistency", "sign_test_p")
                    rows.append(row | {name: found[name] for name in kept})
    frame = pd.DataFrame(rows)
    if rows:
        frame["holm_p"] = statistics.holm(frame["sign_test_p"])
    return frame


def _sign_text(frame):
    small = int((frame["holm_p"] < 0.05).sum())
    return (
        f"Wins and losses of prompts against `{BASELINE}`, conditional on these models (a small p says that these "
        f"policies differ, not that their arms do): {small} of {len(frame)} stay below 0.05 after Holm's correction."
    )
