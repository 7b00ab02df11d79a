"""Stages sft and reward_model: what they train on, what they keep, what they count."""

import copy
import dataclasses
import shutil

import conftest
import numpy as np
import pytest
import torch
from byte_tokenizers import CHATML, byte_tokenizer
from conftest import random_llama, save_model
from transformers import AutoModelForSequenceClassification

from salsa import base, reward, sft
from salsa.data import chat
from salsa.data.messages import assistant, user
from salsa.evaluate import landscape
from salsa.judges import reward_model as judge
from salsa.rl import divergence, forward, models
from salsa.rl.training import EpochSampler
from salsa.workflow import config, runs, stages

LENGTHS = config.Lengths(prompt=64, response=44)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def train_sft(prepare_run, base_run, execution, tmp_path_factory):
    """Train an SFT model: (model, summary, log history)."""
    done = {}

    def run(seed=1, prepare=prepare_run, lengths=LENGTHS, micro_batch=64, **changes):
        key = (seed, str(prepare), str(lengths), micro_batch, *sorted(changes.items()))
        if key not in done:
            values = {"epochs": 2, "batch_size": 16, "learning_rate": 5e-3, "stop": "epochs"}
            settings = config.SftSettings(seed, config.Sft(**values | changes), lengths)
            output = tmp_path_factory.mktemp("sft-stage")
            chosen = dataclasses.replace(execution, micro_batch=micro_batch)
            summary = sft.train(settings, {"prepare": prepare, "base": base_run}, output, chosen)
            shutil.rmtree(output / runs.CHECKPOINTS, ignore_errors=True)
            history = runs.read_json(output / "log_history.json")
            done[key] = models.load_policy(output / "model"), summary, history
        return done[key]

    return run


