"""The limits of the page's queue: one question at a time for each visitor, and a number of questions in all."""

import time
from dataclasses import dataclass, field


@dataclass
class Ticket:
    """A visitor's place in the queue; `taken` once the answer has begun."""

    since: float
    taken: bool = False


@dataclass
class Visitors:
    """The visitors who wait for an answer: `limit` in all, each forgotten after `lost_after` seconds."""

    limit: int
    lost_after: float
    tickets: dict[str, Ticket] = field(default_factory=dict)

    def refusal(self, visitor: str) -> str:
        """Gives the visitor a ticket and returns "", or says why there is none."""
        oldest = time.monotonic() - self.lost_after
        self.tickets = {v: ticket for v, ticket in self.tickets.items() if ticket.since > oldest}
        if visitor in self.tickets:
            return "Your last question is still being answered."
        if len(self.tickets) >= self.limit:
            return "Too many visitors are waiting. Try again in a minute."
        self.tickets[visitor] = Ticket(time.monotonic())
        return ""

    def take(self, visitor: str) -> bool:
        """Returns whether the visitor holds a ticket whose answer has not begun, and begins it."""
        ticket = self.tickets.get(visitor)
        if ticket is None or ticket.taken:
            return False
        ticket.taken = True
        return True

    def leave(self, visitor: str) -> None:
        self.tickets.pop(visitor, None)
