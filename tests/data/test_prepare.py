"""The steps of the data preparation notebooks on a small source: files, reports, leaks."""

import dataclasses
import json

import pandas as pd
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llm_finetuning import prompts
from llm_finetuning.data import pairs, prepare, reports
from llm_finetuning.files.checksums import hash_file
from llm_finetuning.settings import NO_FILTERS, PHI2_FILTERS, DataPrep


@pytest.fixture(scope="module")
def template() -> prompts.Template:
    """A tokenizer of single characters, so that lengths can be counted by eye."""
    letters = {chr(code): number for number, code in enumerate(range(32, 127))} | {"<eos>": 95, "\n": 96}
    core = Tokenizer(models.WordLevel(letters, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return prompts.template_for(PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>"), "Be brief.")


def tree(name: str, question: str, *replies: str, lang: str = "en") -> dict:
    answers = [
        {"message_id": f"{name}-{rank}", "role": "assistant", "text": text, "lang": lang, "rank": rank, "replies": []}
        for rank, text in enumerate(replies)
    ]
    prompt = {"message_id": name, "role": "prompter", "text": question, "lang": lang, "replies": answers}
    return {"message_tree_id": name, "tree_state": "ready_for_export", "prompt": prompt}


TREES = [tree(f"t{n}", f"Question number {n * 7919}?", f"Answer {n}", f"Worse {n}") for n in range(60)]
TREES += [tree("d", "Eine Frage?", "Eine Antwort", lang="de"), tree("n", "Nobody replied?")]


@pytest.fixture
def settings(tmp_path) -> DataPrep:
    source = tmp_path / "source.trees.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in TREES), encoding="utf-8")
    return DataPrep(
        drive_folder=str(tmp_path / "drive"),
        source=str(source),
        source_revision="main",
        model_name="microsoft/phi-2",
        tokenizer_folder="",
        system_message="Be brief.",
        replies="best",
        max_seq_length=200,
        validation_share=0.2,
        on_error="raise",
        **{name: "auto" if type(off) is str else type(off)(-1) for name, off in NO_FILTERS.items()},
        remove_leaks=True,
        leak_similarity=0.9,
    )


def prepared_split(settings: DataPrep, split: str, template) -> prepare.Prepared:
    prepared = prepare.prepare(settings, prepare.read(settings, split), template)
    prepare.write(prepared)
    return prepared


def test_both_splits_are_written_with_their_reports(settings, template):
    parts = [prepared_split(settings, split, template) for split in ("train", "validation")]
    assert [part.path.name for part in parts] == ["finetuning_data_train.jsonl", "finetuning_data_val.jsonl"]
    assert sum(len(part.pairs) for part in parts) == 60
    for part in parts:
        report = reports.read_report(part.path)
        assert pairs.read_jsonl(part.path)["response"].str.startswith("Answer").all()
        assert report["pairs"] == {"pairs": len(part.pairs), "languages": {"en": len(part.pairs)}} | {
            "turns_before": {"0": len(part.pairs)}
        }
        assert report["funnel"][-1]["kept"] == len(part.pairs)
        assert report["recipe"] | PHI2_FILTERS == report["recipe"] and report["recipe"]["replies"] == "best"
        assert report["source"]["sha256"] == hash_file(settings.source)
        assert len(report["examples"]) == min(10, len(part.pairs)) >= 8
        assert set(report["versions"]) >= {"python", "pandas", "transformers"}
    train, validation = (reports.read_report(part.path)["messages"] for part in parts)
    assert train["languages"].get("de", 0) + validation["languages"].get("de", 0) == 2
    assert train["replies_per_prompt"].get("0", 0) + validation["replies_per_prompt"].get("0", 0) == 1


def test_the_token_counts_are_those_of_the_rendered_pairs(settings, template):
    part = prepared_split(settings, "train", template)
    found = reports.read_report(part.path)["tokens"]
    examples = [prompts.encode(pair, template) for pair in pairs.to_records(part.pairs)]
    assert found["tokens"] == sum(len(example["input_ids"]) for example in examples)
    in_the_loss = sum(label != -100 for example in examples for label in example["labels"])
    assert found["share_trained"] == pytest.approx(in_the_loss / found["tokens"], abs=1e-4)
    assert found["response"]["max"] == len("Answer 59") + 2  # the space before it and the end of text


def test_long_pairs_lose_their_oldest_turns_or_go(settings, template):
    answer = {"message_id": "a", "role": "assistant", "text": "First answer", "replies": []}
    then = {"message_id": "b", "role": "prompter", "text": "And then?", "replies": []}
    then["replies"] = [{"message_id": "c", "role": "assistant", "text": "Second answer", "replies": []}]
    answer["replies"] = [then]
    long = tree("t9", "Question", "x" * 300, "Short enough")
    record = {"prompt": {"message_id": "q", "role": "prompter", "text": "y" * 80, "replies": [answer]}}
    with open(settings.source, "w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in (record, long))
    every = {"validation_share": 0.0}
    chosen = dataclasses.replace(settings, max_seq_length=130, **every)
    part = prepared_split(chosen, "train", template)
    assert part.pairs["response"].tolist() == ["First answer", "Second answer", "Short enough"]
    assert part.pairs["history"].map(len).tolist() == [0, 0, 0]
    assert (part.final_lengths["total"] <= 130).all() and (part.lengths["total"] > 130).sum() == 2
    uncut = prepared_split(dataclasses.replace(chosen, drop_too_long="no"), "train", template)
    assert uncut.pairs["response"].tolist()[2] == "x" * 300
    assert uncut.pairs["history"].map(len).tolist() == [0, 2, 0]


def test_joined_has_all_filters_off_unless_set(settings, template):
    joined = dataclasses.replace(settings, replies="joined", max_seq_length=16)
    assert joined.filters == NO_FILTERS
    parts = [prepared_split(joined, split, template) for split in ("train", "validation")]
    assert sum(len(part.pairs) for part in parts) == 61  # the German tree too, however long
    german = dataclasses.replace(joined, languages="de")
    source = prepare.read(german, "train" if "d" in set(parts[0].source["message_tree_id"]) else "validation")
    assert prepare.flatten(german, source).pairs["prompt"].tolist() == ["Eine Frage?"]


def test_leaks_leave_train_and_never_validation(settings, template):
    train, validation = (prepared_split(settings, split, template) for split in ("train", "validation"))
    first = validation.pairs.iloc[0]
    leaking = [
        {"prompt": f"  {first['prompt'].upper()} ", "response": "By prompt"},
        {"prompt": "Other", "response": "By tree", "message_tree_id": first["message_tree_id"]},
        {"prompt": "Another", "response": "By message", "message_id": first["message_id"]},
    ]
    clean = pairs.to_records(train.pairs)
    pairs.write_jsonl([leaking[0], *clean, *leaking[1:]], train.path)
    report = reports.read_report(train.path)
    report["pairs"]["pairs"] += 3
    reports.write_report(report, train.path)
    before = validation.path.read_bytes()

    found = prepare.check_leaks(validation, template)
    assert found["training pairs"].to_dict() == {"tree": 1, "message": 1, "prompt": 1, "near prompt": 0}
    assert found["validation pairs"].sum() == 1
    assert pairs.to_records(pairs.read_jsonl(train.path)) == clean
    assert validation.path.read_bytes() == before
    report = reports.read_report(train.path)
    assert report["leaks"]["removed_from_train"] == 3 and report["pairs"]["pairs"] == len(clean)
    assert report["funnel"][-1]["dropped"] == 3 and report["sha256"] == hash_file(train.path)
    assert reports.read_report(validation.path)["leaks"]["removed_from_train"] == 3
    assert prepare.leak_sentence(validation).startswith("3 pairs taken out")

    written = train.path.stat().st_mtime_ns
    prepare.check_leaks(validation, template)  # a second run finds none and touches nothing
    assert train.path.stat().st_mtime_ns == written
    assert reports.read_report(train.path)["leaks"]["removed_from_train"] == 3


def test_leaks_are_only_counted_when_they_may_stay(settings, template):
    settings = dataclasses.replace(settings, remove_leaks=False)
    train, validation = (prepared_split(settings, split, template) for split in ("train", "validation"))
    pairs.write_jsonl([*pairs.to_records(train.pairs), *pairs.to_records(validation.pairs)], train.path)
    before = train.path.read_bytes()
    assert prepare.check_leaks(validation, template)["training pairs"]["tree"] == len(validation.pairs)
    assert train.path.read_bytes() == before


def test_without_a_training_file_the_notebook_to_run_is_named(settings, template):
    validation = prepared_split(settings, "validation", template)
    with pytest.raises(FileNotFoundError, match="finetuning_data_train.jsonl not found .* Training Data Prep.ipynb"):
        prepare.check_leaks(validation, template)


def test_own_pairs_take_the_same_way(settings, template, tmp_path):
    rows = [{"prompt": f"Question {n * 7919}", "response": f"Answer {n}"} for n in range(60)]
    pd.DataFrame(rows).to_csv(tmp_path / "own.csv", index=False)
    settings = dataclasses.replace(settings, source=str(tmp_path / "own.csv"))
    parts = [prepared_split(settings, split, template) for split in ("train", "validation")]
    assert sum(len(part.pairs) for part in parts) == 60
    assert prepare.check_leaks(parts[1], template).to_numpy().sum() == 0
    report = reports.read_report(parts[0].path)
    assert report["messages"] is None and report["tokens"]["pairs"] == len(parts[0].pairs)
    assert [path.name for path in sorted((tmp_path / "drive" / "figures").glob("*"))] == []
    prepare.save_figures(parts[0])
    assert len(list((tmp_path / "drive" / "figures").glob("data_train_*.png"))) == 4


def test_known_answers_are_compared_when_the_source_is_oasst1(settings):
    source = prepare.read(settings, "train")
    assert reports.known_answers(source) is None
    source.attrs["source"] = "OpenAssistant/oasst1"
    known = reports.known_answers(source)
    assert known["expected"].tolist() == [84437, 9846, 31525, 20587]
    assert known.loc["messages", "found"] == len(source) and not known["same"].any()
    sentence = prepare.known_sentence({"known_answers": known.to_dict("index")})
    assert "84,437 known: DIFFERENT" in sentence


def test_settings_report_all_problems_at_once(settings):
    with pytest.raises(ValueError) as caught:
        dataclasses.replace(settings, replies="most", min_quality=2.0, drop_deleted="maybe", source="")
    for problem in ("replies = 'most'", "min_quality = 2.0", "drop_deleted = 'maybe'", "source is empty"):
        assert problem in str(caught.value)
