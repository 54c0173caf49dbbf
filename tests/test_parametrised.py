"""Names with an argument: torchvision's networks by its names, and data sets by path."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from kdbench import listing, registry
from kdbench.api import KdbenchError, seeded
from kdbench.engine.sources import source_digest
from kdbench.records import Status
from kdbench.suites import reader as suites
from kdbench.suites.suite import Suite
from runs import ONE_CELL, TINY, run


def refusal(kind: str, name: str) -> str:
    with pytest.raises(KdbenchError) as caught:
        registry.find(kind, name)
    return str(caught.value)


# Names


def test_a_parametrised_entry_is_listed_once_by_its_bare_name() -> None:
    assert "torchvision" in registry.names("model")
    assert "imagefolder" in registry.names("dataset")
    assert not [name for kind in registry.KINDS for name in registry.names(kind) if ":" in name]


@pytest.mark.parametrize(("kind", "name"), [("model", "torchvision:NAME"), ("dataset", "imagefolder:PATH")])
def test_the_list_shows_the_form_of_a_parametrised_entry(kind: str, name: str) -> None:
    [line] = [line for line in listing.listing(listing.PLURALS[kind]) if name.partition(":")[0] in line.split()]
    assert f"  {name} is " in line


@pytest.mark.parametrize("name", ["torchvision", "torchvision:"])
def test_a_parametrised_entry_without_its_argument_is_refused_with_the_form(name: str) -> None:
    with pytest.raises(KdbenchError, match=r"^The model 'torchvision' needs an argument: torchvision:NAME\.$"):
        registry.load("model", name)


def test_what_takes_no_argument_says_so() -> None:
    assert refusal("dataset", "digits:3") == "The dataset 'digits' takes no argument: 'digits:3' is nothing."
    assert refusal("defense", "nasty:3") == "The defense 'nasty' takes no argument: 'nasty:3' is nothing."
    assert refusal("model", "cnn:small").endswith(" A module of your own named 'cnn' needs another name.")


def test_a_misspelt_parametrised_entry_is_named_with_the_nearest() -> None:
    assert refusal("dataset", "imagefoldr:x").startswith(
        "There is no dataset 'imagefoldr'. Did you mean 'imagefolder'?"
    )
    assert refusal("model", "torchvison:resnet18").endswith("Did you mean 'torchvision'?")


def test_an_entry_with_an_argument_says_where_it_comes_from() -> None:
    entry, bare = registry.find("model", "torchvision:resnet18"), registry.find("model", "torchvision")
    assert (entry.name, entry.argument, entry.origin) == ("torchvision:resnet18", "resnet18", bare.origin)
    assert listing.describe("model", "torchvision:resnet18").startswith(f"torchvision:resnet18: {bare.target}, from ")


# torchvision


def test_a_misspelt_network_of_torchvision_is_told_with_the_nearest() -> None:
    said = refusal("model", "torchvision:resnt18")
    assert said.startswith("There is no model 'resnt18' in torchvision. Did you mean 'resnet18'? Known: alexnet, ")
    assert "fasterrcnn" not in said


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("shufflenet_v2_x0_5", 8),
        ("mobilenet_v3_small", 8),
        ("squeezenet1_1", 32),
        ("regnet_y_400mf", 8),
        ("googlenet", 32),
    ],
)
def test_a_network_of_torchvision_takes_images_of_any_channels_and_gives_logits(
    name: str, side: int, channels: int
) -> None:
    network = registry.load("model", f"torchvision:{name}")((channels, side, side), 7)
    assert isinstance(network, nn.Module)
    assert network.training
    for training in (True, False):
        z = network.train(training)(torch.rand(4, channels, side, side))
        assert z.shape == (4, 7)
        assert z.isfinite().all()


def test_a_network_of_torchvision_is_torchvisions_own_where_images_are_rgb() -> None:
    from torchvision import models

    with seeded(1):
        ours = registry.load("model", "torchvision:resnet18")((3, 32, 32), 10).state_dict()
    with seeded(1):
        theirs = models.resnet18(num_classes=10).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_a_changed_first_layer_is_drawn_as_wide_as_torchvision_draws_it() -> None:
    make = registry.load("model", "torchvision:resnet18")
    with seeded(0):
        grey, colour = (make((channels, 32, 32), 10).conv1 for channels in (1, 3))
    assert grey.weight.shape == (64, 1, 7, 7)
    assert grey.weight.std().item() == pytest.approx(colour.weight.std().item(), rel=0.1)
    with seeded(0):
        assert torch.equal(make((1, 32, 32), 10).conv1.weight, grey.weight)


@pytest.mark.parametrize(
    ("name", "shape"), [("alexnet", (3, 32, 32)), ("squeezenet1_1", (1, 8, 8)), ("vit_b_32", (3, 32, 64))]
)
def test_a_network_for_larger_images_says_so_in_one_sentence(name: str, shape: tuple[int, int, int]) -> None:
    size = "x".join(map(str, shape))
    said = rf"^The network 'torchvision:{name}' cannot take images of {size} \(.+\)\.$"
    with pytest.raises(KdbenchError, match=said):
        registry.load("model", f"torchvision:{name}")(shape, 10)


def test_a_vision_transformer_is_made_for_the_side_of_the_images() -> None:
    network = registry.load("model", "torchvision:vit_b_32")((3, 32, 32), 10).eval()
    with torch.no_grad():
        assert network(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_a_network_of_torchvision_has_the_digest_of_the_file_that_makes_it() -> None:
    digests = {source_digest(registry.load("model", f"torchvision:{name}")) for name in ("resnet18", "alexnet")}
    assert digests == {source_digest(registry.find("model", "torchvision").load())}


# In a suite


def test_a_wrong_argument_in_a_suite_file_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(TINY.replace('network = "mini-8"', 'network = "torchvision:resnt18"', 1))
    line = file.read_text().splitlines().index('network = "torchvision:resnt18"') + 1
    with pytest.raises(KdbenchError, match=rf"line {line}: There is no model 'resnt18' in torchvision\. Did you mean"):
        suites.load(str(file))


def test_an_attack_may_train_a_network_of_torchvision(tiny: Callable[..., Suite], tmp_path: Path) -> None:
    cells = run(tiny({**ONE_CELL, "student.networks": ["torchvision:shufflenet_v2_x0_5"]}), tmp_path)
    [cell] = cells.values()
    assert (cell.status, cell.reason, cell.student) == (Status.DONE, "", "torchvision:shufflenet_v2_x0_5")
