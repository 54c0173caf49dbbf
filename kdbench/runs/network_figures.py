"""Figures that need more than cells: networks, services and pictures, as the store has them.

The store is only read, and nothing is trained, but for what a service trains when it is opened, as for each of its clients.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NoReturn

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from kdbench import records as results
from kdbench.board.plots import drawing as plots
from kdbench.board.plots import networks as exhibits
from kdbench.board.plots.drawing import Plot
from kdbench.board.plots.networks import ComparedVictims, FeatureMaps, Floats, ImageGrids, PredictionBars
from kdbench.board.study import REFERENCE
from kdbench.engine.stage_log import StageLog
from kdbench.engine.stages import Workspace, load_images, open_service
from kdbench.engine.store import Json, Store
from kdbench.errors import KdbenchError, unknown
from kdbench.game.data import Images, Split
from kdbench.game.roles import Role
from kdbench.game.threat import Service
from kdbench.records import Cell, Status
from kdbench.runs import plan_file
from kdbench.runs.machine import choose_device
from kdbench.training.fit import predict_logits

STORE = Path("runs/store")
THIEF = "kd"  # whose temperature answers are shown at
SHOWN = 4  # images whose answers are drawn
MAPPED = 1000  # images whose features are, at most
NEIGHBOURS = 30  # that t-SNE keeps together: its perplexity, in a set that is large enough
SEEN = 250  # images a network is shown at once
SHEET = "inverted.png"  # the sheet of images that an inversion leaves: image i is one of class i modulo K
SHEET_GAP, SHEET_WIDTH = 2, 64  # pixels between the images of a sheet, and those that small ones are enlarged to
SAME = 1e-4  # by which the probabilities of one model may differ: rounding


def draw(folder: Path, names: Sequence[str], store: Path | None = None) -> list[Path]:
    """Draw figures, by their names in `FIGURES` or as plots, of the cells under `folder` into its `plots`; the files.

    store: where the stages lie that the cells are made of; None: where the run had them. Raises `KdbenchError` for a name
    that is unknown, a stage that is not in the store, and a figure that these cells have nothing to show in.
    """
    cells = results.read(folder)
    of_numbers = {plot.name: [plot] for plot in plots.plots(cells)}
    unheard = [name for name in names if name not in FIGURES and name not in of_numbers]
    if unheard:
        raise unknown("figure", unheard[0], [*FIGURES, *of_numbers])
    with TemporaryDirectory() as scratch, _one_thread():
        figures_of = NetworkFigures(folder, cells, store or _store_of(folder), Path(scratch))
        chosen = [of_numbers.get(name) or FIGURES[name](figures_of) for name in dict.fromkeys(names)]
        wanted = [plot for found in chosen for plot in found]
    (folder / plots.FOLDER).mkdir(exist_ok=True)
    for plot in wanted:
        plots.save(plot, folder / plots.FOLDER)
    return [folder / plots.FOLDER / f"{plot.name}.{format}" for plot in wanted for format in plots.FORMATS]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Inside, sums are taken in the same order however many cores there are: t-SNE makes much of a rounding."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(threads)


def _store_of(folder: Path) -> Path:
    """The store that the run in `folder` was made in, as far as it is known."""
    return plan_file.store_of(folder).resolve() if (folder / plan_file.FILE).is_file() else STORE


@dataclass(frozen=True)
class Victim:
    """A victim behind a defense: the stage that holds its weights, the model, and what is served to the public."""

    name: str
    key: str
    model: nn.Module
    service: Service


@dataclass(frozen=True)
class NetworkFigures:
    """What figures are made of: the cells of a results folder, and of their first seed the stages in the store."""

    folder: Path
    cells: Sequence[Cell]
    root: Path
    scratch: Path

    @cached_property
    def seed(self) -> int:
        """The first seed."""
        return min(cell.seed for cell in self.cells)

    @cached_property
    def played(self) -> list[Cell]:
        """The cells of the first seed in which a victim was asked."""
        finished = (Status.DONE, Status.BYPASSED)
        return [cell for cell in self.cells if cell.defense and cell.seed == self.seed and cell.status in finished]

    @cached_property
    def reference(self) -> str:
        """The label of the defense that is none."""
        normal = [cell.defense.name for cell in self.played if cell.defense and cell.defense.method == REFERENCE]
        if not normal:
            raise KdbenchError(
                f"{self.folder} has no finished cell of '{REFERENCE}' with seed {self.seed}: "
                "there is no normal victim to draw."
            )
        return normal[0]

    @cached_property
    def store(self) -> Store:
        """The store, which is there already."""
        if not (self.root / "data").is_dir():
            raise self.lacking(f"There is no store at {self.root}, where the stages of {self.folder} should be.")
        return Store(self.root)

    @cached_property
    def images(self) -> Images:
        """The data set."""
        key = self.audit(self.reference)["data"]["key"]
        self.manifest(key)
        return load_images(key, self._workspace)

    @property
    def about(self) -> str:
        """What was played, for the head of a figure."""
        cell = self.cells[0]
        return f"{cell.dataset}, victim {cell.victim}, seed {self.seed}"

    def normal(self) -> Victim:
        """The victim that no defense touched."""
        return self._victim(self.reference)

    def defended(self) -> Iterator[Victim]:
        """The others by their labels, one after another."""
        yield from map(self._victim, sorted({c.defense.name for c in self.played if c.defense} - {self.reference}))

    def audit(self, defense: str) -> Json:
        """The specification of the stage that judged the victim behind `defense`: all that its service is made of."""
        key = next(
            cell.keys["evaluate_victim"] for cell in self.played if cell.defense and cell.defense.name == defense
        )
        spec: Json = self.manifest(key)["spec"]
        return spec

    def manifest(self, key: str) -> Json:
        """stage.json of the stage `key`; raises `KdbenchError` when the store does not have it."""
        if not self.store.has(key):
            raise self.lacking(f"The store {self.root} has no stage {key}, which the figure is drawn from.")
        return self.store.manifest(key)

    def lacking(self, what: str) -> KdbenchError:
        """The error for something that a run would put into the store."""
        suite = self.cells[0].suite
        return KdbenchError(
            f"{what} Name the right one with --store, or make it with "
            f"`kdbench run {suite} --store {self.root} --out {self.folder}` and the other options of that run."
        )

    def _victim(self, label: str) -> Victim:
        spec = self.audit(label)
        key = spec["victim"]["key"]
        self.manifest(key)
        plainly = {**spec["numerics"], "compile": False}  # for a few images it would only take longer
        service, model = open_service({**spec, "numerics": plainly}, self._workspace, self.images.train, Role.EVALUATED_SERVICE)
        return Victim(label, key, model, service)

    @cached_property
    def _workspace(self) -> Workspace:
        """A desk whose journal is thrown away: services may write down what they do."""
        recorded = self.played[0].protocol.numerics.device
        device = choose_device("cpu" if recorded == "cpu" else "auto")
        return Workspace(self.store, self.scratch, StageLog(self.scratch, self.scratch), device, Path())


def _answers(figures_of: NetworkFigures) -> list[Plot]:
    """For each defense that answers otherwise than the normal victim: what both say of the same few images."""
    chosen = _one_a_class(figures_of.images.test)
    temperatures, note = _temperatures(figures_of.played)
    normal = _probabilities(figures_of.normal().service, chosen.x, temperatures)
    found = []
    for victim in figures_of.defended():
        said = _probabilities(victim.service, chosen.x, temperatures)
        if np.allclose(said, normal, atol=SAME):
            continue
        pair = ComparedVictims(victim.name, figures_of.about)
        shown = PredictionBars(pair, _pixels(chosen.x), chosen.y.cpu().numpy(), temperatures, normal, said, note)
        name = _name("answers", victim.name)
        found.append(Plot(name, f"Answers of {victim.name}", partial(exhibits.answers, shown)))
    return found or _nothing(figures_of, f"answers otherwise than '{REFERENCE}'")


def _features(figures_of: NetworkFigures) -> list[Plot]:
    """For each defense with a network of its own: where its penultimate features put the test images."""
    test = figures_of.images.test
    few = test.take(_choice(len(test)).to(test.x.device))
    normal = figures_of.normal()
    place = None
    found = []
    for victim in figures_of.defended():
        if victim.key == normal.key:
            continue
        place = _plane(penultimate(normal.model, few.x, few.classes)) if place is None else place
        own = _plane(penultimate(victim.model, few.x, few.classes))
        pair, note = ComparedVictims(victim.name, figures_of.about), f"t-SNE of {len(few)} test images"
        shown = FeatureMaps(pair, few.y.cpu().numpy(), place, own, note)
        name = _name("features", victim.name)
        found.append(Plot(name, f"Features of {victim.name}", partial(exhibits.features, shown)))
    return found or _nothing(figures_of, f"has another network than '{REFERENCE}'")


def _inverted(figures_of: NetworkFigures) -> list[Plot]:
    """For each inversion and each defense with a network of its own: the images that were made from both networks."""
    sheets = _sheets(figures_of)
    if not sheets:
        raise KdbenchError(
            f"No attack in {figures_of.folder} left inverted images of a victim with seed {figures_of.seed}: "
            "play one that does, such as deep-inversion."
        )
    found = []
    for (attack, label), sheet in sheets.items():
        normal = sheets.get((attack, figures_of.reference))
        if normal is None or sheet.network == normal.network or sheet.tiles.shape != normal.tiles.shape:
            continue
        labels = np.arange(len(sheet.tiles)) % figures_of.cells[0].classes
        shown = ImageGrids(ComparedVictims(label, figures_of.about), labels, normal.tiles, sheet.tiles, f"by {attack}")
        several = len({attack for attack, _ in sheets}) > 1
        name = _name("inverted", f"{attack}-{label}" if several else label)
        found.append(Plot(name, f"Images inverted from {label}", partial(exhibits.inverted, shown)))
    return found or _nothing(figures_of, f"has another network than '{REFERENCE}' for images to be inverted from")


FIGURES: Mapping[str, Callable[[NetworkFigures], list[Plot]]] = {
    "answers": _answers,
    "features": _features,
    "inverted": _inverted,
}


def _nothing(figures_of: NetworkFigures, does: str) -> NoReturn:
    raise KdbenchError(f"No defense in {figures_of.folder} {does}: there is nothing to draw.")


def _name(figure: str, whose: str) -> str:
    return f"{figure}-{whose}".replace(":", "-").replace("/", "-")


def _one_a_class(data: Split) -> Split:
    """The first image of each of a few classes, in the order in which the classes come."""
    first = {int(label): index for index, label in reversed(list(enumerate(data.y.tolist())))}
    return data.take(torch.tensor(sorted(first.values())[:SHOWN], device=data.y.device))


def _choice(count: int) -> Tensor:
    """Which of `count` images are mapped (M,), the same every time."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:MAPPED].sort().values


