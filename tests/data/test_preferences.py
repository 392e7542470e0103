"""Preference pairs: from siblings with ranks and ready-made, filtered and checked for leaks like pairs."""

import json

import pytest
from test_filters import QUESTIONS, settings_for
from test_prepare import prepared_split, template, tree  # noqa: F401 (template is a fixture)

from llm_finetuning.data import pairs, preferences, prepare, reports
from llm_finetuning.data.comparisons import differ
from llm_finetuning.data.oasst import flatten, read_messages
from llm_finetuning.data.record_pairs import Reader

TREES = [tree(f"t{n}", f"What is a {name}?", f"A {name}.", "Not bad.", "Bad.") for n, name in enumerate(QUESTIONS)]


def ranked(*ranks: int | None) -> tuple[list[dict], list[str]]:
    pairs = [{"prompt": "Q", "history": [], "response": f"R{n}", "rank": rank} for n, rank in enumerate(ranks)]
    return pairs, ["q"] * len(pairs)


@pytest.mark.parametrize(
    ("ranks", "way", "expected"),
    [
        ((1, 0, 2), "best-worst", [(1, 2)]),
        ((1, 0, 2), "adjacent", [(1, 0), (0, 2)]),
        ((1, 0, 2), "all", [(1, 0), (1, 2), (0, 2)]),
        ((0, 0, 1), "adjacent", [(1, 2)]),
        ((0, 0, 1), "all", [(0, 2), (1, 2)]),
        ((0, 0), "best-worst", []),
        ((0, None, None), "all", []),
        ((None, 4, None, 9), "best-worst", [(1, 3)]),
    ],
)
def test_which_siblings_make_a_preference(ranks, way, expected):
    records, owners = preferences.of_siblings(*ranked(*ranks), way)
    assert [(record["chosen"], record["rejected"]) for record in records] == [(f"R{a}", f"R{b}") for a, b in expected]
    assert owners == ["q"] * len(expected)
    with pytest.raises(ValueError, match="preference_pairs = 'some'"):
        preferences.of_siblings(*ranked(0, 1), "some")


def test_the_real_trees_give_every_ordered_pair(real_trees):
    messages = read_messages(real_trees)
    replies = messages[(messages["role"] == "assistant") & messages["rank"].notna()]
    expected = set()
    for _, siblings in replies.groupby("parent_id"):
        rows = siblings[["message_id", "rank", "text"]].itertuples(index=False)
        rows = list(rows)
        expected |= {(a[0], b[0]) for a in rows for b in rows if a[1] < b[1] and a[2] != b[2]}
    found = flatten(messages, "best", preference_pairs="all").preferences
    assert {(record["chosen_id"], record["rejected_id"]) for record in found} == expected
    assert len(found) == len(expected) > 700
    by_id = messages.set_index("message_id").to_dict("index")
    for record in found:
        chosen = by_id[record["chosen_id"]]
        assert chosen["text"] == record["chosen"] and by_id[chosen["parent_id"]]["text"] == record["prompt"]
    assert len(flatten(messages, "joined", preference_pairs="all").preferences) == len(found)


def test_both_splits_write_their_preferences(tmp_path, template):  # noqa: F811
    settings = settings_for(tmp_path, TREES, validation_share=0.4)
    parts = [prepared_split(settings, split, template) for split in ("train", "validation")]
    assert sum(len(part.flat.preferences) for part in parts) == 10
    for part, name in zip(parts, ("preferences_train.jsonl", "preferences_val.jsonl"), strict=True):
        assert part.preferences_path == tmp_path / "drive" / "data" / name
        records = preferences.read(part.preferences_path)
        assert len(records) == len(part.pairs) == reports.read_report(part.path)["preferences"]["pairs"]
        assert set(records[0]) == {"prompt", "history", "chosen", "rejected", "lang", "message_tree_id"} | {
            f"{side}_{what}" for side in ("chosen", "rejected") for what in ("id", "rank")
        }
        assert (records[0]["chosen_rank"], records[0]["rejected_rank"]) == (0, 2)
        steps = part.funnel[part.funnel["unit"] == preferences.UNIT]
        assert steps["kept"].tolist() == [len(records)] * 2
        assert "preference pairs in" in prepare.written_sentence(part)
    found = prepare.check_leaks(parts[1], template)
    assert found["training preference pairs"].sum() == 0


def test_without_ranks_there_is_no_file_and_an_old_one_goes(tmp_path, template):  # noqa: F811
    settings = settings_for(tmp_path, TREES, validation_share=0.0)
    part = prepared_split(settings, "train", template)
    assert part.preferences_path.exists()
    settings_for(tmp_path, [{"prompt": f"What about a {name}?", "response": "Nice."} for name in QUESTIONS])
    part = prepared_split(settings, "train", template)
    assert not part.preferences_path.exists() and "no file of preference pairs" in prepare.written_sentence(part)


