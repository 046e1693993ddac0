"""The guided run: a PACS, a node, invented children, a scheduled training cycle, a real radiograph, the report that comes back.

In: an empty folder. Out: `summary.json` in it, and whether everything that was shown is true. It drives the product as a user
does: the command line in child processes, DICOM over the network; training is started by the node's schedule and by nobody else.
Nothing here reaches into the node's stores but to read how far it is. No process may outlive it: a trainer, which outlives its
scheduler by design, is cancelled on the way out.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from shutil import rmtree
from time import monotonic, sleep
from types import FrameType
from typing import Any, BinaryIO

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from models.errors import Final
from models.registry import Registry
from node import peer, settings
from node.demo import hospital, phantoms, reading
from node.demo.orthanc import free_port
from node.errors import PeerAway
from node.keep.catalogue import Catalogue
from node.keep.records import Origin, Run, StudyState
from node.settings import Pacs as Peer
from node.settings import Settings
from node.supervise import die_with_parent

SEED = 2026
QUIET_S = 3.0
READY_S = 60.0
LEARNED_S = 60.0
ANSWER_S = 90.0
STOP_S = 40.0
GRACE_S = 20.0
"""For which a trainer that is cancelled may finish its epoch."""
RECIPE = "phantom"
SCHEDULE = "demo"
EVERY = "1min"
"""The shortest sensible rhythm, and yet one run: a due time without new labels is passed over."""
NEW_LABELS = 100
DUE_S = 150.0
GATE_SAYS = "insufficient evidence"
"""What promise 11 makes the gate say of some 16 locked patients a class."""
REASON = (
    "Demo: the gate has too few locked patients to decide. Promoted to show the way; the phantoms mean nothing for any patient."
)
MARK = ".osteon-demo"

MakeSite = Callable[..., Path]


class DemoFailed(Final):
    """A step of the demo did not do what it should."""


@dataclass
class Story:
    """What has happened so far: becomes the table at the end and `summary.json`."""

    folder: Path
    console: Console
    stations: list[tuple[str, float, str]] = field(default_factory=list)
    checks: dict[str, bool] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def station(self, name: str, *, quiet: bool = False) -> Iterator[list[str]]:
        """Time one station and say that it is done; what is put into the list given is said of it.

        `quiet` leaves the terminal to a child process.
        """
        said: list[str] = []
        begun = monotonic()
        if quiet or not self.console.is_terminal:
            self.console.print(f"[bold]{name}[/bold] …")
            yield said
        else:
            with self.console.status(f"{name} …"):
                yield said
        seconds = monotonic() - begun
        self.stations.append((name, seconds, "; ".join(said)))
        self.console.print(f"[green]done[/green] {name} [dim]{seconds:.1f} s[/dim]  {escape('; '.join(said))}")

    def check(self, what: str, *, true: bool) -> None:
        """Note whether something that the demo shows is so."""
        self.checks[what] = true
        if not true:
            self.console.print(f"[red]NOT SO[/red] {escape(what)}")

    @property
    def true(self) -> bool:
        """Whether everything shown so far is so."""
        return bool(self.checks) and all(self.checks.values())

    def write(self) -> None:
        """Write `summary.json`."""
        seconds = {name: round(seconds, 2) for name, seconds, _ in self.stations}
        told = {"true": self.true, "checks": self.checks, "seconds": seconds, "seconds_total": round(sum(seconds.values()), 2)}
        text = json.dumps(told | self.facts, indent=2, ensure_ascii=False, default=str)
        (self.folder / "summary.json").write_text(text + "\n", "utf-8")


def run(folder: Path, *, make_site: MakeSite, keep: bool = False, console: Console | None = None) -> bool:
    """Play the whole way in `folder` and give whether all of it is true.

    Parameters
    ----------
    make_site
        What `osteon init` calls: makes a site in a folder, with sections that differ from the shipped settings.
    keep
        Leave PACS and node running at the end, until Ctrl-C.
    """
    story = Story(folder, console or Console(highlight=False))
    story.facts["begun_at"] = datetime.now(UTC)
    with ExitStack() as stack:
        stack.enter_context(_as_interrupt(signal.SIGTERM))
        stack.enter_context(_own(folder))
        try:
            _play(story, stack, make_site)
        except (Final, PeerAway) as error:
            story.check(str(error), true=False)
        story.write()
        _tell(story)
        if keep and story.true:
            story.console.print("PACS and node keep running; Ctrl-C ends them.")
            with _until_interrupted():
                signal.pause()
    return story.true


def _play(story: Story, stack: ExitStack, make_site: MakeSite) -> None:
    """Walk the stations in order."""
    folder, port = story.folder, free_port()
    story.console.print(
        Panel(
            "A PACS, an Osteon node and 160 invented children with phantom radiographs. A schedule makes the node learn: "
            "DeepCluster on all images, a classifier of the clusters, fine-tuning, gate.\n"
            "The phantoms are plumbing, not medicine: what is learned from them means nothing for any patient.",
            title="osteon demo",
        )
    )
    with story.station("PACS") as said:
        pacs = stack.enter_context(hospital.running_pacs(folder / "pacs", port))
        said.append(pacs.told)
    with story.station("node") as said:
        config = _site(make_site, folder / "site", port, pacs.peer)
        site = settings.load(config)
        node = stack.enter_context(_served(config, folder / "node.log", port))
        stack.callback(_end_runs, site, config)
        said.append(f"{hospital.NODE_AE} on 127.0.0.1:{port}, answers after {QUIET_S:g} s of quiet")
    story.facts |= {"pacs": pacs.told, "config": config, "node_log": folder / "node.log"}

    with story.station("invented cohort") as said:
        cohort = phantoms.cohort(folder / "hospital" / "cohort", SEED)
        said.append(f"{len(cohort.patients)} patients, {len(cohort.files)} images")
    with story.station("C-STORE to learn from", quiet=True) as said:
        _send_cohort(story, cohort, port)
        said.append(f"{len(cohort.files)} images answered 0000")
        learned = _wait_for_learned(site, len(cohort.patients), node)
    story.check("every study of the cohort was taken in and learned", true=learned)
    with story.station("labels") as said:
        said.append(_osteon("labels", "import", str(cohort.labels), config=config).splitlines()[-1])
    _train(story, site, config, node)
    _answer(story, pacs, node)
    with Catalogue.open(site.storage.catalogue) as catalogue:
        states = {state.value: count for state, count in catalogue.studies.by_state().items() if count}
        runs = [(run.schedule, run.origin, run.due_at is not None) for run in catalogue.runs.list()]
    story.facts["studies"] = states
    story.check(
        "one report is in the PACS, and the promotion answered none of the learned studies",
        true=len(pacs.reports()) == 1 and states == {"learned": len(cohort.patients), "delivered": 1},
    )
    story.check("the one run there is was queued by a due time of the schedule", true=runs == [(SCHEDULE, Origin.SCHEDULE, True)])


def _site(make_site: MakeSite, folder: Path, port: int, pacs: Peer) -> Path:
    """Make a fresh site that knows the PACS and the old archive."""
    here = ["127.0.0.0/8"]
    callers = [
        {"ae_title": pacs.ae_title, "networks": here, "purpose": "answer"},
        {"ae_title": hospital.ARCHIVE_AE, "networks": here, "purpose": "learn"},
    ]
    return make_site(
        folder,
        node={
            "ae_title": hospital.NODE_AE,
            "learn_ae_title": hospital.LEARN_AE,
            "port": port,
            "default_issuer": phantoms.DEFAULT_ISSUER,
            "callers": callers,
        },
        pacs=[{"name": pacs.name, "ae_title": pacs.ae_title, "host": pacs.host, "port": pacs.port}],
        completion={"quiet_s": QUIET_S},
        training={"recipe": RECIPE, "stop_grace_s": GRACE_S},
        schedule=[{"name": SCHEDULE, "every": EVERY, "kind": "cycle", "recipe": RECIPE, "when": {"new_labels": NEW_LABELS}}],
        metrics={"receive_port": free_port(), "reply_port": free_port(), "schedule_port": free_port()},
    )


@contextmanager
def _child(*words: str, config: Path, out: BinaryIO | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command of osteon in a process group of its own, which ends with the block, and when we are killed."""
    command = [sys.executable, "-m", "node", *words, "--config", str(config)]
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True, preexec_fn=die_with_parent()
    )
    try:
        yield child
    finally:
        with suppress(ProcessLookupError):
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGTERM)
                with suppress(subprocess.TimeoutExpired):
                    child.wait(STOP_S)
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


