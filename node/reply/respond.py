"""The answer, wired: claim a complete study -> inference -> identity -> report -> delivery -> state.

In: the catalogue's states. Out: SRs in the PACS. Nothing here may answer a study that was sent to be learned from, send
anything while answers are off, or let one destination's trouble hold up another.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from time import monotonic

import node
from models.errors import Retriable, Unreadable
from models.registry import Registry
from models.runtime import Model
from node import daemon
from node.errors import NotFound
from node.keep.archive import Archive
from node.keep.catalogue import Catalogue
from node.keep.custody import Custody
from node.keep.records import Delivery, DeliveryState, Identity, Instance, Purpose, Result, Role, Study
from node.keep.retention import Retention
from node.keep.vault import StudyIdentity, Vault
from node.logs import event, safe_message
from node.metrics import disk, figures
from node.metrics.certificates import Certificates
from node.metrics.meters import CLASS, FAILED, ReplyMeters, new_registry
from node.metrics.serve import STUCK_S, Health, Ready, serving
from node.pseudonym import SiteKeys
from node.reply import completion, delivery, inference, report
from node.settings import Pacs, Settings

log = logging.getLogger("osteon.reply")

RETRY_INFERENCE_FIRST_S = 30.0
RETRY_INFERENCE_MAX_S = 3600.0
TIDY_PAUSE_S = 3600.0
"""How often a look is taken for what was kept long enough."""
WAITS = 5
"""So many times may one delivery wait for `[[pacs]] timeout_s`."""
SILENT_S = 30.0
"""A replier whose sign of life was not taken for so long is not ready, unless a study keeps it; it leaves one every 5 s."""
RETRY_MODEL_S = 10.0
"""How often a version that cannot be put to work is tried again."""


@dataclass
class Reply:
    """Everything one replier holds open."""

    settings: Settings
    catalogue: Catalogue
    vault: Vault
    archive: Archive
    registry: Registry
    keys: SiteKeys
    retention: Retention
    model: Model | None = None
    corpus: frozenset[str] = frozenset()
    """The patients that the model was trained on."""
    model_trouble: str = ""
    """Why the version that is in service does not work here; empty when it does, or there is none."""
    model_since: datetime | None = None
    """When the loaded version was put into service."""
    last_error: str = ""
    meters: ReplyMeters = field(default_factory=ReplyMeters)
    away: set[str] = field(default_factory=set)
    """Destinations whose last delivery was put off."""
    _beaten_at: float = field(default_factory=monotonic)
    _model_tried_at: float = -RETRY_MODEL_S

    @classmethod
    def open(cls, settings: Settings, *, meters: ReplyMeters | None = None) -> Reply:
        """Open the stores; a wrong key or a missing folder is an error before anything is claimed."""
        stores, root, keep = Custody.open(settings.storage), settings.storage.root, settings.storage.keep_days
        archive = Archive(root / "archive")
        return cls(
            settings=settings,
            catalogue=stores.catalogue,
            vault=stores.vault,
            archive=archive,
            retention=Retention(
                root=root,
                archive=archive,
                catalogue=stores.catalogue,
                keep={purpose: timedelta(days=days) for purpose in Purpose if (days := getattr(keep, purpose))},
                keep_held=timedelta(days=keep.quarantine) if keep.quarantine else None,
                forget=stores.vault.forget,
                discard=stores.quarantine.discard,
            ),
            registry=Registry(root / "models"),
            keys=stores.keys,
            meters=meters or ReplyMeters(),
        )

    def close(self) -> None:
        """Close the stores."""
        self.catalogue.close()
        self.vault.close()

    # --- what is complete, and what it shows -------------------------------------------------------------------------------

    def step(self) -> bool:
        """Advance completion, then classify one study; True when there may be more to do."""
        moved = completion.advance(self.catalogue, self.settings.completion, now=_now())
        self._follow_champion()
        study = self.catalogue.studies.claim(claim_s=self.settings.inference.claim_s, now=_now())
        if study is not None:
            self._classify(study)
        opened = self.catalogue.deliveries.open_due(answers_on=self.answers_on(), now=_now())
        self.catalogue.deliveries.kill_unknown([pacs.name for pacs in self.settings.pacs], now=_now())
        return moved or study is not None or bool(opened)

    def answers_on(self) -> bool:
        """Say whether results may leave: the settings and the operator's switch both have to say so."""
        return self.settings.inference.answers == "on" and self.catalogue.roles.flag("answers") != "paused"

    def _follow_champion(self) -> None:
        """Load the version that is in service now, when it is another than the one loaded.

        One that cannot be loaded (damaged, no provider) is no model: studies wait, nothing is answered by the version before,
        and all else goes on. It is tried again, and so is what is promoted instead.
        """
        if self.model_trouble and monotonic() - self._model_tried_at < RETRY_MODEL_S:
            return
        try:
            self._load_champion()
            self.model_trouble = ""
        except Exception as error:  # whatever is wrong with a version must not stop results on their way
            self.model, self._model_tried_at = None, monotonic()
            if self.model_trouble != safe_message(error):
                self.model_trouble = safe_message(error)
                event(log, "model not usable", level=logging.ERROR, error=self.model_trouble)
            return
        finally:
            version = self.model.version if self.model else ""
            self.meters.model(version, since=self.model_since if version else None, trouble=bool(self.model_trouble))
        if self.model is not None:
            self.catalogue.studies.wake_waiting(now=_now())

    def _load_champion(self) -> None:
        version = self.registry.champion()
        if version is None:
            self.model = None
        elif self.model is None or self.model.version != version:
            rules = self.settings.inference
            self.corpus = self.registry.corpus(version)
            self.model = Model.load(
                self.registry, version, provider=rules.provider, threads=rules.threads, allow_degraded=rules.allow_degraded
            )
            move = self.registry.champion_at(_now())
            self.model_since = move.at if move else None
            event(log, "model in service", model=version, provider=rules.provider, degraded=self.model.degraded)

    def _classify(self, study: Study) -> None:
        """Turn a claimed study into a stored result; whatever goes wrong, its next attempt moves ahead first."""
        started = monotonic()
        try:
            if self.model is None:
                self.catalogue.studies.wait_for_model(study.uid, now=_now())
                return
            content = self.catalogue.studies.content(study.uid)
            findings = inference.infer(
                [(instance, self._pixels(instance)) for instance in self.catalogue.instances.of_study(study.uid)],
                self.catalogue.instances.held_of_study(study.uid),
                study_uid=study.uid,
                model=self.model,
                in_corpus=not self.corpus.isdisjoint(self.catalogue.patients.person(study.pid).pseudonyms),
            )
            silent = findings.abstention is not None and self.settings.inference.answer_not_applicable == "status only"
            result = self.catalogue.results.put(
                study.uid,
                findings,
                content_digest=content,
                settings_digest=report.settings_digest(self.settings.report, self.settings.inference),
                destinations=[] if silent else [pacs.name for pacs in self.settings.pacs if pacs.answers(study.calling_ae)],
                now=_now(),
            )
        except Exception as error:  # one bad study must not stop the others; it is tried again, later and later
            wait_s = min(RETRY_INFERENCE_FIRST_S * 2**study.attempts, RETRY_INFERENCE_MAX_S)
            reason = self._trouble(error)
            self.catalogue.studies.fail(study.uid, reason=reason, next_attempt_at=_now() + timedelta(seconds=wait_s), now=_now())
            event(log, "study failed", level=logging.ERROR, study=study.uid, error=reason, again_in_s=wait_s)
            self.meters.classified(FAILED, seconds=monotonic() - started)
            return
        self.meters.classified(findings.abstention or CLASS, seconds=monotonic() - started)
        event(
            log,
            "study classified",
            study=study.uid,
            model=findings.model_id,
            images=len(findings.images),
            abstention=findings.abstention,
            result=result.id,
            ms=round(1000 * (monotonic() - started)),
        )

    def _pixels(self, instance: Instance) -> inference.Image:
        """Read one archived image, or say that it is no image any more.

        A disk or a share that does not answer says nothing about the image: that error passes, and the study is tried again.
        """
        try:
            return self.archive.read(instance)
        except MemoryError:
            raise
        except Exception as error:  # pydicom raises anything on a damaged file, an OSError that no system call gave among it
            if isinstance(error, OSError) and error.errno is not None:
                raise
            return Unreadable(safe_message(error))

    # --- what leaves -------------------------------------------------------------------------------------------------------

    def deliver_step(self, pacs: Pacs) -> bool:
        """Send one due result to `pacs`; True when there may be more."""
        if not self.answers_on():
            return False
        claimed = self.catalogue.deliveries.claim(claim_s=self.settings.inference.claim_s, now=_now(), destinations=[pacs.name])
        if claimed is None:
            return False
        started = monotonic()
        try:
            outcome, reason = self._give_up(claimed) if self._is_over(claimed) else self._send(claimed, pacs)
        except Exception as error:  # as in _classify: the row's next attempt moves ahead, the loop goes on
            outcome, reason = self._put_off(claimed, error)
        self.meters.delivered(pacs.name, outcome)
        (self.away.add if outcome is DeliveryState.PENDING else self.away.discard)(pacs.name)
        event(
            log,
            "result delivered" if outcome is DeliveryState.SENT else "result not delivered",
            level=logging.INFO if outcome is DeliveryState.SENT else logging.WARNING,
            study=claimed.study_uid,
            destination=pacs.name,
            state=outcome,
            **({"reason": reason} if reason else {}),
            ms=round(1000 * (monotonic() - started)),
        )
        return True

    def _send(self, claimed: Delivery, pacs: Pacs) -> tuple[DeliveryState, str]:
        """Build the document the destination can take, note it, send it; give the new state, and why it is not sent."""
        result = self.catalogue.results.get(claimed.result_id)
        if result is None:
            raise NotFound(f"result {claimed.result_id} is gone from the catalogue")
        looked_at = {image.sop_uid for image in result.findings.images}
        asked_at = self.catalogue.studies.asked_at(claimed.study_uid)  # before `sent`: a late image begins another round there
        identity = self.vault.study(claimed.study_uid)
        images = [image for image in self.vault.instances(claimed.study_uid) if image.sop_uid in looked_at]
        try:
            delivery.send(
                pacs,
                calling_ae=self.settings.node.ae_title,
                build=partial(self._document, claimed, result, identity, images),
                study=identity,
            )
        except delivery.Held as held:
            self.catalogue.deliveries.hold(claimed.id, reason=str(held), now=_now())
            return DeliveryState.HELD, str(held)
        self.catalogue.deliveries.sent(claimed.id, now=_now())
        if asked_at is not None and asked_at <= result.created_at:  # else it belongs to a later round than this result
            self.meters.answered(pacs.name, seconds=(_now() - asked_at).total_seconds())
        return DeliveryState.SENT, ""

    def _document(
        self, claimed: Delivery, result: Result, identity: StudyIdentity, images: list[Identity], sop_class_uid: str
    ) -> report.Built:
        """Build the SR and note its UID and hash before the first byte leaves.

        A document that differs from the one noted earlier (corrected demographics, another library version) gets a new
        edition, hence new UIDs and a predecessor: never other bytes under an old UID.
        """
        noted = claimed
        while True:
            built = report.build(
                result.findings,
                result=result,
                study=identity,
                images=images,
                node=self.name(),
                settings=self.settings.report,
                sop_class_uid=sop_class_uid,
                keys=self.keys,
                edition=noted.edition,
                predecessors=self.catalogue.deliveries.documents_before(claimed.id),
            )
            noted = self.catalogue.deliveries.stamp(claimed.id, built.document, now=_now())
            if noted.document == built.document:
                return built

    def _is_over(self, claimed: Delivery) -> bool:
        """Say whether a delivery is older than any attempt in time can be: the node, or its answers, were off for long."""
        rules, within_h = self.settings.delivery, self.settings.completion.answer_within_h
        longest = timedelta(hours=max(rules.give_up_h, within_h), seconds=2 * rules.retry_max_s)
        return claimed.created_at + longest < _now()

    def _give_up(self, claimed: Delivery) -> tuple[DeliveryState, str]:
        reason = "too old when its turn came: `osteon delivery retry` sends it"
        self.catalogue.deliveries.kill(claimed.id, reason=reason, now=_now())
        return DeliveryState.DEAD, reason

    def _put_off(self, claimed: Delivery, error: Exception) -> tuple[DeliveryState, str]:
        """Plan the next attempt of a delivery that failed, or give it up when its time is over."""
        reason = self._trouble(error)
        next_at = delivery.next_attempt(
            claimed.attempts, self.settings.delivery, created_at=claimed.created_at, now=_now(), key=str(claimed.id)
        )
        if next_at is None:
            self.catalogue.deliveries.kill(claimed.id, reason=reason, now=_now())
            return DeliveryState.DEAD, reason
        self.catalogue.deliveries.retry_at(claimed.id, reason=reason, next_attempt_at=next_at, now=_now())
        return DeliveryState.PENDING, reason

    def _trouble(self, error: Exception) -> str:
        """Say what went wrong, and remember it with its time for `osteon status`."""
        message = safe_message(error)
        self.last_error = f"{message} ({_now():%Y-%m-%d %H:%M:%S} UTC)"
        return message

    # --- what was kept for long enough -------------------------------------------------------------------------------------

    def tidy_step(self) -> bool:
        """Remove some of what `[storage.keep_days]` says; True when there may be more."""
        return self.retention.step(_now())

    # --- who answers -------------------------------------------------------------------------------------------------------

    def name(self) -> report.NodeName:
        """Say who observes, for the SR's observation context."""
        return report.NodeName.of(self.settings.node.ae_title, keys=self.keys, version=node.__version__)

    def beat(self) -> None:
        """Leave a sign of life that `osteon status` shows."""
        told = {
            "model": self.model.version if self.model else "",
            "model_trouble": self.model_trouble,
            "provider": self.settings.inference.provider,
            "degraded": self.model.degraded if self.model else "",
            "answers": "on" if self.answers_on() else "off",
            "last_error": self.last_error,
        }
        self.catalogue.roles.beat(Role(name="reply", host=socket.gethostname(), pid=os.getpid(), seen_at=_now(), told=told))
        self.vault.check_site(self.keys.report_uid("site"))
        self._beaten_at = monotonic()

    def ready(self) -> Ready:
        """Say whether studies can be answered now.

        A PACS that is away does not make the role unready, nor does a site that has no model yet: studies wait. Both are told.
        """
        troubles = disk.troubles(self.settings.storage, read=("archive",))
        silent_s = monotonic() - self._beaten_at
        if silent_s > max(SILENT_S, self.settings.inference.claim_s):
            troubles.append(f"the databases have taken nothing for {silent_s:.0f} s")
        if self.model_trouble:
            troubles.append(f"the model in service does not work: {self.model_trouble}")
        told = {
            "model": self.model.version if self.model else "",
            "waiting": "" if self.model or self.model_trouble else "no model is in service: studies to be answered wait",
            "destinations_away": sorted(self.away),
        }
        return Ready(troubles, told)


