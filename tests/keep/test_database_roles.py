"""deploy/postgresql/roles.sql: the trainer on another host reads what it needs and cannot write what it must not."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from shelf import Desk, findings, held, image

from models.errors import Final
from node.errors import NotPermitted, StoreBusy
from node.keep import database
from node.keep.catalogue import Catalogue
from node.keep.catalogue.timings import switch
from node.keep.records import Label, Purpose, Role, RunState, Worker
from node.keep.vault import Vault

if TYPE_CHECKING:
    from postgres import Cluster

SCRIPT = Path(__file__).parents[2] / "deploy" / "postgresql" / "roles.sql"
NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
PASSWORD = "trainer-pass-1"


@dataclass(frozen=True)
class Site:
    """A site whose databases and roles the script made."""

    server: Cluster
    owner: str
    trainer: str
    catalogue: str
    vault: str

    def run_script(self) -> str:
        names = {name: getattr(self, name) for name in ("owner", "trainer", "catalogue", "vault")}
        variables = [word for name, value in names.items() for word in ("-v", f"{name}={value}")]
        return self.server.psql(*variables, "-f", str(SCRIPT))

    def url(self, role: str, database: str) -> str:
        return self.server.url(database, user=f"{role}:{PASSWORD}")


@contextmanager
def made(postgresql: Cluster) -> Iterator[Site]:
    """Run the script for a site of its own."""
    mark = secrets.token_hex(4)
    site = Site(postgresql, *(f"{name}_{mark}" for name in ("owner", "trainer", "catalogue", "vault")))
    assert "no tables yet" in site.run_script()
    for role in (site.owner, site.trainer):
        postgresql.sql(f"ALTER ROLE {role} PASSWORD '{PASSWORD}'")
    yield site
    for name in (site.catalogue, site.vault):
        postgresql.drop(name)
    postgresql.sql(f"DROP ROLE {site.owner}", f"DROP ROLE {site.trainer}")


@pytest.fixture(scope="module")
def site(postgresql: Cluster) -> Iterator[Site]:
    with made(postgresql) as site:
        yield site


@pytest.fixture(scope="module")
def desk(site: Site) -> Iterator[Desk]:
    """Give the owner's catalogue, with a study, an image, a label and a result in it."""
    with Catalogue.open(site.url(site.owner, site.catalogue)) as catalogue:
        assert "rights of the trainer are set" in site.run_script()
        desk = Desk(catalogue, NOW)
        desk.image("1", locked=True)
        desk.answer("1")
        desk.image("2", purpose=Purpose.LEARN)
        catalogue.labels.put_all([Label("OST-1", "1", "", "ewing", "reader", "2026-03-01", "histology")], now=NOW, by="op")
        yield desk


@pytest.fixture(scope="module")
def trainer(site: Site, desk: Desk) -> Iterator[Catalogue]:
    """Give the same catalogue as the trainer opens it."""
    with Catalogue.open(site.url(site.trainer, site.catalogue)) as catalogue:
        yield catalogue


def test_the_trainer_does_all_that_a_training_run_does(trainer: Catalogue) -> None:
    assert [(one.sop_uid, one.locked) for one in trainer.instances.for_training()] == [("1.9.1", True), ("2.9.1", False)]
    assert trainer.instances.locked_patients() == {"OST-1"}
    assert [one.label for one in trainer.labels.all()] == ["ewing"]
    until = NOW + timedelta(minutes=5)
    trainer.timings.see("nightly", "{}", zone="UTC", named=("nightly",), now=NOW - timedelta(days=2))
    assert trainer.timings.queue("nightly", due_at=NOW, kind="finetune", recipe="phantom", now=NOW)
    queued = trainer.runs.lease(devices="dgx:0", host="dgx", ready=lambda run: True, now=NOW, until=until)
    assert queued is not None
    run = trainer.runs.enter(queued.id, queued.tries, Worker("dgx", 1, "boot"), until=until)
    assert trainer.runs.bind(run.id, run.tries, "run-1")
    assert trainer.runs.renew(run.id, run.tries, until=until) is RunState.RUNNING
    trainer.runs.done(run.id, run.tries, model_id="m", decision="refuse", now=NOW)
    assert [one.state for one in trainer.runs.list()] == [RunState.DONE]
    for minutes in (0, 20):
        trainer.roles.beat(Role("train", "dgx", 1, NOW + timedelta(minutes=minutes), {}))
    trainer.roles.leave("train", "dgx", 1)
    assert trainer.roles.flag("answers") is None
    assert trainer.history.acts()
    assert trainer.database.server() is not None, "`osteon check` may ask on its host, too"


