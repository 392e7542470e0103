"""Of a folder's files, and of the configurations of a dataset, the right ones are read and the others are named."""

import shutil
from pathlib import Path

import pytest
from huggingface_hub.utils import filter_repo_objects
from test_own_data import LAYOUTS, prompts_of, write_layout

from llm_finetuning.data import own_data


def parts_of(source: object, **options) -> list[list[int]]:
    """The numbers of the files of which training and validation are, as `write_layout` wrote them."""
    return [sorted({int(prompt[1:]) // 20 for prompt in prompts}) for prompts in prompts_of(source, **options)]


@pytest.mark.parametrize(
    ("names", "train", "validation"),
    [
        (("pairs.jsonl", "dev.jsonl"), [0], [1]),
        (("sft.csv", "eval.csv"), [0], [1]),
        (("zebra.json", "a/testing.json"), [0], [1]),
        (("part1.jsonl", "part2.jsonl", "test.jsonl"), [0, 1], [2]),
        (("a.jsonl", "b.parquet", "evaluation/c.jsonl"), [0, 1], [2]),
        (("train_1.jsonl", "train_2.jsonl", "val.jsonl"), [0, 1], [2]),
        (("mine/Chats-2024-03.jsonl", "mine/chats.jsonl", "valid/1.jsonl"), [0, 1], [2]),
        (("train.jsonl", "dev-1.jsonl", "dev-02.jsonl"), [0], [1, 2]),
        (("train.jsonl", "validation.parquet"), [0], [1]),
        (("train1.jsonl", "train.parquet", "test.csv"), [0, 1], [2]),
        (("pairs.jsonl", ".ipynb_checkpoints/pairs-checkpoint.jsonl", "dev.jsonl"), [0], [2]),
    ],
)
def test_of_a_folder_everything_that_is_not_for_evaluation_is_for_training(names, train, validation, tmp_path):
    assert parts_of(write_layout(tmp_path, *names)) == [train, validation]
    said = own_data.reading_sentences(own_data.read_pairs(tmp_path, "validation"))
    assert "the source's split " in said and "not read" not in said


@pytest.mark.parametrize(
    ("names", "read", "ignored"),
    [
        (LAYOUTS["dev"], [[1], [2]], "x_train"),
        (("train.jsonl", "train.parquet", "dev.jsonl"), [[1], [2]], "train.jsonl"),
        (("train.jsonl", "extra.jsonl", "dev.jsonl"), [[0], [2]], "extra"),
    ],
)
def test_what_is_not_read_of_a_folder_is_named(names, read, ignored, tmp_path):
    assert parts_of(write_layout(tmp_path, *names)) == read
    assert f"; not read: {ignored}\n" in own_data.reading_sentences(own_data.read_pairs(tmp_path, "train"))


def test_one_of_several_numbered_files_can_be_chosen(tmp_path):
    folder = write_layout(tmp_path, "train_1.jsonl", "train_2.jsonl", "dev.jsonl")
    assert parts_of(folder, splits=("train_2", "")) == [[1], [2]]
    train, validation = prompts_of(write_layout(tmp_path / "two", "train_1.jsonl", "train_2.jsonl"))
    assert len(train) + len(validation) == 40 and not set(train) & set(validation)


def test_where_nothing_is_for_training_or_versions_differ_the_splits_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no split for training, only dev, test\. Set train_split to one\."):
        prompts_of(write_layout(tmp_path / "a", "dev.jsonl", "test.jsonl"))
    with pytest.raises(ValueError, match="several splits for train: train_v1, train_v2. Set train_split to one"):
        prompts_of(write_layout(tmp_path / "b", "train_v1.jsonl", "train_v2.jsonl"))
    assert parts_of(write_layout(tmp_path / "c", "test.jsonl"), validation_share=0.5) == [[0], [0]]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in for the Hub: hub(front matter, *names) → the folder into which only what is asked for is copied."""

    def serve(matter: str, *names: str) -> Path:
        repository, snapshot = write_layout(tmp_path / "repository", *names), tmp_path / "snapshots" / "0a1b"
        (repository / "README.md").write_text(f"---\nlicense: mit\n{matter}---\n# A dataset\n", encoding="utf-8")

        def snapshot_download(dataset: str, **options) -> str:
            for name in filter_repo_objects(["README.md", *names], allow_patterns=options["allow_patterns"]):
                (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(repository / name, snapshot / name)
            return str(snapshot)

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        return snapshot

    return serve


def matter_of(*names: str, more: str = "") -> str:
    """The front matter that push_to_hub writes for configurations of these names, in folders of their own."""
    entry = "- config_name: {0}\n  data_files:\n  - split: train\n    path: {0}/train-*\n{1}"
    test = "  - split: test\n    path: {0}/test-*\n"
    return "configs:\n" + "".join(entry.format(name, test.format(name) * (name == names[0])) for name in names) + more


FILES = ("main/train-00000-of-00001.parquet", "main/test-00000-of-00001.parquet", "other/train-00000-of-00001.parquet")


@pytest.mark.parametrize("matter", [matter_of("main", "other", more="  default: false\n"), matter_of("main", "other")])
def test_of_several_configurations_one_has_to_be_chosen(matter, hub):
    snapshot = hub(matter, *FILES)
    with pytest.raises(ValueError, match="the configurations main, other. Set source = 'openai/gsm8k, main'"):
        prompts_of("openai/gsm8k")
    assert [path.name for path in snapshot.rglob("*.*")] == ["README.md"]  # nothing is fetched in vain
    assert parts_of("openai/gsm8k, main") == [[0], [1]] and not (snapshot / "other").exists()
    assert parts_of("openai/gsm8k,other") == [[2], [2]]
    with pytest.raises(ValueError, match="no configuration 'socratic'; it has main, other"):
        prompts_of("openai/gsm8k, socratic")


@pytest.mark.parametrize(
    "matter",
    [
        matter_of("other", "main", more="  - split: test\n    path: main/test-*\n  default: true\n"),
        matter_of("main", "other").replace("name: main", "name: default"),
        "configs:\n- config_name: main\n  data_dir: main\n  default: true\n- {config_name: b, data_files: other/*}\n",
        "configs:\n- {config_name: a, data_files: 'main/**', default: true}\n- {config_name: b, data_files: '**/*'}\n",
    ],
)
def test_the_default_configuration_is_read_and_the_others_are_named(matter, hub):
    snapshot = hub(matter, *FILES)
    assert parts_of("someone/smoltalk") == [[0], [1]] and not (snapshot / "other").exists()
    frame = own_data.read_pairs("someone/smoltalk", "train")
    assert frame.attrs["source"] == "someone/smoltalk" and frame.attrs["revision"] == "0a1b"
    (other,) = frame.attrs["other_configurations"]
    assert f"configuration {frame.attrs['configuration']}; not read: {other}" in own_data.reading_sentences(frame)


def test_the_splits_of_a_card_need_no_names_of_their_own(hub):
    matter = "configs:\n- config_name: all\n  data_files:\n  - split: train\n    path: [data.csv, 'more/*.csv']\n"
    hub(f"{matter}  - split: test\n    path: ./holdout.csv\n", "data.csv", "more/2.csv", "holdout.csv")
    assert parts_of("someone/data") == [[0, 1], [2]]


@pytest.mark.parametrize("matter", ["", "configs: 7\n", "configs: [\n", "configs:\n- config_name: a\n- 5\n"])
def test_folders_are_no_configurations_where_no_card_says_so(matter, hub):
    hub(matter, "harmless/train.jsonl.gz", "helpful/train.jsonl.gz", "helpful/test.jsonl.gz")
    assert parts_of("Anthropic/hh-rlhf") == [[0, 1], [2]]


def test_a_card_leads_to_no_file_elsewhere(hub, tmp_path):
    write_layout(tmp_path, "a", "b", "secret.jsonl")
    elsewhere = f"../../secret.jsonl, '{tmp_path}/*.jsonl', 'https://example.org/x.jsonl'"
    hub(f"configs:\n- config_name: a\n  data_files: [train.jsonl, {elsewhere}]\n", "train.jsonl")
    assert parts_of("someone/data") == [[0], [0]]


def test_a_copy_of_a_dataset_has_its_configurations_too(tmp_path):
    folder = write_layout(tmp_path, *FILES)
    (folder / "README.md").write_text(f"---\n{matter_of('main', 'other')}---\n", encoding="utf-8")
    with pytest.raises(ValueError, match=f"the configurations main, other. Set source = '{folder}, main'"):
        prompts_of(folder)
    assert parts_of(f"{folder}, main") == [[0], [1]] and parts_of(folder / "other") == [[2], [2]]


def test_configurations_of_a_converted_dataset_are_chosen_by_name(hub):
    hub("", "main/train/0000.parquet", "main/test/0000.parquet", "other/train/0000.parquet")
    with pytest.raises(ValueError, match="the configurations main, other. Set source = 'openai/gsm8k, main'"):
        prompts_of("openai/gsm8k")
    assert parts_of("openai/gsm8k, other") == [[2], [2]] and parts_of("openai/gsm8k, main") == [[0], [1]]
