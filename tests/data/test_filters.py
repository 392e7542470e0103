"""Filters say what they took and how to turn them off; siblings, personas and shortened histories are counted."""

import dataclasses
import json
from collections import Counter

import pandas as pd
import pytest
from test_prepare import prepared_split, template, tree  # noqa: F401 (template is a fixture)

from llm_finetuning.data import own_data, pairs, prepare, reports
from llm_finetuning.data.filters import speaks
from llm_finetuning.data.funnel import UNDECIDED, Funnel, large_losses
from llm_finetuning.data.oasst import flatten, read_messages
from llm_finetuning.data.recipes import prompters_of
from llm_finetuning.data.splits import in_split
from llm_finetuning.settings import DataPrep


def settings_for(tmp_path, records: list[dict], **given) -> DataPrep:
    source = tmp_path / "own.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    folder = str(tmp_path / "drive")
    given = {"max_seq_length": 400} | given
    return DataPrep(drive_folder=folder, source=str(source), system_message="Be brief.", **given)


QUESTIONS = ["fjord", "volcano", "glacier", "harbour", "lighthouse", "island", "mountain", "river", "forest", "bridge"]
OWN = [
    {"prompt": f"Tell me something about a {name}.", "response": f"A {name} it is.", "lang": "de"} for name in QUESTIONS
]
TREES = [tree(f"t{n}", f"What is a {name}?", f"A {name}.", "Something.") for n, name in enumerate(QUESTIONS)]


@pytest.mark.parametrize(
    ("records", "given", "message"),
    [
        (OWN, {"languages": "en"}, r"language en dropped 10 of 10 pairs: set languages = ''"),
        (OWN, {"languages": "", "min_response_chars": 500}, r"500 characters dropped 10 of 10 pairs: set min_response"),
        (
            OWN,
            {"languages": "", "max_seq_length": 16},
            r"in tokens dropped 10 of 10 .* drop_too_long = 'no'",
        ),
        (TREES, {"languages": "fr"}, r"language fr dropped 30 of 30 messages: set languages = ''"),
        (TREES, {"tree_states": "growing"}, r"state growing dropped 10 of 10 trees: set tree_states = ''"),
        (TREES, {"min_response_chars": 500}, r"500 characters dropped 20 of 30 messages: set min_response_chars = 0"),
        ([tree("t", "Nobody?")], {}, "it has no prompt with a reply"),
    ],
)
def test_nothing_left_names_the_step_and_the_parameter(records, given, message, tmp_path, template):  # noqa: F811
    settings = settings_for(tmp_path, records, **{"validation_share": 0.0} | given)
    with pytest.raises(ValueError, match=f"nothing is left: .*{message}"):
        prepare.prepare(settings, prepare.read(settings, "train"), template)


def test_a_leak_check_that_would_take_everything_says_so(tmp_path, template):  # noqa: F811
    settings = settings_for(tmp_path, OWN, languages="", validation_share=0.5)
    _, validation = (prepared_split(settings, split, template) for split in ("train", "validation"))
    train = settings.folders.train_file
    pairs.write_jsonl([{"prompt": validation.pairs["prompt"].iloc[0], "response": "A"}], train)
    before = train.read_bytes()
    with pytest.raises(ValueError, match=r"took all 1 pairs .* \(tree: 0|\(prompt: 1\).*remove_leaks = False"):
        prepare.check_leaks(validation, template)
    assert train.read_bytes() == before


def test_without_a_validation_share_everything_is_training(tmp_path, template):  # noqa: F811
    settings = settings_for(tmp_path, TREES, validation_share=0.5)
    assert len(prepared_split(settings, "validation", template).pairs)
    settings = dataclasses.replace(settings, validation_share=0.0)
    train, validation = (prepared_split(settings, split, template) for split in ("train", "validation"))
    assert len(train.pairs) == 10 and validation.is_empty
    assert not settings.folders.val_file.exists() and not settings.folders.val_preferences.exists()
    assert prepare.save_figures(validation) == [] and not len(prepare.check_leaks(validation, template))
    sentences = (prepare.written_sentence, prepare.loss_sentences, prepare.counts_sentence, prepare.leak_sentence)
    assert {sentence(validation) for sentence in sentences} == {prepare.NO_VALIDATION}


@pytest.mark.parametrize("share", [1e-6, 0.1, 0.5, 0.999])
def test_each_side_of_a_split_gets_a_tree(share):
    for number in (2, 3, 50):
        trees = [f"t{n}" for n in range(number)]
        sides = [in_split(trees, split, share) for split in ("train", "validation")]
        assert all(sides) and sides[0] | sides[1] == set(trees) and not sides[0] & sides[1]
    with pytest.raises(ValueError, match="validation_share"):
        in_split(["t", "t"], "train", share)


