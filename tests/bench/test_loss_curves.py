"""Four ways to compute one run, at the paper's shapes with few windows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastdiffclip.bench import loss_curves


@pytest.mark.parametrize("stage", ["umd", "flc"])
def test_curves_are_printed_written_and_not_computed_twice(
    stage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "curves.json"
    arguments = [stage, "--steps", "2", "--batch", "4", "--samples", "7", "--out", str(out)]
    assert loss_curves.main(arguments) == 0
    printed = capsys.readouterr().out
    losses = json.loads(out.read_text())["losses"]
    assert [name.split() for name in losses] == [list(curve) for curve in loss_curves.CURVES]
    plain = losses["plain float32"]
    assert losses["engine float32"] == pytest.approx(plain, rel=1e-5)
    for name in ("plain bfloat16", "engine bfloat16"):
        assert losses[name] == pytest.approx(plain, rel=3e-2) and losses[name] != plain
    assert f"| loss, plain float32 | {plain[0]:.3f} | {plain[1]:.3f} |" in printed

    monkeypatch.setattr(loss_curves, "curve", lambda *settings: pytest.fail("computed again"))
    assert loss_curves.main(arguments) == 0
    assert capsys.readouterr().out == printed


def test_the_largest_difference_so_far_never_falls() -> None:
    assert loss_curves.far([2.0, 1.5, 1.0], [2.0, 1.0, 1.0]) == [0.0, 0.25, 0.25]
