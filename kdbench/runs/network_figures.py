"""Network figures: what needs the networks, services and images of a run, as the store has them.

The store is only read, and nothing is trained, except for what a service trains when it is opened, as for each client.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from torch import Tensor

from kdbench import records
from kdbench.board.plots import drawing, networks
from kdbench.board.plots.drawing import Plot
from kdbench.board.plots.networks import ComparedVictims, FeatureMaps, Floats, ImageGrids, PredictionBars
from kdbench.board.studies import Studies
from kdbench.engine.tensors import load_tensors
from kdbench.errors import KdbenchError, unknown
from kdbench.game.data import Split
from kdbench.game.threat import Service
from kdbench.records import AttackRecord, Cell
from kdbench.runs import plan_file
from kdbench.runs.features import penultimate, plane
from kdbench.runs.opened_run import OpenedRun

STORE = Path("runs/store")
COMPARED = 4  # images whose predictions are drawn
MAPPED = 1000  # images whose features are mapped, at most
INVERTED = "inverted"  # the name under which attacks leave images that they made from a victim
SAME = 1e-4  # by which the probabilities of one model may differ: rounding


def draw(folder: Path, names: Sequence[str], store: Path | None = None) -> list[Path]:
    """Draw figures, by their names in `FIGURES` or as plots, of the cells under `folder` into its `plots`; the files.

    store: where the stages lie that the cells are made of; None: where the run had them. Raises `KdbenchError` for a name
    that is unknown, a stage that is not in the store, and a figure that these cells have nothing to show in.
    """
    cells = records.read(folder)
    of_numbers = {plot.name: [plot] for plot in drawing.plots(Studies.of(cells))}
    unheard = [name for name in names if name not in FIGURES and name not in of_numbers]
    if unheard:
        raise unknown("figure", unheard[0], [*FIGURES, *of_numbers])
    with TemporaryDirectory() as scratch, _one_thread():
        run = OpenedRun(folder, cells, store or _store_of(folder), Path(scratch))
        chosen = [of_numbers.get(name) or FIGURES[name](run) for name in dict.fromkeys(names)]
        wanted = [plot for found in chosen for plot in found]
    (folder / drawing.FOLDER).mkdir(exist_ok=True)
    for plot in wanted:
        drawing.save(plot, folder / drawing.FOLDER)
    return [folder / drawing.FOLDER / f"{plot.name}.{format}" for plot in wanted for format in drawing.FORMATS]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Inside, sums are taken in the same order however many cores there are: t-SNE magnifies differences of rounding."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(threads)


def _store_of(folder: Path) -> Path:
    """The store that the run in `folder` used, as far as it is known."""
    return plan_file.store_of(folder).resolve() if (folder / plan_file.FILE).is_file() else STORE


def _prediction_bars(run: OpenedRun) -> list[Plot]:
    """For each defense whose answers differ from the undefended victim's: what both predict for the same few images."""
    chosen = _one_a_class(run.images.test)
    temperatures, note = _temperatures(run.attacked)
    undefended = _probabilities(run.undefended().service, chosen.x, temperatures)
    found = []
    for victim in run.defended():
        predicted = _probabilities(victim.service, chosen.x, temperatures)
        if np.allclose(predicted, undefended, atol=SAME):
            continue
        pair, labels = ComparedVictims(victim.name, run.about), chosen.y.cpu().numpy()
        bars = PredictionBars(pair, _pixels(chosen.x), labels, temperatures, undefended, predicted, note)
        name = _name("answers", victim.name)
        found.append(Plot(name, f"Answers of {victim.name}", partial(networks.answers, bars)))
    return found or _nothing(run, "answers otherwise than")


def _feature_maps(run: OpenedRun) -> list[Plot]:
    """For each defense with a network of its own: where its penultimate features put the test images."""
    test = run.images.test
    few = test.take(_choice(len(test)).to(test.x.device))
    undefended = run.undefended()
    places = None
    found = []
    for victim in run.defended():
        if victim.key == undefended.key:
            continue
        places = plane(penultimate(undefended.network, few.x, few.classes)) if places is None else places
        own = plane(penultimate(victim.network, few.x, few.classes))
        pair, note = ComparedVictims(victim.name, run.about), f"t-SNE of {len(few)} test images"
        maps = FeatureMaps(pair, few.y.cpu().numpy(), places, own, note)
        name = _name("features", victim.name)
        found.append(Plot(name, f"Features of {victim.name}", partial(networks.features, maps)))
    return found or _nothing(run, "has another network than")