def _now() -> datetime:
    return datetime.now(UTC)


@contextmanager
def opened(settings: Settings, *, meters: ReplyMeters | None = None) -> Iterator[Reply]:
    """Hold a `Reply` open for the length of a block."""
    reply = Reply.open(settings, meters=meters)
    try:
        yield reply
    finally:
        reply.close()


def run(settings: Settings, stop: threading.Event) -> None:
    """Run the role until `stop`: one loop that classifies, one a destination that delivers, and one that tidies.

    A loop that ends by an error ends the role, with that error: whoever supervises it starts the whole again.
    """
    registry, health = new_registry(settings.storage), Health()
    stuck_s = max(STUCK_S, settings.inference.claim_s)  # one study may take as long
    names = [pacs.name for pacs in settings.pacs]
    with opened(settings, meters=ReplyMeters(registry, destinations=names)) as reply:
        registry.register(Certificates({pacs.name: pacs.tls_certificate for pacs in settings.pacs if pacs.tls}))
        registry.register(figures.of_answers(reply.catalogue, destinations=names, answers=settings.inference.answers == "on"))
        broken: list[BaseException] = []

        def beside(step: Callable[[], bool], pause_s: float) -> None:
            try:
                daemon.run(step, stop, pause_s=pause_s)
            except BaseException as error:  # raised below, in the thread that can end the process
                broken.append(error)
            finally:
                stop.set()

        others = [threading.Thread(target=beside, args=(reply.tidy_step, TIDY_PAUSE_S), name="tidy")]
        for pacs in settings.pacs:
            name, stuck_after_s = f"deliver {pacs.name}", stuck_s + WAITS * pacs.timeout_s
            step = health.loop(name, partial(reply.deliver_step, pacs), stuck_s=stuck_after_s)
            others.append(threading.Thread(target=beside, args=(step, 0.5), name=name))
        try:
            for other in others:
                other.start()
            event(log, "replying", destinations=names)
            with serving(settings.metrics, "reply", registry=registry, health=health, ready=reply.ready):
                daemon.run(health.loop("classify", reply.step, stuck_s=stuck_s), stop, heartbeat=reply.beat)
        finally:
            stop.set()
            for other in others:
                if other.ident is not None:
                    other.join()
            with suppress(Retriable):  # without a catalogue it ends all the same, and shows as silent
                reply.catalogue.roles.leave("reply", socket.gethostname(), os.getpid())
        if broken:
            raise broken[0]
