"""Ask a role of this container whether it is well: `healthy.py PORT`; exit code 0 when `/healthz` answers 200, else 1.

In: the port of the role's metrics. Out: an exit code, as a container's health check wants it.
"""

import sys
from http.client import HTTPConnection, HTTPException


def healthy(port: int) -> bool:
    """Say whether the role that listens on `port` says that it is well."""
    connection = HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(not healthy(int(sys.argv[1])))
