"""What the stage base takes in as a model, and what it refuses in one line: whole models of any architecture."""

import json
import re
import shutil

import pytest
import torch
import transformers
from conftest import EXECUTION, finished, random_llama, save_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    PreTrainedTokenizerFast,
)

from salsa import base, reward, sft, soup
from salsa.algorithms.ppo import Ppo
from salsa.data import chat, gold
from salsa.data.messages import assistant, user
from salsa.rl import folders, forward, models, trainer
from salsa.workflow import compose, config, plan, runs

SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LIMIT = {"max_position_embeddings": 256}


@pytest.fixture(scope="module")
def bytes_tokenizer(tiny_chat_model):
    return AutoTokenizer.from_pretrained(tiny_chat_model)


@pytest.fixture
def given(tiny_chat_model, tmp_path):
    """A whole model's folder, which may be changed."""
    return shutil.copytree(tiny_chat_model, tmp_path / "given")


def take_in(folder, output, **settings):
    """The summary of a base made of a folder."""
    output.mkdir()
    model = config.Model("m", "hub", str(folder), **{"chat_template": "roles"} | settings)
    return base.make(config.BaseSettings(model), {}, output, EXECUTION)


def refused(folder, tmp_path, message, **settings):
    """Assert that base refuses a folder with this message (a pattern) in one line, and writes nothing."""
    with pytest.raises(runs.UserError, match=message) as caught:
        take_in(folder, tmp_path / "refused", **settings)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700
    assert not list((tmp_path / "refused").iterdir())


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_weights(folder, change):
    state = load_file(folder / folders.SINGLE)
    change(state)
    save_file(state, folder / folders.SINGLE, {"format": "pt"})


def untied(tokenizer, cls=LlamaForCausalLM, **changes):
    torch.manual_seed(0)
    values = SIZE | IDS | LIMIT | {"vocab_size": len(tokenizer), "tie_word_embeddings": False}
    return cls(LlamaConfig(**values | changes))


# Whole models alone.


@pytest.mark.parametrize(
    ("cls", "changes", "tensor"),
    [
        (LlamaModel, {}, "lm_head.weight is missing"),
        (LlamaForSequenceClassification, {"num_labels": 1}, "lm_head.weight is missing"),
        (LlamaForSequenceClassification, {"num_labels": 1, "tie_word_embeddings": True}, "score.weight is none of"),
    ],
)
def test_another_kind_of_model_is_refused(bytes_tokenizer, tmp_path, cls, changes, tensor):
    save_model(untied(bytes_tokenizer, cls, **changes), bytes_tokenizer, tmp_path / "given")
    refused(tmp_path / "given", tmp_path, f"tensor {tensor}")


