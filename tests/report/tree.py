"""A results tree of finished fake runs with hand-checkable numbers, for whatever reads a whole study."""

import dataclasses
import functools
import itertools
import json
import math

import numpy as np

from salsa.report import sections, study, style
from salsa.workflow import compose, config, overriding, runs, schema

ARMS = {"ppo": "0", "salsa": "0.5", "other": "1"}
UNTRAINED = ("best_of_n", "untrained_soup", "warp")  # arms whose last is not trained, as the fake runs are
EVERY_ARM = ARMS | {name: None for name in overriding.presets("arm") if name not in (*ARMS, *UNTRAINED)}
EVIL = "<script>alert(1)</script> | **bold** [link](x)\n| new | row |"


@functools.cache
def composed():
    """A study of every arm of conf/arm, and the claims of conf/claims.yaml."""
    return compose.compose([f"arm=[{','.join(EVERY_ARM)}]", "sft.models=3"])[0].config


def presets():
    """The arms of conf/arm."""
    return schema.dump(composed().arms)


@dataclasses.dataclass
class Anything:
    """Settings of a fake stage."""

    label: str
    seed: int = 0


class LengthGold:
    """A gold judge whose score is the number of letters."""

    def score(self, prompts, responses):
        return np.array([len(text) for text in responses], dtype=np.float64)


