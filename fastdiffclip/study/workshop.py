"""One process's part of a study: scenes, front ends and pretrained weights that its pieces of work share."""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fastdiffclip.evaluate.contest import Contest, Predicted, WindowSources, scores_of
from fastdiffclip.runtime import Progress, silent
from fastdiffclip.scene.labelled import labelled_pixels
from fastdiffclip.scene.splits import Split
from fastdiffclip.scene.store import open_scene
from fastdiffclip.study.features import features_of, nearest_shot_agrees, plane_of
from fastdiffclip.study.job import Job, Piece, Pretraining
from fastdiffclip.train.umd import UmdResult, load_umd, train_umd

KEPT = 4  # pretrained models held at once


@dataclass(frozen=True)
class Done:
    """The result of a piece: a JSON-able entry of the journal, and arrays that a picture is made of."""

    entry: dict[str, Any]
    arrays: dict[str, np.ndarray] = field(default_factory=dict)


class Workshop:
    """Does any pretraining or piece of a job; a result depends on the piece alone."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.scenes = [open_scene(path) for path in job.paths]
        self.labelled = labelled_pixels(self.scenes, job.classes)
        self.sources = WindowSources(self.scenes, job.budget)
        self._umd: OrderedDict[str, UmdResult] = OrderedDict()
        self._splits: dict[tuple[int | None, int], Split] = {}

    def do(self, task: Pretraining | Piece, progress: Progress = silent) -> Done:
        """Do one piece of work; a pretraining is left in its folder."""
        began = time.monotonic()
        if isinstance(task, Pretraining):
            folder, device = self.job.umd_folder(task.key), self.job.device
            train_umd(
                self.scenes, task.config, seed=task.seed, out=folder, device=device, resume=True, progress=progress
            )
            return Done({})
        line = self.job.lines[task.line]
        umd = None if task.umd is None else self._pretrained(task.umd)
        contest = Contest(
            self.scenes, self.labelled, line.config, umd, line.prompts, self.job.device, self.sources
        )  # fmt: skip
        split = self._split(task)
        make = {"scores": self._scores, "maps": self._map, "features": self._features}[self.job.study.kind]
        done = make(task, contest, split)
        facts = {"row": line.row.label, "shots": task.shots, "seed": task.seed}
        return replace(done, entry={**facts, **done.entry, "seconds": round(time.monotonic() - began, 3)})

    def _scores(self, piece: Piece, contest: Contest, split: Split) -> Done:
        row = self.job.lines[piece.line].row
        predicted = contest.run(row.method, row.features, split, piece.seed)
        return Done({"scores": scores_of(predicted, split, self._values()).to_dict()})

    def _map(self, piece: Piece, contest: Contest, split: Split) -> Done:
        """Every valid pixel of the first scene, and the test pixels of the draw, in one go."""
        row, scene = self.job.lines[piece.line].row, self.scenes[0]
        rows, cols = np.nonzero(scene.read_valid_everywhere())
        every = np.stack([np.zeros_like(rows), rows, cols], axis=1).astype(np.int64)
        asked = replace(split, test=np.concatenate([split.test, every]))
        predicted = contest.run(row.method, row.features, asked, piece.seed)
        tested = len(split.test)
        class_map = np.zeros((scene.height, scene.width), np.uint16)
        class_map[rows, cols] = predicted.values[tested:]
        ours = Predicted(*(None if part is None else part[:tested] for part in predicted))  # type: ignore[arg-type]
        return Done({"scores": scores_of(ours, split, self._values()).to_dict()}, {"map": class_map})

    def _features(self, piece: Piece, contest: Contest, split: Split) -> Done:
        found = features_of(self.job.lines[piece.line].row.stage, contest, split, piece.seed)
        shots, labels = len(split.train), np.concatenate([split.train_labels, split.test_labels])
        agrees = nearest_shot_agrees(found, labels, shots)
        arrays = {"plane": plane_of(found, piece.seed), "labels": labels, "shots": np.arange(len(labels)) < shots}
        return Done({"nearest": agrees, "dimensions": found.shape[1], "pixels": len(found) - shots}, arrays)

    def _values(self) -> list[int]:
        return [item.value for item in self.labelled.classes]

    def _split(self, piece: Piece) -> Split:
        drawn = (piece.shots, piece.seed)
        if drawn not in self._splits:
            self._splits[drawn] = self.job.draw(self.labelled, *drawn)
        return self._splits[drawn]

    def _pretrained(self, key: str) -> UmdResult:
        if key not in self._umd:
            self._umd[key] = load_umd(self.job.umd_folder(key))
            while len(self._umd) > KEPT:
                self._umd.popitem(last=False)
        self._umd.move_to_end(key)
        return self._umd[key]
