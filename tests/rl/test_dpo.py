"""DPO: against a plain implementation of it and TRL's own, its pairs, and runs that are interrupted."""

import copy
import dataclasses
import math
import os
import shutil
import signal
from fractions import Fraction

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch.nn.functional import logsigmoid
from trl import DPOConfig, DPOTrainer

from salsa import anchors, dpo, reward
from salsa.algorithms.dpo import LOGS, Dpo
from salsa.data import chat
from salsa.rl import models, reference, training
from salsa.workflow import config, runs

CPU = torch.device("cpu")
HALVES = ["1/2", "1/2"]
LENGTHS = config.Lengths(64, 10)


def make_settings(anchor=("1",), start=("1",), kl_coef=0.1, seed=3, kind="soup", rate=0.0, every=0, **changes):
    """45 pairs: batches of 16, 16 and 13."""
    section = Dpo(**{"pairs": 45, "batch_size": 16, "epochs": 2, "learning_rate": 1e-3} | changes)
    of = config.Reference(kind, list(anchor), rate=rate, every=every)
    return config.TRAINING["dpo"](seed, kl_coef, list(start), of, section, LENGTHS)


CASES = {
    "sft0": make_settings(),
    "soup": make_settings(HALVES, kl_coef=0.7, schedule="cosine", warmup=0.4),
    "from_the_soup": make_settings(["0", "1"], HALVES, schedule="constant", max_grad_norm=0.3),
    "multi_kl": make_settings(["0.7", "0.3"], kind="multi_kl", warmup=0.0),
    "noise": make_settings(HALVES, kind="noise"),
    "ema": make_settings(["1"], kind="ema", rate=0.4),
    "reset": make_settings(["0", "1"], kind="reset", every=2),
}


@pytest.fixture(scope="module")
def fit(parents, tmp_path_factory):
    """A function: the folder and the summary of a run that has trained."""
    done = {}

    def run(settings, parents=parents, **execution):
        key = str((settings, parents, execution))
        if key not in done:
            folder = tmp_path_factory.mktemp("dpo")
            made = config.Execution(device="cpu", **{"micro_batch": 64, "rollout_batch": 16} | execution)
            done[key] = folder, dpo.train(settings, parents, folder, made)
        return done[key]

    return run


@pytest.fixture(scope="module")
def pairs_of(parents, tokenizer, execution):
    def make(settings):
        return dpo.make_pairs(settings, parents, tokenizer, CPU, execution, None)[0]

    return make


@pytest.fixture(scope="module")
def anchor_of(parents, tokenizer):
    def make(settings):
        ingredients = reference.load_ingredients(settings, parents, tokenizer, CPU, 64)
        policy = reference.mix(ingredients.folders, settings.start, "cpu", torch.float32)
        return policy, anchors.build(settings, ingredients)

    return make


def weights(folder, name="model"):
    return load_file(folder / name / "model.safetensors")


def furthest(one, other):
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


