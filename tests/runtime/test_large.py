"""Pictures that do not fit in memory: the same pixels as in memory, with a bound on what is in memory."""

import io
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from support.scenes import CPUS, WHOLE, noise, scene
from tilewright.runtime import load, write_image
from tilewright.runtime.errors import InputError, ResourceError, UsageError
from tilewright.runtime.images import on_disk, vips
from tilewright.runtime.images.read import read_image
from tilewright.runtime.images.write import PictureOnDisk
from tilewright.runtime.memory import estimate

pyvips = pytest.importorskip("pyvips", reason="images larger than memory need pyvips")
OUT = Path("out.tif")


def files():
    return sorted(path.name for path in Path().iterdir())


@pytest.fixture(autouse=True)
def _folder(tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def scarce(monkeypatch):
    """A memory limit that small pictures exceed, unless their pixels lie on the disk."""
    monkeypatch.setattr(estimate, "LIBVIPS_BYTES", 0)
    monkeypatch.setattr(estimate, "LIBVIPS_ROWS", 0)

    def limit(bundle, height, width, devices=1):
        with load(bundle, threads=1, devices=CPUS[:devices]) as restorer:
            on_disk, in_memory = (
                restorer.estimate(width, height, tile=32, on_disk=disk).needed_bytes for disk in (True, False)
            )
        assert on_disk < in_memory
        return on_disk

    return limit


def restored(bundle, limit, source, target=OUT, *, devices=1, resume=None, on_part=None, bits=8, tile=32, color="off"):
    """Restore a file to a file, and say whether the pixels lay on the disk."""
    with load(bundle, memory_limit=limit, threads=1, devices=CPUS[:devices]) as restorer:
        options = {} if on_part is None else {"on_part": on_part}
        ticket = restorer.submit(source, beside=target, tile=tile, resume=resume, bits=bits, color=color, **options)
        with ticket.keeping(f"{target}.resume"):
            restoration = ticket.result()
            write_image(target, restoration.image, icc=restoration.icc)
    return isinstance(restoration.image, PictureOnDisk)


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_a_picture_on_the_disk_has_the_pixels_of_one_in_memory(bundle, scarce, channels):
    pixels = noise(90, 120, channels)
    Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save("in.png")
    assert not restored(bundle, None, "in.png", Path("memory.png"))
    for devices, target in ((1, OUT), (len(CPUS), Path("out.png"))):
        assert restored(bundle, scarce(bundle, 90, 120, devices), "in.png", target, devices=devices)
        np.testing.assert_array_equal(np.asarray(Image.open(target)), np.asarray(Image.open("memory.png")))
    assert files() == ["in.png", "memory.png", "out.png", "out.tif"]  # nothing else is left


@pytest.mark.parametrize("color", ["wavelet", "adain"])
def test_colours_are_the_same_on_the_disk_and_in_memory(bundle, scarce, color):
    write_image("in.png", noise(50, 60, 4))
    assert not restored(bundle, None, "in.png", Path("memory.png"), color=color)
    assert restored(bundle, scarce(bundle, 50, 60, len(CPUS)), "in.png", devices=len(CPUS), color=color)
    in_memory = np.asarray(Image.open("memory.png"))
    np.testing.assert_array_equal(np.asarray(Image.open(OUT)), in_memory)
    restored(bundle, None, "in.png", Path("off.png"))
    assert (np.asarray(Image.open("off.png")) != in_memory).any()


def test_sixteen_bits_are_kept(bundle, kernels):
    """In 16 bits the network sees more than 256 levels, and the result agrees with a computation in float64."""
    low, fine = scene(40, 56), noise(40, 56, 3, seed=1)
    deep = low.astype(np.uint16) * 256 + fine
    vips.write_large("in.png", deep.shape, np.uint16, lambda top, bottom: deep[top:bottom], kept={})
    assert restored(bundle, None, "in.png", bits=16, tile=WHOLE)
    result = pyvips.Image.new_from_file("out.tif").numpy()
    assert result.dtype == np.uint16
    levels = (deep / np.float32(65535)).astype(np.float32)
    planes = [Image.fromarray(levels[..., c]).resize((112, 80), Image.Resampling.BICUBIC) for c in range(3)]
    large = np.pad(np.stack(planes, 2).clip(0, 1).astype(np.float64), ((1, 1), (1, 1), (0, 0)), "reflect")
    shifts = [(dy, dx) for dy in range(3) for dx in range(3)]
    right = sum(large[dy : 80 + dy, dx : 112 + dx] * kernels[:, dy, dx] for dy, dx in shifts) / 7
    assert np.abs(result - right.clip(0, 1) * 65535).max() < 1  # of 65,535 levels


def test_sixteen_bits_are_the_same_on_any_number_of_devices(bundle):
    deep = np.random.default_rng(0).integers(0, 65536, (40, 56, 2), np.uint16)
    vips.write_large("in.png", deep.shape, np.uint16, lambda top, bottom: deep[top:bottom], kept={})
    for devices, target in ((1, OUT), (len(CPUS), Path("more.tif"))):
        assert restored(bundle, None, "in.png", target, bits=16, devices=devices)
    assert OUT.read_bytes() == Path("more.tif").read_bytes()
    assert pyvips.Image.new_from_file("out.tif").numpy().shape == (80, 112, 2)


@pytest.mark.parametrize("devices", [1, len(CPUS)])
def test_a_picture_on_the_disk_goes_on_after_a_stop(bundle, scarce, devices):
    write_image("in.png", noise(90, 120, 3))
    limit = scarce(bundle, 90, 120, devices)
    with load(bundle, threads=1) as restorer:
        right = restorer(noise(90, 120, 3), tile=32)
    parts = []

    def stop(top, left, pixels):
        parts.append((top, left))
        if len(parts) % 40 == 0:
            raise EOFError

    for _ in range(3):
        with pytest.raises(EOFError):
            restored(bundle, limit, "in.png", devices=devices, resume="out.tif.resume", on_part=stop)
        assert files() == ["in.png", "out.tif.pixels", "out.tif.resume"]
    on_part = lambda top, left, pixels: parts.append((top, left))  # noqa: E731
    assert restored(bundle, limit, "in.png", devices=devices, resume="out.tif.resume", on_part=on_part)
    assert len(parts) == len(set(parts)) + 3  # the part at which it stopped is made again
    np.testing.assert_array_equal(np.asarray(Image.open(OUT)), right)
    assert files() == ["in.png", "out.tif"]


def test_what_lies_beside_the_pixels_is_kept(bundle):
    """A profile, tags of EXIF and the resolution; the picture is upright, and its tags say so."""
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "A Camera Maker", 6  # lies on its side
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture = Image.fromarray(scene(40, 56))
    picture.save("in.jpg", exif=exif, icc_profile=icc, dpi=(300, 300), quality=95)
    assert restored(bundle, None, "in.jpg", Path("out.png"), bits=16)
    result = Image.open("out.png")
    assert result.size == (80, 112) and result.info["icc_profile"] == icc
    assert result.getexif()[0x010F] == "A Camera Maker" and result.getexif().get(0x0112, 1) == 1
    assert round(result.info["dpi"][0]) == 300


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_become_upright_as_in_memory(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(noise(300, 150, 3)).save("in.png", exif=exif)
    picture = vips.read_large(
        Path("in.png"), Path(), bits=8, max_pixels=10**6, check=lambda width, height: None, memory=None
    )
    right = read_image("in.png").rgb
    np.testing.assert_array_equal(picture.rgb[0 : right.shape[0], 0 : right.shape[1]], right)


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("cut.tif", InputError, "cut.tif cannot be decoded .*: replace the damaged or cut file"),
        ("cut.png", InputError, "cut.png cannot be decoded"),
        ("bomb.png", InputError, "bomb.png is 60000x60000 = 3600000000 pixels, over the limit of 100000000"),
        ("text.tif", InputError, "text.tif is damaged, or of a format that is not read strip by strip"),
        ("interlaced.jpg", InputError, "interlaced.jpg can only be decoded as a whole"),
        ("cmyk.jpg", InputError, "cmyk.jpg holds 4 channels of uchar, cmyk: convert it to RGB"),
    ],
)
def test_a_bad_image_is_refused_in_one_line_and_leaves_nothing(bundle, monkeypatch, name, error, said):
    picture = Image.fromarray(noise(200, 300, 3))
    if name == "bomb.png":
        content = io.BytesIO()
        Image.fromarray(np.zeros((1, 1), np.uint8)).save(content, "PNG")
        data = bytearray(content.getvalue())
        data[16:24] = (60000).to_bytes(4, "big") * 2
        data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
        Path(name).write_bytes(data)
    elif name == "text.tif":
        Path(name).write_text("not an image")
    elif name == "interlaced.jpg":
        picture.save(name, progressive=True)
        monkeypatch.setattr(estimate, "available_bytes", lambda: 500_000)
        monkeypatch.setattr(estimate.Estimate, "require", lambda self: None)
    elif name == "cmyk.jpg":
        picture.convert("CMYK").save(name)
    else:
        picture.save(f"whole{Path(name).suffix}")
        Path(name).write_bytes(Path(f"whole{Path(name).suffix}").read_bytes()[:90_000])
    before = files()
    with load(bundle, threads=1) as restorer, pytest.raises(error, match=said) as raised:
        restorer.submit(name, beside=OUT, bits=16)
    assert "\n" not in str(raised.value)
    assert files() == before


