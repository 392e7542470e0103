"""The results of a finished run in a folder, as the evaluation notebook finds them."""

import shutil
from pathlib import Path

from inference_fixtures import known_pairs
from training_fixtures import write_lines

from llm_finetuning.files import checksums
from llm_finetuning.settings import Evaluation


def preferences(better: bool = True) -> list[dict]:
    """To each known prompt its answer against that of another one of about the same length."""
    made, records = known_pairs(), []
    for pair in made:
        others = [p["response"] for p in made if p["response"] != pair["response"]]
        other = min(others, key=lambda text: (abs(len(text) - len(pair["response"])), text))
        sides = (pair["response"], other) if better else (other, pair["response"])
        asked = {"prompt": pair["prompt"], "history": pair.get("history", [])}
        records.append(asked | {"chosen": sides[0], "rejected": sides[1]})
    return records


def finished_run(published: Path, base: Path, folder: Path) -> Evaluation:
    """The fixture model that knows its answers and an untrained base, with a held-out set, ranks and plain text."""
    shutil.copytree(published, folder / "finetuned_phi2")
    (folder / "finetuned_phi2" / "README.md").write_text("# A model\n\nIts card.\n", encoding="utf-8")
    checksums.write_checksums(folder / "finetuned_phi2")
    write_lines(folder / "data" / "finetuning_data_val.jsonl", known_pairs())
    write_lines(folder / "data" / "preferences_val.jsonl", preferences())
    passages = [f"The {word} lies behind the hill, and nobody knows why." for word in ("lake", "mill", "road")]
    (folder / "plain.txt").write_text("\n\n".join(passages), encoding="utf-8")
    return Evaluation(
        drive_folder=str(folder),
        model_name=str(base),
        max_seq_length=200,
        max_new_tokens=48,
        eval_answers=6,
        judge_exact_match=True,
        generic_text=str(folder / "plain.txt"),
        follow_rules=False,
        dtype="float32",
    )
