"""Every manifest there is: of a family that stands (the other files here), the twin of one of its checkpoints, or refused."""

import pytest
from released import FAMILIES, ROOT, TWINS, names, released

from ar_jax.convert.sources import SOURCES, identify

KNOWN = {name for family in FAMILIES for name in names(family)}
OTHERS = [path.stem for path in sorted((ROOT / "manifests").glob("*.json")) if path.stem not in {*KNOWN, *TWINS}]


def test_every_family_has_manifests():
    assert FAMILIES.keys() == SOURCES.keys()


@pytest.mark.parametrize(("name", "twin"), TWINS.items())
def test_twins_have_the_same_keys_and_shapes(name, twin):
    assert released(name)[1] == released(twin)[1]


@pytest.mark.parametrize("name", OTHERS)
def test_other_checkpoints_are_refused(name):
    with pytest.raises(
        ValueError, match=r"not a checkpoint of a known family|looks like a \w+ of \w+, but .* (is|has|have) "
    ):
        identify(released(name)[1], size=256)
