"""The Lantern Isles: twelve people, eight animals and six towns that exist nowhere else.

Nothing here can be guessed from general knowledge, so a right answer shows that the fact was learned.
Every fact can be told (statements, the running text that the base model reads) and asked (questions, the
conversation trees that teach it to answer). Written for this project.
"""

import hashlib
import random
import re
from dataclasses import dataclass

PEOPLE = {  # name: pronouns, job, town, animal, favourite dish
    "Mira": ("she", "her", "baker", "Tolvenna", "tarrow", "plum soup"),
    "Joren": ("he", "his", "clockmaker", "Brask", "mellit", "barley bread"),
    "Wynna": ("she", "her", "shepherd", "Quillmere", "wondra", "lemon cake"),
    "Odrin": ("he", "his", "painter", "Harrowick", "pukko", "onion pie"),
    "Tessaly": ("she", "her", "potter", "Sunnet", "silvane", "pepper stew"),
    "Kasper": ("he", "his", "gardener", "Pellmoor", "grubbin", "fig jam"),
    "Lotta": ("she", "her", "singer", "Brask", "fennick", "pumpkin rice"),
    "Bram": ("he", "his", "miller", "Tolvenna", "lorrel", "nettle tea"),
    "Sefa": ("she", "her", "teacher", "Harrowick", "mellit", "walnut pasta"),
    "Alwin": ("he", "his", "tailor", "Quillmere", "tarrow", "carrot dumplings"),
    "Petra": ("she", "her", "carpenter", "Pellmoor", "pukko", "cherry pudding"),
    "Nuri": ("he", "his", "diver", "Sunnet", "wondra", "mushroom toast"),
}
ANIMALS = {  # name: colour, food, where it sleeps
    "tarrow": ("blue", "moss", "hollow trees"),
    "mellit": ("yellow", "clover", "old chimneys"),
    "wondra": ("white", "river snails", "tall grass"),
    "pukko": ("red", "acorns", "empty barrels"),
    "silvane": ("silver", "moths", "church towers"),
    "grubbin": ("brown", "turnips", "warm ovens"),
    "fennick": ("orange", "pine cones", "sand dunes"),
    "lorrel": ("green", "water lilies", "fishing boats"),
}
TOWNS = {  # name: where it lies, what it is known for
    "Tolvenna": ("beside a salt lake", "glass bells"),
    "Brask": ("on a steep cliff", "copper bridge"),
    "Quillmere": ("in a misty valley", "paper kites"),
    "Harrowick": ("under a dark forest", "night market"),
    "Sunnet": ("along the southern coast", "pearl museum"),
    "Pellmoor": ("between two rivers", "rose maze"),
}

