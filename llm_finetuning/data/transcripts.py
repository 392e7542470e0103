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
TEMPLATES = (
    *(re.compile(rf"###[ ]?({names})(?::|(?=\n))", re.IGNORECASE) for names in (*CHATS, *TASKS)),
    re.compile(r"(?<![^\s>])(USER|ASSISTANT|SYSTEM|FUNCTION RESPONSE):"),
    re.compile(r"(?:^|\n)(Human|Assistant|System):"),
    re.compile(r"(?:^|\n)<(human|bot)>:"),
    re.compile(r"<\|im_start\|>(\w[^\n<]*)(?:\n|<\|im_sep\|>)"),
    re.compile(r"<\|start_header_id\|>(\w[^\n<]*)<\|end_header_id\|>"),
    re.compile(r"<start_of_turn>(user|model)\n"),
    re.compile(r"<\|(system|user|assistant|prompter|prompt|answer|tool|observation|function)\|>"),
    re.compile(r"(?:\[INST\]\s*(?=<<SYS>>))?(\[/?INST\]|<</?SYS>>)"),
)
"""What stands before a turn: of Guanaco and Alpaca, of Vicuna and Glaive, of HH-RLHF, of OIG, of ChatML, Llama 3,
Gemma, Zephyr and OpenAssistant, of Llama 2 and Mistral."""
MARKERS = (
    *TEMPLATES,
    *(re.compile(rf"(?:^|\n)({names}):", re.IGNORECASE) for names in (*TASKS, "q|a")),
    re.compile(r"(?:^|\n)(User|Assistant|System):"),
)
"""These, and words that a prompt may hold for its own sake, as those of Phi-2's questions."""
PREAMBLES = ("Below is an instruction", "A chat between", "You are ", "The following is a conversation")
"""How a text may begin before its first marker; it becomes the system turn."""
STARTS = ("<s>", "<bos>", "<|begin_of_text|>")
ENDS = ("### End", "<s>", "</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>")  # of a text; then those of a turn
ENDS += ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>")
USERS = ("human", "user", "prompter", "instruction", "input", "instruct", "prompt", "context", "question", "q")
ROLES = dict.fromkeys((*USERS, "[inst]", "<</sys>>"), "user") | {"system": "system", "<<sys>>": "system"}
ROLES |= dict.fromkeys(("assistant", "response", "output", "answer", "completion", "a"), "assistant")
ROLES |= dict.fromkeys(("bot", "model", "[/inst]"), "assistant")
"""Of what stands in a marker; anything else is a tool's or a function's."""
ANSWER = "\0"
IN_AN_ANSWER = {"input", "output", "context", "response", "answer", "completion", "a"}
"""Labels that are part of an assistant's text where they stand in it, as in an example with its input and output."""
CALLS = ("<functioncall>", "[TOOL_CALLS]")


def answered(text: str) -> list[Turn]:
    """Returns the turns of a dialogue written as text that ends with the assistant's; [] of any other text.

    As in HH-RLHF: \\n\\nHuman: …\\n\\nAssistant: …
    """
    if not TRANSCRIPT.match(text):
        return []
    _, *parts = TRANSCRIPT.split(text)
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [Turn(roles[role], content) for role, content in zip(parts[::2], parts[1::2], strict=True)]
    return turns if turns[-1].role == "assistant" else []


def asked(prompt: str) -> list[Turn]:
    """Returns the turns of a prompt, the last one the user's; several only with HelpSteer2's marks between them."""
    first, *parts = EXTRA_ID.split(prompt)
    turns = [Turn("user", first)] if first or not parts else []
    turns += [Turn(role.lower(), content, False) for role, content in zip(parts[::2], parts[1::2], strict=True)]
    return turns[:-1] if turns[1:] and turns[-1].role == "assistant" and not turns[-1].content.strip() else turns


def dialogue_of(text: Any, markers: tuple[re.Pattern, ...] = MARKERS) -> list[Turn | Unusable]:
    """Returns the turns of a text that begins with the marker of one and has an assistant's; [] for any other value.

    Where several kinds of markers fit, it is the one that stands first; the others are part of what is said.
    """
    if not is_text(text):
        return []
    text = _without(text.strip(), STARTS, str.removeprefix)
    fitting = []
    for marker in markers:
        if marker.match(text) or text.startswith(PREAMBLES):
            marks = list(_marks(marker, text))
            roles = [_role(mark) for mark in marks]
            if "assistant" in roles and "user" in roles[: roles.index("assistant")]:
                fitting.append(marks)
    if not fitting:
        return []
    marks = min(fitting, key=lambda marks: marks[0].start())
    ends = [*(mark.start() for mark in marks[1:]), len(text)]
    contents = [text[mark.end() : end] for mark, end in zip(marks, ends, strict=True)]
    before = text[: marks[0].start()].strip()
    return [*[Turn("system", before)] * bool(before), *_said([*map(_label, marks)], contents)]


def opened(prompt: Any, response: Any) -> list[Turn | Unusable]:
    """Returns the turns of a prompt that a chat template wrote up to the answer, and the response; [] of any others."""
    if not is_text(prompt) or not is_text(response):
        return []
    turns = dialogue_of(prompt + "\n" * prompt.endswith("<|im_start|>assistant") + ANSWER, TEMPLATES)
    last = turns[-1] if turns else None
    if not isinstance(last, Turn) or last[:2] != ("assistant", ANSWER):
        return []
    return [*turns[:-1], Turn("assistant", without_ends(response))]


def _label(mark: re.Match) -> str:
    """What stands in a marker; of "user name=Bob" the role."""
    return mark[1].lower().split()[0]


def _role(mark: re.Match) -> str:
    return ROLES.get(_label(mark), "tool")


def _marks(marker: re.Pattern, text: str) -> Iterator[re.Match]:
    """Yields the markers at which a turn begins."""
    said = ""
    for found in marker.finditer(text):
        label = _label(found)
        if ROLES.get(said) != "assistant" or label not in IN_AN_ANSWER:
            yield found
            said = label


def _said(labels: list[str], contents: list[str]) -> list[Turn | Unusable]:
    """Returns the turns; a user's texts of two kinds in a row, as an instruction and its input, are one."""
    turns: list[Turn | Unusable] = []
    last = ""
    for number, (label, content) in enumerate(zip(labels, contents, strict=True), 1):
        role, content = ROLES.get(label, "tool"), without_ends(content)
        if role == "tool" or role == "assistant" and content.startswith(CALLS):
            turns.append(Unusable("tool calls", f"turn {number} of the dialogue is a tool call or its result"))
        elif role == "user" == ROLES.get(last) and last != label:
            turns[-1] = turns[-1]._replace(content=BETWEEN.join(filter(None, (turns[-1].content, content))))
        else:
            turns.append(Turn(role, content))
        last = label
    return turns


def without_ends(content: str) -> str:
    """Returns what was said without the marks of an end that templates write behind it."""
    return _without(content.strip(), ENDS, str.removesuffix)


def _without(text: str, marks: tuple[str, ...], remove: Callable[[str, str], str]) -> str:
    """Returns a text without any of the marks at its beginning, or at its end."""
    for mark in marks:
        text = remove(text, mark).strip()
    return text
