"""Reading the latent cache; expected values are computed directly from images and a tiny AutoencoderKL."""

import json
import pickle

import pytest
import torch
from diffusers import AutoencoderKL
from helpers import encode, pixels_of, tiny_vae

from diffusers_mp.data.latents import INDEX_NAME, LatentDataset, content_hash


RESOLUTION = 16


@torch.no_grad()
def test_moments_are_those_of_the_vae_across_shard_borders(encoded, image_data, vae):
    dataset, _ = image_data
    pixels = pixels_of(dataset)
    assert [shard["num_samples"] for shard in encoded.index["shards"]] == [3, 3, 3, 1]
    assert len(encoded) == 10
    assert encoded.latent_shape == (4, 4, 4)
    for flip, variant in ((False, pixels), (True, pixels.flip(-1))):
        posterior = vae.encode(variant).latent_dist
        for index in (0, 2, 3, 5, 6, 8, 9):
            sample = encoded.read(index, flip=flip)
            # a batch of another size may sum in another order
            torch.testing.assert_close(sample["mean"], posterior.mean[index], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(sample["std"], posterior.std[index], rtol=1e-5, atol=1e-5)
            assert sample["label"] == dataset[index]["label"]
    assert not torch.allclose(encoded.read(0, flip=True)["mean"], encoded.read(0)["mean"].flip(-1), atol=1e-3)
    assert torch.equal(encoded[4]["mean"], encoded.read(4)["mean"])
    for index in (-1, 10):
        with pytest.raises(IndexError, match=r"must be in \[0, 10\)"):
            encoded[index]


def test_a_batch_is_what_its_rows_are(encoded):
    indices, flips = [9, 0, 4, 4, 2], [False, True, False, True, True]
    batch = encoded.read_batch(indices, flips)
    for row, (index, flip) in enumerate(zip(indices, flips, strict=True)):
        sample = encoded.read(index, flip=flip)
        assert {*sample} == {*batch}
        assert all(torch.equal(batch[key][row], torch.as_tensor(sample[key])) for key in sample)
    with pytest.raises(IndexError, match=r"must be in \[0, 10\), got 10"):
        encoded.read_batch([3, 10], [False, False])


def test_index_explains_itself_and_survives_reloading(encoded):
    again = LatentDataset(encoded.folder)
    index = json.loads((encoded.folder / "index.json").read_text())
    assert index["vae"]["id"] == "tiny"
    assert index["resolution"] == RESOLUTION
    assert index["skipped"] == []
    assert again.id2label == {0: "cat", 1: "dog", 2: "test"}
    assert again.latents_std == encoded.latents_std
    assert not list(encoded.folder.glob("*.unfinished"))


def test_pickled_after_reading(encoded):
    encoded[0]
    again = pickle.loads(pickle.dumps(encoded))
    assert all(torch.equal(again[index]["mean"], encoded[index]["mean"]) for index in range(10))


@pytest.mark.parametrize("key", ["mean", "std"])
def test_writing_to_a_sample_changes_nothing(encoded, key):
    before = encoded[0][key].clone()
    encoded[0][key].zero_()
    assert torch.equal(encoded[0][key], before)


def test_pixels_are_stored_as_bytes_and_mirrored_on_reading(image_data, tmp_path):
    dataset, id2label = image_data
    encoded = encode(dataset, tmp_path / "a", id2label=id2label, shard_size=4, num_workers=2)
    pixels = pixels_of(dataset)
    assert encoded.latent_shape == (3, RESOLUTION, RESOLUTION)
    for index in range(10):
        sample = encoded.read(index, flip=index % 2 == 1)
        assert set(sample) == {"mean", "label"}
        assert torch.equal(sample["mean"], pixels[index].flip(-1) if index % 2 else pixels[index])
    batch = encoded.read_batch(range(10), [index % 2 == 1 for index in range(10)])["mean"]
    assert all(torch.equal(batch[index], encoded.read(index, flip=index % 2 == 1)["mean"]) for index in range(10))
    num_bytes = sum(shard["num_bytes"] for shard in encoded.index["shards"])
    assert num_bytes < 1.2 * pixels.numel()
    expected_std, expected_mean = torch.std_mean(pixels.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(torch.tensor(encoded.latents_mean).double(), expected_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.tensor(encoded.latents_std).double(), expected_std, rtol=1e-6, atol=1e-6)
    encoded.validate(vae=None, resolution=RESOLUTION, random_flip=True)
    grey = encode(dataset, tmp_path / "b", num_channels=1)
    assert torch.equal(grey[3]["mean"], pixels_of(dataset, 1)[3])


def test_validate_accepts_a_reloaded_vae_and_names_each_difference(encoded, image_data, vae, tmp_path):
    vae.save_pretrained(tmp_path / "vae")
    reloaded = AutoencoderKL.from_pretrained(tmp_path / "vae")
    encoded.validate(vae=reloaded, resolution=RESOLUTION, random_flip=True)
    message = r'was encoded with `vae` {.*"id": "tiny".* \(now {"weights_hash": ".*"}\), `resolution` 16 \(now 32\)\.'
    with pytest.raises(ValueError, match=message):
        encoded.validate(vae=tiny_vae(seed=1), resolution=32)
    with pytest.raises(ValueError, match=r"`vae` {.*} \(now null\)"):
        encoded.validate(vae=None, resolution=RESOLUTION)
    unflipped = encode(image_data[0], tmp_path / "unflipped", vae=vae)
    with pytest.raises(ValueError, match=r"was encoded with `random_flip` false \(now true\)\. Give the same"):
        unflipped.validate(vae=vae, resolution=RESOLUTION, random_flip=True)
    with pytest.raises(ValueError, match="`flip=True` needs data encoded with `random_flip=True`"):
        unflipped.read(0, flip=True)


def test_an_unknown_format_is_refused(image_data, tmp_path):
    encode(image_data[0], tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(index | {"format_version": 99}))
    with pytest.raises(ValueError, match="`folder` must have format version 5, .* has 99"):
        LatentDataset(tmp_path)


@pytest.mark.parametrize("is_absolute", [True, False])
def test_an_index_that_names_files_elsewhere_is_refused(image_data, tmp_path, is_absolute):
    folder = tmp_path / "latents"
    encode(image_data[0], folder)
    (folder / "shard-00000.safetensors").rename(tmp_path / "mine.safetensors")
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0]["name"] = str(tmp_path / "mine.safetensors") if is_absolute else "../mine.safetensors"
    index["content_hash"] = content_hash(index)  # as one who means harm would do
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="index.json must name files and folders beside it by one plain name each"):
        LatentDataset(folder)


