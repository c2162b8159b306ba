"""How much a zstd frame says it inflates to, so that one that says too much is refused before it does."""

from __future__ import annotations

HEAD_BYTES = 18  # of a frame's header at most
MAGIC = b"\x28\xb5\x2f\xfd"
DICTIONARY_BYTES = (0, 1, 2, 4)
SIZE_BYTES = (0, 2, 4, 8)


def content_size(head: bytes) -> int:
    """The size of a frame's content, RFC 8878, section 3.1.1.1.

    Args:
        head: The frame's first `HEAD_BYTES` bytes, or all of them.

    Raises:
        ValueError: it is no zstd frame, or does not say.
    """
    if head[:4] != MAGIC or len(head) < 6:
        raise ValueError("it is no zstd frame")
    flags = head[4]
    single = bool(flags & 0x20)  # a single segment: no window, and a size in any case
    length = SIZE_BYTES[flags >> 6] or int(single)
    start = 5 + (not single) + DICTIONARY_BYTES[flags & 3]
    field = head[start : start + length]
    if not length or len(field) < length:
        raise ValueError("the zstd frame does not say how much it holds")
    return int.from_bytes(field, "little") + (256 if length == 2 else 0)
