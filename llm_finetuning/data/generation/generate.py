"""The steps of the task data generation notebook: taxonomy, estimate, pairs, what was lost, and the files."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pandas as pd

from llm_finetuning.data import funnel as funnels
from llm_finetuning.data import prepare, reports
from llm_finetuning.data.filters import Filters
from llm_finetuning.data.generation import diversity, drafts, parsing, requests, taxonomy
from llm_finetuning.data.generation.budget import Budget, Usage
from llm_finetuning.data.generation.cache import AnswerCache
from llm_finetuning.data.generation.drafts import Draft, Drafts
from llm_finetuning.data.generation.endpoint import Endpoint, GeneratorError, LocalModel
from llm_finetuning.data.generation.generator import Generator
from llm_finetuning.data.oasst import Flattened, finish
from llm_finetuning.data.pairs import to_frame
from llm_finetuning.data.recipes import Candidates
from llm_finetuning.data.splits import in_split
from llm_finetuning.data.tokens import TokenCounter
from llm_finetuning.prompts import Template
from llm_finetuning.settings import DataPrep, Generation

SAMPLE = 5
"""Pairs that are made first, from which the rest is estimated."""
GENERATED = "generated pairs"
"""What reports call the source; who wrote them stands beside."""
Engine = Callable[[list[list[dict]]], list]
"""A model in memory, as `LocalModel` takes it."""


@dataclass
class Task:
    """A task whose data set is being written: its taxonomy, its system message, and the generator with its cache."""

    settings: Generation
    generator: Generator
    name: str
    passages: list[str]
    axes: dict[str, list[str]]
    system: str

    @property
    def model(self) -> str:
        """The name of the generator model as others may read it."""
        name = self.settings.generator_folder or self.settings.generator_model
        return Path(name).resolve().name if self.settings.generator_folder or Path(name).is_absolute() else name

    @property
    def host(self) -> str:
        """Where the generator answered."""
        return "this machine" if self.settings.generator_folder else urlsplit(self.settings.endpoint).netloc


def start(settings: Generation, engine: Engine | None = None) -> Task:
    """Opens the cache of the task, and reads or makes its taxonomy and its system message.

    engine: answers conversations in order, for `generator_folder`; None = the endpoint answers. Raises
    `taxonomy.TaxonomyWritten` where the taxonomy waits to be read, GeneratorError where the model cannot be used.
    """
    passages = taxonomy.passages(settings.documents)
    name = taxonomy.task_hash(settings, passages)
    budget = Budget(settings.budget_tokens, settings.budget_money, settings.prompt_price, settings.answer_price)
    model = LocalModel(engine) if engine else Endpoint(settings)
    cache = AnswerCache(settings.generation_folder / f"{name}.jsonl")
    generator = Generator(model, cache, budget, settings.max_parallel)
    axes = taxonomy.taxonomy(settings, generator, passages, taxonomy.taxonomy_path(settings, name))
    return Task(settings, generator, name, passages, axes, _system_message(settings, generator))


def _system_message(settings: Generation, generator: Generator) -> str:
    """Returns the settings' system message, or lets the generator write it; the task itself where it cannot."""
    if settings.system_message:
        return settings.system_message
    (answer,) = generator.ask([requests.system_message(settings)])
    written = parsing.string(answer.text, "system_message") if answer else ""
    return written or settings.task.strip()


def start_drafts(task: Task, template: Template) -> Drafts:
    """Returns the drafts of a task, none made yet. template: counts tokens as training does."""
    counter, limit = TokenCounter(template), task.settings.max_seq_length

    def fits(pairs: list[dict]) -> list[bool]:
        return [length["total"] <= limit for length in counter.lengths(pairs)]

    cells = taxonomy.cells(task.axes)
    return Drafts(task.settings, task.generator, task.system, cells, task.passages, fits)


