"""The first study on real radiographs, step by step: pictures -> DX objects -> a node's door -> labels -> runs -> figures.

In: the folder that holds the five sets of radiographs (each with `images.tar`, `labels.csv` and a README), and a folder for the
site. Out, in the site's folder: `wrapped/` (DX objects), a site of Osteon that has taken them in, `labels.csv` as it was
imported, and what each step came to (`wrapped.json`, `sent.json`, `labelled.json`, `ran.json`, `compared.json`, `probed.json`);
a step whose file is there is not done again. docs/studies/first-run.md says what is asked and what the sets are worth. Never
here: a fact about a patient that the sets do not state, or a second way into the archive beside the door.

    python tests/studies/first_run.py probes --data FOLDER --site FOLDER
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from io import BytesIO
from itertools import groupby
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import numpy as np
from PIL import Image
from pydicom import Dataset, dcmread
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.filewriter import dcmwrite
from pydicom.uid import DigitalXRayImageStorageForPresentation, JPEGBaseline8Bit

from models import durable
from models.card import Code, Label, Metric
from models.errors import Final, OsteonError
from models.networks import Network, build, with_backbone
from models.preprocess import Preprocessing
from node import peer, settings
from node.commands.init import SETTINGS, init_site
from node.demo import hospital
from node.demo.orthanc import free_port
from node.demo.phantoms import uid
from node.errors import PeerAway
from node.keep.cache import Cache
from node.keep.catalogue import Catalogue
from node.keep.custody import site_keys
from node.keep.records import Hold, StudyState, TrainingImage
from node.pseudonym import SiteKeys
from node.settings import Pacs, Settings
from node.supervise import die_with_parent
from training import checkpoint, corpus, cycle, evaluate, pretrain, probe
from training.__main__ import Lines
from training.engine import Engine
from training.evaluate import Predictions
from training.folder import Orders
from training.ranks import Ranks
from training.recipe import Classifier, Pretraining, Recipe, uniforms

SEED = 20260117
STUDY_DATE = "20200106"
"""Written into every object, since no set states a date: nothing may be concluded from it."""
LABELLED_ON = "2020-01-13"
"""As little worth."""
LESS_SEVERE, SEVERE = 41, 22
"""Training images of the knee task: the sizes of the two classes of the study in docs/training.md."""
READY_S, STALLED_S, STOP_S = 60.0, 300.0, 40.0

BURNED_IN = {
    "cxr_ccby": ("cxr_001.jpg",),
    "spine_scoliosis": tuple(
        f"scol_{number}.jpg"
        for number in ("076", "079", "084", "090", "091", "092", "100", "103", "114", "115", "116", "128", "165", "204", "231",
                       "242", "245")
    ),
}  # fmt: skip
"""Pictures that show a date, a hospital, or a patient's label, as seen by eye: their objects say so, and the node holds them."""


PRETRAINING = Pretraining(
    clusters=100,
    epochs=15,
    batch=64,
    lr=0.01,
    probe_every=3,
    alike_max=1.0,
    classifier=Classifier(epochs=15, batch=64, lr=0.01),
)
"""Fixed before the first run: some 50 pictures a cluster, as in the study; the learning rate of the paper scaled to the batch.

The stop `alike_max`, which that run gave rise to, is open: it would end this pretraining in epoch 12.
"""


class StudyFailed(Final):
    """A step of the study did not come to what it should."""


# ---- the five sets -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Radiograph:
    """One picture and all that its set says of it."""

    set_name: str
    file: str
    sha256: str
    patient: str
    """What must not be split: patient, subject, or group of near-duplicates."""
    row: Mapping[str, str]
    """The line of `labels.csv`."""

    @property
    def patient_id(self) -> str:
        """Its PatientID at the door."""
        return f"{self.set_name}-{self.patient}"

    @property
    def study_uid(self) -> str:
        """One study a picture: no set says which were taken on one day."""
        return uid("first run", self.set_name, self.file, "study")

    @property
    def sop_uid(self) -> str:
        """Its SOP Instance UID at the door."""
        return uid("first run", self.set_name, self.file, "image")

    @property
    def is_burned_in(self) -> bool:
        """Whether the picture shows a date or whose it is."""
        return self.file in BURNED_IN.get(self.set_name, ())

    def below(self, folder: Path) -> Path:
        """Give the place of its DX object."""
        return folder / self.set_name / f"{Path(self.file).stem}.dcm"