@pytest.mark.parametrize("lang", ["en", "EN", "en-US", "en_GB", "En-Latn"])
def test_languages_are_compared_by_main_subtag(lang):
    assert speaks(lang, ["en"]) and speaks("en", [lang]) and not speaks(lang, ["enm", "de"])
    assert speaks(None, ["de"])


def test_a_filter_that_takes_much_shows_what_it_took():
    funnel = Funnel()
    funnel.step("read", "pair", 10)
    funnel.step(
        "prompt new", "pair", 6, "set near_duplicates = 0", [{"prompt": f"P{n}", "like": "Q"} for n in range(4)]
    )
    funnel.step("long enough", "pair", 5, "set min_response_chars = 0", [{"prompt": "Z"}])
    said = large_losses(funnel.frame())
    assert "prompt new dropped 4 of 10 pairs (40%); set near_duplicates = 0" in said
    assert "prompt: 'P2'; like: 'Q'" in said and "P3" not in said and "long enough" not in said


def test_the_report_holds_examples_of_every_step(tmp_path, template):  # noqa: F811
    twice = [*OWN, OWN[0] | {"prompt": OWN[0]["prompt"].upper(), "response": "Another one."}]
    part = prepared_split(settings_for(tmp_path, twice, languages="", validation_share=0.0), "train", template)
    (example,) = reports.read_report(part.path)["dropped_examples"]["prompt not seen before"]
    assert example == {"prompt": twice[-1]["prompt"], "response": "Another one.", "like": OWN[0]["prompt"]}


def test_templated_own_data_goes_through_both_notebooks(tmp_path, template):  # noqa: F811
    text = "Explain the word in one short sentence that a child understands, without difficult words. " * 3
    records = [{"prompt": f"{text}{a} {b}", "response": f"About {a} {b}"} for a in QUESTIONS for b in QUESTIONS[:6]]
    settings = settings_for(tmp_path, records)
    parts = [prepared_split(settings, split, template) for split in ("train", "validation")]
    assert sum(len(part.pairs) for part in parts) == 60
    assert prepare.check_leaks(parts[1], template).to_numpy().sum() == 0


def test_siblings_in_own_data_are_no_duplicates(tmp_path):
    records = [
        {"prompt": "Q", "response": text, "rank": rank} for text, rank in (("B", 1), ("A", 0), ("C", 2), ("A", 0))
    ]
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    read = own_data.read_pairs(path)
    every = own_data.flatten_pairs(read, replies="all", drop_duplicates=True)
    assert every.pairs["response"].tolist() == ["B", "A", "C"]
    best = own_data.flatten_pairs(read, replies="best", drop_duplicates=True)
    assert best.pairs["response"].tolist() == ["A"]
    assert [(p["chosen"], p["rejected"]) for p in best.preferences] == [("A", "C")]


@pytest.mark.parametrize("unranked", [40, 2, 1])
def test_responses_go_without_a_rank_only_by_a_step_that_says_so(unranked, tmp_path, template):  # noqa: F811
    jokes = [(n, k) for n in range(unranked) for k in "ab"]
    records = [{"prompt": f"A joke about {n * 7919}?", "response": f"{n} and {k}"} for n, k in jokes]
    records += [
        {"prompt": f"A word for {n * 104729}?", "response": text, "rank": rank}
        for n in range(60)
        for text, rank in ((f"Worse {n}", 1), (f"Better {n}", 0))
    ]
    settings = settings_for(tmp_path, records, validation_share=0.0, near_duplicates=0.0)
    part = prepared_split(settings, "train", template)
    steps = part.funnel.set_index("step")["dropped"]
    assert steps["preferred to its siblings"] == 60 and steps[UNDECIDED] == unranked
    said, came = prepare.loss_sentences(part), 60 + 2 * unranked
    if unranked == 1:  # too few for a sentence
        assert "No filter took more than 30%" in said
    else:
        assert f"{UNDECIDED} dropped {unranked} of {came} pairs ({unranked / came:.0%}); set replies = 'all'" in said
        assert "prompt: 'A joke about 0?'; response: '0 and b'" in said and "No filter took" not in said
    every = prepared_split(dataclasses.replace(settings, replies="all"), "train", template)
    assert len(every.pairs) == len(records) and "No filter took" in prepare.loss_sentences(every)


def test_where_ranks_or_labels_decide_no_step_says_otherwise(tmp_path, template):  # noqa: F811
    part = prepared_split(settings_for(tmp_path, TREES, validation_share=0.0), "train", template)
    assert len(part.pairs) == 10 and UNDECIDED not in part.funnel["step"].tolist()
    assert "No filter took more than 30%" in prepare.loss_sentences(part)