def test_a_filter_on_replies_also_holds_for_preferences(tmp_path, template):  # noqa: F811
    settings = settings_for(tmp_path, TREES, validation_share=0.0, min_response_chars=5)
    part = prepared_split(settings, "train", template)
    assert {record["rejected"] for record in part.flat.preferences} == {"Not bad."}


def test_siblings_that_were_cut_differently_share_the_shorter_history(tmp_path, template):  # noqa: F811
    turns = [{"role": ("user", "assistant")[n % 2], "content": "x" * 60} for n in range(4)]
    replies = enumerate(("Yes.", "B" * 120))
    records = [{"prompt": "Q?", "response": text, "history": turns, "rank": rank} for rank, text in replies]
    part = prepared_split(settings_for(tmp_path, records, languages="", validation_share=0.0), "train", template)
    (record,) = part.flat.preferences
    assert record["history"] == turns[2:] and part.pairs["history"].tolist() == [turns]


def test_preferences_that_leak_leave_training(tmp_path, template):  # noqa: F811
    settings = settings_for(tmp_path, TREES, validation_share=0.4)
    train, validation = (prepared_split(settings, split, template) for split in ("train", "validation"))
    leak = validation.flat.preferences[0] | {"message_tree_id": None, "chosen_id": None}
    preferences.write([*train.flat.preferences, leak], train.preferences_path)
    found = prepare.check_leaks(validation, template)
    assert found["training preference pairs"].to_dict() == {"tree": 0, "message": 1, "prompt": 0, "near prompt": 0}
    assert preferences.read(train.preferences_path) == train.flat.preferences
    report = reports.read_report(train.path)
    assert report["leaks"]["removed_preferences"] == 1 and report["leaks"]["removed_from_train"] == 0
    assert [step for step in report["funnel"] if step["unit"] == preferences.UNIT][-1]["dropped"] == 1
    assert "(1 preference pairs too)" in prepare.leak_sentence(validation)


READY = [
    {"prompt": f"Describe a {name}, please.", "chosen": f"A fine {name}.", "rejected": "Dunno.", "lang": "en"}
    for name in QUESTIONS
]


def test_ready_made_preferences_go_through_the_same_filters(tmp_path, template):  # noqa: F811
    rows = [{"prompt": record["prompt"], "response": record["chosen"]} for record in READY]
    settings = settings_for(tmp_path, rows, validation_share=0.0)
    bad = [READY[0] | {"lang": "de"}, READY[1] | {"rejected": " "}, READY[2] | {"chosen": "x" * 500}]
    again = [READY[3] | {"prompt": READY[3]["prompt"].upper()}]
    part = prepare.prepare(settings, prepare.read(settings, "train"), template, [*READY, *bad, *again])
    prepare.write(part)
    found = preferences.read(part.preferences_path)
    assert [(r["prompt"], r["chosen"], r["rejected"]) for r in found] == [
        (r["prompt"], r["chosen"], r["rejected"]) for r in READY
    ]
    steps = part.funnel[part.funnel["unit"] == preferences.UNIT]
    assert steps["dropped"].tolist() == [0, 1, 1, 1, 1] and steps["kept"].iloc[-1] == len(READY)


def test_a_bad_record_is_named_and_nothing_is_written(tmp_path):
    path = tmp_path / "preferences_train.jsonl"
    with pytest.raises(ValueError, match="preference 2 for preferences_train.jsonl: the response is empty"):
        preferences.write([READY[0], READY[1] | {"chosen": ""}], path)
    assert not path.exists() and preferences.read(path) == []
    preferences.write(READY, path)
    assert preferences.read(path) == READY == [json.loads(line) for line in path.read_text().splitlines()]
    frame = preferences.as_pairs(READY)
    assert len(frame) == 2 * len(READY)


def test_own_preferences_are_read_and_written_by_both_notebooks(tmp_path, template):  # noqa: F811
    settings = settings_for(tmp_path, READY, validation_share=0.3)
    parts = [prepared_split(settings, split, template) for split in ("train", "validation")]
    found = [record for part in parts for record in preferences.read(part.preferences_path)]
    expected = {(record["prompt"], record["chosen"], record["rejected"]) for record in READY}
    assert {(r["prompt"], r["chosen"], r["rejected"]) for r in found} == expected and len(found) == len(READY)
    assert sum(len(part.pairs) for part in parts) == len(READY) and "rejected" not in parts[0].pairs.columns
    assert prepare.check_leaks(parts[1], template).to_numpy().sum() == 0