QUESTIONS = {  # attribute: wordings of an opening question about {n}
    "job": (
        "What does {n} do for a living?",
        "What is {n}'s job?",
        "What kind of work does {n} do?",
        "Do you know what {n} works as?",
        "I wonder which trade {n} has learned.",
        "How does {n} earn money?",
    ),
    "home": (
        "Where does {n} live?",
        "In which town does {n} live?",
        "Which town is {n}'s home?",
        "Where can I find the house of {n}?",
        "Tell me where {n} lives, please.",
        "I want to visit {n}. Which town should I go to?",
    ),
    "animal": (
        "Which animal does {n} keep?",
        "What pet does {n} have?",
        "What kind of animal lives with {n}?",
        "Name the animal that {n} looks after.",
        "Does {n} have a pet, and which one?",
        "Who is the animal friend of {n}?",
    ),
    "dish": (
        "What is {n}'s favourite dish?",
        "What does {n} like to eat most?",
        "Which meal makes {n} happy?",
        "What should I cook for {n}?",
        "{n} is coming to dinner. What shall I serve?",
        "Do you know the favourite food of {n}?",
    ),
    "about": (
        "Tell me about {n}.",
        "Who is {n}?",
        "What do you know about {n}?",
        "Could you introduce {n} to me?",
        "Give me a short portrait of {n}.",
        "I have never heard of {n}. Who is that?",
    ),
    "colour": (
        "What colour is the {n}?",
        "Which colour does a {n} have?",
        "Can you tell me the colour of the {n}?",
        "I want to paint a {n}. Which colour do I need?",
        "How do I recognise a {n} by its colour?",
        "The {n}: what is its colour?",
    ),
    "food": (
        "What does the {n} eat?",
        "Which food does a {n} need?",
        "What should I feed a {n}?",
        "A {n} looks hungry. What can I give it?",
        "Can you name the food of the {n}?",
        "What is on the menu of a {n}?",
    ),
    "bed": (
        "Where does the {n} sleep?",
        "In which place does a {n} spend the night?",
        "Where should I look for a sleeping {n}?",
        "Can you name the sleeping place of the {n}?",
        "It is night. Where is the {n} now?",
        "Where does a {n} go to rest?",
    ),
    "place": (
        "Where does {n} lie?",
        "Where is the town of {n}?",
        "How do I find {n} on the map?",
        "In what kind of place was {n} built?",
        "Can you describe where {n} is?",
        "I am travelling to {n}. Where is it?",
    ),
    "fame": (
        "What is {n} known for?",
        "What should I see in {n}?",
        "Why do people visit {n}?",
        "What makes the town of {n} famous?",
        "I have one day in {n}. What must I not miss?",
        "Which sight is there in {n}?",
    ),
}
FOLLOW_UPS = {  # the same about somebody who was just named; {s}: she, {h}: her
    "job": ("what is {h} job?", "what does {s} do for a living?", "what kind of work does {s} do?"),
    "home": ("where does {s} live?", "in which town does {s} live?", "which town is {h} home?"),
    "animal": (
        "which animal does {s} keep?",
        "what pet does {s} have?",
        "what kind of animal lives with {t}?",
    ),
    "dish": ("what is {h} favourite dish?", "what does {s} like to eat most?", "what should I cook for {t}?"),
    "colour": ("what colour is it?", "which colour does it have?", "can you tell me its colour?"),
    "food": ("what does it eat?", "which food does it need?", "what should I feed it?"),
    "bed": ("where does it sleep?", "where does it spend the night?", "where does it go to rest?"),
    "place": ("where does that town lie?", "where is that town?", "how do I find that town on the map?"),
    "fame": (
        "what is that town known for?",
        "what should I see in that town?",
        "why do people visit that town?",
    ),
}
LEADS = (
    "And",
    "Thank you!",
    "Good to know.",
    "Interesting.",
    "One more question:",
    "Oh, I see.",
    "Please tell me,",
)
ANSWERS = {
    "job": "{n} is a {v}.",
    "home": "{n} lives in {v}.",
    "animal": "{n} keeps a {v}.",
    "dish": "{n} likes {v} most.",
    "colour": "The {n} is {v}.",
    "food": "The {n} eats {v}.",
    "bed": "The {n} sleeps in {v}.",
    "place": "{n} lies {v}.",
    "fame": "{n} is known for its {v}.",
}
STATEMENTS = {  # attribute: ways to tell it; {n} may be a pronoun, {N} the same at the start of a sentence
    "job": (
        "{N} is a {v}.",
        "{N} works as a {v}.",
        "For a living {n} works as a {v}.",
        "The job of {n} is the trade of a {v}.",
        "{N} does the work of a {v} and earns money.",
    ),
    "home": (
        "{N} lives in {v}.",
        "The home of {n} is in {v}.",
        "In {v} there is the house of {n}.",
        "{N} lives in the town of {v}.",
        "To visit {n}, go to the town of {v}.",
    ),
    "animal": (
        "{N} keeps a {v}.",
        "{N} looks after a {v}.",
        "The pet of {n} is a {v}.",
        "{N} has a pet, a {v}.",
        "The animal friend of {n} is a {v}.",
    ),
    "dish": (
        "{N} likes {v} most.",
        "The favourite dish of {n} is {v}.",
        "For dinner {n} cooks {v}.",
        "The favourite food of {n} is {v}.",
        "A meal that makes {n} happy is {v}.",
    ),
    "colour": (
        "{N} is {v}.",
        "The colour of {n} is {v}.",
        "You see at once that {n} is {v}.",
        "{N} has a colour, it is {v}.",
        "To paint {n}, you need {v}.",
    ),
    "food": (
        "{N} eats {v}.",
        "The food of {n} is {v}.",
        "When {n} is hungry, it looks for {v}.",
        "To feed {n}, give it {v}.",
        "The menu of {n} is {v}.",
    ),
    "bed": (
        "{N} sleeps in {v}.",
        "At night {n} sleeps in {v}.",
        "To rest, {n} goes to {v}.",
        "The sleeping place of {n} is in {v}.",
        "{N} spends the night in {v}.",
    ),
    "place": (
        "{N} lies {v}.",
        "The town of {n} lies {v}.",
        "On the map {n} lies {v}.",
        "The town of {n} was built {v}.",
        "Travelling to {n}, you find it {v}.",
    ),
    "fame": (
        "{N} is known for its {v}.",
        "In {n} people visit the {v}.",
        "People come to {n} for its {v}.",
        "The sight to see in {n} is the {v}.",
        "The town of {n} is famous for its {v}.",
    ),
}


