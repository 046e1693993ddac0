"""A site of release 0.1.0, stored by that release's own code, opens with today's and goes on where it stood."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from shelf import Desk
from sqlalchemy import MetaData, create_engine, select
from studies import image

from node.keep.archive import Archive
from node.keep.catalogue import Catalogue
from node.keep.quarantine import Quarantine
from node.keep.records import DeliveryState, Hold, Purpose, StudyState
from node.keep.vault import Vault
from node.pseudonym import SiteKeys

if TYPE_CHECKING:
    from postgres import Cluster

STORED = Path(__file__).parent / "first_release"
KEYS, VAULT_KEY = SiteKeys.derive(bytes(range(32))), bytes(range(1, 33))
ENDED = datetime(2026, 3, 4, 21, 21, tzinfo=UTC)
"""A little after the last thing that 0.1.0 wrote."""
REPLACED = {"run": {"outcome"}}
"""What has another shape now: table -> columns."""
Rows = dict[str, list[tuple[Any, ...]]]


@pytest.fixture(params=["sqlite", "postgresql"])
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[dict[str, str]]:
    """Give the URLs of a copy of the stored catalogue and vault."""
    if request.param == "sqlite":
        for name in ("catalogue", "vault"):
            shutil.copy(STORED / f"{name}.db", tmp_path)
        yield {name: f"sqlite:///{tmp_path}/{name}.db" for name in ("catalogue", "vault")}
        return
    server: Cluster = request.getfixturevalue("postgresql")
    with server.database() as catalogue, server.database() as vault:
        urls = {"catalogue": catalogue, "vault": vault}
        for name, url in urls.items():
            server.sql((STORED / f"{name}.sql").read_text("utf-8"), database=url.rsplit("/", 1)[1])
        yield urls


def rows(url: str, columns: dict[str, list[str]] | None = None) -> Rows:
    """Read every row as it stands, of all tables and columns or of those given."""
    engine = create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    found = MetaData()
    found.reflect(engine)
    if columns is None:
        columns = {name: list(table.columns.keys()) for name, table in found.tables.items()}
    with engine.connect() as connection:
        read = {
            name: sorted(map(tuple, connection.execute(select(*(found.tables[name].c[column] for column in names)))), key=repr)
            for name, names in columns.items()
        }
    engine.dispose()
    return read


def columns_of(url: str) -> dict[str, list[str]]:
    engine = create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    found = MetaData()
    found.reflect(engine)
    engine.dispose()
    return {name: list(table.columns.keys()) for name, table in found.tables.items()}


def test_a_catalogue_of_the_first_release_keeps_every_row(stored: dict[str, str]) -> None:
    """In every column of then, but those that a later revision turned into others: these are named in `REPLACED`."""
    columns = columns_of(stored["catalogue"])
    del columns["alembic_version"]
    before = rows(stored["catalogue"], kept(columns))
    assert all(before.values()), "the stored catalogue has rows in every table"
    Catalogue.open(stored["catalogue"]).close()
    assert rows(stored["catalogue"], kept(columns)) == before


def kept(columns: dict[str, list[str]]) -> dict[str, list[str]]:
    return {name: [one for one in names if one not in REPLACED.get(name, set())] for name, names in columns.items()}


def test_every_row_of_the_first_release_means_what_it_meant(stored: dict[str, str]) -> None:
    with Catalogue.open(stored["catalogue"]) as catalogue:
        for name in ("receiving", "complete", "inferring", "inferred", "delivering", "delivered", "learned", "waiting", "expired",
                     "failed", "quarantined"):  # fmt: skip
            study = catalogue.studies.get(name)
            assert study is not None
            assert study.state is StudyState(name), name
        learned, delivered = catalogue.studies.get("learned"), catalogue.studies.get("delivered")
        assert learned is not None
        assert delivered is not None
        assert (learned.purpose, learned.locked) == (Purpose.LEARN, True)
        assert (delivered.purpose, delivered.locked, delivered.instances) == (Purpose.ANSWER, False, 2)
        assert catalogue.instances.locked_patients() == {"OST-learned", "OST-receiving"}
        first, revised = catalogue.results.of_study("revised")
        assert (first.model_id, revised.model_id, revised.predecessor) == ("v1", "v2", first.id)
        assert revised.findings.chosen == 0
        (second,) = (row for row in catalogue.deliveries.of_study("revised") if row.result_id == revised.id)
        (before,) = catalogue.deliveries.documents_before(second.id)
        assert catalogue.results.is_ours(before.sop_uid)
        assert [row.state for row in catalogue.deliveries.of_study("stuck")] == [DeliveryState.HELD, DeliveryState.DEAD]
        assert {(one.study_uid, one.label, one.labelled_on) for one in catalogue.labels.all()} == {
            ("delivered", "ewing", "2026-03-02"),
            ("learned", "ewing", "2026-03-03"),
        }
        assert {run.folder: run.decision for run in catalogue.runs.list()} == {"runs/1": "insufficient evidence", "runs/2": ""}
        assert catalogue.roles.flag("answers") == "paused"
        assert {one.reason for one, _since in catalogue.instances.held()} == {
            Hold.PATIENT_CONFLICT,
            Hold.MODALITY,
            Hold.BURNED_IN,
        }
        assert [act.what for act in catalogue.history.acts()][:2] == ["quarantine: discarded", "answers: paused"]
        assert catalogue.instances.dropped_terms() == [("BodyPartExamined", "hash-1", 2), ("ViewPosition", "hash-2", 1)]


def test_studies_of_the_first_release_go_on_where_they_stood(stored: dict[str, str]) -> None:
    with Catalogue.open(stored["catalogue"]) as catalogue:
        desk = Desk(catalogue, ENDED)
        desk.later(minutes=10)
        assert desk.complete() >= 1
        taken = []
        while (claimed := desk.claim()) is not None:
            taken.append(claimed.uid)
            desk.put(claimed.uid)
        assert {"receiving", "complete", "inferring"} <= set(taken), "also what a replier that is gone had claimed"
        assert "put off" not in taken
        desk.open()
        desk.later(hours=1)
        while (delivery := desk.take()) is not None:
            desk.send(delivery)
        for name in ("receiving", "complete", "inferring", "inferred", "delivering"):
            assert desk.state(name) is StudyState.DELIVERED, name
        assert desk.state("late") is StudyState.RECEIVING, "the late image opens its round when the old answer is out"
        assert desk.state("stuck") is StudyState.DELIVERING
        assert catalogue.studies.wake_waiting(desk.now) == 1
        assert desk.image("delivered", 3), "and takes new rows: sequences and keys go on behind the old ones"
        assert catalogue.deliveries.revive(None, desk.now + timedelta(hours=1)) == 2


def test_a_vault_of_the_first_release_opens_and_names_its_patients(stored: dict[str, str], tmp_path: Path) -> None:
    one = image(patient=2)
    with Vault.open(stored["vault"], VAULT_KEY) as vault, Catalogue.open(stored["catalogue"]) as catalogue:
        vault.check_site(KEYS.report_uid("site"))
        known = vault.study(KEYS.uid(one.StudyInstanceUID))
        assert known.original_study_uid == one.StudyInstanceUID
        assert b"Corrected^Patient2" in {element.value for element in known.patient}
        (instance,) = catalogue.instances.of_study(known.study_uid)
        assert [whose.original_sop_uid for whose in vault.instances(known.study_uid)] == [one.SOPInstanceUID]
        shutil.copytree(STORED / "archive", tmp_path / "archive")
        archive = Archive(tmp_path / "archive")
        assert archive.digests(archive.read(instance)) == (instance.header_digest, instance.pixel_digest)
    with Vault.open(stored["vault"], VAULT_KEY) as vault:
        assert vault.study(known.study_uid) == known


def test_a_vault_of_the_first_release_keeps_every_row(stored: dict[str, str]) -> None:
    before = rows(stored["vault"])
    Vault.open(stored["vault"], VAULT_KEY).close()
    after = rows(stored["vault"], columns_of(stored["vault"]))
    assert set(after["vault_meta"]) - set(before["vault_meta"]) == {("schema", b"1")}, "what it was is now written down"
    assert {name: after[name] for name in ("vault_studies", "vault_instances")} == {
        name: before[name] for name in ("vault_studies", "vault_instances")
    }


def test_the_quarantine_of_the_first_release_opens(tmp_path: Path) -> None:
    shutil.copytree(STORED / "quarantine", tmp_path / "quarantine")
    quarantine = Quarantine(tmp_path / "quarantine", VAULT_KEY)
    (held_id,) = quarantine.ids()
    assert image(patient=3).PixelData in quarantine.read(held_id)