def difference(model, other):
    return max((a - b).abs().max().item() for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.fixture(scope="module")
def validation(prepare_run, tokenizer):
    rows = runs.read_jsonl(prepare_run / "sft_validation.jsonl")
    pairs = [chat.encode_conversation(tokenizer, row["messages"]) for row in rows]
    return [(p, r) for p, r in pairs if len(p) <= LENGTHS.prompt and len(r) <= LENGTHS.response]


@torch.no_grad()
def naive_loss(model, pairs):
    """Nats a response token."""
    losses = []
    for prompt, response in pairs:
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        losses += torch.nn.functional.cross_entropy(logits, torch.tensor(response), reduction="none").tolist()
    return sum(losses) / len(losses)


def test_rows_are_masked_to_the_response(tokenizer, prepare_run):
    rows = runs.read_jsonl(prepare_run / "sft.jsonl")
    data, counts = sft.tokenize(tokenizer, rows, config.Lengths(200, 200))
    assert counts == {"read": len(rows), "kept": len(rows), "dropped_too_long": 0}
    for row, made in zip(rows, data, strict=True):
        response = [i for i, m in zip(made["input_ids"], made["completion_mask"], strict=True) if m]
        words = row["messages"][-1]["content"].split()
        assert response == [*tokenizer.convert_tokens_to_ids(words), tokenizer.eos_token_id]
        assert made["completion_mask"] == sorted(made["completion_mask"])
        assert made["input_ids"][0] == tokenizer.bos_token_id and tokenizer.unk_token_id not in made["input_ids"]


def test_rows_that_are_too_long_are_dropped_and_counted(tokenizer, prepare_run):
    rows = runs.read_jsonl(prepare_run / "sft.jsonl")
    encoded = [chat.encode_conversation(tokenizer, row["messages"]) for row in rows]
    lengths = config.Lengths(20, 18)
    fitting = [p + r for p, r in encoded if len(p) <= 20 and len(r) <= 18]
    assert 0 < len(fitting) < len(rows)
    data, counts = sft.tokenize(tokenizer, rows, lengths)
    assert counts == {"read": len(rows), "kept": len(fitting), "dropped_too_long": len(rows) - len(fitting)}
    assert [row["input_ids"] for row in data] == fitting
    with pytest.raises(runs.UserError, match=r"lengths.prompt=20 and lengths.response=1\b"):
        sft.tokenize(tokenizer, rows, config.Lengths(20, 1))


def test_the_loss_is_that_of_the_responses(train_sft, validation, base_run):
    model, summary, history = train_sft()
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert summary["validation_losses"] == losses and len(losses) == 2
    assert losses[-1] == pytest.approx(naive_loss(model, validation), rel=1e-4)
    assert summary["validation_loss"] == losses[-1] and summary["epoch"] == 2
    assert losses[-1] < naive_loss(models.load_policy(base_run / "model"), validation) - 0.5
    found = landscape.token_loss(model, validation, 0, CPU, config.Execution(micro_batch=5))
    assert found == pytest.approx(losses[-1], rel=1e-4)
    assert summary["counts"]["sft_validation"]["kept"] == len(validation)


def test_prompts_are_not_learned(train_sft, prepare_run, tokenizer):
    """In one step of all demonstrations that changes no weight, the training loss is that of the base's responses."""
    model, summary, history = train_sft(learning_rate=1e-30, epochs=1, batch_size=48)
    rows = runs.read_jsonl(prepare_run / "sft.jsonl")
    pairs = [chat.encode_conversation(tokenizer, row["messages"]) for row in rows]
    assert summary["counts"]["sft"]["kept"] == len(rows) == 48 and history[-1]["step"] == 1
    assert history[-1]["train_loss"] == pytest.approx(naive_loss(model, pairs), rel=1e-4)


def test_a_single_step_has_no_warm_up(train_sft, base_run):
    """The first step of a warm-up has a learning rate of 0: were it the only one, nothing would be trained."""
    model, _, history = train_sft(epochs=1, batch_size=48, warmup=0.05)
    assert history[-1]["step"] == 1
    moved = difference(model, models.load_policy(models.model_folder(base_run)))
    assert moved == pytest.approx(5e-3, rel=0.01)  # Adam's first step is the learning rate, where there is a gradient


def test_the_best_epoch_is_kept(train_sft, validation, prepare_run, tmp_path):
    few = shutil.copytree(prepare_run, tmp_path / "few")
    runs.write_jsonl(few / "sft.jsonl", runs.read_jsonl(prepare_run / "sft.jsonl")[:8])
    values = {"prepare": few, "epochs": 12, "learning_rate": 5e-2, "batch_size": 4}
    last, summary, _ = train_sft(**values)
    losses = summary["validation_losses"]
    assert len(losses) == 12 and min(losses) < losses[-1] - 0.01
    best, kept, _ = train_sft(stop="validation", **values)
    assert kept["validation_losses"] == pytest.approx(losses, rel=1e-5)
    assert kept["validation_loss"] == min(kept["validation_losses"])
    assert kept["epoch"] == 1 + int(np.argmin(losses)) < 12
    assert naive_loss(best, validation) == pytest.approx(min(losses), rel=1e-4)
    assert naive_loss(last, validation) == pytest.approx(losses[-1], rel=1e-4)


def test_a_seed_changes_the_model_and_dropout_does(train_sft):
    first, second = train_sft(seed=1)[0], train_sft(seed=2)[0]
    assert difference(first, second) > 1e-3
    assert difference(train_sft(seed=1, weight_decay=0.0)[0], first) == 0
    dropped = train_sft(seed=1, dropout=0.5)[0]
    assert difference(first, dropped) > 1e-3
    assert dropped.config.attention_dropout == 0 and dropped.config.use_cache


def test_micro_batches_change_nothing(train_sft):
    """A micro-batch that does not divide the batch is made smaller, and the batch stays what it is."""
    assert models.even_micro_batch(96, 64) == 48 and models.even_micro_batch(32, 128) == 32
    assert models.even_micro_batch(7, 6) == 1
    whole, _, history = train_sft(epochs=1)
    cut, _, cut_history = train_sft(epochs=1, micro_batch=6)
    assert history[-1]["step"] == cut_history[-1]["step"] == 3
    assert difference(whole, cut) < 2e-3


def reward_settings(preferences="sampled", seed=3, lengths=None, **changes):
    values = {"pairs": 48, "held_out": 16, "epochs": 2, "batch_size": 16, "learning_rate": 5e-3}
    values |= {"gold_temperature": 0.05, "normalisation_prompts": 40} | changes
    lengths = lengths or config.Lengths(64, 10)
    return config.RewardModelSettings(seed, preferences, config.RewardModel(**values), lengths)


class LengthGold:
    """Long answers are good."""

    def score(self, prompts, responses):
        return np.array([len(response.split()) / 10 for response in responses])


def test_pairs_are_sampled_equally_and_labelled_by_gold(parents, tokenizer, execution, sft_models):
    settings = reward_settings(gold_temperature=1e-3)
    pairs, counts = reward.sample_pairs(settings, parents, tokenizer, LengthGold(), CPU, execution)
    assert counts["read"] == 96 and counts["sampled"] == 64
    assert counts["kept"] == len(pairs) == 64 - counts["dropped_identical"]
    for pair in pairs:
        assert pair["gold"][0] >= pair["gold"][1]
        assert all(1 <= len(pair[side]) <= 10 for side in ("chosen", "rejected"))
        texts = [tokenizer.decode(pair[side], skip_special_tokens=True) for side in ("chosen", "rejected")]
        assert texts[0] != texts[1]
        assert pair["gold"] == pytest.approx(tuple(len(text.split()) / 10 for text in texts))
    held = {tuple(pair["prompt"]) for pair in pairs if pair["held_out"]}
    assert sum(pair["held_out"] for pair in pairs) <= 16
    assert len(held) > 10
    again, _ = reward.sample_pairs(settings, parents, tokenizer, LengthGold(), CPU, execution)
    assert again == pairs
    coin = reward_settings(gold_temperature=1e6)  # labels are coin flips
    noisy, _ = reward.sample_pairs(coin, parents, tokenizer, LengthGold(), CPU, execution)
    decided = [pair["gold"][0] > pair["gold"][1] for pair in noisy if pair["gold"][0] != pair["gold"][1]]
    assert 0.25 < np.mean(decided) < 0.75


def test_bradley_terry_noise_has_its_temperature(parents, tokenizer, execution, monkeypatch):
    class Fixed:
        """The first response of each pair is worth one more than the second."""

        def __init__(self):
            self.calls = 0

        def score(self, prompts, responses):
            self.calls += 1
            return np.full(len(responses), 1.0 if self.calls == 1 else 0.0)

    pairs, _ = reward.sample_pairs(
        reward_settings(gold_temperature=1.0, pairs=600, held_out=40), parents, tokenizer, Fixed(), CPU, execution
    )
    share = np.mean([pair["gold"] == (1.0, 0.0) for pair in pairs])
    assert share == pytest.approx(1 / (1 + np.exp(-1)), abs=4 * np.sqrt(0.2 / len(pairs)))


@pytest.fixture(scope="module")
def trained(parents, execution, tmp_path_factory):
    """A reward model that was trained on sampled pairs whose gold is their length."""
    output = tmp_path_factory.mktemp("reward-stage")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reward.gold_data, "load", lambda folder: LengthGold())
        summary = reward.train(
            reward_settings(pairs=240, held_out=40, learning_rate=1e-2, epochs=3), parents, output, execution
        )
    return output, summary


