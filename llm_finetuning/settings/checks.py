"""Settings as a whole: types, checks, one error for all that is wrong, and reading them from a cell or a file."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, dataclass_transform, get_args, get_type_hints

import pydantic.dataclasses
from pydantic import BeforeValidator, ConfigDict, GetCoreSchemaHandler, ValidationError
from pydantic_core import CoreSchema, core_schema

from llm_finetuning.files import drive

AUTO = "auto"
DRIVE_FOLDER = "/content/drive/MyDrive/llm_finetuning"
SYSTEM_MESSAGE = "You are a helpful assistant."
Settings = TypeVar("Settings")


@dataclasses.dataclass(frozen=True)
class Must:
    """A check at a field: what has to hold of its value, and what an error says where it does not."""

    holds: Callable[[Any], bool]
    expected: str

    def check(self, value: Any) -> Any:
        """Returns the value as it is. Raises ValueError that says what was expected."""
        if not self.holds(value):
            raise ValueError(f"is empty: {self.expected}" if value == "" else f"= {value!r}: {self.expected}")
        return value

    def __get_pydantic_core_schema__(self, source: type, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))


MOST = 10**9
"""The largest number that a count may be: beyond it libraries run over, each with a message of its own."""
Count = Annotated[int, Must(lambda value: 1 <= value <= MOST, f"at least 1, at most {MOST:,}")]
CountOrZero = Annotated[int, Must(lambda value: 0 <= value <= MOST, f"0 or more, at most {MOST:,}")]
Seed = Annotated[int, Must(lambda value: 0 <= value < 2**32, "0 or more, below 2**32")]
NotNegative = Annotated[float, Must(lambda value: 0 <= value < float("inf"), "0 or more, and finite")]
Positive = Annotated[float, Must(lambda value: 0 < value < float("inf"), "above 0, and finite")]
Fraction = Annotated[float, Must(lambda value: 0 <= value < 1, "from 0 to below 1")]
Threshold = Annotated[float, Must(lambda value: value == -1 or 0 <= value <= 1, "0 to 1, or -1 for auto")]
Length = Annotated[int, Must(lambda value: 16 <= value <= MOST, f"at least 16 tokens, at most {MOST:,}")]
Switch = Annotated[
    Literal["auto", "yes", "no"],
    BeforeValidator(lambda value: {"true": "yes", "false": "no"}.get(str(value).lower(), value)),
]
"""True and False count as "yes" and "no": settings that earlier versions saved, and YAML, say it so."""
Folder = Annotated[str, Must(str.strip, "name the folder for the results")]
Model = Annotated[str, Must(str.strip, "a hub id, a folder, or sample")]
TemplateFile = Annotated[str, Must(lambda value: value == value.strip(), "a file with a Jinja chat template, or ''")]
Share = Annotated[float, Must(lambda value: 0 <= value <= 1, "0 to 1")]
Texts = Annotated[list, Must(lambda value: all(type(t) is str and t.strip() for t in value), "texts, none empty")]

NOT_IN_FORM = (
    *("model_revision", "source_revision", "tokenizer_folder", "tree_states", "drop_unreviewed"),
    *("packing", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "attention", "weight_decay"),
    *("use_rslora", "use_dora", "init_lora_weights", "neftune_noise_alpha", "loraplus_lr_ratio", "compile_layers"),
    *("logging_steps", "save_total_limit", "judge_exact_match", "task_folder"),
)
"""Settings without a line in a parameters cell; a line of that name, a profile or `-p` sets them too."""


def not_in_form(settings_class: type) -> tuple[str, ...]:
    """The settings of a notebook without a line in its form: NOT_IN_FORM, and its own `without_line`."""
    return (*NOT_IN_FORM, *getattr(settings_class, "without_line", ()))


@dataclass_transform(frozen_default=True)
def validated(settings_class: type[Settings]) -> type[Settings]:
    """Makes a frozen dataclass whose constructor raises one ValueError that lists all problems of its values."""
    config = ConfigDict(strict=True, extra="forbid", validate_default=True, use_attribute_docstrings=True)
    made = pydantic.dataclasses.dataclass(frozen=True, config=config)(settings_class)
    validate = made.__init__
    for base in made.__mro__[1:]:  # pydantic reads the sentences of the class itself alone
        for name, field in getattr(base, "__pydantic_fields__", {}).items():
            made.__pydantic_fields__[name].description = made.__pydantic_fields__[name].description or field.description

    def __init__(self: Settings, *values: Any, **named: Any) -> None:
        try:
            validate(self, *values, **named)
        except ValidationError as error:
            problems = [_sentence(made, problem) for problem in error.errors()]
            raise ValueError(f"{made.__name__} settings:\n" + "\n".join(problems)) from None

    made.__init__ = __init__
    return made


EXPECTED = {bool: "True or False", list: 'a list such as ["one", "two"]'}
"""Types in words of the form, where a type's own name tells less."""


def _sentence(settings_class: type, problem: dict) -> str:
    """Returns a problem that pydantic found as `name = value: what was expected`."""
    name, value, kind = problem["loc"][0], problem["input"], problem["type"]
    field_type = get_type_hints(settings_class).get(name)
    if kind == "value_error":
        return f"{name} {problem['ctx']['error']}"
    if kind == "literal_error":
        return f"{name} = {value!r}: one of {', '.join(get_args(field_type))}"
    if kind.endswith("_type"):
        expected = EXPECTED.get(field_type, field_type.__name__)
        return f"{name} = {value!r}: expected {expected}, found {'nothing' if value is None else type(value).__name__}"
    return f"{name}: {problem['msg']}"


def from_cell(settings_class: type[Settings], namespace: dict) -> Settings:
    """Returns the settings of a notebook from the names its parameters cell defined.

    Every field of `settings_class` must be a name in `namespace`, but for those of NOT_IN_FORM, which may be: what
    hardly anybody changes keeps its default without a line in the form. Whole numbers are accepted for floats.
    Raises ValueError that lists every missing name, or else every wrong type and impossible value at once, and for
    folders of Colab's elsewhere; OSError where they lie on a Drive that is not mounted.
    """
    names = [field.name for field in dataclasses.fields(settings_class)]
    optional = not_in_form(settings_class)
    missing = [name for name in names if name not in namespace and name not in optional]
    if missing:
        raise ValueError("\n".join(f"{name} is missing: the parameters cell has to define it" for name in missing))
    made = settings_class(**{name: namespace[name] for name in names if name in namespace})
    drive.check_folders({name: getattr(made, name) for name in names if name.endswith("_folder")})
    return made


def from_file(settings_class: type[Settings], path: str | Path) -> Settings:
    """Returns the settings that `save` wrote. Raises FileNotFoundError, or ValueError like `from_cell`."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: the finetuning notebook writes it as settings.json to drive_folder")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}:{error.lineno}: no JSON ({error.msg}); run the notebook's settings cell again"
        ) from error
    return from_cell(settings_class, values)


def split_names(text: str) -> list[str]:
    """Splits a text at its commas and spaces: 'en, de' → ['en', 'de'], an empty text → []."""
    return [name for name in re.split(r"[,\s]+", text) if name]
