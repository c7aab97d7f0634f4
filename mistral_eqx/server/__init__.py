from .app import create_app as create_app
from .running import (
    LOOPBACK as LOOPBACK,
    is_loopback as is_loopback,
    listen as listen,
    run as run,
    url as url,
)
