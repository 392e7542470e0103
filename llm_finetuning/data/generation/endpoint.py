"""A chat model behind an OpenAI-compatible address, through the openai client, which retries and waits.

What can never go well (a wrong key, an unknown model, no server) stops with one sentence; what concerns one request
becomes a fault of its answer. The key is in no sentence and in no answer.
"""

import difflib
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from llm_finetuning import colab
from llm_finetuning.data.generation import requests
from llm_finetuning.data.generation.parsing import without_thoughts
from llm_finetuning.data.generation.requests import Answer, Request, estimate_tokens
from llm_finetuning.settings import Generation

RETRIES = 4
"""Further attempts of one request, with the server's Retry-After or a growing wait before each."""
SHORTEST_KEY = 8
"""Characters of a key that is a secret, and no word that stands for none."""
END = "end"
"""How an answer of a model in memory ended that was not cut off."""
TOO_LONG = "not taken by the model"
"""The fault of a conversation that a model in memory refuses: it is longer than the model's context."""
OPTIONAL = ("response_format", "temperature", "max_tokens")
"""Parameters that some servers do not take; the first refusal that names one ends its use."""


class GeneratorError(RuntimeError):
    """The generator model cannot be used. The message says why, and what cures it."""


class Endpoint:
    """Sends requests to the settings' endpoint; safe to call from several threads."""

    def __init__(self, settings: Generation):
        """Reads the key; nothing is sent yet. Raises GeneratorError for a key that can be none, or without openai."""
        try:
            import openai
        except ImportError as error:
            raise GeneratorError("The package openai is missing: pip install openai") from error
        self.openai, self.settings = openai, settings
        self.secret = (colab.token(settings.key_name) or "").strip()
        if not re.fullmatch(r"[!-~]*", self.secret):  # the network library would quote it in its error
            raise GeneratorError(f"{settings.key_name} holds spaces or letters that no key has: set it again.")
        self.client = self._client(settings.endpoint)
        self.left_out: set[str] = set()
        self.answered = False

    def _client(self, address: str) -> "openai.OpenAI":  # noqa: F821 (imported where it is needed)
        return self.openai.OpenAI(
            base_url=address.rstrip("/"),
            api_key=self.secret or "none",
            timeout=self.settings.timeout_seconds,
            max_retries=RETRIES,
        )

    def __call__(self, request: Request) -> Answer:
        """Returns the answer, or its fault. Raises GeneratorError for what no other request would survive."""
        for _ in range(len(OPTIONAL) + 2):  # once for each parameter that may have to go, once for the address
            client, sent = self.client, self._parameters(request)
            try:
                answer = self._read(request, client.chat.completions.create(**sent))
                self.answered = True
                return answer
            except self.openai.APIStatusError as error:
                at_v1 = error.status_code in (404, 405) and self._at_v1(client)
                if not at_v1 and not self._without_parameter(error, sent):
                    return self._status_fault(error)
            except self.openai.APITimeoutError:
                return Answer(fault="timeout")
            except self.openai.APIConnectionError as error:
                return self._connection_fault(error)
            except (self.openai.OpenAIError, ValueError, TypeError, AttributeError, LookupError):
                if not self._at_v1(client):  # else it was a page, and no chat completion
                    return Answer(fault="server error")
        return Answer(fault=requests.REFUSED)

    def _parameters(self, request: Request) -> dict:
        """Returns the request as the client takes it, without what this server has refused."""
        sent = {"model": request.model, "messages": list(request.messages), "temperature": request.temperature}
        sent["max_tokens"] = request.max_tokens
        if request.response_format:
            sent["response_format"] = request.response_format
        if "max_tokens" in self.left_out:  # newer models of OpenAI know it by this name alone
            sent["max_completion_tokens"] = request.max_tokens
        return {name: value for name, value in sent.items() if name not in self.left_out}

    def _read(self, request: Request, completion: object) -> Answer:
        """Returns text and tokens of a chat completion; tokens are estimated where the server counts none."""
        choice, usage = completion.choices[0], completion.usage
        text = self.redact(without_thoughts(choice.message.content or ""))
        fault = {"length": requests.CUT, "content_filter": requests.REFUSED}.get(choice.finish_reason or "", "")
        asked = sum(estimate_tokens(message["content"]) for message in request.messages)
        counts = (getattr(usage, "prompt_tokens", None), getattr(usage, "completion_tokens", None))
        prompt, answer = (
            count if type(count) is int and count >= 0 else estimate
            for count, estimate in zip(counts, (asked, estimate_tokens(text)), strict=True)
        )
        return Answer(text, fault or ("" if text else requests.EMPTY), prompt, answer)

    def _at_v1(self, client: "openai.OpenAI") -> bool:  # noqa: F821
        """Whether the request can be sent again, to /v1 below an address at which nothing has answered yet."""
        if self.client is not client:  # another thread has found the address
            return True
        address = str(client.base_url).rstrip("/")
        if self.answered or address.endswith("/v1"):
            return False
        self.client = self._client(f"{address}/v1")
        return True

    def _without_parameter(self, error: Exception, sent: dict) -> bool:
        """Whether the request can be sent again, without a parameter that the server does not take."""
        text, refused = str(error).casefold(), error.status_code in (400, 422, 501)
        named = [name for name in OPTIONAL if name in sent and name in text]  # llama-cpp-python says so with 500
        if not refused and not (error.status_code == 500 and named):
            return False
        if self.left_out & sent.keys():  # another thread has found it
            return True
        named = named or [name for name in OPTIONAL[:1] if name in sent]
        self.left_out.update(named[:1])
        return bool(named)

    def _status_fault(self, error: Exception) -> Answer:
        """Returns the fault of a status that concerns one request; raises GeneratorError for the others."""
        status, code = error.status_code, str(getattr(error, "code", "") or "")
        if status in (401, 403):
            raise GeneratorError(self._key_sentence(status)) from None
        if status == 404:
            raise GeneratorError(self._model_sentence()) from None
        if status == 402 or code in ("insufficient_quota", "billing_not_active"):
            raise GeneratorError(
                f"{self.host} answers that the account has no credit left: top it up, run again."
            ) from None
        if status == 429:
            return Answer(fault="rate limit")
        return Answer(fault="server error" if status >= 500 or status in (408, 409) else requests.REFUSED)

    def _connection_fault(self, error: Exception) -> Answer:
        """Returns a fault where the server has answered before; raises GeneratorError where it never did."""
        reasons = self._reasons(error)
        if "certificate" in reasons.casefold():
            raise GeneratorError(
                f"The certificate of {self.host} does not fit ({reasons}). Correct endpoint, or trust the server's"
                " certificate with the environment variable SSL_CERT_FILE."
            ) from None
        if not self.answered:
            raise GeneratorError(
                f"No server answers at {self.host} ({reasons}). Start it, or correct endpoint"
                f" ({self.settings.endpoint})."
            ) from None
        return Answer(fault="no connection")

    def _reasons(self, error: BaseException) -> str:
        """Returns what lies behind a connection error, in the words of the network library."""
        while error.__cause__ or error.__context__:
            error = error.__cause__ or error.__context__
        return self.redact(" ".join(str(error).split()))[:200] or type(error).__name__

    def _key_sentence(self, status: int) -> str:
        name = self.settings.key_name
        where = f"add the secret {name} in Colab (the key in the left bar), or set the environment variable {name}"
        if not self.secret:
            return f"{self.host} asks for a key ({status}), and there is none: {where}."
        return f"{self.host} does not accept the key of {name} ({status}): {where}, with a key that may use this model."

    def _model_sentence(self) -> str:
        """Says that a model is unknown, with the names that come closest, or that the address is another one's."""
        name = self.settings.generator_model
        try:
            known = [model.id for model in self.client.with_options(max_retries=0).models.list().data]
        except (self.openai.OpenAIError, ValueError, TypeError, AttributeError):
            known = []
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or known[:5]
        cure = f"there are {', '.join(close)}" if close else "check generator_model, and endpoint, which ends in /v1"
        return self.redact(f"{self.host} knows no model {name!r} (404): {cure}.")

    @property
    def host(self) -> str:
        return urlsplit(self.settings.endpoint).netloc

    def redact(self, text: str) -> str:
        """Takes the key out of a text, where a server has echoed it; what is too short for one ("none") stays."""
        return text.replace(self.secret, "[key]") if len(self.secret) >= SHORTEST_KEY else text


