"""Reading any export: the same messages from every form of it, and bad input refused with file and line."""

import gzip
import json
import random
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mutations import mutated

from llm_finetuning.data import message_files, message_lines
from llm_finetuning.data.oasst import flatten, read_messages
from llm_finetuning.data.splits import in_split

LABELS = {"spam": {"value": 0.0, "count": 3}, "quality": {"value": 0.75, "count": 3}}


def node(name: str, role: str, *replies: dict, **fields) -> dict:
    """A message as the tree exports nest it."""
    message = {"message_id": name, "text": f"text of {name}", "role": role, "lang": "en", "labels": LABELS}
    return message | {"detoxify": {"toxicity": 0.25}} | fields | {"replies": list(replies)}


def tree(name: str) -> dict:
    last = node(f"{name}-5", "assistant")
    best = node(f"{name}-2", "assistant", node(f"{name}-4", "prompter", last), rank=0)
    worse = node(f"{name}-3", "assistant", rank=1, deleted=True, review_result=False, synthetic=True)
    root = node(name, "prompter", worse, best)
    return {"message_tree_id": name, "tree_state": "ready_for_export", "prompt": root}


def flat(trees: list[dict]) -> list[dict]:
    """The messages of nested trees as the flat exports list them."""
    messages = []

    def add(message: dict, parent: str | None, top: dict) -> None:
        own = {key: value for key, value in message.items() if key != "replies"}
        ids = {"message_tree_id": top["message_tree_id"], "tree_state": top["tree_state"], "parent_id": parent}
        messages.append(own | ids)
        for reply in message["replies"]:
            add(reply, message["message_id"], top)

    for top in trees:
        add(top["prompt"], None, top)
    return messages


def lines(records: list[dict]) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def parallel(labels: dict) -> dict:
    """Labels as the hub's rows hold them."""
    return {"name": list(labels)} | {key: [v[key] for v in labels.values()] for key in ("value", "count")}


def write_parquet(path: Path, messages: list[dict]) -> None:
    names = dict.fromkeys(name for message in messages for name in message)
    rows = [dict.fromkeys(names) | message | {"labels": parallel(message["labels"])} for message in messages]
    pq.write_table(pa.Table.from_pylist(rows), path)


TREES = [tree("t0"), tree("t1"), tree("t2")]


@pytest.fixture
def source(tmp_path):
    """source(content) → a file that holds it."""

    def write(content: bytes | list[dict], name: str = "messages.jsonl") -> Path:
        path = tmp_path / name
        path.write_bytes(lines(content) if isinstance(content, list) else content)
        return path

    return write


def test_every_form_of_an_export_gives_the_same_messages(source, tmp_path):
    write_parquet(tmp_path / "messages.parquet", flat(TREES))
    expected = read_messages(source(TREES, "a.trees.jsonl"))
    files = [
        source(flat(TREES), "b.messages.jsonl"),
        source(gzip.compress(lines(TREES)), "c.trees.jsonl.gz"),
        source(gzip.compress(lines(flat(TREES))), "d.messages.jsonl.gz"),
        source(b"\xef\xbb\xbf" + lines(TREES).replace(b"\n", b"\r\n\r\n"), "e.trees.jsonl"),
        source([m | {"labels": parallel(m["labels"])} for m in flat(TREES)], "f.messages.jsonl"),
        tmp_path / "messages.parquet",
    ]
    assert expected["message_id"].tolist()[:5] == ["t0", "t0-3", "t0-2", "t0-4", "t0-5"]
    assert expected["parent_id"].tolist()[:5] == [None, "t0", "t0", "t0-2", "t0-4"]
    assert expected["rank"].tolist()[1:3] == [1, 0] and expected["rank"].isna().sum() == 9
    assert expected.loc[1, ["deleted", "review_result", "synthetic"]].tolist() == [True, False, True]
    assert set(expected["quality"]) == {0.75} and set(expected["detoxify"]) == {0.25}
    for path in files:
        pd.testing.assert_frame_equal(read_messages(path), expected)
    children_first = read_messages(source(flat(TREES)[::-1], "g.messages.jsonl"))
    assert children_first["message_id"].tolist()[:5] == ["t2", "t2-2", "t2-4", "t2-5", "t2-3"]


