"""`search`: what is refused before anything runs, what the table says, and trainings under Optuna."""

import json
import os
import signal
import subprocess
import sys

import pytest
import yaml
from headless import ROOT
from training_fixtures import SMALL, small_pairs, write_lines

from llm_finetuning.evaluation.intervals import Sample
from llm_finetuning.runner import search, search_report
from llm_finetuning.runner.search_report import Row
from llm_finetuning.settings import Finetuning


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """asked(*(name, values), …) → the request of a search on the sample, whether Optuna is installed or not."""
    monkeypatch.setattr(search.importlib.util, "find_spec", lambda name: name)
    return lambda *typed, **options: search.request("sample", tmp_path / "out", list(typed), **options)


def test_the_combinations_of_all_values_are_tried_with_each_seed(asked):
    made = asked(("learning_rate", "1e-4, 2e-4,1e-4"), ("lora_r", "16,64"), ("packing", "true,False"), seeds=2)
    assert made.values == {"learning_rate": [1e-4, 2e-4], "lora_r": [16, 64], "packing": [True, False]}
    assert len(made.combinations) == 8 and made.seeds == [42, 43]
    chosen = made.settings_of(made.combinations[-1])
    assert (chosen.learning_rate, chosen.lora_r, chosen.packing, chosen.tokens_per_step) == (2e-4, 64, False, 1024)


def test_one_value_is_shared_with_the_data_notebooks_and_seeds_may_be_named(asked):
    made = asked(("lora_r", "4,8"), ("max_seq_length", "128"), ("seed", "5,7"), ("source", "my,chats"))
    assert made.fixed.max_seq_length == 128 and made.seeds == [5, 7] and made.fixed.seed == Finetuning().seed
    assert [values["source"] for values in made.data] == ["my,chats"] * 2 and "seed" not in made.values


def test_texts_that_hold_commas_are_a_yaml_list(asked):
    made = asked(("lora_target_modules", '["q_proj, k_proj", all-linear]'), ("own_questions", "[one, two]"))
    assert made.values == {"lora_target_modules": ["q_proj, k_proj", "all-linear"]}
    assert made.fixed.own_questions == ["one", "two"]


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ([("learning_rat", "1e-4,2e-4")], ["learning_rat: no notebook has this parameter; did you mean learning_rate"]),
        ([("lora_r", "16,,64")], ["lora_r = '16,,64': a value is missing"]),
        ([("lora_r", "")], ["lora_r = '': a value is missing"]),
        ([("lora_r", ",")], ["lora_r = ',': a value is missing"]),
        ([("lora_r", "[]")], ["lora_r = '[]': a value is missing"]),
        ([("lora_r", "16,many")], ["lora_r = 'many': expected int, found str"]),
        ([("lora_r", "16,2.5")], ["lora_r = 2.5: expected int, found float"]),
        ([("packing", "True,maybe")], ["packing = 'maybe': expected True or False"]),
        ([("learning_rate", "1e-4,-1")], ["learning_rate = -1"]),
        ([("seed", "1,x"), ("lora_r", "1,2")], ["seed = 'x': expected int"]),
        ([("drive_folder", "a,b")], ["drive_folder: the runner sets it; choose the folder with --output"]),
        ([("find_learning_rate", "True,False")], ["find_learning_rate: it is a search of its own"]),
        ([("max_seq_length", "256,4096")], ["tokens_per_step = 1024: at least max_seq_length (4096)"]),
        ([("lora_r", "16")], ["nothing to compare"]),
        ([("seed", "1,2")], ["nothing to compare"]),
        ([("lora_r", "16,16")], ["nothing to compare"]),
        ([("lora_r", "16"), ("lora_r", "64")], ["lora_r is given twice: give its values as lora_r A,B"]),
        ([("lora_r", "8,16"), ("lora_r", "64")], ["lora_r is given twice"]),
        ([("replies", "best,all")], ["nothing to compare", "replies decides the data", "--output of its own"]),
        ([("replies", "best,all"), ("lora_r", "4,8")], ["replies = 'best,all'", "replies decides the data"]),
        ([("validation_share", "0.1,0.2"), ("lora_r", "4,8")], ["validation_share decides the data"]),
        (
            [("lora_r", "a,0"), ("lora_alpha", "1,,"), ("loralpha", "1,2"), ("learning_rate", "x")],
            ["lora_r = 'a'", "lora_r = 0", "lora_alpha = '1,,'", "loralpha: no", "learning_rate = 'x'"],
        ),
    ],
)
def test_what_cannot_be_searched_is_one_error(asked, tmp_path, typed, said):
    with pytest.raises(ValueError) as error:
        asked(*typed)
    assert all(part in str(error.value) for part in said), error.value
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (("replies", "all"), "replies = 'all': the data in .* was made with 'best'; leave it out, or set --output"),
        (("source", "sample"), None),
        (("replies", "best"), None),
        (("languages", "en,de"), "languages = 'en,de': .* made with 'en'"),
    ],
)
def test_data_that_was_made_otherwise_is_not_taken_for_what_was_typed(asked, tmp_path, typed, said):
    """A finished folder has its data: no data notebook runs again for a search."""
    train = tmp_path / "out" / "data" / "finetuning_data_train.jsonl"
    write_lines(train, small_pairs())
    report = {"recipe": {"replies": "best", "languages": "en"}, "source": {"source": "sample"}}
    train.with_suffix(".report.json").write_text(json.dumps(report))
    if said is None:
        assert asked(typed, ("lora_r", "4,8")).values == {"lora_r": [4, 8]}
    else:
        with pytest.raises(ValueError, match=said):
            asked(typed, ("lora_r", "4,8"))


