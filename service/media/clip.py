"""Play one video track of a file: find out which frames it shows and when, and decode the wanted ones.

Packets announce the frames without decoding, and are usually right. But only the decoder is certain: it reorders
frames, drops those that an edit list or a flag hides, and skips what it cannot decode. So packets only say where to
seek. Where few frames of a long clip are wanted, decoding starts at the keyframe before each of them, and every frame
that comes out must be the next one announced. If one is not, or if seeking would not save half of the work, the clip is
decoded from its first packet to its last, and the packets are ignored.

Knows nothing of sampling, model sizes or processes.
"""

from __future__ import annotations

import io
import math
import statistics
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, cast

import av
import numpy as np
from av.codec import CodecContext
from av.container import InputContainer
from av.packet import Packet
from av.stream import Discard, Disposition
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from service.media.limits import MediaLimits
from service.media.metadata import strip_png
from service.media.refusal import Refusal
from service.media.sampling import Timeline
from service.media.sniff import Format

DEMUXERS: dict[Format, str] = {
    "MP4": "mov",
    "WEBM": "matroska",
    "AVI": "avi",
    "MPEG-TS": "mpegts",
    "GIF": "gif",
    "PNG": "apng",
    "AVIF": "mov",
    "HEIC": "mov",
}
NOT_SHOWN = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
MAX_GAP = 3600.0  # seconds between frames; a longer gap is a broken timestamp (ffplay's bound)
DEFAULT_GAP = Fraction(1, 25)  # seconds, for a single frame without a duration
CPU_SHARE = 0.9  # of the processor time that a decode is allowed
MAX_FALSE_KEYFRAMES = 8  # in one clip; after that it is decoded in order
SEEK_SAVING = 2  # seek where that decodes at most one packet in so many

TRANSPARENT_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}

Tick = int | None  # a timestamp in units of the track


class Deadline:
    """Refuses work that takes too long, before SIGPROF ends the process."""

    def __init__(self, cpu_seconds: float) -> None:
        """cpu_seconds: of this process, from now on; 0: no limit."""
        self._at = time.process_time() + CPU_SHARE * cpu_seconds if cpu_seconds else math.inf

    def check(self) -> None:
        if time.process_time() > self._at:
            raise Refusal("too_much_work")


Choose = Callable[[Timeline], Sequence[int]]  # returns ascending indices of frames
Convert = Callable[[VideoFrame], np.ndarray]


@dataclass(frozen=True)
class PacketInfo:
    pts: Tick
    dts: Tick
    duration: int
    keyframe: bool
    hidden: bool  # decoded, but never shown


