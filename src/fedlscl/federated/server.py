"""What the server does in a round; the same in a simulation and over a network."""

from fedlscl.federated.door import Door
from fedlscl.federated.local import TrainStage, seeded_stages
from fedlscl.federated.method import Method, Progress
from fedlscl.federated.payload import Payload, Upload
from fedlscl.federated.seeding import Turn, seed_turn


class Server:
    """Turns the uploads of a round into one answer for each sender.

    Args:
        method: whose hooks.
        seed: of the run.
        door: what uploads have to pass.
    """

    def __init__(self, method: Method, seed: int, door: Door) -> None:
        self.method, self.seed, self.door = method, seed, door

    def admit(self, uploads: list[Upload], progress: Progress) -> list[Upload]:
        """The uploads that count; no other may be trained on or aggregated."""
        return self.door.admit(uploads, progress)

    def train(self, uploads: list[Upload], progress: Progress, train: TrainStage) -> None:
        """What the method trains at the server."""

        def seed(number: int) -> None:
            place = (*progress, number) if number else tuple(progress)
            seed_turn(self.seed, Turn.SERVER_TRAIN, *place)

        seeded_stages(self.method.server_stages(uploads, progress), None, train, seed)

    def aggregate(self, uploads: list[Upload], progress: Progress) -> dict[int, Payload]:
        """One answer for each sender, by client."""
        seed_turn(self.seed, Turn.SERVER, *progress)
        answers = self.method.aggregate(uploads, progress)
        return {upload.client: answer for upload, answer in zip(uploads, answers, strict=True)}
