"""ENVI rasters: a text header and a data file of plain numbers, in any interleave and byte order.

The data are read with plain file reads, a block of rows at a time, not through a memory map: a map of a file larger
than the address-space limit fails, and one that shrinks while it is read kills the process.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

import numpy as np

from fastdiffclip.errors import InputDataError
from fastdiffclip.scene.readers.envi_header import EnviHeader, bad_bands, placement, read_header, wavelengths
from fastdiffclip.scene.readers.source import RasterSource

DATA_SUFFIXES = (".img", ".dat", ".raw", ".bin", ".bsq", ".bil", ".bip", "")
_DTYPES = {1: "u1", 2: "i2", 3: "i4", 4: "f4", 5: "f8", 12: "u2", 13: "u4", 14: "i8", 15: "u8"}
_COMPLEX = (6, 9)
_ORDERS = {0: "<", 1: ">"}


@dataclass(frozen=True)
class _Layout:
    """Where the numbers of a data file lie; ``dtype`` has the byte order of the file."""

    path: Path
    lines: int
    samples: int
    bands: int
    dtype: np.dtype
    interleave: str
    offset: int

    @property
    def size(self) -> int:
        return self.offset + self.lines * self.samples * self.bands * self.dtype.itemsize


def open_envi(path: Path, variable: str | None) -> RasterSource:
    """Open an ENVI raster by its header (.hdr) or by its data file with the header beside it.

    BSQ, BIL and BIP, both byte orders, every real data type; wavelengths and widths in nm, bad bands, CRS, transform,
    nodata, scale, class names and colours where the header has them. Raises InputDataError when header and data
    file do not fit, before anything is allocated.
    """
    if variable is not None:
        raise InputDataError(f"{path} is an ENVI raster and has no variables: leave out ':{variable}'")
    is_header = path.suffix.lower() == ".hdr"
    header = read_header(path if is_header else _header_beside(path))
    layout = _layout(header, _data_beside(header) if is_header else path)
    return _describe(header, layout)


def envi_header_beside(path: Path) -> Path | None:
    """Return the header of a data file: its name, or its name without suffix, with .hdr behind."""
    for name in (path.name, path.stem):
        for suffix in (".hdr", ".HDR"):
            if (found := path.with_name(name + suffix)).is_file() and found != path:
                return found
    return None


def _header_beside(path: Path) -> Path:
    found = envi_header_beside(path)
    if found is None:
        raise InputDataError(
            f"{path} has no ENVI header beside it: expected {path.stem}.hdr or {path.name}.hdr, a text file that "
            "begins with ENVI"
        )
    return found


def _data_beside(header: EnviHeader) -> Path:
    """Return the one data file that goes with a header by its name; the header's text has no say in it."""
    stem = header.path.with_suffix("")
    found = [
        entry
        for entry in sorted(header.path.parent.iterdir())
        if entry.is_file()
        and envi_header_beside(entry) == header.path
        and (entry == stem or entry.with_suffix("") == stem)
        and (entry == stem or entry.suffix.lower() in DATA_SUFFIXES)
    ]
    if len(found) == 1:
        return found[0]
    if not found:
        raise InputDataError(
            f"ENVI header {header.path} has no data file beside it: expected {stem.name} with one of the suffixes "
            f"{', '.join(filter(None, DATA_SUFFIXES))}, or none"
        )
    raise InputDataError(
        f"ENVI header {header.path} has several data files beside it ({', '.join(file.name for file in found)}): give "
        "the data file instead of the header"
    )


def _layout(header: EnviHeader, data: Path) -> _Layout:
    _refuse_other_files(header)
    code = header.integer("data type")
    if code not in _DTYPES:
        kind = "complex numbers" if code in _COMPLEX else "an unknown type"
        raise InputDataError(
            f"{data} holds {kind} (ENVI data type {code}), expected one of {', '.join(map(str, _DTYPES))}: convert it"
        )
    order = header.integer("byte order", 0)
    interleave = header.fields.get("interleave", "bsq").lower()
    if order not in _ORDERS or interleave not in ("bsq", "bil", "bip"):
        raise InputDataError(
            f"ENVI header {header.path} has byte order {order} and interleave '{interleave}', expected 0 or 1 and bsq, "
            "bil or bip"
        )
    lines, samples, bands = (header.integer(key, least=1) for key in ("lines", "samples", "bands"))
    dtype = np.dtype(_ORDERS[order] + _DTYPES[code])
    layout = _Layout(data, lines, samples, bands, dtype, interleave, header.integer("header offset", 0))
    held = data.stat().st_size
    if held < layout.size:
        raise InputDataError(
            f"{data} has {held} bytes and its header {header.path.name} declares {layout.size} ({lines} lines x "
            f"{samples} samples x {bands} bands, {dtype.itemsize} bytes each, after {layout.offset}): it is truncated, "
            "or the header belongs to another file"
        )
    return layout


def _refuse_other_files(header: EnviHeader) -> None:
    """Refuse what an ENVI header may describe and this reader does not read."""
    if header.fields.get("file compression", "0") not in ("0", ""):
        raise InputDataError(f"{header.path} describes a compressed ENVI file: save it uncompressed, or as GeoTIFF")
    kind = header.fields.get("file type", "ENVI Standard")
    if kind.lower() not in ("envi standard", "envi classification", "envi", ""):
        raise InputDataError(
            f"{header.path} describes a file of type '{kind}', expected ENVI Standard or ENVI Classification: give "
            "that file itself, or convert it"
        )
    if any(header.fields.get(f"{which} frame offsets", "").strip("{} 0,") for which in ("major", "minor")):
        raise InputDataError(f"{header.path} describes frames with bytes between them: save it as plain BSQ or GeoTIFF")


