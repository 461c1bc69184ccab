"""A folder goes with its owner: at the end of the block, and after a kill when the next one begins."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from picker.envoy_folder import PREFIX, own_folder

_OWNER = """
import sys, time
from pathlib import Path
from picker.envoy_folder import own_folder
with own_folder(Path(sys.argv[1])) as path:
    (path / "inside").write_text("x")
    print(path, flush=True)
    sys.stdin.read()
"""


def test_only_its_user_may_enter_and_it_goes_with_the_block(tmp_path: Path) -> None:
    with own_folder(tmp_path) as path:
        assert path.stat().st_mode & 0o777 == 0o700
        (path / "inside").write_text("x")
    assert not list(tmp_path.iterdir())


def test_what_a_killed_owner_has_left_goes_when_the_next_begins_and_not_before(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _OWNER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        left = Path(owner.stdout.readline().strip())
        with own_folder(tmp_path):
            assert (left / "inside").exists()
        os.kill(owner.pid, signal.SIGKILL)
        owner.wait()
    assert left.exists()
    with own_folder(tmp_path) as path:
        assert [*tmp_path.iterdir()] == [path]


def test_what_is_not_ours_or_is_about_to_begin_stays(tmp_path: Path) -> None:
    beginning = tmp_path / f"{PREFIX}beginning"
    beginning.mkdir()
    (beginning / "owner").touch()
    bare = tmp_path / f"{PREFIX}bare"
    bare.mkdir()
    other = tmp_path / "something-else"
    other.mkdir()
    (other / "owner").write_text("1\n")
    link = tmp_path / f"{PREFIX}link"
    link.mkdir()
    (link / "owner").symlink_to(other / "owner")
    with own_folder(tmp_path):
        assert beginning.exists()
        assert bare.exists()
        assert other.exists()
        assert link.exists()