def test_what_cannot_be_written_is_refused_before_any_work(bundle, monkeypatch):
    write_image("in.png", noise(20, 30, 3))
    with load(bundle, threads=1) as restorer:
        with pytest.raises(UsageError, match=r"bits=16: \.jpg holds 8 bits a channel; use \.png or \.tif"):
            restorer.submit("in.png", beside="out.jpg", bits=16)
        with pytest.raises(UsageError, match=r"out\.bmp: pictures on the disk are written as \.png"):
            restorer.submit("in.png", beside="out.bmp", bits=16)
        with pytest.raises(UsageError, match="bits=9 is no depth"):
            restorer.submit("in.png", beside="out.png", bits=9)
        with pytest.raises(UsageError, match="bits=16 works from a file to a file only"):
            restorer.submit(noise(20, 30, 3), bits=16)
        monkeypatch.setattr(on_disk.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**6, 0, 10**4))
        with pytest.raises(ResourceError, match=r"needs room for 33.6 kB \(.*\), and 10.0 kB are free there"):
            restorer.submit("in.png", beside="out.png", bits=16)


def test_a_disk_that_is_full_while_pixels_come_ends_the_restoration_and_can_be_gone_on_from(bundle, monkeypatch):
    write_image("in.png", noise(60, 70, 3))
    write, written = on_disk.PixelFile.__setitem__, []

    def fill_up(file, spans, pixels):
        if file.path and len(written) == 5:
            raise on_disk.disk_error(file.path, OSError(28, "No space left on device"))
        written.extend([spans] if file.path else [])
        write(file, spans, pixels)

    with monkeypatch.context() as patch:
        patch.setattr(on_disk.PixelFile, "__setitem__", fill_up)
        with pytest.raises(
            ResourceError, match=r"out\.tif\.pixels cannot be written .No space left on device.: free space"
        ):
            restored(bundle, None, "in.png", bits=16)
    assert not OUT.exists()
    assert restored(bundle, None, "in.png", bits=16, resume="out.tif.resume")
    assert restored(bundle, None, "in.png", Path("right.tif"), bits=16)
    assert OUT.read_bytes() == Path("right.tif").read_bytes()


