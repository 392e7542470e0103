"""The house rules of the four notebooks and of the files around them."""

import ast
import dataclasses
import re
from pathlib import Path
from urllib.parse import quote

import nbformat
import pytest

from llm_finetuning.runner import parameters, steps
from llm_finetuning.settings import NOT_IN_FORM, not_in_form

ROOT = Path(__file__).parents[1]
REPOSITORY = "mkthoma/llm_finetuning"
NOTEBOOKS = [step.notebook for step in steps.NAMED.values()]
COMMON = [
    'drive_folder = "/content/drive/MyDrive/llm_finetuning"  # @param {type:"string"}',
    'repository = ""  # @param {type:"string"}',
]
LONGEST_CELL = 25

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(path: Path) -> list:
    return [c for c in nbformat.read(path, 4).cells if c.cell_type == "code"]


def test_the_runner_runs_every_notebook_of_the_house():
    assert sorted(NOTEBOOKS) == sorted(p for p in ROOT.glob("*/*.ipynb") if p.parent.name != "outputs")


@each
def test_a_notebook_is_valid_and_carries_no_results(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    assert all(c.outputs == [] and c.execution_count is None for c in code_cells(path))


@each
def test_parameters_come_first_and_begin_with_the_common_lines(path):
    first, *others = code_cells(path)
    assert first.metadata.tags == ["parameters"]
    assert not any("parameters" in c.metadata.get("tags", []) for c in others)
    assert [line for line, _ in form(first.source)[:2]] == COMMON
    parameters.defaults(path)  # literals only


def form(source: str) -> list[tuple[str, str]]:
    """(line, the sentence above it) of each parameter of a cell; headings do not count."""
    found, above = [], []
    for line in filter(None, source.splitlines()):
        if line.startswith("# @markdown #"):
            assert not above, f"a sentence without its parameter: {above}"
        elif line.startswith("# @markdown "):
            above.append(line.removeprefix("# @markdown "))
        else:
            found.append((line, " ".join(above)))
            above = []
    return found


@each
def test_every_parameter_is_a_colab_form_on_one_line(path):
    lines = [line for line, _ in form(code_cells(path)[0].source)]
    assert len(lines) == len(parameters.defaults(path))
    kinds = r"\{type:\"\w+\"[^{}=]*\}|\[[^\]=]*\](?: \{allow-input: true\})?"
    assert [line for line in lines if not re.fullmatch(rf"\w+ = .+  # @param (?:{kinds})", line)] == []


@each
def test_about_ten_parameters_stand_before_the_heading_more(path):
    first, heading, rest = code_cells(path)[0].source.partition("\n# @markdown ## More\n")
    assert heading and 7 <= len(form(first)) <= 11 and form(rest)


@pytest.mark.parametrize("step", steps.NAMED.values(), ids=lambda step: step.notebook.stem)
def test_the_parameters_cell_shows_the_defaults_and_sentences_of_the_settings(step):
    cell = parameters.defaults(step.notebook)
    del cell["repository"]  # for the set-up cell alone
    fields, hidden = step.settings_class.__pydantic_fields__, not_in_form(step.settings_class)
    values = dataclasses.asdict(step.settings_class())
    assert cell == {name: value for name, value in values.items() if name not in hidden}
    for line, sentence in form(code_cells(step.notebook)[0].source):
        name = line.partition(" = ")[0]
        assert name == "repository" or sentence == " ".join(fields[name].description.split()), name


def test_the_form_holds_no_more_parameters_than_people_look_through():
    assert max(len(parameters.defaults(path)) for path in NOTEBOOKS) <= 46
    every = {name for step in steps.NAMED.values() for name in step.settings_class.__pydantic_fields__}
    assert set(NOT_IN_FORM) <= every


def test_the_set_up_cell_is_the_same_in_all():
    assert len({code_cells(path)[1].source for path in NOTEBOOKS}) == 1


def test_a_parameter_that_several_notebooks_have_has_one_default():
    for name in set.intersection(*(set(parameters.defaults(path)) for path in NOTEBOOKS)):
        assert len({repr(parameters.defaults(path)[name]) for path in NOTEBOOKS}) == 1, name


@each
def test_a_notebook_shows_and_the_package_does(path):
    for cell in code_cells(path)[1:]:
        lines = cell.source.splitlines()
        assert len(lines) <= LONGEST_CELL, cell.source
        assert not [line for line in lines if re.match(r"\s*(async def|def|class) ", line)]


@each
def test_a_text_stands_before_each_step(path):
    kinds = [c.cell_type for c in nbformat.read(path, 4).cells]
    assert kinds[0] == "markdown"
    assert "code code code code" not in " ".join(kinds)


@each
def test_the_badge_opens_this_notebook(path):
    address = f"https://colab.research.google.com/github/{REPOSITORY}/blob/main/{quote(str(path.relative_to(ROOT)))}"
    assert address in nbformat.read(path, 4).cells[0].source
    assert address in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "document", ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))]
)
def test_the_files_and_tests_that_a_document_names_exist(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    for name in re.findall(r"`([\w/]+\.py)", text):
        assert (ROOT / name).is_file() or any((ROOT / "llm_finetuning").rglob(name)), name
    for file, test in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text):
        assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), test


