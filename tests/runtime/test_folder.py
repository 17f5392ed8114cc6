"""Many images through one restorer: the same pictures as one by one, bounded, and none lost to another's fault."""

import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support.scenes import noise
from tilewright.runtime import load
from tilewright.runtime.errors import InputError, TilewrightError, UsageError
from tilewright.runtime.folder import PER_DEVICE, images_of, restore_images
from tilewright.runtime.memory import estimate as memory

SIZES = [(20, 30), (61, 17), (8, 8), (40, 90), (33, 33), (64, 64), (5, 50)]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with seven pictures of different sizes."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, size in enumerate(SIZES):
        Image.fromarray(noise(*size, 3, seed=i)).save(folder / f"{i}.png")
    return folder


def pairs_of(folder: Path) -> list[tuple[Path, Path]]:
    return images_of(folder, folder.parent / "restored", "png")[0]


def test_each_picture_is_as_if_it_were_alone_and_the_share_rises_to_one(pictures, restorer) -> None:
    told = []
    pairs = pairs_of(pictures)
    outcomes = restore_images(restorer, pairs, tile=32, overlap=8, on_progress=lambda *news: told.append(news))
    assert [o.source.name for o in outcomes] == [f"{i}.png" for i in range(len(SIZES))]
    for (height, width), outcome in zip(SIZES, outcomes, strict=True):
        assert outcome.error is None
        assert (outcome.input_size, outcome.size) == ((width, height), (2 * width, 2 * height))
        alone = restorer(outcome.source, tile=32, overlap=8)
        np.testing.assert_array_equal(np.asarray(Image.open(outcome.target)), alone)
    shares = [share for _, _, share in told]
    assert shares == sorted(shares) and told[-1] == (7, 7, 1.0)
    assert len(shares) > sum(sum(o.tiles.values()) for o in outcomes)  # every tile is told, and every end


def test_a_picture_that_fails_is_told_and_the_others_are_restored(pictures, restorer) -> None:
    (pictures / "3.png").write_bytes((pictures / "3.png").read_bytes()[:200])
    (pictures / "5.png").write_bytes(b"no picture")
    outcomes = restore_images(restorer, pairs_of(pictures))
    failed = {o.source.name: str(o.error) for o in outcomes if o.error}
    assert set(failed) == {"3.png", "5.png"}
    assert "3.png cannot be decoded" in failed["3.png"] and "5.png is damaged or not an image" in failed["5.png"]
    restored = [*(f"{i}.png" for i in (0, 1, 2, 4, 6)), "finished.resume"]  # so that only the others are left
    assert sorted(p.name for p in (pictures.parent / "restored").iterdir()) == restored


def test_a_few_pictures_are_in_work_at_once_and_never_more(pictures, bundle, monkeypatch) -> None:
    two, at_once = threading.Barrier(PER_DEVICE), []
    with load(bundle) as restorer:
        pairs = pairs_of(pictures)[:6]
        read = type(restorer).sitting

        def sitting(self, image, **options):
            result = read(self, image, **options)
            if isinstance(image, Path):
                two.wait(30)  # each waits for another: one by one, none would go on
            return result

        monkeypatch.setattr(type(restorer), "sitting", sitting)
        outcomes = restore_images(
            restorer, pairs, on_progress=lambda *_: at_once.append(len(restorer.executor.tasks)), tile=16, overlap=0
        )
    assert not any(o.error for o in outcomes)
    assert max(at_once) <= PER_DEVICE


def test_pictures_wait_for_memory_that_others_use(pictures, restorer, monkeypatch) -> None:
    for i in range(len(SIZES)):
        Image.fromarray(noise(60, 60, 3, seed=i)).save(pictures / f"{i}.png")
    smallest, one = (memory.estimate(restorer.bundle, side, side).needed_bytes for side in (1, 60))
    monkeypatch.setattr(memory, "available_bytes", lambda: one + (one - smallest) // 2)
    at_once = []
    outcomes = restore_images(
        restorer, pairs_of(pictures), on_progress=lambda *_: at_once.append(len(restorer.executor.tasks))
    )
    assert [o.error for o in outcomes] == [None] * len(SIZES)
    assert max(at_once) == 1
    monkeypatch.setattr(memory, "available_bytes", lambda: (one + smallest) // 2)
    restorer.engines.opened.clear()  # whose memory would count as free
    failed = restore_images(restorer, pairs_of(pictures))
    assert all("needs about" in str(o.error) for o in failed)


def test_wrong_options_are_refused_before_any_work(pictures, restorer) -> None:
    for options in ({"tile": 7}, {"seed": -1}, {"steps": 3}, {"scale": 3}, {"nonsense": 1}):
        with pytest.raises(UsageError):
            restore_images(restorer, pairs_of(pictures), **options)
    assert not (pictures.parent / "restored").exists()


def test_an_interrupt_keeps_finished_files_and_leaves_no_other(pictures, restorer) -> None:
    def listen(done: int, images: int, share: float) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as stopped:
        restore_images(restorer, pairs_of(pictures), on_progress=listen)
    assert not restorer.executor.tasks
    assert stopped.value.kept.path == pictures.parent / "restored"
    written = [path for path in (pictures.parent / "restored").iterdir() if path.suffix != ".resume"]
    assert 1 <= len(written) < len(SIZES)
    for path in written:
        np.testing.assert_array_equal(np.asarray(Image.open(path)), restorer(pictures / path.name))
    assert not any(o.error for o in restore_images(restorer, pairs_of(pictures)))  # the restorer is as before


def test_the_images_of_a_folder_are_those_with_the_suffix_of_one(pictures, tmp_path) -> None:
    for name in ("notes.txt", ".hidden.png", "Thumbs.db"):
        (pictures / name).write_bytes(b"")
    (pictures / "deeper.png").mkdir()
    (pictures / "0.png").rename(pictures / "0.JPG")
    pairs, others = images_of(pictures, tmp_path / "out", "webp")
    assert [(s.name, t) for s, t in pairs[:2]] == [("0.JPG", tmp_path / "out" / "0.webp"), ("1.png", pairs[1][1])]
    assert (len(pairs), others) == (len(SIZES), 2)


def test_a_folder_that_cannot_be_restored_is_refused(pictures, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_bytes(b"")
    Image.new("RGB", (4, 4)).save(pictures / "0.jpg")
    refusals: list[tuple[Path, Path, type[TilewrightError], str]] = [
        (tmp_path / "empty", tmp_path / "out", InputError, "empty holds no images"),
        (pictures, tmp_path / "file", UsageError, "file is a file"),
        (pictures, tmp_path / "out", UsageError, r"0.jpg and 0.png would both become .*out/0.png; rename"),
        (pictures / "none", tmp_path / "out", InputError, "none cannot be read"),
    ]
    for folder, into, kind, said in refusals:
        with pytest.raises(kind, match=said):
            images_of(folder, into, "png")
    (pictures / "0.jpg").unlink()
    with pytest.raises(UsageError, match="not a directory: create it first"):
        images_of(pictures, tmp_path / "no" / "such", "png")