@dataclass(frozen=True, slots=True)
class _Set:
    """How a set is read."""

    patient: Callable[[Mapping[str, str]], str]
    body_part: str
    region: tuple[str, str]
    """SNOMED CT code and meaning of the same (PS3.16 annex L)."""
    side: Callable[[Mapping[str, str]], str] = lambda _row: "U"
    """Image Laterality: R, L, B; the standard has no word for "not stated", so that is U, unpaired."""
    view: Callable[[Mapping[str, str]], str] = lambda _row: ""


SETS: Mapping[str, _Set] = {
    "knee_kl": _Set(lambda row: row["patient"], "KNEE", ("72696002", "Knee"), side=lambda row: row["side"]),
    "knee_gornale": _Set(
        lambda row: row["group"], "KNEE", ("72696002", "Knee"), side=lambda row: "B" if row["width"] == "640" else "U"
    ),
    "fracatlas_subset": _Set(lambda row: row["fracatlas_id"], "EXTREMITY", ("66019005", "Extremity")),
    "spine_scoliosis": _Set(lambda row: row["group"], "SPINE", ("421060004", "Spine")),
    "cxr_ccby": _Set(
        lambda row: row["patient"].rstrip("ab"), "CHEST", ("816094009", "Chest"), view=lambda row: row["view"].split()[0]
    ),
}
VIEWS = {"AP": ("399348003", "antero-posterior"), "PA": ("272479007", "postero-anterior")}


def radiographs(data: Path, set_name: str) -> list[Radiograph]:
    """Read the table of one set, in its order."""
    with (data / set_name / "labels.csv").open(newline="", encoding="utf-8") as table:
        return [
            Radiograph(set_name, row["file"], row["sha256"], SETS[set_name].patient(row), row) for row in csv.DictReader(table)
        ]


def everything(data: Path) -> list[Radiograph]:
    """Read the tables of all five sets."""
    return [one for name in SETS for one in radiographs(data, name)]


def pictures(data: Path, set_name: str) -> Iterator[tuple[str, bytes]]:
    """Give name and bytes of each picture of a set."""
    with tarfile.open(data / set_name / "images.tar") as archive:
        for member in archive:
            if member.isfile() and (file := archive.extractfile(member)) is not None:
                yield member.name, file.read()


# ---- wrap --------------------------------------------------------------------------------------------------------------------


def wrapped(one: Radiograph, jpeg: bytes) -> Dataset:
    """Put a grey JPEG, byte for byte, into a DX object for presentation (PS3.3 A.26).

    What the object must have and the set does not state is empty; where the standard allows no empty value, it says the least:
    the orientation of a frontal view, a spacing of 1 mm, a logarithmic detector, the identity for a window.
    """
    with Image.open(BytesIO(jpeg)) as picture:
        if (picture.format, picture.mode) != ("JPEG", "L"):
            raise StudyFailed(f"{one.set_name}/{one.file} is no grey JPEG")
        columns, rows = picture.size
    how = SETS[one.set_name]
    dataset = Dataset()
    dataset.SOPClassUID = DigitalXRayImageStorageForPresentation
    dataset.SOPInstanceUID, dataset.StudyInstanceUID = one.sop_uid, one.study_uid
    dataset.SeriesInstanceUID = uid("first run", one.set_name, one.file, "series")
    dataset.PatientID = one.patient_id
    dataset.PatientName = dataset.PatientBirthDate = ""
    dataset.PatientSex = one.row.get("sex", "")
    if age := age_string(one.row.get("age", "")):
        dataset.PatientAge = age
    dataset.StudyDate, dataset.StudyTime = STUDY_DATE, ""
    dataset.AccessionNumber = dataset.StudyID = dataset.ReferringPhysicianName = ""
    dataset.SeriesNumber = dataset.InstanceNumber = 1
    dataset.Modality, dataset.Manufacturer = "DX", one.set_name
    dataset.PresentationIntentType = "FOR PRESENTATION"
    dataset.ImageType = ["DERIVED", "PRIMARY", ""]
    dataset.BodyPartExamined = how.body_part
    dataset.AnatomicRegionSequence = [_code(*how.region)]
    dataset.ImageLaterality = how.side(one.row)
    dataset.PatientOrientation = ["L", "F"]
    _view(dataset, how.view(one.row))
    dataset.AcquisitionContextSequence = []
    dataset.PositionerType = dataset.DetectorType = ""
    dataset.ImagerPixelSpacing = ["1", "1"]
    dataset.BurnedInAnnotation = "YES" if one.is_burned_in else "NO"
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows, dataset.Columns = rows, columns
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 8, 8, 7, 0
    dataset.PixelIntensityRelationship, dataset.PixelIntensityRelationshipSign = "LOG", -1
    dataset.RescaleIntercept, dataset.RescaleSlope, dataset.RescaleType = "0", "1", "US"
    dataset.PresentationLUTShape = "IDENTITY"
    dataset.WindowCenter, dataset.WindowWidth = "128", "256"
    dataset.LossyImageCompression, dataset.LossyImageCompressionMethod = "01", "ISO_10918_1"
    dataset.LossyImageCompressionRatio = f"{rows * columns / len(jpeg):.2f}"
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    dataset.PixelData = encapsulate([jpeg])
    dataset["PixelData"].VR, dataset["PixelData"].is_undefined_length = "OB", True
    return dataset


