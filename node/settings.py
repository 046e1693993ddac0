"""The site's settings: `ae_config.toml` read once, checked, and passed on as frozen pieces.

In: a TOML file. Out: `Settings`. An unknown, missing or unsafe key is a `BadSettings` that names file, key and line. Nothing is
read from the environment here but a key that the file says is there (`env:NAME`, `credential:NAME`).
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import os
import re
import stat
import tomllib
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import parse_qs, urlsplit
from zoneinfo import ZoneInfo

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from node import timetable
from node.errors import BadKey, BadSettings, NotFound

KEY_BYTES = 32
SECRET_MAX = 1024
"""Bytes read of a file that should hold a secret."""
ENVIRONMENT, CREDENTIAL = "env:", "credential:"
"""What the place of a key begins with that is no file of the site."""
AETitle = Annotated[str, Field(min_length=1, max_length=16, pattern=r"^ *[\x21-\x5b\x5d-\x7e][\x20-\x5b\x5d-\x7e]*$")]
"""Not of spaces alone (PS3.5 6.2)."""
Port = Annotated[int, Field(ge=0, le=65535)]
Seconds = Annotated[float, Field(gt=0, le=86400)]
Hours = Annotated[float, Field(gt=0, le=10 * 365 * 24)]
PurposeName = Literal["answer", "learn"]
RoleName = Literal["receive", "reply", "schedule"]
Username = Annotated[str, Field(max_length=64)]


class _Piece(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _whole_identity(username: str, passcode: str) -> None:
    if passcode and not username:
        raise ValueError("passcode needs username")


class Caller(_Piece):
    """A peer that may open associations to this node."""

    ae_title: AETitle
    """Its calling AE title, compared exactly after trimming spaces (PS3.8 9.3.2)."""
    networks: list[str] = Field(min_length=1)
    """CIDR networks it may call from."""
    purpose: PurposeName = "answer"
    """Whether what it sends to `ae_title` is to be answered with an SR, or only learned from."""
    max_associations: Annotated[int, Field(ge=1, le=256)] = 8
    """Associations of this caller alone that may be open at the same time."""
    certificate_names: list[Annotated[str, Field(min_length=1)]] = []
    """Common names, alternative names or fingerprints (`sha256:…`), one of which its certificate must bear; empty: any that
    `[node.tls] ca` has signed. A caller with names is admitted over TLS only."""
    username: Username = ""
    """The user it must name (PS3.7 D.3.3.7); empty: none is asked for."""
    passcode: str = ""
    """Where the passcode of that user lies; empty: the name alone is compared."""
    passcode_in_clear: bool = False
    """Whether name and passcode may come over the plain port."""

    @field_validator("certificate_names")
    @classmethod
    def _are_fingerprints(cls, names: list[str]) -> list[str]:
        for name in names:
            if name.startswith("sha256:") and not re.fullmatch(r"sha256:([0-9A-Fa-f]{2}:?){31}[0-9A-Fa-f]{2}", name):
                raise ValueError("sha256: is followed by the 64 hexadecimal digits of the certificate's fingerprint")
        return names

    @model_validator(mode="after")
    def _passcode_has_a_user(self) -> Caller:
        _whole_identity(self.username, self.passcode)
        return self

    @field_validator("networks")
    @classmethod
    def _are_networks(cls, networks: list[str]) -> list[str]:
        for network in networks:
            ipaddress.ip_network(network)
        return networks

    def calls_from(self, address: str) -> bool:
        """Say whether `address` (IPv4 or IPv6, also IPv4-mapped) lies in one of the networks."""
        ip = ipaddress.ip_address(address.split("%")[0])
        if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped:
            ip = ip.ipv4_mapped
        return any(ip in ipaddress.ip_network(network) for network in self.networks)


class Tls(_Piece):
    """TLS for the peers that call; off while no certificate is named."""

    certificate: str = ""
    key: str = ""
    ca: str = ""
    crl: str = ""
    port: Port = 2762
    require_client_certificate: bool = True
    min_version: Literal["1.2", "1.3"] = "1.2"
    keep_plain_port: bool = False

    @property
    def on(self) -> bool:
        """Say whether callers reach the node over TLS."""
        return bool(self.certificate)

    @model_validator(mode="after")
    def _is_whole(self) -> Tls:
        if bool(self.certificate) != bool(self.key):
            raise ValueError("certificate and key belong together: name both, or neither")
        if self.on and self.require_client_certificate and not self.ca:
            raise ValueError("require_client_certificate needs ca: who signs the certificates of callers?")
        if self.crl and not self.ca:
            raise ValueError("crl needs ca")
        return self


class Node(_Piece):
    """The node as its peers see it."""

    ae_title: AETitle
    learn_ae_title: AETitle
    host: str = "127.0.0.1"
    port: Port = 11112
    default_issuer: Annotated[str, Field(min_length=1, max_length=64)]
    callers: list[Caller] = []
    max_associations: Annotated[int, Field(ge=1, le=256)] = 16
    max_pdu: Annotated[int, Field(ge=4096, le=1 << 20)] = 131072
    max_object_mb: Annotated[int, Field(ge=1, le=4096)] = 256
    idle_timeout_s: Annotated[float, Field(gt=0, le=3600)] = 60.0
    object_timeout_s: Seconds = 900.0
    placeholder_patient_ids: list[str] = ["0", "00000000", "1", "ANONYMOUS", "NONE", "UNKNOWN", "TEST", "XXX"]
    vocabulary: str = ""
    tls: Tls = Tls()

    @property
    def listens_in_clear(self) -> bool:
        """Say whether the plain port is open."""
        return not self.tls.on or self.tls.keep_plain_port

    @model_validator(mode="after")
    def _callers_can_call(self) -> Node:
        """Refuse a caller that no port would ever admit: it is a mistake, not a policy."""
        for caller in self.callers:
            title = caller.ae_title.strip()
            if caller.certificate_names and not (self.tls.on and self.tls.ca):
                raise ValueError(f"caller {title}: certificate_names needs [node.tls] certificate and ca")
            if caller.passcode and not (self.tls.on or caller.passcode_in_clear):
                raise ValueError(f"caller {title}: passcode needs [node.tls], or passcode_in_clear = true")
        if self.tls.keep_plain_port and self.tls.port == self.port != 0:
            raise ValueError("[node] port and [node.tls] port must differ")
        return self

    @model_validator(mode="after")
    def _titles_differ(self) -> Node:
        if self.ae_title.strip() == self.learn_ae_title.strip():
            raise ValueError("learn_ae_title must differ from ae_title")
        titles = [caller.ae_title.strip() for caller in self.callers]
        if len(set(titles)) != len(titles):
            raise ValueError("two [[node.callers]] have the same ae_title")
        return self


class Pacs(_Piece):
    """A destination of results."""

    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_-]+$")]
    ae_title: AETitle
    host: str
    port: Annotated[int, Field(ge=1, le=65535)]
    answers_for: list[str] = []
    """Calling AE titles whose studies are answered here; empty: all."""
    timeout_s: Annotated[float, Field(gt=0, le=600)] = 20.0
    tls: bool = False
    """Whether results go there over TLS."""
    tls_ca: str = ""
    """Who signed its certificate; empty: `[node.tls] ca`."""
    tls_crl: str = ""
    tls_name: str = ""
    """The name its certificate must bear; empty: `host`."""
    tls_certificate: str = ""
    """What this node presents there; empty: `[node.tls] certificate`, if there is one."""
    tls_key: str = ""
    tls_min_version: Literal["1.2", "1.3"] = "1.2"
    username: Username = ""
    """The user this node names there (PS3.7 D.3.3.7); empty: none."""
    passcode: str = ""
    """Where the passcode of that user lies."""
    passcode_in_clear: bool = False
    """Whether the passcode may leave without TLS."""

    @model_validator(mode="after")
    def _is_whole(self) -> Pacs:
        if bool(self.tls_certificate) != bool(self.tls_key):
            raise ValueError("tls_certificate and tls_key belong together: name both, or neither")
        if not self.tls and (self.tls_ca or self.tls_crl or self.tls_name or self.tls_certificate):
            raise ValueError("tls_ca, tls_crl, tls_name and tls_certificate need tls = true")
        _whole_identity(self.username, self.passcode)
        if self.passcode and not (self.tls or self.passcode_in_clear):
            raise ValueError("passcode needs tls = true, or passcode_in_clear = true")
        return self

    def answers(self, calling_ae: str) -> bool:
        """Say whether results of studies that `calling_ae` sent go to this destination."""
        return not self.answers_for or calling_ae.strip() in {ae.strip() for ae in self.answers_for}


DatabaseURL = Annotated[str, Field(pattern=r"^(sqlite:///[^?]*[^?/]|postgresql(\+psycopg)?://.+|env:[A-Za-z_][A-Za-z0-9_]*)$")]


Days = Annotated[float, Field(ge=0, le=36500)]


class KeepDays(_Piece):
    """How long what lies in the storage is kept, by why it was sent; 0 is for ever."""

    answer: Days = 0.0
    learn: Days = 0.0
    quarantine: Days = 0.0


class Storage(_Piece):
    """Where everything lies."""

    root: Path
    catalogue: DatabaseURL
    vault: DatabaseURL
    site_key: str
    vault_key: str
    keep_days: KeepDays = KeepDays()
    free_min_gb: Annotated[float, Field(ge=0, le=1e6)] = 5.0

    @field_validator("root", mode="before")
    @classmethod
    def _is_path(cls, root: object) -> object:
        return Path(root) if isinstance(root, str) else root

    @field_validator("catalogue", "vault")
    @classmethod
    def _holds_no_password(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.password is not None or "password" in parse_qs(parts.query):
            raise ValueError("a password has no place here: put it into a password file (~/.pgpass), or write env:NAME")
        return url

    @model_validator(mode="after")
    def _places_differ(self) -> Storage:
        if self.catalogue == self.vault:
            raise ValueError("vault must be another database than catalogue")
        if self.site_key == self.vault_key:
            raise ValueError("site_key and vault_key must be two keys")
        return self


class Backup(_Piece):
    """Where `osteon backup` writes, and when its sets are too old."""

    folder: str = ""
    max_age_days: Annotated[float, Field(gt=0, le=3650)] = 2.0


class Completion(_Piece):
    """When a study counts as complete."""

    quiet_s: Annotated[float, Field(ge=0, le=86400)] = 120.0
    max_wait_s: Seconds = 1800.0
    answer_within_h: Hours = 72.0


class Inference(_Piece):
    """How studies are scored, and whether answers leave."""

    provider: Literal["cpu", "cuda"] = "cpu"
    allow_degraded: bool = False
    threads: Annotated[int, Field(ge=0, le=256)] = 0
    answers: Literal["on", "off"] = "on"
    answer_not_applicable: Literal["send", "status only"] = "send"
    claim_s: Seconds = 300.0


class Report(_Piece):
    """What the SR says of itself (docs/conformance.md)."""

    document_title: Literal["126000", "126001"] = "126001"
    series_number: Annotated[int, Field(ge=1, le=2**31 - 1)] = 9001
    series_description: Annotated[str, Field(min_length=1, max_length=40, pattern=r"^[\x20-\x5b\x5d-\x7e]+$")] = (
        "Osteon AI RESEARCH ONLY"
    )

    @field_validator("series_description")
    @classmethod
    def _says_research(cls, text: str) -> str:
        if "RESEARCH ONLY" not in text:
            raise ValueError("must contain RESEARCH ONLY")
        return text


class Delivery(_Piece):
    """How often and how long a result is offered to a PACS."""

    retry_first_s: Seconds = 10.0
    retry_max_s: Seconds = 3600.0
    give_up_h: Hours = 72.0


class Training(_Piece):
    """What the trainer of this site runs."""

    recipe: str = "ewing_small"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    locked: Annotated[float, Field(gt=0, lt=1)] = 0.2
    processes: Annotated[int, Field(ge=0, le=512)] = 0
    """Of a run on this machine; 0: one for each GPU, one on a processor."""
    stop_grace_s: Seconds = 900.0
    silent_h: Hours = 24.0


class When(_Piece):
    """What must be so before a run of a schedule starts."""

    new_studies: Annotated[int, Field(ge=0)] = 0
    new_labels: Annotated[int, Field(ge=0)] = 0
    quiet_hours: str = ""
    """Part of the day in which no run starts, in the schedule's zone; empty: none."""

    @field_validator("quiet_hours")
    @classmethod
    def _are_hours(cls, text: str) -> str:
        if text:
            timetable.Hours.read(text)
        return text


