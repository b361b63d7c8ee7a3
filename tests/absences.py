"""Client sampling with named absences."""


def leave_out(trainer, absences):
    """Leave out the given (client, task, round) triples besides those that a trainer leaves out."""
    sample = trainer.sample_clients

    def sample_clients(num_clients, seed, progress):
        sampled = sample(num_clients, seed, progress)
        return [client for client in sampled if (client, *progress.position) not in absences]

    trainer.sample_clients = sample_clients