def test_a_message_needs_only_its_ids_role_and_text(source):
    bare = [{"message_tree_id": "t", "message_id": "t", "role": "prompter", "text": "Q"}]
    bare += [{"message_tree_id": "t", "message_id": "a", "parent_id": "t", "role": "assistant", "text": "A"}]
    assert flatten(read_messages(source(bare))).pairs["response"].tolist() == ["A"]


def test_the_real_trees(real_trees):
    messages = read_messages(real_trees)
    assert messages["role"].value_counts().to_dict() == {"assistant": 687, "prompter": 480}
    assert messages["message_tree_id"].nunique() == 100
    assert len(messages.attrs["sha256"]) == 64


def test_the_splits_part_the_trees(source):
    path = source([tree(f"t{number}") for number in range(200)])
    train, validation = (read_messages(path, split, validation_share=0.2) for split in ("train", "validation"))
    trees = set(train["message_tree_id"]), set(validation["message_tree_id"])
    assert not trees[0] & trees[1] and len(trees[0] | trees[1]) == 200
    assert 25 <= len(trees[1]) <= 55
    assert trees[1] == in_split(trees[0] | trees[1], "validation", 0.2)
    assert flatten(validation).funnel["kept"].tolist()[:2] == [200, len(trees[1])]
    with pytest.raises(ValueError, match="split = 'test'"):
        read_messages(path, "test")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in for the Hub: hub(files) → calls; the dataset lies in a snapshot folder named by its commit."""

    def serve(**files: list[dict]) -> list:
        calls = []
        for name, messages in files.items():
            path = tmp_path / "snapshots" / "0123abc" / "data" / f"{name}-00000-of-00001-feed.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_parquet(path, messages)

        def snapshot_download(dataset, **options):
            calls.append((dataset, options["revision"]))
            return str(tmp_path / "snapshots" / "0123abc")

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        return calls

    return serve


def test_a_hub_dataset_keeps_its_own_splits_and_names_its_commit(hub):
    calls = hub(train=flat(TREES[:2]), validation=flat(TREES[2:]))
    train = read_messages("OpenAssistant/oasst1", "train", revision="v1")
    assert train["message_tree_id"].unique().tolist() == ["t0", "t1"]
    assert calls == [("OpenAssistant/oasst1", commit) for commit in ("v1", "0123abc")]  # the card, then the data
    assert train.attrs["revision"] == "0123abc"
    assert read_messages("OpenAssistant/oasst1", "validation")["message_tree_id"].unique().tolist() == ["t2"]
    assert read_messages("OpenAssistant/oasst1")["message_tree_id"].nunique() == 3


def test_a_hub_dataset_with_one_split_is_split_by_tree(hub):
    hub(train=flat([tree(f"t{number}") for number in range(60)]))
    parts = [read_messages("someone/oasst", split) for split in ("train", "validation")]
    assert sum(part["message_tree_id"].nunique() for part in parts) == 60 and len(parts[1]) > 0


def test_a_hub_dataset_without_the_split_says_which_it_has(hub):
    hub(train=flat(TREES[:1]), test=flat(TREES[1:]))
    with pytest.raises(ValueError, match="no split 'held_out'; it has test, train"):
        read_messages("someone/oasst", "validation", splits=("", "held_out"))


def edited(change) -> bytes:
    """The flat messages after `change(messages)`; the second tree begins on line 6."""
    messages = flat(TREES)
    change(messages)
    return lines(messages)


def set_on(line: int, **fields):
    return lambda messages: messages[line - 1].update(fields)


BROKEN = {
    "broken JSON": (lines(flat(TREES)).replace(b'"message_id": "t1-3"', b'"message_id" "t1-3"'), 7, "not valid JSON"),
    "wrong encoding": (lines(flat(TREES)).replace(b"text of t1-3", "größer".encode("latin-1")), 7, "not UTF-8"),
    "half a surrogate": (lines(flat(TREES)).replace(b"text of t1-3", rb"\ud83d"), 7, "surrogate"),
    "not an object": (lines(flat(TREES)[:7]) + b"[1, 2]\n" + lines(flat(TREES)[8:]), 8, "found list"),
    "cycle": (edited(set_on(8, parent_id="t1-4")), 8, "circle"),
    "orphan": (edited(set_on(9, parent_id="nobody")), 9, "orphan: its parent nobody"),
    "parent in another tree": (edited(set_on(9, parent_id="t0-2")), 9, "belongs to another tree"),
    "duplicate message id": (edited(set_on(7, message_id="t1-2")), 8, "t1-2 appears a second time"),
    "two first prompts": (edited(set_on(9, parent_id=None)), 9, "second message without a parent"),
    "unknown role": (edited(set_on(7, role="system")), 7, "role is 'system'"),
    "assistant at the root": (edited(set_on(6, role="assistant")), 6, "starts with role 'assistant'"),
    "two prompters in a row": (edited(set_on(7, role="prompter")), 7, "two messages in a row by the prompter"),
    "null text": (edited(set_on(7, text=None)), 7, "text is None"),
    "text that is a number": (edited(set_on(7, text=5)), 7, "text is 5"),
    "no message id": (edited(lambda messages: messages[6].pop("message_id")), 7, "neither a message"),
    "list as parent": (edited(set_on(7, parent_id=["t1"])), 7, "parent_id is"),
    "rank that is no number": (edited(set_on(7, rank="first")), 7, "rank is 'first'"),
    "deleted that is no switch": (edited(set_on(7, deleted="no")), 7, "deleted is 'no'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_bad_input_stops_with_file_and_line(name, source):
    content, line, problem = BROKEN[name]
    path = source(content)
    with pytest.raises(ValueError) as caught:
        read_messages(path)
    assert f"messages.jsonl, line {line}: " in str(caught.value) and problem in str(caught.value)
    assert 'on_error="skip"' in str(caught.value)


@pytest.mark.parametrize("name", BROKEN)
def test_bad_trees_are_skipped_counted_and_named_on_request(name, source):
    content, line, problem = BROKEN[name]
    messages = read_messages(source(content), on_error="skip")
    assert set(messages["message_tree_id"]) == {"t0", "t2"}
    skipped = messages.attrs["skipped"]
    assert any(entry["line"] == line and problem in entry["problem"] for entry in skipped)
    assert {entry["tree"] for entry in skipped} <= {"t1", None}
    trees = flatten(messages).funnel.query("unit == 'tree'")
    assert trees["kept"].iloc[-1] == 2 and trees["dropped"].sum() == trees["kept"].iloc[0] - 2 >= 1


def test_problems_of_several_kinds_come_in_the_order_of_their_lines(source):
    content = edited(lambda messages: (set_on(3, text=5)(messages), set_on(12, role="system")(messages)))
    path = source(content.replace(b'"message_id": "t1-3"', b'"message_id" "t1-3"'))
    trees = [tree(f"more {number}") for number in range(40)]
    path.write_bytes(path.read_bytes() + lines(flat(trees)))
    with pytest.raises(ValueError, match="line 3: text is 5"):
        read_messages(path)
    messages = read_messages(path, on_error="skip")
    assert [problem["line"] for problem in messages.attrs["skipped"]][:3] == [3, 7, 12]
    expected = read_messages(source(trees, "sound.jsonl"))
    pd.testing.assert_frame_equal(messages, expected)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda tree: tree["prompt"].update(replies={"a": 1}), "replies is"),
        (lambda tree: tree["prompt"].update(replies=[None]), "a reply is None"),
        (lambda tree: tree["prompt"]["replies"][0].update(parent_id="t7"), "parent_id is 't7'"),
        (lambda tree: tree["prompt"].pop("text"), "text is None"),
        (lambda tree: tree.update(prompt=None), "neither a message"),
        (lambda tree: tree.update(message_tree_id=7), "message_tree_id is 7"),
    ],
)
def test_a_bad_nested_tree_is_named_by_its_line_or_skipped(change, problem, source):
    bad = tree("t1")
    change(bad)
    path = source([TREES[0], bad, TREES[2]])
    with pytest.raises(ValueError, match=r"line 2: .*" + problem):
        read_messages(path)
    assert set(read_messages(path, on_error="skip")["message_tree_id"]) == {"t0", "t2"}


@pytest.mark.parametrize("on_error", ["raise", "skip"])
@pytest.mark.parametrize(
    ("content", "name", "problem"),
    [
        (b"", "empty.jsonl", "is empty"),
        (b"\n \n", "blank.jsonl", "has no lines"),
        (gzip.compress(b""), "empty.jsonl.gz", "has no lines"),
        (gzip.compress(lines(TREES * 50))[:-20], "cut.jsonl.gz", "cut off or damaged"),
        (b"PAR1" + b"\0" * 64, "damaged.parquet", "not a complete parquet file"),
    ],
)
def test_a_file_that_is_not_whole_is_refused(content, name, problem, on_error, source):
    with pytest.raises(ValueError, match=f"{name}.*{problem}"):
        read_messages(source(content, name), on_error=on_error)


def test_a_source_of_broken_trees_alone_is_refused(source):
    with pytest.raises(ValueError, match=r"no sound tree.*line 1: not valid JSON"):
        read_messages(source(b"{\n"), on_error="skip")


def test_a_folder_a_missing_file_and_an_unknown_choice_are_refused(tmp_path, source):
    with pytest.raises(ValueError, match="is a folder"):
        read_messages(tmp_path)
    for missing in (tmp_path / "no.jsonl", "data/no.jsonl", "no.parquet", "nowhere"):
        with pytest.raises(FileNotFoundError, match="not found"):
            read_messages(missing)
    with pytest.raises(ValueError, match="on_error = \"ignore\"|on_error = 'ignore'"):
        read_messages(source(TREES), on_error="ignore")


def test_parquet_names_the_row_and_the_missing_column(tmp_path):
    messages = flat(TREES)
    messages[6]["text"] = None
    write_parquet(tmp_path / "a.parquet", messages)
    with pytest.raises(ValueError, match=r"a\.parquet, row 7: text is None"):
        read_messages(tmp_path / "a.parquet")
    assert read_messages(tmp_path / "a.parquet", on_error="skip")["message_tree_id"].nunique() == 2
    pq.write_table(pa.table({"text": ["a"], "role": ["prompter"]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match="no column message_tree_id, message_id"):
        read_messages(tmp_path / "b.parquet")


def test_a_chain_of_ten_thousand_messages_is_read_flat_and_refused_nested(source):
    roles = ("prompter", "assistant")
    chain = [
        {"message_tree_id": "m0", "message_id": f"m{n}", "role": roles[n % 2], "text": str(n)}
        | ({"parent_id": f"m{n - 1}"} if n else {})
        for n in range(10_000)
    ]
    assert read_messages(source(chain))["text"].tolist() == [str(n) for n in range(10_000)]
    assert len(read_messages(source(chain[::-1]))) == 10_000
    nested = '{"message_id": "m", "role": "prompter", "text": "", "replies": [' * 10_000 + "]}" * 10_000
    path = source(('{"prompt": ' + nested + "}\n").encode())
    with pytest.raises(ValueError, match="line 1: nested too deeply"):
        read_messages(path)


def test_a_message_of_a_million_characters(source):
    long = tree("t1")
    long["prompt"]["text"] = "Größe 😀 " * 125_000
    messages = read_messages(source([TREES[0], long]))
    assert messages["text"].str.len().max() == 1_000_000


@pytest.mark.parametrize("form", ["trees", "messages", "gzip", "parquet"])
def test_a_mutated_file_gives_messages_or_the_documented_error(form, source, tmp_path):
    chance = random.Random(form)
    content = lines(flat(TREES) if form == "messages" else TREES)
    if form == "gzip":
        content = gzip.compress(content, mtime=0)
    if form == "parquet":
        write_parquet(tmp_path / "whole.parquet", flat(TREES))
        content = (tmp_path / "whole.parquet").read_bytes()
    outcomes = {"read": 0, "refused": 0}
    for _ in range(150):
        path = source(mutated(content, chance), "fuzz.jsonl")
        for on_error in ("raise", "skip"):
            try:
                messages = read_messages(path, on_error=on_error)
            except ValueError as error:
                outcomes["refused"] += 1
                assert "fuzz.jsonl" in str(error)
            else:
                outcomes["read"] += 1
                recipe = chance.choice(("best", "all", "joined"))
                flatten(messages, recipe, languages=["en"], min_quality=0.5, drop_duplicates=True)
    assert min(outcomes.values()) >= 10, outcomes


def outcome(path: Path, on_error: str) -> pd.DataFrame | str:
    try:
        return read_messages(path, on_error=on_error)
    except ValueError as error:
        return str(error)


def nothing_at_once(path: Path) -> Iterator:
    yield from ()
    return 0


@pytest.mark.parametrize("form", ["trees", "messages", "hub", "both", "gzip"])
def test_what_is_read_at_once_is_what_the_careful_reader_makes_of_it(form, source, monkeypatch):
    chance, hub = random.Random(form), [m | {"labels": parallel(m["labels"])} for m in flat(TREES)]
    content = lines({"trees": TREES, "hub": hub, "both": [*TREES[:2], *hub[10:]]}.get(form, flat(TREES)))
    kinds = set()
    for _ in range(100):
        changed = mutated(content, chance).replace(b"\n", chance.choice((b"\n", b"\r\n \n")))
        path = source(gzip.compress(changed, mtime=0)[: chance.choice((None, -9))] if form == "gzip" else changed)
        monkeypatch.setattr(message_lines, "BLOCK", chance.choice((1, 900, 1 << 20)))
        on_error = chance.choice(("raise", "skip"))
        found = outcome(path, on_error)
        with monkeypatch.context() as patch:
            patch.setattr(message_files, "sound_blocks", nothing_at_once)
            expected = outcome(path, on_error)
        kinds.add(type(found))
        if isinstance(expected, str):
            assert found == expected
        else:
            pd.testing.assert_frame_equal(found, expected)
            assert found.attrs == expected.attrs
    assert kinds == {str, pd.DataFrame}


ODD = {
    "rank_as_a_fraction": {"rank": 1.0},
    "rank_too_large": {"rank": 10**12},
    "numbers_for_texts": {"lang": 5},
    "one_for_true": {"deleted": 1},
    "label_as_text": {"labels": {"name": ["quality"], "value": ["0.5"], "count": [1]}},
    "label_without_entry": {"labels": {"quality": 0.5}},
    "label_huge": {"labels": {"name": ["quality"], "value": [1e12], "count": [1]}},
    "labels_as_entries": {"labels": [{"name": "quality", "value": 0.5}]},
    "fewer_values_than_names": {"labels": {"name": ["toxicity", "quality"], "value": [0.5]}},
    "names_alone": {"labels": {"name": ["quality"], "quality": {"value": 0.25}}},
    "detoxify_null": {"detoxify": {"toxicity": None}},
    "prompt_as_text": {"prompt": "text"},
    "half_a_pair": {"text": "\ud800"},
    "half_a_pair_elsewhere": {"user_id": "\udfff"},
    "large_whole_number_elsewhere": {"review_count": 10**40},
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_value_is_read_at_once_as_carefully(name, source, monkeypatch):
    messages = flat(TREES)
    messages[7] |= ODD[name]
    path = source("".join(json.dumps(message) + "\n" for message in messages).encode())
    found = [outcome(path, on_error) for on_error in ("raise", "skip")]
    monkeypatch.setattr(message_files, "sound_blocks", nothing_at_once)
    for one, expected in zip(found, [outcome(path, on_error) for on_error in ("raise", "skip")], strict=True):
        assert type(one) is type(expected) and (one == expected if isinstance(one, str) else one.equals(expected))


def test_bytes_that_are_no_utf8_are_named_wherever_they_stand(source):
    messages = lines([message | {"user_id": "someone"} for message in flat(TREES)])
    path = source(messages.replace(b"someone", b"some\xffone", 3))
    with pytest.raises(ValueError, match="line 1: not UTF-8"):
        read_messages(path)
