"""Child process of the MATLAB reader: ``matlab_child.py FILE OUT.npy [VARIABLE]``.

Prints the variables as JSON rows (name, shape, type) and writes VARIABLE, or the only numeric raster, to
OUT.npy. It decides nothing: the parent judges the listing, and OUT.npy is missing where there was nothing
to read.
"""

from __future__ import annotations

import json
import sys

NUMERIC = {"double", "single", "logical"} | {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}


def main(path: str, output: str, variable: str | None = None) -> None:
    import numpy as np
    from scipy.io import loadmat, whosmat

    listing = whosmat(path)
    rasters = [name for name, shape, kind in listing if kind in NUMERIC and (variable or len(shape) in (2, 3))]
    chosen = [name for name in rasters if name == variable] if variable else rasters
    if len(chosen) == 1:
        values = loadmat(path, variable_names=chosen)[chosen[0]]
        np.save(output, np.ascontiguousarray(values), allow_pickle=False)
    print(json.dumps(listing))


if __name__ == "__main__":
    main(*sys.argv[1:])
