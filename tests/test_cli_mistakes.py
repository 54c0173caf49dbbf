"""The command line when something is wrong: one sentence, an exit code, and no traceback; and when it is interrupted."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from kdbench import cli
from kdbench.runs.request import Request


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, arguments)


def shell(*arguments: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    """kdbench as a person starts it."""
    command = [sys.executable, "-m", "kdbench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False, timeout=300)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("run", "--defense", "nastty"), "There is no defense 'nastty'. Did you mean 'nasty'? Known: "),
        (("run", "--attack", "kdd"), "There is no attack 'kdd'. Did you mean 'kd'? Known: "),
        (("run", "--dataset", "blob"), "There is no dataset 'blob'. Did you mean 'blobs'? Known: "),
        (("run", "--student", "mini8"), "There is no model 'mini8'. Did you mean 'mini-8'? Known: "),
        (("run", "digitz"), "There is no suite 'digitz'. Did you mean 'digits'? Known: "),
        (("run", "absent.toml"), "There is no suite file absent.toml."),
        (("run", "--set", "defense.nasty.omga=1"), "There is no field 'omga' in defense.nasty. Did you mean 'omega'?"),
        (("run", "--set", "defense.nasty.omega=x"), "defense.nasty.omega must be a valid number, not 'x'."),
        (("run", "--set", "omega"), "--set takes PATH=VALUE, such as attack.kd.temperature=20, not 'omega'."),
        (("run", "--set", "=1"), "--set takes PATH=VALUE, such as attack.kd.temperature=20, not '=1'."),
        (("run", "--set", ".=1"), "There is no field '.' in the suite file."),
        (("show", "defense", "nastty"), "There is no defense 'nastty'. Did you mean 'nasty'? Known: "),
        (("show", "suite", "digitz"), "There is no suite 'digitz'. Did you mean 'digits'? Known: "),
        (("leaderboard", "absent"), "There are no results in absent: it has no cells.jsonl."),
        (("plot", "absent"), "There are no results in absent: it has no cells.jsonl."),
        (("convert", "absent"), "absent does not have the old layout: there is no cells/ to convert."),
        (("status", "absent"), "absent is not the results folder of a run: it has no plan.json."),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2_before_anything_is_done(
    arguments: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert result.stderr.startswith(f"Error: {said}")
    assert len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("frobnicate",),
        ("list", "robots"),
        ("show", "defense"),
        ("run", "--seeds", "0"),
        ("run", "--jobs", "none"),
        ("run", "--robustness", "all"),
        ("leaderboard", "here", "--format", "pdf"),
    ],
)
def test_a_command_that_makes_no_sense_is_exit_code_2(arguments: tuple[str, ...]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)
    assert "Usage: " in result.stderr


def test_an_executor_that_does_not_exist_is_named_before_anything_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke("run", "--executor", "slrm")
    assert result.exit_code == 2
    assert result.stderr == "Error: There is no executor 'slrm'. Known: local.\n"
    assert not list(tmp_path.glob("runs/store/*/*"))


def test_a_mistake_in_a_file_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('defenses = ["nastty"]\n[victim]\nnetwork = "mini-8"\n[student]\nnetwork = "mini-8"\n')
    result = invoke("run", str(path))
    assert result.exit_code == 2
    assert result.stderr.startswith(f"Error: {path}, line 1: There is no defense 'nastty'. Did you mean 'nasty'?")


def test_a_mistake_shows_no_traceback_at_the_keyboard(tmp_path: Path) -> None:
    said = shell("run", "--attack", "kdd", cwd=tmp_path)
    assert said.returncode == 2
    assert said.stderr.startswith("Error: There is no attack 'kdd'. Did you mean 'kd'?")
    assert "Traceback" not in said.stderr


def test_a_bug_is_not_dressed_up_as_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(kind: str | None) -> list[str]:
        raise ZeroDivisionError

    monkeypatch.setattr("kdbench.listing.listing", broken)
    assert isinstance(invoke("list").exception, ZeroDivisionError)


def test_an_interruption_says_how_to_go_on_and_is_exit_code_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(suite: str, request: Request) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("kdbench.runs.command.run", interrupted)
    monkeypatch.setattr(sys, "argv", ["kdbench", "run", "digits", "--seeds", "1"])
    result = invoke("run", "digits", "--seeds", "1")
    assert result.exit_code == 130
    said = "Interrupted. What was finished is kept; to go on: kdbench run digits --seeds 1"
    assert result.stderr.strip() == said


def test_sigterm_ends_a_run_as_ctrl_c_does_and_is_exit_code_143(monkeypatch: pytest.MonkeyPatch) -> None:
    before, undone = signal.getsignal(signal.SIGTERM), []

    def terminated(suite: str, request: Request) -> int:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("the signal was ignored")
        finally:
            undone.append(suite)  # as the scheduler closes its engine

    monkeypatch.setattr("kdbench.runs.command.run", terminated)
    monkeypatch.setattr(sys, "argv", ["kdbench", "run", "digits"])
    result = invoke("run", "digits")
    assert result.exit_code == 143
    assert undone == ["digits"]
    assert result.stderr.strip() == "Interrupted. What was finished is kept; to go on: kdbench run digits"
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_command_to_go_on_with_can_be_pasted_into_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(suite: str, request: Request) -> int:
        raise KeyboardInterrupt

    arguments = ["run", "my suite.toml", "--set", 'victim.network="mini-8"', "--out", "a;b"]
    monkeypatch.setattr("kdbench.runs.command.run", interrupted)
    monkeypatch.setattr(sys, "argv", ["kdbench", *arguments])
    said = invoke("run").stderr.strip().partition("to go on: ")[2]
    assert shlex.split(said) == ["kdbench", *arguments]


@pytest.mark.parametrize("code", [cli.DONE, cli.SOME_FAILED])
def test_the_exit_code_is_what_the_run_says(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdbench.runs.command.run", lambda suite, request: code)
    assert invoke("run").exit_code == code
