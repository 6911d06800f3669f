"""What is wrong with an HTTP request: the branch E-REQUEST of the tree in `edge_vlm.errors`."""

from __future__ import annotations

from edge_vlm.errors import ProtocolError


class RequestError(ProtocolError):
    """`param`: path of the field that is wrong, as `messages[0].content[1]`; None for all of it."""

    code = "E-REQUEST"

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        remedy: str | None = None,
        param: str | None = None,
    ) -> None:
        super().__init__(what, where=where, remedy=remedy)
        self.param = param


class Unsupported(RequestError):
    code = "E-UNSUPPORTED"


class ModelNotFound(RequestError):
    code = "E-MODEL"
    close_code = 1008


class MediaRefused(RequestError):
    code = "E-MEDIA"


class AnswerFormError(RequestError):
    code = "E-ANSWER-FORM"


class NoSuchPath(RequestError):
    code = "E-NOT-FOUND"


class MethodNotAllowed(RequestError):
    code = "E-METHOD"
