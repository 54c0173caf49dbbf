"""The command line: verbs, exit codes, and sentences in place of tracebacks."""

import contextlib
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

import kdbench
from kdbench import cli, registry
from kdbench.board.formats.rendering import FORMATS
from kdbench.listing import PLURALS
from kdbench.records import Status, read
from kdbench.runs.request import Request
from kdbench.suites import reader as suites

VERBS = sorted(cli.main.commands)
TINY = [
    *("run", "--defense", "nasty", "--attack", "kd", "--dataset", "blobs", "--seeds", "1", "--robustness", "none"),
    *("--set", 'victim.network="mini-8"', "--set", "victim.recipe.epochs=2", "--set", "student.recipe.epochs=2"),
    *("--jobs", "1", "--device", "cpu", "--store", "shelf", "--quiet"),
]
STAGES = 17  # data, train, harden; 2 x 2 attack runs and 2 baselines; an evaluation each, and one of each service
WILD = ["--attack", "assistant-kd", "--set", "attack.assistant-kd.temperature=1e30"]  # T^2 is past single precision


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, arguments)


def shell(*arguments: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    """kdbench as a person starts it."""
    command = [sys.executable, "-m", "kdbench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False, timeout=300)


@dataclass(frozen=True)
class Runs:
    """In one folder: a plan; a run in which one attack diverges; the same without that attack; and its plan again."""

    folder: Path
    plan: "subprocess.CompletedProcess[str]"
    done_by_plan: list[str]
    run: "subprocess.CompletedProcess[str]"
    rerun: Result
    replan: Result
    done_by_rerun: list[str]

    @property
    def out(self) -> Path:
        return self.folder / "again"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("runs")

    def done() -> list[str]:
        return sorted(
            f"{path.parent.parent.name} {path.stat().st_mtime}" for path in folder.glob("shelf/*/*/stage.json")
        )

    plan = shell(*TINY, "--dry-run", cwd=folder)
    planned = done()
    run = shell(*TINY, *WILD, "--out", "wild", cwd=folder)
    ran = done()
    with contextlib.chdir(folder):
        rerun = invoke(*TINY, "--out", "again")
        replan = invoke(*TINY, "--dry-run")
    return Runs(folder, plan, planned, run, rerun, replan, [stage for stage in done() if stage not in ran])


def rows(plan: str) -> list[str]:
    """The stages of a printed plan."""
    return [line for line in plan.splitlines() if re.match(r"(cached|to do) ", line)]


# Help


def test_help_imports_nothing_that_is_slow() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from kdbench.cli import main\n"
        "for verb in ([], *([name] for name in main.commands)):\n"
        "    result = CliRunner().invoke(main, [*verb, '--help'])\n"
        "    assert result.exit_code == 0 and 'Usage' in result.output, result.output\n"
        "assert CliRunner().invoke(main, ['--version']).exit_code == 0\n"
        "slow = {'torch', 'torchvision', 'torchattacks', 'numpy', 'pandas', 'matplotlib', 'seaborn', 'scipy', 'sklearn'}\n"
        "print(sorted((slow | {'pydantic', 'rich'}) & sys.modules.keys()))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert said.stdout.strip() == "[]"


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_every_verb_says_how_it_is_used(verb: str, flag: str) -> None:
    result = invoke(verb, flag)
    assert result.exit_code == 0
    assert result.output.startswith("Usage: ")
    assert all(
        parameter.opts[0] in result.output
        for parameter in cli.main.commands[verb].params
        if isinstance(parameter, click.Option)
    )


def test_every_option_of_run_reaches_the_library() -> None:
    names = {parameter.name for parameter in cli.main.commands["run"].params} - {"suite", "help"}
    assert names == set(Request.__dataclass_fields__)


def test_an_option_is_read_under_its_old_name_which_help_does_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Request] = []
    monkeypatch.setattr("kdbench.runs.command.run", lambda suite, request: asked.append(request) or 0)
    for name in ("--fuse", "--stack"):
        assert invoke("run", name, "3").exit_code == 0
    assert [request.fuse for request in asked] == [3, 3]
    shown = invoke("run", "--help").output
    assert "--fuse" in shown
    assert "--stack" not in shown


def test_the_command_line_offers_the_formats_and_the_kinds_that_there_are() -> None:
    [choice] = [parameter.type for parameter in cli.main.commands["leaderboard"].params if parameter.name == "format_"]
    assert isinstance(choice, click.Choice)
    assert list(choice.choices) == [format.name for format in FORMATS]
    for command, kinds in (("list", PLURALS.values()), ("show", PLURALS)):
        [choice] = [parameter.type for parameter in cli.main.commands[command].params if parameter.name == "kind"]
        assert isinstance(choice, click.Choice)
        assert {*kinds} < {*choice.choices}


def test_the_version_is_the_packages() -> None:
    said = subprocess.run(
        [sys.executable, "-m", "kdbench", "--version"], capture_output=True, text=True, check=True, timeout=60
    )
    assert said.stdout.strip() == f"kdbench, version {kdbench.__version__}"


# The plan, without running it


def test_a_dry_run_lists_each_stage_once_and_trains_nothing(runs: Runs) -> None:
    said = runs.plan.stdout
    assert runs.plan.returncode == 0, runs.plan.stderr
    assert len(rows(said)) == len(set(rows(said))) == STAGES
    assert [row for row in rows(said) if row.startswith("cached")] == ["cached  data      read blobs"]
    assert f"6 cells, {STAGES} unique stages" in said
    assert f"{STAGES - 1} to do" in said
    assert "estimated time: " in said
    assert [stage.split()[0] for stage in runs.done_by_plan] == ["data"]


def test_a_dry_run_after_the_run_finds_everything_cached(runs: Runs) -> None:
    assert runs.replan.exit_code == 0
    assert len(rows(runs.replan.output)) == STAGES
    assert all(row.startswith("cached") for row in rows(runs.replan.output))
    assert ", 0 to do" in runs.replan.output
    assert not (runs.folder / "runs").exists()


# A run


def test_a_cell_that_fails_does_not_stop_the_rest_and_is_exit_code_1(runs: Runs) -> None:
    assert runs.run.returncode == 1, runs.run.stderr
    assert "2 cells failed: training diverged: the loss was not finite in epoch 0" in runs.run.stdout
    assert runs.run.stderr == ""
    cells = read(runs.folder / "wild")
    assert [cell.attack.name for cell in cells if cell.status is Status.FAILED] == ["assistant-kd"] * 2
    assert sum(cell.status is Status.DONE for cell in cells) == 6
    status = invoke("status", str(runs.folder / "wild")).output
    assert "cells: 6 done, 2 failed" in status
    assert "failed: nasty--assistant-kd--mini-8--seed0: training diverged" in status


def test_a_run_of_what_is_finished_does_nothing_again_and_is_exit_code_0(runs: Runs) -> None:
    assert runs.rerun.exit_code == 0
    assert runs.done_by_rerun == []


@pytest.mark.parametrize("name", ["wild", "again"])
def test_a_run_prints_the_leaderboard_and_where_the_results_are(runs: Runs, name: str) -> None:
    said = {"wild": runs.run.stdout, "again": runs.rerun.stdout}[name]
    assert "Defense" in said
    assert re.search(r"\bnasty\b", said)
    assert re.search(r"\bnone\b", said)
    assert f"Results and leaderboards: {name}\n" in said
    assert f"Plots: {Path(name) / 'plots'}" in said


def test_a_run_writes_its_cells_and_everything_else_beside_them(runs: Runs) -> None:
    cells = {cell.name: cell for cell in read(runs.out)}
    assert sorted(cells) == [
        "baseline-1-0--cross-entropy--mini-8--seed0",
        "baseline-1-0--label-smoothing--mini-8--seed0",
        "nasty--hard-label--mini-8--seed0",
        "nasty--kd--mini-8--seed0",
        "none--hard-label--mini-8--seed0",
        "none--kd--mini-8--seed0",
    ]
    assert {"README.md", "leaderboard.md", "leaderboard.csv", "leaderboard.json", "plan.json", "cells.jsonl"} <= {
        path.name for path in runs.out.iterdir()
    }
    assert any((runs.out / "plots").glob("*.png"))
    cell = cells["nasty--kd--mini-8--seed0"]
    assert cell.status is Status.DONE
    assert 0 <= cell.metrics["student_acc"] <= 1
    assert cell.metrics["queries"] == 2 * 96
    assert cell.defense
    assert cell.defense.fields == {"tau": 4.0, "omega": 0.04, "clip": 1.0}
    assert cell.protocol.victim_recipe["epochs"] == 2


# What was run, shown again


@pytest.mark.parametrize(
    ("format", "begins"), [("table", ""), ("md", "#"), ("csv", ""), ("json", ("{", "[")), ("html", "<")]
)
def test_the_leaderboard_is_printed_in_every_format(runs: Runs, format: str, begins: str | tuple[str, ...]) -> None:
    result = invoke("leaderboard", str(runs.out), "--format", format)
    assert result.exit_code == 0
    assert "nasty" in result.output
    assert result.output.startswith(begins)
    if format == "json":
        json.loads(result.output)


def test_the_plots_are_drawn_again_where_they_were(runs: Runs) -> None:
    first = sorted((runs.out / "plots").glob("*.png"))[0]
    first.unlink()
    result = invoke("plot", str(runs.out))
    assert result.exit_code == 0
    drawn = [Path(line) for line in result.output.splitlines()]
    assert first in drawn
    assert all(path.is_file() for path in drawn)


def test_the_status_says_how_far_a_run_is_and_what_it_cost(runs: Runs) -> None:
    result = invoke("status", str(runs.out))
    assert result.exit_code == 0
    assert re.match(rf"stages: {STAGES} of {STAGES} done, .* of computing\ncells: 6 done\n", result.output)


# What there is


@pytest.mark.parametrize("plural", ["defenses", "attacks", "models", "datasets", "victims", "executors"])
def test_each_kind_is_listed_by_name(plural: str) -> None:
    result = invoke("list", plural)
    assert result.exit_code == 0
    kind = plural.removesuffix("s")
    assert [line.split()[0] for line in result.output.splitlines()] == registry.names(kind)


def test_suites_are_listed_by_name_and_title() -> None:
    result = invoke("list", "suites")
    assert result.exit_code == 0
    for name, line in zip(suites.shipped(), result.output.splitlines(), strict=True):
        assert line.split(maxsplit=1) == [name, suites.load(name).title]


def test_everything_is_listed_under_headings() -> None:
    result = invoke("list")
    assert result.exit_code == 0
    assert re.findall(r"^\w+:$", result.output, re.MULTILINE) == [
        "defenses:",
        "attacks:",
        "models:",
        "datasets:",
        "victims:",
        "executors:",
        "suites:",
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("defense", "nasty"), "omega: float >= 0 = 0.04"),
        (("attack", "kd"), "temperature: float > 0 = 4.0"),
        (("model", "mini-8"), "kdbench.zoo.networks:mini_8"),
        (("dataset", "digits"), "test: int >= 1 = 600"),
        (("suite", "digits"), "defenses: none, nasty, "),
    ],
)
def test_one_thing_is_shown_with_all_there_is_to_know(arguments: tuple[str, str], said: str) -> None:
    result = invoke("show", *arguments)
    assert result.exit_code == 0
    assert said in result.output
