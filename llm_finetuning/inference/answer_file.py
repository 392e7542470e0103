"""A file of prompts in, a file of answers out: JSON lines, with a progress bar, going on where it stopped."""

import json
import os
from pathlib import Path

from tqdm.auto import tqdm

from llm_finetuning.data import pairs, reading
from llm_finetuning.inference import examples
from llm_finetuning.inference.chat import Answer, Chat
from llm_finetuning.inference.generation import SamplingParameters


def answer_file(
    chat: Chat, prompts_file: str | Path, answers_file: str | Path, options: SamplingParameters, batch_size: int = 8
) -> Path:
    """Answers every line of `prompts_file` ({"prompt", optional "history"}; other fields are carried over).

    Answers go to `<answers_file>.partial` batch by batch and get their name when all are there; the same call
    goes on after the last whole line. Raises ValueError naming file and line for a bad prompt, before the
    first answer, and where the partial file belongs to other prompts.
    """
    prompts_file, answers_file = Path(prompts_file), Path(answers_file)
    records = read_prompts(prompts_file)
    for line, record in records:
        try:
            chat.prepare(examples.messages_of(record), options)
        except ValueError as error:
            raise ValueError(f"{prompts_file}, line {line}: {error}") from error
    partial = answers_file.with_name(answers_file.name + ".partial")
    done = _already_answered(partial, records)
    waiting = [record for _, record in records[done:]]
    with (
        partial.open("a", encoding="utf-8") as file,
        tqdm(total=len(records), initial=done, unit="answer") as bar,
    ):
        for start in range(0, len(waiting), batch_size):
            batch = waiting[start : start + batch_size]
            replies = chat.generate_batch([examples.messages_of(record) for record in batch], options)
            for record, reply in zip(batch, replies, strict=True):
                file.write(json.dumps(record | answered(reply), ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
            bar.update(len(batch))
    os.replace(partial, answers_file)
    return answers_file


def answered(reply: Answer) -> dict:
    """The fields that an answer adds to its prompt's line."""
    return {"answer": reply.text, "ended_by": reply.ended_by, "tokens": reply.tokens} | (
        {"note": reply.note} if reply.note else {}
    )


def read_prompts(path: Path) -> list[tuple[int, dict]]:
    """(line number, record) of a prompts file; raises ValueError with file and line for what is no prompt."""
    if not path.exists():
        raise FileNotFoundError(f'{path} not found: a JSONL file with one {{"prompt": …}} a line')
    problems = reading.Problems(str(path))
    records = []
    for line, record in reading.records(reading.existing_file(path), problems):
        try:
            if not isinstance(record.get("prompt"), str):
                raise ValueError('no "prompt" with a text')
            pairs.check_turns(record.get("history") or [], "history")
        except ValueError as error:
            raise ValueError(f"{path}, line {line}: {error}") from error
        records.append((line, record))
    return records


def _already_answered(partial: Path, records: list[tuple[int, dict]]) -> int:
    """Whole lines of a partial file, a cut-off last line taken out. They must answer the same prompts."""
    if not partial.exists():
        return 0
    raw = partial.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    if len(whole) < len(raw):
        with partial.open("r+b") as file:
            file.truncate(len(whole))
    lines = [json.loads(line) for line in whole.decode("utf-8").splitlines()]
    for number, (line, (_, record)) in enumerate(zip(lines, records, strict=False), 1):
        if {name: line.get(name) for name in record} != record:
            raise ValueError(f"{partial}, line {number} answers another prompt: delete the file to start afresh")
    if len(lines) > len(records):
        raise ValueError(f"{partial} has more answers than there are prompts: delete the file to start afresh")
    return len(lines)