class Clip:
    """A video file. Every pass demuxes `data` again, so that only a few frames and packets are in memory at a time."""

    def __init__(self, data: bytes, format: Format, limits: MediaLimits, deadline: Deadline) -> None:
        """Read all packets without decoding. Raises Refusal, and any exception of PyAV on broken files."""
        self._data, self._format, self._limits, self._deadline = data, format, limits, deadline
        with self._open() as container:
            track = main_track(container)
            self._track = track.index
            self.size = track.codec_context.width, track.codec_context.height  # as the container claims
            self.rate = float(track.average_rate) if track.average_rate else None  # likewise; frames per second
            self._unit = track.time_base or Fraction(1)
            self._packets = self._read_packets(container, track)

    def take(self, choose: Choose, convert: Convert) -> tuple[Timeline, dict[int, np.ndarray]]:
        """Return the timeline, and by index what `convert` makes of each frame that `choose` picks from it."""
        if (index := self._index()) is not None:
            timeline = self._timeline(index.shown)
            wanted = choose(timeline)
            if SEEK_SAVING * index.cost(wanted) <= len(self._packets):
                self._check_work(index.cost(wanted))
                arrays = self._take_by_seeking(index, wanted, convert)
                if arrays is not None:
                    return timeline, arrays
        return self._take_in_order(choose, convert)

    def announced(self) -> Timeline:
        """Return the timeline as the packets announce it. Raises Refusal where decoding them all is too much work."""
        self._check_work(len(self._packets))
        packets = [packet for packet in self._packets if not packet.hidden]
        return self._timeline(sorted(packets, key=lambda packet: _first(packet) or 0))

    def _take_in_order(self, choose: Choose, convert: Convert) -> tuple[Timeline, dict[int, np.ndarray]]:
        """Decode everything. Which frames are wanted is certain only at the end, so the first pass uses the packets'
        timeline as a guess, and where that was wrong a second pass decodes the missing ones."""
        wanted: Collection[int] = choose(self.announced())
        arrays: dict[int, np.ndarray] = {}
        while True:
            shown: list[PacketInfo] = []
            with self._open() as container:
                for frame in Player(container, self._track, self._limits, len(self._packets), self._deadline):
                    if len(shown) in wanted and len(shown) not in arrays:
                        arrays[len(shown)] = convert(frame)
                    shown.append(PacketInfo(frame.pts, frame.dts, frame.duration, frame.key_frame, False))
                    self._check_count(len(shown))
            timeline = self._timeline(shown)
            wanted = set(choose(timeline))
            if wanted <= arrays.keys():
                return timeline, {index: arrays[index] for index in wanted}

    def _take_by_seeking(self, index: Index, wanted: Sequence[int], convert: Convert) -> dict[int, np.ndarray] | None:
        """Decode from keyframes; return None where other frames come out than the packets announced."""
        arrays: dict[int, np.ndarray] = {}
        num_false = 0
        while len(arrays) < len(set(wanted)):
            with self._open() as container:
                player = Player(container, self._track, self._limits, len(self._packets), self._deadline)
                try:
                    for frame in wanted:
                        if frame not in arrays:
                            arrays[frame] = convert(player.find(index, frame))
                except NotAKeyframe as error:
                    index.keyframes.remove(error.number)  # the next pass starts at the previous one
                    if (num_false := num_false + 1) > MAX_FALSE_KEYFRAMES:
                        return None
                except NotAnnounced:
                    return None
        return arrays

    def _index(self) -> Index | None:
        """Return the frames that the packets announce; None where they do not say enough to seek."""
        packets = self._packets
        numbers = [number for number, packet in enumerate(packets) if not packet.hidden]
        times = [packets[number].pts for number in numbers]
        if not numbers or None in times or len(set(times)) < len(times) or not packets[0].keyframe:
            return None
        numbers.sort(key=lambda number: packets[number].pts or 0)
        first = packets[0].pts
        if first is not None and (packets[numbers[0]].pts or 0) < first:
            decodable = self._times_before(first)
            numbers = [number for number in numbers if (time := packets[number].pts or 0) >= first or time in decodable]
        keyframes = [number for number, packet in enumerate(packets) if packet.keyframe and packet.pts is not None]
        return Index(packets, numbers, keyframes)

    def _times_before(self, first: int) -> set[Tick]:
        """Return the times of frames that are shown before the first keyframe and can be decoded.

        In a clip cut out of a longer one at a keyframe, some of these refer to frames that were cut off.
        """
        times: set[Tick] = set()
        with self._open() as container:
            for frame in Player(container, self._track, self._limits, len(self._packets), self._deadline):
                if frame.pts is None or frame.pts >= first:
                    break
                times.add(frame.pts)
        return times

    def _timeline(self, shown: Sequence[PacketInfo]) -> Timeline:
        """Compute the times of frames in presentation order. Raises Refusal for no frames, or too long a clip.

        A timestamp that is missing, does not ascend or leaps is replaced, as players do: the frame comes one usual step
        after the previous one, and the clock continues from there.
        """
        if not shown:
            raise Refusal("no_frames")
        pts, dts = [info.pts for info in shown], [info.dts for info in shown]
        ticks = dts if _faults(dts) < _faults(pts) else pts
        steps = np.diff(np.array([np.nan if tick is None else tick for tick in ticks]))
        valid = (steps > 0) & (steps <= MAX_GAP / self._unit)
        usual = max(1.0, float(statistics.median(steps[valid].tolist()) if valid.any() else DEFAULT_GAP / self._unit))
        clock = np.append(0.0, np.cumsum(np.where(valid, steps, usual)))
        longest = self._limits.max_video_seconds
        end = self._seconds(clock[-1] + shown[-1].duration)
        if shown[-1].duration <= 0 or end > longest:
            end = self._seconds(clock[-1] + usual)
        if end > longest:
            raise Refusal("too_long", seconds=int(end), max_video_seconds=int(longest))
        return Timeline(self._seconds(clock), float(end))

    def _seconds(self, ticks: Any) -> Any:
        """Convert ticks to seconds with one multiplication and one division, so that whole seconds stay whole."""
        return ticks * self._unit.numerator / self._unit.denominator

    def _read_packets(self, container: InputContainer, track: VideoStream) -> list[PacketInfo]:
        """Demux all packets without decoding. Raises Refusal for too many or too slow ones."""
        packets: list[PacketInfo] = []
        for packet in container.demux(track):
            self._deadline.check()
            self._check_count(len(packets))
            hidden = not packet.size or packet.is_discard or _is_hidden(track.codec_context.name, packet)
            info = PacketInfo(packet.pts, packet.dts, packet.duration or 0, packet.is_keyframe, hidden)
            packets.append(info)
        return packets[:-1]  # the last one is empty: it flushes the decoder

    def _open(self) -> InputContainer:
        """Open a demuxer. It may decode a frame to learn its size, so `max_pixels` limits that."""
        options = {"max_pixels": str(self._limits.max_side**2)}
        demuxer = DEMUXERS[self._format]  # metadata may be in any encoding, and is not read
        return av.open(io.BytesIO(self._data), "r", format=demuxer, options=options, metadata_errors="ignore")

    def _check_work(self, num_packets: int) -> None:
        if num_packets * self.size[0] * self.size[1] > self._limits.max_decoded_pixels:
            raise Refusal("too_much_work")

    def _check_count(self, count: int) -> None:
        if count > self._limits.max_source_frames:
            raise Refusal("too_many_source_frames", max_source_frames=self._limits.max_source_frames)


