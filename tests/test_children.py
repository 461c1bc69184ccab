from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from pathlib import Path

import pytest

from picker.children import Child, ChildFailedError, Children, supervised

SLEEPER = "import signal; print('awake', flush=True); signal.pause()"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('awake', flush=True); signal.pause()"
CRASH = "import sys; print('noise'); sys.exit('the cable is unplugged')"

linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc and PR_SET_PDEATHSIG")


async def start(children: Children, script: str, name: str = "pods") -> Child:
    return await children.start(name, sys.executable, "-c", script)


async def awake(children: Children, child: Child) -> None:
    assert await children.announced(child, re.compile("(awake)"), timeout=60) == ["awake"]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_children_have_ended_when_the_block_is_left() -> None:
    async with supervised() as children:
        pids = [(await start(children, SLEEPER, name)).process.pid for name in ("a", "b")]
        folder = children.folder
        assert all(is_alive(pid) for pid in pids)
    assert not any(is_alive(pid) for pid in pids)
    assert not folder.exists()


async def test_an_error_in_the_block_ends_the_children_and_stays_itself() -> None:
    pids: list[int] = []

    async def block() -> None:
        async with supervised() as children:
            pids.append((await start(children, SLEEPER)).process.pid)
            raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        await block()
    assert not is_alive(pids[0])


async def test_cancelling_the_block_ends_the_children() -> None:
    pids: list[int] = []
    started = asyncio.Event()

    async def block() -> None:
        async with supervised() as children:
            pids.append((await start(children, SLEEPER)).process.pid)
            started.set()
            await asyncio.Event().wait()

    async with asyncio.TaskGroup() as group:
        task = group.create_task(block())
        await started.wait()
        task.cancel()
    assert task.cancelled()
    assert not is_alive(pids[0])


async def test_a_child_that_ends_by_itself_ends_the_block_with_its_last_words() -> None:
    pids: list[int] = []

    async def block() -> None:
        async with supervised() as children:
            pids.append((await start(children, SLEEPER, "gateway")).process.pid)
            await start(children, CRASH)
            await asyncio.Event().wait()

    with pytest.raises(ChildFailedError, match=r"(?s)pods ended by itself \(exit status 1\).*the cable is unplugged"):
        await block()
    assert not is_alive(pids[0])


async def test_a_killed_child_is_told_by_the_signal() -> None:
    async def block() -> None:
        async with supervised() as children:
            (await start(children, SLEEPER)).process.kill()
            await asyncio.Event().wait()

    with pytest.raises(ChildFailedError, match="SIGKILL"):
        await block()


async def test_a_child_that_ignores_sigterm_is_killed() -> None:
    async with supervised(grace=0.05) as children:
        child = await start(children, STUBBORN)
        await awake(children, child)
    assert child.process.returncode == -signal.SIGKILL


async def test_a_child_that_is_never_ready_is_named_with_its_last_words() -> None:
    async def no() -> bool:
        return False

    async def block() -> None:
        async with supervised() as children:
            child = await start(children, SLEEPER)
            await awake(children, child)
            await children.ready(child, no, timeout=0.05)

    with pytest.raises(ChildFailedError, match=r"(?s)pods was not ready after 0\.05 s.*awake"):
        await block()


async def test_ctrl_c_at_the_terminal_does_not_reach_children() -> None:
    async with supervised() as children:
        child = await start(children, SLEEPER)
        assert os.getpgid(child.process.pid) != os.getpgid(0)


async def test_a_child_announces_as_much_as_it_is_asked_for() -> None:
    async with supervised() as children:
        child = await start(children, "print('port 1\\nport 2\\nport 3', flush=True); " + SLEEPER)
        assert await children.announced(child, re.compile(r"port (\d)"), timeout=60, count=2) == ["1", "2"]


PARENT = """
import asyncio, re, sys
from picker.children import supervised
async def main():
    async with supervised() as children:
        child = await children.start("pods", sys.executable, "-c", {script!r})
        await children.announced(child, re.compile("(awake)"), timeout=60)
        print(child.process.pid, flush=True)
        await asyncio.Event().wait()
asyncio.run(main())
"""


@linux_only
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
async def test_children_do_not_outlive_a_parent_that_is_killed(number: signal.Signals) -> None:
    parent = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PARENT.format(script=SLEEPER)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert parent.stdout is not None
    child = os.pidfd_open(int(await parent.stdout.readline()))
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(child, ended.set)
    parent.send_signal(number)
    async with asyncio.timeout(60):
        await ended.wait()
        await parent.wait()
    asyncio.get_running_loop().remove_reader(child)
    os.close(child)


def test_output_files_are_read_from_the_end(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("\n".join(f"line {i}\n" for i in range(100)))

    class Dead:
        pid = 0

    child = Child("x", Dead(), log)  # type: ignore[arg-type]
    assert child.last_lines().splitlines() == [f"line {i}" for i in range(88, 100)]
