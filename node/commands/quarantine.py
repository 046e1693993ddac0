"""`osteon quarantine`: see what could not be taken in safely, and decide.

In: an id, a reason. Out: lines that name no patient, and the picture that a person asks for, never in a folder of everybody's.
Nothing here opens what is sealed but a release and a look at the picture, and the history keeps both.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from node.errors import NotFound, Refused
from node.keep.records import Hold
from node.options import DEFAULT_CONFIG, Config, login

if TYPE_CHECKING:
    from collections.abc import Iterator

    from node.keep.custody import Custody
    from node.keep.records import Held
    from node.settings import Settings

app = typer.Typer(help="What could not be taken in safely: list, show, release, discard.", no_args_is_help=True)

HeldId = Annotated[str, typer.Argument(metavar="ID", help="As `osteon quarantine list` gives it.")]
Reason = Annotated[str, typer.Option("--reason", help="Why; kept in the history.", prompt="Why")]

ASK = "ask"
PICTURE_PX = 1024
"""Longest edge of the picture: enough to read what is burned in."""
GIVE_AWAY = "The whole study, with every image of it in the archive, goes to the patient whom this image names. Is that right?"
CUT_SHORT = "Its writing was cut short before its row; its sender was told no success and sends it again. Discard this one."
_OVERRULE = "puts it into the archive, pseudonymised; the pixels stay as they are, so look at the picture first"
_MEND = "is refused while the reason stands: mend it at its source and send it again, then discard this one"
WORDS = {
    Hold.MODALITY: ('only CR and DX are learned from; the study may be answered "not applicable"', _MEND),
    Hold.BURNED_IN: (
        "its header says that text is burned into the pixels: a name may be in them, and would reach the archive",
        _OVERRULE,
    ),
    Hold.SECONDARY: ("it is a copy or a screen capture, no acquisition: names are often burned into such pixels", _OVERRULE),
    Hold.DIGITISED: ("it was scanned from film: the film's label with the name is often on it", _OVERRULE),
    Hold.PATIENT_ID: (
        "its PatientID names nobody: a pseudonym made of it would melt patients together",
        "--as-patient study takes it in under the patient of its study, when you know that it is theirs; else correct the "
        "PatientID in the PACS and send it again",
    ),
    Hold.PATIENT_CONFLICT: (
        "its study came under another patient before: PatientID and issuer differ, or birth date and sex both do",
        "--as-patient study when it belongs to the study's patient; --as-patient newcomer when the image is right and the study "
        "came under a wrong one; after `osteon patients merge` without either. Else correct it in the PACS and send it again",
    ),
    Hold.PIXEL_CONFLICT: (
        "an image with this UID is known, with other pixels or in another series: one of the two is not what its UID says",
        "is refused while the other stands: compare the two in the PACS; give a changed image a new UID there and send it again",
    ),
    Hold.MALFORMED: ("it is not what DICOM asks for, and what cannot be read cannot be pseudonymised for sure", _MEND),
}
"""Why an object is held and what `release` does with it, by the reason."""
LOST = "not in the catalogue"
"""A sealed file whose writing was cut short before its row: its sender was told no success and sends it again."""


@app.command("list")
def list_held(config: Config = DEFAULT_CONFIG) -> None:
    """List what is held: id, when it came, reason, modality, pseudonym of the study."""
    from node.keep.custody import Custody

    with Custody.open(_settings(config).storage) as stores:
        held, files = stores.catalogue.instances.held(), stores.quarantine.ids()
    for one, at in held:
        typer.echo(
            f"{one.id}  {at.astimezone():%Y-%m-%d %H:%M}  {one.reason:<28}  {one.modality or '-':<4}  {one.study_uid or '-'}"
        )
    lost = sorted(set(files) - {one.id for one, _at in held})
    for held_id in lost:
        typer.echo(f"{held_id}  {'-':<16}  {LOST}")
    if not held and not lost:
        typer.echo("The quarantine is empty.")


@app.command()
def show(
    held_id: HeldId,
    picture: Annotated[
        bool, typer.Option("--picture/--no-picture", help="Make a PNG of the image; the history keeps who did.")
    ] = True,
    out: Annotated[Path, typer.Option("--out", help="Folder for the PNG.", show_default="here")] = Path(),
    reason: Annotated[str, typer.Option("--reason", help="Why you look; kept in the history.")] = "to decide on it",
    config: Config = DEFAULT_CONFIG,
) -> None:
    """Show one held object: why it is held, what can be done, and its picture, as a PNG that you delete when you have decided."""
    from node.keep.custody import Custody

    with Custody.open(_settings(config).storage) as stores:
        found = _found(stores, held_id)
        for line in _facts(*found) if found else [LOST, CUT_SHORT]:
            typer.echo(line)
        if picture:
            # before the pixels are: nobody looks unseen
            stores.catalogue.history.note(
                by=login(), what="quarantine: looked at", subject=held_id, reason=reason, now=datetime.now(UTC)
            )
            typer.echo(_picture(stores.quarantine.read(held_id), out / f"quarantine-{held_id}.png"))


def _facts(held: Held, at: datetime) -> Iterator[str]:
    """Say what may be said of a held object without opening it."""
    facts = {
        "id": held.id,
        "held since": f"{at.astimezone():%Y-%m-%d %H:%M}",
        "reason": held.reason,
        "detail": held.detail,
        "modality": held.modality,
        "SOP class": held.sop_class_uid,
        "patient": held.pid,
        "study": held.study_uid,
        "instance": held.sop_uid,
        "sent by": held.calling_ae,
        "purpose": held.purpose,
    }
    for name, value in facts.items():
        yield f"{name:<11}{value or '-'}"
    why, what = WORDS[held.reason]
    yield f"why        {why}"
    yield f"release    {what}"
    yield "discard    removes it for good"


def _picture(part10: bytes, file: Path) -> str:
    """Write the picture of a held object beside the terminal, or say why there is none.

    Raises
    ------
    Refused
        The folder is not there, or one in which everybody may write, as the system's for temporary files.
    """
    from io import BytesIO

    import pydicom.config
    from PIL import Image
    from pydicom import dcmread
    from pydicom.errors import InvalidDicomError

    from models import durable
    from models.errors import Unreadable
    from models.preprocess import first_look
    from node.receive.intake import BROKEN

    if not file.parent.is_dir() or file.parent.stat().st_mode & 0o002:
        raise Refused(f"{file.parent.resolve()}: not a folder of your own: name one with --out")
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    try:
        try:
            shown, frames = first_look(dcmread(BytesIO(part10)))
        except (InvalidDicomError, *BROKEN) as error:
            raise Unreadable(f"it is no image that can be read ({type(error).__name__})") from None
    except Unreadable as error:
        return f"picture    none: {error}"
    image = Image.fromarray(shown)
    image.thumbnail((PICTURE_PX, PICTURE_PX))
    png = BytesIO()
    image.save(png, "PNG")
    durable.write(file, png.getvalue(), mode=0o600)
    told = f" (the first of {frames} frames)" if frames > 1 else ""
    return f"""\
