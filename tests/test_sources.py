"""What can be had of a name, without a network and with a Hub that answers."""

import os
import subprocess
import sys
import time

import pytest
from hub_client import TOKEN, client

from diffusers_mp.sources import check_dataset_reachable, check_reachable, naming


# A port that nobody listens on.
NOWHERE = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}


def test_a_path_that_is_there_is_not_asked_for(tmp_path):
    check_reachable("vae", str(tmp_path), ["config.json"])


def test_what_is_no_id_is_no_path_either():
    with pytest.raises(FileNotFoundError, match="`vae` must be a path or an id on the Hub, as user/name, got 'a b'"):
        check_reachable("vae", "a b", ["config.json"])


def test_offline_is_said_with_the_flag_and_the_way_out(tmp_path):
    start = time.monotonic()
    with pytest.raises(
        ConnectionError, match=r"`vae` 'user/vae' is no folder .* network \(.*\): give 'none', or fetch"
    ):
        check_reachable("vae", "user/vae", ["config.json"], cache_dir=tmp_path, instead="'none'")
    with pytest.raises(ConnectionError, match=r"`dataset_name` 'user/images' is no folder here .*`train_data_dir`"):
        check_dataset_reachable("user/images", tmp_path)
    assert time.monotonic() - start < 60  # the Hub's client alone waits longer than this
    (tmp_path / "user___images").mkdir()
    check_dataset_reachable("user/images", tmp_path)
    check_dataset_reachable("parquet", tmp_path)


def test_what_is_in_the_cache_needs_no_network(tmp_path):
    commit = "0" * 40
    repo = tmp_path / "models--user--vae"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "snapshots" / commit / "vae").mkdir(parents=True)
    (repo / "snapshots" / commit / "vae" / "config.json").write_text("{}")
    check_reachable("vae", "user/vae", ["config.json", "vae/config.json"], cache_dir=tmp_path)
    with pytest.raises(ConnectionError):
        check_reachable("vae", "user/vae", ["config.json"], cache_dir=tmp_path)


def test_a_network_that_is_gone_is_asked_once(tmp_path):
    code = f"""
from diffusers_mp.sources import check_reachable
check_reachable("vae", "user/vae", ["config.json"], cache_dir={str(tmp_path)!r})
"""
    ran = subprocess.run([sys.executable, "-c", code], env={**os.environ, **NOWHERE}, capture_output=True, text=True)
    assert ran.returncode == 1
    assert "ConnectionError: `vae` 'user/vae' is no folder here" in ran.stderr
    assert "over the network ([Errno 111] Connection refused): give a folder" in ran.stderr
    assert "Retry" not in ran.stderr


@pytest.mark.slow
def test_a_hub_that_answers_is_asked_by_those_who_load(server, tmp_path):
    code = """
from diffusers_mp.sources import check_reachable
check_reachable("vae", "user/nothing", ["config.json"])
print("RESULTS null")
"""
    client(server, tmp_path / "home", code, None, HF_TOKEN=TOKEN)


@pytest.mark.parametrize(
    "error, kind, said",
    [
        (KeyError("shape"), ValueError, "`vae` cannot be 'folder': 'shape'"),
        (UnboundLocalError("act_fn"), ValueError, "`vae` cannot be 'folder': act_fn"),
        (TypeError("no list"), TypeError, "`vae` cannot be 'folder': no list"),
        (FileNotFoundError("config.json"), FileNotFoundError, "`vae` cannot be 'folder': config.json"),
        (ValueError("`vae` must be finite"), ValueError, "`vae` must be finite"),
    ],
)
def test_what_libraries_say_of_a_source_names_its_argument(error, kind, said):
    with pytest.raises(kind) as raised, naming("vae", "folder"):
        raise error
    assert str(raised.value) == said