def test_the_reward_model_learns_its_preferences(trained):
    output, summary = trained
    evaluation = runs.read_json(output / "evaluation.json")
    assert evaluation["held_out_accuracy"] == summary["held_out_accuracy"] > 0.65
    assert evaluation["gold_agreement"] >= 0.7 and evaluation["held_out"] <= 40 and evaluation["pairs"] <= 240
    assert evaluation["counts"]["sampled"] == 280


def test_normalised_rewards_of_sft0s_samples_have_mean_zero_and_deviation_one(
    trained, parents, prompts, sft_models, tokenizer
):
    from salsa.rl import rollout

    output, _ = trained
    constants = runs.read_json(output / "normalisation.json")
    assert constants["samples"] == 40
    seed = runs.derive_seed(3, "normalisation", 0)
    noise = rollout.uniforms(seed, 0, prompts[0][:40], 10)
    ends = chat.end_ids(sft_models[0], tokenizer)
    sequences, _, _ = rollout.sample(sft_models[0], prompts[1][:40], noise, 1.0, ends, 0)
    scores = models.load_score_model(output).scores(sequences, 16)
    assert scores.mean().item() == pytest.approx(0, abs=1e-4)
    assert scores.std(unbiased=False).item() == pytest.approx(1, abs=1e-4)
    raw = models.load_score_model(output, normalised=False).scores(sequences, 16)
    torch.testing.assert_close(scores, (raw - constants["mean"]) / constants["std"], rtol=1e-4, atol=1e-4)
    # And the folder is what transformers loads.
    classifier = AutoModelForSequenceClassification.from_pretrained(output / "model").eval()
    ids = torch.tensor([prompts[1][0] + sequences.responses[0, : sequences.lengths[0]].tolist()])
    assert classifier(input_ids=ids).logits.item() == pytest.approx(raw[0].item(), abs=1e-4)


def test_responses_are_computed_with_those_of_like_length(reward_run, monkeypatch):
    monkeypatch.setattr(forward, "PASS", 0)
    model, widths = models.load_score_model(reward_run).classifier, []
    lengths, longest = [3, 9, 4, 9], 12
    mask = torch.tensor([[1] * length + [0] * (longest - length) for length in lengths])
    tokens = torch.randint(6, 100, mask.shape) * mask + model.config.pad_token_id * (1 - mask)

    def recorded(input_ids, **options):
        widths.append(input_ids.shape[1])
        return model(input_ids=input_ids, **options)

    logits = reward._ByLength(recorded)(tokens, mask, use_cache=False).logits
    assert widths == [3, 4, 9]
    torch.testing.assert_close(logits, model(input_ids=tokens, attention_mask=mask).logits, rtol=1e-5, atol=1e-5)
    logits.sum().backward()
    assert all(weight.grad is not None for weight in model.parameters())


