"""Flags that would have no effect beside the others are refused by every script, before anything is imported."""

import json

import pytest


TRAIN = "train_mpdit --train_data_dir images --output_dir new"
ENCODE = "encode_latents --train_data_dir images --latents_dir new"
EVALUATE = "evaluate --pretrained_model_name_or_path run --reference_dir images"
FINETUNE = "finetune_rotation --pretrained_model_name_or_path run --train_data_dir images --output_dir new"


@pytest.mark.parametrize(
    "command, without",
    [
        *(
            (f"train_mpdit --latents_dir latents --output_dir new --{flag}", f"--{flag.split()[0]}")
            for flag in ("max_train_samples 5", "image_channels 1", "split test", "class_level last", "background red")
        ),
        *(
            (f"train_mpdit --latents_dir latents --output_dir new --{flag}", f"--{flag}")
            for flag in ("skip_corrupt", "streaming")
        ),
        *(
            (f"train_mpdit --latents_dir latents --output_dir new --{flag} x", f"--{flag}")
            for flag in ("image_column", "label_column", "pooled_column")
        ),
        (
            f"{ENCODE} --vae none --random_flip",
            "--random_flip would have no effect with --vae none: pixels are mirrored",
        ),
        (f"{TRAIN} --image_channels 1", "--image_channels would have no effect with a VAE, which brings its own"),
        (f"{TRAIN} --vae x/vae --image_channels 1", "--image_channels"),
        (f"{TRAIN} --dataset_config_name x", "--dataset_config_name would have no effect without --dataset_name"),
        (
            f"{TRAIN} --hub_model_id a/b --hub_private_repo",
            "--hub_model_id, --hub_private_repo would have no effect wit",
        ),
        (
            f"{TRAIN} --validation_steps 0 --validation_guidance_scale 2",
            "--validation_guidance_scale would have no eff",
        ),
        (f"{TRAIN} --num_validation_images 0 --num_validation_levels 2", "--num_validation_levels"),
        (f"{FINETUNE} --max_train_steps 0 --distillation", "--distillation would have no effect with --max_train_st"),
        (f"{ENCODE} --image_channels 1", "--image_channels"),
        (f"{ENCODE} --seed 1", "--seed would have no effect without --max_train_samples"),
        (f"{ENCODE} --dataset_config_name x", "--dataset_config_name"),
        (
            "encode_latents --latents_dir new --verify --resolution 8",
            "--resolution would have no effect with --verify",
        ),
        (f"{EVALUATE} --revision main", "--revision would have no effect with a folder, which has no revisions"),
        (f"{EVALUATE} --step 2", "--step would have no effect without --ema_stds"),
        (f"{EVALUATE} --dataset_config_name x", "--dataset_config_name"),
        (f"{EVALUATE} --hub_private_repo", "--hub_private_repo"),
        (f"{EVALUATE} --extractors a:b --extractor_output x", "--extractor_output"),
        (
            "evaluate --pretrained_model_name_or_path run --reference_statistics x --max_reference_images 5",
            "--max_reference_images would have no effect with --reference_statistics",
        ),
        (f"{FINETUNE} --swap none --rank 2", "--rank would have no effect with --swap none"),
        (f"{FINETUNE} --swap none --sublayers mlp", "--sublayers"),
        (
            f"{FINETUNE} --train rotation --pin_weight_norms row",
            "--pin_weight_norms would have no effect with --train",
        ),
        (f"{FINETUNE} --hub_model_id a/b", "--hub_model_id"),
        (f"{FINETUNE} --lr_scheduler constant --lr_warmup_steps 3", "--lr_warmup_steps has no meaning for --lr_sched"),
    ],
)
def test_a_flag_without_effect_is_refused(examples_run_here, tmp_path, monkeypatch, capsys, command, without):
    monkeypatch.chdir(tmp_path)
    for name in ("images", "latents", "run"):
        (tmp_path / name).mkdir()
    index = {"resolution": 8, "vae": None}
    (tmp_path / "latents" / "index.json").write_text(json.dumps(index))
    script, *flags = command.split()
    with pytest.raises(SystemExit, match="2"):
        __import__(script).parse_args(flags)
    said = capsys.readouterr().err
    assert f"error: {without}" in said
    assert said.count("\n") == 1


def test_the_damaged_index_of_latents_is_named(examples_run_here, tmp_path, capsys):
    import train_mpdit

    from diffusers_mp.scripts import command_line

    (tmp_path / "index.json").write_text("{")
    argv = ["--latents_dir", str(tmp_path), "--output_dir", str(tmp_path / "new")]
    with pytest.raises(SystemExit, match="2"):
        command_line(lambda: train_mpdit.parse_args(argv), train_mpdit.make_parser())
    assert f"error: {tmp_path / 'index.json'} is damaged, it is no JSON" in capsys.readouterr().err
