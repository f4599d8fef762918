"""Two faults of the `cyclonedds` wheel (11.0.1), mended where it turns a C description of an endpoint into Python.

It reads every policy into variables that all threads share, and lets other threads run between reading and looking. A
process whose threads look at endpoints at the same moment (a dispatcher, a service call) got user data without a type
hash, or of another's length: read beyond its end, that kills the process. And of the copy of the user data that Cyclone
hands out it frees nothing: 96 bytes for every look at an endpoint.

Not mended, since its lock is out of reach: making a topic walks Cyclone's table of types while Cyclone's own threads
may change it. A process that made a node within milliseconds of closing another on the same domain, a hundred times a
second on a busy host, died of it, or was refused a topic with BAD_PARAMETER, once in some 1500 times. So make a node's
topics once, when it starts.
"""

import ctypes
import functools
import threading
from typing import Any

_one_at_a_time = threading.RLock()


@functools.cache
def mend() -> None:
    """Mend the wheel for this process; before its first participant."""
    from cyclonedds.core import Policy
    from cyclonedds.qos import _CQos

    convert = _CQos.cqos_to_qos

    def cqos_to_qos(_: Any, description: Any) -> Any:
        with _one_at_a_time:
            return convert(description)

    def user_data(cls: Any, description: Any) -> Any:
        value, size = ctypes.c_void_p(), ctypes.c_size_t()
        if not cls._get_userdata(description, ctypes.byref(value), ctypes.byref(size)) or not value:
            return None
        try:
            return Policy.Userdata(ctypes.string_at(value, size.value)) if size.value else None
        finally:
            cls.free(value)

    _CQos.cqos_to_qos = classmethod(cqos_to_qos)  # type: ignore[assignment]
    _CQos._get_p_userdata = classmethod(user_data)  # type: ignore[assignment]