LAST = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda f: edit(f / "config.json", num_hidden_layers=3),
            r"model\.layers\.2\.input_layernorm\.weight is missing",
        ),
        (
            lambda f: edit(f / "config.json", num_hidden_layers=1),
            r"model\.layers\.1\..* \(8 more\) is none of LlamaFor",
        ),
        (
            lambda f: edit(f / "config.json", intermediate_size=64),
            r"down_proj\.weight has shape \[32, 48\].*\[32, 64\]",
        ),
        (lambda f: edit(f / "config.json", vocab_size=100), r"embed_tokens\.weight has shape"),
        (lambda f: change_weights(f, lambda s: s.pop(LAST)), rf"tensor {LAST} is missing, of LlamaForCausalLM"),
        (
            lambda f: change_weights(f, lambda s: s.update({"v_head.weight": s[LAST].clone()})),
            r"v_head\.weight is none",
        ),
        (lambda f: change_weights(f, lambda s: s[LAST][3].fill_(float("nan"))), rf"{LAST} holds NaN or infinity"),
        (lambda f: change_weights(f, lambda s: s[LAST][3].fill_(-float("inf"))), rf"{LAST} holds NaN or infinity"),
        (
            lambda f: change_weights(f, lambda s: s.update({f"module.{n}": s.pop(n) for n in [*s]})),
            r"is missing \(20 more",
        ),
        (
            lambda f: (f / folders.SINGLE).write_bytes((f / folders.SINGLE).read_bytes()[:-9]),
            r"safetensors: can't be read",
        ),
        (lambda f: (f / folders.SINGLE).write_bytes(b""), r"safetensors: can't be read"),
        (lambda f: (f / folders.SINGLE).unlink(), r"no weights in safetensors"),
        (lambda f: (f / "config.json").write_text("{"), r"config\.json: not JSON"),
        (lambda f: (f / "config.json").write_text("[" * 99999), r"config\.json: not JSON"),
        (lambda f: (f / "config.json").write_text("[]"), r"config\.json: holds no JSON object"),
        (lambda f: (f / "config.json").write_text("{}"), r"config\.json: has no model_type"),
        (lambda f: edit(f / "config.json", model_type="mine"), r"model_type 'mine' is none that"),
        (lambda f: edit(f / "config.json", model_type=["llama"]), r"model_type .* is none that"),
        (lambda f: edit(f / "tokenizer_config.json", model_max_length="long"), r"model_max_length='long': no number"),
        (lambda f: edit(f / "config.json", hidden_size="many"), r"config\.json: can't be loaded"),
        (
            lambda f: edit(f / "tokenizer_config.json", tokenizer_class="X", auto_map={"AutoTokenizer": ["x.X", None]}),
            r"tokenizer: needs code of its own .* choose another model",
        ),
        (lambda f: edit(f / "config.json", num_attention_heads=0), r"can't be loaded"),
        (lambda f: edit(f / "config.json", quantization_config={"bits": 4}), r"weights are quantized"),
        (lambda f: edit(f / "config.json", is_encoder_decoder=True), r"no causal language model"),
        (lambda f: edit(f / "config.json", attn_implementation="someone/kernel"), r"code that torch doesn't bring"),
        (lambda f: edit(f / "config.json", _attn_implementation="flash_attention_2"), r"code that torch doesn't bring"),
        (lambda f: edit(f / "config.json", rms_norm_eps=float("nan")), r"predictions are NaN"),
        (lambda f: edit(f / "config.json", model_type="clip"), r"'clip': transformers has no causal language model"),
        (lambda f: edit(f / "config.json", max_position_embeddings=12), r"holds 12 tokens"),
        (lambda f: (f / "tokenizer.json").write_text('{"model"'), r"tokenizer: can't be loaded"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), r"tokenizer: can't be loaded"),
        (lambda f: edit(f / "tokenizer_config.json", eos_token=None), r"no end token"),
        (lambda f: edit(f / "tokenizer_config.json", eos_token="<none>"), r"<none>.* no row"),
        (lambda f: (f / "generation_config.json").write_text("{"), r"generation_config\.json: not JSON"),
        (lambda f: edit(f / "generation_config.json", eos_token_id="</s>"), r"eos_token_id='</s>': neither"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), r"holds an adapter"),
    ],
)
def test_a_model_that_is_not_whole_is_refused(given, tmp_path, change, message):
    change(given)
    refused(given, tmp_path, message)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.bool, torch.complex64])
def test_weights_that_are_no_floats_are_refused(given, tmp_path, dtype):
    change_weights(given, lambda state: state.update({LAST: state[LAST].to(dtype)}))
    refused(given, tmp_path, rf"tensor {LAST} is [A-Z0-9_]+: weights are quantized, or none")


def test_a_wrapper_that_was_saved_too_is_named(given, tmp_path):
    change_weights(given, lambda state: [state.update({f"_orig_mod.{name}": state.pop(name)}) for name in list(state)])
    refused(given, tmp_path, r"is missing .*\(the files have _orig_mod\.")


def test_a_tokenizer_draws_nothing_at_random(given, tmp_path):
    content = json.loads((given / "tokenizer.json").read_text())
    content["model"]["dropout"] = 0.5
    (given / "tokenizer.json").write_text(json.dumps(content))
    take_in(given, tmp_path / "out")
    for folder in (given, tmp_path / "out" / "model"):
        tokenizer = models.load_tokenizer(folder)
        encoded = {tuple(chat.encode_prompt(tokenizer, [user("How do I cook rice in water?")])) for _ in range(9)}
        assert len(encoded) == 1


