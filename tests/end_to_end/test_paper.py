"""experiment=paper at the paper's architectures: random weights, a few layers, all stages of all three models.

The stages are called in this process, in the plan's order; test_study.py starts them as Snakemake does.
"""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import hub_like
import in_process
import pytest
import torch

from salsa import soup
from salsa.data import chat
from salsa.judges import openai
from salsa.rl import forward, models, rollout
from salsa.workflow import compose, plan

ROOT = Path(__file__).parents[2]
MODELS = {
    "gemma_2b": "google/gemma-2b",
    "mistral_7b": "mistralai/Mistral-7B-v0.1",
    "llama2_7b": "meta-llama/Llama-2-7b-hf",
}
SMALL = [
    "experiment=paper",
    "lengths.prompt=128",
    "lengths.response=24",
    "sft.batch_size=16",
    "sft.learning_rate=3e-3",  # or two models that few weights are trained in for few steps are one
    "reward_model.pairs=16",
    "reward_model.held_out=8",
    "reward_model.batch_size=8",
    "reward_model.normalisation_prompts=8",
    "ppo.iterations=2",
    "ppo.batch_size=8",
    "ppo.rollouts_every=1",
    "evaluate.alphas=[0,0.5,1]",
    "report.bootstrap=100",
    "mixed_precision=no",  # what is equal by construction is equal
    "execution.device=cpu",
    "execution.gpus=0",
    "execution.processes=1",
    "execution.accelerate_config=''",
    "execution.threads=1",
    "execution.micro_batch=4",
    "execution.rollout_batch=6",
]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def data_files(folder):
    """Rows of the published files' forms, made up; overrides that name the files."""
    ask = ["How do I cook rice {}?", "Tell me about number {}", "Please write a poem about the sea and {}."]
    answer = ["Wash it {}, then boil it.", "\nNumber {} comes after the list.", "I do not know {}."]

    def turns(i):
        return [ask[i % 3].format(i), answer[i % 2].format(i)]

    def messages(texts):
        return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]

    chats = [turns(i) + turns(i + 1) * (i % 4 == 0) for i in range(1000, 1120)]
    ultrachat = [{"prompt": c[0], "prompt_id": str(i), "messages": messages(c)} for i, c in enumerate(chats)]

    def preference(i):
        question, good = turns(i)
        pair = {"chosen": messages([question, good]), "rejected": messages([question, answer[2].format(i)])}
        return {"prompt": question, "prompt_id": str(i), **pair, "score_chosen": 8.0, "score_rejected": 3.0}

    bench = [
        {"question_id": 81 + i, "category": "writing", "turns": [f"List {i} words", "Now list more"]} for i in range(3)
    ]
    bench.append({"question_id": 101, "category": "reasoning", "turns": ["What comes after 2?", "And then?"]})
    reference = [{"question_id": 101, "choices": [{"index": 0, "turns": ["3", "4"]}]}]
    hard = [
        {"uid": f"{i:032x}", "category": "arena-hard-v0.1", "cluster": "ABC", "prompt": f"Why {i}?"} for i in range(4)
    ]
    files = {
        "data.task.sft_file": ultrachat,
        "data.task.preference_file": [preference(i) for i in range(150)],
        "benchmarks.ultrafeedback.file": [preference(i) for i in range(500, 505)],
        "benchmarks.mt_bench.file": bench,
        "benchmarks.mt_bench.reference_file": reference,
        "benchmarks.arena_hard.file": hard,
    }
    return [f"{key}={write_rows(folder / f'{key}.jsonl', rows)}" for key, rows in files.items()]


class Judge:
    """Stands in for the client of a language model: it prefers the longer answer."""

    def __init__(self, judge, execution):
        pass

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        pass

    async def answer(self, prompt, seed=None):
        answers = re.findall(r"<answer_[ab12]>\n(.*?)\n</answer", prompt, re.DOTALL)
        text = "[[A>B]]" if len(answers[0]) > len(answers[-1]) else "[[B>A]]"
        return {
            "text": text,
            "finish_reason": "stop",
            "prompt_tokens": 1,
            "completion_tokens": 1,
            "served_model": "judge",
        }


