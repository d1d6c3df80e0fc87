"""What ``add-class`` reaches: every class in turn added later, with few shots or none, against training it at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastdiffclip.train.logistic import fit_head
from fastdiffclip.train.new_class import KnownClasses, NewClass

if TYPE_CHECKING:
    from fastdiffclip.bench.accuracy import Bench

SHOTS = (0, 1, 2, 5, 10, 20)  # of the class that is added, as far as the draw has them


class Found(NamedTuple):
    """Percent of its test pixels found, of the others taken for it; points by which the others' accuracy changes."""

    found: float
    taken: float
    change: float


def add_class(bench: Bench) -> dict[str, Any]:
    """Every class in turn: the head is trained without it, and it is added; beside that, trained at once.

    Where nothing is known of its share, a class with 0 shots is raised to 1 / K of all labelled pixels, as in
    ``zero-shot``.
    """
    figures: dict[tuple[int, str], list[list[Found]]] = {}
    for (most, seed), draw in bench.draws.items():
        at_once: dict[bytes, np.ndarray] = {}
        for unseen in range(bench.count):
            own = draw.train[bench.labels[draw.train] == unseen]
            kept = draw.train[bench.labels[draw.train] != unseen]
            order = np.append(np.delete(np.arange(bench.count), unseen), unseen)
            head, shares = _head(bench, kept, order[:-1])
            before = order[head.logits(bench.features[draw.test]).argmax(axis=1)]
            for count in (count for count in SHOTS if count <= min(most, len(own))):
                rows = {}
                for name, share in _shares(bench, unseen).items():
                    wider = _wider(bench, head, shares, kept, own[:count], order, share)
                    added = order[wider.logits(bench.features[draw.test]).argmax(axis=1)]
                    rows[name] = _judged(bench, draw.test, added, before, unseen)
                if count:
                    together = np.sort(np.concatenate([kept, own[:count]]))
                    if together.tobytes() not in at_once:
                        whole, _ = _head(bench, together, np.arange(bench.count))
                        at_once[together.tobytes()] = whole.logits(bench.features[draw.test]).argmax(axis=1)
                    rows["at once"] = _judged(bench, draw.test, at_once[together.tobytes()], before, unseen)
                for name, row in rows.items():
                    by_class = figures.setdefault((count, name), [[] for _ in range(bench.count)])
                    by_class[unseen].append(row)
        print(f"draw {seed}, {most} shots of the other classes", flush=True)
    return _table(bench, figures)


def _head(bench: Bench, rows: np.ndarray, classes: np.ndarray) -> tuple[KnownClasses, dict[str, float]]:
    """The head that ``train-flc`` fits to labelled pixels ``rows`` of these classes, and the weights of its views."""
    place = np.empty(bench.count, np.int64)
    place[classes] = np.arange(len(classes))
    texts = bench.prompts(bench.given.prompts)
    prompts = tuple(texts[number] for number in classes)
    settings = bench.config.logistic
    labels, centres = place[bench.labels[rows]], bench.centres[rows]
    head = fit_head(bench.features[rows], labels, centres, prompts, bench.statistics, settings)
    infos = tuple(bench.labelled.classes[number] for number in classes)
    return KnownClasses(infos, prompts, head.texts, head.bias, head.centre, head.weight), head.shares


def _shares(bench: Bench, unseen: int) -> dict[str, float | None]:
    """What a user may know of the share of the class: nothing, the truth, or something in between."""
    true = float((bench.labels == unseen).mean())
    return {"added": None, "share known": true, "half of it": true / 2, "twice it": min(0.9, 2 * true)}


def _wider(
    bench: Bench, head: KnownClasses, shares: dict[str, float], kept: np.ndarray, own: np.ndarray, order: np.ndarray,
    share: float | None,
) -> KnownClasses:  # fmt: skip
    """The head with the last class of ``order`` added from its text, or from shots ``own`` as well."""
    number = int(order[-1])
    new = NewClass(bench.labelled.classes[number], bench.prompts(bench.given.prompts)[number], share)
    if len(own) == 0:
        return head.with_described([new], bench.features, bench.config)
    rows, place = np.concatenate([kept, own]), np.argsort(order)
    labels = place[bench.labels[rows]]
    return head.with_shots(new, bench.features[rows], labels, bench.statistics, shares, bench.config, bench.features)


def _judged(bench: Bench, test: np.ndarray, said: np.ndarray, before: np.ndarray, unseen: int) -> Found:
    truth = bench.labels[test]
    own, others = truth == unseen, [value for value in np.unique(truth) if value != unseen]
    change = np.mean([(said[truth == k] == k).mean() - (before[truth == k] == k).mean() for k in others])
    return Found(*(100 * float(part) for part in ((said[own] == unseen).mean(), (said[~own] == unseen).mean(), change)))


def _table(bench: Bench, figures: dict[tuple[int, str], list[list[Found]]]) -> dict[str, Any]:
    """Means over draws and classes; the standard error is that over classes."""
    print("| shots of the class | | found | taken for it | AA of the others |")
    result: dict[str, Any] = {}
    for (count, name), by_class in figures.items():
        means = np.array([np.mean(rows, axis=0) for rows in by_class if rows])
        mean, error = means.mean(axis=0), means.std(axis=0, ddof=1) / len(means) ** 0.5
        cells = " | ".join(f"{m:.1f} ± {e:.1f}" for m, e in zip(mean, error, strict=True))
        print(f"| {count} | {name} | {cells} |")
        names = [item.name for item, rows in zip(bench.labelled.classes, by_class, strict=True) if rows]
        per_class = {item: Found(*row)._asdict() for item, row in zip(names, means.tolist(), strict=True)}
        result[f"{count} {name}"] = {"mean": Found(*mean.tolist())._asdict(), "classes": per_class}
    return result
