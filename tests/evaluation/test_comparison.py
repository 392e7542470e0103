"""Models side by side: what is measured, that it goes on where it stopped, and what is refused beforehand."""

import dataclasses
import json
import random
import shutil

import pytest
from evaluation_fixtures import finished_run, preferences
from inference_fixtures import known_pairs
from safetensors.torch import load_file, save_file
from training_fixtures import prepare, small_pairs, small_settings, write_lines

from llm_finetuning import prompts
from llm_finetuning.data import oasst
from llm_finetuning.evaluation import agreement, comparison, generic, intervals, report, rules
from llm_finetuning.files import checksums
from llm_finetuning.release.evaluated import add_evaluation, add_to_measured


@pytest.fixture
def finished(published, tiny_base, tmp_path):
    """The results of a finished run."""
    return finished_run(published, tiny_base, tmp_path)


def test_base_and_finetuned_are_told_apart(finished, monkeypatch):
    results = comparison.compare(finished)
    record = report.write(results, finished.folders.evaluation)
    assert json.loads(finished.folders.evaluation.read_text()) == record
    assert list(record) == ["base", "finetuned"]
    for found in record.values():
        for name, figure in found.items():
            assert set(figure) == {"value", "low", "high", "n"}, name
            assert figure["low"] <= figure["value"] <= figure["high"], name
    assert record["finetuned"]["loss"]["value"] < 0.1 < record["base"]["loss"]["value"]
    assert record["finetuned"]["exact_match"]["value"] == 1.0
    assert record["finetuned"]["rank_agreement"]["value"] == 1.0
    assert record["base"]["rank_agreement"]["low"] < 0.5 < record["base"]["rank_agreement"]["high"]
    told = report.differences(results).set_index("figure")["verdict"]
    assert told["loss"] == told["exact_match"] == told["stop_rate"] == "better"
    told = report.answers(results)
    assert (told["finetuned"] == told["reference"]).all() and not (told["base"] == told["reference"]).any()
    monkeypatch.setattr(report, "SHOWN", 2)
    asked = report.questions(results)
    assert len(asked) == 4 and any(len(messages) == 3 for messages, _ in asked)
    for messages, answers in asked:
        known = next(pair for pair in known_pairs() if prompts.question(pair) == messages)
        assert answers["finetuned"] == known["response"] != answers["base"]
    assert report.questions({"base": results["base"]}) == []


