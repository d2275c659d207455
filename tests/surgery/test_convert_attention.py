"""Softmax attention becomes linear attention on the same projections, and comes near what it was."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slabformer as sf
from slabformer.nn.converted_attention import ConvertedLinearAttention, Place
from slabformer.surgery.attention_start import Seen, start_
from slabformer.surgery.outputs import tensors_of
from slabformer.surgery.reasons import Reason
from slabformer.surgery.recognise_attention import find_attentions
from tolerances import FLOAT32, assert_close

timm = pytest.importorskip("timm", reason="its models are the subjects")
SIZE = 32


def vit(**changes: Any) -> nn.Module:
    settings = {"img_size": SIZE, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    torch.manual_seed(0)
    return timm.models.VisionTransformer(**settings | changes).eval()


def images(count: int = 3, size: int = SIZE) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 3, size, size, generator=generator) for _ in range(count)]


def stock(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="its models are the subjects")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = getattr(transformers, f"{kind}Config")(image_size=SIZE, patch_size=4, **sizes)
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}Model")(config).eval()


@pytest.fixture(scope="module")
def aligned() -> tuple[nn.Module, nn.Module, dict[str, float], dict[str, float]]:
    """Teacher, student, and errors after the start and after training."""
    teacher = vit()
    student = copy.deepcopy(teacher)
    sf.convert_attention_(student)
    start = sf.align_attention_(student, teacher, images(), steps=0)
    trained = sf.align_attention_(student, teacher, images(), steps=40)
    return teacher, student, start, trained


@pytest.mark.parametrize(
    ("model", "prefix"),
    [
        (lambda: vit(), 1),
        (lambda: vit(reg_tokens=2), 3),
        (lambda: vit(class_token=False, global_pool="avg"), 0),
        (lambda: stock("ViT"), 1),
        (lambda: stock("DeiT"), 2),
        (lambda: stock("Dinov2"), 1),
        (lambda: stock("Dinov2WithRegisters"), 5),
        (lambda: stock("Beit"), 1),
        (lambda: stock("CLIPVision"), 1),
        (lambda: stock("SiglipVision"), 0),
    ],
    ids=["timm", "registers", "pooled", "vit", "deit", "dinov2", "dinov2_registers", "beit", "clip", "siglip"],
)
def test_models_of_timm_and_transformers_convert(model: Any, prefix: int) -> None:
    model = model()
    before = model.state_dict()
    names = sf.convert_attention_(model)
    assert len(names) == 2
    assert not names.left
    for name in names:
        new = model.get_submodule(name)
        assert isinstance(new, ConvertedLinearAttention)
        assert (new.grid_size, new.num_prefix_tokens) == ((8, 8), prefix)
    kept = model.state_dict()
    assert all(torch.equal(kept[name], value) for name, value in before.items()), "projections keep names and values"
    assert {name.rpartition(".")[2] for name in kept.keys() - before.keys()} <= {
        *("positional_encoding", "prefix_encoding", "weight", "bias")
    }
    model.train()
    output = model(images(1)[0])
    (output if isinstance(output, Tensor) else output[0]).square().mean().backward()
    assert all(model.get_submodule(name).dwc.weight.grad is not None for name in names)


@pytest.mark.parametrize("by", ["softmax", "linear"])
def test_attention_is_the_formula(by: Any) -> None:
    """ReLU features, table on the keys, one normaliser, depthwise convolution on the patches alone."""
    model = vit(reg_tokens=1)
    sf.convert_attention_(model, plan=["blocks.0.attn"], prefix_attention=by)
    attention = model.blocks[0].attn
    for parameter in (attention.positional_encoding, attention.prefix_encoding, attention.dwc.weight):
        nn.init.normal_(parameter)
    x = torch.randn(2, 66, 32)
    q, k, v = (t.unflatten(-1, (2, 16)).transpose(1, 2) for t in attention.qkv(x).chunk(3, -1))
    exact = (q[:, :, :2] @ k.transpose(2, 3) / 4).softmax(-1) @ v
    table = torch.cat([attention.prefix_encoding, attention.positional_encoding], 1)
    q, k = q.relu(), (k + table.unflatten(-1, (2, 16)).transpose(1, 2)).relu()
    weights = q @ k.transpose(2, 3)
    expected = weights / (weights.sum(-1, keepdim=True) + 1e-6) @ v
    if by == "softmax":
        expected[:, :, :2] = exact
    maps = v[:, :, 2:].transpose(2, 3).reshape(2, 32, 8, 8)
    expected[:, :, 2:] += attention.dwc(maps).unflatten(1, (2, 16)).flatten(3).transpose(2, 3)
    expected = attention.proj(expected.transpose(1, 2).flatten(2))
    assert_close(attention(x), expected, FLOAT32)


@pytest.mark.parametrize(
    "model",
    [lambda: vit(), lambda: vit(reg_tokens=2, qk_norm=True), lambda: stock("Dinov2"), lambda: eva()],
    ids=["timm", "registers", "dinov2", "eva"],
)
def test_tokens_in_front_attend_as_they_did(model: Any) -> None:
    teacher = model()
    student = copy.deepcopy(teacher)
    (name, *_) = sf.convert_attention_(student)
    old, new = teacher.get_submodule(name), student.get_submodule(name)
    rope = {"rope": student.rope.get_embed()} if hasattr(student, "rope") else {}
    x, prefix = torch.randn(2, 64 + new.num_prefix_tokens, 32), new.num_prefix_tokens
    with torch.no_grad():
        ours, theirs = (tensors_of(each(x, **rope))[0] for each in (new, old))
    assert_close(ours[:, :prefix], theirs[:, :prefix], FLOAT32)
    assert not torch.allclose(ours[:, prefix:], theirs[:, prefix:], rtol=0.1)


def test_tokens_in_front_see_no_padding() -> None:
    model = vit()
    sf.convert_attention_(model)
    attention, x = model.blocks[0].attn, torch.randn(3, 65, 32)
    mask = torch.rand(3, 65) < 0.7
    mask[1], mask[2, :] = True, False
    other = x.masked_fill(~mask[..., None], 9.0)
    other[:, 0] = x[:, 0]
    first, second = (attention(each, attn_mask=mask)[:, 0] for each in (x, other))
    assert_close(first, second, FLOAT32)
    assert_close(first[1], attention(x)[1, 0], FLOAT32)
    assert_close(first[2], attention.proj(torch.zeros(32)), FLOAT32)  # nothing to attend to


def test_alignment_brings_attention_near_its_teacher(aligned: Any) -> None:
    teacher, student, start, trained = aligned
    untouched = copy.deepcopy(teacher)
    sf.convert_attention_(untouched)
    x = images(1)[0]

    def distance(model: nn.Module) -> float:
        with torch.no_grad():
            return float((model.forward_features(x) - teacher.forward_features(x)).square().mean())

    assert set(start) == {"blocks.0.attn", "blocks.1.attn"}
    assert all(trained[name] < 0.9 * start[name] for name in start)
    assert distance(student) < distance(untouched)


def test_training_that_makes_it_worse_is_undone(aligned: Any, caplog: pytest.LogCaptureFixture) -> None:
    teacher, _, start, _ = aligned
    student = copy.deepcopy(teacher)
    sf.convert_attention_(student)
    assert sf.align_attention_(student, teacher, images(), steps=3, lr=10.0) == pytest.approx(start)
    assert "it keeps its start; lower lr" in caplog.text


def test_the_start_solves_what_it_can_express() -> None:
    """Where the teacher is a linear attention with a depthwise branch, the start finds that branch."""
    teacher = vit()
    student = copy.deepcopy(teacher)
    sf.convert_attention_(student)
    attention = student.blocks[0].attn
    wanted = copy.deepcopy(attention)
    nn.init.normal_(wanted.dwc.weight, std=0.3)
    nn.init.normal_(wanted.dwc.bias)
    x = torch.randn(8, 65, 32)
    with torch.no_grad():
        start_(attention, [Seen(x, wanted.mixed(x), Place((8, 8)))])
    assert_close(attention.dwc.weight, wanted.dwc.weight, 0.05)
    assert_close(attention.dwc.bias, wanted.dwc.bias, 0.05)


def test_alignment_leaves_the_teacher_and_all_else_alone(aligned: Any) -> None:
    teacher, student, _, _ = aligned
    assert all(torch.equal(value, vit().state_dict()[name]) for name, value in teacher.state_dict().items())
    attention = ("attn.",)
    mine = {n: v for n, v in student.state_dict().items() if not any(part in n for part in attention)}
    assert all(torch.equal(value, teacher.state_dict()[name]) for name, value in mine.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in teacher.modules())
    assert all(p.grad is None for p in student.parameters())
    assert not student.training


def test_converted_attention_takes_other_image_sizes() -> None:
    model = vit(dynamic_img_size=True)
    sf.convert_attention_(model)
    assert model(images(1, 48)[0]).shape == (2, 5)


def test_norms_and_attention_go_together_and_fuse() -> None:
    model = vit()
    sf.convert_attention_(model)
    sf.convert_norms_(model)
    for norm in model.modules():
        if isinstance(norm, sf.PRepBN):
            norm.set_gamma(0)
    sf.testing.randomize_norms_(model)
    fused, report = sf.fuse(model.eval(), images(1)[0])
    assert report.num_kept == 0
    sf.verify(model, fused, images(1)[0])


def test_mixtures_are_a_matter_of_names() -> None:
    model = vit()
    assert list(sf.convert_attention_(model, plan=["blocks.1.attn"])) == ["blocks.1.attn"]
    assert type(model.blocks[0].attn).__name__ == "Attention"
    model = vit()
    assert list(sf.convert_attention_(model, lambda module, name: "0" in name)) == ["blocks.0.attn"]


def test_keys_that_are_padding_do_not_count() -> None:
    model = vit()
    sf.convert_attention_(model)
    attention, mask = model.blocks[0].attn, torch.ones(2, 65, dtype=torch.bool)
    mask[:, 50:] = False
    x = torch.randn(2, 65, 32)
    spoiled = x.masked_fill(~mask[..., None], 7.0)
    assert_close(attention(spoiled, mask)[:, :1], attention(x, mask)[:, :1], FLOAT32)


def eva(**changes: Any) -> nn.Module:
    settings = {"img_size": SIZE, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    torch.manual_seed(0)
    return timm.models.eva.Eva(**settings | {"use_rot_pos_emb": True, "use_abs_pos_emb": False} | changes).eval()


def timm_beit(**changes: Any) -> nn.Module:
    settings = {"img_size": SIZE, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    torch.manual_seed(0)
    return timm.models.beit.Beit(**settings | changes).eval()


def timm_sam() -> nn.Module:
    settings = {"img_size": SIZE, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    torch.manual_seed(0)
    windows = {"use_rel_pos": True, "window_size": 3, "global_attn_indexes": (1,), "neck_chans": 16}
    return timm.models.vision_transformer_sam.VisionTransformerSAM(**settings | windows).eval()


def stock_sam() -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="its models are the subjects")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_dim": 64, "output_channels": 8}
    windows = {"image_size": SIZE, "patch_size": 4, "window_size": 3, "global_attn_indexes": [1]}
    torch.manual_seed(0)
    model = transformers.SamVisionModel(transformers.SamVisionConfig(**sizes, **windows)).eval()
    nn.init.normal_(model.vision_encoder.patch_embed.projection.weight, std=0.2)  # as given, images are not seen
    return model


def stock_with(kind: str, **settings: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="its models are the subjects")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = getattr(transformers, f"{kind}Config")(image_size=SIZE, patch_size=4, **sizes, **settings)
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}Model")(config).eval()


WITH_POSITIONS: dict[str, tuple[Any, list[tuple[tuple[int, int], int]]]] = {
    "qk_norm": (lambda: vit(qk_norm=True), [((8, 8), 1)] * 2),
    "scale_norm": (lambda: vit(scale_attn_norm=True), [((8, 8), 1)] * 2),
    "eva": (eva, [((8, 8), 1)] * 2),
    "eva_fused": (lambda: eva(qkv_fused=False, scale_attn_inner=True), [((8, 8), 1)] * 2),
    "eva_rope": (lambda: eva(attn_type="rope", rope_rotate_half=True), [((8, 8), 1)] * 2),
    "timm_beit": (lambda: timm_beit(use_rel_pos_bias=True), [((8, 8), 1)] * 2),
    "timm_beit_shared": (lambda: timm_beit(use_shared_rel_pos_bias=True), [((8, 8), 1)] * 2),
    "timm_sam": (timm_sam, [((3, 3), 0), ((8, 8), 0)]),
    "sam": (stock_sam, [((3, 3), 0), ((8, 8), 0)]),
    "dinov3": (lambda: stock_with("DINOv3ViT", num_register_tokens=2), [((8, 8), 3)] * 2),
    "beit": (lambda: stock_with("Beit", use_relative_position_bias=True), [((8, 8), 1)] * 2),
    "beit_shared": (lambda: stock_with("Beit", use_shared_relative_position_bias=True), [((8, 8), 1)] * 2),
}


@pytest.mark.parametrize(("model", "places"), WITH_POSITIONS.values(), ids=WITH_POSITIONS)
def test_positions_and_norms_in_the_attention_convert_too(model: Any, places: Any) -> None:
    teacher = model()
    for name, parameter in teacher.named_parameters():
        if any(part in name for part in ("rel_pos", "relative_position", "q_bias", "v_bias", "_norm.")):
            nn.init.normal_(parameter, 1.0 if "norm.weight" in name else 0.0, 0.3)
        elif any(part in name for part in ("qkv.weight", "q_proj.weight", "k_proj.weight", "v_proj.weight")):
            parameter.data.mul_(5.0)  # attention that looks at something
    student = copy.deepcopy(teacher)
    names = sf.convert_attention_(student)
    assert not names.left
    found = [student.get_submodule(name) for name in names]
    assert [(each.grid_size, each.num_prefix_tokens) for each in found] == places
    x = images(1)[0]
    errors = sf.align_attention_(student, teacher, images(), steps=0)
    assert all(0 < error < 1 for error in errors.values()), "nearer than the mean"
    with torch.no_grad():
        outputs = [tensors_of(each(x))[0] for each in (student, teacher)]
    assert outputs[0].shape == outputs[1].shape
    costs = sf.audit_attention(teacher, images(), outputs=lambda model, batch: tensors_of(model(batch))[0]).costs
    assert [cost.error for cost in costs] == pytest.approx([*errors.values()], rel=1e-3)


@pytest.mark.parametrize("rotary", ["half", "interleaved"])
def test_queries_and_keys_are_turned_before_their_relu(rotary: Any) -> None:
    model = eva(rope_rotate_half=rotary == "half", attn_type="rope" if rotary == "half" else "eva", qk_norm=True)
    sf.convert_attention_(model, prefix_attention="linear")
    attention = model.blocks[0].attn
    assert attention.rotary == rotary
    nn.init.normal_(attention.dwc.weight)
    x, rope = torch.randn(2, 65, 32), model.rope.get_embed()
    q, k, v = (t.unflatten(-1, (2, 16)).transpose(1, 2) for t in attention.projected(x))
    sin, cos = rope.chunk(2, -1)

    def turned(heads: Tensor) -> Tensor:
        pairs = heads.unflatten(-1, (2, 8)) if rotary == "half" else heads.unflatten(-1, (8, 2)).transpose(-1, -2)
        angle_cos, angle_sin = (t[:, :8] if rotary == "half" else t[:, ::2] for t in (cos, sin))
        first, second = pairs[..., 1:, 0, :], pairs[..., 1:, 1, :]
        out = torch.stack([first * angle_cos - second * angle_sin, second * angle_cos + first * angle_sin], -2)
        out = out.flatten(-2) if rotary == "half" else out.transpose(-1, -2).flatten(-2)
        return torch.cat([heads[..., :1, :], out], -2)

    plain = attention.q_norm, attention.k_norm
    assert not any(isinstance(norm, nn.Identity) for norm in plain)
    weights = turned(q).relu() @ turned(k).relu().transpose(2, 3)
    mixed = (weights / (weights.sum(-1, keepdim=True) + 1e-6) @ v).transpose(1, 2).flatten(2)
    v_maps = v[:, :, 1:].transpose(2, 3).reshape(2, 32, 8, 8)
    mixed[:, 1:] += attention.dwc(v_maps).flatten(2).transpose(1, 2)
    assert_close(attention(x, rope=rope), attention.outgoing(mixed), FLOAT32)


def test_maps_that_are_no_square_keep_their_grid() -> None:
    model = timm_sam()
    sf.convert_attention_(model)
    attention = model.blocks[1].attn
    nn.init.normal_(attention.dwc.weight)
    x = torch.randn(1, 4, 16, 32)
    expected = attention.outgoing(attention.mixed(x.flatten(1, 2), place=Place((4, 16))))
    assert_close(attention(x), expected.unflatten(1, (4, 16)), FLOAT32)


def test_a_tower_of_text_is_left_beside_one_of_images() -> None:
    transformers = pytest.importorskip("transformers", reason="its models are the subjects")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    vision = {**sizes, "image_size": SIZE, "patch_size": 4}
    model = transformers.CLIPModel(
        transformers.CLIPConfig(text_config={**sizes, "vocab_size": 50}, vision_config=vision)
    )
    names = sf.convert_attention_(model)
    assert list(names) == ["vision_model.encoder.layers.0.self_attn"]
    assert [left.code for left in names.left] == [Reason.NO_GRID]


@pytest.mark.parametrize(
    ("model", "code"),
    [
        (lambda: vit(attn_layer="diff"), Reason.NOT_SOFTMAX_ATTENTION),
        (
            lambda: timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1), embed_dim=24),
            Reason.FEW_KEYS,
        ),
        (lambda: timm.create_model("pvt_v2_b0"), Reason.FEW_KEYS),
    ],
    ids=["diff", "swin", "pvt"],
)
def test_what_is_more_than_softmax_attention_is_left_with_a_reason(model: Any, code: Reason) -> None:
    model = model()
    _, left = find_attentions(model)
    assert {attention.code for attention in left} == {code}
    with pytest.raises(ValueError, match=f"^no softmax attention .* to convert; {re.escape(str(left[0]))}"):
        sf.convert_attention_(model)


def test_what_cannot_be_converted_or_aligned_is_said() -> None:
    teacher, student = vit(), vit()
    with pytest.raises(ValueError, match="no softmax attention of Linear to convert"):
        sf.convert_attention_(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"names 1 attention that the model .* \(first: 'blocks.7.attn'\)"):
        sf.convert_attention_(student, plan=["blocks.7.attn"])
    assert type(student.blocks[0].attn).__name__ == "Attention"
    with pytest.raises(ValueError, match="no converted attention; call convert_attention_"):
        sf.align_attention_(student, teacher, images())
    wrapped = nn.Sequential(student.blocks)
    with pytest.raises(ValueError, match=r"does not say how its tokens lie; pass grid_size="):
        sf.convert_attention_(wrapped)
    assert len(sf.convert_attention_(wrapped, grid_size=(8, 8), num_prefix_tokens=1)) == 2
    student = vit()
    sf.convert_attention_(student)
    with pytest.raises(ValueError, match=r"the teacher has no softmax attention 'blocks.0.attn'"):
        sf.align_attention_(student, student, images())
    with pytest.raises(ValueError, match="there was no batch"):
        sf.align_attention_(student, teacher, [])
    with pytest.raises(ValueError, match=r"outputs of the teacher's blocks.0.attn are not finite"):
        sf.align_attention_(student, teacher, [torch.full((1, 3, SIZE, SIZE), float("nan"))])
    with pytest.raises(ValueError, match="linear attention takes tokens and a mask of keys, got is_causal"):
        student.blocks[0].attn(torch.randn(1, 65, 32), is_causal=True)
