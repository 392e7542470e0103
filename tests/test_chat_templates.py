"""Chat templates of others: the response alone is in the loss, and what is asked is what was trained."""

import copy
import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from inference_fixtures import END, ask, make_tokenizer
from training_fixtures import small_pairs, small_settings

from llm_finetuning import prompts
from llm_finetuning.settings import DataPrep, Finetuning

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TURN = "{% for m in messages %}{{ '<|' + m['role'] + '|>' + WORDS }}{% endfor %}{{ '<|assistant|>' * OPEN }}"
BUNDLED = sorted((Path(importlib.util.find_spec("trl").origin).parent / "chat_templates").glob("*.jinja"))
IMAGES_ONLY = [f"{name}{kind}" for name in ("idefics3", "llava_next", "smolvlm") for kind in ("", "_training")]
"""Their messages are lists of texts and images; a text as it is stays unwritten or fails."""
REASONED = ask("Why?", "Hi", "<think>\nA greeting.\n</think>\n\nHello")
PAIR = {"prompt": "Why?", "response": "Because.", "history": REASONED[:2]}
TEXTS = {path.stem: path.read_text(encoding="utf-8") for path in BUNDLED if path.stem not in IMAGES_ONLY}


def tokenizer_with(source: str, *special: str, tokenizer=None):
    """A tokenizer with a template; the special tokens that it writes are added, `<think>` as a plain one."""
    tokenizer = tokenizer or make_tokenizer()
    names = set(re.findall(r"<\|?[^\s<>{}'\"=/]+\|?>|</\w+>", source)) | set(special)
    tokenizer.add_tokens(sorted(name for name in names if "think" in name and name not in special))
    specials = sorted(name for name in names if "think" not in name or name in special)
    tokenizer.add_special_tokens({"additional_special_tokens": specials})
    tokenizer.chat_template = source
    return tokenizer


def in_loss(row: dict, template: prompts.Template) -> str:
    return template.tokenizer.decode([label for label in row["labels"] if label != prompts.IGNORE_INDEX])


def prompts_everywhere(template: prompts.Template, pair: dict, folder: Path) -> dict[str, list[int]]:
    """The ids that stand before the answer, as each part of the project and plain transformers make them."""
    from transformers import AutoTokenizer

    from llm_finetuning.evaluation import scoreboard
    from llm_finetuning.inference.chat import encode_question
    from llm_finetuning.training.dataset import encode_pairs

    asked = prompts.conversation(pair)[:-1]
    (example,) = encode_pairs([pair], template, 4096).examples
    (held_out,) = scoreboard.held_out_set([pair], template, 4096, 1, seed=0)
    template.tokenizer.save_pretrained(folder)
    saved = AutoTokenizer.from_pretrained(folder)
    again = prompts.template_for(AutoTokenizer.from_pretrained(folder))
    return {
        "training": example["input_ids"][: example["labels"].count(prompts.IGNORE_INDEX)],
        "evaluation": held_out["input_ids"][: held_out["labels"].count(prompts.IGNORE_INDEX)],
        "answers": prompts.render(prompts.conversation(held_out["pair"])[:-1], template),
        "chat": encode_question(asked, again, 4096, 16).ids,
        "transformers": saved.apply_chat_template(asked, add_generation_prompt=True)["input_ids"],
    }