class Tree:
    """A results tree of finished fake runs, and the study's settings and parents over it.

    `only` names the kl_coefs of an arm that is not run at all of them; the arms of `planes` span a plane in the first
    replicate at the first kl_coef; in a tournament each arm is judged against every arm before it. Each policy is
    trained with `seeds` seeds, and answers each prompt `samples` times.
    """

    def __init__(self, root, replicates=(0, 1), arms=ARMS, kl_coefs=(0.05,), gold=True, prompts=12, iterations=6,
                 benchmarks=("in_distribution", "out_of_distribution"), judges=("gold",), only=None,
                 planes=("salsa",), tournament=False, seeds=1, samples=1):  # fmt: skip
        self.root, self.gold, self.prompts, self.iterations = root / "results", gold, prompts, iterations
        self.only, self.planes, self.tournament = only or {}, planes, tournament
        self.seeds, self.samples = seeds, samples
        self.benchmarks, self.judges, self.arms = benchmarks, judges if gold else (), arms
        self.figures = {}  # name -> the figure that was not rendered
        self.policies, self.parents = [], {"prepare": self.run("prepare", "p", {}, {"gold/gold.json": "{}"})}
        base = self.run("base", "b", {}, {"model/config.json": "{}"})
        for replicate in replicates:
            self.replicate(replicate, base, kl_coefs, spans_plane=replicate == replicates[0])
        values = schema.defaults(config.Config)
        values |= {"name": "tiny_test", "title": "A test", "replicates": list(replicates), "kl_coefs": list(kl_coefs)}
        values["arms"] = {arm: presets()[arm] for arm in sorted(arms) if arm in EVERY_ARM}  # as a plan sorts them
        values["alphas"] = [alpha for arm, alpha in arms.items() if arm.startswith("alpha")]
        values["benchmarks"] = {name: {"kind": "in_distribution"} for name in benchmarks}
        values["judges"] = {name: {"kind": name, "tournament": tournament} for name in self.judges}
        values["claims"] = schema.dump(composed().claims)
        values["model"] |= {"name": "tiny", "source": "pretrain"}
        values["data"] |= {
            "name": "stories",
            "task": {"kind": "stories" if gold else "ultra"},
            "corpus": {"kind": "stories"},
        }
        values["report"] |= {"bootstrap": 200, "samples": 2}
        values["ppo"]["seeds"], values["evaluate"]["samples"] = seeds, samples
        for name in ("execution", "results", "companions", "objective"):
            del values[name]
        self.settings = config.StudySettings(config=values, policies=self.policies)

    def run(self, stage, label, parents, files, seed=0):
        def write(settings, parents, output, execution):
            for name, text in files.items():
                runs.write_atomically(output / name, text)

        output = self.root / stage / f"{label}-0123456789ab"
        runs.execute(stage, 1, write, Anything(label, seed), parents, output, config.Execution())
        return output

    def replicate(self, replicate, base, kl_coefs, spans_plane):
        label, prepare = f"r{replicate}", self.parents["prepare"]
        sft = [self.run("sft", f"{label}-s{i}", {"prepare": prepare, "base": base}, {"model/config.json": str(i)}, i)
               for i in (0, 1)]  # fmt: skip
        models = {"prepare": prepare, "sft0": sft[0], "sft1": sft[1]}
        held_out = {"held_out_accuracy": 0.8, "gold_agreement": 0.85 if self.gold else None, "pairs": 10, "held_out": 5}
        reward = self.run("reward_model", label, models, {"evaluation.json": json.dumps(held_out)})
        landscape = self.run("landscape", label, models | {"reward_model": reward}, self.landscape(replicate))
        gates = self.run("gates", label, {"landscape": landscape, "reward_model": reward}, self.gates(replicate))
        self.parents |= {f"reward_model/r{replicate}": reward, f"landscape/r{replicate}": landscape}
        self.parents[f"gates/r{replicate}"] = gates
        parents = {"prepare": prepare, "reward_model": reward, "sft0": sft[0]}
        for seed in range(self.seeds):
            self.training(replicate, seed, parents, landscape, kl_coefs, spans_plane and seed == 0)

    def training(self, replicate, seed, parents, landscape, kl_coefs, spans_plane):
        plain, judged, self.seed = {}, {}, seed
        label = f"r{replicate}" + f"-t{seed}" * bool(seed)
        for arm, alpha in self.arms.items():
            for kl_coef in self.only.get(arm, kl_coefs):
                index, name = len(self.policies), f"{arm}-kl_{kl_coef}"
                ppo = self.run("ppo", f"{label}-{name}", parents, self.ppo(replicate, arm, kl_coef))
                respond = self.run("respond", f"{label}-{name}", parents | {"policy": ppo},
                                   self.respond(replicate, arm, kl_coef))  # fmt: skip
                baselines = {"sft0": "sft0"} | ({"ppo": plain[kl_coef][0]} if kl_coef in plain else {})
                plain.setdefault(kl_coef, (name, respond))
                self.parents |= {f"policy/{index}": ppo, f"respond/{index}": respond}
                if arm in self.planes and spans_plane and kl_coef == self.only.get(arm, kl_coefs)[0]:
                    self.parents[f"plane/{index}"] = self.run("plane", f"{label}-{name}", parents | {"policy": ppo},
                                                              {"plane.csv": self.plane(arm)})  # fmt: skip
                opponents = dict(baselines)
                if self.tournament:
                    opponents |= {other: other for other in judged.get(kl_coef, ()) if other not in baselines.values()}
                judged.setdefault(kl_coef, []).append(name)
                for judge in self.judges:
                    verdicts = {"verdicts.jsonl": lines(self.verdicts(replicate, arm, name, opponents, judge))}
                    self.parents[f"judge/{judge}/{index}"] = self.run(
                        "judge", f"{label}-{name}-{judge}", {"candidate": respond, "baseline/sft0": landscape}, verdicts
                    )
                self.policies.append(
                    {"arm": arm, "alpha": alpha, "kl_coef": kl_coef, "replicate": replicate, "seed": seed, "name": name,
                     "index": index, "baselines": baselines}
                )  # fmt: skip

    def rows(self, model, reward, gold, text):
        return [
            {"benchmark": benchmark, "prompt_id": f"{benchmark}-{i}", "sample": j, "category": "", "model": model,
             "prompt": ["write"], "responses": [text], "tokens": [20 + i + 2 * j], "finish_reasons": ["stop"],
             "reward": reward + i + 0.5 * j, "gold": gold + i + 0.25 * j if self.gold else None}
            for benchmark in self.benchmarks for i in range(self.prompts) for j in range(self.samples)
        ]  # fmt: skip

    def number(self, value):
        return value if self.gold else None

    def landscape(self, replicate):
        line = [
            [a, 2 - 0.1 * a * (1 - a) + 0.03 * replicate, 2 + 0.03 * replicate, 0.1 * a + replicate * 0.02, 0.01,
             0.2 + 0.1 * a + 0.01 * replicate if self.gold else "", 0.01 if self.gold else "", 0.8 * a, 0.01, 25, 0.98]
            for a in (0, 0.25, 0.5, 0.75, 1)
        ]  # fmt: skip
        header = ("alpha,loss,loss_interpolated,reward,reward_se,gold_reward,gold_reward_se,kl_from_sft0,"
                  "kl_from_sft0_se,response_length,eos_rate")  # fmt: skip
        responses = [row for model in ("sft0", "sft1", "soup") for row in self.rows(model, 0.0, 0.0, EVIL)]
        text = "\n".join([header, *(",".join(map(str, row)) for row in line)]) + "\n"
        return {"line.csv": text, "responses.jsonl": lines(responses)}

    def gates(self, replicate):
        gates = {
            "held_out_accuracy": 0.8,
            "gold_agreement": self.number(0.85),
            "kl_sft0_soup": 0.4,
            "barrier": 0.002,
            "gold": {name: self.number(x + 0.01 * replicate) for name, x in
                     (("sft0", 0.2), ("sft1", 0.3), ("soup", 0.25))},
            "largest_kl_coef": 0.05,
            "largest_manipulation": 0.05 * 0.4,
            "claim_kl_coef": None,
            "claim_manipulation": None,
            "soup_minus_sft0_reward": 0.05 - 0.01 * replicate,
            "soup_minus_sft0_reward_se": 0.02,
            "soup_minus_sft0_gold": self.number(0.05),
            "soup_minus_sft0_gold_se": self.number(0.01),
            "warnings": ["the soup is near"] if replicate else [],
        }  # fmt: skip
        return {"gates.json": json.dumps(gates)}

    def final(self, replicate, arm, kl_coef):
        place = list(self.arms).index(arm)
        gain = 1 + 0.2 * place + 0.1 * replicate + 0.05 * place * replicate + 0.03 * self.seed * (1 + place)
        return gain, (3 + 2 * place) * 0.05 / kl_coef + 0.5 * self.seed

    def ppo(self, replicate, arm, kl_coef):
        gain, kl = self.final(replicate, arm, kl_coef)
        metrics, rollouts = [], []
        for i in range(self.iterations):
            share = 1 - math.exp(-3 * i / self.iterations)
            metrics.append({"iteration": i, "score": gain * share, "reward": gain * share - 0.1,
                            "kl_to_sft0": kl * share, "kl_to_reference": 0.5 + kl * share,
                            "response_length": 25 - 3 * share, "eos_rate": 0.9, "entropy": 2 - share,
                            "kl_coef": kl_coef * (1 - share if arm == "decaying_beta" else 1)})  # fmt: skip
            if i % 5 == 0:
                rollouts += [{"iteration": i, "prompt_id": n, "prompt": [{"role": "user", "content": "w"}],
                              "response": "x" * (n + 1 + i), "score": 0.0, "kl_to_reference": 0, "kl_to_sft0": 0}
                             for n in range(3)]  # fmt: skip
        return {"metrics.jsonl": lines(metrics), "rollouts.jsonl": lines(rollouts)}

    def respond(self, replicate, arm, kl_coef):
        gain, kl = self.final(replicate, arm, kl_coef)
        evaluation = {"kl_to_sft0": kl, "kl_to_reference": kl + 0.5, "reward": gain, "response_length": 22.0,
                      "gold_reward": self.number(0.3 + gain / 10), "gold_reward_se": self.number(0.01),
                      "eos_rate": 0.95, "prompts": 40, "iteration": self.iterations}  # fmt: skip
        responses = lines(self.rows("policy", gain, gain if arm == "ppo" else -gain, f"a {arm} story | {EVIL}"))
        return {"evaluation.json": json.dumps(evaluation), "responses.jsonl": responses,
                "geometry.json": json.dumps(self.geometry(replicate, arm))}  # fmt: skip

    def geometry(self, replicate, arm):
        """sft1 lies 4 from sft0, whose norm is 20; the policy 3 along the line to it and 4 off it, in units of 1/5."""
        far = (1 + list(self.arms).index(arm)) * (1 + 0.1 * replicate)
        return {"from_sft0": far, "sft0_norm": 20.0, "from_sft1": math.hypot(4 - 0.6 * far, 0.8 * far),
                "from_soup": math.hypot(2 - 0.6 * far, 0.8 * far), "sft0_to_sft1": 4.0, "cosine_sft1": 0.6,
                "along_sft1": 0.6 * far / 4, "off_line": 0.8 * far}  # fmt: skip

    def plane(self, arm):
        """plane.csv: a grid of 3 x 3 and a line of 5 points, on which proxy and gold reward are known functions."""
        gold = (lambda x: f"{x:g}") if self.gold else (lambda x: "")
        points = [("plane", 1 - x - y, x, y) for x in (0, 0.5, 1) for y in (0, 0.5, 1)]
        points += [("line", 1 - x, 0, x) for x in (-0.5, 0, 0.5, 1, 1.5)]
        rows = ["kind,w_sft0,w_sft1,w_policy,reward,reward_se,gold_reward,gold_reward_se,kl_from_sft0,response_length,"
                "eos_rate"]  # fmt: skip
        for kind, w0, w1, wp in points:
            reward, gold_reward = w1 + 2 * wp, 0.2 + 0.1 * w1 + 0.3 * wp - 0.1 * wp**2
            rows.append(f"{kind},{w0:g},{w1:g},{wp:g},{reward:g},0.05,{gold(gold_reward)},{gold(0.01)},"
                        f"{abs(w1) + 2 * abs(wp):g},25,0.95")  # fmt: skip
        return "\n".join(rows) + "\n"

    def verdicts(self, replicate, arm, name, opponents, judge):
        """Against sft0: every third prompt is lost, the others won; else all ties, but for salsa's first.

        With another seed or sample, the prompts that are lost and won are others.
        """
        rows, places = [], itertools.product(self.benchmarks, range(self.prompts), range(self.samples))
        for baseline, (benchmark, i, j) in itertools.product(opponents.values(), list(places)):
            place = i + 2 * j + 4 * self.seed
            won = "model_a" if place % 3 else "model_b"
            tied = "model_a" if (arm, place) == ("salsa", 0) else "tie"
            line = {"prompt_id": f"{benchmark}-{i}", "benchmark": benchmark, "model_a": name, "model_b": baseline,
                    "winner": won if baseline == "sft0" else tied, "judge": judge, "replicate": replicate}  # fmt: skip
            line |= ({"seed": self.seed} if self.seed else {}) | ({"sample": j} if self.samples > 1 else {})
            rows += [line | {"order": order} for order in (0, 1)]
        return rows

    def build(self, monkeypatch, drawn=False):
        """Run the stage; the figures are made, but rendered only where `drawn`."""
        monkeypatch.setattr(study, "gold_judge", lambda prepare: LengthGold() if self.gold else None)
        output = self.root / "studies" / "tiny_test-0123456789ab"
        with monkeypatch.context() as patch:  # of this study alone: the figures of the next are not this one's
            if not drawn:
                patch.setattr(style, "save", lambda figure, folder, name: self.figures.update({name: figure}))
            runs.execute("study", study.VERSION, study.build, self.settings, self.parents, output, config.Execution())
        return output


def table_of(study, name):
    """A table of the report as a data frame."""
    return sections.sections()[name].table(study)


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)
