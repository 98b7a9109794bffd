"""A reader of TensorBoard's event files that shares no code with their writer but the protocol buffers."""

import struct
from pathlib import Path

Curve = list[tuple[int, float]]


def crc32c(data: bytes) -> int:
    """Return the Castagnoli checksum, bit by bit."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> int:
    """Return the checksum as records store it, rotated by 15 bits and moved."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def records(path: Path) -> list[bytes]:
    """Return the records of a file, which has to end with a whole one."""
    data, found, start = path.read_bytes(), [], 0
    while start < len(data):
        header = data[start : start + 8]
        (length,) = struct.unpack("<Q", header)
        content = data[start + 12 : start + 12 + length]
        assert struct.unpack("<I", data[start + 8 : start + 12]) == (masked(header),)
        assert struct.unpack("<I", data[start + 12 + length : start + 16 + length]) == (masked(content),)
        found.append(content)
        start += 16 + length
    return found


def files(run: Path) -> list[Path]:
    """Return a run's event files in the order in which TensorBoard reads them."""
    return sorted((run / "tensorboard").iterdir())


def curves(run: Path) -> dict[str, Curve]:
    """Return the points of each tag as TensorBoard shows them: the start of a session drops its step and later ones."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    shown: dict[str, Curve] = {}
    for path in files(run):
        for number, record in enumerate(records(path)):
            event = Event.FromString(record)
            assert (event.file_version == "brain.Event:2") == (number == 0)
            if event.session_log.status == SessionLog.START:
                shown = {tag: [(s, v) for s, v in curve if s < event.step] for tag, curve in shown.items()}
            for value in event.summary.value:
                shown.setdefault(value.tag, []).append((event.step, value.simple_value))
    return shown
