"""Which network the ranks use."""

import psutil

from rlattn.trainers.rank import interface_of


def test_the_interface_is_the_one_that_carries_the_address():
    own = {address.address: name for name, found in psutil.net_if_addrs().items() for address in found}
    for address, name in own.items():
        if address.count(".") == 3 and not address.startswith("127."):
            assert interface_of(address) == name
    assert interface_of("127.0.0.1") is None  # which reaches nobody else
    assert interface_of("203.0.113.7") is None  # not of this machine
