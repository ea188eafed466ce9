"""A peak learning rate for each part: patterns and numbers in, the rate of every parameter out.

rates: {embed: 1e-3, head: 1e-3, layers: 1e-4}      # the last pattern that covers a part is the one that counts

"layers" (or "blocks") alone stands for all layers; the other patterns are those of families/patterns.py. Parts that no
pattern covers have the run's own rate. Leaves out the schedule, which scales all of them alike.
"""

from collections.abc import Iterable, Mapping

from lapis.errors import ConfigError
from lapis.families import family_of
from lapis.families.base import Family, part_of
from lapis.families.patterns import covered_parts
from lapis.model.transformer import Transformer

_ALL_LAYERS = ("layers", "blocks")


def peak_rates(model: Transformer, rates: Mapping[str, float], lr: float) -> dict[str, float]:
    """The peak learning rate of each parameter of a model that is trained; see rates_by_name."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return rates_by_name(rates, names, lr, family_of(model.config))


def rates_by_name(
    rates: Mapping[str, float], names: Iterable[str], lr: float, family: Family | None = None
) -> dict[str, float]:
    """The peak learning rate of each parameter.

    Args:
        rates: Pattern -> peak learning rate.
        names: Of the parameters that are trained.
        lr: Of parts that no pattern covers.
        family: Whose names on disk are understood.

    Raises:
        ConfigError: For a pattern that covers nothing that is trained, or a rate that is not above 0.
    """
    parts = {name: part_of(name) for name in names}
    result = dict.fromkeys(parts, lr)
    for pattern, rate in rates.items():
        if not isinstance(rate, (int, float)) or isinstance(rate, bool) or rate <= 0:
            raise ConfigError(f"train: rates: {pattern} is {rate!r}; give a number above 0, or freeze that part")
        if pattern in _ALL_LAYERS:
            covered = {part for part in parts.values() if part.layer is not None}
        else:
            covered = covered_parts([pattern], parts.values(), "train: rates", family)
        if not covered:
            raise ConfigError(f"train: rates: {pattern} covers nothing that is trained; leave it out")
        result |= {name: float(rate) for name, part in parts.items() if part in covered}
    return result
