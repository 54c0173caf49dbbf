"""Network figures: they draw what the victims of a run answer, compute and leak, and only read the store."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from helpers import context
from kdbench import registry
from kdbench.api import KdbenchError, Split
from kdbench.board.plots import networks
from kdbench.board.plots.networks import FeatureMaps, ImageGrids, PredictionBars
from kdbench.cli import main
from kdbench.defenses.stingy import Stingy
from kdbench.engine.models import Standardise
from kdbench.engine.store import Store
from kdbench.engine.tensors import load_tensors, load_weights
from kdbench.records import Cell, DefenseRecord
from kdbench.runs import network_figures
from kdbench.runs.network_figures import FIGURES
from kdbench.runs.opened_run import OpenedRun
from kdbench.suites.suite import Suite
from runs import FinishedRun, Json, RecordedProgress, run

INVERTED = 20


SHOWN: Json = {
    "precision": "fp32",
    "attacks": ["kd", "deep-inversion"],
    "baselines": [],
    "scenario.access": "weights",
    "attack.deep-inversion.images": INVERTED,
    "attack.deep-inversion.batch": INVERTED,
    "attack.deep-inversion.iterations": 3,
}


@pytest.fixture(scope="module")
def inverted_run(tiny: Callable[..., Suite], tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """The tiny suite with an inversion; nobody changes this folder."""
    folder, progress_display = tmp_path_factory.mktemp("shown"), RecordedProgress()
    return FinishedRun(folder, run(tiny(SHOWN), folder, progress_display), progress_display)


@pytest.fixture
def opened_run(inverted_run: FinishedRun, tmp_path: Path) -> OpenedRun:
    return open_run(inverted_run, tmp_path)


def open_run(inverted_run: FinishedRun, scratch: Path) -> OpenedRun:
    return OpenedRun(
        inverted_run.folder / "out", list(inverted_run.cells.values()), inverted_run.folder / "store", scratch
    )


def shown(opened_run: OpenedRun, name: str) -> "dict[str, tuple[object, ...]]":
    """The arguments with which each plot of a figure would be drawn, by the plot's name."""
    return {plot.name: plot.figure.args for plot in FIGURES[name](opened_run)}  # type: ignore[attr-defined]


def asked(inverted_run: FinishedRun, name: str) -> Cell:
    """The cell of `kd` against a defense."""
    return inverted_run.cells[f"{name}--kd--mini-8--seed0"]


def data(inverted_run: FinishedRun) -> dict[str, Tensor]:
    """The tensors of the data set."""
    [key] = [key for key in inverted_run.store.finished() if key.startswith("data/")]
    return load_tensors(inverted_run.store.path(key) / "tensors.safetensors")


def victim(inverted_run: FinishedRun, key: str) -> nn.Module:
    """The network of a stage, put together by hand."""
    x = data(inverted_run)["train.x"]
    std, mean = torch.std_mean(x, dim=(0, 2, 3))
    network = nn.Sequential(Standardise(mean, std), registry.load("model", "mini-8")((1, 8, 8), 3))
    return load_weights(network, inverted_run.store.path(key) / "weights.safetensors")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# What is drawn


def test_the_bars_are_what_the_services_say_of_the_first_image_of_each_class(
    inverted_run: FinishedRun, opened_run: OpenedRun
) -> None:
    found = shown(opened_run, "answers")
    assert list(found) == ["answers-nasty", "answers-stingy"]
    tensors = data(inverted_run)
    first = [int((tensors["test.y"] == label).nonzero()[0]) for label in range(3)]
    x = tensors["test.x"][sorted(first)]
    normal = victim(inverted_run, asked(inverted_run, "none").keys["train"])
    ctx = context(Split(tensors["train.x"], tensors["train.y"], 3))
    services = {
        "answers-nasty": lambda x: victim(inverted_run, asked(inverted_run, "nasty").keys["harden"])(x).log_softmax(1),
        "answers-stingy": Stingy(**asked(inverted_run, "stingy").defense.fields).serve(normal, ctx),  # type: ignore[union-attr]
    }
    for name, (bars,) in found.items():
        assert isinstance(bars, PredictionBars)
        assert bars.temperatures == (1, 4)
        figure = networks.answers(bars)
        with torch.no_grad():
            said = [normal(x).log_softmax(1), services[name](x)]
        for row in range(3):
            _, *axes = figure.axes[5 * row : 5 * row + 5]
            expected = [(log_p[row] / T).softmax(0) for T in (1, 4) for log_p in said]
            for ax, probabilities in zip(axes, expected, strict=True):
                heights = [bar.get_height() for bar in ax.containers[0]]
                assert heights == pytest.approx(probabilities.tolist(), abs=1e-5)


