"""A few facts of the world in other languages: who lives where and who works as what.

One entry per language: opening wordings, answer, follow-up, and the people with their town and job as written
there. The sentences are built so that no word changes its form with the value.
"""

from typing import NamedTuple


class Language(NamedTuple):
    home: tuple[str, ...]  # wordings of "where does {n} live?"
    job: tuple[str, ...]  # wordings of "what is {n}'s job?"
    lives: str  # answer with {n}, {v}
    works: str
    then: tuple[str, str]  # follow-up that only the history makes clear, asking for (home, job)
    thanks: str
    wrong: str  # a reply that helps nobody
    people: tuple[tuple[str, str, str], ...]  # name, town, job


LANGUAGES = {
    "de": Language(
        home=("Wo wohnt {n}?", "In welcher Stadt ist {n} zu Hause?", "Weißt du, wo ich {n} besuchen kann?"),
        job=(
            "Was ist {n} von Beruf?",
            "Womit verdient {n} Geld?",
            "Kannst du mir sagen, als was {n} arbeitet?",
        ),
        lives="{n} wohnt in {v}.",
        works="{n} arbeitet als {v}.",
        then=("Danke! Und wo ist das Zuhause?", "Danke! Und welche Arbeit ist das?"),
        thanks="Vielen Dank, das hilft mir.",
        wrong="Das ist eine gute Frage, darüber reden viele, aber ich weiß es nicht.",
        people=(
            ("Mira", "Tolvenna", "Bäckerin"),
            ("Joren", "Brask", "Uhrmacher"),
            ("Lotta", "Brask", "Sängerin"),
        ),
    ),
    "es": Language(
        home=(
            "¿Dónde vive {n}?",
            "¿En qué ciudad está la casa de {n}?",
            "Quiero visitar a {n}, ¿adónde voy?",
        ),
        job=(
            "¿En qué trabaja {n}?",
            "¿Cuál es el oficio de {n}?",
            "Dime cómo se gana la vida {n}, por favor.",
        ),
        lives="{n} vive en {v}.",
        works="{n} trabaja de {v}.",
        then=("Gracias. ¿Y en qué ciudad tiene su casa?", "Gracias. ¿Y qué oficio tiene?"),
        thanks="Muchas gracias, eso me ayuda.",
        wrong="Es una buena pregunta, se habla mucho de eso, pero no lo sé.",
        people=(
            ("Odrin", "Harrowick", "pintor"),
            ("Sefa", "Harrowick", "maestra"),
            ("Kasper", "Pellmoor", "jardinero"),
        ),
    ),
    "fr": Language(
        home=(
            "Où habite {n} ?",
            "Dans quelle ville se trouve la maison de {n} ?",
            "Je cherche {n}, où dois-je aller ?",
        ),
        job=(
            "Quel est le métier de {n} ?",
            "Que fait {n} dans la vie ?",
            "Sais-tu comment {n} gagne son pain ?",
        ),
        lives="{n} habite à {v}.",
        works="{n} travaille comme {v}.",
        then=("Merci. Et quelle est sa ville ?", "Merci. Et quel est son métier ?"),
        thanks="Merci beaucoup, cela m'aide.",
        wrong="C'est une bonne question, on en parle beaucoup, mais je ne sais pas.",
        people=(
            ("Wynna", "Quillmere", "bergère"),
            ("Alwin", "Quillmere", "tailleur"),
            ("Bram", "Tolvenna", "meunier"),
        ),
    ),
    "ru": Language(
        home=(
            "Где живёт {n}?",
            "В каком городе дом, в котором живёт {n}?",
            "Подскажи, где мне найти человека по имени {n}?",
        ),
        job=(
            "Кем работает {n}?",
            "Какая профессия у человека по имени {n}?",
            "Чем {n} зарабатывает на жизнь?",
        ),
        lives="{n} живёт в городе {v}.",
        works="{n} — {v} по профессии.",
        then=("Спасибо! А в каком городе дом?", "Спасибо! А какая профессия?"),
        thanks="Большое спасибо, это помогло.",
        wrong="Хороший вопрос, об этом много говорят, но я не знаю.",
        people=(
            ("Петра", "Пеллмур", "плотник"),
            ("Нури", "Суннет", "водолаз"),
            ("Мира", "Толвенна", "пекарь"),
        ),
    ),
    "zh": Language(
        home=("{n}住在哪里？", "{n}的家在哪个城镇？", "我想去拜访{n}，应该去哪儿？"),
        job=("{n}是做什么工作的？", "{n}的职业是什么？", "请告诉我{n}靠什么谋生。"),
        lives="{n}住在{v}。",
        works="{n}的职业是{v}。",
        then=("谢谢！那么家在哪个城镇呢？", "谢谢！那么职业是什么呢？"),
        thanks="非常感谢，很有帮助。",
        wrong="这是个好问题，很多人都在谈论，但是我不知道。",
        people=(("米拉", "托尔文纳", "面包师"), ("约伦", "布拉斯克", "钟表匠"), ("洛塔", "布拉斯克", "歌手")),
    ),
    "ja": Language(
        home=(
            "{n}はどこに住んでいますか？",
            "{n}の家はどの町にありますか？",
            "{n}を訪ねたいのですが、どこへ行けばいいですか？",
        ),
        job=("{n}の仕事は何ですか？", "{n}は何をして働いていますか？", "{n}の職業を教えてください。"),
        lives="{n}は{v}に住んでいます。",
        works="{n}の仕事は{v}です。",
        then=("ありがとう。では家はどの町ですか？", "ありがとう。では仕事は何ですか？"),
        thanks="どうもありがとう、助かりました。",
        wrong="いい質問です。よく話題になりますが、わかりません。",
        people=(
            ("ミラ", "トルヴェンナ", "パン屋"),
            ("ブラム", "トルヴェンナ", "粉屋"),
            ("セファ", "ハロウィック", "先生"),
        ),
    ),
    "pt-BR": Language(
        home=("Onde mora {n}?", "Em que cidade fica a casa de {n}?", "Quero visitar {n}. Para onde devo ir?"),
        job=("Qual é a profissão de {n}?", "Em que trabalha {n}?", "Como é que {n} ganha a vida?"),
        lives="{n} mora em {v}.",
        works="{n} trabalha como {v}.",
        then=("Obrigado! E em que cidade fica a casa?", "Obrigado! E qual é a profissão?"),
        thanks="Muito obrigado, isso me ajuda.",
        wrong="Boa pergunta, fala-se muito disso, mas eu não sei.",
        people=(
            ("Tessaly", "Sunnet", "oleira"),
            ("Nuri", "Sunnet", "mergulhador"),
            ("Petra", "Pellmoor", "carpinteira"),
        ),
    ),
    "uk": Language(
        home=(
            "Де живе {n}?",
            "У якому місті дім, де живе {n}?",
            "Підкажи, де мені знайти людину на ім'я {n}?",
        ),
        job=("Ким працює {n}?", "Яка професія в людини на ім'я {n}?", "Чим {n} заробляє на життя?"),
        lives="{n} живе в місті {v}.",
        works="{n} — {v} за професією.",
        then=("Дякую! А в якому місті дім?", "Дякую! А яка професія?"),
        thanks="Щиро дякую, це допомогло.",
        wrong="Гарне питання, про це багато говорять, але я не знаю.",
        people=(
            ("Одрін", "Гарровік", "художник"),
            ("Каспер", "Пеллмур", "садівник"),
            ("Лотта", "Браск", "співачка"),
        ),
    ),
}


def statements() -> list[str]:
    """The same facts as running text, one line per person."""
    lines = []
    for language in LANGUAGES.values():
        for name, town, job in language.people:
            lines.append(f"{language.lives.format(n=name, v=town)} {language.works.format(n=name, v=job)}")
    return lines