def given_pairs(folder, tokenizer, count=60):
    words = sorted(word for word in tokenizer.get_vocab() if not word.startswith("<"))[:60]
    generator = np.random.default_rng(0)

    def text(length, words=words):
        return " ".join(generator.choice(words, length))

    rows = [
        {
            "prompt": [{"role": "user", "content": text(5)}],
            "chosen": [{"role": "assistant", "content": text(generator.integers(5, 9), words[:10])}],
            "rejected": [{"role": "assistant", "content": text(generator.integers(1, 5), words[-10:])}],
        }
        for _ in range(count)
    ]
    rows[7]["chosen"][0]["content"] = text(40)
    rows[9]["rejected"][0]["content"] = text(40)
    rows[11]["prompt"][0]["content"] = text(90)
    runs.write_jsonl(folder / "preferences.jsonl", rows)
    return rows


def test_given_preferences(parents, execution, tokenizer, prepare_run, tmp_path):
    given = shutil.copytree(prepare_run, tmp_path / "prepare")
    runs.write_json(given / "gold" / "gold.json", {"kind": "none"})
    rows = given_pairs(given, tokenizer)
    parents = {"prepare": given, "sft0": parents["sft0"]}
    settings = reward_settings("given", held_out=10, pairs=40, epochs=3)
    pairs, counts = reward.read_pairs(settings, parents, tokenizer, None)
    assert counts == {"read": 60, "kept": 57, "dropped_too_long": 3}
    first = tokenizer.convert_tokens_to_ids(rows[0]["chosen"][0]["content"].split())
    assert pairs[0]["chosen"] == [*first, tokenizer.eos_token_id] and pairs[0]["gold"] is None
    (tmp_path / "out").mkdir()
    summary = reward.train(settings, parents, tmp_path / "out", execution)
    assert summary["gold_agreement"] is None and summary["held_out"] == 10 and summary["pairs"] == 40
    assert summary["held_out_accuracy"] >= 0.8
    (tmp_path / "few").mkdir()
    with pytest.raises(runs.UserError, match=r"too few for reward_model.held_out=50"):
        reward.train(reward_settings("given", held_out=50), parents, tmp_path / "few", execution)
    assert not (tmp_path / "few" / "model").exists()


def test_a_judges_preferences_begin_at_the_other_end(parents, tokenizer, execution):
    """96 prompts, 16 of them held out: two times 40 share none, two times 48 share 16."""
    encoded = chat.encode_prompts(
        tokenizer, [row["prompt"] for row in runs.read_jsonl(parents["prepare"] / "preference_prompts.jsonl")]
    )

    def sampled(preferences, seed, pairs):
        settings = reward_settings(preferences, seed, pairs=pairs)
        return reward.sample_pairs(settings, parents, tokenizer, LengthGold(), CPU, execution)

    def prompts(pairs, held_out):
        return [pair["prompt"] for pair in pairs if pair["held_out"] is held_out]

    for count, shared in ((40, 0), (48, 16)):
        own, counts = sampled("sampled", 3, count)
        other, other_counts = sampled("sampled_for_judge", 4, count)
        assert "shared_prompts" not in counts and other_counts["shared_prompts"] == shared
        last = [ids for ids in encoded[::-1][:count] if ids in prompts(other, False)]
        assert prompts(other, False) == last and len(last) > count - 10
        assert all(ids in encoded[:16] for ids in prompts(own, True) + prompts(other, True))
    both = {tuple(ids) for ids in prompts(own, True)} & {tuple(ids) for ids in prompts(other, True)}
    chosen = [{tuple(p["prompt"]): p["chosen"] for p in pairs if p["held_out"]} for pairs in (own, other)]
    assert any(chosen[0][prompt] != chosen[1][prompt] for prompt in both)  # the noise is another


def test_a_judges_given_preferences_are_those_behind_ppos(parents, execution, tokenizer, prepare_run, tmp_path):
    given = shutil.copytree(prepare_run, tmp_path / "prepare")
    runs.write_json(given / "gold" / "gold.json", {"kind": "none"})
    rows = given_pairs(given, tokenizer)
    rows[40]["prompt"] = rows[15]["prompt"]  # a prompt of both
    runs.write_jsonl(given / "preferences.jsonl", rows)
    parents = {"prepare": given, "sft0": parents["sft0"]}
    seen = []

    def trained(preferences, name, **changes):
        (tmp_path / name).mkdir()
        settings = reward_settings(preferences, held_out=10, **changes)
        with pytest.MonkeyPatch.context() as patch:
            trainer = reward._trainer
            patch.setattr(
                reward,
                "_trainer",
                lambda s, c, t, training, *rest: seen.append(training) or trainer(s, c, t, training, *rest),
            )
            return reward.train(settings, parents, tmp_path / name, execution)

    own, other = trained("given", "own", pairs=20), trained("given_for_judge", "other", pairs=20)
    pairs, _ = reward.read_pairs(reward_settings("given", held_out=10), parents, tokenizer, None)
    assert seen == [pairs[10:30], pairs[30:50]]
    assert other["counts"]["shared_prompts"] == 1 and "shared_prompts" not in own["counts"]
    assert (own["held_out"], other["held_out"], other["pairs"]) == (10, 10, 20)
    with pytest.raises(runs.UserError, match=r"7 training pairs are left of 60 rows after PPO's 40: too few"):
        trained("given_for_judge", "few", pairs=40)


