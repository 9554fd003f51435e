"""Recordings: every common format of .wav gives the same sound; what is no recording is named."""

import io
import struct
import wave

import numpy as np
import pytest
from scipy.io import wavfile

from foundation.errors import DataError
from pipeline import data
from pipeline.data.audiofolder import recording
from pipeline.data.samples import Reading

RATE = 16_000
TONE = 0.5 * np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)


def wav(samples, width=2, rate=RATE, channels=1) -> bytes:
    """PCM of `width` bytes per sample."""
    scaled = np.round(samples * (2 ** (8 * width - 1) - 1)).astype(np.int64) + (128 if width == 1 else 0)
    content = b"".join(int(one).to_bytes(width, "little", signed=width > 1) for one in np.repeat(scaled, channels))
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(channels), file.setsampwidth(width), file.setframerate(rate)
        file.writeframes(content)
    return buffer.getvalue()


def folder(path, classes=("no", "yes"), count=12, **options):
    for number, name in enumerate(classes):
        (path / name).mkdir(parents=True)
        for n in range(count):
            tone = 0.5 * np.sin(2 * np.pi * (100 + 37 * n + 400 * number) * np.arange(2000) / RATE)
            (path / name / f"{n}.wav").write_bytes(wav(tone, **options))
    return path


def test_a_folder_per_class_becomes_recordings_of_one_length(tmp_path):
    found = data.load(f"audiofolder:{folder(tmp_path / 'words')}", reading=Reading(seconds=0.1))
    assert found.labels == ("no", "yes")
    assert found.inputs[0].shape == (1, 1600)
    (sound,), labels = next(found.batches("train"))
    assert sound.shape[1:] == (1, 1600)
    assert 0.4 < float(sound.abs().max()) < 0.51
    assert len(labels) == len(sound)
    assert sum(len(found.split(part)) for part in data.PARTS) == 24


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2])
def test_every_width_gives_the_same_sound(tmp_path, width, channels):
    (tmp_path / "a.wav").write_bytes(wav(TONE[:4000], width, channels=channels))
    made = recording(str(tmp_path / "a.wav"), RATE, 4000)
    np.testing.assert_allclose(made[0], TONE[:4000], atol=2e-2 if width == 1 else 1e-3)


def test_floats_and_extensible_headers_are_read(tmp_path):
    wavfile.write(tmp_path / "a.wav", RATE, TONE.astype(np.float32))
    np.testing.assert_allclose(recording(str(tmp_path / "a.wav"), RATE, RATE)[0], TONE, atol=1e-6)
    plain = wav(TONE[:4000])
    head = struct.pack("<HHIIHH", 0xFFFE, 1, RATE, 2 * RATE, 2, 16) + struct.pack("<HHI", 22, 16, 4)
    head += struct.pack("<IHH", 1, 0, 16) + b"\x80\x00\x00\xaa\x00\x38\x9b\x71"
    body = b"WAVEfmt " + struct.pack("<I", len(head)) + head + plain[36:]
    (tmp_path / "b.wav").write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)
    np.testing.assert_allclose(recording(str(tmp_path / "b.wav"), RATE, 4000)[0], TONE[:4000], atol=1e-3)


def test_a_header_of_a_stream_claims_more_than_there_is(tmp_path):
    whole = wav(TONE[:4000])
    (tmp_path / "a.wav").write_bytes(whole[:40] + struct.pack("<I", 2**32 - 1) + whole[44:])
    np.testing.assert_allclose(recording(str(tmp_path / "a.wav"), RATE, 4000)[0], TONE[:4000], atol=1e-3)


@pytest.mark.parametrize("rate", [8000, 22_050, 44_100, 48_000])
def test_other_rates_are_brought_to_the_wanted_one(tmp_path, rate):
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(3 * rate) / rate)
    (tmp_path / "a.wav").write_bytes(wav(tone, rate=rate))
    made = recording(str(tmp_path / "a.wav"), RATE, RATE)[0].numpy()
    np.testing.assert_allclose(made[1000:-1000], TONE[1000:-1000], atol=0.01)


def test_short_recordings_are_filled_up_with_silence_and_long_ones_cut(tmp_path):
    (tmp_path / "a.wav").write_bytes(wav(TONE[:500]))
    made = recording(str(tmp_path / "a.wav"), RATE, 800)[0]
    assert not made[500:].any()
    (tmp_path / "a.wav").write_bytes(wav(TONE))
    np.testing.assert_allclose(recording(str(tmp_path / "a.wav"), RATE, 300)[0], TONE[:300], atol=1e-3)


def test_loose_recordings_have_no_labels_and_copies_leave_training(tmp_path):
    for n in range(20):
        (tmp_path / f"{n}.wav").write_bytes(wav(TONE[n : n + 400]))
    found = data.load(f"audiofolder:{tmp_path}", reading=Reading(seconds=0.05))
    assert not found.labelled
    folder(tmp_path / "parts" / "train")
    folder(tmp_path / "parts" / "test", count=3)
    assert "also occur in test" in data.load(f"audiofolder:{tmp_path / 'parts'}").notes[0]


def damaged():
    whole = wav(TONE[:4000])
    silent = io.BytesIO()
    wavfile.write(silent, RATE, np.full(800, np.nan, np.float32))
    return {
        "empty": b"",
        "text": b"no recording at all",
        "cut short": whole[:5000],
        "header alone": whole[:44],
        "no sample": wav(TONE[:0]),
        "compressed": whole[:20] + struct.pack("<H", 85) + whole[22:],
        "no rate": whole[:24] + struct.pack("<II", 0, 0) + whole[32:],
        "not a number": silent.getvalue(),
    }


@pytest.mark.parametrize("content", damaged().values(), ids=damaged())
def test_what_is_no_recording_is_named(tmp_path, content):
    folder(tmp_path)
    (tmp_path / "yes" / "3.wav").write_bytes(content)
    with pytest.raises(DataError, match=r"yes/3\.wav is not a readable recording: ") as caught:
        data.load(f"audiofolder:{tmp_path}", reading=Reading(seconds=0.1))
    assert "\n" not in str(caught.value)
    assert caught.value.hint


def test_folders_without_recordings_say_so(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        data.load(f"audiofolder:{tmp_path / 'nowhere'}")
    with pytest.raises(DataError, match="no recordings"):
        data.load(f"audiofolder:{tmp_path}")
    folder(tmp_path / "train")
    folder(tmp_path / "test", ("no", "maybe"))
    with pytest.raises(DataError, match="has classes that .* has not: maybe"):
        data.load(f"audiofolder:{tmp_path}")
