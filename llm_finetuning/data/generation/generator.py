"""Asks a model many things at once, each of them once: cache first, within the budget, until the server gives up."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from tqdm.auto import tqdm

from llm_finetuning.data.generation.budget import Budget, Usage, total
from llm_finetuning.data.generation.cache import AnswerCache
from llm_finetuning.data.generation.endpoint import Endpoint, GeneratorError, LocalModel
from llm_finetuning.data.generation.requests import TRANSIENT, Answer, Request

PATIENCE = 4
"""Requests in a row, beyond those that run side by side, that may fail before the server counts as gone."""

SHOWN = 20
"""Requests from which on a bar shows how far they are."""


class Generator:
    """Answers requests from the cache, and the others by the model.

    A failed request is remembered like an answer once another one has succeeded; where all fail in a row, the server
    has stopped, and the next run asks again.
    """

    def __init__(self, model: Endpoint | LocalModel, cache: AnswerCache, budget: Budget, max_parallel: int):
        self.model, self.cache, self.budget, self.max_parallel = model, cache, budget, max_parallel
        self.used: dict[str, Usage] = {}
        self.failed: list[tuple[Request, Answer]] = []
        self.exhausted = False
        self.halted = False
        self.lock = threading.Lock()
        budget.count(cache.answers.values())

    @property
    def usage(self) -> Usage:
        """Tokens of all answers that were asked for since this object was made, those of the cache among them."""
        return total(self.used.values())

    def ask(self, requests: Sequence[Request]) -> list[Answer | None]:
        """Returns the answers in the order of the requests; None where the budget is spent.

        Raises GeneratorError for what no request would survive; the answers until then are in the cache.
        """
        new = list({request.key: request for request in requests if self.cache.get(request) is None}.values())
        self.halted = False
        ask = self._batches if isinstance(self.model, LocalModel) else self._threads
        with tqdm(total=len(new), desc=requests[0].purpose if requests else "", disable=len(new) < SHOWN) as self.bar:
            failed = ask(new) if new else {}
        answers = [self.cache.get(request) or failed.get(request.key) for request in requests]
        both = zip(requests, answers, strict=True)
        self.used.update((request.key, Usage().plus(answer)) for request, answer in both if answer)
        return answers

    def _threads(self, requests: list[Request]) -> dict[str, Answer]:
        """Asks an endpoint from several threads; returns {key: answer} of all that came."""
        with ThreadPoolExecutor(self.max_parallel) as threads:
            futures = [threads.submit(self._one, request) for request in requests]
            try:
                answers = [future.result() for future in futures]
            except BaseException:  # KeyboardInterrupt too: what waits is not asked any more
                self.halted = True
                threads.shutdown(cancel_futures=True)
                raise
        return {request.key: answer for request, answer in zip(requests, answers, strict=True) if answer}

    def _batches(self, requests: list[Request]) -> dict[str, Answer]:
        """Asks a model in memory, `max_parallel` requests side by side."""
        for start in range(0, len(requests), self.max_parallel):
            batch = requests[start : start + self.max_parallel]
            for request, answer in zip(batch, self.model.answer(batch), strict=True):
                self._keep(request, answer)
                self.budget.count([answer])
        return {}

    def _one(self, request: Request) -> Answer | None:
        """Asks one request if nothing has stopped; None where the budget does not reach."""
        most = None if self.halted or self.exhausted else self.budget.reserve(request)
        if most is None:
            self.exhausted = self.exhausted or not self.halted
            return None
        answer = None
        try:
            answer = self.model(request)
            self._keep(request, answer)
        except BaseException:
            self.halted = True
            raise
        finally:
            self.budget.release(most, answer)
        return answer

    def _keep(self, request: Request, answer: Answer) -> None:
        """Writes an answer to the cache, with the failures before it; raises GeneratorError where all fail."""
        with self.lock:
            self.bar.update()
            self.failed.append((request, answer))
            if answer.fault not in TRANSIENT:
                ready, self.failed = self.failed, []
                for one in ready:
                    self.cache.add(*one)
            elif len(self.failed) >= self.max_parallel + PATIENCE:
                faults = ", ".join(dict.fromkeys(one.fault for _, one in self.failed))
                raise GeneratorError(
                    f"The server has stopped answering ({faults}; {len(self.failed)} requests in a row, each tried"
                    f" several times). {len(self.cache.answers):,} answers are kept: run all cells again to go on."
                )

    def settle(self) -> None:
        """Remembers the last failures too: called when what was wanted is there, so that nobody asks for them again."""
        for one in self.failed:
            self.cache.add(*one)
        self.failed = []
