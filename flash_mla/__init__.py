from flash_mla.errors import *  # noqa: F403
