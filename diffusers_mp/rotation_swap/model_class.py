"""Classes of swapped models: stock classes that know that they are swapped, and so save and load exactly."""

import functools
import inspect
from collections.abc import Mapping

import diffusers
from diffusers import ConfigMixin, ModelMixin

from .. import _registration  # noqa: F401
from .coverage import COVERAGE, SUPPORTED
from .linear import RotationLinear, make_rotation_linears, replace_maps
from .sites import find_sites


PREFIX = "Rotation"


@functools.cache
def rotation_class(stock_class: type[ModelMixin]) -> type[ModelMixin]:
    """The class of a swapped model, `Rotation<stock name>`, to be found in `diffusers_mp` under that name.

    Its only additions are a config entry `rotation_modulation`, the options of the swap, and the name: a stock class
    that loaded such weights would silently leave the rotations out.

    Args:
        stock_class (type): a supported class of diffusers.
    Returns:
        type: a subclass of it.
    """
    stock_init = stock_class.__init__

    def __init__(self, *args, rotation_modulation=None, **kwargs):
        stock_init(self, *args, **kwargs)
        if rotation_modulation is None:
            raise ValueError(
                f"`rotation_modulation` must hold the options of the swap: make a {stock_class.__name__} and call "
                "`swap_adaln_for_rotation`, or load a model saved after that."
            )
        sites = find_sites(self, rotation_modulation["sublayers"])
        replace_maps(self, make_rotation_linears(sites, rotation_modulation))
        self.register_to_config(rotation_modulation=dict(rotation_modulation))

    # diffusers reads the names of config entries from here.
    signature = inspect.signature(stock_init)
    entry = inspect.Parameter("rotation_modulation", inspect.Parameter.KEYWORD_ONLY, default=None)
    parameters = [
        parameter for parameter in signature.parameters.values() if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    __init__.__signature__ = signature.replace(parameters=[*parameters, entry])
    return type(
        PREFIX + stock_class.__name__,
        (stock_class,),
        {
            "__init__": __init__,
            # Those of Transformer2DModel go by its name to load another class in its place.
            "from_config": classmethod(ConfigMixin.from_config.__func__),
            "from_pretrained": classmethod(ModelMixin.from_pretrained.__func__),
            "__module__": "diffusers_mp",
            "__doc__": f"{stock_class.__name__} with rotations in the places of its shifts.",
        },
    )


def install(model: ModelMixin, linears: Mapping[str, RotationLinear], options: Mapping) -> None:
    """Put rotations into a stock model, and make it one of its swapped class.

    Args:
        model (ModelMixin): of a stock class.
        linears (mapping): from `make_rotation_linears`.
        options (mapping): of the swap, for the config.
    """
    replace_maps(model, linears)
    model.__class__ = rotation_class(type(model))
    model.register_to_config(rotation_modulation=dict(options))


def is_rotation_class(cls: type) -> bool:
    """Whether a class is one of `rotation_class`."""
    return cls.__name__.startswith(PREFIX) and rotation_class_of_name(cls.__name__) is cls


def rotation_class_of_name(name: str) -> type[ModelMixin] | None:
    """The class of a name as `diffusers_mp` is asked for it; None if there is none.

    Args:
        name (str): such as "RotationFluxTransformer2DModel".
    Returns:
        type or None: as `rotation_class` gives.
    """
    stock_name = name.removeprefix(PREFIX)
    if stock_name == name or COVERAGE.get(stock_name) != SUPPORTED:
        return None
    return rotation_class(getattr(diffusers, stock_name))
