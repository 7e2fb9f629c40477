"""What a base is fetched from: a wheel with its digest and no code that runs, in an environment without secrets."""

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from finetuning.bases import fetch
from finetuning.bases.fetch import FetchFailed, download_environment, split_revision
from finetuning.recipes.library import base_of

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
    revision = "0123456789abcdef0123456789abcdef01234567"
    assert split_revision(f"org/some-base@{revision}") == ("org/some-base", revision)
    assert split_revision("org/some-base") == ("org/some-base", None)
    assert base_of(f"org/some-base@{revision}").id == base_of("org/some-base").id == "some-base"
