"""A figure as data: what an experiment's ``analyse`` returns and the report draws."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Series:
    """Points joined or not. ``points``: (x, y) or (x, y, spread), the spread drawn as a bar up and
    down.
    """

    label: str
    points: tuple[tuple[float, ...], ...]
    style: str = "line"  # line | points | bars
    family: str = "other"  # colour and marker, see plots.STYLES
    dashed: bool = False


@dataclasses.dataclass(frozen=True)
class Figure:
    """Axes with their series. ``x`` and ``y`` are the axes' labels with units."""

    name: str  # unique in the experiment; letters, digits and dashes
    title: str
    caption: str
    x: str
    y: str
    series: tuple[Series, ...]
    log_x: bool = False
    log_y: bool = False
    lines: tuple[tuple[float, str], ...] = ()  # (y, text) of horizontal reference lines
    ticks: tuple[tuple[float, str], ...] = ()  # (x, text) of a categorical axis
    noise: float | None = (
        None  # height of a bar that shows what two seeds of one model may differ by
    )

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)
