"""Any number of models on the same held-out set: measured one after the other, each figure once.

What was measured is kept in a file for each model, so that an interrupted evaluation goes on where it stopped.
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from llm_finetuning import hardware, prompts
from llm_finetuning.data import pairs, preferences
from llm_finetuning.evaluation import agreement, candidates, generic, likelihood, mode, rules, scoreboard, tasks
from llm_finetuning.evaluation.candidates import Candidate
from llm_finetuning.evaluation.intervals import Sample
from llm_finetuning.files import checksums
from llm_finetuning.files.atomic import read_json, write_json
from llm_finetuning.inference.chat import Chat
from llm_finetuning.inference.generation import SamplingParameters
from llm_finetuning.prompts import Template
from llm_finetuning.settings import Evaluation, split_names

FORM = 2
"""Of what is kept of a model: what was kept in another form is measured again."""


@dataclass(frozen=True)
class HeldOut:
    """What every model is measured on: pairs that fit with every model's template, ranked pairs, plain text."""

    pairs: list[dict]
    ranked: list[dict]
    """Preference records."""
    passages: list[str]
    other_languages: list[str]
    """Replies in languages that finetuning does not teach."""


@dataclass
class Result:
    """What was measured of one model."""

    samples: dict[str, Sample]
    """Figure → what was measured on each unit, in the order of the held-out set."""
    tasks: dict[str, dict]
    answers: list[dict]
    """{"prompt", "history", "reference", "text"} of the first `eval_answers` held-out prompts."""


def templates(found: list[Candidate]) -> dict[str, Template]:
    """Each model's own chat template; a base without one is asked as the first model of its tokens that has one.

    Raises ValueError where no model has a chat template.
    """
    tokenizers = {candidate.name: candidate.tokenizer() for candidate in found}
    own = {
        name: prompts.template_for(tokenizer, date=prompts.FIXED_DATE)
        for name, tokenizer in tokenizers.items()
        if tokenizer.chat_template
    }
    if not own:
        raise ValueError(
            f"none of the models has a chat template ({', '.join(tokenizers)}): add the finetuned one, whose folder"
            " has one"
        )
    return {c.name: own.get(c.name) or _borrowed(c, tokenizers[c.name], list(own.values())) for c in found}


def _borrowed(candidate: Candidate, tokenizer: PreTrainedTokenizerBase, others: list[Template]) -> Template:
    """The first of the others whose token ids are the model's too; without one the fallback, in its own tokens."""
    vocabulary, rows = tokenizer.get_vocab().items(), candidate.config.get_text_config().vocab_size
    for template in others:
        if vocabulary <= template.tokenizer.get_vocab().items() and len(template.tokenizer) <= rows:
            return template
    print(f"{candidate.name} has no chat template, and other tokens than those that do: it is asked in Phi-2's format")
    return prompts.template_for(tokenizer, date=prompts.FIXED_DATE)


def held_out(settings: Evaluation, used: dict[str, Template]) -> HeldOut:
    """Draws the held-out set from the files that the data preparation wrote, the same for every model.

    A pair that is too long under one of the templates is left out for all. Raises FileNotFoundError without a
    validation file, ValueError where nothing fits, or a record is none.
    """
    drawn = pairs.read_prepared(settings.folders.val_file, "Validation")
    ranks = settings.folders.val_preferences
    ranked = preferences.read_prepared(ranks, "Validation") if ranks.is_file() and ranks.stat().st_size else []
    length, count, seed = settings.max_seq_length, settings.eval_pairs, settings.seed
    for template in {id(template): template for template in used.values()}.values():
        drawn = [cut.pair for cut in scoreboard.fitting(drawn, template, length)]
        ranked = [pair["record"] for pair in agreement.ranked_pairs(ranked, template, length)]
    texts = generic.passages(settings.generic_text, count) if settings.generic_text else []
    others = generic.other_languages(settings.source, settings.folders.val_file, count, seed)
    return HeldOut(pairs.draw(drawn, count, seed), agreement.sampled(ranked, count, seed), texts, others)


