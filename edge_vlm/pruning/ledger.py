"""What a stream may spend: the running budget that every causal policy keeps to."""

from __future__ import annotations

import math


class CellLedger:
    """What a stream may have spent by now, so that its average never exceeds `keep_ratio`.

    The first frame is kept whole, which is more than its share; the excess is paid back over the
    first `payback_frames` frames. From the frame with index payback_frames - 1 on,

        cells kept so far  <=  keep_ratio * cells seen so far        (exactly, at every frame).

    Before that a frame may run ahead of the even schedule, as long as every frame left until then
    can still have `min_cells`. Credit that is not spent is banked, at most `bank_frames` whole
    frames of it. If `keep_ratio` is so small that the first frame alone would use up the payback
    time, that is lengthened.
    """

    def __init__(
        self,
        num_cells: int,
        keep_ratio: float,
        payback_frames: int,
        min_cells: int,
        bank_frames: float,
    ) -> None:
        self.num_cells = num_cells
        self.rate = keep_ratio * num_cells
        """Cells that each coming frame brings, as far as is known."""
        self._earned = 0.0
        self._earned_until = 0
        self._extra = 0.0
        self.horizon = payback_frames
        if keep_ratio * payback_frames < 1.25:
            self.horizon = math.ceil(1.5 / keep_ratio)
        self.bank_limit = bank_frames * num_cells
        later = max(self.horizon - 1, 1)
        affordable = (self.rate * self.horizon - num_cells) / later
        self.min_cells = max(0, min(min_cells, math.floor(affordable + 1e-9)))
        self.frames = 0
        self.spent = 0
        self.discarded = 0.0

    def set_rate(self, coming: float, later: float) -> None:
        """The coming frame brings `coming` cells, and each later one `later`."""
        if later != self.rate:
            self._earned = self._earned_by(self.frames)
            self._earned_until = self.frames
            self.rate = later
        self._extra = coming - later

    def _earned_by(self, frame: int) -> float:
        return self._earned + self.rate * (frame - self._earned_until)

    def available(self) -> float:
        """Cells that the coming frame may use at most, before the ceiling of a frame is applied."""
        seen = max(self.frames + 1, self.horizon)
        reserve = self.min_cells * max(self.horizon - (self.frames + 1), 0)
        earned = self._earned_by(seen) + self._extra
        return earned - self.discarded - self.spent - reserve + 1e-9

    def frames_to_plan(self) -> int:
        """Frames, the coming one included, over which the present credit should be spent evenly."""
        return max(self.horizon - self.frames, 1)

    @property
    def paid_back(self) -> bool:
        """The first frame's excess is repaid; every coming frame brings its full income."""
        return self.frames >= self.horizon

    def even_share(self) -> float:
        """Cells for the coming frame if all frames until the payback time ends got the same."""
        plan = self.frames_to_plan()
        return (self.available() + self.min_cells * (plan - 1)) / plan

    def spend(self, cells: int) -> None:
        self.frames += 1
        self.spent += cells
        self._earned += self._extra
        self._extra = 0.0
        if self.frames >= self.horizon:
            banked = self._earned_by(self.frames) - self.discarded - self.spent
            self.discarded += max(banked - self.bank_limit, 0.0)
