"""Rules on single responses: what a generator writes when it declines, breaks off, or forgets the language."""

import keyword
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator

from llm_finetuning.data.filters import main_subtag

OPENING = 200
"""Characters at the start of a response in which a refusal stands."""
NO = r"(?:can(?:not|'t)|can not|won't|unable|not able|not allowed|not comfortable|not in a position)"
HELP = (
    r"(?:assist|help|provide|comply|fulfil|answer|discuss|do (?:that|this|so)|create|write|generate|engage|support"
    r"|share|give|continue|respond|participate|offer|talk|complete|accommodate|advise)"
)
REFUSAL = re.compile(
    "|".join(
        (
            rf"(?:^|[.!?] |\b(?:i|we)(?:'m| am|'re| are)? (?:\w+ ){{0,2}})(?:sorry|afraid)\b.{{0,60}}?\b{NO}\b",
            rf"\b(?:apologi[sz]e|apologies|unfortunately|regret)\b.{{0,60}}?\b(?:i|we)(?:'m| am|'re| are)? {NO}\b",
            r"\b(?:sorry|afraid)\b.{0,40}?\bnot (?:something|able|going to|comfortable)\b",
            rf"\b(?:i|we)(?:'m| am|'re| are)? (?:really |simply |currently |just )?{NO} (?:to |with )?(?:\w+ )?{HELP}",
            rf"\b(?:i|we) (?:will not|could not|couldn't|would not|wouldn't|do not|don't) (?:\w+ ){{0,2}}{HELP}",
            r"\b(?:i|we) (?:(?:must|have to|will|would have to) )?(?:respectfully |politely )?(?:decline|refuse)\b",
            r"\bagainst my (?:guidelines|programming|policy|policies|principles)\b|\bnot something i can help\b",
            r"\bes tut mir leid\b.{0,60}?\b(?:nicht|kein)",
            r"\bich (?:kann|darf) (?:\S+ ){0,6}?nicht (?:helfen|beantworten)",
            r"\bleider (?:kann|darf) ich\b.{0,60}?\bnicht\b|\bje (?:suis désolée?|regrette)\b.{0,60}?\b(?:ne|pas)\b",
            r"\blo siento\b.{0,60}?\bno (?:puedo|me es)\b|\bmi dispiace\b.{0,60}?\bnon (?:posso|sono)\b",
            r"\b(?:desculpe|lamento|sinto muito)\b.{0,60}?\bnão posso\b|\bhet spijt me\b.{0,60}?\bniet\b",
        )
    ),
    re.IGNORECASE | re.DOTALL,
)
MODEL = r"(?:ai|a\.i\.|artificial intelligence|(?:large )?language model|llm|chatbot|virtual assistant)"
ABOUT_ITSELF = re.compile(
    "|".join(
        (
            rf"\b(?:as|since i am|since i'm|because i'm|i am|i'm) (?:just |only |merely )?an? (?:\w+ )?{MODEL}(?!\w)",
            r"\bas chatgpt\b|\bmy (?:training data|training|knowledge) (?:cut-?off|only|includes|ends|goes)\b",
            r"\bi (?:was|am|have been) (?:trained|developed|created) by\b|\bas of my (?:last|knowledge|training)\b",
            r"\bi (?:do not|don't) have (?:personal|human|my own) (?:opinions|feelings|experiences|beliefs)\b",
            r"\bals (?:ein |eine )?(?:ki|künstliche intelligenz|sprachmodell)\b",
            r"\bich bin (?:nur )?(?:ein|eine) (?:ki|sprachmodell)\b",
            r"\ben tant qu(?:'|e )(?:ia|intelligence artificielle|modèle de langage|assistant virtuel)\b",
            r"\bcomo (?:una? )?(?:ia|inteligencia artificial|modelo de (?:lenguaje|linguagem))\b",
        )
    ),
    re.IGNORECASE,
)
REMAINS = re.compile(
    r"<\|[\w ]+\|>|\[/?INST\]|<</?SYS>>|</?s>|<(?:start|end)_of_turn>|</?think(?:ing)?>|\ufffd"
    r"|^\s*(?:#+ *)?(?:user|human|assistant|instruct|output|### \w+) ?:",
    re.IGNORECASE | re.MULTILINE,
)
"""Parts of chat templates, and characters that could not be decoded."""
FENCE = re.compile(r"^ {0,3}(```+|~~~+)", re.MULTILINE)
HTML_TAG = re.compile(r"<(/?)(table|ul|ol|div|p|pre|code|b|i|strong|em|html|body)\b[^>\n]*?(/?)>", re.IGNORECASE)
NO_LANGUAGE = re.compile(
    r"```.*?```|~~~.*?~~~|`[^`\n]*`|\$\$?[^$\n]+\$\$?|\\\(.*?\\\)|\\\[.*?\\\]|</?\w[^>\n]*>|\w+://\S+|\S+@\S+\.\w+|\|",
    re.DOTALL,
)
"""Parts of a text that are in no language: code, formulas, markup, addresses, borders of tables."""
NO_WORD = re.compile(r"[\d()\[\]{}<>=_\\/|+*^#@$%&~]")
"""Characters within a word by which it is part of code, of a formula or of a name."""
EDGES = ".,;:!?…\"'`«»„“”‘’()[]*_-–—#>。，、！？：；「」『』（）।؟،؛"
LATIN = "LATIN"
SCRIPTS = {
    LATIN: "sr kk",
    "CYRILLIC": "ru uk bg sr mk be kk ky mn tg",
    "CJK": "zh ja",
    "HIRAGANA": "ja",
    "KATAKANA": "ja",
    "HANGUL": "ko",
    "ARABIC": "ar fa ur ps",
    "HEBREW": "he yi",
    "GREEK": "el",
    "DEVANAGARI": "hi mr ne",
    "THAI": "th",
    "BENGALI": "bn",
    "TAMIL": "ta",
    "TELUGU": "te",
    "GEORGIAN": "ka",
    "ARMENIAN": "hy",
}
"""Scripts, and the languages that are written in each; what is not named is written in Latin letters."""
WITHOUT_BLANKS = ("CJK", "HIRAGANA", "KATAKANA", "THAI")
FEW_LETTERS = 24
"""Letters of another script that a text may have: a name, or the word that was asked for."""
FUNCTION_WORDS = {
    lang: frozenset(words.split())
    for lang, words in {
        "en": "the and of to is that it for with as was are this be you not have from or by but they which we can your",
        "de": "der die das und ist nicht ein eine zu den mit sich"
        " auf für dem von des im werden sie wird auch als wie du",
        "fr": "le la les et est une un des que dans pour pas qui sur du au avec ce il elle sont vous nous plus ou par",
        "es": "el la los las y es una un que de en por con para no se del al lo como más su son está pero",
        "it": "il lo la gli le e è un una che di in per con non si del della dei sono più come anche nel alla",
        "pt": "o a os as e é um uma que de em para com não se do da dos das por mais como são ao seu na no",
        "nl": "de het een en van is dat niet in op te zijn voor met die aan er ook als maar bij of je wordt naar",
        "sv": "och att det är en ett som på av för med inte den till har de om var kan sig från så eller men",
        "pl": "i w nie na się z jest to że do jak o co po ale tak za od dla przez są czy być jego tego",
        "tr": "ve bir bu için ile de da çok olarak daha gibi olan en kadar sonra ama değil var ne ya her mi",
    }.items()
}
"""Words by which the texts of these languages are told apart."""
FEWEST_WORDS = 8
"""Words of a text below which function words do not tell it from a near language."""
SURE = 3
"""Different function words of a language from which on a text counts as written in it."""
LATIN_WORDS = 12
"""Different words from which on a text in Latin letters is prose, where no function words tell it."""