def test_a_tokenizer_that_pads_with_its_end_is_refused(parents, execution, tokenizer, sft_runs, tmp_path):
    folder = shutil.copytree(sft_runs[0], tmp_path / "sft0")
    padded = models.load_tokenizer(folder / "model")
    padded.pad_token = padded.eos_token
    padded.save_pretrained(folder / "model")
    with pytest.raises(runs.UserError, match="pads with its end token"):
        reward.train(reward_settings(), {**parents, "sft0": folder}, tmp_path, execution)


def test_agreement_counts_only_pairs_that_gold_decides(reward_run, tokenizer, execution):
    model = models.load_score_model(reward_run)
    scored = [[6, 7, 8], [9, 10], [11, 12, 13], [14]]
    batch = forward.from_lists([[1]] * 4, scored, [], 0)
    order = [scored[i] for i in torch.argsort(model.scores(batch, 4)).tolist()]  # worst first
    golds = [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5)]
    pairs = [{"prompt": [1], "chosen": order[3], "rejected": order[0], "gold": gold} for gold in golds]
    quality = reward._quality(model, pairs, tokenizer, execution)
    assert quality == {"held_out": 3, "held_out_accuracy": 1.0, "gold_agreement": 0.5}
    tied = reward._quality(model, pairs[2:], tokenizer, execution)
    assert tied["gold_agreement"] is None


def test_the_command_by_hand_takes_a_plain_model_folder(prepare_run, tiny_chat_model, tmp_path):
    settings = config.SftSettings(1, config.Sft(epochs=1), config.Lengths(prompt=400, response=400))
    runs.write_json(tmp_path / "settings.json", dataclasses.asdict(settings))
    output = tmp_path / "sft"
    parents = [f"--parent=prepare={prepare_run}", f"--parent=base={tiny_chat_model}"]
    arguments = ["--settings", str(tmp_path / "settings.json"), *parents, "--output", str(output)]
    stages.SFT.command(sft.train, sft.VERSION, argv=arguments)
    assert runs.verify(output)["settings"]["seed"] == 1
    assert models.load_policy(output / "model").num_parameters() > 0


def test_sizes_are_asked_before_anything_is_sampled(parents, prepare_run, execution, tmp_path, monkeypatch):
    monkeypatch.setattr(reward, "sample_pairs", lambda *_: pytest.fail("sampled"))
    one = shutil.copytree(prepare_run, tmp_path / "one")
    runs.write_jsonl(one / "prompts.jsonl", runs.read_jsonl(prepare_run / "prompts.jsonl")[:1])
    says = "1 prompt of PPO's for reward_model.normalisation_prompts=40: .* no standard"
    with pytest.raises(runs.UserError, match=says):
        reward.train(reward_settings(), parents | {"prepare": one}, tmp_path, execution)
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("SALSA_PROCESSES", "3")
    with pytest.raises(runs.UserError, match=r"3 processes can't share reward_model\.batch_size"):
        reward.train(reward_settings(), parents, tmp_path, execution)


class Scores:
    """A reward model that gives each response of a batch a number."""

    def __init__(self, score):
        self.score = score

    def scores(self, sequences, micro_batch):
        return torch.tensor([self.score(row) for row in sequences.responses.tolist()])


def test_a_reward_without_spread_is_refused(parents, prompts, tokenizer, execution, monkeypatch):
    rows = [{"id": name} for name in prompts[0][:8]], prompts[1][:8]

    def constants(score):
        return reward.normalise(Scores(score), reward_settings(), rows, parents, tokenizer, CPU, execution)

    by_first_token = constants(lambda row: float(row[0]))
    assert by_first_token["std"] > 0 and by_first_token["samples"] == 8
    with pytest.raises(
        runs.UserError, match=r"on 8 samples of sft0 is 0 \(mean 0\.7\): the reward model says the same"
    ):
        constants(lambda row: 0.7)
    with pytest.raises(divergence.NotFinite, match="the score of sft0's samples is nan"):
        constants(lambda row: float("nan"))

    policy = models.load_policy(models.model_folder(parents["sft0"]))
    policy.model.norm.weight.data.zero_()  # all logits 0; and so the likeliest token is one
    monkeypatch.setattr(reward.models, "load_policy", lambda *_: policy)
    monkeypatch.setattr("salsa.rl.rollout.draw", lambda logits, uniform: torch.full((len(logits),), 12))
    with pytest.raises(runs.UserError, match="sft0 says the same to all of them"):
        constants(lambda row: float(row[0]))