@dataclass
class Index:
    """The frames that the packets announce.

    numbers: their packets' numbers, in presentation order; keyframes: numbers of the packets at which decoding can
    start, ascending from 0.
    """

    packets: Sequence[PacketInfo]
    numbers: list[int]
    keyframes: list[int]

    def __post_init__(self) -> None:
        self.times: list[int] = [self.packets[number].pts or 0 for number in self.numbers]

    @property
    def shown(self) -> list[PacketInfo]:
        return [self.packets[number] for number in self.numbers]

    def start(self, frame: int) -> int:
        """Return the last keyframe from which a frame can be decoded: neither decoded nor shown later than it.

        A frame decoded after a keyframe and shown before it refers to the previous keyframe (an open GOP).
        """
        at = bisect_right(self.keyframes, self.numbers[frame]) - 1
        while at > 0 and (self.packets[self.keyframes[at]].pts or 0) > self.times[frame]:
            at -= 1
        return self.keyframes[at]

    def first_after(self, start: int) -> int:
        """Return the first frame that must come out when decoding starts at a keyframe."""
        return bisect_right(self.times, (self.packets[start].pts or 0) - 1) if start else 0

    def cost(self, wanted: Sequence[int]) -> int:
        """Return how many packets must be decoded for these frames, at least."""
        cost, fed = 0, -1
        for frame in wanted:
            start, number = self.start(frame), self.numbers[frame]
            cost += max(0, number - max(start - 1, fed))
            fed = max(fed, number)
        return cost


class NotAKeyframe(Exception):
    """Decoding cannot start at this packet, though it is marked as a keyframe."""

    def __init__(self, number: int) -> None:
        self.number = number


class NotAnnounced(Exception):
    """Another frame came out than the packets announced."""


