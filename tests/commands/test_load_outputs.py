from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import pytest
import yaml

from load.fake_openai import FakeAnswer, Json, answer_well, chunk, fake_server
from picker.commands.load_outputs import Outputs, command_line, outputs, put, without_password
from picker.errors import ConfigError
from picker.load import saved
from picker.load.slo import Slo

SMALL = (
    *("--no-calibrate", "--requests", "6", "--rate", "200"),
    *("--system-tokens", "8", "--question-tokens", "8", "--max-tokens", "2"),
)
FULL = Path("/dev/full")


async def start(*arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "picker", "load", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


def test_flags_become_outputs(tmp_path: Path) -> None:
    assert outputs(save=tmp_path / "a", slo="ttft=1") == Outputs(save=tmp_path / "a", slo=Slo(ttft=1.0))


def test_what_cannot_be_written_is_refused_before_the_load(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--save .*there is no folder"):
        outputs(save=tmp_path / "none" / "run.json")
    with pytest.raises(ConfigError, match=r"--report .*must end in \.json"):
        outputs(report_file=tmp_path / "run.txt")


def test_without_its_libraries_a_page_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("picker.commands.load_outputs.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"--html needs jinja2: pip install matplotlib jinja2"):
        outputs(html=tmp_path / "run.html")


def test_keys_and_passwords_are_left_out_of_the_command() -> None:
    typed = [
        "/bin/picker",
        "load",
        "http://me:secret@host:1/v1",
        "--api-key",
        "secret",
        "--api-key=secret",
        "--rate",
        "4",
    ]
    told = command_line(typed)
    assert "secret" not in told
    assert told == "picker load http://...@host:1/v1 --api-key ... --api-key=... --rate 4"
    assert without_password("http://host:1") == "http://host:1"


def test_an_older_file_stays_when_the_new_one_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def full() -> str:
        raise OSError(28, "No space left on device")

    file = tmp_path / "run.json"
    file.write_text("older", encoding="utf-8")
    assert not put("--save", file, full)
    assert file.read_text(encoding="utf-8") == "older"
    assert os.listdir(tmp_path) == ["run.json"]
    assert f"--save {file}: not written: No space left on device" in capsys.readouterr().err


@pytest.mark.skipif(not FULL.exists(), reason="needs a device that is always full, as Linux has")
async def test_a_full_disk_takes_nothing_else_along(tmp_path: Path) -> None:
    report = tmp_path / "run.yaml"
    async with fake_server() as server:
        process = await start(server.url, *SMALL, "--save", str(FULL), "--report", str(report), "--json")
        out, err = await process.communicate()
    assert process.returncode == 1
    assert json.loads(out)["requests"] == 6
    assert yaml.safe_load(report.read_text(encoding="utf-8"))["version"] == "0.2.1"
    assert b"--save /dev/full: not written: No space left on device" in err
    assert b"Traceback" not in err


@pytest.mark.skipif(not FULL.exists(), reason="needs a device that is always full, as Linux has")
async def test_files_are_written_when_the_figures_cannot_be_printed(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    full = os.open(FULL, os.O_WRONLY)
    async with fake_server() as server:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "picker", "load", server.url, *SMALL, "--save", str(file)),
            stdout=full,
            stderr=asyncio.subprocess.PIPE,
        )
        os.close(full)
        _, err = await process.communicate()
    assert process.returncode == 1
    assert saved.load(file).figures["requests"] == 6
    assert b"the figures: not written: No space left on device" in err


async def test_ctrl_c_writes_every_report_of_what_was_measured(tmp_path: Path) -> None:
    async def hang_after_three(request: Json, answer: FakeAnswer) -> None:
        if len(server.requests) <= 3:
            await answer_well(request, answer)
            return
        await answer.start()
        await answer.send(chunk("x"))
        await asyncio.Event().wait()

    files = {name: tmp_path / f"run.{name}" for name in ("json", "yaml", "html")}
    async with fake_server(hang_after_three) as server:
        # Three at once: when six have come, the answers to the first three have been read.
        process = await start(
            *(server.url, *SMALL, "--processes", "1", "--concurrency", "3", "--slo", "ttft=60", "--json"),
            *("--save", str(files["json"]), "--report", str(files["yaml"]), "--html", str(files["html"])),
        )
        await server.wait_for(6)
        process.send_signal(signal.SIGINT)
        out, _ = await process.communicate()
    assert process.returncode == 130
    figures = json.loads(out)
    assert (figures["requests"], figures["goodput"]["share"]) == (3, 1.0)
    run = saved.load(files["json"])
    assert (len(run.requests), run.cancelled, run.planned) == (3, 3, 6)
    assert any("ended early" in note for note in run.notes)
    requests = yaml.safe_load(files["yaml"].read_text(encoding="utf-8"))["results"]["request_performance"]["aggregate"]
    assert (requests["requests"]["total"], requests["requests"]["incomplete"]) == (6, 3)
    assert "ended early" in files["html"].read_text(encoding="utf-8")