def test_without_optuna_the_cure_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(search.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install -r requirements-search.txt"):
        search.request("sample", tmp_path, [("lora_r", "1,2")])
    assert (ROOT / "requirements-search.txt").read_text().count(search.REQUIREMENT) == 1


def row(rate: str, *means: float | None) -> Row:
    """A combination whose 12 held-out pairs of one token each lie around a mean for each seed."""
    samples = [
        None if mean is None else Sample([mean + unit / 100 for unit in range(12)], [1.0] * 12) for mean in means
    ]
    return Row({"learning_rate": rate}, dict(enumerate(samples)))


def test_the_table_sorts_and_says_what_is_apart():
    rows = [row("3e-3", 2.0), row("1e-3", None), row("1e-4", 1.2, 1.1, 1.1), row("2e-4", 1.0, 1.2, 1.1)]
    table = search_report.table(rows)
    assert list(table.learning_rate) == ["2e-4", "1e-4", "3e-3", "1e-3"]
    assert list(table.seeds) == [3, 3, 1, 1] and table["held-out loss"].iloc[3] == "not finite"
    assert table["worse with"].iloc[1] == "1 of 3 seeds"
    assert table["worse with"].iloc[2] == "1 of 1 seeds" and table.iloc[2, -1] == "worse"
    assert "n = 12" in table["held-out loss"].iloc[0]


def test_a_difference_is_apart_only_where_its_interval_excludes_zero():
    clear = search_report.verdict([row("a", 1.0, 1.0), row("b", 1.5, 1.5)])
    assert clear.startswith("best: learning_rate = a") and "excludes zero" in clear
    noisy = Row({"learning_rate": "b"}, {0: Sample([1.5, 0.6] * 6, [1.0] * 12)})
    assert "does not exclude zero" in search_report.verdict([row("a", 0.95), noisy])
    assert search_report.verdict([row("a", None), row("b", None)]).startswith("the loss was finite nowhere")
    assert search_report.verdict([row("a", 1.0), row("b", None)]) == "best: learning_rate = a"


@pytest.fixture
def small(tmp_path, tiny_base):
    """(profile, output folder with pairs) of a search that takes seconds."""
    profile, output = tmp_path / "small.yaml", tmp_path / "out"
    profile.write_text(yaml.safe_dump(SMALL | {"model_name": str(tiny_base), "eval_pairs": 24, "lora_dropout": 0.0}))
    for name in ("train", "val"):
        write_lines(output / "data" / f"finetuning_data_{name}.jsonl", small_pairs())
    return profile, output


TYPED = [("learning_rate", "1e-2,1e-6"), ("lora_r", "4")]


@pytest.mark.more
def test_a_search_prunes_and_trains_nothing_twice(small, monkeypatch, capsys):
    pytest.importorskip("optuna")
    from llm_finetuning.runner import study

    profile, output = small

    def searched(*typed) -> tuple[list[dict], str, int]:
        trained = []
        with monkeypatch.context() as patch:
            measured = study.rate_search.measured
            patch.setattr(study.rate_search, "measured", lambda made: trained.append(made) or measured(made))
            study.run(search.request(str(profile), output, [*typed], 2, 3))
        return json.loads((output / "search" / "search.json").read_text()), capsys.readouterr().out, len(trained)

    found, said, trained = searched(*TYPED)
    assert [each["values"]["learning_rate"] for each in found] == ["0.01", "1e-06"]
    assert [len(each["by seed"]) for each in found] == [2, 1] and trained == 3  # the second rate after one seed
    assert "best: learning_rate = 0.01" in said and "excludes zero" in said and "2 combinations × 2 seeds" in said
    assert searched(*TYPED)[0] == found and searched(*TYPED)[2] == 0
    more, said, trained = searched(("learning_rate", "1e-2,1e-6,2e-2"))
    assert trained == 2 and len(more) == 3 and "3 were trained before" in said
    assert sorted(path.name for path in (output / "search").iterdir() if path.is_dir()) == []


@pytest.mark.more
def test_losses_that_do_not_compare_are_refused(small, tmp_path):
    pytest.importorskip("optuna")
    from llm_finetuning.runner import study

    profile, output = small
    template = tmp_path / "loud.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.role == 'assistant' %}A: {% generation %}{{ m.content }}!!!{{ eos_token }}"
        "{% endgeneration %}{% else %}{{ m.role }}: {{ m.content }}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}A: {% endif %}"
    )
    with pytest.raises(ValueError, match="chat_template = .*losses per token do not compare"):
        study.run(search.request(str(profile), output, [("chat_template", f'["", "{template}"]')], 1, 1))
    study.run(search.request(str(profile), output, [("max_seq_length", "64,96"), ("system_message", "A,B")], 1, 1))
    assert len(json.loads((output / "search" / "search.json").read_text())) == 4


