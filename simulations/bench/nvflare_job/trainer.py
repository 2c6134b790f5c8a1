"""What a client does in NVFLARE's job: receive the model, add a constant, send it back. Runs in an environment of its own."""

import nvflare.client as flare  # type: ignore[import-not-found]  # not installed beside fedmix
from nvflare.app_common.np.constants import NPConstants  # type: ignore[import-not-found]

ADDED = 1e-4

if __name__ == "__main__":
    flare.init()
    while flare.is_running():
        model = flare.receive()
        if model is None:
            break
        changed = model.params[NPConstants.NUMPY_KEY] + ADDED
        flare.send(flare.FLModel(params={NPConstants.NUMPY_KEY: changed}))
