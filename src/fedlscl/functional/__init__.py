"""Pure mathematics, without nets, clients or devices."""
