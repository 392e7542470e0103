"""Answers as tables for the inference notebook."""

import pandas as pd

from llm_finetuning.inference.chat import Answer, Chat
from llm_finetuning.inference.generation import SamplingParameters


def answers(chat: Chat, conversations: list[list[dict]], options: SamplingParameters) -> pd.DataFrame:
    """One row a conversation: what was asked last, the answer, its tokens, how it ended."""
    replies = chat.generate_batch(conversations, options)
    return pd.DataFrame(
        {
            "question": [c[-1]["content"] for c in conversations],
            "answer": [reply.text for reply in replies],
            "tokens": [reply.tokens for reply in replies],
            "ended by": [reply.ended_by for reply in replies],
        }
    )


def side_by_side(before: pd.DataFrame, after: pd.DataFrame) -> pd.DataFrame:
    """The same questions answered by the base and by the finetuned model."""
    columns = ["answer", "ended by"]
    return pd.concat({"": after[["question"]], "base": before[columns], "finetuned": after[columns]}, axis="columns")


def sampled(chat: Chat, messages: list[dict], options: list[SamplingParameters]) -> pd.DataFrame:
    """The same conversation answered with each of the options."""
    replies = [chat.generate(messages, option) for option in options]
    shown = ("temperature", "top_p", "top_k", "repetition_penalty", "seed")
    return pd.DataFrame(
        [
            {name: getattr(option, name) for name in shown} | {"answer": reply.text, "ended by": reply.ended_by}
            for option, reply in zip(options, replies, strict=True)
        ]
    )


def dialogue(chat: Chat, said: list[str], options: SamplingParameters) -> pd.DataFrame:
    """A conversation: each thing the user says is answered with everything before it in view."""
    messages, rows = [], []
    for text in said:
        messages.append({"role": "user", "content": text})
        reply = chat.generate(messages, options)
        messages.append({"role": "assistant", "content": reply.text})
        rows.append({"user": text, "assistant": reply.text, "note": reply.note})
    return pd.DataFrame(rows)


def speed(reply: Answer) -> str:
    """'12 tokens in 0.4 s (30.0 tokens/s), the first after 0.05 s; ended by itself'."""
    endings = {
        "end": "ended by itself",
        "length": "cut at the limit of tokens",
        "time": "cut at the limit of time",
    }
    return (
        f"{reply.tokens} tokens in {reply.seconds:.2f} s ({reply.tokens_per_second:.1f} tokens/s),"
        f" the first after {reply.first_token_seconds:.2f} s; {endings.get(reply.ended_by, 'stopped')}"
    )
