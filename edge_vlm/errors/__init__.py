"""Every error this project raises on purpose, as one tree: class, exit code, code.

    EdgeVlmError                1  E-EDGE-VLM         any other error
    |-- ConfigError             2  E-CONFIG             a setting, recipe or config file is wrong
    |   `-- RecipeTooLarge      2  E-RECIPE-MEMORY      a training run that cannot fit its memory
    |-- CheckpointError         3  E-CHECKPOINT         names, shapes or files of a checkpoint
    |   |-- WeightFilesError    3  E-CHECKPOINT-FILES   lists absent, cut off and foreign files
    |   `-- WeightNamesError    3  E-CHECKPOINT-NAMES   lists missing, unknown, unfit tensors
    |-- BundleError             4  E-BUNDLE           what was exported cannot be opened
    |   |-- BundleNotFound      4  E-BUNDLE-NOT-FOUND no bundle lies there
    |   |-- BundleFileMissing   4  E-BUNDLE-FILE        a file of the manifest is not there
    |   |-- BundleHashMismatch  4  E-BUNDLE-HASH      a file is not the one that was written
    |   `-- BundleSchemaError   4  E-BUNDLE-SCHEMA    written by another version, or no manifest
    |-- VideoError              5  E-VIDEO            a source, for another reason
    |   |-- VideoNotFound       5  E-VIDEO-NOT-FOUND  no such file
    |   |-- VideoUnreadable     5  E-VIDEO-UNREADABLE   not a video, or cut off
    |   `-- VideoEmpty          5  E-VIDEO-EMPTY        a video without a single frame
    |-- FrameDecodeError        6  E-FRAME-DECODE       one picture that is not a JPEG we can read
    |-- ProtocolError           7  E-PROTOCOL           the other side broke the wire protocol
    |   |-- MessageTooLarge     7  E-MESSAGE-TOO-LARGE a message or frame above its limit
    |   |-- RequestTimeout      7  E-TIMEOUT            a request that does not come to its end
    |   |-- UnknownMessageType  7  E-UNKNOWN-TYPE     a message of no type that is known
    |   `-- RequestError        7  E-REQUEST            an HTTP request is wrong; names the field
    |       |-- Unsupported     7  E-UNSUPPORTED        what the model or this server cannot do
    |       |-- ModelNotFound   7  E-MODEL              another model than the one that is served
    |       |-- MediaRefused    7  E-MEDIA              a picture or video that may not be read
    |       |-- AnswerFormError 7  E-ANSWER-FORM        a form that an answer cannot be given
    |       |-- NoSuchPath      7  E-NOT-FOUND          nothing is served there
    |       `-- MethodNotAllowed 7 E-METHOD             not with this method
    |-- ServerUnreachable       8  E-SERVER-UNREACHABLE nobody answers there
    |   |-- ServerBusy          8  E-SERVER-BUSY        no free session, or it is stopping
    |   |   `-- TooManyRequests  8  E-TOO-MANY-REQUESTS  as many wait as may; says when to come back
    |   |-- Unauthorized        8  E-UNAUTHORIZED       it wants another API key
    |   `-- HostNotAllowed      8  E-HOST               it does not go by the name it was called
    |-- MissingExtraError       9  E-MISSING-EXTRA      names the extra to install
    |-- SessionError           10  E-SESSION          a session, for another reason
    |   |-- NoFrameYet         10  E-NO-FRAME           a question before the first frame
    |   |-- NoQuestion         10  E-NO-QUESTION        an answer to nothing is asked for
    |   |-- QuestionCancelled  10  E-CANCELLED          before its answer began
    |   |-- QuestionTooLong    10  E-QUESTION-TOO-LONG more words than the model can be asked
    |   |-- TooManyQuestions   10  E-TOO-MANY-QUESTIONS waiting for an answer already
    |   |-- UnknownAlert       10  E-UNKNOWN-ALERT      no alert of this id
    |   |-- TooManyAlerts      10  E-TOO-MANY-ALERTS  as many as a session may have
    |   |-- AlertsUnsupported  10  E-ALERTS-UNSUPPORTED the model has no words for yes and no
    |   |-- SnapshotsUnsupported 10 E-NO-SNAPSHOTS     the model reads video only
    |   |-- SnapshotTooLarge   10  E-SNAPSHOT-ROOM      no room for a picture in full detail
    |   |-- SessionGone        10  E-SESSION-GONE       no session of this name to go on with
    |   |   `-- UnknownStream  10  E-UNKNOWN-STREAM     no such camera; lists those there are
    |   |-- NotForSubscribers  10  E-SUBSCRIBER         what only the owner of a stream may do
    |   |-- ReplayLost         10  E-REPLAY-LOST        it is there, but not all it said meanwhile
    |   |-- ClipTooLong        10  E-CLIP-TOO-LONG      more of a clip than its session can hold
    |   |-- KvFull             10  E-KV-FULL            the arena has no room for more tokens
    |   `-- PositionsUsedUp    10  E-POSITIONS          past the last position the model knows
    |-- EngineError            11  E-ENGINE           what runs a graph, for another reason
    |   |-- NonFinite          11  E-NONFINITE          NaN or infinity in a tensor
    |   |-- ShapeRange         11  E-SHAPE-RANGE        a dimension outside its graph's range
    |   |-- TrtMissing         11  E-TRT-MISSING-LIB    no usable TensorRT in this Python
    |   |-- GpuMissing         11  E-GPU                no NVIDIA driver or GPU, or too old a driver
    |   |-- CudaError          11  E-CUDA               any other failure of a GPU
    |   |-- OnnxUnsupported    11  E-ONNX-UNSUPPORTED   TensorRT has no such operator
    |   |-- TrtParse           11  E-TRT-PARSE          it cannot read a graph for another reason
    |   |-- TrtProfile         11  E-TRT-PROFILE        shape ranges that contradict each other
    |   |-- TrtNoTactic        11  E-TRT-NO-TACTIC      no kernel for a layer on this GPU
    |   |-- OutOfDeviceMemory  11  E-DEVICE-MEMORY      of a GPU, or of a machine that shares it
    |   |-- TrtBuildFailed     11  E-TRT-BUILD          the build ended for a reason not listed here
    |   |-- EngineMissing      11  E-ENGINE-MISSING     not built yet
    |   `-- EngineStale        11  E-ENGINE-STALE       built for another GPU, version or graph
    |-- OutputError            16  E-OUTPUT             standard output or error takes no more
    |-- InternalError           1  E-INTERNAL           a bug of ours, logged with its traceback
    |-- RecordingError         14  E-RECORDING          a recorded session cannot be read or written
    |   `-- ReplayDiffers      14  E-REPLAY-DIFFERS     the same work did not give the same events
    |-- DeliveryError          13  E-DELIVERY           an alert output did not take everything
    |   `-- DeliveryRefused     13  E-DELIVERY-REFUSED   the receiver will never take this event
    |-- DataError              15  E-DATA               training data: a file, or all of a source
    |   |-- RecordInvalid      15  E-DATA-RECORD        names the record (file:line) and the field
    |   `-- RecordTooLong      15  E-DATA-TOO-LONG      does not fit a packed row
    |-- HubError               17  E-HUB                weights cannot be fetched from a model hub
    |   |-- HubUnreachable     17  E-HUB-UNREACHABLE    no connection, or it ended on the way
    |   |-- HubNotFound        17  E-HUB-NOT-FOUND      no such repository, revision or weights
    |   |-- HubRefused         17  E-HUB-REFUSED        its licence is to be accepted, or a token
    |   `-- HubFileDamaged     17  E-HUB-FILE           a file is not what the hub says it is
    |-- NoSpaceLeft            12  E-NO-SPACE           a disk is, or would become, full
    `-- ExportError            12  E-EXPORT           an export, for another reason
        |-- Specialised        12  E-EXPORT-SPECIALISED a free dimension became a constant
        |-- RangeFp16          12  E-RANGE-FP16         a float16 tensor saw too large a value
        |-- NotEnoughMemory    12  E-NO-MEMORY        less than the export would take
        `-- ParityError        12  E-PARITY             an exported graph differs from torch

An error says what happened, where, and what to do about it, in one line. It is told apart by its
type (or, over the wire, by `code`), never by its text. A caller's mistake inside Python stays a
`ValueError`.
"""