class Schedule(_Piece):
    """When the trainer is to run by itself."""

    name: Annotated[str, Field(min_length=1, max_length=40, pattern=r"^[A-Za-z0-9_-]*[A-Za-z_-][A-Za-z0-9_-]*$")]
    """Not of digits alone: those are runs."""
    cron: str = ""
    every: str = ""
    timezone: str = ""
    """IANA name; empty: the machine's zone."""
    kind: Literal["cycle", "pretrain", "finetune"] = "cycle"
    """`cycle`: pretraining, fine-tuning, gate; `pretrain`, `finetune`: that part alone."""
    recipe: str = ""
    """Empty: `[training] recipe`."""
    when: When = When()

    @field_validator("cron")
    @classmethod
    def _is_cron(cls, text: str) -> str:
        if text:
            timetable.cron(text)
        return text

    @field_validator("every")
    @classmethod
    def _is_period(cls, text: str) -> str:
        if text:
            timetable.period(text)
        return text

    @field_validator("timezone")
    @classmethod
    def _is_zone(cls, name: str) -> str:
        try:
            if name:
                ZoneInfo(name)
        except (ValueError, OSError, KeyError):  # ZoneInfoNotFoundError is a KeyError
            raise ValueError(f'there is no time zone {name!r}; write one such as "Europe/Berlin"') from None
        return name

    @model_validator(mode="after")
    def _has_one_rhythm(self) -> Schedule:
        if bool(self.cron) == bool(self.every):
            raise ValueError("a schedule needs `cron` or `every`, one of the two")
        return self


