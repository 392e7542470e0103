"""Models that did not come from here: other families and tokens, folders that cannot be loaded, adapters of others."""

import dataclasses
import json
import shutil

import pytest
import torch
from evaluation_fixtures import finished_run, preferences
from inference_fixtures import END, known_pairs, make_tokenizer
from safetensors.torch import load_file, save_file
from training_fixtures import save_base, write_lines

from llm_finetuning import prompts
from llm_finetuning.evaluation import candidates, comparison, figures, intervals, report
from llm_finetuning.settings import Evaluation


@pytest.fixture
def finished(published, tiny_base, tmp_path) -> Evaluation:
    return dataclasses.replace(finished_run(published, tiny_base, tmp_path), eval_answers=2)


def other_tokenizer(chat_template: str | None = None):
    """SentencePiece-like pieces with a BOS of its own: no token has the id that it has in the fixture's tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.Unigram())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    texts = [f"Instruct: {pair['prompt']}\nOutput: {pair['response']}" for pair in known_pairs()]
    letters = sorted({letter for text in texts for letter in text} | set("\n'[]") | set("assistant user system"))
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=letters, unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = chat_template
    return tokenizer


TAGGED = (
    "{{ bos_token }}{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)


def tiny_llama(folder, tokenizer, **changed):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256}
    return save_base(folder, LlamaForCausalLM(LlamaConfig(**sizes | heads | changed)), tokenizer)


def test_another_family_with_other_tokens_is_compared_by_what_compares(finished, tmp_path):
    llama = tiny_llama(tmp_path / "llama", other_tokenizer(TAGGED))
    results = comparison.compare(dataclasses.replace(finished, models=["finetuned", str(llama)], follow_rules=True))
    told = report.differences(results).set_index("figure")["verdict"]
    assert told["bits_per_byte"] == "worse" and told["rank_agreement"] == "worse"
    assert not {"loss", "generic_loss"} & set(told.index), "nats per token of other tokens do not compare"
    record = report.write(results, finished.folders.evaluation)
    assert list(record) == ["finetuned", "llama"] and record["llama"]["loss"]["n"] == len(known_pairs())


@pytest.mark.parametrize("same_tokens", [True, False])
def test_a_base_without_a_chat_template_is_asked_in_its_own_tokens(finished, published, tmp_path, capsys, same_tokens):
    tokenizer = make_tokenizer() if same_tokens else other_tokenizer()
    tokenizer.chat_template = None
    base = tiny_llama(tmp_path / "plain", tokenizer, vocab_size=448)
    found = candidates.named(dataclasses.replace(finished, models=["finetuned", str(base)]))
    used = comparison.templates(found)
    assert (used["plain"] is used["finetuned"]) is same_tokens
    assert ("plain has no chat template, and other tokens" in capsys.readouterr().out) is not same_tokens
    example = prompts.encode(known_pairs()[0], used["plain"])
    assert max(example["input_ids"]) < 448
    assert example["input_ids"][-1] == tokenizer.eos_token_id
    if not same_tokens:
        assert example["input_ids"][0] == tokenizer.bos_token_id


def test_a_base_without_embeddings_for_added_tokens_does_not_get_them(finished, tmp_path):
    """The finetuned tokenizer has one token more than the base has rows."""
    base = tiny_llama(tmp_path / "plain", make_tokenizer())
    grown = make_tokenizer()
    grown.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    grown.chat_template = TAGGED
    larger = tiny_llama(tmp_path / "grown", grown)
    used = comparison.templates(candidates.named(dataclasses.replace(finished, models=[str(base), str(larger)])))
    assert len(used["plain"].tokenizer) == len(make_tokenizer()) < len(used["grown"].tokenizer)


def pickled(folder):
    """As the Hub has it from before safetensors."""
    file = folder / "model.safetensors"
    torch.save(load_file(file), folder / "pytorch_model.bin")
    file.unlink()


def cut_off(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def of_other_sizes(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))


def one_shard_lost(folder):
    index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (pickled, r"models: other: .*Pickled weights \(pytorch_model.bin\) are never opened"),
        (cut_off, "model.safetensors is damaged"),
        (of_other_sizes, "config.json describes another model"),
        (one_shard_lost, "models: other: .*lacks model-00002-of-00002.safetensors"),
    ],
)
def test_a_folder_that_could_not_be_loaded_is_refused_before_the_first_model_is(
    damage, problem, finished, published, tmp_path, monkeypatch
):
    shutil.copytree(published, tmp_path / "other")
    damage(tmp_path / "other")
    monkeypatch.setattr(candidates.Candidate, "load", lambda *_: pytest.fail("loaded"))
    with pytest.raises((ValueError, FileNotFoundError), match=problem):
        comparison.compare(dataclasses.replace(finished, models=["finetuned", str(tmp_path / "other")]))


def adapter_on(base, folder, **changed):
    """An untrained adapter as PEFT saves it."""
    import peft
    from transformers import AutoModelForCausalLM

    config = peft.LoraConfig(**{"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | changed)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    return folder


def larger_phi(folder):
    from inference_fixtures import make_model

    return save_base(folder, make_model(rows=448, hidden=320), make_tokenizer())


@pytest.mark.parametrize(
    "base_of", [lambda folder: tiny_llama(folder, make_tokenizer()), larger_phi], ids=["another family", "other sizes"]
)
def test_an_adapter_of_another_base_is_refused_before_the_first_model_is_loaded(
    base_of, finished, tmp_path, monkeypatch
):
    adapter = adapter_on(base_of(tmp_path / "theirs"), tmp_path / "their-adapter")
    monkeypatch.setattr(candidates.Candidate, "load", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ValueError, match="their-adapter is not an adapter of this base"):
        comparison.compare(dataclasses.replace(finished, models=["finetuned", f"base + {adapter}"]))


@pytest.mark.parametrize("changed", [{}, {"use_dora": True}, {"target_modules": ["q_proj"], "use_rslora": True}])
def test_adapters_of_other_kinds_are_taken_on_base(changed, finished, tiny_base, tmp_path):
    """Untrained, it is the base."""
    adapter = adapter_on(tiny_base, tmp_path / "fresh", **changed)
    several = dataclasses.replace(finished, models=["finetuned", "base", f"base + {adapter}"], eval_answers=0)
    results = comparison.compare(several)
    assert results["fresh"].samples["loss"].values == pytest.approx(results["base"].samples["loss"].values, rel=1e-4)


def test_a_model_whose_loss_is_not_finite_is_named_and_not_kept(finished, published, tmp_path):
    broken = shutil.copytree(published, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.fc2.weight"][0, 0] = torch.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    settings = dataclasses.replace(finished, models=["finetuned", str(broken)])
    with pytest.raises(ValueError, match=r"of broken the loss is not finite on \d+ of \d+ units.*leave it out"):
        comparison.compare(settings)
    assert [path.stem for path in finished.folders.evaluated.iterdir()] == ["finetuned"]
    assert not finished.folders.evaluation.exists()


def test_a_nan_is_no_agreement(world):
    from llm_finetuning.evaluation import agreement

    found = agreement.figures(intervals.Sample([float("nan"), 1.0, 1.0, 2.0], [1.0] * 4))
    assert str(found["rank_agreement"].values) == "[nan, True]" or found["rank_agreement"].values[1] == 1


def test_one_question_has_figures_and_no_intervals(finished):
    write_lines(finished.folders.val_file, known_pairs()[:1])
    write_lines(finished.folders.val_preferences, preferences()[:1])
    results = comparison.compare(finished)
    record = report.write(results, finished.folders.evaluation)
    assert record["base"]["loss"]["n"] == record["base"]["rank_agreement"]["n"] == 1
    assert record["base"]["loss"]["low"] is record["base"]["perplexity"]["high"] is None
    told = report.differences(results).set_index("figure")["verdict"]
    assert told["loss"] == told["rank_agreement"] == "no difference shown"
    assert "(n = 1)" in report.table(record)["base"]["loss"]
    figures.with_intervals(record)


def test_a_model_with_fewer_positions_decides_the_length(finished, tmp_path, capsys):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TAGGED.replace("{{ bos_token }}", "")
    short = tiny_llama(tmp_path / "short", tokenizer, max_position_embeddings=40)
    results = comparison.compare(dataclasses.replace(finished, models=["finetuned", str(short)], eval_answers=0))
    assert "max_seq_length = 40 in place of 200: short has no more" in capsys.readouterr().out
    (measured,) = {len(result.samples["loss"].values) for result in results.values()}
    assert 0 < measured < len(known_pairs())


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("\n\n", "preferences_val.jsonl has no lines"),
        ("{\n", "preferences_val.jsonl.*line 1"),
        ('{"prompt": "a", "chosen": "b"}\n', "preferences_val.jsonl.*rejected missing"),
        ('{"prompt": "a", "chosen": "b", "rejected": 3}\n', "preferences_val.jsonl.*rejected response is 3"),
    ],
)
def test_ranks_that_are_none_are_refused_with_their_line(text, problem, finished):
    finished.folders.val_preferences.write_text(text)
    with pytest.raises(ValueError, match=rf"(?s){problem}"):
        comparison.compare(finished)


def test_text_of_single_tokens_says_nothing(finished, tmp_path):
    """Nothing stands before the only token of a passage, so it has no likelihood."""
    (tmp_path / "plain.txt").write_text("a\n\nb", encoding="utf-8")
    results = comparison.compare(dataclasses.replace(finished, models=["finetuned"], eval_answers=0))
    assert "generic_loss" not in report.figures(results["finetuned"])


def test_an_empty_file_of_ranks_leaves_agreement_out(finished):
    finished.folders.val_preferences.write_text("")
    results = comparison.compare(dataclasses.replace(finished, models=["finetuned"], eval_answers=0))
    assert "rank_agreement" not in report.figures(results["finetuned"])
    assert END not in str(report.questions(results))