@mode.within_memory(mode.while_measuring)
def measure(
    candidate: Candidate, template: Template, data: HeldOut, settings: Evaluation, machine: hardware.Machine
) -> Result:
    """Measures a model, or what is still missing of it; each part is kept as soon as it is measured."""
    dtype = hardware.choose_dtype(settings.dtype, machine.capability)
    asked = replace(settings, dtype=str(dtype).removeprefix("torch."))
    path = settings.folders.evaluated / f"{candidate.name.replace('/', '--')}.json"
    kept = _Kept(path, _identity(candidate, template, data, asked))
    steps = [step for step in _steps(template, data, settings) if step.name not in kept.parts]
    if steps:
        with hardware.timed(candidate.name):
            model = candidate.load(dtype, machine.device)
            for step in steps:
                if not kept.has(step.name):
                    kept.add(step.name, _finite(candidate.name, step.run(model)))
        del model
        hardware.free_memory()
    return kept.result()


def _finite(name: str, part: dict) -> dict:
    """The part, if all that was measured is finite. Raises ValueError otherwise: its figures would say nothing."""
    for figure, sample in part.get("samples", {}).items():
        if odd := sum(not math.isfinite(value) for value in sample.values):
            raise ValueError(
                f"models: of {name} the {figure} is not finite on {odd} of {len(sample.values)} units: its weights are"
                " damaged, or the dtype overflows. Set dtype = 'float32', or leave it out of models"
            )
    return part


@dataclass(frozen=True)
class _Step:
    """A part of the evaluation of a model: {"samples": {figure: Sample}, "tasks": …, "answers": …}."""

    name: str
    run: Callable[[torch.nn.Module], dict]


def _steps(template: Template, data: HeldOut, settings: Evaluation) -> list[_Step]:
    steps = [_Step("held-out pairs", lambda model: _losses(model, template, data.pairs))]
    if settings.eval_answers:
        steps.append(_Step("answers", lambda model: _answers(model, template, data.pairs, settings)))
    if data.ranked:
        steps.append(_Step("ranks", lambda model: _ranks(model, template, data.ranked, settings)))
    plain = {"generic_loss": data.passages, "other_languages_loss": data.other_languages}
    for name, texts in plain.items():
        if texts:
            steps.append(_Step(name, partial(_generic, template=template, name=name, texts=texts, settings=settings)))
    if settings.follow_rules:
        steps.append(_Step("rules", lambda model: _rules(model, template, settings)))
    if names := split_names(settings.tasks):
        options = names, settings.task_limit, settings.task_folder
        steps.append(_Step("tasks", lambda model: {"tasks": tasks.figures(model, template, *options)}))
    return steps


def _losses(model: torch.nn.Module, template: Template, held_out_pairs: list[dict]) -> dict:
    loss = likelihood.losses(model, prompts.encode_all(held_out_pairs, template), template)
    texts = [pair["response"] for pair in held_out_pairs]
    return {"samples": {"loss": loss, "bits_per_byte": _bits_per_byte(loss, texts)}}


def _bits_per_byte(loss: Sample, texts: list[str]) -> Sample:
    """A loss that models with different tokenizers can be compared by."""
    return Sample([value / math.log(2) for value in loss.values], [len(text.encode()) for text in texts])


def _answers(model: torch.nn.Module, template: Template, held_out_pairs: list[dict], settings: Evaluation) -> dict:
    asked = [{"pair": pair} for pair in held_out_pairs[: settings.eval_answers]]
    given = scoreboard.answers(model, asked, template, settings.max_new_tokens)
    measured = scoreboard.of_answers(asked, given, settings.judge_exact_match)
    told = [
        {"prompt": row["pair"]["prompt"], "history": row["pair"].get("history") or [],
         "reference": row["pair"]["response"], "text": answer.text}
        for row, answer in zip(asked, given, strict=True)
    ]  # fmt: skip
    return {"samples": measured, "answers": told}


