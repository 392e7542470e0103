"""Reads dialogues that are written as one text, with a marker before each turn."""

import re
from collections.abc import Callable, Iterator
from typing import Any

from llm_finetuning.data.reading import is_text
from llm_finetuning.data.turns import BETWEEN, Turn, Unusable

TRANSCRIPT = re.compile(r"(?:^|\n\n)(Human|Assistant):[ \n]?")
EXTRA_ID = re.compile(r"(?:^|\n)<extra_id_1>(User|Assistant)(?:\n|$)")
CHATS = ("human|assistant|system", "user|assistant|system")
TASKS = ("instruction|input|response", "instruction|input|output", "instruct|output", "prompt|completion")
TASKS += ("context|question|answer",)
MARKERS = (
    *(re.compile(rf"###[ ]?({names})(?::|(?=\n))", re.IGNORECASE) for names in (*CHATS, *TASKS)),
    *(re.compile(rf"(?:^|\n)({names}):", re.IGNORECASE) for names in (*TASKS, "q|a")),
    re.compile(r"(?<![^\s>])(USER|ASSISTANT|SYSTEM|FUNCTION RESPONSE):"),
    *(re.compile(rf"(?:^|\n)({names}):") for names in ("Human|Assistant|System", "User|Assistant|System")),
    re.compile(r"(?:^|\n)<(human|bot)>:"),
    re.compile(r"<\|im_start\|>(system|user|assistant|tool)(?:\n|<\|im_sep\|>)"),
    re.compile(r"<\|start_header_id\|>(system|user|assistant|ipython)<\|end_header_id\|>"),
    re.compile(r"<start_of_turn>(user|model)\n"),
    re.compile(r"<\|(system|user|assistant|prompter|prompt|answer)\|>"),
    re.compile(r"(?:\[INST\]\s*(?=<<SYS>>))?(\[/?INST\]|<</?SYS>>)"),
)
"""What stands before a turn: of Guanaco and Alpaca, of Phi-2's questions, of Vicuna and Glaive, of HH-RLHF, of OIG, of
ChatML, Llama 3, Gemma, Zephyr and OpenAssistant, of Llama 2 and Mistral."""
PREAMBLES = ("Below is an instruction", "A chat between", "You are ", "The following is a conversation")
"""How a text may begin before its first marker; it becomes the system turn."""
STARTS = ("<s>", "<bos>", "<|begin_of_text|>")
ENDS = ("<s>", "</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>")  # of a text; then those of a turn
ENDS += ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>")
ROLES = dict.fromkeys(("assistant", "response", "output", "answer", "completion", "a"), "assistant")
ROLES |= dict.fromkeys(("bot", "model", "[/inst]"), "assistant") | {"system": "system", "<<sys>>": "system"}
IN_AN_ANSWER = {"input", "output", "context", "response", "answer", "completion", "a"}
"""Labels that are part of an assistant's text where they stand in it, as in an example with its input and output."""
CALL, RESULTS = "<functioncall>", ("function response", "tool", "ipython")


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
    text = _without(text.strip(), STARTS, str.removeprefix)
    for marker in MARKERS:
        if not (marker.match(text) or text.startswith(PREAMBLES)):
            continue
        marks = list(_marks(marker, text))
        labels = [mark[1].lower() for mark in marks]
        if "assistant" in map(ROLES.get, labels) and ROLES.get(labels[0]) != "assistant":
            ends = [*(mark.start() for mark in marks[1:]), len(text)]
            contents = [text[mark.end() : end] for mark, end in zip(marks, ends, strict=True)]
            before = text[: marks[0].start()].strip()
            return [*[Turn("system", before)] * bool(before), *_said(labels, contents)]
    return []


def _marks(marker: re.Pattern, text: str) -> Iterator[re.Match]:
    """Yields the markers at which a turn begins."""
    said = ""
    for found in marker.finditer(text):
        label = found[1].lower()
        if ROLES.get(said) != "assistant" or label not in IN_AN_ANSWER:
            yield found
            said = label


def _said(labels: list[str], contents: list[str]) -> list[Turn | Unusable]:
    """Returns the turns; a user's texts of two kinds in a row, as an instruction and its input, are one."""
    turns: list[Turn | Unusable] = []
    last = ""
    for number, (label, content) in enumerate(zip(labels, contents, strict=True), 1):
        role, content = ROLES.get(label, "user"), _without(content.strip(), ENDS, str.removesuffix)
        if label in RESULTS or role == "assistant" and content.startswith(CALL):
            turns.append(Unusable("tool calls", f"turn {number} of the dialogue is a tool call or its result"))
        elif role == "user" == ROLES.get(last, "user") and last not in ("", label, *RESULTS):
            turns[-1] = turns[-1]._replace(content=BETWEEN.join(filter(None, (turns[-1].content, content))))
        else:
            turns.append(Turn(role, content))
        last = label
    return turns


def _without(text: str, marks: tuple[str, ...], remove: Callable[[str, str], str]) -> str:
    """Returns a text without any of the marks at its beginning, or at its end."""
    for mark in marks:
        text = remove(text, mark).strip()
    return text
