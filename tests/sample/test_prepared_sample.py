"""What the data preparation makes of the sample: losses in every step, leaks of every kind, ranks worth learning."""

from collections import Counter
from dataclasses import dataclass

import pandas as pd
import pytest

from llm_finetuning import models, prompts
from llm_finetuning.data import leaks, pairs, preferences, prepare
from llm_finetuning.runner import parameters
from llm_finetuning.sample import TRAIN, VALIDATION, world
from llm_finetuning.settings import DataPrep

FORMS = {text: form for fact in world.facts() if len(fact.answers) > 1 for form, text in enumerate(fact.answers)}
"""{an answer that can be said in two forms: 0 for the preferred one, 1 for the other}"""
SPLITS = (TRAIN, VALIDATION)


@dataclass
class Files:
    """What both notebooks leave: by split what was prepared and written; then the table of leaks."""

    prepared: dict[str, prepare.Prepared]
    pairs: dict[str, list[dict]]
    preferences: dict[str, list[dict]]
    leaks: pd.DataFrame


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Files:
    length = parameters.read_profile("sample")["max_seq_length"]
    folder = str(tmp_path_factory.mktemp("sample"))
    settings = DataPrep(drive_folder=folder, source="sample", model_name="sample", max_seq_length=length)
    template = prompts.template_for(models.tokenizer("sample"), settings.system_message)
    made = {split: prepare.prepare(settings, prepare.read(settings, split), template) for split in SPLITS}
    for one in made.values():
        prepare.write(one)
    found = prepare.check_leaks(made[VALIDATION], template)
    names = settings.folders
    written = {split: pairs.to_records(pairs.read_jsonl(made[split].path)) for split in SPLITS}
    ranked = {TRAIN: preferences.read(names.train_preferences), VALIDATION: preferences.read(names.val_preferences)}
    return Files(made, written, ranked, found)


@pytest.mark.parametrize("split", SPLITS)
def test_every_filter_drops_something_and_at_most_two_steps_drop_nothing(files, split):
    funnel = files.prepared[split].funnel
    later = funnel[funnel["unit"].eq(funnel["unit"].shift())]  # the first step of a unit only counts
    assert set(funnel.attrs["cures"]) <= set(later["step"]) and len(funnel.attrs["cures"]) == 12
    assert (later.loc[later["step"].isin(funnel.attrs["cures"]), "dropped"] > 0).all()
    assert (later["dropped"] == 0).sum() <= 2
    assert (later["dropped"] <= 0.3 * (later["kept"] + later["dropped"])).all()


def test_one_leak_of_each_kind_is_found_and_taken_out(files):
    assert files.leaks.loc[list(leaks.KINDS), ["training pairs", "validation pairs"]].eq(1).all(axis=None)
    train, held_out = (files.pairs[split] for split in SPLITS)
    assert len(train) == len(files.prepared[TRAIN].pairs) - len(leaks.KINDS)
    for name in ("message_tree_id", "message_id", "prompt"):
        assert not {pair[name] for pair in train} & {pair[name] for pair in held_out}


def test_both_forms_of_an_answer_are_finetuned_on_about_as_often(files):
    forms = Counter(FORMS[pair["response"]] for pair in files.pairs[TRAIN] if pair["response"] in FORMS)
    single = {FORMS.get(pair["response"]) for pair in files.pairs[TRAIN] if "rank" not in pair}
    assert {0, 1} <= single
    assert 0.4 < forms[1] / forms.total() < 0.6 and forms.total() > 250


@pytest.mark.parametrize(("split", "count"), [(TRAIN, 200), (VALIDATION, 100)])
def test_people_prefer_one_form_wherever_both_stand(files, split, count):
    ranked = files.preferences[split]
    forms = Counter((FORMS.get(record["chosen"]), FORMS.get(record["rejected"])) for record in ranked)
    assert set(forms) == {(0, 1), (None, None)} and len(ranked) > count
    assert 0.5 < forms[0, 1] / len(ranked) < 0.75


@pytest.mark.parametrize("split", SPLITS)
def test_neither_length_nor_position_tells_the_preferred_reply(files, split):
    longer = [len(record["chosen"]) - len(record["rejected"]) for record in files.preferences[split]]
    by_form = [gap for gap, record in zip(longer, files.preferences[split], strict=True) if record["chosen"] in FORMS]
    place = {name: row for row, name in enumerate(files.prepared[split].source["message_id"])}
    first = [place[record["chosen_id"]] < place[record["rejected_id"]] for record in files.preferences[split]]
    assert not any(by_form)
    assert abs(sum(gap > 0 for gap in longer) - sum(gap < 0 for gap in longer)) < 0.1 * len(longer)
    assert 0.4 < sum(first) / len(first) < 0.6


def test_responses_have_lines_lists_and_code(files):
    for records in files.pairs.values():
        responses = [pair["response"] for pair in records]
        assert 0.15 < sum("\n" in text for text in responses) / len(responses) < 0.5
        assert sum("\n- " in text for text in responses) > 20
        assert sum("\n```json\n" in text and text.endswith("\n```") for text in responses) > 20
