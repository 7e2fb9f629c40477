"""Orgs, projects and API keys: how keys are made, stored (keyed BLAKE2b and a 6-character hint) and found."""

import hashlib
import re
import secrets
from dataclasses import dataclass

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from app.core.errors import InvalidApiKey, StartRefused
from app.core.ids import Prefix, new_id, random_text
from app.core.kept_secrets import keep_secret
from app.core.settings import Settings
from app.core.storage.database import change, db_now, one_at_a_time
from app.core.storage.identity import deployment_of
from app.core.storage.tables import ApiKey, Org, Project

_HEX = re.compile("[0-9a-f]{64}")
_LOST = "If that pepper is lost, no key can be used any more: `immunotune rekey` makes a new one and voids the others."
SCOPES = ("files:r", "files:w", "jobs:r", "jobs:w", "models:infer", "models:w", "artifacts:r", "safety:r")


@dataclass(frozen=True)
class Caller:
    """Whom a valid key belongs to: the project on whose behalf a request runs."""

    project: Project
    org: Org
    scopes: frozenset[str]
    key_id: str

    @property
    def project_id(self) -> str:
        """The id that every query filters on."""
        return self.project.id


@dataclass(frozen=True)
class BootstrapKeys:
    """The plain keys of the embedded service; never logged. `baseline` is empty outside the demo."""

    default: str
    baseline: str = ""


class WrongPepper(StartRefused):
    """Keys of this deployment were hashed with another pepper than this process has; the message says what to do."""


class UnknownKey(StartRefused):
    """The configured key is none that opens the default project; the message says what to do."""


def load_pepper(settings: Settings) -> bytes:
    """The secret for hashing keys: IMMUNOTUNE_PEPPER, the file that IMMUNOTUNE_PEPPER_FILE names, or
    <data>/keys/pepper, made with mode 600 when absent. What that file holds means the same in the variable.

    Raises WrongPepper when a file that is named cannot be read or holds less than 32 characters.
    """
    text = settings.pepper.get_secret_value() if settings.pepper else None
    if text is None and settings.pepper_file is not None:
        try:
            text = settings.pepper_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise WrongPepper("IMMUNOTUNE_PEPPER_FILE cannot be read; name a text file that can.") from error
        if len(text) < 32:
            raise WrongPepper("The file that IMMUNOTUNE_PEPPER_FILE names must hold at least 32 characters.")
    if text is None:
        text = keep_secret(settings.data / "keys" / "pepper", secrets.token_hex(32))
    return bytes.fromhex(text) if _HEX.fullmatch(text) else hashlib.blake2b(text.encode(), digest_size=32).digest()


def bind_pepper(session: Session, settings: Settings, pepper: bytes) -> None:
    """Note which pepper the deployment's keys are hashed with, at the first start; later ones must have the same.

    Call when the deployment is bound. Raises WrongPepper.
    """
    own = deployment_of(session)
    assert own is not None, "a deployment is bound first"
    if own.pepper is None and session.scalars(select(ApiKey.seq).limit(1)).first() is not None:
        # of an earlier release: whoever comes first must not make its own pepper the deployment's
        hashes = [_hash(pepper, secret) for secret in _known_secrets(settings)]
        if session.scalars(select(ApiKey.seq).where(ApiKey.hash.in_(hashes)).limit(1)).first() is None:
            raise WrongPepper(
                "None of the API keys in the database can be shown to belong to this pepper. Start once with the "
                "IMMUNOTUNE_API_KEY and the pepper (IMMUNOTUNE_PEPPER_FILE, or keys/pepper of the data folder) that "
                f"were in use. {_LOST}"
            )
    if own.pepper not in (None, _fingerprint(pepper)):
        raise WrongPepper(
            "The API keys of this deployment were made with another pepper. Set IMMUNOTUNE_PEPPER_FILE or "
            f"IMMUNOTUNE_PEPPER to that of the other API processes (keys/pepper of their data folder). {_LOST}"
        )
    own.pepper = _fingerprint(pepper)
    session.flush()


def authenticate(session: Session, pepper: bytes, secret: str) -> Caller:
    """Who holds this key. Raises InvalidApiKey."""
    found = session.execute(
        select(ApiKey, Project, Org)
        .join(Project, Project.id == ApiKey.project_id)
        .join(Org, Org.id == Project.org_id)
        .where(ApiKey.hash == _hash(pepper, secret), ApiKey.revoked_at.is_(None))
    ).one_or_none()
    if found is None:
        raise InvalidApiKey("The API key is wrong or was revoked. Send a valid one as 'Authorization: Bearer KEY'.")
    key, project, org = found
    return Caller(project, org, frozenset(key.scopes), key.id)


def bootstrap(session: Session, settings: Settings, pepper: bytes) -> str | None:
    """Make the project `default` with the service's policy, and a key for it where it never had one. Safe to repeat.

    Returns the plain key where this process knows it: `settings.api_key`, or the one that was made and kept under
    <data>/keys, mode 600. Raises UnknownKey when the configured key does not open the project: `new_key` changes keys,
    a restart does not.
    """
    project = ensure_project(session, "default", policy=settings.policy)
    project.policy = settings.policy  # whoever changes the setting means the jobs that come
    kept = settings.data / "keys" / "default"
    if session.scalars(select(ApiKey.seq).where(ApiKey.project_id == project.id).limit(1)).first() is None:
        secret = _configured_key(settings) or keep_secret(kept, new_secret())
        add_key(session, pepper, project, secret)
        return secret
    known = _configured_key(settings) or (kept.read_text().strip() if kept.is_file() else None)
    if known is not None and _opens(session, pepper, project, known):
        return known
    if settings.api_key is not None:
        raise UnknownKey(
            "IMMUNOTUNE_API_KEY is no valid key of the default project. Set it back or leave it unset; or, to use this "
            "one from now on and revoke the others, run `immunotune rekey`."
        )
    return None


