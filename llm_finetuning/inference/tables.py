"""Answers as tables for the inference notebook."""

import pandas as pd

from llm_finetuning.inference.chat import Answer, Chat
from llm_finetuning.inference.generation import END, LENGTH, TIME, SamplingParameters


def answers(chat: Chat, conversations: list[list[dict]], sampling: SamplingParameters) -> pd.DataFrame:
    """Answers conversations; returns a row for each: its last question, the answer, its tokens, how it ended."""
    results = chat.generate_batch(conversations, sampling)
    rows = [
        {"question": c[-1]["content"], "answer": r.text, "tokens": r.tokens, "ended by": r.ended_by}
        for c, r in zip(conversations, results, strict=True)
    ]
    return pd.DataFrame(rows, columns=["question", "answer", "tokens", "ended by"])


def side_by_side(before: pd.DataFrame, after: pd.DataFrame) -> pd.DataFrame:
    """Returns the answers of the base and of the finetuned model to the same questions in one table."""
    columns = ["answer", "ended by"]
    return pd.concat({"": after[["question"]], "base": before[columns], "finetuned": after[columns]}, axis="columns")


def sampled(chat: Chat, messages: list[dict], samplings: list[SamplingParameters]) -> pd.DataFrame:
    """Answers one conversation with each of several sampling parameters; returns a row for each."""
    names, rows = ("temperature", "top_p", "top_k", "repetition_penalty", "seed"), []
    for sampling in samplings:
        result = chat.generate(messages, sampling)
        shown = {name: getattr(sampling, name) for name in names}
        rows.append(shown | {"answer": result.text, "ended by": result.ended_by})
    return pd.DataFrame(rows)


def dialogue(chat: Chat, said: list[str], sampling: SamplingParameters) -> pd.DataFrame:
    """Answers what the user says turn by turn, everything before it in view; returns a row for each turn."""
    messages, rows = [], []
    for text in said:
        messages.append({"role": "user", "content": text})
        result = chat.generate(messages, sampling)
        messages.append({"role": "assistant", "content": result.text})
        rows.append({"user": text, "assistant": result.text, "note": result.note})
    return pd.DataFrame(rows)


def speed(answer: Answer) -> str:
    """Formats length, times and end: '12 tokens in 0.4 s (30.0 tokens/s), the first after 0.05 s; ended by itself'."""
    endings = {END: "ended by itself", LENGTH: "cut at the limit of tokens", TIME: "cut at the limit of time"}
    return (
        f"{answer.tokens} tokens in {answer.seconds:.2f} s ({answer.tokens_per_second:.1f} tokens/s),"
        f" the first after {answer.first_token_seconds:.2f} s; {endings.get(answer.ended_by, 'stopped')}"
    )