def test_a_row_shows_its_image_and_names_its_class(opened_run: OpenedRun) -> None:
    [bars] = shown(opened_run, "answers")["answers-nasty"]
    assert isinstance(bars, PredictionBars)
    figure = networks.answers(bars)
    assert len(figure.axes) == 3 * (1 + 2 * 2)
    for row, label in enumerate(bars.labels):
        photo = figure.axes[5 * row]
        assert photo.get_ylabel() == f"class {label}"
        assert np.array_equal(photo.images[0].get_array(), bars.images[row])
        assert bars.images[row].min() < bars.images[row].max()


def test_predictions_are_shown_at_the_temperature_of_most_attacks_or_at_1_alone(inverted_run: FinishedRun) -> None:
    cells = list(inverted_run.cells.values())
    without = [replace(cell, attack=replace(cell.attack, fields={})) for cell in cells]
    assert network_figures._temperatures(without)[0] == (1,)
    hotter = [
        replace(cell, attack=replace(cell.attack, name=name, fields={"temperature": 20.0}))
        for cell in cells
        for name in ("a", "b", "c")
    ]
    assert network_figures._temperatures([*cells, *hotter])[0] == (1, 20)


def test_the_same_answers_are_not_drawn(inverted_run: FinishedRun, tmp_path: Path) -> None:
    """A defense that leaves the victim as it is and all its answers too."""
    honest = [cell for cell in inverted_run.cells.values() if cell.defense and cell.defense.name == "none"]
    copies = [replace(cell, defense=DefenseRecord("idle", "idle", {}, "made up")) for cell in honest]
    opened_run = OpenedRun(tmp_path, [*honest, *copies], inverted_run.folder / "store", tmp_path)
    for name, lacks in {"answers": "answers otherwise than", "features": "has another network than"}.items():
        with pytest.raises(KdbenchError, match=f"No defense in .* {lacks} 'none'"):
            FIGURES[name](opened_run)


def test_features_are_mapped_where_a_defense_has_a_network_of_its_own(
    inverted_run: FinishedRun, opened_run: OpenedRun
) -> None:
    found = shown(opened_run, "features")
    assert list(found) == ["features-nasty"]
    [maps] = found["features-nasty"]
    assert isinstance(maps, FeatureMaps)
    assert maps.labels.tolist() == data(inverted_run)["test.y"].tolist()
    figure = networks.features(maps)
    assert [ax.get_title() for ax in figure.axes] == ["undefended", "nasty"]
    for ax, places in zip(figure.axes, (maps.normal, maps.defended), strict=True):
        drawn = [np.asarray(dots.get_offsets()) for dots in ax.collections]
        assert [len(dots) for dots in drawn] == [32, 32, 32]
        assert np.array_equal(drawn[1], places[maps.labels == 1])
        assert np.isfinite(places).all()
    assert not np.allclose(maps.normal, maps.defended)


def test_inverted_images_stand_in_the_row_of_their_class(inverted_run: FinishedRun, opened_run: OpenedRun) -> None:
    found = shown(opened_run, "inverted")
    assert list(found) == ["inverted-nasty"]
    [grids] = found["inverted-nasty"]
    assert isinstance(grids, ImageGrids)
    assert grids.labels.tolist() == [index % 3 for index in range(INVERTED)]
    key = inverted_run.cells["nasty--deep-inversion--mini-8--seed0"].keys["steal"]
    kept = load_tensors(inverted_run.store.path(key) / "inverted.safetensors")
    assert kept["labels"].tolist() == grids.labels.tolist()
    assert np.array_equal(grids.defended, kept["images"].expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy())
    figure = networks.inverted(grids)
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == ["0", "1", "2"]
    for ax, images in zip(figure.axes, (grids.normal, grids.defended), strict=True):
        for drawn in ax.images:
            left, right, bottom, top = drawn.get_extent()
            column, row = round((left + right) / 2), round((bottom + top) / 2)
            assert np.array_equal(drawn.get_array(), images[row + 3 * column])
        assert len(ax.images) == 3 * 6