class Metrics(_Piece):
    """Where each role shows its health and its figures; a port of 0: nowhere."""

    host: str = "127.0.0.1"
    receive_port: Port = 9711
    reply_port: Port = 9712
    schedule_port: Port = 9713

    @model_validator(mode="after")
    def _ports_differ(self) -> Metrics:
        ports = [port for port in (self.receive_port, self.reply_port, self.schedule_port) if port]
        if len(set(ports)) != len(ports):
            raise ValueError("two roles have the same port")
        return self

    def port(self, role: RoleName) -> int:
        """Give the port of a role, 0 when it shows nothing."""
        return {"receive": self.receive_port, "reply": self.reply_port, "schedule": self.schedule_port}[role]


class Settings(_Piece):
    """All of `ae_config.toml`."""

    node: Node
    pacs: list[Pacs] = []
    storage: Storage
    backup: Backup = Backup()
    completion: Completion = Completion()
    inference: Inference = Inference()
    report: Report = Report()
    delivery: Delivery = Delivery()
    training: Training = Training()
    schedule: list[Schedule] = []
    metrics: Metrics = Metrics()

    def schedule_named(self, name: str) -> Schedule:
        """Give the schedule of this name.

        Raises
        ------
        NotFound
            With the names there are.
        """
        for one in self.schedule:
            if one.name == name:
                return one
        there = ", ".join(one.name for one in self.schedule) or "none; ae_config.toml shows how to write one"
        raise NotFound(f"there is no schedule {name!r}; there are: {there}")

    def recipe_of(self, schedule: Schedule) -> str:
        """Name the recipe of a schedule."""
        return schedule.recipe or self.training.recipe

    @model_validator(mode="after")
    def _names_differ(self) -> Settings:
        for table, names in (("pacs", [one.name for one in self.pacs]), ("schedule", [one.name for one in self.schedule])):
            if len(set(names)) != len(names):
                raise ValueError(f"two [[{table}]] have the same name")
        for pacs in self.pacs:
            if pacs.tls and not (pacs.tls_ca or self.node.tls.ca):
                raise ValueError(f"pacs {pacs.name}: tls needs tls_ca (or [node.tls] ca): who signed its certificate?")
        return self


