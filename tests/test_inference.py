"""Inference answers as the model does; precision and compilation change no more than rounding."""

import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny_training import network, same, state, trained
from torch import Tensor, nn

from helpers import blobs, context
from kdbench.api import Context, Precision, Split, fit, inference, predict_logits
from kdbench.attacks.kd import kd_loss


@pytest.fixture(scope="module")
def data() -> Split:
    return blobs().train


@pytest.mark.parametrize("batch", [1, 7, 1024])
def test_predicted_logits_are_those_of_the_model_in_eval_mode_without_gradient(data: Split, batch: int) -> None:
    model = trained(data, context(data)).train()
    z = predict_logits(model, data.x.clone().requires_grad_(), batch)
    assert not z.requires_grad
    assert not model.training
    torch.testing.assert_close(z, model.eval()(data.x))


def test_predicting_logits_changes_nothing_in_the_model(data: Split) -> None:
    model = network()
    before = state(model)
    predict_logits(model, data.x)
    assert same(state(model), before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_logits_of_no_images_are_none(data: Split) -> None:
    assert predict_logits(network(), data.x[:0]).shape == (0, 3)


# Precision


def test_training_in_bf16_keeps_fp32_weights_and_learns_as_well(data: Split) -> None:
    ctx = replace(context(data, epochs=8), precision="bf16")
    model = ctx.new_student()
    fit(model, F.cross_entropy, data.x, data.y, ctx)
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    held_out = blobs().validation
    assert (predict_logits(model, held_out.x).argmax(1) == held_out.y).float().mean() > 0.9
    in_fp32 = context(data, epochs=8)
    other = in_fp32.new_student()
    fit(other, F.cross_entropy, data.x, data.y, in_fp32)
    assert not same(state(model), state(other))  # it did compute otherwise


def test_losses_get_fp32_in_bf16(data: Split) -> None:
    seen = set()

    def loss(z: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
        answers, y = target
        seen.update({z.dtype, answers.dtype})
        return F.cross_entropy(z, y)

    ctx = replace(context(data), precision="bf16")
    teacher = ctx.new_student()
    fit(ctx.new_student(), loss, data.x, (teacher, data.y), ctx)
    assert seen == {torch.float32}


# Inference


def teacher(data: Split, precision: Precision = "fp32") -> tuple[nn.Module, Context]:
    ctx = replace(context(data, epochs=2), precision=precision)
    model = ctx.new_student("mini-16")
    fit(model, F.cross_entropy, data.x, data.y, ctx)
    return model, ctx


@pytest.mark.parametrize(("precision", "room"), [("fp32", 1e-5), ("bf16", 0.03)])
def test_inference_answers_as_the_model_in_eval_mode(data: Split, precision: Precision, room: float) -> None:
    model, ctx = teacher(data, precision)
    expected = predict_logits(model, data.x)
    before = state(model.train())
    answers = inference(model, ctx)(data.x)
    assert answers.dtype == torch.float32
    assert not answers.requires_grad
    assert 0 < (answers - expected).abs().max() <= room * expected.abs().max()
    assert model.training
    assert same(state(model), before)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())


def test_inference_does_not_follow_later_changes_of_the_model(data: Split) -> None:
    model, ctx = teacher(data)
    ask = inference(model, ctx)
    before = ask(data.x)
    fit(model, F.cross_entropy, data.x, data.y, ctx)
    assert torch.equal(ask(data.x), before)


def test_inference_needs_no_images(data: Split) -> None:
    model, ctx = teacher(data)
    nobody = replace(ctx, data=data.take(torch.arange(0)))
    torch.testing.assert_close(inference(model, nobody)(data.x), predict_logits(model, data.x), rtol=1e-4, atol=1e-4)


# Compilation


@pytest.mark.slow
def test_a_compiled_network_learns_the_same(data: Split) -> None:
    """Needs a C++ compiler, as torch.compile does on a CPU."""
    if not shutil.which("g++"):
        pytest.skip("no C++ compiler")
    nets = []
    for compile_ in (False, True):
        ctx = replace(context(data, epochs=1), compile=compile_)
        ask = inference(ctx.new_student("mini-16").eval(), ctx)
        model = ctx.new_student()
        fit(model, kd_loss(4, 0.9, labelled=True), data.x, (ask, data.y), ctx)
        nets.append(model)
    for ours, theirs in zip(*(net.state_dict().values() for net in nets), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
