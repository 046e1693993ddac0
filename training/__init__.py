"""The trainer: sees pseudonyms and pixels, never identities."""
