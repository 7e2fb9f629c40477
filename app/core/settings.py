"""The one settings tree of a process: names, ranges and defaults.

`load_settings` reads the IMMUNOTUNE_* variables, once; from there on settings are passed as arguments.
"""

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Annotated, Self
from urllib.parse import quote, urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from finetuning.contract.progress import Stage
from finetuning.contract.recipe import GateLimits
from finetuning.judging.catalogue import require_keys, resolved
from finetuning.judging.judges import BadGuard
from finetuning.recipes.registry import OFFERED

_PREFIX = "IMMUNOTUNE_"
# no error may show what was set: it may be a secret, or lie beside one in a JSON value
_FIXED = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


def _listed(value: object) -> object:
    """The parts of a text that is a JSON list, or has commas between them; what is no text as it is."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        return json.loads(value)
    return tuple(part.strip() for part in value.split(",") if part.strip())


# how a variable may name several
_Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_listed)]


class LeaseSettings(BaseModel):
    """Timings of leases, all in seconds; tests shrink them together."""

    model_config = _FIXED

    beat_seconds: float = Field(default=5.0, gt=0)
    ttl_seconds: float = Field(default=60.0, gt=0)
    self_stop_seconds: float = Field(
        default=40.0, gt=0, description="without a good beat: the training process gets SIGTERM"
    )
    kill_seconds: float = Field(
        default=50.0, gt=0, description="without a good beat: the training process gets SIGKILL"
    )
    reaper_tick_seconds: float = Field(default=10.0, gt=0)
    rewake_seconds: float = Field(default=30.0, gt=0, description="a message not acted on is sent again after this")
    backoff_seconds: float = Field(default=5.0, ge=0, description="first pause after a loss is twice this")
    max_losses: int = Field(default=3, ge=1, description="losses without a new checkpoint before the job fails")
    max_host_losses: int = Field(default=20, ge=1, description="lost hosts without a new checkpoint before it fails")
    max_faults: int = Field(default=3, ge=1, description="jobs lost in a row before work began, then the worker rests")
    rest_seconds: float = Field(default=60.0, ge=0, description="a worker's first rest; twice as long each time")
    stall_seconds: float = Field(default=3 * 3600.0, gt=0, description="running without any progress")
    stall_seconds_of: dict[Stage, float] = Field(
        default={"gate": 12 * 3600.0, "parity": 12 * 3600.0},
        description="the same for single stages: those that ask a judge show no figures meanwhile",
    )


class LimitSettings(BaseModel):
    """What one project may ask for; sizes in bytes, ages in seconds."""

    model_config = _FIXED

    file_bytes: int = Field(default=512 * 2**20, ge=1)
    project_bytes: int = Field(default=100 * 2**30, ge=1)
    json_body_bytes: int = Field(default=256 * 2**10, ge=1)
    chat_body_bytes: int = Field(default=4 * 2**20, ge=1)
    rows_min: int = Field(default=10, ge=1)
    rows_max: int = Field(default=200_000, ge=1)
    live_jobs: int = Field(default=50, ge=1)
    running_jobs: int = Field(default=2, ge=1)
    check_seconds: float = Field(
        default=900.0, gt=0, description="a check that works longer fails its job; one that waits longer is an alarm"
    )
    orphan_blob_seconds: float = Field(default=86_400.0, ge=0, description="a blob that no row needs goes after this")
    sweep_seconds: float = Field(default=1800.0, gt=0, description="between two looks for such blobs")
    sweep_share: float = Field(default=0.1, ge=0, le=1, description="of the store; if more is nobody's, none goes")
    free_bytes: int = Field(default=64 * 2**20, ge=0, description="low-water mark of the blob folder's disk")


class RetentionSettings(BaseModel):
    """How long things are kept, in days; what is not named here stays until its owner deletes it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    quarantined_days: float = Field(default=30.0, ge=0, description="weights that the gate held back")
    reports_days: float = Field(default=400.0, ge=0, description="single reports and row ledger, after the job's end")
    events_days: float = Field(default=400.0, ge=0, description="a job's events, after its end")
    workers_days: float = Field(default=30.0, gt=0, description="rows of workers that were drained")
    unfinished_seconds: float = Field(default=60.0, ge=0, description="an upload whose process was killed")


class ServingSettings(BaseModel):
    """One model server: how much it takes at once and keeps."""

    model_config = _FIXED

    threads: int = Field(default=1, ge=1, description="torch threads; training on the same machine wants the others")
    rows: int = Field(default=16, ge=1, description="answers decoded together")
    cached_tokens: int = Field(default=32_768, ge=1, description="rows times their longest possible length")
    waiting: int = Field(default=64, ge=1, description="requests in line before the server says overloaded")
    adapters: int = Field(default=8, ge=1, description="adapters in memory")
    adapter_cache_bytes: int = Field(default=4 * 2**30, ge=1, description="adapters on disk")
    new_tokens: int = Field(default=512, ge=1, description="length of an answer when the request names none")
    chat_seconds: float = Field(default=600.0, gt=0, description="an answer that takes longer is broken off")
    ping_seconds: float = Field(default=15.0, gt=0, description="pause of a stream before a comment keeps it alive")


