"""When engines are opened and closed, and how many are open at once."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from support.scenes import CPUS, noise, scene
from tilewright.runtime import Restorer, load, setup
from tilewright.runtime.engines import ort
from tilewright.runtime.errors import ResourceError
from tilewright.runtime.memory import estimate as memory


class Life:
    """Which engines are opened and closed, in order."""

    def __init__(self, monkeypatch):
        self.told = []
        open_engine, close = ort.open_engine, ort.OrtEngine.close

        def opened(bundle, component, spec, opening):
            self.told.append(f"+{component}")
            return open_engine(bundle, component, spec, opening)

        def closed(engine):
            self.told.append(f"-{engine.graph.stem}")
            close(engine)

        monkeypatch.setattr(ort, "open_engine", opened)
        monkeypatch.setattr(ort.OrtEngine, "close", closed)

    def take(self):
        told, self.told = self.told, []
        return told


@pytest.fixture
def life(monkeypatch):
    return Life(monkeypatch)


ONE_BY_ONE = ["+words", "-words", "+see", "-see", "+paint", "-paint"]


def test_in_fast_memory_all_engines_are_opened_at_once_and_closed_at_the_end(tinted, life):
    with load(tinted) as restorer:
        assert sorted(life.take()) == ["+paint", "+see", "+words"]
        for _ in range(2):
            restorer(noise(9, 9, 3))
        restorer.sitting(noise(9, 9, 3))(gain=2)
        assert life.take() == []
    assert sorted(life.take()) == ["-paint", "-see", "-words"]


@pytest.mark.parametrize("devices", [CPUS[:1], CPUS])
def test_in_low_memory_an_engine_is_open_from_its_first_call_to_the_end_of_its_last_pass(tinted, life, devices):
    with load(tinted, memory="low", threads=1, devices=devices) as restorer:
        assert life.take() == []
        for _ in range(2):  # used again, they are opened again
            restorer(scene(20, 50))
            assert life.take() == ONE_BY_ONE
    assert life.take() == []


def test_engines_that_do_not_fit_together_are_opened_one_pass_at_a_time(tinted, life, monkeypatch):
    image = scene(20, 50)
    with load(tinted) as restorer:
        usual = restorer(image)
    life.take()
    monkeypatch.setattr(memory, "weights_bytes", lambda bundle, components, memory: 2**60 if memory == "fast" else 0)
    with load(tinted) as restorer:
        assert life.take() == []
        np.testing.assert_array_equal(restorer(image), usual)
        assert life.take() == ONE_BY_ONE


@pytest.mark.parametrize(("free", "opened"), [(None, True), (155, True), (154, False), (0, False)])
def test_engines_fit_together_where_their_weights_leave_three_tenths_of_what_is_free(
    bundle, life, monkeypatch, free, opened
):
    monkeypatch.setattr(setup, "available_bytes", lambda: free)  # the weights hold 27 numbers: 108 bytes
    with load(bundle):
        assert life.take() == (["+sharpen"] if opened else [])


@pytest.mark.skipif(len(CPUS) < 2, reason="needs two cores, for two devices")
@pytest.mark.parametrize(("free", "opened"), [(309, True), (308, False)])
def test_devices_with_engines_of_their_own_open_them_all_where_all_of_them_fit(bundle, life, monkeypatch, free, opened):
    monkeypatch.setattr(setup, "available_bytes", lambda: free)  # 216 bytes for both devices
    with load(bundle, devices=CPUS[:2], threads=2):
        assert life.take() == (["+sharpen", "+sharpen"] if opened else [])


def test_rounds_in_low_memory_open_only_the_engines_they_call(tinted, life):
    with load(tinted, memory="low") as restorer:
        sitting = restorer.sitting(scene(20, 50))
        sitting()
        assert life.take() == ONE_BY_ONE
        sitting(gain=2)
        assert life.take() == ["+paint", "-paint"]
        sitting(gain=2)
        assert life.take() == []
        sitting(prompt="red")
        assert life.take() == ["+words", "-words", "+paint", "-paint"]


def test_what_is_given_for_words_keeps_their_engine_closed(tinted, life, tmp_path):
    save_file({"look.tint": np.float32([[0.5, 0.25, 1]])}, tmp_path / "look.safetensors")
    with load(tinted, memory="low") as restorer:
        restorer(scene(20, 50), look=tmp_path / "look.safetensors")
    assert life.take() == ["+see", "-see", "+paint", "-paint"]


def test_an_engine_left_open_by_a_fault_is_closed_with_the_restorer(tinted, life, monkeypatch):
    def fail(engine, inputs, wanted):
        raise ResourceError("no room")

    monkeypatch.setattr(ort.OrtEngine, "run", fail)
    with load(tinted, memory="low") as restorer, pytest.raises(ResourceError):
        restorer(noise(9, 9, 3))
    assert life.take() == ["+words", "-words"]


def test_leaving_the_context_closes_the_engines_also_after_an_error(bundle):
    for fault in (None, RuntimeError("halfway")):
        try:
            with load(bundle) as restorer:
                assert isinstance(restorer, Restorer)
                (engine,) = restorer.engines.values()
                assert engine.session is not None
                if fault:
                    raise fault
        except RuntimeError:
            assert fault
        assert engine.session is None


def test_batch_replaces_the_number_of_tiles_in_a_call(tinted):
    picture, calls = noise(50, 50, 3), {}
    for batch in (None, 3):
        with load(tinted, threads=1, batch=batch) as restorer:
            engine = restorer.engines["paint"]
            run, sizes = engine.run, []
            engine.run = lambda inputs, wanted, run=run, sizes=sizes: (
                sizes.append(len(inputs["image"])) or run(inputs, wanted)
            )
            calls[batch] = restorer(picture, tile=16, overlap=0).tobytes(), max(sizes), sum(sizes)
    assert calls[None][1:] == (1, 16) and calls[3][1:] == (3, 16)
    assert calls[None][0] == calls[3][0]