@pytest.mark.more
@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (("save_steps", "10,20"), "save_steps = 10 and save_steps = 20 come to the same training"),
        (("merge_base", "best,original"), "merge_base = best and merge_base = original"),
        (("max_steps", "10,20"), "max_steps = 10 and max_steps = 20"),
    ],
)
def test_values_that_change_nothing_are_refused_before_anything_is_trained(small, monkeypatch, typed, said):
    pytest.importorskip("optuna")
    from llm_finetuning.runner import study

    profile, output = small
    monkeypatch.setattr(study.rate_search, "measured", lambda made: pytest.fail("trained"))
    with pytest.raises(ValueError, match=said):
        study.run(search.request(str(profile), output, [typed], 1, 2))


@pytest.mark.more
def test_a_second_search_in_the_folder_is_refused_while_one_is_at_work(small, monkeypatch):
    pytest.importorskip("optuna")
    from llm_finetuning.runner import study

    profile, output = small
    request = search.request(str(profile), output, TYPED, 1, 2)
    measured, second = study.rate_search.measured, []

    def meanwhile(made):
        with pytest.raises(RuntimeError, match="another search is at work"):
            study.run(request)
        second.append(made)
        return measured(made)

    monkeypatch.setattr(study.rate_search, "measured", meanwhile)
    study.run(request)
    assert len(second) == 2


@pytest.mark.more
def test_one_held_out_pair_gives_a_table_without_intervals(small, capsys):
    pytest.importorskip("optuna")
    from llm_finetuning.runner import study

    profile, output = small
    write_lines(output / "data" / "finetuning_data_val.jsonl", small_pairs(1))
    study.run(search.request(str(profile), output, TYPED, 2, 2))
    found = json.loads((output / "search" / "search.json").read_text())
    assert found[0]["loss"]["n"] == 1 and found[0]["loss"]["low"] is None
    assert "does not exclude zero" in capsys.readouterr().out


@pytest.mark.more
@pytest.mark.slow
def test_a_killed_search_comes_to_the_same(small):
    pytest.importorskip("optuna")
    profile, output = small
    command = [sys.executable, "-m", "llm_finetuning", "search", "--profile", str(profile), "--output", str(output)]
    command += ["--seeds", "2", "--steps", "3", "-p", "learning_rate=1e-2,1e-3"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as run:
        for line in run.stdout:
            if "held-out loss" in line:
                run.send_signal(signal.SIGKILL)
    resumed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    assert "1 were trained before" in resumed.stdout
    first = json.loads((output / "search" / "losses.json").read_text())
    (output / "search" / "losses.json").unlink()  # the study alone is no reason to believe that something was trained
    assert subprocess.run(command, cwd=ROOT, env=environment, capture_output=True).returncode == 0
    assert json.loads((output / "search" / "losses.json").read_text()) == first