def open_baseline(session: Session, pepper: bytes) -> str:
    """Make the undefended project `baseline` (policy plain), for the demo alone, and a key that nobody else knows.

    Earlier keys of it are revoked.
    """
    project = ensure_project(session, "baseline", policy="plain")
    revoke_keys(session, project)
    secret = new_secret()
    add_key(session, pepper, project, secret)
    return secret


def new_key(session: Session, settings: Settings, pepper: bytes, *, name: str = "default") -> str:
    """Give a project a new key, `settings.api_key` for the default one, and revoke all others of it, for good.

    Where the deployment's keys are of another pepper, no process can tell them any more: all are revoked, and this
    pepper is the deployment's. Raises UnknownKey when there is no such project or the key was revoked before.
    """
    project = get_project(session, name)
    own = deployment_of(session)
    if own is not None and own.pepper not in (None, _fingerprint(pepper)):
        session.execute(update(ApiKey).where(ApiKey.revoked_at.is_(None)).values(revoked_at=db_now()))
    if own is not None:
        own.pepper = _fingerprint(pepper)
    chosen = _configured_key(settings) if name == "default" else None
    secret = chosen or new_secret()
    if _opens(session, pepper, project, secret):
        revoke_keys(session, project, but=_hash(pepper, secret))
        return secret
    revoke_keys(session, project)
    if add_key(session, pepper, project, secret).revoked_at is not None:
        raise UnknownKey("This key was revoked before, and that is final. Choose another IMMUNOTUNE_API_KEY.")
    return secret


def revoke_keys(session: Session, project: Project, *, but: str = "") -> int:
    """Revoke the project's keys, for good, except for the one with this hash; returns how many were valid."""
    which = ApiKey.project_id == project.id, ApiKey.revoked_at.is_(None), ApiKey.hash != but
    return change(session, update(ApiKey).where(*which).values(revoked_at=db_now()))


def ensure_project(session: Session, name: str, *, policy: str, org_slug: str = "local") -> Project:
    """The project of that name, made with its org when absent."""
    one_at_a_time(session)
    org = session.scalars(select(Org).where(Org.slug == org_slug)).one_or_none()
    if org is None:
        org = Org(id=new_id(Prefix.ORG), name=org_slug, slug=org_slug)
        session.add(org)
        session.flush()
    project = session.scalars(select(Project).where(Project.name == name)).one_or_none()
    if project is None:
        project = Project(id=new_id(Prefix.PROJECT), org_id=org.id, name=name, policy=policy)
        session.add(project)
        session.flush()
    return project


def get_project(session: Session, name: str) -> Project:
    """The project of that name. Raises UnknownKey."""
    project = session.scalars(select(Project).where(Project.name == name)).one_or_none()
    if project is None:
        raise UnknownKey(f"There is no project '{name}'. Start the service once, or name another.")
    return project


def keep_key(settings: Settings, secret: str) -> None:
    """Keep a new key of the default project where `bootstrap` finds it."""
    path = settings.data / "keys" / "default"
    path.unlink(missing_ok=True)
    keep_secret(path, secret)


def add_key(session: Session, pepper: bytes, project: Project, secret: str) -> ApiKey:
    """Let this secret act for the project, with every project scope. Safe to repeat."""
    digest = _hash(pepper, secret)
    key = session.scalars(select(ApiKey).where(ApiKey.hash == digest)).one_or_none()
    if key is None:
        key = ApiKey(id=new_id(Prefix.KEY), project_id=project.id, hash=digest, hint=secret[-6:], scopes=list(SCOPES))
        session.add(key)
        session.flush()
    return key


def new_secret() -> str:
    """A new project key: 256 bits behind a prefix that leak scanners know."""
    return "sk-proj-" + random_text(43)


def _opens(session: Session, pepper: bytes, project: Project, secret: str) -> bool:
    of_project = ApiKey.project_id == project.id, ApiKey.hash == _hash(pepper, secret), ApiKey.revoked_at.is_(None)
    return session.scalars(select(ApiKey.seq).where(*of_project)).first() is not None


def _known_secrets(settings: Settings) -> list[str]:
    configured = _configured_key(settings)
    kept = [path for name in ("default", "baseline") if (path := settings.data / "keys" / name).is_file()]
    return [*([configured] if configured else []), *(path.read_text().strip() for path in kept)]


def _configured_key(settings: Settings) -> str | None:
    return settings.api_key.get_secret_value() if settings.api_key else None


def _fingerprint(pepper: bytes) -> str:
    return hashlib.blake2b(pepper, digest_size=16, person=b"immunotune").hexdigest()


def _hash(pepper: bytes, secret: str) -> str:
    # 256-bit random secrets need no slow hash; the pepper makes a stolen table useless on its own
    return hashlib.blake2b(secret.encode("utf-8", "surrogateescape"), key=pepper, digest_size=32).hexdigest()