from __future__ import annotations

from typing import ClassVar

from edge_vlm.errors.words import shortened, visible


class EdgeVlmError(Exception):
    """Base of the tree. `str(error)` is one printable line: what (where): remedy."""

    code: ClassVar[str] = "E-EDGE-VLM"
    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, where: object = None, remedy: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = None if where is None else str(where)
        self.remedy = remedy

    def __str__(self) -> str:
        what = shortened(self.what)
        line = what if self.where is None else f"{what} ({shortened(self.where)})"
        if self.remedy is not None:  # what other libraries say may be a whole sentence
            line = f"{line if line.endswith('..') else line.removesuffix('.')}: {self.remedy}"
        return visible(" ".join(line.split()))


class ConfigError(EdgeVlmError):
    code = "E-CONFIG"
    exit_code = 2


class RecipeTooLarge(ConfigError):
    code = "E-RECIPE-MEMORY"


class CheckpointError(EdgeVlmError):
    code = "E-CHECKPOINT"
    exit_code = 3


class WeightFilesError(CheckpointError):
    """The files that should hold a model's weights. `problems` has one line for each fault."""

    code = "E-CHECKPOINT-FILES"

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        remedy: str | None = None,
        problems: tuple[str, ...] = (),
    ) -> None:
        super().__init__(what, where=where, remedy=remedy)
        self.problems = problems