class Naive:
    """DPO in float64, a pair and a response at a time. It shares with the trainer only its pairs and their order."""

    def __init__(self, settings, policy, anchor, pairs):
        self.settings, self.dpo, self.pairs = settings, settings.dpo, pairs
        self.policy = copy.deepcopy(policy).double()
        self.references = [copy.deepcopy(model).double() for model in anchor.models]
        given = [float(Fraction(weight)) for weight in settings.reference.weights]
        self.shares = [share for share in given if share] if settings.reference.kind == "multi_kl" else [1.0]
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)

    def logprob(self, model, prompt, response):
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0]
        distributions = torch.log_softmax(logits, dim=-1)
        return sum(distributions[len(prompt) + place - 1, token] for place, token in enumerate(response))

    def ratio(self, prompt, response):
        with torch.no_grad():
            anchored = [self.logprob(model, prompt, response) for model in self.references]
        ours = self.logprob(self.policy, prompt, response)
        return sum(w * (ours - theirs) for w, theirs in zip(self.shares, anchored, strict=True)), ours.item()

    def learning_rate(self, step, steps):
        rising = math.ceil(steps * self.dpo.warmup)
        if step < rising:
            return self.dpo.learning_rate * step / rising
        done = (step - rising) / (steps - rising)
        left = {"constant": 1, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
        return self.dpo.learning_rate * left[self.dpo.schedule]

    def follow(self, step):
        """After step `step` (from 0)."""
        kind, tensors = (
            self.settings.reference,
            zip(self.references[0].parameters(), self.policy.parameters(), strict=True),
        )
        for tensor, ours in tensors:
            if kind.kind == "ema":
                tensor.data = (1 - kind.rate) * tensor.data + kind.rate * ours.data
            elif kind.kind == "reset" and (step + 1) % kind.every == 0:
                tensor.data = ours.data.clone()

    def fit(self):
        size, count = self.dpo.batch_size, len(self.pairs)
        order = training.EpochSampler(count, 1, self.settings.seed)
        per_epoch = math.ceil(count / size)
        steps, rows = self.dpo.epochs * per_epoch, []
        for epoch in range(self.dpo.epochs):
            order.shuffled.set_epoch(epoch)
            places = list(order)
            for start in range(0, count, size):
                batch = [self.pairs[place] for place in places[start : start + size]]
                rows.append(self.step(batch, len(rows), steps))
                if len(rows) < steps:
                    self.follow(len(rows) - 1)
        return rows

    def step(self, batch, step, steps):
        beta, losses, row = self.settings.kl_coef, [], {name: [] for name in list(LOGS)[1:7]}
        for pair in batch:
            chosen, chosen_logprob = self.ratio(pair["prompt"], pair["chosen"])
            rejected, rejected_logprob = self.ratio(pair["prompt"], pair["rejected"])
            margin = beta * chosen - beta * rejected
            losses.append(-logsigmoid(margin))
            values = [margin.item(), beta * chosen.item(), beta * rejected.item(), chosen_logprob, rejected_logprob]
            values.insert(0, margin.item() > 0)
            for column, value in zip(row.values(), values, strict=True):
                column.append(float(value))
        loss = sum(losses) / len(losses)
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.dpo.max_grad_norm)
        rate = self.optimizer.param_groups[0]["lr"] = self.learning_rate(step, steps)
        self.optimizer.step()
        means = {name: sum(column) / len(column) for name, column in row.items()}
        return {"loss": loss.item(), **means, "gradient_norm": norm.item(), "learning_rate": rate}


@pytest.mark.parametrize("name", CASES)
def test_a_run_is_that_of_a_plain_implementation(fit, pairs_of, anchor_of, name):
    settings = CASES[name]
    folder, summary = fit(settings)
    pairs = pairs_of(settings)
    naive = Naive(settings, *anchor_of(settings), pairs)
    expected, metrics = naive.fit(), runs.read_jsonl(folder / "metrics.jsonl")
    assert [row["iteration"] for row in metrics] == list(range(6)) and summary["steps"] == 6
    assert summary["pairs"] == len(pairs) > 32
    for row, wanted in zip(metrics, expected, strict=True):
        assert {column: row[column] for column in wanted} == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    trained = models.load_policy(folder / "model")
    for tensor, wanted in zip(trained.parameters(), naive.policy.parameters(), strict=True):
        assert (tensor - wanted).abs().max() < 2e-5
    assert (folder / "reference").exists() == (name in ("ema", "reset"))
    if name in ("ema", "reset"):
        moved = models.load_policy(folder / "reference")
        for tensor, wanted in zip(moved.parameters(), naive.references[0].parameters(), strict=True):
            assert (tensor - wanted).abs().max() < 2e-5
        assert summary["final_reference"] != summary["reference"]["sha256"]


