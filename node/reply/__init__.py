"""The door out: completion, inference, report, delivery."""
