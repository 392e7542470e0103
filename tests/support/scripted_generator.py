"""An OpenAI-compatible server that writes about the sample's invented world, and does harm when told to.

    python tests/support/scripted_generator.py [PORT]

It is no language model: topics, prompts, answers and scores follow from the world's facts. It stands in for a
generator where there is none, for tests and for `profiles/generation.yaml`.
"""

import json
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from llm_finetuning.sample import world

LEADS = ("", "Hello! ", "Please tell me: ", "I wonder: ", "One question. ", "Quick one: ", "Hi there. ", "Say, ")
TOPIC = re.compile(r"^Topic: (.*)$", re.MULTILINE)
NUMBER = re.compile(r"^Write (\d+) different messages", re.MULTILINE)


FACTS = [fact for fact in world.facts() if fact.attribute not in ("about", "card", "entry")]
"""Those that are told in one short sentence."""


def facts_by_question() -> dict[str, world.Fact]:
    """Every question with each lead: neighbours ask for different facts, in different words."""
    most = max(len(fact.questions()) for fact in FACTS)
    return {
        LEADS[(turn + number) % len(LEADS)] + fact.questions()[number]: fact
        for turn in range(len(LEADS))
        for number in range(most)
        for fact in FACTS
        if number < len(fact.questions())
    }


QUESTIONS = facts_by_question()
SUBJECTS = list(dict.fromkeys(fact.subject for fact in FACTS))


