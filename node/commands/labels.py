"""`osteon labels`: what readers say of studies and images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from node.options import DEFAULT_CONFIG, Config, login

if TYPE_CHECKING:
    from collections.abc import Sequence

    from node.keep.records import Label

app = typer.Typer(help="Import and list the labels that the model learns from.", no_args_is_help=True)


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="CSV under the hospital's identifiers: patient_id, issuer (may be empty), study "
                                              "(accession number or UID), sop_instance_uid (may be empty), label, reader, "
                                              "labelled_on, confirmed_by (histology, culture, follow-up, opinion), "
                                              "first_treatment_on (may be empty).")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be imported, and import nothing.")] = False,
    reason: Annotated[str, typer.Option("--reason", help="Why, or where the table comes from; kept in the history.")] = "",
    config: Config = DEFAULT_CONFIG,
) -> None:  # fmt: skip
    """Import a label table: all of it, or, when a row has a problem, nothing."""
    from datetime import UTC, datetime

    from node import settings
    from node.errors import BadLabels
    from node.keep.catalogue import Catalogue
    from node.keep.custody import site_keys
    from node.receive import labels

    site = settings.load(config)
    try:
        text = file.read_text("utf-8-sig")
    except OSError as error:
        raise BadLabels(f"{file}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise BadLabels(f"{file}: not UTF-8; save the file as UTF-8 text") from None
    with Catalogue.open(site.storage.catalogue) as catalogue:
        rows, problems = labels.read(text, site_keys(site.storage, catalogue), site.node.default_issuer)

        def study_of_image(sop_uid: str) -> str | None:
            image = catalogue.instances.find(sop_uid)
            return image.study_uid if image else None

        found, more = labels.resolve(
            rows,
            studies=lambda row: [
                *catalogue.studies.find(uid=row.study_uid),
                *catalogue.studies.find(accession_keys=row.accession_keys),
            ],
            pseudonyms=lambda pid: catalogue.patients.person(pid).pseudonyms,
            study_of_image=study_of_image,
            stored=catalogue.labels.all(),
        )
        for problem in sorted(problems + more, key=lambda one: one.line):
            typer.echo(f"{file.name}: line {problem.line}: {problem.what}", err=True)
        _print_counts(found, "label")
        typer.echo(f"{len(rows) - len(more) - len(found)} rows say what is known already")
        if problems or more:
            raise BadLabels(f"{len(problems) + len(more)} rows of {file.name} cannot be imported; nothing was imported")
        if dry_run:
            typer.echo("dry run: nothing was imported")
            return
        catalogue.labels.put_all(found, now=datetime.now(UTC), by=login(), reason=reason or file.name)
        typer.echo(f"{len(found)} labels imported")


@app.command("list")
def list_(config: Config = DEFAULT_CONFIG) -> None:
    """List the labels, under pseudonyms."""
    from rich.console import Console
    from rich.table import Table

    from node import settings
    from node.keep.catalogue import Catalogue

    with Catalogue.open(settings.load(config).storage.catalogue) as catalogue:
        labels = catalogue.labels.all()
    columns = ("label", "study", "image", "reader", "labelled on", "confirmed by", "first treatment (shifted)")
    table = Table(*columns)
    for one in labels:
        image = one.sop_uid or "(study)"
        table.add_row(one.label, one.study_uid, image, one.reader, one.labelled_on, one.confirmed_by, one.first_treatment_on)
    Console(soft_wrap=True).print(table)
    _print_counts(labels, "label")


def _print_counts(labels: Sequence[Label], what: str) -> None:
    """Print how many studies and patients each label has."""
    for name in sorted({one.label for one in labels}):
        of_it = [one for one in labels if one.label == name]
        studies, patients = len({one.study_uid for one in of_it}), len({one.pid for one in of_it})
        typer.echo(f"{what} {name}: {len(of_it)} rows, {studies} studies, {patients} patients")
