"""Any number of models on the same held-out set: measured one after the other, each figure once.

What was measured is kept in a file for each model, so that an interrupted evaluation goes on where it stopped.
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from llm_finetuning import hardware, prompts
from llm_finetuning.data import pairs, preferences
from llm_finetuning.evaluation import agreement, candidates, generic, likelihood, mode, rules, scoreboard, tasks
from llm_finetuning.evaluation.candidates import Candidate
from llm_finetuning.evaluation.intervals import Sample
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
    """Each model's own chat template; a base without one is asked as the first model that has one.

    Raises ValueError where no model has a chat template.
    """
    own = {candidate.name: candidate.own_template() for candidate in found}
    shared = next((template for template in own.values() if template), None)
    if shared is None:
        raise ValueError(
            f"none of the models has a chat template ({', '.join(own)}): add the finetuned one, whose folder has one"
        )
    return {name: template or shared for name, template in own.items()}


def held_out(settings: Evaluation, used: dict[str, Template]) -> HeldOut:
    """Draws the held-out set from the files that the data preparation wrote, the same for every model.

    A pair that is too long under one of the templates is left out for all. Raises FileNotFoundError without a
    validation file, ValueError where nothing fits.
    """
    drawn = pairs.read_prepared(settings.folders.val_file, "Validation")
    ranked = preferences.read(settings.folders.val_preferences)
    length, count, seed = settings.max_seq_length, settings.eval_pairs, settings.seed
    for template in {id(template): template for template in used.values()}.values():
        drawn = [cut.pair for cut in scoreboard.fitting(drawn, template, length)]
        ranked = [pair["record"] for pair in agreement.ranked_pairs(ranked, template, length)]
    texts = generic.passages(settings.generic_text, count) if settings.generic_text else []
    others = generic.other_languages(settings.source, settings.folders.val_file, count, seed)
    return HeldOut(pairs.draw(drawn, count, seed), agreement.sampled(ranked, count, seed), texts, others)


def measure(
    candidate: Candidate, template: Template, data: HeldOut, settings: Evaluation, machine: hardware.Machine
) -> Result:
    """Measures a model, or what is still missing of it; each part is kept as soon as it is measured."""
    kept = _Kept(settings.folders.evaluated / f"{candidate.name.replace('/', '--')}.json", _identity(
        candidate, template, data, settings))  # fmt: skip
    steps = [step for step in _steps(template, data, settings) if step.name not in kept.parts]
    if steps:
        dtype = hardware.choose_dtype(settings.dtype, machine.capability)
        with hardware.timed(candidate.name):
            model = candidate.load(dtype, machine.device)
            for step in steps:
                kept.add(step.name, step.run(model))
        del model
        hardware.free_memory()
    return kept.result()


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
    loss = likelihood.losses(model, generic.examples(texts, template, settings.max_seq_length), template)
    return {"samples": {name: loss}}


def _rules(model: torch.nn.Module, template: Template, settings: Evaluation) -> dict:
    asked = rules.questions()
    sampling = SamplingParameters(max_new_tokens=settings.max_new_tokens)
    with mode.evaluating(model):
        given = Chat.of(model, template).answer_batch([question["messages"] for question in asked], sampling)
    return {"samples": {"rules_followed": Sample(rules.followed(asked, given))}}


def _identity(candidate: Candidate, template: Template, data: HeldOut, settings: Evaluation) -> str:
    """A hash of all that the figures of a model depend on."""
    asked = {name: value for name, value in asdict(settings).items() if name not in ("drive_folder", "models")}
    parts = [FORM, candidate.fingerprint(), template.tokenizer.chat_template, asdict(data), asked]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class _Kept:
    """The parts that were measured of a model, in a file that is begun afresh when what they depend on changed."""

    def __init__(self, path: Path, identity: str):
        self.path, self.identity = path, identity
        found = read_json(path)
        self.parts: dict[str, dict] = found["parts"] if found.get("identity") == identity else {}

    def add(self, name: str, part: dict) -> None:
        samples = {figure: asdict(sample) for figure, sample in part.get("samples", {}).items()}
        self.parts[name] = part | {"samples": samples}
        write_json(self.path, {"identity": self.identity, "parts": self.parts})

    def result(self) -> Result:
        made = Result({}, {}, [])
        for part in self.parts.values():
            made.samples |= {figure: Sample(**sample) for figure, sample in part["samples"].items()}
            made.tasks |= part.get("tasks", {})
            made.answers = part.get("answers") or made.answers
        return made


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
    machine = hardware.detect(settings.dtype)
    candidates.check_memory(found, hardware.choose_dtype(settings.dtype, machine.capability), machine)
    data = held_out(settings, used)
    return {candidate.name: measure(candidate, used[candidate.name], data, settings, machine) for candidate in found}
