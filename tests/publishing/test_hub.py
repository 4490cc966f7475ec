"""Publishing: the real huggingface_hub client over HTTP against `hub_server.py`, without Xet."""

import ast
import json
import re
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from hub_client import PUSH, READ_TOKEN, TOKEN, call, client, holding, load, make_pipeline, publish, push, rewrite
from hub_server import CHUNK_SIZE, Fault, HubServer, sha256

from diffusers_mp.publishing import hub
from diffusers_mp.publishing.model_card import write_model_card


WEIGHTS = "diffusion_pytorch_model.safetensors"
PUBLISHED = {
    "README.md",
    "model_index.json",
    "sample_grid.png",
    "scheduler/scheduler_config.json",
    "training_curve.png",
    *(f"{folder}/config.json" for folder in ("transformer", "transformer_ema_0.1", "vae")),
    *(f"{folder}/{WEIGHTS}" for folder in ("transformer", "transformer_ema_0.1", "vae")),
}


# Secrets in arguments


def test_public_arguments_have_no_token():
    arguments = Namespace(
        hub_token=TOKEN, seed=3, note=f"x{TOKEN}y", paths=[Path("a"), Path(READ_TOKEN)], other="own-secret", of=None
    )
    public = hub.public_arguments(arguments, token="own-secret")
    assert "hub_token" not in public
    assert arguments.hub_token == TOKEN
    assert (public["seed"], public["of"], public["paths"][0]) == (3, None, Path("a"))
    assert public["note"] == "x[removed]y"
    assert TOKEN not in str(public)
    assert READ_TOKEN not in str(public)
    assert "own-secret" not in str(public)
    # A token of an unknown shape is known from the arguments themselves.
    assert "own-secret" not in str(hub.public_arguments({"hub_token": "own-secret", "a": "/own-secret/"}))


@pytest.mark.parametrize("report_to", ["wandb", "all", "clearml", "comet_ml"])
def test_a_token_on_the_command_line_beside_a_tracker_that_records_it(report_to):
    with pytest.raises(
        ValueError, match=f"`hub_token` must not be given together with `report_to='{report_to}'`"
    ) as e:
        hub.check_trackers(report_to, {"hub_token": TOKEN})
    assert TOKEN not in str(e.value)
    address = "https://me:open-sesame@example.org/vae"
    with pytest.raises(ValueError, match=f"`vae` must hold no token or password together with .*'{report_to}'") as e:
        hub.check_trackers(report_to, {"hub_token": None, "vae": address})
    assert "open-sesame" not in str(e.value)
    hub.check_trackers(report_to, {"hub_token": None, "vae": "user/vae", "seed": 0})
    hub.check_trackers("tensorboard", {"hub_token": TOKEN, "vae": address})
    hub.check_trackers("none", {"hub_token": TOKEN})


# Publishing