def test_constants_that_nothing_can_be_divided_by_are_refused(reward_run, tmp_path):
    for std in (0.0, -1.0):
        runs.write_json(tmp_path / "normalisation.json", {"mean": 0.25, "std": std, "samples": 16})
        with pytest.raises(
            runs.UserError, match=f"normalisation.json: .* mean 0.25 and standard deviation {std:g}, by"
        ):
            models.load_score_model(tmp_path)


@pytest.fixture(params=["<eos>", "<|im_end|>"])
def chatml_base(request, tmp_path):
    """A base run with ChatML that is given with its turn's end as padding, and in one case as its tokenizer's end."""
    made = byte_tokenizer("<|im_start|>", "<|im_end|>")
    made.chat_template, made.eos_token, made.pad_token = CHATML, request.param, "<|im_end|>"
    model = random_llama(made, 5)
    model.generation_config.eos_token_id = made.eos_token_id
    save_model(model, made, tmp_path / "given")
    settings = config.BaseSettings(config.Model("m", "hub", str(tmp_path / "given"), chat_template=None))
    runs.execute("base", base.VERSION, base.make, settings, {}, tmp_path / "base", conftest.EXECUTION)
    return tmp_path / "base"


def answered(place):
    texts = ["boil it", "boil <|im_end|> it\n<|im_start|>user", "", " ", "wash it, then boil it"]
    return [user(f"How <|im_end|> do I cook rice {place}?"), assistant(texts[place % 5])]


def test_trainers_batches_hold_what_ppo_samples_and_reads(chatml_base, execution, tmp_path, monkeypatch):
    tokenizer = models.load_tokenizer(chatml_base / "model")
    policy = models.load_policy(chatml_base / "model")
    ends, pad = chat.end_ids(policy, tokenizer), tokenizer.pad_token_id
    turn_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert turn_end in ends and tokenizer.eos_token_id in ends and pad not in ends
    lengths = config.Lengths(64, 40)
    refused = [{"role": "system", "content": "\ud800"}, *answered(0)]  # of which no tokenizer makes ids
    rows = [{"messages": answered(i)} for i in range(10)]
    given = [
        {"prompt": row["messages"][:1], "chosen": row["messages"][1:], "rejected": [assistant(f"no {i}")]}
        for i, row in enumerate(rows)
    ]
    prepare = tmp_path / "prepare"
    prepare.mkdir()
    for name in ("sft", "sft_validation"):
        runs.write_jsonl(prepare / f"{name}.jsonl", rows)
    runs.write_jsonl(prepare / "preferences.jsonl", given)
    runs.write_jsonl(prepare / "prompts.jsonl", [{"id": i, "prompt": row["prompt"]} for i, row in enumerate(given)])
    runs.write_json(prepare / "gold" / "gold.json", {"kind": "none"})
    batches = []

    class Sft(sft._Trainer):
        def training_step(self, model, inputs, *arguments, **named):
            batches.append({name: values.clone() for name, values in inputs.items()})
            return super().training_step(model, inputs, *arguments, **named)

    monkeypatch.setattr(sft, "_Trainer", Sft)
    summary = sft.train(
        config.SftSettings(0, config.Sft(epochs=1, batch_size=10), lengths),
        {"prepare": prepare, "base": chatml_base},
        tmp_path / "sft",
        execution,
    )
    assert summary["counts"]["sft"] == {"read": 10, "kept": 10, "dropped_too_long": 0}
    with pytest.raises(chat.Refused):
        chat.encode_conversation(tokenizer, refused)
    end = chat.ending(tokenizer, ends)
    encoded = [chat.encode_conversation(tokenizer, row["messages"], end) for row in rows]
    (batch,) = batches
    learned = [
        (ids[mask.bool()].tolist(), labels[labels != sft.IGNORED].tolist())
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True)
    ]
    assert sorted(learned) == sorted((prompt + response, response) for prompt, response in encoded)
    for (_, response), row in zip(encoded, rows, strict=True):
        assert response[-1] == turn_end and not {*ends, pad} & set(response[:-1])  # sampling would end here, not before
        assert chat.text_of(tokenizer, response) == row["messages"][1]["content"]

    compared = []

    class Reward(reward._Trainer):
        def compute_loss(self, model, inputs, *arguments, **named):
            with torch.no_grad():
                compared.append((inputs["input_ids"], inputs["attention_mask"], model(**inputs).logits[:, 0]))
                rows = [ids[mask.bool()].tolist() for ids, mask in zip(*compared[-1][:2], strict=True)]
                sequences = forward.from_lists([row[:1] for row in rows], [row[1:] for row in rows], ends, pad)
                by_position = forward.ScoreModel(model).scores(sequences, 8)
            torch.testing.assert_close(compared[-1][2], by_position, rtol=1e-4, atol=1e-5)
            return super().compute_loss(model, inputs, *arguments, **named)

    monkeypatch.setattr(reward, "_Trainer", Reward)
    settings = reward_settings("given", held_out=2, pairs=8, batch_size=8, epochs=1)
    settings = dataclasses.replace(settings, lengths=lengths)
    (tmp_path / "reward").mkdir()
    reward.train(settings, {"prepare": prepare, "sft0": tmp_path / "sft"}, tmp_path / "reward", execution)
    (ids, mask, _) = compared[0]
    chosen = [row[kept.bool()].tolist() for row, kept in zip(ids[:8], mask[:8], strict=True)]
    assert sorted(chosen) == sorted(prompt + response for prompt, response in encoded[2:])
    assert all(row[-1] == turn_end for row in chosen)

    # The judge reads a response as PPO scored it.
    assert chat.folder_end_ids(tmp_path / "reward" / "model", tokenizer) == ends
    model = models.load_score_model(tmp_path / "reward")
    prompts, responses = zip(*encoded, strict=True)
    scored = model.scores(forward.from_lists(prompts, responses, ends, pad), 8)
    told = [
        {"prompt": [row["messages"][0]["content"]], "responses": [chat.text_of(tokenizer, response)]}
        | {"finish_reasons": ["stop"]}
        for row, response in zip(rows, responses, strict=True)
    ]
    found = judge.rewards(told, tmp_path / "reward", execution)
    assert found == pytest.approx(scored.tolist(), abs=1e-4)


