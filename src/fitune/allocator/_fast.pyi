import numpy as np
import numpy.typing as npt

def replay(
    storage: npt.NDArray[np.int64],
    requested: npt.NDArray[np.int64],
    *,
    allocated_changes: npt.NDArray[np.int64],
    reserved_bytes: npt.NDArray[np.int64],
    is_retried: npt.NDArray[np.bool_],
    num_storages: int,
    limit: int,
) -> int: ...
