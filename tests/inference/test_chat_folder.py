"""What `Chat.load` accepts, a complete published folder, and what it reads from it."""

import json
import shutil

import pytest
from inference_fixtures import ask

from llm_finetuning import prompts
from llm_finetuning.files import checksums
from llm_finetuning.inference.chat import Chat
from llm_finetuning.inference.generation import SamplingParameters


@pytest.fixture
def folder(published, tmp_path):
    return shutil.copytree(published, tmp_path / "model")


def change(file, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    checksums.write_checksums(file.parent)


def test_a_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not there. Run the finetuning notebook"):
        Chat.load(tmp_path / "nowhere")


def test_a_damaged_folder_names_the_file(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        Chat.load(folder)


def test_a_folder_that_was_not_published_whole(folder):
    (folder / "SHA256SUMS").unlink()
    with pytest.raises(FileNotFoundError, match="SHA256SUMS is missing"):
        Chat.load(folder)


def test_an_adapter_is_not_a_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="an adapter without its base"):
        Chat.load(tmp_path)


def test_a_folder_of_another_kind(tmp_path):
    with pytest.raises(ValueError, match="no model folder"):
        Chat.load(tmp_path)


def test_a_folder_without_chat_template(folder):
    (folder / "chat_template.jinja").unlink()
    checksums.write_checksums(folder)
    with pytest.raises(ValueError, match="has no chat template"):
        Chat.load(folder)


def test_a_folder_without_a_stop_token_id(folder):
    change(folder / "generation_config.json", eos_token_id=None)
    with pytest.raises(ValueError, match="names no eos_token_id"):
        Chat.load(folder)


def test_an_unknown_backend_is_refused(folder):
    with pytest.raises(ValueError, match="backend = 'gpu'"):
        Chat.load(folder, "gpu")


def test_stop_and_suppressed_token_ids_come_from_the_folder(folder, chat):
    word = chat.template.tokenizer(" two").input_ids[0]
    change(folder / "generation_config.json", eos_token_id=[0, word])
    assert Chat.load(folder, "float32").answer(ask("Count."), SamplingParameters(40)) == "one"
    change(folder / "generation_config.json", eos_token_id=0, suppress_tokens=[word])
    changed = Chat.load(folder, "float32")
    assert word in changed.rules.suppressed_token_ids
    assert "two" not in changed.answer(ask("Count."), SamplingParameters(5))


def test_the_trained_system_message_comes_from_the_folder(folder, chat):
    prompts.template_for(chat_tokenizer := Chat.load(folder, "float32").template.tokenizer, "Be a pirate.")
    chat_tokenizer.save_pretrained(folder)
    checksums.write_checksums(folder)
    loaded = Chat.load(folder, "float32")
    assert "Be a pirate." in loaded.template.tokenizer.decode(loaded.prepare(ask("Hi")).ids)


def test_loading_writes_nothing_into_the_folder(folder):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    Chat.load(folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize(
    ("settings", "expected"),
    [('{"model_name": "sample"}', True), ('{"model_name": "me/sample"}', False), ("[1", False), (None, False)],
)
def test_the_sample_is_known_by_its_settings(tmp_path, settings, expected):
    from llm_finetuning.inference.chat import is_sample

    if settings:
        (tmp_path / "settings.json").write_text(settings)
    assert is_sample(tmp_path) == expected