def test_altered_files_are_named(image_data, tmp_path):
    encode(image_data[0], tmp_path, shard_size=2).verify()
    for number in (1, 4):
        path = tmp_path / f"shard-0000{number}.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    encoded = LatentDataset(tmp_path)  # sizes are right
    with pytest.raises(ValueError, match="differ from what was written: shard-00001.safetensors, shard-00004.safe"):
        encoded.verify()
    with pytest.raises(ValueError, match="written: shard-00001.safetensors: delete"):
        encoded.verify(num_processes=2, process_index=1)
    index = json.loads((tmp_path / "index.json").read_text())
    index["latents_std"][0] *= 2
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="index.json must be as it was written, it was altered"):
        LatentDataset(tmp_path)


def test_an_index_opens_no_file_elsewhere(image_data, tmp_path):
    folder = tmp_path / "latents"
    encode(image_data[0], folder)
    index = json.loads((folder / INDEX_NAME).read_text())
    shard = index["shards"][0]
    (folder / shard["name"]).rename(tmp_path / shard["name"])
    for name in (f"../{shard['name']}", str(tmp_path / shard["name"]), "..", "nested/shard-00000.safetensors"):
        changed = index | {"shards": [shard | {"name": name}]}
        (folder / INDEX_NAME).write_text(json.dumps(changed | {"content_hash": content_hash(changed)}))
        with pytest.raises(
            ValueError, match=f"index.json must name files and folders beside it by one plain name each, got '{name}'"
        ):
            LatentDataset(folder)


@pytest.mark.parametrize("content", ["[]", "{", "", '"text"', '{"format_version": 5, "vae": 1}'])
def test_an_index_of_something_else_is_named(image_data, tmp_path, content):
    index = encode(image_data[0], tmp_path).index
    (tmp_path / INDEX_NAME).write_text(content)
    with pytest.raises(ValueError, match="index.json .*: delete the file and encode again into the same folder"):
        LatentDataset(tmp_path)
    if "vae" in content:  # no index of this data, though one might be so
        assert encode(image_data[0], tmp_path).index == index
    else:
        with pytest.raises(ValueError, match="index.json .*: delete the file and encode again into the same folder"):
            encode(image_data[0], tmp_path)
    (tmp_path / INDEX_NAME).unlink()
    assert encode(image_data[0], tmp_path).index == index
