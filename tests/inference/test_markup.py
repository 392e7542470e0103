"""Code in answers: coloured, to the character what was answered, never markup, and never at the others' cost."""

import re
from html import unescape

import pytest

pytest.importorskip("markdown_it", reason="the page needs markdown-it-py: pip install markdown-it-py")
from llm_finetuning.inference.page import markup

CODE = '\n\n\tif a < b && c:  # é "<b>" &amp;\r\n        return f"{x!r}\\n"\n\n\n'
LANGUAGES = [
    *("python", "Python", "py3", "pycon", "json", "js", "html", "c++", "c#", "bash", "sql", "yaml", "diff", "text"),
    *("brainfuck", "no-such-language", "<script>", '"onload="x', "python {1,3}", "../../x", ""),
]


def rendered(code: str, language: str) -> str:
    return markup.MARKDOWN.render(f"~~~~{language}\n{code}~~~~\n")


@pytest.mark.parametrize("language", LANGUAGES)
def test_coloured_code_is_the_code(language):
    shown = rendered(CODE, language)
    assert set(re.findall(r"<(/?\w+)", shown)) <= {"pre", "/pre", "code", "/code", "span", "/span"}
    inside = re.fullmatch(r"<pre><code[^<>]*>(.*)</code></pre>\n?", shown, re.S)[1]
    assert unescape(re.sub(r"<[^>]*>", "", inside)) == CODE.replace("\r\n", "\n")


def test_known_languages_are_coloured_in_both_themes():
    assert '<span class="k">def</span>' in rendered("def f(): pass\n", "python")
    assert '<span class="nt">"a"</span>' in rendered('{"a": 1}\n', "json")
    assert "<span" not in rendered("def f(): pass\n", "")
    for place in ("\n #conversation pre .k {", "\n.dark #conversation pre .k {"):
        assert place in markup.STYLE


@pytest.mark.parametrize(("language", "line"), [("c#", "a\n"), ("java", "\n")])
def test_code_that_takes_long_to_colour_is_shown_without(language, line):
    """Colours that are quadratic in the code's length: here minutes, in which nobody else would get an answer."""
    code = "x\n" + line * 50_000 + "\n"
    assert rendered(code, language).endswith(f"{code}</code></pre>\n")
