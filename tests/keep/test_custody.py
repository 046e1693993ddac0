"""A lost, wrong, open or swapped key is a clear error at start, and nothing is written."""

from __future__ import annotations

import base64
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from roles import Role, hand_in, running
from studies import image
from typer.testing import CliRunner

from node import settings
from node.__main__ import build
from node.commands.init import init_site
from node.errors import BadKey, BadSettings, LostStore
from node.keep.custody import Custody
from node.receive.intake import Intake, Taken
from node.reply import respond

OTHER = base64.b64encode(bytes(range(7, 39)))
Break = Callable[[Path], None]


@pytest.fixture
def used(site: Path) -> Path:
    """Give a site with an image in the archive and one in the quarantine, at rest."""
    intake = Intake.open(settings.load(site))
    assert hand_in(intake, image()) is Taken.NEW
    assert hand_in(intake, image(instance=2, BurnedInAnnotation="YES")) is Taken.HELD
    intake.close()
    return site


def everything(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Give name, mode and bytes of whatever is below a folder."""
    return {
        str(path.relative_to(folder)): (stat.S_IMODE(path.stat().st_mode), path.read_bytes() if path.is_file() else b"")
        for path in sorted(folder.rglob("*"))
    }


def _keys(site: Path) -> tuple[Path, Path]:
    return site.parent / "keys" / "site.key", site.parent / "keys" / "vault.key"


def lose_site(site: Path) -> None:
    _keys(site)[0].unlink()


def lose_vault(site: Path) -> None:
    _keys(site)[1].unlink()


def open_site(site: Path) -> None:
    _keys(site)[0].chmod(0o644)


def open_vault(site: Path) -> None:
    _keys(site)[1].chmod(0o640)


def swap(site: Path) -> None:
    one, other = _keys(site)
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def copy_over(site: Path) -> None:
    one, other = _keys(site)
    other.write_bytes(one.read_bytes())


def wrong_site(site: Path) -> None:
    _keys(site)[0].write_bytes(OTHER)


def wrong_vault(site: Path) -> None:
    _keys(site)[1].write_bytes(OTHER)


def no_vault(site: Path) -> None:
    (site.parent / "data/vault/vault.db").unlink()


def empty_vault(site: Path) -> None:
    (site.parent / "data/vault/vault.db").write_bytes(b"")


def no_catalogue(site: Path) -> None:
    (site.parent / "data/catalogue/catalogue.db").unlink()


def new_catalogue(site: Path) -> None:
    no_catalogue(site)
    CliRunner().invoke(build(), ["status", "--config", str(site)], catch_exceptions=False)


def archive_alone(site: Path) -> None:
    no_vault(site)
    (site.parent / "data/catalogue/catalogue.db").unlink()


PUT_BACK = "put it back from its copy in the safe"
BROKEN: dict[str, tuple[Break, str]] = {
    "site key lost": (lose_site, PUT_BACK),
    "vault key lost": (lose_vault, PUT_BACK),
    "site key open": (open_site, r"readable by others \(mode 0644\)"),
    "vault key open": (open_vault, r"readable by others \(mode 0640\)"),
    "keys swapped": (swap, "the keys are swapped"),
    "one key twice": (copy_over, "are the same"),
    "wrong site key": (wrong_site, "not the site key whose pseudonyms are in this vault"),
    "wrong vault key": (wrong_vault, "not the key that sealed this vault"),
    "vault lost": (no_vault, "the vault is empty or not there, while the catalogue is not.*Restore the vault"),
    "vault emptied": (empty_vault, "the vault is empty or not there, while the catalogue is not"),
    "catalogue lost": (no_catalogue, "the catalogue is not there or empty, while the vault knows.*Restore the catalogue"),
    "catalogue made anew by a verb": (new_catalogue, "the catalogue is not there or empty, while the vault knows"),
    "archive alone": (archive_alone, "the vault is empty or not there, while the archive is not"),
}
STARTS: dict[str, tuple[str, ...]] = {
    "quarantine list": ("quarantine", "list"),
    "quarantine show": ("quarantine", "show", "a" * 32),
    "quarantine release": ("quarantine", "release", "a" * 32, "--reason", "x"),
    "quarantine discard": ("quarantine", "discard", "a" * 32, "--reason", "x", "--yes"),
    "vault verify": ("vault", "verify"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_nothing_starts_and_nothing_is_written(used: Path, broken: str) -> None:
    breaking, told = BROKEN[broken]
    breaking(used)
    before = everything(used.parent)
    starts: list[Callable[[], object]] = [
        lambda: Intake.open(settings.load(used)),
        lambda: respond.Reply.open(settings.load(used)),
        *(
            lambda words=words: CliRunner().invoke(build(), [*words, "--config", str(used)], catch_exceptions=False)  # type: ignore[misc]
            for words in STARTS.values()
        ),
    ]
    for start in starts:
        with pytest.raises((BadKey, LostStore), match=told) as error:
            start()
        assert "osteon init" not in str(error.value)
    assert everything(used.parent) == before


@pytest.mark.parametrize("role", ["receive", "reply"])
def test_a_role_that_cannot_open_its_stores_ends_at_once_and_says_why(used: Path, role: str) -> None:
    swap(used)
    before = everything(used.parent)
    process = Role(role, "--config", str(used))
    assert process.wait() == 2
    assert "the keys are swapped" in "".join(process.noise)
    assert everything(used.parent) == before
    swap(used)
    if role == "receive":
        with running(role, config=used) as well:
            assert well.event("listening")


@pytest.mark.parametrize("broken", ["site key lost", "site key open", "keys swapped", "wrong site key"])
@pytest.mark.parametrize(
    "words",
    [
        ("status", "--study", "ACC001001"),
        ("reply", "study", "ACC001001", "--reason", "x"),
        ("labels", "import", "labels.csv"),
        ("patients", "merge", "OST-" + "A" * 16, "OST-" + "B" * 16, "--reason", "x"),
    ],
    ids=["status", "reply study", "labels import", "patients merge"],
)
def test_a_verb_that_only_makes_pseudonyms_knows_a_wrong_site_key(
    used: Path, broken: str, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    (used.parent / "labels.csv").write_text("patient_id,study,label,reader,labelled_on,confirmed_by\n")
    monkeypatch.chdir(used.parent)
    BROKEN[broken][0](used)
    before = everything(used.parent)
    with pytest.raises(BadKey):
        CliRunner().invoke(build(), [*words, "--config", str(used)], catch_exceptions=False)
    assert everything(used.parent) == before


def test_check_says_what_is_wrong_with_the_keys_and_writes_nothing(used: Path) -> None:
    swap(used)
    before = everything(used.parent)
    done = CliRunner().invoke(build(), ["check", "--config", str(used)], catch_exceptions=False)
    assert done.exit_code == 1
    assert "swapped" in " ".join(done.output.split())
    assert everything(used.parent) == before


def test_new_keys_are_never_made_beside_stores_that_are_full(used: Path) -> None:
    for file in (used, *_keys(used)):
        file.unlink()
    before = everything(used.parent)
    for broken in (lambda: None, lambda: no_vault(used), lambda: (used.parent / "data/catalogue/catalogue.db").unlink()):
        broken()
        before = everything(used.parent)
        with pytest.raises(BadSettings, match="new keys would open nothing in it: put the site's own keys back"):
            init_site(used.parent)
        assert everything(used.parent) == before


def test_keys_may_come_as_credentials_of_systemd(used: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "credentials"
    folder.mkdir(mode=0o700)
    for file in _keys(used):
        (folder / file.stem).write_bytes(file.read_bytes())
        (folder / file.stem).chmod(0o400)
        file.unlink()
    text = (
        used.read_text("utf-8").replace('"keys/site.key"', '"credential:site"').replace('"keys/vault.key"', '"credential:vault"')
    )
    used.write_text(text, "utf-8")
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    with pytest.raises(BadKey, match="LoadCredential=site:FILE"):
        Custody.open(settings.load(used).storage)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(folder))
    with Custody.open(settings.load(used).storage) as stores:
        assert stores.catalogue.instances.count() == 1


def test_a_catalogue_of_another_site_is_not_mixed_with_this_vault(used: Path, tmp_path: Path) -> None:
    other = init_site(tmp_path / "other")
    Custody.open(settings.load(other).storage).close()
    text = used.read_text("utf-8")
    used.write_text(text.replace("sqlite:///data/catalogue", f"sqlite:///{other.parent}/data/catalogue"), "utf-8")
    with pytest.raises(BadKey, match="not the site key whose pseudonyms are in this catalogue"):
        Custody.open(settings.load(used).storage)


def test_an_empty_site_may_begin(site: Path) -> None:
    Custody.open(settings.load(site).storage).close()
    Custody.open(settings.load(site).storage).close()
    assert (site.parent / "data/vault/vault.db").stat().st_size
