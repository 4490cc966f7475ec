"""What an installed wheel must do, run in an environment that holds nothing else: import lightly, carry its types."""

import subprocess
import sys
import tempfile
from pathlib import Path


USER = """
import torch
from diffusers_mp import MPLinear, RotationModulation, get_preset, normalize_weights_

layer: MPLinear = MPLinear(4, 4)
output: torch.Tensor = layer(torch.zeros(2, 4))
config: dict = get_preset("S/2")
normalize_weights_(layer)
wrong: int = layer.forward(torch.zeros(2, 4))
"""

import diffusers_mp  # noqa: E402


assert Path(diffusers_mp.__file__).is_relative_to(sys.prefix), diffusers_mp.__file__
from diffusers_mp import MPLinear  # noqa: E402


assert "torch" in sys.modules
heavy = {"diffusers", "transformers", "accelerate", "datasets"} & set(sys.modules)
assert not heavy, heavy
MPLinear(4, 4)
for name in diffusers_mp.__all__:
    getattr(diffusers_mp, name)

# Files that are not Python come along.
from diffusers_mp.publishing.cards import filled  # noqa: E402


assert "mit" in filled(["end"], {"license": "mit"})

with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "user.py"
    file.write_text(USER)
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--follow-imports=silent", "--cache-dir", folder, file],
        capture_output=True,
        text=True,
        cwd=folder,
    )
print(checked.stdout)
# Types are seen: the one mistake is found, and nothing else is.
assert "Found 1 error" in checked.stdout, checked.stderr
assert 'expression has type "Tensor", variable has type "int"' in checked.stdout
print(f"diffusers_mp {diffusers_mp.__version__} from {Path(diffusers_mp.__file__).parent}")