def threads(messages: pd.DataFrame) -> list[dict]:
    """Every way from a first prompt to a last reply, as a chat."""
    by_id = messages.set_index("message_id").to_dict("index")
    answered = set(messages["parent_id"].dropna())
    chats = []
    for name in messages.loc[~messages["message_id"].isin(answered), "message_id"]:
        turns = []
        while isinstance(name, str):
            role = {"prompter": "user", "assistant": "assistant"}[by_id[name]["role"]]
            turns.insert(0, {"role": role, "content": by_id[name]["text"]})
            name = by_id[name]["parent_id"]
        turns = turns[: len(turns) // 2 * 2]
        chats += [{"messages": turns}] if turns else []
    return chats


def test_the_real_threads_as_chats_give_the_trees_replies(real_trees, tmp_path):
    messages = read_messages(real_trees)
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(chat) + "\n" for chat in threads(messages)), encoding="utf-8")
    found = own_data.flatten_pairs(own_data.read_pairs(path), replies="all", drop_duplicates=True, near_duplicates=0.9)

    def keys(rows: pd.DataFrame) -> set[tuple]:
        turns = [tuple(turn["content"] for turn in history) for history in rows["history"]]
        return set(zip(rows["prompt"], rows["response"], turns, strict=True))

    expected = keys(flatten(messages, "all").pairs)
    assert keys(found.pairs) == expected and len(found.pairs) == len(expected) > 600


def test_shortened_histories_are_counted(tmp_path, template):  # noqa: F811
    turns = [{"role": ("user", "assistant")[n % 2], "content": "x" * 60} for n in range(6)]
    records = [{"prompt": "Short?", "response": "Yes.", "history": turns[:2]}]
    records += [{"prompt": "Long?", "response": "No.", "history": turns}]
    records += [{"prompt": "y" * 300, "response": "None.", "history": turns[:2]}]
    part = prepared_split(settings_for(tmp_path, records, languages="", validation_share=0.0), "train", template)
    assert part.pairs["history"].map(len).tolist() == [2, 4, 0]
    assert reports.read_report(part.path)["shortened"] == {"pairs": 2, "without_history": 1}
    assert part.funnel.attrs["notes"]["short enough in tokens"].startswith("2 pairs lost their oldest turns, 1 of them")
    assert "2 pairs lost their oldest turns, 1 of them all turns" in prepare.written_sentence(part)


def test_prompts_without_a_pair_are_counted_by_where_they_lost_their_last_reply(tmp_path, template):  # noqa: F811
    records = [
        *TREES[:3],
        tree("n", "Nobody?"),
        tree("s", "Short one?", "A"),
        tree("d", "Und auf Deutsch?", "Ja!", lang="de"),
    ]
    part = prepared_split(settings_for(tmp_path, records, validation_share=0.0), "train", template)
    report = reports.read_report(part.path)
    expected = {"no reply in the source": 1, "reply of at least 2 characters": 1, "language en": 1}
    assert report["prompts_without_pair"] == expected
    assert report["shape"]["replies to a prompt"] == {
        "in the source": {"0": 1, "1": 2, "2": 3},
        "after the filters": {"2": 3},
    }
    assert report["shape"]["turns before a prompt"] == {"in the source": {"0": 6}, "after the filters": {"0": 3}}


def test_pairs_have_one_prompter_where_prompt_and_history_are_equal():
    turns = [{"role": role, "content": text} for role, text in (("user", "Q"), ("assistant", "A"), ("system", "Q"))]
    ways = [[], [0], [0, 1], [1], [0, 1], [2], [1, 0], [0, 1, 0, 1], [0, 1, 0], [], [0, 1, 0, 1], [0, 1], [2, 0, 1]]
    histories = [[dict(turns[place]) for place in way] for way in ways]
    pairs_of_all = [{"prompt": prompt, "history": history} for history in histories for prompt in ("P", "Q", "P")]
    found = prompters_of(pairs_of_all)
    for one, name in zip(pairs_of_all, found, strict=True):
        assert [name == other for other in found] == [one == other for other in pairs_of_all]


def test_the_history_of_a_long_chat_is_read_once():
    read = Counter()

    class Turn(dict):
        def __getitem__(self, key: str) -> str:
            read[key] += 1
            return super().__getitem__(key)

    chat = [Turn(role=("user", "assistant")[n % 2], content=f"Turn {n}") for n in range(400)]
    pairs_of_chat = [{"prompt": chat[at].get("content"), "history": chat[:at]} for at in range(0, 400, 2)]
    assert len(set(prompters_of(pairs_of_chat))) == 200 and read["content"] < 400