class Script:
    """What the server writes, and which harm it does: `fault(purpose, number)` names one of FAULTS, or is None."""

    def __init__(self, fault=None, structured: bool = True, prefix: str = "/v1", key: str = ""):
        self.fault, self.structured, self.prefix, self.key = (
            fault or (lambda purpose, number: None),
            structured,
            prefix,
            key,
        )
        self.lock = threading.Lock()
        self.requests: list[dict] = []
        self.written: dict[str, int] = {}
        self.stopped = False
        self.seconds = 0.0

    refusal = 400
    """Status of what `refuses` does not take."""

    def count(self, body: dict) -> int:
        with self.lock:
            self.requests.append(body)
            return len(self.requests)

    def text(self, purpose: str, content: str) -> str:
        """The text of a sound answer."""
        if purpose == "topics":
            return json.dumps({"topics": SUBJECTS})
        if purpose == "system_message":
            return json.dumps({"system_message": "You tell travellers about the Lantern Isles in one sentence."})
        if purpose == "prompts":
            return json.dumps({"prompts": self.prompts(TOPIC.search(content)[1], int(NUMBER.search(content)[1]))})
        if purpose == "scores":
            return json.dumps({"scores": [9, 4][: content.count("Response ")]})
        fact = QUESTIONS.get(content.strip())
        return fact.answers[0] if fact else "Nobody on the islands has told me about that yet."

    def refuses(self, body: dict) -> str:
        """Why a request is not taken (400), "" for one that is."""
        return ""

    def usage(self) -> tuple[int, int]:
        """Tokens that the server says were sent and written."""
        return 100, 20

    def prompts(self, topic: str, number: int) -> list[str]:
        """The next questions about a subject, each once; when all are asked they begin again."""
        known = [question for question, fact in QUESTIONS.items() if fact.subject == topic]
        with self.lock:
            start = self.written.get(topic, 0)
            self.written[topic] = start + number
        return [
            known[(start + place) % len(known)] if known else f"What of {topic} {start + place}?"
            for place in range(number)
        ]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    script: Script

    def log_message(self, *_):
        pass

    def do_GET(self):
        if self.path == f"{self.script.prefix}/models":
            return self.reply(200, {"object": "list", "data": [{"id": "scripted", "object": "model"}]})
        self.reply(404, {"error": {"message": "no such page"}})

    def do_POST(self):
        script = self.script
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if script.stopped:
            return self.close()
        if self.path != f"{script.prefix}/chat/completions":
            return self.reply(404, {"detail": "Not Found"})
        key = self.headers["Authorization"].removeprefix("Bearer ")
        if script.key and key != script.key:
            return self.reply(
                401, {"error": {"message": f"Incorrect API key provided: {key}", "code": "invalid_api_key"}}
            )
        if body["model"] != "scripted":
            return self.reply(
                404, {"error": {"message": f"model {body['model']} not found, key {key}", "code": "model_not_found"}}
            )
        if "response_format" in body and not script.structured:
            return self.reply(422, {"detail": "Unexpected fields in the request: {'response_format'}"})
        if refusal := script.refuses(body):
            return self.reply(script.refusal, {"error": {"message": refusal}})
        content = body["messages"][-1]["content"]
        form = re.search(r'in the form \{"(\w+)":', content)
        purpose = form[1] if form else "answer"
        number = script.count(body)
        time.sleep(script.seconds)
        self.harm(script.fault(purpose, number), purpose, script.text(purpose, content), key)

    def harm(self, fault, purpose, text, key):
        """Sends the answer, or one of the faults that servers have."""
        quick = {"retry-after-ms": "1"}
        if fault in (500, 503, 429):
            return self.reply(fault, {"error": {"message": f"failed for {key}"}}, quick)
        if fault == "429 without Retry-After":
            return self.reply(429, {"error": {"message": "slow down"}})
        if fault == "quota":
            return self.reply(
                429, {"error": {"message": "no credit", "code": "insufficient_quota"}}, {"x-should-retry": "false"}
            )
        if fault == "timeout":
            time.sleep(3)
        if fault == "hang up":
            return self.close()
        if fault == "page":
            return self.reply(200, b"<html><body>Welcome</body></html>", {"Content-Type": "text/html"})
        if fault == "no choices":
            return self.reply(200, {"id": "x", "object": "chat.completion", "choices": [], "usage": None})
        finish = {"cut": "length", "filtered": "content_filter"}.get(fault, "stop")
        text = {
            "cut": text[: max(1, len(text) // 2)],
            "empty": "",
            "refusal": "I’m sorry, but I can’t assist with that request.",
            "as an AI": "As an AI language model, I have never been to the islands.",
            "markup": "```python\nprint(1)",
            "German": "Das ist eine sehr gute Frage, und die Antwort ist nicht so einfach, wie man es sich denkt.",
            "echo": f"{text} Your key is {key}.",
            "thoughts": f"<think>Let me see {{}}.</think>\n\n{text}",
            "text around": f"Sure! Here you are:\n\n```json\n{text}\n```\n\nAnything else?",
            "list": "\n".join(f"{n}. {one}" for n, one in enumerate(json.loads(text)["prompts"], 1))
            if purpose == "prompts"
            else text,
            "python": str(json.loads(text)) if text.startswith("{") else text,
            "half a character": f"{text[:-2]}\ud83d{text[-2:]}"
            if purpose == "answer"
            else text.replace("?", "\\ud83d?"),
            "garbage": '{{{[[[ \\u12 "prompts": nothing ]]]',
        }.get(fault, text)
        message = {"role": "assistant", "content": text}
        sent, written = self.script.usage()
        usage = {"prompt_tokens": sent, "completion_tokens": written, "total_tokens": sent + written}
        choice = {"index": 0, "message": message, "finish_reason": finish}
        self.reply(
            200, {"id": "x", "object": "chat.completion", "model": "scripted", "choices": [choice], "usage": usage}
        )

    def reply(self, status, content, headers=()):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | dict(headers)).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        try:
            self.wfile.write(data)
        except ConnectionError:
            self.close_connection = True

    def close(self):
        self.close_connection = True
        self.connection.close()


class Server:
    """The scripted server on a free port of this machine, until the `with` block ends."""

    def __init__(self, script: Script | None = None, port: int = 0):
        self.script = script or Script()
        self.server = ThreadingHTTPServer(("127.0.0.1", port), type("Scripted", (Handler,), {"script": self.script}))
        self.server.daemon_threads = True

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


if __name__ == "__main__":
    server = Server(port=int((*sys.argv[1:], "8977")[0]))
    print(f"A script about an invented world, no language model: {server.address}/v1", flush=True)
    server.server.serve_forever()
