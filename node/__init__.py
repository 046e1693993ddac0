"""The node: receive, pseudonymise, keep, answer."""

__version__ = "0.2.0"

IMPLEMENTATION_CLASS_UID = "2.25.238949817992553993677805726979551656877"
"""Names Osteon in associations and in file meta information (PS3.7 D.3.3.2)."""
IMPLEMENTATION_VERSION_NAME = f"OSTEON_{__version__}"[:16]
