"""An adapter belongs to the files of the base that it was made over, and says so."""

import json
from pathlib import Path

import pytest

from finetuning.model.digest import ABOUT_FILE, PARITY_FILE, BaseFiles, OtherBase, base_files, require_same_base


def base_in(folder: Path, *, weights: str = "w", template: str = "t") -> Path:
    folder.mkdir()
    (folder / "model.safetensors").write_text(weights)
    (folder / "chat_template.jinja").write_text(template)
    return folder


def made_over(base: BaseFiles, folder: Path, name: str = ABOUT_FILE) -> Path:
    folder.mkdir()
    (folder / name).write_text(json.dumps(base.told() | {"calibration": {}}))
    return folder


@pytest.mark.parametrize("changed", [{"weights": "other"}, {"template": "other"}])
def test_an_adapter_made_over_other_files_is_refused_with_what_to_do(tmp_path: Path, changed: dict[str, str]) -> None:
    own, other = base_files(base_in(tmp_path / "a")), base_files(base_in(tmp_path / "b", **changed))
    alignment = made_over(own, tmp_path / "alignment")
    assert require_same_base(alignment, own)
    assert require_same_base(alignment, base_files(base_in(tmp_path / "same")))
    with pytest.raises(OtherBase, match="put the base's files back as they were, or align the base again"):
        require_same_base(alignment, other)


def test_a_parity_certificate_binds_a_fine_tune_to_the_weights(tmp_path: Path) -> None:
    made = made_over(BaseFiles("w" * 64), tmp_path / "stock", PARITY_FILE)
    assert require_same_base(made, BaseFiles("w" * 64, "f" * 64))
    with pytest.raises(OtherBase):
        require_same_base(made, BaseFiles("v" * 64, "f" * 64))


def test_what_earlier_releases_stored_is_taken_and_known_to_be_unbound(tmp_path: Path) -> None:
    base = base_files(base_in(tmp_path / "base"))
    (tmp_path / "none").mkdir()
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / ABOUT_FILE).write_text('{"base": "tiny", "calibration": {}}')
    assert [require_same_base(tmp_path / name, base) for name in ("none", "old")] == [False, False]


def test_a_base_that_lies_nowhere_here_has_no_digests() -> None:
    assert base_files("somebody/some-model") == BaseFiles()