def estimate(task: Task, made: Drafts) -> str:
    """Makes the first SAMPLE pairs, and says what all of them will take.

    Raises ValueError where that does not fit the budget, GeneratorError where no pair came of it.
    """
    settings, budget, before = task.settings, task.generator.budget, task.generator.usage
    made.fill(min(SAMPLE, settings.pairs_wanted))
    check_left(made)
    sample = task.generator.usage.plus(before, -1)
    whole = before.plus(sample.times(settings.pairs_wanted / len(made.kept)))
    said = f"{settings.pairs_wanted:,} pairs will take about {usage_sentence(whole, budget)}"
    if not budget.holds(whole):
        share = min(
            settings.budget_tokens / whole.tokens if settings.budget_tokens else 1.0,
            settings.budget_money / budget.cost(whole) if settings.budget_money else 1.0,
        )
        raise ValueError(
            f"{said}, and the budget is {_limits(settings)}. Raise it, or set pairs_wanted ="
            f" {max(1, int(0.9 * share * settings.pairs_wanted))}."
        )
    return f"{said}, as {len(made.kept)} pairs show; {usage_sentence(budget.spent, budget)} are paid already."


def usage_sentence(usage: Usage, budget: Budget) -> str:
    """Says tokens, and money where prices are known."""
    said = f"{usage.tokens:,} tokens ({usage.prompt_tokens:,} sent, {usage.answer_tokens:,} written)"
    return f"{said}, which cost {budget.cost(usage):,.4f}" if budget.prompt_price or budget.answer_price else said


def _limits(settings: Generation) -> str:
    limits = [f"{settings.budget_tokens:,} tokens"] * bool(settings.budget_tokens)
    return " and ".join(limits + [f"{settings.budget_money:g} in money"] * bool(settings.budget_money))


def generate(task: Task, made: Drafts) -> str:
    """Makes all pairs that are wanted, and says how many there are and what they took."""
    wanted = task.settings.pairs_wanted
    made.fill(wanted)
    check_left(made)
    kept, budget = len(made.kept), task.generator.budget
    lines = [f"{kept:,} pairs of {len(made.all):,} drafts; {usage_sentence(budget.spent, budget)}."]
    if kept < wanted:
        why = (
            f"the budget ({_limits(task.settings)}) is spent"
            if task.generator.exhausted
            else f"{drafts.MOST_DRAFTS} drafts a pair is the bound, and too many were lost: the funnel says where"
        )
        lines.append(f"{wanted - kept:,} pairs are missing: {why}.")
    if task.passages:
        asked, number = passages_asked(made), len(task.passages)
        more = f", {drafts.PROMPTS_PER_REQUEST} prompts each: a larger pairs_wanted asks about more"
        lines.append(f"{asked:,} of {number:,} passages were asked about{more * (asked < number)}.")
    return "\n".join(lines)


def passages_asked(made: Drafts) -> int:
    """Returns about how many passages of the documents prompts were written."""
    return len({draft.passage for draft in made.all if draft.prompt and draft.passage})


def check_left(made: Drafts) -> None:
    """Raises GeneratorError that names the largest loss where no draft is left."""
    if made.kept:
        return
    losses = pd.Series([loss for draft in made.all for loss in draft.losses], dtype=object).value_counts()
    step = losses.index[0]
    faults = drafts.faults(made.all, step)
    why = ", ".join(f"{fault}: {number}" for fault, number in faults.items())
    lost = [
        text for draft in made.all for text, loss in zip(draft.responses, draft.losses, strict=True) if loss == step
    ]
    quoted = next((f"; it wrote {text[:80]!r}" for text in lost if text), "")
    cure = drafts.STEPS[step] or "another generator_model, or a clearer task"
    raise GeneratorError(
        f"No pair is left: {losses.iloc[0]} of {losses.sum()} were lost at {step!r}"
        f"{f' ({why})' if why else ''}{quoted}. Set {cure}."
    )


def prepared_splits(task: Task, made: Drafts, template: Template) -> dict[str, prepare.Prepared]:
    """Returns {"train" and "validation": prepared pairs with their funnel}, split by topic."""
    topics = {draft.cell["topic"] for draft in made.kept}
    held_out = in_split(topics, "validation", task.settings.validation_share)
    counter = TokenCounter(template)
    return {
        split: _prepared(task, [d for d in made.all if (d.cell["topic"] in held_out) == wanted], split, counter)
        for split, wanted in (("train", False), ("validation", True))
    }


