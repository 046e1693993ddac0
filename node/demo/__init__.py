"""The demonstration: phantom cohort, embedded PACS, guided run."""
