"""Instructions whose fulfilment a program can see, after the idea of IFEval (arXiv 2311.07911), a dozen of our own."""

import json
import re
from collections.abc import Callable

TOPICS = ("a garden in winter", "how bread is made")
"""Each rule is asked about each of these."""


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+(?:['’-][^\W\d_]+)*", text)


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().splitlines() if line.strip()]


def _is_json(text: str) -> bool:
    body = re.fullmatch(r"(?:```(?:json)?\s*)?(.*?)(?:\s*```)?", text.strip(), re.DOTALL)[1]
    try:
        return isinstance(json.loads(body), dict)
    except ValueError:
        return False


RULES: dict[str, Callable[[str], bool]] = {
    "Answer in exactly three bullet points, each on a line that begins with '- '.": lambda text: (
        len(_lines(text)) == 3 and all(line.startswith("- ") for line in _lines(text))
    ),
    "Answer in capital letters only.": lambda text: any(map(str.isalpha, text)) and text == text.upper(),
    "Answer in lowercase letters only.": lambda text: any(map(str.isalpha, text)) and text == text.lower(),
    "Do not use a single comma.": lambda text: bool(text.strip()) and "," not in text,
    "Answer in at most ten words.": lambda text: 1 <= len(_words(text)) <= 10,
    "Answer in at least fifty words.": lambda text: len(_words(text)) >= 50,
    "Answer in exactly one sentence.": lambda text: len(re.findall(r"[.!?]+(?=\s|$)", text.strip())) == 1,
    "Answer as one JSON object and nothing else.": _is_json,
    "End your answer with the words 'That is all.'": lambda text: text.rstrip().endswith("That is all."),
    "Put your whole answer in double quotation marks.": lambda text: (
        len(text.strip()) > 2 and text.strip()[0] in '"“„' and text.strip()[-1] in '"”“'
    ),
    "Use the word 'because' at least twice.": lambda text: _words(text.lower()).count("because") >= 2,
    "Number your points 1. to 4., each on its own line.": lambda text: (
        [line[:2] for line in _lines(text) if re.match(r"\d\.", line)] == ["1.", "2.", "3.", "4."]
    ),
}
"""Instruction → whether an answer follows it."""


def questions() -> list[dict]:
    """A user message for each rule and topic, as {"rule", "messages"}."""
    return [
        {"rule": rule, "messages": [{"role": "user", "content": f"Write about {topic}. {rule}"}]}
        for rule in RULES
        for topic in TOPICS
    ]


def followed(asked: list[dict], answers: list[str]) -> list[float]:
    """1 for each answer that follows the rule of its question, else 0."""
    return [float(RULES[question["rule"]](answer)) for question, answer in zip(asked, answers, strict=True)]