@pytest.mark.parametrize("path", sorted((ROOT / "profiles").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_profile_fits_the_notebooks(path, tmp_path):
    assert steps.prepare(path.stem, tmp_path, [], tuple(steps.NAMED.values()))


def test_the_promised_profiles_are_there():
    assert {p.stem for p in (ROOT / "profiles").glob("*.yaml")} >= {"sample", "rehearsal"}


WITHOUT_CODE = {"GenerationConfig", "PeftConfig", "PeftModel"}
"""What reads no code from a folder, and knows no trust_remote_code."""


def loading_calls() -> list[tuple[str, ast.Call]]:
    """(place, call) of each `from_pretrained` of the package, the page, the benchmarks and the notebooks."""
    files = [path for folder in ("llm_finetuning", "Inference", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    sources = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in files}
    for path in NOTEBOOKS:
        plain = [line for cell in code_cells(path) for line in cell.source.splitlines() if line[:1] not in ("%", "!")]
        sources[path.name] = "\n".join(plain)
    calls = [(name, node) for name, source in sources.items() for node in ast.walk(ast.parse(source))]
    return [
        (f"{name}:{node.lineno}", node)
        for name, node in calls
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "from_pretrained"
    ]


def test_no_model_folder_brings_code_that_is_run():
    calls = loading_calls()
    assert len(calls) > 10
    refused = {
        place
        for place, call in calls
        if ast.unparse(call.func.value).rpartition(".")[2] in WITHOUT_CODE
        or any(k.arg == "trust_remote_code" and ast.unparse(k.value) == "False" for k in call.keywords)
    }
    assert [place for place, _ in calls if place not in refused] == []


def test_troubleshooting_quotes_the_messages_as_they_are():
    """Each message of docs/troubleshooting.md, piece by piece between its dots, is one of the program's own texts."""
    texts = [text for path in (ROOT / "llm_finetuning").rglob("*.py") for text in texts_of(path.read_text("utf-8"))]
    texts += texts_of(code_cells(NOTEBOOKS[0])[1].source) + ["Tokenizer class TokenizersBackend does not exist"]
    whole = "\n".join(re.sub(r"\s+", " ", text) for text in texts)
    document = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^### `(.+)`$", document, re.MULTILINE)
    assert len(quoted) >= 15
    for message in quoted:
        for piece in filter(None, re.split(r"\s*…\s*", message)):
            assert piece in whole, (message, piece)


def texts_of(source: str) -> list[str]:
    """The texts of a program; what an f-string fills in becomes a space."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            found += "".join(getattr(part, "value", None) if isinstance(part, ast.Constant) else "\n"
                             for part in node.values).split("\n")  # fmt: skip
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found
