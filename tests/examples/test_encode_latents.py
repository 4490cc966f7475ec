"""The script that encodes, alone and launched as two processes, and the trainer's use of what it leaves."""

import argparse
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from helpers import EXAMPLES, ROOT, content_of, tiny_vae, write_table
from processes import run_processes

from diffusers_mp.data.latents import LatentDataset


pytestmark = pytest.mark.usefixtures("examples_run_here")


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    tiny_vae().save_pretrained(folder)
    return folder


@pytest.fixture
def arguments(image_folder, vae_folder, tmp_path):
    return [
        *("--train_data_dir", str(image_folder)),
        *("--vae", str(vae_folder)),
        *("--cache_dir", str(tmp_path / "cache")),
        *("--resolution", "16"),
        *("--shard_size", "3"),
        "--random_flip",
        "--latents_dir",
    ]


def encode(*arguments):
    import encode_latents

    encode_latents.main(encode_latents.parse_args(list(map(str, arguments))))


def test_two_launched_processes_leave_what_one_leaves(arguments, tmp_path, capsys):
    encode(*arguments, tmp_path / "one")
    said = capsys.readouterr().out
    assert "\n10 images encoded in 4 shards" in said
    assert ["device", "encoding", "output"] == [
        line.split()[0] for line in said.splitlines() if line.startswith(("device ", "encoding ", "output "))
    ]
    command = f"python examples/train_mpdit.py --latents_dir {tmp_path / 'one'} --random_flip --output_dir run"
    assert said.endswith(f"\nNext: {command}\n")
    printed = run_processes(EXAMPLES / "encode_latents.py", *arguments, tmp_path / "two")
    assert printed.count("10 images encoded in 4 shards") == 1
    assert content_of(tmp_path / "two") == content_of(tmp_path / "one")


def test_streaming_and_verifying(arguments, image_data, tmp_path, capsys):
    encode(*arguments, tmp_path / "whole")
    table = ["--dataset_name", write_table(image_data[0], tmp_path / "table"), *arguments[2:]]
    encode(*table, tmp_path / "stream", "--streaming", "--dataloader_num_workers", "2")
    whole, stream = LatentDataset(tmp_path / "whole"), LatentDataset(tmp_path / "stream")
    assert stream.index["content_hash"] == whole.index["content_hash"]
    encode("--latents_dir", tmp_path / "stream", "--verify")
    assert "10 images unaltered in 4 shards" in capsys.readouterr().out
    alter(tmp_path / "stream" / "shard-00002.safetensors")
    with pytest.raises(ValueError, match="differ from what was written: shard-00002.safetensors"):
        encode("--latents_dir", tmp_path / "stream", "--verify")


def test_a_list_says_what_there_is_and_stops(image_folder, tmp_path, capsys):
    (tmp_path / "images").symlink_to(image_folder)
    encode("--train_data_dir", tmp_path / "images", "--list")
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path / 'images'}: 10 images, classes are the only level of folders",
        "3 classes: cat (4), dog (3), test (3)",
        "warning: classes are called as splits are: test",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def alter(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_processes_that_did_not_join_are_refused(arguments, tmp_path, monkeypatch):
    import encode_latents

    alone = SimpleNamespace(num_processes=1, process_index=0)
    monkeypatch.setattr(encode_latents, "Accelerator", lambda: alone)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="launched as 2 processes, but Accelerate runs 1: each would encode every"):
        encode(*arguments, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_flags_are_the_trainers_own(tmp_path):
    import encode_latents
    import train_mpdit

    own = vars(encode_latents.parse_args(["--latents_dir", "a"]))
    trainer = ["--train_data_dir", "a", "--latents_dir", "a", "--output_dir", str(tmp_path / "new")]
    trainers = vars(train_mpdit.parse_args(trainer)) | {"train_data_dir": None}
    shared = own.keys() - {"streaming", "shard_size", "verify", "list"}
    # The trainer takes these two from images that are encoded already, and falls back to the same defaults.
    assert {name: own[name] for name in shared} == {name: trainers[name] for name in shared}


def test_a_vae_that_is_not_there_is_named_with_its_flag(arguments, tmp_path):
    with pytest.raises(OSError, match=r"`--vae` must be .* got '.*nowhere'"):
        encode(*arguments, tmp_path / "latents", "--vae", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="`vae` must be an image autoencoder .* got MPDiTTransformer2DModel"):
        encode(*arguments, tmp_path / "latents", "--vae", ROOT / "docs" / "tiny" / "transformer")
    assert not (tmp_path / "latents").exists()


def test_a_vae_of_another_config_is_refused(arguments, vae_folder, tmp_path):
    shutil.copytree(vae_folder, tmp_path / "vae")
    config = tmp_path / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "layers_per_block": 2}))
    with pytest.raises(ValueError, match=r"`vae` must hold the weights that .*/vae lacks \d+, such as decoder"):
        encode(*arguments, tmp_path / "latents", "--vae", tmp_path / "vae")
    assert not (tmp_path / "latents").exists()


def load_latents(vae, folder, **more):
    """What the trainer does at its start, without a flag that says where the images are."""
    import train_mpdit

    wanted = {"latents_dir": str(folder), "resolution": 16, "random_flip": True} | more
    wanted |= {"train_data_dir": None, "dataset_name": None}
    process = SimpleNamespace(num_processes=1, process_index=0, device=torch.device("cpu"))
    return train_mpdit.load_latents(argparse.Namespace(**wanted), vae, process)


def test_the_trainer_opens_it_and_refuses_what_does_not_fit(arguments, tmp_path):
    encode(*arguments, tmp_path / "a")
    latents, vae = load_latents(tiny_vae(), tmp_path / "a"), tiny_vae()
    assert isinstance(latents, LatentDataset)
    assert len(latents) == 10
    with pytest.raises(ValueError, match=r"was encoded with `resolution` 16 \(now 32\)"):
        load_latents(vae, tmp_path / "a", resolution=32)
    with pytest.raises(ValueError, match="was encoded with `vae` .*weights_hash"):
        load_latents(tiny_vae(seed=1), tmp_path / "a")
    alter(tmp_path / "a" / "shard-00001.safetensors")
    with pytest.raises(ValueError, match="differ from what was written: shard-00001.safetensors"):
        load_latents(vae, tmp_path / "a")
    (tmp_path / "a" / "shard-00001.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"shard-00001.safetensors must have \d+ bytes, found 0"):
        load_latents(vae, tmp_path / "a")
