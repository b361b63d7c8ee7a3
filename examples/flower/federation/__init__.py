"""The digits federation as a Flower app: a configuration, and two modules that name it."""