@pytest.mark.parametrize("name", IMAGES_ONLY)
def test_a_bundled_template_for_images_is_refused(name):
    (path,) = [path for path in BUNDLED if path.stem == name]
    with pytest.raises(ValueError, match="the chat template of this tokenizer .*: set chat_template to a file"):
        prompts.template_for(tokenizer_with(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", TEXTS)
def test_every_bundled_template_has_the_response_alone_in_the_loss(name, tmp_path):
    tokenizer = tokenizer_with(TEXTS[name])
    template = prompts.template_for(tokenizer)
    for pair in ({"prompt": "Why?", "response": "Because."}, PAIR):
        row = prompts.encode(pair, template)
        assert row["labels"][-1] in template.stop_token_ids
        assert row["labels"][-1] in tokenizer.all_special_ids
        *response, end = [label for label in row["labels"] if label != prompts.IGNORE_INDEX]
        assert tokenizer.decode(response) == "Because.", "nothing but the response, and one token that ends it"
        made = prompts_everywhere(template, pair, tmp_path)
        assert len({tuple(ids) for ids in made.values()}) == 1, made


@pytest.mark.parametrize("name", TEXTS)
def test_a_finished_conversation_is_written_as_the_template_itself_does(name):
    own = tokenizer_with(TEXTS[name])
    template = prompts.template_for(copy.deepcopy(own))
    for messages in (prompts.conversation(PAIR), ask("b", "a")[:2]):
        theirs = own.apply_chat_template(messages, tokenize=False)
        assert template.tokenizer.apply_chat_template(messages, tokenize=False) == theirs
        if "generation %}" in TEXTS[name]:
            masks = [
                each.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
                for each in (own, template.tokenizer)
            ]
            assert masks[0]["assistant_masks"] == masks[1]["assistant_masks"] and 1 in masks[0]["assistant_masks"]
    once = template.tokenizer.chat_template
    assert prompts.template_for(template.tokenizer).tokenizer.chat_template == once, "a second time changes nothing"


@pytest.mark.parametrize(
    ("name", "opening"),
    [
        ("qwen3_5_think", "assistant\n<think>\n\n</think>\n\n"),
        ("qwen3", "assistant\n<think>\n\n</think>\n\n"),
        ("nemotron_3_nano", "assistant\n<think></think>"),
        ("deepseek_r1_distill", "Why?<｜Assistant｜>"),
        ("glm4moe", "<|assistant|>\n<think></think>\n"),
        ("gptoss", "assistant<|channel|>final<|message|>"),
    ],
)
def test_a_turn_is_opened_as_it_is_finished(name, opening):
    source = TEXTS[name]
    for system_message in ("", "It's brief.\nVery."):
        template = prompts.template_for(tokenizer_with(source), system_message)
        text = template.tokenizer.decode(prompts.render(REASONED, template))
        assert text.endswith(opening)
        assert system_message in text
        assert in_loss(prompts.encode(PAIR, template), template).startswith("Because.")


DATED = [name for name, source in TEXTS.items() if "strftime_now" in source]


def test_what_is_trained_and_compared_does_not_change_overnight(clock, tmp_path):
    from llm_finetuning.evaluation import comparison
    from llm_finetuning.training import dataset, preference_data

    sizes = dict.fromkeys(("max_seq_length", "tokens_per_step", "micro_batch_tokens"), 2048)
    chosen, pairs = small_settings(tmp_path, "m", system_message="", **sizes), small_pairs(3)
    ranked = [{"prompt": "q", "history": [], "chosen": "yes", "rejected": "no"}]
    days = []
    for day in (0, 1):
        clock(day)
        made = {}
        for name in DATED:
            inputs = dataset.encode_inputs(chosen, tokenizer_with(TEXTS[name]), pairs, pairs, ranked)
            preferred = preference_data.encode_inputs(chosen, tokenizer_with(TEXTS[name]), ranked, pairs, ranked)
            candidate = SimpleNamespace(name=name, tokenizer=lambda name=name: tokenizer_with(TEXTS[name]))
            measured = prompts.encode(PAIR, comparison.templates([candidate])[name])
            made[name] = [inputs.data, inputs.held_out, inputs.ranked, preferred.data, measured]
        days.append(made)
    assert "llama3_2" in DATED and days[0] == days[1]


def test_thinking_that_is_asked_for_by_name_is_left_alone():
    source = TEXTS["qwen3"]
    tokenizer = prompts.template_for(tokenizer_with(source)).tokenizer
    off, on = (
        tokenizer.apply_chat_template(ask("q"), tokenize=False, add_generation_prompt=True, **named)
        for named in ({"enable_thinking": False}, {})
    )
    assert off == on and off.count("<think>") == 1


def test_special_tokens_that_swallow_blank_space_do_so_as_in_transformers():
    from tokenizers import AddedToken

    tokenizer = make_tokenizer()
    names = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken(n, rstrip=True) for n in names]})
    tokenizer.chat_template = TEXTS["phi3"]
    template = prompts.template_for(tokenizer)
    asked = prompts.render(ask("  q\n"), template)
    assert asked == tokenizer.apply_chat_template(ask("  q\n"), add_generation_prompt=True)["input_ids"]
    row = prompts.encode({"prompt": "  q\n", "response": "Yes <|end|>\n no"}, template)
    assert row["input_ids"][: len(asked)] == asked
    assert in_loss(row, template) == "Yes <|end|>\n no<|end|>"


