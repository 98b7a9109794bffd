"""Text that shows nothing: white space, and characters that are invisible by themselves."""

# White space, control and format characters, and the characters with Unicode's property Default_Ignorable_Code_Point.
# Python knows neither the property nor, in older versions, all of the categories.
_RANGES = (
    (0x20, 0x20),  # first, because str.strip looks through them in this order
    (0x00, 0x1F),
    (0x7F, 0xA0),
    (0xAD, 0xAD),  # soft hyphen
    (0x34F, 0x34F),  # combining grapheme joiner
    (0x600, 0x605),  # Arabic signs that enclose the numbers after them
    (0x61C, 0x61C),
    (0x6DD, 0x6DD),
    (0x70F, 0x70F),
    (0x890, 0x891),
    (0x8E2, 0x8E2),
    (0x115F, 0x1160),  # Hangul fillers
    (0x1680, 0x1680),
    (0x17B4, 0x17B5),
    (0x180B, 0x180F),
    (0x2000, 0x200F),  # spaces, zero width spaces and joiners, directions
    (0x2028, 0x202F),
    (0x205F, 0x206F),
    (0x3000, 0x3000),
    (0x3164, 0x3164),  # Hangul filler
    (0xFE00, 0xFE0F),  # variation selectors
    (0xFEFF, 0xFEFF),  # byte-order mark
    (0xFFA0, 0xFFA0),  # Hangul filler
    (0xFFF0, 0xFFFB),
    (0x110BD, 0x110BD),
    (0x110CD, 0x110CD),
    (0x13430, 0x1343F),
    (0x1BCA0, 0x1BCA3),
    (0x1D173, 0x1D17A),
    (0xE0000, 0xE0FFF),  # tags and variation selectors
)
_BLANKS = "".join(chr(code) for first, last in _RANGES for code in range(first, last + 1))


def strip(text: str) -> str:
    """Return the text without characters that show nothing at its ends."""
    return text.strip(_BLANKS)


def is_empty(text: str) -> bool:
    """Return whether the text has only characters that show nothing, or none at all."""
    return not text.lstrip(_BLANKS)
