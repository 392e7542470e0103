"""Rules on single responses: what a generator writes when it declines, breaks off, or forgets the language."""

import re
import unicodedata
from collections import Counter

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
SCRIPTS = {
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
}
"""Scripts, and the languages that are written in each; what is not named is written in Latin letters."""
NOT_LATIN = frozenset(" ".join(SCRIPTS.values()).split())
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
KANJI = 12
"""Characters in a row of sentences from which on Japanese has kana between them, and Chinese has not."""
FEWEST_WORDS = 8
"""Words of a text below which its language is not judged by function words."""


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
    """Whether a text can be in a language: by its letters, and for FUNCTION_WORDS by its words. Doubt counts as yes."""
    wanted = main_subtag(lang)
    scripts = Counter(_script(letter) for letter in text if letter.isalpha())
    if not scripts:
        return True
    latin = scripts.pop("", 0)
    if wanted in NOT_LATIN:
        written = sum(number for script, number in scripts.items() if wanted in SCRIPTS[script].split())
        kana = scripts["HIRAGANA"] + scripts["KATAKANA"]
        other = wanted == "ja" and not kana and scripts["CJK"] > KANJI or wanted == "zh" and kana > scripts["CJK"] / 9
        return written >= max(1, (latin + sum(scripts.values())) // 4) and not other
    return latin >= sum(scripts.values()) and _by_words(text, wanted)


def _by_words(text: str, wanted: str) -> bool:
    """Whether no other language of FUNCTION_WORDS has twice as many different words of its own in a text."""
    words = re.findall(r"[^\W\d_]+", text.casefold())
    if wanted not in FUNCTION_WORDS or len(words) < FEWEST_WORDS:
        return True
    counts = {lang: len(known.intersection(words)) for lang, known in FUNCTION_WORDS.items()}
    best = max(counts.values())
    return counts[wanted] * 2 > best or best < 3


def _script(letter: str) -> str:
    """Returns the name of SCRIPTS that a letter belongs to, "" for Latin and others."""
    name = unicodedata.name(letter, "").split(" ")[0]
    return name if name in SCRIPTS else ""
