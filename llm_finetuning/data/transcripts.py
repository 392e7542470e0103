"""Reads dialogues that are written as one text, with a marker before each turn."""

import re
from typing import Any

from llm_finetuning.data.reading import is_text
from llm_finetuning.data.turns import BETWEEN, Turn, Unusable

TRANSCRIPT = re.compile(r"(?:^|\n\n)(Human|Assistant):[ \n]?")
EXTRA_ID = re.compile(r"(?:^|\n)<extra_id_1>(User|Assistant)(?:\n|$)")
HEADINGS = ("human|assistant|system", "user|assistant|system", "instruction|input|response", "instruction|input|output")
MARKERS = (
    *(re.compile(rf"###[ ]?({names}):", re.IGNORECASE) for names in (*HEADINGS, "question|answer")),
    re.compile(r"(?<![^\s>])(USER|ASSISTANT|SYSTEM|FUNCTION RESPONSE):"),
    re.compile(r"(?:^|\n)(Human|Assistant):"),
    re.compile(r"(?:^|\n)(User|Assistant|System):"),
    re.compile(r"<\|im_start\|>(system|user|assistant)\n"),
    re.compile(r"<\|(system|user|assistant)\|>\n"),
)
"""What stands before a turn: of Guanaco and Alpaca, of Vicuna and Glaive, of HH-RLHF, of ChatML and Zephyr."""
PREAMBLE = "Below is an instruction"
"""How Alpaca's text begins before its first marker."""
ENDS = ("<s>", "</s>", "<|endoftext|>", "<|im_end|>")
ROLES = dict.fromkeys(("assistant", "response", "output", "answer"), "assistant") | {"system": "system"}
CALL, RESULT = "<functioncall>", "function response"


def transcript_turns(text: str) -> list[Turn]:
    """Reads the turns of a dialogue written as text, as in HH-RLHF: \\n\\nHuman: …\\n\\nAssistant: …"""
    _, *parts = TRANSCRIPT.split(text)
    roles = {"Human": "user", "Assistant": "assistant"}
    return [Turn(roles[role], content) for role, content in zip(parts[::2], parts[1::2], strict=True)]


def asked(prompt: str) -> list[Turn]:
    """Returns the turns of a prompt, the last one the user's; several only with HelpSteer2's marks between them."""
    first, *parts = EXTRA_ID.split(prompt)
    turns = [Turn("user", first)] if first or not parts else []
    turns += [Turn(role.lower(), content, False) for role, content in zip(parts[::2], parts[1::2], strict=True)]
    return turns[:-1] if turns[1:] and turns[-1].role == "assistant" and not turns[-1].content.strip() else turns


def dialogue_of(text: Any) -> list[Turn | Unusable]:
    """Returns the turns of a text that begins with the marker of one and has an assistant's; [] for any other value."""
    if not is_text(text):
        return []
    text = text.strip().removeprefix("<s>")
    found = ((marker.match(text) or text.startswith(PREAMBLE)) and marker.split(text) for marker in MARKERS)
    for before, *parts in filter(None, found):
        labels = [label.lower() for label in parts[::2]]
        roles = [ROLES.get(label, "user") for label in labels]
        if "assistant" in roles and roles[0] != "assistant":
            turns = _said(labels, map(_without_ends, parts[1::2]))
            return [*[Turn("system", before.strip())] * bool(before), *turns]
    return []


def _said(labels: list[str], contents: map) -> list[Turn | Unusable]:
    turns: list[Turn | Unusable] = []
    for number, (label, content) in enumerate(zip(labels, contents, strict=True), 1):
        role = ROLES.get(label, "user")
        if label == RESULT or role == "assistant" and content.startswith(CALL):
            turns.append(Unusable("tool calls", f"turn {number} of the dialogue is a tool call or its result"))
        elif label == "input" and labels[number - 2 : number - 1] == ["instruction"]:
            turns[-1] = turns[-1]._replace(content=BETWEEN.join(filter(None, (turns[-1].content, content))))
        else:
            turns.append(Turn(role, content))
    return turns


def _without_ends(content: str) -> str:
    content = content.strip()
    for end in ENDS:
        content = content.removesuffix(end).rstrip()
    return content