def age_string(years: str) -> str:
    """Write an age of years, or of parts of a year, as PS3.5 spells it; "" stays ""."""
    if not years:
        return ""
    return f"{int(years):03d}Y" if years.isdigit() else f"{round(12 * float(years)):03d}M"


def _view(dataset: Dataset, view: str) -> None:
    if view:
        dataset.ViewPosition = view
        dataset.ViewCodeSequence = [_code(*VIEWS[view])]
        dataset.ViewCodeSequence[0].ViewModifierCodeSequence = []


def _code(value: str, meaning: str) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, "SCT", meaning
    return item


def wrap(data: Path, site: Path) -> dict[str, Any]:
    """Write a DX object for each picture whose bytes are those its table names."""
    folder, began = site / "wrapped", monotonic()
    told: dict[str, dict[str, int]] = {}
    for name in SETS:
        listed = {one.file: one for one in radiographs(data, name)}
        (folder / name).mkdir(parents=True, exist_ok=True)
        for file, jpeg in pictures(data, name):
            one = listed.pop(file)
            if hashlib.sha256(jpeg).hexdigest() != one.sha256:
                raise StudyFailed(f"{name}/{file} is not the picture that its table names")
            target = one.below(folder)
            if not target.is_file():
                part = target.with_suffix(".part")
                dcmwrite(part, wrapped(one, jpeg), enforce_file_format=True)
                part.replace(target)
        if listed:
            raise StudyFailed(f"{len(listed)} pictures of {name} are in its table and not in its archive")
        these = radiographs(data, name)
        told[name] = {"images": len(these), "patients": len({one.patient for one in these})}
    return {"sets": told, "images": sum(one["images"] for one in told.values()), "seconds": round(monotonic() - began, 1)}


# ---- send --------------------------------------------------------------------------------------------------------------------


def make_site(site: Path) -> Path:
    """Make the node's site where there is none, and give its settings; it learns, answers nobody, and sends nowhere."""
    config = site / SETTINGS
    if config.is_file():
        return config
    vocabulary = site / "vocabulary.toml"
    vocabulary.write_text(f"[terms.manufacturer]\nvalues = {json.dumps(list(SETS))}\n", "utf-8")
    callers = [{"ae_title": hospital.ARCHIVE_AE, "networks": ["127.0.0.0/8"], "purpose": "learn"}]
    return init_site(
        site,
        node={
            "ae_title": hospital.NODE_AE,
            "learn_ae_title": hospital.LEARN_AE,
            "port": free_port(),
            "default_issuer": "STUDY",
            "vocabulary": vocabulary.name,
            "callers": callers,
        },
        completion={"quiet_s": 3.0},
        metrics={"receive_port": 0, "reply_port": 0, "schedule_port": 0},
    )


