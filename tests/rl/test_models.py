"""Tokenizers, chat templates, end tokens, models in memory, and the base model that the project makes."""

import dataclasses
import shutil

import pytest
import torch
import transformers
from conftest import SHAPE, random_llama, save_model
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from salsa import base
from salsa.data import chat
from salsa.data.messages import user
from salsa.data.worlds import stories
from salsa.rl import folders, forward, models
from salsa.workflow import config, runs


@pytest.fixture
def fresh(tokenizer, tmp_path):
    """A copy of the tokenizer that may be changed."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return models.load_tokenizer(tmp_path / "tokenizer")


def test_words_are_tokens(tokenizer):
    assert len(tokenizer) == 6 + len(stories.words())
    text = "the fox loves a kite ."
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == 6 and tokenizer.decode(ids) == text
    assert tokenizer("unheard", add_special_tokens=False)["input_ids"] == [tokenizer.unk_token_id]
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 4


def test_a_vocabulary_that_does_not_fit_is_refused(tmp_path):
    runs.write_json(tmp_path / "words.json", ["a", "b", "c"])
    with pytest.raises(runs.UserError, match="vocabulary_size=8: the corpus has 9 words"):
        base.make_tokenizer([], tmp_path / "words.json", config.Architecture(vocabulary_size=8))


def test_text_without_a_word_list_gets_bytes(tmp_path):
    texts = ["a good film, truly good", "a bad film — sadly"] * 20
    shape = config.Architecture(vocabulary_size=300)
    made = base.make_tokenizer(texts, tmp_path / "none.json", shape)
    assert len(made) <= 300
    for text in [*texts[:2], "Ünseen ✓ text\nof two lines"]:
        ids = made(text, add_special_tokens=False)["input_ids"]
        assert made.decode(ids) == text and made.unk_token_id not in ids


def test_a_soup_in_memory(sft_runs, sft_models, tmp_path):
    folders = [folder / "model" for folder in sft_runs]
    mixed = models.mix_policies(folders, ["1/4", "3/4"])
    assert not mixed.training and mixed.dtype == torch.float32
    for found, a, b in zip(mixed.parameters(), *(m.parameters() for m in sft_models), strict=True):
        torch.testing.assert_close(found, 0.25 * a + 0.75 * b, rtol=1e-6, atol=1e-7)
    only = models.mix_policies([tmp_path / "absent", folders[1], None], [0, "1", 0])  # what isn't used isn't read
    assert all(torch.equal(a, b) for a, b in zip(only.parameters(), sft_models[1].parameters(), strict=True))
    with pytest.raises(runs.UserError, match="must sum to 1"):
        models.mix_policies(folders, [0.5, 0.6])


@pytest.mark.parametrize("name", ["GPTNeoXForCausalLM", "OlmoeForCausalLM"])
def test_a_soup_of_models_that_are_stored_by_other_names(tokenizer, tmp_path, name):
    cls, shape = getattr(transformers, name), SHAPE
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": 2,
        "num_experts": 2,
    }
    settings |= {"intermediate_size": 48, "num_attention_heads": 2, "num_experts_per_tok": 1, "eos_token_id": 2}
    made = []
    for i in range(2):
        torch.manual_seed(i)
        made.append(cls(cls.config_class(**settings)))
        save_model(made[i], tokenizer, tmp_path / str(i))
    assert not folders.stored(tmp_path / "0").keys() <= made[0].state_dict().keys()
    mixed = models.mix_policies([tmp_path / "0", tmp_path / "1"], ["1/4", "3/4"])
    assert not mixed.training and mixed.generation_config.eos_token_id == 2
    for (key, found), a, b in zip(mixed.named_parameters(), *(m.parameters() for m in made), strict=True):
        torch.testing.assert_close(found, 0.25 * a + 0.75 * b, rtol=1e-6, atol=1e-7, msg=key)


def test_attention_dropout_by_any_name(tokenizer, tiny_chat_model, tmp_path):
    assert models.attention_dropout(tiny_chat_model, 0.1) == {"attention_dropout": 0.1}
    assert models.attention_dropout(tiny_chat_model, 0.0) == {}
    shape = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": len(tokenizer), "attn_pdrop": 0.0}
    save_model(GPT2LMHeadModel(GPT2Config(**shape, eos_token_id=2)), tokenizer, tmp_path)
    loaded = models.load_policy(tmp_path, **models.attention_dropout(tmp_path, 0.1))
    assert loaded.transformer.h[0].attn.attn_dropout.p == 0.1
    models.end_dropout(loaded.config)
    assert loaded.config.attn_pdrop == 0 and not hasattr(loaded.config, "attention_dropout")
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(runs.UserError, match=r"sft.dropout=0.1: mamba has no attention dropout"):
        models.attention_dropout(tmp_path, 0.1)


def test_a_gpu_that_is_not_there(execution):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(runs.UserError, match=r"execution.device=cuda"):
        models.prepare_process(dataclasses.replace(execution, device="cuda"))
    assert models.prepare_process(dataclasses.replace(execution, device="auto")) == torch.device("cpu")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, execution):
    from salsa.data import corpus

    folder = tmp_path_factory.mktemp("corpus") / "corpus"
    settings = config.CorpusSettings(config.Corpus(kind="stories", documents=150, seed=1))
    runs.execute("corpus", corpus.VERSION, corpus.make, settings, {}, folder, execution)
    return folder


def base_settings(**changes):
    model = config.Model("t", "pretrain", chat_template="roles", architecture=SHAPE)
    values = {"epochs": 2, "batch_size": 16, "block_length": 32, "learning_rate": 5e-3}
    return config.BaseSettings(model, config.Base(**values | changes))


def test_pretraining(corpus, execution, tmp_path):
    output = tmp_path / "base"
    runs.execute("base", base.VERSION, base.make, base_settings(), {"corpus": corpus}, output, execution)
    summary = runs.verify(output)["summary"]
    network = AutoModelForCausalLM.from_pretrained(output / "model")
    tokenizer = models.load_tokenizer(output / "model")
    assert summary["parameters"] == network.num_parameters() and summary["vocabulary"] == len(tokenizer) == 6 + len(
        stories.words()
    )
    assert network.dtype == torch.float32 and network.config.max_position_embeddings == SHAPE.max_length
    assert 0 < summary["held_out_loss"] < 4.5  # a uniform guess costs 5.1
    texts = [row["text"] for row in runs.read_jsonl(corpus / "corpus.jsonl")]
    blocks = base._blocks(tokenizer, texts, 32)
    assert len(blocks) == summary["blocks"]
    stream = [token for block in blocks for token in block]
    joined = " ".join(f"<bos> {text} <eos>" for text in texts).split()
    assert tokenizer.convert_ids_to_tokens(stream) == joined[: len(stream)] and len(joined) - len(stream) < 32
    held_out = blocks[: max(1, len(blocks) // 100)]
    with torch.no_grad():
        loss = network(input_ids=torch.tensor(held_out), labels=torch.tensor(held_out)).loss.item()
    assert loss == pytest.approx(summary["held_out_loss"], rel=1e-4)


def test_the_shipped_base_is_used_where_its_address_is_the_runs(corpus, execution, tmp_path, monkeypatch, base_run):
    settings = base_settings(seed=4)
    address = runs.address(
        "base", base.VERSION, dataclasses.asdict(settings), {"corpus": runs.manifest_of(corpus)["address"]}
    )
    shipped = shutil.copytree(base_run / "model", tmp_path / "assets" / address[:12])
    runs.write_json(shipped / "training.json", {"held_out_loss": 1.0})
    monkeypatch.setattr(base, "ASSETS", tmp_path / "assets")
    monkeypatch.setattr(base, "pretrain", lambda *arguments: {"trained": True})
    summary = base.make(settings, {"corpus": corpus}, tmp_path / "out", execution)
    assert summary["shipped"] == address[:12] and (tmp_path / "out" / "model" / "model.safetensors").is_file()
    anew = dataclasses.replace(execution, shipped_base=False)
    assert base.make(settings, {"corpus": corpus}, tmp_path / "other", anew) == {"trained": True}
    assert base.make(base_settings(seed=5), {"corpus": corpus}, tmp_path / "third", execution) == {"trained": True}


def test_a_local_model_becomes_a_base(tokenizer, fresh, execution, tmp_path):
    fresh.pad_token = fresh.eos_token
    network = random_llama(tokenizer, 3)
    save_model(network, fresh, tmp_path / "given")
    settings = config.BaseSettings(config.Model("m", "hub", str(tmp_path / "given"), chat_template="plain"))
    base.make(settings, {}, tmp_path / "base", execution)
    loaded, found = models.load_policy(tmp_path / "base" / "model"), models.load_tokenizer(tmp_path / "base" / "model")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), network.parameters(), strict=True))
    assert found.pad_token == "<unk>" and loaded.config.pad_token_id == found.unk_token_id
    assert len(chat.encode_prompts(found, [[user("the fox")]])[0]) == 3
    assert chat.end_ids(loaded, found) == chat.end_ids(network, tokenizer)


def test_a_model_that_cannot_be_had(execution, tmp_path):
    settings = config.BaseSettings(config.Model("m", "hub", "nobody-at-all/no-such-model", chat_template="plain"))
    with pytest.raises(runs.UserError, match=r"no-such-model: can't be loaded .*hf auth login") as caught:
        base.make(settings, {}, tmp_path, execution)
    assert "\n" not in str(caught.value)
    package = config.BaseSettings(config.Model("m", "package", "no-such-package-of-a-model"))
    with pytest.raises(runs.UserError, match="make smollm2"):
        base.make(package, {}, tmp_path, execution)
    assert not list(tmp_path.iterdir())


def test_logits_that_are_more_than_the_heads_are_refused(sft_models):
    models.check_head(sft_models[0])
    torch.manual_seed(0)
    shape = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.5}
    models.check_head(Gemma2ForCausalLM(Gemma2Config(**shape, final_logit_softcapping=None)).eval())
    with pytest.raises(runs.UserError, match="Gemma2ForCausalLM changes its logits after its head"):
        models.check_head(Gemma2ForCausalLM(Gemma2Config(**shape, final_logit_softcapping=1.0)).eval())


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler to compile with")
def test_a_compiled_trunk_computes_the_same(sft_runs, prompts):
    plain, compiled = (models.load_policy(sft_runs[0] / "model") for _ in range(2))
    models.compile_trunks([compiled])
    responses = [[7, 8, 9][: 1 + i % 3] for i in range(8)]
    sequences = forward.from_lists(prompts[1][:8], responses, [], 0)
    found = [forward.response_logprobs(model, sequences)[0] for model in (plain, compiled)]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    for logprobs in found:
        logprobs.sum().backward()
    for a, b in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0


def test_without_a_compiler_nothing_is_compiled_and_it_says_so(sft_runs, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    model = models.load_policy(sft_runs[0] / "model")
    models.compile_trunks([model])
    assert not hasattr(model, "compiled_trunk")
    assert "no C++ compiler" in capsys.readouterr().out


@pytest.mark.parametrize("offline", [True, False])
def test_how_a_tokenizer_was_loaded_is_not_saved_with_it(base_run, tmp_path, monkeypatch, offline):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    models.load_tokenizer(base_run / "model").save_pretrained(tmp_path)
    saved = runs.read_json(tmp_path / "tokenizer_config.json")
    assert not {"is_local", "local_files_only", "trust_remote_code"} & set(saved) and saved["padding_side"] == "left"
