"""The catalogue: all SQL about instances, studies, results, deliveries, labels, runs, schedules and roles.

In: frozen records and the time. Out: frozen records, after what was written is on the disk. Only pseudonyms, keyed hashes, states
and times stand here; an identity never does. States of studies change in `states.py` alone, those of runs in `runs.py`.
"""

from __future__ import annotations

from node.keep.catalogue.deliveries import Deliveries
from node.keep.catalogue.figures import Figures
from node.keep.catalogue.history import History
from node.keep.catalogue.instances import Instances
from node.keep.catalogue.labels import Labels
from node.keep.catalogue.patients import Patients
from node.keep.catalogue.results import Results
from node.keep.catalogue.roles import Roles
from node.keep.catalogue.runs import Runs
from node.keep.catalogue.schema import HEAD, MIGRATIONS, metadata, patient, study
from node.keep.catalogue.studies import Studies
from node.keep.catalogue.timings import Timings
from node.keep.database import REVISION, Database, has_rows

__all__ = ["Catalogue"]


class Catalogue:
    """The catalogue of one site; safe to use from any thread of the process that opened it."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.instances = Instances(database)
        self.patients = Patients(database)
        self.studies = Studies(database)
        self.results = Results(database)
        self.deliveries = Deliveries(database)
        self.labels = Labels(database)
        self.runs = Runs(database)
        self.timings = Timings(database)
        self.roles = Roles(database)
        self.history = History(database)
        self.figures = Figures(database)

    @classmethod
    def open(cls, url: str) -> Catalogue:
        """Open the catalogue, made or migrated when need be; see `Database.open` for what it raises."""
        return cls(Database.open(url, metadata, migrations=MIGRATIONS, head=HEAD))

    @staticmethod
    def is_there(url: str) -> bool:
        """Say whether there is a catalogue at `url`, be it empty; the look makes and changes nothing."""
        return has_rows(url, REVISION)

    @staticmethod
    def is_full(url: str) -> bool:
        """Say whether a catalogue at `url` knows any study or patient; the look makes and changes nothing."""
        return has_rows(url, study, patient)

    def close(self) -> None:
        """Finish what waits to be written and close."""
        self.database.close()

    def __enter__(self) -> Catalogue:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()