@contextmanager
def serving(config: Path, log: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Run `osteon serve` for the length of a block, from its first answer to a C-ECHO on."""
    here = Pacs(name="node", ae_title=hospital.NODE_AE, host="127.0.0.1", port=port, timeout_s=5.0)
    with log.open("ab") as out:
        node = subprocess.Popen(
            [sys.executable, "-m", "node", "serve", "--config", str(config)],
            stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True, preexec_fn=die_with_parent(),
        )  # fmt: skip
        try:
            _until(lambda: _answers(here), node, READY_S, f"the node answers no C-ECHO; see {log}")
            yield node
        finally:
            node.terminate()
            try:
                node.wait(STOP_S)
            except subprocess.TimeoutExpired:
                node.kill()
                node.wait()


def _answers(node: Pacs) -> bool:
    try:
        peer.echo(node, hospital.ARCHIVE_AE)
    except PeerAway:
        return False
    return True


def _until(true: Callable[[], bool], node: subprocess.Popen[bytes], seconds: float, otherwise: str) -> None:
    deadline = monotonic() + seconds
    while not true():
        if node.poll() is not None:
            raise StudyFailed(f"the node ended by itself with code {node.returncode}")
        if monotonic() > deadline:
            raise StudyFailed(otherwise)
        sleep(0.2)


def send(data: Path, site: Path, associations: int) -> dict[str, Any]:
    """C-STORE what the node does not have to its learning title, wait until every study is learned, and compare."""
    config = make_site(site)
    setup = settings.load(config)
    images = everything(data)
    with Catalogue.open(setup.storage.catalogue) as catalogue:
        keys = site_keys(setup.storage, catalogue)
        known = _archived(catalogue).keys() | _held(catalogue).keys()
        missing = [one.below(site / "wrapped") for one in images if keys.uid(one.sop_uid) not in known]
        with serving(config, site / "node.log", setup.node.port) as node:
            began = monotonic()
            _store(missing, setup, associations)
            sent_s = monotonic() - began
            _await_learned(catalogue, node)
            learned_s = monotonic() - began
        told = compare(images, catalogue, keys, setup)
    speed = {"associations": associations, "images": len(missing), "seconds": round(sent_s, 1)}
    if missing:
        speed |= {"images_per_s": round(len(missing) / sent_s, 1), "seconds_until_learned": round(learned_s, 1)}
    return told | {"last_sending": speed}


def _store(files: Sequence[Path], setup: Settings, associations: int) -> None:
    to = Pacs(name="node", ae_title=hospital.LEARN_AE, host="127.0.0.1", port=setup.node.port)
    shares = [share for share in (files[start::associations] for start in range(associations)) if share]
    with ThreadPoolExecutor(associations) as pool:
        for _ in pool.map(lambda share: hospital.send(share, to, calling=hospital.ARCHIVE_AE), shares):
            pass


def _await_learned(catalogue: Catalogue, node: subprocess.Popen[bytes]) -> None:
    """Wait until no study is on its way; fail when nothing has moved for long."""
    while left := _under_way(catalogue):
        moved = partial(_is_below, catalogue, left)
        _until(moved, node, STALLED_S, f"{left} studies are not learned, and none has been for {STALLED_S:g} s")


def _is_below(catalogue: Catalogue, left: int) -> bool:
    return _under_way(catalogue) < left


def _under_way(catalogue: Catalogue) -> int:
    states = catalogue.studies.by_state()
    return states[StudyState.RECEIVING] + states[StudyState.COMPLETE]


def _archived(catalogue: Catalogue) -> dict[str, TrainingImage]:
    """Give the images of the archive by pseudonymous UID."""
    return {image.sop_uid: image for image in catalogue.instances.for_training()}


def _held(catalogue: Catalogue) -> dict[str, Hold]:
    """Give why images are in the quarantine, by pseudonymous UID."""
    return {held.sop_uid: held.reason for held, _since in catalogue.instances.held()}


def compare(images: Sequence[Radiograph], catalogue: Catalogue, keys: SiteKeys, setup: Settings) -> dict[str, Any]:
    """Count by set what became of what was sent, and hold every archived picture against its file.

    Raises
    ------
    StudyFailed
        An image is nowhere, was held for a reason other than the one its object states, or is not the picture that was sent.
    """
    archived, held = _archived(catalogue), _held(catalogue)
    told: dict[str, dict[str, Any]] = {}
    for name, group in groupby(images, key=lambda one: one.set_name):
        these = list(group)
        kept = [archived[key] for one in these if (key := keys.uid(one.sop_uid)) in archived]
        reasons = Counter(held[key].value for one in these if (key := keys.uid(one.sop_uid)) in held)
        told[name] = {
            "sent": len(these),
            "archived": len(kept),
            "held": dict(sorted(reasons.items())),
            "patients": len({image.person for image in kept}),
            "locked_patients": len({image.person for image in kept if image.locked}),
            "locked_images": sum(image.locked for image in kept),
        }
    for one in images:
        image = archived.get(keys.uid(one.sop_uid))
        if image is None and held.get(keys.uid(one.sop_uid)) is not (Hold.BURNED_IN if one.is_burned_in else None):
            raise StudyFailed(f"{one.set_name}/{one.file} was held, and not for what its object states")
        if image is None and not one.is_burned_in:
            raise StudyFailed(f"{one.set_name}/{one.file} is neither in the archive nor in the quarantine")
        if image is not None and _picture(setup.storage.root / "archive" / image.path) != one.sha256:
            raise StudyFailed(f"{one.set_name}/{one.file} is not in the archive as it was sent")
    states = {state.value: count for state, count in catalogue.studies.by_state().items() if count}
    whole = {key: sum(one[key] for one in told.values()) for key in ("sent", "archived", "locked_images", "locked_patients")}
    return {"sets": told, "studies": states} | whole


def _picture(file: Path) -> str:
    """Give the SHA-256 of the JPEG in an object; the fragment's padding to even length is not of it."""
    jpeg = get_frame(dcmread(file).PixelData, 0, number_of_frames=1)
    return hashlib.sha256(jpeg[: jpeg.rindex(b"\xff\xd9") + 2]).hexdigest()


# ---- label -------------------------------------------------------------------------------------------------------------------


def _class(name: str, code: Code, of: str, *, urgent: bool = False) -> Label:
    probability = Code(f"P-{name.upper().replace('_', '')[:14]}", "99OSTEON", f"AI probability of {of}")
    return Label(name=name, code=code, probability=probability, urgent=urgent)


KNEE = (
    _class("knee_kl_3_4", Code("KL34", "99OSTEON", "Kellgren-Lawrence grade 3 or 4"), "Kellgren-Lawrence grade 3-4", urgent=True),
    _class("knee_kl_0_1", Code("KL01", "99OSTEON", "Kellgren-Lawrence grade 0 or 1"), "Kellgren-Lawrence grade 0-1"),
)
SPINE = (
    _class("scoliosis", Code("298382003", "SCT", "Scoliosis deformity of spine"), "scoliosis", urgent=True),
    _class("normal", Code("17621005", "SCT", "Normal"), "no scoliosis"),
)
KL_CLASS = {"0": "knee_kl_0_1", "1": "knee_kl_0_1", "3": "knee_kl_3_4", "4": "knee_kl_3_4"}
"""Grade 2 is in neither class."""
ADULTS_TOO = 150
LIMITS = ("A study of method on public pictures: its answers mean nothing for any patient.", "Research use only.")


def knee() -> Recipe:
    """Kellgren-Lawrence grade 0-1 against 3-4 from 63 training images.

    Expected: an AUC of 0.75 to 0.9 on the locked patients from an ImageNet start, clearly less from a random one.
    """
    return _recipe(knee, "study_knee", KNEE, ("KNEE",))


def spine() -> Recipe:
    """Scoliosis against normal, in the one collection that has both.

    Expected: an AUC of 0.8 to 0.95 out of fold from an ImageNet start; too few locked patients for the gate to decide.
    """
    return _recipe(spine, "study_spine", SPINE, ("SPINE",))


def _recipe(made_by: Callable[[], Recipe], name: str, classes: tuple[Label, ...], body_parts: tuple[str, ...]) -> Recipe:
    expects = " ".join((made_by.__doc__ or "").split("Expected:", 1)[1].split())
    return Recipe(
        name=name,
        expects=expects,
        classes=classes,
        body_parts=body_parts,
        max_age=ADULTS_TOO,
        takes_unknown_age=True,
        size_px=128,
        lr=1e-4,
        pretraining=PRETRAINING,
        limits=LIMITS,
    )


@dataclass(frozen=True, slots=True)
class Given:
    """A label for one picture."""

    one: Radiograph
    label: str
    reader: str


def knee_labels(images: Iterable[tuple[Radiograph, TrainingImage]], *, less_severe: int, severe: int) -> list[Given]:
    """Label every picture of the locked patients, and a drawn one of each of so many others; a patient is drawn once.

    Raises
    ------
    StudyFailed
        There are not enough patients.
    """
    graded = [(one, image, KL_CLASS[one.row["kl"]]) for one, image in images if one.row["kl"] in KL_CLASS]
    given = [Given(one, label, "OAI readers") for one, image, label in graded if image.locked]
    drawn: set[str] = set()
    for label, wanted in (("knee_kl_3_4", severe), ("knee_kl_0_1", less_severe)):  # the rarer class first
        pool = {one.file: (one, image) for one, image, of in graded if of == label and not image.locked}
        chances = uniforms(SEED, "first run, knee", 0, list(pool))[:, 0]
        before = len(drawn)
        for _, file in sorted(zip(chances, pool, strict=True)):
            one, image = pool[file]
            if len(drawn) - before < wanted and image.person not in drawn:
                drawn.add(image.person)
                given.append(Given(one, label, "OAI readers"))
        if len(drawn) - before < wanted:
            raise StudyFailed(f"there are not {wanted} patients outside the locked set for {label}")
    return given


def spine_labels(images: Iterable[tuple[Radiograph, TrainingImage]]) -> list[Given]:
    """Label every picture of the collection in which both classes are."""
    return [Given(one, one.row["label"], "spine_scoliosis") for one, _image in images if one.row["naming"] == "S/N"]


def label(data: Path, site: Path) -> dict[str, Any]:
    """Import the labels of both tasks as a hospital would, and count what the corpus of each takes."""
    config = make_site(site)
    setup = settings.load(config)
    with Catalogue.open(setup.storage.catalogue) as catalogue:
        keys, archived = site_keys(setup.storage, catalogue), _archived(catalogue)
        found = [(one, archived[key]) for one in everything(data) if (key := keys.uid(one.sop_uid)) in archived]
        by_set = {name: [pair for pair in found if pair[0].set_name == name] for name in SETS}
        given = knee_labels(by_set["knee_kl"], less_severe=LESS_SEVERE, severe=SEVERE) + spine_labels(by_set["spine_scoliosis"])
        table = site / "labels.csv"
        _write_table(table, given)
        said = _osteon("labels", "import", str(table), "--reason", "first study on real radiographs", config=config)
        images, labels = list(archived.values()), catalogue.labels.all()
        tasks = {recipe.name: _count(recipe, images, labels) for recipe in (knee(), spine())}
    return {"imported": said.splitlines(), "tasks": tasks}


def _write_table(file: Path, given: Sequence[Given]) -> None:
    with file.open("w", newline="", encoding="utf-8") as out:
        table = csv.writer(out, lineterminator="\n")
        table.writerow(["patient_id", "study", "label", "reader", "labelled_on", "confirmed_by"])
        for each in given:
            table.writerow([each.one.patient_id, each.one.study_uid, each.label, each.reader, LABELLED_ON, "opinion"])


def _osteon(*words: str, config: Path) -> str:
    command = [sys.executable, "-m", "node", *words, "--config", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise StudyFailed(f"osteon {words[0]} {words[1]} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip()


def _count(recipe: Recipe, images: Sequence[TrainingImage], labels: Sequence[Any]) -> dict[str, Any]:
    """Count labels by class inside and outside the locked set, and what the corpus leaves out of the labelled images."""
    names = {one.name for one in recipe.classes}
    said = {one.study_uid: one.label for one in labels if one.label in names}
    these = [image for image in images if image.study_uid in said]

    def count(*, locked: bool) -> dict[str, dict[str, int]]:
        part = [(image, said[image.study_uid]) for image in these if image.locked is locked]
        return {
            name: {
                "images": sum(of == name for _, of in part),
                "patients": len({image.person for image, of in part if of == name}),
            }
            for name in sorted(names)
        }

    _chosen, left_out = corpus.choose(these, labels, recipe)
    return {
        "to_train_on": count(locked=False),
        "locked": count(locked=True),
        "of_both_classes": len(_in_both(these, said)),
        "left_out_by_the_corpus": dict(left_out),
    }


def _in_both(images: Sequence[TrainingImage], said: Mapping[str, str]) -> set[str]:
    """Name the patients who have a picture in each class."""
    seen = {(image.person, said[image.study_uid]) for image in images}
    return {person for person, count in Counter(person for person, _ in seen).items() if count > 1}


# ---- the program -------------------------------------------------------------------------------------------------------------

FILES = {
    "wrap": "wrapped.json",
    "send": "sent.json",
    "label": "labelled.json",
    "run": "ran.json",
    "compare": "compared.json",
    "probes": "probed.json",
}


ARMS = ("random", "imagenet", "pretrained")


def probes(data: Path, site: Path) -> dict[str, Any]:
    """Probe start and pretrained weights on every graded knee and S/N spine that is not locked, by patient.

    The gate of a pretraining sees 63 labels. This looks with thousands, which the site was never told: how much the weights know.
    """
    setup = settings.load(make_site(site))
    ran = json.loads((site / FILES["run"]).read_text("utf-8"))
    folder = setup.storage.root / "runs" / ran["pretraining"]["run"] / "pretrain"
    recipe = knee()
    cache = Cache(setup.storage.root / "cache", Preprocessing(recipe.size_px))
    with Catalogue.open(setup.storage.catalogue) as catalogue:
        keys, archived = site_keys(setup.storage, catalogue), _archived(catalogue)
    found = [(one, archived[key]) for one in everything(data) if (key := keys.uid(one.sop_uid)) in archived]
    found = [(one, image) for one, image in found if not image.locked and cache.get(image.sop_uid)]
    state = checkpoint.load(folder / "state.pt")["network"]
    clustered = {name.partition(".")[2]: value for name, value in state.items() if name.startswith("backbone.")}
    networks = {
        "ImageNet": build(recipe.network, 2, "imagenet"),
        "DeepCluster": with_backbone(recipe.network, 2, clustered),
        "DeepCluster and classifier": with_backbone(recipe.network, 2, checkpoint.load(folder / "backbone.pt")),
    }
    tasks = {
        "knee KL 0-1 against 3-4": {"knee_kl_0_1": 0, "knee_kl_3_4": 1},
        "spine S/N": {"normal": 0, "scoliosis": 1},
    }
    told: dict[str, Any] = {}
    for task, targets in tasks.items():
        labelled = [(image, targets[of]) for one, image in found if (of := _truth(one)) in targets]
        told[task] = _probed(labelled, networks, cache, recipe)
    return told


def compared(site: Path) -> dict[str, Any]:
    """Hold the arms of each task against each other, in pairs on the same patients."""
    setup = settings.load(make_site(site))
    ran = json.loads((site / FILES["run"]).read_text("utf-8"))
    told: dict[str, Any] = {}
    for task in (knee(), spine()):
        folders = {arm: setup.storage.root / "runs" / ran[f"{task.name} {arm}"]["run"] for arm in ARMS}
        for part in (evaluate.OUT_OF_FOLD, evaluate.LOCKED):
            said = {
                arm: Predictions.from_plain(json.loads((folder / "predictions.json").read_bytes())[part], task.urgent)
                for arm, folder in folders.items()
            }
            for one, other in (("pretrained", "imagenet"), ("imagenet", "random"), ("pretrained", "random")):
                apart = evaluate.difference(said[one], said[other], f"AUC, {one} minus {other}, {part}", seed=SEED)
                told[f"{task.name}: {one} minus {other}, {part}"] = asdict(apart) if apart else None
    return told


def _truth(one: Radiograph) -> str:
    if one.set_name == "knee_kl":
        return KL_CLASS.get(one.row["kl"], "")
    return one.row["label"] if one.row.get("naming") == "S/N" else ""


def _probed(
    labelled: Sequence[tuple[TrainingImage, int]], networks: Mapping[str, Network], cache: Cache, recipe: Recipe
) -> dict[str, Any]:
    """Give the AUC of both probes for each network, and what each gains on the first."""
    uids = [image.sop_uid for image, _ in labelled]
    rows, at = cache.mapped(uids)
    gallery = pretrain.Gallery(rows, at, tuple(uids))
    part = pretrain.Part(Engine(), Ranks(), 2, recipe.seed, recipe.size_px, 64)
    persons = tuple(image.person for image, _ in labelled)
    truth = [target for _, target in labelled]
    said: dict[str, dict[str, Predictions]] = {}
    for name, network in networks.items():
        features = pretrain.features(part.engine.place(network), gallery, part).numpy()
        guessed = probe.out_of_fold(features, truth, persons, 2, folds=5, repeats=1, seed=recipe.seed)
        said[name] = {
            kind: Predictions(tuple(uids), persons, np.array(truth), evaluate.softmax(logits), (1,))
            for kind, logits in guessed.items()
        }
    first = next(iter(said.values()))
    told: dict[str, Any] = {"images": len(uids), "patients": len(set(persons)), "urgent": sum(truth)}
    for name, by_kind in said.items():
        for kind, predictions in by_kind.items():
            told[f"{name}, {kind}"] = evaluate.auc_with_interval(predictions, name, seed=SEED)
            if name != next(iter(said)):
                told[f"{name} minus ImageNet, {kind}"] = evaluate.difference(predictions, first[kind], name, seed=SEED)
    return {name: asdict(one) if isinstance(one, Metric) else one for name, one in told.items()}


def run(site: Path) -> dict[str, Any]:
    """Pretrain once on all that is not locked; then fine-tune both tasks from the three starts.

    The pretrained arm is fine-tuned whatever the probes say of it: that it is not offered is a result, too.
    """
    setup = settings.load(make_site(site))
    done: dict[str, Any] = {}
    upstream = _cycle(setup, site, "pretraining", knee(), Orders(kind="pretrain"))
    done["pretraining"] = asdict(upstream)
    for made in (knee, spine):
        for arm in ARMS:
            recipe = replace(made(), start="random" if arm == "random" else "imagenet")
            orders = Orders(kind="finetune", start_from=upstream.run if arm == "pretrained" else "")
            recipe = recipe if arm == "pretrained" else replace(recipe, pretraining=None)
            done[f"{recipe.name} {arm}"] = asdict(_cycle(setup, site, f"{recipe.name}-{arm}", recipe, orders))
    return done


def _cycle(setup: Settings, site: Path, name: str, recipe: Recipe, orders: Orders) -> cycle.Outcome:
    """Run one training, or go on with the run that was begun under this name."""
    mark = site / "begun" / f"{name}.json"
    begun = json.loads(mark.read_bytes())["run"] if mark.is_file() else ""
    folder = setup.storage.root / "runs" / begun
    if begun and (folder / "outcome.json").is_file():
        return cycle.Outcome(begun, folder, **json.loads((folder / "outcome.json").read_bytes()))

    known = set(_runs(setup))

    def mark_it() -> None:
        if not mark.is_file() and (new := set(_runs(setup)) - known):
            durable.make_folder(mark.parent)
            durable.write(mark, json.dumps({"run": new.pop()}).encode())

    with Marking(mark_it) as progress:
        return cycle.run(setup, recipe, now=lambda: datetime.now(UTC), progress=progress, orders=orders, run_id=begun)


class Marking(Lines):
    """Plain lines that first write down which run was begun: whatever kills the program later, the run goes on."""

    def __init__(self, mark_it: Callable[[], None]) -> None:
        self._mark_it = mark_it

    def stage(self, what: str, total: int = 0) -> None:
        """Name the stage."""
        self._mark_it()
        super().stage(what, total)


def _runs(setup: Settings) -> list[str]:
    folder = setup.storage.root / "runs"
    return [one.name for one in folder.iterdir() if (one / "run.json").is_file()] if folder.is_dir() else []


def main(arguments: Sequence[str] | None = None) -> int:
    """Do every step up to the one named that is not yet done, print what each counted, and give the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("step", choices=list(FILES), help="do this step, and those before it that are not done")
    parser.add_argument("--data", type=Path, required=True, help="the folder in which the five sets lie")
    parser.add_argument("--site", type=Path, required=True, help="the folder of the site; made when it is not there")
    parser.add_argument("--associations", type=int, default=8, help="C-STORE over so many associations at once (default 8)")
    asked = parser.parse_args(arguments)
    data, site = asked.data.resolve(), asked.site.resolve()
    site.mkdir(parents=True, exist_ok=True)
    steps: dict[str, Callable[[], dict[str, Any]]] = {
        "wrap": lambda: wrap(data, site),
        "send": lambda: send(data, site, asked.associations),
        "label": lambda: label(data, site),
        "run": lambda: run(site),
        "compare": lambda: compared(site),
        "probes": lambda: probes(data, site),
    }
    for name in list(steps)[: list(steps).index(asked.step) + 1]:
        file = site / FILES[name]
        is_done = file.is_file()
        if not is_done:
            try:
                told = steps[name]()
            except OsteonError as error:
                print(f"{name}: {error}", file=sys.stderr)
                return 2
            durable.write(file, (json.dumps(told, indent=2, default=str) + "\n").encode())
        print(f"{name}{' (done before)' if is_done else ''}: {file.read_text('utf-8').strip()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