picture    {file.resolve()}{told}
           It is a patient's image, and a name may be burned into it: pass it to nobody, and delete it when you have decided."""


@app.command()
def release(
    held_id: HeldId,
    reason: Reason,
    as_patient: Annotated[
        str,
        typer.Option(
            "--as-patient",
            metavar="WHOSE",
            help="Whose image it is, where that is in doubt: study (it belongs to the patient of its study), newcomer (the image "
            "is right, and the study came under a wrong patient), a pseudonym OST-… that is one of these two, or ask, to type "
            "the hospital's PatientID.",
        ),
    ] = "",
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before a study is given to another patient.")] = False,
    config: Config = DEFAULT_CONFIG,
) -> None:
    """Take a held image in after all: a person has seen it and overrules the reason, or knows whose it is."""
    from node.commands.patients import PSEUDONYM, ask
    from node.receive.intake import NEWCOMER, STUDY, Intake

    if as_patient and as_patient not in (STUDY, NEWCOMER, ASK) and not PSEUDONYM.fullmatch(as_patient):
        raise typer.BadParameter(
            "give study, newcomer, a pseudonym (OST-…), or ask; a hospital's identifier does not belong on a command line",
            param_hint="--as-patient",
        )
    site = _settings(config)
    intake = Intake.open(site)
    try:
        whose = ask(site, intake.keys, "PatientID of the patient whose image it is") if as_patient == ASK else as_patient
        if intake.gives_study_away(held_id, whose) and not yes:
            typer.confirm(GIVE_AWAY, abort=True)
        taken = intake.release(held_id, by=login(), reason=reason, whose=whose)
    finally:
        intake.close()
    typer.echo(f"{held_id} is released: {taken}")
    if whose:
        typer.echo("Correct the PatientID in the PACS, too: sent again as it was, the same image is held again.")


@app.command()
def discard(
    held_id: HeldId,
    reason: Reason,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    config: Config = DEFAULT_CONFIG,
) -> None:
    """Remove a held object for good."""
    from node.keep.custody import Custody

    with Custody.open(_settings(config).storage) as stores:
        found = _found(stores, held_id)
        if not yes:
            typer.confirm(f"Remove {held_id} ({found[0].reason if found else LOST}) for good?", abort=True)
        now = datetime.now(UTC)

        def goes(_since: datetime) -> bool:
            # The file first: should the rest be cut short, the row is still listed and the patient's data are gone.
            stores.quarantine.discard(held_id)
            return True

        if found is not None:
            stores.catalogue.instances.unhold(held_id, by=login(), reason=reason, decision="discarded", now=now, goes=goes)
        else:
            stores.quarantine.discard(held_id)
            stores.catalogue.history.note(by=login(), what="quarantine: discarded", subject=held_id, reason=reason, now=now)
    typer.echo(f"{held_id} is removed.")


def _found(stores: Custody, held_id: str) -> tuple[Held, datetime] | None:
    """Give what is held and since when; None for a sealed file of which the catalogue knows nothing."""
    found = stores.catalogue.instances.held_one(held_id)
    if found is None and held_id not in stores.quarantine.ids():
        raise NotFound(f"the quarantine holds nothing under {held_id}; `osteon quarantine list` shows what it holds")
    return found


def _settings(config: Config) -> Settings:
    from node import settings

    return settings.load(config)