class ReleaseSettings(BaseModel):
    """How much the release gate asks and what it lets pass; what is unset follows the queue (jobs/policy.py).

    `limits` are fields of the recipe's GateLimits. A project may ask for stricter ones, never for looser ones.
    """

    model_config = _FIXED

    harmful_prompts: int | None = Field(default=None, ge=8, description="unset: 60 on a CPU, 400 on a GPU")
    benign_prompts: int | None = Field(default=None, ge=8, description="unset: 48 on a CPU, 200 on a GPU")
    answer_tokens: int | None = Field(default=None, ge=1, le=512, description="unset: 48 on a CPU, 256 on a GPU")
    limits: dict[str, float | None] = Field(default_factory=dict)

    @field_validator("limits")
    @classmethod
    def _known_limits(cls, value: dict[str, float | None]) -> dict[str, float | None]:
        GateLimits.model_validate(value)
        return value


class EdgeSettings(BaseModel):
    """What one connection, one address and one key may take of an API process (docs/getting-started/operator.md)."""

    model_config = _FIXED

    header_seconds: float = Field(default=10.0, gt=0, description="until the headers of a request are complete")
    header_bytes: int = Field(default=32 * 2**10, ge=1024)
    headers: int = Field(default=100, ge=16, description="header lines of one request")
    connections: int = Field(default=1000, ge=1, description="open at once, from all addresses")
    connections_per_address: int = Field(default=256, ge=1, description="raise it behind a proxy: that is one address")
    window_seconds: float = Field(default=30.0, gt=0, description="a body must bring bytes_per_second over each window")
    bytes_per_second: int = Field(default=1024, ge=1)
    body_seconds: float = Field(default=120.0, gt=0, description="waited for a JSON body in all")
    upload_seconds: float = Field(default=6 * 3600.0, gt=0, description="waited for an upload in all")
    body_bytes: int = Field(
        default=32 * 2**20, ge=2**20, description="of all JSON bodies read and parsed at once; a quarter a project"
    )
    uploads: int = Field(default=16, ge=1, description="received at once")
    uploads_per_project: int = Field(default=4, ge=1, description="received at once; more wait in line")
    upload_wait_seconds: float = Field(default=600.0, gt=0, description="in that line")
    requests_per_minute: int = Field(default=600, ge=1, description="of one key, at one API process")
    tokens_per_minute: int = Field(default=200_000, ge=1, description="of one project's chats, at one API process")
    chats: int = Field(default=32, ge=1, description="answers of one project in progress at one API process")
    wrong_keys_per_minute: int = Field(default=30, ge=1, description="from one address, before it must wait")
    trusted_proxies: _Names = Field(
        default=(),
        description="addresses whose X-Forwarded-For is believed; unset: none, whoever connects is the client",
    )
    allowed_hosts: _Names = Field(
        default=(), description="names that Host may give; unset: on a loopback address its names, elsewhere any"
    )
    metrics_host: str = "127.0.0.1"
    metrics_port: int | None = Field(default=None, ge=0, le=65535, description="unset: no metrics are served")