# The command


def test_figures_are_written_beside_the_plots_and_the_store_is_only_read(
    inverted_run: FinishedRun, tmp_path: Path
) -> None:
    out, store = tmp_path / "out", inverted_run.copy(tmp_path) / "store"
    shutil.copytree(inverted_run.folder / "out", out)
    before, kept = files(store), files(out)
    arguments = ["plot", str(out), "--figure", "answers", "--figure", "features", "--figure", "inverted"]
    drawn = CliRunner().invoke(main, [*arguments, "--store", str(store)])
    assert drawn.exit_code == 0, drawn.output
    names = ["answers-nasty", "answers-stingy", "features-nasty", "inverted-nasty"]
    assert drawn.output.split() == [str(out / "plots" / f"{name}.{end}") for name in names for end in ("png", "svg")]
    first = files(out)
    pictures = {f"plots/{name}.{end}" for name in names for end in ("png", "svg")}
    assert first.keys() - kept.keys() == {*pictures, "README.md"}
    assert all(f"plots/{name}.png" in (out / "README.md").read_text(encoding="utf-8") for name in names)
    assert all(first[name] == content for name, content in kept.items())
    assert CliRunner().invoke(main, arguments).exit_code == 0  # the run says where its store is
    assert files(out) == first
    assert files(store) == before


def mistake(folder: Path, figure: str, store: Path) -> str:
    """What is said of a figure that cannot be drawn."""
    result = CliRunner().invoke(main, ["plot", str(folder), "--figure", figure, "--store", str(store)])
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    return result.stderr


def test_a_store_that_is_not_there_is_named_with_the_command_that_makes_it(
    inverted_run: FinishedRun, tmp_path: Path
) -> None:
    said = mistake(inverted_run.folder / "out", "answers", tmp_path / "absent")
    assert said.startswith(f"Error: There is no store at {tmp_path / 'absent'}")
    assert f"`kdbench run tiny --store {tmp_path / 'absent'} --out {inverted_run.folder / 'out'}`" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("figure", "role"),
    [("answers", "evaluate_victim"), ("answers", "harden"), ("features", "harden"), ("inverted", "steal")],
)
def test_a_stage_that_is_not_there_is_named_with_the_command_that_makes_it(
    figure: str, role: str, inverted_run: FinishedRun, tmp_path: Path
) -> None:
    store = Store(inverted_run.copy(tmp_path) / "store")
    key = inverted_run.cells["nasty--deep-inversion--mini-8--seed0"].keys[role]
    store.discard(key)
    said = mistake(inverted_run.folder / "out", figure, store.root)
    assert said.startswith(f"Error: The store {store.root} has no stage {key}")
    assert f"`kdbench run tiny --store {store.root} --out " in said


def test_a_run_without_an_inversion_has_no_inverted_images(golden: FinishedRun) -> None:
    said = mistake(golden.folder / "out", "inverted", golden.folder / "store")
    assert "left inverted images of a victim" in said
    assert "run an attack that does" in said


def test_a_run_without_an_undefended_victim_is_a_mistake(inverted_run: FinishedRun, tmp_path: Path) -> None:
    cells = [cell for cell in inverted_run.cells.values() if cell.defense and cell.defense.name != "none"]
    with pytest.raises(KdbenchError, match="no scored cell of the undefended victim with seed 0"):
        FIGURES["answers"](OpenedRun(tmp_path, cells, inverted_run.folder / "store", tmp_path))


def test_an_unknown_figure_is_named_with_the_nearest(golden: FinishedRun) -> None:
    said = mistake(golden.folder / "out", "anwsers", golden.folder / "store")
    assert said.startswith(
        "Error: There is no figure 'anwsers'. Did you mean 'answers'? Known: answers, features, inverted"
    )
