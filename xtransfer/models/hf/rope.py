"""The settings of rotary positions in config.json, under their present and their older keys.

Version 5 of `transformers` writes `rope_parameters`, with `rope_type` and `rope_theta`. Older files have `rope_theta`
and `rope_scaling` (with `type` or `rope_type`), or null.
"""

from collections.abc import Mapping
from typing import Any

DEFAULT, LINEAR, NTK = "default", "linear", "ntk"


def read_rope(raw: Mapping[str, Any], theta: float, *, types: tuple[str, ...] = (DEFAULT,)) -> tuple[float, float]:
    """Return the base of the angles and their divisor, by a whole config.json; see `rope_of`."""
    stated = [name for name in ("rope_parameters", "rope_scaling") if raw.get(name)]
    if len(stated) > 1:
        raise ValueError(f"{stated[0]} and {stated[1]} are both set: keep the one that the model was trained with")
    key = stated[0] if stated else "rope_theta"
    settings = raw[key] if stated else {}
    return rope_of(key, settings, raw.get("rope_theta", theta), head_size(raw), types=types)


def head_size(raw: Mapping[str, Any]) -> int:
    """Return D, the width of a head, which must be even; 2 if config.json is too broken to tell."""
    size, heads = raw.get("hidden_size"), raw.get("num_attention_heads")
    width = raw.get("head_dim")
    if width is None:
        if not (type(size) is int and type(heads) is int and heads > 0):
            return 2
        width = size // heads
    if type(width) is not int or width % 2:
        raise ValueError(f"a head is {width!r} wide (hidden_size / num_attention_heads), expected an even number")
    return width


def rope_of(
    key: str,
    settings: Any,
    theta: Any,
    width: int,
    *,
    types: tuple[str, ...] = (DEFAULT,),
    theta_key: str = "rope_theta",
) -> tuple[float, float]:
    """Return the base of the angles and their divisor; see `models.rotary.rotation`.

    "linear" divides the angles by its factor. "ntk" multiplies the base by its factor f and divides the angles by
    f^(2 / D) (fixed NTK scaling, kexue.fm/archives/9706, as in gte-multilingual).

    Args:
      key: the name of the settings in config.json, for errors.
      settings: the object under that key.
      theta: the base if the settings have none.
      width: D, the width of a head.
      types: the types of scaling that the family has.
      theta_key: the name of `theta` in config.json, for errors.

    Raises:
      ValueError: another type, an unknown key, or a value that is not a positive number.
    """
    if not isinstance(settings, Mapping):
        raise ValueError(f"{key} is {settings!r}, expected an object")
    kind = settings.get("rope_type", settings.get("type", DEFAULT))
    if kind not in types:
        raise ValueError(f"{key} is {dict(settings)}: only the type {' or '.join(map(repr, types))} is supported")
    known = {"rope_type", "type", "rope_theta"} | ({"factor"} if kind != DEFAULT else set())
    unknown = sorted(str(name) for name in settings if name not in known and settings[name] is not None)
    if unknown:
        raise ValueError(f"{key} has {unknown[0]}, which is not supported")
    base = _positive(theta_key, settings.get("rope_theta", theta))
    if kind == DEFAULT:
        return base, 1.0
    factor = _positive(f"{key}.factor", settings.get("factor"))
    return (base, factor) if kind == LINEAR else (base * factor, factor ** (2 / width))


def _positive(name: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e12:
        raise ValueError(f"{name} is {value!r}, expected a positive number")
    return float(value)