class Plain(DPOTrainer):
    """TRL's trainer as it is, of tokens, in the order of ours."""

    def _prepare_dataset(self, dataset, *_):
        return dataset

    def _get_train_sampler(self, train_dataset=None):
        self.epoch_sampler = training.EpochSampler(len(self.train_dataset), 1, self.args.seed)
        return self.epoch_sampler


def test_with_the_start_as_reference_it_is_trls_own(fit, pairs_of, anchor_of, tokenizer, tmp_path):
    settings = make_settings(HALVES, HALVES, pairs=32, warmup=0.0)
    pairs = pairs_of(settings)
    assert len(pairs) == 32  # two whole batches, of which TRL's means are exact
    columns = {f"{part}_ids": [pair[part] for pair in pairs] for part in ("prompt", "chosen", "rejected")}
    options = {"per_device_train_batch_size": 16, "num_train_epochs": 2, "learning_rate": 1e-3}
    options |= {"bf16": False, "seed": 3, "beta": 0.1, "use_cpu": True, "save_strategy": "no", "report_to": "none"}
    trainer = Plain(
        model=anchor_of(settings)[0],
        ref_model=anchor_of(settings)[0],
        args=DPOConfig(str(tmp_path), logging_steps=1, max_length=None, gradient_checkpointing=False, **options),
        train_dataset=Dataset.from_dict(columns),
        processing_class=tokenizer,
    )
    trainer.train()
    folder, _ = fit(settings)
    rows, theirs = (
        runs.read_jsonl(folder / "metrics.jsonl"),
        [row for row in trainer.state.log_history if "loss" in row],
    )
    assert len(rows) == len(theirs) == 4
    for row, other in zip(rows, theirs, strict=True):
        assert {column: row[column] for column in dpo.COLUMNS.values()} == {
            column: other[name] for name, column in dpo.COLUMNS.items()
        }
    for tensor, other in zip(
        models.load_policy(folder / "model").parameters(), trainer.model.parameters(), strict=True
    ):
        assert torch.equal(tensor, other)


@pytest.mark.parametrize("name", ["multi_kl", "ema"])
def test_micro_batches_change_nothing(fit, name):
    """The last batch of an epoch is smaller, and a micro-batch of it, too."""
    (whole, summary), (cut, other) = fit(CASES[name]), fit(CASES[name], micro_batch=6)  # so 4 pairs at a time
    assert furthest(weights(whole), weights(cut)) < 2e-5 and summary["pairs"] == other["pairs"] and other["pairs"] % 4
    for row, wanted in zip(*(runs.read_jsonl(folder / "metrics.jsonl") for folder in (cut, whole)), strict=True):
        assert row == pytest.approx(wanted, rel=1e-4, abs=1e-5)


class Interrupted(Exception):
    """A kill that leaves no time to save."""


@pytest.fixture
def interrupt(monkeypatch):
    """A function that lets a training do something once, after its step of a number."""

    def at(step, act):
        step_end, left = training.CheckpointCallback.on_step_end, [step]

        def watched(watch, args, state, control, **named):
            step_end(watch, args, state, control, **named)
            if left == [state.global_step]:
                left.clear()
                act()

        monkeypatch.setattr(training.CheckpointCallback, "on_step_end", watched)

    return at


def kill():
    raise Interrupted


def stop():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("name", "step", "act", "raised"),
    [("soup", 4, kill, Interrupted), ("noise", 2, stop, SystemExit), ("ema", 4, stop, SystemExit),
     ("reset", 5, kill, Interrupted)],
)  # fmt: skip
def test_an_interrupted_run_ends_with_the_same_bytes(fit, parents, interrupt, tmp_path, name, step, act, raised):
    execution = config.Execution(device="cpu", micro_batch=64, rollout_batch=16, checkpoint_minutes=1e-9)
    interrupt(step, act)
    with pytest.raises(raised):
        dpo.train(CASES[name], parents, tmp_path, execution)
    assert not (tmp_path / "model").exists()
    summary = dpo.train(CASES[name], parents, tmp_path, execution)
    folder, expected = fit(CASES[name])
    assert summary == expected
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    files = [path for path in files if path.parts[0] in ("model", "reference", "metrics.jsonl")]
    assert len(files) > 4
    for path in files:
        assert (tmp_path / path).read_bytes() == (folder / path).read_bytes(), path


