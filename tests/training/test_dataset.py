"""Pairs of one conversation as one example: every response in the loss once, every history read once."""

import dataclasses
import random
from collections import Counter

import pytest
import torch
from families import tiny_base_of
from training_fixtures import prepare, small_settings
from transformers import AutoTokenizer

from llm_finetuning import models, prompts
from llm_finetuning.data import oasst, pairs
from llm_finetuning.settings import SYSTEM_MESSAGE
from llm_finetuning.training import resumable as training
from llm_finetuning.training.dataset import conversations, encode_inputs, encode_pairs, read_inputs
from llm_finetuning.training.trainer import pack

TRAIN, VAL = "finetuning_data_train.jsonl", "finetuning_data_val.jsonl"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|endoftext|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Written another way in the history than as a response: nothing may be merged.
MARKED = (
    "{% for m in messages %}{{ m['role'] + ('(earlier): ' if m['role'] == 'assistant' and not loop.last else ': ') }}"
    "{{ m['content'] + '<|endoftext|>' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def random_pairs(chance: random.Random, trees: int) -> list[dict]:
    """Pairs of random trees: every reply of every prompt, out of few words, so that texts repeat."""
    made = []

    def grow(history: list[dict], depth: int) -> None:
        prompt = chance.choice(["Why?", "And then?", "go on", "<|endoftext|> typed", " blank\n"]) * chance.randint(1, 2)
        for _ in range(chance.randint(1, 3)):
            response = chance.choice(["Yes.", "No.", "because\n\n- so\n- so", "Yes. ", "x" * 40])
            made.append({"prompt": prompt, "response": response, **({"history": history} if history else {})})
            if depth and chance.random() < 0.7:
                turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
                grow(history + turns, depth - 1)

    for _ in range(trees):
        system = [{"role": "system", "content": "Be odd."}] if chance.random() < 0.3 else []
        grow(system, 4)
    chance.shuffle(made)
    return made


def terms_of_the_loss(examples: list[dict]) -> Counter:
    """Each token in the loss with everything before it, on which its loss and its gradient depend: how often."""
    return Counter(
        tuple(example["input_ids"][: place + 1])
        for example in examples
        for place, label in enumerate(example["labels"])
        if label != prompts.IGNORE_INDEX
    )


@pytest.fixture(scope="module")
def templates(tiny_base) -> dict:
    made = {}
    for name, source in {"phi": None, "chatml": CHATML, "marked": MARKED}.items():
        tokenizer = models.tokenizer(str(tiny_base))
        tokenizer.chat_template = source
        made[name] = prompts.template_for(tokenizer)
    return made


@pytest.mark.parametrize("name", ["phi", "chatml", "marked"])
@pytest.mark.parametrize("longest", [1000, 120])
def test_the_loss_has_the_same_terms_as_with_an_example_for_each_pair(name, longest, templates):
    for seed in range(5):
        made = random_pairs(random.Random(seed), trees=6)
        alone = encode_pairs(made, templates[name], longest, merge=False)
        merged = encode_pairs(made, templates[name], longest)
        assert terms_of_the_loss(merged.examples) == terms_of_the_loss(alone.examples)
        assert merged.tokens_in_loss == alone.tokens_in_loss and merged.pairs == len(alone.examples)
        assert max(merged.lengths) <= longest
        if name == "marked":
            assert len(merged.examples) == len(alone.examples)
        else:  # a history that was truncated begins elsewhere
            assert sum(merged.lengths) < (0.8 if longest == 1000 else 1) * sum(alone.lengths)


def test_no_example_is_left_that_another_one_begins_with(templates):
    made = {str(pair): pair for pair in random_pairs(random.Random(0), trees=10)}
    merged = encode_pairs(list(made.values()), templates["phi"], 1000).examples
    whole = sorted(tuple(example["input_ids"]) for example in merged)
    assert not any(after[: len(ids)] == ids for ids, after in zip(whole, whole[1:], strict=False))


def test_the_same_pair_twice_counts_twice(templates):
    pair = {"prompt": "a", "response": "b"}
    longer = {"prompt": "c", "response": "d", "history": prompts.conversation(pair)}
    alone = prompts.encode_all([pair, pair, longer], templates["phi"])
    merged = conversations(alone)
    assert len(merged) == 2
    assert terms_of_the_loss(merged) == terms_of_the_loss(alone)


def test_each_sibling_is_in_the_loss_of_one_example(templates):
    first = {"prompt": "a", "response": "b"}
    history = prompts.conversation(first)
    siblings = [{"prompt": "c", "response": text, "history": history} for text in ("d", "e", "f")]
    alone = prompts.encode_all([*siblings, first], templates["phi"])
    merged = conversations(alone)
    assert [example["input_ids"] for example in merged] == [example["input_ids"] for example in alone[:3]]
    assert [list(filter(lambda label: label >= 0, example["labels"])) for example in merged[1:]] == [
        list(filter(lambda label: label >= 0, example["labels"])) for example in alone[1:3]
    ]
    assert terms_of_the_loss(merged) == terms_of_the_loss(alone)


@pytest.mark.parametrize(
    ("replies", "counted"),
    [("best", (249, 209, 90_363, 78_667)), ("all", (677, 546, 213_600, 183_465))],
)
def test_real_trees_need_fewer_tokens(replies, counted, real_trees, phi2_tokenizer_folder):
    template = prompts.template_for(AutoTokenizer.from_pretrained(phi2_tokenizer_folder), SYSTEM_MESSAGE)
    made = pairs.to_records(oasst.flatten(oasst.read_messages(real_trees), replies).pairs)
    alone = encode_pairs(made, template, 1024, merge=False)
    merged = encode_pairs(made, template, 1024)
    assert (len(alone.examples), len(merged.examples), sum(alone.lengths), sum(merged.lengths)) == counted
    assert merged.tokens_in_loss == alone.tokens_in_loss
    assert f"{1 - counted[3] / counted[2]:.0%} fewer" in merged.table().to_string()


def summed_gradients(run) -> tuple[float, torch.Tensor]:
    """Loss and gradients of everything that a run trains on, packed as it trains it."""
    model, tokens = run.trainer.model.train(), torch.tensor(run.data.tokens_in_loss)
    model.zero_grad()
    packed, total = pack(run.data.examples, run.settings, run.plan), 0.0
    for row in packed:
        loss = run.trainer.compute_loss(model, run.trainer.data_collator([row]), num_items_in_batch=tokens)
        loss.backward()
        total += loss.item()
    return total, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("family", ["phi", "llama"])
def test_loss_gradients_and_adapter_are_those_of_pairs(family, tiny_base, tmp_path):
    base = tiny_base if family == "phi" else tiny_base_of(family, tmp_path / "base")
    made = random_pairs(random.Random(3), trees=3)
    whole = {"tokens_per_step": 100_000, "max_steps": 3, "lora_dropout": 0.0, "dtype": "float32", "warmup_ratio": 0.0}
    sizes = {"max_seq_length": 250, "micro_batch_tokens": 512}
    found = {}
    for train_on in ("last response", "every response"):
        chosen = small_settings(tmp_path / train_on, base, train_on=train_on, **whole, **sizes)
        inputs = encode_inputs(chosen, models.tokenizer(str(base)), made, made[:4])
        run = prepare(chosen, inputs=inputs)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for name, parameter in run.model.named_parameters():
                if parameter.requires_grad and "lora_B" in name:
                    parameter.data.normal_(std=0.02)
        loss, gradients = summed_gradients(run)
        training.train(run.trainer)
        adapter = torch.cat([p.detach().flatten() for p in run.model.parameters() if p.requires_grad])
        found[train_on] = len(inputs.data.examples), loss, gradients, adapter
    (many, loss, gradients, adapter), (fewer, merged_loss, merged_gradients, merged_adapter) = found.values()
    assert fewer < many
    assert merged_loss == pytest.approx(loss, rel=1e-5)
    assert (merged_gradients - gradients).norm() <= 1e-4 * gradients.norm()
    assert (merged_adapter - adapter).norm() <= 1e-4 * adapter.norm()


def test_a_quick_trial_takes_few_pairs_and_folders_of_its_own(tiny_base, tmp_path):
    chosen = small_settings(tmp_path, tiny_base, quick_trial=True)
    pairs.write_jsonl([{"prompt": f"p {i}", "response": "r"} for i in range(300)], tmp_path / "data" / TRAIN)
    pairs.write_jsonl([{"prompt": "p", "response": "r"}], tmp_path / "data" / VAL)
    assert read_inputs(chosen).data.read == 200
    assert read_inputs(dataclasses.replace(chosen, quick_trial=False)).data.read == 300
    folders, whole = chosen.folders, dataclasses.replace(chosen, quick_trial=False).folders
    assert (folders.train_file, folders.base) == (whole.train_file, whole.base)
    for name in ("checkpoints", "adapter", "merged", "published", "settings", "scoreboard", "metrics", "figures"):
        assert getattr(folders, name) != getattr(whole, name), name
    with pytest.raises(ValueError, match="a quick trial is not uploaded"):
        small_settings(tmp_path, tiny_base, quick_trial=True, publish_to="hub", hub_repository="a/b")
