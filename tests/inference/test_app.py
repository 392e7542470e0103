"""The page's program with two models: their names, and how the second one is asked."""

import importlib.util
import sys
from pathlib import Path

import huggingface_hub
import pytest
from httpx import Request, Response
from inference_fixtures import COLOURS, ask, make_model
from training_fixtures import save_base

pytest.importorskip("gradio", reason="the page needs gradio: pip install gradio")
from llm_finetuning.inference.generation import SamplingParameters

REQUEST = Request("GET", "https://hub.invalid")
APP = Path(__file__).parents[2] / "Inference" / "app.py"


@pytest.fixture(scope="module")
def app():
    spec = importlib.util.spec_from_file_location("page_app", APP)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_second_model_is_a_published_folder_or_the_base(app, chat, published, tiny_base):
    question, short = ask("Which colour does bram like?"), SamplingParameters(max_new_tokens=12)
    same = app.load_against(str(published), chat, "float32")
    assert same.answer(question) == f"bram likes {COLOURS['bram']}."
    base = app.load_against(str(tiny_base), chat, "float32")
    assert base.template is chat.template and base.answer(question, short) != same.answer(question, short)


def test_a_base_of_other_tokens_is_refused(app, chat, tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = models.WordLevel({"<|endoftext|>": 0, "other": 1}, unk_token="other")
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(vocabulary))
    other = save_base(tmp_path / "other", make_model(rows=64), words)
    with pytest.raises(ValueError, match="has other tokens"):
        app.load_against(str(other), chat, "float32")


def test_a_repository_on_the_hub_is_downloaded_at_home_too(app, chat, published, tiny_base, monkeypatch):
    """Published ones whole, with their list; of a base what a model consists of, by the name as it was given."""
    asked = []

    def listed(name: str, file: str) -> str:
        if name == "user/base":
            raise huggingface_hub.errors.RemoteEntryNotFoundError("none", response=Response(404, request=REQUEST))
        return str(published / file)

    def snapshot(name: str, **options: object) -> str:
        asked.append((name, sorted(options)))
        return str(tiny_base if name == "user/base" else published)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", listed)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert app.downloaded("user/model") == str(published) and app.downloaded(str(published)) == str(published)
    assert app.load_against("user/other", chat, "float32").digest
    assert app.load_against("user/base", chat, "float32").template is chat.template
    assert asked == [("user/model", []), ("user/other", []), ("user/base", ["allow_patterns", "revision"])]


@pytest.mark.parametrize(
    ("model", "against", "names"),
    [
        ("a/finetuned_phi2", "b/preferred_phi2/", ["finetuned_phi2", "preferred_phi2"]),
        ("a/finetuned_phi2", "b/finetuned_phi2", ["a/finetuned_phi2", "b/finetuned_phi2"]),
        ("user/one", "microsoft/phi-2", ["one", "phi-2"]),
    ],
)
def test_votes_keep_the_shortest_names_that_differ(app, monkeypatch, model, against, names):
    monkeypatch.setattr(sys, "argv", ["app.py", "--model", model, "--against", against])
    assert app.names(app.arguments()) == names
    monkeypatch.setattr(sys, "argv", ["app.py", "--model", model, "--against", model])
    with pytest.raises(SystemExit):
        app.arguments()
