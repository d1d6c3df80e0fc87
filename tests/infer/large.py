"""Run in a process of its own: predict a stored scene with a tiny model and tell the memory it took.

``python large.py SCENE OUT SIDE [MEMORY [MASK]]``; SIDE of the windows, MEMORY in MiB, 0 for no limit. Prints a JSON
object.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from fastdiffclip.config import build_config
from fastdiffclip.infer import engine
from fastdiffclip.infer.classifier import Classifier
from fastdiffclip.infer.finish import Outputs
from fastdiffclip.infer.interest import interest_of
from fastdiffclip.infer.stream import open_job
from fastdiffclip.model.language_classifier import LanguageClassifier
from fastdiffclip.runtime import Compute
from fastdiffclip.scene.prepare import fit_front_end
from fastdiffclip.scene.store import ClassInfo, open_scene

# The shipped batches are for real models; on a tiny one they would leave little but the overhead of calls.
STEM, WINDOWS, TILE = 16384, 4096, 65536


def peak() -> int:
    """High-water mark of the resident set in bytes; ``ru_maxrss`` would begin with that of the process before exec."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))


def main() -> None:
    path, out, window = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    memory, mask = [*sys.argv[4:], "0", ""][:2]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    engine.BATCHES["cpu"] = engine.Batches(STEM, WINDOWS * window**2, TILE)
    scene = open_scene(path)
    front_end = fit_front_end("standard", [scene])
    sizes = {name: 8 for name in ("width", "embedding", "text_width", "decoder_width")}
    depths = {name: 1 for name in ("heads", "depth", "text_depth", "text_heads", "decoder_depth")}
    config = build_config({"recipe": "custom", "model": {"window": window, **sizes, **depths}})
    model = LanguageClassifier(front_end.channels, config.model, 10).eval()
    classes = tuple(ClassInfo(value, f"class {value}") for value in (1, 2, 3))
    texts = torch.nn.functional.normalize(torch.randn(3, 8), dim=1)
    classifier = Classifier(model, texts, classes, front_end, config, Compute.choose("cpu", "fp32"))
    interest = interest_of(scene, mask=mask or None)
    with open_job(scene, classifier, Outputs(out, png=out.with_suffix(".png")), interest) as job:
        plan = job.plan(int(memory) << 20 or None)
        began = time.monotonic()
        result = job.run(plan)
    print(json.dumps({
        "peak": peak(),
        "planned": sum(plan.memory.values()),
        "blocks": len(plan.blocks),
        "pixels": result.pixels,
        "classified": sum(row["pixels"] for row in result.areas),
        "seconds": time.monotonic() - began,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
