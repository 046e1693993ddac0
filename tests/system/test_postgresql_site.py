"""A site with catalogue and vault on PostgreSQL: sent, answered, and every verb; and what `osteon check` says of the server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from pydicom import Dataset, dcmread
from roles import hand_in, running, send, until
from studies import image, study
from tiny_model import promote_tiny
from typer.testing import CliRunner, Result

from node import __main__ as command
from node import settings as site_settings
from node.commands.check import Verdict, _server, findings
from node.commands.init import init_site
from node.demo.pacs import Pacs
from node.errors import StoreBusy
from node.keep import database
from node.keep.database import Server
from node.keep.records import Hold
from node.receive.intake import Intake, Taken

if TYPE_CHECKING:
    from postgres import Cluster

SAFE = Server(
    ("2026", "osteon"), {"fsync": "on", "full_page_writes": "on", "server_encoding": "UTF8"}, False, False, datetime.now(UTC)
)
"""A server of which nothing is to be said."""


@pytest.fixture
def pacs(tmp_path: Path) -> Iterator[Pacs]:
    with Pacs(tmp_path / "pacs", callers=["OSTEON"]) as running_pacs:
        yield running_pacs


@dataclass
class Site:
    """A site on PostgreSQL, and the command `osteon`."""

    config: Path

    @property
    def settings(self) -> site_settings.Settings:
        return site_settings.load(self.config)

    def osteon(self, *words: str) -> str:
        """Run a verb in this process; what goes wrong is raised."""
        done: Result = CliRunner().invoke(command.build(), [*words, "--config", str(self.config)], catch_exceptions=False)
        return done.output


@pytest.fixture
def site(tmp_path: Path, postgresql: Cluster, pacs: Pacs, free_port: Callable[[], int]) -> Iterator[Site]:
    with postgresql.database() as catalogue, postgresql.database() as vault:
        yield Site(
            init_site(
                tmp_path / "site",
                node={"port": free_port(), "callers": [{"ae_title": "SENDER", "networks": ["127.0.0.0/8"], "purpose": "answer"}]},
                storage={"catalogue": catalogue, "vault": vault},
                pacs=[{"name": "main", "ae_title": pacs.ae_title, "host": "127.0.0.1", "port": pacs.port, "timeout_s": 3.0}],
                completion={"quiet_s": 0.3},
                delivery={"retry_first_s": 0.1, "retry_max_s": 0.5},
            )
        )


def reports(pacs: Pacs) -> list[Dataset]:
    return [dcmread(path) for path in pacs.held("SR")]


def test_a_study_is_sent_and_answered_and_every_verb_tells_of_it(
    site: Site, pacs: Pacs, tmp_path: Path, postgresql: Cluster
) -> None:
    promote_tiny(site.settings.storage.root / "models")
    sent = study(patient=1, images=2, PatientName="SECRET^NAME", AccessionNumber="ACC-1")
    burned = image(patient=2, BurnedInAnnotation="YES")
    with running("receive", config=site.config) as receiver, running("reply", config=site.config):
        receiver.event("listening")
        assert send([*sent, burned], port=site.settings.node.port) == [0, 0, 0]
        until(lambda: reports(pacs), seconds=60, told="an SR")
        until(lambda: "delivered" in site.osteon("status", "--study", "ACC-1"), seconds=20)
    (report,) = reports(pacs)
    assert (report.StudyInstanceUID, report.PatientName) == (sent[0].StudyInstanceUID, "SECRET^NAME")

    assert "quarantine 1" in site.osteon("status")
    held_id = next(word for word in site.osteon("quarantine", "list").split() if len(word) == 32)
    site.osteon("quarantine", "release", held_id, "--reason", "only an L in the corner")
    assert "empty" in site.osteon("quarantine", "list")
    table = tmp_path / "labels.csv"
    table.write_text(
        "patient_id,study,label,reader,labelled_on,confirmed_by\n"
        f"{sent[0].PatientID},ACC-1,ewing_sarcoma,reader-1,2026-03-01,histology\n"
    )
    assert "1 labels imported" in site.osteon("labels", "import", str(table))
    assert "ewing_sarcoma" in site.osteon("labels", "list")
    assert "sent" in site.osteon("delivery", "list")
    site.osteon("reply", "pause", "--reason", "a test")
    assert "OFF" in site.osteon("status")
    site.osteon("reply", "study", "ACC-1", "--reason", "once more")
    assert "complete" in site.osteon("status", "--study", "ACC-1")
    told = {(finding.what, finding.verdict) for finding in findings(site.settings)}
    assert ("catalogue", Verdict.OK) in told
    assert ("catalogue", Verdict.FAIL) in told, "the server of the tests runs with fsync off"

    storage = site.settings.storage
    everything = postgresql.log() + "".join(postgresql.dump(url.rsplit("/", 1)[1]) for url in (storage.catalogue, storage.vault))
    assert "vault_instances" in everything
    for secret in ("SECRET^NAME", sent[0].PatientID, "ACC-1", sent[0].StudyInstanceUID):
        assert secret not in everything
        assert secret.encode().hex() not in everything


@pytest.mark.long
def test_roles_ride_out_a_restart_of_the_server(tmp_path: Path, pacs: Pacs, free_port: Callable[[], int]) -> None:
    from postgres import cluster

    with cluster({}) as server:
        server.sql("CREATE DATABASE catalogue", "CREATE DATABASE vault")
        config = init_site(
            tmp_path / "site",
            node={"port": free_port(), "callers": [{"ae_title": "SENDER", "networks": ["127.0.0.0/8"], "purpose": "answer"}]},
            storage={"catalogue": server.url("catalogue"), "vault": server.url("vault")},
            pacs=[{"name": "main", "ae_title": pacs.ae_title, "host": "127.0.0.1", "port": pacs.port, "timeout_s": 3.0}],
            completion={"quiet_s": 0.3},
            inference={"claim_s": 3.0},
        )
        settings = site_settings.load(config)
        promote_tiny(settings.storage.root / "models")
        one = image(patient=1)
        with running("receive", config=config) as receiver, running("reply", config=config) as replier:
            receiver.event("listening")
            replier.event("replying")
            server.stop(hard=True)
            (refused,) = send([one], port=settings.node.port)
            assert refused not in (0, None), "an honest failure"
            replier.event("step put off")
            server.start()
            until(lambda: send([one], port=settings.node.port) == [0], seconds=60)
            until(lambda: reports(pacs), seconds=90, told="an SR, by roles that were never started again")
            assert receiver.process.poll() is None
            assert replier.process.poll() is None


def test_two_receivers_that_make_one_study_of_two_patients_at_once_keep_one(site: Site) -> None:
    """The same study UID under two PatientIDs, the same SOP UID with other pixels: one is archived, the other is held."""
    import threading

    with ExitStack() as stack:
        intakes = [Intake.open(site.settings) for _ in range(2)]
        for intake in intakes:
            stack.callback(intake.close)
        for number in range(6):
            one = image(patient=1, study=number)
            if number % 2:
                other = image(patient=1, study=number, instance=2, PatientID="SOMEBODY-ELSE", PatientBirthDate="20110101")
            else:
                other = image(patient=1, study=number, instance=2, SOPInstanceUID=one.SOPInstanceUID)
                other.file_meta.MediaStorageSOPInstanceUID = one.SOPInstanceUID
            taken: list[Taken] = []
            start = threading.Barrier(2)

            def receive(intake: Intake, which: Dataset, start: threading.Barrier, taken: list[Taken]) -> None:
                start.wait(20)
                taken.append(hand_in(intake, which))

            threads = [
                threading.Thread(target=receive, args=(intake, which, start, taken))
                for intake, which in zip(intakes, (one, other), strict=True)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
            assert sorted(taken) == [Taken.HELD, Taken.NEW]
            uid = intakes[0].keys.uid(one.StudyInstanceUID)
            (kept,) = intakes[0].catalogue.instances.of_study(uid)
            (held,) = intakes[0].catalogue.instances.held_of_study(uid)
            assert held.reason is (Hold.PATIENT_CONFLICT if number % 2 else Hold.PIXEL_CONFLICT)
            assert intakes[0].archive.digests(intakes[0].archive.read(kept))[1] == kept.pixel_digest
            assert intakes[0].vault.study(uid).pid == kept.pid


@pytest.mark.parametrize(
    ("server", "told"),
    [
        (replace(SAFE, settings=dict(SAFE.settings) | {"fsync": "off"}), "fsync = off"),
        (replace(SAFE, settings=dict(SAFE.settings) | {"full_page_writes": "off"}), "full_page_writes = off"),
        (replace(SAFE, settings=dict(SAFE.settings) | {"server_encoding": "SQL_ASCII"}), "SQL_ASCII"),
        (replace(SAFE, is_standby=True), "standby"),
        (replace(SAFE, now=SAFE.now + timedelta(seconds=60)), "60 s ahead of this machine's"),
        (replace(SAFE, now=SAFE.now - timedelta(seconds=9)), "9 s behind this machine's"),
    ],
)
def test_check_fails_on_a_server_that_cannot_be_trusted(server: Server, told: str) -> None:
    (finding,) = _server("catalogue", server, SAFE.now)
    assert finding.verdict is Verdict.FAIL
    assert told in finding.told


def test_check_finds_nothing_in_a_server_as_it_should_be(site: Site) -> None:
    assert [finding.verdict for finding in _server("catalogue", SAFE, SAFE.now)] == [Verdict.OK]
    assert [finding.verdict for finding in _server("vault", replace(SAFE, is_in_clear=True), SAFE.now)] == [
        Verdict.OK,
        Verdict.WARN,
    ]
    stores = [finding for finding in findings(site.settings) if finding.what in ("catalogue", "vault", "stores")]
    assert not any("clock" in finding.told and finding.verdict is Verdict.FAIL for finding in stores)


def test_check_fails_when_vault_and_catalogue_are_one_database_under_two_names(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = site.settings.storage.catalogue
    monkeypatch.setenv("OSTEON_VAULT", url)
    text = site.config.read_text("utf-8").replace(f'vault = "{site.settings.storage.vault}"', 'vault = "env:OSTEON_VAULT"')
    site.config.write_text(text, "utf-8")
    told = [finding.told for finding in findings(site.settings) if finding.verdict is Verdict.FAIL]
    assert any("same database as the catalogue" in each for each in told)


def test_a_password_in_the_environment_is_never_shown(
    site: Site, postgresql: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`check` and `status` with a password that is right, and with one that the server refuses."""
    monkeypatch.setattr(database, "BUSY_S", 1.0)
    name = site.settings.storage.catalogue.rsplit("/", 1)[1]
    postgresql.sql(f"CREATE ROLE {name} LOGIN PASSWORD 'Sesame-1'", f"ALTER DATABASE {name} OWNER TO {name}")
    try:
        text = site.config.read_text("utf-8")
        site.config.write_text(text.replace(f'"{site.settings.storage.catalogue}"', '"env:OSTEON_CATALOGUE"'), "utf-8")
        for password in ("Sesame-1", "Sesame-wrong"):
            monkeypatch.setenv("OSTEON_CATALOGUE", postgresql.url(name, user=f"{name}:{password}"))
            told = ""
            for verb in ("check", "status"):
                try:
                    told += site.osteon(verb)
                except StoreBusy as error:
                    told += str(error)
            assert "Sesame" not in told
            assert ("password authentication failed" in told) is (password == "Sesame-wrong")
    finally:
        postgresql.sql(f"ALTER DATABASE {name} OWNER TO postgres")
        postgresql.sql(f"DROP OWNED BY {name}", f"DROP ROLE {name}", database=name)
