"""A user's own data as people keep it: records of every shape with their pairs, and the files that may hold them."""

import bz2
import csv
import gzip
import io
import json
import lzma
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

TRICKY = 'Größe, "zitiert";\n二行目\t😀'
"""Delimiters, quotes, a line break, letters of two and more bytes."""


def pair(prompt: str, response: str, *history: str, system: str = "") -> dict:
    """A pair as it should be read; history: texts of user and assistant in turn."""
    turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(history)]
    before = [{"role": "system", "content": system}] if system else []
    return {"prompt": prompt, "response": response, "history": before + turns}


def chat(*texts: str, role="role", content="content", names=("user", "assistant"), system=()) -> list[dict]:
    """Turns of user and assistant, after a system turn (its role and text) if there is one."""
    turns = [{role: system[0], content: system[1]}] if system else []
    return turns + [{role: names[n % 2], content: text} for n, text in enumerate(texts)]


SHARE = {"role": "from", "content": "value", "names": ("human", "gpt")}
SHAPES = {
    "prompt, response": (
        [{"prompt": "Q1", "response": "A1"}, {"prompt": TRICKY, "response": f"a {TRICKY}"}],
        [pair("Q1", "A1"), pair(TRICKY, f"a {TRICKY}")],
    ),
    "prompt, completion": (
        [{"prompt": "Q1", "completion": TRICKY}, {"prompt": "Q2", "completion": "A2"}],
        [pair("Q1", TRICKY), pair("Q2", "A2")],
    ),
    "Alpaca": (
        [
            {"instruction": "Translate.", "input": TRICKY, "output": "Size"},
            {"instruction": "Sing.", "input": "", "output": "La"},
        ],
        [pair(f"Translate.\n\n{TRICKY}", "Size"), pair("Sing.", "La")],
    ),
    "Dolly": (
        [
            {"instruction": "Who?", "context": TRICKY, "response": "She", "category": "closed_qa"},
            {"instruction": "When?", "context": "", "response": "Now", "category": "open_qa"},
        ],
        [pair(f"Who?\n\n{TRICKY}", "She"), pair("When?", "Now")],
    ),
    "question, answer": (
        [{"question": TRICKY, "answer": "A1"}, {"question": "Q2", "answer": "A2"}],
        [pair(TRICKY, "A1"), pair("Q2", "A2")],
    ),
    "names in any case": (
        [{" Prompt ": TRICKY, "RESPONSE": "A1"}, {" Prompt ": "Q2", "RESPONSE": "A2"}],
        [pair(TRICKY, "A1"), pair("Q2", "A2")],
    ),
    "system": (
        [{"system": TRICKY, "prompt": "Q1", "response": "A1"}, {"system": "", "prompt": "Q2", "response": "A2"}],
        [pair("Q1", "A1", system=TRICKY), pair("Q2", "A2")],
    ),
    "history": (
        [
            {"prompt": "Q2", "response": "A2", "history": json.dumps(chat("Q1", TRICKY))},
            {"prompt": "Q", "response": "A"},
        ],
        [pair("Q2", "A2", "Q1", TRICKY), pair("Q", "A")],
    ),
    "preference": (
        [
            {"prompt": TRICKY, "chosen": "Good", "rejected": "Bad"},
            {"prompt": "Q2", "chosen": "Better", "rejected": "Worse"},
        ],
        [pair(TRICKY, "Good") | {"rejected": "Bad"}, pair("Q2", "Better") | {"rejected": "Worse"}],
    ),
    "HH-RLHF": (
        [
            {
                "chosen": f"\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: {TRICKY}\n\nAssistant: Good",
                "rejected": f"\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: {TRICKY}\n\nAssistant: Bad",
            }
        ]
        * 2,
        [pair(TRICKY, "Good", "Hi", "Yes?") | {"rejected": "Bad"}] * 2,
    ),
    "messages": (
        [{"messages": chat("Q1", "A1", TRICKY, "A2", system=("system", "Be brief."))}, {"messages": chat("Q", "A")}],
        [
            pair("Q1", "A1", system="Be brief."),
            pair(TRICKY, "A2", "Q1", "A1", system="Be brief."),
            pair("Q", "A"),
        ],
    ),
    "OpenAI": (
        [
            {
                "messages": [
                    {"role": "developer", "content": "Be brief.", "weight": None},
                    {"role": "user", "content": "Q1", "weight": None},
                    {"role": "assistant", "content": "A1", "weight": 0},
                    {"role": "user", "content": TRICKY, "weight": None},
                    {"role": "assistant", "content": "A2", "weight": 1},
                ]
            }
        ]
        * 2,
        [pair(TRICKY, "A2", "Q1", "A1", system="Be brief.")] * 2,
    ),
    "content parts": (
        [
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "Q"}, {"type": "text", "text": TRICKY}]},
                    {"role": "assistant", "content": [{"type": "text", "text": "A"}]},
                ]
            }
        ]
        * 2,
        [pair(f"Q\n{TRICKY}", "A")] * 2,
    ),
    "ShareGPT": (
        [
            {"conversations": chat("Q1", "A1", TRICKY, "A2", system=("system", "Be brief."), **SHARE)},
            {"conversations": chat("Q", "A", **SHARE)},
        ],
        [
            pair("Q1", "A1", system="Be brief."),
            pair(TRICKY, "A2", "Q1", "A1", system="Be brief."),
            pair("Q", "A"),
        ],
    ),
    "conversations with roles": (
        [{"conversations": chat("Q1", TRICKY)}, {"conversations": chat("Q", "A")}],
        [pair("Q1", TRICKY), pair("Q", "A")],
    ),
    "one conversation a record": (
        [{"conversation_id": "c", "conversation": chat("Q1", "A1", TRICKY, "A2"), "language": "English"}] * 2,
        [pair("Q1", "A1"), pair(TRICKY, "A2", "Q1", "A1")] * 2,
    ),
    "exchanges of a conversation": (
        [{"source": "s", "conversation": [{"input": "Q1", "output": TRICKY}, {"input": "Q2", "output": "A2"}]}] * 2,
        [pair("Q1", TRICKY), pair("Q2", "A2", "Q1", TRICKY)] * 2,
    ),
    "speakers and their texts": (
        [{"dialogue": chat(TRICKY, "A1", "Q2", "A2", role="speaker", content="text")}] * 2,
        [pair(TRICKY, "A1"), pair("Q2", "A2", TRICKY, "A1")] * 2,
    ),
    "OpenOrca": (
        [
            {"id": "t0.1", "system_prompt": TRICKY, "question": "Q1", "response": "A1"},
            {"id": "t0.2", "system_prompt": "", "question": "Q2", "response": "A2"},
        ],
        [pair("Q1", "A1", system=TRICKY), pair("Q2", "A2")],
    ),
    "a transcript as prompt": (
        [{"prompt": f"\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: {TRICKY}\n\nAssistant:", "response": " Good"}] * 2,
        [pair(TRICKY, "Good", "Hi", "Yes?")] * 2,
    ),
    "messages as prompt and completion": (
        [
            {"prompt": chat("Q1", TRICKY, "Q2"), "completion": [{"role": "assistant", "content": "A2"}]},
            {"prompt": chat("Q"), "completion": [{"role": "assistant", "content": "A"}]},
        ],
        [pair("Q2", "A2", "Q1", TRICKY), pair("Q", "A")],
    ),
    "messages as chosen and rejected": (
        [{"prompt": TRICKY, "chosen": chat(TRICKY, "Good"), "rejected": chat(TRICKY, "Bad"), "score_chosen": 8.5}] * 2,
        [pair(TRICKY, "Good") | {"rejected": "Bad"}] * 2,
    ),
}
"""Shape → (records, the pairs that they hold)."""


