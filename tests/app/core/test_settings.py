from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from pydantic import SecretStr, ValidationError
from sqlalchemy import make_url

from app.core.settings import LeaseSettings, LimitSettings, ReleaseSettings, Settings, load_settings, to_environment
from tests.support.judge_server import guard_text


def test_defaults_lie_under_the_data_folder(tmp_path: Path) -> None:
    settings = Settings(data=tmp_path)
    assert settings.database_url == f"sqlite:///{tmp_path}/immunotune.db"
    assert settings.blob_url == f"file://{tmp_path}/blobs"
    assert settings.broker_url == f"redis+socket://{settings.runtime}/valkey.sock"


def test_the_socket_path_stays_short_however_deep_the_data_lies(tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*["folder-with-a-long-name"] * 8)
    assert len(str(Settings(data=deep).runtime / "valkey.sock").encode()) < 100


def test_two_data_folders_have_two_runtime_folders(tmp_path: Path) -> None:
    assert Settings(data=tmp_path / "a").runtime != Settings(data=tmp_path / "b").runtime


def test_a_child_process_rebuilds_equal_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(
        data=tmp_path,
        port=1234,
        api_key=SecretStr("sk-proj-0123456789abcdef0123456789abcdef"),
        model_server_urls=("http://127.0.0.1:1", "http://127.0.0.1:2"),
        lease=LeaseSettings(ttl_seconds=3.5),
        limits=LimitSettings(rows_min=11),
        policy="as_asked",
        draw_secret=SecretStr("d" * 32),
        release=ReleaseSettings(harmful_prompts=200, limits={"max_leak": 0.1, "max_drift": None}),
    )
    for name, value in to_environment(settings).items():
        monkeypatch.setenv(name, value)
    assert load_settings() == settings


def test_nested_settings_can_be_set_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMMUNOTUNE_LEASE__TTL_SECONDS", "7")
    assert load_settings().lease == LeaseSettings(ttl_seconds=7)