def _temperatures(cells: Iterable[Cell]) -> tuple[tuple[float, ...], str]:
    """1 and the temperature of the thief by knowledge distillation, and a word on where it comes from."""
    attackers = [cell.attack for cell in cells if cell.attack.method == THIEF]
    if not attackers:
        return (1.0,), f"no '{THIEF}' was played whose temperature could be shown"
    attacker = min(attackers, key=lambda player: (player.name != THIEF, player.name))
    T = float(attacker.fields["temperature"])
    return tuple(dict.fromkeys((1.0, T))), f"T = {T:g}: the temperature of '{attacker.name}'"


def _probabilities(service: Service, x: Tensor, temperatures: Iterable[float]) -> Floats:
    """What a service says of images `x`, softened: (T,N,K). A withheld class stays at 0."""
    with torch.no_grad():
        log_p = service(x).float()
    return np.stack([(log_p / T).softmax(dim=1).cpu().numpy() for T in temperatures])


def _pixels(x: Tensor) -> Floats:
    """Images (N,C,H,W) -> (N,H,W) if they are grey, (N,H,W,3) otherwise, as they are drawn."""
    images: Floats = (x[:, 0] if x.shape[1] == 1 else x[:, :3].permute(0, 2, 3, 1)).cpu().numpy()
    return images