class WeightNamesError(CheckpointError):
    """A state dict does not fit the model. The four lists hold every offending name."""

    code = "E-CHECKPOINT-NAMES"

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        remedy: str | None = None,
        missing: tuple[str, ...] = (),
        unknown: tuple[str, ...] = (),
        misshaped: tuple[str, ...] = (),
        mistyped: tuple[str, ...] = (),
    ) -> None:
        super().__init__(what, where=where, remedy=remedy)
        self.missing = missing
        self.unknown = unknown
        self.misshaped = misshaped
        self.mistyped = mistyped


class BundleError(EdgeVlmError):
    code = "E-BUNDLE"
    exit_code = 4


class BundleNotFound(BundleError):
    code = "E-BUNDLE-NOT-FOUND"


class BundleFileMissing(BundleError):
    code = "E-BUNDLE-FILE"


class BundleHashMismatch(BundleError):
    code = "E-BUNDLE-HASH"


class BundleSchemaError(BundleError):
    code = "E-BUNDLE-SCHEMA"


class VideoError(EdgeVlmError):
    code = "E-VIDEO"
    exit_code = 5


class VideoNotFound(VideoError):
    code = "E-VIDEO-NOT-FOUND"


class VideoUnreadable(VideoError):
    code = "E-VIDEO-UNREADABLE"


class VideoEmpty(VideoError):
    code = "E-VIDEO-EMPTY"


class FrameDecodeError(EdgeVlmError):
    code = "E-FRAME-DECODE"
    exit_code = 6


class ProtocolError(EdgeVlmError):
    """`close_code`: websocket close code (RFC 6455, 7.4.1) if the connection cannot go on."""

    code = "E-PROTOCOL"
    exit_code = 7
    close_code: ClassVar[int | None] = None


class MessageTooLarge(ProtocolError):
    code = "E-MESSAGE-TOO-LARGE"
    close_code = 1009


class RequestTimeout(ProtocolError):
    """A request that does not come to its end."""

    code = "E-TIMEOUT"


class UnknownMessageType(ProtocolError):
    code = "E-UNKNOWN-TYPE"


class ServerUnreachable(EdgeVlmError):
    code = "E-SERVER-UNREACHABLE"
    exit_code = 8


class ServerBusy(ServerUnreachable):
    code = "E-SERVER-BUSY"


class TooManyRequests(ServerBusy):
    """`retry_after_s`: when it is worth while to come back."""

    code = "E-TOO-MANY-REQUESTS"

    def __init__(self, what: str, *, retry_after_s: int = 1, remedy: str | None = None) -> None:
        super().__init__(what, remedy=remedy)
        self.retry_after_s = retry_after_s


class Unauthorized(ServerUnreachable):
    code = "E-UNAUTHORIZED"


class HostNotAllowed(ServerUnreachable):
    code = "E-HOST"


class MissingExtraError(EdgeVlmError):
    """An optional library is absent. Raised by the one module that imports it.

    `library` and `extra` are those of `for_library`.
    """

    code = "E-MISSING-EXTRA"
    exit_code = 9
    library: str | None = None
    extra: str | None = None

    @classmethod
    def for_library(cls, library: str, extra: str) -> MissingExtraError:
        """`raise MissingExtraError.for_library("onnxruntime", "ort") from error`

        `extra`: the smallest that brings the library and what its module needs."""
        error = cls(
            f"{library} is not installed",
            remedy=f"install it with: pip install 'edge-vlm[{extra}]'",
        )
        error.library, error.extra = library, extra
        return error

    def widened(self, extra: str) -> MissingExtraError:
        """The same for something that needs all of `extra`: one installation, not several."""
        growing = ("client", "serve", "ort")  # each holds the one before
        if self.library is None or self.extra not in growing or extra not in growing:
            return self
        wider = max(self.extra, extra, key=growing.index)
        return MissingExtraError.for_library(self.library, wider)


