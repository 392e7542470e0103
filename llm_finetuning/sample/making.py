"""Making a base model on this machine: once, atomically, and again when its recipe changes."""

import json
from collections.abc import Callable
from pathlib import Path

from llm_finetuning.files.atomic import building, read_json
from llm_finetuning.files.copying import check_space
from llm_finetuning.sample import phi

RECIPE_FILE = "recipe.json"


def make_once(target: Path, recipe: str, size: int, write: Callable[[Path], None]) -> Path:
    """Makes the folder `target` with `write` unless it was made by the same `recipe`, a hash; returns `target`.

    size: bytes that it will take. Raises OSError if they are not free.
    """
    file, mark = target / RECIPE_FILE, {"recipe": recipe}
    if read_json(file) == mark:
        return target
    check_space(target.parent, size, target.name)
    with building(target) as partial:
        write(partial)
        (partial / RECIPE_FILE).write_text(json.dumps(mark), encoding="utf-8")
    return target


def make_sample(target: Path, recipe: phi.Recipe | None = None) -> Path:
    """Makes the tiny Phi in `target` (about a minute) unless it is there by the same recipe; returns `target`."""
    recipe = recipe or phi.Recipe()

    def write(folder: Path) -> None:
        bpe = phi.train_tokenizer(recipe)
        phi.pretrain(recipe, bpe).save_pretrained(folder)
        bpe.save_pretrained(folder)

    return make_once(target, recipe.fingerprint(), 50 * 10**6, write)