def refuses(text: str) -> bool:
    """Whether a response declines to answer."""
    return bool(REFUSAL.search(_plain(text)[:OPENING]))


def speaks_of_itself(text: str) -> bool:
    """Whether a response says that it comes from a model ("as an AI")."""
    return bool(ABOUT_ITSELF.search(_plain(text)))


def is_broken(text: str) -> bool:
    """Whether markup is not closed, or remains of templates stand in a text."""
    outside = re.sub(r"```.*?```|~~~.*?~~~|`[^`\n]*`", "", text, flags=re.DOTALL)
    return len(FENCE.findall(text)) % 2 == 1 or bool(REMAINS.search(outside)) or _unclosed(outside)


def _unclosed(text: str) -> bool:
    """Whether an HTML element that has to be closed is not, or the other way round; <p> may stay open."""
    opened: Counter[str] = Counter()
    for closing, name, alone in HTML_TAG.findall(text):
        opened[name.lower()] += 0 if alone else -1 if closing else 1
    return any(number for name, number in opened.items() if name != "p")


def _plain(text: str) -> str:
    return " ".join(text.replace("’", "'").replace("`", "'").split())


def is_language(text: str, lang: str) -> bool:
    """Whether a text can be in a language: by its letters, and for FUNCTION_WORDS by its words. Doubt counts as yes.

    Formulas and code, which are in no language, and a few words of another script, such as names, leave doubt.
    """
    wanted, words = main_subtag(lang), list(_words(NO_LANGUAGE.sub(" ", text)))
    letters = _letters(words)
    own = [script for script, languages in SCRIPTS.items() if wanted in languages.split()] or [LATIN]
    if _is_the_other_of_zh_and_ja(letters, wanted):
        return False
    written = sum(letters[script] for script in own)
    enough = written > 0 and written * (1 if LATIN in own else 4) >= letters.total() - written
    if LATIN in own:
        return (enough or _are_few(letters, own)) and _by_words(words, wanted)
    return enough or (_are_few(letters, own) and not _is_latin_prose(words))


