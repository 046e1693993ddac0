"""The command `osteon`, one file a verb group."""