def test_a_template_without_a_generation_prompt_gets_one():
    template = prompts.template_for(tokenizer_with(CHATML.partition("{% if")[0]))
    assert template.tokenizer.decode(prompts.render(ask("q"), template)).endswith("<|im_start|>assistant\n")
    assert in_loss(prompts.encode(PAIR, template), template) == "Because.<|im_end|>"


def test_a_response_whose_reasoning_the_template_cuts_is_refused():
    source = TEXTS["qwen3"]
    template = prompts.template_for(tokenizer_with(source))
    with pytest.raises(ValueError, match="writes the response '<think>.*in other words.*set chat_template"):
        prompts.encode({"prompt": "q", "response": "<think>\nplan\n</think>\n\nanswer"}, template)


def written(words: str, opening: str = "add_generation_prompt") -> str:
    return TURN.replace("WORDS", words).replace("OPEN", f"({opening})|int")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (written("'<think></think>' * (m['role'] == 'assistant') + m['content']"), f"Because.{END}"),
        (written("m['content'] + '\n### End\n'"), f"Because.{END}"),
        (written("m['content'] + ' ' + eos_token"), f"Because. {END}"),
        (written("'  ' + m['content']|trim + eos_token + eos_token"), f"  Because.{END}"),
        (written("m['content'] + '[END]' + eos_token"), f"Because.[END]{END}"),
        (written("m['content']", opening="messages[-1]['role'] == 'user'"), f"Because.{END}"),
    ],
)
@pytest.mark.parametrize("special", [(), ("<think>", "</think>")], ids=["plain", "special"])
def test_an_end_counts_only_after_the_response(source, expected, special):
    tokenizer = tokenizer_with(source, "<|user|>", "<|assistant|>", *special)
    template = prompts.template_for(tokenizer)
    assert in_loss(prompts.encode(PAIR, template), template) == expected
    assert template.stop_token_ids == {tokenizer.eos_token_id}


REFUSED = {
    "begins with .* twice": "{{ bos_token + bos_token }}" + CHATML,
    "0 times as it is": CHATML.replace("m['content']", "m['content']|upper"),
    "2 times as it is": CHATML.replace("m['content']", "m['content'] + m['content']"),
    "writes the response of a finished turn 0 times": CHATML.replace(
        "for m in messages", "for m in messages if m['role'] == 'user'"
    ),
    "not write the response after its prompt": CHATML.replace("in messages", "in messages|reverse"),
    "ZeroDivisionError": "{{ 1 // 0 }}" + CHATML,
    "Range too big": "{% for i in range(10 ** 9) %}{{ i }}{% endfor %}" + CHATML,
    "RecursionError": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}" + CHATML,
    "no valid Jinja: line 2": "\n{% for m in messages %}{{ m['content'] }",
    "no roles here": "{{ raise_exception('no roles here') }}",
}


@pytest.mark.parametrize("reason", REFUSED)
@pytest.mark.parametrize("system_message", ["", "Be brief."])
def test_a_template_that_cannot_be_trained_with_is_refused_by_name(reason, system_message, tmp_path):
    file = tmp_path / "odd.jinja"
    file.write_text(REFUSED[reason])
    tokenizer = tokenizer_with(CHATML)
    with pytest.raises(ValueError, match=f"odd.jinja .*{reason}.*: set chat_template to a file"):
        prompts.template_for(tokenizer, system_message, str(file))


