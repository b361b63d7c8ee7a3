"""Plain torch nets: they know no clients, no tasks and no Lightning."""