def siblings(prompt: str, *responses: tuple[str, int | None]) -> list[dict]:
    """The pairs of responses to one prompt, each with its rank."""
    return [pair(prompt, text) | ({} if rank is None else {"rank": rank}) for text, rank in responses]


def completion(text: str, **more: object) -> dict:
    """A response of UltraFeedback's, rated by aspect."""
    ratings = zip(("helpfulness", "honesty"), more.pop("ratings", ("N/A", "N/A")), strict=True)
    aspects = {aspect: {"Rating": rating, "Rationale": "Since."} for aspect, rating in ratings}
    return {"annotations": aspects, "critique": "Hm.", "model": "m", "response": text} | more


RATED = [completion("A1", overall_score=6.5), completion("A2", overall_score=8.0), completion("A3", overall_score=6.5)]
BY_ASPECT = [completion("A", ratings=("2", "3")), completion(TRICKY, ratings=("5", "N/A"))]
LIKED = pair("Q", "Good") | {"rejected": "Bad"}
COMPARISONS = {
    "Nectar": (
        [
            {
                "prompt": "\n\nHuman: Hi \n\nAssistant: Yes? \n\nHuman: Q \n\nAssistant: ",
                "answers": [
                    {"answer": "Bad", "model": "m", "rank": 3.0},
                    {"answer": TRICKY, "model": "n", "rank": 1.0},
                    {"answer": "Fair", "model": "o", "rank": 2.0},
                ],
                "turns": 2,
                "num_responses": 3,
            }
        ],
        [pair("Q ", text, "Hi ", "Yes? ") | {"rank": rank} for text, rank in (("Bad", 2), (TRICKY, 0), ("Fair", 1))],
        [(TRICKY, "Bad")],
    ),
    "UltraFeedback": (
        [{"source": "s", "instruction": "Q", "models": ["m", "n", "o"], "completions": RATED}],
        siblings("Q", ("A1", 1), ("A2", 0), ("A3", 1)),
        [("A2", "A3")],
    ),
    "UltraFeedback by aspect": (
        [{"instruction": TRICKY, "completions": BY_ASPECT}],
        siblings(TRICKY, ("A", 1), (TRICKY, 0)),
        [(TRICKY, "A")],
    ),
    "OpenAI's preferences": (
        [
            {
                "input": {"messages": chat("Q1", "A1", TRICKY), "tools": [], "parallel_tool_calls": True},
                "preferred_output": [{"role": "assistant", "content": "Good"}],
                "non_preferred_output": [{"role": "assistant", "content": "Bad"}],
            }
        ],
        [pair(TRICKY, "Good", "Q1", "A1") | {"rejected": "Bad"}],
        [("Good", "Bad")],
    ),
    "SHP": (
        [
            {"post_id": "p", "history": TRICKY, "human_ref_A": "Good", "human_ref_B": "Bad", "labels": 1, "score_A": 9},
            {"post_id": "p", "history": "Q", "human_ref_A": "Bad", "human_ref_B": "Good", "labels": 0, "score_A": 2},
        ],
        [LIKED | {"prompt": TRICKY}, LIKED],
        [("Good", "Bad")] * 2,
    ),
    "Chatbot Arena": (
        [
            {"conversation_a": chat("Q", left), "conversation_b": chat("Q", right), "winner": winner, "turn": 1}
            for left, right, winner in (("Good", "Bad", "model_a"), ("Bad", "Good", "model_b"))
        ],
        [LIKED] * 2,
        [("Good", "Bad")] * 2,
    ),
    "Chatbot Arena, flags": (
        [
            {"prompt": '["Q"]', "response_a": '["Bad"]', "response_b": '["Good"]'}
            | {"winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0},
            {"prompt": json.dumps(["Q1", "Q2"]), "response_a": json.dumps(["A1", TRICKY]), "response_b": '["x", null]'}
            | {"winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0},
        ],
        [LIKED, pair("Q2", TRICKY, "Q1", "A1")],
        [("Good", "Bad")],
    ),
    "HelpSteer": (
        [
            {"prompt": "Q", "response": text, "helpfulness": helpful, "correctness": 4, "coherence": 4}
            | {"complexity": 1, "verbosity": 2}
            for text, helpful in ((TRICKY, 4), ("Bad", 1))
        ],
        siblings("Q", (TRICKY, 0), ("Bad", 3)),
        [(TRICKY, "Bad")],
    ),
    "HelpSteer, preferences": (
        [
            {"prompt": prompt, "response_1": one, "response_2": two, "preference_strength": strength}
            for prompt, one, two, strength in (("Q", "Good", "Bad", -2), ("Q2", "Bad", "Good", 3))
        ],
        [LIKED, LIKED | {"prompt": "Q2"}],
        [("Good", "Bad")] * 2,
    ),
    "HelpSteer 3": (
        [{"context": chat("Q1", "A1", "Q"), "response1": "Bad", "response2": "Good", "overall_preference": 1}],
        [LIKED | pair("Q", "Good", "Q1", "A1")],
        [("Good", "Bad")],
    ),
    "PKU-SafeRLHF": (
        [
            {"prompt": "Q", "response_0": "Bad", "response_1": "Good", "is_response_0_safe": True}
            | {"better_response_id": 1, "safer_response_id": 0}
        ],
        [LIKED],
        [("Good", "Bad")],
    ),
    "WebGPT": (
        [
            {"question": {"dataset": "eli5", "id": "1", "full_text": "Q"}, "answer_0": "Good", "answer_1": "Bad"}
            | {"quotes_0": {"title": ["T"]}, "score_0": 0.5, "score_1": -0.5},
        ],
        [LIKED],
        [("Good", "Bad")],
    ),
    "TL;DR": (
        [
            {"info": {"id": "1", "post": "Q", "title": "T"}, "choice": 1, "worker": "w"}
            | {"summaries": [{"text": "Bad", "policy": "p"}, {"text": "Good", "policy": "q"}]}
        ],
        [LIKED],
        [("Good", "Bad")],
    ),
    "Stack Exchange": (
        [{"qid": 1, "question": "Q", "date": "2020", "response_j": "Good", "response_k": "Bad"}],
        [LIKED],
        [("Good", "Bad")],
    ),
    "distilabel": (
        [{"instruction": "Q", "generations": ["A1", TRICKY, "A3"], "ratings": [3.0, 5.0, None], "model_name": "m"}],
        siblings("Q", ("A1", 1), (TRICKY, 0), ("A3", None)),
        [(TRICKY, "A1")],
    ),
    "AlpacaFarm": (
        [{"instruction": "I", "input": "x", "output_1": "Bad", "output_2": "Good", "preference": 2}],
        [LIKED | pair("I\n\nx", "Good")],
        [("Good", "Bad")],
    ),
}
"""Layout of several responses to one prompt → (records, the pairs that they hold, chosen and rejected responses)."""
SHAPES |= {layout: (records, pairs) for layout, (records, pairs, _) in COMPARISONS.items()}
FLAT = [name for name, (records, _) in SHAPES.items() if all(type(v) is str for row in records for v in row.values())]
"""Shapes of texts alone, which a CSV can hold as they are."""


def json_lines(records: list) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def windows_lines(records: list) -> str:
    return "\r\n".join(json.dumps(record) for record in records) + "\r\n\r\n"


def comma_lines(records: list) -> str:
    return ",\n".join(json.dumps(record, ensure_ascii=False) for record in records) + ",\n"


def array(records: list) -> str:
    return json.dumps(records, ensure_ascii=False)


def pretty_array(records: list) -> str:
    return json.dumps(records, ensure_ascii=False, indent=2)


def array_of_lines(records: list) -> str:
    return "[" + ",\n".join(json.dumps(record) for record in records) + "\n]\n"


def pretty_objects(records: list) -> str:
    return "\n".join(json.dumps(record, ensure_ascii=False, indent=4) for record in records)


def wrapper(records: list) -> str:
    return json.dumps({"version": 1, "data": records}, ensure_ascii=False)


def pretty_wrapper(records: list) -> str:
    return json.dumps({"records": records, "license": "CC0"}, ensure_ascii=False, indent=1)


TEXTS = {
    form.__name__: form
    for form in (
        json_lines,
        windows_lines,
        comma_lines,
        array,
        pretty_array,
        array_of_lines,
        pretty_objects,
        wrapper,
        pretty_wrapper,
    )
}


def zipped(content: bytes, *names: str) -> bytes:
    """A zip archive of this content under each name, as macOS makes it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names or ("export/data.json",):
            archive.writestr(name, content)
        archive.writestr("__MACOSX/export/._data.json", b"\0")
    return buffer.getvalue()


def zst(content: bytes) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor().compress(content)


COMPRESSIONS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zip": zipped, "zst": zst}
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32")


def csv_text(records: list, delimiter: str, end: str = "\r\n") -> str:
    names = list(dict.fromkeys(name for record in records for name in record))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, names, delimiter=delimiter, lineterminator=end)
    writer.writeheader()
    writer.writerows(records)
    return stream.getvalue()


def write_columns(records: list, form: str, path: Path) -> Path:
    """Writes records as parquet, an arrow file or stream, or a folder of Dataset.save_to_disk."""
    names = dict.fromkeys(name for record in records for name in record)
    table = pa.Table.from_pylist([dict.fromkeys(names) | record for record in records])
    if form == "parquet":
        pq.write_table(table, path)
    elif form == "saved":
        from datasets import Dataset

        Dataset(table).save_to_disk(str(path))
    else:
        make = pa.ipc.new_file if form == "arrow file" else pa.ipc.new_stream
        with make(str(path), table.schema) as writer:
            writer.write_table(table)
    return path
