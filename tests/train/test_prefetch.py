"""Windows that are fed to the steps: the same run to the last bit, and what a device that runs behind must not see."""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from fastdiffclip.config import Config
from fastdiffclip.errors import InputDataError, InterruptedRunError
from fastdiffclip.kernels import philox, visible_noise
from fastdiffclip.model.mask_diffusion import MaskDiffusion
from fastdiffclip.runtime import Compute
from fastdiffclip.scene.blocks import RowReader
from fastdiffclip.scene.prepare import fit_front_end
from fastdiffclip.scene.store import Scene, open_scene
from fastdiffclip.scene.windows import read_windows
from fastdiffclip.train import prefetch, umd
from fastdiffclip.train.data import UmdData, device_room, umd_data
from fastdiffclip.train.loop import EpochOrder, start_engine
from fastdiffclip.train.prefetch import FedData, Feeder, fitting_data
from fastdiffclip.train.steps import GraphSteps
from fastdiffclip.train.umd import UmdResult, UmdStep, train_umd
from fastdiffclip.train.world import World

from ..conftest import write_small_scene
from .test_steps import Recorder, rate, take, with_rate_tensor

CPU = torch.device("cpu")
BATCH_BYTES = 16 * 9 * (12 * 2 + 1 + 1 * 4 + 1)  # of the small scene and the small settings
# Room on the device, memory for scenes: from prepared scenes, from disk a batch at a time, and three at a time.
WAYS = {"memory": (0, 1 << 30), "disk": (None, 1), "disk ahead": (None, 3 * BATCH_BYTES)}


@pytest.fixture(scope="module")
def scenes(small_scene: Scene, tmp_path_factory: pytest.TempPathFactory) -> list[Scene]:
    """Two scenes of different size, both with invalid pixels."""
    folder = tmp_path_factory.mktemp("scenes")
    return [small_scene, open_scene(write_small_scene(folder / "other.zarr", seed=1, height=9, width=41))]


@pytest.fixture(scope="module")
def config(small_config: Config) -> Config:
    """Batches of 16 out of 90 windows, the last one of 10, over two epochs."""
    return small_config.model_copy(update={"umd": small_config.umd.model_copy(update={"samples": 90, "epochs": 2})})


@pytest.fixture(scope="module")
def resident(scenes: list[Scene], config: Config) -> UmdResult:
    return train_umd(scenes, config, device="cpu")


def fed(scenes: list[Scene], config: Config, way: str, world: World | None = None) -> FedData:
    front_end = fit_front_end("standard", scenes)
    room, budget = WAYS[way]
    data = fitting_data(scenes, front_end, config, 0, CPU, world or World(), budget, room)
    assert isinstance(data, FedData) and (data.ahead > 1) == (way == "disk ahead")
    return data


def held(scenes: list[Scene], config: Config) -> UmdData:
    return umd_data(scenes, fit_front_end("standard", scenes), config.umd.samples, 3, 0, 1 << 30, CPU)


@contextmanager
def forced(monkeypatch: pytest.MonkeyPatch, way: str) -> Iterator[list[UmdData]]:
    """``train_umd`` feeds its windows; yields what it took."""
    taken: list[UmdData] = []

    def choose(*args: object) -> UmdData:
        taken.append(fitting_data(*args[:6], WAYS[way][1], WAYS[way][0]))  # type: ignore[arg-type]
        return taken[-1]

    with monkeypatch.context() as patch:
        patch.setattr(umd, "fitting_data", choose)
        yield taken
    assert taken and all(isinstance(data, FedData) for data in taken)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("windows")]


def windows_of(data: UmdData, order: EpochOrder, step: int) -> list[torch.Tensor]:
    """What the ops read at a step."""
    centres, rows, total = data.batch(order, torch.tensor(step))
    read = [
        visible_noise(flat, centres, None, None, philox.rng_state(0), window=3, visible=9, valid_rows=rows)[0]
        for flat in data.flat
    ]
    return [*read, rows, total]


def same(ours: UmdResult, theirs: UmdResult) -> bool:
    pairs = zip(ours.model.parameters(), theirs.model.parameters(), strict=True)
    return ours.losses == theirs.losses and all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("way", WAYS)