def _words(text: str) -> Iterator[str]:
    """The words of a text, without symbols of one letter and without lines of code: less than two thirds words."""
    for line in text.splitlines():
        parts = [part.strip(EDGES) for part in line.split()]
        parts = [part for part in parts if part and not part[0].isdigit()]
        words = [part for part in parts if any(map(str.isalpha, part)) and not NO_WORD.search(part)]
        if 3 * len("".join(words)) >= 2 * len("".join(parts)):
            yield from (word for word in words if len(word) > 1)


def _letters(words: list[str]) -> Counter[str]:
    """How many letters of each script words have; those of scripts that do not part their words count twice."""
    letters = Counter(_script(letter) for word in words for letter in word if letter.isalpha())
    return letters + Counter({script: letters[script] for script in WITHOUT_BLANKS})


def _is_the_other_of_zh_and_ja(letters: Counter[str], wanted: str) -> bool:
    """Whether a text is Japanese where Chinese is wanted, or the other way round: both are written in CJK."""
    kana = letters["HIRAGANA"] + letters["KATAKANA"]
    japanese = letters["CJK"] and kana > max(2, letters["CJK"] / 9)
    return bool(wanted == "zh" and japanese or wanted == "ja" and not kana and letters["CJK"] > FEW_LETTERS)


def _are_few(letters: Counter[str], own: list[str]) -> bool:
    """Whether the letters of scripts other than `own` and Latin are too few to judge by."""
    return sum(count for script, count in letters.items() if script not in own and script != LATIN) <= FEW_LETTERS


def _is_latin_prose(words: list[str]) -> bool:
    """Whether words are sentences in Latin letters: titles and names, which have capitals, and commands are not."""
    latin = {word for word in words if _script(word[0]) == LATIN}
    common = {word for word in latin if not word.istitle()}
    told = max(_function_words(common.difference(keyword.kwlist)).values())
    return 2 * len(common) > len(latin) and (told >= SURE or len(common) >= LATIN_WORDS)


def _by_words(words: list[str], wanted: str) -> bool:
    """Whether no other language of FUNCTION_WORDS has twice as many different words of its own in a text."""
    if wanted not in FUNCTION_WORDS or len(words) < FEWEST_WORDS:
        return True
    counts = _function_words(words)
    best = max(counts.values())
    return counts[wanted] * 2 > best or best < SURE


def _function_words(words: Iterable[str]) -> dict[str, int]:
    """How many different function words of each language stand among words; those within a word count too (l'eau)."""
    parts = re.findall(r"[^\W\d_]+", " ".join(words).casefold())
    return {lang: len(known.intersection(parts)) for lang, known in FUNCTION_WORDS.items()}


def _script(letter: str) -> str:
    """Returns the name of SCRIPTS that a letter belongs to, LATIN for Latin and others."""
    name = re.split("[ -]", unicodedata.name(letter, ""))[0]
    return name if name in SCRIPTS else LATIN
