import signal

import pytest
import torch
from hypothesis import settings

# A shell that runs tests in the background has them ignore Ctrl-C, and so would every program that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)


# A busy machine makes an example slow now and then; pytest-timeout ends those that hang.
settings.register_profile("fedmix", deadline=None)
settings.load_profile("fedmix")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--renew-golden", action="store_true", help="write tests/golden/loss_curve.json anew")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tests share their cores with other work, and tiny tensors are slower on two threads than on one."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_chance() -> None:
    """Numbers drawn without a generator are the same whichever tests ran before."""
    torch.manual_seed(0)