def test_demonstrations_that_the_template_or_tokenizer_refuses_are_counted(tokenizer):
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + (
        tokenizer.chat_template
    )
    rows = [{"messages": [user("a fox"), assistant("a kite")]} for _ in range(4)]
    rows[1]["messages"] = [{"role": "system", "content": "the kite"}, *rows[1]["messages"]]
    rows[2]["messages"] = [user("a fox"), assistant("a <eos> kite")]
    data, counts = sft.tokenize(strict, rows, LENGTHS)
    assert counts == {
        **{"read": 4, "kept": 2, "dropped_too_long": 0},
        **{"dropped_by_template": 1, "dropped_control_token": 1},
    }
    assert len(data) == 2
    with pytest.raises(
        runs.UserError, match=r"sft\.jsonl: none of 1 demonstrations fits .* 1 can't be encoded.*no system.*=roles"
    ) as caught:
        sft.tokenize(strict, rows[1:2], LENGTHS)
    assert "\n" not in str(caught.value)


def test_pairs_that_the_template_or_tokenizer_refuses_are_counted(parents, tokenizer, prepare_run, tmp_path):
    given = shutil.copytree(prepare_run, tmp_path / "prepare")
    rows = given_pairs(given, tokenizer)
    rows[0]["rejected"][0]["content"] = "a <eos> kite"
    runs.write_jsonl(given / "preferences.jsonl", rows)
    pairs, counts = reward.read_pairs(
        reward_settings("given"), {"prepare": given, "sft0": parents["sft0"]}, tokenizer, None
    )
    assert counts == {"read": 60, "kept": 56, "dropped_too_long": 3, "dropped_control_token": 1} and len(pairs) == 56


SMALL = {"pairs": 96, "held_out": 32, "learning_rate": 2e-2}


@pytest.fixture(scope="module")
def members(parents, execution, tmp_path_factory):
    """The finished runs of three reward models that are averaged, by their roles."""
    root, folders = tmp_path_factory.mktemp("members"), {}
    for member in range(3):
        settings = dataclasses.replace(reward_settings(**SMALL), member=member)
        output = root / f"{member}"
        runs.execute("reward_model", reward.VERSION, trained_by_length, settings, parents, output, execution)
        folders[f"reward_model/{member}"] = output
    return folders


def trained_by_length(*arguments):
    """The stage, where gold is the length of a response."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reward.gold_data, "load", lambda folder: LengthGold())
        return reward.train(*arguments)


@pytest.fixture(scope="module")
def averaged(parents, members, execution, tmp_path_factory):
    """The finished run of their average; a run that was killed while it measured had left a model in its folder."""
    output = tmp_path_factory.mktemp("averaged") / "run"
    (output / "model").mkdir(parents=True)
    (output / "model" / "config.json").write_text("{")
    settings = reward_settings(**SMALL, models=3)
    stage = stages.REWARD_MODEL
    runs.execute(
        "reward_model",
        reward.VERSION,
        trained_by_length,
        settings,
        parents | members,
        output,
        execution,
        writes=stage.writes,
        may_write=stage.may_write,
    )
    return output


def classifier_weights(run):
    return dict(AutoModelForSequenceClassification.from_pretrained(run / "model").state_dict())


def test_an_averaged_reward_model_is_the_mean_of_its_members(averaged, members):
    """In float64, of every weight, the head's included; the members differ, or there would be nothing to average."""
    weights = [classifier_weights(run) for run in members.values()]
    for name, tensor in classifier_weights(averaged).items():
        terms = torch.stack([member[name].double() / 3 for member in weights])
        bound = 4 * 2**-24 * terms.abs().sum(0)  # the weight 1/3, products and sums are rounded
        assert tensor.dtype == torch.float32 and ((tensor.double() - terms.sum(0)).abs() <= bound).all()
        pairs = [(0, 1), (0, 2), (1, 2)]
        assert name != "score.weight" or all(not torch.equal(weights[a][name], weights[b][name]) for a, b in pairs)
    files = {path.name for path in (averaged / "model").iterdir()}
    assert files == {path.name for path in (members["reward_model/0"] / "model").iterdir()} | {"README.md"}


