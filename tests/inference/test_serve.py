"""The published folder under `transformers serve`, asked by the openai client: an API without a server of ours."""

import sys
from pathlib import Path

import pytest
from inference_fixtures import COLOURS, NUMBERS, PLACES, ask
from servers import serving

openai = pytest.importorskip("openai", reason="needs openai: pip install 'transformers[serving]'")
pytest.importorskip("fastapi", reason="transformers serve needs fastapi: pip install 'transformers[serving]'")
pytest.importorskip("uvicorn", reason="transformers serve needs uvicorn: pip install 'transformers[serving]'")


@pytest.fixture(scope="module")
def client(published, tmp_path_factory):
    """A client of a server that runs the published folder; the server ends with the tests."""
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(published), "--host", "127.0.0.1"]
    command += ["--port", "PORT", "--device", "cpu", "--dtype", "float32"]
    with serving(command, "/health", tmp_path_factory.mktemp("serve") / "log") as address:
        yield openai.OpenAI(base_url=f"{address}/v1", api_key="none", timeout=120)


def settings(published) -> dict:
    return {"model": str(published), "max_tokens": 80, "temperature": 0}


def test_an_answer_ends_by_itself(client, published):
    answer = client.chat.completions.create(messages=ask("Count."), **settings(published)).choices[0]
    assert answer.message.content == NUMBERS
    assert answer.finish_reason == "stop"


def test_the_stream_is_the_answer(client, published):
    stream = client.chat.completions.create(messages=ask("Count."), stream=True, **settings(published))
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert len([piece for piece in pieces if piece]) > 3
    assert "".join(pieces) == NUMBERS


def test_the_history_is_used(client, published):
    for name in COLOURS:
        asked = ask("And where is the house?", f"Which colour does {name} like?", f"{name} likes {COLOURS[name]}.")
        answer = client.chat.completions.create(messages=asked, **settings(published)).choices[0]
        assert answer.message.content == f"In {PLACES[name]}."