def _image_grids(run: OpenedRun) -> list[Plot]:
    """For each inversion and each defense with a network of its own: the images that were made from both networks."""
    inversions = _inversions(run)
    if not inversions:
        raise KdbenchError(
            f"No attack in {run.folder} left inverted images of a victim with seed {run.seed}: run an attack that does."
        )
    several = len({attack for attack, _ in inversions}) > 1
    found = []
    for (attack, defense), own in inversions.items():
        undefended = inversions.get((attack, run.reference))
        if undefended is None or own.network == undefended.network or not np.array_equal(own.labels, undefended.labels):
            continue
        pair = ComparedVictims(defense, run.about)
        grids = ImageGrids(pair, own.labels, undefended.images, own.images, f"by {attack}")
        name = _name("inverted", f"{attack}-{defense}" if several else defense)
        found.append(Plot(name, f"Images inverted from {defense}", partial(networks.inverted, grids)))
    return found or _nothing(run, "let images be inverted from another network than")


FIGURES: Mapping[str, Callable[[OpenedRun], list[Plot]]] = {
    "answers": _prediction_bars,
    "features": _feature_maps,
    "inverted": _image_grids,
}


def _nothing(run: OpenedRun, does: str) -> NoReturn:
    raise KdbenchError(f"No defense in {run.folder} {does} '{run.reference}': there is nothing to draw.")


def _name(figure: str, whose: str) -> str:
    return f"{figure}-{whose}".replace(":", "-").replace("/", "-")


def _one_a_class(data: Split) -> Split:
    """The first image of each of a few classes, in the order in which the classes come."""
    first = {int(label): index for index, label in reversed(list(enumerate(data.y.tolist())))}
    return data.take(torch.tensor(sorted(first.values())[:COMPARED], device=data.y.device))


def _choice(count: int) -> Tensor:
    """Which of `count` images are mapped (M,), the same every time."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:MAPPED].sort().values


def _temperatures(cells: Iterable[Cell]) -> tuple[tuple[float, ...], str]:
    """1 and the temperature at which most attacks learn (of several, the highest); and a note on where it comes from."""
    of_attacks = {cell.attack.name: T for cell in cells if (T := _temperature(cell.attack))}
    if not of_attacks:
        return (1.0,), "no attack was run whose temperature could be shown"
    [(T, count)] = Counter(sorted(of_attacks.values(), reverse=True)).most_common(1)
    name = min(name for name, own in of_attacks.items() if own == T)
    others = f" and {count - 1} more" if count > 1 else ""
    return tuple(dict.fromkeys((1.0, T))), f"T = {T:g}: the temperature of '{name}'{others}"


def _temperature(attack: AttackRecord) -> float | None:
    """The temperature at which an attack learns from answers, if it has one."""
    T = attack.fields.get("temperature")
    return float(T) if isinstance(T, int | float) else None


def _probabilities(service: Service, x: Tensor, temperatures: Iterable[float]) -> Floats:
    """What a service answers to images `x`, softened by each temperature: (T,N,K). A withheld class stays at 0."""
    with torch.no_grad():
        log_p = service(x).float()
    return np.stack([(log_p / T).softmax(dim=1).cpu().numpy() for T in temperatures])


def _pixels(x: Tensor) -> Floats:
    """Images (N,C,H,W) -> (N,H,W) if they are grey, (N,H,W,3) otherwise, as they are drawn."""
    images: Floats = (x[:, 0] if x.shape[1] == 1 else x[:, :3].permute(0, 2, 3, 1)).cpu().numpy()
    return images


@dataclass(frozen=True)
class _Inversion:
    """Images (N,H,W,3) in [0,1] with the labels (N,) for which they were made from the network of a stage."""

    images: Floats
    labels: NDArray[np.integer]
    network: str


def _inversions(run: OpenedRun) -> dict[tuple[str, str], _Inversion]:
    """Inverted images by attack and defense; of several students, those of the first."""
    inverting = {cell.attack.name for cell in run.cells if any(INVERTED in picture for picture in cell.pictures)}
    found: dict[tuple[str, str], _Inversion] = {}
    for cell in run.attacked:
        names = (cell.attack.name, cell.defense.name if cell.defense else "")
        if cell.attack.name in inverting and names not in found:
            key = cell.keys["steal"]
            run.manifest(key)
            path = run.store.path(key) / f"{INVERTED}.safetensors"
            if path.is_file():
                kept = load_tensors(path)
                images = _pixels(kept["images"].expand(-1, max(3, kept["images"].shape[1]), -1, -1))
                found[names] = _Inversion(images, kept["labels"].numpy(), cell.keys["harden"])
    return found