def _prepared(task: Task, split: list[Draft], name: str, counter: TokenCounter) -> prepare.Prepared:
    flat = flatten(split)
    source = to_frame([pair for draft in split for pair in kept_records(draft)])
    source.attrs = {"source": GENERATED, "revision": task.name, "split": name, "split_in_source": False, "skipped": []}
    lengths = counter.lengths(flat.pairs.to_dict("records"))
    table = pd.DataFrame(lengths, columns=list(reports.PARTS))
    return prepare.Prepared(data_prep(task), source, flat, table, table)


def kept_records(draft: Draft) -> list[dict]:
    """Returns the pair records of the responses that were not lost."""
    return [pair for pair, loss in zip(drafts.records(draft), draft.losses, strict=True) if not loss]


def flatten(split: list[Draft]) -> Flattened:
    """Counts every loss of drafts as a step of the funnel, and chooses among two answers by rank."""
    funnel = funnels.Funnel()
    candidates = Candidates(
        [pair for draft in split for pair in drafts.records(draft)],
        [draft.number for draft in split for _ in draft.losses],
        [None for draft in split for _ in draft.losses],
    )
    losses = [loss for draft in split for loss in draft.losses]
    funnel.step("responses drafted", "pair", len(losses))
    for step, cure in drafts.STEPS.items():
        if step in losses:
            candidates.filter(funnel, step, [loss != step for loss in losses], cure)
            losses = [loss for loss in losses if loss != step]
            if faults := drafts.faults(split, step):
                funnel.notes[step] = ", ".join(f"{fault}: {number:,}" for fault, number in faults.most_common())
    return finish(candidates, "best", Filters(), funnel, "best-worst")


def data_prep(task: Task) -> DataPrep:
    """Returns the settings of a data preparation that wrote the same pairs: for reports and for the leak check."""
    names = ("drive_folder", "model_name", "tokenizer_folder", "chat_template", "max_seq_length", "languages")
    names += ("validation_share", "min_response_chars", "near_duplicates")
    off = {"min_quality": 0.0, "max_toxicity": 1.0, "max_detoxify": 1.0, "drop_synthetic": "no"}
    return DataPrep(
        source=GENERATED,
        system_message=task.system,
        leak_similarity=task.settings.near_duplicates,
        **off,
        **{name: getattr(task.settings, name) for name in names},
    )


def write(task: Task, made: Drafts, splits: dict[str, prepare.Prepared], template: Template) -> pd.DataFrame:
    """Writes both files of pairs with their reports and preference pairs; returns the table of the leak check."""
    entries = {"generation": facts(task, made)}
    for prepared in splits.values():
        prepare.write(prepared)
        if not prepared.is_empty:
            prepare.add_to_report(prepared.path, entries)
    return prepare.check_leaks(splits["validation"], template)


def facts(task: Task, made: Drafts) -> dict:
    """Returns what a report says of how the pairs were written."""
    settings, budget = task.settings, task.generator.budget
    names = ("task", "style", "documents", "languages", "temperature", "second_answer", "min_score", "pairs_wanted")
    return {
        "generator": task.model,
        "at": task.host,
        "judge": (settings.judge_model or task.model) if settings.second_answer or settings.min_score else None,
        "system_message": task.system,
        **{name: getattr(settings, name) for name in names},
        "taxonomy": task.axes,
        "passages": {"asked": passages_asked(made), "in_documents": len(task.passages)} if task.passages else None,
        "diversity": diversity_of(task, made),
        "usage": vars(budget.spent)
        | {"requests": len(task.generator.cache.answers), "cost": budget.cost(budget.spent)},
    }


def diversity_of(task: Task, made: Drafts) -> dict:
    """Returns the figures of `diversity.figures` for all pairs, those of validation among them."""
    pairs = [kept_records(draft)[0] for draft in made.kept]
    return diversity.figures(pairs, [draft.cell["topic"] for draft in made.kept], task.axes)


def closing_sentence(task: Task) -> str:
    """Says which system message belongs to these pairs."""
    return f"For the finetuning notebook, so that the model answers in its role:\nsystem_message = {task.system!r}"
