import signal
import time

import pytest
import torch
from hypothesis import settings

# A shell that runs tests in the background has them ignore Ctrl-C, and so would every program that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)


# A busy machine makes an example slow now and then; pytest-timeout ends those that hang.
settings.register_profile("fedmix", deadline=None)
settings.load_profile("fedmix")

LONGEST = ("test_chaos.py", "test_hospitals.py")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--renew-golden", action="store_true", help="write tests/golden/loss_curve.json anew")
    parser.addoption("--begin-until", type=float, metavar="UNIX_TIME", help="skip e2e tests that would begin later")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take minutes first: side by side with all the others they end together."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_runtest_setup(item: pytest.Item) -> None:
    until = item.config.getoption("--begin-until")
    if until and time.time() > until and item.get_closest_marker("e2e"):
        pytest.skip("no time is left for it here; `make test-systems` without UNTIL takes the time it needs")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tests share their cores with other work, and tiny tensors are slower on two threads than on one."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_chance() -> None:
    """Numbers drawn without a generator are the same whichever tests ran before."""
    torch.manual_seed(0)
