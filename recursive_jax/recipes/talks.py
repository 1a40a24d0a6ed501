"""Transcripts of a teacher that talks with itself (Baize, arXiv:2304.01196), and the rows that are learnt of them."""

from __future__ import annotations

from recursive_jax.data.dataset import Dataset, python_rows
from recursive_jax.data.parsers import Turns

HUMAN, AI = "[Human]", "[AI]"
HEADER = (
    "The transcript of a conversation between a person and an AI assistant. The person asks and follows up; the "
    "assistant answers in detail and asks no questions. A turn of the person begins with "
    f"{HUMAN}, one of the assistant with {AI}.\n\n{HUMAN} Hello!\n{AI} Hi! How can I help you?\n"
)


def with_talk(seed: Dataset) -> Dataset:
    return seed.with_column("talk", [f"{HEADER}{HUMAN} {text}" for text in seed.column("asked")])


def as_rows(written: Dataset, chat: bool) -> Dataset:
    """The talks: whole ones as `messages` where the student has a chat form, else a row for every
    answer; of those that could not be read, why."""
    rows = []
    for row in python_rows(written.table):
        text = row["talk"].removeprefix(HEADER)
        if not written.has("turns"):  # one call: the reply goes on from the first answer
            text += f"\n{AI} " + row["text"].strip().removeprefix(AI)
        found = Turns(HUMAN, AI).read(text, row["status"] == "length")
        if not isinstance(found, list):
            rows.append(
                {
                    "id": row["id"],
                    "parents": row["parents"],
                    "status": found.status,
                    "text": row["text"],
                    "synthetic": True,
                }
            )
            continue
        messages = found[0]["messages"]
        core = {key: row[key] for key in ("id", "parents", "model", "round")} | {"synthetic": True}
        if chat:
            rows.append(
                {**core, "asked": messages[0]["content"], "output": messages[1]["content"], "messages": messages}
            )
            continue
        said = [messages[0]["content"], *(f"{(HUMAN, AI)[n % 2]} {m['content']}" for n, m in enumerate(messages) if n)]
        for n in range(1, len(messages), 2):
            more = {"asked": "\n".join(said[:n]), "output": messages[n]["content"]}
            rows.append({**core, **more, "id": f"{row['id']}/{n}"})
    return Dataset.from_rows([{"asked": None, "output": None, **row} for row in rows])
