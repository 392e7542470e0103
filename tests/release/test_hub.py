"""Uploading with the real client of huggingface_hub to a stand-in of the Hub on this machine."""

import hashlib

import huggingface_hub
import pytest
from hub_stand_in import StandIn
from publishing_world import SHARDS, finished

from llm_finetuning.release import hub

TOKEN = "hf_" + "x" * 34


@pytest.fixture
def stand_in(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with StandIn() as stand_in:
        stand_in.api = huggingface_hub.HfApi(endpoint=stand_in.url, token=TOKEN)
        yield stand_in
    huggingface_hub.close_session()


def push(folder, stand_in, **options):
    return hub.push_to_hub(folder, "user/model", api=stand_in.api, **options)


def test_model_arrives_whole_in_a_private_repository(tmp_path, stand_in):
    source = finished(tmp_path / "merged", 1)
    (source / ".ipynb_checkpoints").mkdir()
    (source / ".ipynb_checkpoints" / "config-checkpoint.json").write_text("{}")
    url = push(source, stand_in)
    assert url == f"{stand_in.url}/user/model/tree/{'c' * 40}"
    assert set(stand_in.files) == {*SHARDS, "config.json", "deeper/notes.txt", "SHA256SUMS"}
    assert stand_in.files[SHARDS[0]]["lfs"]["oid"] == hashlib.sha256((source / SHARDS[0]).read_bytes()).hexdigest()
    assert stand_in.created[0]["visibility"] == "private"
    assert {token for _, path, token in stand_in.requests if "/store/" not in path} == {f"Bearer {TOKEN}"}


def test_adapter_arrives_without_a_list_of_hashes(tmp_path, stand_in):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.safetensors").write_bytes(b"adapter")
    push(adapter, stand_in, private=False)
    assert set(stand_in.files) == {"adapter_config.json", "adapter_model.safetensors"}
    assert stand_in.created[0]["visibility"] == "public"


def test_nothing_private_goes_to_a_repository_that_is_public_already(tmp_path, stand_in):
    source, stand_in.private = finished(tmp_path / "merged", 1), False
    with pytest.raises(ValueError, match="user/model is there already and public"):
        push(source, stand_in)
    assert stand_in.files == {}
    push(source, stand_in, private=False)
    assert set(stand_in.files) >= set(SHARDS)


def test_again_sends_no_weights_that_are_there(tmp_path, stand_in):
    source = finished(tmp_path / "merged", 1)
    push(source, stand_in)
    stand_in.requests.clear()
    push(source, stand_in)
    assert [path for method, path, _ in stand_in.requests if method == "PUT"] == []


def test_shards_of_the_version_before_do_not_stay(tmp_path, stand_in):
    stand_in.files["model-00003-of-00003.safetensors"] = {
        "type": "file", "path": "model-00003-of-00003.safetensors", "size": 1, "oid": "0" * 40,
    }  # fmt: skip
    push(finished(tmp_path / "merged", 1), stand_in)
    assert sorted(name for name in stand_in.files if name.endswith(".safetensors")) == list(SHARDS)


@pytest.mark.parametrize("forgotten", [SHARDS[1], "config.json"])
def test_file_that_the_hub_lost_is_named(tmp_path, stand_in, forgotten):
    stand_in.forget = forgotten
    with pytest.raises(ValueError, match=f"user/model at c+ differs .* in: {forgotten}. Upload again"):
        push(finished(tmp_path / "merged", 1), stand_in)


def test_file_that_the_hub_changed_is_named(tmp_path, stand_in):
    source = finished(tmp_path / "merged", 1)
    push(source, stand_in)
    stand_in.files["config.json"]["oid"] = "1" * 40
    stand_in.files[SHARDS[0]]["lfs"]["oid"] = "2" * 64
    with pytest.raises(ValueError, match=f"config.json, {SHARDS[0]}"):
        hub.check_commit(stand_in.api, source, "user/model", "main")


def test_damaged_folder_is_not_uploaded(tmp_path, stand_in):
    source = finished(tmp_path / "merged", 1)
    (source / SHARDS[0]).write_bytes(b"")
    with pytest.raises(ValueError, match=SHARDS[0]):
        push(source, stand_in)
    assert stand_in.requests == []


def test_token_comes_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert hub.colab.hub_token() == TOKEN


def test_token_comes_from_colabs_secrets(monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(hub.colab, "token", lambda: TOKEN)
    assert hub.colab.hub_token() == TOKEN


def test_without_a_token_it_says_where_to_put_one(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "none"))
    with pytest.raises(PermissionError, match="secret HF_TOKEN.*environment variable HF_TOKEN"):
        hub.push_to_hub(finished(tmp_path / "merged", 1), "user/model")


def test_repository_name_without_a_user(tmp_path):
    with pytest.raises(ValueError, match="'model' is not user/name"):
        hub.push_to_hub(finished(tmp_path / "merged", 1), "model")