def test_pixels_that_are_gone_are_refused(bundle):
    write_image("in.png", noise(60, 70, 3))
    parts = []

    def stop(top, left, pixels):
        parts.append((top, left))
        if len(parts) == 9:
            raise EOFError

    with pytest.raises(EOFError):
        restored(bundle, None, "in.png", bits=16, on_part=stop)
    with pytest.raises(
        UsageError, match=r"out\.tif\.pixels holds pixels of an earlier restoration, of which .*% is done"
    ):
        restored(bundle, None, "in.png", bits=16)
    with pytest.raises(UsageError, match="with bits=16, and this one has bits=8"):
        restored(bundle, None, "in.png", resume="out.tif.resume")
    with Path("out.tif.pixels").open("r+b") as file:
        top, left = parts[0]  # parts end in any order, and the first is surely counted as done
        file.seek((top * 2 * 70 + left) * 3 * 2)
        file.write(b"\0" * 3 * 2 * 4)
    with pytest.raises(
        InputError, match=r"out\.tif\.pixels lacks pixels that out.tif.resume counts as done; remove both"
    ):
        restored(bundle, None, "in.png", bits=16, resume="out.tif.resume")


def test_without_pyvips_a_picture_that_does_not_fit_names_what_to_install(bundle, scarce, monkeypatch):
    write_image("in.png", noise(90, 120, 3))
    limit = scarce(bundle, 90, 120)
    monkeypatch.setattr("tilewright.runtime.restore.installed", lambda: False)
    with pytest.raises(ResourceError, match=r"or pip install 'tilewright\[large\]', which keeps pixels on the disk"):
        restored(bundle, limit, "in.png")
