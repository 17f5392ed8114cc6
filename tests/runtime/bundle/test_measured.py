"""The measurements beside a bundle's seal: the latest on such a processor counts, and a damaged file counts as none."""

from dataclasses import replace

from tilewright.runtime.bundle.measured import Measured, Measurement, measurements, on_processor, remember
from tilewright.runtime.bundle.read import read_bundle
from tilewright.runtime.doctor import diagnose, summary
from tilewright.runtime.engines.machine import processor

FIRST = Measurement("EPYC", 2, {"ort": "1"}, {"sharpen": {"ort-float32": Measured(1e-6, 2.5)}})


def test_the_latest_measurement_on_a_processor_counts(tmp_path):
    slower = replace(FIRST, versions={"ort": "2"}, components={"sharpen": {"ort-float32": Measured(1e-6, 9.0)}})
    elsewhere = replace(FIRST, processor="Xeon", components={"sharpen": {"other": Measured(0, 1.0)}})
    for each in (FIRST, slower, elsewhere):
        remember(tmp_path, each)
    assert on_processor(tmp_path, "EPYC") == {"sharpen": {"ort-float32": Measured(1e-6, 9.0)}}
    assert on_processor(tmp_path, "Xeon") == {"sharpen": {"other": Measured(0, 1.0)}}
    assert on_processor(tmp_path, "Ryzen") == {}


def test_a_measurement_replaces_one_of_the_same_processor_threads_and_versions(tmp_path):
    again = replace(FIRST, components={"sharpen": {"ort-float32": Measured(2e-6, 3.0)}})
    for each in (FIRST, again):
        remember(tmp_path, each)
    assert measurements(tmp_path).measurements == (again,)


def test_engines_that_were_measured_apart_are_compared_if_they_had_the_same_threads(tmp_path):
    again = replace(FIRST, components={"sharpen": {"ort-int8": Measured(1e-3, 1.0)}})
    other = replace(FIRST, versions={"openvino": "2"}, components={"sharpen": {"vino": Measured(1e-6, 2.0)}})
    for each in (replace(FIRST, threads=8), FIRST, again, other):
        remember(tmp_path, each)
    engines = on_processor(tmp_path, "EPYC")["sharpen"]
    assert {name: m.seconds_per_megapixel for name, m in engines.items()} == {
        "ort-float32": 2.5,
        "ort-int8": 1.0,
        "vino": 2.0,
    }
    remember(tmp_path, replace(again, threads=8))
    assert {name: m.seconds_per_megapixel for name, m in on_processor(tmp_path, "EPYC")["sharpen"].items()} == {
        "ort-float32": 2.5,
        "ort-int8": 1.0,
    }
    remember(tmp_path, replace(again, threads=3))
    assert set(on_processor(tmp_path, "EPYC")["sharpen"]) == {"ort-int8"}


def test_a_damaged_file_counts_as_none_with_a_warning(tmp_path, caplog):
    remember(tmp_path, FIRST)
    (tmp_path / "reports" / "measured.json").write_text('{"measurements": [{"processor": 3}]}')
    assert on_processor(tmp_path, "EPYC") == {}
    assert "engines count as not measured" in caplog.text


def test_a_measurement_leaves_the_digest_as_it_is_and_the_doctor_shows_it(bundle):
    digest = read_bundle(bundle).digest
    remember(bundle, replace(FIRST, processor=processor()))
    remember(bundle, replace(FIRST, processor="another", components={"sharpen": {"ort-float32": Measured(0, 77.0)}}))
    assert read_bundle(bundle).digest == digest
    text = summary(diagnose(read_bundle(bundle))[0])
    assert "ort-float32  cpu  chosen; measured on such a processor: 2.5 s a megapixel, error 1.0e-06" in text