@pytest.mark.long
def test_a_whole_training_run_works_as_the_trainer(postgresql: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from labelled import labelled_site, settings_of

    from training import cycle
    from training.recipe import Gate, named

    class Quiet:
        def stage(self, what: str, total: int = 0) -> None: ...
        def advance(self, done: int) -> None: ...
        def within(self, done: float) -> None: ...
        def epoch(self, fit: str, line: object) -> None: ...

    recipe = replace(named("phantom"), size_px=32, folds=3, epochs=1, batch=8, gate=Gate(draws=100), pretraining=None)
    with made(postgresql) as site:
        monkeypatch.setenv("OSTEON_CATALOGUE", site.url(site.owner, site.catalogue))
        config = labelled_site(
            tmp_path / "site", patients=24, is_locked=lambda one: one % 3 == 0, storage={"catalogue": "env:OSTEON_CATALOGUE"}
        )
        site.run_script()
        monkeypatch.setenv("OSTEON_CATALOGUE", site.url(site.trainer, site.catalogue))
        outcome = cycle.run(settings_of(config), recipe, now=lambda: NOW, progress=Quiet())
        assert outcome.decision == "insufficient evidence"
        with Catalogue.open("env:OSTEON_CATALOGUE") as catalogue:
            assert [(run.folder, run.state) for run in catalogue.runs.list()] == [(outcome.run, RunState.DONE)]


WRITES: dict[str, Callable[[Catalogue], Any]] = {
    "an image": lambda own: own.instances.note(image("3"), purpose=Purpose.ANSWER, calling_ae="X", locked=False, now=NOW),
    "an image's age": lambda own: own.instances.correct("1.9.1", age_years=40, sex="M"),
    "a held image": lambda own: own.instances.hold(held("1", 7), now=NOW),
    "a study": lambda own: own.studies.reopen("1", now=NOW),
    "a study's state": lambda own: own.studies.fail("1", reason="x", next_attempt_at=None, now=NOW),
    "a result": lambda own: own.results.put(
        "1", findings("1"), content_digest="0" * 64, settings_digest="s", destinations=["main"], now=NOW
    ),
    "a delivery": lambda own: own.deliveries.kill(1, "x", now=NOW),
    "a sent delivery": lambda own: own.deliveries.sent(1, now=NOW),
    "a label": lambda own: own.labels.put_all(
        [Label("OST-1", "1", "", "osteomyelitis", "other", "2026-03-02", "opinion")], now=NOW, by="x"
    ),
    "a switch": lambda own: own.roles.set_flag("answers", "on", by="x", reason="y", now=NOW),
}


@pytest.mark.parametrize("what", WRITES)
def test_the_server_refuses_the_trainer_to_write(trainer: Catalogue, desk: Desk, what: str) -> None:
    delivery = desk.catalogue.deliveries.list()
    with pytest.raises(NotPermitted, match=r"permission denied|row-level security"):
        WRITES[what](trainer)
    assert desk.catalogue.deliveries.list() == delivery
    assert desk.study("1").state == "delivered"


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE study SET state = 'complete'",
        "UPDATE delivery SET state = 'pending'",
        "UPDATE instance SET path = ''",
        "UPDATE patient SET locked = false",
        "DELETE FROM document",
        "DELETE FROM history",
        "UPDATE history SET by = 'nobody'",
        "UPDATE alembic_version SET version_num = '0000'",
        "CREATE TABLE mine (id int)",
        "SELECT * FROM delivery",
        "SELECT * FROM result",
    ],
)
def test_nor_does_any_sql_of_the_trainer_get_there(trainer: Catalogue, statement: str) -> None:
    with pytest.raises(NotPermitted, match=r"permission denied|must be owner"):
        trainer.database.write(lambda connection: connection.exec_driver_sql(statement))


def test_of_the_switches_the_trainer_writes_those_of_schedules_alone(trainer: Catalogue, desk: Desk) -> None:
    desk.catalogue.roles.set_flag("answers", "paused", by="op", reason="weeks of silence", now=NOW)
    trainer.timings.see("weekly", "{}", zone="UTC", named=("weekly",), now=NOW)
    trainer.roles.set_flag(switch("weekly"), "paused", by="op", reason="x", now=NOW)
    trainer.timings.see("saturdays", "{}", zone="UTC", named=("saturdays",), now=NOW)  # renamed
    assert desk.catalogue.roles.flag(switch("saturdays")) == "paused"
    trainer.database.write(lambda connection: connection.exec_driver_sql("UPDATE flag SET value = 'on'"))
    trainer.database.write(lambda connection: connection.exec_driver_sql("DELETE FROM flag"))
    assert (trainer.roles.flag("answers"), trainer.roles.flag(switch("saturdays"))) == ("paused", None)
    desk.catalogue.roles.set_flag("answers", "on", by="op", reason="over", now=NOW)


@pytest.mark.usefixtures("desk")
def test_the_trainer_has_no_way_into_the_vault(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "BUSY_S", 1.0)
    Vault.open(site.url(site.owner, site.vault), bytes(range(32))).close()
    with pytest.raises(StoreBusy, match="permission denied for database"):
        Vault.open(site.url(site.trainer, site.vault), bytes(range(32)))


@pytest.mark.usefixtures("desk")
def test_a_trainer_of_another_release_is_told_who_has_to_migrate(site: Site) -> None:
    def change(statement: str) -> None:
        site.server.sql(statement, database=site.catalogue)

    change("UPDATE alembic_version SET version_num = '9' || version_num")
    with pytest.raises(Final, match="newer version"):
        Catalogue.open(site.url(site.trainer, site.catalogue))
    change("UPDATE alembic_version SET version_num = substr(version_num, 2)")
    change("ALTER TABLE alembic_version RENAME TO elsewhere")  # as a database that no role of this release has opened
    with pytest.raises(NotPermitted, match="as the owner of the database"):
        Catalogue.open(site.url(site.trainer, site.catalogue))
    change("ALTER TABLE elsewhere RENAME TO alembic_version")
    Catalogue.open(site.url(site.trainer, site.catalogue)).close()


@pytest.mark.usefixtures("desk")
def test_rights_that_the_trainer_got_otherwise_are_taken_back(site: Site) -> None:
    site.server.sql(f"GRANT ALL ON study TO {site.trainer}", database=site.catalogue)
    site.run_script()
    with Catalogue.open(site.url(site.trainer, site.catalogue)) as trainer, pytest.raises(NotPermitted):
        trainer.studies.reopen("1", now=NOW)