class LocalModel:
    """A model in memory: `engine` takes conversations and returns their answers in order.

    An answer is a text, or has `text`, `ended_by` ("end" = by itself), `tokens` and `prompt_tokens`.
    """

    def __init__(self, engine: Callable[[list[list[dict]]], list]):
        self.engine = engine

    def answer(self, batch: list[Request]) -> list[Answer]:
        """Answers requests side by side; tokens are estimated where the engine counts none."""
        made = self._made([list(request.messages) for request in batch])
        return [_local_answer(request, one) for request, one in zip(batch, made, strict=True)]

    def _made(self, conversations: list[list[dict]]) -> list:
        """What the engine makes of conversations, None for one that it does not take, such as one that is too long."""
        try:
            return self.engine(conversations)
        except ValueError:
            if len(conversations) == 1:
                return [None]
            return [one for conversation in conversations for one in self._made([conversation])]


def _local_answer(request: Request, made: Any) -> Answer:
    """Makes an answer of what an engine made of a request."""
    if made is None:
        return Answer(fault=TOO_LONG)
    text = without_thoughts(getattr(made, "text", made))
    asked = sum(estimate_tokens(message["content"]) for message in request.messages)
    fault = "" if getattr(made, "ended_by", END) == END else requests.CUT
    tokens = getattr(made, "prompt_tokens", asked), getattr(made, "tokens", estimate_tokens(text))
    return Answer(text, fault or ("" if text else requests.EMPTY), *tokens)
