import pytest

from foundation.errors import ConfigError, ValidationError
from pipeline.report.outcome import judged
from validators.gates import judge


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("a cannot be read: no such file..", "a cannot be read: no such file."),
        ("it broke.. Try again", "it broke. Try again"),
        ("look in ../a and ..", "look in ../a and .."),
        ("and so on...", "and so on..."),
    ],
)
def test_no_sentence_ends_in_two_full_stops(said, shown):
    error = ConfigError(said, said)
    assert (error.message, error.hint) == (shown, shown)


def test_a_reason_that_is_a_sentence_stays_one_in_a_verdict_and_names_keep_their_underscores():
    why = str(ValidationError("It is cut off.", "Fetch it again."))
    words = [judged(check).words for check in judge({}, [], crashed={"my_file.onnx": why}).checks]
    assert words == ["My_file.onnx could not be measured: It is cut off. Fetch it again."]