def test_a_fed_run_is_the_resident_run(
    scenes: list[Scene], config: Config, resident: UmdResult, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    with forced(monkeypatch, way):
        assert same(train_umd(scenes, config, device="cpu"), resident)


@pytest.mark.parametrize("way", ["memory", "disk ahead"])
def test_an_interrupted_fed_run_goes_on_in_any_way(
    scenes: list[Scene], config: Config, resident: UmdResult, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    way: str,
) -> None:  # fmt: skip
    def interrupt(task: str, done: int, total: int, note: str = "") -> None:
        if done == 7:
            os.kill(os.getpid(), signal.SIGINT)

    with forced(monkeypatch, way), pytest.raises(InterruptedRunError, match="after step 7 of 12"):
        train_umd(scenes, config, device="cpu", out=tmp_path / "run", progress=interrupt)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    with forced(monkeypatch, way):
        assert same(train_umd(scenes, config, device="cpu", out=tmp_path / "run", resume=True), resident)
        # A finished run is taken as it is: nothing is gathered any more.
        assert same(train_umd(scenes, config, device="cpu", out=tmp_path / "run", resume=True), resident)
    assert same(train_umd(scenes, config, device="cpu", out=tmp_path / "copy", resume=True), resident)


def test_a_chunk_damaged_during_the_run_ends_it_with_its_own_sentence(
    config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    scene = open_scene(write_small_scene(tmp_path / "s.zarr"))
    chunk = next(file for file in sorted((tmp_path / "s.zarr" / "hsi" / "c").rglob("*")) if file.is_file())

    def damage(task: str, done: int, total: int, note: str = "") -> None:
        if done == 2:
            content = bytearray(chunk.read_bytes())
            content[len(content) // 2] ^= 255
            chunk.write_bytes(content)

    with forced(monkeypatch, "disk"), pytest.raises(InputDataError, match=r"array 'hsi', chunk 0/0/0 is damaged"):
        train_umd([scene], config, device="cpu", progress=damage)


def test_a_signal_during_a_pass_over_the_scenes_ends_it(
    config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The run waits for its fourth batch; what is left of the pass is not read."""
    monkeypatch.setattr("fastdiffclip.scene.layout._CHUNK_BYTES", 9 * 24)
    scene = open_scene(write_small_scene(tmp_path / "s.zarr", height=60, width=20))
    assert scene.chunk_rows("hsi") == 3
    third, passes, late, rows = threading.Event(), [], [], RowReader.rows

    def read(reader: RowReader, *where: int) -> tuple[np.ndarray, np.ndarray]:
        if len(passes) == 2:
            if not late:
                assert third.wait(60)
                time.sleep(0.3)  # for the run to find that there is no fourth batch
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
            late.append(where)
        return rows(reader, *where)

    def progress(task: str, done: int, total: int, note: str = "") -> None:
        if done == 3:
            third.set()

    whole = train_umd([scene], config, device="cpu")
    with monkeypatch.context() as patch:
        patch.setattr(RowReader, "rows", read)
        patch.setattr(prefetch, "read_windows", lambda *args: passes.append(1) or read_windows(*args))
        with forced(patch, "disk ahead"), pytest.raises(InterruptedRunError, match="after step 3 of 12; continue"):
            train_umd([scene], config, device="cpu", out=tmp_path / "run", progress=progress)
    assert len(passes) == 2 and len(late) < 10  # of 20 rows of chunks of one raster and some of the other
    assert same(train_umd([scene], config, device="cpu", out=tmp_path / "run", resume=True), whole)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_each_process_gathers_its_own_rows(scenes: list[Scene], config: Config, way: str, size: int) -> None:
    """Shares of 16, 8 and 6 rows; of a last batch of 10 the last of three processes has padding alone."""
    reference = held(scenes, config)
    for rank in range(size):
        world = World(rank, size)
        data = fed(scenes, config, way, world)
        order = EpochOrder(0, 90, 16, CPU, world)
        with data.feed(4, 15) as feed:
            assert feed is not None
            for step in range(4, 15):
                feed.load(step)
                for ours, theirs in zip(windows_of(data, order, step), windows_of(reference, order, step), strict=True):
                    assert torch.equal(ours, theirs)


def test_a_graph_reads_the_same_buffers(scenes: list[Scene], config: Config) -> None:
    """The recorded step finds the half of its batch from its number on the device."""
    losses, total = [], 20
    for data in (held(scenes, config), fed(scenes, config, "memory")):
        where = Compute(CPU, torch.float32)
        channels = {"hsi": 12, "lidar": 1}
        model = MaskDiffusion(channels, config.model)
        engine = start_engine(model, {}, config, config.umd, where, World())
        step = UmdStep(data, config, 0, where, with_rate_tensor(engine))
        with data.feed(3, total) as feed:
            steps = GraphSteps(step, engine, rate, total, 3, Recorder(engine), None if feed is None else feed.load)
            losses.append(take(steps, 3, total))
    assert len(losses[0]) == 17 and losses[0] == losses[1]


def test_what_fits_is_held(scenes: list[Scene], small_config: Config) -> None:
    """Whole scenes first, then the drawn windows, and only then batches; the smaller limit counts."""
    front_end = fit_front_end("standard", scenes)
    drawn = 40 * BATCH_BYTES // 16
    cases = (((1 << 30, None), 2), ((1 << 30, drawn), 40), ((drawn, None), 40), ((drawn, 1 << 30), 40))
    for (budget, room), count in cases:
        data = fitting_data(scenes, front_end, small_config, 0, CPU, World(), budget, room)
        assert type(data) is UmdData and len(data.flat[0].extents) == count
    for budget, room in ((1 << 30, drawn - 1), (drawn - 1, None)):
        assert isinstance(fitting_data(scenes, front_end, small_config, 0, CPU, World(), budget, room), FedData)


def test_room_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (6 << 30, 8 << 30))
    assert device_room(CPU) is None and device_room(torch.device("cuda", 0)) == 3 << 30


class Device:
    """Stands in for a GPU: work waits in streams until somebody waits for it, then runs in any order they allow."""

    def __init__(self, seed: int) -> None:
        self.random, self.streams = random.Random(seed), [Stream(self)]
        self.current = self.streams[0]

    def new_stream(self, _: object) -> Stream:
        self.streams.append(Stream(self))
        return self.streams[-1]

    @contextmanager
    def use(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def run(self, until: Callable[[], bool]) -> None:
        while not until():
            ready = [s for s in self.streams if s.work and s.work[0][0]()]
            assert ready, "the streams wait for each other"
            self.random.choice(ready).work.pop(0)[1]()


class Event:
    def __init__(self, device: Device) -> None:
        self.device, self.past = device, False

    def happen(self) -> None:
        self.past = True

    def synchronize(self) -> None:
        self.device.run(lambda: self.past)


class Stream:
    def __init__(self, device: Device) -> None:
        self.device = device
        self.work: list[tuple[Callable[[], bool], Callable[[], None]]] = []

    def add(self, call: Callable[[], None]) -> None:
        self.work.append((lambda: True, call))

    def record_event(self) -> Event:
        event = Event(self.device)
        self.add(event.happen)
        return event

    def wait_event(self, event: Event) -> None:
        self.work.append((lambda: event.past, lambda: None))


@pytest.mark.parametrize("seed", range(8))
def test_a_device_that_runs_behind_reads_whole_batches(
    scenes: list[Scene], config: Config, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    device, copy = Device(seed), prefetch.copy
    data, reference = fed(scenes, config, "memory"), held(scenes, config)
    order, wrong, deepest = EpochOrder(0, 90, 16, CPU), [], 0
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: device.current)
    monkeypatch.setattr(torch.cuda, "stream", device.use)
    monkeypatch.setattr(prefetch, "copy", lambda a, b: device.current.add(lambda: copy(a, b)))
    done: list[int] = []

    def compute(step: int) -> None:
        pairs = zip(windows_of(data, order, step), windows_of(reference, order, step), strict=True)
        wrong.extend(step for ours, theirs in pairs if not torch.equal(ours, theirs))
        done.append(step)

    with ThreadPoolExecutor(1) as pool:
        feeder = Feeder(data, pool, 0, 40)
        feeder._side = device.new_stream(None)  # type: ignore[assignment]
        for step in range(40):
            feeder.load(step)
            device.current.add(lambda step=step: compute(step))  # type: ignore[misc]
            deepest = max(deepest, step + 1 - len(done))
        device.run(lambda: not any(s.work for s in device.streams))
    assert done == list(range(40)) and not wrong
    assert deepest >= 2  # the device has work while the host looks for more