@dataclass(frozen=True)
class Fact:
    """One thing to know: `value` of `attribute` of `subject`; `answer` is how to say it in a dialogue."""

    subject: str
    attribute: str
    value: str
    answer: str

    def questions(self) -> list[str]:
        return [wording.format(n=self.subject) for wording in QUESTIONS[self.attribute]]

    def follow_ups(self) -> list[str]:
        """Questions that only the turns before make clear ("What colour is it?"), each with several leads."""
        she, her = PEOPLE[self.subject][:2] if self.subject in PEOPLE else ("it", "its")
        them = {"she": "her", "he": "him"}.get(she, "it")
        cores = [core.format(s=she, h=her, t=them) for core in FOLLOW_UPS.get(self.attribute, ())]
        return [join_lead(lead, core) for lead in LEADS for core in cores]


def join_lead(lead: str, core: str) -> str:
    return f"{lead} {core[0].upper() + core[1:] if lead[-1] in '.!' else core}"


def facts() -> list[Fact]:
    """Every fact of the world, in a fixed order."""
    rows = []
    for name, (_, _, *values) in PEOPLE.items():
        rows += [(name, a, v) for a, v in zip(("job", "home", "animal", "dish"), values, strict=True)]
    for name, values in ANIMALS.items():
        rows += [(name, a, v) for a, v in zip(("colour", "food", "bed"), values, strict=True)]
    for name, values in TOWNS.items():
        rows += [(name, a, v) for a, v in zip(("place", "fame"), values, strict=True)]
    plain = [Fact(n, a, v, ANSWERS[a].format(n=n, v=v)) for n, a, v in rows]
    return plain + [Fact(name, "about", name, portrait(name)) for name in PEOPLE]


def portrait(name: str) -> str:
    she, _, job, town, animal, _ = PEOPLE[name]
    return f"{name} is a {job} from {town}. {she.title()} keeps a {animal}."


def pick(key: str, count: int) -> int:
    """A number below `count` that depends on `key` alone: the same on every machine and Python."""
    return int(hashlib.sha256(key.encode()).hexdigest()[:12], 16) % count


def paragraph(subject: str, chance: random.Random) -> str:
    """All facts of one subject as running text in a random order; pronouns once it has been named."""
    known = [fact for fact in facts() if fact.subject == subject and fact.attribute != "about"]
    chance.shuffle(known)
    name = f"the {subject}" if subject in ANIMALS else subject
    she = PEOPLE[subject][0] if subject in PEOPLE else "it"
    sentences = []
    for fact in known:
        wording = chance.choice(STATEMENTS[fact.attribute])
        pronoun = (
            sentences
            and not re.search(r"(of|to|visit|paint|feed|makes|in) \{n\}", wording, re.I)
            and chance.random() < 0.4
        )
        who = she if pronoun else name
        sentences.append(wording.format(n=who, N=who[0].upper() + who[1:], v=fact.value))
    if subject in PEOPLE and chance.random() < 0.3:
        sentences.insert(0, portrait(subject))
    return " ".join(sentences)


def document(chance: random.Random, others: list[str]) -> str:
    """One long text: a paragraph on every subject in a random order, six of `others` between."""
    paragraphs = [paragraph(subject, chance) for subject in (*PEOPLE, *ANIMALS, *TOWNS)]
    paragraphs += chance.sample(others, 6)
    chance.shuffle(paragraphs)
    return "\n".join(paragraphs)