class Player:
    """Decodes one track, forwards only."""

    def __init__(
        self, container: InputContainer, track: int, limits: MediaLimits, num_packets: int, deadline: Deadline
    ) -> None:
        (stream,) = (stream for stream in container.streams.video if stream.index == track)
        for other in container.streams:
            if other.index != track:
                other.discard = Discard.all
        self._decoder, self._limits = _decoder_of(stream), limits
        self._decoder.thread_count = 1  # a child has little memory, and other processors have other work
        self._decoder.options = {"max_pixels": str(2 * limits.max_video_pixels)}  # codecs round sizes up to blocks
        self._packets = enumerate(container.demux(stream))
        self._num_packets, self._deadline = num_packets, deadline
        self._ready: deque[VideoFrame] = deque()
        self._last = -1  # number of the last packet that was read
        self._next = 0  # the next frame announced

    def __iter__(self) -> Iterator[VideoFrame]:
        return self

    def __next__(self) -> VideoFrame:
        while not self._ready:
            self._decode(*next(self._packets))
        return self._ready.popleft()

    def find(self, index: Index, target: int) -> VideoFrame:
        """Decode forwards to a frame, or skip to the last keyframe before it. Raises NotAKeyframe, NotAnnounced."""
        start = index.start(target)
        if start > self._last:
            self._skip_to(start)
            self._next = index.first_after(start)
            if start:
                self._check_start(index, start)
        for frame in self:
            if frame.pts != index.times[self._next]:
                raise NotAnnounced
            self._next += 1
            if self._next == target + 1:
                return frame
        raise NotAnnounced

    def _check_start(self, index: Index, start: int) -> None:
        """Drop frames that refer to skipped ones, and check that the keyframe is one."""
        for frame in self:
            if frame.pts is None:
                raise NotAnnounced
            if frame.pts >= index.times[self._next]:
                self._ready.appendleft(frame)
                if not index.packets[start].hidden and not (frame.key_frame and frame.pts == index.packets[start].pts):
                    raise NotAKeyframe(start)
                return
        raise NotAKeyframe(start)

    def _skip_to(self, start: int) -> None:
        """Drop packets up to number `start`, and decode that one."""
        self._decoder.flush_buffers()
        self._ready.clear()
        for number, packet in self._packets:
            if number == start:
                return self._decode(number, packet)
        raise NotAnnounced

    def _decode(self, number: int, packet: Packet[VideoStream]) -> None:
        self._deadline.check()
        self._last = number
        if packet.size or number == self._num_packets:  # an empty packet repeats a frame; the last one flushes
            self._ready += self._decoder.decode(packet if self._decoder.name != "png" else self._stripped(packet))

    def _stripped(self, packet: Packet[VideoStream]) -> Packet[VideoStream]:
        """Return a packet of a PNG without its metadata: PyAV frees the name of a colour profile twice."""
        if not packet.size:
            return packet
        stripped: Any = Packet(strip_png(bytes(packet), self._limits))
        stripped.pts, stripped.dts, stripped.time_base = packet.pts, packet.dts, packet.time_base
        stripped.duration, stripped.is_keyframe = packet.duration, packet.is_keyframe
        return cast("Packet[VideoStream]", stripped)


def main_track(container: InputContainer) -> VideoStream:
    """Return the video track that a player shows: the default one, never cover art. Raises Refusal."""
    videos = [stream for stream in container.streams.video if not stream.disposition & NOT_SHOWN]
    if not videos:
        raise Refusal("no_video")
    best = container.streams.best("video")
    default = [stream for stream in videos if stream.disposition & Disposition.default]
    track = next(
        (stream for stream in videos if best is not None and stream.index == best.index), (default or videos)[0]
    )
    if track.codec_context is None:
        raise Refusal("unsupported_codec")
    return track


def _decoder_of(track: VideoStream) -> VideoCodecContext:
    """Return the track's decoder: for a transparent VP8 or VP9, libvpx's, since FFmpeg's own ignore transparency."""
    own = track.codec_context
    name = TRANSPARENT_DECODERS.get(own.name) if track.metadata.get("alpha_mode") == "1" else None
    if name is None:
        return own
    decoder: Any = CodecContext.create(name, "r")
    decoder.extradata = own.extradata
    return cast("VideoCodecContext", decoder)


def _is_hidden(codec: str, packet: Packet[VideoStream]) -> bool:
    """Return whether a frame is never shown: VP8's alternate reference frame has a packet of its own."""
    return codec == "vp8" and packet.size > 0 and not memoryview(packet)[0] >> 4 & 1


def _first(packet: PacketInfo) -> Tick:
    return packet.dts if packet.pts is None else packet.pts


def _faults(ticks: Sequence[Tick]) -> int:
    """Count timestamps that are missing or do not ascend."""
    faults, last = 0, None
    for tick in ticks:
        if tick is None or (last is not None and tick <= last):
            faults += 1
        last = tick if tick is not None else last
    return faults
