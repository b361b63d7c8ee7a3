"""What the server has told a client and what of it has arrived: every command is carried out once, whatever is lost."""

from dataclasses import dataclass, field
from typing import Any

from fedlscl.deploy.letters import (
    BEGIN,
    DOWNLOAD,
    END,
    TEST_AFTER,
    TEST_BEFORE,
    TRAIN,
    UPLOAD,
    Command,
    Letter,
    Reply,
    Result,
)
from fedlscl.federated.method import Progress
from fedlscl.federated.payload import Payload

OF_A_ROUND = (TRAIN, TEST_BEFORE, UPLOAD)
"""Commands that are worth nothing when their round is over."""


@dataclass
class Ledger:
    """One client's commands, numbered from 1."""

    client: int
    number: int = 0
    """The newest one."""
    acknowledged: int = 0
    """The newest one that the client is known to have carried out."""
    commands: list[Command] = field(default_factory=list)
    """Those that it is not known to have carried out."""
    answer: Payload | None = None
    """For the download among them."""
    begun: int = -1
    """The newest task that it was told to begin."""
    ended: int = -1

    def tell(self, kind: str, task: int, round_: int) -> None:
        """Add a command."""
        self.number += 1
        self.commands.append(Command(self.number, kind, task, round_))

    def turn_over(self, task: int, last_round: int) -> None:
        """Add the end of the task before, if there is one, and the beginning of a task."""
        if task:
            self.end(task - 1, last_round)
        if self.begun < task:
            self.tell(BEGIN, task, 0)
            self.begun = task

    def end(self, task: int, last_round: int) -> None:
        """Add the end of a task and its test, once."""
        if self.ended < task:
            self.tell(END, task, last_round)
            self.tell(TEST_AFTER, task, last_round)
            self.ended = task

    def give(self, answer: Payload, progress: Progress) -> None:
        """Add the answer to the client's upload."""
        self.answer = answer
        self.tell(DOWNLOAD, *progress)

    def letter(self, run: str, identity: str) -> Letter:
        """All that is open."""
        return Letter(self.client, run, identity, self.acknowledged, list(self.commands), self.answer)

    def done_in(self, reply: Reply) -> list[tuple[Command, Result]]:
        """What a reply says to have done of what is open, and what it gave.

        Raises:
            ValueError: if the reply is another client's, or does not fit what was told.
        """
        if reply.client != self.client:
            raise ValueError(f"it says that it is client {reply.client}")
        if not self.acknowledged <= reply.done <= self.number:
            raise ValueError(f"it says that it did command {reply.done} of {self.acknowledged} to {self.number}")
        results = {result.number: result for result in reply.results}
        done = [command for command in self.commands if command.number <= reply.done]
        if missing := [command for command in done if command.number not in results]:
            raise ValueError(f"it sent no result of command {missing[0].number} ({missing[0].kind})")
        return [(command, results[command.number]) for command in done]

    def acknowledge(self, reply: Reply) -> None:
        """Strike out what was done."""
        self.commands = [command for command in self.commands if command.number > reply.done]
        self.acknowledged = reply.done
        if not any(command.kind == DOWNLOAD for command in self.commands):
            self.answer = None

    def miss(self) -> None:
        """Strike out what belongs to a round that went by without the client."""
        self.commands = [command for command in self.commands if command.kind not in OF_A_ROUND]

    def state_dict(self, answers: list[Payload]) -> dict[str, Any]:
        """Numbers and text; the answer as its place among all, since many clients may get the same."""
        place = next((i for i, answer in enumerate(answers) if answer is self.answer), None)
        return {**vars(self), "commands": [list(command) for command in self.commands], "answer": place}

    def load_state_dict(self, state: dict[str, Any], answers: list[Payload]) -> None:
        """Restore what ``state_dict`` gave."""
        place, commands = state["answer"], [Command(*command) for command in state["commands"]]
        vars(self).update({**state, "commands": commands, "answer": None if place is None else answers[place]})