@pytest.mark.parametrize("change", ["|replace('e', 'x')", "[:4]", "|e", "|replace('\n', ' ')"])
def test_a_response_that_is_not_in_its_labels_raises(change):
    source = CHATML.replace("m['content']", f"m['content']{change}")
    try:
        template = prompts.template_for(tokenizer_with(source))
    except ValueError as error:
        assert "as it is" in str(error)  # seen on the first look already
        return
    with pytest.raises(ValueError, match="this tokenizer writes the response .* in other words"):
        prompts.encode({"prompt": "q", "response": "Some <b>\nlines"}, template)


def test_a_response_that_begins_with_line_breaks_is_asked_for_with_the_prompts_own_tokens():
    tokenizer = tokenizer_with(CHATML)
    tokenizer.add_tokens(["\n\n"])  # as "\n\n" is one token of most tokenizers
    template = prompts.template_for(tokenizer)
    row = prompts.encode({"prompt": "q", "response": "\nYes"}, template)
    asked = prompts.render(ask("q"), template)
    assert row["input_ids"][: len(asked)] == asked
    assert in_loss(row, template) == "\nYes<|im_end|>"


words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)
SOME = ["qwen3_5_think", "deepseekv3", "glm4moe", "gptoss", "gemma3", "phi3", "nemotron_3_nano", "llama3_1"]
TEMPLATES = {}


