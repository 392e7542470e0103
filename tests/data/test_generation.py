"""A data set from a task, written by a scripted server that does every harm a server can do."""

import dataclasses
import json
from collections import Counter
from itertools import cycle, pairwise
from types import SimpleNamespace

import pytest
from generation_world import KEY, every_file, files_with, letters_template, run, settings_for
from scripted_generator import QUESTIONS, SUBJECTS, Script, Server

from llm_finetuning.data import pairs, preferences, reports
from llm_finetuning.data.generation import drafts, generate, taxonomy
from llm_finetuning.data.generation.endpoint import GeneratorError
from llm_finetuning.release import model_card

HARM = {
    "prompts": ("text around", "list", "python", "thoughts", 500, "cut", "garbage", "empty"),
    "answer": (
        *("refusal", "as an AI", "markup", "German", "cut", "empty", "echo", 500, 429, "429 without Retry-After"),
        *("timeout", "hang up", "page", "no choices", "filtered", "thoughts"),
    ),
}


class Harm:
    """Every third answer of each purpose is harmed, each time in the next way."""

    def __init__(self):
        self.seen = Counter()

    def __call__(self, purpose, number):
        self.seen[purpose] += 1
        kinds, turn = HARM.get(purpose, ()), self.seen[purpose]
        return kinds[turn // 3 % len(kinds)] if kinds and turn % 3 == 0 else None


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def test_the_wanted_pairs_come_through_all_faults_and_a_second_run_asks_nothing(tmp_path, capfd):
    with Server(Script(Harm())) as server:
        settings = settings_for(server, tmp_path, pairs_wanted=80, max_parallel=4, timeout_seconds=1.0)
        _, made, splits = run(settings)
        asked, written = len(server.script.requests), every_file(tmp_path / "data")
        run(settings)
        assert len(server.script.requests) == asked > 0
        assert every_file(tmp_path / "data") == written
    train, val = (pairs.read_jsonl(path) for path in (settings.folders.train_file, settings.folders.val_file))
    assert len(train) + len(val) == len(made.kept) == 80
    assert not set(train["message_tree_id"]) & set(val["message_tree_id"])
    assert all(QUESTIONS[pair.prompt].answers[0] in pair.response for pair in train.itertuples())
    whole = generate.flatten(made.all).funnel
    assert whole["kept"].tolist()[1:] == [a - b for a, b in zip(whole["kept"], whole["dropped"][1:], strict=False)]
    lost = dict(zip(whole["step"], whole["dropped"], strict=True))
    names = ("no refusal", 'no "as an AI"', "whole markup", "in the language asked for", "response not cut off")
    assert all(lost[name] for name in (*names, "response not empty", "answered", "prompt written")), lost
    assert files_with(tmp_path, KEY) == [] and KEY not in "".join(capfd.readouterr())
    assert files_with(tmp_path, "[key]")  # the server did echo it
    kept = sum(prepared.funnel["kept"].iloc[0] for prepared in splits.values())
    assert kept == whole["kept"].iloc[0]


def test_half_a_character_is_replaced_wherever_it_stands(tmp_path):
    with Server(Script(lambda purpose, number: "half a character" if number > 2 else None)) as server:
        settings = settings_for(server, tmp_path)
        _, made, _ = run(settings)
    assert "?" in made.kept[0].responses[0] and "??" in made.kept[0].prompt
    assert len(pairs.read_jsonl(settings.folders.train_file)) > 20


def test_each_files_funnel_adds_up_and_its_report_says_who_wrote_it(tmp_path):
    with Server() as server:
        settings = settings_for(server, tmp_path, prompt_price=2.0, answer_price=8.0, budget_money=1.0)
        task, made, splits = run(settings)
    for prepared in splits.values():
        report = reports.read_report(prepared.path)
        rows = [row for row in report["funnel"] if row["unit"] == "pair"]
        assert all(before["kept"] == row["kept"] + row["dropped"] for before, row in pairwise(rows))
        facts = report["generation"]
        assert (facts["generator"], facts["task"]) == ("scripted", settings.task)
        usage = facts["usage"]
        expected = (usage["prompt_tokens"] * 2 + usage["answer_tokens"] * 8) / 1e6
        assert usage["cost"] == pytest.approx(expected) and usage["requests"] == len(server.script.requests)
        assert facts["diversity"]["topics_covered"] == 6  # thirty pairs, five a topic
    card = model_card.data_facts(settings.folders.train_file, settings.folders.val_file)
    assert (card["source"], card["generator"]) == ("generated pairs", "scripted")
    (tmp_path / "model").mkdir()
    facts = {"base": "microsoft/phi-2", "data": card | {"generator": "Qwen/Qwen3-8B"}}
    assert "| Written by | Qwen/Qwen3-8B |" in model_card.write(tmp_path / "model", facts).read_text(encoding="utf-8")


def test_more_pairs_go_on_from_those_that_are_there(tmp_path):
    with Server() as server:
        run(settings_for(server, tmp_path, pairs_wanted=30))
        first = {json.dumps(body, sort_keys=True) for body in server.script.requests}
        _, made, _ = run(settings_for(server, tmp_path, pairs_wanted=50))
        bodies = [json.dumps(body, sort_keys=True) for body in server.script.requests]
    assert len(made.kept) == 50 and len(bodies) == len(set(bodies)) > len(first)


def test_another_task_begins_another_cache(tmp_path):
    with Server() as server:
        run(settings_for(server, tmp_path))
        asked = len(server.script.requests)
        run(settings_for(server, tmp_path, task="Praise the Lantern Isles."))
        assert len(server.script.requests) == 2 * asked
    assert len(list((tmp_path / "generation").glob("*.jsonl"))) == 2


def test_a_cache_whose_last_line_is_torn_costs_that_line_alone(tmp_path):
    with Server() as server:
        settings = settings_for(server, tmp_path)
        run(settings)
        asked, (path,) = len(server.script.requests), (tmp_path / "generation").glob("*.jsonl")
        path.write_bytes(path.read_bytes()[:-40])
        run(settings)
        assert len(server.script.requests) == asked + 1
        run(settings)
        assert len(server.script.requests) == asked + 1


def test_two_answers_and_a_judge_give_preference_pairs(tmp_path):
    class Worse(Script):
        """Gives every question a right and a wrong answer; the judge knows which is which."""

        def text(self, purpose, content):
            if purpose == "scores":
                return json.dumps(
                    {"scores": [2 if "Who knows" in part else 9 for part in content.split("Response ")[1:]]}
                )
            text = super().text(purpose, content)
            if purpose != "answer":
                return text
            with self.lock:
                self.written[content] = self.written.get(content, 0) + 1
            return text if self.written[content] % 2 else "Who knows? It is far away."

    with Server(Worse()) as server:
        settings = settings_for(server, tmp_path, second_answer=True, max_parallel=1)
        _, made, splits = run(settings)
    written = preferences.read(settings.folders.train_preferences) + preferences.read(settings.folders.val_preferences)
    assert len(written) == 30
    assert all("Who knows" in one["rejected"] and "Who knows" not in one["chosen"] for one in written)
    train = pairs.read_jsonl(settings.folders.train_file)
    assert not train["response"].str.contains("Who knows").any()
    with Server(Worse()) as server:
        settings = settings_for(server, tmp_path / "strict", min_score=5, max_parallel=1)
        _, made, _ = run(settings)
        assert all("Who knows" not in draft.responses[0] for draft in made.kept)


def test_the_taxonomy_is_shown_before_pairs_are_paid_for_and_what_is_changed_counts(tmp_path):
    with Server() as server:
        settings = settings_for(server, tmp_path, review_taxonomy=True)
        with pytest.raises(taxonomy.TaxonomyWritten, match="run all cells again"):
            generate.start(settings)
        assert len(server.script.requests) == 1
        (path,) = (tmp_path / "generation").glob("*.taxonomy.json")
        axes = json.loads(path.read_text(encoding="utf-8"))
        assert axes["topics"] == SUBJECTS[: settings.topics_wanted]
        path.write_text(json.dumps(axes | {"topics": ["Mira", "Bram"]}), encoding="utf-8")
        _, made, _ = run(settings)
        assert {draft.cell["topic"] for draft in made.all} == {"Mira", "Bram"}
        changed = dataclasses.replace(settings, topics=["Odrin", "Petra"], review_taxonomy=False)
        assert {draft.cell["topic"] for draft in run(changed)[1].all} == {"Odrin", "Petra"}
        for broken in ("{", "[]", json.dumps(axes | {"topics": []}), json.dumps(axes | {"forms": [7]})):
            path.write_text(broken, encoding="utf-8")
            with pytest.raises(ValueError, match=r"taxonomy.json"):
                generate.start(settings)


def test_documents_are_asked_about_a_passage_at_a_time(tmp_path):
    folder = tmp_path / "documents"
    folder.mkdir()
    (folder / "a.md").write_text("\ufeffThe ferry to Brask leaves at noon.\n\n" + "Long. " * 900, encoding="utf-8")
    (folder / "b.txt").write_text("Every lantern is lit at dusk.", encoding="utf-8")
    (folder / "c.png").write_bytes(b"\x89PNG\0")
    found = taxonomy.passages(str(folder))
    assert len(found) == 4 and max(map(len, found)) <= taxonomy.PASSAGE
    with Server() as server:
        _, made, _ = run(settings_for(server, tmp_path, documents=str(folder)))
        asked = [body["messages"][-1]["content"] for body in server.script.requests]
    assert {draft.passage for draft in made.all} == set(found)
    assert any("lit at dusk" in text for text in asked)
    assert not any("lit at dusk" in draft.prompt for draft in made.all)


def test_a_large_document_shuts_out_no_other(tmp_path):
    folder = tmp_path / "documents"
    (folder / "z").mkdir(parents=True)
    (folder / "a.md").write_text("\n\n".join(f"Ledger {n}. {'Entry. ' * 300}" for n in range(80)), encoding="utf-8")
    small = ["b.txt", "c.md", "z/d.csv", "z/e.rst", "z/f.html"]
    for name in small:
        (folder / name).write_text(f"The chapter {name} of the almanac.", encoding="utf-8")
    with Server() as server:
        task, made, splits = run(settings_for(server, tmp_path, documents=str(folder), topics_wanted=6))
        said = generate.generate(task, made)
        topics, *asked = [body["messages"][-1]["content"] for body in server.script.requests]
    assert len(task.passages) == 85 and all(f"The chapter {name} of" in topics for name in small)
    about = {draft.passage for draft in made.all if draft.prompt}
    assert {f"The chapter {name} of the almanac." for name in small} < about and len(about) < 20
    assert all(any(text in one for one in asked) for text in about)
    assert f"{len(about)} of 85 passages were asked about, 5 prompts each: a larger pairs_wanted" in said
    facts = reports.read_report(splits["train"].path)["generation"]
    assert facts["passages"] == {"asked": len(about), "in_documents": 85}
    order = taxonomy.passages(str(folder))
    assert order == task.passages and [text[:6] for text in order[:6]].count("Ledger") == 1
    assert order[6:] != sorted(order[6:], key=lambda text: int(text.split()[1][:-1]))


@pytest.mark.parametrize("name, content", [("x.txt", b"\xff\xfe\0a"), ("x.txt", b""), ("x.bin", b"text")])
def test_documents_that_hold_no_text_are_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="x.txt|documents"):
        taxonomy.passages(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        taxonomy.passages(str(tmp_path / "nowhere"))


def test_a_budget_that_does_not_reach_stops_before_the_start(tmp_path):
    with Server() as server:
        settings = settings_for(server, tmp_path, pairs_wanted=1000, budget_tokens=20_000)
        task = generate.start(settings)
        made = generate.start_drafts(task, letters_template())
        with pytest.raises(ValueError, match=r"set pairs_wanted = \d+"):
            generate.estimate(task, made)
        assert len(server.script.requests) < 12


def test_a_budget_is_never_exceeded_and_what_was_paid_is_written(tmp_path):
    class Dear(Script):
        """The first five answers are cheap, so that the estimate is too low."""

        def usage(self):
            return (10, 5) if len(self.requests) < 9 else (90, 600)

    with Server(Dear()) as server:
        settings = settings_for(server, tmp_path, budget_tokens=20_000, max_answer_tokens=600, max_parallel=3)
        task = generate.start(settings)
        made = generate.start_drafts(task, letters_template())
        generate.estimate(task, made)
        said = generate.generate(task, made)
        spent = task.generator.budget.spent.tokens
        assert 10_000 < spent <= 20_000
        assert "budget" in said and 5 <= len(made.kept) < 30
        asked = len(server.script.requests)
        again = generate.start(settings)
        remade = generate.start_drafts(again, letters_template())
        generate.generate(again, remade)
        assert len(server.script.requests) <= asked + 1


def test_without_validation_there_is_one_file(tmp_path):
    with Server() as server:
        settings = settings_for(server, tmp_path, validation_share=0.0)
        run(settings)
    assert len(pairs.read_jsonl(settings.folders.train_file)) == 30
    assert not settings.folders.val_file.exists()


def test_a_single_topic_cannot_be_split(tmp_path):
    with Server() as server, pytest.raises(ValueError, match="validation_share = 0"):
        run(settings_for(server, tmp_path, topics=["Mira"]))


def test_a_generator_that_repeats_itself_ends_at_the_bound(tmp_path):
    class Parrot(Script):
        def prompts(self, topic, number):
            return [f"Who is {topic}?"] * number

    with Server(Parrot()) as server:
        _, made, _ = run(settings_for(server, tmp_path, topics=["Mira", "Bram"], pairs_wanted=20))
        assert len(made.kept) == 2 and len(made.all) == 80
        assert len(server.script.requests) < 25


def test_a_model_in_memory_writes_pairs_too(tmp_path):
    script, sizes = Script(), []

    def engine(conversations):
        sizes.append(len(conversations))
        texts = [turns[-1]["content"] for turns in conversations]
        return [script.text("prompts" if "Topic:" in text else "answer", text) for text in texts]

    settings = settings_for("http://localhost:1/v1", tmp_path, generator_folder="models/finetuned_phi2", max_parallel=4)
    settings = dataclasses.replace(settings, topics=["Mira", "Bram"], system_message="Tell.")
    task, made, _ = run(settings, engine)
    assert len(made.kept) == 30 and max(sizes) == 4 and task.model == "finetuned_phi2"
    sizes.clear()
    run(settings, engine)
    assert sizes == []


def test_what_a_model_in_memory_cuts_off_or_does_not_take_is_counted(tmp_path):
    """Every third answer reaches the limit, and a conversation of more than 800 characters does not fit."""
    script, asked = Script(), Counter()

    def answered(content):
        asked["all"] += 1
        ended = "length" if asked["all"] % 3 == 0 and "Topic:" not in content else "end"
        text = script.text("prompts" if "Topic:" in content else "answer", content)
        return SimpleNamespace(text=text, ended_by=ended, tokens=7, prompt_tokens=70)

    def engine(conversations):
        texts = [turns[-1]["content"] for turns in conversations]
        if any("Ulla" in text and "Topic:" not in text for text in texts):
            raise ValueError("conversation 1: the message is too long")
        return [answered(text) for text in texts]

    settings = settings_for("http://localhost:1/v1", tmp_path, generator_folder="models/finetuned_phi2", max_parallel=4)
    topics = ["Mira", "Bram", "Ulla"]
    settings = dataclasses.replace(settings, topics=topics, system_message="Tell.", pairs_wanted=10)
    task = generate.start(settings, engine)
    made = generate.start_drafts(task, letters_template())
    made.fill(10)
    lost = Counter(loss for draft in made.all for loss in draft.losses)
    assert len(made.kept) == 10 and lost[drafts.UNCUT] >= 3 and lost[drafts.ANSWERED] >= 3, lost
    assert drafts.faults(made.all, drafts.ANSWERED) == {"not taken by the model": lost[drafts.ANSWERED]}
    assert task.generator.usage.tokens == 77 * asked["all"]


@pytest.mark.parametrize("lang", ["ru", "ja", "hi", "en"])
def test_short_answers_are_kept_whatever_language_is_asked_for(tmp_path, lang):
    short = ["H2O", "7", "```python\nprint(7)\n```", "Albert Einstein", "水", "Да"]
    lapses = ["Ich weiß das leider nicht so genau, denn das ist mir zu lange her und die Quellen sind auch nicht da."]
    script, answers = Script(), cycle(short + lapses)

    def engine(conversations):
        texts = [turns[-1]["content"] for turns in conversations]
        return [script.text("prompts", text) if "Topic:" in text else next(answers) for text in texts]

    settings = settings_for("http://localhost:1/v1", tmp_path, languages=lang, generator_folder="models/finetuned_phi2")
    settings = dataclasses.replace(settings, topics=["Mira", "Bram"], system_message="Tell.", pairs_wanted=12)
    task = generate.start(settings, engine)
    made = generate.start_drafts(task, letters_template())
    made.fill(12)
    assert {draft.responses[0] for draft in made.kept} == set(short)
    assert {draft.losses[0] for draft in made.all if draft.responses[0] in lapses} == {drafts.SPOKEN}


def test_a_generator_that_says_nothing_of_use_is_refused_in_one_sentence(tmp_path):
    with Server(Script(lambda purpose, number: "garbage")) as server:
        with pytest.raises(GeneratorError, match="proposed no topics"):
            run(settings_for(server, tmp_path))
        with pytest.raises(GeneratorError, match="No pair is left: 20 of 20 were lost at 'prompt written'"):
            run(settings_for(server, tmp_path / "topics", topics=["Mira", "Bram"]))
