"""What fetching weights and exporting them raise, of the tree drawn in `edge_vlm.errors`."""

from __future__ import annotations

from edge_vlm.errors import EdgeVlmError


class HubError(EdgeVlmError):
    code = "E-HUB"
    exit_code = 17


class HubUnreachable(HubError):
    code = "E-HUB-UNREACHABLE"


class HubNotFound(HubError):
    code = "E-HUB-NOT-FOUND"


class HubRefused(HubError):
    code = "E-HUB-REFUSED"


class HubFileDamaged(HubError):
    code = "E-HUB-FILE"


class NoSpaceLeft(EdgeVlmError):
    code = "E-NO-SPACE"
    exit_code = 12


class ExportError(EdgeVlmError):
    code = "E-EXPORT"
    exit_code = 12


class Specialised(ExportError):
    code = "E-EXPORT-SPECIALISED"


class RangeFp16(ExportError):
    code = "E-RANGE-FP16"


class NotEnoughMemory(ExportError):
    code = "E-NO-MEMORY"


class ParityError(ExportError):
    code = "E-PARITY"
