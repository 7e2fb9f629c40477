"""What each program of the service is given: the settings, what it inherits, and time to stop."""

from pathlib import Path

from app.core.settings import Settings, to_environment
from embedded.programs import WORKER_GRACE_SECONDS, base_folder, base_program, service_programs

INHERITED = {"PATH": "/bin", "HF_HUB_OFFLINE": "1", "IMMUNOTUNE_BASE": "another"}


def test_programs_inherit_what_they_are_given_and_the_settings_win(tmp_path: Path) -> None:
    settings = Settings(data=tmp_path, base="tiny", model_server_urls=("http://127.0.0.1:4711",))
    programs = service_programs(settings, INHERITED)
    assert [program.name for program in programs] == ["API", "checks worker", "training worker", "model server"]
    for program in programs:
        assert program.env == INHERITED | to_environment(settings)
        assert program.env["IMMUNOTUNE_BASE"] == "tiny"
    assert programs[-1].argv[-1] == "4711"
    assert programs[2].grace_seconds == WORKER_GRACE_SECONDS
    assert len({program.log for program in programs}) == len(programs)


def test_only_the_program_that_fetches_a_base_may_ask_the_model_hub(tmp_path: Path) -> None:
    settings = Settings(data=tmp_path, base="tiny", model_server_urls=("http://127.0.0.1:4711",))
    fetching = base_program(settings, INHERITED)
    assert fetching is not None
    assert fetching.env == {"PATH": "/bin"} | to_environment(settings)
    assert all(program.env["HF_HUB_OFFLINE"] == "1" for program in service_programs(settings, INHERITED))


def test_a_base_that_is_here_is_not_fetched(tmp_path: Path) -> None:
    settings = Settings(data=tmp_path, base="tiny")
    base_folder(settings).mkdir(parents=True)
    (base_folder(settings) / "config.json").write_text("{}")
    assert base_program(settings, INHERITED) is None