class Settings(BaseModel):
    """Everything that an operator may set. `data` holds every byte that the service writes."""

    model_config = _FIXED

    data: Path = Field(default=Path("var"), validate_default=True)
    host: str = "127.0.0.1"
    port: int = Field(default=8080, ge=0, le=65535)
    api_key: SecretStr | None = Field(default=None, min_length=32)
    pepper: SecretStr | None = Field(
        default=None,
        min_length=32,
        description="hashes API keys; unset: pepper_file or <data>/keys/pepper",
    )
    pepper_file: Path | None = Field(default=None, description="a file that holds the pepper")
    draw_secret: SecretStr | None = Field(
        default=None,
        min_length=32,
        description="what hidden draws of jobs are made with, the same wherever jobs train; unset: <data>/keys/draws",
    )
    model_server_secret: SecretStr | None = Field(
        default=None,
        min_length=32,
        description="what the API says to the model servers, the same on both; unset: <data>/keys/models",
    )
    base: str = "smollm2"
    policy: str = Field(
        default="immunotune",
        description="how the default project's jobs are defended, and by that how the base is aligned: immunotune, or "
        "as_asked (one method of each of three papers, under our settings)",
    )
    operator_rows: Path | None = Field(
        default=None, description="the operator's own safety rows, read where jobs train; unset: the shipped ones"
    )
    judge: str = Field(
        default="",
        description="a guard that judges answers, by name or by the path of its file (*.toml), or several joined by +; "
        "recommended: llama-guard-3-8b, qwen3guard-gen-4b beyond English, granite-guardian-3.1-2b on less memory "
        "(docs/guides/judges.md); empty: the judge of the safety rows",
    )
    train_queue: str = Field(
        default="train.cpu",
        pattern=r"train\.[a-z0-9]+",
        description="the queue that new jobs go to, and the size of the gate: a CPU's for train.cpu, else a GPU's",
    )
    device: str = Field(
        default="auto",
        pattern="auto|cpu|cuda",
        description="on which a training worker's jobs run; a worker of a GPU's queue sets cuda, whatever stands here",
    )
    runtime: Path = Field(default_factory=lambda d: _runtime_folder(d["data"]), description="short path for sockets")
    database_url: str = Field(default_factory=lambda d: f"sqlite:///{d['data'] / 'immunotune.db'}", repr=False)
    database_seconds: float = Field(default=5.0, gt=0, description="no database call may take longer")
    broker_url: str = Field(default_factory=lambda d: f"redis+socket://{d['runtime'] / 'valkey.sock'}", repr=False)
    database_password: SecretStr | None = Field(default=None, min_length=1, description="goes into database_url")
    broker_password: SecretStr | None = Field(default=None, min_length=1, description="goes into broker_url")
    secrets: Path = Field(
        default=Path("/run/secrets"), description="files of single settings, named as their variables in small letters"
    )
    blob_url: str = Field(default_factory=lambda d: (d["data"] / "blobs").as_uri(), repr=False)
    model_server_urls: _Names = ()
    log_level: str = "info"
    lease: LeaseSettings = LeaseSettings()
    limits: LimitSettings = LimitSettings()
    retention: RetentionSettings = RetentionSettings()
    serving: ServingSettings = ServingSettings()
    release: ReleaseSettings = ReleaseSettings()
    edge: EdgeSettings = EdgeSettings()

    @field_validator("data", "operator_rows", "pepper_file")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return None if value is None else value.expanduser().resolve()

    @field_validator("policy")
    @classmethod
    def _known_policy(cls, value: str) -> str:
        if value not in OFFERED:
            raise ValueError(f"{_PREFIX}POLICY is no policy that is offered: use {' or '.join(OFFERED)}")
        return value

    @field_validator("judge")
    @classmethod
    def _known_judge(cls, value: str) -> str:
        try:
            return resolved(value) if value else value
        except BadGuard as error:
            raise _unfit_judge(error) from error


class _Environment(Settings, BaseSettings):
    # pydantic merges the two bases' configurations at run time; the checkers see only their declared types
    model_config = SettingsConfigDict(  # pyright: ignore[reportIncompatibleVariableOverride]
        env_prefix=_PREFIX, env_nested_delimiter="__", frozen=True, extra="forbid", hide_input_in_errors=True
    )

    @model_validator(mode="after")
    def _has_the_judges_keys(self) -> Self:
        try:
            require_keys(self.judge, os.environ)
        except BadGuard as error:
            raise _unfit_judge(error) from error
        return self


def load_settings() -> Settings:
    """Read IMMUNOTUNE_* once, and what is not set there from files of the folder IMMUNOTUNE_SECRETS.

    Raises pydantic.ValidationError naming each bad variable.
    """
    folder = Path(os.environ.get(_PREFIX + "SECRETS", Settings.model_fields["secrets"].default))
    found = _Environment(_secrets_dir=folder if folder.is_dir() else None)  # pyright: ignore[reportCallIssue]
    settings = Settings.model_validate(found.model_dump(exclude_unset=True))
    passwords = {"database_url": settings.database_password, "broker_url": settings.broker_password}
    return settings.model_copy(
        update={name: _with_password(getattr(settings, name), word) for name, word in passwords.items() if word}
    )


def take_settings() -> Settings:
    """Read them, and leave none in the environment, so that no program that we start inherits a secret unasked.

    Raises pydantic.ValidationError naming each bad variable.
    """
    settings = load_settings()
    ours = tuple(_PREFIX + name.upper() for name in Settings.model_fields)
    for name in [name for name in os.environ if name.startswith(ours)]:
        del os.environ[name]
    return settings


def to_environment(settings: Settings) -> dict[str, str]:
    """The variables from which `load_settings` in a child process rebuilds equal settings."""
    found: dict[str, str] = {}
    for name, value in settings.model_dump(mode="json").items():
        own = getattr(settings, name)
        if isinstance(own, SecretStr):
            found[_PREFIX + name.upper()] = own.get_secret_value()
        elif name == "model_server_urls":
            found[_PREFIX + name.upper()] = ",".join(value)
        elif isinstance(value, dict):
            found[_PREFIX + name.upper()] = json.dumps(value)
        elif value is not None:
            found[_PREFIX + name.upper()] = str(value)
    return found


def _with_password(url: str, password: SecretStr) -> str:
    parts = urlsplit(url)
    user, host = parts.username or "", parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=f"{user}:{quote(password.get_secret_value(), safe='')}@{host}").geturl()


def _unfit_judge(error: BadGuard) -> ValueError:
    advice = "or leave it unset for the judge of the safety rows"
    return ValueError(f"{_PREFIX}JUDGE cannot be used: {error}, {advice}")


def _runtime_folder(data: Path) -> Path:
    # a unix socket path must stay under 108 bytes, so sockets cannot live under an arbitrary data folder
    name = hashlib.blake2b(os.fsencode(data), digest_size=4).hexdigest()
    return Path(tempfile.gettempdir()) / f"immunotune-{os.getuid()}-{name}"
