"""The recipe of the tiny Phi: a tokenizer, Phi-2's architecture in small, and a minute of reading.

The base that comes out completes sentences about the Lantern Isles and has never seen a dialogue.
"""

import hashlib
import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm

from llm_finetuning.sample import languages, world

END = "<|endoftext|>"


@dataclass(frozen=True)
class Recipe:
    """How the tiny base is made. The same recipe on the same machine gives the same weights."""

    vocabulary: int = 1000
    """Tokens of the tokenizer; the model has a multiple of 64 rows, like Phi-2 more than are used."""
    layers: int = 4
    heads: int = 2
    """Of 80 channels each, as in Phi-2."""
    context: int = 2048
    documents: int = 150
    """Texts about the whole world, each ended by the end-of-text token."""
    rows: int = 16
    row_tokens: int = 128
    """One step reads rows × row_tokens tokens."""
    steps: int = 250
    learning_rate: float = 3e-3
    """Peak, per step; rises over a tenth of the steps and falls to zero as a cosine."""
    seed: int = 20

    def fingerprint(self) -> str:
        """Changes with the recipe, the text that is read, and the code that follows it."""
        files = [Path(m.__file__).with_suffix(suffix) for m in (world, languages) for suffix in (".py", ".yaml")]
        sources = [path.read_bytes() for path in (Path(__file__), *files)]
        parts = [json.dumps(asdict(self)).encode(), *sources]
        return hashlib.sha256(b"\0".join(parts)).hexdigest()


def texts(recipe: Recipe) -> list[str]:
    """The running text that the base reads: `recipe.documents` long texts, none of them a dialogue."""
    chance = random.Random(recipe.seed)
    return [world.document(chance, languages.statements()) for _ in range(recipe.documents)]


def train_tokenizer(recipe: Recipe) -> "transformers.PreTrainedTokenizerFast":
    """Byte-level BPE with GPT-2's pre-tokenizer, trained on the world's text and questions: any text encodes.

    Like Phi-2's: `<|endoftext|>` is bos, eos and unk; no pad token, no chat template.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    questions = [q for fact in world.facts() for q in (*fact.questions(), *fact.follow_ups())]
    bpe.train_from_iterator(texts(recipe)[:20] + questions, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END,
        eos_token=END,
        unk_token=END,
        model_max_length=recipe.context,
        clean_up_tokenization_spaces=False,
    )


def config(recipe: Recipe, tokenizer: "transformers.PreTrainedTokenizerFast") -> "transformers.PhiConfig":
    """Phi-2's configuration with the recipe's layers and heads, and rows for the tokenizer; without dropout."""
    hidden = recipe.heads * 80
    return transformers.PhiConfig(
        vocab_size=(len(tokenizer) // 64 + 1) * 64,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        max_position_embeddings=recipe.context,
        partial_rotary_factor=0.4,
        hidden_act="gelu_new",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        architectures=["PhiForCausalLM"],
    )


def pretrain(recipe: Recipe, tokenizer: "transformers.PreTrainedTokenizerFast") -> "transformers.PhiForCausalLM":
    """A PhiForCausalLM in fp32 that has read the world's text. Leaves torch's random state as it was."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = transformers.PhiForCausalLM(config(recipe, tokenizer)).train()
        stream = torch.tensor([i for ids in tokenizer([t + END for t in texts(recipe)]).input_ids for i in ids])
        optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, recipe.learning_rate, total_steps=recipe.steps, pct_start=0.1
        )
        bar = tqdm(range(recipe.steps), desc="Making the tiny Phi", unit="step", mininterval=1)
        for _ in bar:
            starts = torch.randint(len(stream) - recipe.row_tokens, (recipe.rows,))
            batch = torch.stack([stream[start : start + recipe.row_tokens] for start in starts])  # (B, T)
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model.eval()