@pytest.mark.parametrize("name", SOME)
def test_bundled_templates_on_phi2s_own_tokenizer(name, phi2_tokenizer_folder, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = tokenizer_with(TEXTS[name], tokenizer=AutoTokenizer.from_pretrained(phi2_tokenizer_folder))
    template = prompts.template_for(tokenizer)
    pair = PAIR | {"response": "\n\nBecause:\n\n- 日本語 🎉\n"}
    made = prompts_everywhere(template, pair, tmp_path)
    assert len({tuple(ids) for ids in made.values()}) == 1, made
    *response, end = [label for label in prompts.encode(pair, template)["labels"] if label != prompts.IGNORE_INDEX]
    assert tokenizer.decode(response).strip() == pair["response"].strip() and end in template.stop_token_ids


@pytest.mark.parametrize("name", SOME)
@settings(max_examples=25, deadline=None)
@given(prompt=words, response=words, turns=st.lists(st.tuples(words, words), max_size=2), special=st.booleans())
def test_any_conversation(name, prompt, response, turns, special):
    if name not in TEMPLATES:
        source = TEXTS[name]
        TEMPLATES[name] = prompts.template_for(tokenizer_with(source))
    template = TEMPLATES[name]
    assume(response.strip())  # where nothing is left of it the pair is refused
    response += " <|im_end|><|end|><|endoftext|>!" * special
    history = [m for turn in turns for m in ask("", *turn)[:2]]
    row = prompts.encode({"prompt": prompt, "response": response, "history": history}, template)
    asked = prompts.render([*history, *ask(prompt)], template)
    assert row["input_ids"][: len(asked)] == asked
    assert row["labels"] == [prompts.IGNORE_INDEX] * len(asked) + row["input_ids"][len(asked) :]
    *answer, end = row["input_ids"][len(asked) :]
    assert template.tokenizer.decode(answer).strip() == response.strip()
    assert end in template.stop_token_ids and not template.stop_token_ids & set(answer)
    typed = [prompt, response, *(text for turn in turns for text in turn)]
    if not any(map(template.special_tokens.search, typed)):  # which is what theirs would take it for
        theirs = template.tokenizer.apply_chat_template([*history, *ask(prompt)], add_generation_prompt=True)
        assert asked == theirs["input_ids"]


def bos_tokenizer(kind: str):
    """A tokenizer that puts `<s>` before every text and has no chat template."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    alphabet = []
    if kind == "bytes":
        bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    elif kind == "metaspace":
        bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        bpe.decoder = decoders.Metaspace(prepend_scheme="first")
    else:
        bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet)
    bpe.train_from_iterator(["Instruct: Why? Because.\nOutput: Because. Be brief. Hi Hello"] * 3, trainer)
    bpe.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("kind", ["bytes", "metaspace", "sentencepiece"])
@pytest.mark.parametrize("system_message", ["", "Be brief."])
def test_a_tokenizer_that_prepends_bos_gets_it_once_everywhere(kind, system_message, tmp_path):
    template = prompts.template_for(bos_tokenizer(kind), system_message)
    pair = {"prompt": "Why?", "response": "Because.", "history": ask("x", "Hi", "Hello")[:2]}
    made = prompts_everywhere(template, pair, tmp_path)
    assert len({tuple(ids) for ids in made.values()}) == 1, made
    ids = made["training"]
    assert ids[0] == template.tokenizer.bos_token_id and ids.count(ids[0]) == 1
    assert in_loss(prompts.encode(pair, template), template).strip() == "Because.</s>"
    text = (
        f"{system_message}\n" if system_message else ""
    ) + "Instruct: Hi\nOutput: Hello</s>\nInstruct: Why?\nOutput:"
    assert ids == template.tokenizer(text).input_ids


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
def test_a_typed_bos_stays_text(kind):
    template = prompts.template_for(bos_tokenizer(kind))
    ids = prompts.render(ask("<s>Hi</s>"), template)
    assert ids.count(template.tokenizer.bos_token_id) == 1 and template.tokenizer.eos_token_id not in ids
    row = prompts.encode({"prompt": "<s>", "response": "</s>"}, template)
    assert row["labels"].count(template.tokenizer.eos_token_id) == 1


def test_a_tokenizer_that_prepends_nothing_keeps_the_fallback_as_it_is():
    assert prompts.template_for(make_tokenizer()).tokenizer.chat_template == prompts.PHI2_FORMAT


def test_the_template_of_a_file_overrides_and_travels(tmp_path):
    from transformers import AutoTokenizer

    from llm_finetuning.training.dataset import encode_inputs

    file = tmp_path / "chatml.jinja"
    file.write_text(CHATML, encoding="utf-8")
    tokenizer, fresh = (tokenizer_with(prompts.PHI2_FORMAT, "<|im_start|>", "<|im_end|>") for _ in range(2))
    settings = small_settings(tmp_path, "m", chat_template=str(file))
    inputs = encode_inputs(settings, tokenizer, small_pairs(3), small_pairs(2))
    tokenizer.save_pretrained(tmp_path)
    text = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        ask("What is 1 and 2?"), tokenize=False, add_generation_prompt=True
    )
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 1 and 2?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(inputs.data.examples[1]["input_ids"]) == text + "It is so 3.<|im_end|>"
    counted = prompts.lengths(small_pairs(3), prompts.template_for(fresh, "Be brief.", str(file)))
    assert [row["total"] for row in counted] == inputs.data.lengths, "data preparation counts what training reads"


@pytest.mark.parametrize("settings_class", [DataPrep, Finetuning])
def test_a_blank_file_name_is_told_with_the_other_settings(settings_class):
    with pytest.raises(ValueError, match="chat_template = ' ': a file with a Jinja chat template"):
        settings_class(chat_template=" ")


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, FileNotFoundError, "no.jinja is no file: give one that holds a Jinja chat template"),
        (b"\xff\xfe{", ValueError, "no.jinja is no text in UTF-8"),
        (b"", ValueError, "no.jinja writes the response of a finished turn 0 times"),
        (b'{"chat_template": "x"}', ValueError, "no.jinja writes the response of a finished turn 0 times"),
    ],
)
def test_a_file_that_is_no_template_is_named(tmp_path, content, error, message):
    file = tmp_path / "no.jinja"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(error, match=message):
        prompts.template_for(make_tokenizer(), "Be brief.", str(file))


def test_several_named_templates_count_as_the_default_one():
    tokenizer = tokenizer_with(CHATML)
    tokenizer.chat_template = {"default": CHATML, "tool_use": "{{ tools }}"}
    template = prompts.template_for(tokenizer, "Be brief.")
    assert "Be brief." in template.tokenizer.decode(prompts.render(ask("q"), template))
