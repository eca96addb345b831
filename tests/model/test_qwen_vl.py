import json
import logging

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessor
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding

from permlab.config.build import build
from permlab.config.schema import CONF
from permlab.data.spec import DataSpec
from permlab.model.qwen_vl import QwenVl

IMAGES = DataSpec(kind="image", num_classes=5, channels=3, height=16, width=24)
TEXT = DataSpec(kind="text", num_classes=40, channels=1, height=1, width=12)
IMAGE_TOKEN = 39


def qwen_vl(spec=IMAGES, **changes):
    options = {"patch_size": 2 if spec.kind == "image" else 1, "merge_size": 2, "width": 32, "depth": 2}
    options |= {"num_heads": 2, "num_kv_heads": 1, "mlp_width": 40, "norm_eps": 1e-6, "rope_theta": 1000.0}
    options |= {"vision_width": 16, "vision_depth": 2, "vision_heads": 2, "vision_mlp_width": 20}
    options |= {"tie_embeddings": False}
    return QwenVl(spec, **(options | changes))


def scatter(model):
    """Weights large enough for every part to show."""
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name or "ln_q" in name else 0.0, std=0.2)
    return model


def transformers_model(*, tied=False, full=(1,), **vision):
    vision = {
        "depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 20, "in_channels": 3, "patch_size": 2,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 16, "out_hidden_size": 32,
        "fullatt_block_indexes": list(full),
    } | vision  # fmt: skip
    text = {
        "vocab_size": 40, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-6, "bos_token_id": None,
        "eos_token_id": None, "use_cache": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [2, 3, 3]},
    }  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=tied, image_token_id=IMAGE_TOKEN,
        video_token_id=38, vision_start_token_id=37, vision_end_token_id=36, attn_implementation="eager",
    )  # fmt: skip
    return scatter(Qwen2_5_VLForConditionalGeneration(config)).eval()


def transformers_features(oracle, images, *, patch_size=2):
    """transformers' own features of the last token of a sequence that is nothing but an image."""
    processor = Qwen2VLImageProcessor(
        patch_size=patch_size, temporal_patch_size=2, merge_size=2, do_resize=False, do_rescale=False,
        do_normalize=False, do_convert_rgb=False,
    )  # fmt: skip
    found = processor(list(images), return_tensors="pt")
    num_tokens = int(found["image_grid_thw"][0].prod()) // 4
    tokens = torch.full((len(images), num_tokens), IMAGE_TOKEN)
    output = oracle.model(input_ids=tokens, mm_token_type_ids=torch.ones_like(tokens).int(), **found)
    return output.last_hidden_state[:, -1]


def take_weights(model, oracle):
    """Load transformers' weights, which have the same names."""
    state = {key.removeprefix("model."): value for key, value in oracle.state_dict().items()}
    report = model.load_state_dict(state, strict=False)
    assert set(report.missing_keys) <= {"head.weight", "head.bias"}
    return model