def test_a_killed_evaluation_goes_on_and_measures_nothing_twice(finished, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(generic, "examples", killed)
        with pytest.raises(Killed):
            comparison.compare(finished)
    measured = []
    losses = comparison.likelihood.losses
    monkeypatch.setattr(comparison.likelihood, "losses", lambda *a: (measured.append(len(a[1])), losses(*a))[1])
    results = comparison.compare(finished)
    whole = [len(known_pairs()), 2 * len(known_pairs()), 3]
    assert measured == [3, *whole], "of the base the passages alone, of the finetuned model all"
    measured.clear()
    assert report.write(comparison.compare(finished), finished.folders.evaluation) == {
        name: report.figures(result) for name, result in results.items()
    }
    assert measured == []
    write_lines(finished.folders.val_preferences, preferences(better=False))
    comparison.compare(finished)
    assert measured == whole + whole, "other ranks: everything is measured again"


class Killed(BaseException):
    """As a process ends that is killed."""


STEPS = 5
"""Parts of the evaluation of a model: pairs, answers, ranks, plain text, rules."""


@pytest.mark.parametrize("where", [0, 3, *(pytest.param(n, marks=pytest.mark.more) for n in (1, 2, 4, 5, 7, 9))])
@pytest.mark.parametrize("written", [False, pytest.param(True, marks=pytest.mark.more)])
def test_killed_in_any_part_it_comes_to_the_same(finished, monkeypatch, where, written):
    """Each part is measured once; the one that was at work when the process ended, twice unless it was written."""
    finished = dataclasses.replace(finished, follow_rules=True, eval_answers=2)
    added, add = [], comparison._Kept.add

    def killed(kept, name, part):
        added.append((kept.path.stem, name))
        if written or len(added) != where + 1:
            add(kept, name, part)
        if len(added) == where + 1:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(comparison._Kept, "add", killed)
        with pytest.raises(Killed):
            comparison.compare(finished)
    seen = lambda kept, name, part: (added.append((kept.path.stem, name)), add(kept, name, part))  # noqa: E731
    monkeypatch.setattr(comparison._Kept, "add", seen)
    resumed = report.write(comparison.compare(finished), finished.folders.evaluation)
    assert len(set(added)) == 2 * STEPS and len(added) == 2 * STEPS + (not written)
    shutil.rmtree(finished.folders.evaluated)
    assert report.write(comparison.compare(finished), finished.folders.evaluation) == resumed


def test_two_at_once_in_one_folder_measure_everything_once(finished, monkeypatch):
    """A second evaluation begins and ends while the first measures ranks."""
    added, add, ranks = [], comparison._Kept.add, comparison._ranks
    seen = lambda kept, name, part: (added.append((kept.path.stem, name)), add(kept, name, part))  # noqa: E731
    monkeypatch.setattr(comparison._Kept, "add", seen)

    def meanwhile(*given):
        monkeypatch.setattr(comparison, "_ranks", ranks)
        second.append(comparison.compare(finished))
        return ranks(*given)

    second = []
    monkeypatch.setattr(comparison, "_ranks", meanwhile)
    first = comparison.compare(finished)
    assert len(added) == len(set(added)) + 1, "the ranks of the base, at which both were"
    records = [{name: report.figures(result) for name, result in found.items()} for found in (first, *second)]
    assert records[0] == records[1]


def test_a_record_that_was_cut_off_is_begun_afresh(finished):
    whole = report.write(comparison.compare(dataclasses.replace(finished, eval_answers=0)), finished.folders.evaluation)
    for text in ("{", "[]", "", '{"identity": 3}'):
        (finished.folders.evaluated / "base.json").write_text(text)
        results = comparison.compare(dataclasses.replace(finished, eval_answers=0))
        assert {name: report.figures(found) for name, found in results.items()} == whole


def test_another_held_out_set_is_measured_anew(finished):
    settings = dataclasses.replace(finished, models=["finetuned"], eval_answers=0)
    counts = []
    for pairs in (known_pairs(), known_pairs()[:7], known_pairs()):
        write_lines(finished.folders.val_file, pairs)
        counts.append(report.figures(comparison.compare(settings)["finetuned"])["loss"]["n"])
    assert counts == [len(known_pairs()), 7, len(known_pairs())]


def test_an_adapter_on_its_base_is_measured_like_the_model_in_training(finished, tiny_base, tmp_path):
    run = trained_adapter(tiny_base, tmp_path / "run")
    settings = dataclasses.replace(finished, models=[f"{tiny_base} + {run.settings.folders.adapter}"])
    found = comparison.compare(settings)["adapter"].samples["loss"].value
    examples = prompts.encode_all(known_pairs(), run.template)
    assert found == pytest.approx(
        comparison.likelihood.losses(run.trainer.model, examples, run.template).value, rel=1e-4
    )


def trained_adapter(base, folder, steps: int = 2, **changed):
    """The folder of an adapter that was trained on the known pairs."""
    from llm_finetuning.training.resumable import save_adapter, train

    run = prepare(small_settings(folder, base, use_4bit=False, max_steps=steps, **changed), known_pairs())
    train(run.trainer)
    save_adapter(run.trainer)
    run.template.tokenizer.save_pretrained(run.settings.folders.adapter)
    return run


def test_a_damaged_adapter_shows_that_something_was_forgotten(finished, published, tmp_path):
    """The finetuned model trained on at a sound rate, and at fifty times that; what it forgets are its own answers."""
    told = "\n\n".join(f"Instruct: {pair['prompt']}\nOutput: {pair['response']}" for pair in known_pairs())
    (tmp_path / "plain.txt").write_text(told, encoding="utf-8")
    adapters = {}
    for name, rate in (("sound", 1e-3), ("damaged", 50 * 1e-3)):
        run = trained_adapter(published, tmp_path / name, steps=8, learning_rate=rate)
        adapters[name] = run.settings.folders.adapter.rename(tmp_path / f"adapter-{name}")
    several = ["finetuned", *(f"{published} + {adapter}" for adapter in adapters.values())]
    results = comparison.compare(dataclasses.replace(finished, models=several, eval_answers=0))
    told = report.differences(results).set_index(["model", "figure"])["verdict"]
    assert told["adapter-damaged", "generic_loss"] == "worse"
    assert told["adapter-sound", "generic_loss"] != "worse"


def test_a_model_is_not_different_from_itself(finished, published, tmp_path):
    """The same weights in two folders, loaded and measured one after the other, whatever pairs were drawn."""
    shutil.copytree(published, tmp_path / "again")
    results = comparison.compare(dataclasses.replace(finished, models=["finetuned", str(tmp_path / "again")]))
    told = report.differences(results)
    assert len(told) >= 7 and set(told["verdict"]) == {"no difference shown"}
    first, again = (result.samples["loss"] for result in results.values())
    chance = random.Random(0)
    for _ in range(100):
        units = chance.choices(range(len(first.values)), k=len(first.values))
        drawn = [intervals.Sample(*([column[i] for i in units] for column in (side.values, side.weights)))
                 for side in (first, again)]  # fmt: skip
        assert not intervals.is_apart(intervals.difference(*drawn))


def test_an_adapter_of_another_model_is_refused(finished, tiny_base, tmp_path):
    adapter = trained_adapter(tiny_base, tmp_path / "run", steps=1).settings.folders.adapter
    for change in (lambda names: names[1:], lambda names: [*names, names[-1].replace("layers.1", "layers.2")]):
        weights = load_file(adapter / "adapter_model.safetensors")
        names = change(sorted(weights))
        changed = tmp_path / f"changed-{len(names)}"
        shutil.copytree(adapter, changed)
        save_file({name: weights[name] if name in weights else next(iter(weights.values())).clone() for name in names},
                  changed / "adapter_model.safetensors")  # fmt: skip
        with pytest.raises(ValueError, match="not an adapter of this base"):
            comparison.compare(dataclasses.replace(finished, models=[f"{tiny_base} + {changed}"]))


@pytest.mark.parametrize(
    ("models", "problem"),
    [
        (["finetuned", "finetuned"], "finetuned twice"),
        (["preferred"], "preferred is not there yet"),
        (["base"], "none of the models has a chat template"),
        (["base + /nowhere/adapter"], "no folder with an adapter"),
        (["/nowhere/model"], "is not there"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_loaded(models, problem, finished, monkeypatch):
    monkeypatch.setattr(comparison.candidates.Candidate, "load", lambda *_: pytest.fail("loaded"))
    with pytest.raises((ValueError, FileNotFoundError), match=problem):
        comparison.compare(dataclasses.replace(finished, models=models))


def test_a_model_that_does_not_fit_is_named_with_its_size(finished, monkeypatch):
    monkeypatch.setattr(comparison.candidates, "LOADED", 1e6)
    with pytest.raises(MemoryError, match=r"base needs .* GiB; finetuned needs .* GiB, and .* are free"):
        comparison.compare(finished)


def test_shuffled_ranks_are_agreed_with_by_chance(world):
    model, template = world

    def agreed(records: list[dict]) -> dict:
        ranked = agreement.ranked_pairs(records, template, 200)
        return agreement.rank_agreement(model, ranked, template)["rank_agreement"].figure()

    assert agreed(preferences())["value"] == 1.0
    assert agreed(preferences(better=False))["value"] == 0.0
    shuffled = agreed([random.Random(i).choice([preferences(), preferences(better=False)])[i]
                       for i in range(len(preferences()))])  # fmt: skip
    assert shuffled["low"] <= 0.5 <= shuffled["high"]
    same = [record | {"rejected": record["chosen"]} for record in preferences()]
    assert agreed(same)["value"] == 0.5


def test_the_card_gets_the_figures_and_the_folder_stays_whole(finished, monkeypatch):
    folder = finished.folders.published
    record = {"base": {"loss": {"value": 2.0, "low": 1.9, "high": 2.1, "n": 9}}}
    time = (folder / checksums.NAME).stat().st_mtime_ns
    add_evaluation(folder, record)
    assert (folder / checksums.NAME).stat().st_mtime_ns == time  # by it the page knows GGUF files of this model
    add_evaluation(folder, record | {"finetuned": {"loss": {"value": 1.0, "low": None, "high": None, "n": 9}}})
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card.startswith("# A model\n\nIts card.\n") and card.count("## Evaluation") == 1
    assert "| loss | 2.000 (1.900 to 2.100, n = 9) | 1.000 (n = 9) |" in card
    checksums.verify_checksums(folder)
    assert add_to_measured(finished.folders, {"other/model": record["base"]}) == []
    assert add_to_measured(finished.folders, record | {"finetuned": record["base"]}) == [folder / "README.md"]

    import llm_finetuning.release.evaluated as evaluated

    writes = []

    def stopped_after(count: int):
        def write(path, text):
            if len(writes) == count:
                raise KeyboardInterrupt
            writes.append(path)
            path.write_text(text, encoding="utf-8")

        return write

    for count in range(3):
        writes.clear()
        for module, write in zip((evaluated, checksums), [stopped_after(count)] * 2, strict=True):
            monkeypatch.setattr(module, "write_text", write)
        with pytest.raises(KeyboardInterrupt):
            add_evaluation(folder, {"other": record["base"]})
        checksums.verify_checksums(folder)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [("a.txt", "  \n\n ", "holds no text"), ("a.jsonl", '{"body": "x"}\n', "no column text"),
     ("a.txt", b"\xff\xfe\x00x", "no text in UTF-8")],
)  # fmt: skip
def test_text_that_is_none_is_refused(name, content, problem, tmp_path):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=problem):
        generic.passages(str(path))
    with pytest.raises(FileNotFoundError):
        generic.passages(str(tmp_path / "missing.txt"))


def test_what_was_left_out_by_its_language_is_read_of_the_source(tmp_path):
    val_file = tmp_path / "finetuning_data_val.jsonl"
    messages = oasst.read_messages("sample", "validation")
    replies = messages[messages["role"] == "assistant"]

    def read(languages: str, source: str = "sample") -> set[str]:
        (tmp_path / "finetuning_data_val.report.json").write_text(json.dumps({"recipe": {"languages": languages}}))
        return set(generic.other_languages(source, val_file, 1000, 0))

    assert generic.other_languages("sample", val_file, 5, 0) == [], "no report, no data preparation"
    assert read("") == read("en", "") == set()
    assert read("en") == set(replies["text"][replies["lang"] != "en"]) != set()
    assert read("en, pt") == set(replies["text"][~replies["lang"].isin(["en", "pt-BR"])]) < read("en")
    own = tmp_path / "own.jsonl"
    write_lines(own, known_pairs())
    assert read("en", str(own)) == set()
    assert len(generic.other_languages("sample", val_file, 5, 0)) == 5


def test_rules_tell_what_follows_them():
    follows = [
        "- a\n- b\n- c", "LOUD AND CLEAR.", "quiet, calm", "No such sign here", "Bread rises.",
        "word " * 50, "One sentence only.", '```json\n{"a": 1}\n```', "So it is. That is all.", "“Quoted.”",
        "Because it rains, because it pours.", "1. a\n2. b\n3. c\n4. d",
    ]  # fmt: skip
    breaks = [
        "- a\n- b", "Loud", "Quiet", "a, b", "word " * 11, "too short", "One. Two.", '[1, 2] and more',
        "That is all. Or not", '"open', "because", "1. a\n3. b\n2. c\n4. d",
    ]  # fmt: skip
    for rule, good, bad in zip(rules.RULES.values(), follows, breaks, strict=True):
        assert rule(good) and not rule(bad) and not rule("")
    asked = rules.questions()
    assert len(asked) == 24 and sum(rules.followed(asked, ["LOUD"] * 24)) >= 2


def test_small_pairs_without_ranks_leave_agreement_out(finished):
    finished.folders.val_preferences.unlink()
    write_lines(finished.folders.val_file, small_pairs(6))
    record = {name: report.figures(found) for name, found in comparison.compare(finished).items()}
    assert "rank_agreement" not in record["base"] and record["base"]["loss"]["n"] == 6