def load(file: Path) -> Settings:
    """Read and check `file`; relative paths in it are taken from its folder.

    Raises
    ------
    BadSettings
        The file is missing, is no TOML, or a key is unknown, missing or invalid; the message names file, key and line.
    """
    try:
        text = file.read_text("utf-8")
    except OSError as error:
        raise BadSettings(
            f"{file}: cannot be read ({error.strerror}); name the settings of the site with --config FILE or "
            "OSTEON_CONFIG; `osteon init DIR` makes a new site"
        ) from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise BadSettings(f"{file}: line {line}: not UTF-8; save the file as UTF-8 text") from None
    return parse(text, file)


def parse(text: str, file: Path) -> Settings:
    """Check settings that are to stand in `file`; see `load`."""
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BadSettings(f"{file}: not valid TOML: {error}") from None
    try:
        settings = Settings.model_validate(raw)
    except ValidationError as error:
        raise BadSettings("\n".join(_complaint(file, text, problem) for problem in error.errors())) from None
    settings = _anchored(settings, file.resolve().parent)
    for one, other in (("catalogue", "vault"), ("site_key", "vault_key")):  # the same place may be spelt in two ways
        if getattr(settings.storage, one) == getattr(settings.storage, other):
            line = line_of(text, ("storage", other))
            raise BadSettings(f"{file}: line {line}: storage.{other}: must be another place than storage.{one}")
    return settings


