"""The command line: parses, calls, prints. Heavy imports stand in the commands that need them: --help answers at once."""

import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from kdbench import __version__
from kdbench.errors import KdbenchError

DONE, SOME_FAILED, MISTAKE = 0, 1, 2
INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived: the run ends as it does by Ctrl-C."""


class Group(click.Group):
    """Turns the user's mistakes into one sentence and exit code 2, Ctrl-C into 130 and SIGTERM into 143."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            with _terminable():
                return super().invoke(ctx)
        except KdbenchError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(MISTAKE)
        except KeyboardInterrupt as interruption:
            click.echo(f"\nInterrupted. What was finished is kept; to go on: {_command_line()}", err=True)
            ctx.exit(TERMINATED if isinstance(interruption, Terminated) else INTERRUPTED)


class Renamed(click.Option):
    """An option that is also read under an older name, which help does not show."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """The line of help, with today's name alone."""
        record = super().get_help_record(ctx)
        if record is None:
            return None
        names, text = record
        for old in self.opts[1:]:
            names = names.replace(f", {old}", "")
        return names, text


@contextmanager
def _terminable() -> Iterator[None]:
    """Inside, SIGTERM interrupts like Ctrl-C: workers stop at a checkpoint. Signals are handled in a main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(*_: object) -> None:
    raise Terminated


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="kdbench")
def main() -> None:
    """Benchmark of defenses against model stealing by knowledge distillation, each run against every attack."""


def _options(*decorators: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def apply(command: Any) -> Any:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return apply


_selection = _options(
    click.option(
        "--defense", "-d", multiple=True, help="Run this defense (repeatable). The undefended victim is always run."
    ),
    click.option("--attack", "-a", multiple=True, help="Run this attack (repeatable). Baselines are always run."),
    click.option("--dataset", help="Use this data set."),
    click.option("--student", multiple=True, help="Train this network as the student (repeatable)."),
    click.option("--seeds", type=click.IntRange(min=1), help="Number of seeds."),
    click.option(
        "--robustness",
        type=click.Choice(["none", "fast", "more", "full"]),
        help="How much adversarial robustness to measure.",
    ),
    click.option("--precision", type=click.Choice(["auto", "fp32", "bf16"]), help="Of forward and backward passes."),
    click.option(
        "--set", "changes", multiple=True, metavar="PATH=VALUE", help="Change a field, e.g. attack.kd.temperature=20."
    ),
)
_machine = _options(
    click.option("--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto", show_default=True),
    click.option("--executor", default="local", show_default=True, help="What starts workers: see `list executors`."),
    click.option("--jobs", "-j", type=click.IntRange(min=1), help="Worker processes; default: one a core."),
    click.option(
        "--threads",
        type=click.IntRange(min=1),
        default=1,
        show_default=True,
        help="Threads of one worker; part of every key.",
    ),
    click.option(
        "--fuse",
        "--stack",
        "fuse",
        cls=Renamed,
        type=click.IntRange(min=1),
        default=1,
        show_default=True,
        help="Attack runs at most whose students a worker trains as one network; part of every key.",
    ),
    click.option(
        "--compile",
        is_flag=True,
        help="Compile networks (torch.compile); pays on GPUs in long runs. Part of every key.",
    ),
    click.option(
        "--data-dir",
        type=click.Path(path_type=Path),
        default=Path("data"),
        show_default=True,
        help="Folder of the data sets.",
    ),
    click.option(
        "--store",
        type=click.Path(path_type=Path),
        default=Path("runs/store"),
        show_default=True,
        envvar="KDBENCH_STORE",
        help="Folder of the finished stages.",
    ),
    click.option("--out", type=click.Path(path_type=Path), help="Results folder; default: runs/ and the suite's name."),
    click.option("--dry-run", is_flag=True, help="Print the plan and stop."),
    click.option("--force", is_flag=True, help="Run finished stages again."),
    click.option("--quiet", "-q", is_flag=True, help="No progress."),
    click.option(
        "--profile", is_flag=True, help="Print at the end how fast each stage was, beside a bare training loop."
    ),
)


@main.command()
@click.argument("suite", default="digits")
@_selection
@_machine
def run(suite: str, **options: Any) -> None:
    """Run a SUITE. It is the name of a shipped one or a .toml file; default: digits."""
    from kdbench.runs.command import run as run_suite
    from kdbench.runs.request import Request

    sys.exit(run_suite(suite, Request(**options)))


@main.command(name="list")
@click.argument(
    "kind",
    required=False,
    type=click.Choice(["defenses", "attacks", "models", "datasets", "victims", "executors", "suites"]),
)
def list_(kind: str | None) -> None:
    """List registered names and shipped suites. Each name is shown with its origin and its first sentence."""
    from kdbench.listing import listing

    for line in listing(kind):
        click.echo(line)


@main.command()
@click.argument("kind", type=click.Choice(["defense", "attack", "model", "dataset", "victim", "executor", "suite"]))
@click.argument("name")
def show(kind: str, name: str) -> None:
    """Show one of them. For a method: fields with types and defaults, source, citation, and what it needs of the victim."""
    from kdbench.listing import describe

    click.echo(describe(kind, name))


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--format", "format_", type=click.Choice(["table", "md", "csv", "json", "html"]), default="table", show_default=True
)
def leaderboard(folder: Path, format_: str) -> None:
    """Print the leaderboards of a results FOLDER. They and the report are written again from the cells."""
    from kdbench.board import report

    _name_old_layout(folder)
    click.echo(report.write_all(folder, format_))


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--figure",
    "figures",
    multiple=True,
    metavar="NAME",
    help="Draw this only: answers, features, inverted, or the name of a plot (repeatable).",
)
@click.option(
    "--store",
    type=click.Path(path_type=Path),
    envvar="KDBENCH_STORE",
    help="Folder of the finished stages that such figures need; default: that of the run.",
)
def plot(folder: Path, figures: tuple[str, ...], store: Path | None) -> None:
    """Draw the plots of a results FOLDER. With --figure: figures, some of which need the networks of the run."""
    if figures:
        from kdbench.board import report
        from kdbench.runs import network_figures

        drawn = network_figures.draw(folder, figures, store)
        report.write_report(folder)  # which shows them
    else:
        from kdbench.board.plots import drawing
        from kdbench.board.studies import Studies

        drawn = drawing.draw(Studies.read(folder), folder, force=True)
    for path in drawn:
        click.echo(path)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
def status(folder: Path) -> None:
    """Say how far a run is. FOLDER is where it writes; also what failed and why, and what it cost."""
    from kdbench.runs.status import status as report

    click.echo(report(folder))


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
def convert(folder: Path) -> None:
    """Rewrite an older results FOLDER. Its cells/*.json become one cells.jsonl, with the same numbers."""
    from kdbench.runs.conversion import convert as rewrite

    click.echo(f"{rewrite(folder)} cells rewritten to {folder / 'cells.jsonl'}")


def _name_old_layout(folder: Path) -> None:
    """Say how a folder of the old layout, which is read all the same, is rewritten."""
    from kdbench.records import is_old

    if is_old(folder):
        click.echo(f"{folder} has the old layout; `kdbench convert {folder}` rewrites it.", err=True)


def _command_line() -> str:
    return shlex.join(["kdbench", *sys.argv[1:]])
