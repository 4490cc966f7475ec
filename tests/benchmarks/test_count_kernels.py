"""The counter of kernels on its stand-in: what a step may start at most, and that the counter sees what is planted."""

import json
import textwrap

import pytest
from processes import ROOT, run_python


# In a separate process: the stand-in cannot be undone.
CODE = """
    import json, sys
    sys.path.insert(0, sys.argv[1])
    import torch
    import count_kernels
    from torch._subclasses.fake_tensor import FakeTensorMode
    from diffusers_mp import fused
    from diffusers_mp.modulation import Modulation

    counted, found = count_kernels.Counted(), {}
    count_kernels.stand_in(counted)

    def count(name):
        count_kernels.count(name, "XS/2", 256, counted, num_layers=5)
        return counted.kernels.total(), counted.num_bytes, counted.wide.total()

    with FakeTensorMode(), torch.device("gpu"):
        found["A"], found["E"], found["F"] = map(count, (count_kernels.A, count_kernels.E, count_kernels.F_BOUND))
        forward = Modulation.forward

        def planted(self, hidden_states, conditioning):
            hidden_states, gate = forward(self, hidden_states, conditioning)
            return hidden_states.float().to(hidden_states.dtype), gate

        Modulation.forward = planted
        found["planted"] = count(count_kernels.E)
        a, b = torch.zeros(2, 3), torch.zeros(2, 1)
        with counted:
            for name, tensors in (("fast", [a, a]), ("slow", [b, b])):
                counted.start()
                torch._foreach_mul([a, a], tensors)
                found[name] = counted.kernels.total()
    print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found():
    output = run_python(textwrap.dedent(CODE), str(ROOT / "benchmarks" / "speed"))
    return json.loads(output.splitlines()[-1])


def test_a_step_of_E_starts_at_most_half_more_kernels_than_A_and_moves_fewer_bytes(found):
    (kernels, num_bytes, wide), (kernels_of_A, bytes_of_A, _) = found["E"], found["A"]
    assert kernels <= 1.5 * kernels_of_A
    assert num_bytes <= bytes_of_A
    # Under autocast nothing as wide as the tokens is made in float32.
    assert wide == found["F"][2] == 0


def test_the_counter_sees_what_is_planted(found):
    kernels, _, wide = found["planted"]
    # Two casts each way, one to float32, at ten sites of blocks and one of the output.
    assert (kernels - found["E"][0], wide) == (11 * 4, 11 * 2)
    assert (found["fast"], found["slow"]) == (1, 2)