def _anchored(settings: Settings, folder: Path) -> Settings:
    """Make every path in the settings absolute, from the folder of the file."""
    storage = settings.storage
    anchored = storage.model_copy(
        update={
            "root": (folder / storage.root).resolve(),
            "catalogue": _database_url(storage.catalogue, folder),
            "vault": _database_url(storage.vault, folder),
            "site_key": key_place(storage.site_key, folder),
            "vault_key": key_place(storage.vault_key, folder),
        }
    )
    node = settings.node
    tls = node.tls.model_copy(update=_files(node.tls, ("certificate", "key", "ca", "crl"), folder))
    callers = [caller.model_copy(update=_files(caller, ("passcode",), folder)) for caller in node.callers]
    node = node.model_copy(update={**_files(node, ("vocabulary",), folder), "tls": tls, "callers": callers})
    pacs = [_with_defaults(one.model_copy(update=_files(one, _PACS_FILES, folder)), tls) for one in settings.pacs]
    backup = settings.backup.model_copy(update=_files(settings.backup, ("folder",), folder))
    return settings.model_copy(update={"storage": anchored, "node": node, "pacs": pacs, "backup": backup})


_PACS_FILES = ("tls_ca", "tls_crl", "tls_certificate", "tls_key", "passcode")


def _files(piece: _Piece, names: tuple[str, ...], folder: Path) -> dict[str, str]:
    """Make those of the named places that are set absolute."""
    return {name: key_place(getattr(piece, name), folder) for name in names if getattr(piece, name)}


def _with_defaults(pacs: Pacs, tls: Tls) -> Pacs:
    """Let a PACS over TLS have the node's authority and certificate where it names none of its own."""
    if not pacs.tls:
        return pacs
    update = {} if pacs.tls_ca else {"tls_ca": tls.ca, "tls_crl": tls.crl}
    if not pacs.tls_certificate:
        update |= {"tls_certificate": tls.certificate, "tls_key": tls.key}
    return pacs.model_copy(update=update)


def _database_url(url: str, folder: Path) -> str:
    prefix = "sqlite:///"
    return prefix + str((folder / url.removeprefix(prefix)).resolve()) if url.startswith(prefix) else url


def key_place(place: str, folder: Path) -> str:
    """Make the place of a key absolute, from `folder`."""
    return place if place.startswith((ENVIRONMENT, CREDENTIAL)) else str((folder / place).resolve())


def _complaint(file: Path, text: str, problem: object) -> str:
    """Say where in the file a problem of pydantic lies, in one line."""
    found = dict(problem)  # type: ignore[call-overload]
    where = found["loc"]
    key = ".".join(str(part) for part in where)
    line = line_of(text, tuple(where))
    told = found["msg"].removeprefix("Value error, ")
    what = {"missing": "this key is missing", "extra_forbidden": "unknown key"}.get(found["type"], told)
    return f"{file}: line {line}: {key or 'file'}: {what}"


def line_of(text: str, where: tuple[str | int, ...]) -> int:
    """Find the line (from 1) of a key, or of the table that should hold it, in TOML text.

    `where` is a path as pydantic gives it: names, with a number after the name of an array of tables.
    """
    names = [part for part in where if isinstance(part, str)]
    index = next((at for at, part in enumerate(where) if isinstance(part, int)), None)
    array = ".".join(names[:index]) if index is not None else ""
    best, table, nth = 1, "", -1
    for number, line in enumerate(text.splitlines(), start=1):
        if match := re.match(r"^\s*\[\[?\s*([A-Za-z0-9_.-]+)\s*\]\]?", line):
            table = match[1]
            nth += table == array
            key = table
        else:
            key = f"{table}.{line.split('=')[0].strip()}" if "=" in line else ""
        if array and (table == array or table.startswith(f"{array}.")) and nth != where[index or 0]:
            continue
        if key and key == ".".join(names):
            return number
        if key and key == ".".join(names[: key.count(".") + 1]):
            best = number
    return best


