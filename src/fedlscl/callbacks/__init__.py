"""What happens beside training: progress, TensorBoard, result files."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedlscl.federated.client import Client
    from fedlscl.federated.method import Stage
    from fedlscl.federated.state import RunState


class Callback:
    """Observes a federation; every hook does nothing until overridden. Tasks and rounds count from 0.

    A callback reads ``run.progress``, ``matrix``, ``traffic`` (bytes and numbers sent, clients x tasks x rounds),
    ``history`` (one entry per finished stage) and ``clients``. Stages of the server come with None as the client.
    """

    def on_fit_start(self, run: "RunState") -> None:
        """Clients exist; a checkpoint, if any, is loaded."""

    def on_task_start(self, run: "RunState") -> None:
        """Every client has new classes."""

    def on_round_start(self, run: "RunState") -> None:
        """Clients are about to train."""

    def on_client_start(self, run: "RunState", client: "Client") -> None:
        """A client's turn in a round begins."""

    def on_stage_start(self, run: "RunState", client: "Client | None", stage: "Stage") -> None:
        """A client, or the server, begins a stage."""

    def on_batch_end(self, run: "RunState", client: "Client | None", num_images: int) -> None:
        """One optimizer step is done."""

    def on_stage_end(
        self,
        run: "RunState",
        client: "Client | None",
        stage: "Stage",
        terms: dict[str, float],
        seconds: float,
    ) -> None:
        """``terms`` are the objective's means over the last epoch."""

    def on_evaluation_start(self, run: "RunState", client: "Client", phase: str) -> None:
        """A client is about to be tested, 'before' or 'after' the last aggregation of a task."""

    def on_evaluation_end(self, run: "RunState", client: "Client", phase: str, seconds: float) -> None:
        """The matrix has the client's rows."""

    def on_server_end(self, run: "RunState", seconds: float) -> None:
        """The server has its answers."""

    def on_round_end(self, run: "RunState") -> None:
        """Answers are downloaded, traffic is counted."""

    def on_task_end(self, run: "RunState") -> None:
        """The matrix has its row for this task."""

    def on_checkpoint(self, run: "RunState") -> None:
        """A checkpoint was written."""

    def on_fit_end(self, run: "RunState") -> None:
        """All tasks are learned."""

    def on_exception(self, run: "RunState") -> None:
        """The run ends early: put the terminal back in order."""