def test_push_then_load_from_a_clean_cache(made, server, tmp_path):
    (url,) = push(server, tmp_path / "home", publish(made.folder, commit_message="after 100 updates"))
    repository = server.repositories["user/name"]
    files = repository.files()
    assert url["value"] == f"{server.endpoint}/user/name/commit/{repository.branches['main']}"
    assert repository.messages == ["initial commit", "after 100 updates"]
    assert set(files) == PUBLISHED | {".gitattributes"}
    assert not repository.private
    # Large files in parts and whole, each proven to have arrived.
    assert server.count("PUT", "/part/") > 1
    assert server.count("PUT", "/object/") > 1
    for name in PUBLISHED:
        if name not in ("vae/config.json", "model_index.json"):
            assert files[name] == (made.folder / name).read_bytes(), name
    # Where the author's VAE lay is nobody's business; nothing else is changed.
    config = json.loads((made.folder / "vae" / "config.json").read_text())
    assert "home of the author" in config.pop("_name_or_path")
    assert json.loads(files["vae/config.json"]) == config
    index = json.loads(files["model_index.json"])
    assert index.pop("_ignore_files") == sorted(name for name in PUBLISHED if name.startswith("transformer_ema_0.1/"))
    assert index == json.loads((made.folder / "model_index.json").read_text())
    assert not any(b"home of the author" in content or TOKEN.encode() in content for content in files.values())
    assert not holding(TOKEN, made.folder)

    blocks = re.findall(r"```python\n(.*?)```", files["README.md"].decode(), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        ast.parse(block)
    blocks = [block.replace("num_inference_steps=50", "num_inference_steps=2") for block in blocks]
    (images,) = load(server, tmp_path / "reader", {}, blocks=blocks)
    np.testing.assert_array_equal(images, made.images)


def test_weights_in_a_variant_alone_are_loaded_by_the_code_of_the_card(made, server, tmp_path):
    folder = tmp_path / "run"
    make_pipeline(folder, vae=made.pipe.vae)
    shutil.rmtree(folder / "transformer")
    made.pipe.transformer.save_pretrained(folder / "transformer", variant="fp16")
    made.pipe.transformer.save_pretrained(folder / "transformer_ema_0.1", variant="fp16")
    write_model_card(folder, "user/name")
    push(server, tmp_path / "home", publish(folder))
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    blocks = [block.replace("num_inference_steps=50", "num_inference_steps=2") for block in blocks]
    (images,) = load(server, tmp_path / "reader", {"variant": "fp16"}, blocks=blocks)
    np.testing.assert_array_equal(images, made.images)


def test_private_repository_and_revision(made, run, server, tmp_path):
    make_pipeline(tmp_path / "other", seed=5, vae=made.pipe.vae)
    write_model_card(tmp_path / "other", "user/name", revision="draft")
    first, second = push(
        server,
        tmp_path / "home",
        publish(made.folder, private=True),
        publish(tmp_path / "other", private=True, revision="draft", token=None),
        HF_TOKEN=TOKEN,
    )
    repository = server.repositories["user/name"]
    assert repository.private
    assert first["value"].endswith(repository.branches["main"])
    assert second["value"].endswith(repository.branches["draft"])
    assert "transformer_ema_0.1/config.json" in repository.files("main")
    # What the branch had and the new folder has not is gone.
    assert not any("transformer_ema_0.1" in name or "sample_grid" in name for name in repository.files("draft"))

    def where(name, **options):
        return {"cache_dir": str(tmp_path / name), **options}

    stranger, owner, draft, commit, nowhere = load(
        server,
        tmp_path / "reader",
        where("stranger"),
        where("owner", token=TOKEN),
        where("owner", token=TOKEN, revision="draft"),
        where("fresh", token=TOKEN, revision=repository.branches["main"]),
        where("owner", token=TOKEN, revision="nowhere"),
    )
    assert stranger["error"] == "OSError"
    assert "user/name" in stranger["message"]
    np.testing.assert_array_equal(owner, made.images)
    np.testing.assert_array_equal(commit, made.images)
    assert not np.array_equal(draft, made.images)
    assert "Cannot load model user/name" in nowhere["message"]
    for name in ("stranger", "owner", "fresh"):
        assert not holding(TOKEN, tmp_path / name)
    assert not any((tmp_path / "stranger").rglob("*.safetensors"))
    # The averages beside the pipeline are downloaded by those who ask for them.
    assert len(list((tmp_path / "fresh").rglob("*.safetensors"))) == 2


def test_a_second_push_changes_what_changed_in_one_commit(run, server, tmp_path):
    push(server, tmp_path / "home", publish(run))
    repository, num_uploads = server.repositories["user/name"], server.count("PUT", "/")
    head = repository.branches["main"]
    (same,) = push(server, tmp_path / "home", publish(run, "name"))
    assert same["value"].endswith(head)
    assert len(repository.messages) == 2

    repository.files()["CITATION.cff"] = repository.files()["docs/config.json"] = b"of the owner"
    for path in (run / "transformer_ema_0.1").iterdir():
        path.unlink()
    (run / "transformer_ema_0.1").rmdir()
    rewrite(run / "README.md", (run / "README.md").read_text() + "\nMore.\n")
    (again,) = push(server, tmp_path / "home", publish(run))
    assert again["value"].endswith(repository.branches["main"])
    assert len(repository.messages) == 3
    gone = {name for name in PUBLISHED if name.startswith("transformer_ema_0.1")}
    assert set(repository.files()) == PUBLISHED - gone | {".gitattributes", "CITATION.cff", "docs/config.json"}
    assert repository.files()["README.md"].endswith(b"\nMore.\n")
    assert server.count("PUT", "/") == num_uploads


def weights(folder):
    return sha256((folder / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes())


def test_an_upload_that_breaks_off_is_resumed(made, server, tmp_path):
    server.faults = [
        Fault("PUT", f"/part/{weights(made.folder)}/1", after_bytes=CHUNK_SIZE // 2),
        Fault("PUT", "/object/", after_bytes=100),
        Fault("POST", "/user/name/preupload"),
    ]
    (url,) = push(server, tmp_path / "home", publish(made.folder))
    assert [fault.times for fault in server.faults] == [0, 0, 0]
    assert url["value"].endswith(server.repositories["user/name"].branches["main"])
    assert server.repositories["user/name"].messages == ["initial commit", "Upload with diffusers-mp"]
    assert set(server.repositories["user/name"].files()) == PUBLISHED | {".gitattributes"}


def test_an_upload_that_fails_for_good_publishes_nothing_and_can_go_on(made, server, tmp_path):
    lasting = Fault("PUT", f"/part/{weights(made.folder)}/2", times=1000, after_bytes=1000)
    server.faults = [lasting]
    (failed,) = push(server, tmp_path / "home", publish(made.folder))
    assert failed["error"] == "HubError"
    for fact in (
        "'user/name' failed and left it as it was",
        "is intact",
        "diffusers_mp.publishing.hub.publish(",
        "transformer/",
    ):
        assert fact in failed["message"], fact
    # The client tries six times, and publish three.
    assert lasting.times == 1000 - 18
    repository = server.repositories["user/name"]
    assert repository.messages == ["initial commit"]
    assert set(repository.files()) == {".gitattributes"}

    server.faults, arrived, num_uploads = [], dict(server.large_files), server.count("PUT", "/object/")
    assert len(arrived) > 1
    (url,) = push(server, tmp_path / "home", publish(made.folder))
    assert repository.messages == ["initial commit", "Upload with diffusers-mp"]
    assert set(repository.files()) == PUBLISHED | {".gitattributes"}
    assert server.count("PUT", "/object/") == num_uploads
    assert url["value"].endswith(repository.branches["main"])


@pytest.mark.parametrize("after_bytes", [0, 1], ids=["before it is made", "after it is made"])
def test_a_commit_whose_answer_is_lost_is_made_once(made, server, tmp_path, after_bytes):
    server.faults = [Fault("POST", "/commit/main", after_bytes=after_bytes)]
    (url,) = push(server, tmp_path / "home", publish(made.folder))
    repository = server.repositories["user/name"]
    assert server.faults[0].times == 0
    assert repository.messages == ["initial commit", "Upload with diffusers-mp"]
    assert url["value"].endswith(repository.branches["main"])
    assert set(repository.files()) == PUBLISHED | {".gitattributes"}


def test_a_download_that_breaks_off(made, server, tmp_path):
    push(server, tmp_path / "home", publish(made.folder))
    digest = weights(made.folder)
    size = len(server.large_files[digest])
    # The client tries six times: the first load fails. The second, with the same cache, is broken off and resumes.
    server.faults = [Fault("GET", f"/object/{digest}", 6), Fault("GET", f"/object/{digest}", after_bytes=size // 2)]
    failed, resumed = load(server, tmp_path / "reader", {}, {})
    assert "peer closed connection" in failed["message"]
    assert [fault.times for fault in server.faults] == [0, 0]
    assert any(path == f"/object/{digest}" and status == 206 for _, _, path, status in server.requests)
    np.testing.assert_array_equal(resumed, made.images)


# Access


def test_access_is_checked_before_training(server, tmp_path):
    server.create("user/public")
    server.create("stranger/model")
    check = "check_hub_access"
    cases = [
        (call(check, "user/new", token=TOKEN, private=True), "user/new"),
        (call(check, "short", token=f" {TOKEN}\n"), "user/short"),
        (call(check, "user/public", token=TOKEN), "user/public"),
        (call(check, "user/public", token=TOKEN, revision="draft"), "user/public"),
        (call(check, "user/name"), "there is none: use `hf auth login`"),
        (call(check, "user/name", token="hf_Unknown"), "does not know the token (expired, revoked or mistyped)"),
        (call(check, "user/name", token=f"{TOKEN}\n{TOKEN}"), "must be printable ASCII without spaces"),
        (call(check, "user/name", token=f"{TOKEN}é"), "must be printable ASCII without spaces"),
        (call(check, "user/unmade", token=READ_TOKEN), "the token of 'user' cannot create or write to 'user/unmade'"),
        (call(check, "user/public", token=READ_TOKEN), "cannot create or write to 'user/public'"),
        (call(check, "stranger/model", token=TOKEN), "cannot create or write to 'stranger/model'"),
        (call(check, "stranger/new", token=TOKEN), "cannot create or write to 'stranger/new'"),
        (call(check, "user/public", token=TOKEN, private=True), "'user/public' must be private, but exists and is"),
        (call(check, "a/b/c", token=TOKEN), "`repo_id` must be 'user/name', got 'a/b/c'"),
    ]
    results = push(server, tmp_path / "home", *(case for case, _ in cases))
    for (_, expected), result in zip(cases, results, strict=True):
        assert result.get("value") == expected or expected in result.get("message", ""), (expected, result)
        assert "value" not in result or result["value"] == expected
    kinds = {result["error"] for result in results if "error" in result}
    assert kinds == {"HubError", "ValueError"}
    assert set(server.repositories) == {"user/new", "user/short", "user/public", "stranger/model"}
    assert server.repositories["user/new"].private
    assert not server.repositories["user/short"].private
    assert set(server.repositories["user/public"].branches) == {"main", "draft"}


def test_no_connection_is_said_clearly(server, tmp_path):
    with HubServer({}) as gone:
        pass
    for endpoint, offline in ((gone, "0"), (server, "1")):
        (result,) = push(
            endpoint, tmp_path / "home", call("check_hub_access", "user/name", token=TOKEN), HF_HUB_OFFLINE=offline
        )
        assert result["error"] == "HubError"
        assert "the Hub did not answer" in result["message"]


def test_a_token_that_a_server_sends_back_is_shown_to_nobody(server, tmp_path):
    server.echo_token, odd = True, "odd-token-of-a-mirror"
    calls = [call("check_hub_access", "user/name", token=token) for token in (odd, "hf_" + "Expired" * 4)]
    # At DEBUG the HTTP library itself logs the headers of every answer.
    results, output = client(server, tmp_path / "home", PUSH, calls, LEVEL="INFO", HF_DEBUG="0")
    for result in results:
        assert "[removed]" in result["message"]
    for secret in (odd, "Expired" * 4):
        assert secret not in output


def test_a_file_with_the_token_is_not_published(run, server, tmp_path):
    rewrite(run / "README.md", (run / "README.md").read_text() + f"\n`login({TOKEN[:-1]}{TOKEN[-1]})`\n")
    (result,) = push(server, tmp_path / "home", publish(run))
    assert "README.md holds the token; nothing was published" in result["message"]
    assert server.repositories == {}


# Rotation swaps


LOAD_SWAPPED = """
import json, re, sys, torch
torch.set_num_threads(1)
from diffusers import DiTPipeline
task, inputs = json.load(sys.stdin), (torch.ones(1, 4, 8, 8), torch.tensor([7]), torch.tensor([1]))
(block,) = re.findall(r"```python\\n(.*?)```", task["card"], re.DOTALL)
names = {}
exec(block, names)
swapped = names["pipe"].transformer(*inputs).sample.tolist()
pipe = DiTPipeline.from_pretrained(task["stock"])
from diffusers_mp import load_rotation_adapter
load_rotation_adapter(pipe.transformer, "user/adapter")
print("RESULTS " + json.dumps([swapped, pipe.transformer(*inputs).sample.tolist()]))
"""


def test_a_swapped_pipeline_and_an_adapter_are_published_and_loaded(swapped, server, tmp_path):
    push(
        server,
        tmp_path / "home",
        publish(swapped.base / "run"),
        publish(swapped.base / "adapter", "user/adapter"),
    )
    run, adapter = (server.repositories[name].files() for name in ("user/name", "user/adapter"))
    parts = [f"{part}/{name}" for part in ("transformer", "vae") for name in ("config.json", WEIGHTS)]
    assert set(run) == {".gitattributes", "README.md", "model_index.json", "scheduler/scheduler_config.json", *parts}
    assert set(adapter) == {".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors"}
    # Where the base lay is nobody's business.
    assert json.loads(adapter["adapter_config.json"])["base_model_name_or_path"] is None
    for content in (*run.values(), *adapter.values()):
        assert b"home of the author" not in content
        assert b"private" not in content

    card = run["README.md"].decode()
    for fact in ("license: mit", "a model of the author's own", "rotations", "2,000 before, 1,900 after", "| final |"):
        assert fact in card, fact
    assert "base_model" not in card
    adapters_card = adapter["README.md"].decode()
    assert "base_model: owner/dit" in adapters_card
    assert "None was given" in adapters_card
    (block,) = re.findall(r"```python\n(.*?)```", adapters_card, re.DOTALL)
    ast.parse(block)
    assert 'load_rotation_adapter(pipe.transformer, "user/adapter")' in block

    task = {"card": card, "stock": str(swapped.base / "stock")}
    (whole, adapted), _ = client(server, tmp_path / "reader", LOAD_SWAPPED, task)
    np.testing.assert_allclose(whole, swapped.output, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(adapted, swapped.output, rtol=1e-5, atol=1e-6)


def test_an_adapter_in_the_place_of_a_pipeline_leaves_nothing_of_it(swapped, server, tmp_path):
    push(server, tmp_path / "home", publish(swapped.base / "run"), publish(swapped.base / "adapter"))
    files = server.repositories["user/name"].files()
    assert set(files) == {".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors"}
