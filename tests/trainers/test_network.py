"""Which network the ranks use, and who is asked for a job."""

import psutil
import pytest

from rlattn.config import ConfigError
from rlattn.trainers.jobs import JobServer
from rlattn.trainers.rank import interface_of


def test_the_interface_is_the_one_that_carries_the_address():
    own = {address.address: name for name, found in psutil.net_if_addrs().items() for address in found}
    for address, name in own.items():
        if address.count(".") == 3 and not address.startswith("127."):
            assert interface_of(address) == name
    assert interface_of("127.0.0.1") is None  # which reaches nobody else
    assert interface_of("203.0.113.7") is None  # not of this machine


def test_a_proxy_in_between_is_named_but_not_its_password(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError) as direct:
        JobServer("http://127.0.0.1:9", "--address")
    assert "proxy" not in str(direct.value)
    monkeypatch.setenv("http_proxy", "http://me:secret@127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"that http_proxy names, NO_PROXY=head\.example asks directly") as asked:
        JobServer("http://head.example:8265", "--address")
    assert "secret" not in str(asked.value)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(ConfigError) as bypassed:
        JobServer("http://127.0.0.1:9", "--address")
    assert "proxy" not in str(bypassed.value)
