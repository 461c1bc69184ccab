# mypy: ignore-errors
# sha256 of picker.proto: 3dcbb3d93f7690859eb744c5ab9a1797c36babe245ee7f4991bf1d14a5219e61
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Explain(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    EXPLAIN_UNSPECIFIED: _ClassVar[Explain]
    EXPLAIN_CHOSEN: _ClassVar[Explain]
    EXPLAIN_ALL: _ClassVar[Explain]
    EXPLAIN_NONE: _ClassVar[Explain]

class FailureReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FAILURE_REASON_UNSPECIFIED: _ClassVar[FailureReason]
    FAILURE_REASON_CLIENT_GONE: _ClassVar[FailureReason]
    FAILURE_REASON_CONNECT: _ClassVar[FailureReason]
    FAILURE_REASON_RESET: _ClassVar[FailureReason]
    FAILURE_REASON_TIMEOUT: _ClassVar[FailureReason]
    FAILURE_REASON_TRUNCATED: _ClassVar[FailureReason]
EXPLAIN_UNSPECIFIED: Explain
EXPLAIN_CHOSEN: Explain
EXPLAIN_ALL: Explain
EXPLAIN_NONE: Explain
FAILURE_REASON_UNSPECIFIED: FailureReason
FAILURE_REASON_CLIENT_GONE: FailureReason
FAILURE_REASON_CONNECT: FailureReason
FAILURE_REASON_RESET: FailureReason
FAILURE_REASON_TIMEOUT: FailureReason
FAILURE_REASON_TRUNCATED: FailureReason

class PickRequest(_message.Message):
    __slots__ = ("http", "features", "subset", "exclude", "reporter", "reports_first_token", "explain")
    HTTP_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    SUBSET_FIELD_NUMBER: _ClassVar[int]
    EXCLUDE_FIELD_NUMBER: _ClassVar[int]
    REPORTER_FIELD_NUMBER: _ClassVar[int]
    REPORTS_FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    EXPLAIN_FIELD_NUMBER: _ClassVar[int]
    http: HttpRequest
    features: Features
    subset: _containers.RepeatedScalarFieldContainer[str]
    exclude: _containers.RepeatedScalarFieldContainer[str]
    reporter: str
    reports_first_token: bool
    explain: Explain
    def __init__(self, http: _Optional[_Union[HttpRequest, _Mapping]] = ..., features: _Optional[_Union[Features, _Mapping]] = ..., subset: _Optional[_Iterable[str]] = ..., exclude: _Optional[_Iterable[str]] = ..., reporter: _Optional[str] = ..., reports_first_token: bool = ..., explain: _Optional[_Union[Explain, str]] = ...) -> None: ...

class HttpRequest(_message.Message):
    __slots__ = ("path", "body", "headers")
    class HeadersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    PATH_FIELD_NUMBER: _ClassVar[int]
    BODY_FIELD_NUMBER: _ClassVar[int]
    HEADERS_FIELD_NUMBER: _ClassVar[int]
    path: str
    body: bytes
    headers: _containers.ScalarMap[str, str]
    def __init__(self, path: _Optional[str] = ..., body: _Optional[bytes] = ..., headers: _Optional[_Mapping[str, str]] = ...) -> None: ...

class Features(_message.Message):
    __slots__ = ("model", "blocks", "prompt", "prompt_bytes", "prompt_tokens", "max_tokens", "priority", "session", "cache_salt", "headers")
    class HeadersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    MODEL_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_BYTES_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    HEADERS_FIELD_NUMBER: _ClassVar[int]
    model: str
    blocks: BlockHashes
    prompt: bytes
    prompt_bytes: int
    prompt_tokens: int
    max_tokens: int
    priority: int
    session: str
    cache_salt: str
    headers: _containers.ScalarMap[str, str]
    def __init__(self, model: _Optional[str] = ..., blocks: _Optional[_Union[BlockHashes, _Mapping]] = ..., prompt: _Optional[bytes] = ..., prompt_bytes: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., max_tokens: _Optional[int] = ..., priority: _Optional[int] = ..., session: _Optional[str] = ..., cache_salt: _Optional[str] = ..., headers: _Optional[_Mapping[str, str]] = ...) -> None: ...

class BlockHashes(_message.Message):
    __slots__ = ("hashes", "block_tokens", "block_bytes")
    HASHES_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    hashes: _containers.RepeatedScalarFieldContainer[int]
    block_tokens: int
    block_bytes: int
    def __init__(self, hashes: _Optional[_Iterable[int]] = ..., block_tokens: _Optional[int] = ..., block_bytes: _Optional[int] = ...) -> None: ...

class PickResponse(_message.Message):
    __slots__ = ("picked", "refusal")
    PICKED_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    picked: Picked
    refusal: Refusal
    def __init__(self, picked: _Optional[_Union[Picked, _Mapping]] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ...) -> None: ...

class Picked(_message.Message):
    __slots__ = ("id", "endpoint", "fallbacks", "set_headers", "matched_blocks", "total_blocks", "matched_tokens", "prompt_tokens", "waited_s", "candidates", "charged", "rewrite")
    class SetHeadersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    ID_FIELD_NUMBER: _ClassVar[int]
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    FALLBACKS_FIELD_NUMBER: _ClassVar[int]
    SET_HEADERS_FIELD_NUMBER: _ClassVar[int]
    MATCHED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    MATCHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    WAITED_S_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    CHARGED_FIELD_NUMBER: _ClassVar[int]
    REWRITE_FIELD_NUMBER: _ClassVar[int]
    id: str
    endpoint: Endpoint
    fallbacks: _containers.RepeatedCompositeFieldContainer[Endpoint]
    set_headers: _containers.ScalarMap[str, str]
    matched_blocks: int
    total_blocks: int
    matched_tokens: float
    prompt_tokens: float
    waited_s: float
    candidates: _containers.RepeatedCompositeFieldContainer[Candidate]
    charged: bool
    rewrite: Rewrite
    def __init__(self, id: _Optional[str] = ..., endpoint: _Optional[_Union[Endpoint, _Mapping]] = ..., fallbacks: _Optional[_Iterable[_Union[Endpoint, _Mapping]]] = ..., set_headers: _Optional[_Mapping[str, str]] = ..., matched_blocks: _Optional[int] = ..., total_blocks: _Optional[int] = ..., matched_tokens: _Optional[float] = ..., prompt_tokens: _Optional[float] = ..., waited_s: _Optional[float] = ..., candidates: _Optional[_Iterable[_Union[Candidate, _Mapping]]] = ..., charged: bool = ..., rewrite: _Optional[_Union[Rewrite, _Mapping]] = ...) -> None: ...

class Rewrite(_message.Message):
    __slots__ = ("model", "begin", "end", "data")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    model: str
    begin: int
    end: int
    data: bytes
    def __init__(self, model: _Optional[str] = ..., begin: _Optional[int] = ..., end: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class Endpoint(_message.Message):
    __slots__ = ("name", "address", "scheme", "rank")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    SCHEME_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    name: str
    address: str
    scheme: str
    rank: int
    def __init__(self, name: _Optional[str] = ..., address: _Optional[str] = ..., scheme: _Optional[str] = ..., rank: _Optional[int] = ...) -> None: ...

class Candidate(_message.Message):
    __slots__ = ("endpoint", "total", "parts")
    class PartsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    endpoint: str
    total: float
    parts: _containers.ScalarMap[str, float]
    def __init__(self, endpoint: _Optional[str] = ..., total: _Optional[float] = ..., parts: _Optional[_Mapping[str, float]] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("status", "reason", "message", "retry_after_s", "headers", "body")
    class HeadersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    STATUS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    HEADERS_FIELD_NUMBER: _ClassVar[int]
    BODY_FIELD_NUMBER: _ClassVar[int]
    status: int
    reason: str
    message: str
    retry_after_s: float
    headers: _containers.ScalarMap[str, str]
    body: bytes
    def __init__(self, status: _Optional[int] = ..., reason: _Optional[str] = ..., message: _Optional[str] = ..., retry_after_s: _Optional[float] = ..., headers: _Optional[_Mapping[str, str]] = ..., body: _Optional[bytes] = ...) -> None: ...

class Outcome(_message.Message):
    __slots__ = ("pick_id", "hello", "started", "first_token", "finished", "failed")
    PICK_ID_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    STARTED_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    pick_id: str
    hello: Hello
    started: Started
    first_token: FirstToken
    finished: Finished
    failed: Failed
    def __init__(self, pick_id: _Optional[str] = ..., hello: _Optional[_Union[Hello, _Mapping]] = ..., started: _Optional[_Union[Started, _Mapping]] = ..., first_token: _Optional[_Union[FirstToken, _Mapping]] = ..., finished: _Optional[_Union[Finished, _Mapping]] = ..., failed: _Optional[_Union[Failed, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("reporter",)
    REPORTER_FIELD_NUMBER: _ClassVar[int]
    reporter: str
    def __init__(self, reporter: _Optional[str] = ...) -> None: ...

class Started(_message.Message):
    __slots__ = ("status", "endpoint")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    status: int
    endpoint: str
    def __init__(self, status: _Optional[int] = ..., endpoint: _Optional[str] = ...) -> None: ...

class FirstToken(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Finished(_message.Message):
    __slots__ = ("status", "usage")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    status: int
    usage: Usage
    def __init__(self, status: _Optional[int] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("prompt_tokens", "completion_tokens", "cached_tokens")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    def __init__(self, prompt_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class Failed(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: FailureReason
    def __init__(self, reason: _Optional[_Union[FailureReason, str]] = ...) -> None: ...

class ReportSummary(_message.Message):
    __slots__ = ("heard", "unknown")
    HEARD_FIELD_NUMBER: _ClassVar[int]
    UNKNOWN_FIELD_NUMBER: _ClassVar[int]
    heard: int
    unknown: int
    def __init__(self, heard: _Optional[int] = ..., unknown: _Optional[int] = ...) -> None: ...

class WatchEndpointsRequest(_message.Message):
    __slots__ = ("interval_ms",)
    INTERVAL_MS_FIELD_NUMBER: _ClassVar[int]
    interval_ms: int
    def __init__(self, interval_ms: _Optional[int] = ...) -> None: ...

class EndpointsUpdate(_message.Message):
    __slots__ = ("snapshot", "changed", "removed")
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    CHANGED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    snapshot: bool
    changed: _containers.RepeatedCompositeFieldContainer[EndpointState]
    removed: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, snapshot: bool = ..., changed: _Optional[_Iterable[_Union[EndpointState, _Mapping]]] = ..., removed: _Optional[_Iterable[str]] = ...) -> None: ...

class EndpointState(_message.Message):
    __slots__ = ("endpoint", "models", "role", "healthy", "draining", "resting", "inflight_requests", "backlog_tokens", "waiting", "running", "kv_usage", "kv_capacity_tokens", "labels")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    HEALTHY_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    RESTING_FIELD_NUMBER: _ClassVar[int]
    INFLIGHT_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    BACKLOG_TOKENS_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    KV_USAGE_FIELD_NUMBER: _ClassVar[int]
    KV_CAPACITY_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    endpoint: Endpoint
    models: _containers.RepeatedScalarFieldContainer[str]
    role: str
    healthy: bool
    draining: bool
    resting: bool
    inflight_requests: int
    backlog_tokens: int
    waiting: float
    running: float
    kv_usage: float
    kv_capacity_tokens: float
    labels: _containers.ScalarMap[str, str]
    def __init__(self, endpoint: _Optional[_Union[Endpoint, _Mapping]] = ..., models: _Optional[_Iterable[str]] = ..., role: _Optional[str] = ..., healthy: bool = ..., draining: bool = ..., resting: bool = ..., inflight_requests: _Optional[int] = ..., backlog_tokens: _Optional[int] = ..., waiting: _Optional[float] = ..., running: _Optional[float] = ..., kv_usage: _Optional[float] = ..., kv_capacity_tokens: _Optional[float] = ..., labels: _Optional[_Mapping[str, str]] = ...) -> None: ...