def turns(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def answer(text: str) -> dict:
    return {"role": "assistant", "content": text}


SAID = {"chosen": [answer("good")], "rejected": [answer("bad")]}
WHOLE = {"chosen": turns("Q", "good"), "rejected": turns("Q", "bad")}
HH = {side: f"\n\nHuman: Q\n\nAssistant: {text}" for side, text in (("chosen", "good"), ("rejected", "bad"))}
FORMS = {
    "TRL, explicit prompt": {"prompt": turns("Q"), **SAID},
    "TRL, implicit prompt": WHOLE,
    "UltraFeedback, binarised": {"prompt": "Q", "prompt_id": "1", "messages": turns("Q", "good"), **WHOLE}
    | {"score_chosen": 8.5, "score_rejected": 4.0},
    "the same from a CSV": {"prompt": "Q", "chosen": str(WHOLE["chosen"]), "rejected": json.dumps(WHOLE["rejected"])},
    "HH-RLHF": HH,
    "HH-RLHF, its question beside it": {"question": "Q"} | HH,
    "Orca": {"question": "Q", "chosen": "good", "rejected": "bad"},
    "Alpaca": {"instruction": "Q", "input": "", "chosen": "good", "rejected": "bad"},
    "ShareGPT": {
        "conversations": [{"from": "human", "value": "Q"}],
        "chosen": {"from": "gpt", "value": "good"},
        "rejected": {"from": "gpt", "value": "bad"},
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_chosen_and_rejected_are_read_in_the_forms_of_others(form):
    (pair,), faults = Reader().pairs(FORMS[form])
    assert (pair["prompt"], pair["history"], pair["response"], pair["rejected"]) == ("Q", [], "good", "bad")
    assert not faults


def test_a_shared_beginning_of_several_turns_is_the_history():
    shared = [{"role": "system", "content": "S"}, *turns("Q1", "A1", "Q2")]
    record = {"chosen": [*shared, answer("good")], "rejected": [*shared, answer("bad")]}
    ((pair,), _), ((parted,), _) = (
        (reader := Reader()).pairs(each)
        for each in (record, record | {"rejected": [*shared[:2], answer("other"), shared[3], answer("bad")]})
    )
    assert (pair["prompt"], pair["history"], pair["rejected"]) == ("Q2", shared[:3], "bad")
    assert "rejected" not in parted and reader.reasons.total() == 1, "they answer different conversations"


@pytest.mark.parametrize(
    ("scores", "preferred"), [((8, 4.5), True), (("7.5", "7"), True), ((5, 5.0), False), ((1, 2), False)]
)
def test_equal_scores_are_no_preference(scores, preferred):
    reader = Reader()
    (pair,), _ = reader.pairs(
        {"prompt": "Q"} | WHOLE | dict(zip(("score_chosen", "score_rejected"), scores, strict=True))
    )
    assert ("rejected" in pair) == preferred == (not reader.reasons)


@pytest.mark.parametrize("labels", [(True, False), ("True", "FALSE")])
def test_thumbs_up_and_down_on_one_prompt_are_a_preference(labels, tmp_path, template):  # noqa: F811
    up, down = ({"label": label} for label in labels)
    records = [{"prompt": f"Describe a {name}.", "completion": text} | thumb for name in QUESTIONS[:3]
               for text, thumb in (("Fine.", up), ("Dunno.", down))]  # fmt: skip
    records += [
        {"prompt": "Only down?", "completion": "Bad."} | down,
        {"prompt": "Only up?", "completion": "Good."} | up,
    ]
    for replies in ("best", "all"):
        part = prepared_split(settings_for(tmp_path, records, validation_share=0.0, replies=replies), "train", template)
        found = preferences.read(part.preferences_path)
        assert [(record["chosen"], record["rejected"]) for record in found] == [("Fine.", "Dunno.")] * 3
        written = pairs.read_jsonl(part.path)
        assert written["response"].tolist() == ["Fine."] * 3 + ["Good."], "nothing that people disliked is imitated"
        assert "liked" not in written.columns and "label" not in part.source.attrs["not_used"]
    other = [{"prompt": f"Say {name}.", "completion": name, "label": "positive"} for name in QUESTIONS]
    part = prepared_split(settings_for(tmp_path, other, validation_share=0.0), "train", template)
    assert len(part.pairs) == len(other) and not preferences.read(part.preferences_path)


@pytest.mark.parametrize(
    ("chosen", "rejected"), [("Yes.", " Yes.\n"), (" \n", "Yes."), ("Yes.", "\u2003"), ("", "Yes.")]
)
def test_what_differs_in_blanks_alone_is_no_preference(chosen, rejected):
    assert not differ(chosen, rejected) and differ("Yes.", "Yes, sir.")
    both = [
        {"prompt": "Q", "history": [], "response": text, "rank": rank} for rank, text in enumerate((chosen, rejected))
    ]
    assert preferences.of_siblings(both, ["q", "q"], "best-worst") == ([], [])
