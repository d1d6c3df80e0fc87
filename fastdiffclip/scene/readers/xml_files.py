"""XML of unknown origin: no document type, so no entities that grow or reach out, and bounds on size and depth."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from fastdiffclip.errors import InputDataError

_SIZE_LIMIT = 64 * 2**20
_DEPTH_LIMIT = 64


def read_xml(path: Path) -> Element:
    """Return the root of an XML file; raises InputDataError where it is damaged, too large, too deep or has a DTD."""
    size = path.stat().st_size
    if size > _SIZE_LIMIT:
        raise InputDataError(f"{path} has {size} bytes, expected an XML file of at most {_SIZE_LIMIT // 2**20} MiB")
    builder, parser, depth = TreeBuilder(), expat.ParserCreate(), 0

    def refuse(*_: object) -> NoReturn:
        raise InputDataError(
            f"{path} has a document type definition, which is not read: expected plain XML without one"
        )

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > _DEPTH_LIMIT:
            raise InputDataError(f"{path} nests its elements deeper than {_DEPTH_LIMIT}: expected a metadata file")
        builder.start(tag, attributes)

    def end(tag: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(tag)

    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = builder.data
    try:
        with path.open("rb") as stream:
            parser.ParseFile(stream)
    except (expat.ExpatError, LookupError, ValueError) as error:  # an encoding that does not exist, or is no text's
        raise InputDataError(f"{path} is damaged XML ({error}): remove it or mend it") from error
    except OSError as error:
        raise InputDataError(f"{path} cannot be read ({error.strerror})") from error
    return builder.close()
