"""What other libraries say, as the end of a sentence."""

from halfbyte.errors import reason


def test_what_is_long_ends_where_a_sentence_does():
    long = "The first went wrong. " + "The second did too, " * 20
    assert reason(ValueError(long)) == "The first went wrong."
    assert reason(ValueError("word " * 100)) == ("word " * 48).strip() + "."
    assert reason(KeyError()) == "KeyError."
    assert reason(ValueError("short:\n  said! ")) == "short: said."
