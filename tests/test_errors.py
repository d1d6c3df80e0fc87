"""What a message may look like, whatever a file made it quote."""

from __future__ import annotations

import pytest

from fastdiffclip.errors import InputDataError, InterruptedRunError, ResourceError, UsageError, nearest


@pytest.mark.parametrize("kind", [UsageError, InputDataError, ResourceError, InterruptedRunError])
def test_a_message_is_one_harmless_line(kind: type[Exception]) -> None:
    assert str(kind("the file Größe.tif is empty: copy it again")) == "the file Größe.tif is empty: copy it again"
    assert str(kind("a\nb\tc\r\x1b[31mred\u202e\0")) == "a b c ?[31mred??"


def test_a_long_message_keeps_both_ends() -> None:
    text = str(InputDataError(f"a.hdr says '{'<a>' * 50_000}', expected 5 bands: correct the header"))
    assert (
        len(text) < 2100
        and text.startswith("a.hdr says '<a>")
        and text.endswith("expected 5 bands: correct the header")
    )
    whole = "x" * 2000
    assert str(InputDataError(whole)) == whole


def test_the_nearest_name() -> None:
    assert nearest("trent", ("trento", "muufl")) == " (did you mean 'trento'?)" and nearest("xyz", ("trento",)) == ""
