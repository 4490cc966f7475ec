"""A run and an evaluation whose arguments hold secrets, published: none is in any file."""

import shutil

from helpers import EXAMPLES
from hub_client import TOKEN, client, holding
from training_runs import arguments


RUN = f"""
import json, sys
sys.path.insert(0, {str(EXAMPLES)!r})
import torch
torch.set_num_threads(1)
import train_mpdit, evaluate
for script, argv in zip((train_mpdit, evaluate), json.load(sys.stdin), strict=True):
    script.main(script.parse_args(argv))
    from accelerate.state import AcceleratorState
    AcceleratorState._reset_state(reset_partial_state=True)
print("RESULTS []")
"""
# In a folder's name as in an address.
SECRETS = {"vae": "glpat-" + "Ab3-dEf6" * 3, "images": "ghp_" + "Ab3dEf6h" * 4, "model": "sk-" + "Ab3dEf6h" * 5}
PASSWORD = "open-sesame"


def test_no_secret_is_in_a_file(server, data, dinov2, tmp_path):
    places = {"vae": SECRETS["vae"], "images": f"me:{PASSWORD}@example.org", "model.json": SECRETS["model"]}
    for name, place in places.items():
        copy = shutil.copytree if (data / name).is_dir() else shutil.copy
        (tmp_path / place).mkdir()
        copy(data / name, tmp_path / place / name)
    run, evaluation, home = tmp_path / "run", tmp_path / "evaluation", tmp_path / "home"
    extractor = shutil.copytree(dinov2, tmp_path / SECRETS["images"] / "dinov2")
    train = [
        *arguments(data, run, "--max_train_steps", "2", "--ema_snapshot_steps", "1", "--report_to", "tensorboard"),
        *("--vae", str(tmp_path / places["vae"] / "vae")),
        *("--train_data_dir", str(tmp_path / places["images"] / "images")),
        *("--model_config_name_or_path", str(tmp_path / places["model.json"] / "model.json")),
        *("--push_to_hub", "--hub_model_id", "user/name", "--hub_license", "mit", "--hub_token", TOKEN),
    ]
    measure = [
        *("--pretrained_model_name_or_path", str(run), "--ema_stds", "0.05"),
        *("--reference_dir", str(tmp_path / places["images"] / "images")),
        *("--extractors", str(extractor), "--num_samples", "10", "--num_inference_steps", "2"),
        *("--output_dir", str(evaluation), "--push_to_hub", "--hub_model_id", "user/best", "--hub_token", TOKEN),
    ]
    client(server, home, RUN, [train, measure])
    for folder in (run, evaluation):
        assert any(folder.rglob("*.json"))
        for secret in (*SECRETS.values(), PASSWORD, TOKEN):
            assert holding(secret, folder) == [], secret
    for name in ("user/name", "user/best"):
        files = server.repositories[name].files()
        assert "README.md" in files
        for secret in (*SECRETS.values(), PASSWORD, TOKEN):
            assert not [path for path, content in files.items() if secret.encode() in content], secret
    assert "[removed]" in (run / "training_arguments.json").read_text()
