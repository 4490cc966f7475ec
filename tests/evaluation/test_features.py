"""Features are those of the declared model, and its description says what they depend on."""

import sys

import pytest
import torch
import transformers
from helpers import means_of_blocks

from diffusers_mp.evaluation.features import (
    FeatureExtractor,
    inception_extractor,
    load_extractor,
    prepare_pixels,
    transformers_extractor,
)


BLOCKS = FeatureExtractor(means_of_blocks, {"id": "means of blocks"})


def test_features_are_those_of_the_model(dinov2):
    extractor = transformers_extractor(dinov2)
    images = torch.randint(0, 256, (3, 3, 28, 28), dtype=torch.uint8)
    processor = transformers.BitImageProcessorPil.from_pretrained(dinov2)
    # Of the processor's own size nothing is resized or cropped: both must prepare alike.
    pixels = processor(list(images), do_resize=False, return_tensors="pt")["pixel_values"]
    assert torch.allclose(prepare_pixels(images, extractor.description["preprocessing"]), pixels, atol=1e-6)
    with torch.no_grad():
        expected = transformers.Dinov2Model.from_pretrained(dinov2).eval()(pixels).last_hidden_state[:, 0]
    features, logits = extractor(images)
    assert torch.allclose(features, expected, atol=1e-5)
    assert logits is None
    assert extractor(torch.zeros(2, 1, 9, 9, dtype=torch.uint8))[0].shape == (2, 8)


def test_the_whole_image_is_seen(dinov2):
    extractor, image = transformers_extractor(dinov2), torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    framed = image.clone()
    framed[..., :2, :] = 255
    assert not torch.allclose(extractor(image)[0], extractor(framed)[0], atol=1e-3)


def test_description_declares_what_features_depend_on(dinov2, tmp_path):
    extractor = transformers_extractor(dinov2)
    assert extractor.description["class"] == "Dinov2Model"
    assert extractor.description["preprocessing"]["size"] == [28, 28]
    assert extractor.description["preprocessing"]["resample"] == "bicubic"
    model = transformers.Dinov2Model.from_pretrained(dinov2)
    model.save_pretrained(tmp_path)
    processor = transformers.BitImageProcessorPil.from_pretrained(dinov2)
    processor.save_pretrained(tmp_path)
    # The same weights elsewhere are the same extractor; other weights, or other pixels, are not.
    assert transformers_extractor(tmp_path).fingerprint == extractor.fingerprint
    processor.resample = 2
    processor.save_pretrained(tmp_path)
    assert transformers_extractor(tmp_path).fingerprint != extractor.fingerprint
    processor.resample = 3
    processor.save_pretrained(tmp_path)
    with torch.no_grad():
        model.layernorm.bias += 1e-3
    model.save_pretrained(tmp_path)
    assert transformers_extractor(tmp_path).fingerprint != extractor.fingerprint


def test_extractors_that_would_mislead_are_refused(dinov2, tmp_path):
    config = transformers.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=16)
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    transformers.ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks \['pooler.dense.bias', 'pooler.dense.weight'\]: .* random ones"):
        transformers_extractor(tmp_path)
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"`output` must be one of \['last_hidden_state', 'pooler_output'\]"):
        transformers_extractor(dinov2, output="pooled")(images)
    with pytest.raises(ValueError, match=r"must return features of shape \(2, D\), got \(2, 5, 8\)"):
        transformers_extractor(dinov2, output="last_hidden_state")(images)


def test_an_extractor_out_of_reach_is_named(tmp_path):
    with pytest.raises(OSError, match=r"an extractor must be .* 'torch-fidelity', got '.*nowhere'"):
        load_extractor(str(tmp_path / "nowhere"))


def test_a_function_of_one_s_own(tmp_path, monkeypatch):
    source = "import torch\ndef colours(images):\n    return images.float().mean((2, 3))\nnumber = 3\n"
    (tmp_path / "my_features.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    extractor = load_extractor("my_features:colours")
    features, _ = extractor(torch.full((2, 1, 4, 4), 7, dtype=torch.uint8))
    assert features.tolist() == [[7, 7, 7]] * 2
    assert extractor.description["id"] == "my_features:colours"
    assert len(extractor.description["source_sha256"]) == 64
    with pytest.raises(ImportError, match="my_features must have a function 'number'"):
        load_extractor("my_features:number")
    # What its source does not tell.
    before = load_extractor("my_features:colours").fingerprint
    sys.modules["my_features"].colours.description = {"weights_sha256": "0123"}
    told = load_extractor("my_features:colours")
    assert told.description["weights_sha256"] == "0123"
    assert told.fingerprint != before


@pytest.mark.parametrize(
    "images, message",
    [
        (torch.zeros(2, 3, 8, 8), r"uint8 tensor of .* got torch.float32 of shape \(2, 3, 8, 8\)"),
        ([torch.zeros(3, 8, 8), torch.zeros(3, 9, 9)], "all of one size .* got list"),
        (torch.zeros(2, 4, 8, 8, dtype=torch.uint8), "must have 1 or 3 channels"),
    ],
)
def test_what_is_no_batch_of_images_is_refused(images, message):
    with pytest.raises(ValueError, match=message):
        BLOCKS(images)


def test_features_that_are_not_finite_are_refused():
    extractor = FeatureExtractor(lambda images: images[:, :, 0, 0].float() / 0, {"id": "division"})
    with pytest.raises(ValueError, match="'division' returned features that are not finite"):
        extractor(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="must name the extractor under 'id'"):
        FeatureExtractor(means_of_blocks, {})


def test_inception_needs_its_package():
    # torch-fidelity cannot be installed here: what happens without it is all that is tested.
    with pytest.raises(ImportError, match="need two packages: `pip install torch-fidelity torchvision`"):
        inception_extractor()


def test_extractors_of_another_name_or_revision_share_no_statistics():
    of_name, of_revision, of_content = (
        [FeatureExtractor(lambda images: images, {**plain, **facts}).fingerprint for facts in ({}, {changed: "other"})]
        for plain, changed in (
            ({"id": "net", "size": 224}, "id"),
            ({"id": "net", "size": 224}, "revision"),
            ({"id": "folder", "weights_sha256": "0"}, "id"),  # the same weights in another place
        )
    )
    assert of_name[0] != of_name[1]
    assert of_revision[0] != of_revision[1]
    assert of_content[0] == of_content[1]
