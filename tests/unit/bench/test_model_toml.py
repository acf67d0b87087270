from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from headrace.bench.choice import Settings, Setup
from headrace.bench.model_toml import changes, edited, replace
from headrace.errors import ConfigError

VALUES: dict[str, int | list[int]] = {"max_batch_size": 8, "allowed_batch_sizes": [1, 8], "instances.count": 2, "instances.threads": 1}
WRITTEN = {"max_batch_size": 8, "allowed_batch_sizes": [1, 8], "instances": {"count": 2, "threads": 1}}


def accept(text: str) -> None:
    pass


def refuse(text: str) -> None:
    raise ConfigError("cannot be served")


def test_only_what_changes_is_written() -> None:
    before = Settings(Setup(1, 2), 64)
    assert changes(before, before) == {}
    assert changes(before, Settings(Setup(2, 1), 8, (1, 8))) == VALUES


@pytest.mark.parametrize(
    "text",
    [
        "",
        "max_batch_size = 64 # rows\n",
        "[labels]\nstable = 1\n",
        "[instances]\n# one each\ncount = 1\n\n[[output]]\nname = 'y'\n",
        "instances.count = 1\n",
        "instances = { count = 1 }\n",
        "allowed_batch_sizes = [\n  1, # alone\n  64,\n]\n",
    ],
)
def test_values_go_where_they_belong_in_every_way_to_write_a_file(text: str) -> None:
    table = tomllib.loads(edited(text, VALUES))
    assert table == {**tomllib.loads(text), **WRITTEN}


def test_comments_and_order_stay() -> None:
    text = "# ours\nmax_batch_size = 64 # rows\nmax_queue_delay_ms = 2   # measured\n\n[instances]\n# one each\ncount = 1\n"
    assert edited(text, {"max_batch_size": 8, "instances.count": 2}) == text.replace("64", "8").replace("count = 1", "count = 2")


def test_what_cannot_be_served_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "model.toml"
    path.write_text("before")
    with pytest.raises(ConfigError, match="cannot be served"):
        replace(path, "before", "after", refuse)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_somebody_else_has_changed_is_left_to_them(tmp_path: Path) -> None:
    path = tmp_path / "model.toml"
    path.write_text("theirs")
    with pytest.raises(ConfigError, match="was changed while"):
        replace(path, "before", "after", accept)
    assert path.read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_a_link_and_the_mode_what_it_was(tmp_path: Path) -> None:
    target = tmp_path / "shared.toml"
    target.write_text("before")
    target.chmod(0o640)
    link = tmp_path / "model.toml"
    link.symlink_to(target)
    replace(link, "before", "after", accept)
    assert link.is_symlink()
    assert (target.read_text(), target.stat().st_mode & 0o777) == ("after", 0o640)


def test_a_new_file_can_be_read_by_others(tmp_path: Path) -> None:
    replace(tmp_path / "model.toml", "", "after", accept)
    assert (tmp_path / "model.toml").stat().st_mode & 0o777 == 0o644