def test_a_tensor_in_two_shards_is_refused(tmp_path, bytes_tokenizer):
    save_model(untied(bytes_tokenizer), bytes_tokenizer, tmp_path / "given", max_shard_size="30KB")
    first, second = sorted((tmp_path / "given").glob("*.safetensors"))[:2]
    save_file({**load_file(second), **dict([next(iter(load_file(first).items()))])}, second, metadata={"format": "pt"})
    refused(tmp_path / "given", tmp_path, f"{second.name}: tensor .* is in {first.name} too")


def test_a_missing_shard_is_refused(tmp_path, bytes_tokenizer):
    save_model(untied(bytes_tokenizer), bytes_tokenizer, tmp_path / "given", max_shard_size="30KB")
    gone = sorted((tmp_path / "given").glob("*.safetensors"))[1]
    gone.unlink()
    refused(tmp_path / "given", tmp_path, f"{gone.name}: missing, though")


def test_every_stage_asks_the_same(given, reward_run, tmp_path):
    change_weights(given, lambda state: state.pop(LAST))
    for take in (models.load_policy, lambda f: models.mix_policies([f], ["1"]), lambda f: models.new_classifier(f, 0)):
        with pytest.raises(runs.UserError, match=f"tensor {LAST} is missing"):
            take(given)
    folder = shutil.copytree(reward_run, tmp_path / "reward")
    change_weights(folder / "model", lambda state: state.pop("score.weight"))
    with pytest.raises(runs.UserError, match=r"tensor score\.weight is missing, of LlamaForSequenceClassification"):
        models.load_score_model(folder)


def test_a_tied_head_may_be_stored_or_not(given, tmp_path):
    before = models.load_policy(given)
    take_in(given, tmp_path / "a")
    change_weights(given, lambda state: state.update({"lm_head.weight": state["model.embed_tokens.weight"].clone()}))
    take_in(given, tmp_path / "b")
    for name in "ab":
        loaded = models.load_policy(tmp_path / name / "model")
        assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
        assert models.content_sha256(loaded) == models.content_sha256(before)
    change_weights(given, lambda state: state["lm_head.weight"].mul_(2))  # in truth untied: both are kept
    take_in(given, tmp_path / "c")
    loaded = models.load_policy(tmp_path / "c" / "model")
    assert torch.equal(loaded.get_output_embeddings().weight, 2 * loaded.get_input_embeddings().weight)
    assert not loaded.config.tie_word_embeddings


def test_what_older_versions_stored_beside_the_weights_is_no_loss(given, tmp_path):
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    change_weights(given, lambda state: state.update(more))
    take_in(given, tmp_path / "out")


# No code, no pickles.


def test_code_of_a_folder_does_not_run(given, tmp_path):
    ran = tmp_path / "ran"
    (given / "code.py").write_text(
        f"open({str(ran)!r}, 'w')\nfrom transformers import LlamaConfig as C, LlamaForCausalLM as M\n"
    )
    auto = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M", "AutoTokenizer": ["code.T", None]}
    edit(given / "config.json", auto_map=auto, model_type="mine")
    refused(given, tmp_path, r"trust_remote_code.*; save it as a class that transformers has")
    edit(given / "config.json", model_type="llama")  # which transformers has: its own class is taken
    edit(given / "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.T", None]})
    take_in(given, tmp_path / "out")
    assert not ran.exists() and not list((tmp_path / "out").rglob("*.py"))


def test_pickles_are_refused_unless_asked_for(given, tmp_path):
    state = load_file(given / folders.SINGLE)
    whole = models.content_sha256(models.load_policy(given))
    (given / folders.SINGLE).unlink()
    torch.save(state, given / folders.PICKLE)
    refused(given, tmp_path, r"its weights are pickles.*model\.pickled_weights=true")
    take_in(given, tmp_path / "out", pickled_weights=True)
    assert models.content_sha256(models.load_policy(tmp_path / "out" / "model")) == whole
    assert not list((tmp_path / "out").rglob("*.bin"))


