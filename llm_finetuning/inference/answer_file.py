"""A file of prompts is answered into a file of answers: JSON lines, and the next call resumes where one stopped."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from tqdm.auto import tqdm

from llm_finetuning import prompts
from llm_finetuning.data import pairs, reading
from llm_finetuning.data.records import records
from llm_finetuning.files.atomic import partial_name, write_text
from llm_finetuning.inference.chat import Answer, Chat
from llm_finetuning.inference.generation import SamplingParameters


def answer_file(
    chat: Chat, prompts_file: str | Path, answers_file: str | Path, sampling: SamplingParameters, batch_size: int = 8
) -> Path:
    """Answers every line of `prompts_file` ({"prompt", optional "history"}; other fields are carried over).

    Answers are appended batch by batch to a hidden partial file, which gets its final name when all are there; the
    same call resumes after its last complete line. What another model has begun, or other sampling, is begun afresh.
    Raises ValueError naming file and line for a bad prompt, before the first answer, and where the partial file
    belongs to other prompts.
    """
    prompts_file, answers_file = Path(prompts_file), Path(answers_file)
    asked = read_prompts(prompts_file, lambda messages: chat.prepare(messages, sampling))
    partial = partial_name(answers_file)
    by = _note_who_answers(partial, {"model": chat.digest, **asdict(sampling)})
    done = _already_answered(partial, asked)
    waiting = asked[done:]
    with partial.open("a", encoding="utf-8") as file, tqdm(total=len(asked), initial=done, unit="answer") as bar:
        for start in range(0, len(waiting), batch_size):
            batch = waiting[start : start + batch_size]
            answers = chat.generate_batch([prompts.question(record) for record in batch], sampling)
            for record, answer in zip(batch, answers, strict=True):
                file.write(json.dumps(record | answer_fields(answer), ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
            bar.update(len(batch))
    os.replace(partial, answers_file)
    by.unlink()
    return answers_file


def answer_fields(answer: Answer) -> dict:
    """Returns the fields that an answer adds to its prompt's line."""
    fields = {"answer": answer.text, "ended_by": answer.ended_by, "tokens": answer.tokens}
    return fields | ({"note": answer.note} if answer.note else {})


def read_prompts(path: Path, check: Callable[[list[dict]], object]) -> list[dict]:
    """Reads a prompts file; raises ValueError with file and line for what is no prompt, or what `check` refuses."""
    if not path.exists():
        raise FileNotFoundError(f'{path} not found: a JSONL file with one {{"prompt": …}} a line')
    problems = reading.Problems(str(path))
    found = []
    for line, record in records(reading.existing_file(path), problems):
        try:
            if not isinstance(record.get("prompt"), str):
                raise ValueError('no "prompt" with a text')
            pairs.check_turns(record.get("history") or [], "history")
            check(prompts.question(record))
        except ValueError as error:
            raise ValueError(f"{path}, line {line}: {error}") from error
        found.append(record)
    return found


def _note_who_answers(partial: Path, who: dict) -> Path:
    """Writes a note of model and sampling beside a partial file; that of others goes. Returns the note's file."""
    note, text = partial.with_name(f"{partial.name}.by"), json.dumps(who)
    if partial.exists() and note.exists() and note.read_text(encoding="utf-8") != text:
        print(f"{partial.name} holds answers of another model or other sampling: begun afresh.")
        partial.unlink()
    return write_text(note, text)


def _already_answered(partial: Path, asked: list[dict]) -> int:
    """Counts the complete lines of a partial file, which must answer the first records, and cuts off the rest."""
    if not partial.exists():
        return 0
    raw = partial.read_bytes()
    complete = raw[: raw.rfind(b"\n") + 1]
    os.truncate(partial, len(complete))
    lines = [json.loads(line) for line in complete.splitlines()]  # bytes: a U+2028 in a text ends no line
    for number, (line, record) in enumerate(zip(lines, asked, strict=False), 1):
        if {name: line.get(name) for name in record} != record:
            raise ValueError(f"{partial}, line {number} answers another prompt: delete the file to start afresh")
    if len(lines) > len(asked):
        raise ValueError(f"{partial} has more answers than there are prompts: delete the file to start afresh")
    return len(lines)
