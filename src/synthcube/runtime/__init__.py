"""The process a run happens in: seeds, caches, memory, libraries, logging, versions.

The only room that reads the environment (ruff's TID251 watches over it).
"""

from synthcube.runtime.folders import cache_folder, keep_caches_private
from synthcube.runtime.hub import PUBLIC_HUB, is_offline, ready_hub, uses_xet
from synthcube.runtime.libraries import (
    calm_threads,
    fix_cublas,
    import_monai,
    keep_conversions_local,
    keep_loggers_local,
    keep_out_current_folder,
    name_user,
    quiet_lightning,
)
from synthcube.runtime.machine import free_memory, num_cores, resident_bytes, workers_that_fit
from synthcube.runtime.messages import is_terminal, open_log, told
from synthcube.runtime.processes import launched_processes, local_rank, process_rank
from synthcube.runtime.record import environment_record, versions
from synthcube.runtime.seeds import derived_seed

__all__ = [
    "PUBLIC_HUB", "cache_folder", "calm_threads", "derived_seed", "environment_record",
    "fix_cublas", "free_memory", "import_monai", "is_offline", "is_terminal",
    "keep_caches_private", "keep_conversions_local", "keep_loggers_local",
    "keep_out_current_folder", "launched_processes",
    "local_rank", "name_user", "num_cores", "open_log", "process_rank", "quiet_lightning",
    "ready_hub", "resident_bytes", "told", "uses_xet", "versions", "workers_that_fit",
]  # fmt: skip