def test_an_average_is_measured_as_one_model_is(averaged, members, parents, tokenizer, execution, prompts, sft_models):
    from salsa.rl import rollout

    evaluation = runs.read_json(averaged / "evaluation.json")
    alone = [runs.read_json(run / "evaluation.json") for run in members.values()]
    measured = [{name: run[name] for name in ("held_out_accuracy", "gold_agreement")} for run in alone]
    assert evaluation.pop("members") == measured
    assert evaluation.keys() == alone[0].keys()
    same = ("held_out", "pairs", "counts")
    assert all({name: run[name] for name in same} == {name: evaluation[name] for name in same} for run in alone)

    # Its accuracy, pair by pair, by transformers alone.
    pairs, _ = reward.sample_pairs(reward_settings(**SMALL), parents, tokenizer, LengthGold(), CPU, execution)
    held_out = [pair for pair in pairs if pair["held_out"]]
    classifier = AutoModelForSequenceClassification.from_pretrained(averaged / "model").eval()

    def score(pair, side):
        return classifier(input_ids=torch.tensor([pair["prompt"] + pair[side]])).logits.item()

    right = [score(pair, "chosen") > score(pair, "rejected") for pair in held_out]
    assert evaluation["held_out_accuracy"] == np.mean(right) and evaluation["held_out"] == len(held_out)

    # Its own constants make sft0's samples standard.
    noise = rollout.uniforms(runs.derive_seed(3, "normalisation", 0), 0, prompts[0][:40], 10)
    ends = chat.end_ids(sft_models[0], tokenizer)
    sequences, _, _ = rollout.sample(sft_models[0], prompts[1][:40], noise, 1.0, ends, 0)
    scores = models.load_score_model(averaged).scores(sequences, 16)
    assert scores.mean().item() == pytest.approx(0, abs=1e-4)
    assert scores.std(unbiased=False).item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("rank", [0, 2])
def test_members_differ_in_the_order_of_the_pairs_alone(parents, tokenizer, execution, tmp_path, rank):
    """They have the same start, head and adapters included, and the same pairs."""
    rows = [{"prompt": [5, 6], "chosen": [7 + i % 9], "rejected": [30 + i % 7, 31]} for i in range(20)]
    settings = reward_settings(lora_rank=rank)
    starts, orders = [], []
    for member in (0, 0, 1, 2):
        reward.set_seed(settings.seed)
        classifier = models.new_classifier(models.model_folder(parents["sft0"]), tokenizer.pad_token_id)
        own = dataclasses.replace(settings, member=member)
        trainer = reward._trainer(own, classifier, tokenizer, rows, tmp_path, CPU, execution)
        starts.append({name: tensor.clone() for name, tensor in trainer.model.state_dict().items()})
        orders.append(list(trainer.epoch_sampler))
        assert trainer.train_dataset["chosen_ids"] == [row["prompt"] + row["chosen"] for row in rows]
    for start in starts[1:]:
        torch.testing.assert_close(start, starts[0], rtol=0, atol=0)
    assert orders[0] == orders[1] and len({tuple(order) for order in orders}) == 3
    assert orders[0] == list(EpochSampler(len(rows), 1, settings.seed))  # the first is what one model has


@pytest.mark.parametrize("places", [(), (0, 1), (0, 1, 3), (0, 1, 2, 3)])
def test_an_average_of_other_members_is_refused(parents, execution, tmp_path, monkeypatch, places):
    monkeypatch.setattr(reward, "_pairs", lambda *_: pytest.fail("sampled"))
    others = {f"reward_model/{i}": parents["reward_model"] for i in places}
    with pytest.raises(runs.UserError, match=r"models=3: its parents are reward_model/0 to reward_model/2"):
        reward.train(reward_settings(models=3), parents | others, tmp_path, execution)
    if places:
        with pytest.raises(runs.UserError, match=r"models=1: its parents are no reward_model/I"):
            reward.train(reward_settings(), parents | others, tmp_path, execution)