def _ranks(model: torch.nn.Module, template: Template, records: list[dict], settings: Evaluation) -> dict:
    ranked = agreement.ranked_pairs(records, template, settings.max_seq_length)
    return {"samples": agreement.rank_agreement(model, ranked, template)}


def _generic(model: torch.nn.Module, template: Template, name: str, texts: list[str], settings: Evaluation) -> dict:
    examples = generic.examples(texts, template, settings.max_seq_length)
    return {"samples": {name: likelihood.losses(model, examples, template)} if examples else {}}


def _rules(model: torch.nn.Module, template: Template, settings: Evaluation) -> dict:
    asked = rules.questions()
    sampling = SamplingParameters(max_new_tokens=settings.max_new_tokens)
    with mode.evaluating(model):
        given = Chat.of(model, template).answer_batch([question["messages"] for question in asked], sampling)
    return {"samples": {"rules_followed": Sample(rules.followed(asked, given))}}


def _identity(candidate: Candidate, template: Template, data: HeldOut, settings: Evaluation) -> str:
    """A hash of all that the figures of a model depend on."""
    asked = {name: value for name, value in asdict(settings).items() if name not in ("drive_folder", "models")}
    if settings.task_folder:
        files = sorted(path for path in Path(settings.task_folder).rglob("*") if path.is_file())
        asked["task_folder"] = checksums.hash_together(files)
    dated = [str(template.date)] * ("strftime_now" in str(template.tokenizer.chat_template))
    parts = [FORM, candidate.fingerprint(), template.tokenizer.chat_template, *dated, asdict(data), asked]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class _Kept:
    """The parts that were measured of a model, in a file that is begun afresh when what they depend on changed.

    Another evaluation that is at work in the same folder adds to it too: neither measures what the other has.
    """

    def __init__(self, path: Path, identity: str):
        self.path, self.identity = path, identity
        self.parts: dict[str, dict] = {}
        self.has("")

    def has(self, name: str) -> bool:
        """Whether the part was measured, here or by another evaluation."""
        try:
            found = read_json(self.path)
        except ValueError:  # of a disk that was full
            found = {}
        if isinstance(found, dict) and found.get("identity") == self.identity:
            self.parts = found["parts"] | self.parts
        return name in self.parts

    def add(self, name: str, part: dict) -> None:
        self.has(name)
        samples = {figure: asdict(sample) for figure, sample in part.get("samples", {}).items()}
        self.parts[name] = part | {"samples": samples}
        write_json(self.path, {"identity": self.identity, "parts": self.parts}, shared=True)

    def result(self) -> Result:
        made = Result({}, {}, [])
        for part in self.parts.values():
            made.samples |= {figure: Sample(**sample) for figure, sample in part["samples"].items()}
            made.tasks |= part.get("tasks", {})
            made.answers = part.get("answers") or made.answers
        return made


def _within_positions(settings: Evaluation, found: list[Candidate]) -> Evaluation:
    """The settings with a max_seq_length that every model has positions for."""
    shortest = min(found, key=lambda candidate: candidate.positions)
    if shortest.positions >= settings.max_seq_length:
        return settings
    print(f"max_seq_length = {shortest.positions} in place of {settings.max_seq_length}: {shortest.name} has no more")
    return replace(settings, max_seq_length=shortest.positions)


def compare(settings: Evaluation) -> dict[str, Result]:
    """Measures every model of the settings, one in memory at a time; what was measured before is not measured again.

    Everything that can be known beforehand is checked before the first model is loaded. Raises FileNotFoundError,
    ValueError or MemoryError.
    """
    if names := split_names(settings.tasks):
        tasks.install()
        tasks.check(names, settings.task_folder)
    found = candidates.named(settings)
    used = templates(found)
    for candidate in found:
        candidate.check()
    machine = hardware.detect(settings.dtype)
    candidates.check_memory(found, hardware.choose_dtype(settings.dtype, machine.capability), machine)
    settings = _within_positions(settings, found)
    data = held_out(settings, used)
    return {candidate.name: measure(candidate, used[candidate.name], data, settings, machine) for candidate in found}
