"""Say which redis-server embedded runs will use; fail the set-up when there is none."""

from __future__ import annotations

import sys

from avatar_rl.buffer_service.redis.server import find_redis_server
from avatar_rl.common.errors import AvatarError

if __name__ == "__main__":
    try:
        print(f"  redis-server: {find_redis_server()}")
    except AvatarError as error:
        sys.exit(str(error))
