"""Ten images, encoded once for all modules that only read."""

import pytest
from helpers import encode, tiny_vae


@pytest.fixture(scope="session")
def vae():
    return tiny_vae()


@pytest.fixture(scope="session")
def encoded(image_data, vae, tmp_path_factory):
    dataset, id2label = image_data
    folder = tmp_path_factory.mktemp("encoded")
    options = {"random_flip": True, "batch_size": 2, "shard_size": 3}
    return encode(dataset, folder, vae=vae, id2label=id2label, vae_id="tiny", **options)
