"""`embodied data info`: what a store holds."""

import dataclasses
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from embodied.progress import Progress
from embodied.verbs import Touches

NAMED_SHOWN, UNNAMED_SHOWN = 40, 12  # elements of an array, one line each
INSTRUCTIONS_SHOWN = 5
SIZES_SHOWN = 8


@dataclasses.dataclass(frozen=True)
class DataInfo:
    """Print what a store holds: episodes, rates, arrays with units and ranges, labels, sizes, where it came from.

    Attributes:
        store: an EpisodeStore.
    """

    store: Positional[Path]


def touches(config: DataInfo) -> Touches:
    return Touches(reads=(config.store,))


def data_info(config: DataInfo, progress: Progress) -> dict[str, Any]:
    from embodied.datasets.info import describe
    from embodied.datasets.store import EpisodeStore

    return describe(EpisodeStore(config.store))


def as_text(result: dict[str, Any]) -> str:
    """A page that a person reads from top to bottom: what it is, how much, how fast, then each array."""
    seconds = result["duration"]
    length = result["episode_length"]
    lines = [
        result["path"] + (f"  ({result['environment']})" if result["environment"] else ""),
        "",
        _row("episodes", f"{result['episodes']:,} of {length['min']:,} to {length['max']:,} frames, "
             f"median {length['median']:,.0f}"),
        _row("frames", f"{result['frames']:,}, of which {result['steps']:,} are steps to learn from"),
        _row("duration", _time(seconds) if seconds else "no timestamps"),
        _row("rate", _rate(result)),
        _row("ends", f"{result['terminated']:,} terminated, {result['truncated']:,} truncated"),
        _row("success", _success(result)),
    ]  # fmt: skip
    lines += [
        _row("task" if i == 0 else "", text) for i, text in enumerate(result["instructions"][:INSTRUCTIONS_SHOWN])
    ]
    if (more := result["num_instructions"] - INSTRUCTIONS_SHOWN) > 0:
        lines.append(_row("", f"and {more} more instructions"))
    for camera, about in result["cameras"].items():
        height, width, _ = about["shape"]
        some = about["episodes"] < result["episodes"]
        absent = f", in {about['episodes']:,} of {result['episodes']:,} episodes" if some else ""
        lines.append(_row("camera", f"{camera}, {width}x{height}{absent}"))
    arrays = {f"observation {key}": array for key, array in result["observations"].items()}
    arrays |= {name: result[name] for name in ("action", "reward") if result[name]}
    for name, array in arrays.items():
        lines += ["", *_array(name, array)]
    if result["labels"]:
        lines += ["", f"{'label set':24s}{'1 %':>10s}{'median':>10s}{'99 %':>10s}  made by"]
        lines += [
            f"{name:24s}{_short(label['q01'])}{_short(label['median'])}{_short(label['q99'])}  {label['labeller']}"
            + (f", with {', '.join(label['channels'])}" if label["channels"] else "")
            for name, label in result["labels"].items()
        ]
    lines += ["", *_sizes(result)]
    lines += ["", *(_row(key, result[key]) for key in ("source", "licence") if result[key])]
    if result["made_by"]:
        lines.append(_row("made by", f"{result['made_by']}, {result['date']}".rstrip(", ")))
    lines.append(_row("fingerprint", result["fingerprint"][:16]))
    found = ", ".join(f"{n} {severity}{'' if n == 1 else 's'}" for severity, n in result["findings"].items() if n)
    lines.append(_row("findings", f"{found or 'none'} at import; embodied data doctor {result['path']} looks further"))
    return "\n".join(lines)


def _row(name: str, text: str) -> str:
    return f"{name:13s}{text}"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _rate(result: dict[str, Any]) -> str:
    declared, clock = result["control_dt"], result["clock"]
    said = f"{1 / declared:.4g} Hz declared" if declared else "not declared"
    if clock is None or clock["median"] <= 0:
        return f"{said}, nothing measured"
    return (
        f"{said}, {1 / clock['median']:.4g} Hz measured "
        f"(98 % of the steps take {1000 * clock['q01']:.4g} to {1000 * clock['q99']:.4g} ms)"
    )


def _success(result: dict[str, Any]) -> str:
    success = result["success"]
    known = success["succeeded"] + success["failed"]
    if not known:
        return "unknown"
    unknown = f", {success['unknown']:,} unknown" if success["unknown"] else ""
    return f"{success['succeeded']:,} of {known:,} ({100 * success['succeeded'] / known:.0f} %){unknown}"


def _array(name: str, array: dict[str, Any]) -> list[str]:
    """An array's elements with their ranges; of a wide one the range of all."""
    said = [array["unit"], "privileged" if array["privileged"] else "", array.get("control_mode", "")]
    shape = f"({', '.join(map(str, array['shape']))})" if array["shape"] else "scalar"
    lines = [f"{name} {shape}  {', '.join(filter(None, said))}".rstrip()]
    if array["min"] is None:
        return [*lines, "  no values"]
    low, high = _flat(array["min"]), _flat(array["max"])
    names = array["names"] if len(array["names"]) == len(low) else [str(i) for i in range(len(low))]
    if len(low) > (NAMED_SHOWN if array["names"] else UNNAMED_SHOWN):
        return [*lines, f"  {len(low)} elements within {_short(min(low)).strip()} to {_short(max(high)).strip()}"]
    width = max(len(name) for name in names)
    return [
        *lines,
        *(
            f"  {name:{width}s} {_short(a)} to {_short(b)}{'   never changes' if a == b else ''}"
            for name, a, b in zip(names, low, high, strict=True)
        ),
    ]


def _flat(value: Any) -> list[float]:
    return [item for part in value for item in _flat(part)] if isinstance(value, list) else [value]


def _short(value: float) -> str:
    return f"{value:10.4g}"


def _sizes(result: dict[str, Any]) -> list[str]:
    sizes = sorted(result["sizes"].items(), key=lambda item: -item[1]["raw"])
    if result["bytes"] is None:
        return [_row("size", f"{_amount(sum(size['raw'] for _, size in sizes))} uncompressed; remote")]
    shown = sizes[:SIZES_SHOWN]
    width = max(len(name) for name, _ in shown)
    lines = [_row("size", f"{_amount(result['bytes'])} on disk")]
    for name, size in shown:
        ratio = f"1 : {size['raw'] / size['disk']:.1f}" if size["disk"] else ""
        lines.append(f"  {name:{width}s} {_amount(size['disk']):>10s} of {_amount(size['raw']):>10s}   {ratio}")
    return lines


def _amount(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def summary(store: Any) -> dict[str, Any]:
    """The few facts that a verb which made a store reports."""
    success = store.success
    return {
        "store": store.path,
        "episodes": store.num_episodes,
        "frames": store.num_frames,
        "successful": int((success == 1).sum()),
        "success_unknown": int((success < 0).sum()),
        "cameras": list(store.spec.images),
        "fingerprint": store.fingerprint,
    }


def label_summary(label: Any) -> dict[str, Any]:
    """The few facts that a verb which made a label set reports."""
    return {
        "label": label.name,
        "frames": len(label.score),
        "score": {
            "min": float(label.score.min()),
            "mean": float(label.score.mean()),
            "max": float(label.score.max()),
        },
        "alignment": label.alignment,
        "labeller": label.provenance["labeller"],
    }
