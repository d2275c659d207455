from __future__ import annotations

import copy
import pickle

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn

from slabformer import PRepBN, ProgressiveSchedule, RepBN, blended, copy_gamma_, set_token_mask, sync_norms_, token_mask
from slabformer.nn.controls import prepbn_modules, repbn_modules
from slabformer.nn.sync import StatisticsSync
from tolerances import EXACT, assert_close

C = 4
MASK = torch.tensor([[True, True, False]])


def model() -> nn.Sequential:
    tied = PRepBN(C)
    return nn.Sequential(PRepBN(C), nn.Sequential(RepBN(C)), tied, nn.Linear(C, C), tied)


def test_norms_are_listed_by_name_and_tied_ones_once() -> None:
    assert list(prepbn_modules(model())) == ["0", "2"]
    assert list(repbn_modules(model())) == ["0.rep", "1.0", "2.rep"]


def test_set_token_mask_reaches_every_norm_until_set_again() -> None:
    net = model()
    set_token_mask(net, MASK)
    assert all(norm.token_mask is not None for norm in repbn_modules(net).values())
    set_token_mask(net, None)
    assert all(norm.token_mask is None for norm in repbn_modules(net).values())


def test_token_mask_restores_what_was_there_also_after_an_error() -> None:
    net = model()
    set_token_mask(net, MASK)
    before = net[0].rep.token_mask
    with token_mask(net, ~MASK):
        assert torch.equal(net[0].rep.token_mask, ~MASK)
    with pytest.raises(RuntimeError, match="normalized_shape"), token_mask(net, ~MASK):
        net(torch.zeros(1, 3, C + 1))
    assert net[0].rep.token_mask is before


def test_integer_masks_of_tokenizers_are_taken_as_boolean() -> None:
    net = model()
    with token_mask(net, MASK.long()):
        assert torch.equal(net[0].rep.token_mask, MASK)


def test_float_mask_is_refused_because_additive_masks_mean_the_opposite() -> None:
    net = model()
    with pytest.raises(ValueError, match="must be boolean"), token_mask(net, MASK.float()):
        pass
    assert net[0].rep.token_mask is None


def test_mask_does_not_touch_eval() -> None:
    net = model().eval()
    x = torch.randn(1, 3, C)
    expected = net(x)
    with token_mask(net, MASK):
        assert_close(net(x), expected, EXACT)


def test_blended_nests_and_restores_also_after_an_error() -> None:
    net = model()
    with blended(net):
        with pytest.raises(RuntimeError), blended(net):
            net(torch.zeros(1, 3, C + 1))
        assert net[0].blend_in_eval
    assert not net[0].blend_in_eval


def test_sync_without_ranks_changes_nothing_and_copies_with_the_model() -> None:
    net = model()
    sync_norms_(net)
    copied = copy.deepcopy(net)
    assert copied[0].rep.sync is net[0].rep.sync is not None
    plain = model()
    plain.load_state_dict(net.state_dict())
    x = torch.randn(2, 3, C)
    assert_close(net(x), plain(x), EXACT)
    with pytest.raises(ValueError, match="more than one token"):
        net[1](torch.randn(1, 1, C))
    sync_norms_(net, enabled=False)
    assert net[0].rep.sync is None


def test_a_group_that_saving_lost_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    for group in (None, object()):
        sync = pickle.loads(pickle.dumps(StatisticsSync(group)))
        assert not sync.active
        monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
        monkeypatch.setattr("torch.distributed.get_world_size", lambda group: 2)
        if group is None:
            assert sync.active
        else:
            with pytest.raises(RuntimeError, match=r"call sync_norms_\(model, process_group=...\) again"):
                _ = sync.active
        monkeypatch.undo()


def test_averaged_copy_takes_gamma_and_phase_as_they_are() -> None:
    net = nn.Sequential(nn.Linear(C, C), PRepBN(C))
    schedule = ProgressiveSchedule(net, total_steps=4, fade=0.5)
    ema = ModelEmaV3(net, decay=0.9)
    for _ in range(4):
        with torch.no_grad():
            net[0].weight.add_(1)
        schedule.step()
        ema.update(net)
    assert ema.module[1].gamma > 0  # what averaging does to it
    copy_gamma_(net, ema.module)
    assert ema.module[1].gamma == 0
    assert ema.module[1].phase == "done"
    assert ema.module[1].fuse().weight.shape == (C,)


@pytest.mark.parametrize("wrap", [lambda m: nn.Sequential(m), lambda m: torch.compile(m, backend="eager")])
def test_gamma_copies_between_differently_wrapped_models(wrap: object) -> None:
    net, target = model(), model()
    net[2].set_gamma(0.25)
    copy_gamma_(wrap(net), target)
    assert target[2].gamma == 0.25
    assert target[2].phase == "fading"


def test_copy_gamma_refuses_another_model() -> None:
    with pytest.raises(ValueError, match="2 PRepBN modules, target 1"):
        copy_gamma_(model(), nn.Sequential(PRepBN(C)))
