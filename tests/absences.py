"""Client sampling with named absences."""

from dataclasses import dataclass

from fedlscl.federated.trainer import ClientSampling


@dataclass(frozen=True, kw_only=True)
class NamedAbsences(ClientSampling):
    """Leaves out the given (client, task, round) triples besides."""

    absences: frozenset = frozenset()

    def sample(self, num_clients, seed, progress):
        sampled = super().sample(num_clients, seed, progress)
        return [client for client in sampled if (client, *progress.position) not in self.absences]
