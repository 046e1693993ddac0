"""The node: receive, pseudonymise, keep, answer."""

__version__ = "0.1.0"
