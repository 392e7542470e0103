"""The model card: what a reader finds in it, what must never stand in it, and that the Hub would take it."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, ModelCardData

from llm_finetuning.files.checksums import hash_file, hash_together
from llm_finetuning.release import model_card
from llm_finetuning.sample import trees_of

TOKEN = "hf_" + "aB3" * 12


@pytest.fixture
def facts():
    return {
        "base": "microsoft/phi-2",
        "base_revision": "ef382358ec9e382308935a992d908de099b64c23",
        "tiny": False,
        "data": {
            "source": "OpenAssistant/oasst1",
            "revision": "fdf72ae0827c1cda404aff25b6603abec9e3399b",
            "licence": "Apache-2.0",
            "languages": ["en", "pt-BR", "no"],
            "train": {"pairs": 20587, "tokens": 9846},
            "val": {"pairs": 1095},
        },
        "settings": {
            "model_name": "microsoft/phi-2",
            "drive_folder": "/content/drive/MyDrive/llm_finetuning",
            "tokenizer_folder": "/home/somebody/phi-2-tokenizer",
            "learning_rate": 2e-4,
            "lora_r": 64,
            "max_new_tokens": 256,
            "hub_token": "a secret that is no known kind",
        },
        "scoreboard": {
            "before": {"loss": 1.4912, "stop_rate": 0.0, "samples": []},
            "after": {"loss": 1.2, "stop_rate": 0.97, "samples": []},
            "merged": {
                "loss": 1.2012,
                "stop_rate": 0.98,
                "samples": [{"prompt": "Why?\nTell!", "text": "So|so."}],
            },
        },
        "merge": {"base": "dequantized", "largest logit difference": 0.0081},
        "machine": {"gpu": "NVIDIA A100-SXM4-40GB", "cache": "/root/.cache/huggingface/hub"},
        "seconds": 5430.4,
        "peak_memory_bytes": 12_345_678_901,
        "cost": 1.83,
        "versions": {"torch": "2.13.0"},
    }


def written(folder: Path, facts: dict) -> str:
    return model_card.write(folder, facts).read_text(encoding="utf-8")


def test_front_matter_is_what_the_hub_wants(tmp_path, facts):
    written(tmp_path, facts)
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.to_dict() == {
        "license": "mit",
        "base_model": "microsoft/phi-2",
        "datasets": ["OpenAssistant/oasst1"],
        "language": ["en", "no", "pt"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["phi", "qlora", "sft", "conversational"],
    }
    assert ModelCardData(**data.to_dict()).to_dict() == data.to_dict()


@pytest.mark.parametrize(
    "found",
    [
        "ef382358ec9e382308935a992d908de099b64c23",
        "fdf72ae0827c1cda404aff25b6603abec9e3399b",
        "| train: pairs | 20,587 |",
        "| train: tokens | 9,846 |",
        "| val: pairs | 1,095 |",
        "| learning_rate | 0.0002 |",
        "| lora_r | 64 |",
        "| max_new_tokens | 256 |",
        "| before | 1.491 | 0.0 |",
        "| merged | 1.201 | 0.98 |",
        "NVIDIA A100-SXM4-40GB",
        "1 h 30 min",
        "12.35 GB",
        "1.83",
        "2.13.0",
        "> **answer**: So|so.",
        "sha256sum -c SHA256SUMS",
        "apply_chat_template",
        "vllm serve",
        "make gguf MODEL=.",
        "Licence of the weights: `mit`",
        "Licence of the data: Apache-2.0",
    ],
)
def test_card_says(tmp_path, facts, found):
    assert found in written(tmp_path, facts)


def test_no_token_and_no_path_of_this_machine(tmp_path, facts):
    facts["scoreboard"]["merged"]["samples"][0]["text"] = f"Log in with {TOKEN}."
    facts["settings"]["report_to"] = TOKEN
    text = written(tmp_path, facts)
    assert TOKEN not in text and "no known kind" not in text
    for path in ("/content", "/home", "/root", "somebody", str(tmp_path)):
        assert path not in text
    assert "| drive_folder | llm_finetuning |" in text


@pytest.mark.parametrize("base", ["/home/somebody/models/phi-2", "~/models/phi-2", "sample"])
def test_base_that_is_not_on_the_hub(tmp_path, facts, base):
    text = written(tmp_path, facts | {"base": base, "base_revision": None})
    data = ModelCard(text).data.to_dict()
    assert "base_model" not in data and "license" not in data
    assert "somebody" not in text
    assert f"| Base | {Path(base).name} |" in text


def test_tiny_model_says_so_at_once(tmp_path, facts):
    text = written(tmp_path, facts | {"base": "sample", "tiny": True})
    body = text.split("---\n", 2)[2].strip().splitlines()
    assert "tiny" in body[0].lower()
    assert "not Phi-2" in body[2]
    assert "test-model" in ModelCard(text).data.tags


def test_rehearsal_says_that_its_weights_are_random(tmp_path, facts):
    assert "random weights" in written(tmp_path, facts | {"base": "rehearsal"})


def test_base_alone_is_enough_and_nothing_is_made_up(tmp_path):
    text = written(tmp_path, {"base": "microsoft/phi-2"})
    ModelCard(text)
    for section in ("What was measured", "Machine", "Samples", "Loss", "Recipe", "Data"):
        assert f"## {section}" not in text
    assert "None" not in text


def test_loss_figure_travels_along(tmp_path, facts):
    figure = tmp_path / "figures" / "loss of this run.png"
    figure.parent.mkdir()
    figure.write_bytes(b"\x89PNG")
    (tmp_path / "out").mkdir()
    text = written(tmp_path / "out", facts | {"loss_figure": figure})
    (name,) = re.findall(r"!\[.*\]\((.*)\)", text)
    assert (tmp_path / "out" / name).read_bytes() == b"\x89PNG"


def test_loss_figure_that_lies_there_already(tmp_path, facts):
    (tmp_path / "loss.png").write_bytes(b"\x89PNG")
    assert "(loss.png)" in written(tmp_path, facts | {"loss_figure": tmp_path / "loss.png"})
    assert (tmp_path / "loss.png").read_bytes() == b"\x89PNG"


def test_card_of_an_adapter(tmp_path, facts):
    """PEFT writes a README.md of its own, which names the base by its path on this machine."""
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "README.md").write_text("---\nbase_model: /root/models/phi-2\n---\n")
    text = written(tmp_path, facts)
    data = ModelCard(text).data
    assert (data.library_name, data.base_model) == ("peft", "microsoft/phi-2")
    assert "AutoPeftModelForCausalLM" in text and "vllm serve" not in text and "/root" not in text
    for code in re.findall(r"```python\n(.*?)```", text, re.S):
        compile(code, "README.md", "exec")


def test_tables_survive_bars_and_line_breaks(tmp_path, facts):
    facts["settings"]["system_message"] = "a|b\nc"
    assert "| system_message | a\\|b<br>c |" in written(tmp_path, facts)


def test_recipe_hash_knows_the_recipe_and_not_the_machine():
    recipe = {"lora_r": 64, "drive_folder": "/content/x/y", "hub_token": "one"}
    same = {"hub_token": "two", "drive_folder": "/home/me/y", "lora_r": 64}
    assert model_card.recipe_hash(recipe) == model_card.recipe_hash(same)
    assert model_card.recipe_hash(recipe) != model_card.recipe_hash(recipe | {"lora_r": 32})


def test_code_in_the_card_is_right(tmp_path, facts):
    text = written(tmp_path, facts)
    for code in re.findall(r"```python\n(.*?)```", text, re.S):
        compile(code, "README.md", "exec")
    (tmp_path / "SHA256SUMS").write_text("")
    if shutil.which("sha256sum"):
        (tmp_path / "SHA256SUMS").write_bytes(
            subprocess.run(["sha256sum", "README.md"], cwd=tmp_path, capture_output=True).stdout
        )
        (command,) = [line for line in text.splitlines() if line.startswith("sha256sum")]
        assert subprocess.run(command.split(), cwd=tmp_path, capture_output=True).returncode == 0


def test_data_facts_come_from_the_reports(tmp_path):
    for split, count in (("train", 3), ("val", 1)):
        path = tmp_path / f"finetuning_data_{split}.jsonl"
        path.write_text('{"prompt": "a", "response": "b"}\n' * count)
        report = {
            "source": {"source": "OpenAssistant/oasst1", "revision": "abc", "split": split},
            "recipe": {"replies": "best"},
            "pairs": {"pairs": count, "languages": {"en": 2, "unknown": 1}},
            "tokens": {"tokens": 1234, "share_trained": 0.6},
        }
        path.with_suffix(".report.json").write_text(json.dumps(report))
    facts = model_card.data_facts(tmp_path / "finetuning_data_train.jsonl", tmp_path / "finetuning_data_val.jsonl")
    assert facts["source"] == "OpenAssistant/oasst1" and facts["licence"] == "Apache-2.0"
    assert facts["languages"] == ["en"]
    text = written(tmp_path, {"base": "microsoft/phi-2", "data": facts})
    assert "| train: pairs | 3 |" in text and "| train: tokens | 1,234 |" in text and "| Revision | abc |" in text


@pytest.mark.parametrize(
    ("sources", "changed", "shown"),
    [
        (("OpenAssistant/oasst1", "OpenAssistant/oasst1"), False, True),
        (("OpenAssistant/oasst1", "OpenAssistant/oasst1"), True, False),  # other pairs were put under the name
        (("OpenAssistant/oasst1", "company/tickets"), False, False),
        (("company/tickets", "OpenAssistant/oasst1"), False, False),  # answers may repeat what was trained on
        (("sample", "sample"), False, True),
        (("trees.jsonl", "sample"), False, False),  # of the sample's name alone
        ((None, None), False, False),
    ],
)
def test_held_out_prompts_and_answers_are_shown_of_public_data_alone(tmp_path, facts, sources, changed, shown):
    files = [tmp_path / f"finetuning_data_{split}.jsonl" for split in ("train", "val")]
    for file, source, split in zip(files, sources, ("train", "validation"), strict=True):
        file.write_text('{"prompt": "a", "response": "b"}\n')
        origin = (
            {"source": source, "revision": "abc"} if "/" in str(source) else {"source": "trees.jsonl", "sha256": "0"}
        )
        origin = {"source": "trees.jsonl", "sha256": hash_together([trees_of(split)])} if source == "sample" else origin
        report = {"source": origin, "sha256": hash_file(file)}
        if source:
            file.with_suffix(".report.json").write_text(json.dumps(report))
    if changed:
        files[1].write_text('{"prompt": "a secret", "response": "b"}\n')
    text = written(tmp_path, facts | {"data": model_card.data_facts(*files)})
    assert ("Why?" in text) == ("So|so." in text) == shown


def test_pairs_of_ones_own_have_no_report(tmp_path):
    for name in ("train.jsonl", "val.jsonl"):
        (tmp_path / name).write_text('{"prompt": "a", "response": "b"}\n\n')
    facts = model_card.data_facts(tmp_path / "train.jsonl", tmp_path / "val.jsonl")
    assert facts["train"]["pairs"] == 1 and "source" not in facts
    assert "| val: pairs | 1 |" in written(tmp_path, {"base": "microsoft/phi-2", "data": facts})
    alone = model_card.data_facts(tmp_path / "none.jsonl", tmp_path / "val.jsonl")
    assert alone == {"val": facts["val"], "public": False}, "an adapter is tuned on without the pairs it learned from"


def test_the_card_of_a_preferred_model_tells_of_its_pairs(facts, tmp_path):
    facts["preference"] = {"loss": "sigmoid", "train: preference pairs": 1234}
    facts["scoreboard"]["after"] |= {"rank_agreement": 0.75, "margin": 0.4}
    text = model_card.write(tmp_path, facts).read_text(encoding="utf-8")
    assert "| Preference tuning, train: preference pairs | 1,234 |" in text
    assert "dpo" in ModelCard(text).data.tags and "sft" not in ModelCard(text).data.tags
    assert re.search(r"\| after \|.* 0\.75 \| 0\.4 \|", text)
    assert "Preference" not in model_card.write(tmp_path, facts | {"preference": {}}).read_text(encoding="utf-8")
