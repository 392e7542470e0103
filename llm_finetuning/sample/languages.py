"""A few facts of the world in other languages, who lives where and works as what; their wordings: languages.yaml."""

from pathlib import Path
from typing import NamedTuple

import yaml


class Language(NamedTuple):
    home: list[str]  # wordings of "where does {n} live?"
    job: list[str]  # wordings of "what is {n}'s job?"
    lives: str  # answer with {n}, {v}
    works: str
    then: list[str]  # follow-up that only the history makes clear, asking for (home, job)
    thanks: str
    wrong: str  # a reply that helps nobody
    people: list[list[str]]  # name, town, job


WORDINGS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
LANGUAGES = {code: Language(**wordings) for code, wordings in WORDINGS.items()}


def statements() -> list[str]:
    """The same facts as running text, one line per person."""
    lines = []
    for language in LANGUAGES.values():
        for name, town, job in language.people:
            lines.append(f"{language.lives.format(n=name, v=town)} {language.works.format(n=name, v=job)}")
    return lines
