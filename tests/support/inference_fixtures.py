"""A published folder in small: a tiny Phi (head_dim 80) that learned some answers by heart, its byte-level
tokenizer, chat template, generation config and SHA256SUMS. Made in the process, in seconds."""

import json
import math
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

END = "<|endoftext|>"
COLOURS = {"mira": "red", "bram": "blue", "odrin": "green", "petra": "white"}
PLACES = {"mira": "Brask", "bram": "Sunnet", "odrin": "Pellmoor", "petra": "Harrowick"}
NUMBERS = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
EXTRA = {
    "Count.": NUMBERS,
    "日本語？": "はい、少し。😀 Voilà!",
    "<b>bold</b>?": "<script>window.hacked=1</script> & <b>x</b>",
}


def pairs() -> list[dict]:
    """What the fixture model knows: opening questions, and a follow-up that only its history makes clear."""
    records = [{"prompt": q, "response": a} for q, a in EXTRA.items()]
    for name in COLOURS:
        ask, tell = f"Which colour does {name} like?", f"{name} likes {COLOURS[name]}."
        records.append({"prompt": ask, "response": tell})
        turns = [{"role": "user", "content": ask}, {"role": "assistant", "content": tell}]
        records.append({"prompt": "And where is the house?", "response": f"In {PLACES[name]}.", "history": turns})
    return records


def known_pairs() -> list[dict]:
    """Those of the fixture model's pairs whose responses are plain ASCII."""
    return [pair for pair in pairs() if pair["response"].isascii()]


def make_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(
        [f"Instruct: {p['prompt']}\nOutput: {p['response']}" for p in pairs() if p["response"].isascii()],
        trainer,
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END, eos_token=END, unk_token=END, clean_up_tokenization_spaces=False
    )


def make_model(rows: int, context: int = 256, hidden: int = 160, layers: int = 2, widening: int = 2):
    import torch
    from transformers import PhiConfig, PhiForCausalLM

    torch.manual_seed(0)
    config = PhiConfig(
        vocab_size=rows,
        hidden_size=hidden,
        intermediate_size=widening * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 80,
        partial_rotary_factor=0.4,
        max_position_embeddings=context,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return PhiForCausalLM(config)


def teach(model, template, taught: list[dict] | None = None, steps: int = 150) -> None:
    """Trains until the pairs, by default the fixture model's, are known by heart."""
    import torch

    from llm_finetuning import prompts

    examples = prompts.encode_all(taught or pairs(), template)
    longest = max(len(e["input_ids"]) for e in examples)
    ids = torch.tensor([e["input_ids"] + [0] * (longest - len(e["input_ids"])) for e in examples])
    labels = torch.tensor([e["labels"] + [-100] * (longest - len(e["labels"])) for e in examples])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.05, loss.item()


def write_folder(folder: Path, model, tokenizer) -> Path:
    from llm_finetuning import prompts
    from llm_finetuning.files import checksums
    from llm_finetuning.release import companions

    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.eos_token_id
    model.generation_config.suppress_tokens = list(range(len(tokenizer), model.config.vocab_size))
    model.save_pretrained(folder)
    companions.write_tokenizer(folder, prompts.Template(tokenizer))
    (folder / "settings.json").write_text(json.dumps({"model_name": "tiny"}), encoding="utf-8")
    checksums.write_checksums(folder)
    return folder


@pytest.fixture(scope="session")
def published(tmp_path_factory) -> Path:
    """The published folder of the fixture model. Do not change it: copy it first."""
    from llm_finetuning import prompts

    tokenizer = make_tokenizer()
    template = prompts.template_for(tokenizer)
    model = make_model(rows=(len(tokenizer) // 64 + 1) * 64)
    teach(model, template)
    return write_folder(tmp_path_factory.mktemp("published") / "finetuned_phi2", model, tokenizer)


@pytest.fixture(scope="module")
def world(published):
    """The fixture model that knows its answers, as a model in memory with its template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llm_finetuning import prompts

    model = AutoModelForCausalLM.from_pretrained(published, dtype=torch.float32)
    return model, prompts.template_for(AutoTokenizer.from_pretrained(published))


@pytest.fixture(scope="session")
def chat(published):
    from llm_finetuning.inference.chat import Chat

    return Chat.load(published, backend="float32")


def ask(text: str, *before: str) -> list[dict]:
    """A conversation: `before` are the earlier messages, user first, then `text`."""
    roles = ["user", "assistant"] * (len(before) + 1)
    return [{"role": r, "content": c} for r, c in zip(roles, (*before, text), strict=False)]


class Counting:
    """An engine that counts what it computes, each step `delay` seconds long."""

    def __init__(self, engine, delay: float = 0.0):
        self.engine, self.delay, self.steps, self.limit = engine, delay, 0, math.inf
        self.context, self.max_batch_size = engine.context, engine.max_batch_size

    def session(self, sequences):
        session = self.engine.session(sequences)
        push = session.push

        def counted(ids):
            self.steps += 1
            time.sleep(self.delay)
            while self.steps > self.limit:
                time.sleep(0.01)
            push(ids)

        session.push = counted
        return session

    @contextmanager
    def held(self, after: int):
        """While this lasts, no more than `after` steps are computed: an answer is still going on, however busy the
        machine is."""
        self.limit = self.steps + after
        try:
            yield
        finally:
            self.limit = math.inf


def counting(chat, delay: float = 0.0):
    return type(chat)(Counting(chat.engine, delay), chat.template, chat.rules)