@contextmanager
def _served(config: Path, log: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Run `osteon serve` and wait until it answers a C-ECHO."""
    with log.open("wb") as out, _child("serve", config=config, out=out) as node:
        here = Peer(name="node", ae_title=hospital.NODE_AE, host="127.0.0.1", port=port, timeout_s=5.0)
        _wait(lambda: _answers(here), READY_S, "the node did not answer a C-ECHO", node, log)
        yield node


def _answers(node: Peer) -> bool:
    try:
        peer.echo(node, hospital.ARCHIVE_AE)
    except PeerAway:
        return False
    return True


def _wait(true: Callable[[], bool], seconds: float, otherwise: str, node: subprocess.Popen[bytes], log: Path) -> None:
    """Wait for a condition, as long as the node runs."""
    deadline = monotonic() + seconds
    while not true():
        if node.poll() is not None:
            raise DemoFailed(f"the node ended by itself with code {node.returncode}; see {log}")
        if monotonic() > deadline:
            raise DemoFailed(f"{otherwise} within {seconds:g} s; see {log}")
        sleep(0.2)


def _send_cohort(story: Story, cohort: phantoms.Cohort, port: int) -> None:
    to = Peer(name="node", ae_title=hospital.LEARN_AE, host="127.0.0.1", port=port)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=story.console, transient=True, disable=not story.console.is_terminal) as progress:
        task = progress.add_task("images", total=len(cohort.files))
        hospital.send(cohort.files, to, calling=hospital.ARCHIVE_AE, sent=lambda: progress.advance(task))


def _wait_for_learned(site: Settings, studies: int, node: subprocess.Popen[bytes]) -> bool:
    """Wait until every study is complete; say whether all are learned."""
    with Catalogue.open(site.storage.catalogue) as catalogue:
        deadline = monotonic() + LEARNED_S
        while monotonic() < deadline and node.poll() is None:
            if catalogue.studies.by_state().get(StudyState.RECEIVING, 0) == 0:
                break
            sleep(0.3)
        return catalogue.studies.by_state().get(StudyState.LEARNED, 0) == studies


def _osteon(*words: str, config: Path) -> str:
    """Run a command of osteon to its end and give what it prints."""
    command = [sys.executable, "-m", "node", *words, "--config", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise DemoFailed(f"osteon {words[0]} {words[1]} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip()


def _train(story: Story, site: Settings, config: Path, node: subprocess.Popen[bytes]) -> None:
    """Let the schedule start one training cycle, hear probes and gate, and promote as a person would."""
    shelf = Registry(site.storage.root / "models")
    run = _due(story, site, node)
    with story.station("training cycle", quiet=True) as said:
        with _child("train", "watch", str(run.id), config=config) as watching:
            code = watching.wait()
        versions = shelf.versions()
        if code or len(versions) != 1:
            words = site.storage.root / "runs" / "words" / f"{run.id}.log"
            raise DemoFailed(f"run {run.id} ended with code {code} and left {len(versions)} versions on the shelf; see {words}")
        (version,) = versions
        card = shelf.card(version)
        with Catalogue.open(site.storage.catalogue) as catalogue:
            run = catalogue.runs.get(run.id)
        pretraining = _pretraining(site.storage.root / "runs" / run.folder)
        said += [_told(pretraining), f"the gate says: {card.decision}"]
    story.facts |= {
        "pretraining": pretraining,
        "started_from": card.start.name,
        "model": version,
        "metrics": [asdict(metric) for metric in card.metrics],
        "gate": {"decision": card.decision, "reason": card.decision_reason},
        "runs": site.storage.root / "runs",
    }
    story.console.print(f"  {escape(pretraining['words'])} Fine-tuned from: {escape(card.start.name)}.")
    story.console.print(f"  {escape(card.decision_reason)}")
    story.check(
        "fine-tuning started from the pretraining if the probes offer it, and else from the start weights",
        true=pretraining["offered"] == card.start.name.startswith(f"pretrained by run {run.folder},"),
    )
    story.check(f"the gate says {GATE_SAYS!r} of so few locked patients", true=card.decision == GATE_SAYS)
    story.check("the gate put nothing into service by itself", true=shelf.champion() is None)
    with story.station("promotion by hand") as said:
        _osteon("models", "promote", version, "--reason", REASON, config=config)
        move = shelf.history()[-1]
        story.facts["promoted"] = {"version": move.version, "by": move.by, "reason": move.reason, "at": move.at}
        said.append(f"{version}, by {move.by}")
    story.check(
        "the model was promoted by a named person for a stated reason", true=shelf.champion() == version and bool(move.by)
    )


def _due(story: Story, site: Settings, node: subprocess.Popen[bytes]) -> Run:
    """Wait until the schedule is due and has queued its run."""
    with story.station("schedule") as said, Catalogue.open(site.storage.catalogue) as catalogue:
        _wait(lambda: bool(catalogue.runs.list()), DUE_S, "the schedule queued no run", node, story.folder / "node.log")
        run = catalogue.runs.list()[-1]
        due = f", due {run.due_at.astimezone():%H:%M:%S}" if run.due_at else ""
        said.append(f"every {EVERY}, once {NEW_LABELS} labels are new{due}: run {run.id} is queued, the node starts its trainer")
    story.facts["schedule"] = {"name": SCHEDULE, "every": EVERY, "new_labels": NEW_LABELS, "due_at": run.due_at, "run": run.id}
    return run


def _pretraining(folder: Path) -> dict[str, Any]:
    """Read what a run's pretraining came to: clusters, how well the classifier of step two tells them, the probes' words."""
    pool, classifier, probe = (
        json.loads((folder / name).read_bytes())
        for name in ("pretraining-corpus.json", "pretrain/classifier.json", "pretrain/probe.json")
    )
    return {
        "images": len(pool["images"]),
        **{name: classifier[name] for name in ("clusters", "accuracy", "accuracy_by_patient", "chance")},
        "probes": probe["metrics"],
        "offered": probe["offered"],
        "words": probe["words"],
    }


def _told(pretraining: Mapping[str, Any]) -> str:
    """Say in a line what the pretraining came to."""
    right, chance = pretraining["accuracy"], pretraining["chance"]
    offered = "offered" if pretraining["offered"] else "not offered"
    return (
        f"{pretraining['clusters']} clusters of {pretraining['images']} images, told by the classifier with an accuracy of "
        f"{right['value']:.2f} on {right['n']} images (largest cluster {chance:.2f}); {offered} by the probes"
    )


def _end_runs(site: Settings, config: Path) -> None:
    """Cancel what waits or trains, and wait until the node has ended it."""
    with Catalogue.open(site.storage.catalogue) as catalogue:
        for run in catalogue.runs.open():
            with suppress(DemoFailed):  # it has come to its end meanwhile
                _osteon("train", "cancel", str(run.id), "--reason", "the demo was ended", config=config)
        deadline = monotonic() + 2 * GRACE_S
        while catalogue.runs.open() and monotonic() < deadline:
            sleep(0.2)


def _answer(story: Story, pacs: hospital.HospitalPacs, node: subprocess.Popen[bytes]) -> None:
    """Put the real radiograph into the PACS, let it route the study, and look at what comes back."""
    with story.station("real radiograph into the PACS") as said:
        files, description = hospital.real_study(story.folder / "hospital" / "real", datetime.now().astimezone().date())
        images = [hospital.parsed(file.read_bytes()) for file in files]
        hospital.send(files, pacs.peer, calling=hospital.MODALITY_AE)
        said.append("one lower leg, uncompressed and JPEG 2000")
    log = story.folder / "node.log"
    with story.station("routed, classified, answered") as said:
        pacs.route(images[0].StudyInstanceUID)
        _wait(lambda: bool(pacs.reports()), ANSWER_S, "no report came back into the PACS", node, log)
        received = pacs.reports()[0]
        sr = hospital.parsed(received)
        said.append(f"the report says: {reading.classification(sr)}")
    file = story.folder / "report.dcm"
    file.write_bytes(received)
    story.facts |= {
        "study_uid": sr.StudyInstanceUID,
        "sr_uid": sr.SOPInstanceUID,
        "sr_class": sr.SOPClassUID.name,
        "sr_file": file,
        "sr_says": reading.classification(sr),
    }
    story.console.print(Panel(escape("\n".join(reading.text(sr))), title="the report, as the PACS holds it"))
    complaints = reading.complaints(sr, images)
    for complaint in complaints:
        story.console.print(f"[red]NOT SO[/red] of the report: {escape(complaint)}")
    story.check("the report is in the original study, of the original patient, for research only", true=not complaints)
    validators = reading.validate(file)
    story.facts["validators"] = [asdict(one) for one in validators]
    for one in validators:
        verdict = {True: "no error", False: "ERROR", None: "not installed"}[one.passed]
        story.console.print(f"{one.tool}: {verdict}")
        for line in one.said if one.passed is not None else ():
            story.console.print(f"  [dim]{escape(line)}[/dim]")
        story.check(f"{one.tool} finds no error in the report", true=one.passed is not False)
    story.console.print(
        Panel(
            f"The real file describes itself as: {escape(description)}. That is a benign lesion, which the model does not know:\n"
            "it can only choose between two answers that are both wrong here, or abstain. "
            f"It said: {escape(reading.classification(sr))}.\n"
            "The phantoms it learned from are plumbing, not medicine.",
            title="what this means: nothing, on purpose",
        )
    )


def _tell(story: Story) -> None:
    """Print what happened when, where everything lies, and how to go on."""
    table = Table(title="what happened", show_footer=True)
    total = sum(seconds for _, seconds, _ in story.stations)
    table.add_column("station", footer="all")
    table.add_column("seconds", justify="right", footer=f"{total:.1f}")
    table.add_column("")
    for name, seconds, said in story.stations:
        table.add_row(name, f"{seconds:.1f}", escape(said))
    story.console.print(table)
    folder = story.folder
    config = folder / "site" / "ae_config.toml"
    story.console.print(f"settings, keys, archive, models, runs   {folder}/site", soft_wrap=True)
    story.console.print(f"what the hospital sent; its PACS         {folder}/hospital, {folder}/pacs", soft_wrap=True)
    story.console.print(f"the report; all of this as JSON          {folder}/report.dcm, {folder}/summary.json", soft_wrap=True)
    story.console.print(f"go on with                               osteon serve --config {config}", soft_wrap=True)
    story.console.print(f"                                         osteon status --config {config}", soft_wrap=True)
    for what, so in story.checks.items():
        story.console.print(f"  {'[green]true  [/green]' if so else '[red]NOT SO[/red]'} {escape(what)}", soft_wrap=True)
    if not story.true:
        story.console.print(f"[red]The demo failed.[/red] The node's log: {folder}/node.log", soft_wrap=True)


# ---- the folder and the signals ----------------------------------------------------------------------------------------------


@contextmanager
def _own(folder: Path) -> Iterator[None]:
    """Empty the folder of an earlier demo and keep other demos out of it.

    Raises
    ------
    DemoFailed
        The folder holds something else, or a demo runs in it.
    """
    mark = folder / MARK
    if folder.exists() and any(folder.iterdir()) and not mark.exists():
        raise DemoFailed(f"{folder} holds something that is not a demo: choose another with --folder, or empty it")
    folder.mkdir(parents=True, exist_ok=True)
    with mark.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DemoFailed(f"a demo is running in {folder}; end it, or choose another with --folder") from None
        for child in folder.iterdir():
            if child.is_dir():
                rmtree(child)
            elif child != mark:
                child.unlink()
        yield


@contextmanager
def _as_interrupt(number: signal.Signals) -> Iterator[None]:
    """Treat a signal as Ctrl-C, so that every child is ended on the way out."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(number, interrupt)
    try:
        yield
    finally:
        signal.signal(number, previous)


@contextmanager
def _until_interrupted() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        return