@pytest.mark.parametrize(
    ("height", "width", "vision_depth", "full"),
    [
        (8, 8, 2, [1]),  # less than a window
        (16, 32, 2, [1]),  # two whole windows
        (24, 20, 3, [2]),  # windows of three sizes
        (16, 32, 9, [7, 8]),  # every eighth block and the last see the whole image
    ],
)
def test_on_images_it_is_transformers_own_model(height, width, vision_depth, full):
    spec = DataSpec(kind="image", num_classes=5, channels=3, height=height, width=width)
    oracle = transformers_model(depth=vision_depth, full=full)
    model = take_weights(qwen_vl(spec, vision_depth=vision_depth), oracle)
    images = torch.randn(3, 3, height, width)
    assert (model.height, model.width) == (height // 4, width // 4)
    items = model.embed(images)
    assert items.shape == (3, height * width // 16, 32)
    features = transformers_features(oracle, images)
    assert features.std() > 0.1
    torch.testing.assert_close(model.encode(items), features, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(images), model.head(features), rtol=1e-4, atol=1e-4)


def test_one_pixel_patches_of_one_channel():
    spec = DataSpec(kind="image", num_classes=5, channels=1, height=8, width=12)
    oracle = transformers_model(patch_size=1, in_channels=1, window_size=8)
    model = take_weights(qwen_vl(spec, patch_size=1), oracle)
    images = torch.randn(2, 1, 8, 12)
    assert (model.height, model.width, model.num_items) == (4, 6, 24)
    # Written out by hand: the processor knows colour images only.
    patches = torch.stack([
        image[0, 2 * row + r, 2 * column + c].repeat(2)
        for image in images for row in range(4) for column in range(6) for r in range(2) for c in range(2)
    ])  # fmt: skip
    expected = oracle.model.visual(patches, grid_thw=torch.tensor([[1, 8, 12]] * 2)).pooler_output
    torch.testing.assert_close(model.embed(images).flatten(0, 1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_on_tokens_it_is_transformers_own_model(tied):
    oracle = transformers_model(tied=tied)
    model = qwen_vl(TEXT, tie_embeddings=tied)
    state = {key.removeprefix("model."): value for key, value in oracle.state_dict().items() if "visual" not in key}
    state["head.weight"] = state.pop("lm_head.weight")
    model.load_state_dict(state)
    assert (model.head.weight is model.language_model.embed_tokens.weight) == tied
    tokens = torch.randint(36, (3, 12))
    assert model.num_items == 12
    torch.testing.assert_close(model(tokens), oracle(tokens).logits, rtol=1e-4, atol=1e-4)


def test_the_last_slot_hears_all_items_and_knows_their_order():
    model = scatter(qwen_vl())
    items = torch.randn(2, 24, 32, requires_grad=True)
    features = model.encode(items)
    (grad,) = torch.autograd.grad(features.square().sum(), items)
    assert (grad.abs().amax(-1) > 0).all()
    order = torch.cat([torch.randperm(23), torch.tensor([23])])  # the last item stays last
    assert (model.encode(items[:, order]) - features).abs().max() > 1e-2


def test_a_slot_of_a_text_hears_only_of_those_before_it():
    model = scatter(qwen_vl(TEXT))
    items = torch.randn(1, 12, 32, requires_grad=True)
    (grad,) = torch.autograd.grad(model.encode(items)[0, 5].square().sum(), items)
    reached = grad[0].abs().amax(-1)
    assert (reached[:6] > 0).all()
    assert (reached[6:] == 0).all()


def test_images_of_a_batch_do_not_meet():
    model, images = scatter(qwen_vl()), torch.randn(3, 3, 16, 24)
    alone = torch.cat([model(image.unsqueeze(0)) for image in images])
    torch.testing.assert_close(model(images), alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("head_width", "sections"), [(128, [16, 24, 24]), (16, [2, 3, 3]), (12, [2, 2, 2])])
def test_wavelengths_are_shared_out_as_published(head_width, sections):
    model = qwen_vl(width=2 * head_width, depth=1)
    rotation = model.language_model.rotary_emb
    assert rotation.mrope_section == sections
    if head_width == 128:  # transformers' own value where a configuration names none
        config = type(model.language_model.config)()
        assert Qwen2_5_VLRotaryEmbedding(config).mrope_section == sections


@pytest.mark.parametrize("spec", [IMAGES, TEXT])
def test_gradients_reach_every_parameter(spec):
    model = qwen_vl(spec)
    inputs = torch.rand(3, 3, 16, 24) if spec is IMAGES else torch.randint(40, (3, 12))
    model(inputs).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []


@pytest.mark.parametrize("spec", [IMAGES, TEXT])
def test_the_seed_fixes_the_weights(spec):
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(qwen_vl(spec).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("spec", [IMAGES, TEXT])
def test_transformers_has_nothing_to_complain_about(spec):
    complaints = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = complaints.append
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        qwen_vl(spec)(torch.rand(2, 3, 16, 24) if spec is IMAGES else torch.randint(40, (2, 12)))
    finally:
        logger.removeHandler(handler)
    assert [record.getMessage() for record in complaints] == []


def test_bfloat16():
    model, images = qwen_vl(), torch.rand(3, 3, 16, 24)
    expected = model(images)
    frequencies = model.language_model.rotary_emb.inv_freq, model.visual.rotary_pos_emb.inv_freq
    result = model.bfloat16()(images.bfloat16())
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.float(), expected, atol=0.05, rtol=0.05)
    # Rounded angles would be wrong in late slots.
    kept = model.language_model.rotary_emb.inv_freq, model.visual.rotary_pos_emb.inv_freq
    assert all(torch.equal(*pair) and pair[0].dtype == torch.float32 for pair in zip(kept, frequencies, strict=True))


def preset(name, spec, **changes):
    with initialize_config_dir(str(CONF / "model"), version_base="1.3"):
        settings = OmegaConf.to_container(compose(name))
    return build("model", settings | changes, spec)


def test_the_preset_has_the_published_size():
    text = DataSpec(kind="text", num_classes=151936, channels=1, height=1, width=2048)
    image = DataSpec(kind="image", num_classes=1, channels=3, height=224, width=224)
    with torch.device("meta"):
        language, whole = preset("qwen2_5_vl_3b", text, patch_size=1), preset("qwen2_5_vl_3b", image)
    num_language = sum(parameter.numel() for parameter in language.parameters())
    num_tower = sum(parameter.numel() for parameter in whole.visual.parameters())
    assert num_language == 3_085_938_688  # Qwen2.5-3B
    assert num_language + num_tower == 3_754_622_976
    assert (whole.height, whole.width) == (8, 8)
    assert whole.visual.config.window_size == 112
    assert list(whole.visual.config.fullatt_block_indexes) == [7, 15, 23, 31]
    # Everything but the table of tokens, and a head in its place.
    num_whole = sum(parameter.numel() for parameter in whole.parameters())
    assert num_whole == 3_754_622_976 - 151936 * 2048 + 2048 + 1


def test_the_small_preset():
    digits = DataSpec(kind="image", num_classes=10, channels=1, height=8, width=8)
    model = preset("qwen_vl_nano", digits, patch_size=1)
    assert (model.height, model.width) == (4, 4)
    assert sum(parameter.numel() for parameter in model.parameters()) == 30_810


# Pretrained weights


def save(folder, **how):
    oracle = transformers_model(tied=how.pop("tied", False))
    oracle.save_pretrained(folder, **how)
    return oracle


@pytest.mark.parametrize("names", ["published", "current"])
@pytest.mark.parametrize("max_shard_size", ["8KB", "1GB"])
def test_pretrained_weights(names, max_shard_size, tmp_path):
    oracle = save(tmp_path, tied=True, max_shard_size=max_shard_size)
    if names == "current":  # transformers writes the names of the published files, and uses others inside
        for file in tmp_path.glob("*.safetensors"):
            state = load_file(file)
            assert not any("language_model" in key for key in state)
            renamed = {key: "model." + key if key.startswith("visual.") else key for key in state}
            renamed |= {key: key.replace("model.", "model.language_model.", 1) for key in state if key[:6] == "model."}
            save_file({renamed[key]: value for key, value in state.items()}, file)
    tokens, images = torch.randint(36, (3, 12)), torch.randn(2, 3, 16, 24)
    text = qwen_vl(TEXT, pretrained=str(tmp_path), tie_embeddings=True)
    torch.testing.assert_close(text(tokens), oracle(tokens).logits, rtol=1e-5, atol=1e-5)
    model = qwen_vl(pretrained=str(tmp_path))
    torch.testing.assert_close(model.encode(model.embed(images)), transformers_features(oracle, images))
    assert model(images).shape == (2, 5)


@pytest.mark.parametrize(
    ("spec", "change", "message"),
    [
        (IMAGES, {"width": 64}, "its width is 32, not 64"),
        (IMAGES, {"depth": 1}, "its depth is 2, not 1"),
        (IMAGES, {"num_kv_heads": 2}, "its num_kv_heads is 1, not 2"),
        (IMAGES, {"mlp_width": 48}, "its mlp_width is 40, not 48"),
        (IMAGES, {"norm_eps": 1e-5}, "its norm_eps is 1e-06, not 1e-05"),
        (IMAGES, {"rope_theta": 10.0}, r"its rope_theta is 1000\.0, not 10\.0"),
        (IMAGES, {"vision_width": 32}, "its vision_width is 16, not 32"),
        (IMAGES, {"vision_depth": 3}, "its vision_depth is 2, not 3"),
        (IMAGES, {"vision_heads": 4}, "its vision_heads is 2, not 4"),
        (IMAGES, {"vision_mlp_width": 24}, "its vision_mlp_width is 20, not 24"),
        (IMAGES, {"patch_size": 4}, "its patch_size is 2, not 4"),
        (IMAGES, {"merge_size": 4}, "its merge_size is 2, not 4"),
        (TEXT, {"tie_embeddings": True}, "its tie_embeddings is False, not True"),
    ],
)
def test_a_checkpoint_of_another_shape_is_refused(spec, change, message, tmp_path):
    save(tmp_path)
    with pytest.raises(ValueError, match=f"^pretrained=.*: {message}$"):
        qwen_vl(spec, pretrained=str(tmp_path), **change)


def test_a_checkpoint_for_other_data_is_refused(tmp_path):
    save(tmp_path)
    text = DataSpec(kind="text", num_classes=256, channels=1, height=1, width=12)
    with pytest.raises(ValueError, match="its vocabulary is 40, not 256"):
        qwen_vl(text, pretrained=str(tmp_path))
    grey = DataSpec(kind="image", num_classes=5, channels=1, height=16, width=24)
    with pytest.raises(ValueError, match="its number of channels is 3, not 1"):
        qwen_vl(grey, pretrained=str(tmp_path))


def test_a_tower_with_other_windows_is_refused(tmp_path):
    save(tmp_path)
    path = tmp_path / "config.json"
    settings = json.loads(path.read_text())
    for change, message in (({"window_size": 32}, "window_size is 32"), ({"fullatt_block_indexes": [0]}, "full")):
        changed = settings | {"vision_config": settings["vision_config"] | change}
        path.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=message):
            qwen_vl(pretrained=str(tmp_path))
        assert qwen_vl(TEXT, pretrained=str(tmp_path)).num_items == 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 3, "num_kv_heads": 3}, "num_heads=3 does not divide width=32"),
        ({"num_heads": 32, "num_kv_heads": 1}, "an odd head width of 1 cannot be rotated"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_kv_heads=3 does not divide num_heads=4"),
        ({"vision_heads": 3}, "vision_heads=3 does not divide vision_width=16"),
        ({"vision_heads": 8}, "its width is a multiple of four, not 2"),
        ({"patch_size": 3}, "merge_size=2 x patch_size=3: 6 does not divide a 16x24 image"),
    ],
)
def test_bad_values_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        qwen_vl(**change)