def test_a_pickle_of_a_name_that_is_not_read_gets_no_advice_to_read_it(given, tmp_path):
    (given / folders.SINGLE).rename(given / "model.pth")
    refused(given, tmp_path, r"its weights are pickles.*\(save_pretrained\)$")
    (tmp_path / "refused").rmdir()
    refused(given / "config.json", tmp_path, "a file; give the model's folder")


def test_a_pickle_runs_no_code(given, tmp_path):
    (given / folders.SINGLE).unlink()
    torch.save({"a": _Opens(tmp_path / "ran")}, given / folders.PICKLE)
    shutil.rmtree(tmp_path / "refused", ignore_errors=True)
    refused(
        given,
        tmp_path,
        "a pickle that is damaged, or holds more than tensors and so could run code; ",
        pickled_weights=True,
    )
    assert not (tmp_path / "ran").exists()


class _Opens:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


# Generation settings, ends, padding.


@pytest.mark.parametrize(
    "published",
    [
        {"do_sample": False, "temperature": 0.6, "top_p": 0.9},
        {"num_beams": 1, "early_stopping": True, "length_penalty": 2.0, "unheard_of": {"a": 1}},
        {"max_new_tokens": -1, "cache_implementation": "none-such", "temperature": "hot"},
    ],
)
def test_of_published_generation_settings_the_ids_are_kept(given, tmp_path, published):
    (given / "generation_config.json").write_text(
        json.dumps(published | {"eos_token_id": [2, 7, -1, 10**30], "bos_token_id": -1})
    )
    take_in(given, tmp_path / "out")
    loaded = models.load_policy(tmp_path / "out" / "model")
    tokenizer = models.load_tokenizer(tmp_path / "out" / "model")
    assert chat.end_ids(loaded, tokenizer) == [2, 7]
    kept = json.loads((tmp_path / "out" / "model" / "generation_config.json").read_text())
    assert not published.keys() & kept.keys() and kept["pad_token_id"] == tokenizer.pad_token_id


