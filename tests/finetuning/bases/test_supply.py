"""What a base is fetched from: a wheel with its digest and no code that runs, in an environment without secrets."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from finetuning.bases import fetch
from finetuning.bases.fetch import FetchFailed, download_environment, split_revision
from finetuning.recipes.library import base_of

REVISION = "0123456789abcdef0123456789abcdef01234567"
FILES = {"config.json": b"{}", "model.safetensors": b"weights", "modeling_own.py": b"raise SystemExit"}
ROOT = Path(__file__).resolve().parents[3]
RAN = "ran.txt"
SETUP = """
from pathlib import Path
import os
Path(os.environ["HOME"], "ran.txt").write_text("code of a source distribution ran")
from setuptools import setup
setup(name="some-base", version="1.0")
"""


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for all that there is."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name, value in (("NO_INDEX", "1"), ("FIND_LINKS", str(folder)), ("CONFIG_FILE", "/dev/null")):
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setenv("HOME", str(tmp_path))
    return folder


def _wheel(index: Path, content: str) -> str:
    """A wheel of `some-base` with this content; returns its digest."""
    path = index / "some_base-1.0-py3-none-any.whl"
    about = "Metadata-Version: 2.1\nName: some-base\nVersion: 1.0\n"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("weights.gguf", content)
        wheel.writestr("some_base-1.0.dist-info/METADATA", about)
        wheel.writestr("some_base-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("some_base-1.0.dist-info/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _download(digest: str, scratch: Path) -> Path:
    scratch.mkdir(exist_ok=True)
    return fetch._download("some-base==1.0", digest, scratch)  # pyright: ignore[reportPrivateUsage]


def test_the_wheel_with_the_digest_is_taken_and_another_is_refused(index: Path, tmp_path: Path) -> None:
    """S35: only the weights inside were pinned, after the index had had its way."""
    known = _wheel(index, "weights")
    assert _download(known, tmp_path / "first").name.endswith(".whl")
    _wheel(index, "other weights")
    with pytest.raises(FetchFailed, match="another sha256"):
        _download(known, tmp_path / "second")


def test_a_source_distribution_is_never_run(index: Path, tmp_path: Path) -> None:
    """S35: pip would have run its setup.py, with all of the service's secrets in its environment."""
    package = tmp_path / "some-base-1.0"
    package.mkdir()
    (package / "setup.py").write_text(SETUP, encoding="utf-8")
    (package / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: some-base\nVersion: 1.0\n", encoding="utf-8")
    sdist = index / "some-base-1.0.tar.gz"
    subprocess.run(["tar", "-czf", str(sdist), "-C", str(tmp_path), package.name], check=True)
    with pytest.raises(FetchFailed):
        _download(hashlib.sha256(sdist.read_bytes()).hexdigest(), tmp_path / "scratch")
    assert not (tmp_path / RAN).exists()


def test_pip_gets_no_secret(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """S35: a clean environment; the index, its proxy and certificates are all it needs."""
    monkeypatch.setenv("IMMUNOTUNE_DATABASE_URL", "postgresql://a:secret@db/x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    program = "import os; print(sorted(os.environ))"
    environment = download_environment({**os.environ, "https_proxy": "http://proxy:1"})
    seen = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert "PIP_FIND_LINKS" in seen
    assert "https_proxy" in seen
    assert "IMMUNOTUNE" not in seen
    assert "AWS" not in seen


def test_a_hub_id_can_name_its_revision() -> None:
    """S35: a hub's base had neither revision nor digest."""
    assert split_revision(f"org/some-base@{REVISION}") == ("org/some-base", REVISION)
    assert split_revision("org/some-base") == ("org/some-base", None)
    assert base_of(f"org/some-base@{REVISION}").id == base_of("org/some-base").id == "some-base"


def _oid(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


class _Hub(BaseHTTPRequestHandler):
    """A model hub with one base at one revision, which notes what it is asked."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if self.path.startswith(f"/api/models/org/some-base/tree/{REVISION}"):
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": _oid(data)} for name, data in FILES.items()
            ]
            self._answer(json.dumps(tree).encode(), "application/json")
        elif self.path.startswith("/api/models/org/some-base"):
            siblings = [{"rfilename": name, "size": len(data)} for name, data in FILES.items()]
            about = {"id": "org/some-base", "sha": REVISION, "siblings": siblings, "tags": [], "downloads": 0}
            self._answer(json.dumps(about).encode(), "application/json")
        elif self.path.startswith(f"/org/some-base/resolve/{REVISION}/"):
            self._answer(FILES[self.path.rpartition("/")[2]], "application/octet-stream")
        else:
            self.send_error(404)

    do_HEAD = do_GET  # noqa: N815

    def _answer(self, data: bytes, kind: str) -> None:
        self.send_response(200)
        for name, value in {
            "Content-Type": kind, "Content-Length": str(len(data)), "X-Repo-Commit": REVISION,
            "ETag": _oid(data),
        }.items():  # fmt: skip
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub() -> Iterator[str]:
    _Hub.asked.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("name", ["org/some-base", f"org/some-base@{REVISION}"])
def test_a_hubs_base_comes_at_one_revision_which_is_recorded(hub: str, tmp_path: Path, name: str) -> None:
    """S35: a hub base came without revision or digest, at whatever stood there when each host asked."""
    program = (
        "import sys; from pathlib import Path; from finetuning.bases.fetch import fetch; "
        f"fetch({name!r}, Path(sys.argv[1]), say=print)"
    )
    environment = {**os.environ, "HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1"}
    argv = [sys.executable, "-c", program, str(tmp_path / "bases" / "some-base")]
    done = subprocess.run(argv, env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    found = tmp_path / "bases" / "some-base"
    about = json.loads((found / "base.json").read_text(encoding="utf-8"))
    assert about["revision"] == REVISION
    assert about["weights_sha256"] == hashlib.sha256(FILES["model.safetensors"]).hexdigest()
    assert not (found / "modeling_own.py").exists()
    assert all(REVISION in path for path in _Hub.asked if "/resolve/" in path)
    assert (f"pin it as org/some-base@{REVISION}" in done.stdout) == ("@" not in name)
