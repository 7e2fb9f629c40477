"""Orgs, projects and API keys: how keys are made, stored (keyed BLAKE2b and a 6-character hint) and found."""

import hashlib
import secrets
from dataclasses import dataclass

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from app.core.errors import InvalidApiKey
from app.core.ids import Prefix, new_id, random_text
from app.core.kept_secrets import keep_secret
from app.core.settings import Settings
from app.core.storage.database import db_now, one_at_a_time
from app.core.storage.tables import ApiKey, Org, Project

SCOPES = ("files:r", "files:w", "jobs:r", "jobs:w", "models:infer", "models:w", "artifacts:r", "safety:r")


@dataclass(frozen=True)
class Caller:
    """Whom a valid key belongs to: the project on whose behalf a request runs."""

    project: Project
    org: Org
    scopes: frozenset[str]

    @property
    def project_id(self) -> str:
        """The id that every query filters on."""
        return self.project.id


@dataclass(frozen=True)
class BootstrapKeys:
    """The plain keys of the two projects of the embedded service; never logged."""

    default: str
    baseline: str


def load_pepper(settings: Settings) -> bytes:
    """The server's secret for hashing keys: <data>/keys/pepper, made with mode 600 when absent."""
    return bytes.fromhex(keep_secret(settings.data / "keys" / "pepper", secrets.token_hex(32)))


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
    return Caller(project, org, frozenset(key.scopes))


def bootstrap(session: Session, settings: Settings, pepper: bytes) -> BootstrapKeys:
    """Make the projects `default` (the service's policy) and `baseline` (policy plain) with a key each. Safe to repeat.

    The default key is `settings.api_key`; keys not given are generated once and kept under <data>/keys, mode 600.
    Whatever else opened these projects is revoked: who changes the configured key wants the old one dead.
    """
    folder, given = settings.data / "keys", settings.api_key
    keys = BootstrapKeys(
        default=given.get_secret_value() if given else keep_secret(folder / "default", new_secret()),
        baseline=keep_secret(folder / "baseline", new_secret()),
    )
    for name, policy, secret in (("default", settings.policy, keys.default), ("baseline", "plain", keys.baseline)):
        project = ensure_project(session, name, policy=policy)
        project.policy = policy  # whoever changes the setting means the jobs that come
        key = add_key(session, pepper, project, secret)
        key.revoked_at = None  # a key that is configured again opens again
        others = ApiKey.project_id == key.project_id, ApiKey.id != key.id, ApiKey.revoked_at.is_(None)
        session.execute(update(ApiKey).where(*others).values(revoked_at=db_now()))
    session.flush()
    return keys


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


def _hash(pepper: bytes, secret: str) -> str:
    # 256-bit random secrets need no slow hash; the pepper makes a stolen table useless on its own
    return hashlib.blake2b(secret.encode("utf-8", "surrogateescape"), key=pepper, digest_size=32).hexdigest()
