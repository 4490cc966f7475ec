"""What a folder is encoded to: settings that cannot be, and those that differ from the folder's."""

import pytest
import torch
from helpers import content_of, encode, tiny_vae

from diffusers_mp.data.images import load_image_dataset
from diffusers_mp.data.settings import vae_fingerprint


def test_fingerprint_tells_weights_and_configurations_apart(vae):
    same, other = vae_fingerprint(tiny_vae()), vae_fingerprint(tiny_vae(seed=1))
    assert same == vae_fingerprint(vae)
    assert other["config_hash"] == same["config_hash"]
    assert other["weights_hash"] != same["weights_hash"]
    assert vae_fingerprint(tiny_vae(in_channels=1))["config_hash"] != same["config_hash"]


@pytest.mark.parametrize("name", ["batch_size", "shard_size", "resolution"])
def test_sizes_of_nothing_leave_no_folder(image_folder, tmp_path, name):
    dataset, *_ = load_image_dataset(image_folder, cache_dir=str(tmp_path / "cache"))
    options = {name: 0}
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
        encode(dataset, tmp_path / "encoded", **options)
    assert not (tmp_path / "encoded").exists()


def test_unfit_vaes_are_refused(image_data, tmp_path, vae):
    dataset, _ = image_data
    with pytest.raises(ValueError, match="`vae` must be in float32 to encode, got torch.bfloat16"):
        encode(dataset, tmp_path, vae=tiny_vae().to(torch.bfloat16))
    with pytest.raises(ValueError, match=r"`num_channels`, .* must be 1 \(grey\) or 3 \(RGB\), got 4"):
        encode(dataset, tmp_path, vae=tiny_vae(in_channels=4))
    with pytest.raises(ValueError, match="must be a multiple of the VAE's factor 4, got 18"):
        encode(dataset, tmp_path, vae=vae, resolution=18)
    grey = encode(dataset, tmp_path / "grey", vae=tiny_vae(in_channels=1))
    assert len(grey) == 10


@pytest.mark.parametrize("finished", [True, False])
def test_a_folder_begun_with_other_settings_is_refused(image_data, tmp_path, vae, finished):
    dataset, id2label = image_data
    options = {"vae": vae, "random_flip": True, "shard_size": 4, "id2label": id2label}
    encode(dataset, tmp_path, **options)
    if not finished:
        (tmp_path / "index.json").unlink()
    before = content_of(tmp_path)
    others = [
        ({"resolution": 32}, r"`resolution` 16 \(now 32\)"),
        ({"random_flip": False}, r"`random_flip` true \(now false\)"),
        ({"shard_size": 5}, r"`shard_size` 4 \(now 5\)"),
        ({"vae": tiny_vae(seed=1)}, r"`vae` {.*weights_hash.*} \(now {.*weights_hash.*}\)"),
        (
            {"vae": None, "num_channels": 1},
            r"`vae` {.*} \(now null\), `random_flip` true \(now false\), `num_channels` 3 \(now 1\)",
        ),
        ({"id2label": None}, r"classes {.*cat.*} \(now null\)"),
        ({"id2label": {0: "cat", 1: "cow", 2: "test"}}, r'classes {"1": "dog"} \(now {"1": "cow"}\)'),
    ]
    if finished:
        others.append(({"dataset": dataset.select(range(9))}, r"number of images 10 \(now 9\)"))
    for other, message in others:
        with pytest.raises(ValueError, match=f"{tmp_path} was encoded with {message}. Give the same again, or ano"):
            encode(**{"dataset": dataset, "folder": tmp_path, **options, **other})
    assert content_of(tmp_path) == before
    encode(dataset, tmp_path, **options, batch_size=1)
    if finished:
        assert content_of(tmp_path) == before