class SessionError(EdgeVlmError):
    code = "E-SESSION"
    exit_code = 10


class NoFrameYet(SessionError):
    code = "E-NO-FRAME"


class NoQuestion(SessionError):
    code = "E-NO-QUESTION"


class QuestionCancelled(SessionError):
    code = "E-CANCELLED"


class QuestionTooLong(SessionError):
    code = "E-QUESTION-TOO-LONG"


class TooManyQuestions(SessionError):
    code = "E-TOO-MANY-QUESTIONS"


class UnknownAlert(SessionError):
    code = "E-UNKNOWN-ALERT"


class TooManyAlerts(SessionError):
    code = "E-TOO-MANY-ALERTS"


class AlertsUnsupported(SessionError):
    code = "E-ALERTS-UNSUPPORTED"


class SnapshotsUnsupported(SessionError):
    code = "E-NO-SNAPSHOTS"


class SnapshotTooLarge(SessionError):
    code = "E-SNAPSHOT-ROOM"


class SessionGone(SessionError):
    code = "E-SESSION-GONE"


class UnknownStream(SessionGone):
    code = "E-UNKNOWN-STREAM"


class NotForSubscribers(SessionError):
    code = "E-SUBSCRIBER"


class ReplayLost(SessionError):
    code = "E-REPLAY-LOST"


class ClipTooLong(SessionError):
    code = "E-CLIP-TOO-LONG"


class KvFull(SessionError):
    code = "E-KV-FULL"


class PositionsUsedUp(SessionError):
    code = "E-POSITIONS"


class EngineError(EdgeVlmError):
    code = "E-ENGINE"
    exit_code = 11


class NonFinite(EngineError):
    code = "E-NONFINITE"


class ShapeRange(EngineError):
    code = "E-SHAPE-RANGE"


class TrtMissing(EngineError):
    code = "E-TRT-MISSING-LIB"


class GpuMissing(EngineError):
    code = "E-GPU"


class CudaError(EngineError):
    code = "E-CUDA"


class OnnxUnsupported(EngineError):
    code = "E-ONNX-UNSUPPORTED"


class TrtParse(EngineError):
    code = "E-TRT-PARSE"


class TrtProfile(EngineError):
    code = "E-TRT-PROFILE"


class TrtNoTactic(EngineError):
    code = "E-TRT-NO-TACTIC"


class OutOfDeviceMemory(EngineError):
    code = "E-DEVICE-MEMORY"


class TrtBuildFailed(EngineError):
    code = "E-TRT-BUILD"


class EngineMissing(EngineError):
    code = "E-ENGINE-MISSING"


class EngineStale(EngineError):
    """`differences`: one line for each field in which the engine differs from what is needed."""

    code = "E-ENGINE-STALE"

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        remedy: str | None = None,
        differences: tuple[str, ...] = (),
    ) -> None:
        super().__init__(what, where=where, remedy=remedy)
        self.differences = differences


class DeliveryError(EdgeVlmError):
    code = "E-DELIVERY"
    exit_code = 13


class DeliveryRefused(DeliveryError):
    code = "E-DELIVERY-REFUSED"


class OutputError(EdgeVlmError):
    code = "E-OUTPUT"
    exit_code = 16


class InternalError(EdgeVlmError):
    code = "E-INTERNAL"


class RecordingError(EdgeVlmError):
    code = "E-RECORDING"
    exit_code = 14


class ReplayDiffers(RecordingError):
    code = "E-REPLAY-DIFFERS"


class DataError(EdgeVlmError):
    code = "E-DATA"
    exit_code = 15


class RecordInvalid(DataError):
    """`field`: path of the wrong value inside its record, as `$.annotations[0].count`."""

    code = "E-DATA-RECORD"

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        remedy: str | None = None,
        field: str = "$",
    ) -> None:
        super().__init__(f"{what} - at {field}", where=where, remedy=remedy)
        self.field = field


class RecordTooLong(DataError):
    code = "E-DATA-TOO-LONG"
