"""A flipped bit anywhere in a store: refused, or harmless; never other data."""

import shutil

import numpy as np
import pytest

from .flips import everything, outcomes, regions
from .toy import KINDS

SAMPLES = 6  # of each region of each file, its first and last byte among them
HARMLESS = {
    "shard index, crc32c",
    "checksums, unused places",
}  # nothing depends on these bytes when rows are read
PERHAPS = {"zarr.json", "tkv.json"}  # JSON: 1e-06 as 1E-06


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_is_refused_or_harmless_and_found_by_deep_verification(
    kind, stores, tmp_path
):
    shutil.copytree(stores[kind], store := tmp_path / "s")
    rng, places = np.random.default_rng(0), []
    for region in regions(store):
        start, end = region[2:]
        chosen = {start, end - 1, *rng.integers(start, end, SAMPLES - 2).tolist()}
        places += [
            (region, place, int(bit))
            for place, bit in zip(sorted(chosen), rng.integers(0, 8, len(chosen)))
        ]
    whole = everything(store)
    reading, deep = outcomes(store, whole, places)
    for what in {region[1] for region in regions(store)}:
        refused, harmless = reading[what, "refused"], reading[what, "harmless"]
        assert refused + harmless
        assert what in PERHAPS or (refused == 0 if what in HARMLESS else harmless == 0), (
            what,
            refused,
            harmless,
        )
        assert what in PERHAPS and deep[what, "passed"] <= harmless or not deep[what, "passed"], (
            what
        )
    assert len(places) > 180
    assert everything(store) == whole
