"""An endpoint that cannot be used is refused in one sentence; one that stops in the middle loses nothing."""

import ssl
import subprocess

import pytest
from generation_world import KEY, files_with, run, settings_for
from scripted_generator import Script, Server

from llm_finetuning.data.generation import generate
from llm_finetuning.data.generation.endpoint import GeneratorError


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def refusal(settings) -> str:
    """The one sentence with which a run stops; no exception stands behind it, and no key in it or in a file."""
    with pytest.raises(GeneratorError) as caught:
        run(settings)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    assert KEY not in str(caught.value) and "\n" not in str(caught.value)
    assert files_with(settings.drive_folder, KEY) == []
    return str(caught.value)


def test_a_wrong_key_is_named_by_its_secret(tmp_path):
    with Server(Script(key="another")) as server:
        assert "does not accept the key of OPENAI_API_KEY (401)" in refusal(settings_for(server, tmp_path))
        assert server.script.requests == []


def test_a_missing_key_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with Server(Script(key="another")) as server:
        assert "asks for a key (401), and there is none" in refusal(settings_for(server, tmp_path))


@pytest.mark.parametrize("typed", [f"{KEY}\n", f" {KEY} "])
def test_white_space_around_a_key_is_none_of_it(tmp_path, monkeypatch, typed):
    monkeypatch.setenv("OPENAI_API_KEY", typed)
    with Server(Script(key=KEY)) as server:
        assert len(run(settings_for(server, tmp_path))[1].kept) == 30


@pytest.mark.parametrize("typed", [f"{KEY}\n{KEY}", f"{KEY} x", f"ключ{KEY}", f"{KEY}\u200b"])
def test_a_key_that_cannot_be_sent_is_not_quoted(tmp_path, monkeypatch, typed):
    monkeypatch.setenv("OPENAI_API_KEY", typed)
    with Server() as server:
        assert "OPENAI_API_KEY holds" in refusal(settings_for(server, tmp_path))


def test_a_word_in_place_of_a_key_is_not_taken_out_of_answers(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "is")
    with Server() as server:
        assert all("[key]" not in draft.responses[0] for draft in run(settings_for(server, tmp_path))[1].kept)


def test_a_server_that_needs_no_key_gets_none(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with Server() as server:
        assert len(run(settings_for(server, tmp_path))[1].kept) == 30


def test_an_unknown_model_is_answered_with_those_that_are_there(tmp_path):
    with Server() as server:
        said = refusal(settings_for(server, tmp_path, generator_model="scriptde"))
        assert "knows no model 'scriptde' (404): there are scripted" in said


@pytest.mark.parametrize("prefix, typed", [("/v1", ""), ("/v1", "/"), ("/openai/v1", "/openai"), ("", "")])
def test_an_address_without_v1_is_completed_where_that_helps(tmp_path, prefix, typed):
    with Server(Script(prefix=prefix)) as server:
        assert len(run(settings_for(f"{server.address}{typed}", tmp_path))[1].kept) == 30


def test_an_address_of_pages_is_no_chat_model(tmp_path):
    with Server(Script(prefix="/elsewhere")) as server:
        assert "check generator_model, and endpoint" in refusal(settings_for(f"{server.address}", tmp_path))


def test_no_server_is_said_with_its_address(tmp_path, quick):
    said = refusal(settings_for("http://127.0.0.1:9/v1", tmp_path))
    assert "No server answers at 127.0.0.1:9 (" in said and "refused" in said


@pytest.fixture
def quick(monkeypatch):
    """Retries without waits: how long the client waits is its own affair."""
    import openai._base_client

    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.001)


def test_a_certificate_that_does_not_fit_is_said(tmp_path, quick):
    pem = tmp_path / "pem"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=elsewhere.example",
    ]
    done = subprocess.run([*command, "-keyout", str(pem), "-out", str(pem) + ".crt"], capture_output=True)
    if done.returncode:
        pytest.skip("openssl makes no certificate here")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(f"{pem}.crt", pem)
    with Server() as server:
        server.server.socket = context.wrap_socket(server.server.socket, server_side=True)
        address = server.address.replace("http:", "https:")
        said = refusal(settings_for(f"{address}/v1", tmp_path / "out"))
    assert "The certificate of 127.0.0.1" in said and "SSL_CERT_FILE" in said


def test_an_account_without_credit_is_not_asked_again(tmp_path):
    with Server(Script(lambda purpose, number: "quota" if number > 4 else None)) as server:
        assert "no credit left" in refusal(settings_for(server, tmp_path))
        assert len(server.script.requests) < 4 + 2 * 8


def test_a_server_that_stops_in_the_middle_ends_the_run_and_the_next_goes_on(tmp_path, quick):
    script = Script(lambda purpose, number: 503 if number > 20 else None)
    with Server(script) as server:
        settings = settings_for(server, tmp_path, max_parallel=2)
        said = refusal(settings)
        assert "has stopped answering (server error" in said and "run all cells again" in said
        assert len(script.requests) < 20 + 8 * 5  # each that failed was tried five times
        script.fault = lambda purpose, number: None
        before = len(script.requests)
        assert len(run(settings)[1].kept) == 30
        assert len(script.requests) - before == 1 + 1 + 6 + 30 - 20  # system message, topics, prompts, answers


def test_a_server_that_goes_away_in_the_middle_does_so_too(tmp_path, quick):
    script = Script()

    def stop(purpose, number):
        script.stopped = number >= 20

    script.fault = stop
    with Server(script) as server:
        assert "has stopped answering (no connection" in refusal(settings_for(server, tmp_path, max_parallel=2))


def test_a_server_that_slows_everything_down_for_ever_ends_too(tmp_path, quick):
    with Server(Script(lambda purpose, number: 429 if number > 3 else None)) as server:
        assert "has stopped answering (rate limit" in refusal(settings_for(server, tmp_path, max_parallel=2))


@pytest.mark.parametrize(
    "status, words", [(400, "max_tokens"), (422, "temperature"), (400, "response_format"), (500, "response_format")]
)
def test_a_parameter_that_the_server_does_not_take_is_left_out(tmp_path, quick, status, words):
    class Strict(Script):
        refusal = status

        def refuses(self, body):
            return f"Unsupported parameter: '{words}' is not supported with this model." if words in body else ""

    with Server(Strict()) as server:
        _, made, _ = run(settings_for(server, tmp_path))
        assert len(made.kept) == 30
        if words == "max_tokens":
            assert all(body["max_completion_tokens"] == 1024 for body in server.script.requests)


def test_a_server_without_structured_output_is_asked_in_words(tmp_path):
    with Server(Script(lambda purpose, number: "text around", structured=False)) as server:
        assert len(run(settings_for(server, tmp_path))[1].kept) == 30
        assert not any("response_format" in body for body in server.script.requests)


def test_a_refused_request_is_counted_and_never_sent_for_ever(tmp_path):
    class Picky(Script):
        def refuses(self, body):
            return "The response was filtered" if "Odrin" in body["messages"][-1]["content"] else ""

    with Server(Picky()) as server:
        _, made, _ = run(settings_for(server, tmp_path))
    whole = generate.flatten(made.all).funnel
    assert len(made.kept) == 30 and "refused by the server" in str(whole.attrs["notes"])


def test_the_key_in_place_of_its_name_is_not_repeated(tmp_path):
    for wrong in ({"key_name": KEY}, {"endpoint": f"http://user:{KEY}@localhost/v1"}, {"endpoint": KEY}):
        with pytest.raises(ValueError) as caught:
            settings_for("http://localhost/v1", tmp_path, **wrong)
        assert KEY not in str(caught.value)
