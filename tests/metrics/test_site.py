"""A whole site that is watched: both roles as processes, a PACS, a stranger; then what its pages and its log lines say of it.

What stands in deploy/ for Prometheus and Grafana is compared with what these roles really show.
"""

from __future__ import annotations

import json
import re
import socket
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from time import sleep
from typing import Any
from urllib.parse import quote

import pages
import pytest
import yaml
from certificates import Authority
from prometheus_client.samples import Sample
from pydicom.uid import EnhancedSRStorage
from roles import Role, running, send, until
from shared import tool
from studies import image, study
from tiny_model import promote_tiny

from node import settings as site_settings
from node.commands.init import init_site
from node.demo.pacs import Pacs
from node.keep.catalogue import Catalogue
from node.keep.records import LAST_BACKUP, Run, Worker
from node.metrics.figures import FRESH_S
from node.pseudonym import SiteKeys
from node.settings import Settings, load_key

pytestmark = pytest.mark.xdist_group("watched site")  # one worker, so that the site runs once
HOUR = timedelta(hours=1)
DEPLOY = Path(__file__).parents[2] / "deploy"
SCRAPED = {"job", "instance", "role"}
"""Labels that Prometheus adds, by deploy/prometheus/prometheus.yml."""


@dataclass
class Site:
    """What ran, and what it said."""

    settings: Settings
    uid: str
    """Of the study that was answered."""
    receiver: Role
    replier: Role

    def scrape(self) -> dict[str, list[Sample]]:
        ports = self.settings.metrics
        return {"receive": pages.scrape(ports.receive_port), "reply": pages.scrape(ports.reply_port)}

    @property
    def events(self) -> list[dict[str, Any]]:
        return sorted([*self.receiver.events, *self.replier.events], key=lambda line: line["at"])


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Run a site through a little of everything: answered, sent again, held, refused, rejected, learned, a PACS that is away."""
    folder = tmp_path_factory.mktemp("watched")
    authority = Authority(folder / "ca")
    own = authority.issue("osteon")
    tls = {"certificate": str(own.certificate), "key": str(own.key), "ca": str(authority.certificate), "port": 0}
    with Pacs(folder / "pacs", callers=["OSTEON"]) as pacs:
        config = init_site(
            folder / "site",
            **{"node.tls": tls | {"keep_plain_port": True}},
            node={"port": 0, "callers": [{"ae_title": "SENDER", "networks": ["127.0.0.0/8"]}]},
            pacs=[
                {"name": "main", "ae_title": pacs.ae_title, "host": "127.0.0.1", "port": pacs.port},
                {"name": "away", "ae_title": "AWAY", "host": "127.0.0.1", "port": free_port(), "timeout_s": 1.0},
            ],
            completion={"quiet_s": 0.5},
            delivery={"retry_first_s": 0.2, "retry_max_s": 1.0},
            metrics={"receive_port": free_port(), "reply_port": free_port(), "schedule_port": 0},
        )
        settings = site_settings.load(config)
        promote_tiny(settings.storage.root / "models")
        _runs(settings)
        with running("receive", config=config) as receiver, running("reply", config=config) as replier:
            port = receiver.event("listening")["port"]
            answered = study(patient=1, images=2)
            assert send(answered, port=port) == [0, 0]
            assert send(answered[:1], port=port) == [0]
            assert send([image(patient=2, BurnedInAnnotation="YES")], port=port) == [0]
            assert send([image(patient=3)], port=port, called="OSTEON_LEARN") == [0]
            strange = image(patient=4)
            strange.SOPClassUID = strange.file_meta.MediaStorageSOPClassUID = EnhancedSRStorage
            assert send([strange], port=port) == [0x0122]
            assert send([image(patient=5)], port=port, calling="STRANGER") == []
            replier.event("result delivered")
            until(lambda: any(line.get("destination") == "away" for line in replier.events))
            keys = SiteKeys.derive(load_key(settings.storage.site_key))
            yield Site(settings, keys.uid(answered[0].StudyInstanceUID), receiver, replier)


def _runs(settings: Settings) -> None:
    """Enter training runs, as the trainer does: the newest of each kind has ended well, has failed, or runs."""
    with Catalogue.open(settings.storage.catalogue) as catalogue:
        runs, now = catalogue.runs, datetime.now(UTC)
        for kind, decision in (("finetune", ""), ("finetune", "insufficient evidence"), ("probe", "")):
            run = _begun(catalogue, kind, now)
            if decision:
                runs.done(run.id, run.tries, model_id="", decision=decision, now=now)
            else:
                runs.fail(run.id, run.tries, "too few images for a fold", now=now)
        _begun(catalogue, "pretrain", now)
        catalogue.roles.set_flag(LAST_BACKUP, f"{now:%Y-%m-%dT%H:%M:%S%z} 4096", by="test", reason="/backups", now=now)
        catalogue.timings.see("nightly", "{}", zone="UTC", named=("nightly",), now=now)
        catalogue.timings.plan("nightly", now + timedelta(hours=1))


def _begun(catalogue: Catalogue, kind: str, now: datetime) -> Run:
    worker = Worker("here", 1, "boot 1")
    return catalogue.runs.start(kind=kind, recipe="phantom", devices=f"cpu {kind}", worker=worker, now=now, until=now + HOUR)


# --- what the pages say ----------------------------------------------------------------------------------------------------


def test_the_receiver_counts_what_came(site: Site) -> None:
    shown = site.scrape()["receive"]
    counted = lambda name, **labels: pages.value(shown, name, **labels)  # noqa: E731
    assert counted("osteon_instances_total", calling_ae="SENDER", outcome="new") == 3
    assert counted("osteon_instances_total", calling_ae="SENDER", outcome="known") == 1
    assert counted("osteon_instances_total", calling_ae="SENDER", outcome="held") == 1
    assert counted("osteon_instances_held_total", reason="burned-in annotation") == 1
    assert counted("osteon_quarantine_instances", reason="burned-in annotation") == 1
    assert counted("osteon_images") == 3
    assert counted("osteon_instances_refused_total", status="0122H") == 1
    assert counted("osteon_associations_accepted_total", calling_ae="SENDER") == 5
    assert counted("osteon_associations_rejected_total", reason="calling AE title not recognised") == 1
    assert counted("osteon_intake_seconds_count") == 5
    assert counted("osteon_received_bytes_total", calling_ae="SENDER") > 5 * 64 * 48 * 2
    assert counted("osteon_disk_free_bytes", store="root") > 0
    assert not any("STRANGER" in str(sample.labels) for sample in shown), "a stranger chooses no label"


def test_the_replier_shows_the_way_of_the_studies(site: Site) -> None:
    until(lambda: pages.value(site.scrape()["reply"], "osteon_studies", state="delivering") == 1)
    shown = site.scrape()["reply"]
    counted = lambda name, **labels: pages.value(shown, name, **labels)  # noqa: E731
    assert counted("osteon_studies", state="learned") == 1
    assert counted("osteon_studies", state="quarantined") == 1
    assert 0 < counted("osteon_oldest_study_age_seconds") < 600
    assert counted("osteon_classifications_total", outcome="class") == 1
    assert counted("osteon_inference_seconds_count") == 1
    assert counted("osteon_answer_seconds_count", destination="main") == 1
    assert 0.5 < counted("osteon_answer_seconds_sum", destination="main") < 300, "from the first image, over the quiet time"
    assert counted("osteon_answer_seconds_count", destination="away") == 0
    assert counted("osteon_deliveries", destination="main", state="sent") == 1
    assert counted("osteon_deliveries", destination="away", state="pending") == 1
    assert counted("osteon_delivery_attempts_total", destination="main", outcome="sent") == 1
    assert counted("osteon_delivery_attempts_total", destination="away", outcome="put off") >= 1
    sent_at = counted("osteon_delivery_last_success_timestamp_seconds", destination="main")
    assert abs(datetime.now(UTC).timestamp() - sent_at) < 600
    assert counted("osteon_delivery_last_success_timestamp_seconds", destination="away") == 0
    assert counted("osteon_answers_on") == 1
    assert counted("osteon_model_trouble") == 0
    (model,) = [sample.labels["version"] for sample in shown if sample.name == "osteon_model_info"]
    assert model == site.replier.event("model in service")["model"]
    assert abs(datetime.now(UTC).timestamp() - counted("osteon_model_in_service_timestamp_seconds")) < 600


def test_training_runs_are_told_by_their_states(site: Site) -> None:
    shown = site.scrape()["reply"]
    runs = {(s.labels["kind"], s.labels["state"]): s.value for s in shown if s.name == "osteon_runs"}
    assert runs == {("finetune", "failed"): 1, ("finetune", "done"): 1, ("pretrain", "running"): 1, ("probe", "failed"): 1}
    last = [sample.labels for sample in shown if sample.name == "osteon_run_last_info"]
    assert {"kind": "finetune", "state": "done", "decision": "insufficient evidence"} in last
    assert pages.value(shown, "osteon_run_last_finished_timestamp_seconds", kind="pretrain") == 0
    due_in_s = pages.value(shown, "osteon_schedule_next_timestamp_seconds", schedule="nightly") - datetime.now(UTC).timestamp()
    assert 3000 < due_in_s < 3700


def test_the_end_of_our_certificate_is_told(site: Site) -> None:
    ends_at = pages.value(site.scrape()["receive"], "osteon_certificate_end_timestamp_seconds", certificate="listener")
    assert 80 * 86400 < ends_at - datetime.now(UTC).timestamp() < 100 * 86400


def test_the_newest_backup_is_told(site: Site) -> None:
    made_at = pages.value(site.scrape()["reply"], "osteon_backup_last_timestamp_seconds")
    assert abs(datetime.now(UTC).timestamp() - made_at) < 600


def test_both_roles_are_healthy_and_ready_with_a_pacs_that_is_away(site: Site) -> None:
    for port in (site.settings.metrics.receive_port, site.settings.metrics.reply_port):
        assert pages.told(port, "/healthz")[0] == 200
        assert pages.told(port, "/readyz")[0] == 200
    _code, told = pages.told(site.settings.metrics.reply_port, "/readyz")
    assert told["destinations_away"] == ["away"]
    assert told["model"]


def test_pages_name_neither_pseudonym_nor_patient(site: Site) -> None:
    for port in (site.settings.metrics.receive_port, site.settings.metrics.reply_port):
        for path in ("/healthz", "/readyz", "/metrics"):
            body = pages.get(port, path)[1]
            assert not re.search(r"OST-|2\.25\.|Patient\d|PID0|ACC0", body), path


def test_a_scrape_is_answered_in_full_while_somebody_writes(site: Site) -> None:
    with closing(sqlite3.connect(site.settings.storage.catalogue.removeprefix("sqlite:///"), isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        try:
            sleep(FRESH_S)  # what was read before is not told any more
            shown = site.scrape()
        finally:
            writer.execute("ROLLBACK")
    assert pages.value(shown["reply"], "osteon_studies", state="learned") == 1
    assert pages.value(shown["receive"], "osteon_images") == 3
    assert [pages.value(samples, "osteon_scrape_errors_total") for samples in shown.values()] == [0, 0]


def test_a_port_in_use_does_not_keep_a_role_from_receiving(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = init_site(
            tmp_path / "site",
            node={"port": 0, "callers": [{"ae_title": "SENDER", "networks": ["127.0.0.0/8"]}]},
            metrics={"receive_port": taken.getsockname()[1], "reply_port": 0, "schedule_port": 0},
        )
        with running("receive", config=config) as receiver:
            port = receiver.event("listening")["port"]
            said = receiver.event("metrics not served")
            assert (said["level"], said["port"]) == ("error", taken.getsockname()[1])
            assert send([image()], port=port) == [0]


# --- one study in the log --------------------------------------------------------------------------------------------------


def test_one_id_gives_the_whole_way_of_a_study(site: Site) -> None:
    lines = [line for line in site.events if line.get("study") == site.uid and line.get("destination") != "away"]
    way = [(line["role"], line["event"], line.get("outcome")) for line in lines]
    assert way == [
        ("receive", "instance stored", "new"),
        ("receive", "instance stored", "new"),
        ("receive", "instance stored", "known"),
        ("reply", "study complete", None),
        ("reply", "study classified", None),
        ("reply", "result delivered", None),
    ]


def test_one_association_can_be_followed(site: Site) -> None:
    accepted = [line for line in site.events if line["event"] == "association accepted"]
    ids = [line["association"] for line in accepted]
    assert len(set(ids)) == 5
    first = [line["event"] for line in site.receiver.events if line.get("association") == ids[0]]
    assert first == ["association accepted", "instance stored", "instance stored"]
    refused = next(line for line in site.events if line["event"] == "instance refused")
    assert refused["association"] in ids


# --- what stands in deploy/ ------------------------------------------------------------------------------------------------


def _dashboard() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((DEPLOY / "grafana" / "osteon.json").read_text("utf-8"))["panels"]
    return found


def _rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text("utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def _expressions() -> dict[str, tuple[str, str]]:
    """Give each expression by where it stands, with the template that its labels go into."""
    found = {rule["alert"]: (rule["expr"], json.dumps(rule["annotations"])) for rule in _rules()}
    for panel in _dashboard():
        for target in panel.get("targets", []):
            found[f"{panel['title']} {target['refId']}"] = target["expr"], target["legendFormat"]
    return found


@pytest.mark.parametrize("where", _expressions())
def test_alerts_and_dashboard_ask_for_what_there_is(where: str, site: Site) -> None:
    """Every metric, label and label value of every expression is one that a running role shows."""
    expression, template = _expressions()[where]
    shown = [sample for samples in site.scrape().values() for sample in samples]
    names = set(re.findall(r"\b(?:osteon|process)_\w+", re.sub(r'"[^"]*"', "", expression)))
    assert names or "up{" in expression, "it asks for something"
    assert names <= {sample.name for sample in shown}
    of_these = [sample for sample in shown if sample.name in names]
    labels = {label for sample in of_these for label in sample.labels}
    for clause in re.findall(r"\b(?:by|on)\s*\(([\w, ]*)\)", expression):
        assert set(re.findall(r"\w+", clause)) <= labels | SCRAPED | {"le"}, clause
    assert set(re.findall(r"\{\{\s*(?:\$labels\.)?(\w+)\s*\}\}", template)) <= labels | SCRAPED
    for label, values in re.findall(r'(\w+)!?=~?"([^"]*)"', expression):
        if label not in SCRAPED:
            known = {sample.labels.get(label) for sample in of_these}
            assert set(values.split("|")) <= known, f"{label} is never {values}"


def test_every_figure_of_ours_is_on_the_dashboard_or_in_an_alert(site: Site) -> None:
    asked = " ".join(expression for expression, _template in _expressions().values())
    shown = {sample.name for samples in site.scrape().values() for sample in samples if sample.name.startswith("osteon_")}
    assert {name for name in shown if name not in asked and not name.endswith(("_sum", "_count"))} == set()


def test_the_dashboard_is_laid_out_for_a_screen() -> None:
    board = json.loads((DEPLOY / "grafana" / "osteon.json").read_text("utf-8"))
    panels = _dashboard()
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, f"{panel['title']} lies over another panel"
        assert max(x for x, _y in cells) < 24
        taken |= cells
        assert panel["type"] == "row" or panel["targets"]
    (source,) = [variable["name"] for variable in board["templating"]["list"] if variable["type"] == "datasource"]
    asked = {target["datasource"]["uid"] for panel in panels for target in panel.get("targets", [])}
    assert asked == {f"${{{source}}}"}, "the data source is chosen on import"


def test_alerts_say_what_to_do() -> None:
    for rule in _rules():
        assert rule["annotations"]["summary"], rule["alert"]
        assert rule["annotations"]["action"], rule["alert"]
        assert rule["labels"]["severity"] in ("page", "ticket")
    names = [rule["alert"] for rule in _rules()]
    assert len(set(names)) == len(names)


def test_every_alert_is_made_to_fire() -> None:
    promtool, tests = tool("promtool"), DEPLOY / "prometheus" / "alerts_test.yml"
    done = subprocess.run([promtool, "test", "rules", str(tests)], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    expected = set(re.findall(r'labels: \'\{alertname="(\w+)"', tests.read_text("utf-8")))
    assert expected == {rule["alert"] for rule in _rules()}


def test_prometheus_understands_rules_settings_and_pages(site: Site) -> None:
    promtool = tool("promtool")
    for words in (
        ["config", str(DEPLOY / "prometheus" / "prometheus.yml")],
        ["rules", str(DEPLOY / "prometheus" / "alerts.yml")],
    ):
        done = subprocess.run([promtool, "check", *words], capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
    for port in (site.settings.metrics.receive_port, site.settings.metrics.reply_port):
        page = pages.get(port, "/metrics")[1]
        done = subprocess.run([promtool, "check", "metrics"], input=page, capture_output=True, text=True, check=False, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")


def test_a_real_prometheus_fills_every_panel(site: Site, tmp_path: Path) -> None:
    with _prometheus(site.settings, tmp_path) as ask:
        targets = until(lambda: ask("count(up) == 2") and ask("up"), told="both roles scraped")
        up = {one["metric"]["role"]: one["value"][1] for one in targets}
        assert up == {"receive": "1", "reply": "1"}
        for panel in _dashboard():
            for target in panel.get("targets", []):
                until(lambda expression=target["expr"]: ask(expression), seconds=60, told=f"{panel['title']}: {target['expr']}")
        rules = {rule["alert"]: rule for rule in _rules()}
        assert all(ask(f"count(({rule['expr']}) or vector(0))") for rule in rules.values()), "each can be evaluated"
        assert not ask("osteon_ready == 0")


@contextmanager
def _prometheus(settings: Settings, folder: Path) -> Iterator[Callable[[str], list[dict[str, Any]]]]:
    """Run Prometheus with our example, but for ports and intervals; give a function that asks it."""
    program, port = tool("prometheus"), free_port()
    config = (DEPLOY / "prometheus" / "prometheus.yml").read_text("utf-8")
    for old, new in (
        ("127.0.0.1:9711", f"127.0.0.1:{settings.metrics.receive_port}"),
        ("127.0.0.1:9712", f"127.0.0.1:{settings.metrics.reply_port}"),
        ("scrape_interval: 15s", "scrape_interval: 1s"),
        ("- alerts.yml", f"- {DEPLOY / 'prometheus' / 'alerts.yml'}"),
    ):
        assert old in config
        config = config.replace(old, new)
    (folder / "prometheus.yml").write_text(config)
    log = (folder / "log").open("wb")
    process = subprocess.Popen(
        [program, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/tsdb",
         f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log,
    )  # fmt: skip

    def ask(expression: str) -> list[dict[str, Any]]:
        try:
            code, body = pages.get(port, f"/api/v1/query?query={quote(expression)}")
        except ConnectionError:
            return []  # it is starting
        if code == 503:
            return []
        assert code == 200, body
        found: list[dict[str, Any]] = json.loads(body)["data"]["result"]
        return found

    try:
        yield ask
    finally:
        process.terminate()
        process.wait(30)
        log.close()