def one_special_token():
    """A byte-level tokenizer as GPT-2's: its only special token ends."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE

    made = Tokenizer(BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet, end = pre_tokenizers.ByteLevel.alphabet(), "<|endoftext|>"
    trainer = trainers.BpeTrainer(vocab_size=290, special_tokens=[end], initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(["cook rice in water"] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=end, eos_token=end, unk_token=end)


@pytest.mark.parametrize("spare", [0, 9])
def test_a_model_with_one_special_token(tmp_path, spare):
    tokenizer = one_special_token()
    torch.manual_seed(0)
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256, "vocab_size": len(tokenizer) + spare}
    save_model(GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)), tokenizer, tmp_path / "given")
    take_in(tmp_path / "given", tmp_path / "out")
    folder = tmp_path / "out" / "model"
    loaded, found = models.load_policy(folder), models.load_tokenizer(folder)
    assert found.pad_token_id not in chat.end_ids(loaded, found) and found.pad_token_id < models.rows(loaded)
    text = "boil ÿ rice"
    assert found.decode(chat.encode_prompts(found, [[{"role": "user", "content": text}]])[0]).count(text) == 1
    assert folders.positions(loaded.config.to_dict()) == 256
    models.check_context(folder, config.Lengths(200, 56))
    with pytest.raises(runs.UserError, match="the model holds 256"):
        models.check_context(folder, config.Lengths(200, 57))


def test_a_pad_token_beyond_the_embedding(bytes_tokenizer, tmp_path, tiny_chat_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_chat_model)
    tokenizer.add_special_tokens({"pad_token": "<filler>"})
    model = random_llama(bytes_tokenizer, 0, pad_token_id=None)
    save_model(model, tokenizer, tmp_path / "given")
    take_in(tmp_path / "given", tmp_path / "out")
    loaded, found = (f(tmp_path / "out" / "model") for f in (models.load_policy, models.load_tokenizer))
    assert found.pad_token == "<unk>" and loaded.config.pad_token_id == found.pad_token_id < models.rows(loaded)
    some = forward.from_lists([[5], [5, 6, 7]], [[8, 2], [9, 7, 2]], [2], found.pad_token_id)
    assert forward.response_logprobs(loaded, some)[0].isfinite().all()


def test_a_tokenizer_of_another_model_is_refused(bytes_tokenizer, tmp_path, tiny_chat_model):
    save_model(untied(range(len(bytes_tokenizer) - 5)), bytes_tokenizer, tmp_path / "given")
    refused(tmp_path / "given", tmp_path, r"the tokenizer's token .* has id \d+, and the model's embedding \d+ rows")


# Architectures.

GPT = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256}
MOE = {"num_experts": 2, "num_experts_per_tok": 1}
MAMBA = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
KV = {"num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("name", "settings", "own"),
    [
        ("GPT2LMHeadModel", GPT, True),
        ("GPTNeoXForCausalLM", SIZE | LIMIT, True),
        ("OPTForCausalLM", {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 2}, True),
        ("Gemma3ForCausalLM", SIZE | LIMIT | KV | {"head_dim": 8, "sliding_window": 4}, True),
        ("MptForCausalLM", {"d_model": 32, "n_heads": 2, "n_layers": 2, "max_seq_len": 256}, True),
        ("OlmoeForCausalLM", SIZE | LIMIT | KV | MOE, False),
        ("CodeGenForCausalLM", GPT | {"rotary_dim": 4, "n_head": 4}, False),
        ("XGLMForCausalLM", {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 2}, False),
    ],
)
def test_a_score_head_on_any_trunk(bytes_tokenizer, tmp_path, name, settings, own):
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    save_model(
        cls(cls.config_class(vocab_size=len(bytes_tokenizer), **settings | IDS)), bytes_tokenizer, tmp_path / "m"
    )
    take_in(tmp_path / "m", tmp_path / "base")
    network = models.load_policy(tmp_path / "base" / "model")
    classifier = models.new_classifier(tmp_path / "base" / "model", 0)
    assert hasattr(transformers, type(classifier).__name__) == own
    trunks = [model.base_model.state_dict() for model in (network, classifier)]
    assert all(torch.equal(trunks[0][key], trunks[1][key]) for key in trunks[0] | trunks[1])
    classifier.save_pretrained(tmp_path / "reward" / "model")
    runs.write_json(tmp_path / "reward" / "normalisation.json", {"mean": 0.0, "std": 1.0})
    loaded = models.load_score_model(tmp_path / "reward")
    some = forward.from_lists([[5], [5, 6, 7]], [[8, 9], [9, 7, 8]], [], 0)
    scores = loaded.scores(some, 2)
    for i, ids in enumerate(([5, 8, 9], [5, 6, 7, 9, 7, 8])):  # as the classifier itself reads them, which TRL trains
        assert scores[i].item() == pytest.approx(classifier(torch.tensor([ids])).logits.item(), abs=1e-5)


def test_an_architecture_without_a_classifier_is_trained_to_the_end(bytes_tokenizer, tmp_path):
    torch.manual_seed(0)
    settings = SIZE | LIMIT | KV | MOE | IDS | {"vocab_size": len(bytes_tokenizer)}
    save_model(transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**settings)), bytes_tokenizer, tmp_path / "m")
    asked, answers = [user("cook rice")], [[assistant(text)] for text in ("boil it", "no")]

    def prepare(folder):
        for name in ("prompts", "evaluation"):
            runs.write_jsonl(folder / f"{name}.jsonl", [{"id": str(i), "prompt": asked} for i in range(4)])
        for name in ("sft", "sft_validation"):
            runs.write_jsonl(folder / f"{name}.jsonl", [{"messages": asked + answers[0]}] * 4)
        pair = {"prompt": asked, "chosen": answers[0], "rejected": answers[1]}
        runs.write_jsonl(folder / "preferences.jsonl", [pair] * 8)
        gold.save(folder / "gold", "none")

    lengths = config.Lengths(64, 8)
    model = config.Model("m", "hub", str(tmp_path / "m"), chat_template="roles")
    preferences = config.RewardModel(pairs=4, held_out=4, batch_size=4, normalisation_prompts=4, learning_rate=1e-3)
    weights = ["1/2", "1/2"]
    ppo = config.TRAINING["ppo"](
        0, 0.1, ["1"], config.Reference("soup", weights), Ppo(iterations=1, batch_size=4), lengths
    )
    made = {"prepare": finished("prepare", tmp_path / "prepare", prepare)}

    def run(role, function, settings, *parents):
        made[role] = tmp_path / role
        runs.execute(role, 1, function, settings, {name: made[name] for name in parents}, made[role], EXECUTION)

    run("base", base.make, config.BaseSettings(model))
    for i in (0, 1):
        chosen = config.Sft(epochs=1, batch_size=4, learning_rate=1e-2)
        run(f"sft{i}", sft.train, config.SftSettings(i, chosen, lengths), "prepare", "base")
    run("reward_model", reward.train, config.RewardModelSettings(0, "given", preferences, lengths), "prepare", "sft0")
    run("ppo", trainer.train, ppo, "prepare", "reward_model", "sft0", "sft1")
    (metrics,) = runs.read_jsonl(made["ppo"] / "metrics.jsonl")
    assert metrics["response_length"] > 0 and models.load_score_model(made["ppo"] / "value_model")


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("MambaForCausalLM", MAMBA, r"differ from those of a fresh pass by 0\.\d+ nats"),
        ("Gemma2ForCausalLM", SIZE | LIMIT | KV | {"head_dim": 8}, r"final_logit_softcapping=30\.0"),
        ("CohereForCausalLM", SIZE | LIMIT | KV, "changes its logits after its head"),
        ("OpenAIGPTLMHeadModel", GPT, "can't be trained here"),
        ("BertLMHeadModel", SIZE, "BertLMHeadModel"),
    ],
)
def test_architectures_that_can_not_be_trained_are_refused(bytes_tokenizer, tmp_path, name, settings, message):
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    save_model(
        cls(cls.config_class(vocab_size=len(bytes_tokenizer), **settings | IDS)), bytes_tokenizer, tmp_path / "m"
    )
    refused(tmp_path / "m", tmp_path, message)


def test_positions_by_any_name():
    named = [{name: 64} for name in folders.POSITIONS]
    assert [folders.positions(values) for values in named] == [64] * len(named)
    assert folders.limit({"text_config": {"n_positions": 9}}) == ("n_positions", 9)
    assert folders.positions({"n_positions": None, "max_position_embeddings": True, "text_config": 3}) is None


# The hub.


def test_a_model_of_the_hub_is_taken_from_the_cache_with_its_commit(given, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    repository, commit = tmp_path / "cache" / "models--someone--model", "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(given, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for revision in (None, "main", commit):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        assert take_in("someone/model", tmp_path / "out", revision=revision)["commit"] == commit
    with pytest.raises(runs.UserError, match=r"model\.path=someone/model: can't be loaded .*hf auth login") as caught:
        take_in("someone/model", tmp_path / "other", revision="v2")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [TimeoutError("timed out\nafter 10 s"), ConnectionError("refused"), OSError("gated")])
def test_a_hub_that_does_not_answer_is_one_line(tmp_path, monkeypatch, error):
    def fails(*arguments, **options):
        raise error

    monkeypatch.setattr("salsa.rl.intake.snapshot_download", fails)
    refused("someone/model", tmp_path, re.escape(str(error).split("\n")[0]))


def test_the_default_study_ships_its_base():
    result = plan.plan(compose.compose([]))
    (address,) = {run.address for run in result.runs.values() if run.stage == "base"}
    assert [path.name for path in base.ASSETS.iterdir()] == [address[:12]], (
        "rename it, if its content is still the same"
    )
    assert soup.shapes(base.ASSETS / address[:12])["model.embed_tokens.weight"] == (161, 128)