@pytest.fixture
def draws(monkeypatch):
    """The rollout_batch of each time that pairs are sampled, which another rollout_batch makes others."""
    draw, sizes = reward.draw_pairs, []

    def counted(*arguments):
        sizes.append(arguments[-1].rollout_batch)
        responses = draw(*arguments)
        return responses if sizes[-1] == 16 else [pair[::-1] for pair in responses[:20]]

    monkeypatch.setattr(reward, "draw_pairs", counted)
    return sizes


def test_a_run_goes_on_with_the_pairs_that_it_drew_first(fit, parents, interrupt, draws, tmp_path):
    folder, expected = fit(CASES["soup"])
    draws.clear()
    interrupt(4, kill)
    first = config.Execution(device="cpu", micro_batch=64, rollout_batch=16, checkpoint_minutes=1e-9)
    with pytest.raises(Interrupted):
        dpo.train(CASES["soup"], parents, tmp_path, first)
    summary = dpo.train(CASES["soup"], parents, tmp_path, dataclasses.replace(first, rollout_batch=5))
    assert draws == [16] and summary == expected
    for name in ("metrics.jsonl", "model/model.safetensors"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_pairs_that_a_kill_left_incomplete_are_drawn_again(parents, draws, tmp_path, monkeypatch):
    execution = config.Execution(device="cpu", micro_batch=64, rollout_batch=16)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(dpo.checkpoints, "describe_files", lambda _: kill())
        dpo.train(CASES["soup"], parents, tmp_path, execution)
    assert (tmp_path / runs.CHECKPOINTS / dpo.KEPT / "pairs.jsonl").exists()
    dpo.train(CASES["soup"], parents, tmp_path, execution)
    assert draws == [16, 16]


@pytest.mark.parametrize("damage", ["altered", "removed"])
def test_damaged_pairs_are_refused(parents, interrupt, draws, tmp_path, damage):
    execution = config.Execution(device="cpu", rollout_batch=16, checkpoint_minutes=1e-9)
    interrupt(2, kill)  # after the checkpoint of the first step
    with pytest.raises(Interrupted):
        dpo.train(CASES["soup"], parents, tmp_path, execution)
    kept = tmp_path / runs.CHECKPOINTS / dpo.KEPT
    if damage == "altered":
        text = (kept / "pairs.jsonl").read_text()
        (kept / "pairs.jsonl").write_text(text.replace("[", " ", 1))
        says = r"pairs: pairs.jsonl was altered since it was written; remove .*checkpoints and run again"
    else:
        shutil.rmtree(kept)
        says = r"pairs/files.json: missing, or altered since it was written; remove .*checkpoints and run again"
    with pytest.raises(runs.UserError, match=says):
        dpo.train(CASES["soup"], parents, tmp_path, execution)
    assert draws == [16]


def test_an_altered_reference_in_a_checkpoint_is_refused(parents, interrupt, tmp_path):
    execution = config.Execution(device="cpu", checkpoint_minutes=1e-9)
    interrupt(3, kill)
    with pytest.raises(Interrupted):
        dpo.train(CASES["ema"], parents, tmp_path, execution)
    (saved,) = (tmp_path / runs.CHECKPOINTS).glob("checkpoint-*")
    with open(saved / dpo.MOVED, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"!")
    with pytest.raises(runs.UserError, match=f"{dpo.MOVED} was altered since it was written"):
        dpo.train(CASES["ema"], parents, tmp_path, execution)


def test_adapters_train_towards_a_reference_of_their_own(fit, anchor_of):
    settings = make_settings(HALVES, lora_rank=2, lora_alpha=4.0, learning_rate=1e-2)
    folder, _ = fit(settings)
    start, _ = anchor_of(settings)
    moved = [
        name
        for name, tensor in start.state_dict().items()
        if name in weights(folder) and not torch.equal(tensor, weights(folder)[name])
    ]
    assert len(moved) == 2 * 7 and not (folder / "model" / "adapter_config.json").exists()
    rows = runs.read_jsonl(folder / "metrics.jsonl")
    assert rows[0]["chosen_reward"] != 0 and rows[-1]["loss"] < rows[0]["loss"]


def test_in_bfloat16_weights_stay_in_float32(fit):
    settings = dataclasses.replace(make_settings(), mixed_precision="bf16")
    folder, _ = fit(settings)
    exact = runs.read_jsonl(fit(make_settings())[0] / "metrics.jsonl")
    for row, wanted in zip(runs.read_jsonl(folder / "metrics.jsonl"), exact, strict=True):
        assert row["loss"] == pytest.approx(wanted["loss"], abs=0.02)
    assert {tensor.dtype for tensor in weights(folder).values()} == {torch.float32}


def test_it_learns_its_pairs(fit):
    folder, _ = fit(make_settings(label_temperature=1e-3, epochs=6, batch_size=8, learning_rate=5e-3))
    rows = runs.read_jsonl(folder / "metrics.jsonl")
    assert rows[-1]["loss"] < 0.3 and rows[-1]["accuracy"] > 0.9 and rows[-1]["margin"] > 1


def test_pairs_are_labelled_by_the_reward_model_and_none_is_held_out(parents, tokenizer, execution):
    settings = make_settings(pairs=100, label_temperature=1e-6)
    pairs, counts = dpo.make_pairs(settings, parents, tokenizer, CPU, execution, None)
    assert counts == {"read": 96, "sampled": 100, "kept": len(pairs), "dropped_identical": 100 - len(pairs)}
    scorer = models.load_score_model(parents["reward_model"])
    for pair in pairs:
        scores = [
            scorer.classifier(input_ids=torch.tensor([pair["prompt"] + pair[side]])).logits.item()
            for side in ("chosen", "rejected")
        ]
        assert scores[0] > scores[1]
        assert all(1 <= len(pair[side]) <= 10 for side in ("chosen", "rejected"))
    encoded = chat.encode_prompts(
        tokenizer, [row["prompt"] for row in runs.read_jsonl(parents["prepare"] / "preference_prompts.jsonl")]
    )
    held_out = {tuple(prompt) for prompt in encoded[:16]} - {tuple(prompt) for prompt in encoded[16:]}
    assert len(held_out) > 10 and not held_out & {tuple(pair["prompt"]) for pair in pairs}
    assert dpo.make_pairs(settings, parents, tokenizer, CPU, execution, None)[0] == pairs
    other = dpo.make_pairs(make_settings(pairs=100, seed=4), parents, tokenizer, CPU, execution, None)[0]
    assert [pair["chosen"] for pair in other] != [pair["chosen"] for pair in pairs]


def test_labels_have_bradley_terry_noise_of_the_normalised_reward(parents, tokenizer, execution):
    """Of as many pairs, the share of better chosen responses is the mean of σ(difference)."""
    settings = make_settings(pairs=600)
    pairs, _ = dpo.make_pairs(settings, parents, tokenizer, CPU, execution, None)
    scorer = models.load_score_model(parents["reward_model"])
    scores = [
        scorer.scores(
            dpo.forward.from_lists([pair["prompt"] for pair in pairs], [pair[side] for pair in pairs], [], 0), 64
        )
        for side in ("chosen", "rejected")
    ]
    difference = scores[0] - scores[1]
    expected = torch.sigmoid(difference.abs())
    deviation = (expected * (1 - expected)).sum().sqrt()
    assert abs((difference > 0).sum() - expected.sum()) < 4 * deviation and expected.mean() > 0.6


@pytest.fixture(scope="module")
def given(parents, tmp_path_factory):
    """Parents of a data set with preferences of its own, of which the reward model holds out 16."""
    root = tmp_path_factory.mktemp("given")
    prepare = shutil.copytree(parents["prepare"], root / "prepare")
    prompts = runs.read_jsonl(prepare / "preference_prompts.jsonl")
    texts = [row["messages"][-1]["content"] for row in runs.read_jsonl(prepare / "sft.jsonl")]
    sides = [{"role": "assistant", "content": " ".join(text.split()[:8])} for text in texts]
    rows = [
        {"prompt": row["prompt"], "chosen": [sides[i % 48]], "rejected": [sides[(i + 7) % 48]]}
        for i, row in enumerate(prompts)
    ]
    rows[20]["chosen"] = [{"role": "assistant", "content": texts[0] + " " + texts[1]}]
    runs.write_jsonl(prepare / "preferences.jsonl", rows)
    settings = config.RewardModelSettings(3, "given", config.RewardModel(pairs=20, held_out=16, batch_size=10), LENGTHS)

    def write(settings, _, output, execution):
        for name in ("model", "normalisation.json"):
            copy_ = shutil.copytree if name == "model" else shutil.copy
            copy_(parents["reward_model"] / name, output / name)

    runs.execute("reward_model", 1, write, settings, {}, root / "reward_model", config.Execution())
    return {"prepare": prepare, "reward_model": root / "reward_model", "sft0": parents["sft0"]}


def test_the_datas_pairs_are_those_that_the_reward_model_is_not_measured_on(given, tokenizer, execution, fit):
    settings = make_settings(pairs=40, label_temperature=1.0)
    pairs, counts = dpo.make_pairs(settings, given, tokenizer, CPU, execution, None)
    reward_settings = config.RewardModelSettings(
        3, "given", config.RewardModel(pairs=20, held_out=16, batch_size=10), LENGTHS
    )
    every, _ = reward.read_pairs(reward_settings, given, tokenizer, None)
    assert counts == {"read": 96, "kept": 95, "dropped_too_long": 1}
    assert pairs == [pair for pair in every if not pair["held_out"]][:40] and len(pairs) == 40
    assert pairs[0]["chosen"][-1] == tokenizer.eos_token_id
    folder, summary = fit(settings, given)
    assert summary["pairs"] == 40 and summary["steps"] == 6 and (folder / "model").is_dir()


def test_too_few_pairs_are_refused(given, tokenizer, execution, tmp_path):
    few = shutil.copytree(given["prepare"], tmp_path / "few")
    runs.write_jsonl(few / "preferences.jsonl", runs.read_jsonl(few / "preferences.jsonl")[:30])
    says = "13 pairs are left of 30 rows without reward_model.held_out=16: too few for dpo.batch_size=16"
    with pytest.raises(runs.UserError, match=says):
        dpo.train(make_settings(), given | {"prepare": few}, tmp_path / "run", execution)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (make_settings(kl_coef=0.0), "kl_coef=0 is DPO's β, which must be above 0"),
        (make_settings(kind="ema", rate=0.1, lora_rank=2), "dpo.lora_rank=2 trains adapters, and a reference that mov"),
        (make_settings(kind="reset", every=6), r"reference.every=6: must be at least 1 and below the 6 iterations"),
    ],
)
def test_what_can_not_be_trained_is_refused(parents, execution, tmp_path, settings, says):
    with pytest.raises(runs.UserError, match=says):
        dpo.train(settings, parents, tmp_path, execution)
    assert not list(tmp_path.iterdir())


def test_a_learning_rate_that_explodes_ends_the_run(parents, execution, tmp_path):
    says = r"dpo\.learning_rate=1e\+30: .* not finite at step \d of 6; lower it"
    with pytest.raises(runs.UserError, match=says):
        dpo.train(make_settings(learning_rate=1e30), parents, tmp_path, execution)
    assert (tmp_path / "diverged.safetensors").exists() and not (tmp_path / "model").exists()
