"""Small H.264 films that every browser plays."""

from pathlib import Path

import numpy as np

from embodied.contracts.errors import MissingExtraError


def write_mp4(path: Path, frames: np.ndarray, fps: float) -> None:
    """Write (T, H, W, 3) uint8 pictures; H and W must be even. The file appears whole.

    Raises:
        MissingExtraError: PyAV is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise MissingExtraError("av", "report", "writing a film") from error
    from fractions import Fraction

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    with av.open(str(temporary), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000), options={"crf": "23"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"  # the one pixel format all browsers decode
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        container.mux(stream.encode())
    temporary.replace(path)