def put_in_cache(cache, name, identifier):
    """A model as the hub's cache has it, at the commit that its preset pins."""
    (study,) = compose.compose([f"model={name}", "data=ultra", "arm=[ppo,salsa]", "benchmark=[]", "judge=[]"])
    revision = study.config.model.revision
    hub_like.write(name, cache / f"models--{identifier.replace('/', '--')}" / "snapshots" / revision)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder where the hub's models are in a cache, a judge answers, and figures are not drawn."""
    root = tmp_path_factory.mktemp("paper")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(root / "hub"))
        patch.setattr(openai, "Client", Judge)
        patch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **_: Path(path).write_bytes(b""))  # slow
        patch.setenv("OPENAI_API_KEY", "none")
        for name, identifier in MODELS.items():
            put_in_cache(root / "hub", name, identifier)
        yield root


@pytest.fixture(scope="module")
def study(root):
    """experiment=paper, run whole: (plan, results folder)."""
    result = plan.plan(compose.compose([*SMALL, f"results={root / 'results'}", *data_files(root)]))
    return result, in_process.execute_all(result)


def table(folder, name):
    with open(folder / "tables" / f"{name}.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_model_from_its_base_to_the_comparison(study):
    result, results = study
    assert [entry["name"] for entry in result.studies] == [f"paper_{name}" for name in MODELS]
    for entry in result.studies:
        rates = table(results / entry["path"], "win_rates")
        found = {(row["judge"], row["benchmark"], row["candidate"], row["baseline"]) for row in rates}
        judged = {(j, b) for j in ("openai", "reward_model") for b in ("ultrafeedback", "mt_bench", "arena_hard")}
        pairs = {("ppo", "sft0"), ("salsa", "sft0"), ("salsa", "ppo")}
        assert found == {(*one, *pair) for one in judged for pair in pairs}
    comparison = table(results / result.comparison, "comparison")
    assert {row["model"] for row in comparison} == set(MODELS)


def test_a_key_is_asked_for_before_the_first_job(tmp_path):
    """And not for a dry run of all three models."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OPENAI_")}
    command = [sys.executable, "-m", "snakemake", "--snakefile", ROOT / "Snakefile", "--cores", "1"]
    command += ["--directory", tmp_path, "--config", f"overrides=experiment=paper results={tmp_path / 'results'}"]
    dry, real = (
        subprocess.run([*command, *more], env=environment, capture_output=True, text=True) for more in (["-n"], [])
    )
    assert dry.returncode == 0 and "comparison" in dry.stdout + dry.stderr
    last = (real.stdout + real.stderr).strip().splitlines()[-1]
    assert real.returncode == 1 and last.startswith("salsa: judge.kind=openai: OPENAI_API_KEY is not set")
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["plans"]


def of_stage(study, stage, model):
    """(run, folder) of the runs of a model's stage, in the plan's order."""
    result, results = study
    return [(run, results / path) for path, run in result.runs.items() if run.stage == stage and model in run.label]


@pytest.mark.parametrize("model", MODELS)
def test_a_policy_starts_at_sft0_and_away_from_the_soup(study, model):
    for run, folder in of_stage(study, "ppo", model):
        first = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
        plain = run.settings["reference"]["weights"] == ["1"]
        assert run.settings["ppo"]["value_model"] == ("reward_model" if model == "gemma_2b" else "shared")
        assert abs(first["kl_to_sft0"]) < 1e-3
        assert (abs(first["kl_to_reference"]) < 1e-3) == plain


@pytest.mark.parametrize("model", MODELS)
def test_what_is_saved_is_a_model_of_its_class(study, model):
    """Trained policies load as what they were, with what is special of each, and pad with no end token."""
    (base,), (sft0, sft1), policies = (of_stage(study, stage, model) for stage in ("base", "sft", "ppo"))
    original = models.load_policy(base[1] / "model")
    assert models.load_tokenizer(base[1] / "model").pad_token == ("<pad>" if model == "gemma_2b" else "<unk>")
    for _, folder in [sft0, sft1, *policies]:
        trained, tokenizer = models.load_policy(folder / "model"), models.load_tokenizer(folder / "model")
        assert type(trained) is type(original) and trained.dtype == torch.float32
        assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
        tied = trained.get_output_embeddings().weight is trained.get_input_embeddings().weight
        assert tied == (model == "gemma_2b") == (not any("lm_head" in name for name in soup.shards(folder / "model")))
        changed = [not torch.equal(a, b) for a, b in zip(trained.parameters(), original.parameters(), strict=True)]
        assert sum(changed) > len(changed) / 2
        for name in ("head_dim", "num_key_value_heads", "sliding_window", "tie_word_embeddings"):
            assert getattr(trained.config, name, None) == getattr(original.config, name, None)


@pytest.mark.parametrize("model", MODELS)
def test_soups_are_means(study, model):
    folders = [folder / "model" for _, folder in of_stage(study, "sft", model)]
    mixed = models.mix_policies(folders, ["1/2", "1/2"])
    one, two = (models.load_policy(folder).state_dict() for folder in folders)
    for name, tensor in mixed.state_dict().items():
        torch.testing.assert_close(tensor, (one[name] + two[name]) / 2)
    assert any(not torch.equal(one[name], two[name]) for name in one)


def test_adapters_are_merged(root, study):
    """model=gemma_2b_lora, from its base to PPO against the soup: ordinary models, what is tied still tied."""
    pytest.importorskip("peft", reason="needs the extra salsa[lora]")
    results = study[1]
    few = [f"{section}.lora_rank=4" for section in ("sft", "reward_model", "ppo")]
    overrides = [*SMALL, "model=gemma_2b_lora", *few, f"results={results}", *data_files(root)]
    result = plan.plan(compose.compose(overrides))
    wanted = {[path for path, run in result.runs.items() if run.stage == "ppo"][-1]}
    for path, run in reversed(result.runs.items()):  # parents come before their children
        wanted |= set(run.parents.values()) if path in wanted else set()
    made = {}
    for path, run in result.runs.items():
        if path in wanted:
            in_process.execute(result, path, run)
            made.setdefault(run.stage, results / path / "model")
    start = models.load_policy(made["base"])
    for stage, rank in (("sft", 4), ("ppo", 8)):  # PPO's adapters are added to SFT's
        trained = models.load_policy(made[stage])
        assert torch.equal(trained.get_output_embeddings().weight, start.get_input_embeddings().weight)
        before, after = (model.model.layers[0].self_attn.q_proj.weight for model in (start, trained))
        assert 1 <= torch.linalg.matrix_rank(after - before, rtol=1e-4) <= rank < min(before.shape)


@pytest.fixture(scope="module", params=MODELS)
def network(request):
    """(model, tokenizer, prompts as token ids) of an architecture, in float32."""
    tokenizer = hub_like.tokenizer_of(request.param)
    chat.set_chat_template(tokenizer, "roles")
    chat.ensure_padding(tokenizer)
    asked = ["Hello", "How do I cook rice, then write a poem about the sea and a list of water?", "Why", "Tell me 12"]
    prompts = chat.encode_prompts(tokenizer, [[{"role": "user", "content": text}] for text in asked])
    return hub_like.model_of(request.param, tokenizer), tokenizer, prompts


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_logprobs_are_those_of_a_fresh_pass(network, temperature):
    """Prompts of several lengths, some responses long over before others, and longer than Mistral's window."""
    model, tokenizer, prompts = network
    noise = rollout.uniforms(0, 0, list("abcd"), 24)
    ends = [tokenizer.eos_token_id, *range(270, 290)]
    batch, logprobs, _ = rollout.sample(model, prompts, noise, temperature, ends, tokenizer.pad_token_id)
    assert len(set(batch.lengths.tolist())) > 1
    fresh, _ = forward.response_logprobs(model, batch, temperature)
    torch.testing.assert_close(logprobs, fresh, atol=2e-5, rtol=1e-5)
    whole = model(
        input_ids=batch.tokens,
        attention_mask=batch.attention_mask,
        position_ids=forward.positions(batch.attention_mask),
    )
    expected = (whole.logits[:, batch.prompt_length - 1 : -1] / temperature).log_softmax(-1)
    expected = expected.gather(2, batch.responses[:, :, None]).squeeze(2) * batch.response_mask
    torch.testing.assert_close(fresh, expected, atol=2e-5, rtol=1e-5)


def test_what_else_is_in_a_batch_changes_nothing(network):
    model, tokenizer, prompts = network
    noise = rollout.uniforms(0, 0, list("abcd"), 24)
    ends = [tokenizer.eos_token_id, *range(270, 290)]
    batch, logprobs, _ = rollout.sample(model, prompts, noise, 1.0, ends, tokenizer.pad_token_id)
    for i in range(len(prompts)):
        alone, own, _ = rollout.sample(model, prompts[i : i + 1], noise[i : i + 1], 1.0, ends, tokenizer.pad_token_id)
        length = int(alone.lengths[0])
        assert length == batch.lengths[i] and torch.equal(alone.responses[0], batch.responses[i, :length])
        torch.testing.assert_close(own[0], logprobs[i, :length], atol=2e-5, rtol=1e-5)


def test_padding_changes_no_reward(network):
    """The reward at the end of a response, and a value at each of its tokens: alone and beside longer ones."""
    from transformers import AutoModelForSequenceClassification

    model, tokenizer, prompts = network
    torch.manual_seed(1)
    config_ = type(model.config).from_dict(model.config.to_dict() | {"num_labels": 1})
    classifier = AutoModelForSequenceClassification.from_config(config_).eval()
    scorer = forward.ScoreModel(classifier)
    responses = [[300 + i, 280, tokenizer.eos_token_id][-1 - i % 3 :] for i in range(len(prompts))]
    batch = forward.from_lists(prompts, responses, [tokenizer.eos_token_id], tokenizer.pad_token_id, "cpu")
    together, values = scorer.scores(batch, len(prompts)), scorer.values(batch)
    for i in range(len(prompts)):
        alone = forward.from_lists(prompts[i : i + 1], responses[i : i + 1], [], tokenizer.pad_token_id, "cpu")
        torch.testing.assert_close(scorer.scores(alone, 1)[0], together[i], atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(scorer.values(alone)[0], values[i, : len(responses[i])], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("answer", ["Wash it, then boil it.", "\n\nWash it", " Wash it", "é 漢"])
def test_an_answer_follows_its_prompt_token_by_token(network, answer):
    """Where the whole conversation has a token that spans both (Gemma's runs of newlines), a policy sees none."""
    _, tokenizer, _ = network
    messages = [{"role": "user", "content": "How do I cook rice?"}, {"role": "assistant", "content": answer}]
    prompt, response = chat.encode_conversation(tokenizer, messages)
    assert prompt == chat.encode_prompts(tokenizer, [messages[:1]])[0]
    assert response.count(tokenizer.eos_token_id) == 1 and response[-1] == tokenizer.eos_token_id
    assert tokenizer.unk_token_id not in response
    text = tokenizer.decode(prompt + response, skip_special_tokens=False)
    assert text.replace("<s> ", "<s>") == tokenizer.apply_chat_template(messages, tokenize=False)