def load_url(place: str) -> str:
    """Give the URL of a database: `place` itself, or what the environment holds under the name that it says (`env:NAME`).

    The URL from the environment may hold a password: it is handed on to the driver and never kept or shown.

    Raises
    ------
    BadSettings
        The environment has no such name, or another thing than a PostgreSQL URL under it.
    """
    if not place.startswith("env:"):
        return place
    name = place.removeprefix("env:")
    url = os.environ.get(name, "").strip()
    if not url:
        raise BadSettings(f"the environment has no {name}, which the settings name as the URL of a database")
    if not re.match(r"postgresql(\+psycopg)?://", url):
        raise BadSettings(f"the environment's {name} must read postgresql://…; a file of SQLite is named in the settings")
    return url


def load_key(place: str) -> bytes:
    """Read a key of 32 bytes, base64, from where the settings say that it is.

    Parameters
    ----------
    place
        A file of mode 0600 or less; `env:NAME`, a variable of the environment; `credential:NAME`, what systemd hands to the
        service (LoadCredential=).

    Raises
    ------
    BadKey
        Missing, malformed, too short, or readable by others. No message repeats a byte of it.
    """
    content, told = _secret(place, "key", remedy=f"; {_PUT_BACK}")
    try:
        key = base64.b64decode(content.strip(), validate=True)
    except (binascii.Error, ValueError):
        raise BadKey(f"{told}: the key is not base64; {_PUT_BACK}") from None
    if len(key) != KEY_BYTES:
        raise BadKey(f"{told}: the key has {len(key)} bytes, not {KEY_BYTES}; {_PUT_BACK}")
    return key


def load_passcode(place: str) -> bytes:
    """Read a passcode, one line of text, from where the settings say that it is; places as for `load_key`.

    Raises
    ------
    BadKey
        Missing, empty, or readable by others.
    """
    content, told = _secret(place, "passcode")
    passcode = content.rstrip(b"\r\n")
    if not passcode:
        raise BadKey(f"{told}: the passcode is empty")
    return passcode


_PUT_BACK = "put it back from its copy in the safe: no other key can stand in for it"


def _secret(place: str, what: str, *, remedy: str = "") -> tuple[bytes, str]:
    """Read a secret that its owner alone can reach, and say how a message may call its place."""
    if place.startswith(ENVIRONMENT):
        name = place.removeprefix(ENVIRONMENT)
        if name not in os.environ:
            raise BadKey(f"the environment has no {name}, which the settings name as a {what}{remedy}")
        return os.environ[name].encode("utf-8", "surrogateescape"), f"the environment's {name}"
    is_credential = place.startswith(CREDENTIAL)
    file = _credential(place.removeprefix(CREDENTIAL)) if is_credential else Path(place)
    try:
        with file.open("rb") as opened:
            _require_closed(os.fstat(opened.fileno()), place, what, is_credential=is_credential)
            return opened.read(SECRET_MAX), place
    except OSError as error:
        raise BadKey(f"{place}: the {what} cannot be read ({error.strerror}){remedy}") from None


def _credential(name: str) -> Path:
    """Say where systemd puts a credential of this service."""
    if Path(name).name != name or name in ("", ".", ".."):
        raise BadKey(f"{CREDENTIAL}{name}: a credential is named as in LoadCredential=NAME:FILE, without a folder")
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    if not folder:
        raise BadKey(
            f"{CREDENTIAL}{name}: CREDENTIALS_DIRECTORY is not set, so systemd handed nothing over: the unit needs "
            f"LoadCredential={name}:FILE, a verb by hand `systemd-run --pty --property=LoadCredential={name}:FILE osteon …`"
        )
    return Path(folder) / name


def private_file(place: str, what: str) -> str:
    """Give the path of a secret that a library reads by itself: a file, or `credential:NAME`.

    Raises
    ------
    BadKey
        It is open to others, or systemd handed nothing over.
    OSError
        It is not there.
    """
    is_credential = place.startswith(CREDENTIAL)
    file = _credential(place.removeprefix(CREDENTIAL)) if is_credential else Path(place)
    _require_closed(file.stat(), place, what, is_credential=is_credential)
    return str(file)


def _require_closed(status: os.stat_result, told: str, what: str, *, is_credential: bool = False) -> None:
    mode = stat.S_IMODE(status.st_mode)
    # systemd lets the service's user read a file of root's by an ACL, whose mask shows in the group's place as "r"
    closed_to = 0o037 if is_credential and status.st_uid == 0 else 0o077
    if mode & closed_to:
        raise BadKey(f"{told}: the {what} is readable by others (mode {mode:04o}); `chmod 600` it, and think of it as known")
