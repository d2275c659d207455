"""Tokens that a mask leaves out: as if they were not there, whatever they hold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from slabformer import PRepBN, RepBN, set_token_mask, token_mask
from slabformer.nn.controls import TokenMask, repbn_modules
from small_norms import MASK, C, trained
from tolerances import ALGEBRA, EXACT, FLOAT32, assert_close


@pytest.mark.parametrize("mask", [None, MASK], ids=["no_mask", "mask"])
def test_gradients_match_finite_differences(mask: Tensor | None) -> None:
    norm = trained()
    norm.token_mask = mask
    x = torch.randn(2, 4, C, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, weight: Tensor, bias: Tensor, eta: Tensor) -> Tensor:
        return torch.func.functional_call(norm, {"weight": weight, "bias": bias, "eta": eta}, (x,))

    assert torch.autograd.gradcheck(run, (x, norm.weight, norm.bias, norm.eta))


def test_masked_tokens_count_as_dropped() -> None:
    norm, dropped = trained(), trained()
    x = torch.randn(2, 4, C, dtype=torch.float64, requires_grad=True)
    valid = x.detach()[MASK].requires_grad_()
    with token_mask(norm, MASK):
        y = norm(x)
    expected = dropped(valid)
    y[MASK].square().sum().backward()
    expected.square().sum().backward()
    assert_close(y[MASK], expected, ALGEBRA)
    assert_close(x.grad[MASK], valid.grad, ALGEBRA)
    assert not x.grad[~MASK].any()
    for name, parameter in norm.named_parameters():
        assert_close(parameter.grad, dropped.get_parameter(name).grad, ALGEBRA)
    assert_close(norm.running_mean, dropped.running_mean, ALGEBRA)
    assert_close(norm.running_var, dropped.running_var, ALGEBRA)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
def test_what_padding_holds_does_not_leak(garbage: float) -> None:
    norm, clean = trained(dtype=torch.float32), trained(dtype=torch.float32)
    x = torch.randn(2, 4, C)
    results = []
    for module, fill in ((norm, garbage), (clean, 0.0)):
        leaf = x.masked_fill(~MASK.unsqueeze(-1), fill).requires_grad_()
        with token_mask(module, MASK):
            y = module(leaf)
        y[MASK].square().sum().backward()
        results.append([y[MASK], leaf.grad, module.weight.grad, module.bias.grad, module.eta.grad])
        results[-1] += [module.running_mean, module.running_var]
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs, EXACT)


@pytest.mark.parametrize("num_valid", [0, 1])
@pytest.mark.parametrize("momentum", [0.1, None], ids=["momentum", "average"])
def test_fewer_than_two_valid_tokens_teach_nothing(num_valid: int, momentum: float | None) -> None:
    norm = RepBN(C, momentum=momentum)
    x = torch.randn(2, 4, C)
    norm(x)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    mask = torch.zeros(2, 4, dtype=torch.bool)
    mask.view(-1)[:num_valid] = True
    with token_mask(norm, mask):
        assert norm(x)[mask].isfinite().all()
    for name, value in norm.state_dict().items():
        assert_close(value, before[name], EXACT)


def test_all_true_mask_is_no_mask() -> None:
    masked, plain = trained(), trained()
    x = torch.randn(2, 4, C, dtype=torch.float64)
    with token_mask(masked, torch.ones(2, 4, dtype=torch.bool)):
        assert_close(masked(x), plain(x), ALGEBRA)
    assert_close(masked.running_var, plain.running_var, ALGEBRA)


def test_mask_of_another_shape_is_refused() -> None:
    norm = RepBN(C)
    with token_mask(norm, MASK), pytest.raises(ValueError, match="does not fit tokens"):
        norm(torch.zeros(2, 5, C))


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.text, self.image = nn.Sequential(PRepBN(C), RepBN(C)), nn.Sequential(RepBN(C))
        self.text[0].set_gamma(0)

    def forward(self, text: Tensor, image: Tensor) -> Tensor:
        return self.text(text).mean(1) * self.image(image).mean(1)


TEXT, IMAGE = torch.randn(2, 4, C), torch.randn(2, 3, C)


def means(model: nn.Module, text: Tensor, image: Tensor) -> list[Tensor]:
    for norm in repbn_modules(model).values():
        norm.momentum = None
    model(text, image)
    return [norm.running_mean for norm in repbn_modules(model).values()]


@pytest.mark.parametrize(
    "masks",
    [{"text": MASK}, (MASK, torch.ones(2, 3, dtype=torch.bool)), (MASK, None), {"": None, "text": MASK}],
    ids=["by name", "by shape", "by shape or all", "the longest name decides"],
)
def test_each_tower_has_its_own_mask(masks: TokenMask) -> None:
    model = Towers()
    with token_mask(model, masks):
        first, second, image = means(model, TEXT, IMAGE)
    assert_close(first, TEXT[MASK].mean(0), FLOAT32)
    assert second.any()
    assert_close(image, IMAGE.mean((0, 1)), FLOAT32)


def test_masks_of_one_shape_are_told_apart_by_name() -> None:
    model = Towers()
    with token_mask(model, {"text": MASK, "image": ~MASK}):
        first, _, image = means(model, TEXT, TEXT)
    assert_close(first, TEXT[MASK].mean(0), FLOAT32)
    assert_close(image, TEXT[~MASK].mean(0), FLOAT32)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"txt": MASK}, "Towers has no RepBN under 'txt' for a token mask"),
        ({"txt": None}, "Towers has no RepBN under 'txt'"),
        ((MASK, ~MASK), r"2 token masks of shape \(2, 4\); give each by the name of its submodule"),
        ([[True]], "must be boolean, true where a token is valid, got list"),
    ],
)
def test_masks_without_a_norm_of_their_own_are_refused(masks: TokenMask, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        set_token_mask(Towers(), masks)


def test_a_model_without_norms_takes_no_mask() -> None:
    with pytest.raises(ValueError, match="Linear has no RepBN for a token mask"):
        set_token_mask(nn.Linear(2, 2), MASK)
    set_token_mask(nn.Linear(2, 2), None)


def test_a_norm_that_no_mask_fits_says_which_it_is() -> None:
    model = Towers()
    with pytest.raises(ValueError, match=r"\(2, 4\) does not fit .* \(2, 3\) at image.0"), token_mask(model, MASK):
        model(TEXT, IMAGE)


def test_a_mask_that_fits_no_norm_is_an_error_when_its_block_ends() -> None:
    model = Towers()
    idle = torch.ones(2, 9, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"\(2, 9\) fitted no norm"), token_mask(model, (MASK, idle, None)):
        model(TEXT, IMAGE)
    assert all(norm.token_mask is None for norm in repbn_modules(model).values())
    with token_mask(model.eval(), (MASK, idle)):
        model(TEXT, IMAGE)  # in eval nothing is asked


def test_a_frozen_tower_may_leave_its_mask_unused() -> None:
    model = Towers()
    model.image.eval()
    before = {name: norm.num_batches_tracked.item() for name, norm in repbn_modules(model).items()}
    with token_mask(model, {"text": MASK, "image": torch.ones(2, 3, dtype=torch.bool)}):
        model(TEXT, IMAGE)
    for name, norm in repbn_modules(model).items():
        assert norm.num_batches_tracked == before[name] + (not name.startswith("image"))


def test_tied_norms_take_the_mask_that_fits_in_either_place() -> None:
    model = Towers()
    model.image = model.text
    with token_mask(model, {"text": MASK, "image": torch.ones(2, 3, dtype=torch.bool)}):
        model(TEXT, IMAGE)
    with pytest.raises(ValueError, match=r"2 token masks of shape \(2, 4\) for text.0.rep, which lies under several"):
        set_token_mask(model, {"text": MASK, "image": ~MASK})


def test_tokens_of_another_kind_are_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    model = Towers()
    set_token_mask(model, (MASK, None))
    model(TEXT, IMAGE)
    model(TEXT, IMAGE)
    (record,) = caplog.records
    assert record.getMessage().startswith("all tokens of shape (2, 3) at image.0 count for its statistics")


@pytest.mark.parametrize(
    "shape", [(8, C), (2, 4, 3, C), (8, 3, C)], ids=["flat", "heads behind tokens", "flat with heads"]
)
def test_a_mask_fits_tokens_that_were_flattened_or_split_into_heads(shape: tuple[int, ...]) -> None:
    norm = RepBN(C, momentum=None)
    x = torch.randn(shape)
    with token_mask(norm, MASK):
        norm(x)
    valid = MASK.flatten()[:, None].expand(8, x.numel() // C // 8).flatten()
    assert_close(norm.running_mean, x.reshape(-1, C)[valid].mean(0), FLOAT32)
