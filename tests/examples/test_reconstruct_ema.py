"""The script that rebuilds averages of other widths."""

import pytest
from helpers import small_run

from diffusers_mp import MPDiTPipeline


pytestmark = pytest.mark.usefixtures("examples_run_here")


def test_the_script_reports_and_writes(tmp_path, capsys):
    import reconstruct_ema as script

    snapshots, output = str(tmp_path / "ema_snapshots"), tmp_path / "out"
    small_run(tmp_path / "ema_snapshots")
    script.main(script.parse_args([snapshots, "--ema_stds", "0.03", "0.075"]))
    shown = capsys.readouterr().out
    assert shown.splitlines()[:3] == [
        f"data    {snapshots}: 8 snapshots of updates 1 to 4, widths 0.05, 0.1",
        "wanted  0.03, 0.075 at update 4",
        "output  none, the fit is shown",
    ]
    assert "std 0.03 at step 4" in shown
    assert "std 0.075 at step 4: fit error" in shown
    command = f"python examples/reconstruct_ema.py {snapshots} --ema_stds 0.03 --output_dir run_0.03"
    assert shown.endswith(f"Nothing was written. Next, a pipeline: {command}\n")
    script.main(script.parse_args([snapshots, "--ema_stds", "0.075", "--step", "3", "--output_dir", str(output)]))
    shown = capsys.readouterr().out
    assert "std 0.075 at step 3: fit error" in shown
    assert f"Saved the pipeline to {output}: " in shown
    assert f"python examples/evaluate.py --pretrained_model_name_or_path {output}" in shown
    assert MPDiTPipeline.from_pretrained(output).config.latents_std == [2.0] * 4


def test_arguments(tmp_path, capsys):
    import reconstruct_ema as script

    for arguments, message in (
        (("--ema_stds", "0.03", "0.075", "--output_dir", "two"), "--output_dir takes one pipeline"),
        (("--ema_stds", "0.05", "0.050000001"), "--ema_stds must differ in six digits, got 0.05 0.050000001"),
        (("--ema_stds", "0.3"), "--ema_stds: must be in (0, 1/sqrt(12)), that is below 0.2887, got 0.3"),
        (("--ema_stds", "0.075"), f"--ema_snapshot_steps does, got {tmp_path / 'nowhere'}"),
    ):
        with pytest.raises(SystemExit, match="2"):
            script.main(script.parse_args([str(tmp_path / "nowhere"), *arguments]))
        assert message in capsys.readouterr().err
