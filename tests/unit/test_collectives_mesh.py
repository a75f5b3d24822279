"""A mesh whose neighbours are meshes too, all of them polled here: how many links there may be, and none to spare."""

import errno
import os
import socket

import pytest

from collectives.mesh.addresses import Address, listen
from collectives.mesh.handshake import Party, group_key
from collectives.mesh.mesh import Mesh
from collectives.types import Protection
from protocol.identity import Identity
from tests.waiting import wait_until

pytestmark = pytest.mark.slow


@pytest.fixture
def make():
    made = []

    def make_one():
        identity = Identity.generate()
        party = Party(identity, group_key("test"), os.urandom(8), Protection.ENCRYPTED)
        made.append(Mesh(party, Address.parse("tcp://127.0.0.1:0"), 1, lambda *_: None, lambda _: frozenset()))
        return made[-1], identity.node_id

    yield make_one
    for mesh in made:
        mesh.close(0.0)


def poll(meshes, reached):
    """Let all of them work until something is so."""

    def work():
        for mesh in meshes:
            mesh.poll(0.01)
        return reached()

    wait_until(work, 20)


def settle(own, others):
    """Go on until each of the others is linked, or was turned away."""
    poll((own, *others), lambda: len(own.linked) + own.refused["too_many_strangers"] >= len(others))


def test_those_whom_a_member_dials_are_bounded_as_those_are_who_dial_it(make, monkeypatch):
    monkeypatch.setattr("collectives.mesh.mesh.MAX_STRANGERS_WHO_MAY_JOIN", 2)
    own, node_id = make()
    others = [make()[0] for _ in range(4)]
    own.enter(frozenset([node_id]))
    for other in others:
        own.want(Address.parse(other.address))
    settle(own, others)
    assert len(own.linked) == 2


def test_one_that_there_was_no_link_for_is_dialled_again(make, monkeypatch):
    monkeypatch.setattr("collectives.mesh.mesh.MAX_STRANGERS_WHO_MAY_JOIN", 1)
    own, node_id = make()
    (first, first_id), (second, second_id) = make(), make()
    own.enter(frozenset([node_id]))
    for other in (first, second):
        own.want(Address.parse(other.address))
        poll((own, first, second), lambda: own.linked or own.refused)
    poll((own, first, second), lambda: own.refused["too_many_strangers"] > 0)
    (linked,) = own.linked
    own.drop(linked, "it made way")
    poll((own, first, second), lambda: own.linked == {first_id, second_id} - {linked})


def test_one_outside_has_a_bounded_number_of_links(make, monkeypatch):
    monkeypatch.setattr("collectives.mesh.mesh.MAX_LINKS_OUTSIDE", 2)
    own, _ = make()
    others = [make()[0] for _ in range(4)]
    for other in others:
        other.want(Address.parse(own.address))
    settle(own, others)
    assert len(own.linked) == 2


class Full(socket.socket):
    """A listener of a process that has no descriptor left."""

    tries = 0

    def accept(self):
        self.tries += 1
        raise OSError(errno.EMFILE, "Too many open files")


def test_a_connection_that_no_descriptor_is_left_for_does_not_keep_the_thread_busy(make, monkeypatch):
    made = []

    def listen_in_vain(address):
        sock, where = listen(address)
        made.append(Full(fileno=sock.detach()))
        return made[-1], where

    monkeypatch.setattr("collectives.mesh.mesh.listen", listen_in_vain)
    own, _ = make()
    address = Address.parse(own.address)
    with socket.create_connection((address.host, address.port)):
        for _ in range(1000):
            own.poll(0.0)
        assert 1 <= made[0].tries < 500
        wait_until(lambda: own.poll(0.1) or made[0].tries > 1, 10, "it to be tried again")
