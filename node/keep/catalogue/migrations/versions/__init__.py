"""The revisions, in a line."""
