"""What generators write around and instead of what they were asked for, as such models are known to write it."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_finetuning.data.generation import diversity, parsing, rules

ASKED = ["What is tar?", 'Say "a, b" [twice].']
WRITTEN = {
    "plain": json.dumps({"prompts": ASKED}),
    "in a fence": f"```json\n{json.dumps({'prompts': ASKED}, indent=2)}\n```",
    "with text around": f"Here are [2] prompts:\n{json.dumps({'prompts': ASKED})}\nDo you need {{more}}?",
    "a bare list": json.dumps(ASKED),
    "under another name": json.dumps({"questions": ASKED}),
    "deeper": json.dumps({"result": {"prompts": ASKED}}),
    "numbered keys": json.dumps({"prompts": dict(enumerate(ASKED))}),
    "objects": json.dumps({"prompts": [{"prompt": text, "id": 1} for text in ASKED]}),
    "trailing comma": json.dumps({"prompts": ASKED})[:-2] + ",],}",
    "comments": '{"prompts": [\n// easy\n"What is tar?", // short\n"Say \\"a, b\\" [twice]."\n]}',
    "Python": str({"prompts": ASKED}),
    "raw newlines": '{"prompts":\n["What is tar?",\n"Say \\"a, b\\" [twice]."]}',
    "cut off": json.dumps({"prompts": [*ASKED, "What is the"]})[:-4],
    "no end": json.dumps({"prompts": ASKED})[:-1],
    "thoughts": f"<think>They want {{prompts}}: [1, 2]</think>\n{json.dumps({'prompts': ASKED})}",
    "thoughts without a start": f"They want {{prompts}}: [1, 2]\n</think>\n\n{json.dumps({'prompts': ASKED})}",
    "a list": 'Sure!\n\n1. What is tar?\n2. Say "a, b" [twice].',
    "a bold list": '**1.** What is tar?\n**2.** Say "a, b" [twice].',
    "bullets": '- What is tar?\n- Say "a, b" [twice].\n',
}


@pytest.mark.parametrize("how", WRITTEN)
def test_prompts_are_read_however_they_are_written(how):
    assert parsing.strings(WRITTEN[how], "prompts") == ASKED


@pytest.mark.parametrize(
    "text, answer",
    [
        ("They ask.\nEasy.</think>\n\nTar.", "Tar."),
        ("Hm</THINKING>Tar.", "Tar."),
        ("</think>Tar.", "Tar."),
        ("One</think><think>two</think>Tar.", "Tar."),
        ("<think>One</think>Tar.", "Tar."),
        ("Tar.<thinking>So</thinking>", "Tar."),
        ("Tar. <think>So", "Tar. <think>So"),
        ("<b>Tar</b> < thinking > it", "<b>Tar</b> < thinking > it"),
    ],
)
def test_thoughts_are_taken_out_whether_their_start_is_marked_or_not(text, answer):
    assert parsing.without_thoughts(text) == answer


@pytest.mark.parametrize(
    "text", ["", "{", "[" * 5000, '{"prompts": 7}', '{"prompts": []}', "I will not.", "{" * 99 + "]"]
)
def test_where_there_is_nothing_nothing_is_read(text):
    assert parsing.strings(text, "prompts") == []
    assert parsing.string(text, "system_message") == ""
    assert parsing.numbers(text, "scores") == []


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet='{}[]",:\\n1. ab\u2028"\'', max_size=60))
def test_no_text_breaks_the_reader(text):
    assert all(isinstance(one, str) and one for one in parsing.strings(text, "prompts"))
    parsing.numbers(text, "scores")


@pytest.mark.parametrize(
    "text",
    [
        '{"scores": [8, 3.5]}',
        '{"scores": ["8", "3.5/10"]}',
        '{"scores": [{"response": 1, "score": 8}, {"response": 2, "score": 3.5}]}',
        '{"scores": {"Response 1": 8, "Response 2": 3.5}}',
        "The first is better.\n[8, 3.5]",
    ],
)
def test_scores_are_read_however_they_are_written(text):
    assert parsing.numbers(text, "scores") == [8, 3.5]


REFUSALS = [
    "I'm sorry, but I can't help with that.",
    "I’m really sorry, but I cannot assist you with this request.",
    "I cannot provide instructions for that.",
    "Unfortunately, I am not able to answer this question.",
    "I must respectfully decline.",
    "Sorry, that's not something I'm able to do.",
    "I apologize, but I won't create that kind of content.",
    "I'm unable to fulfil this request because it is unsafe.",
    "We can't discuss this topic.",
    "Es tut mir leid, aber dabei kann ich nicht helfen.",
    "Je suis désolé, mais je ne peux pas répondre.",
    "Lo siento, pero no puedo ayudar con eso.",
]
NO_REFUSALS = [
    "You can't divide by zero, for no number times zero gives one.",
    "The Titanic could not turn in time.",
    "If a friend is sad, say that you are sorry and that you are there.",
    "I can help with that: take two eggs.",
    "Plants cannot move, so they give off scents. This helps them to answer danger.",
    "Whales breathe air. They are sorry sights on land, unable to cool down.",
]


@pytest.mark.parametrize("text", REFUSALS)
def test_a_refusal_is_known(text):
    assert rules.refuses(text)


@pytest.mark.parametrize("text", NO_REFUSALS)
def test_an_answer_about_what_cannot_be_is_no_refusal(text):
    assert not rules.refuses(text) and not rules.speaks_of_itself(text) and not rules.is_broken(text)


@pytest.mark.parametrize(
    "text, found",
    [
        ("As an AI, I have no favourite.", True),
        ("Great question! As a large language model, I cannot taste.", True),
        ("I'm just an AI assistant, so take this with care.", True),
        ("As of my last update in 2023, it was so.", True),
        ("I was trained by OpenAI.", True),
        ("I don't have personal opinions, but many like it.", True),
        ("Als KI habe ich keine Meinung.", True),
        ("An AI is a program that learns from examples.", False),
        ("A language model guesses the next word.", False),
        ("Android was developed by Google.", False),
        ("As an airline pilot you see the sun twice.", False),
    ],
)
def test_a_response_that_speaks_of_itself_as_a_model_is_known(text, found):
    assert rules.speaks_of_itself(text) is found


@pytest.mark.parametrize(
    "text, broken",
    [
        ("```python\nprint(1)", True),
        ("```python\nprint(1)\n```", False),
        ("Use `<b>` and then:\n```html\n<div>\n```", False),
        ("<ul><li>one</li>", True),
        ("<p>One<p>Two", False),
        ("Yes.<|im_end|>", True),
        ("Yes.</s>", True),
        ("[INST] And now?", True),
        ("Yes.\nUser: And now?\nAssistant: No.", True),
        ("caf\ufffd", True),
        ("<think>So", True),
        ("2 < 3 and 5 > 4, see <https://example.org>", False),
        ("| a | b |\n|---|---|\n| 1 | 2 |", False),
    ],
)
def test_markup_that_is_not_closed_is_known(text, broken):
    assert rules.is_broken(text) is broken


SPOKEN = {
    "en": "The lantern is lit at dusk and it burns until the morning, for the wind of the sea is not strong here.",
    "de": "Die Laterne wird am Abend angezündet und brennt bis zum Morgen, denn der Wind ist hier nicht stark.",
    "fr": "La lanterne est allumée au crépuscule et elle brûle jusqu'au matin, car le vent n'est pas fort ici.",
    "es": "La linterna se enciende al anochecer y arde hasta la mañana, porque el viento del mar no es fuerte aquí.",
    "it": "La lanterna è accesa al tramonto e brucia fino al mattino, perché il vento non è forte in questo luogo.",
    "nl": "De lantaarn wordt in de schemering aangestoken en brandt tot de ochtend, want de wind is niet sterk.",
    "ru": "Фонарь зажигают в сумерках, и он горит до утра, потому что ветер с моря здесь не сильный.",
    "zh": "灯笼在黄昏时点亮，一直燃烧到早晨，因为这里的海风不大。",
    "ja": "ランタンは夕暮れに灯され、朝まで燃え続けます。ここでは海からの風が強くないからです。",
    "ko": "등불은 해질녘에 켜져 아침까지 타오릅니다. 이곳은 바닷바람이 세지 않기 때문입니다.",
    "ar": "يضاء الفانوس عند الغسق ويحترق حتى الصباح لأن رياح البحر هنا ليست قوية.",
}


@pytest.mark.parametrize("written", SPOKEN)
def test_a_text_is_in_its_language_and_in_no_other(written):
    taken = [lang for lang in SPOKEN if rules.is_language(SPOKEN[written], lang)]
    assert taken == [written]
    assert rules.is_language(SPOKEN[written], f"{written}-XX")


SCRIPTED = {
    "uk": "Ліхтар запалюють у сутінках, і він горить до ранку, бо вітер із моря тут несильний.",
    "el": "Το φανάρι ανάβει το σούρουπο και καίει ως το πρωί, γιατί ο άνεμος εδώ δεν είναι δυνατός.",
    "he": "הפנס נדלק עם רדת הערב ודולק עד הבוקר, כי הרוח מן הים אינה חזקה כאן.",
    "fa": "فانوس هنگام غروب روشن می‌شود و تا صبح می‌سوزد، زیرا باد دریا در اینجا تند نیست.",
    "hi": "लालटेन शाम को जलाई जाती है और सुबह तक जलती है, क्योंकि यहाँ समुद्र की हवा तेज़ नहीं है।",
    "bn": "সন্ধ্যায় লণ্ঠন জ্বালানো হয় এবং সকাল পর্যন্ত জ্বলে, কারণ এখানে সমুদ্রের বাতাস তীব্র নয়।",
    "ta": "அந்தி நேரத்தில் விளக்கு ஏற்றப்பட்டு காலை வரை எரிகிறது, ஏனெனில் இங்கு கடல் காற்று பலமாக இல்லை.",
    "te": "సాయంత్రం లాంతరు వెలిగించి ఉదయం వరకు మండుతుంది, ఎందుకంటే ఇక్కడ సముద్రపు గాలి బలంగా లేదు.",
    "th": "โคมไฟถูกจุดในยามพลบค่ำและลุกไหม้จนถึงเช้า เพราะลมทะเลที่นี่ไม่แรง",
    "ka": "ფარანს შებინდებისას ანთებენ და ის დილამდე იწვის, რადგან ზღვის ქარი აქ ძლიერი არ არის.",
    "hy": "Լապտերը վառում են մթնշաղին, և այն վառվում է մինչև առավոտ, քանի որ քամին այստեղ ուժեղ չէ։",
}
"""The same sentence in further scripts."""
ALL = SPOKEN | SCRIPTED
NO_OTHER = {"uk": ["uk", "ru"], "ru": ["ru", "uk"], "fa": ["fa", "ar"], "ar": ["ar", "fa"]}
IN_NO_LANGUAGE = {
    "numbers": ["42", "3.14", "1,024", "12:30", "-5", "50 %", "1998–2004"],
    "formulas": ["H2O", "NaCl", "C6H12O6 + 6 O2", "E = mc²", "π", "λ = h/p", "$\\frac{a}{b}$", "sin(x) + cos(x)", "pH"],
    "names": ["Albert Einstein", "iPhone 15 Pro", "Harry Potter and the Prisoner of Azkaban", "Charles de Gaulle",
              "Homo sapiens", "NASA, ESA", "Python, Java, Rust, Go", "Wi-Fi", "Rio de Janeiro", "O'Neill"],
    "addresses": ["https://example.org/the/way/to/it?is=not#for-you", "a@b.example", "/usr/bin/env", "C:\\Windows"],
    "code": ["print(x)", "git commit -m 'first' && git push origin main", "if x is not None and y in seen:",
             "for (let i = 0; i < n; i++) {\n  sum += i;\n}", "`the_and_of_to(is, that)`",
             "```python\n# the sum of all that is in it\nfor it in them:\n    if it is not None:\n        add(it)\n```",
             "SELECT name FROM users WHERE age > 18", "| a | b |\n|---|---|\n| 1 | 2 |", "<ul><li>7</li></ul>"],
    "loan words": ["OK", "café", "Привет", "你好", "こんにちは", "안녕하세요", "Лев Толстой", "नमस्ते", "שלום", "σοφία"],
    "nothing": ["", "…", "👍", "---"],
}  # fmt: skip
"""Short answers that are right in any language."""


@pytest.mark.parametrize("lang", sorted(ALL))
def test_what_is_in_no_language_passes_in_each(lang):
    wrong = [t for texts in IN_NO_LANGUAGE.values() for t in texts if not rules.is_language(t, lang)]
    assert wrong == []


@pytest.mark.parametrize("written", SCRIPTED)
def test_a_text_is_in_the_languages_of_its_script(written):
    taken = [lang for lang in ALL if rules.is_language(ALL[written], lang)]
    assert sorted(taken) == sorted(NO_OTHER.get(written, [written]))


@pytest.mark.parametrize("lang", sorted(set(ALL) - {"en"}))
def test_code_names_and_addresses_within_a_text_do_not_change_its_language(lang):
    code, long = IN_NO_LANGUAGE["code"][5], ALL[lang]
    around = ("LONG\n\nCODE\n", "CODE\nLONG", "- LONG\n- https://example.org/is/it/that/this/way\n",
              "1. **LONG**\n2. Microsoft Visual Studio Code", "| LONG | H2O |\n|---|---|\n| Word | PDF |")  # fmt: skip
    for text in (text.replace("LONG", long).replace("CODE", code) for text in around):
        assert rules.is_language(text, lang), text
        assert not rules.is_language(text, "en") and not rules.is_language(text, "pl"), text


@pytest.mark.parametrize("lang", sorted(set(ALL) - {"en"}))
def test_prose_in_another_language_is_told_beside_a_few_words_of_the_own(lang):
    english = f"{ALL['en']} The people of the town say that it was built by one of them."
    for text in (english, f"{english}\n```\n42\n```", f"# H2O\n{english}", ALL[lang][:6] + english):
        assert not rules.is_language(text, lang), text


def test_serbian_is_written_in_both_scripts():
    texts = ("Fenjer se pali u sumrak i gori do jutra, jer vetar s mora ovde nije jak.", ALL["ru"])
    assert all(rules.is_language(text, "sr") for text in texts) and not rules.is_language(texts[0], "bg")


@pytest.mark.parametrize("text, lang", [("Ja, gern.", "en"), ("Da, naravno.", "fr"), ("水", "ja"), ("東京都", "zh")])
def test_what_is_too_short_to_tell_passes(text, lang):
    assert rules.is_language(text, lang)


def test_diversity_is_what_it_says():
    pairs = [{"prompt": text} for text in ("one two three", "one two four", "ein ganz anderer Satz")]
    found = diversity.figures(pairs, ["a", "a", "b"], {"topics": ["a", "b", "c"]})
    assert (found["topics_covered"], found["topics"]) == (2, 3)
    assert found["distinct_1_grams"] == 8 / 10 and found["distinct_2_grams"] == round(6 / 7, 4)
    one = {"one t", "ne tw", "e two", " two ", "two t", "wo th", "o thr", " thre", "three"}
    two = {"one t", "ne tw", "e two", " two ", "two f", "wo fo", "o fou", " four"}
    assert found["nearest_neighbour"]["max"] == round(len(one & two) / len(one | two), 4)
    assert diversity.figures(pairs[:1], ["a"], {"topics": ["a"]})["nearest_neighbour"]["max"] is None