@pytest.mark.parametrize("value", ["10.0.0.1, 10.0.0.2,", '["10.0.0.1", "10.0.0.2"]'])
def test_a_variable_names_several_with_commas_or_as_json(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Review: one address, not written as JSON, stopped the start without a hint at what was wrong."""
    for name in ("EDGE__TRUSTED_PROXIES", "EDGE__ALLOWED_HOSTS", "MODEL_SERVER_URLS"):
        monkeypatch.setenv(f"IMMUNOTUNE_{name}", value)
    found = load_settings()
    for several in (found.edge.trusted_proxies, found.edge.allowed_hosts, found.model_server_urls):
        assert several == ("10.0.0.1", "10.0.0.2")
    for name, text in to_environment(found).items():
        monkeypatch.setenv(name, text)
    assert load_settings() == found


@pytest.mark.parametrize(
    ("name", "value"),
    [("EDGE__ALLOWED_HOSTS", '["a"'), ("PORT", "eighty"), ("API_KEY", "short"), ("LEASE__TTL_SECONDS", "-1")],
)
def test_a_bad_variable_is_named(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"IMMUNOTUNE_{name}", value)
    with pytest.raises(ValidationError, match=name.rpartition("__")[2].lower()):
        load_settings()


@pytest.mark.parametrize("judge", ["lama-guard-3-8b", "llama-guard-3-8b+", "llama-guard-3-8b, refusal-marker"])
def test_an_unknown_judge_is_refused_with_the_known_ones(judge: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMMUNOTUNE_JUDGE", judge)
    with pytest.raises(ValidationError, match=r"IMMUNOTUNE_JUDGE cannot be used: judge .* use one of .*llama-guard"):
        load_settings()


@pytest.mark.parametrize("judge", ["", "invented-hazards", "llama-guard-3-8b+refusal-marker"])
def test_a_judge_that_there_is_can_be_set(judge: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMMUNOTUNE_JUDGE", judge)
    assert load_settings().judge == judge


def test_secrets_do_not_show(tmp_path: Path) -> None:
    shown = repr(
        Settings(
            data=tmp_path,
            api_key=SecretStr("sk-proj-0123456789abcdef0123456789abcdef"),
            database_url="postgresql://u:pw@h/d",
        )
    )
    assert "0123456789abcdef" not in shown
    assert "pw@" not in shown


def test_a_policy_is_one_of_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMMUNOTUNE_POLICY", "as_asked")
    assert load_settings().policy == "as_asked"
    monkeypatch.setenv("IMMUNOTUNE_POLICY", "as_i_like")
    with pytest.raises(ValidationError, match="no policy that is offered: use immunotune or as_asked"):
        load_settings()


def guard_file(folder: Path, text: str) -> Path:
    path = folder / "own.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_guard_file_is_named_by_its_whole_path_wherever_a_process_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = guard_file(tmp_path, guard_text("http://127.0.0.1:9/v1"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("IMMUNOTUNE_JUDGE", "own.toml+refusal-marker")
    settings = load_settings()
    assert settings.judge == f"{path}+refusal-marker"
    monkeypatch.chdir("/")
    for name, value in to_environment(settings).items():
        monkeypatch.setenv(name, value)
    assert load_settings().judge == settings.judge


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("licence = ", r"guard file own\.toml is no TOML"),
        (guard_text("http://x/v1").replace("'^safe'", "'^fine'"), r"own\.toml, field examples, number 2: neither"),
        (guard_text("ftp://x"), r"own\.toml, field url\.base"),
        (guard_text("http://key@x/v1"), r"own\.toml, field url\.base"),
    ],
)
def test_a_guard_file_that_cannot_serve_stops_the_process_at_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, words: str
) -> None:
    monkeypatch.setenv("IMMUNOTUNE_JUDGE", str(guard_file(tmp_path, text)))
    with pytest.raises(ValidationError, match=f"IMMUNOTUNE_JUDGE cannot be used: .*{words}"):
        load_settings()


def test_a_judge_whose_key_is_not_set_stops_the_process_at_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMMUNOTUNE_JUDGE", str(guard_file(tmp_path, guard_text("http://x/v1", variable="GUARD_KEY"))))
    monkeypatch.delenv("GUARD_KEY", raising=False)
    with pytest.raises(ValidationError, match=r"url\.key_variable names GUARD_KEY, which is not set; export it"):
        load_settings()
    monkeypatch.setenv("GUARD_KEY", "secret-1")
    assert "secret-1" not in repr(load_settings())


@pytest.mark.parametrize(("name", "value"), [("API_KEY", "hunter2"), ("DRAW_SECRET", "hunter2"), ("PORT", "hunter2")])
def test_what_was_set_is_not_shown_in_an_error(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """S24: a secret that does not fit must not end in a log."""
    monkeypatch.setenv(f"IMMUNOTUNE_{name}", value)
    with pytest.raises(ValidationError, match=name.lower()) as refused:
        load_settings()
    assert "hunter2" not in str(refused.value)


def test_secrets_have_no_text(tmp_path: Path) -> None:
    """S24: nothing that formats settings shows a secret; only a child process is told."""
    settings = Settings(
        data=tmp_path, api_key=SecretStr("sk-proj-0123456789abcdef0123456789abcdef"), draw_secret=SecretStr("d" * 32)
    )
    for shown in (str(settings), repr(settings), str(settings.model_dump()), settings.model_dump_json()):
        assert "0123456789abcdef" not in shown
        assert "d" * 32 not in shown
    assert to_environment(settings)["IMMUNOTUNE_API_KEY"] == "sk-proj-0123456789abcdef0123456789abcdef"


def test_secrets_come_from_files_and_passwords_go_into_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """S36: a password stood in a URL of the environment, and broke it where it held an @."""
    for name, value in (("database_password", "p@ss/w:rd%"), ("broker_password", "b@1"), ("api_key", "k" * 40)):
        (tmp_path / f"immunotune_{name}").write_text(value + "\n")
    monkeypatch.setenv("IMMUNOTUNE_SECRETS", str(tmp_path))
    monkeypatch.setenv("IMMUNOTUNE_DATABASE_URL", "postgresql://immunotune@postgres/immunotune")
    monkeypatch.setenv("IMMUNOTUNE_BROKER_URL", "redis://valkey:6379/0")
    settings = load_settings()
    database = make_url(settings.database_url)
    assert (database.username, database.password, database.host) == ("immunotune", "p@ss/w:rd%", "postgres")
    broker = urlsplit(settings.broker_url)
    assert (unquote(broker.password or ""), broker.hostname, broker.port) == ("b@1", "valkey", 6379)
    monkeypatch.delenv("IMMUNOTUNE_SECRETS")
    for name, value in to_environment(settings).items():
        monkeypatch.setenv(name, value)
    assert load_settings() == settings


def test_what_the_environment_says_goes_before_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """S36: so an operator can try another value without touching the files."""
    (tmp_path / "immunotune_base").write_text("smollm2")
    monkeypatch.setenv("IMMUNOTUNE_SECRETS", str(tmp_path))
    monkeypatch.setenv("IMMUNOTUNE_BASE", "tiny")
    assert load_settings().base == "tiny"