@dataclass(frozen=True)
class _Sheet:
    """Images (N,H,W,3) in [0,1] that an attack made from the network whose weights the stage `network` left."""

    tiles: Floats
    network: str


def _sheets(figures_of: NetworkFigures) -> dict[tuple[str, str], _Sheet]:
    """The sheets of inverted images by attack and defense; of several students, that of the first."""
    inverting = {cell.attack.name for cell in figures_of.cells if any(name.endswith(SHEET) for name in cell.pictures)}
    found: dict[tuple[str, str], _Sheet] = {}
    for cell in figures_of.played:
        names = (cell.attack.name, cell.defense.name if cell.defense else "")
        if cell.attack.name in inverting and names not in found:
            manifest = figures_of.manifest(cell.keys["steal"])
            if SHEET in manifest["pictures"]:
                picture = figures_of.store.path(cell.keys["steal"]) / SHEET
                size = figures_of.images.test.shape[1:]
                found[names] = _Sheet(_tiles(picture, size), manifest["spec"]["victim"]["key"])
    return found


def _tiles(picture: Path, size: tuple[int, ...]) -> Floats:
    """The images (N,H,W,3) of a sheet that a journal saved, `size` (H,W) large before they were enlarged."""
    from matplotlib.image import imread

    pixels = imread(picture)[..., :3]
    factor = max(1, SHEET_WIDTH // size[1])
    height, width = (side * factor for side in size)
    gap = SHEET_GAP if pixels.shape[1] > width else 0  # one image alone has no frame
    rows, columns = ((side - gap) // (own + gap) for side, own in zip(pixels.shape, (height, width), strict=False))
    corners = [(gap + r * (height + gap), gap + c * (width + gap)) for r in range(rows) for c in range(columns)]
    tiles = np.stack([pixels[y : y + height : factor, x : x + width : factor] for y, x in corners])
    used = np.flatnonzero((tiles < 1).any(axis=(1, 2, 3)))  # places that no image took are white
    return tiles[: used[-1] + 1] if len(used) else tiles


def penultimate(network: nn.Module, x: Tensor, classes: int) -> Tensor:
    """What enters the classifier of `network` (N,D) for images `x`; maps, before a convolution, are averaged.

    The classifier is the linear layer or 1x1 convolution with an output a class that is called last, wherever it stands in
    the network. Raises `KdbenchError` when there is none.
    """
    seen: list[Tensor] = []

    def look(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0].detach())

    hooks = [layer.register_forward_pre_hook(look) for layer in network.modules() if _classifies(layer, classes)]
    parts: list[Tensor] = []
    try:
        for part in x.split(SEEN):
            predict_logits(network, part)
            parts += seen[-1:]
            seen.clear()
    finally:
        for hook in hooks:
            hook.remove()
    if not parts:
        raise KdbenchError(f"The network {type(network).__name__} has no linear layer with {classes} outputs.")
    features = torch.cat(parts)
    return features.flatten(2).mean(2) if features.ndim > 2 else features


def _classifies(layer: nn.Module, classes: int) -> bool:
    if isinstance(layer, nn.Conv2d):
        return layer.kernel_size == (1, 1) and layer.out_channels == classes
    return isinstance(layer, nn.Linear) and layer.out_features == classes


def _plane(features: Tensor) -> Floats:
    """Features (N,D) -> places (N,2) by t-SNE, always the same."""
    from sklearn.manifold import TSNE

    tsne = TSNE(perplexity=min(NEIGHBOURS, (len(features) - 1) / 3), init="pca", random_state=0)
    places: Floats = tsne.fit_transform(features.cpu().float().numpy())
    return places
