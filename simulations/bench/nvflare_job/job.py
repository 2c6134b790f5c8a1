"""FedAvg over a NumPy array on NVFLARE's simulator. Runs in an environment of its own (../nvflare.py):

python job.py FOLDER NUM_SITES NUM_ROUNDS NUM_VALUES
"""

import sys
from pathlib import Path

import numpy as np
from nvflare.app_common.np.recipes.fedavg import NumpyFedAvgRecipe  # type: ignore[import-not-found]
from nvflare.recipe import SimEnv  # type: ignore[import-not-found]
from trainer import ADDED  # type: ignore[import-not-found]  # this folder is the path of the other Python

TRAINER = Path(__file__).with_name("trainer.py")


def run(folder: Path, num_sites: int, num_rounds: int, num_values: int) -> None:
    """Train, in a workspace below the folder, and check the model that came out."""
    start = folder / "start.npy"
    np.save(start, np.zeros(num_values, np.float32))
    recipe = NumpyFedAvgRecipe(
        name="bench", initial_ckpt=str(start), min_clients=num_sites, num_rounds=num_rounds, train_script=str(TRAINER)
    )
    recipe.execute(SimEnv(num_clients=num_sites, workspace_root=str(folder / "workspace")))
    (model,) = (folder / "workspace").rglob("server.npy")
    if not np.allclose(np.load(model), num_rounds * ADDED, atol=ADDED / 100):
        sys.exit(f"the model is not what {num_rounds} rounds make of it")


if __name__ == "__main__":
    run(Path(sys.argv[1]), *map(int, sys.argv[2:5]))