def _describe(header: EnviHeader, layout: _Layout) -> RasterSource:
    bands, native = layout.bands, layout.dtype.newbyteorder("=")
    centres, widths = wavelengths(header, bands)
    crs_wkt, transform, warnings = placement(header)
    extra = layout.path.stat().st_size - layout.size
    if extra:
        warnings.append(f"{layout.path} has {extra} bytes more than its header declares: do they belong together?")
    ignored = header.numbers("data ignore value", 1)
    gains, offsets, uniform = _scaling(header, bands)
    if not uniform and ignored is not None:
        raise InputDataError(
            f"{layout.path} has a data ignore value and bands with different gains or offsets: write physical values "
            "instead"
        )
    names, colours = _classes(header) if bands == 1 else ({}, {})
    reader = _Rows(layout, None if uniform else gains, None if uniform else offsets)
    return RasterSource(
        path=layout.path,
        height=layout.lines,
        width=layout.samples,
        bands=bands,
        dtype=native if uniform else np.dtype(np.float32),
        read_rows=reader.read,
        crs_wkt=crs_wkt,
        affine_transform=transform,
        nodata=None if ignored is None else ignored[0],
        scale=float(gains[0]) if uniform else 1.0,
        offset=float(offsets[0]) if uniform else 0.0,
        wavelengths=centres,
        fwhm=widths,
        bad_bands=bad_bands(header, bands),
        class_names=names,
        class_colours=colours,
        warnings=tuple(warnings),
        companions=(header.path,),
        close=reader.close,
    )


def _scaling(header: EnviHeader, bands: int) -> tuple[np.ndarray, np.ndarray, bool]:
    """Return gain and offset per band, and whether all bands share them.

    The header has ``data gain values`` and ``data offset values``, or one ``reflectance scale factor`` that stored
    values are divided by.
    """
    factor = header.numbers("reflectance scale factor", 1)
    if factor is not None and factor[0] <= 0:
        raise InputDataError(f"ENVI header {header.path}: 'reflectance scale factor' is {factor[0]}, expected above 0")
    gains = np.array(header.numbers("data gain values", bands) or [1.0 / factor[0] if factor else 1.0] * bands)
    offsets = np.array(header.numbers("data offset values", bands) or [0.0] * bands)
    return gains, offsets, len(set(zip(gains, offsets, strict=True))) == 1


def _classes(header: EnviHeader) -> tuple[dict[int, str], dict[int, tuple[int, int, int]]]:
    """Return class names and colours by value; value 0 is unclassified and left out."""
    names = {value: name for value, name in enumerate(header.words("class names") or []) if value and name}
    count = len(header.words("class lookup") or []) // 3
    lookup = header.numbers("class lookup", 3 * count) if count else None
    rows = np.clip(np.array(lookup or ()).reshape(-1, 3), 0, 255).astype(int).tolist()
    return names, {value: (red, green, blue) for value, (red, green, blue) in enumerate(rows) if value}


@dataclass
class _Rows:
    """Reads rows of a data file, which is opened on first use."""

    layout: _Layout
    gains: np.ndarray | None
    offsets: np.ndarray | None
    _stream: FileIO | None = field(default=None, init=False)

    def read(self, rows: slice) -> np.ndarray:
        """Return (h, samples, bands) in native byte order, physical values where bands have their own gain."""
        layout, count = self.layout, rows.stop - rows.start
        row = layout.samples * layout.bands
        if layout.interleave == "bsq":
            block = np.empty((layout.bands, count, layout.samples), layout.dtype)
            for band, plane in enumerate(block):
                self._fill(plane, (band * layout.lines + rows.start) * layout.samples, rows)
            block = np.moveaxis(block, 0, -1)
        else:
            shape = (layout.bands, layout.samples) if layout.interleave == "bil" else (layout.samples, layout.bands)
            block = np.empty((count, *shape), layout.dtype)
            self._fill(block, rows.start * row, rows)
            block = block.swapaxes(1, 2) if layout.interleave == "bil" else block
        if not layout.dtype.isnative:
            block = block.byteswap(inplace=True).view(layout.dtype.newbyteorder("="))
        if self.gains is None or self.offsets is None:
            return block
        return np.asarray(block * self.gains.astype(np.float32) + self.offsets.astype(np.float32), np.float32)

    def _fill(self, target: np.ndarray, position: int, rows: slice) -> None:
        """Read into a contiguous array what lies ``position`` numbers behind the header offset."""
        layout = self.layout
        try:
            if self._stream is None:
                self._stream = FileIO(layout.path)
            self._stream.seek(layout.offset + position * layout.dtype.itemsize)
            space = memoryview(target.reshape(-1).view(np.uint8).data)
            while space:
                got = self._stream.readinto(space)
                if not got:
                    raise InputDataError(
                        f"{layout.path} ends within rows {rows.start} to {rows.stop}: it was truncated"
                    )
                space = space[got:]
        except OSError as error:
            raise InputDataError(
                f"{layout.path} cannot be read in rows {rows.start} to {rows.stop} ({error.strerror})"
            ) from error

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None
